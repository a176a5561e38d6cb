"""Cases 25-27 and 49: clients that hang up, wherever their request is, or wait too long."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import pytest

from backends.fake import FakeEngine, Pause, Repeat, Send, Serve, Silence, chunk, event, stream
from backends.fake.wire import Received
from gateway.app import Gateway
from gateway.routing.scheduler import Scheduler
from tests.support.gateways import Running, StartGateway
from tests.support.models import alone, chat, pair

CHAT = "/v1/chat/completions"

#: By then the engine must be let go, in any case …
AT_MOST_S = 1.0
#: … and by then it usually is.
USUALLY_S = 0.05


@dataclass(frozen=True)
class Caller:
    """A client with one request on its own socket."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def until(self, text: bytes) -> bytes:
        """Read until this text has arrived."""
        async with asyncio.timeout(5):
            return await self.reader.readuntil(text)

    def hang_up(self, *, politely: bool = False) -> float:
        """Close the connection, with a reset or a FIN; returns the time of it."""
        if politely:
            self.writer.close()
        else:
            self.writer.transport.abort()
        return time.monotonic()


@asynccontextmanager
async def calling(running: Running, **fields: Any) -> AsyncIterator[Caller]:
    """A client that has sent a chat with `m` and has read nothing yet."""
    body = json.dumps(chat(**fields)).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(running.url).port)
    writer.write(
        b"POST %b HTTP/1.1\r\nhost: gateway\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (CHAT.encode(), len(body), body)
    )
    try:
        yield Caller(reader, writer)
    finally:
        writer.transport.abort()


def chats(engine: FakeEngine) -> list[Received]:
    """The chats that an engine has received, without the gateway's own probe for tools."""
    hello = chat()["messages"]
    return [r for r in engine.generations if r.body.get("messages") == hello]


def scheduler(gateway: Gateway) -> Scheduler:
    """The scheduler of `m`."""
    return gateway.catalogue.models["m"].admission.scheduler


def waiting(count: int) -> Callable[[Gateway], bool]:
    """Whether so many requests wait."""
    return lambda gateway: scheduler(gateway).waiting == count


def idle(gateway: Gateway) -> bool:
    """Whether no request holds a slot or a place in the queue."""
    of = scheduler(gateway)
    held = sum(lane.running for lane in of.lanes.values()) + of.waiting + of.demand
    return not held and not gateway.edge.in_flight


async def answered(running: Running, **fields: Any) -> float:
    """Send a chat, read its answer, and return the seconds that it took."""
    began = time.monotonic()
    answer = await running.http.post(CHAT, json=chat(**fields))
    assert answer.status_code == 200, answer.text
    return time.monotonic() - began


def replica_state(running: Running) -> tuple[int, int]:
    """Failures of the only replica of `m`, and slots withheld from it."""
    [server] = running.gateway.catalogue.models["m"].admission.servers.values()
    return server.breaker.failures, server.breaker.slots - server.breaker.ramp


# The four places in which a hang-up may find a request

Case: TypeAlias = Callable[[Running, FakeEngine], Awaitable[float]]


async def before_the_head(running: Running, engine: FakeEngine) -> float:
    """Seconds until an engine is free again that has not begun its answer."""
    engine.script(Silence())
    async with calling(running, stream=True) as caller:
        await engine.until(lambda engine: engine.running == 1)
        return await release_time(engine, caller)


async def in_mid_stream(running: Running, engine: FakeEngine) -> float:
    """Seconds until an engine is free again that streams."""
    engine.gap_s = 0.01
    async with calling(running, stream=True, max_tokens=1000) as caller:
        await caller.until(b"token3")
        return await release_time(engine, caller)


async def between_two_tokens(running: Running, engine: FakeEngine) -> float:
    """Seconds until an engine is free again that is silent within a stream."""
    engine.script([Serve(tokens=3), Silence()])
    async with calling(running, stream=True) as caller:
        await caller.until(b"token2")
        return await release_time(engine, caller)


async def without_a_stream(running: Running, engine: FakeEngine) -> float:
    """Seconds until an engine is free again that works on a whole answer."""
    engine.ttft_s = 60
    async with calling(running) as caller:
        await engine.until(lambda engine: engine.running == 1)
        return await release_time(engine, caller)


async def half_way_through_a_whole_answer(running: Running, engine: FakeEngine) -> float:
    """Seconds until an engine is free again that has sent half of a whole answer."""
    engine.script([Serve(tokens=3), Silence()])
    async with calling(running) as caller:
        await engine.until(lambda engine: engine.running == 1)
        return await release_time(engine, caller)


async def release_time(engine: FakeEngine, caller: Caller, *, politely: bool = False) -> float:
    """Hang up, and return the seconds until the engine's connection and slot are free."""
    before = len(engine.hang_ups)
    hung_up = caller.hang_up(politely=politely)
    await engine.until(lambda engine: len(engine.hang_ups) > before, within_s=AT_MOST_S)
    assert engine.running == 0
    return engine.hang_ups[-1] - hung_up


cases = pytest.mark.parametrize(
    "case",
    [
        pytest.param(before_the_head, id="26 before the head"),
        pytest.param(in_mid_stream, id="26 mid-stream"),
        pytest.param(between_two_tokens, id="26 between two tokens"),
        pytest.param(without_a_stream, id="27 not streamed"),
        pytest.param(half_way_through_a_whole_answer, id="27 half-way through"),
    ],
)


@pytest.mark.alone
@cases
async def test_26_27_a_hang_up_reaches_the_engine_at_once_and_is_no_failure(
    vllm: FakeEngine,
    start_gateway: StartGateway,
    capsys: pytest.CaptureFixture[str],
    case: Case,
) -> None:
    async with start_gateway(**alone(vllm, slots=1), log="json") as running:
        seconds = [await case(running, vllm) for _ in range(9)]
        await running.until(idle)
        connections = vllm.connections
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
        blamed = replica_state(running)
        vllm.ttft_s = vllm.gap_s = 0
        await answered(running)  # in the one slot there is

    assert max(seconds) < AT_MOST_S
    assert statistics.median(seconds) < USUALLY_S
    assert [line["outcome"] for line in lines] == ["cancelled"] * 9
    assert blamed == (0, 0)
    assert connections <= 1  # at most one that a look has left


async def test_26_a_fin_is_a_hang_up_too(vllm: FakeEngine, start_gateway: StartGateway) -> None:
    vllm.gap_s = 0.01
    async with start_gateway(**alone(vllm)) as running:
        seconds = []
        for fields in ({"stream": True}, {"stream": False}) * 3:
            async with calling(running, max_tokens=1000, **fields) as caller:
                await vllm.until(lambda engine: engine.running == 1)
                seconds.append(await release_time(vllm, caller, politely=True))

    assert max(seconds) < AT_MOST_S
    assert statistics.median(seconds) < USUALLY_S


async def test_26_a_hang_up_of_a_client_that_had_stopped_reading_is_noticed(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm, slots=1)) as running:
        piece = Send(event(chunk("x" * 65536)))
        vllm.script([*stream(chunk("Hi")), Repeat([piece, Pause(0.001)])])
        async with calling(running, stream=True) as caller:
            # Everything on the way is full, until the engine itself waits to be read.
            await blocked(vllm)
            seconds = await release_time(vllm, caller)

        assert seconds < AT_MOST_S
        await running.until(idle)
        assert await answered(running) < 1


async def blocked(engine: FakeEngine) -> None:
    """Return when the engine is blocked in sending."""
    async with asyncio.timeout(10):
        while not any(not c._writable.is_set() for c in engine._server.connections):
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)
        assert any(not c._writable.is_set() for c in engine._server.connections)


@pytest.mark.alone
async def test_26_the_next_request_has_the_slot_at_once(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm, slots=1)) as running:
        vllm.script([Serve(tokens=3), Silence()])
        async with calling(running, stream=True) as caller:
            await caller.until(b"token2")
            next_one = asyncio.create_task(answered(running))
            await running.until(waiting(1))
            hung_up = caller.hang_up()
            await next_one

    assert chats(vllm)[1].at - hung_up < USUALLY_S


async def test_26_a_hang_up_is_not_retried_on_another_lane(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**pair(ollama, vllm)) as running:
        for _ in range(5):
            ollama.script(Silence())
            async with calling(running, stream=True) as caller:
                await ollama.until(lambda engine: engine.running == 1)
                await release_time(ollama, caller)
        await running.until(idle)
        lanes = (await running.status("m"))["lanes"]

    assert chats(vllm) == []
    assert lanes["ollama"]["replicas"][0]["state"] == "ready"


async def test_26_a_hang_up_during_a_second_attempt_reaches_that_engine(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**pair(ollama, vllm), limits={"first_token_s": 0.2}) as running:
        ollama.script(Silence())
        vllm.script([Serve(tokens=0), Silence()])
        async with calling(running, stream=True) as caller:
            await vllm.until(lambda engine: engine.running == 1)
            seconds = await release_time(vllm, caller)
        await running.until(idle)

    assert seconds < USUALLY_S
    assert (len(ollama.hang_ups), len(vllm.hang_ups)) == (1, 1)


async def test_26_a_hang_up_during_the_connect_sends_nothing(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm, slots=1), limits={"connect_s": 5}) as running:
        vllm.deaf()
        async with calling(running) as caller:
            await running.until(lambda gateway: scheduler(gateway).demand == 1)
            began = caller.hang_up()
        await running.until(idle, within_s=AT_MOST_S)
        seconds = time.monotonic() - began

    assert seconds < USUALLY_S + 0.01
    assert chats(vllm) == []


async def test_26_a_hang_up_within_the_body_is_no_request(
    vllm: FakeEngine, start_gateway: StartGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    async with start_gateway(**alone(vllm), log="json") as running:
        _, writer = await asyncio.open_connection("127.0.0.1", urlsplit(running.url).port)
        writer.write(b"POST %b HTTP/1.1\r\nhost: gateway\r\n" % CHAT.encode())
        writer.write(b'content-length: 1000\r\n\r\n{"model": "m"')
        await running.http.get("/health")  # by now it has been read
        writer.transport.abort()
        await answered(running)
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]

    assert sorted(line["outcome"] for line in lines) == ["cancelled", "ok"]
    assert len(chats(vllm)) == 1


# 25. In the queue


async def test_25_a_request_hung_up_in_the_queue_leaves_it_and_is_never_sent(
    vllm: FakeEngine, start_gateway: StartGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = []
    async with start_gateway(**alone(vllm, slots=1), log="json") as running:
        vllm.script(Silence())
        async with calling(running, stream=True) as first:
            await vllm.until(lambda engine: engine.running == 1)
            for fields in ({"stream": True}, {"stream": False}) * 5:
                async with calling(running, **fields) as second:
                    await running.until(waiting(1))
                    began = second.hang_up()
                    await running.until(waiting(0), within_s=AT_MOST_S)
                    seconds.append(time.monotonic() - began)
            demand = scheduler(running.gateway).demand
            await release_time(vllm, first)  # the slot is free: now it could be sent
        await running.until(idle)
        await answered(running)
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]

    assert max(seconds) < AT_MOST_S
    assert statistics.median(seconds) < USUALLY_S
    assert demand == 1
    assert len(chats(vllm)) == 2
    assert [line["outcome"] for line in lines] == ["cancelled"] * 11 + ["ok"]
    assert [line["attempts"] for line in lines] == [0] * 10 + [1, 1]


async def test_25_the_requests_behind_move_up_in_order(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm, slots=1)) as running:
        vllm.script(Silence())
        async with calling(running) as first:
            await vllm.until(lambda engine: engine.running == 1)
            tasks = []
            async with calling(running, max_tokens=1) as gone:
                await running.until(waiting(1))
                for number in (2, 3, 4):
                    tasks.append(asyncio.create_task(answered(running, max_tokens=number)))
                    await running.until(waiting(number))
                gone.hang_up()
                await running.until(waiting(3))
            first.hang_up()
            await asyncio.gather(*tasks)

    assert [request.body.get("max_tokens") for request in chats(vllm)] == [None, 2, 3, 4]


async def test_25_a_hang_up_as_its_slot_becomes_free_passes_it_on(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm, slots=1)) as running:
        for _ in range(10):
            vllm.script(Silence())
            async with calling(running) as first, calling(running) as second:
                await running.until(waiting(1))
                first.hang_up()
                second.hang_up()
            await running.until(idle)

        assert await answered(running) < 1
    assert all(request.ended in ("hung up", "done") for request in chats(vllm))


async def test_25_26_27_hang_ups_at_any_moment_leave_nothing_behind(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    dice = random.Random(25)
    for engine in (ollama, vllm):
        engine.ttft_s = 0.02
        engine.gap_s = 0.002
    async with start_gateway(**pair(ollama, vllm, slots=2, queue=100)) as running:

        async def some_client() -> None:
            async with calling(running, stream=dice.random() < 0.5, max_tokens=20) as caller:
                await asyncio.sleep(dice.random() * 0.15)
                caller.hang_up(politely=dice.random() < 0.5)

        await asyncio.gather(*(some_client() for _ in range(100)))
        await running.until(idle)
        await ollama.until(lambda engine: not engine.running)
        await vllm.until(lambda engine: not engine.running)
        status = await running.status("m")

        for engine, kind in ((ollama, "ollama"), (vllm, "vllm")):
            assert engine.peak_running <= 2
            assert status["lanes"][kind]["replicas"][0]["room"] == 2
            await answered(running, model=f"m@{kind}")
        assert len(ollama.hang_ups) + len(vllm.hang_ups) > 0


# 49. Too long in the queue


@pytest.mark.alone
@pytest.mark.parametrize("fields", [{}, {"stream": True}], ids=["whole", "stream"])
async def test_49_a_request_that_waits_too_long_receives_503_and_is_never_sent(
    vllm: FakeEngine, start_gateway: StartGateway, fields: dict[str, Any]
) -> None:
    async with start_gateway(**alone(vllm, slots=1), limits={"max_wait_s": 0.4}) as running:
        vllm.script(Silence())
        async with calling(running, stream=True) as first:
            await vllm.until(lambda engine: engine.running == 1)
            began = time.monotonic()
            answer = await running.http.post(CHAT, json=chat(max_tokens=7, **fields))
            seconds = time.monotonic() - began
            left = scheduler(running.gateway).waiting, scheduler(running.gateway).demand
            await release_time(vllm, first)  # the slot is free: now it could be sent
        await running.until(idle)
        await answered(running)

    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (503, "waited_too_long")
    assert answer.json().keys() == {"error"}
    assert error.keys() == {"message", "type", "param", "code"}
    assert 1 <= int(answer.headers["retry-after"]) <= 120
    assert answer.headers["x-request-id"].startswith("req_")
    assert (answer.headers["x-gateway-lane"], answer.headers["x-gateway-reason"]) == (
        "none",
        "the gateway's own",
    )
    assert 0.39 < seconds < 0.7
    assert left == (0, 1)
    assert [request.body.get("max_tokens") for request in chats(vllm)] == [None, None]


async def test_49_a_slot_that_becomes_free_at_the_deadline_is_used_or_passed_on(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    answers = []
    async with start_gateway(**alone(vllm, slots=1), limits={"max_wait_s": 0.1}) as running:
        for late_s in (-0.004, -0.002, 0.0, 0.002, 0.004):
            vllm.script([Pause(0.1 + late_s), Serve()])
            first = asyncio.create_task(answered(running))
            await vllm.until(lambda engine: engine.running == 1)
            answer = await running.http.post(CHAT, json=chat(max_tokens=7))
            answers.append(answer.status_code)
            await first
            await running.until(idle)
        await answered(running)

    assert set(answers) <= {200, 503}
    sent = [request for request in chats(vllm) if request.body.get("max_tokens") == 7]
    assert len(sent) == answers.count(200)


async def test_49_each_request_has_its_own_deadline(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm, slots=1), limits={"max_wait_s": 0.3}) as running:
        vllm.script([Pause(0.45), Serve()])
        first = asyncio.create_task(answered(running))
        await vllm.until(lambda engine: engine.running == 1)
        early = asyncio.create_task(running.http.post(CHAT, json=chat()))
        await asyncio.sleep(0.2)
        late = asyncio.create_task(running.http.post(CHAT, json=chat()))

        assert (await early).status_code == 503
        assert (await late).status_code == 200
        await first
