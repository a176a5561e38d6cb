"""What live answers make of a measured profile, and what they must not make of it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing.lanes import Lane as Queue
from gateway.routing.lanes import Replica, Ticket
from gateway.routing.policy_shared import SharedPolicy
from gateway.routing.profile import ASSUMED, LaneProfile, Profile
from gateway.routing.refine import MAX_CORRECTION, ProfileRefiner
from gateway.routing.regret import ModelDemand, RoutedModel
from gateway.routing.scheduler import REFINE_INTERVAL_S, Scheduler, Start

LEVELS = (1, 4, 8, 16)
TOKENS = 64
#: Slots of both lanes, where the tests do not say otherwise.
SLOTS = {"ollama": 16, "vllm": 16}


def queueing(n: float) -> float:
    return 0.2 + 0.5 * n


def batching(n: float) -> float:
    return 2.2 + 0.25 * n


def profile(seconds: Mapping[str, Callable[[float], float]]) -> Profile:
    """A fifth of the time is the first token's."""
    return Profile(
        version=1,
        source="measured",
        tokens_out=TOKENS,
        lanes={
            name: LaneProfile(
                LEVELS,
                tuple(of(n) for n in LEVELS),
                ttft_s=tuple(of(n) / 5 for n in LEVELS),
                tokens_per_s=tuple(TOKENS * n / of(n) for n in LEVELS),
            )
            for name, of in seconds.items()
        },
    )


#: They cross at eight.
CROSSING = profile({"ollama": queueing, "vllm": batching})


def answers(
    refined: ProfileRefiner,
    lane: str,
    n: float,
    factor: float = 1.0,
    *,
    many: int = 3000,
    noise: float = 0.0,
    tokens: int | None = None,
    seed: int = 1,
) -> None:
    """So many answers that took so many times what the measured profile says, n at once."""
    dice = random.Random(seed)
    expected = CROSSING.lanes[lane].at(n)
    for _ in range(many):
        length = tokens or dice.choice((32, 64, 200))
        seconds = expected * (0.2 + 0.8 * length / TOKENS) * factor
        refined.learn(lane, n, seconds * math.exp(dice.gauss(0, noise)), length)


def crossing(found: Profile) -> int:
    """The first number at once at which vLLM is the faster one."""
    ollama, vllm = found.lanes["ollama"], found.lanes["vllm"]
    return next(n for n in range(1, 100) if vllm.at(n) < ollama.at(n))


# What it learns


def test_answers_as_measured_change_nothing_whatever_their_length() -> None:
    refined = ProfileRefiner(CROSSING, SLOTS)
    for lane in SLOTS:
        for n in (1, 3, 8, 16):
            answers(refined, lane, n)

    assert refined.corrected() is None
    assert refined.profile is CROSSING
    assert refined.requests == 8 * 3000


@pytest.mark.slow
@given(
    factors=st.lists(st.floats(0.6, 1.7), min_size=8, max_size=8),
    noise=st.floats(0.0, 0.3),
    seed=st.integers(0, 99),
)
def test_it_converges_to_what_is_true(factors: list[float], noise: float, seed: int) -> None:
    true = dict(zip(((lane, n) for lane in SLOTS for n in LEVELS), factors, strict=True))
    refined = ProfileRefiner(CROSSING, SLOTS)
    for (lane, n), factor in true.items():
        answers(refined, lane, n, factor, many=100 * n, noise=noise, seed=seed)

    found = refined.corrected() or CROSSING

    for (lane, n), factor in true.items():
        wanted = CROSSING.lanes[lane].at(n) * factor
        assert found.seconds(lane, n) == pytest.approx(wanted, rel=0.2)


def test_a_lane_that_has_become_slower_is_left_earlier() -> None:
    refined = ProfileRefiner(CROSSING, SLOTS)
    for n in range(1, 17):
        answers(refined, "ollama", n, 1.5, noise=0.2)
        answers(refined, "vllm", n, 1.0, noise=0.2)

    found = refined.corrected()

    true = profile({"ollama": lambda n: 1.5 * queueing(n), "vllm": batching})
    assert found is not None
    assert crossing(CROSSING) == 9
    assert crossing(found) == crossing(true) == 4


def test_what_befalls_the_lane_that_is_used_is_expected_of_the_other_too() -> None:
    refined = ProfileRefiner(CROSSING, SLOTS)
    for n in (1, 2, 4):
        answers(refined, "ollama", n, 1.5, noise=0.2)  # longer prompts, say

    found = refined.corrected()

    assert found is not None
    assert found.lanes["ollama"].at(4) == pytest.approx(1.5 * queueing(4), rel=0.05)
    assert crossing(found) == crossing(CROSSING)


def test_answers_with_all_slots_taken_correct_every_longer_queue() -> None:
    refined = ProfileRefiner(CROSSING, {"ollama": 1, "vllm": 16})
    answers(refined, "ollama", 1, 1.5)
    answers(refined, "vllm", 16, 1.0)

    found = refined.corrected()

    assert found is not None
    for n in LEVELS:
        assert found.seconds("ollama", n) == pytest.approx(1.5 * queueing(n), rel=0.05)


def test_the_length_of_an_answer_is_what_was_generated_and_not_its_limit() -> None:
    half = tuple(TOKENS / 2 * n / queueing(n) for n in LEVELS)  # all ended half-way
    lane = LaneProfile(LEVELS, tuple(map(queueing, LEVELS)), ttft_s=(0.0,) * 4, tokens_per_s=half)
    refined = ProfileRefiner(Profile(1, "measured", {"ollama": lane}, tokens_out=TOKENS), SLOTS)
    for _ in range(100):
        refined.learn("ollama", 4, queueing(4) / 2, TOKENS // 4)

    assert refined.corrected() is None


# What it does not


@pytest.mark.parametrize("n", [1, 4, 16])
def test_few_answers_say_little(n: int) -> None:
    refined = ProfileRefiner(CROSSING, SLOTS)
    answers(refined, "vllm", n, 1.0, many=100 * n)
    answers(refined, "ollama", n, 1.5, many=n)

    found = refined.corrected() or CROSSING

    assert found.seconds("ollama", n) == pytest.approx(queueing(n), rel=0.03)


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_no_correction_is_beyond_a_factor_of_two(factor: float) -> None:
    refined = ProfileRefiner(CROSSING, SLOTS)
    for n in LEVELS:
        answers(refined, "ollama", n, factor)
        answers(refined, "vllm", n, 1 / factor)
    refined.corrected()

    factors = [f for by_level in refined.factors.values() for f in by_level.values()]
    assert max(factors) <= 2.000001
    assert min(factors) >= 0.499999


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["ollama", "vllm", "nobody", ""]),
            st.floats() | st.integers(0, 17).map(float) | st.just(math.nextafter(8, 0)),
            st.floats() | st.floats(0, 100),
            st.integers() | st.sampled_from([0, 1, 10**6, 10**400]),
        )
    )
)
def test_hostile_numbers_do_nothing_bad(said: list[tuple[str, float, float, int]]) -> None:
    refined = ProfileRefiner(CROSSING, SLOTS)
    for told in said:
        refined.learn(*told)

    found = refined.corrected() or CROSSING

    for name, lane in found.lanes.items():
        for n, seconds in zip(lane.at_once, lane.seconds, strict=True):
            was = CROSSING.lanes[name].at(n)
            assert (
                was * math.exp(-MAX_CORRECTION) * 0.999
                <= seconds
                <= was * math.exp(MAX_CORRECTION) * 1.001
            )


@pytest.mark.parametrize(
    ("lane", "n", "seconds", "tokens"),
    [
        ("ollama", 1, 0.0, 64),
        ("ollama", 1, -1.0, 64),
        ("ollama", 1, math.nan, 64),
        ("ollama", 1, math.inf, 64),
        ("ollama", 1, 1.0, 0),
        ("ollama", 1, 1.0, -5),
        ("ollama", 1, 1.0, 10**9),
        ("nobody", 1, 1.0, 64),
    ],
)
def test_what_says_nothing_is_not_counted(lane: str, n: int, seconds: float, tokens: int) -> None:
    refined = ProfileRefiner(CROSSING, SLOTS)
    refined.learn(lane, n, seconds, tokens)

    assert refined.requests == 0


def test_an_answer_of_a_million_tokens_hardly_counts() -> None:
    refined = ProfileRefiner(CROSSING, SLOTS)
    answers(refined, "ollama", 1, many=100, noise=0.1)
    answers(refined, "ollama", 1, 100.0, many=100, tokens=10**6)

    assert refined.corrected() is None


@pytest.mark.parametrize(
    "known",
    [
        ASSUMED,
        Profile(1, "measured", {"ollama": LaneProfile(LEVELS, (1.0,) * 4)}, tokens_out=64),
        Profile(1, "measured", {"ollama": LaneProfile(LEVELS, (1.0,) * 4, ttft_s=(0.1,) * 4)}),
    ],
)
def test_a_profile_that_knows_one_length_only_learns_nothing(known: Profile) -> None:
    refined = ProfileRefiner(known, SLOTS)
    refined.learn("ollama", 1, 100.0, 64)

    assert refined.requests == 0
    assert refined.corrected() is None


# What becomes of the lanes


@dataclass
class Day:
    """What came of it: how often the lane changed, and the request-seconds that were lost."""

    moves: int = 0
    lost: float = 0.0


def days(believed: Profile, true: Profile, demands: range, *, learn: bool) -> Day:
    """Four times four hours in which the crowd grows and shrinks by one, and asks in rounds."""
    total = Day()
    for seed in range(4):
        dice, crowd = random.Random(seed), random.Random(-1 - seed)
        policy = SharedPolicy(list(SLOTS), {"m": RoutedModel(tuple(SLOTS), believed)})
        refined = ProfileRefiner(believed, SLOTS)
        now, told_at, n = 0.0, 0.0, demands[len(demands) // 2]
        while now < 4 * 3600:
            lane = policy.lane
            by_lane = {name: true.seconds(name, n) or 0.0 for name in SLOTS}
            now += by_lane[lane]
            total.lost += n * (by_lane[lane] - min(by_lane.values()))
            together = dice.gauss(0, 0.1)
            for _ in range(n if learn else 0):
                tokens = dice.choice((20, 64, 200))
                took = by_lane[lane] * (0.2 + 0.8 * tokens / TOKENS)
                refined.learn(lane, n, took * math.exp(together + dice.gauss(0, 0.3)), tokens)
            if now - told_at >= REFINE_INTERVAL_S and (found := refined.corrected()) is not None:
                policy.refine(now, "m", found)
                told_at = now
            n = min(demands[-1], max(demands[0], n + crowd.choice((-1, 0, 1))))
            policy.observe(now, "m", ModelDemand(n, {lane: n - 1}, {}))
        total.moves += policy.moves
    return total


@pytest.mark.slow
@pytest.mark.parametrize("demands", [range(1, 5), range(2, 13), range(8, 17)])
def test_noise_never_moves_lanes_that_are_equal(demands: range) -> None:
    equal = profile({"ollama": queueing, "vllm": queueing})

    assert days(equal, equal, demands, learn=True).moves == 0


@pytest.mark.slow
def test_noise_around_the_crossover_moves_it_no_more_than_before() -> None:
    before = days(CROSSING, CROSSING, range(6, 11), learn=False).moves
    after = days(CROSSING, CROSSING, range(6, 11), learn=True).moves

    assert before > 100
    assert after <= before * 1.05


@pytest.mark.slow
def test_where_the_profile_is_wrong_by_half_less_than_half_of_that_is_lost() -> None:
    slower = profile({"ollama": lambda n: 1.5 * queueing(n), "vllm": batching})

    without = days(CROSSING, slower, range(1, 17), learn=False).lost
    learned = days(CROSSING, slower, range(1, 17), learn=True).lost

    assert learned < without / 2


def test_a_policy_decides_by_the_last_profile_and_keeps_its_regret() -> None:
    policy = SharedPolicy(list(SLOTS), {"m": RoutedModel(tuple(SLOTS), CROSSING)})
    policy.observe(0.0, "m", ModelDemand(12, {"ollama": 12}, {}))
    policy.observe(5.0, "m", ModelDemand(12, {"ollama": 12}, {}))
    owed = policy.regret

    swapped = {"ollama": CROSSING.lanes["vllm"], "vllm": CROSSING.lanes["ollama"]}
    policy.refine(5.0, "m", Profile(1, "measured", swapped))

    assert policy.lane == "ollama"
    assert policy.regret == owed > 0
    assert policy.due() == math.inf
    assert "faster at demand 12" in policy.reason("m")


# Which requests tell anything


class Times:
    """A scheduler of one model, at times that a test gives."""

    def __init__(self, slots: int = 16) -> None:
        self.refined = ProfileRefiner(CROSSING, SLOTS)
        lanes = [Queue(name, [Replica(name, slots, slots)], 128) for name in SLOTS]
        self.policy = SharedPolicy(list(SLOTS), {"m": RoutedModel(tuple(SLOTS), CROSSING)})
        self.scheduler = Scheduler(lanes, self.policy, model="m", refined=self.refined)

    def start(self, now: float, **ticket: object) -> Ticket:
        asked = Ticket(**ticket)  # type: ignore[arg-type]  # as the tests give it
        assert Start(asked) in self.scheduler.arrived(asked, now)
        return asked

    def end(self, ticket: Ticket, now: float, tokens: int = 64) -> int:
        """Returns how many requests have told anything since the beginning."""
        self.scheduler.served(ticket, tokens, now)
        self.scheduler.left(ticket, now)
        return self.refined.requests


def test_an_answer_is_learned_from() -> None:
    served = Times()

    assert served.end(served.start(100.0), 100.7) == 1


def test_background_calls_are_not_learned_from_and_count_beside_others() -> None:
    served = Times()
    behind = served.start(0.0, background=True)
    asked = served.start(0.0)

    assert served.end(asked, 1.2) == 1
    assert served.end(behind, 1.3) == 1
    assert served.scheduler.lanes["ollama"].concurrency_s == pytest.approx(2 * 1.2 + 0.1)


def test_failed_and_abandoned_requests_teach_nothing() -> None:
    served = Times()
    served.scheduler.left(served.start(0.0), 1.0)

    assert served.refined.requests == 0


def test_where_the_number_at_once_was_not_steady_nothing_is_learned() -> None:
    served = Times()
    first = served.start(0.0)
    others = [served.start(2.0) for _ in range(3)]

    assert served.end(first, 4.0) == 0
    assert [served.end(other, 5.0) for other in others] == [1, 2, 3]


def test_a_wave_is_learned_from_as_the_number_that_it_was() -> None:
    served = Times()
    for wave in range(20):
        began = 100.0 * wave
        asked = [served.start(began + number / 100) for number in range(8)]
        for number, one in enumerate(asked):
            served.end(one, began + 1.5 * queueing(8) + number / 100)

    found = served.refined.profile

    assert served.refined.requests == 8 * 20
    assert found.seconds("ollama", 8) == pytest.approx(1.5 * queueing(8), rel=0.1)


def test_where_both_lanes_had_work_nothing_is_learned() -> None:
    served = Times()
    beside = served.start(0.0, pin="vllm")
    asked = served.start(0.0)

    assert served.end(asked, 1.0) == 0
    assert served.end(beside, 1.1) == 0


def test_the_policy_receives_a_profile_now_and_then_and_not_with_every_answer() -> None:
    served = Times()
    told: list[float] = []
    now = 1000.0
    known = CROSSING
    while now < 1000 + 4 * REFINE_INTERVAL_S:
        asked = served.start(now)
        now += 1.3 * queueing(1)
        served.end(asked, now)
        if served.refined.profile is not known:
            known = served.refined.profile
            told.append(now)
    between = [later - sooner for sooner, later in pairwise(told)]

    assert 1 <= len(told) <= 5
    assert min(between, default=REFINE_INTERVAL_S) >= REFINE_INTERVAL_S
    assert "0.9 s against" in served.policy.reason("m")
