"""The Locust file of a chatting team: growing chats, think times and disconnects."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from loadtests.measure import samples
from tests.support.locusts import RunLocust
from tests.support.servers import WHOLE, always, scripted

pytestmark = pytest.mark.integration  # programs of their own


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return tmp_path / "chat.jsonl"


def test_every_question_carries_the_conversation_so_far(locust: RunLocust, raw: Path) -> None:
    with scripted(always(*WHOLE)) as server:
        done = locust(
            "chat", "--host", server.url, "-u", 2, "-t", "4s", "--think-s", 0.05, "--turns", 3,
            "--hang-up", 0, "--raw", raw,
        )  # fmt: skip
        chats = [body["messages"] for _, body in server.received[1:]]

    assert done.returncode == 0, done.stderr
    longest = max(chats, key=len)
    roles = [message["role"] for message in longest]
    assert roles[:4] == ["system", "user", "assistant", "user"]
    assert {m["content"] for m in longest if m["role"] == "assistant"} == {"abc"}
    asked = samples.requests(samples.read(raw))
    assert {(one.loop, one.level, one.target) for one in asked} == {("chat", 2, "host")}
    assert len({one.user for one in asked}) == 2


def test_users_of_several_processes_write_into_one_file(locust: RunLocust, raw: Path) -> None:
    with scripted(always(*WHOLE)) as server:
        done = locust(
            "chat", "--host", server.url, "-u", 4, "-r", 4, "-t", "4s", "--think-s", 0.2,
            "--processes", 2, "--raw", raw,
        )  # fmt: skip

    assert done.returncode == 0, done.stderr
    first, *requests = samples.read(raw)
    assert isinstance(first, samples.Run)
    assert {one.level for one in requests if isinstance(one, samples.Request)} == {4}
    assert {one.user // 10_000 for one in requests if isinstance(one, samples.Request)} == {0, 1}


def test_nothing_is_measured_before_all_users_have_started(locust: RunLocust, raw: Path) -> None:
    with scripted(always(*WHOLE)) as server:
        locust(
            "chat", "--host", server.url, "-u", 3, "-t", "5s", "--think-s", 0.05, "--hang-up", 0,
            "--raw", raw,
        )  # fmt: skip

    phases = [one.phase for one in samples.requests(samples.read(raw))]
    assert phases == sorted(phases, key=["warm-up", "measured"].index)
    assert set(phases) == {"warm-up", "measured"}


def test_a_users_disconnect_is_no_failure_of_the_server(locust: RunLocust, raw: Path) -> None:
    with scripted(lambda number: (200, WHOLE) if number < 2 else _hang()) as server:
        done = locust(
            "chat", "--host", server.url, "-u", 1, "-t", "5s", "--think-s", 0.05, "--hang-up", 1,
            "--patience-s", 0.2, "--raw", raw,
        )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert {one.error for one in samples.requests(samples.read(raw))} == {"cut"}


def _hang() -> tuple[int, list[object]]:
    """An answer that takes longer than its reader waits."""
    time.sleep(1.0)
    return 200, WHOLE


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--hang-up", "2"], "from 0 to 1"),
        (["--think-s", "0"], "--think-s 0.0: write a number above zero"),
        (["--tokens-out", "-1"], "--tokens-out -1: it must be at least 1"),
    ],
)
def test_invalid_options_are_refused(locust: RunLocust, arguments: list[str], why: str) -> None:
    done = locust("chat", "--host", "http://127.0.0.1:9", "--model", "m", *arguments)

    assert done.returncode == 2
    assert why in done.stderr
