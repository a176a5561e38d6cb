"""What is measured next: visits in order, the search for the SLO's level, and the time left."""

from __future__ import annotations

from collections.abc import (
    Iterable,
    Mapping,
    Sequence,
)
from dataclasses import dataclass

import msgspec

from loadtests.analysis import rows, slo
from loadtests.measure import samples
from loadtests.measure.experiment import (
    Limits,
    Plan,
)


@dataclass(frozen=True)
class Visit:
    """One target, once, at some levels."""

    label: str
    repetition: int
    levels: tuple[int, ...]


def itinerary(plan: Plan, labels: Sequence[str], done: Iterable[samples.Cell]) -> list[Visit]:
    """What is still to be measured, in order: forth in odd repetitions, back in even ones."""
    complete = {
        (cell.target, cell.repetition, cell.level) for cell in done if cell.outcome == "complete"
    }
    visits = []
    for repetition in range(1, plan.repetitions + 1):
        for label in labels if repetition % 2 else reversed(labels):
            levels = tuple(n for n in plan.levels if (label, repetition, n) not in complete)
            if levels:
                visits.append(Visit(label, repetition, levels))
    return visits


def search(plan: Plan, limits: Limits, label: str, lines: Sequence[samples.Line]) -> list[Visit]:
    """What to measure next to learn how many at once this target answers within the limits.

    Halves what lies between the highest level that keeps them and the lowest that does not.
    Nothing where that is known, or where no limit is stated.
    """
    cells = [(cell, of) for cell, of in rows.closed_cells(lines) if cell.target == label]
    added = {int(cell.level) for cell, _ in cells} - {*plan.levels}  # perhaps interrupted
    if limits != Limits():
        table = rows.make_rows(cells, tokens_out=plan.tokens_out, limits=limits)
        added |= {one.next_level for one in slo.slo_brackets(table) if one.next_level}
    wanted = msgspec.structs.replace(plan, levels=tuple(sorted(added)))
    return itinerary(wanted, [label], [cell for cell, _ in cells])


def seconds_left(
    todo: Mapping[tuple[str, int], int], took: Mapping[tuple[str, int], float]
) -> float | None:
    """How long the cells that are left will take, by those that are done; None: no idea yet.

    A cell that was never done takes as long as the nearest level of its target, in
    proportion to the level, or else as the nearest of any target.

    Args:
        todo: How many cells, by target and level.
        took: Seconds of a cell, by target and level.
    """
    if not took:
        return None
    total = 0.0
    for (label, level), cells in todo.items():
        known = {n: s for (of, n), s in took.items() if of == label}
        known = known or {n: s for (_, n), s in took.items()}
        nearest = min(known, key=lambda n: abs(n - level))
        total += cells * known[nearest] * max(1.0, level / nearest)
    return total
