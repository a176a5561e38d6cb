"""Three tools agree, or it is told which one is off, where, and by how much."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtests.measure.experiment import ExperimentError, Machine
from loadtests.proof import agreement
from loadtests.proof.agreement import KNOWN, OURS, VERSION, Agreement, Reading
from loadtests.proof.known import Times

GUIDELLM = "guidellm"
BENCH = "vllm bench serve"
VLLM = "vLLM"
TIMES = Times(ttft_s=0.3, gap_s=0.02, tokens=64)


def reading(tool: str, ratio: float = 1.0, *, server: str = KNOWN, repetition: int = 1) -> Reading:
    """The truth at 8 at once, so many times slower in TTFT."""
    medians = TIMES.truth(8)
    return Reading(
        tool, server, 8, repetition, medians | {"TTFT": medians["TTFT"] * ratio}, requests=80
    )


def found(*readings: Reading) -> Agreement:
    tools = {OURS: "", GUIDELLM: "0.8.1", BENCH: "0.32.0"}
    machine = Machine("a CPU", 2, 24.0, "Linux", "3.11")
    return Agreement(VERSION, 0.0, machine, TIMES, 10, 80, 64, tools, readings)


def test_tools_that_saw_the_truth_agree() -> None:
    assert found(reading(OURS), reading(GUIDELLM), reading(BENCH)).disagreements() == []


def test_ours_must_be_near_the_truth_whatever_the_others_saw() -> None:
    said = found(reading(OURS, 1.025), reading(GUIDELLM, 1.025)).disagreements()

    assert said == ["TTFT at 8 on known: twolane saw 1.025 of the truth"]


def test_ours_must_be_near_the_others_where_those_are_near_the_truth() -> None:
    said = found(reading(OURS, 1.019), reading(GUIDELLM, 0.985)).disagreements()

    assert said == ["TTFT at 8 on known: 1.035 of what guidellm saw"]


def test_one_that_is_far_from_the_truth_itself_is_told_and_not_held_against_ours() -> None:
    seen = found(reading(OURS), reading(GUIDELLM), reading(BENCH, 1.05))

    assert seen.disagreements() == []
    assert seen.strays() == [f"TTFT at 8 on known: {BENCH} saw 1.050 of the truth"]


def test_on_a_real_server_they_agree_where_now_one_and_now_the_other_saw_more() -> None:
    ours = [reading(OURS, ratio, server=VLLM, repetition=n) for n, ratio in ((1, 1.0), (2, 1.3))]
    theirs = [reading(BENCH, ratio, server=VLLM, repetition=n) for n, ratio in ((1, 1.1), (2, 1.2))]

    assert found(*ours, *theirs).disagreements() == []


def test_on_a_real_server_that_changes_meanwhile_each_is_held_to_who_asked_beside_it() -> None:
    ours = [reading(OURS, ratio, server=VLLM, repetition=n) for n, ratio in ((1, 1.0), (2, 1.5))]
    theirs = [reading(BENCH, ratio, server=VLLM, repetition=n) for n, ratio in ((1, 1.1), (2, 1.7))]

    said = found(*ours, *theirs).disagreements()

    assert said == [f"TTFT at 8 on vLLM: 0.896 of what {BENCH} saw"]


def test_on_a_real_server_a_difference_that_is_small_is_none() -> None:
    ours = [reading(OURS, 1.02, server=VLLM, repetition=n) for n in (1, 2)]
    theirs = [reading(BENCH, 1.0, server=VLLM, repetition=n) for n in (1, 2)]

    assert found(*ours, *theirs).disagreements() == []


def test_what_a_tool_saw_of_several_runs_is_their_median_with_lowest_and_highest() -> None:
    runs = [reading(OURS, ratio, server=VLLM, repetition=n) for n, ratio in enumerate((3, 1, 2))]

    seen = found(*runs).rows()[0].by_tool[OURS]

    assert (seen.low, seen.value, seen.high) == pytest.approx((0.3, 0.6, 0.9))


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = found(reading(OURS), reading(BENCH))

    written.save(tmp_path)

    assert agreement.load(tmp_path) == written


def test_of_another_version_it_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / agreement.AGREEMENT).write_text('{"version": 0}')

    with pytest.raises(
        ExperimentError, match="has version 0, this program reads 1: run `make agreement` again"
    ):
        agreement.load(tmp_path)
