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
from typing import Self, TypeAlias
from urllib.parse import urlsplit

import msgspec
from rich.console import Console

from loadtests.measure import samples
from loadtests.measure.experiment import (
    RAW,
    Experiment,
    ExperimentError,
    Machine,
    Plan,
    Subject,
)
from loadtests.measure.generator import (
    LOG,
    POLL_S,
    RawTail,
    VisitFailed,
    failure_excerpt,
    locust_command,
    terminate,
)
from loadtests.measure.itinerary import Visit, itinerary, search
from loadtests.measure.progress import ProgressBar, ProgressView
from loadtests.measure.stopwatch import Target

#: How often the cards are asked what they draw, seconds.
POWER_INTERVAL_S = 1.0


#: Tells what the cards of this machine draw together; None where they do not say it now.
Watts: TypeAlias = Callable[[], Awaitable[float | None]]


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
    def is_local(self) -> bool:
        """Whether what it draws is drawn by this machine's cards, for all its address tells."""
        name = urlsplit(self.target.url).hostname or ""
        return name in ("localhost", "::1") or name.startswith("127.")


@asynccontextmanager
async def already_running(subject: Subject) -> AsyncIterator[Subject]:
    """For an entrant that runs already, and that nobody here starts or stops."""
    yield subject


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
    view: ProgressView
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
        self.view.visit_started(visit)
        entrant = self.entrants[visit.label]
        if self._up != visit.label:
            await self._stack.aclose()  # what ran before leaves the machine to this one
            self._up = None
            self.subjects[visit.label] = await self._stack.enter_async_context(entrant.running())
            self._up = visit.label
        whom = [entrant, *(self.entrants[label] for label in entrant.subject.before)]
        async with self._metering(self.watts if all(one.is_local for one in whom) else None):
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
                    await asyncio.sleep(POWER_INTERVAL_S)
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
        tail = RawTail(self.folder / RAW)
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
                        async with asyncio.timeout(POLL_S):
                            await locust.wait()
                    for line in tail.read():
                        self.view.line_written(line)
            finally:
                await terminate(locust)
        for line in tail.read():
            self.view.line_written(line)
        if locust.returncode:
            raise VisitFailed(failure_excerpt(log, told_from))


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
    with ProgressBar(console, experiment.plan, visits) as view:
        by_label = {one.label: one for one in entrants}
        async with Session(folder, experiment.plan, by_label, view, watts) as session:
            for visit in _with_searches(visits, experiment, by_label, raw, failures):
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


def _with_searches(
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


def check_same_machine(folder: Path, found: Experiment, machine: Machine) -> Experiment:
    """An experiment that may be gone on with; raises `ExperimentError` on another machine."""
    if (found.machine.cpu, found.machine.gpus) != (machine.cpu, machine.gpus):
        raise ExperimentError(
            f"{folder} was begun on another machine ({found.machine.cpu}): what comes of two "
            "machines can not be compared; begin a new folder with --out"
        )
    return found
