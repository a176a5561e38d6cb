"""The whole matrix: who x at how many at once x how often, one after another.

Whatever is measured shares one machine, so one target is asked at a time, and the order
turns round with every repetition: what the machine does over the hours falls on all alike.
Where limits are stated, levels are added until it is known how many at once keep them.
The load itself is Locust's (`concurrency.py`), in a process of its own for each visit to a
target. Every cell that is done is in the raw file, and is not done again.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self, TypeAlias
from urllib.parse import urlsplit

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from loadtests.measure import samples
from loadtests.measure.stopwatch import Target
from loadtests.report import analysis
from loadtests.report.experiment import (
    RAW,
    Experiment,
    ExperimentError,
    Limits,
    Machine,
    Plan,
    Subject,
)

LOCUSTFILE = Path(__file__).parents[1] / "concurrency.py"
#: What Locust says goes here, beside the raw file.
LOG = "locust.log"
#: How often the raw file is looked at for progress, seconds.
LOOK_S = 0.5
#: How often the cards are asked what they draw, seconds.
METER_S = 1.0
#: How long Locust may take to write down what it has when it is told to end, seconds.
LAST_WORD_S = 15.0
#: How much of what Locust said last is shown when it fails, characters.
TOLD = 600


#: Tells what the cards of this machine draw together; None where they do not say it now.
Watts: TypeAlias = Callable[[], Awaitable[float | None]]


class VisitFailed(Exception):
    """A target could not be measured; the text says why and what to do."""


@dataclass(frozen=True)
class Entrant:
    """A target, and how it is made to serve.

    Attributes:
        subject: What is known of it beforehand.
        target: Whom to ask.
        running: It serves for as long as this is entered, which may start it and may take
            minutes; tells what is known of it then. Raises `VisitFailed`.
    """

    subject: Subject
    target: Target
    running: Callable[[], AbstractAsyncContextManager[Subject]]

    @property
    def label(self) -> str:
        return self.target.label

    @property
    def is_here(self) -> bool:
        """Whether what it draws is drawn by this machine's cards, for all its address tells."""
        name = urlsplit(self.target.url).hostname or ""
        return name in ("localhost", "::1") or name.startswith("127.")


@asynccontextmanager
async def as_it_is(subject: Subject) -> AsyncIterator[Subject]:
    """For an entrant that runs already, and that nobody here starts or stops."""
    yield subject


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
    cells = [(cell, of) for cell, of in analysis.closed_cells(lines) if cell.target == label]
    added = {int(cell.level) for cell, _ in cells} - {*plan.levels}  # perhaps interrupted
    if limits != Limits():
        table = analysis.rows(cells, tokens_out=plan.tokens_out, limits=limits)
        added |= {one.between for one in analysis.kept(table) if one.between}
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


class View(Protocol):
    """Who is told how far it is."""

    def begun(self, visit: Visit) -> None:
        """A target is made to serve, and asked as soon as it does."""

    def seen(self, line: samples.Line) -> None:
        """A request or a cell is over."""


@dataclass
class Session:
    """Measures visit by visit, into one folder, and keeps a target up between two visits.

    Args:
        folder: Of the experiment; the raw file is added to.
        plan: How to measure.
        entrants: By label.
        view: Is told how far it is.
        watts: Asked about once a second while a target of this machine is measured.
        processes: Of the load generator.
    """

    folder: Path
    plan: Plan
    entrants: Mapping[str, Entrant]
    view: View
    watts: Watts | None = None
    processes: int = 1
    subjects: dict[str, Subject] = field(default_factory=dict)
    _up: str | None = None
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def visit(self, visit: Visit) -> None:
        """Measure one target at these levels.

        Raises:
            VisitFailed: It does not serve, or not this model; the cells before are kept.
        """
        self.view.begun(visit)
        entrant = self.entrants[visit.label]
        if self._up != visit.label:
            await self._stack.aclose()  # what ran before leaves the machine to this one
            self._up = None
            self.subjects[visit.label] = await self._stack.enter_async_context(entrant.running())
            self._up = visit.label
        whom = [entrant, *(self.entrants[label] for label in entrant.subject.before)]
        async with self._metering(self.watts if all(one.is_here for one in whom) else None):
            await self._generate(entrant.target, visit)

    @asynccontextmanager
    async def _metering(self, watts: Watts | None) -> AsyncIterator[None]:
        """Meanwhile what the cards draw goes into the raw file, too."""

        async def read(watts: Watts) -> None:
            raw = samples.Writer(self.folder / RAW)
            try:
                while True:
                    drawn = await watts()
                    if drawn is not None:
                        raw.write(samples.Power(time.time(), drawn))
                    await asyncio.sleep(METER_S)
            finally:
                raw.close()

        reading = None if watts is None else asyncio.create_task(read(watts))
        try:
            yield
        finally:
            if reading is not None:
                reading.cancel()
                with suppress(asyncio.CancelledError):
                    await reading

    async def _generate(self, target: Target, visit: Visit) -> None:
        """Locust, on one target; what it writes is passed on as it comes."""
        command = locust_command(
            target, self.plan, visit, self.folder / RAW, processes=self.processes
        )
        environment = dict(os.environ)
        environment.pop("OPENAI_API_KEY", None)
        if target.key:
            environment["OPENAI_API_KEY"] = target.key  # where `ps` does not show it
        tail = _Tail(self.folder / RAW)
        log = self.folder / LOG
        with log.open("ab") as output:
            told_from = output.tell()
            locust = await asyncio.create_subprocess_exec(
                *command,
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is ours; it is told to end by us
            )
            try:
                while locust.returncode is None:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(LOOK_S):
                            await locust.wait()
                    for line in tail.read():
                        self.view.seen(line)
            finally:
                await _end(locust)
        for line in tail.read():
            self.view.seen(line)
        if locust.returncode:
            raise VisitFailed(_last_words(log, told_from))


def locust_command(
    target: Target, plan: Plan, visit: Visit, raw: Path, *, processes: int = 1
) -> list[str]:
    """What measures this visit; the key is not in it."""
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless"]
    command += ["--only-summary", "--loglevel", "WARNING", "--exit-code-on-error", "0"]
    command += ["--raw", str(raw)]
    command += ["--target", str(target), "--levels", ",".join(map(str, visit.levels))]
    command += ["--first-repetition", str(visit.repetition), "--repetitions", "1"]
    command += ["--rounds", str(plan.rounds), "--warm-up", str(plan.warm_up)]
    command += ["--at-least", str(plan.at_least)]
    command += ["--tokens-in", str(plan.tokens_in), "--tokens-out", str(plan.tokens_out)]
    command += ["--cell-s", f"{plan.cell_s:g}", "--cooldown-s", f"{plan.cooldown_s:g}"]
    if plan.prompts:
        command += ["--prompts", plan.prompts]
    if processes > 1:
        command += ["--processes", str(processes)]
    return command


async def _end(locust: asyncio.subprocess.Process) -> None:
    """Have it write down what it has, and end."""
    if locust.returncode is not None:
        return
    with suppress(ProcessLookupError):
        os.killpg(locust.pid, signal.SIGTERM)
    try:
        async with asyncio.timeout(LAST_WORD_S):
            await locust.wait()
    except TimeoutError:
        with suppress(ProcessLookupError):
            os.killpg(locust.pid, signal.SIGKILL)
        await locust.wait()


def _last_words(log: Path, since: int) -> str:
    """What Locust said of its failure: the lines that speak to people, or the last ones."""
    with log.open("rb") as file:
        file.seek(since)
        said = file.read().decode(errors="replace")
    lines = [line for line in said.splitlines() if line.startswith("twolane: ")]
    if lines:
        return "; ".join(line.removeprefix("twolane: ") for line in lines)
    return f"the load generator failed, {log} ends with:\n{said[-TOLD:].strip()}"


class _Tail:
    """The lines that are added to a raw file, as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def read(self) -> list[samples.Line]:
        """What is new and whole."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text.rfind(b"\n") + 1
        self._offset += whole
        lines = []
        for line in text[:whole].splitlines():
            with suppress(msgspec.DecodeError):
                lines.append(samples.decode(line))
        return lines


class Progressing:
    """Shows on a terminal what is measured, and how long it will still take."""

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

    def begun(self, visit: Visit) -> None:
        """As `View`; a visit that was not foreseen makes it longer."""
        for level in visit.levels:
            key = visit.label, level
            if not self._todo.get(key):
                self._todo[key] = 1
                self._total += 1
        self._bar.update(self._all, total=self._total)
        self._show(f"{visit.label}: getting ready", 1)

    def seen(self, line: samples.Line) -> None:
        """As `View`."""
        if isinstance(line, samples.Request):
            self._look(line)
        elif isinstance(line, samples.Cell):
            self._close(line)

    def _look(self, one: samples.Request) -> None:
        level = int(one.level)
        name = f"{one.target}, {level} at once, repetition {one.repetition}"
        if self._cell is None or self._bar.tasks[-1].description != name:
            self._show(name, max(level * self._plan.rounds, self._plan.at_least))
        if one.phase == "measured" and self._cell is not None:
            self._bar.advance(self._cell)

    def _close(self, cell: samples.Cell) -> None:
        now = time.monotonic()
        key = cell.target, int(cell.level)
        self._took[key] = now - self._since
        self._since = now
        self._todo[key] = max(0, self._todo.get(key, 1) - 1)
        left = seconds_left(self._todo, self._took)
        self._bar.update(self._all, advance=1, left="" if left is None else f"about {_clock(left)}")
        if cell.outcome != "complete":
            self._console.print(f"  {cell.target}, {cell.level:g} at once: {cell.outcome}")
        self._show("pause", 1)

    def _show(self, name: str, total: float) -> None:
        if self._cell is not None:
            self._bar.remove_task(self._cell)
        else:
            self._since = time.monotonic()
        self._cell = self._bar.add_task(name, total=total, left="")


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return "a minute left"
    return f"{minutes // 60} h {minutes % 60} min left" if minutes >= 60 else f"{minutes} min left"


async def run(
    folder: Path,
    experiment: Experiment,
    entrants: Sequence[Entrant],
    console: Console,
    watts: Watts | None = None,
) -> list[str]:
    """Measure all that the folder does not have yet; says which targets failed, and why.

    What is known of the targets once they serve is added to the experiment's file, and what
    the cards draw meanwhile, where `watts` tells it, to the raw one.

    Raises:
        ExperimentError: The folder cannot be written.
        samples.SamplesError: The raw file there cannot be read.
    """
    experiment.save(folder)
    raw = folder / RAW
    done = samples.cells(samples.read(raw)) if raw.exists() else []
    visits = itinerary(experiment.plan, [one.label for one in entrants], done)
    failures: dict[str, str] = {}
    with Progressing(console, experiment.plan, visits) as view:
        by_label = {one.label: one for one in entrants}
        async with Session(folder, experiment.plan, by_label, view, watts) as session:
            for visit in _and_search(visits, experiment, by_label, raw, failures):
                try:
                    await session.visit(visit)
                except VisitFailed as exc:
                    console.print(f"  [red]{visit.label}: {exc}[/]")
                    failures[visit.label] = str(exc)
                known = {subject.label: subject for subject in experiment.subjects}
                known |= session.subjects
                experiment = msgspec.structs.replace(experiment, subjects=tuple(known.values()))
                experiment.save(folder)
    return [f"{label}: {why}" for label, why in failures.items()]


def _and_search(
    visits: Sequence[Visit],
    experiment: Experiment,
    labels: Iterable[str],
    raw: Path,
    failures: Mapping[str, str],
) -> Iterator[Visit]:
    """First these visits, then each target's search; none of them twice."""
    yield from visits
    for label in labels:
        gone: set[Visit] = set()
        while label not in failures and raw.exists():
            lines = [*samples.read(raw)]
            left = search(experiment.plan, experiment.limits, label, lines)
            visit = next((one for one in left if one not in gone), None)
            if visit is None:
                break
            gone.add(visit)
            yield visit


def resumed(folder: Path, found: Experiment, machine: Machine) -> Experiment:
    """An experiment that may be gone on with; raises `ExperimentError` on another machine."""
    if (found.machine.cpu, found.machine.gpus) != (machine.cpu, machine.gpus):
        raise ExperimentError(
            f"{folder} was begun on another machine ({found.machine.cpu}): what comes of two "
            "machines can not be compared; begin a new folder with --out"
        )
    return found
