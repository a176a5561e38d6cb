"""What tokens cost, with figures that can be checked by hand."""

from __future__ import annotations

import pytest

from gateway.observe.cost import LONGEST_GAP_S, Meter, Use, bill, statement
from gateway.settings import Prices

HOUR = 3600.0


def run(seconds: float, watts: float | None, running: dict[str, int], meter: Meter) -> None:
    """Let this state last for so many seconds, sampled once a second."""
    start = meter._at or 0.0
    for second in range(int(seconds) + 1):
        meter.sample(start + second, watts, running)


# One machine, one lane


def test_electricity_cost_of_a_million_tokens() -> None:
    # 700 W for an hour are 0.7 kWh and at 0.30 EUR 0.21 EUR; 1,000 tokens/s are 3.6 million.
    hour = Use(HOUR, 700 * HOUR, 3_600_000, 3_600_000)

    assert hour.tokens_per_joule == pytest.approx(1000 / 700)
    assert bill(hour, Prices(per_kwh=0.30)).electricity == pytest.approx(0.21 / 3.6)


def test_rent_cost_of_a_million_tokens() -> None:
    # Two euros for an hour in which 500,000 tokens came are four a million.
    assert bill(Use(HOUR, tokens=500_000), Prices(rent_per_hour=2)).rent == pytest.approx(4)


def test_price_of_an_api_is_as_configured() -> None:
    assert bill(Use(), Prices(api_per_million=0.88)).api == 0.88


def test_a_cost_without_its_price_is_unknown() -> None:
    costs = bill(Use(HOUR, 700 * HOUR, 100, 100), Prices())

    assert (costs.electricity, costs.rent, costs.api) == (None, None, None)


def test_without_tokens_the_cost_of_a_token_is_unknown() -> None:
    costs = bill(Use(HOUR, 700 * HOUR), Prices(per_kwh=0.3, rent_per_hour=2))

    assert (costs.electricity, costs.rent) == (None, None)


def test_electricity_that_costs_nothing_costs_nothing() -> None:
    assert bill(Use(HOUR, HOUR, 1, 1), Prices(per_kwh=0)).electricity == 0


# What the machine uses, looked at


def test_energy_is_watts_over_time() -> None:
    meter = Meter()
    run(100, 700, {"vllm": 4}, meter)
    meter.add_tokens("vllm", 14_000)

    assert meter.total() == Use(100, 70_000, 14_000, 14_000)
    assert meter.total().tokens_per_joule == pytest.approx(0.2)


def test_energy_between_two_samples_is_their_mean_power_times_the_time() -> None:
    meter = Meter()
    meter.sample(0, 100, {"vllm": 1})
    meter.sample(2, 300, {"vllm": 1})

    assert meter.total().joules == 400


def test_concurrent_lanes_share_by_their_running_requests() -> None:
    meter = Meter()
    run(100, 400, {"ollama": 1, "vllm": 3}, meter)

    assert meter.busy["ollama"] == Use(25, 10_000)
    assert meter.busy["vllm"] == Use(75, 30_000)


def test_idle_time_is_shared_by_busy_time_and_nothing_is_lost() -> None:
    meter = Meter()
    run(30, 500, {"vllm": 2}, meter)
    run(10, 500, {"ollama": 1}, meter)
    run(60, 100, {"ollama": 0, "vllm": 0}, meter)
    shares = meter.shares()

    assert meter.idle.seconds == 60
    assert shares["vllm"].seconds == pytest.approx(30 + 45)
    assert shares["ollama"].seconds == pytest.approx(10 + 15)
    assert sum(use.joules for use in shares.values()) == pytest.approx(meter.total().joules)
    assert sum(use.seconds for use in shares.values()) == pytest.approx(meter.total().seconds)


def test_a_lane_without_running_requests_in_any_sample_uses_nothing() -> None:
    meter = Meter()
    run(10, 100, {}, meter)
    meter.add_tokens("ollama", 5)

    assert meter.shares() == {"ollama": Use(tokens=5, metered=5)}
    assert meter.total().joules == 1_000


# Gaps in the watts


def test_without_watts_neither_energy_nor_tokens_enter_the_ratio() -> None:
    meter = Meter()
    run(10, 100, {"vllm": 1}, meter)
    meter.add_tokens("vllm", 50)
    run(10, None, {"vllm": 1}, meter)
    meter.add_tokens("vllm", 50)
    whole = meter.total()

    assert (whole.seconds, whole.joules, whole.tokens, whole.metered) == (20, 1_000, 100, 50)
    assert whole.tokens_per_joule == pytest.approx(0.05)


def test_energy_over_a_long_gap_is_unknown() -> None:
    meter = Meter()
    meter.sample(0, 100, {"vllm": 1})
    meter.sample(LONGEST_GAP_S + 1, 100, {"vllm": 1})

    assert meter.total() == Use(LONGEST_GAP_S + 1, 0)


def test_the_first_sample_adds_nothing() -> None:
    meter = Meter()
    meter.sample(1e6, 700, {"vllm": 1})

    assert meter.total() == Use()


# What is told


def test_there_is_no_statement_without_watts_and_prices() -> None:
    meter = Meter()
    run(10, None, {"vllm": 1}, meter)

    assert statement(meter, Prices()) is None


@pytest.mark.parametrize("price", ["per_kwh", "rent_per_hour", "api_per_million"])
def test_one_price_is_enough_for_a_statement(price: str) -> None:
    assert statement(Meter(), Prices.model_validate({price: 1})) is not None


def test_the_statement_says_whether_watts_are_given_or_measured() -> None:
    meter = Meter()
    run(1, 350, {"vllm": 1}, meter)
    given = statement(meter, Prices(watts=350, currency="USD"))
    measured = statement(meter, Prices())

    assert given is not None
    assert measured is not None
    assert (given.watts, given.watts_are) == (350, "given")
    assert (given.currency, measured.currency) == ("USD", "EUR")
    assert measured.watts_are == "measured"
