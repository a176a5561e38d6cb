"""Up to which level a target meets the SLO."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import msgspec

from loadtests.analysis.rows import Row


class Kept(msgspec.Struct, frozen=True):
    """How far a target keeps the limits, by levels that were measured and nothing between them.

    Attributes:
        level: The highest up to which every level keeps them; None: not even the lowest.
        fails: The lowest that does not; None: all measured keep them.
    """

    target: str
    level: int | None
    fails: int | None

    @property
    def between(self) -> int | None:
        """The level to measure next to know it closer; None: it is known closely enough."""
        low = self.level or 0
        if self.fails is None or self.fails - low <= max(1, low // 8):
            return None
        return (low + self.fails) // 2


def kept(table: Iterable[Row]) -> list[Kept]:
    """Of every target; its levels in order."""
    found = []
    for target, its in itertools.groupby(table, key=lambda row: row.target):
        levels = list(its)
        keeping = list(itertools.takewhile(lambda row: row.keeps, levels))
        others = levels[len(keeping) :]
        level = keeping[-1].level if keeping else None
        found.append(Kept(target, level, others[0].level if others else None))
    return found
