"""The engines, and what listens on the gateway's port."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from backends import base, errors, reports
from backends.base import Timeouts
from backends.errors import BackendError, Unreachable
from backends.kinds import KINDS, Kind
from backends.transport import http
from gateway import settings
from gateway.doctor.collect.attempt import ask, attempt
from gateway.doctor.collect.processes import (
    ListeningSocket,
    can_bind,
    conflict,
    holder,
    process,
    resolve,
)
from gateway.doctor.observations import (
    ExpectedLane,
    NotObserved,
    ObservedEngine,
    Port,
    Process,
    Unknown,
    require,
)
from gateway.serving import discovery
from gateway.settings import Settings

T = TypeVar("T")

CONNECT_S = 2.0


@dataclass(frozen=True, slots=True)
class Sources:
    """Where to look; others only for tests."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    ports: discovery.Ports = field(default_factory=lambda: discovery.USUAL)
    docker: str = "docker"


class EngineCollector:
    """What looks at engines: the settings, a client, and what was seen before."""

    def __init__(
        self,
        client: http.Client,
        read: Settings,
        listeners: list[ListeningSocket] | Unknown,
        here: Process | Unknown,
        places: Sources,
    ) -> None:
        self._client = client
        self._read = read
        self._listeners = listeners
        self._here = here
        self._places = places

    async def servers(self) -> tuple[ObservedEngine, ...]:
        """The engines of the settings, or those that answer on their usual ports."""
        read = self._read
        wanted: dict[tuple[Kind, str], list[ExpectedLane]] = {
            (kind, url): [] for kind, engine in read.engines.items() for url in engine.urls
        }
        if not read.engines and not read.models:
            found = await discovery.find(self._client, self._places.ports, own_port=read.port)
            wanted = {(kind, url): [] for kind, url in found.items()}
            for lanes in read.pair.values():
                for kind in lanes.keys() - found.keys():
                    wanted[kind, KINDS[kind].usual_url] = []
        for name, model in read.served().items():
            for kind, lane in model.lanes.items():
                own = lane.urls or tuple(url for of, url in wanted if of == kind)
                for url in own:
                    needs = ExpectedLane(name, lane, exclusive=model.placement == "exclusive")
                    wanted.setdefault((kind, url), []).append(needs)
        looks = (self._server(kind, url, tuple(of)) for (kind, url), of in wanted.items())
        return tuple(await asyncio.gather(*looks))

    async def _server(
        self, kind: Kind, url: str, wanted: tuple[ExpectedLane, ...]
    ) -> ObservedEngine:
        origin, configured = http.Origin.of(url), self._read.engines.get(kind)
        key = configured.api_key.get_secret_value() if configured and configured.api_key else None
        engine = KINDS[kind].engine(
            url, self._client, api_key=key, timeouts=Timeouts(connect_s=CONNECT_S)
        )
        addresses = await ask(resolve(origin.host))
        seen = () if isinstance(addresses, Unknown) else addresses
        server = ObservedEngine(
            kind,
            url,
            origin.port,
            addresses if isinstance(addresses, Unknown) else await self._answers(engine),
            wanted,
            configured,
            addresses=addresses,
            here=any(map(can_bind, seen)),
        )
        server = replace(
            server,
            sockets=attempt(lambda: tuple(one.address for one in self._on(origin.port))),
            process=await asyncio.to_thread(attempt, lambda: self._process(server)),
        )
        try:
            return await self._told(server, engine)
        finally:
            await engine.close()

    async def _answers(self, engine: base.Engine) -> Kind | Unknown | None:
        """Which kind of engine is there; None: something that is none."""
        found = await discovery.kind_of(self._client, engine.url)
        if found is not None:
            return found
        try:
            await engine.models()
        except (Unreachable, errors.Silent) as exc:
            return Unknown(str(exc).removeprefix(f"{engine}: "))
        except BackendError:
            return None
        return engine.kind  # it took its time

    async def _told(self, server: ObservedEngine, engine: base.Engine) -> ObservedEngine:
        """What it says of itself."""
        if server.answers != server.kind:
            why = Unknown(
                "it does not answer"
                if isinstance(server.answers, Unknown)
                else "it is another kind"
            )
            return replace(
                server, version=why, models=why, loaded=why, contexts=why, identities=why,
                sleeps=why, asleep=why,
            )  # fmt: skip
        models = await ask(engine.models())
        wanted = tuple(dict.fromkeys(lane.lane.model for lane in server.wanted))
        return replace(
            server,
            models=models if isinstance(models, Unknown) else tuple(models),
            version=await ask(engine.version()),
            identities=await ask(_of_lanes(server, engine.identity)),
            loaded=await ask(_loaded(engine)),
            contexts=await ask(engine.contexts(wanted)),
            sleeps=await ask(engine.sleeps()),
            asleep=await ask(engine.asleep()),
        )

    def _on(self, port: int) -> list[ListeningSocket]:
        return [one for one in require(self._listeners) if one.port == port]

    def _process(self, server: ObservedEngine) -> Process:
        """The engine's own process; as it would be started, where it does not run."""
        configured = server.configured
        if isinstance(server.answers, Unknown) and configured and configured.command:
            here = require(self._here)
            environment = {**settings.environment(), **configured.environment}
            return Process(None, configured.command, environment, here.shm, here.memlock)
        if not server.here:
            raise NotObserved(
                "it runs on another machine or in a container: its flags are not seen"
            )
        found = self._held(server.port)
        if found is None:
            raise NotObserved("its process is not seen: another user's, or in a container")
        if not KINDS[server.kind].is_process(found.name, " ".join(found.command)):
            raise NotObserved(
                f"what listens for it is {found.name} (process {found.pid}), not the engine itself"
            )
        return found

    def _held(self, port: int) -> Process | None:
        pid = holder(self._places.proc, {one.inode for one in self._on(port)})
        return None if pid is None else process(self._places.proc, pid)

    async def port(self) -> Port | Unknown:
        """Who is where the gateway is to listen."""
        host, number = self._read.host, self._read.port
        if number == 0:
            return Port(host, number)
        try:
            own = await resolve(host)
        except NotObserved:
            return Port(host, number, here=False)
        if not any(map(can_bind, own)):
            return Port(host, number, here=False)
        listeners = attempt(lambda: self._on(number))
        if isinstance(listeners, Unknown):
            return listeners
        # As the gateway listens: a name that stands for both is taken in the older family.
        own = tuple(address for address in own if (":" in address) == (":" in host))
        taken = tuple(one.address for one in listeners if conflict(one.address, own))
        if not taken or (set(taken) == {"::"} and ":" not in host and can_bind(host, number)):
            return Port(host, number)  # the second: one that takes no IPv4 is not in the way
        found = attempt(lambda: self._held(number))
        by = "something that this user cannot look at"
        if isinstance(found, Process):
            by = f"{found.name} (process {found.pid})"
        return Port(host, number, taken, by, ours=await self._is_ours(host, number))

    async def _is_ours(self, host: str, number: int) -> bool:
        """Whether what listens there answers as a gateway does."""
        where = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - not bound to
        origin = http.Origin(where, number, tls=False)
        try:
            answer = await self._client.request(
                origin, "GET", "/ready", {}, b"", connect_s=CONNECT_S, head_s=CONNECT_S
            )
            said = json.loads(await answer.read_all(base.MAX_ERROR))
            answer.close(reuse=False)
        except (http.HttpError, ValueError):
            return False
        return isinstance(said, dict) and {"ready", "waiting_for"} <= said.keys()


async def _loaded(engine: base.Engine) -> tuple[reports.Loaded, ...]:
    return tuple(await engine.loaded())


async def _of_lanes(
    server: ObservedEngine, question: Callable[[str], Awaitable[T]]
) -> Mapping[str, T]:
    """What an engine says of each model that the settings want of it, and that it has."""
    found = {}
    for name in dict.fromkeys(wanted.lane.model for wanted in server.wanted):
        try:
            found[name] = await question(name)
        except errors.Refused:
            continue  # it does not have it, which is said elsewhere
    return found
