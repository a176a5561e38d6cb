"""What goes wrong while the GPU passes from one engine to the other, step by step.

Each ends in service, or in a plain refusal that says when to come again for as long as no
engine can be had. People ask through all of it; each is answered once, or told why not.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from backends.fake import DONE, GIB, Answer, FakeEngine, Kill, Serve, Silence, status
from backends.fake.gpu import Allocation
from gateway.gpu.state import Step
from gateway.routing.switch_cost import HandoverCost
from gateway.settings import Timings
from tests.support import exclusive
from tests.support.exclusive import (
    NEEDS_GIB,
    PING,
    SHORT,
    Box,
    Served,
    boxed,
    failed,
    gone,
    stream_of,
)
from tests.support.gateways import StartGateway

#: How a load, a wake and the like are told apart in a script.
LOAD = {"ollama": "load", "vllm": "/wake_up"}
UNLOAD = {"ollama": "unload", "vllm": "/sleep"}
OTHER = {"ollama": "vllm", "vllm": "ollama"}
#: Whoever else is at the GPU, a training job perhaps.
STRANGER = 1
#: As soon as one step is too long, and its way back: the deadlines above and as much again.
SOON_S = 20.0


#: Between two attempts there is not much time.
HASTY = Timings(gpu_retry_min_s=0.1, gpu_retry_max_s=0.2)


def serving(
    start_gateway: StartGateway, box: Box, **settings: Any
) -> AbstractAsyncContextManager[Served]:
    """A gateway before the box that tries again soon."""
    return exclusive.serving(start_gateway, box, timings=HASTY, **settings)


@pytest.fixture
def never_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hand-over is ever made for the sake of speed."""
    monkeypatch.setattr(HandoverCost, "threshold", lambda *_, **__: math.inf)


@dataclass
class People:
    """Some who ask all the time, and what became of each request."""

    served: Served
    answers: dict[str, httpx.Response] = field(default_factory=dict)
    streamed: set[str] = field(default_factory=set)
    _number: itertools.count[int] = field(default_factory=itertools.count)

    async def ask_until(self, leaving: asyncio.Event) -> None:
        while not leaving.is_set():
            number = next(self._number)
            text = f"question {number}"
            if number % 2:
                self.streamed.add(text)
            self.answers[text] = await self.served.ask(text, stream=number % 2 == 1)
            await asyncio.sleep(0.02)

    async def served_at(self, kind: str) -> None:
        """Return when the next who ask are answered by this engine."""
        before = len(self._whole(kind))
        await self.served.until(lambda: len(self._whole(kind)) > before + 1, within_s=SOON_S)

    def _whole(self, kind: str) -> list[str]:
        return [
            text
            for text, answer in self.answers.items()
            if self.verdict(text) == "answered" and self.served.box.answered_by(text)[-1] == kind
        ]

    def verdict(self, text: str) -> str:
        """Answered, refused or broken off; anything else is an error."""
        answer = self.answers[text]
        if answer.headers["content-type"].startswith("application/json"):
            if answer.status_code == 200:
                assert answer.json()["choices"][0]["finish_reason"]
                return "answered"
            assert answer.status_code in (502, 503, 504), answer.text
            failed(answer, answer.status_code, answer.json()["error"]["code"])
            return "refused"
        assert answer.status_code == 200
        assert answer.content.endswith(DONE)
        assert answer.content.count(DONE) == 1
        return "broken off" if b'data: {"error"' in answer.content else "answered"

    def check(self) -> None:
        """Each was answered once or told why not, and the lane that was named was true."""
        for text, answer in self.answers.items():
            verdict, asked = self.verdict(text), self.served.box.answered_by(text)
            # One whose engine died under it is tried a second time, at the other.
            assert len(set(asked)) == len(asked) <= 2, (text, asked)
            if verdict == "answered":
                begun = not answer.content.startswith(PING)
                assert not begun or answer.headers["x-gateway-lane"] == asked[-1], (text, asked)
            elif verdict == "refused" and answer.json()["error"]["code"] == "waited_too_long":
                assert asked == []


@asynccontextmanager
async def asked(served: Served, number: int = 3) -> AsyncIterator[People]:
    """People who ask as long as the context is open; all are looked at in the end."""
    people = People(served)
    leaving = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for _ in range(number):
            group.create_task(people.ask_until(leaving))
        try:
            yield people
        finally:
            leaving.set()
    people.check()


LIMITS = {"heartbeat_s": 0.05}


# The next one does not come: back to the one before


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong in the engine that is to have the GPU."""

    kind: str
    inject: Callable[[FakeEngine], object]
    #: The step that fails, as the hand-over tells it.
    step: Step
    dies: bool = False


def _on(path: str, answer: Answer) -> Callable[[FakeEngine], object]:
    return lambda engine: engine.script(then=answer, path=path)


def _generating(answer: Answer) -> Callable[[FakeEngine], object]:
    return lambda engine: engine.script(then=answer)


def _stuck(engine: FakeEngine) -> None:
    engine.wakes_stuck = True


AWAKE = status(200, body={"status": "awake", "tags": None})
TARGETS = {
    "wake says 500": Fault("vllm", _on("/wake_up", status(500)), Step.LOADING),
    "never wakes": Fault("vllm", _on("/wake_up", Silence()), Step.LOADING),
    "only says that it woke": Fault("vllm", _on("/wake_up", AWAKE), Step.LOADING),
    "dies of waking": Fault("vllm", _on("/wake_up", Kill()), Step.LOADING, dies=True),
    "dies when awake": Fault("vllm", _on("/wake_up", [Serve(), Kill()]), Step.LOADING, dies=True),
    "wakes and never generates": Fault("vllm", _stuck, Step.PROBING, dies=True),
    "dies of its first token": Fault("vllm", _generating(Kill()), Step.PROBING, dies=True),
    "fails at its first token": Fault("vllm", _generating(status(500)), Step.PROBING),
    "load says 500": Fault("ollama", _on("load", status(500)), Step.LOADING),
    "never loads": Fault(
        "ollama", lambda engine: setattr(engine, "load_s", math.inf), Step.LOADING
    ),
    "dies of loading": Fault("ollama", _on("load", Kill()), Step.LOADING, dies=True),
    "loads and never generates": Fault("ollama", _generating(Silence()), Step.PROBING),
}


@pytest.mark.parametrize("fault", TARGETS.values(), ids=TARGETS)
async def test_where_the_next_engine_does_not_come_the_one_before_serves_on_until_it_does(
    tmp_path: Path, start_gateway: StartGateway, fault: Fault
) -> None:
    kind, source = fault.kind, OTHER[fault.kind]
    async with boxed(tmp_path, loaded=[source]) as box:
        engine = box.engine(kind)
        settings = {**SHORT, "limits": LIMITS, "holder": source}
        async with serving(start_gateway, box, **settings) as served, asked(served) as people:
            await people.served_at(source)
            fault.inject(engine)
            await served.pin(kind)
            await served.until(
                lambda: len(served.outcomes) == 1 and served.outcomes[0] != "under way"
            )
            outcome = served.outcomes[0]
            await people.served_at(source)

            engine.heal()
            engine.load_s, engine.wakes_stuck = 0.0, False
            if fault.dies:
                engine.kill()
                box.revive(kind)
                await engine.up()
            await served.until(kind, within_s=SOON_S)
            await people.served_at(kind)

    assert outcome.startswith(f"failed: {fault.step} {kind}: ")
    assert all(people.verdict(text) == "answered" for text in people.answers)


async def test_an_engine_that_dies_before_its_turn_is_waited_for_but_not_for_long(
    box: Box, start_gateway: StartGateway
) -> None:
    box.ollama.settle_s = 0.4
    settings = {**SHORT, "free_s": 5.0, "limits": LIMITS}
    async with serving(start_gateway, box, **settings) as served, asked(served) as people:
        await people.served_at("ollama")
        await served.pin("vllm")
        await served.until(Step.FREEING)
        box.vllm.kill()
        await served.until(Step.LOADING)
        await served.until("ollama", within_s=SOON_S)
        await people.served_at("ollama")
        box.revive("vllm")
        await box.vllm.up()
        await served.until("vllm", within_s=SOON_S)
        await people.served_at("vllm")
        outcomes = served.outcomes

    assert "failed: loading vllm" in outcomes[1]
    assert outcomes[-1] == "done"


# The one before does not go


async def test_an_engine_that_dies_while_it_drains_has_given_its_memory(
    box: Box, start_gateway: StartGateway
) -> None:
    settings = {**SHORT, "drain_s": 10.0, "limits": LIMITS}
    async with serving(start_gateway, box, **settings) as served, asked(served) as people:
        await people.served_at("ollama")
        box.ollama.tokens, box.ollama.gap_s = 100_000, 0.01
        async with stream_of(served, "endless") as endless:
            parts = endless.aiter_raw()
            await anext(parts)
            await served.pin("vllm")
            await served.until(Step.DRAINING)
            box.ollama.kill()
            rest = b"".join([part async for part in parts])
        await served.until("vllm")
        await people.served_at("vllm")
        box.ollama.tokens, box.ollama.gap_s = 5, 0.0
        await box.ollama.up()
        await served.pin("ollama")
        await served.until("ollama")
        await people.served_at("ollama")
        outcomes = served.outcomes

    assert rest.endswith(DONE)
    assert b'"code":"engine_failed"' in rest
    assert outcomes == ["done"] * 3


@pytest.mark.parametrize("source", ["ollama", "vllm"])
async def test_an_engine_that_dies_while_it_unloads_has_given_its_memory(
    tmp_path: Path, start_gateway: StartGateway, source: str
) -> None:
    target = OTHER[source]
    async with boxed(tmp_path, loaded=[source]) as box:
        box.ollama.unload_s = box.vllm.sleep_s = math.inf
        settings = {**SHORT, "unload_s": 10.0, "limits": LIMITS, "holder": source}
        async with serving(start_gateway, box, **settings) as served, asked(served) as people:
            await people.served_at(source)
            await served.pin(target)
            await box.engine(source).until(lambda e: e.paused or box.asked(source, "/api/generate"))
            while_unloading = served.owner.state.step
            box.engine(source).kill()
            await served.until(target)
            await people.served_at(target)
            outcomes = served.outcomes

    assert while_unloading is Step.UNLOADING
    assert outcomes == ["done"]


@pytest.mark.parametrize("answer", [status(500), Silence()], ids=["says 500", "never answers"])
@pytest.mark.parametrize("source", ["ollama", "vllm"])
async def test_an_engine_that_does_not_give_its_memory_keeps_the_gpu_and_serves(
    tmp_path: Path, start_gateway: StartGateway, source: str, answer: Answer
) -> None:
    target = OTHER[source]
    async with boxed(tmp_path, loaded=[source]) as box:
        settings = {**SHORT, "limits": LIMITS, "holder": source}
        async with serving(start_gateway, box, **settings) as served, asked(served) as people:
            await people.served_at(source)
            box.engine(source).script(answer, path=UNLOAD[source])
            await served.pin(target)
            await served.until(lambda: served.outcomes and served.outcomes[0] != "under way")
            outcome = served.outcomes[0]
            await people.served_at(source)
            await served.until(target, within_s=SOON_S)
            await people.served_at(target)

    assert outcome.startswith(f"failed: unloading {source}: ")
    assert all(people.verdict(text) == "answered" for text in people.answers)


# Nobody can be had: a plain refusal meanwhile


@asynccontextmanager
async def nobody_serves(served: Served) -> AsyncIterator[None]:
    """For as long as the context is open everybody is refused at once, streams too."""
    await served.until(Step.DOWN, within_s=SOON_S)
    refused = [await served.ask(f"refused {n}", stream=n % 2 == 0) for n in range(4)]
    # While the next attempt is made it is no other: nobody is kept waiting for it.
    await served.until(lambda: served.owner.state.step is not Step.DOWN, within_s=SOON_S)
    refused += [await served.ask(f"refused {n}", stream=n % 2 == 0) for n in range(4, 8)]
    ready = await served.running.http.get("/ready")
    progress = ready.json()["gpu"]
    for answer in refused:
        assert "could not be loaded; it is tried again" in failed(answer)
    assert ready.status_code == 503
    assert progress["holder"] is None
    assert progress["trouble"]
    yield
    assert all(served.box.answered_by(f"refused {n}") == [] for n in range(8))


@pytest.mark.parametrize("source", ["ollama", "vllm"])
async def test_memory_that_an_engine_never_frees_is_free_after_its_restart(
    tmp_path: Path, start_gateway: StartGateway, source: str
) -> None:
    async with boxed(tmp_path, loaded=[source]) as box:
        engine = box.engine(source)
        settings = {**SHORT, "limits": LIMITS, "holder": source}
        async with serving(start_gateway, box, **settings) as served, asked(served) as people:
            engine.unload_s = engine.sleep_s = math.inf
            await served.pin(OTHER[source])
            async with nobody_serves(served):
                engine.unload_s = engine.sleep_s = 0.0
                engine.kill()
                box.revive(source)
                await engine.up()
            await served.until(OTHER[source], within_s=SOON_S)
            await people.served_at(OTHER[source])


async def test_memory_that_is_never_free_is_waited_for(
    box: Box, start_gateway: StartGateway
) -> None:
    settings = {**SHORT, "limits": LIMITS}
    async with serving(start_gateway, box, **settings) as served, asked(served) as people:
        box.ollama.settle_s = math.inf
        await served.pin("vllm")
        async with nobody_serves(served):
            assert box.vllm.asleep, "woken with its memory taken: that kills it"
            assert box.asked("vllm", "/wake_up") == []
            box.ollama.settle_s = 0.0
            box.ollama.kill()
            await box.ollama.up()
        await served.until("vllm", within_s=SOON_S)
        await people.served_at("vllm")


async def test_a_stranger_at_the_gpu_is_waited_for(box: Box, start_gateway: StartGateway) -> None:
    settings = {**SHORT, "limits": LIMITS}
    async with serving(start_gateway, box, **settings) as served, asked(served) as people:
        await people.served_at("ollama")
        stranger = box.gpu.allocate(STRANGER, 30 * GIB)
        await people.served_at("ollama")  # it is in nobody's way as long as nothing moves
        await served.pin("vllm")
        async with nobody_serves(served):
            why = served.owner.records[-1].outcome
            box.gpu.release(stranger)
        await served.until("vllm", within_s=SOON_S)
        await people.served_at("vllm")

    assert "freeing vllm: not done after 0.5 s" in why
    assert "nvidia-smi shows other processes on the GPU" in why


@dataclass
class TwoCards:
    """Two cards of 80 GiB; a stranger has some of the second."""

    taken: int

    def total(self) -> int:
        return 160 * GIB

    def free(self) -> int:
        return 160 * GIB - self.taken

    def least(self) -> int:
        return 80 * GIB - self.taken

    def by_card(self) -> list[tuple[str, int, int]]:
        return [("card 0", 80 * GIB, 80 * GIB), ("card 1", 80 * GIB, self.least())]

    def processes(self) -> list[tuple[int, int]]:
        return [(STRANGER, self.taken)]


async def test_a_card_that_is_half_full_is_waited_for_where_a_model_needs_its_share_on_each(
    box: Box, start_gateway: StartGateway
) -> None:
    memory = TwoCards(taken=40 * GIB)
    settings = {**box.settings(**SHORT, limits=LIMITS, timings=HASTY), "memory": memory}
    async with start_gateway(**settings) as running:
        served = Served.of(running, box)
        await served.until("ollama")  # spread over the cards as there is room
        await served.pin("vllm")
        await served.until(lambda: served.outcomes[-1].startswith("failed"))
        why = served.outcomes[-1]
        woken = box.asked("vllm", "/wake_up")
        memory.taken = 0
        await served.until("vllm", within_s=SOON_S)

    assert memory.free() > NEEDS_GIB * GIB, "there is room in all"
    assert "card 1 has 40.0 GiB free of the 45.0 needed on each of 2 cards" in why
    assert woken == []


@pytest.mark.parametrize("returns", ["ollama", "vllm"])
async def test_when_both_engines_are_dead_the_one_that_returns_serves(
    box: Box, start_gateway: StartGateway, returns: str
) -> None:
    settings = {**SHORT, "limits": LIMITS}
    async with serving(start_gateway, box, **settings) as served, asked(served) as people:
        await people.served_at("ollama")
        box.vllm.kill()
        box.ollama.kill()
        async with nobody_serves(served):
            await box.engine(returns).up()
        await served.until(returns, within_s=SOON_S)
        await people.served_at(returns)


async def test_what_was_found_and_does_not_generate_is_left_for_the_other(
    tmp_path: Path, start_gateway: StartGateway
) -> None:
    async with boxed(tmp_path, loaded=["vllm"]) as box:
        box.vllm.stuck = True
        async with serving(start_gateway, box, holder="ollama", **SHORT) as served:
            answer = await served.ask()

    assert answer.headers["x-gateway-lane"] == "ollama"
    assert box.vllm.asleep


async def test_released_while_no_engine_serves_the_memory_is_free_in_the_end(
    box: Box, start_gateway: StartGateway
) -> None:
    async with serving(start_gateway, box, **SHORT) as served:
        for engine in box.engines:
            engine.script(then=status(500))  # both load, and neither generates
        await served.pin("vllm")
        async with nobody_serves(served):
            pass
        await served.release()
        await served.until(Step.FREE, within_s=SOON_S)
        free = box.gpu.free()
        refused = await served.ask()
        for engine in box.engines:
            engine.heal()
        await served.pin("auto")
        back = await served.ask()

    assert free == box.gpu.total() - box.gpu.remainder
    assert "the operator has released the GPU" in failed(refused)
    assert back.status_code == 200


@pytest.mark.parametrize("source", ["ollama", "vllm"])
async def test_released_with_an_answer_that_outlasts_the_drain_it_is_free_when_that_is_over(
    tmp_path: Path, start_gateway: StartGateway, source: str
) -> None:
    async with boxed(tmp_path, loaded=[source]) as box:
        engine = box.engine(source)
        async with serving(start_gateway, box, holder=source, **SHORT) as served:
            engine.tokens, engine.gap_s = 100_000, 0.01
            async with stream_of(served, "endless") as endless:
                parts = endless.aiter_raw()
                await anext(parts)
                await served.release()
                await served.until(Step.UNLOADING)
                await served.until(lambda: served.owner.states.moving_s() > 1.5)
                while_it_runs = (served.owner.state.step, engine.running, box.gpu.free())
            await served.until(Step.FREE, within_s=SOON_S)
            free = box.gpu.free()

    assert while_it_runs[:2] == (Step.UNLOADING, 1)
    assert while_it_runs[2] < free == box.gpu.total() - box.gpu.remainder


# Whoever holds it dies


async def test_when_the_holder_dies_and_stays_away_the_other_has_the_gpu(
    box: Box, start_gateway: StartGateway
) -> None:
    settings = {**SHORT, "limits": LIMITS}
    async with serving(start_gateway, box, **settings) as served, asked(served) as people:
        await people.served_at("ollama")
        box.ollama.kill()
        await served.until("vllm")
        await people.served_at("vllm")
        moves = [(p.source, p.target, p.outcome) for p in served.owner.records]

    assert moves == [(None, "ollama", "done"), ("ollama", "vllm", "done")]


async def test_when_the_holder_dies_and_returns_waiting_requests_go_to_it_and_nothing_moves(
    box: Box, start_gateway: StartGateway, never_pays: None
) -> None:
    settings = {**SHORT, "limits": LIMITS, "patience_s": 10.0}
    async with serving(start_gateway, box, **settings) as served, asked(served) as people:
        await people.served_at("ollama")
        box.ollama.kill()
        await served.until(lambda: served.waiting == 3)
        await box.ollama.up()
        await served.until(lambda: served.waiting == 0, within_s=5.0)
        await people.served_at("ollama")
        moves = served.owner.policy.moves

    assert moves == 0
    assert box.said("vllm") == []
    refused = [a.json()["error"]["code"] for a in people.answers.values() if a.status_code != 200]
    assert set(refused) <= {"engine_failed"}  # whom it had when it died


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_fails_at_an_engine_that_is_well_moves_nothing(
    box: Box, start_gateway: StartGateway, never_pays: None, *, stream: bool
) -> None:
    async with serving(start_gateway, box, **SHORT) as served:
        box.ollama.script(status(500))
        answer = await served.ask("too much for it", stream=stream)
        moves = served.owner.policy.moves
        next_one = await served.ask("another")

    failed(answer, 502, "engine_failed")
    assert next_one.headers["x-gateway-lane"] == "ollama"
    assert moves == 0


# After a failure


async def test_after_each_failure_it_is_tried_again_and_later_each_time(
    box: Box, start_gateway: StartGateway
) -> None:
    took_s = 0.2
    async with serving(start_gateway, box, handover_s=took_s, **SHORT) as served:
        box.vllm.script(*[status(500)] * 3, path="/wake_up")
        await served.pin("vllm")
        await served.until("vllm", within_s=SOON_S)
        tries = [passage for passage in served.owner.records if passage.target == "vllm"]

    pauses = [later.at - each.at for each, later in itertools.pairwise(tries)]
    assert [try_.outcome.split(":")[0] for try_ in tries] == ["failed"] * 3 + ["done"]
    for number, pause in enumerate(pauses):
        assert pause >= took_s * 2**number * 0.99, pauses


@pytest.mark.parametrize("taken_gib", [0, 80])
async def test_a_model_that_is_partly_on_the_cpu_serves_with_a_warning(
    box: Box, start_gateway: StartGateway, caplog: pytest.LogCaptureFixture, taken_gib: int
) -> None:
    # Nobody said how much it needs, so nobody has waited for the memory.
    for lane in box.models["m"]["lanes"].values():
        del lane["memory_gib"]
    box.gpu.allocate(STRANGER, taken_gib * GIB)
    async with serving(start_gateway, box, **SHORT) as served:
        answer = await served.ask()

    assert (answer.status_code, answer.headers["x-gateway-lane"]) == (200, "ollama")
    assert ("% of small:1b are on the GPU" in caplog.text) == (taken_gib > 0)


# Anything, in any order


class Chaos:
    """What may happen to the box, to the operator's mind and to the people, at random."""

    def __init__(self, served: Served, seed: int) -> None:
        self.served = served
        self.box = served.box
        self.dice = random.Random(seed)
        self.strangers: list[Allocation] = []
        self.events: list[Callable[[], Awaitable[None]]] = [
            self.pin, self.pin, self.auto, self.release, self.kill, self.up, self.up,
            self.stranger, self.leave, self.hang_up, self.hang_up, self.fault, self.fault,
        ]  # fmt: skip

    async def reign(self, number: int) -> None:
        for _ in range(number):
            await self.dice.choice(self.events)()
            await asyncio.sleep(self.dice.random() * 0.15)

    async def end(self) -> None:
        """All is well from now on."""
        for engine in self.box.engines:
            engine.heal()
            await self._up(engine)
        while self.strangers:
            await self.leave()

    def _engine(self) -> FakeEngine:
        return self.dice.choice(self.box.engines)

    async def pin(self) -> None:
        await self.served.pin(self._engine().kind)

    async def auto(self) -> None:
        await self.served.pin("auto")

    async def release(self) -> None:
        await self.served.release()

    async def kill(self) -> None:
        self._engine().kill()

    async def up(self) -> None:
        await self._up(self._engine())

    async def _up(self, engine: FakeEngine) -> None:
        if not engine.alive:
            self.box.revive(engine.kind)
            await engine.up()

    async def stranger(self) -> None:
        if self.box.gpu.free() > 20 * GIB:
            self.strangers.append(self.box.gpu.allocate(STRANGER, 10 * GIB))

    async def leave(self) -> None:
        if self.strangers:
            self.box.gpu.release(self.strangers.pop())

    async def hang_up(self) -> None:
        task = self.served.asking("gone", stream=self.dice.random() < 0.5)
        await asyncio.sleep(self.dice.random() * 0.05)
        await gone(task)

    async def fault(self) -> None:
        engine = self._engine()
        path = self.dice.choice([LOAD, UNLOAD])[engine.kind]
        answers: list[Answer] = [status(500), Silence(), Kill()]
        engine.script(self.dice.choice(answers), path=path)


def tasks_of_ours() -> list[str]:
    """What runs in this loop, without what belongs to a fake's connections."""
    tasks = [str(task.get_coro()) for task in asyncio.all_tasks()]
    return sorted(task for task in tasks if "Connection" not in task)


@pytest.mark.parametrize("seed", [1, 2])
async def test_whatever_happens_all_is_well_in_the_end_and_nothing_is_left_over(
    box: Box, start_gateway: StartGateway, seed: int
) -> None:
    settings = {**SHORT, "limits": {**LIMITS, "max_wait_s": 3.0}, "idle_release_s": 0.5}
    async with serving(start_gateway, box, **settings) as served:
        before = tasks_of_ours()
        async with asked(served, 4) as people:
            chaos = Chaos(served, seed)
            await chaos.reign(30)
            await chaos.end()
            for kind in ("vllm", "ollama"):
                await served.pin(kind)
                await served.until(kind, within_s=SOON_S)
                await people.served_at(kind)
            await served.pin("auto")
        await served.until(Step.FREE)  # nobody asks any more
        scheduler = served.running.gateway.catalogue.models["m"].admission.scheduler
        running = [lane.running for lane in scheduler.lanes.values()]
        await served.until(lambda: len(tasks_of_ours()) <= len(before))

    assert (scheduler.demand, scheduler.waiting, running) == (0, 0, [0, 0])
    assert box.gpu.free() >= NEEDS_GIB * GIB
