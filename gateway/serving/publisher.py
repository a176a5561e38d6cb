"""Models put into service and taken out of it: lanes, replicas, admission, monitors."""

from __future__ import annotations

import asyncio
import contextlib

from backends.kinds import KINDS
from backends.reports import Capabilities
from gateway.gpu.handover import Gpu
from gateway.routing import profile
from gateway.routing.breaker import Breaker
from gateway.routing.lanes import Lane, Replica
from gateway.routing.policy_shared import SharedPolicy
from gateway.routing.refine import ProfileRefiner
from gateway.routing.regret import RoutedModel
from gateway.routing.scheduler import Scheduler
from gateway.serving.admission import Admission
from gateway.serving.catalogue import Catalogue, Model
from gateway.serving.engines import EnginePool
from gateway.serving.monitor import ReplicaMonitor, stated_capabilities
from gateway.serving.prober import Prober
from gateway.serving.replica_server import ReplicaServer
from gateway.settings import ModelSettings, Settings, SettingsError, Timings


class Publisher:
    """Publishes models in the catalogue, and watches their replicas until they are withdrawn.

    Args:
        settings: The gateway's configuration.
        pool: The engines.
        catalogue: Where the models are listed.
        timings: How often replicas are probed.

    Attributes:
        gpu: The GPU that the models in exclusive placement share; None without any.
    """

    def __init__(
        self, settings: Settings, pool: EnginePool, catalogue: Catalogue, timings: Timings
    ) -> None:
        self.gpu: Gpu | None = None
        self._settings = settings
        self._pool = pool
        self._catalogue = catalogue
        self._timings = timings
        self._monitors: dict[str, dict[asyncio.Task[None], ReplicaMonitor]] = {}  # by model

    def publish(self, name: str, configured: ModelSettings) -> None:
        """Serve a model from now on."""
        model = self._model(name, configured)
        self._catalogue.add(model)
        monitors = [
            ReplicaMonitor(
                model, replica, lane.name, configured.lanes[lane.name],
                self._settings.engines.get(lane.name), self._timings,
            )
            for lane in model.admission.scheduler.lanes.values()
            for replica in lane.replicas
        ]  # fmt: skip
        self._monitors[name] = {asyncio.create_task(each.run()): each for each in monitors}

    def withdraw(self, name: str) -> list[asyncio.Task[None]]:
        """Serve a model no longer; returns its monitors' tasks, which are being cancelled."""
        tasks = list(self._monitors.pop(name, {}))
        for task in tasks:
            task.cancel()
        self._catalogue.remove(name).admission.close()
        return tasks

    async def first_results(self, within_s: float) -> None:
        """Wait for a first probe of every replica, so that the first request is served.

        An engine that does not answer in time is not fatal: it may come later.

        Raises:
            SettingsError: An engine cannot do what the settings promise.
        """
        monitors = [each for of_model in self._monitors.values() for each in of_model.values()]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await asyncio.gather(*(monitor.first_result.wait() for monitor in monitors))
        misfits = [monitor.misfit for monitor in monitors if monitor.misfit]
        if misfits:
            raise SettingsError("\n".join(misfits))

    async def close(self) -> None:
        """Withdraw every model, and return when their monitors have ended."""
        ending = [task for name in list(self._catalogue.models) for task in self.withdraw(name)]
        await asyncio.gather(*ending, return_exceptions=True)

    def _model(self, name: str, configured: ModelSettings) -> Model:
        """A model and all that serves it."""
        lanes: list[Lane] = []
        servers: dict[Replica, ReplicaServer] = {}
        for kind, lane in configured.lanes.items():
            replicas = []
            for url in lane.urls or self._pool.urls[kind]:
                engine = self._pool.engine(kind, url)
                replica = Replica(url, lane.slots or KINDS[kind].slots)
                prober = Prober(engine, lane.model, self._timings)
                servers[replica] = ReplicaServer(engine, lane.model, Breaker(replica.slots), prober)
                replicas.append(replica)
            lanes.append(Lane(kind, replicas, lane.queue))
        gpu = self.gpu if configured.placement == "exclusive" else None
        known = model_profile(configured)
        refined = None
        if configured.refine and known.source == "measured":
            refined = ProfileRefiner(known, {lane.name: lane.slots for lane in lanes})
        ref = gpu.ref if gpu is not None else None
        policy = gpu.policy if gpu is not None else _shared_policy(name, configured, known)
        admission = Admission(
            Scheduler(lanes, policy, model=name, gpu=ref, refined=refined),
            servers,
            max_wait_s=self._settings.limits.max_wait_s,
            gpu=gpu,
        )
        model = Model(name, admission, known)
        model.can = {
            kind: stated_capabilities(Capabilities(), lane)
            for kind, lane in configured.lanes.items()
        }
        return model


def model_profile(configured: ModelSettings) -> profile.Profile:
    """The profile that a model is decided by; raises SettingsError where it cannot be used."""
    if configured.profile is None:
        return profile.ASSUMED
    try:
        return profile.load(configured.profile)
    except profile.ProfileError as exc:
        raise SettingsError(str(exc)) from exc


def _shared_policy(name: str, configured: ModelSettings, known: profile.Profile) -> SharedPolicy:
    """The policy of one model whose lanes are in memory together."""
    lanes = tuple(configured.lanes)
    return SharedPolicy(lanes, {name: RoutedModel(lanes, known)}, pin=configured.pin)
