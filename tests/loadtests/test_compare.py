"""The order of the measurements, what is left of them, and resuming an experiment."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest

from loadtests.measure import samples
from loadtests.measure.experiment import Limits, Plan, Subject
from loadtests.measure.generator import locust_command
from loadtests.measure.itinerary import Visit, itinerary, search, seconds_left
from loadtests.measure.matrix import Entrant, Session, already_running
from loadtests.measure.stopwatch import Target

PLAN = Plan(levels=(1, 4), repetitions=3)


def cell(target: str, level: int, repetition: int, outcome: str = "complete") -> samples.Cell:
    return samples.Cell(target, "closed", level, repetition, 0.0, 1.0, outcome)


def test_even_repetitions_reverse_the_order() -> None:
    order = [(visit.repetition, visit.label) for visit in itinerary(PLAN, ["a", "b", "c"], [])]

    assert order == [
        (1, "a"), (1, "b"), (1, "c"), (2, "c"), (2, "b"), (2, "a"), (3, "a"), (3, "b"), (3, "c"),
    ]  # fmt: skip


def test_complete_cells_are_not_measured_again() -> None:
    done = [cell("a", 1, 1), cell("a", 4, 1), cell("b", 1, 1), cell("b", 4, 1, "interrupted")]

    visits = itinerary(PLAN, ["a", "b"], done)

    assert visits[0] == Visit("b", 1, (4,))
    assert visits[1:3] == [Visit("b", 2, (1, 4)), Visit("a", 2, (1, 4))]


def test_with_all_cells_complete_nothing_is_left() -> None:
    done = [cell(t, n, r) for t in "ab" for n in (1, 4) for r in (1, 2, 3)]

    assert itinerary(PLAN, ["a", "b"], done) == []


def answers(took: Mapping[int, float], repetitions: int = 3) -> list[samples.Line]:
    """Lines of a target that takes these seconds at each level, in every repetition."""
    return [
        line
        for level, seconds in took.items()
        for n in range(1, repetitions + 1)
        for line in (
            samples.Request("a", "closed", level, n, 0, 0, "measured", 0.1, seconds, seconds / 2),
            cell("a", level, n),
        )
    ]


def test_the_search_bisects_between_the_last_level_that_meets_the_slo_and_the_next() -> None:
    limits = Limits(e2e_s=5)

    first = search(PLAN, limits, "a", answers({1: 1.0, 4: 4.0, 16: 16.0}))
    second = search(PLAN, limits, "a", answers({1: 1.0, 4: 4.0, 10: 10.0, 16: 16.0}))
    last = search(PLAN, limits, "a", answers({4: 4.0, 5: 5.0, 6: 6.0}))

    assert first == [Visit("a", n, (10,)) for n in (1, 2, 3)]
    assert second == [Visit("a", n, (7,)) for n in (1, 2, 3)]
    assert last == []


def test_the_search_goes_below_the_lowest_level() -> None:
    visits = search(PLAN, Limits(e2e_s=0.5), "a", answers({4: 4.0}))

    assert visits[0] == Visit("a", 1, (2,))


def test_an_interrupted_level_of_the_search_is_resumed() -> None:
    lines = [*answers({1: 1.0, 4: 9.0}), *answers({2: 2.0}, repetitions=1)]

    assert search(PLAN, Limits(e2e_s=2.5), "a", lines)[0] == Visit("a", 1, (3,))
    assert search(PLAN, Limits(e2e_s=1.5), "a", lines) == [Visit("a", n, (2,)) for n in (2, 3)]


def test_without_an_slo_nothing_is_searched() -> None:
    assert search(PLAN, Limits(), "a", answers({1: 1.0, 4: 4.0})) == []


def test_cells_left_are_estimated_by_those_that_are_done() -> None:
    took = {("a", 1): 10.0, ("a", 4): 30.0}

    assert seconds_left({("a", 1): 2, ("a", 4): 1}, took) == pytest.approx(50)


def test_a_new_level_is_estimated_by_the_nearest_in_proportion() -> None:
    assert seconds_left({("a", 8): 1}, {("a", 4): 30.0, ("b", 8): 1.0}) == pytest.approx(60)
    assert seconds_left({("b", 4): 1}, {("a", 4): 30.0}) == pytest.approx(30)


def test_before_the_first_cell_there_is_no_estimate() -> None:
    assert seconds_left({("a", 1): 3}, {}) is None


def test_the_key_is_in_no_command_line() -> None:
    target = Target("a", "http://127.0.0.1:1", "m", key="sk-secret")

    command = locust_command(target, PLAN, Visit("a", 2, (4,)), Path("raw.jsonl"))

    assert "sk-secret" not in " ".join(command)
    assert "a=http://127.0.0.1:1=m" in command


# watts


def entrant(label: str, url: str, *before: str) -> Entrant:
    subject = Subject(label, url, "m", before=before)
    return Entrant(subject, Target(label, url, "m"), partial(already_running, subject))


class Quiet(Session):
    """A session that sends no request: a visit ends after some power samples."""

    looks = 0

    async def drawn(self) -> float | None:
        self.looks += 1
        return 350.0 if self.looks != 2 else None

    async def _generate(self, target: Target, visit: Visit) -> None:
        for _ in range(20):
            await asyncio.sleep(0.005)


class SilentView:
    """A view that ignores the progress."""

    def visit_started(self, visit: Visit) -> None: ...

    def line_written(self, line: samples.Line) -> None: ...


@pytest.mark.parametrize(("label", "is_local"), [
    ("near", True), ("far", False), ("before_near", True), ("before_far", False),
])  # fmt: skip
async def test_power_is_sampled_while_a_target_on_this_machine_is_measured(
    tmp_path: Path, label: str, *, is_local: bool
) -> None:
    entrants = [
        entrant("near", "http://127.0.0.1:1"),
        entrant("far", "http://gpu-2:1"),
        entrant("before_near", "http://localhost:2", "near"),
        entrant("before_far", "http://localhost:2", "near", "far"),
    ]
    session = Quiet(tmp_path, PLAN, {one.label: one for one in entrants}, SilentView())
    session.watts, session.watts_interval_s = session.drawn, 0.001
    async with session:
        await session.visit(Visit(label, 1, (1,)))
    raw = tmp_path / "raw.jsonl"
    powers = samples.powers(samples.read(raw)) if raw.exists() else []

    assert {power.watts for power in powers} == ({350.0} if is_local else set())
    assert len(powers) in ((session.looks - 1, session.looks) if is_local else (0,))
