"""Up to how many concurrent requests a target meets the SLO."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import msgspec

from loadtests.analysis.rows import Row


class SloBracket(msgspec.Struct, frozen=True):
    """The measured levels between which a target stops meeting the SLO.

    Attributes:
        level: The highest level up to which every level meets it; None: not even the lowest.
        fails: The lowest level that misses it; None: every measured level meets it.
    """

    target: str
    level: int | None
    fails: int | None

    @property
    def next_level(self) -> int | None:
        """The level to measure next; None if the bracket is narrow enough."""
        low = self.level or 0
        if self.fails is None or self.fails - low <= max(1, low // 8):
            return None
        return (low + self.fails) // 2


def slo_brackets(table: Iterable[Row]) -> list[SloBracket]:
    """One bracket a target; `table` has the rows of a target together, levels ascending."""
    brackets = []
    for target, rows_of_target in itertools.groupby(table, key=lambda row: row.target):
        levels = list(rows_of_target)
        passing = list(itertools.takewhile(lambda row: row.meets_slo, levels))
        others = levels[len(passing) :]
        level = passing[-1].level if passing else None
        brackets.append(SloBracket(target, level, others[0].level if others else None))
    return brackets
