"""When the policy moves, when it does not, and when it will: at given times, on made-up lanes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.gpu.state import GpuState, GpuStateRef, Step
from gateway.routing.policy_exclusive import ExclusivePolicy
from gateway.routing.policy_shared import SharedPolicy
from gateway.routing.profile import ASSUMED, LaneProfile, Profile
from gateway.routing.regret import ModelDemand, RoutedModel
from gateway.routing.switch_cost import IDLE_RESET_S, LEAST_SHARE, OVERLAP_SHARE, HandoverCost

LANES = ("ollama", "vllm")
#: Ollama is faster below three at once, vLLM above; at three they are equal.
CROSSING = Profile(
    version=1,
    source="measured",
    lanes={"ollama": LaneProfile((1, 9), (1.0, 9.0)), "vllm": LaneProfile((1,), (3.0,))},
)
#: vLLM always wins, as with a 70B over two cards.
ONE_WINS = Profile(
    version=1,
    source="measured",
    lanes={"ollama": LaneProfile((1, 8), (3.0, 9.0)), "vllm": LaneProfile((1, 8), (1.0, 2.0))},
)
#: Nothing is known of vLLM.
HALF = Profile(version=1, source="measured", lanes={"ollama": CROSSING.lanes["ollama"]})

NOTHING = {"ollama": 0, "vllm": 0}
MODEL = "chat"


def shared(profile: Profile, lanes: Sequence[str] = LANES) -> SharedPolicy:
    """Both lanes fit in memory."""
    return SharedPolicy(lanes, {MODEL: RoutedModel(tuple(lanes), profile)})


def exclusive(
    profile: Profile = CROSSING,
    cost: HandoverCost | None = None,
    gpu: GpuStateRef | None = None,
    lanes: Sequence[str] = LANES,
) -> ExclusivePolicy:
    """One lane at a time has the GPU; the first at the beginning."""
    gpu = gpu or GpuStateRef(held_by(lanes[0]))
    cost = cost or HandoverCost(assumed_s=10.0)
    return ExclusivePolicy(lanes, {MODEL: RoutedModel(LANES, profile)}, cost, gpu)


def held_by(layout: str) -> GpuState:
    return GpuState(Step.HELD, layout, layout)


def see(
    policy: SharedPolicy | ExclusivePolicy,
    now: float,
    n: int,
    running: Mapping[str, int] = NOTHING,
) -> bool:
    """Whether it moves at this demand, of which nothing is stranded."""
    return bool(policy.observe(now, MODEL, ModelDemand(n, running, {})))


def on(lane: str, running: int) -> dict[str, int]:
    """So many run on one lane, none on the other."""
    return {**NOTHING, lane: running}


def lane_at(policy: SharedPolicy, demands: list[int]) -> list[str]:
    """Where it is at each of these demands, with nothing running, long after the one before."""
    lanes = []
    for number, demand in enumerate(demands):
        now = number * 3 * IDLE_RESET_S
        see(policy, now, demand)
        lanes.append(policy.lane)
        see(policy, now + 0.1, 0)
    return lanes


# Where it goes


def test_it_begins_with_the_first_lane_before_anybody_has_asked() -> None:
    assert shared(CROSSING).lane == exclusive().lane == "ollama"
    assert shared(CROSSING).due() == exclusive().due() == math.inf


def test_after_a_pause_the_faster_lane_is_chosen() -> None:
    policy = shared(CROSSING)

    lanes = lane_at(policy, [1, 2, 4, 9, 2, 1, 5])

    assert lanes == ["ollama", "ollama", "vllm", "vllm", "ollama", "ollama", "vllm"]
    assert policy.moves == 3


def test_where_both_are_equal_it_stays_wherever_it_is() -> None:
    assert lane_at(shared(CROSSING), [1, 3]) == ["ollama", "ollama"]
    assert lane_at(shared(CROSSING), [4, 3]) == ["vllm", "vllm"]


def test_without_demand_it_does_not_move_and_pays_no_rent() -> None:
    policy = shared(CROSSING)
    see(policy, 0.0, 9, on("ollama", 8))
    see(policy, 0.5, 0)
    owed = policy.regret

    assert not see(policy, 1000.0, 0)
    assert (policy.lane, policy.regret) == ("ollama", owed)
    assert owed > 0


def test_a_lane_that_always_wins_is_gone_to_at_once_and_never_left() -> None:
    policy = shared(ONE_WINS)

    lanes = lane_at(policy, [1, 8, 64, 2, 1, 32, 0, 1])

    assert lanes == ["vllm"] * 8
    assert policy.moves == 1


@given(
    st.lists(
        st.tuples(st.floats(0, 100), st.integers(0, 64), st.integers(0, 32), st.integers(0, 32))
    )
)
def test_from_a_lane_that_always_wins_nothing_makes_it_move(
    seen: list[tuple[float, int, int, int]],
) -> None:
    for policy in (
        shared(ONE_WINS, ("vllm", "ollama")),
        exclusive(ONE_WINS, HandoverCost(), lanes=("vllm", "ollama")),
    ):
        now = 0.0
        for passed, demand, here, there in seen:
            now += passed
            assert not see(policy, now, demand, {"vllm": here, "ollama": there})
            assert policy.due() == math.inf
        assert policy.lane == "vllm"


def test_a_single_lane_is_never_left() -> None:
    policy = shared(CROSSING, ["vllm"])

    assert not any(see(policy, float(second), 64, {"vllm": 32}) for second in range(100))
    assert policy.reason(MODEL) == "the model's only lane"
    assert policy.due() == math.inf


def test_what_was_not_measured_is_nothing_to_move_for() -> None:
    for policy in (shared(HALF), exclusive(HALF)):
        assert not see(policy, 0.0, 64, on("ollama", 1))
        assert not see(policy, 1000.0, 64, on("ollama", 1))
        assert policy.reason(MODEL) == "not measured"


def test_of_three_lanes_it_goes_to_the_fastest() -> None:
    three = Profile(
        version=1,
        source="measured",
        lanes={name: LaneProfile((1,), (s,)) for name, s in (("a", 3.0), ("b", 2.0), ("c", 1.0))},
    )
    policy = shared(three, ("a", "b", "c"))

    assert see(policy, 0.0, 1, {})
    assert policy.lane == "c"


# How long it hesitates where both are resident


def test_the_price_is_what_still_runs_on_the_lane_that_would_be_left() -> None:
    policy = shared(CROSSING)

    see(policy, 0.0, 4, {"ollama": 3, "vllm": 7})

    assert policy.price == 3 * OVERLAP_SHARE * 4.0  # a request takes four seconds there
    assert policy.lane == "ollama"


def test_with_nothing_running_there_a_move_costs_a_part_of_one_request() -> None:
    policy = shared(CROSSING)
    see(policy, 0.0, 4, on("ollama", 1))  # earns one a second

    assert not see(policy, 0.2, 4, on("vllm", 5))
    assert policy.price == LEAST_SHARE * 1.0
    assert see(policy, 0.26, 4, on("vllm", 5))
    assert policy.lane == "vllm"


def test_the_first_of_a_wave_does_not_lead_the_crowd_away() -> None:
    policy = shared(CROSSING)
    see(policy, 0.0, 9)

    for wave in range(10):
        now = 1.0 + 6 * wave
        see(policy, now, 9, on("vllm", 9))
        see(policy, now + 2, 0)  # all think
        see(policy, now + 5, 1)  # the first is back, the others half a second later
        see(policy, now + 5.5, 5, on("vllm", 1))

    assert (policy.lane, policy.moves) == ("vllm", 1)


def test_a_lone_user_is_back_on_the_faster_lane_after_one_answer() -> None:
    policy = shared(CROSSING)
    see(policy, 0.0, 9)
    see(policy, 1.0, 0)

    see(policy, 3.0, 1)
    first = policy.lane
    see(policy, 6.0, 0)  # three seconds, as vLLM takes
    see(policy, 8.0, 1)

    assert (first, policy.lane) == ("vllm", "ollama")


def test_it_moves_once_the_rent_has_paid_the_price() -> None:
    # Nine here lose 9 * (1 - 3/9) = 6 request-seconds a second; two take 18.
    policy = shared(CROSSING)
    see(policy, 10.0, 9, on("ollama", 2))

    assert policy.due() == pytest.approx(10.0 + 18 / 6)
    assert not see(policy, 12.99, 9, on("ollama", 2))
    assert see(policy, 13.01, 9, on("ollama", 2))
    assert (policy.lane, policy.regret, policy.moves) == ("vllm", 0.0, 1)


def test_the_better_the_other_lane_the_sooner_it_moves() -> None:
    waits = []
    for demand in (4, 5, 7, 9):
        policy = shared(CROSSING)
        see(policy, 0.0, demand, on("ollama", 1))
        waits.append(policy.due())

    assert waits == sorted(waits, reverse=True)
    assert len(set(waits)) == 4


def test_a_short_burst_that_does_not_pay_moves_nothing() -> None:
    policy = shared(CROSSING)

    for burst in range(100):
        see(policy, float(burst), 4, on("ollama", 2))  # earns 1 a second
        see(policy, burst + 0.1, 1, on("ollama", 1))  # and loses 2/3 a second
    assert (policy.lane, policy.moves) == ("ollama", 0)


def test_time_on_the_better_lane_pays_the_rent_back_but_not_below_zero() -> None:
    policy = shared(CROSSING)
    see(policy, 0.0, 4, on("ollama", 4))
    see(policy, 1.0, 1, on("ollama", 1))
    owed = policy.regret

    see(policy, 1.5, 1, on("ollama", 1))
    paid = policy.regret
    see(policy, 1000.0, 1, on("ollama", 1))

    assert owed == pytest.approx(1.0)  # 4 * (1 - 3/4)
    assert paid == pytest.approx(owed - 0.5 * 2 / 3)  # one there loses 1 * (1 - 1/3)
    assert policy.regret == 0.0


def test_it_does_not_swing_back_before_that_pays_too() -> None:
    policy = shared(CROSSING)
    see(policy, 0.0, 4)
    moved = policy.lane

    see(policy, 1.0, 2, on("vllm", 2))  # loses 2 * (1 - 2/3) a second; two take six

    assert (moved, policy.lane) == ("vllm", "vllm")
    assert policy.due() == pytest.approx(1.0 + 6 / (2 / 3))
    assert see(policy, 10.01, 2, on("vllm", 2))
    assert policy.lane == "ollama"


# When it will


@given(
    demand=st.integers(4, 64),
    running=st.integers(1, 32),
    start=st.floats(0, 1e6),
)
def test_at_the_time_that_is_due_it_moves_and_just_before_it_does_not(
    demand: int, running: int, start: float
) -> None:
    def watched() -> SharedPolicy:
        policy = shared(CROSSING)
        see(policy, start, demand, on("ollama", running))
        return policy

    due = watched().due()

    assert due > start
    assert not see(watched(), due - 1e-3, demand, on("ollama", running))
    assert see(watched(), due, demand, on("ollama", running))


@given(
    seen=st.lists(
        st.tuples(st.floats(0, 10), st.integers(0, 32), st.integers(0, 16), st.integers(0, 16)),
        min_size=1,
    )
)
def test_after_any_demand_it_moves_when_it_is_due_and_not_before(
    seen: list[tuple[float, int, int, int]],
) -> None:
    policy = shared(ASSUMED)
    now = 0.0
    for passed, demand, ollama, vllm in seen:
        now += passed
        see(policy, now, demand, {"ollama": ollama, "vllm": vllm})
    _, demand, ollama, vllm = seen[-1]
    running = {"ollama": ollama, "vllm": vllm}
    due = policy.due()

    if due == math.inf:
        assert not see(policy, now + 1e6, demand, running)
        return
    if policy.price - policy.regret > 0.01:
        assert not see(policy, now + 0.999 * (due - now), demand, running)
    assert see(policy, max(due, now), demand, running)


@given(
    st.lists(
        st.tuples(st.floats(0, 10), st.integers(0, 32), st.integers(0, 16), st.integers(0, 16))
    )
)
def test_it_never_moves_to_a_slower_lane_and_owes_nothing_after_a_move(
    seen: list[tuple[float, int, int, int]],
) -> None:
    policy = shared(ASSUMED)

    now = 0.0
    for passed, demand, ollama, vllm in seen:
        now += passed
        left = policy.lane
        if see(policy, now, demand, {"ollama": ollama, "vllm": vllm}):
            here, there = ASSUMED.seconds(policy.lane, demand), ASSUMED.seconds(left, demand)
            assert here is not None
            assert there is not None
            assert here < there
            assert policy.regret == 0.0
        assert policy.regret >= 0.0


@pytest.mark.parametrize(
    ("busy_s", "calm_s", "moves"),
    [
        pytest.param(0.9, 8.5, 0, id="shorter than either move pays"),
        pytest.param(3.2, 8.5, 1, id="long enough to go, too short to come back"),
        pytest.param(3.2, 9.5, 20, id="long enough for both"),
    ],
)
def test_a_swing_of_demand_is_followed_only_where_it_lasts_long_enough(
    busy_s: float, calm_s: float, moves: int
) -> None:
    # Two run on the lane it is on, whichever that is. Nine at once lose six a second on
    # Ollama, where two take 18; one alone loses 2/3 on vLLM, where they take 6.
    policy = shared(CROSSING)

    now = 0.0
    for _ in range(10):
        for demand, lasts in ((9, busy_s), (1, calm_s)):
            see(policy, now, demand, on(policy.lane, 2))
            if policy.due() < now + lasts:
                see(policy, policy.due(), demand, on(policy.lane, 2))
            now += lasts
            see(policy, now, demand, on(policy.lane, 2))
    assert policy.moves == moves


# What it says


def test_the_reason_says_which_lane_is_faster_and_by_which_profile() -> None:
    policy = shared(CROSSING)
    see(policy, 0.0, 2)

    assert policy.reason(MODEL) == (
        "faster at demand 2 by the measured profile: 2.0 s against 3.0 s on vllm"
    )


def test_the_reason_says_what_a_move_waits_for() -> None:
    policy = shared(CROSSING)
    see(policy, 0.0, 9, on("ollama", 4))
    see(policy, 0.5, 9, on("ollama", 4))

    assert policy.reason(MODEL) == (
        "a move to vllm does not pay yet: regret 3.0 of 36.0 request-seconds at demand 9"
    )


def test_the_reason_of_a_pinned_lane_is_the_pin_in_either_placement() -> None:
    for policy in (shared(CROSSING), exclusive()):
        policy.pin = "ollama"
        assert policy.reason(MODEL) == "pinned by the operator"
        policy.pin = "vllm"
        assert "pinned" not in policy.reason(MODEL)


# The GPU on its way


def test_waiting_is_counted_during_a_move_and_while_no_layout_holds() -> None:
    gpu = GpuStateRef(GpuState(Step.LOADING, target="ollama"))
    policy = exclusive(cost=HandoverCost(assumed_s=10.0), gpu=gpu)
    see(policy, 10.0, 3)
    policy.advance(14.0)
    gpu.state = held_by("ollama")
    policy.on_settled(14.0, None)
    free = policy.waited
    see(policy, 20.0, 3, on("ollama", 1))
    policy.pin = "vllm"
    move = policy.observe(30.0, MODEL, ModelDemand(3, on("ollama", 1), {}))
    gpu.state = GpuState(Step.DRAINING, "ollama", "vllm", move)
    policy.advance(35.0)
    gpu.state = held_by("vllm")
    policy.on_settled(35.0, move)

    assert free == 3 * 4
    assert policy.moves == 1
    assert policy.waited - free == 2 * 5  # the one still running does not wait
