"""Three tools agree, or the disagreement says which one deviates, where, and by how much."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtests.measure.experiment import ExperimentError, Machine
from loadtests.proof import agreement
from loadtests.proof.agreement import AGREEMENT_VERSION, KNOWN, OURS, Agreement, Reading
from loadtests.proof.known import Times

GUIDELLM = "guidellm"
BENCH = "vllm bench serve"
VLLM = "vLLM"
TIMES = Times(ttft_s=0.3, gap_s=0.02, tokens=64)


def reading(tool: str, ratio: float = 1.0, *, server: str = KNOWN, repetition: int = 1) -> Reading:
    """A reading of the truth with 8 concurrent requests, its TTFT off by this ratio."""
    medians = TIMES.truth(8)
    return Reading(
        tool, server, 8, repetition, medians | {"TTFT": medians["TTFT"] * ratio}, requests=80
    )


def found(*readings: Reading) -> Agreement:
    tools = {OURS: "", GUIDELLM: "0.8.1", BENCH: "0.32.0"}
    machine = Machine("a CPU", 2, 24.0, "Linux", "3.11")
    return Agreement(AGREEMENT_VERSION, 0.0, machine, TIMES, 10, 80, 64, tools, readings)


def test_tools_that_measured_the_truth_agree() -> None:
    assert found(reading(OURS), reading(GUIDELLM), reading(BENCH)).disagreements() == []


def test_our_figure_must_be_near_the_truth_whatever_the_others_are() -> None:
    texts = found(reading(OURS, 1.025), reading(GUIDELLM, 1.025)).disagreements()

    assert texts == ["TTFT at concurrency 8 on known: twolane measured 1.025 of the truth"]


def test_our_figure_must_be_near_the_others_that_are_near_the_truth() -> None:
    texts = found(reading(OURS, 1.019), reading(GUIDELLM, 0.985)).disagreements()

    assert texts == ["TTFT at concurrency 8 on known: 1.035 of guidellm's figure"]


def test_a_tool_that_deviates_from_the_truth_itself_is_an_outlier_and_no_reference() -> None:
    seen = found(reading(OURS), reading(GUIDELLM), reading(BENCH, 1.05))

    assert seen.disagreements() == []
    assert seen.outliers() == [
        f"TTFT at concurrency 8 on known: {BENCH} measured 1.050 of the truth"
    ]


def test_on_a_real_server_they_agree_if_the_sign_of_the_difference_varies() -> None:
    ours = [reading(OURS, ratio, server=VLLM, repetition=n) for n, ratio in ((1, 1.0), (2, 1.3))]
    theirs = [reading(BENCH, ratio, server=VLLM, repetition=n) for n, ratio in ((1, 1.1), (2, 1.2))]

    assert found(*ours, *theirs).disagreements() == []


def test_on_a_real_server_that_changes_tools_are_compared_within_a_repetition() -> None:
    ours = [reading(OURS, ratio, server=VLLM, repetition=n) for n, ratio in ((1, 1.0), (2, 1.5))]
    theirs = [reading(BENCH, ratio, server=VLLM, repetition=n) for n, ratio in ((1, 1.1), (2, 1.7))]

    texts = found(*ours, *theirs).disagreements()

    assert texts == [f"TTFT at concurrency 8 on vLLM: 0.896 of {BENCH}'s figure"]


def test_on_a_real_server_a_small_difference_is_no_disagreement() -> None:
    ours = [reading(OURS, 1.02, server=VLLM, repetition=n) for n in (1, 2)]
    theirs = [reading(BENCH, 1.0, server=VLLM, repetition=n) for n in (1, 2)]

    assert found(*ours, *theirs).disagreements() == []


def test_several_runs_of_a_tool_are_their_median_with_lowest_and_highest() -> None:
    runs = [reading(OURS, ratio, server=VLLM, repetition=n) for n, ratio in enumerate((3, 1, 2))]

    seen = found(*runs).rows()[0].by_tool[OURS]

    assert (seen.low, seen.value, seen.high) == pytest.approx((0.3, 0.6, 0.9))


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = found(reading(OURS), reading(BENCH))

    written.save(tmp_path)

    assert agreement.load(tmp_path) == written


def test_an_agreement_of_another_version_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / agreement.AGREEMENT).write_text('{"version": 0}')

    with pytest.raises(
        ExperimentError, match="has version 0, this program reads 1: run `make agreement` again"
    ):
        agreement.load(tmp_path)
