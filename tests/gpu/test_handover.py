"""The GPU passes from one engine to the other, over real sockets, between fake engines."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from backends.fake import DONE
from gateway.gpu.state import Step
from gateway.routing.switch_cost import HandoverCost
from gateway.settings import Timings
from tests.support.exclusive import (
    CHAT,
    PING,
    PROBE,
    SHORT,
    Box,
    Served,
    boxed,
    failed,
    gone,
    serving,
    stream_of,
)
from tests.support.gateways import StartGateway

#: Ollama is much faster for one, vLLM for three and more.
STEEP = {
    "version": 1,
    "source": "measured",
    "lanes": {
        "ollama": {"at_once": [1, 2, 8], "seconds": [0.2, 1.0, 8.0]},
        "vllm": {"at_once": [1], "seconds": [2.0]},
    },
}
BACKGROUND = {"x-task": "title_generation"}


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hand-over costs next to nothing, and an hour may have any number of them."""
    monkeypatch.setattr(HandoverCost, "threshold", lambda *_, **__: 0.5)
    monkeypatch.setattr(HandoverCost, "allowed_at", lambda price, *_: price.not_before)


@pytest.fixture
def never_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hand-over is ever made for the sake of speed."""
    monkeypatch.setattr(HandoverCost, "threshold", lambda *_, **__: math.inf)


# Who has it at the start


@pytest.mark.parametrize(
    ("loaded", "holder"),
    [((), "ollama"), (("ollama",), "ollama"), (("vllm",), "vllm"), (("ollama", "vllm"), "ollama")],
    ids=["nobody", "ollama", "vllm", "both"],
)
async def test_a_model_loaded_at_the_start_is_kept_and_not_loaded_again(
    tmp_path: Path, start_gateway: StartGateway, loaded: tuple[str, ...], holder: str
) -> None:
    async with boxed(tmp_path, loaded=loaded) as box:
        async with serving(start_gateway, box, holder=holder) as served:
            answer = await served.ask("first")
            passages = list(served.owner.records)

        loads = [request.body.get("keep_alive") for request in box.asked("ollama", "/api/generate")]
        assert answer.headers["x-gateway-lane"] == holder
        assert box.answered_by("first") == [holder]
        assert loads == ([] if loaded else [-1])
        assert box.asked("vllm", "/wake_up") == []
        assert len(box.asked("vllm", "/sleep")) == (len(loaded) > 1)
        assert len(passages) == (not loaded)
        # Whoever holds it has answered a token before anybody was sent there.
        assert PROBE in box.asked(holder, CHAT)[0].body["messages"][0]["content"]


async def test_a_gateway_that_is_started_again_finds_the_gpu_where_it_was(
    box: Box, start_gateway: StartGateway
) -> None:
    async with serving(start_gateway, box) as served:
        await served.pin("vllm")
        await served.until("vllm")
    woken = len(box.asked("vllm", "/wake_up"))
    async with serving(start_gateway, box, holder="vllm") as served:
        answer = await served.ask("again")

    assert answer.headers["x-gateway-lane"] == "vllm"
    assert woken == len(box.asked("vllm", "/wake_up")) == 1
    assert box.asked("vllm", "/sleep") == []


async def test_a_pin_in_the_settings_is_where_it_begins(
    box: Box, start_gateway: StartGateway
) -> None:
    box.models["m"]["pin"] = "vllm"
    box.vllm.wake_s = 0.3
    async with serving(start_gateway, box, holder=None) as served:
        answer = await served.ask("first")
        moves = served.owner.policy.moves

    assert answer.headers["x-gateway-lane"] == "vllm"
    assert answer.headers["x-gateway-reason"] == "pinned by the operator"
    assert moves == 0, "it has been nowhere else"
    assert box.ollama.memory == {}
    assert box.asked("ollama", "/api/generate") == []


async def test_the_first_lane_is_waited_for_before_the_other_loads_anything(
    tmp_path: Path, start_gateway: StartGateway
) -> None:
    async with boxed(tmp_path) as box:
        # A vLLM whose container starts with ours: it wants its share of the memory free.
        box.vllm.kill()
        box.models["m"] = box.model("vllm", "ollama")
        limits = {"heartbeat_s": 0.04}
        async with serving(start_gateway, box, holder=None, away_s=10.0, limits=limits) as served:
            early = served.asking("early", stream=True)
            await served.until(Step.LOADING)
            ready = await served.running.http.get("/ready")
            await asyncio.sleep(0.1)  # a heartbeat has told the lane already
            await box.vllm.up()
            answer = await early
            passages = [(p.source, p.target, p.outcome) for p in served.owner.records]

        loads = box.asked("ollama", "/api/generate")

    assert ready.status_code == 503
    assert (ready.json()["gpu"]["to"], ready.json()["gpu"]["step"]) == ("vllm", "loading")
    assert answer.headers["x-gateway-lane"] == "vllm"
    assert passages == [(None, "vllm", "done")]
    assert loads == []


async def test_a_first_lane_that_stays_away_leaves_the_gpu_to_the_other(
    tmp_path: Path, start_gateway: StartGateway
) -> None:
    async with boxed(tmp_path) as box:
        box.vllm.kill()
        box.models["m"] = box.model("vllm", "ollama")
        async with serving(start_gateway, box, away_s=0.3) as served:
            answer = await served.ask()

    assert answer.headers["x-gateway-lane"] == "ollama"


# There and back, by the load


@dataclass
class People:
    """Who asks again as soon as there is an answer, whole and streamed in turn."""

    served: Served
    answers: dict[str, httpx.Response] = field(default_factory=dict)
    _number: itertools.count[int] = field(default_factory=itertools.count)

    @asynccontextmanager
    async def asking(self, number: int) -> AsyncIterator[None]:
        """So many of them; each is answered to the end before they go."""
        leaving = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for _ in range(number):
                group.create_task(self._person(leaving))
            try:
                yield
            finally:
                leaving.set()

    async def _person(self, leaving: asyncio.Event) -> None:
        while not leaving.is_set():
            number = next(self._number)
            text = f"question {number}"
            self.answers[text] = await self.served.ask(text, stream=number % 2 == 0)

    def of(self, lane: str) -> list[httpx.Response]:
        return [a for a in self.answers.values() if a.headers["x-gateway-lane"] == lane]


async def test_the_gpu_follows_the_load_there_and_back_and_no_request_is_lost(
    box: Box, start_gateway: StartGateway, eager: None
) -> None:
    profile = box.folder / "profile.json"
    profile.write_text(json.dumps(STEEP))
    box.models["m"] |= {"profile": str(profile)}
    box.ollama.ttft_s = box.vllm.ttft_s = 0.03
    box.ollama.unload_s = box.vllm.wake_s = 0.1
    limits = {"heartbeat_s": 0.05}
    async with serving(start_gateway, box, limits=limits) as served:
        people = People(served)
        async with people.asking(1):
            await served.until(lambda: len(people.answers) > 5)
            async with people.asking(9):
                await served.until("vllm")
                before = len(people.of("vllm"))
                await served.until(lambda: len(people.of("vllm")) > before + 30)
            await served.until("ollama")
            before = len(people.of("ollama"))
            await served.until(lambda: len(people.of("ollama")) > before + 5)
        passages = list(served.owner.records)
        status = await served.running.status("m")

    assert [(p.source, p.target, p.outcome) for p in passages] == [
        (None, "ollama", "done"),
        ("ollama", "vllm", "done"),
        ("vllm", "ollama", "done"),
    ]
    assert all("regret" in passage.why for passage in passages[1:])
    assert passages[1].waited > 0
    assert (status["demand"], status["waiting"]) == (0, 0)
    for text, answer in people.answers.items():
        lane, reason = answer.headers["x-gateway-lane"], answer.headers["x-gateway-reason"]
        assert answer.status_code == 200, answer.text
        assert whole(answer), answer.text
        assert box.answered_by(text) == [lane], "not once, or not by whom the header names"
        # It tells of the other lane what it compares with, or which one the GPU comes to.
        named = re.search(r"(?:on|[Aa] move to) (ollama|vllm)|[Tt]he GPU goes.* to (\w+)", reason)
        assert named is not None, reason
        assert named[1] != lane if named[1] else named[2] == lane, (lane, reason)
    everything = len(box.said("ollama")) + len(box.said("vllm"))
    assert everything == len(people.answers)


def whole(answer: httpx.Response) -> bool:
    """Whether an answer has come to its end."""
    if answer.headers["content-type"].startswith("application/json"):
        return bool(answer.json()["choices"][0]["finish_reason"])
    ends: int = answer.content.count(DONE)
    return ends == 1 and answer.content.endswith(DONE) and b'"error"' not in answer.content


# Who waits for it


async def test_a_stream_is_silent_in_the_queue_and_kept_alive_by_a_hand_over(
    box: Box, start_gateway: StartGateway
) -> None:
    box.models["m"] = box.model("ollama", "vllm", slots=1)
    box.vllm.wake_s = 0.3
    async with serving(start_gateway, box, limits={"heartbeat_s": 0.04}) as served:
        box.ollama.gap_s = 60.0
        running = served.asking("runs", stream=True, max_tokens=2)
        await served.until(lambda: box.ollama.running == 1)
        begun = asyncio.Event()

        async def queued() -> httpx.Response:
            async with stream_of(served, "waits") as answer:
                begun.set()
                await answer.aread()
                return answer

        waits = asyncio.create_task(queued())
        await served.until(lambda: served.waiting == 1)
        await asyncio.sleep(0.4)
        silent = not begun.is_set()
        await served.pin("vllm")
        await begun.wait()
        while_moving = served.owner.state.step
        box.ollama.kill()
        await served.until("vllm")
        answer = await waits
        broken = await running

    assert silent
    assert while_moving is Step.DRAINING
    assert answer.content.startswith(PING)
    assert whole(answer)
    assert answer.headers["x-gateway-lane"] == "vllm"
    assert answer.headers["x-gateway-reason"] == "The GPU goes to vllm: draining"
    assert box.answered_by("waits") == ["vllm"]
    assert b'"code":"engine_failed"' in broken.content
    assert broken.content.endswith(DONE)


async def test_a_stream_in_the_queue_is_refused_before_it_has_begun(
    box: Box, start_gateway: StartGateway
) -> None:
    box.models["m"] = box.model("ollama", "vllm", slots=1, queue=1)
    limits = {"heartbeat_s": 0.04, "max_wait_s": 0.5}
    async with serving(start_gateway, box, limits=limits) as served:
        box.ollama.gap_s = 60.0
        running = served.asking("runs", stream=True, max_tokens=2)
        await served.until(lambda: box.ollama.running == 1)
        waits = served.asking("waits too long", stream=True)
        await served.until(lambda: served.waiting == 1)
        too_many = await served.ask("one too many", stream=True)
        too_long = await waits
        await gone(running)

    failed(too_many, 429, "queue_full")
    failed(too_long, 503, "waited_too_long")
    assert box.answered_by("waits too long") == box.answered_by("one too many") == []


async def test_a_stream_that_waited_and_cannot_be_served_ends_with_an_error_event(
    box: Box, start_gateway: StartGateway
) -> None:
    async with serving(start_gateway, box, limits={"heartbeat_s": 0.04}) as served:
        box.vllm.wake_s = 60.0
        await served.pin("vllm")
        await served.until(Step.LOADING)
        async with stream_of(served, "waits") as answer:
            parts = answer.aiter_raw()
            assert await anext(parts) == PING
            await served.release()
            rest = b"".join([part async for part in parts])

    *pings, event, done, end = rest.split(b"\n\n")
    assert set(pings) <= {b": ping"}
    assert json.loads(event.removeprefix(b"data: "))["error"]["code"] == "no_engine"
    assert (done + b"\n\n", end) == (DONE, b"")
    assert box.answered_by("waits") == []


async def test_open_webui_shows_what_a_stream_waits_for(
    box: Box, start_gateway: StartGateway
) -> None:
    box.vllm.wake_s = 0.4
    settings = {**box.settings(limits={"heartbeat_s": 0.04}), "status_events": True}
    async with start_gateway(**settings) as running:
        served = Served.of(running, box)
        await served.until("ollama")
        await served.pin("vllm")
        answer = await served.ask("waits", stream=True)

    events = [
        json.loads(line.removeprefix("data: "))
        for line in answer.text.splitlines()
        if line.startswith("data: {")
    ]
    told = [event["event"]["data"] for event in events if "event" in event]
    assert all(event["event"]["type"] == "status" for event in events if "event" in event)
    assert told[-1] == {"description": "The GPU is ready.", "done": True}
    assert {status["done"] for status in told[:-1]} == {False}
    assert all("The GPU goes to vllm" in status["description"] for status in told[:-1])
    assert whole(answer)


async def test_open_webui_shows_it_after_a_second_and_each_status_once(
    box: Box, start_gateway: StartGateway
) -> None:
    box.timings = Timings(status_event_s=0.05)
    box.vllm.wake_s = 0.6
    settings = {**box.settings(limits={"heartbeat_s": 15}), "status_events": True}
    async with start_gateway(**settings) as running:
        served = Served.of(running, box)
        await served.until("ollama")
        await served.pin("vllm")
        await served.until(Step.LOADING)
        answer = await served.ask("waits", stream=True)

    assert answer.text.count("The GPU goes to vllm: loading") == 1
    assert ": ping" not in answer.text


async def test_a_hand_over_takes_nothing_of_the_time_in_the_queue(
    box: Box, start_gateway: StartGateway
) -> None:
    box.models["m"] = box.model("ollama", "vllm", slots=1)
    async with serving(start_gateway, box, limits={"max_wait_s": 0.4}) as served:
        box.ollama.ttft_s = 1.0
        slow = served.asking("slow")
        await served.until(lambda: box.ollama.running == 1)
        queued = await served.ask("in the queue")  # 0.4 s are too long here
        box.vllm.wake_s = 0.8
        await served.pin("vllm")
        moved = await served.ask("waits for the GPU")
        await slow
        [passage] = [p for p in served.owner.records if p.target == "vllm"]

    failed(queued, 503, "waited_too_long")
    assert moved.status_code == 200
    assert moved.headers["x-gateway-lane"] == "vllm"
    assert passage.steps[Step.LOADING] >= 0.8


async def test_a_client_that_hangs_up_during_a_hand_over_leaves_at_once_and_is_never_sent(
    box: Box, start_gateway: StartGateway
) -> None:
    box.vllm.wake_s = 0.8
    async with serving(start_gateway, box, limits={"heartbeat_s": 0.04}) as served:
        await served.pin("vllm")
        await served.until(Step.LOADING)
        tasks = [served.asking(f"gone {number}", stream=number % 2 == 0) for number in range(6)]
        stays = served.asking("stays")
        await served.until(lambda: served.waiting == 7)
        for task in tasks:
            await gone(task)
        await served.until(lambda: served.waiting == 1)
        while_moving = served.owner.state.step
        answer = await stays
        demand = (await served.running.status("m"))["demand"]

    assert while_moving is Step.LOADING
    assert (answer.status_code, demand) == (200, 0)
    assert box.said("ollama") + box.said("vllm") == ["stays"]


# Who needs the other engine


async def test_background_calls_never_move_the_gpu_and_are_served_where_it_is(
    box: Box, start_gateway: StartGateway, eager: None
) -> None:
    box.ollama.ttft_s = 0.02
    async with serving(start_gateway, box) as served:
        asked = [served.asking(f"title {n}", headers=BACKGROUND) for n in range(40)]
        answers = await asyncio.gather(*asked)
        moves = served.owner.policy.moves
        people = [served.asking(f"chat {n}") for n in range(40)]
        await served.until("vllm")  # as many who do wait for an answer move it
        await asyncio.gather(*people)

    assert {answer.status_code for answer in answers} == {200}
    assert {answer.headers["x-gateway-lane"] for answer in answers} == {"ollama"}
    assert moves == 0


async def test_a_request_that_names_the_other_engine_waits_and_has_it_in_the_end(
    box: Box, start_gateway: StartGateway, never_pays: None
) -> None:
    async with serving(start_gateway, box, patience_s=0.5) as served:
        before = asyncio.get_running_loop().time()
        named = served.asking("named", model="m@vllm")
        await served.until(lambda: served.waiting == 1)
        meanwhile = await served.ask("meanwhile")
        answer = await named
        waited = asyncio.get_running_loop().time() - before

    assert meanwhile.headers["x-gateway-lane"] == "ollama"
    assert (answer.status_code, answer.headers["x-gateway-lane"]) == (200, "vllm")
    assert answer.headers["x-gateway-reason"] == "pinned by the request"
    assert waited >= 0.5
    assert box.answered_by("named") == ["vllm"]


async def test_a_background_call_that_names_the_other_engine_moves_nothing(
    box: Box, start_gateway: StartGateway
) -> None:
    async with serving(start_gateway, box, limits={"max_wait_s": 0.6}) as served:
        answer = await served.ask("title", model="m@vllm", headers=BACKGROUND)
        moves = served.owner.policy.moves

    failed(answer, 503, "waited_too_long")
    assert moves == 0


async def test_two_models_on_one_engine_each_share_the_gpu_and_neither_starves(
    box: Box, start_gateway: StartGateway, never_pays: None
) -> None:
    box.models = {"small": box.model("ollama"), "large": box.model("vllm")}
    box.ollama.unload_s = box.vllm.wake_s = box.vllm.sleep_s = 0.02
    served_to: Counter[str] = Counter()
    longest = 0.0
    loop = asyncio.get_running_loop()

    async def people(served: Served, model: str, until: float) -> None:
        nonlocal longest
        while (began := loop.time()) < until:
            answer = await served.ask(model, model=model)
            assert answer.status_code == 200, answer.text
            longest = max(longest, loop.time() - began)
            served_to[model] += 1

    box.ollama.ttft_s = box.vllm.ttft_s = 0.01
    async with serving(start_gateway, box, patience_s=0.2, handover_s=0.2) as served:
        began = loop.time()
        async with asyncio.TaskGroup() as group:
            for model in ("small", "large"):
                for _ in range(3):
                    group.create_task(people(served, model, began + 2.0))
        took = loop.time() - began
        passages = [p for p in served.owner.records if p.source is not None]

    turns = Counter(passage.target for passage in passages)
    assert set(box.said("ollama")) == {"small"}
    assert set(box.said("vllm")) == {"large"}
    assert min(turns["ollama"], turns["vllm"]) >= 2, turns
    assert min(served_to.values()) >= 6, served_to
    # After each hand-over somebody has to wait for as long as patience goes, at least.
    assert len(passages) <= took / 0.2 + 3
    assert longest < took


# Memory for others


async def test_without_requests_the_memory_is_given_back_and_the_next_request_has_it_loaded(
    box: Box, start_gateway: StartGateway
) -> None:
    async with serving(start_gateway, box, idle_release_s=0.3) as served:
        for number in range(12):  # longer than that, and nobody waits for long
            assert (await served.ask(f"now and then {number}")).status_code == 200
            await asyncio.sleep(0.05)
        passages = len(served.owner.records)
        await served.until(Step.FREE)
        free = box.gpu.free()
        ready = await served.running.http.get("/ready")
        answer = await served.ask("after a pause")
        again = served.owner.records[-1]

    assert passages == 1, "it was given back although somebody asked"
    assert free == box.gpu.total() - box.gpu.remainder
    assert (ready.status_code, ready.json()["gpu"]["step"]) == (200, "free")
    assert answer.status_code == 200
    assert (again.source, again.target, again.outcome) == (None, "ollama", "done")


async def test_a_long_answer_is_no_pause(box: Box, start_gateway: StartGateway) -> None:
    box.ollama.ttft_s = 0.7
    async with serving(start_gateway, box, idle_release_s=0.2) as served:
        answer = await served.ask("long")
        passages = len(served.owner.records)

    assert answer.status_code == 200
    assert box.answered_by("long") == ["ollama"]
    assert passages == 1


async def test_released_by_the_operator_it_is_for_others_until_it_is_wanted_back(
    box: Box, start_gateway: StartGateway
) -> None:
    async with serving(start_gateway, box) as served:
        box.ollama.ttft_s = 0.5
        running = served.asking("runs")
        await served.until(lambda: box.ollama.running == 1)
        await served.release()
        at_once = await served.ask("while it drains")
        await served.until(Step.FREE)
        finished = await running
        free = box.gpu.free()
        stranger = box.gpu.allocate(1, 90 * 1024**3)  # a training job, for example
        later = await served.ask("later")
        streamed = await served.ask("streamed", stream=True)
        ready = await served.running.http.get("/ready")
        box.gpu.release(stranger)
        await served.pin("auto")
        back = await served.ask("back")

    assert finished.status_code == 200
    for refused in (at_once, later, streamed):
        assert "the operator has released the GPU" in failed(refused)
    assert free == box.gpu.total() - box.gpu.remainder
    assert ready.status_code == 503
    assert "released" in ready.json()["waiting_for"]["m"]["ollama"]
    assert (back.status_code, back.headers["x-gateway-lane"]) == (200, "ollama")
    assert box.said("ollama") == ["runs", "back"]


async def test_released_while_it_moves_the_memory_is_free_in_the_end(
    box: Box, start_gateway: StartGateway
) -> None:
    box.vllm.wake_s = 0.3
    async with serving(start_gateway, box) as served:
        await served.pin("vllm")
        await served.until(Step.LOADING)
        waits = served.asking("waits")
        await served.until(lambda: served.waiting == 1)
        await served.release()
        refused = await waits
        await served.until(Step.FREE)
        free = box.gpu.free()

    failed(refused)
    assert free == box.gpu.total() - box.gpu.remainder
    assert box.vllm.asleep


# The operator's pin


async def test_the_operator_moves_the_gpu_there_and_back(
    box: Box, start_gateway: StartGateway
) -> None:
    async with serving(start_gateway, box) as served:
        await served.pin("vllm")
        await served.until("vllm")
        away = list(box.ollama.resident)
        there = await served.ask("there")
        await served.pin("ollama")
        await served.until("ollama")
        asleep = box.vllm.asleep
        back = await served.ask("back")
        outcomes = served.outcomes

    assert (away, asleep) == ([], True)
    assert there.headers["x-gateway-lane"] == "vllm"
    assert back.headers["x-gateway-lane"] == "ollama"
    assert back.headers["x-gateway-reason"] == "pinned by the operator"
    assert outcomes == ["done"] * 3


async def test_a_pin_during_a_hand_over_is_carried_out_after_it(
    box: Box, start_gateway: StartGateway
) -> None:
    box.vllm.wake_s = 0.3
    async with serving(start_gateway, box) as served:
        await served.pin("vllm")
        await served.until(Step.LOADING)
        await served.pin("ollama")
        waits = await served.ask("waits")
        await served.until("ollama")
        outcomes = served.outcomes

    assert waits.headers["x-gateway-lane"] == "ollama"
    assert outcomes == ["done"] * 3
    assert box.said("vllm") == []


async def test_pinned_elsewhere_a_model_is_refused_that_is_not_there(
    box: Box, start_gateway: StartGateway
) -> None:
    box.models = {"m": box.model("ollama", "vllm"), "only": box.model("ollama")}
    async with serving(start_gateway, box) as served:
        await served.pin("vllm")
        while_moving = await served.ask("only", model="only")
        await served.until("vllm")
        refused = await served.ask("only", model="only")
        answer = await served.ask("both")
        await served.pin("auto")
        back = await served.ask("only", model="only")

    for each in (while_moving, refused):
        assert "keeps the GPU at vllm, which does not have this model" in failed(each)
    assert answer.headers["x-gateway-lane"] == "vllm"
    assert (back.status_code, back.headers["x-gateway-lane"]) == (200, "ollama")
    assert box.said("ollama") == ["only"]


# What must not be waited for for ever


async def test_an_endless_answer_puts_the_move_off_and_is_not_cut(
    box: Box, start_gateway: StartGateway
) -> None:
    async with serving(start_gateway, box, **SHORT) as served:
        box.ollama.tokens, box.ollama.gap_s = 100_000, 0.01
        async with stream_of(served, "endless") as endless:
            parts = endless.aiter_raw()
            await anext(parts)
            await served.pin("vllm")
            await served.until(lambda: "failed: draining ollama" in served.outcomes[-1])
            meanwhile = await served.ask("meanwhile", max_tokens=1)
            await served.until(lambda: len(served.outcomes) >= 3)
            for _ in range(50):
                await anext(parts)
            reason = meanwhile.headers["x-gateway-reason"]
            still = (box.ollama.running, box.asked("vllm", "/wake_up"))
            loads = box.asked("ollama", "/api/generate")
        await served.until("vllm")
        moved = await served.ask("moved")

    assert meanwhile.headers["x-gateway-lane"] == "ollama"
    assert reason == "the GPU could not be moved to vllm, which the operator has pinned"
    assert still == (1, [])
    assert len(loads) == 1, "it was never away"
    assert moved.headers["x-gateway-lane"] == "vllm"
