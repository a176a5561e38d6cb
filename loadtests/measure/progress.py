"""The progress of a measurement on a terminal."""

from __future__ import annotations

import time
from collections.abc import (
    Sequence,
)
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from loadtests.measure import samples
from loadtests.measure.experiment import (
    Plan,
)
from loadtests.measure.itinerary import Visit, seconds_left


class ProgressView(Protocol):
    """Receives the progress of a measurement."""

    def visit_started(self, visit: Visit) -> None:
        """Take note that a target is started, and measured as soon as it serves."""

    def line_written(self, line: samples.Line) -> None:
        """Take note of a line of the raw file: a request or a cell is over."""


class ProgressBar:
    """Shows the current cell on a terminal, and the estimated time left."""

    def __init__(self, console: Console, plan: Plan, visits: Sequence[Visit]) -> None:
        self._console = console
        self._plan = plan
        self._todo: dict[tuple[str, int], int] = {}
        for visit in visits:
            for level in visit.levels:
                key = visit.label, level
                self._todo[key] = self._todo.get(key, 0) + 1
        self._took: dict[tuple[str, int], float] = {}
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:g}/{task.total:g}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
        )
        self._total = sum(self._todo.values())
        self._all = self._bar.add_task("cells", total=self._total, left="")
        self._cell: TaskID | None = None
        self._since = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def visit_started(self, visit: Visit) -> None:
        """See `ProgressView`; a visit that was not planned extends the bar."""
        for level in visit.levels:
            key = visit.label, level
            if not self._todo.get(key):
                self._todo[key] = 1
                self._total += 1
        self._bar.update(self._all, total=self._total)
        self._show(f"{visit.label}: getting ready", 1)

    def line_written(self, line: samples.Line) -> None:
        """See `ProgressView`."""
        if isinstance(line, samples.Request):
            self._show_request(line)
        elif isinstance(line, samples.Cell):
            self._show_cell(line)

    def _show_request(self, request: samples.Request) -> None:
        level = int(request.level)
        name = f"{request.target}, {level} concurrent, repetition {request.repetition}"
        if self._cell is None or self._bar.tasks[-1].description != name:
            self._show(name, max(level * self._plan.rounds, self._plan.at_least))
        if request.phase == "measured" and self._cell is not None:
            self._bar.advance(self._cell)

    def _show_cell(self, cell: samples.Cell) -> None:
        now = time.monotonic()
        key = cell.target, int(cell.level)
        self._took[key] = now - self._since
        self._since = now
        self._todo[key] = max(0, self._todo.get(key, 1) - 1)
        left = seconds_left(self._todo, self._took)
        self._bar.update(
            self._all, advance=1, left="" if left is None else f"about {_time_left(left)}"
        )
        if cell.outcome != "complete":
            self._console.print(f"  {cell.target}, {cell.level:g} concurrent: {cell.outcome}")
        self._show("pause", 1)

    def _show(self, name: str, total: float) -> None:
        if self._cell is not None:
            self._bar.remove_task(self._cell)
        else:
            self._since = time.monotonic()
        self._cell = self._bar.add_task(name, total=total, left="")


def _time_left(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return "a minute left"
    return f"{minutes // 60} h {minutes % 60} min left" if minutes >= 60 else f"{minutes} min left"
