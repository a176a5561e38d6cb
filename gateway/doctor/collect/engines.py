"""Observes the engines: by their own API, their sockets and their processes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from backends import base, errors, reports
from backends.base import Timeouts
from backends.errors import BackendError, Unreachable
from backends.kinds import KINDS, Kind
from backends.transport import http
from backends.transport.origin import Origin
from gateway import settings
from gateway.doctor.collect.attempt import ask, attempt
from gateway.doctor.collect.processes import SocketTable, can_bind, resolve
from gateway.doctor.observations import (
    ExpectedLane,
    NotObserved,
    ObservedEngine,
    Process,
    Unknown,
    require,
)
from gateway.serving import discovery
from gateway.settings import Settings

T = TypeVar("T")

#: Timeout of a connection to an engine, seconds.
ENGINE_CONNECT_S = 2.0


class EngineCollector:
    """Observes each engine of the settings, or those on their usual ports."""

    def __init__(
        self,
        client: http.Client,
        own: Settings,
        sockets: SocketTable,
        own_process: Process | Unknown,
    ) -> None:
        self._client = client
        self._own = own
        self._sockets = sockets
        self._own_process = own_process

    async def engines(self, ports: discovery.Ports) -> tuple[ObservedEngine, ...]:
        """All engines, observed concurrently.

        Args:
            ports: By kind, where to look for engines if the settings name none.
        """
        expected = await self._expected(ports)
        collectors = (self._engine(kind, url, tuple(of)) for (kind, url), of in expected.items())
        return tuple(await asyncio.gather(*collectors))

    async def _expected(
        self, ports: discovery.Ports
    ) -> Mapping[tuple[Kind, str], list[ExpectedLane]]:
        """By kind and URL, the lanes that the settings expect of an engine."""
        own = self._own
        expected: dict[tuple[Kind, str], list[ExpectedLane]] = {
            (kind, url): [] for kind, engine in own.engines.items() for url in engine.urls
        }
        if not own.engines and not own.models:
            discovered = await discovery.find(self._client, ports, own_port=own.port)
            expected = {(kind, url): [] for kind, url in discovered.items()}
            for lanes in own.pair.values():
                for kind in lanes.keys() - discovered.keys():
                    expected[kind, KINDS[kind].usual_url] = []
        for name, model in own.served().items():
            for kind, lane in model.lanes.items():
                urls = lane.urls or tuple(url for of, url in expected if of == kind)
                for url in urls:
                    is_exclusive = model.placement == "exclusive"
                    expected.setdefault((kind, url), []).append(
                        ExpectedLane(name, lane, is_exclusive)
                    )
        return expected

    async def _engine(
        self, kind: Kind, url: str, lanes: tuple[ExpectedLane, ...]
    ) -> ObservedEngine:
        origin, configured = Origin.of(url), self._own.engines.get(kind)
        key = configured.api_key.get_secret_value() if configured and configured.api_key else None
        engine = KINDS[kind].engine(
            url, self._client, api_key=key, timeouts=Timeouts(connect_s=ENGINE_CONNECT_S)
        )
        addresses = await ask(resolve(origin.host))
        known = () if isinstance(addresses, Unknown) else addresses
        observed = ObservedEngine(
            kind,
            url,
            origin.port,
            addresses if isinstance(addresses, Unknown) else await self._answering_kind(engine),
            lanes,
            configured,
            addresses=addresses,
            is_local=any(map(can_bind, known)),
        )
        observed = replace(
            observed,
            listening_on=attempt(
                lambda: tuple(entry.address for entry in self._sockets.on(origin.port))
            ),
            process=await asyncio.to_thread(attempt, lambda: self._process(observed)),
        )
        try:
            return await self._with_reports(observed, engine)
        finally:
            await engine.close()

    async def _answering_kind(self, engine: base.Engine) -> Kind | Unknown | None:
        """The kind of engine that answers; None for something else."""
        kind = await discovery.kind_of(self._client, engine.url)
        if kind is not None:
            return kind
        try:
            await engine.models()
        except (Unreachable, errors.NoAnswer) as exc:
            return Unknown(str(exc).removeprefix(f"{engine}: "))
        except BackendError:
            return None
        return engine.kind  # it was too slow for discovery

    async def _with_reports(self, observed: ObservedEngine, engine: base.Engine) -> ObservedEngine:
        """The engine with all that it reports about itself."""
        if observed.answering_kind != observed.kind:
            unknown = Unknown(
                "it does not answer"
                if isinstance(observed.answering_kind, Unknown)
                else "another kind of engine answers"
            )
            return replace(
                observed, version=unknown, models=unknown, loaded=unknown, contexts=unknown,
                identities=unknown, has_dev_endpoints=unknown, is_asleep=unknown,
            )  # fmt: skip
        models = await ask(engine.models())
        names = tuple(dict.fromkeys(expected.lane.model for expected in observed.lanes))
        return replace(
            observed,
            models=models if isinstance(models, Unknown) else tuple(models),
            version=await ask(engine.version()),
            identities=await ask(_of_each_model(names, engine.identity)),
            loaded=await ask(_loaded(engine)),
            contexts=await ask(engine.contexts(names)),
            has_dev_endpoints=await ask(engine.sleeps()),
            is_asleep=await ask(engine.asleep()),
        )

    def _process(self, observed: ObservedEngine) -> Process:
        """The engine's process; where it does not run, how the gateway would start it."""
        configured = observed.configured
        if isinstance(observed.answering_kind, Unknown) and configured and configured.command:
            shell = require(self._own_process)
            environment = {**settings.environment(), **configured.environment}
            return Process(None, configured.command, environment, shell.shm, shell.memlock)
        if not observed.is_local:
            raise NotObserved(
                "it runs on another machine or in a container: its options cannot be read"
            )
        process = self._sockets.process_on(observed.port)
        if process is None and isinstance(observed.answering_kind, Unknown):
            raise NotObserved("it does not run: start it, then run this again")
        if process is None:
            raise NotObserved(
                "its process cannot be read: it belongs to another user or runs in a container"
            )
        if not KINDS[observed.kind].is_process(process.name, " ".join(process.command)):
            raise NotObserved(
                f"{process.name} (process {process.pid}) listens on its port, not the engine itself"
            )
        return process


async def _loaded(engine: base.Engine) -> tuple[reports.Loaded, ...]:
    return tuple(await engine.loaded())


async def _of_each_model(
    names: tuple[str, ...], question: Callable[[str], Awaitable[T]]
) -> Mapping[str, T]:
    """The answers of an engine, by model; without the models that it does not have."""
    answers = {}
    for name in names:
        try:
            answers[name] = await question(name)
        except errors.Refused:
            continue  # it does not have the model: check `engine` has that finding
    return answers
