"""Models are brought into memory and put out of it by hand, as with llama.cpp's router.

Loading is a request that generates nothing: it waits for its slot as others do. So the
policy chooses the lane, the GPU is brought where nobody holds it, and a hand-over waits for
it. Unloading waits for who is being answered. Both go on when whoever asked has hung up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TypeAlias

from backends.errors import BackendError
from gateway.errors import BadRequest, EngineFailed, InUse
from gateway.routing.scheduler import Ticket
from gateway.serving.admission import Admission, Residence, Server
from gateway.serving.catalogue import Catalogue, Model
from gateway.settings import Timings

log = logging.getLogger("gateway.loading")

#: What is under way, by model and lane.
Work: TypeAlias = dict[tuple[str, str | None], asyncio.Task[None]]


class Loader:
    """Loads and unloads the models of a catalogue."""

    def __init__(self, catalogue: Catalogue, timings: Timings) -> None:
        self._catalogue = catalogue
        self._timings = timings
        self._loads: Work = {}
        self._unloads: Work = {}

    def residence(self, model: Model) -> Residence:
        """Whether a model is in memory, or on its way there."""
        found = model.admission.residence()
        coming = found is Residence.UNLOADED and any(name == model.name for name, _ in self._loads)
        return Residence.LOADING if coming else found

    async def load(self, name: str) -> bool:
        """Bring a model into memory; `name@lane` chooses the lane.

        Returns:
            Whether it is there; after `load_answer_s` it may still be under way.

        Raises:
            ModelNotFound: There is none of this name.
            GatewayError: No engine can load it now.
        """
        model, pin = self._catalogue.find(name)
        if model.admission.residence(pin) is Residence.LOADED:
            return True
        return await self._done(self._loads, (model.name, pin), lambda: _load(model, pin))

    async def unload(self, name: str) -> bool:
        """Put a model out of memory; the next request for it loads it again.

        In an exclusive placement the whole GPU is given back. Otherwise the engines that load
        when they are asked let the model go; the others have it for as long as they run.

        Returns:
            Whether it is gone; after `load_answer_s` it may still be under way.

        Raises:
            ModelNotFound: There is none of this name.
            BadRequest: None of its engines ever lets it go.
            GatewayError: It is in use, or an engine failed.
        """
        model, pin = self._catalogue.find(name)
        deadline_s = self._timings.shared_unload_s
        return await self._done(
            self._unloads, (model.name, pin), lambda: _unload(model, pin, deadline_s)
        )

    async def close(self) -> None:
        """End what is under way."""
        tasks = [*self._loads.values(), *self._unloads.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _done(
        self,
        under_way: Work,
        what: tuple[str, str | None],
        work: Callable[[], Coroutine[None, None, None]],
    ) -> bool:
        """Whether it is done by now; who asks for what is under way waits for the same."""
        task = under_way.get(what)
        if task is None:
            task = under_way[what] = asyncio.create_task(work())
            task.add_done_callback(partial(_over, under_way, what))
        done, _ = await asyncio.wait((task,), timeout=self._timings.load_answer_s)
        if done:
            task.result()
        return bool(done)


def _over(under_way: Work, what: tuple[str, str | None], task: asyncio.Task[None]) -> None:
    del under_way[what]
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("%s: %s", what[0], error)  # who asked may no longer be there to be told


async def _load(model: Model, pin: str | None) -> None:
    admission = model.admission
    async with admission.slot(Ticket(pin=pin)) as replica:
        server = admission.servers[replica]
        try:
            await server.engine.load(server.model)
        except BackendError as exc:
            admission.failed(replica, exc)
            raise _failed(server, exc) from exc
        server.loaded = True


async def _unload(model: Model, pin: str | None, deadline_s: float) -> None:
    admission = model.admission
    if admission.gpu is not None:
        if admission.residence(pin) is Residence.UNLOADED:
            return  # the GPU is another engine's, or nobody's
        if not await asyncio.shield(admission.gpu.unload()):
            raise InUse("Somebody is being answered by this model. It stays in memory.")
        return
    servers = _letting_go(admission, pin)
    if not servers:
        raise BadRequest(
            "The engine keeps this model for as long as it runs: stop the engine instead.",
            param="model",
        )
    for server in servers:
        try:
            async with asyncio.timeout(deadline_s):
                await server.engine.unload(server.model)
        except TimeoutError:
            raise InUse("This model is in use. It stays in memory.") from None
        except BackendError as exc:
            raise _failed(server, exc) from exc
        server.loaded = False
        server.prober.doubt()  # what was just being asked may be out of date


def _letting_go(admission: Admission, pin: str | None) -> list[Server]:
    """Whom the model can be taken from while its engine runs on."""
    return [
        admission.servers[replica]
        for lane in admission.scheduler.lanes.values()
        if pin in (None, lane.name)
        for replica in lane.replicas
        if admission.servers[replica].engine.loads_when_asked
    ]


def _failed(server: Server, error: BackendError) -> EngineFailed:
    log.warning("%s", error)
    return EngineFailed(f"{server.engine.kind} failed to do it; the gateway's log says why.")
