"""The figures of requests of which the truth is known."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing.profile import LaneProfile
from loadtests.analysis import energy, gateway_cost, rows, slo
from loadtests.analysis.crossover import Seconds, find_crossover, seconds_by_level
from loadtests.analysis.rows import Row
from loadtests.analysis.spread import Spread, Summary, percentile
from loadtests.measure.experiment import Limits, Prices
from loadtests.measure.samples import Cell, Line, Power, Request, Run

ANY = Limits()
#: Ten rounds are enough for a median.
ROUNDS = 10


def request(start: float = 0.0, e2e_s: float = 2.0, **more: Any) -> Request:
    """Five tokens, a chunk each: the first after a second, the last at the end."""
    asked: dict[str, Any] = {
        "target": "a", "loop": "closed", "level": 1, "repetition": 1, "user": 0, "number": 0,
        "phase": "measured", "ttft_s": 1.0, "gaps_s": [(e2e_s - 1) / 4] * 4,
        "tpot_s": (e2e_s - 1) / 4, "tokens_out": 5, "finish": "length",
    }  # fmt: skip
    return Request(**(asked | more), start=start, e2e_s=e2e_s)


def cell(began: float = 0.0, ended: float = 10.0, **more: Any) -> Cell:
    named: dict[str, Any] = {"target": "a", "loop": "closed", "level": 1, "repetition": 1}
    return Cell(**(named | more), began=began, ended=ended)


def row(
    requests: Sequence[Request], *, limits: Limits = ANY, tokens_out: int = 5, **more: Any
) -> Row:
    """The row of one cell."""
    (only,) = rows.make_rows([(cell(**more), [*requests])], tokens_out=tokens_out, limits=limits)
    return only


def rounds(e2e_s: Callable[[int], float], **more: Any) -> list[Request]:
    """One user's requests, one after another."""
    return [request(e2e_s=e2e_s(number), number=number, **more) for number in range(ROUNDS)]


# watts, and what tokens cost


def steady(watts: float, *, without: Sequence[int] = ()) -> list[Power]:
    """Power samples, one per second, before, during and after a cell of ten seconds."""
    return [Power(float(at), watts) for at in range(-5, 16) if at not in without]


def busy() -> Row:
    """A target with 2.5 tokens per second for ten seconds."""
    return row([request(start=2.0 * n, number=n) for n in range(5)])


def test_tokens_per_joule_and_prices_are_those_of_the_window() -> None:
    [one] = energy.energy_by_row([busy()], steady(100), Prices(per_kwh=0.36, rent_per_hour=1.8))

    assert one.watts == Spread(100, 100, 100)
    assert one.tokens_per_joule is not None
    assert one.electricity is not None
    assert one.rent is not None
    assert one.tokens_per_joule.value == pytest.approx(0.025)
    # A million tokens take 40 MJ, which are 11.1 kWh, and 111 hours.
    assert one.electricity.value == pytest.approx(4.0)
    assert one.rent.value == pytest.approx(200.0)


def test_watts_before_and_after_the_window_do_not_count() -> None:
    looks = [Power(one.at, 100 if 0 <= one.at <= 10 else 900) for one in steady(0)]

    assert energy.mean_watts(busy().repetitions[0], looks) == 100


def test_configured_watts_replace_those_of_the_cards() -> None:
    [one] = energy.energy_by_row([busy()], steady(100), Prices(watts=500))

    assert one.watts == Spread(500, 500, 500)


@pytest.mark.parametrize("gone", [range(-5, 16), range(3, 9), range(6), range(5, 16)])
def test_watts_are_not_known_after_a_long_gap_in_the_samples(gone: range) -> None:
    assert energy.energy_by_row([busy()], steady(100, without=gone), Prices(per_kwh=0.3)) == []


def test_a_short_gap_in_the_power_samples_is_allowed() -> None:
    assert energy.mean_watts(busy().repetitions[0], steady(100, without=range(3, 7))) == 100


def test_rent_needs_no_watts_and_electricity_does() -> None:
    [one] = energy.energy_by_row([busy()], [], Prices(per_kwh=0.3, rent_per_hour=1.8))

    assert (one.watts, one.tokens_per_joule, one.electricity) == (None, None, None)
    assert one.rent is not None


def test_a_target_without_tokens_has_watts_and_no_price() -> None:
    idle = row([request(error="500", ttft_s=None, gaps_s=[], tokens_out=None)])
    [one] = energy.energy_by_row([idle], steady(100), Prices(per_kwh=0.3, rent_per_hour=1.8))

    assert one.watts is not None
    assert (one.tokens_per_joule, one.electricity, one.rent) == (None, None, None)


# percentiles


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.floats(0, 1))
def test_a_percentile_equals_that_of_numpy(values: list[float], p: float) -> None:
    assert percentile(values, p) == pytest.approx(float(np.quantile(values, p)), abs=1e-6)


def test_a_percentile_between_two_values_is_linear() -> None:
    assert percentile([30.0, 10.0, 20.0, 40.0], 0.5) == 25.0
    assert percentile([30.0, 10.0, 20.0, 40.0], 0.9) == pytest.approx(37.0)


def test_the_summary_reproduces_a_known_distribution() -> None:
    dice = random.Random(4)
    waits = [[dice.expovariate(2.0) for _ in range(20_000)] for _ in range(3)]

    found = Summary.of(waits)

    assert found is not None
    truth = {"median": math.log(2) / 2, "p90": math.log(10) / 2, "p99": math.log(100) / 2}
    assert found.mean == pytest.approx(0.5, rel=0.02)
    for name, value in truth.items():
        assert getattr(found, name) == pytest.approx(value, rel=0.03)


def test_the_spread_is_the_lowest_and_the_highest_median_of_a_repetition() -> None:
    found = Summary.of([[1, 2, 9], [], [3, 4, 5], [0, 3, 3]])

    assert found is not None
    assert (found.low, found.median, found.high) == (2, 3, 4)


# a row


def test_failed_requests_are_counted_and_make_no_latency() -> None:
    bad = [request(e2e_s=0.01, error="503: full"), request(e2e_s=9.0, error="cut")]
    found = row([*rounds(lambda _: 2.0), *bad, bad[0]])

    assert (found.asked, found.answered, found.failed, found.cut) == (13, 10, 2, 1)
    assert found.errors == {"503: full": 2}
    assert found.e2e is not None
    assert (found.e2e.count, found.e2e.mean, found.e2e.p99) == (10, 2.0, 2.0)


def test_only_measured_requests_make_a_latency() -> None:
    others = [request(e2e_s=50.0, phase="warm-up"), request(e2e_s=50.0, phase="trailing")]

    assert row([*rounds(lambda _: 2.0), *others]).value("e2e") == 2.0


def test_a_row_of_nothing_but_errors_has_no_latency() -> None:
    found = row([request(e2e_s=0.1, error="refused")])

    assert (found.e2e, found.ttft, found.tpot, found.answered) == (None, None, None, 0)
    assert found.saturation() == ""


def test_answers_that_ended_early_are_a_share_of_all_answers() -> None:
    early = request(tokens_out=3, finish="stop")
    silent = request(tokens_out=None, finish="stop")
    failed = request(tokens_out=1, error="broke off")

    assert row([request(), request(), early, silent, failed]).ended_early_share == 0.5


def test_an_answer_that_stops_with_its_last_token_did_not_end_early() -> None:
    assert row([request(tokens_out=5, finish="stop")]).ended_early == 0


def test_without_usage_tpot_is_the_time_per_chunk() -> None:
    found = row([request(e2e_s=5.0, tokens_out=None, tpot_s=None)] * ROUNDS)

    assert found.uncounted == ROUNDS
    assert found.value("tpot") == 1.0


def test_gaps_are_over_all_chunks() -> None:
    found = row([request(gaps_s=[0.1] * 99), request(gaps_s=[1.1])])

    assert found.gap_p50_s == pytest.approx(0.1)
    assert found.gap_p99_s == pytest.approx(0.11)


def test_fewer_than_ten_answers_per_user_make_an_ill_defined_median() -> None:
    assert row(rounds(lambda _: 2.0)[1:]).has_few_samples
    assert not row(rounds(lambda _: 2.0)).has_few_samples


def test_a_saturated_generator_is_reported() -> None:
    requests = rounds(lambda _: 2.0)

    assert row(requests).saturation() == ""
    assert "0.91 of a core" in row(requests, cpu=0.91).saturation()
    assert "lagged by 30.0 ms (p50)" in row(requests, lag_p50_s=0.03).saturation()
    assert "400.0 ms (p99)" in row(requests, lag_p99_s=0.4).saturation()


# what is said of a second


def test_tokens_count_when_their_chunk_arrives_in_every_phase() -> None:
    warm = request(start=-4.5, e2e_s=5.0, phase="warm-up")  # its last chunk is inside
    whole = request(start=1.0, e2e_s=5.0)
    trailing = request(start=7.5, e2e_s=5.0, phase="trailing", error="cut")  # two are inside

    assert row([warm, whole, trailing]).tokens_per_s.value == pytest.approx((1 + 5 + 2) / 10)


def test_a_chunk_has_its_requests_tokens_over_its_chunks() -> None:
    assert row([request(tokens_out=20)]).tokens_per_s.value == pytest.approx(2.0)


def test_a_chunk_without_usage_has_the_median_of_the_cell() -> None:
    counted = [request(tokens_out=10), request(tokens_out=15), request(tokens_out=500)]
    uncounted = request(tokens_out=None)

    assert row([*counted, uncounted]).tokens_per_s.value == pytest.approx((10 + 15 + 500 + 15) / 10)


def test_without_usage_a_chunk_counts_as_a_token() -> None:
    assert row([request(tokens_out=None)]).tokens_per_s.value == pytest.approx(0.5)


def test_achieved_concurrency_is_the_integral_over_the_window() -> None:
    asked = [request(start=-5.0, e2e_s=10.0), request(start=0.0, e2e_s=10.0), request(9.0, 60.0)]

    assert row(asked).concurrency.value == pytest.approx((5 + 10 + 1) / 10)


def test_requests_per_second_are_those_answered_in_the_window() -> None:
    asked = [request(0.0, 2.0), request(2.0, 2.0, error="x"), request(9.0, 2.0, phase="trailing")]

    assert row(asked).requests_per_s.value == pytest.approx(0.1)


def test_rates_are_by_repetition_with_their_spread() -> None:
    cells = [(cell(ended=10.0 * n, repetition=n), [request(repetition=n)]) for n in (1, 2, 4)]
    (found,) = rows.make_rows(cells, tokens_out=5, limits=Limits())

    spread = found.tokens_per_s
    assert (spread.low, spread.value, spread.high) == pytest.approx((0.125, 0.25, 0.5))


# goodput


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        (Limits(), 2),
        (Limits(ttft_s=1.0, tpot_s=1.0, e2e_s=5.0), 2),
        (Limits(ttft_s=0.9), 0),
        (Limits(tpot_s=0.5), 1),
        (Limits(e2e_s=2.5), 1),
    ],
)
def test_a_good_request_meets_every_stated_limit(limits: Limits, good: int) -> None:
    found = row([request(e2e_s=2.0), request(e2e_s=5.0), request(error="x")], limits=limits)

    assert found.good == good
    assert found.good_per_s.value == pytest.approx(good / 10)


def test_a_failed_request_does_not_meet_the_slo() -> None:
    assert row([request()] * 19 + [request(error="x")]).meets_slo
    assert not row([request()] * 18 + [request(error="x")] * 2).meets_slo


def level_by_level(*e2e_s: float) -> list[Row]:
    """The rows of a target with 1, 2, 4, … concurrent requests."""
    cells = [
        (cell(level=2**n), [request(e2e_s=seconds, level=2**n)]) for n, seconds in enumerate(e2e_s)
    ]
    return rows.make_rows(cells, tokens_out=5, limits=Limits(e2e_s=3.0))


@pytest.mark.parametrize(
    ("e2e_s", "level", "fails"),
    [
        ((2.0, 2.0, 4.0, 2.0), 2, 4),  # that 8 meets it again is luck
        ((4.0, 2.0), None, 1),
        ((2.0, 2.0), 2, None),
    ],
)
def test_the_highest_level_that_meets_the_slo_is_a_measured_one_with_all_below(
    e2e_s: tuple[float, ...], level: int | None, fails: int | None
) -> None:
    (found,) = slo.slo_brackets(level_by_level(*e2e_s))

    assert (found.level, found.fails) == (level, fails)


# which cells


def test_of_a_repeated_cell_the_complete_run_counts() -> None:
    lines: list[Line] = [
        Run(1, -1.0, []), request(0.0, 7.0), cell(outcome="interrupted"),
        Run(1, 99.0, []), request(100.0, 2.0), cell(100.0, 110.0),
        Run(1, 199.0, []), request(200.0, 9.0), cell(200.0, 210.0, outcome="interrupted"),
    ]  # fmt: skip
    found = rows.closed_cells(lines)

    assert [one.began for one, _ in found] == [100.0]
    assert [one.e2e_s for one in found[0][1]] == [2.0]


def test_a_cell_that_never_completed_is_shown_as_incomplete() -> None:
    found = rows.closed_cells([request(), cell(outcome="600 s were over")])

    (only,) = rows.make_rows(found, tokens_out=5, limits=Limits())
    assert only.unfinished == ["repetition 1: 600 s were over"]


def test_an_open_loop_has_no_fixed_concurrency() -> None:
    assert rows.closed_cells([cell(loop="open")]) == []


# two targets


def test_a_ratio_has_the_spread_of_the_ratios_within_each_repetition() -> None:
    def at(seconds: tuple[float, float]) -> Row:
        cells = [
            (cell(repetition=n), [request(e2e_s=e2e_s)] * ROUNDS)
            for n, e2e_s in enumerate(seconds, 1)
        ]
        return rows.make_rows(cells, tokens_out=5, limits=Limits())[0]

    found = rows.ratio(at((4.0, 8.0)), at((2.0, 2.0)), "e2e")

    assert found is not None
    assert (found.low, found.value, found.high) == (2.0, 3.0, 4.0)


def test_a_gateway_is_compared_with_the_faster_of_its_lanes() -> None:
    cells = [
        (cell(target=label, level=level), [request(e2e_s=e2e_s)] * ROUNDS)
        for label, level, e2e_s in [
            ("a", 1, 2.0), ("b", 1, 3.0), ("gateway", 1, 2.2),
            ("a", 8, 9.0), ("b", 8, 4.0), ("gateway", 8, 4.0),
        ]
    ]  # fmt: skip
    table = rows.make_rows(cells, tokens_out=5, limits=Limits())
    low, high = gateway_cost.gateway_costs(table, "gateway", ("a", "b"))

    assert (low.level, low.lane, low.e2e_s, low.is_noise) == (1, "a", (2.2, 2.0), False)
    assert (high.level, high.lane, high.e2e_s, high.is_noise) == (8, "b", (4.0, 4.0), True)


# crossover

LEVELS = (1, 4, 8, 16, 32)


def measured(
    mean: Callable[[int], float],
    *,
    seed: int = 1,
    repetitions: int = 3,
    per_user: int = 10,
    noise: float = 0.1,
    drift: float = 0.01,
) -> Seconds:
    """Requests of a known mean, with noise per request and per repetition."""
    dice = random.Random(seed)
    shift = [dice.gauss(1, drift) for _ in range(repetitions)]
    return {
        level: [
            [mean(level) * by * dice.gauss(1, noise) for _ in range(level * per_user)]
            for by in shift
        ]
        for level in LEVELS
    }


def queue(level: int) -> float:
    return 0.3 + 0.9 * level


def batch(level: int) -> float:
    return 3.0 + 0.3 * level


TRUTH = 4.5  # where those two are equal


def test_the_crossover_of_two_known_lines_is_found_with_its_interval() -> None:
    found = find_crossover(measured(queue), measured(batch, seed=2))

    assert (found.verdict, found.faster) == ("crosses", "a")
    assert found.low is not None
    assert found.level is not None
    assert found.high is not None
    assert found.low < TRUTH < found.high
    assert found.level == pytest.approx(TRUTH, rel=0.1)


def test_the_crossover_is_the_same_with_the_targets_swapped() -> None:
    found = find_crossover(measured(batch, seed=2), measured(queue))

    assert (found.verdict, found.faster) == ("crosses", "b")
    assert found.sentence("vLLM", "Ollama").startswith("Ollama is faster below 4.")


@pytest.mark.slow
def test_the_interval_contains_the_truth_about_as_often_as_stated() -> None:
    inside = 0
    for seed in range(30):
        found = find_crossover(measured(queue, seed=seed), measured(batch, seed=1000 + seed))
        inside += (found.low or 0) <= TRUTH <= (found.high or 0)

    assert inside >= 24  # three repetitions make it rough


def test_the_interpolated_lines_are_those_the_gateway_decides_by() -> None:
    a, b = measured(queue), measured(batch, seed=2)
    found = find_crossover(a, b)

    lanes = [
        LaneProfile(LEVELS, tuple(statistics.fmean(map(statistics.fmean, of[n])) for n in LEVELS))
        for of in (a, b)
    ]
    assert found.level is not None
    assert lanes[0].at(found.level) == pytest.approx(lanes[1].at(found.level))


def test_the_same_samples_have_the_same_interval() -> None:
    a, b = measured(queue), measured(batch, seed=2)

    assert find_crossover(a, b) == find_crossover(a, b)


def test_a_target_that_is_always_faster_never_crosses() -> None:
    found = find_crossover(measured(lambda n: 2.0 * n + 4), measured(batch, seed=2))

    assert (found.verdict, found.faster) == ("never", "b")
    assert found.sentence("a", "b") == "no crossover: b is faster at every level measured"


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"repetitions": 2}, "at concurrency 4 there are 2 repetitions, 3 are needed"),
        (
            {"per_user": 1, "noise": 0.01},
            "at concurrency 4 there are 12 requests of each, 20 are needed",
        ),
    ],
)
def test_with_too_few_samples_the_crossover_is_unknown(how: dict[str, Any], why: str) -> None:
    found = find_crossover(measured(queue, **how), measured(batch, seed=2, **how))

    assert (found.verdict, found.level, found.why) == ("unknown", None, why)
    assert found.sentence("a", "b") == f"not enough data: {why}"


def test_levels_far_from_the_crossover_need_no_repetitions() -> None:
    a, b = (dict(measured(mean, seed=5)) for mean in (queue, batch))
    for one in (a, b):
        one[32] = one[32][:1]

    assert find_crossover(a, b).verdict == "crosses"


def test_two_equal_targets_have_no_known_crossover() -> None:
    found = find_crossover(measured(batch), measured(batch, seed=2))

    assert found.verdict == "unknown"


def test_one_level_in_common_is_not_enough_data() -> None:
    a, b = measured(queue), measured(batch)

    assert find_crossover({1: a[1], 4: a[4]}, {4: b[4], 8: b[8]}).verdict == "unknown"


def test_seconds_are_those_of_complete_cells() -> None:
    cells = [
        (cell(), [request(e2e_s=2.0), request(e2e_s=3.0, error="x"), request(phase="warm-up")]),
        (cell(repetition=2, outcome="interrupted"), [request(e2e_s=4.0)]),
        (cell(target="b"), [request(e2e_s=5.0)]),
    ]

    assert seconds_by_level(cells, "a") == {1: [[2.0]]}
