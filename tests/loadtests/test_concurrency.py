"""The Locust file of fixed concurrencies: what it measures, and its messages if it cannot."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest

from loadtests.measure import samples
from loadtests.measure.samples import Cell, Request
from tests.support.locusts import RunLocust, locust_process, master_port
from tests.support.servers import WHOLE, always, scripted, unused_url
from tests.support.waiting import wait_until

pytestmark = pytest.mark.integration  # programs of their own

#: Quick and exact enough: what is measured is checked elsewhere (test_selfcheck).
QUICK = ["--ttft-s", "0.05", "--gap-s", "0.005", "--tokens", "8"]


@pytest.fixture(scope="module")
def known() -> Iterator[str]:
    """The URL of a server of known times."""
    with subprocess.Popen(
        [sys.executable, "-m", "loadtests.proof.known", "--port", "0", *QUICK],
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return tmp_path / "raw.jsonl"


def by_cell(raw: Path) -> list[tuple[Cell, list[Request]]]:
    return samples.by_cell(samples.read(raw))


def test_every_level_has_its_users_and_every_user_all_rounds(
    locust: RunLocust, known: str, raw: Path
) -> None:
    done = locust(
        "concurrency", "--target", f"a={known}=known", "--levels", "1,3", "--rounds", 2,
        "--repetitions", 2, "--cooldown-s", 0, "--tokens-out", 8, "--raw", raw,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    cells = by_cell(raw)
    assert [(cell.level, cell.repetition) for cell, _ in cells] == [(1, 1), (3, 1), (1, 2), (3, 2)]
    for cell, requests in cells:
        phases = Counter((one.user, one.phase) for one in requests)
        users = {one.user for one in requests}
        assert (cell.outcome, len(users)) == ("complete", cell.level)
        assert all(phases[user, "warm-up"] == 1 for user in users)
        assert all(phases[user, "measured"] == 2 for user in users)
        measured = [one for one in requests if one.phase == "measured"]
        assert cell.began == min(one.start for one in measured)
        assert [one.error for one in measured] == [None] * len(measured)
        assert {one.tokens_out for one in measured} == {8}


def test_even_repetitions_reverse_the_targets(locust: RunLocust, known: str, raw: Path) -> None:
    locust(
        "concurrency", "--target", f"a={known}=known", "--target", f"b={known}=known",
        "--levels", "1", "--rounds", 1, "--repetitions", 2, "--cooldown-s", 0, "--raw", raw,
    )  # fmt: skip

    assert [cell.target for cell, _ in by_cell(raw)] == ["a", "b", "b", "a"]


def test_locusts_own_tables_have_ttft_and_e2e_of_their_own(
    locust: RunLocust, known: str, raw: Path
) -> None:
    done = locust(
        "concurrency", "--host", known, "--levels", "2", "--rounds", 1, "--raw", raw
    )  # fmt: skip

    rows = [line.split() for line in done.stderr.splitlines() if "host, 2 concurrent" in line]
    assert sorted({row[0] for row in rows}) == ["E2E", "TTFT"]
    assert rows[0][4] == "2"  # the measured ones, and no more


def test_users_of_several_processes_are_complete_and_have_distinct_numbers(
    locust: RunLocust, known: str, raw: Path
) -> None:
    done = locust(
        "concurrency", "--host", known, "--levels", "4", "--rounds", 2, "--processes", 2,
        "--raw", raw,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    ((cell, requests),) = by_cell(raw)
    measured = Counter(one.user for one in requests if one.phase == "measured")
    assert cell.outcome == "complete"
    assert sorted(measured.values()) == [2, 2, 2, 2]
    assert len({user // 10_000 for user in measured}) == 2


def test_a_number_of_users_and_a_run_time_work_as_in_any_locust_file(
    locust: RunLocust, known: str, raw: Path
) -> None:
    done = locust("concurrency", "--host", known, "-u", 3, "-t", "4s", "--raw", raw)

    assert done.returncode == 0, done.stderr
    ((cell, requests),) = by_cell(raw)
    assert (cell.level, cell.outcome) == (3, "complete")
    assert len([one for one in requests if one.phase == "measured"]) > 3


def test_in_an_open_loop_requests_arrive_however_many_wait(
    locust: RunLocust, known: str, raw: Path
) -> None:
    done = locust(
        "concurrency", "--host", known, "--rate", "20", "--arrivals", 30, "--raw", raw
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    ((cell, requests),) = by_cell(raw)
    measured = [one for one in requests if one.phase == "measured"]
    assert (cell.loop, cell.level, cell.outcome, len(measured)) == ("open", 20, "complete", 30)
    assert 10 < len(measured) / (cell.ended - cell.began) < 40


@pytest.mark.parametrize("file", ["concurrency", "chat"])
def test_help_lists_the_options_of_the_file(file: str) -> None:
    said = subprocess.run(
        [sys.executable, "-m", f"loadtests.{file}", "--help"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip

    for option in ("--tokens-out", "--model", "--raw", "--headless"):
        assert option in said


def test_the_first_line_has_the_options_of_the_run(
    locust: RunLocust, known: str, raw: Path
) -> None:
    locust("concurrency", "--host", known, "--levels", "1", "--warm-up", 0, "--rounds", 1,
           "--raw", raw)  # fmt: skip

    first = next(iter(samples.read(raw)))
    assert isinstance(first, samples.Run)
    asked = {name: first.options.get(name) for name in ("host", "levels", "warm_up", "rounds")}
    assert asked == {"host": known, "levels": "1", "warm_up": 0, "rounds": "1"}


def test_the_key_is_sent_and_written_nowhere(locust: RunLocust, raw: Path) -> None:
    with scripted(always(*WHOLE)) as server:
        done = locust(
            "concurrency", "--host", server.url, "--model", "m", "--levels", "1", "--rounds", 1,
            "--api-k", "sk-secret", "--raw", raw,
        )  # fmt: skip
        headers = {headers["authorization"] for headers, _ in server.received}

    assert headers == {"Bearer sk-secret"}
    assert "sk-secret" not in raw.read_text() + done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "no target"),
        (["--target", "x"], "LABEL=URL=MODEL"),
        (["--target", "a=http://a=m", "--target", "a=http://b=m"], "label of its own"),
        (["--host", "http://a", "--model", "m", "--levels", "0"], "--levels 0"),
        (["--host", "http://a", "--model", "m", "--levels", "10000"], "from 1 to 1024"),
        (["--host", "http://a", "--model", "m", "-u", "10000"], "-u 10000"),
        (["--host", "http://a", "--model", "m", "-u", "0"], "-u 0"),
        (["--host", "http://a", "--model", "m", "--processes", "2", "--levels", "0"], "--levels 0"),
        (["--host", "http://a", "--model", "m", "--levels", "a"], "--levels a"),
        (["--host", "http://a", "--model", "m", "--levels", "1.5"], "whole numbers"),
        (["--host", "http://a", "--model", "m", "--rate", "-1"], "--rate -1"),
        (["--host", "http://a", "--model", "m", "--rounds", "0"], "--rounds 0"),
        (["--host", "http://a", "--model", "m", "--tokens-out", "0"], "--tokens-out 0"),
        (["--host", "http://a", "--model", "m", "--prompts", "no-such"], "no-such cannot be read"),
    ],
)
def test_invalid_options_are_refused_in_one_line_before_any_request(
    locust: RunLocust, arguments: list[str], why: str
) -> None:
    done = locust("concurrency", *arguments)

    said = done.stderr.splitlines()
    assert done.returncode == 2
    assert len(said) == 1
    assert said[0].startswith("twolane: ")
    assert why in said[0]


@pytest.mark.parametrize(
    ("status", "message", "hint"),
    [
        (404, "no such model", "does it list the model m?"),
        (401, "wrong key", "--api-key"),
        (500, "on fire", "see its log"),
    ],
)
def test_a_target_that_refuses_its_first_request_is_named_with_a_hint(
    locust: RunLocust, raw: Path, status: int, message: str, hint: str
) -> None:
    with scripted(lambda _: (status, {"error": {"message": message}})) as server:
        done = locust("concurrency", "--host", server.url, "--model", "m", "--raw", raw)

    assert done.returncode == 2
    assert f"({status}: {message})" in done.stderr
    assert hint in done.stderr


def test_a_target_that_is_not_running_is_named(locust: RunLocust, raw: Path) -> None:
    url = unused_url()

    done = locust("concurrency", "--target", f"dead={url}=m", "--raw", raw)

    assert done.returncode == 2
    assert f"dead at {url}" in done.stderr
    assert "is it running" in done.stderr


def test_a_target_that_dies_is_given_up_and_the_other_is_measured(
    locust: RunLocust, known: str, raw: Path
) -> None:
    refused = (503, {"error": {"message": "dead"}})
    with scripted(lambda number: (200, WHOLE) if number <= 1 else refused) as server:
        done = locust(
            "concurrency", "--target", f"dies={server.url}=m", "--target", f"lives={known}=known",
            "--levels", "2", "--rounds", 4, "--cooldown-s", 0, "--raw", raw,
        )  # fmt: skip

    assert done.returncode == 0, done.stderr
    (dead, requests), (alive, _) = by_cell(raw)
    assert dead.outcome == "every request failed: 503: dead"
    assert {one.error for one in requests} <= {"503: dead", "cut"}
    assert (alive.target, alive.outcome) == ("lives", "complete")


def test_single_failures_are_counted_and_stop_nothing(locust: RunLocust, raw: Path) -> None:
    with scripted(lambda n: (200, WHOLE) if n % 3 else (500, {"error": "once"})) as server:
        locust(
            "concurrency", "--host", server.url, "--model", "m", "--levels", "1", "--rounds", 6,
            "--raw", raw,
        )  # fmt: skip

    ((cell, requests),) = by_cell(raw)
    errors = [one.error for one in requests if one.phase == "measured"]
    assert cell.outcome == "complete"
    assert (len(errors), errors.count("500: once")) == (6, 2)


def test_a_full_disk_ends_the_run_with_a_message(locust: RunLocust, known: str) -> None:
    done = locust("concurrency", "--host", known, "--levels", "1", "--raw", "/dev/full")

    assert done.returncode == 2
    assert "No space left on device" in done.stderr


def test_a_disk_that_becomes_full_ends_the_run_and_keeps_its_lines(known: str, raw: Path) -> None:
    def little_space() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (32768, 32768))

    done = locust_process("concurrency", "--host", known, "-u", 4, "-t", "20s", "--raw", raw,
                  preexec_fn=little_space)  # fmt: skip

    assert done.returncode == 2
    assert done.stderr.count("twolane: ") == 1
    assert "cannot be written: File too large" in done.stderr
    assert len(samples.requests(samples.read(raw))) > 10


def test_locusts_page_has_our_options_but_shows_no_key(
    page: httpx.Client, known: str, tmp_path: Path
) -> None:
    form = page.get("/").text
    whom = {"first": "", "second": f"a={known}=known b={known}=known"}
    for name, target in whom.items():  # two starts, each into a file of its own
        raw = tmp_path / name
        asked = {"host": known, "target": target, "levels": "2", "rounds": "1", "raw": str(raw)}
        page.post("/swarm", data=asked).raise_for_status()
        wait_until(partial(has_a_cell, raw))
        wait_until(lambda: page.get("/stats/requests").json()["state"] == "stopped")

    assert "tokens_out" in form
    assert "sk-secret" not in form
    cells = [
        (cell.target, cell.outcome, len([one for one in requests if one.phase == "measured"]))
        for name in whom
        for cell, requests in by_cell(tmp_path / name)
    ]
    assert cells == [("host", "complete", 2), ("a", "complete", 2), ("b", "complete", 2)]


@pytest.fixture
def page() -> Iterator[httpx.Client]:
    """A client of Locust's page; the environment has a key."""
    url = unused_url()
    port = url.rpartition(":")[2]
    command = [sys.executable, "-m", "locust", "-f", "loadtests/concurrency.py",
               "--web-host", "127.0.0.1", "--web-port", port]  # fmt: skip
    environment = {**os.environ, "OPENAI_API_KEY": "sk-secret"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as running:
        try:
            wait_until(lambda: listens(int(port)))
            with httpx.Client(base_url=url, trust_env=False) as client:
                yield client
        finally:
            running.terminate()


def listens(port: int) -> bool:
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


def has_a_cell(raw: Path) -> bool:
    return raw.exists() and b'"type":"cell"' in raw.read_bytes()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("processes", [[], ["--processes", "2"]])
def test_an_interrupted_run_keeps_its_lines(
    known: str, raw: Path, sent: signal.Signals, processes: list[str]
) -> None:
    command = [sys.executable, "-m", "locust", "-f", "loadtests/concurrency.py", "--headless",
               "--host", known, "--levels", "2", "--rounds", "1000", "--raw", str(raw),
               *master_port(), *processes]  # fmt: skip
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads
    ) as running:
        wait_until(lambda: raw.exists() and raw.read_text().count("\n") > 9)
        running.send_signal(sent)
        running.wait(30)

    ((cell, requests),) = by_cell(raw)
    assert cell.outcome == "interrupted"
    assert len(requests) > 5
