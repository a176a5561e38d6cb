"""Models are loaded and unloaded by hand, as with llama.cpp's router.

Loading is a request that generates nothing: it waits for its slot like any other. So the
policy chooses the lane, an engine takes the GPU where none holds it, and a hand-over waits
for the load. Unloading waits for running answers. Both go on when the client hangs up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TypeAlias

from backends.base import Engine
from backends.errors import BackendError
from gateway.errors import BadRequest, EngineFailed, InUse
from gateway.routing.lanes import Ticket
from gateway.serving.admission import Admission
from gateway.serving.catalogue import Catalogue, Model
from gateway.serving.outlook import Residence
from gateway.serving.replica_server import ReplicaServer
from gateway.settings import Timings

log = logging.getLogger("gateway.loading")

#: Loads or unloads under way, by model and pinned lane.
Tasks: TypeAlias = dict[tuple[str, str | None], asyncio.Task[None]]


class Loader:
    """Loads and unloads the models of a catalogue."""

    def __init__(self, catalogue: Catalogue, timings: Timings) -> None:
        self._catalogue = catalogue
        self._timings = timings
        self._loads: Tasks = {}
        self._unloads: Tasks = {}

    def residence(self, model: Model) -> Residence:
        """Whether a model is in memory, or being loaded."""
        residence = model.admission.residence()
        loading = any(name == model.name for name, _ in self._loads)
        return Residence.LOADING if loading and residence is Residence.UNLOADED else residence

    async def load(self, name: str) -> bool:
        """Load a model into memory; `name@lane` chooses the lane.

        Returns:
            Whether it is loaded; after `load_answer_s` the load may still be under way.

        Raises:
            ModelNotFound: There is no model of this name.
            GatewayError: No engine can load it now.
        """
        model, pin = self._catalogue.find(name)
        if model.admission.residence(pin) is Residence.LOADED:
            return True
        return await self._finished_in_time(
            self._loads, (model.name, pin), lambda: _load(model, pin)
        )

    async def unload(self, name: str) -> bool:
        """Unload a model; the next request for it loads it again.

        In an exclusive placement the GPU is released. Otherwise the engines that load a model
        on demand unload it; the others keep it for as long as they run.

        Returns:
            Whether it is unloaded; after `load_answer_s` the unload may still be under way.

        Raises:
            ModelNotFound: There is no model of this name.
            BadRequest: None of its engines can unload it.
            GatewayError: It is in use, or an engine failed.
        """
        model, pin = self._catalogue.find(name)
        deadline_s = self._timings.shared_unload_s
        return await self._finished_in_time(
            self._unloads, (model.name, pin), lambda: _unload(model, pin, deadline_s)
        )

    async def close(self) -> None:
        """Cancel the loads and unloads under way."""
        tasks = [*self._loads.values(), *self._unloads.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _finished_in_time(
        self,
        under_way: Tasks,
        key: tuple[str, str | None],
        work: Callable[[], Coroutine[None, None, None]],
    ) -> bool:
        """Whether the work is done in time; a second request waits for the same task."""
        task = under_way.get(key)
        if task is None:
            task = under_way[key] = asyncio.create_task(work())
            task.add_done_callback(partial(_on_done, under_way, key))
        done, _ = await asyncio.wait((task,), timeout=self._timings.load_answer_s)
        if done:
            task.result()
        return bool(done)


def _on_done(under_way: Tasks, key: tuple[str, str | None], task: asyncio.Task[None]) -> None:
    del under_way[key]
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("%s: %s", key[0], error)  # the client may have hung up


async def _load(model: Model, pin: str | None) -> None:
    admission = model.admission
    async with admission.slot(Ticket(pin=pin)) as grant:
        try:
            await grant.engine.load(grant.model)
        except BackendError as exc:
            grant.failed(exc)
            raise _failed(grant.engine, exc) from exc
        grant.loaded()


async def _unload(model: Model, pin: str | None, deadline_s: float) -> None:
    admission = model.admission
    if admission.gpu is not None:
        if admission.residence(pin) is Residence.UNLOADED:
            return  # another engine holds the GPU, or none does
        if not await asyncio.shield(admission.gpu.unload()):
            raise InUse(
                "The model is answering requests and stays in memory. Try again when they are over."
            )
        return
    servers = _unloading_servers(admission, pin)
    if not servers:
        raise BadRequest(
            "The engine keeps this model in memory for as long as it runs. To free the memory, "
            "stop the engine instead.",
            param="model",
        )
    for server in servers:
        try:
            async with asyncio.timeout(deadline_s):
                await server.engine.unload(server.model)
        except TimeoutError:
            raise InUse(
                "The model is in use and stays in memory. Try again when its requests are over."
            ) from None
        except BackendError as exc:
            raise _failed(server.engine, exc) from exc
        server.loaded = False
        server.prober.probe_now()  # the result of the probe under way may be out of date


def _unloading_servers(admission: Admission, pin: str | None) -> list[ReplicaServer]:
    """The servers that can unload the model while their engine runs on."""
    return [
        admission.servers[replica]
        for lane in admission.scheduler.lanes.values()
        if pin in (None, lane.name)
        for replica in lane.replicas
        if admission.servers[replica].engine.loads_when_asked
    ]


def _failed(engine: Engine, error: BackendError) -> EngineFailed:
    log.warning("%s", error)
    return EngineFailed(
        f"{engine.kind} failed to load or unload the model; the gateway's log has the reason."
    )
