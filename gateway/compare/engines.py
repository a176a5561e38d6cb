"""The lanes of a configuration, each brought up to serve alone while it is measured."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Self

import msgspec

from backends.base import Engine
from backends.errors import BackendError
from backends.kinds import KINDS, Kind
from backends.processes.supervised import Supervised
from backends.reports import Identity
from backends.transport import http
from gateway import settings
from gateway.gpu.engine import GpuEngine
from gateway.settings import Settings
from loadtests.measure.experiment import Subject
from loadtests.measure.generator import VisitFailed
from loadtests.measure.matrix import Entrant
from loadtests.measure.options import shareable_command
from loadtests.measure.stopwatch import Target


class LaneEntrants:
    """The lanes of one model in a configuration, as entrants while the context is open.

    Args:
        read: The settings.
        model: The settings of the model.
        client: The HTTP client for the engines.
        folder: For the logs of engines that are started here.
    """

    def __init__(
        self, read: Settings, model: settings.ModelSettings, client: http.Client, folder: Path
    ) -> None:
        self._read = read
        self._model = model
        self._client = client
        self._folder = folder
        self._running: list[GpuEngine] = []  # started by others, so never stopped here
        self._engines: list[Engine] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        for engine in self._engines:
            await engine.close()

    def entrants(self, ollama_slots: Sequence[int | None] = (None,)) -> list[Entrant]:
        """Every lane; Ollama once for each number of slots, where it is started here."""
        entrants = []
        for kind, lane in self._model.lanes.items():
            started_here = bool(self._read.engines[kind].command)
            variable = bool(KINDS[kind].slots_variable) and started_here
            numbers = ollama_slots if variable else (None,)
            entrants += [self._entrant(kind, lane, slots) for slots in numbers]
        return entrants

    def _entrant(self, kind: Kind, lane: settings.LaneSettings, slots: int | None) -> Entrant:
        configured = self._read.engines[kind]
        url = (lane.urls or configured.urls)[0]
        key = configured.api_key.get_secret_value() if configured.api_key else None
        engine = KINDS[kind].engine(url, self._client, api_key=key)
        self._engines.append(engine)
        process = None
        if configured.command:
            environment = dict(configured.environment)
            if slots is not None:
                environment[KINDS[kind].slots_variable] = str(slots)
            log = configured.log or self._folder / f"{kind}.log"
            process = Supervised(configured.command, log, environment)
        own = GpuEngine(engine, [lane.model], process=process)
        if process is None:
            self._running.append(own)
        subject = Subject(
            label=kind if slots in (None, 1) else f"{kind}-{slots}",
            url=url,
            model=lane.model,
            engine=kind,
            slots=slots or lane.slots or KINDS[kind].slots,
            context=lane.context,
            command=shlex.join(shareable_command(configured.command)),
        )
        target = Target(subject.label, url, lane.model, key)
        return Entrant(subject, target, partial(self._serving, own, subject))

    @asynccontextmanager
    async def _serving(self, own: GpuEngine, subject: Subject) -> AsyncIterator[Subject]:
        """Bring the engine up; in an exclusive placement the others give up the GPU first."""
        try:
            async with asyncio.timeout(self._read.gpu.load_s):
                if self._model.placement == "exclusive":
                    for other in self._running:
                        if other is not own:
                            await other.release()
                await own.acquire()
            described = await describe(own.engine, subject)
        except TimeoutError:
            await own.stop()
            raise VisitFailed(
                f"{subject.label} was not ready after {self._read.gpu.load_s:g} s; if it loads so "
                "slowly, raise gpu.load_s in the settings"
            ) from None
        except BackendError as exc:
            await own.stop()
            raise VisitFailed(f"{subject.label} did not become ready: {exc}") from exc
        try:
            yield described
        finally:
            await own.stop()


async def describe(engine: Engine, subject: Subject) -> Subject:
    """The subject with version, weights, slots and context as its engine reports them."""
    identity, context = Identity(), subject.context
    with contextlib.suppress(BackendError):
        identity = await engine.identity(subject.model)
    with contextlib.suppress(BackendError):
        context = context or (await engine.capabilities(subject.model)).context
    return msgspec.structs.replace(
        subject,
        version=identity.version,
        weights=identity.weights or _precision(subject.command),
        digest=identity.digest,
        slots=identity.slots or subject.slots,
        context=context,
    )


def _precision(command: str) -> str:
    """The precision of the weights in the command line of a vLLM; empty if it names none."""
    words = shlex.split(command)
    for flag in ("--quantization", "-q", "--dtype"):
        if flag in words[:-1]:
            return words[words.index(flag) + 1]
    return ""
