"""Cases 1-12: engines that are unreachable, not ready, refuse, or only seem healthy."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import httpx
import pytest

from backends.errors import Broken, Busy, Refused, ServerError, Unreachable
from backends.fake import (
    DONE,
    Answer,
    FakeEngine,
    Head,
    Pause,
    Repeat,
    Reset,
    Send,
    Serve,
    Silence,
    status,
)
from backends.fake.wire import Received
from backends.transport import http
from gateway.app import Gateway
from gateway.relay.retry import RETRY_SAVED, RETRY_SHARE
from gateway.routing.breaker import (
    FAILURES,
    FIRST_EJECTION_S,
    LONGEST_EJECTION_S,
    Breaker,
    ReplicaState,
)
from gateway.routing.lanes import Replica
from gateway.serving.replica_server import failure_of
from tests.support.gateways import Running, StartGateway
from tests.support.models import alone, chat, pair

CHAT = "/v1/chat/completions"
How: TypeAlias = dict[str, bool]


@pytest.fixture(params=[{"stream": False}, {"stream": True}], ids=["whole", "stream"])
def how(request: pytest.FixtureRequest) -> How:
    """Streamed or not: a failure before the answer begins is the same for both."""
    asked_for: How = request.param
    return asked_for


async def ask(running: Running, **fields: Any) -> httpx.Response:
    """The answer to a chat with `m`."""
    return await running.http.post(CHAT, json=chat(**fields))


async def served(running: Running, **fields: Any) -> str:
    """Send a chat, read its whole answer, and return the lane that gave it."""
    answer = await ask(running, **fields)
    assert answer.status_code == 200, answer.text
    if fields.get("stream"):
        assert answer.text.endswith("data: [DONE]\n\n")
        assert '"error"' not in answer.text
    else:
        assert answer.json()["choices"][0]["message"]["content"].startswith("token0")
    return answer.headers["x-gateway-lane"]


async def timed(answer: Awaitable[httpx.Response]) -> tuple[httpx.Response, float]:
    """An answer and the seconds it took."""
    began = time.monotonic()
    return await answer, time.monotonic() - began


def error_message(answer: httpx.Response, code: int, name: str) -> str:
    """The message of an error response, whose form is checked."""
    said = answer.json()
    assert said.keys() == {"error"}
    assert said["error"].keys() == {"message", "type", "param", "code"}
    assert (answer.status_code, said["error"]["code"]) == (code, name)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.headers["x-gateway-lane"] in ("ollama", "vllm", "llamacpp", "none")
    assert answer.headers["x-gateway-reason"]
    assert "127.0.0." not in answer.text
    assert "http://" not in answer.text
    message: str = said["error"]["message"]
    return message


def retry_after(answer: httpx.Response, code: int, name: str) -> int:
    """The Retry-After of an error response, seconds."""
    error_message(answer, code, name)
    seconds = int(answer.headers["retry-after"])
    assert 1 <= seconds <= 120
    return seconds


def chats(engine: FakeEngine) -> list[Received]:
    """The chats that an engine has received, without the gateway's own probe for tools."""
    hello = chat()["messages"]
    return [r for r in engine.generations if r.body.get("messages") == hello]


def probe_count(engine: FakeEngine) -> int:
    """The number of probes that an engine has received."""
    return sum(r.path in ("/health", "/api/tags") for r in engine.received)


def replica(gateway: Gateway, lane: str) -> Replica:
    """The only replica of a lane of `m`."""
    [only] = gateway.catalogue.models["m"].admission.scheduler.lanes[lane].replicas
    return only


def breaker(running: Running, lane: str) -> Breaker:
    """The breaker of the only replica of a lane of `m`."""
    admission = running.gateway.catalogue.models["m"].admission
    return admission.servers[replica(running.gateway, lane)].breaker


def usable(lane: str) -> Callable[[Gateway], bool]:
    """Whether a lane of `m` accepts requests."""
    return lambda gateway: replica(gateway, lane).capacity > 0


# 1. Connection refused


async def test_01_connection_refused_is_retried_elsewhere_at_once(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway, how: How
) -> None:
    async with start_gateway(**pair(ollama, vllm)) as running:
        assert await served(running) == "ollama"
        ollama.down()
        answer, seconds = await timed(ask(running, **how))

    assert answer.status_code == 200
    assert answer.headers["x-gateway-lane"] == "vllm"
    assert answer.headers["x-gateway-reason"] == "ollama failed this request"
    assert seconds < 1


async def test_01_connection_refused_by_all_is_a_503_in_under_a_second(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway, how: How
) -> None:
    async with start_gateway(**pair(ollama, vllm)) as running:
        ollama.down()
        vllm.down()
        # The first is refused by both engines, the second by the gateway, which knows.
        for _ in range(2):
            answer, seconds = await timed(ask(running, **how))

            retry_after(answer, 503, "no_engine")
            assert seconds < 1


async def test_01_an_engine_that_was_down_at_the_start_serves_when_it_comes_up(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    vllm.down()
    async with start_gateway(**alone(vllm)) as running:
        message = error_message(await ask(running), 503, "no_engine")
        await vllm.up()
        await running.until(usable("vllm"))

        assert "vllm cannot be reached" in message
        assert await served(running) == "vllm"


async def test_01_a_restart_of_an_engine_fails_no_request(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**pair(ollama, vllm)) as running:
        await served(running)  # leaves a connection to be used again
        ollama.down()
        await ollama.up()

        assert await served(running) == "ollama"


# 2. Packets dropped


async def test_02_dropped_packets_fail_over_after_the_connect_timeout(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway, how: How
) -> None:
    async with start_gateway(**pair(ollama, vllm), limits={"connect_s": 0.3}) as running:
        ollama.deaf()
        answer, seconds = await timed(ask(running, **how))

    assert answer.status_code == 200
    assert answer.headers["x-gateway-lane"] == "vllm"
    assert 0.29 < seconds < 1


async def test_02_dropped_packets_everywhere_are_a_503_after_the_connect_timeout(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm), limits={"connect_s": 0.3}) as running:
        vllm.deaf()
        first, waited = await timed(ask(running))
        second, known = await timed(ask(running))

        retry_after(first, 503, "no_engine")
        retry_after(second, 503, "no_engine")
        assert 0.29 < waited < 1
        assert known < 0.29  # nobody waits for what the gateway knows

        # A request has failed, so it is looked at often now, and not only in five seconds.
        await vllm.up()
        await running.until(usable("vllm"), within_s=2.5)
        assert await served(running) == "vllm"


# 3. A name that stops resolving


class Names:
    """A resolver that knows these names; addresses resolve to themselves."""

    def __init__(self, **known: str) -> None:
        self.known = known

    def resolve(self, host: str) -> str:
        name, _, domain = host.partition(".")
        if domain != "internal":
            return host
        if name not in self.known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return self.known[name]


async def test_03_a_name_that_stops_resolving_fails_over_and_is_resolved_again(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    moved = FakeEngine("vllm", ["Small-1B"], own_port=vllm.port)
    moved._server.host = "127.0.0.2"
    other = FakeEngine("vllm", ["Small-1B"])
    names = Names(gpu="127.0.0.1")
    async with moved, other:
        settings = alone(vllm)
        settings["engines"]["vllm"]["urls"] = [f"http://gpu.internal:{vllm.port}", other.url]
        async with start_gateway(**settings, upstream=http.Client(names.resolve)) as running:
            scheduler = running.gateway.catalogue.models["m"].admission.scheduler
            named = scheduler.lanes["vllm"].replicas[0]  # of two that are idle, the first
            answered = []

            await served(running)
            answered.append([len(chats(engine)) for engine in (vllm, other, moved)])

            names.known.clear()
            vllm.down()  # nor is the old address of any use
            await served(running)
            trouble = named.unavailable_reason
            answered.append([len(chats(engine)) for engine in (vllm, other, moved)])

            names.known["gpu"] = "127.0.0.2"
            await running.until(lambda _: named.capacity)
            await served(running)
            answered.append([len(chats(engine)) for engine in (vllm, other, moved)])

    assert answered == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert trouble == "cannot be reached"


async def test_03_a_name_that_never_resolves_is_an_unreachable_engine(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    settings = alone(vllm)
    settings["engines"]["vllm"]["urls"] = ["http://engine.invalid:8000", vllm.url]
    async with start_gateway(**settings, limits={"connect_s": 1}) as running:
        assert [await served(running) for _ in range(3)] == ["vllm"] * 3
        states = (await running.status("m"))["lanes"]["vllm"]["replicas"]

    assert [replica["state"] for replica in states] == ["cannot be reached", "ready"]
    assert len(chats(vllm)) == 3


# 4. Accepted, never answered

never = pytest.mark.parametrize(
    "never",
    [
        pytest.param(Silence(), id="no head"),
        pytest.param([Head(), Silence()], id="a head and nothing else"),
        pytest.param([Head(), Repeat([Send(b": ping\n\n"), Pause(0.02)])], id="only comments"),
    ],
)


@never
async def test_04_no_first_token_in_time_is_retried_elsewhere(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway, never: Answer
) -> None:
    async with start_gateway(**pair(ollama, vllm), limits={"first_token_s": 0.3}) as running:
        ollama.script(then=never)
        answer, seconds = await timed(ask(running, stream=True))
        await ollama.until(lambda engine: engine.hang_ups, within_s=1)

    assert answer.status_code == 200
    assert answer.headers["x-gateway-lane"] == "vllm"
    assert answer.text.endswith("data: [DONE]\n\n")
    assert 0.29 < seconds < 1
    assert (len(chats(ollama)), len(chats(vllm))) == (1, 1)


@never
async def test_04_no_first_token_in_time_from_any_engine_is_a_504_after_one_failover(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway, never: Answer
) -> None:
    async with start_gateway(**pair(ollama, vllm), limits={"first_token_s": 0.2}) as running:
        ollama.script(then=never)
        vllm.script(then=never)
        answer, seconds = await timed(ask(running, stream=True))
        for engine in (ollama, vllm):
            await engine.until(lambda engine: engine.hang_ups, within_s=1)

    error_message(answer, 504, "engine_silent")
    assert answer.headers["x-should-retry"] == "false"
    assert 0.39 < seconds < 1
    assert (len(chats(ollama)), len(chats(vllm))) == (1, 1)
    assert (ollama.running, vllm.running) == (0, 0)


async def test_04_a_whole_answer_that_does_not_come_is_a_504_and_is_aborted(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm), limits={"answer_s": 0.3}) as running:
        vllm.script(Silence())
        answer, seconds = await timed(ask(running))
        await vllm.until(lambda engine: engine.hang_ups, within_s=1)

        error_message(answer, 504, "engine_silent")
        assert 0.29 < seconds < 1
        assert len(chats(vllm)) == 1
        assert await served(running) == "vllm"


async def test_04_no_other_engine_is_tried_after_a_heartbeat(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    limits = {"first_token_s": 0.4, "heartbeat_s": 0.1}
    async with start_gateway(**pair(ollama, vllm), limits=limits) as running:
        ollama.script(Silence())
        answer = await ask(running, stream=True)

    assert answer.status_code == 200  # it was said before anybody knew
    *pings, error, done, end = answer.text.split("\n\n")
    assert set(pings) == {": ping"}
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_silent"
    assert (done, end) == ("data: [DONE]", "")
    assert chats(vllm) == []


async def test_04_waiting_for_a_silent_engine_is_not_time_in_the_queue_of_the_next(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    limits = {"first_token_s": 0.6, "max_wait_s": 0.5}
    async with start_gateway(**pair(ollama, vllm, slots=1), limits=limits) as running:
        ollama.script(Silence())
        vllm.script([Pause(0.8), Serve()])
        busy = asyncio.create_task(served(running, model="m@vllm"))
        await vllm.until(chats)

        # It comes to vLLM's queue after 0.6 s, more than the longest wait, and waits for 0.2 s.
        assert await served(running, stream=True) == "vllm"
        assert await busy == "vllm"


# 5. 500, 502, 503 before the stream

SICK = [
    pytest.param(status(500), id="500"),
    pytest.param(status(502, body=b"<html>Bad Gateway</html>"), id="502"),
    pytest.param(status(503, "engine core died"), id="503"),
    pytest.param(Reset(), id="reset"),
]


@pytest.mark.parametrize("sick", SICK)
async def test_05_a_failure_before_the_stream_is_retried_once_on_another_engine(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway, sick: Answer
) -> None:
    async with start_gateway(**pair(ollama, vllm)) as running:
        for count, stream in enumerate((False, True), start=1):
            ollama.script(sick)

            assert await served(running, stream=stream) == "vllm"
            assert (len(chats(ollama)), len(chats(vllm))) == (count, count)


@pytest.mark.parametrize("sick", SICK[:3])
async def test_05_a_failure_of_both_is_a_502_and_a_third_is_not_tried(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway, sick: Answer
) -> None:
    async with FakeEngine("vllm", ["Small-1B"]) as third:
        settings = pair(ollama, vllm)
        settings["engines"]["vllm"]["urls"].append(third.url)
        async with start_gateway(**settings) as running:
            for engine in (ollama, vllm, third):
                engine.script(then=sick)
            answer = await ask(running, stream=True)

    retry_after(answer, 502, "engine_failed")
    assert sorted(len(chats(engine)) for engine in (ollama, vllm, third)) == [0, 1, 1]


async def test_05_a_replica_of_the_same_lane_is_another_engine(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with FakeEngine("vllm", ["Small-1B"]) as other:
        settings = alone(vllm)
        settings["engines"]["vllm"]["urls"].append(other.url)
        async with start_gateway(**settings) as running:
            vllm.script(then=status(500))

            assert await served(running) == "vllm"
            assert (len(chats(vllm)), len(chats(other))) == (1, 1)


async def test_05_without_another_engine_there_is_no_second_attempt(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm)) as running:
        vllm.script(status(500))

        retry_after(await ask(running), 502, "engine_failed")
        assert len(chats(vllm)) == 1


async def test_05_second_attempts_are_a_share_of_all_requests(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    requests = 60
    async with start_gateway(**pair(ollama, vllm, slots=8)) as running:
        # Two of three fail: never three in a row, so that it is never left alone.
        for _ in range(requests):
            ollama.script(status(500), status(500), Serve())
        answers = [await ask(running) for _ in range(requests)]

    refused = [answer for answer in answers if answer.status_code != 200]
    attempts = len(chats(ollama)) + len(chats(vllm))
    assert len(chats(ollama)) == requests
    assert requests < attempts <= requests * (1 + RETRY_SHARE) + RETRY_SAVED
    assert len(refused) == 2 * requests // 3 - len(chats(vllm)) > 0
    for answer in refused:
        retry_after(answer, 502, "engine_failed")


async def test_05_of_many_kept_connections_that_break_one_is_reopened(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm)) as running:
        vllm.ttft_s = 0.1
        await asyncio.gather(*(served(running) for _ in range(8)))
        before = len(chats(vllm))
        vllm.script(then=Reset())
        answer = await ask(running)

    retry_after(answer, 502, "engine_failed")
    assert len(chats(vllm)) - before == 2  # the first may have been closed while it was idle


@pytest.mark.parametrize("code", [302, 401, 403])
async def test_05_an_error_of_a_proxy_in_between_is_not_the_clients_fault(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway, code: int
) -> None:
    async with start_gateway(**pair(ollama, vllm)) as running:
        ollama.script(then=status(code, "our key is wrong", headers={"location": "/elsewhere"}))
        vllm.script(Serve(), then=status(code, "our key is wrong"))

        assert await served(running) == "vllm"
        assert "key" not in error_message(await ask(running), 502, "engine_failed")


# 6. Busy

BUSY = [
    pytest.param(status(429, retry_after=1), id="429"),
    pytest.param(status(503, retry_after=1), id="503 with Retry-After"),
    pytest.param(status(503, "too many queued requests"), id="503 that says so"),
]


@pytest.mark.parametrize("busy", BUSY)
async def test_06_a_busy_engine_is_skipped_for_its_retry_after_and_not_ejected(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway, busy: Answer
) -> None:
    async with start_gateway(**pair(ollama, vllm)) as running:
        ollama.script(busy)
        lanes = [await served(running) for _ in range(5)]
        state = (await running.status("m"))["lanes"]["ollama"]["replicas"][0]["state"]
        standing = breaker(running, "ollama")

        assert lanes == ["vllm"] * 5
        assert state == "reports that it is busy"
        assert (standing.failures, standing.ramp) == (0, standing.slots)

        await running.until(usable("ollama"))
        assert await served(running) == "ollama"
        first, second = chats(ollama)
        assert second.at - first.at > 0.99


async def test_06_a_client_receives_busy_only_when_all_engines_are(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway, how: How
) -> None:
    async with start_gateway(**pair(ollama, vllm)) as running:
        ollama.script(status(429, retry_after=7))
        vllm.script(status(503, "queue is full", retry_after=5))
        first = await ask(running, **how)
        second = await ask(running, **how)

        assert retry_after(first, 503, "engine_busy") == 5
        assert retry_after(second, 503, "no_engine") == 5
        assert "reports that it is busy" in error_message(second, 503, "no_engine")
        assert (len(chats(ollama)), len(chats(vllm))) == (1, 1)


# 7. Refused

REFUSED: list[Any] = [
    (400, {"error": {"message": "too long", "type": "BadRequestError", "param": "input_tokens",
                     "code": 400}}),
    (404, {"error": "model 'm' not found"}),
    (413, {"object": "error", "message": "too large", "code": 413}),
    (422, {"detail": [{"loc": ["body", "top_p"], "msg": "too large"}]}),
]  # fmt: skip


@pytest.mark.parametrize(("code", "body"), REFUSED)
async def test_07_a_refusal_is_passed_on_in_one_form_and_never_retried(
    ollama: FakeEngine,
    vllm: FakeEngine,
    start_gateway: StartGateway,
    code: int,
    body: Any,
) -> None:
    async with start_gateway(**pair(ollama, vllm)) as running:
        ollama.script(then=status(code, body=body))
        for number in range(FAILURES + 1):
            answer = await ask(running, stream=number % 2 == 1)

            error = answer.json()["error"]
            assert answer.status_code == code
            assert answer.json().keys() == {"error"}
            assert error.keys() == {"message", "type", "param", "code"}
            assert isinstance(error["message"], str)
            assert any(
                words in error["message"] for words in ("too long", "not found", "too large")
            )
            assert answer.headers["x-should-retry"] == "false"
            assert answer.headers["x-gateway-lane"] == "ollama"
            assert answer.headers["x-gateway-reason"]
            assert answer.headers["x-request-id"].startswith("req_")
        standing = breaker(running, "ollama")

        assert (standing.failures, standing.ramp) == (0, standing.slots)
        assert len(chats(ollama)) == FAILURES + 1
        assert chats(vllm) == []


# 8. Flapping: the breaker by itself, at given times

SICK_NOW = ServerError("500")


def healthy(slots: int = 8) -> Breaker:
    """The breaker of a healthy replica."""
    standing = Breaker(slots)
    standing.on_probe(ReplicaState.READY)
    return standing


def fail(standing: Breaker, now: float, times: int = FAILURES) -> None:
    for _ in range(times):
        standing.on_failure(failure_of(SICK_NOW), now)


def test_08_a_replica_is_ejected_after_consecutive_failures() -> None:
    standing = healthy()
    fail(standing, 10.0, FAILURES - 1)
    before = standing.capacity(10.0)
    fail(standing, 10.0, 1)

    assert before == 8
    assert standing.capacity(10.0) == standing.capacity(10.0 + FIRST_EJECTION_S - 0.001) == 0
    assert standing.unavailable_reason(10.0) == "failed too often and is ejected for a while"
    assert standing.next_change_at(10.0) == 10.0 + FIRST_EJECTION_S


def test_08_a_good_answer_resets_the_count_of_failures() -> None:
    standing = healthy()

    for _ in range(10):
        fail(standing, 10.0, FAILURES - 1)
        standing.on_answer(10.0)
    assert standing.capacity(10.0) == 8


def test_08_the_ramp_starts_at_one_and_doubles_with_each_good_answer() -> None:
    standing = healthy(slots=8)
    fail(standing, 10.0)

    room = []
    for second in range(5):
        room.append(standing.capacity(11.0 + second))
        standing.on_answer(11.0 + second)
    assert room == [1, 2, 4, 8, 8]


def test_08_each_failed_trial_doubles_the_ejection_up_to_a_limit() -> None:
    standing = healthy()
    fail(standing, 0.0)

    lengths, now = [], 0.0
    for _ in range(9):
        lengths.append(standing.out_until - now)
        now = standing.out_until
        assert standing.capacity(now) == 1
        fail(standing, now, 1)
    assert lengths == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_08_a_flapping_replica_is_ejected_longer_each_time() -> None:
    standing = healthy()
    now = 0.0

    lengths = []
    for _ in range(4):
        fail(standing, now)
        lengths.append(standing.out_until - now)
        now = standing.out_until + 5
        standing.on_answer(now)
    assert lengths == [1, 2, 4, 8]


def test_08_after_a_long_healthy_time_the_ejection_is_short_again() -> None:
    standing = healthy()
    for _ in range(4):
        fail(standing, standing.out_until)
    assert standing.out_until > FIRST_EJECTION_S * 2
    standing.on_answer(standing.out_until)
    now = standing.out_until + LONGEST_EJECTION_S + 1

    fail(standing, now)

    assert standing.out_until == now + FIRST_EJECTION_S


def test_08_many_failures_by_one_fault_count_as_one() -> None:
    standing = healthy(slots=32)

    fail(standing, 10.0, 32)  # one crash, all that ran there

    assert standing.out_until == 10.0 + FIRST_EJECTION_S


def test_08_an_answer_from_before_the_ejection_does_not_end_it() -> None:
    standing = healthy(slots=8)
    fail(standing, 10.0)

    for _ in range(4):  # sent before the others failed
        standing.on_answer(10.5)
    assert (standing.capacity(10.5), standing.capacity(11.0)) == (0, 1)


def test_08_neither_busy_nor_a_refusal_is_a_failure() -> None:
    standing = healthy()

    for _ in range(20):
        standing.on_failure(failure_of(Refused("400", status=400)), 10.0)
        standing.on_failure(failure_of(Busy("429", retry_after=2)), 10.0)
    assert (standing.capacity(10.0), standing.next_change_at(10.0)) == (0, 12.0)
    assert standing.unavailable_reason(10.0) == "reports that it is busy"
    assert standing.capacity(12.0) == 8


def test_08_an_unreachable_replica_stays_out_until_a_probe_finds_it_ready() -> None:
    standing = healthy()
    standing.on_failure(failure_of(Unreachable("refused")), 10.0)

    assert standing.capacity(10.0) == standing.capacity(1000.0) == 0
    standing.on_probe(ReplicaState.READY)
    assert standing.capacity(1000.0) == 1


def test_08_a_good_probe_does_not_end_an_ejection() -> None:
    standing = healthy()
    fail(standing, 10.0)
    standing.on_probe(ReplicaState.READY)

    assert standing.capacity(10.5) == 0


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (None, "has not been probed yet"),
        (ReplicaState.LOADING, "is still loading its model"),
        (ReplicaState.ABSENT, "does not have the model"),
        (ReplicaState.ASLEEP, "is asleep"),
        (ReplicaState.DOWN, "cannot be reached"),
    ],
)
def test_08_a_replica_that_is_not_ready_receives_nothing_and_has_a_reason(
    state: ReplicaState | None, reason: str
) -> None:
    standing = Breaker(8, state)
    standing.on_failure(failure_of(Broken("a request sent before")), 1.0)

    assert (standing.capacity(1.0), standing.unavailable_reason(1.0)) == (0, reason)


# … and through the gateway


async def test_08_half_open_admits_exactly_one_request(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm, slots=16)) as running:
        vllm.script(then=status(500))
        for _ in range(FAILURES):
            error_message(await ask(running), 502, "engine_failed")
        retry_after(await ask(running), 503, "no_engine")
        vllm.heal()
        vllm.ttft_s = 0.1
        before = len(chats(vllm))
        herd = concurrency_history(vllm)

        await running.until(usable("vllm"))
        lanes = await asyncio.gather(*(served(running) for _ in range(24)))

    assert lanes == ["vllm"] * 24
    assert len(chats(vllm)) - before == 24
    assert peak_concurrency(herd, after=0) == 1
    assert peak_concurrency(herd, after=1) <= 2
    assert peak_concurrency(herd, after=2) <= 4
    assert peak_concurrency(herd, after=3) <= 8
    assert max(running for _, running in herd) > 8  # in the end it has all its slots again


async def test_08_a_failed_trial_doubles_the_ejection(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm, slots=16)) as running:
        vllm.script(then=status(500))
        while breaker(running, "vllm").ejections < 1:
            await ask(running)
        ends = [breaker(running, "vllm").out_until]
        await running.until(usable("vllm"))
        # Ten at once: one is the trial, which fails; the others are told so and not sent.
        before = len(chats(vllm))
        answers = await asyncio.gather(*(ask(running) for _ in range(10)))
        ends.append(breaker(running, "vllm").out_until)

        assert len(chats(vllm)) - before == 1
        assert sorted(answer.status_code for answer in answers) == [502] + [503] * 9
        assert 2 * FIRST_EJECTION_S < ends[1] - ends[0] < 2 * FIRST_EJECTION_S + 0.5


def concurrency_history(engine: FakeEngine) -> list[tuple[int, int]]:
    """Chats that have ended and that run, recorded at every change from now on."""
    history: list[tuple[int, int]] = []
    before = len(chats(engine))

    def look(engine: FakeEngine) -> bool:
        since = chats(engine)[before:]
        ended = sum(chat.ended is not None for chat in since)
        history.append((ended, len(since) - ended))
        return False

    engine._watchers.append((look, asyncio.get_running_loop().create_future()))
    return history


def peak_concurrency(history: list[tuple[int, int]], *, after: int) -> int:
    """The highest concurrency until more than `after` chats had ended."""
    return max(running for ended, running in history if ended <= after)


# 9. All are left alone


async def test_09_with_all_ejected_a_request_fails_at_once_and_one_is_admitted_later(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**pair(ollama, vllm)) as running:
        for engine in (ollama, vllm):
            engine.script(then=status(500))
        while usable("ollama")(running.gateway) or usable("vllm")(running.gateway):
            await ask(running)
        sent = len(chats(ollama)) + len(chats(vllm))
        answers = [await timed(ask(running, stream=i % 2 == 1)) for i in range(6)]

        for answer, seconds in answers:
            assert retry_after(answer, 503, "no_engine") <= 2
            assert seconds < 0.25
        assert len(chats(ollama)) + len(chats(vllm)) == sent

        for engine in (ollama, vllm):
            engine.heal()
        await running.until(usable("ollama"))
        assert await served(running) == "ollama"


async def test_09_with_all_down_they_are_probed_often(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**pair(ollama, vllm)) as running:
        for engine in (ollama, vllm):
            engine.script(then=status(500), path="/health")
            engine.script(then=status(500), path="/api/tags")
            engine.script(status(500))
        error_message(await ask(running), 502, "engine_failed")  # makes both be looked at again
        await running.until(lambda gateway: not gateway.ready().ready)

        for engine in (ollama, vllm):
            often = probe_count(engine) + 2
            await engine.until(lambda e, often=often: probe_count(e) >= often, within_s=3)  # type: ignore[misc]
        retry_after(await ask(running), 503, "no_engine")
        assert (await running.http.get("/ready")).status_code == 503


async def test_09_a_waiting_request_fails_at_once_when_the_last_replica_goes_down(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm, slots=1)) as running:
        vllm.script(then=[Pause(0.05), *status(500)])
        answers = await asyncio.gather(*(timed(ask(running)) for _ in range(FAILURES + 5)))

    failed = [answer for answer, _ in answers if answer.status_code == 502]
    refused = [answer for answer, _ in answers if answer.status_code == 503]
    assert (len(failed), len(refused), len(chats(vllm))) == (FAILURES, 5, FAILURES)
    for answer in refused:
        retry_after(answer, 503, "no_engine")
    assert max(seconds for _, seconds in answers) < 0.5


# 10. Still loading


async def test_10_a_llamacpp_that_loads_receives_nothing_and_then_one_request_first(
    start_gateway: StartGateway,
) -> None:
    async with (
        FakeEngine("llamacpp", ["small"], loading=True) as engine,
        start_gateway(**alone(engine, "small", slots=4)) as running,
    ):
        answer, seconds = await timed(ask(running))
        while_loading = len(chats(engine))
        engine.loading = False
        engine.ttft_s = 0.1
        await running.until(usable("llamacpp"))
        herd = concurrency_history(engine)
        await asyncio.gather(*(served(running) for _ in range(24)))

    retry_after(answer, 503, "no_engine")
    assert "llamacpp is still loading its model" in answer.text
    assert seconds < 1
    assert while_loading == 0
    assert peak_concurrency(herd, after=0) == 1
    assert peak_concurrency(herd, after=1) <= 2
    assert max(running for _, running in herd) == 4


async def test_10_while_one_engine_loads_the_other_serves(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with FakeEngine("llamacpp", ["small"], loading=True) as loading:
        settings = {
            "engines": {"llamacpp": {"urls": [loading.url]}, "vllm": {"urls": [vllm.url]}},
            "models": {
                "m": {"lanes": {"llamacpp": {"model": "small"}, "vllm": {"model": "Small-1B"}}}
            },
        }
        async with start_gateway(**settings) as running:
            answer = await ask(running)
            loading.loading = False
            await running.until(usable("llamacpp"))

            assert answer.headers["x-gateway-lane"] == "vllm"
            assert answer.headers["x-gateway-reason"] == "llamacpp is still loading its model"
            assert await served(running) == "llamacpp"


async def test_10_a_port_that_opens_before_the_model_is_loaded_is_not_ready(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    vllm.script(then=status(503, "starting"), path="/health")
    async with start_gateway(**alone(vllm, slots=8)) as running:
        retry_after(await ask(running), 503, "no_engine")
        assert chats(vllm) == []

        vllm.heal()
        vllm.ttft_s = 0.1
        await running.until(usable("vllm"))
        herd = concurrency_history(vllm)
        await asyncio.gather(*(served(running) for _ in range(24)))
        assert peak_concurrency(herd, after=0) == 1
        assert max(running for _, running in herd) == 8


async def test_10_a_model_that_is_missing_does_not_block_another(
    start_gateway: StartGateway,
) -> None:
    async with FakeEngine("vllm", ["other"]) as engine:
        settings = alone(engine)
        settings["models"]["n"] = {"lanes": {"vllm": {"model": "other"}}}
        async with start_gateway(**settings) as running:
            message = error_message(await ask(running), 503, "no_engine")
            lane = await served(running, model="n")
            engine.models = ("other", "Small-1B")
            await running.until(usable("vllm"))

            assert "vllm does not have the model" in message
            assert lane == "vllm"
            assert await served(running) == "vllm"


async def test_10_the_load_of_a_cold_ollama_is_no_failure(
    vllm: FakeEngine, start_gateway: StartGateway, how: How
) -> None:
    async with FakeEngine("ollama", ["small:1b"], load_s=0.8) as ollama:
        limits = {"heartbeat_s": 0.3}
        async with start_gateway(**pair(ollama, vllm, slots=4), limits=limits) as running:
            before = list(ollama.resident)
            answers = await asyncio.gather(
                *(timed(ask(running, model="m@ollama", **how)) for _ in range(3))
            )
            standing = breaker(running, "ollama")

    assert (before, ollama.resident) == ([], ["small:1b"])
    for answer, seconds in answers:
        assert answer.headers["x-gateway-lane"] == "ollama"
        assert "token0" in answer.text
        assert answer.text.startswith(": ping\n\n") == how["stream"]  # nobody thinks it is dead
        assert seconds > 0.79
    assert standing.failures == 0
    assert (len(chats(ollama)), len(chats(vllm))) == (3, 0)


# 11. Models that are not everywhere


async def test_11_a_model_on_one_engine_only_is_served_there(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    engines = {"ollama": {"urls": [ollama.url]}, "vllm": {"urls": [vllm.url]}}
    async with start_gateway(engines=engines) as running:
        assert await served(running, model="small:1b") == "ollama"
        assert await served(running, model="Small-1B") == "vllm"
        listed = (await running.http.get("/v1/models")).json()["data"]

    assert {model["id"]: model["lanes"] for model in listed} == {
        "small:1b": ["ollama"],
        "Small-1B": ["vllm"],
    }


async def test_11_a_model_on_one_replica_only_is_served_there(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with FakeEngine("vllm", ["something else"]) as without:
        settings = alone(vllm)
        settings["engines"]["vllm"]["urls"] = [without.url, vllm.url]
        async with start_gateway(**settings) as running:
            assert [await served(running) for _ in range(4)] == ["vllm"] * 4

    assert (len(chats(without)), len(chats(vllm))) == (0, 4)


@pytest.mark.parametrize("name", ["gpt-4", "m@nowhere", "m@llamacpp", "M", "m/../m", "@vllm"])
async def test_11_an_unknown_model_is_a_404_that_reveals_nothing(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway, name: str
) -> None:
    async with start_gateway(**pair(ollama, vllm)) as running:
        answer = await ask(running, model=name)
        page = await running.http.get(f"/v1/models/{name.replace('/../', '%2F..%2F')}")

    message = error_message(answer, 404, "model_not_found")
    assert answer.json()["error"]["param"] == "model"
    assert "retry-after" not in answer.headers
    assert message == f"The model {name!r} does not exist. GET /v1/models lists those that do."
    assert page.status_code == 404
    assert page.json().keys() == {"error"}
    assert chats(ollama) == chats(vllm) == []


# 12. Well by its own word, and yet it fails


async def test_12_an_engine_whose_answers_fail_is_ejected_whatever_its_health_page_says(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway, how: How
) -> None:
    async with start_gateway(**pair(ollama, vllm)) as running:
        ollama.script(then=status(500))
        lanes = [await served(running, **how) for _ in range(FAILURES + 5)]
        state = (await running.status("m"))["lanes"]["ollama"]["replicas"][0]["state"]
        standing = breaker(running, "ollama")

        assert lanes == ["vllm"] * (FAILURES + 5)  # nobody noticed
        assert len(chats(ollama)) == FAILURES  # and nobody was sent there any more
        assert state == "failed too often and is ejected for a while"
        assert standing.state is ReplicaState.READY


async def test_12_streams_that_break_off_count_as_failures_too(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm)) as running:
        vllm.script(then=[Serve(tokens=2), Reset()])
        broken = [await ask(running, stream=True) for _ in range(FAILURES)]
        refused = await ask(running, stream=True)

    for answer in broken:
        assert answer.status_code == 200
        assert '"code":"engine_failed"' in answer.text
        assert answer.text.endswith(DONE.decode())
        assert '"stop"' not in answer.text
    retry_after(refused, 503, "no_engine")
    assert len(chats(vllm)) == FAILURES


async def test_12_one_crash_under_many_streams_is_one_fault(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm, slots=16)) as running:
        vllm.gap_s = 0.05
        streams = [
            asyncio.create_task(ask(running, stream=True, max_tokens=500)) for _ in range(16)
        ]
        await vllm.until(lambda engine: engine.running == 16)
        vllm.down()
        await asyncio.gather(*streams)
        ends_in_s = breaker(running, "vllm").out_until - time.monotonic()
        await vllm.up()
        vllm.gap_s = 0
        await running.until(usable("vllm"), within_s=3)

        assert ends_in_s <= FIRST_EJECTION_S
        assert await served(running) == "vllm"


@pytest.mark.parametrize("path", ["/openapi.json", "/is_sleeping", "/metrics"])
async def test_12_nonsense_beside_its_health_page_does_no_harm(
    vllm: FakeEngine, start_gateway: StartGateway, path: str
) -> None:
    nonsense = status(200, body=b"vllm:num_requests_running NaN\n")
    vllm.script(then=nonsense, path=path)
    async with start_gateway(**alone(vllm)) as running:
        assert await served(running) == "vllm"
        vllm.down()
        error_message(await ask(running), 503, "no_engine")
        await vllm.up()

        # The one that looks at it has survived, too.
        await running.until(usable("vllm"))
        assert await served(running) == "vllm"
