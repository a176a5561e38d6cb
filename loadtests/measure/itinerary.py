"""What is measured next: the order of visits, the search for the SLO's level, the time left."""

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
    """One target at some levels, in one repetition."""

    label: str
    repetition: int
    levels: tuple[int, ...]


def itinerary(plan: Plan, labels: Sequence[str], done: Iterable[samples.Cell]) -> list[Visit]:
    """The visits that are left, in order; even repetitions go through the targets in reverse."""
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
    """The next visits to find the highest concurrency at which a target meets the SLO.

    Bisects between the highest level that meets it and the lowest that misses it. Empty if
    the bracket is narrow enough, or no limit is stated.
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
    """Estimated seconds of the cells that are left; None if no cell is done yet.

    A cell is estimated by the nearest level of its target that is done, in proportion to
    the level, or else by the nearest level of any target.

    Args:
        todo: Number of cells left, by target and level.
        took: Seconds of a finished cell, by target and level.
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
