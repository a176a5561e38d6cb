"""What is measured in which order, what is left, and that a run goes on where it ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtests import samples
from loadtests.compare import Visit, itinerary, locust_command, seconds_left
from loadtests.experiment import Plan
from loadtests.stopwatch import Target

PLAN = Plan(levels=(1, 4), repetitions=3)


def cell(target: str, level: int, repetition: int, outcome: str = "complete") -> samples.Cell:
    return samples.Cell(target, "closed", level, repetition, 0.0, 1.0, outcome)


def test_the_order_turns_round_with_every_repetition() -> None:
    order = [(visit.repetition, visit.label) for visit in itinerary(PLAN, ["a", "b", "c"], [])]

    assert order == [
        (1, "a"), (1, "b"), (1, "c"), (2, "c"), (2, "b"), (2, "a"), (3, "a"), (3, "b"), (3, "c"),
    ]  # fmt: skip


def test_what_is_complete_is_not_measured_again() -> None:
    done = [cell("a", 1, 1), cell("a", 4, 1), cell("b", 1, 1), cell("b", 4, 1, "interrupted")]

    visits = itinerary(PLAN, ["a", "b"], done)

    assert visits[0] == Visit("b", 1, (4,))
    assert visits[1:3] == [Visit("b", 2, (1, 4)), Visit("a", 2, (1, 4))]


def test_with_everything_done_nothing_is_left() -> None:
    done = [cell(t, n, r) for t in "ab" for n in (1, 4) for r in (1, 2, 3)]

    assert itinerary(PLAN, ["a", "b"], done) == []


def test_what_is_left_takes_as_long_as_what_was_done() -> None:
    took = {("a", 1): 10.0, ("a", 4): 30.0}

    assert seconds_left({("a", 1): 2, ("a", 4): 1}, took) == pytest.approx(50)


def test_what_was_never_done_takes_as_long_as_the_nearest_level_in_proportion() -> None:
    assert seconds_left({("a", 8): 1}, {("a", 4): 30.0, ("b", 8): 1.0}) == pytest.approx(60)
    assert seconds_left({("b", 4): 1}, {("a", 4): 30.0}) == pytest.approx(30)


def test_before_anything_is_done_nobody_knows_how_long_it_takes() -> None:
    assert seconds_left({("a", 1): 3}, {}) is None


def test_a_key_is_in_no_command_line() -> None:
    target = Target("a", "http://127.0.0.1:1", "m", key="sk-secret")

    command = locust_command(target, PLAN, Visit("a", 2, (4,)), Path("raw.jsonl"))

    assert "sk-secret" not in " ".join(command)
    assert "a=http://127.0.0.1:1=m" in command
