"""Events of models that share a GPU, one after the other: none is handled inside another."""

from __future__ import annotations

import asyncio

import pytest

from backends.fake import FakeGpu
from backends.ollama import Ollama
from backends.transport import http
from gateway.gpu.handover import Gpu
from gateway.gpu.record import Deadlines
from gateway.gpu.state import GpuState, GpuStateRef, Step
from gateway.routing.breaker import Breaker
from gateway.routing.events import EventQueue
from gateway.routing.lanes import Lane, Replica, Ticket
from gateway.routing.policy_exclusive import ExclusivePolicy
from gateway.routing.profile import ASSUMED
from gateway.routing.regret import RoutedModel
from gateway.routing.scheduler import Scheduler
from gateway.routing.switch_cost import HandoverCost
from gateway.serving.admission import Admission
from gateway.serving.prober import Prober
from gateway.serving.replica_server import ReplicaServer
from gateway.settings import Timings
from tests.support.exclusive import TOTAL, never_reentered

LAYOUTS = ("ollama", "vllm")


def admission(gpu: Gpu, name: str, client: http.Client) -> Admission:
    """One model of those that share a GPU; its engines are never asked."""
    lanes, servers = [], {}
    for layout in LAYOUTS:
        replica = Replica(f"http://{layout}", slots=1)
        engine = Ollama(replica.url, client)
        servers[replica] = ReplicaServer(engine, name, Breaker(1), Prober(engine, name, Timings()))
        lanes.append(Lane(layout, [replica], queue_limit=8))
    scheduler = Scheduler(lanes, gpu.policy, model=name, gpu=gpu.ref)
    return Admission(scheduler, servers, max_wait_s=1.0, gpu=gpu)


async def test_a_request_that_makes_the_gpu_move_is_handled_before_the_move_is_known() -> None:
    client, ref = http.Client(), GpuStateRef()
    models = dict.fromkeys(("first", "second"), RoutedModel(LAYOUTS, ASSUMED))
    policy = ExclusivePolicy(LAYOUTS, models, HandoverCost(), ref)
    gpu = Gpu(policy, {}, Deadlines(), FakeGpu(TOTAL), ref)
    first, second = (admission(gpu, name, client) for name in models)
    with never_reentered() as steps:
        gpu.states.hold("ollama")
        async with first.slot(Ticket()) as grant:
            policy.pin = "vllm"
            opened = steps.copy()
            # Its arrival decides the move: admission -> gpu -> events of both admissions.
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01), second.slot(Ticket()):
                    pass
            moved = steps[len(opened) :]
            state = ref.state
    for each in (first, second):
        each.close()
    client.close()

    assert grant.lane == "ollama"
    assert opened == ["first at depth 1", "second at depth 1", "first at depth 1"]
    assert moved[:3] == ["second at depth 1", "first at depth 1", "second at depth 1"]
    assert (state.step, state.layout, state.target) == (Step.DRAINING, "ollama", "vllm")


class Client:
    """A model on the GPU that records each state, and may fail once a layout holds."""

    demand = waiting = 0
    active_at = 0.0

    def __init__(self, *, fails: bool) -> None:
        self.seen: list[Step] = []
        self._fails = fails

    def running(self, lane: str) -> int:
        return 0

    def on_gpu_change(self, before: GpuState, after: GpuState) -> None:
        if self._fails and after.step is Step.HELD:
            raise ValueError("of this model")
        self.seen.append(after.step)


def test_a_model_that_fails_to_follow_the_gpu_stops_neither_the_others_nor_the_gpu(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ref = GpuStateRef()
    models = {"m": RoutedModel(LAYOUTS, ASSUMED)}
    policy = ExclusivePolicy(LAYOUTS, models, HandoverCost(), ref)
    states = Gpu(policy, {}, Deadlines(), FakeGpu(TOTAL), ref).states
    failing, healthy = Client(fails=True), Client(fails=False)
    for client in (failing, healthy):
        states.join(client)

    states.enter(Step.LOADING)
    states.hold("ollama")
    states.enter(Step.DRAINING)

    assert failing.seen == [Step.FREE, Step.LOADING, Step.DRAINING]
    assert healthy.seen == [Step.FREE, Step.LOADING, Step.HELD, Step.DRAINING]
    assert "ValueError: of this model" in caplog.text


def test_an_event_that_causes_others_has_ended_before_they_begin() -> None:
    events, order = EventQueue(), list[str]()

    def outer() -> None:
        order.append("outer begins")
        events.post(lambda: order.append("inner"))
        order.append("outer ends")

    events.post(outer)

    assert order == ["outer begins", "outer ends", "inner"]


def test_an_event_that_fails_loses_no_other() -> None:
    events, order = EventQueue(), list[str]()

    def fails() -> None:
        events.post(lambda: order.append("caused"))
        raise ValueError("of the first")

    with pytest.raises(ValueError, match="of the first"):
        events.post(fails)
    events.post(lambda: order.append("next"))

    assert order == ["caused", "next"]
