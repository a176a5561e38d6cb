"""The benchmark itself: its arithmetic, what it must refuse, and one short run of it."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loadtests.bench import fast_client, fast_engine, floors, overhead, script, ways
from loadtests.bench.fast_client import ProcessMeter, Streams
from loadtests.bench.floors import (
    ADDED_TTFT,
    FLOORS,
    HANG_UP,
    JSON_COST,
    JSON_SHARE,
    STREAM_COST,
    STREAM_RATE,
    STREAM_SHARE,
    TTFT,
    Floor,
    Measures,
)
from loadtests.bench.rounds import Settings
from loadtests.bench.script import ANSWER_WORDS, Answer, BrokenAnswer, Script
from loadtests.bench.ways import CASES, DIRECT, GATEWAY, NGINX, DisconnectTimer, RawClient, Way
from tests.support.requirements import unavailable


@pytest.fixture(scope="module")
def nginx() -> str:
    try:
        return ways.find_nginx()
    except script.BenchError as exc:
        unavailable(str(exc))


@pytest.fixture(scope="module")
def engine() -> Iterator[int]:
    with ways.engine_running() as (port, _):
        yield port


# --- arithmetic and floors ----------------------------------------------------------------


def good() -> Measures:
    """Measures that just hold every floor."""
    return {floor.measure: {GATEWAY: [floor.limit]} for floor in FLOORS}


def test_each_floor_holds_at_its_limit_and_not_beyond() -> None:
    for floor in FLOORS:
        step = -0.001 if floor.at_least else 0.001

        assert floor.holds(floor.limit)
        assert floor.holds(floor.goal)
        assert not floor.holds(floor.limit + step)


def test_the_floors_are_the_promised_ones() -> None:
    promised = {
        STREAM_SHARE: ">= 0.25",
        JSON_SHARE: ">= 0.045",
        ADDED_TTFT: "<= 1.5",
        floors.RSS_PEAK: "<= 100",
        **{HANG_UP[case]: "<= 50" for case in CASES},
    }

    assert {floor.measure: str(floor) for floor in FLOORS} == promised


def test_the_median_of_the_rounds_is_judged_not_the_best_or_the_worst() -> None:
    measures = good()
    measures[ADDED_TTFT] = {GATEWAY: [0.1, 9.0, 1.4], NGINX: [9.0, 9.0, 9.0]}
    assert not any(verdict.missed for verdict in floors.verdicts_of(measures))

    measures[ADDED_TTFT][GATEWAY] = [0.1, 9.0, 1.6]
    missed = [str(verdict) for verdict in floors.verdicts_of(measures) if verdict.missed]
    assert missed == [f"{ADDED_TTFT}: 1.6, the floor is <= 1.5"]


def test_an_unmeasured_floor_is_neither_held_nor_missed() -> None:
    verdicts = floors.verdicts_of({})

    assert not any(verdict.missed for verdict in verdicts)
    assert all(str(verdict).endswith("not measured") for verdict in verdicts)


def test_shares_and_differences_are_computed_within_a_round() -> None:
    # The machine was twice as fast in the second round: no ratio may notice.
    measures: Measures = {
        STREAM_COST: {NGINX: [50_000, 100_000], GATEWAY: [20_000, 40_000]},
        JSON_COST: {GATEWAY: [5_000, 10_000], NGINX: [50_000, 100_000]},
        TTFT: {DIRECT: [0.25, 0.125], NGINX: [0.5, 0.25], GATEWAY: [1.25, 0.625]},
    }

    floors.add_ratios(measures)

    assert measures[STREAM_SHARE] == {GATEWAY: [0.4, 0.4]}
    assert measures[JSON_SHARE] == {GATEWAY: [0.1, 0.1]}
    assert measures[ADDED_TTFT] == {NGINX: [0.25, 0.125], GATEWAY: [1.0, 0.5]}


def test_without_nginx_there_is_no_share() -> None:
    measures: Measures = {STREAM_COST: {GATEWAY: [20_000]}, TTFT: {NGINX: [1.0]}}

    floors.add_ratios(measures)

    assert set(measures) == {STREAM_COST, TTFT}


def test_each_way_goes_first_in_turn() -> None:
    firsts = [fast_client.rotated((DIRECT, NGINX, GATEWAY), turn)[0] for turn in range(4)]

    assert firsts == [DIRECT, NGINX, GATEWAY, DIRECT]


def test_the_usual_load_is_256_streams_for_about_five_seconds() -> None:
    usual = Settings()

    assert (usual.streams, usual.rounds, usual.json_connections) == (256, 5, 64)
    assert usual.tokens * usual.period_ms == pytest.approx(5000, rel=0.02)
    assert usual.offered == pytest.approx(usual.rate, rel=0.05)


@pytest.mark.parametrize(("limit_kept", "status"), [(True, 0), (False, 1)])
def test_a_missed_floor_is_named_and_ends_the_command_with_1(
    limit_kept: bool,  # noqa: FBT001 - a case
    status: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measures = good()
    if not limit_kept:
        measures[JSON_SHARE] = {GATEWAY: [0.02]}

    assert overhead.main([], lambda settings, say: (measures, [])) == status

    said = capsys.readouterr()
    assert ("missed: JSON, share of nginx's: 0.02, the floor is >= 0.045" in said.err) is bool(
        status
    )
    assert ("MISSED" in said.out) is bool(status)


def test_a_run_without_a_result_ends_the_command_with_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(settings: Settings, say: Any) -> floors.Measured:
        raise BrokenAnswer("gateway, streams: a word is missing")

    assert overhead.main([], broken) == 2
    assert "no result: gateway, streams: a word is missing" in capsys.readouterr().err


def test_without_nginx_the_error_says_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(script.BenchError, match="apt-get install nginx"):
        ways.find_nginx(str(tmp_path))


# --- whole and broken streams -------------------------------------------------------------

SCRIPT = Script(tokens=5, first=3)


def event(data: object) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def chunk(delta: dict[str, str], finish: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def whole(script: Script = SCRIPT) -> list[bytes]:
    """A good stream, event by event."""
    return [
        chunk({"role": "assistant", "content": ""}),
        *(chunk({"content": word}) for word in ANSWER_WORDS[script.first :][: script.tokens]),
        chunk({}, "stop"),
        event({"choices": [], "usage": {"completion_tokens": script.tokens}}),
        b"data: [DONE]\n\n",
    ]


def read(*events: bytes, status: int = 200) -> script.Stream:
    pieces = [(float(at), piece) for at, piece in enumerate(events)]
    return script.read_stream(Answer(0.0, status, pieces), SCRIPT)


def test_a_whole_stream_counts_its_events_and_times_its_first_word() -> None:
    assert read(*whole()) == script.Stream(events=9, first_word_at=1.0)


def test_a_stream_may_be_cut_anywhere_and_carry_heartbeats() -> None:
    role, *rest = whole()
    stream = b"".join((role, b": ping\n\n", *rest))

    assert read(*(stream[at : at + 1] for at in range(len(stream)))).events == 9


def spoilt() -> dict[str, list[bytes]]:
    role, one, two, *rest, finish, usage, done = whole()
    return {
        "a word lost": [role, two, *rest, finish, usage, done],
        "a word doubled": [role, one, one, two, *rest, finish, usage, done],
        "two words swapped": [role, two, one, *rest, finish, usage, done],
        "another stream's words": whole(Script(tokens=5, first=4)),
        "no [DONE]": [role, one, two, *rest, finish, usage],
        "no finish reason": [role, one, two, *rest, usage, done],
        "no usage": [role, one, two, *rest, finish, done],
        "another usage": [role, one, two, *rest, finish, event({"usage": {}}), done],
        "an error event": [*whole()[:-1], event({"error": {"message": "backend_failed"}}), done],
        "something after its end": [*whole(), one],
        "an end within an event": [*whole(), b"data: {"],
        "no JSON": [role, b"data: {oops\n\n", done],
        "no event": [role, b"oops\n\n", done],
        "nothing": [],
    }


@pytest.mark.parametrize("fault", spoilt())
def test_a_spoilt_stream_is_refused(fault: str) -> None:
    with pytest.raises(BrokenAnswer):
        read(*spoilt()[fault])


def test_a_stream_with_another_status_is_refused() -> None:
    with pytest.raises(BrokenAnswer, match="status 503"):
        read(*whole(), status=503)


@pytest.mark.parametrize(
    "body",
    [
        b'{"choices":[{"message":{"content":"something else"}}],"usage":{}}',
        b'{"choices":[],"usage":{}}',
        b'{"error":{"message":"no"}}',
        b"",
    ],
)
def test_a_spoilt_json_answer_is_refused(body: bytes) -> None:
    with pytest.raises(BrokenAnswer):
        script.check_json(Answer(0.0, 200, [(0.0, body)]))


# --- real sockets -------------------------------------------------------------------------


@contextmanager
def relaying(engine: int, spoil: bytes = b"") -> Iterator[int]:
    """A bad proxy: it removes `spoil` from the stream, and never notices a client's disconnect."""
    listening = socket.create_server(("127.0.0.1", 0))

    def carry(source: socket.socket, to: socket.socket, spoil: bytes) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                to.sendall(data.replace(spoil, b"") if spoil else data)

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listening.accept()
                upstream = socket.create_connection(("127.0.0.1", engine))
                open_sockets.extend((client, upstream))
                for source, to, what in ((client, upstream, b""), (upstream, client, spoil)):
                    threading.Thread(target=carry, args=(source, to, what), daemon=True).start()

    open_sockets = [listening]
    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listening.getsockname()[1]
    finally:
        for each in open_sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


def run_job(job: fast_client.Job) -> fast_client.Result:
    return asyncio.run(fast_client.run_job(job))


@pytest.mark.alone
@pytest.mark.integration
@pytest.mark.parametrize("spread", [False, True])
def test_the_engine_sends_each_token_separately_and_in_time(engine: int, *, spread: bool) -> None:
    result = run_job(Streams(engine, None, streams=8, tokens=25, period_ms=20, spread=spread))

    assert isinstance(result, fast_client.StreamsResult)
    assert result.events == 8 * (25 + 4)
    # Of a stream's 29 events the first two and the last three come in one go.
    assert result.events / result.reads < 1.5
    assert 24 * 0.020 <= result.elapsed_s < 1.5  # 25 periods, the first of them cut short


@pytest.mark.integration
def test_a_proxy_that_loses_a_chunk_has_no_result(engine: int) -> None:
    lost = next(word for word in fast_engine.WORD_EVENTS if b" w07" in word)
    with relaying(engine, spoil=lost) as port, ways.client_running() as load:
        assert isinstance(load(Streams(port, None, 2, 3, 10)), fast_client.StreamsResult)

        with pytest.raises(BrokenAnswer, match="has other words"):
            load(Streams(port, None, streams=2, tokens=12, period_ms=10))


@pytest.mark.integration
def test_a_proxy_that_never_ends_a_stream_has_no_result(engine: int) -> None:
    class Hasty(Streams):
        def timeout_s(self) -> float:
            return 0.3

    with relaying(engine, spoil=b"0\r\n\r\n") as port:
        result = run_job(Hasty(port, None, streams=1, tokens=3, period_ms=10))

    assert isinstance(result, fast_client.JobFailed)
    assert result.why.startswith("no end after 0.3 s")


@pytest.mark.alone
@pytest.mark.integration
@pytest.mark.parametrize("case", [case for case in CASES if case != "queued"])
def test_the_engine_sees_a_client_disconnect_within_the_floor(engine: int, case: str) -> None:
    assert 0 < DisconnectTimer(Way(DIRECT, engine), engine).time_ms(case) < ways.NEVER_MS / 2


@pytest.mark.integration
def test_a_proxy_that_does_not_pass_a_disconnect_on_misses_the_floor(engine: int) -> None:
    with relaying(engine) as port:
        took = DisconnectTimer(Way(GATEWAY, port), engine).time_ms("mid-stream")

    assert took == ways.NEVER_MS
    assert not Floor(HANG_UP["mid-stream"], 50, goal=50).holds(took)


@pytest.mark.integration
def test_a_silent_stream_times_out(engine: int) -> None:
    with RawClient(engine, script.chat_request(Script(tokens=1, hold=True))) as caller:
        caller.read_events(2)

        caller._socket.settimeout(0.1)
        with pytest.raises(script.BenchError, match="went silent"):
            caller.read_events(3)


@pytest.mark.integration
def test_cpu_seconds_include_children_that_have_ended() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    parent = (
        "import subprocess, sys\n"
        "sys.stdin.readline()\n"
        f"subprocess.run([sys.executable, '-c', {burn!r}])\n"
        "print(flush=True)\n"
        "sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", parent]
    with ways.running(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        meter = ProcessMeter(process.pid)
        before = meter.cpu_s()
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()

        assert 0.25 <= meter.cpu_s() - before <= 1
        assert 0 < meter.rss_mb() <= meter.peak_mb() < 100


@pytest.mark.alone
@pytest.mark.integration
def test_a_short_run_of_direct_against_nginx(nginx: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    quick = ["--rounds", "1", "--seconds", "0.5", "--streams", "16", "--rate", "640"]
    command = ["--only", "direct,nginx", *quick, "--json", str(report)]

    assert overhead.main(command) == 0

    said = msgspec.json.decode(report.read_bytes())
    assert set(said["machine"]) >= {"cpu", "cores", "kernel", "python", "nginx", "date", "command"}
    assert said["machine"]["command"][3:] == command
    rounds = said["rounds"]
    assert set(rounds[STREAM_RATE]) == {DIRECT, NGINX}
    assert set(rounds[STREAM_COST]) == {NGINX}
    assert rounds[JSON_COST][NGINX][0] > 1000
    assert rounds[ADDED_TTFT][NGINX][0] > 0
    assert rounds[HANG_UP["before headers"]][NGINX][0] < 50
    # nginx keeps its connections to the engine; who does not is found out here.
    assert rounds[floors.JSON_CONNECTIONS][NGINX][0] < 0.1
    assert all(floor["median"] is None for floor in said["floors"])


@pytest.mark.alone
@pytest.mark.integration
def test_the_gateway_drops_a_queued_request_whose_client_disconnected(
    engine: int, tmp_path: Path
) -> None:
    with ways.gateway_running(engine, tmp_path) as way:
        assert 0 < DisconnectTimer(way, engine).time_ms("queued") < ways.NEVER_MS / 2
