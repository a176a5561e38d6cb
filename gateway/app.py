"""The whole, put together in one place: settings in, a serving gateway out."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from backends.base import Engine, Timeouts
from backends.errors import BackendError
from backends.kinds import EMBEDDED, KINDS, Kind
from backends.processes.supervised import Supervised
from backends.reports import Capabilities, Readiness
from backends.transport import http
from gateway import settings
from gateway.errors import BadRequest, NotFound
from gateway.gpu.handover import Deadlines, Gpu, Occupant
from gateway.gpu.lease import Lease, LeaseError, usual_lease
from gateway.gpu.memory import Budget, Memory, MemoryUnknown, Nvml
from gateway.http.auth import Keys
from gateway.http.edge import Edge
from gateway.http.metrics_page import Scraped
from gateway.http.pages import Pages
from gateway.observe import request_log as telemetry
from gateway.observe.cost import statement
from gateway.observe.metrics import Metrics
from gateway.relay.relay import Relay
from gateway.routing import profile
from gateway.routing.breaker import Breaker
from gateway.routing.policy import HandOver, Overlap, Policy, Served
from gateway.routing.refine import Refined
from gateway.routing.scheduler import Lane, Replica, Scheduler
from gateway.serving import discovery
from gateway.serving.admission import Admission, Server
from gateway.serving.catalogue import Catalogue, Model
from gateway.serving.loading import Loader
from gateway.serving.prober import Prober
from gateway.settings import Settings, SettingsError, Timings

log = logging.getLogger("gateway")

GIB = 2**30


class Gateway:
    """The gateway, from `async with` to its end.

    Entering finds the engines and looks at each once; one that is down is not fatal. What
    serves is `edge`, an ASGI application.

    Args:
        read: The settings.
        ports: Where engines are looked for if the settings name none.
        client: What talks to the engines; closed at the end.
        memory: What the GPU's is read from, in place of its driver.
        nvml: That driver.
        timings: Intervals and deadlines that no setting names.

    Raises (on entering):
        SettingsError: There is nothing to serve, or a profile cannot be used.
    """

    def __init__(
        self,
        read: Settings,
        ports: discovery.Ports = discovery.USUAL,
        *,
        client: http.Client | None = None,
        memory: Memory | None = None,
        nvml: Nvml | None = None,
        timings: Timings | None = None,
    ) -> None:
        self._timings = timings or Timings()
        self._settings = read
        self._ports = ports
        self._limits = read.limits
        self._client = client or http.Client()
        self._memory = memory
        self._engines: dict[tuple[Kind, str], Engine] = {}
        self._urls: dict[Kind, tuple[str, ...]] = {k: e.urls for k, e in read.engines.items()}
        self._tasks: dict[str, list[asyncio.Task[None]]] = {}  # by model
        self._relisting: asyncio.Task[None] | None = None
        self._heard: list[asyncio.Event] = []  # of each replica, when it has been looked at
        self._misfits: list[str] = []
        self._embedded: Supervised | None = None
        self._kept: list[tuple[Supervised, asyncio.Task[None]]] = []
        self._lease: Lease | None = None
        self.gpu: Gpu | None = None
        self._owning: asyncio.Task[None] | None = None
        self._began = time.time()
        self.catalogue = Catalogue()
        self._loader = Loader(self.catalogue, self._timings)
        self.metrics = Metrics(self.catalogue.models, read.cost, self._timings)
        self._nvml = nvml or Nvml()
        self._watching: asyncio.Task[None] | None = None
        self.scraped: Scraped | None = None
        self.edge = Edge(
            Relay(
                self.catalogue,
                heartbeat_s=read.limits.heartbeat_s,
                status_events=read.status_events,
            ),
            Pages(
                self.catalogue,
                self._loader,
                ready=self.ready,
                status=self.status,
                pin=self.pin,
                release=self.release,
                version=importlib.metadata.version("twolane"),
                metrics=self._exposition,
            ),
            Keys(read.keys()),
            Keys([key.get_secret_value() for key in read.admin_keys] or read.keys()),
            [*([telemetry.Log()] if read.log == "json" else []), self.metrics],
            max_body=int(read.limits.max_body_mb * 1024 * 1024),
        )

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._stop()

    # Starting

    async def _start(self) -> None:
        self._serve_metrics()
        if self._discovers:
            await self._discover()
            for lanes in self._settings.pair.values():
                for kind in lanes:  # named, so expected: it may only be late
                    self._urls.setdefault(kind, (KINDS[kind].usual_url,))
            if not self._urls:
                await self._start_embedded()
        configured = self._settings.served()
        await self._take_gpu(
            {name: model for name, model in configured.items() if model.placement == "exclusive"}
        )
        self._keep_ours()
        for name, model in configured.items():
            self._add(name, model)
        if self.gpu is not None:
            self._owning = asyncio.create_task(self.gpu.run())
        if not self._settings.models:
            await self._relist()
            self._relisting = asyncio.create_task(self._keep_relisting())
        self._watching = asyncio.create_task(self.metrics.watch(self._nvml))
        await self._first_look()

    def _serve_metrics(self) -> None:
        """On a port of their own, if they have one; raises SettingsError."""
        host, port = self._settings.metrics.host, self._settings.metrics.port
        if port is None:
            return
        try:
            self.scraped = Scraped(self.metrics.exposition, host, port)
        except OSError as exc:
            raise SettingsError(
                f"metrics: {host}:{port} cannot be listened on ({exc.strerror}): choose another "
                "metrics.port"
            ) from exc
        self.scraped.start()

    def _exposition(self, accept: str) -> tuple[bytes, str]:
        """What `/metrics` says here; raises NotFound where it is elsewhere."""
        if self.scraped is not None:
            raise NotFound(
                f"Metrics are on a port of their own, {self.scraped.port}, without a key."
            )
        return self.metrics.exposition(accept)

    async def _take_gpu(self, models: Mapping[str, settings.ModelSettings]) -> None:
        """Be the one owner of the GPU that these models share; raises SettingsError."""
        if not models:
            return
        own = self._settings.gpu
        try:
            self._lease = Lease(own.lease or usual_lease())
            self._lease.acquire(f"{self._settings.host}:{self._settings.port}")
        except LeaseError as exc:
            raise SettingsError(str(exc)) from exc
        kinds = list(dict.fromkeys(kind for model in models.values() for kind in model.lanes))
        occupants: dict[str, Occupant] = {
            kind: await self._occupant(kind, models) for kind in kinds
        }
        policy = Policy(
            kinds,
            {name: self._served(model) for name, model in models.items()},
            HandOver(own.handover_s, own.moves_per_hour, own.patience_s),
        )
        policy.pin = next((model.pin for model in models.values() if model.pin), None)
        deadlines = Deadlines(own.drain_s, own.unload_s, own.free_s, own.load_s, own.probe_s)
        ours = [o.process for o in occupants.values() if o.process is not None]
        memory = self._memory or self._nvml
        if own.budget_gib is not None:
            size = int(own.budget_gib * GIB)
            memory = Budget(size, lambda: [p.pid for p in ours if p.pid is not None])
        self._check_memory(models, memory)
        self.gpu = Gpu(policy, occupants, deadlines, memory, idle_release_s=own.idle_release_s)
        self.metrics.follow(self.gpu)

    async def _occupant(self, kind: Kind, models: Mapping[str, settings.ModelSettings]) -> Occupant:
        """One engine as a tenant of the GPU; raises SettingsError where it cannot give it back."""
        configured = self._settings.engines[kind]
        lanes = [model.lanes[kind] for model in models.values() if kind in model.lanes]
        process = _supervised(kind, configured) if configured.command else None
        engine = self._engine(kind, configured.urls[0])
        if process is None:
            with contextlib.suppress(BackendError):  # one that is down cannot be asked yet
                if obstacle := await engine.release_obstacle():
                    raise SettingsError(
                        f"{engine.url} cannot give its GPU memory back. {obstacle}, or let the "
                        f"gateway start and stop it: engines.{kind}.command"
                    )
        needs = max((lane.memory_gib for lane in lanes if lane.memory_gib), default=None)
        return Occupant(
            engine,
            [lane.model for lane in lanes],
            process=process,
            needs=int(needs * GIB) if needs else None,
            away_s=self._settings.gpu.away_s,
        )

    def _check_memory(self, models: Mapping[str, settings.ModelSettings], memory: Memory) -> None:
        """Raise SettingsError where a lane needs more than there is."""
        with contextlib.suppress(MemoryUnknown):
            total = memory.total()
            for name, model in models.items():
                for kind, lane in model.lanes.items():
                    if lane.memory_gib and lane.memory_gib * GIB > total:
                        raise SettingsError(
                            f"models.{name}.lanes.{kind}.memory_gib: {lane.memory_gib:g} GiB do "
                            f"not fit in the GPU's {total / GIB:.1f}; take a smaller model, a "
                            "smaller quantization or less context"
                        )

    def _keep_ours(self) -> None:
        """Have the engines run that are ours to start and have no GPU to wait for."""
        for kind, configured in self._settings.engines.items():
            waits = self.gpu is not None and kind in self.gpu.occupants
            if configured.command and not waits:
                process = _supervised(kind, configured)
                self._kept.append((process, asyncio.create_task(process.keep())))

    @property
    def _discovers(self) -> bool:
        """Whether nobody said which engines there are."""
        return not self._settings.engines and not self._settings.models

    async def _discover(self) -> None:
        found = await discovery.find(self._client, self._ports, own_port=self._settings.port)
        for kind, url in found.items():
            self._urls.setdefault(kind, (url,))

    async def _start_embedded(self) -> None:
        """Start the engine that comes along; raises SettingsError where it cannot."""
        own = self._settings.embedded
        gguf = own.model or discovery.packaged_model()
        if not discovery.embedded_installed() or gguf is None:
            raise SettingsError(
                f"Found {_none_of_them()}, and the embedded engine is not installed. "
                "Start one of them, name yours in a configuration file, or install the "
                "extra: pip install 'twolane[embedded]'."
            )
        if not gguf.is_file():
            raise SettingsError(f"embedded.model: there is no file {gguf}")
        command = [sys.executable, "-m", "backends.llamacpp", str(gguf), "--name", own.name,
                   "--slots", str(own.slots), "--context", str(own.context)]  # fmt: skip
        errors = Path(tempfile.mkdtemp(prefix="twolane-")) / "llamacpp.log"
        log.info("starting the embedded engine on %s (log: %s)", gguf.name, errors)
        embedded = self._embedded = Supervised(command, errors, tells_url=True)
        try:
            await embedded.start(deadline_s=self._timings.embedded_start_s)
        except BackendError as exc:
            raise SettingsError(f"The embedded engine does not start: {exc}") from exc
        self._urls[EMBEDDED] = (self._embedded.url,)

    async def _keep_relisting(self) -> None:
        while True:
            await asyncio.sleep(self._timings.relist_interval_s)
            if self._discovers and self._embedded is None:
                await self._discover()  # one that was started after us
            await self._relist()

    async def _relist(self) -> None:
        """Serve what the engines have, under their own names; equal names are one model."""
        found, silent = await self._listed()
        for name, lanes in found.items():
            known = self.catalogue.models.get(name)
            if (
                known is not None
                and name not in self._settings.pair
                and set(lanes) - set(known.lanes)
            ):
                self._remove(name)  # another engine has it now, too
            if name not in self.catalogue.models:
                self._add(name, settings.ModelSettings(lanes=lanes))
        for name, known in list(self.catalogue.models.items()):
            gone = name not in found and name not in self._settings.pair
            if gone and not silent.intersection(known.lanes):  # one that is down forgets nothing
                self._remove(name)

    async def _listed(self) -> tuple[dict[str, dict[Kind, settings.LaneSettings]], set[Kind]]:
        """The engines' models that are in no pair, and the engines that did not answer."""
        paired = {
            (kind, model) for lanes in self._settings.pair.values() for kind, model in lanes.items()
        }
        found: dict[str, dict[Kind, settings.LaneSettings]] = {}
        silent: set[Kind] = set()
        for kind, urls in self._urls.items():
            try:
                names = await self._engine(kind, urls[0]).models()
            except BackendError:
                silent.add(kind)
                continue
            for name in names:
                if (kind, name) not in paired:
                    lane = settings.LaneSettings(model=name, slots=self._embedded_slots(kind))
                    found.setdefault(name, {})[kind] = lane
        return found, silent

    def _embedded_slots(self, kind: Kind) -> int | None:
        return self._settings.embedded.slots if self._embedded and kind == EMBEDDED else None

    def _engine(self, kind: Kind, url: str) -> Engine:
        known = self._engines.get((kind, url))
        if known is None:
            limits, configured = self._limits, self._settings.engines.get(kind)
            key = (
                configured.api_key.get_secret_value() if configured and configured.api_key else None
            )
            known = self._engines[kind, url] = KINDS[kind].engine(
                url,
                self._client,
                api_key=key,
                timeouts=Timeouts(
                    limits.connect_s, limits.first_token_s, limits.idle_s, limits.answer_s
                ),
            )
        return known

    def _add(self, name: str, model: settings.ModelSettings) -> None:
        """Serve a model: its lanes, their replicas, and a prober for each."""
        lanes: list[Lane] = []
        servers: dict[Replica, Server] = {}
        probers: list[tuple[Replica, Prober, Kind]] = []
        for kind, lane in model.lanes.items():
            replicas = []
            for url in lane.urls or self._urls[kind]:
                engine = self._engine(kind, url)
                replica = Replica(url, lane.slots or KINDS[kind].slots)
                prober = Prober(engine, lane.model, self._timings)
                servers[replica] = Server(engine, lane.model, Breaker(replica.slots), prober)
                replicas.append(replica)
                probers.append((replica, prober, kind))
            lanes.append(Lane(kind, replicas, lane.queue))
        exclusive = self.gpu is not None and model.placement == "exclusive"
        known = self._profile(model)
        if self.gpu is not None and exclusive:
            policy = self.gpu.policy
        else:
            names = [lane.name for lane in lanes]
            policy = Policy(names, {name: Served(tuple(names), known)}, Overlap())
            policy.pin = model.pin
        refined = None
        if model.refine and known.source == "measured":
            refined = Refined(known, {lane.name: lane.slots for lane in lanes})
        admission = Admission(
            Scheduler(lanes, policy, model=name, exclusive=exclusive, refined=refined),
            servers,
            max_wait_s=self._limits.max_wait_s,
            gpu=self.gpu if exclusive else None,
        )
        served = Model(name, admission, known)
        served.can = {kind: _stated(Capabilities(), lane) for kind, lane in model.lanes.items()}
        self.catalogue.add(served)
        self._tasks[name] = [
            asyncio.create_task(prober.run(self._on_word(served, replica, kind, model.lanes[kind])))
            for replica, prober, kind in probers
        ]

    def _served(self, model: settings.ModelSettings) -> Served:
        return Served(tuple(model.lanes), self._profile(model))

    def _profile(self, model: settings.ModelSettings) -> profile.Profile:
        if model.profile is None:
            return profile.ASSUMED
        try:
            return profile.load(model.profile)
        except profile.ProfileError as exc:
            raise SettingsError(str(exc)) from exc

    def _on_word(
        self, model: Model, replica: Replica, kind: Kind, lane: settings.LaneSettings
    ) -> Any:
        """What to do with what a replica says of itself: ask what it can take, then use it."""
        server = model.admission.servers[replica]
        first = asyncio.Event()
        self._heard.append(first)

        last: Readiness | None = None
        identified = -math.inf

        async def heard(readiness: Readiness) -> None:
            nonlocal last, identified
            if readiness is Readiness.READY and last is not readiness:
                identified = -math.inf
                with contextlib.suppress(BackendError):
                    can = await server.engine.capabilities(server.model)
                    model.can[kind] = _stated(can, lane)
                    self._check_context(model.name, kind, lane, can)
            last = readiness
            model.admission.reported(replica, readiness)
            first.set()
            server.loaded = server.loaded and readiness is Readiness.READY
            if readiness is Readiness.READY:
                with contextlib.suppress(BackendError):
                    server.activity = await server.engine.activity(server.model)
                    server.loaded = server.activity.loaded
                if time.monotonic() - identified > self._timings.identity_interval_s:
                    identified = time.monotonic()
                    await self._compare(model, replica, kind, lane)

        return heard

    def _check_context(
        self, name: str, kind: Kind, lane: settings.LaneSettings, can: Capabilities
    ) -> None:
        """Take note of a context that is promised and not there."""
        if KINDS[kind].engine.fixed_context and (lane.context or 0) > (can.context or math.inf):
            self._misfits.append(
                f"models.{name}.lanes.{kind}.context: {lane.context} tokens are more than the "
                f"{can.context} its engine was started with; start that with more, or say less"
            )
            log.error(self._misfits[-1])

    async def _compare(
        self, model: Model, replica: Replica, kind: Kind, lane: settings.LaneSettings
    ) -> None:
        """Take note where an engine is not the one that the profile was measured on."""
        measured = model.profile.lanes.get(kind)
        if measured is None or measured.on is None:
            return
        try:
            found = await model.admission.servers[replica].engine.identity(lane.model)
        except BackendError as exc:
            log.info("%s did not say what it is: %s", kind, exc)
            return
        configured = self._settings.engines.get(kind)
        now = profile.Measured(
            kind,
            lane.model,
            found.version,
            found.weights,
            found.slots or lane.slots or KINDS[kind].slots,
            model.can[kind].context,
            shlex.join(configured.command) if configured else "",
            found.digest,
        )
        changes = "; ".join(model.profile.changed(kind, now))
        told = f"{kind}: {changes}: run `twolane calibrate` again" if changes else ""
        if told and model.changed.get(replica.url) != told:
            log.warning("%s: the profile may be out of date: %s", model.name, told)
        model.changed[replica.url] = told

    async def _first_look(self) -> None:
        """Wait a moment for a word of every engine, so that the first request is served.

        Raises:
            SettingsError: One cannot do what the settings say.
        """
        heard = [event.wait() for event in self._heard]
        with contextlib.suppress(TimeoutError):
            # Our own engine is there, however busy the machine: it is worth waiting for.
            timings = self._timings
            wait_s = timings.embedded_start_s if self._embedded else timings.first_probe_wait_s
            async with asyncio.timeout(wait_s):
                await asyncio.gather(*heard)
        if self._misfits:
            raise SettingsError("\n".join(self._misfits))

    # Ending

    def _remove(self, name: str) -> list[asyncio.Task[None]]:
        """Serve a model no longer; returns its tasks, which are being cancelled."""
        tasks = self._tasks.pop(name, [])
        for task in tasks:
            task.cancel()
        self.catalogue.remove(name).admission.close()
        return tasks

    async def _stop(self) -> None:
        await self._loader.close()
        ending = [task for name in list(self.catalogue.models) for task in self._remove(name)]
        own = (self._relisting, self._owning, self._watching, *(task for _, task in self._kept))
        for task in filter(None, own):
            task.cancel()
            ending.append(task)
        await asyncio.gather(*ending, return_exceptions=True)
        if self.gpu is not None:
            await self.gpu.stop()
        ours = [process for process, _ in self._kept]
        ours += [self._embedded] if self._embedded is not None else []
        stops = (process.stop() for process in ours)
        for failed in await asyncio.gather(*stops, return_exceptions=True):
            if failed is not None:
                log.warning("%s", failed)
        if self._lease is not None:
            self._lease.release()
        if self.scraped is not None:
            await self.scraped.stop()
        for engine in self._engines.values():
            await engine.close()
        self._client.close()

    # What the operator may want

    def pin(self, lane: str | None) -> None:
        """Keep the work of all models that have this lane there; None: the policy decides.

        Raises:
            BadRequest: No model has this lane.
        """
        models = self.catalogue.models.values()
        if lane is not None and not any(lane in model.lanes for model in models):
            raise BadRequest(f"No model is served by {lane}.", param="lane")
        if self.gpu is not None and (lane is None or lane in self.gpu.occupants):
            self.gpu.pin(lane)
        for model in models:
            if not model.admission.scheduler.exclusive:
                known = lane is not None and lane in model.lanes
                model.admission.pin(lane if known else None)

    def release(self) -> None:
        """Give the GPU's memory to others until the next `pin`.

        Raises:
            BadRequest: No model is in an exclusive placement.
        """
        if self.gpu is None:
            raise BadRequest("No model is in an exclusive placement: there is no GPU to release.")
        self.gpu.release()

    # What it tells

    def ready(self) -> dict[str, Any]:
        """Whether any model can be answered, and what the others wait for."""
        waiting = {
            name: {lane.name: trouble for lane in _lanes(model) if (trouble := _trouble(lane))}
            for name, model in self.catalogue.models.items()
        }
        usable = [
            name
            for name, model in self.catalogue.models.items()
            if any(lane.room and not lane.barred for lane in _lanes(model))
        ]
        said: dict[str, Any] = {
            "ready": bool(usable) and not self.edge.draining and not self._starting,
            "draining": self.edge.draining,
            "models": usable,
            "waiting_for": {name: troubles for name, troubles in waiting.items() if troubles},
        }
        if self.gpu is not None:
            said["gpu"] = self.gpu.progress()
        return said

    @property
    def _starting(self) -> bool:
        """Whether all there is to serve waits for a GPU that nobody has held yet."""
        models = self.catalogue.models.values()
        return (
            self.gpu is not None
            and not self.gpu.held_once
            and all(model.admission.scheduler.exclusive for model in models)
        )

    def status(self) -> dict[str, Any]:
        """Everything the gateway knows of itself, as JSON: no key, no prompt."""
        return {
            "version": importlib.metadata.version("twolane"),
            "up_s": round(time.time() - self._began, 1),
            "in_flight": self.edge.in_flight,
            "draining": self.edge.draining,
            "gpu": self.gpu.status() if self.gpu is not None else None,
            "cost": statement(self.metrics.meter, self._settings.cost),
            "models": {
                name: _status(model, time.time()) for name, model in self.catalogue.models.items()
            },
        }


def _none_of_them() -> str:
    """Each kind of engine and its usual port, as what was not found."""
    *others, last = (f"no {kind.server} on port {kind.ports[0]}" for kind in KINDS.values())
    return f"{', '.join(others)} and {last}"


def _supervised(kind: Kind, configured: settings.EngineSettings) -> Supervised:
    """An engine of the operator's command."""
    file = configured.log or Path(tempfile.mkdtemp(prefix="twolane-")) / f"{kind}.log"
    log.info("%s is ours to start and stop (log: %s)", kind, file)
    return Supervised(configured.command, file, configured.environment)


def _stated(found: Capabilities, lane: settings.LaneSettings) -> Capabilities:
    """What an engine said it can take, corrected by what the operator knows better."""
    stated: Mapping[str, Any] = {
        name: value
        for name in ("context", "tools", "images", "embeddings")
        if (value := getattr(lane, name)) is not None
    }
    return replace(found, **stated)


def _lanes(model: Model) -> Iterable[Lane]:
    return model.admission.scheduler.lanes.values()


def _trouble(lane: Lane) -> str:
    """Why a lane takes nothing now; empty where it does."""
    if lane.barred:
        return lane.barred
    return "" if lane.room else next((r.trouble for r in lane.replicas if r.trouble), "is full")


def _profile_status(model: Model, now: float) -> dict[str, Any]:
    """What is decided by, and what speaks against it."""
    measured, refined = model.profile, model.admission.scheduler.refined
    age_s = measured.age_s(now)
    return {
        "source": measured.source,
        "told": measured.told(now),
        "measured_at": measured.measured_at or None,
        "age_s": None if age_s is None else round(age_s),
        "machine": measured.machine,
        "warnings": list(dict.fromkeys(told for told in model.changed.values() if told)),
        "refined": None
        if refined is None
        else {
            "requests": refined.requests,
            "factors": {
                lane: {str(n): round(factor, 3) for n, factor in by_level.items()}
                for lane, by_level in refined.factors.items()
                if lane in model.lanes
            },
        },
    }


def _status(model: Model, now: float) -> dict[str, Any]:
    scheduler = model.admission.scheduler
    policy = scheduler.policy
    servers = model.admission.servers
    return {
        "placement": "exclusive" if scheduler.exclusive else "shared",
        "lane": policy.lane,
        "reason": policy.reason(model.name),
        "profile": _profile_status(model, now),
        "demand": scheduler.demand,
        "waiting": scheduler.waiting,
        "moves": policy.moves,
        "lanes": {
            lane.name: {
                "running": lane.running,
                "slots": lane.room,
                "service_s": round(lane.service_s, 3),
                "replicas": [
                    {
                        "running": replica.running,
                        "slots": replica.slots,
                        "room": replica.room,
                        "state": replica.trouble or "ready",
                        "engine_running": servers[replica].activity.running,
                        "engine_waiting": servers[replica].activity.waiting,
                    }
                    for replica in lane.replicas
                ],
            }
            for lane in scheduler.lanes.values()
        },
        "decisions": [
            {"at": d.at, "lane": d.lane, "reason": d.reason, "demand": d.demand}
            for d in model.admission.decisions
        ],
    }
