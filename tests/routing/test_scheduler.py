"""Who is served next, on which lane and by which replica: without clock, task or socket."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import NoLane, QueueFull
from gateway.gpu.state import GpuState, GpuStateRef, Move, Step
from gateway.routing import profile
from gateway.routing.lanes import Lane, Replica, Ticket
from gateway.routing.policy_exclusive import ExclusivePolicy
from gateway.routing.policy_shared import SharedPolicy
from gateway.routing.profile import Profile
from gateway.routing.regret import RoutedModel
from gateway.routing.scheduler import Action, Refuse, RequestGpu, Scheduler, Start
from gateway.routing.switch_cost import HandoverCost

#: Ollama is faster at every demand, so that the policy stays where it begins.
STILL = Profile(
    version=1,
    source="measured",
    lanes={"ollama": profile.LaneProfile((1,), (1.0,)), "vllm": profile.LaneProfile((1,), (2.0,))},
)
#: vLLM is faster from three at once on.
CROSSING = Profile(
    version=1,
    source="measured",
    lanes={
        "ollama": profile.LaneProfile((1, 4), (1.0, 4.0)),
        "vllm": profile.LaneProfile((1,), (2.5,)),
    },
)


def replica(capacity: int, url: str = "http://one") -> Replica:
    """A healthy replica."""
    return Replica(url, slots=capacity, capacity=capacity, unavailable_reason="")


def two_lanes(
    ollama: int = 1,
    vllm: int = 4,
    *,
    waiting: int = 8,
    by: Profile = STILL,
    pin: str | None = None,
) -> Scheduler:
    """One replica with so many slots on each lane; Ollama's turn at the beginning."""
    lanes = [Lane("ollama", [replica(ollama)], waiting), Lane("vllm", [replica(vllm)], waiting)]
    scheduler = Scheduler(lanes, policy(by))
    scheduler.policy.pin = pin
    return scheduler


def policy(by: Profile, *lanes: str) -> SharedPolicy:
    """A shared placement's, of one model."""
    names = lanes or ("ollama", "vllm")
    return SharedPolicy(names, {"": RoutedModel(names, by)})


def one_lane(*capacities: int, waiting: int = 8) -> Scheduler:
    """A single lane, with a replica of each of these sizes."""
    replicas = [replica(capacity, f"http://{number}") for number, capacity in enumerate(capacities)]
    return Scheduler([Lane("vllm", replicas, waiting)], policy(STILL, "vllm"))


def arrive(scheduler: Scheduler, *tickets: Ticket, now: float = 1.0) -> list[Action]:
    """All of them in this order, at once."""
    return [action for ticket in tickets for action in scheduler.arrived(ticket, now)]


def started(actions: Iterable[Action]) -> list[Ticket]:
    """Who was started, in order."""
    return [action.ticket for action in actions if isinstance(action, Start)]


def refused(actions: Iterable[Action]) -> dict[Ticket, type[Exception]]:
    """Who was refused, and with which error."""
    return {a.ticket: type(a.error) for a in actions if isinstance(a, Refuse)}


def served_in_turn(scheduler: Scheduler, running: Ticket) -> list[Ticket]:
    """Who comes after whom, as each that was started leaves again."""
    order: list[Ticket] = []
    now = 1.0
    while True:
        now += 1.0
        actions = started(scheduler.left(running, now))
        if not actions:
            return order
        [running] = actions
        order.append(running)


def out(scheduler: Scheduler, lane: str, reason: str = "cannot be reached") -> list[Action]:
    """A lane's replicas take nothing any more."""
    for each in scheduler.lanes[lane].replicas:
        each.capacity, each.unavailable_reason = 0, reason
    return scheduler.changed(2.0)


# Slots


def test_a_request_starts_at_once_where_a_slot_is_free() -> None:
    scheduler = one_lane(1)
    ticket = Ticket()

    assert scheduler.arrived(ticket, 1.0) == [Start(ticket)]
    assert ticket.lane is scheduler.lanes["vllm"]
    assert ticket.replica is scheduler.lanes["vllm"].replicas[0]
    assert repr(scheduler) == "<Scheduler vllm 1/1, 0 waiting, demand 1>"


def test_it_waits_where_none_is_free_and_starts_when_one_comes_free() -> None:
    scheduler = one_lane(1)
    first, second = Ticket(), Ticket()
    arrive(scheduler, first)

    assert scheduler.arrived(second, 1.0) == []
    assert scheduler.left(first, 2.0) == [Start(second)]


def test_the_replica_with_the_least_in_flight_is_chosen() -> None:
    scheduler = one_lane(4, 4, 4)
    tickets = [Ticket() for _ in range(9)]

    arrive(scheduler, *tickets)
    for ticket in tickets[1:9:3]:  # all that the second one has
        scheduler.left(ticket, 2.0)
    after = Ticket()
    arrive(scheduler, after)

    assert [ticket.replica for ticket in tickets[:1]] == [scheduler.lanes["vllm"].replicas[0]]
    assert [r.running for r in scheduler.lanes["vllm"].replicas] == [3, 1, 3]
    assert after.replica is scheduler.lanes["vllm"].replicas[1]


def test_a_replica_without_capacity_receives_nothing_however_idle_it_is() -> None:
    scheduler = one_lane(0, 2)
    tickets = [Ticket() for _ in range(3)]

    assert started(arrive(scheduler, *tickets)) == tickets[:2]
    assert [r.running for r in scheduler.lanes["vllm"].replicas] == [0, 2]


def test_capacity_that_grows_is_used_and_capacity_that_shrinks_ends_no_request() -> None:
    scheduler = one_lane(1)
    tickets = [Ticket() for _ in range(4)]
    arrive(scheduler, *tickets)
    [only] = scheduler.lanes["vllm"].replicas

    only.capacity = 3
    grown = scheduler.changed(2.0)
    only.capacity = 1
    shrunk = scheduler.changed(3.0)

    assert (started(grown), shrunk, only.running) == (tickets[1:3], [], 3)
    assert scheduler.left(tickets[0], 4.0) == []
    assert scheduler.left(tickets[1], 4.0) == []
    assert scheduler.left(tickets[2], 4.0) == [Start(tickets[3])]


# Turns


def test_requests_of_one_key_are_served_in_order_of_arrival() -> None:
    scheduler = one_lane(1)
    running, *waiting = (Ticket("a") for _ in range(6))
    arrive(scheduler, running, *waiting)

    assert served_in_turn(scheduler, running) == waiting


def test_a_key_that_floods_does_not_delay_the_next_one_by_more_than_one() -> None:
    scheduler = one_lane(1, waiting=100)
    running, *flood = (Ticket("flood") for _ in range(51))
    arrive(scheduler, running, *flood)
    chat = Ticket("chat")
    arrive(scheduler, chat)

    assert served_in_turn(scheduler, running).index(chat) <= 1


def test_keys_take_turns_whatever_they_have_waiting() -> None:
    scheduler = one_lane(1, waiting=100)
    running = Ticket("other")
    waiting = [Ticket(key) for key in "aaaaaabbbc"]
    arrive(scheduler, running, *waiting)

    order = "".join(ticket.key for ticket in served_in_turn(scheduler, running))

    assert sorted(order[:3]) == ["a", "b", "c"]
    assert sorted(order[3:5]) == ["a", "b"]
    assert sorted(order[5:7]) == ["a", "b"]
    assert order[7:] == "aaa"


def test_a_key_that_always_has_a_next_request_does_not_starve_others() -> None:
    scheduler = one_lane(1)
    running, other = Ticket("eager"), Ticket("other")
    arrive(scheduler, running, Ticket("eager"), other)

    served = []
    for now in (2.0, 3.0):
        arrive(scheduler, Ticket("eager"), now=now)
        [running] = started(scheduler.left(running, now))
        served.append(running)
    assert other in served


def test_background_calls_come_after_all_other_requests() -> None:
    scheduler = one_lane(1)
    running = Ticket("a")
    titles = [Ticket("a", background=True), Ticket("b", background=True)]
    chats = [Ticket("b"), Ticket("a")]
    arrive(scheduler, running, titles[0], chats[0], titles[1], chats[1])

    order = served_in_turn(scheduler, running)

    assert set(order[:2]) == set(chats)
    assert order[2:] == titles


def test_background_calls_are_no_demand_and_take_a_spare_slot() -> None:
    scheduler = one_lane(2)
    title, waits = Ticket(background=True), Ticket(background=True)

    assert started(arrive(scheduler, title)) == [title]
    arrive(scheduler, Ticket(), waits)
    assert repr(scheduler) == "<Scheduler vllm 2/2, 1 waiting, demand 1>"


def test_background_calls_alone_move_no_policy() -> None:
    scheduler = two_lanes(ollama=1, by=CROSSING)

    arrive(scheduler, *(Ticket(background=True) for _ in range(6)))
    scheduler.passed(1000.0)

    assert scheduler.policy.lane == "ollama"
    assert scheduler.lanes["vllm"].running == 0


# Which lane: operator, request, what the lane can take, health, policy


def test_the_policy_chooses_where_nothing_else_does() -> None:
    scheduler = two_lanes()
    ticket = Ticket()
    arrive(scheduler, ticket)

    assert scheduler.lane_for(Ticket()) == "ollama"
    assert ticket.lane is scheduler.lanes["ollama"]
    assert ticket.reason.startswith("faster at demand 1 by the measured profile")


def test_health_is_before_the_policy() -> None:
    scheduler = two_lanes()
    out(scheduler, "ollama", "is still loading its model")
    ticket = Ticket()
    arrive(scheduler, ticket)

    assert ticket.lane is scheduler.lanes["vllm"]
    assert ticket.reason == "ollama is still loading its model"


def test_what_a_lane_can_take_is_before_the_policy() -> None:
    scheduler = two_lanes()
    ticket = Ticket(eligible=frozenset({"vllm"}), exclusion_reason="ollama takes no tools")
    arrive(scheduler, ticket)

    assert ticket.lane is scheduler.lanes["vllm"]
    assert ticket.reason == "ollama takes no tools"


def test_what_a_lane_can_take_is_before_health() -> None:
    scheduler = two_lanes()
    out(scheduler, "vllm")
    ticket = Ticket(eligible=frozenset({"vllm"}), exclusion_reason="ollama takes no tools")

    [refusal] = arrive(scheduler, ticket)

    assert isinstance(refusal, Refuse)
    assert isinstance(refusal.error, NoLane)
    assert "vllm cannot be reached" in refusal.error.message
    assert "ollama" not in refusal.error.message


def test_the_requests_pin_is_before_what_a_lane_can_take() -> None:
    scheduler = two_lanes()
    ticket = Ticket(pin="ollama", eligible=frozenset({"vllm"}))
    arrive(scheduler, ticket)

    assert ticket.lane is scheduler.lanes["ollama"]
    assert ticket.reason == "pinned by the request"


def test_the_requests_pin_is_before_health() -> None:
    scheduler = two_lanes()
    out(scheduler, "vllm")
    ticket = Ticket(pin="vllm")

    assert refused(arrive(scheduler, ticket)) == {ticket: NoLane}


def test_the_operators_pin_is_before_all() -> None:
    scheduler = two_lanes(pin="vllm")
    ticket = Ticket(pin="ollama", eligible=frozenset({"ollama"}))
    arrive(scheduler, ticket)

    assert ticket.lane is scheduler.lanes["vllm"]
    assert ticket.reason == "pinned by the operator"


def test_a_pinned_lane_that_is_full_is_waited_for() -> None:
    scheduler = two_lanes(ollama=1)
    first, second = Ticket(pin="ollama"), Ticket(pin="ollama")
    arrive(scheduler, first)

    assert arrive(scheduler, second) == []
    assert scheduler.left(first, 2.0) == [Start(second)]
    assert second.lane is scheduler.lanes["ollama"]


def test_a_request_that_waits_for_one_lane_blocks_none_for_another() -> None:
    scheduler = two_lanes(ollama=1)
    arrive(scheduler, Ticket("a", pin="ollama"), Ticket("a", pin="ollama"))
    other = Ticket("a", pin="vllm")

    assert started(arrive(scheduler, other)) == [other]


# When no lane is left


def test_without_a_lane_a_request_is_refused_with_the_trouble_and_a_time() -> None:
    scheduler = two_lanes()
    out(scheduler, "ollama", "is still loading its model")
    out(scheduler, "vllm", "cannot be reached")
    for number, lane in enumerate(scheduler.lanes.values()):
        lane.replicas[0].retry_after_s = 3.0 + number

    [refusal] = arrive(scheduler, Ticket())

    assert isinstance(refusal, Refuse)
    assert refusal.error.message == (
        "No engine can answer for this model now: "
        "ollama is still loading its model; vllm cannot be reached."
    )
    assert refusal.error.retry_after == 3.0
    assert repr(scheduler) == "<Scheduler ollama 0/0, vllm 0/0, 0 waiting, demand 0>"


def test_when_the_last_lane_goes_all_waiting_requests_are_refused_at_once() -> None:
    scheduler = one_lane(1)
    running, *waiting = Ticket(), Ticket("a"), Ticket("b"), Ticket(background=True)
    arrive(scheduler, running, *waiting)

    actions = out(scheduler, "vllm")

    assert refused(actions) == dict.fromkeys(waiting, NoLane)
    assert repr(scheduler) == "<Scheduler vllm 1/0, 0 waiting, demand 1>"


# The queue's bounds


def test_exactly_so_many_wait_and_the_next_is_refused() -> None:
    scheduler = one_lane(2, waiting=3)
    tickets = [Ticket() for _ in range(6)]

    actions = arrive(scheduler, *tickets)

    assert started(actions) == tickets[:2]
    assert refused(actions) == {tickets[5]: QueueFull}
    assert repr(scheduler) == "<Scheduler vllm 2/2, 3 waiting, demand 5>"


def test_a_lane_without_a_queue_refuses_requests_that_do_not_start() -> None:
    scheduler = one_lane(1, waiting=0)
    first, second = Ticket(), Ticket()

    actions = arrive(scheduler, first, second)

    assert started(actions) == [first]
    assert refused(actions) == {second: QueueFull}


def test_how_long_to_stay_away_follows_from_the_measured_time_of_service() -> None:
    scheduler = one_lane(2, waiting=0)
    slow = Ticket()
    arrive(scheduler, slow, now=1.0)
    scheduler.left(slow, 9.0)
    arrive(scheduler, Ticket(), Ticket(), now=10.0)

    [refusal] = arrive(scheduler, Ticket(), now=10.0)

    assert isinstance(refusal, Refuse)
    assert refusal.error.retry_after == pytest.approx(8.0 / 2)


def test_background_calls_fill_a_queue_of_their_own() -> None:
    scheduler = one_lane(1, waiting=2)
    arrive(scheduler, Ticket())
    titles = [Ticket(background=True) for _ in range(3)]
    chats = [Ticket() for _ in range(3)]

    assert refused(arrive(scheduler, *titles)) == {titles[2]: QueueFull}
    assert refused(arrive(scheduler, *chats)) == {chats[2]: QueueFull}


def test_each_lane_bounds_only_the_requests_that_wait_for_it() -> None:
    scheduler = two_lanes(ollama=1, vllm=1, waiting=1)
    for_ollama = [Ticket(pin="ollama") for _ in range(3)]
    for_vllm = [Ticket(pin="vllm") for _ in range(3)]

    actions = arrive(scheduler, *for_ollama, *for_vllm)

    assert refused(actions) == {for_ollama[2]: QueueFull, for_vllm[2]: QueueFull}


def test_a_request_that_makes_the_policy_move_is_not_measured_by_the_lane_it_leaves() -> None:
    scheduler = two_lanes(ollama=1, vllm=4, waiting=0, by=CROSSING)
    arrive(scheduler, on_ollama := Ticket(), Ticket(pin="vllm"), Ticket(pin="vllm"), now=1.0)
    fourth = Ticket()

    # By now the rent is paid: Ollama is full, has no queue, and is not asked any more.
    assert started(arrive(scheduler, fourth, now=100.0)) == [fourth]
    assert fourth.lane is scheduler.lanes["vllm"]
    assert on_ollama.lane is scheduler.lanes["ollama"]


# A second attempt


def test_a_second_attempt_goes_to_another_replica_and_is_let_in_although_the_queue_is_full() -> (
    None
):
    scheduler = one_lane(1, 1, waiting=0)
    failed, running = Ticket(), Ticket()
    arrive(scheduler, failed, running)
    assert failed.replica is not None
    failed.excluded.add(failed.replica)
    scheduler.left(failed, 2.0)

    assert scheduler.arrived(failed, 2.0, again=True) == []
    assert scheduler.left(running, 3.0) == [Start(failed)]
    assert failed.replica not in failed.excluded


def test_a_second_attempt_comes_before_all_first_attempts() -> None:
    scheduler = one_lane(1, 1)
    failed, running = Ticket("a"), Ticket("b")
    arrive(scheduler, failed, running, Ticket("b"), Ticket("a"), Ticket("c"))
    [first, _] = scheduler.lanes["vllm"].replicas
    failed.excluded.add(first)
    first.capacity = 0
    scheduler.left(failed, 2.0)
    scheduler.arrived(failed, 2.0, again=True)

    assert scheduler.left(running, 3.0) == [Start(failed)]


def test_a_second_attempt_goes_to_the_other_lane_and_says_why() -> None:
    scheduler = two_lanes()
    ticket = Ticket()
    arrive(scheduler, ticket)
    ticket.excluded.update(scheduler.lanes["ollama"].replicas)
    scheduler.left(ticket, 2.0)

    assert scheduler.arrived(ticket, 2.0, again=True) == [Start(ticket)]
    assert ticket.lane is scheduler.lanes["vllm"]
    assert ticket.reason == "ollama failed this request"


def test_a_second_attempt_with_nowhere_to_go_is_refused() -> None:
    scheduler = one_lane(4)
    ticket = Ticket()
    arrive(scheduler, ticket)
    ticket.excluded.update(scheduler.lanes["vllm"].replicas)
    scheduler.left(ticket, 2.0)

    assert refused(scheduler.arrived(ticket, 2.0, again=True)) == {ticket: NoLane}
    assert repr(scheduler) == "<Scheduler vllm 0/4, 0 waiting, demand 0>"


# What waits is bound to no lane


def test_a_waiting_request_moves_with_the_policy() -> None:
    scheduler = two_lanes(ollama=1, vllm=4, by=CROSSING)
    running, *waiting = (Ticket() for _ in range(4))
    arrive(scheduler, running, *waiting, now=1.0)
    due = scheduler.policy.due()

    assert scheduler.passed(due - 0.01) == []
    assert started(scheduler.passed(due)) == waiting
    assert {ticket.lane for ticket in waiting} == {scheduler.lanes["vllm"]}
    assert running.lane is scheduler.lanes["ollama"]


def test_a_waiting_request_moves_when_its_engine_goes_away() -> None:
    scheduler = two_lanes(ollama=1, vllm=2)
    running, *waiting = (Ticket() for _ in range(4))
    arrive(scheduler, running, *waiting)

    assert started(out(scheduler, "ollama")) == waiting[:2]
    assert waiting[0].reason == "ollama cannot be reached"


def test_a_waiting_request_moves_with_the_operators_pin() -> None:
    scheduler = two_lanes(ollama=1, vllm=4)
    running, *waiting = (Ticket() for _ in range(3))
    arrive(scheduler, running, *waiting)

    scheduler.policy.pin = "vllm"

    assert started(scheduler.changed(2.0)) == waiting
    assert waiting[0].reason == "pinned by the operator"


def test_a_waiting_request_that_only_one_lane_can_take_does_not_move() -> None:
    scheduler = two_lanes(ollama=1, vllm=4)
    running, waits = Ticket(), Ticket(eligible=frozenset({"ollama"}))
    arrive(scheduler, running, waits)

    assert refused(out(scheduler, "ollama")) == {waits: NoLane}
    assert scheduler.lanes["vllm"].running == 0


# Leaving gives back what was held, and nothing else


def state(scheduler: Scheduler) -> tuple[int, int, int]:
    """Running, waiting, demand."""
    running = sum(lane.running for lane in scheduler.lanes.values())
    return running, scheduler.waiting, scheduler.demand


@pytest.fixture(params=["foreground", "background"])
def ticket(request: pytest.FixtureRequest) -> Ticket:
    """A foreground request, or a background call."""
    return Ticket(background=request.param == "background")


def test_leaving_while_it_runs_gives_back_the_slot(ticket: Ticket) -> None:
    scheduler = one_lane(2)
    arrive(scheduler, ticket)

    assert scheduler.left(ticket, 2.0) == []
    assert state(scheduler) == (0, 0, 0)
    assert (ticket.lane, ticket.replica) == (None, None)


def test_leaving_while_it_waits_gives_back_the_place(ticket: Ticket) -> None:
    scheduler = one_lane(1)
    arrive(scheduler, Ticket(), ticket)

    assert scheduler.left(ticket, 2.0) == []
    assert state(scheduler) == (1, 0, 1)


def test_leaving_twice_gives_back_nothing_more(ticket: Ticket) -> None:
    scheduler = one_lane(1)
    arrive(scheduler, running := Ticket(), ticket)
    scheduler.left(ticket, 2.0)

    assert scheduler.left(ticket, 3.0) == []
    assert state(scheduler) == (1, 0, 1)
    scheduler.left(running, 4.0)
    assert scheduler.left(running, 5.0) == []
    assert state(scheduler) == (0, 0, 0)


def test_leaving_after_a_refusal_gives_back_nothing() -> None:
    scheduler = one_lane(1, waiting=0)
    arrive(scheduler, Ticket(), too_many := Ticket())
    out(scheduler, "vllm")
    arrive(scheduler, no_lane := Ticket())
    before = state(scheduler)

    assert scheduler.left(too_many, 2.0) == []
    assert scheduler.left(no_lane, 2.0) == []
    assert state(scheduler) == before == (1, 0, 1)


def test_leaving_after_the_queue_was_dissolved_gives_back_nothing() -> None:
    scheduler = one_lane(1)
    arrive(scheduler, Ticket(), waits := Ticket())
    out(scheduler, "vllm")

    assert scheduler.left(waits, 3.0) == []
    assert state(scheduler) == (1, 0, 1)


def test_leaving_without_having_come_gives_back_nothing() -> None:
    scheduler = one_lane(1)
    arrive(scheduler, Ticket("a"), Ticket("a"))

    assert scheduler.left(Ticket("a"), 2.0) == []
    assert scheduler.left(Ticket("b"), 2.0) == []
    assert state(scheduler) == (1, 1, 2)


def test_a_request_that_left_the_queue_is_skipped() -> None:
    scheduler = one_lane(1)
    running, gone, last = Ticket(), Ticket(), Ticket()
    arrive(scheduler, running, gone, last)
    scheduler.left(gone, 2.0)

    assert scheduler.left(running, 3.0) == [Start(last)]


def test_a_slot_comes_back_to_the_replica_that_gave_it() -> None:
    scheduler = one_lane(2, 2)
    tickets = [Ticket() for _ in range(4)]
    arrive(scheduler, *tickets)
    second = tickets[1].replica
    assert second is not None

    scheduler.left(tickets[1], 2.0)

    assert [r.running for r in scheduler.lanes["vllm"].replicas] == [2, 1]
    assert second.running == 1


# One GPU, which only one lane can have

PATIENCE_S = 5.0
#: Longer than any hand-over here, and than what follows one that has failed.
LONG_S = 100.0


@dataclass
class Sharing:
    """A scheduler, its policy, and a GPU whose state the test sets as the hand-over does."""

    scheduler: Scheduler
    policy: ExclusivePolicy
    gpu: GpuStateRef

    def act(self, actions: list[Action]) -> list[Action]:
        """Begin the move that was decided, if one was."""
        for action in actions:
            if isinstance(action, RequestGpu) and (move := action.move) is not None:
                self.gpu.state = GpuState(Step.DRAINING, move.source, move.target, move)
        return actions

    def open(self, now: float, lane: str) -> list[Action]:
        """The GPU has come to this lane, or has gone back to it."""
        move = self.gpu.state.move
        self.policy.advance(now)
        self.gpu.state = held_by(lane)
        self.policy.on_settled(now, move)
        return self.scheduler.changed(now)

    def arrive(self, *tickets: Ticket, now: float = 1.0) -> list[Action]:
        """All of them in this order, at once."""
        return [a for each in tickets for a in self.act(self.scheduler.arrived(each, now))]


def held_by(layout: str) -> GpuState:
    return GpuState(Step.HELD, layout, layout, held_before=True)


def sharing(holder: str | None = "ollama", by: Profile = STILL) -> Sharing:
    """The GPU is with this lane, and moves only for those who need the other."""
    lanes = [Lane("ollama", [replica(1)], 8), Lane("vllm", [replica(4)], 8)]
    names = ("ollama", "vllm")
    gpu = GpuStateRef(GpuState() if holder is None else held_by(holder))
    cost = HandoverCost(assumed_s=1.0, patience_s=PATIENCE_S)
    shared = ExclusivePolicy(names, {"": RoutedModel(names, by)}, cost, gpu)
    if holder is not None:
        shared.on_settled(0.0, None)
    return Sharing(Scheduler(lanes, shared, gpu=gpu), shared, gpu)


def moves(actions: Iterable[Action]) -> list[str | None]:
    """Where the GPU is to be brought; None: anywhere, as no layout holds it."""
    return [
        action.move.target if action.move is not None else None
        for action in actions
        if isinstance(action, RequestGpu)
    ]


def test_while_no_layout_holds_the_gpu_is_requested_and_nothing_starts() -> None:
    box = sharing(holder=None)
    ticket = Ticket()

    assert box.scheduler.arrived(ticket, 1.0) == [RequestGpu()]
    assert box.open(2.0, "ollama") == [Start(ticket)]


def test_without_waiting_requests_the_gpu_is_not_requested() -> None:
    scheduler = sharing(holder=None).scheduler

    assert scheduler.passed(1.0) == scheduler.changed(2.0) == []


def test_from_the_decision_on_nothing_starts_until_the_gpu_has_come() -> None:
    box = sharing()
    running, waits = Ticket(), Ticket()
    box.arrive(running)
    box.policy.pin = "vllm"
    decided = box.act(box.scheduler.changed(1.0))
    arrived = box.arrive(waits)
    left = box.scheduler.left(running, 2.0)

    reason = "the GPU goes from ollama to vllm: the operator has pinned it"
    assert decided == [RequestGpu(Move("ollama", "vllm", reason, forced=True))]
    assert (arrived, left) == ([], [])
    assert box.open(3.0, "vllm") == [Start(waits)]
    assert waits.lane is box.scheduler.lanes["vllm"]


def test_a_request_that_makes_the_gpu_move_is_not_measured_by_the_layout_it_leaves() -> None:
    box = sharing()
    box.scheduler.lanes["ollama"].queue_limit = 0
    box.arrive(Ticket())
    box.policy.pin = "vllm"
    waits = Ticket()

    actions = box.arrive(waits, now=2.0)

    assert moves(actions) == ["vllm"]
    assert refused(actions) == {}
    assert box.open(3.0, "vllm") == [Start(waits)]


def test_a_slot_that_becomes_free_at_the_moment_of_the_decision_stays_free() -> None:
    box = sharing()
    running, waits = Ticket(), Ticket(pin="ollama")
    box.arrive(running, Ticket(pin="vllm"), waits)

    decided = box.act(box.scheduler.left(running, box.policy.due()))

    assert moves(decided) == ["vllm"]
    assert started(decided) == []
    assert box.open(10.0, "ollama") == [Start(waits)]


def test_after_a_hand_over_that_failed_it_goes_on_where_it_was() -> None:
    box = sharing()
    box.arrive(Ticket(pin="vllm"))
    decided = box.act(box.scheduler.passed(box.policy.due()))
    box.arrive(waits := Ticket())

    assert moves(decided) == ["vllm"]
    assert box.open(20.0, "ollama") == [Start(waits)]
    assert waits.lane is box.scheduler.lanes["ollama"]


def test_where_the_gpu_cannot_be_brought_to_the_operators_pin_it_serves_where_it_is() -> None:
    box = sharing()
    box.policy.pin = "vllm"
    box.act(box.scheduler.changed(1.0))
    box.arrive(waits := Ticket(pin="ollama"))
    while_moving = box.scheduler.lane_for(waits)

    assert while_moving == "vllm"
    assert box.open(2.0, "ollama") == [Start(waits)]
    assert waits.reason == "the GPU could not be moved to vllm, which the operator has pinned"


@pytest.mark.parametrize("needs", [Ticket(pin="vllm"), Ticket(eligible=frozenset({"vllm"}))])
def test_a_stranded_request_waits_no_longer_than_patience(needs: Ticket) -> None:
    box = sharing()
    box.arrive(needs, now=1.0)
    due = box.policy.due()

    assert due <= 1.0 + PATIENCE_S
    assert box.scheduler.passed(due - 0.01) == []
    assert moves(box.act(box.scheduler.passed(due))) == ["vllm"]
    assert box.open(due + 1, "vllm") == [Start(needs)]


def test_a_background_call_that_needs_the_other_lane_moves_nothing() -> None:
    box = sharing()
    box.arrive(Ticket(pin="vllm", background=True))

    assert box.policy.due() == math.inf
    assert box.scheduler.passed(LONG_S) == []


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (GpuState(Step.DRAINING, "ollama", released=True), "the operator has released the GPU"),
        (GpuState(Step.DOWN, failure="no driver"), "could not be loaded; it is tried again"),
    ],
)
def test_requests_for_a_blocked_gpu_are_refused_with_the_reason(
    state: GpuState, reason: str
) -> None:
    box = sharing()
    box.arrive(Ticket(), waits := Ticket())

    box.gpu.state = state
    [refusal] = box.scheduler.changed(2.0)
    [at_once] = box.scheduler.arrived(Ticket(), 3.0)

    for action, ticket in ((refusal, waits), (at_once, None)):
        assert isinstance(action, Refuse)
        assert ticket is None or action.ticket is ticket
        assert reason in action.error.message
    assert box.open(4.0, "ollama") == []


def test_for_a_request_whose_engine_fails_the_gpu_moves_to_the_other() -> None:
    box = sharing()
    box.arrive(ticket := Ticket())
    ticket.excluded.update(box.scheduler.lanes["ollama"].replicas)
    box.act(out(box.scheduler, "ollama"))
    box.scheduler.left(ticket, 3.0)

    assert box.scheduler.arrived(ticket, 3.0, again=True) == []
    assert moves(box.act(box.scheduler.passed(3.0 + PATIENCE_S))) == ["vllm"]
    assert box.open(10.0, "vllm") == [Start(ticket)]


def test_a_request_that_fails_at_a_healthy_engine_is_refused_and_moves_nothing() -> None:
    box = sharing()
    box.arrive(ticket := Ticket())
    ticket.excluded.update(box.scheduler.lanes["ollama"].replicas)
    box.scheduler.left(ticket, 3.0)

    assert refused(box.scheduler.arrived(ticket, 3.0, again=True)) == {ticket: NoLane}
    assert box.policy.due() == math.inf


# Under any sequence of events

KEYS = st.sampled_from(["a", "b", "c"])
PINS = st.sampled_from([None, None, None, "ollama", "vllm"])
ABLE = st.sampled_from([frozenset[str](), frozenset({"ollama"}), frozenset({"vllm"})])


@dataclass(frozen=True)
class Arrive:
    key: str
    background: bool
    pin: str | None
    able: frozenset[str]


@dataclass(frozen=True)
class Leave:
    """One of those that came, in the queue, in a slot, or gone already."""

    which: int
    failed: bool  # and comes again, not to the same replica


@dataclass(frozen=True)
class Room:
    which: int
    slots: int


@dataclass(frozen=True)
class Pin:
    lane: str | None


@dataclass(frozen=True)
class Pass:
    seconds: float


Event: TypeAlias = Arrive | Leave | Room | Pin | Pass

ANY = st.one_of(
    st.builds(Arrive, KEYS, st.booleans(), PINS, ABLE),
    st.builds(Arrive, KEYS, st.just(value=False), st.none(), st.just(frozenset[str]())),
    st.builds(Leave, st.integers(0, 30), st.booleans()),
    st.builds(Room, st.integers(0, 2), st.integers(0, 3)),
    st.builds(Pin, PINS),
    st.builds(Pass, st.floats(0, 10)),
)
EVENTS = st.lists(ANY, max_size=60)


@dataclass
class Ledger:
    """What an outsider knows of each request, from the actions alone."""

    scheduler: Scheduler
    all: list[Ticket] = field(default_factory=list)
    waiting: set[Ticket] = field(default_factory=set)
    running: dict[Ticket, Replica] = field(default_factory=dict)
    now: float = 1.0

    def take(self, actions: list[Action]) -> None:
        """Note what was decided; every decision must be about one who waits."""
        for action in actions:
            assert not isinstance(action, RequestGpu), "both lanes are resident"
            ticket = action.ticket
            assert ticket in self.waiting, "decided about one who had left, or twice"
            self.waiting.remove(ticket)
            if isinstance(action, Start):
                assert ticket.replica is not None
                assert ticket.replica not in ticket.excluded
                self.running[ticket] = ticket.replica
                pin = self.pinned(ticket)
                assert ticket.lane is not None
                assert not pin or ticket.lane.name == pin
                assert pin or not ticket.eligible or ticket.lane.name in ticket.eligible
        for replica in {a.ticket.replica for a in actions if isinstance(a, Start)}:
            assert replica is not None
            assert replica.running <= replica.capacity, "started more than there is room for"

    def pinned(self, ticket: Ticket) -> str | None:
        """Where it has to be served."""
        return self.scheduler.policy.pin or ticket.pin

    def play(self, event: Event) -> None:
        scheduler = self.scheduler
        match event:
            case Arrive(key, background, pin, able):
                ticket = Ticket(key, background, pin, able)
                self.all.append(ticket)
                self.waiting.add(ticket)
                self.take(scheduler.arrived(ticket, self.now))
            case Leave(which, failed) if which < len(self.all):
                ticket = self.all[which]
                held = self.running.pop(ticket, None)
                self.waiting.discard(ticket)
                self.take(scheduler.left(ticket, self.now))
                if failed and held is not None:
                    ticket.excluded.add(held)
                    self.waiting.add(ticket)
                    self.take(scheduler.arrived(ticket, self.now, again=True))
            case Room(which, slots):
                replicas = [r for lane in scheduler.lanes.values() for r in lane.replicas]
                replicas[which].capacity = slots
                self.take(scheduler.changed(self.now))
            case Pin(lane):
                scheduler.policy.pin = lane
                self.take(scheduler.changed(self.now))
            case Pass(seconds):
                self.now += seconds
                self.take(scheduler.passed(self.now))

    def check(self) -> None:
        """What must hold after every event."""
        scheduler = self.scheduler
        held = Counter(self.running.values())
        for lane in scheduler.lanes.values():
            for replica in lane.replicas:
                assert replica.running == held[replica]
        wanted = [*self.waiting, *self.running]
        assert scheduler.demand == sum(not ticket.background for ticket in wanted)
        assert scheduler.waiting == len(self.waiting)
        for ticket in self.waiting:
            name = scheduler.lane_for(ticket)
            assert name is not None, "waits for a lane that will not take it"
            lane = scheduler.lanes[name]
            free = lane.free_replica(ticket.excluded) if scheduler.is_resident(lane) else None
            assert free is None, "waits beside a free slot"


@settings(max_examples=3 * settings().max_examples)
@given(EVENTS)
def test_after_any_events_the_counts_are_right_and_no_request_starts_twice_or_after_leaving(
    events: list[Event],
) -> None:
    lanes = [
        Lane("ollama", [replica(1)], queue_limit=3),
        Lane("vllm", [replica(2, "http://0"), replica(2, "http://1")], queue_limit=3),
    ]
    ledger = Ledger(Scheduler(lanes, policy(CROSSING)))

    for event in events:
        ledger.play(event)
        ledger.check()
    for ticket in ledger.all:
        ledger.play(Leave(ledger.all.index(ticket), failed=False))
        ledger.check()
    assert state(ledger.scheduler) == (0, 0, 0)


@dataclass(frozen=True)
class Settle:
    """The hand-over is over, if there is one; else the GPU is given to who should have it."""

    well: bool


@dataclass(frozen=True)
class Free:
    """The holder releases the GPU: without requests, or for the operator."""

    released: bool


SHARED = st.lists(
    st.one_of(
        st.tuples(st.booleans(), ANY),
        st.tuples(st.booleans(), ANY),
        st.builds(Settle, st.booleans()),
        st.builds(Free, st.booleans()),
    ),
    max_size=60,
)


class Sharer(Ledger):
    """One model of several that share a GPU."""

    def __init__(self, scheduler: Scheduler, owner: Owner) -> None:
        super().__init__(scheduler)
        self.owner = owner

    def take(self, actions: list[Action]) -> None:
        decided: list[Action] = [a for a in actions if not isinstance(a, RequestGpu)]
        requests = [a for a in actions if isinstance(a, RequestGpu)]
        for action in decided:
            if isinstance(action, Start):
                assert not requests, "started on its way out"
                assert action.ticket.lane is not None
                assert action.ticket.lane.name == self.owner.holder, "started without the GPU"
        super().take(decided)
        for request in requests:
            self.owner.request(request.move)

    def pinned(self, ticket: Ticket) -> str | None:
        """Where it has to be served; the operator's pin is where the GPU is, if need be."""
        lanes, operator = self.scheduler.lanes, self.scheduler.policy.pin
        if operator in lanes and self.owner.holder in lanes:
            return self.owner.holder
        return operator or ticket.pin

    def check(self) -> None:
        super().check()
        if self.waiting and self.owner.holder is None and self.owner.gpu.state.move is None:
            assert self.owner.asked, "waits, and nobody was asked for the GPU"


class Owner:
    """The GPU's part in it: it brings the GPU where it is wanted, some time."""

    def __init__(self) -> None:
        both, only = ("ollama", "vllm"), ("vllm",)
        models = {"both": RoutedModel(both, CROSSING), "only": RoutedModel(only, CROSSING)}
        self.gpu = GpuStateRef()
        self.policy = ExclusivePolicy(both, models, HandoverCost(1.0, 2, PATIENCE_S), self.gpu)
        self.sharers = [self._sharer(name, model.lanes) for name, model in models.items()]
        self.former = "ollama"
        self.asked = False
        self.now = 1.0

    def _sharer(self, name: str, lanes: tuple[str, ...]) -> Sharer:
        made = [Lane(lane, [replica(2)], queue_limit=3) for lane in lanes]
        return Sharer(Scheduler(made, self.policy, model=name, gpu=self.gpu), self)

    @property
    def holder(self) -> str | None:
        return self.gpu.state.holder

    def request(self, move: Move | None) -> None:
        self.asked = True
        if move is not None:
            assert self.holder == move.source, "decided while it does not hold"
            self.former = move.source
            self.policy.advance(self.now)
            self.gpu.state = GpuState(Step.DRAINING, move.source, move.target, move)
            self.changed()

    def changed(self) -> None:
        for sharer in self.sharers:  # what one does about it may change it for the next, as in Gpu
            sharer.take(sharer.scheduler.changed(self.now))

    def open(self, lane: str) -> None:
        self.asked = False
        move = self.gpu.state.move
        self.policy.advance(self.now)
        self.gpu.state = held_by(lane)
        self.policy.on_settled(self.now, move)
        self.changed()

    def free(self, *, released: bool) -> None:
        assert self.holder is not None
        self.former = self.holder
        self.policy.advance(self.now)
        self.gpu.state = GpuState(released=released)
        self.policy.on_freed(self.now, self.former)
        self.changed()

    def play(self, event: Settle | Free | tuple[bool, Event]) -> None:
        match event:
            case Settle(well) if (move := self.gpu.state.move) is not None:
                self.open(move.target if well else self.former)
            case Settle() if self.holder is None:
                self.open(self.policy.next_layout)
            case Free(released) if self.holder is not None:
                self.free(released=released)
            case (first, its):
                self.play_one(self.sharers[0 if first else 1], its)

    def play_one(self, sharer: Sharer, event: Event) -> None:
        sharer.now = self.now
        match event:
            case Room(which, slots):
                lanes = list(sharer.scheduler.lanes.values())
                lanes[which % len(lanes)].replicas[0].capacity = slots
                sharer.take(sharer.scheduler.changed(self.now))
            case Pin(lane):
                self.policy.pin = lane
                self.changed()
            case _:
                sharer.play(event)
        self.now = sharer.now

    def check(self) -> None:
        for sharer in self.sharers:
            sharer.check()


@settings(max_examples=3 * settings().max_examples)
@given(SHARED)
def test_after_any_events_of_the_gpu_nothing_starts_without_it_and_no_request_waits_for_ever(
    events: list[Settle | Free | tuple[bool, Event]],
) -> None:
    owner = Owner()
    owner.open("ollama")

    for event in events:
        owner.play(event)
        owner.check()

    # From now on all is well: whoever waits is served, in a few turns of the GPU.
    owner.policy.pin = None
    for sharer in owner.sharers:
        for lane in sharer.scheduler.lanes.values():
            lane.replicas[0].capacity = 2
    owner.changed()
    for _ in range(60):
        owner.now += LONG_S
        owner.play(Settle(well=True))
        for sharer in owner.sharers:
            for ticket in list(sharer.running):
                owner.play_one(sharer, Leave(sharer.all.index(ticket), failed=False))
            owner.play_one(sharer, Pass(0.0))
        owner.check()
    for sharer in owner.sharers:
        assert all(ticket.background for ticket in sharer.waiting), "waits for ever"
        for number in range(len(sharer.all)):
            owner.play_one(sharer, Leave(number, failed=False))
        assert state(sharer.scheduler) == (0, 0, 0)


@given(st.lists(KEYS), st.lists(st.tuples(KEYS, st.booleans())))
def test_after_any_events_waiting_keys_are_served_in_turn(
    first: list[str], then: list[tuple[str, bool]]
) -> None:
    scheduler = one_lane(1, waiting=1000)
    arrive(scheduler, running := Ticket("running"), *map(Ticket, first))
    for key, somebody_leaves in then:
        arrive(scheduler, Ticket(key))
        if somebody_leaves:
            [running] = started(scheduler.left(running, 2.0))

    order = [ticket.key for ticket in served_in_turn(scheduler, running)]

    for key, other in itertools.permutations(set(order), 2):
        # As long as one key has somebody waiting, another comes at most once between two.
        last = max(index for index, each in enumerate(order) if each == key)
        assert order[:last].count(other) <= order.count(key)
