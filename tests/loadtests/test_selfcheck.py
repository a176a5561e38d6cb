"""A stopwatch that deviates does not pass its check; the reason says by how much, and why."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtests.measure import samples
from loadtests.measure.experiment import ExperimentError
from loadtests.proof import known, selfcheck
from loadtests.proof.known import Lateness, Times
from loadtests.proof.selfcheck import SelfCheck, SelfCheckError

TIMES = Times(ttft_s=0.3, gap_s=0.02, tokens=11)
BEGAN = 1_800_000_000.0


def request(slower: float = 1.0, late_s: float = 0.0, error: str | None = None) -> samples.Request:
    """A request measured as `slower` times as slow, its first token another `late_s` late."""
    ttft_s = TIMES.ttft_s * slower + late_s
    gaps_s = [TIMES.gap_s * slower] * (TIMES.tokens - 1)
    return samples.Request(
        "known", "closed", 2, 1, 0, 0, "measured", BEGAN, ttft_s + sum(gaps_s), ttft_s, gaps_s,
        tpot_s=TIMES.gap_s * slower, tokens_out=TIMES.tokens, error=error,
    )  # fmt: skip


def judged(
    requests: list[samples.Request],
    *,
    cpu: float = 0.2,
    lag_p99_s: float = 0.001,
    asked: int | None = None,
    engine: Lateness = Lateness(),  # noqa: B008 - frozen
) -> SelfCheck:
    ended = BEGAN + max(one.e2e_s for one in requests) + 0.00001
    cell = samples.Cell("known", "closed", 2, 1, BEGAN, ended, "complete", cpu, 0.0, lag_p99_s)
    wanted = SelfCheck(selfcheck.SELFCHECK_VERSION, BEGAN, 2, TIMES, 1, asked or len(requests))
    return selfcheck.with_verdict(wanted, cell, requests, engine)


def test_a_stopwatch_that_measures_the_truth_passes() -> None:
    seen = judged([request(), request()])

    assert seen.passed
    assert [one.ratio for one in seen.quantities] == pytest.approx([1, 1, 1, 1], rel=1e-3)


def test_a_stopwatch_that_measures_everything_slower_is_off_in_every_quantity() -> None:
    seen = judged([request(slower=1.05), request(slower=1.05)])

    assert not seen.passed
    assert [one.name for one in seen.quantities if one.is_off] == list(known.QUANTITIES)


def test_the_reason_says_what_deviates_and_by_how_much() -> None:
    why = judged([request(late_s=0.012), request(late_s=0.012)]).why

    assert "TTFT was measured as 312.00 ms and is 300.00 ms in truth: the ratio is 1.040" in why


def test_up_to_two_percent_is_allowed() -> None:
    assert judged([request(slower=1.019), request(slower=1.019)]).passed
    assert not judged([request(slower=1.021), request(slower=1.021)]).passed


def test_a_few_slow_requests_do_not_move_a_median() -> None:
    seen = judged([request(), request(), request(late_s=0.002)])

    assert seen.quantities[0].ratio == pytest.approx(1)


def test_a_saturated_generator_fails_even_with_correct_figures() -> None:
    seen = judged([request(), request()], cpu=0.95)

    assert "saturated: its busiest process used 0.95 of a core" in seen.why
    assert "--processes 2" in seen.why


def test_a_lagging_generator_is_saturated() -> None:
    assert "saturated" in judged([request(), request()], lag_p99_s=0.05).why


def test_if_the_server_lagged_the_generator_is_not_blamed() -> None:
    late = Lateness(p50=0.02, p99=0.03, tokens=22)

    why = judged([request(late_s=0.02), request(late_s=0.02)], engine=late).why

    assert "the server of known times lagged itself, by 20.0 ms (p50)" in why
    assert "saturated" not in why


def test_a_failed_request_fails_the_check() -> None:
    assert "1 of 3 requests failed, the first with: reset" in (
        judged([request(), request(), request(error="reset")]).why
    )


def test_a_generator_with_too_few_requests_fails() -> None:
    assert "only 2 of 20 requests were measured" in judged([request(), request()], asked=20).why


def test_without_any_measurement_it_does_not_pass() -> None:
    assert not judged([request(error="refused")]).passed


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    seen = judged([request(late_s=0.012)])

    seen.save(tmp_path)

    assert selfcheck.load(tmp_path) == seen


def test_a_check_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "selfcheck.json").write_text('{"version": 0}')

    with pytest.raises(ExperimentError, match="has version 0, this program reads 1: check again"):
        selfcheck.load(tmp_path)


def test_without_a_check_the_error_asks_about_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"cannot be read .*: is .* the folder"):
        selfcheck.load(tmp_path)


@pytest.mark.alone
@pytest.mark.integration
def test_a_server_with_other_times_than_it_claims_does_not_pass() -> None:
    claimed = Times(ttft_s=0.1, gap_s=0.02, tokens=16)

    with known.known_server(Times(claimed.ttft_s, claimed.gap_s * 1.05, claimed.tokens)) as server:
        seen = selfcheck.check_against(server, claimed, level=2, rounds=2)

    assert "TPOT was measured as" in seen.why
    assert seen.requests >= seen.asked == 4
    assert seen.errors == 0


@pytest.mark.integration
def test_a_generator_that_fails_is_reported_with_its_output() -> None:
    gone = known.KnownServer("http://127.0.0.1:9")  # port 9, discard: nothing listens

    with pytest.raises(SelfCheckError, match="the load generator failed:\\ntwolane: known at"):
        selfcheck.check_against(gone, TIMES, level=1, rounds=1)
