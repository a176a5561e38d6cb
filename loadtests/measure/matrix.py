"""Measures the matrix of an experiment: targets x levels x repetitions.

The targets share one machine, so they are measured one at a time, and every repetition
reverses their order: a drift of the machine over the hours affects all alike. If an SLO is
stated, levels are added until its highest level is known. The load is made by Locust
(`concurrency.py`), in a process of its own for each visit to a target. Every finished cell is
in the raw file and is not measured again.
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

#: How often the power of the cards is sampled, seconds.
POWER_INTERVAL_S = 1.0


#: Returns the power of all cards of this machine, watts; None if it is not known now.
Watts: TypeAlias = Callable[[], Awaitable[float | None]]


@dataclass(frozen=True)
class Entrant:
    """A target of the experiment, and how it is made to serve.

    Attributes:
        subject: What is known of it before it serves.
        target: Where to send requests.
        running: A context in which it serves. Entering may start it, which may take minutes,
            and returns what is known of it then. Raises `VisitFailed`.
    """

    subject: Subject
    target: Target
    running: Callable[[], AbstractAsyncContextManager[Subject]]

    @property
    def label(self) -> str:
        return self.target.label

    @property
    def is_local(self) -> bool:
        """Whether its address is on this machine, so that this machine's cards power it."""
        name = urlsplit(self.target.url).hostname or ""
        return name in ("localhost", "::1") or name.startswith("127.")


@asynccontextmanager
async def already_running(subject: Subject) -> AsyncIterator[Subject]:
    """The `running` of an entrant that runs already and is not started or stopped here."""
    yield subject


@dataclass
class Session:
    """Measures visit by visit into one folder; a target stays up between two visits to it.

    Args:
        folder: The experiment's folder; its raw file is appended to.
        plan: How to measure.
        entrants: The entrants by label.
        view: Receives the progress.
        watts: Called while a target on this machine is measured.
        watts_interval_s: How often it is called.
        processes: Processes of the load generator.
    """

    folder: Path
    plan: Plan
    entrants: Mapping[str, Entrant]
    view: ProgressView
    watts: Watts | None = None
    watts_interval_s: float = POWER_INTERVAL_S
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
            VisitFailed: It does not serve, or not this model; finished cells stay.
        """
        self.view.visit_started(visit)
        entrant = self.entrants[visit.label]
        if self._up != visit.label:
            await self._stack.aclose()  # the target before releases the machine
            self._up = None
            self.subjects[visit.label] = await self._stack.enter_async_context(entrant.running())
            self._up = visit.label
        involved = [entrant, *(self.entrants[label] for label in entrant.subject.before)]
        all_local = all(one.is_local for one in involved)
        async with self._sampling_power(self.watts if all_local else None):
            await self._generate(entrant.target, visit)

    @asynccontextmanager
    async def _sampling_power(self, watts: Watts | None) -> AsyncIterator[None]:
        """A context in which the power of the cards is written into the raw file, too."""

        async def read(watts: Watts) -> None:
            raw = samples.Writer(self.folder / RAW)
            try:
                while True:
                    power = await watts()
                    if power is not None:
                        raw.write(samples.Power(time.time(), power))
                    await asyncio.sleep(self.watts_interval_s)
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
        """Run Locust on one target, and pass the lines it writes to the view."""
        command = locust_command(
            target, self.plan, visit, self.folder / RAW, processes=self.processes
        )
        environment = dict(os.environ)
        environment.pop("OPENAI_API_KEY", None)
        if target.key:
            environment["OPENAI_API_KEY"] = target.key  # not on the command line, which `ps` shows
        tail = RawTail(self.folder / RAW)
        log = self.folder / LOG
        with log.open("ab") as output:
            start = output.tell()
            locust = await asyncio.create_subprocess_exec(
                *command,
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches us alone, and we end it
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
            raise VisitFailed(failure_excerpt(log, start))


async def run(
    folder: Path,
    experiment: Experiment,
    entrants: Sequence[Entrant],
    console: Console,
    watts: Watts | None = None,
) -> list[str]:
    """Measure the cells that the folder does not have; returns which targets failed, and why.

    Facts on the targets that are known once they serve are added to the experiment's file,
    and power samples, if `watts` is given, to the raw file.

    Raises:
        ExperimentError: The folder cannot be written.
        samples.SamplesError: Its raw file cannot be read.
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
    """These visits, then each target's search for its highest level; none of them twice."""
    yield from visits
    for label in labels:
        tried: set[Visit] = set()
        while label not in failures and raw.exists():
            lines = [*samples.read(raw)]
            left = search(experiment.plan, experiment.limits, label, lines)
            visit = next((one for one in left if one not in tried), None)
            if visit is None:
                break
            tried.add(visit)
            yield visit


def check_same_machine(folder: Path, found: Experiment, machine: Machine) -> Experiment:
    """The experiment, if this is its machine; raises `ExperimentError` on another one."""
    if (found.machine.cpu, found.machine.gpus) != (machine.cpu, machine.gpus):
        raise ExperimentError(
            f"{folder} was begun on another machine ({found.machine.cpu}): figures of two "
            "machines cannot be compared; begin a new folder with --out"
        )
    return found
