"""How targets, rows, spreads and days are written in a report."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Iterator

from loadtests.analysis.rows import Row
from loadtests.analysis.spread import Spread
from loadtests.measure.experiment import (
    Subject,
)
from loadtests.report.page import number


def names(subjects: Iterable[Subject]) -> dict[str, str]:
    """What a target is called in a sentence, by label."""
    found: dict[str, str] = {}
    for one in subjects:
        name = one.label
        if one.engine == "ollama":
            name = "Ollama"
            if one.slots:
                name += " as installed" if one.slots == 1 else f" with {one.slots} slots"
        elif one.engine == "vllm":
            name = "vLLM"
        elif one.before:
            name = "the gateway"
        found[one.label] = name if name not in found.values() else f"{name} ({one.label})"
    return found


def spread(seen: Spread | None, unit: str = "") -> str:
    """A value, and what its repetitions were, where they can be told apart."""
    if seen is None:
        return "-"
    low, value, high = number(seen.low), number(seen.value), number(seen.high)
    return f"{value}{unit}" if low == high else f"{value}{unit} ({low} to {high})"


def _name(row: Row) -> str:
    return f"{row.target} at {row.level}"


def _each(table: Iterable[Row], cells: Callable[[Row], Iterable[str]]) -> Iterator[tuple[str, ...]]:
    """A row of a table for each row, named; an empty one where another target begins."""
    before = None
    for row in table:
        if before not in (None, row.target):
            yield ()
        before = row.target
        yield (_name(row), *cells(row))


def _counts(row: Row) -> tuple[str, str, str]:
    return str(row.answered), str(row.failed), str(row.cut)


def _day(at: float) -> str:
    return dt.datetime.fromtimestamp(at, dt.UTC).strftime("%Y-%m-%d")
