"""Two replicas of one lane, each its own process; one is killed under load."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from backends.fake import FakeEngine, status
from gateway.relay.retry import RETRY_SAVED
from tests.faults.test_reachability import served
from tests.faults.test_streams import Logged, logged  # noqa: F401 - a fixture
from tests.support.crowd import crowd
from tests.support.gateways import Running, StartGateway
from tests.support.models import alone, chat

PEOPLE = 32
#: One server alone has too few for all, so that some wait in the queue meanwhile.
SLOTS = 24
#: What the fake says, as long as it may.
EVERYTHING = " ".join(f"token{number}" for number in range(100))


@dataclass(frozen=True)
class Server:
    """A fake vLLM in its own process."""

    process: Process
    url: str

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@asynccontextmanager
async def server(port: int = 0) -> AsyncIterator[Server]:
    """A fake vLLM for as long as the context is open: TTFT 0.2 s, 20 ms between tokens."""
    options = f"--kind vllm --model Small-1B --ttft 0.2 --gap 0.02 --slots {SLOTS} --port {port}"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "backends.fake", *options.split(), stdout=PIPE
    )
    try:
        assert process.stdout is not None
        yield Server(process, (await process.stdout.readline()).decode().split()[-1])
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def two(one: str, other: str, slots: int = SLOTS) -> dict[str, Any]:
    """Settings of one lane with two replicas."""
    return {
        "engines": {"vllm": {"urls": [one, other]}},
        "models": {"m": {"lanes": {"vllm": {"model": "Small-1B", "slots": slots}}}},
    }


async def states(running: Running) -> list[str]:
    """The state of each replica in `/status`."""
    said = (await running.status("m"))["lanes"]["vllm"]["replicas"]
    return [replica["state"] for replica in said]


def random_chat(dice: random.Random) -> dict[str, Any]:
    """A chat of random length, so that clients do not fall into step."""
    return chat(max_tokens=dice.randint(5, 25))


async def test_of_two_replicas_one_is_killed_under_load_and_comes_back(
    start_gateway: StartGateway,
    logged: Logged,  # noqa: F811 - the fixture
) -> None:
    async with (
        AsyncExitStack() as servers,  # they go when the last answer is over
        server() as one,
        server() as other,
        start_gateway(**two(one.url, other.url), log="json") as running,
        crowd(running, PEOPLE, random_chat) as people,
    ):
        lane = running.gateway.catalogue.models["m"].admission.scheduler.lanes["vllm"]
        dying, staying = lane.replicas

        def half_have_begun() -> bool:
            begun = [bool(answer.body) for answer in people.now]
            return min(begun.count(True), begun.count(False)) >= 12

        await people.more(3 * PEOPLE)
        await people.until(half_have_begun)
        one.process.kill()
        had, killed = dying.running, time.monotonic()

        # Found dead, while all goes on at the other.
        await running.until(lambda _: dying.capacity == 0)
        later = await people.more(2 * PEOPLE)
        alone = dying.running, await states(running)

        # It returns, and has all its slots again as answer after answer of it is good.
        await servers.enter_async_context(server(one.port))
        await running.until(lambda _: dying.capacity == SLOTS, within_s=20)
        await running.until(lambda _: dying.running and staying.running)
        await people.more(PEOPLE)

    outcomes = Counter(answer.outcome for answer in people.answers)
    lines = [line for line in logged() if line["model"] == "m"]
    tried_again = [line for line in lines if line["attempts"] == 2]
    cut = [answer for answer in people.answers if answer.outcome == "cut"]

    assert alone == (0, ["cannot be reached", "ready"])
    assert {answer.outcome for answer in later} == {"whole"}
    # Nobody lost an answer that had not begun …
    assert outcomes.keys() == {"whole", "cut"}
    assert tried_again
    assert {(line["outcome"], line["status"]) for line in tried_again} == {("ok", 200)}
    # … and those that had begun say that they are not whole, and repeat nothing.
    assert 0 < len(cut) <= had
    assert max(answer.asked for answer in cut) < killed
    assert len(cut) == Counter(line["outcome"] for line in lines)["truncated"]
    assert all(EVERYTHING.startswith(answer.text) for answer in people.answers)
    assert len(people.answers) == len(lines)


async def test_requests_that_a_dead_replica_had_not_begun_to_answer_go_to_the_other(
    start_gateway: StartGateway,
) -> None:
    slots = 32
    async with (
        FakeEngine("vllm", ["Small-1B"], ttft_s=3, slots=slots) as dying,
        FakeEngine("vllm", ["Small-1B"], ttft_s=3, slots=slots) as staying,
        start_gateway(**two(dying.url, staying.url, slots)) as running,
    ):
        asking = [asyncio.create_task(served(running, stream=True)) for _ in range(2 * slots)]
        await dying.until(lambda engine: engine.running == slots)
        dying.kill()
        staying.ttft_s = 0

        assert await asyncio.gather(*asking) == ["vllm"] * 2 * slots
        assert slots > RETRY_SAVED


async def test_a_server_without_a_health_page_is_ready_when_it_lists_the_model(
    start_gateway: StartGateway,
) -> None:
    """As Ray Serve's OpenAI server."""
    async with FakeEngine("vllm", ["Small-1B"]) as engine:
        for path in ("/health", "/is_sleeping", "/version", "/metrics"):
            engine.script(then=status(404, "Not Found"), path=path)
        async with start_gateway(**alone(engine)) as running:
            assert await served(running) == "vllm"
