"""Two real Ollamas behind one lane, and one is killed while people ask."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.engines import rig
from tests.engines.conftest import running as started
from tests.support.crowd import crowd
from tests.support.gateways import run_gateway

#: Few, and short answers: two Ollamas on two cores are far slower than one.
PEOPLE = 8
SLOTS = 4


@pytest.fixture
def one() -> Iterator[rig.Engine]:
    yield from started(rig.ollama(num_parallel=SLOTS))


@pytest.fixture
def other() -> Iterator[rig.Engine]:
    yield from started(rig.ollama(num_parallel=SLOTS))


def poem(dice: random.Random) -> dict[str, Any]:
    content = f"{dice.random()}: write a short poem about the sea."
    return {
        "model": "m",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": dice.randint(4, 12),
    }


@pytest.fixture
def servers() -> Iterator[ExitStack]:
    """Those that come later; they go when the test, and with it the last answer, is over."""
    with ExitStack() as stack:
        yield stack


@pytest.mark.timeout(180)
async def test_of_two_ollamas_one_is_killed_under_load_and_comes_back(
    one: rig.Engine, other: rig.Engine, servers: ExitStack
) -> None:
    lane = {"model": one.model, "slots": SLOTS}
    async with (
        run_gateway(
            engines={"ollama": {"urls": [one.url, other.url]}},
            models={"m": {"lanes": {"ollama": lane}}},
        ) as running,
        crowd(running, PEOPLE, poem) as people,
    ):
        scheduler = running.gateway.catalogue.models["m"].admission.scheduler
        dying, staying = scheduler.lanes["ollama"].replicas
        await people.more(PEOPLE)
        await people.until(lambda: dying.running == SLOTS, within_s=60)
        os.killpg(one.pid, signal.SIGKILL)
        await running.until(lambda _: dying.capacity == 0)
        alone = await people.more(2 * PEOPLE)

        again = rig.ollama(num_parallel=SLOTS, port=int(one.url.rpartition(":")[2]))
        await asyncio.to_thread(servers.enter_context, again)
        await running.until(lambda _: dying.capacity == SLOTS, within_s=60)
        both = await people.more(SLOTS)
        await running.until(lambda _: dying.running and staying.running, within_s=60)

    outcomes = Counter(answer.outcome for answer in people.answers)
    assert {answer.outcome for answer in alone + both} == {"whole"}
    assert outcomes.keys() <= {"whole", "cut"}
    assert outcomes["cut"] <= SLOTS
