"""The lanes of a configuration, each made to serve alone."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec

from backends.base import Engine
from backends.errors import BackendError
from backends.kinds import KINDS, Kind
from backends.processes.supervised import Supervised
from backends.reports import Identity
from backends.transport import http
from gateway import settings
from gateway.gpu.handover import Occupant
from gateway.settings import Settings
from loadtests.measure.experiment import Subject
from loadtests.measure.generator import VisitFailed
from loadtests.measure.matrix import Entrant
from loadtests.measure.options import shareable_command
from loadtests.measure.stopwatch import Target


class Lanes:
    """The lanes of one model in a configuration, and how each is made to serve alone.

    Args:
        read: The settings.
        model: The settings of the model.
        client: What talks to the engines.
        folder: For what engines of ours say.
    """

    def __init__(
        self, read: Settings, model: settings.ModelSettings, client: http.Client, folder: Path
    ) -> None:
        self._read = read
        self._model = model
        self._client = client
        self._folder = folder
        self._running: list[Occupant] = []  # those that are not ours to stop

    def entrants(self, ollama_slots: Sequence[int | None] = (None,)) -> list[Entrant]:
        """Every lane; Ollama once for each number of slots, where it is ours to start."""
        found = []
        for kind, lane in self._model.lanes.items():
            ours = bool(self._read.engines[kind].command)
            several = ollama_slots if KINDS[kind].slots_variable and ours else (None,)
            found += [self._entrant(kind, lane, slots) for slots in several]
        return found

    def _entrant(self, kind: Kind, lane: settings.LaneSettings, slots: int | None) -> Entrant:
        own = self._read.engines[kind]
        url = (lane.urls or own.urls)[0]
        key = own.api_key.get_secret_value() if own.api_key else None
        engine = KINDS[kind].engine(url, self._client, api_key=key)
        process = None
        if own.command:
            environment = dict(own.environment)
            if slots is not None:
                environment[KINDS[kind].slots_variable] = str(slots)
            log = own.log or self._folder / f"{kind}.log"
            process = Supervised(own.command, log, environment)
        occupant = Occupant(engine, [lane.model], process=process)
        if process is None:
            self._running.append(occupant)
        subject = Subject(
            label=kind if slots in (None, 1) else f"{kind}-{slots}",
            url=url,
            model=lane.model,
            engine=kind,
            slots=slots or lane.slots or KINDS[kind].slots,
            context=lane.context,
            command=shlex.join(shareable_command(own.command)),
        )
        target = Target(subject.label, url, lane.model, key)
        return Entrant(subject, target, partial(self._serving, occupant, subject))

    @asynccontextmanager
    async def _serving(self, occupant: Occupant, subject: Subject) -> AsyncIterator[Subject]:
        """The one engine that serves, where only one can."""
        try:
            async with asyncio.timeout(self._read.gpu.load_s):
                if self._model.placement == "exclusive":
                    for other in self._running:
                        if other is not occupant:
                            await other.give()
                await occupant.take()
            facts = await describe(occupant.engine, subject)
        except TimeoutError:
            await occupant.stop()
            raise VisitFailed(
                f"{subject.label} does not serve after {self._read.gpu.load_s:g} s (gpu.load_s)"
            ) from None
        except BackendError as exc:
            await occupant.stop()
            raise VisitFailed(f"{subject.label} does not serve: {exc}") from exc
        try:
            yield facts
        finally:
            await occupant.stop()


async def describe(engine: Engine, subject: Subject) -> Subject:
    """A subject with what its engine says of itself, now that it serves."""
    found, context = Identity(), subject.context
    with contextlib.suppress(BackendError):
        found = await engine.identity(subject.model)
    with contextlib.suppress(BackendError):
        context = context or (await engine.capabilities(subject.model)).context
    return msgspec.structs.replace(
        subject,
        version=found.version,
        weights=found.weights or _precision(subject.command),
        digest=found.digest,
        slots=found.slots or subject.slots,
        context=context,
    )


def _precision(command: str) -> str:
    """What a vLLM was told about its weights, where we have its command line."""
    words = shlex.split(command)
    for flag in ("--quantization", "-q", "--dtype"):
        if flag in words[:-1]:
            return words[words.index(flag) + 1]
    return ""
