"""How targets, rows, spreads and days are written in a report."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Iterator

from loadtests.analysis.rows import Row
from loadtests.analysis.spread import Spread
from loadtests.measure.experiment import Subject
from loadtests.report.page import format_number


def display_names(subjects: Iterable[Subject]) -> dict[str, str]:
    """The name of each target in a sentence, by label."""
    names: dict[str, str] = {}
    for subject in subjects:
        name = subject.label
        if subject.engine == "ollama":
            name = "Ollama"
            if subject.slots:
                slots = subject.slots
                name += " as installed (1 slot)" if slots == 1 else f" with {slots} slots"
        elif subject.engine == "vllm":
            name = "vLLM"
        elif subject.before:
            name = "the gateway"
        taken = name in names.values()
        names[subject.label] = f"{name} ({subject.label})" if taken else name
    return names


def as_sentence(text: str) -> str:
    """Text with a capital first letter and a full stop; the name vLLM stays as it is."""
    return f"{text if text.startswith('vLLM') else text[0].upper() + text[1:]}."


def format_spread(spread: Spread | None, unit: str = "") -> str:
    """A value, with the range of its repetitions in brackets if they differ in print."""
    if spread is None:
        return "-"
    low, value, high = map(format_number, (spread.low, spread.value, spread.high))
    return f"{value}{unit}" if low == high else f"{value}{unit} ({low} to {high})"


def row_name(row: Row) -> str:
    """A row's target and level, for the first column of a table."""
    return f"{row.target} at {row.level}"


def grid_rows(
    table: Iterable[Row], cells: Callable[[Row], Iterable[str]]
) -> Iterator[tuple[str, ...]]:
    """The rows of a table in print, each named; an empty row where another target begins."""
    before = None
    for row in table:
        if before not in (None, row.target):
            yield ()
        before = row.target
        yield (row_name(row), *cells(row))


def outcome_counts(row: Row) -> tuple[str, str, str]:
    """How many requests of a row were answered, failed and cancelled."""
    return str(row.answered), str(row.failed), str(row.cut)


def format_day(at: float) -> str:
    """The day of a Unix time, in UTC."""
    return dt.datetime.fromtimestamp(at, dt.UTC).strftime("%Y-%m-%d")
