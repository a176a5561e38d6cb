"""An engine that acquires the GPU and releases it.

Today a layout is one such engine, so the hand-over holds one for each layout.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence

import msgspec

from backends.base import Engine
from backends.calls import CHAT, Call
from backends.errors import BackendError, Broken, Refused, Unreachable, Unsupported
from backends.kinds import KINDS
from backends.processes.supervised import Supervised
from backends.reports import Readiness
from gateway.gpu.memory import Memory, MemoryNeed, MemoryUnknown
from gateway.settings import Timings

log = logging.getLogger("gateway.handover")


class GpuEngine:
    """One engine, its models, and its process where the gateway starts it.

    Args:
        engine: The engine.
        models: Its own names of the models it serves, the first to be loaded first.
        process: The engine's process, where the gateway starts and stops it.
        needs: What must be free before it loads, if that is known.
        away_s: How long it may be unreachable without such a process, as when its container
            restarts, seconds.
        timings: How often it is looked at, and how long its process may take to stop.
    """

    def __init__(
        self,
        engine: Engine,
        models: Sequence[str],
        *,
        process: Supervised | None = None,
        needs: MemoryNeed | None = None,
        away_s: float = 30.0,
        timings: Timings | None = None,
    ) -> None:
        self.engine = engine
        self.models = tuple(models)
        self.process = process
        self.needs = needs
        self.away_s = away_s
        # Seconds to start from nothing: assumed, until a start was measured.
        self.cold_s = KINDS[engine.kind].cold_start_s
        self._timings = timings or Timings()

    @property
    def died(self) -> bool:
        """Whether its process has ended although it should run."""
        return self.process is not None and self.process.wanted and not self.process.running

    async def is_resident(self) -> bool:
        """Whether it has a model in GPU memory now; False where it does not answer."""
        try:
            return bool(await self.engine.resident())
        except BackendError:
            return False

    async def wait_leftover_gone(self) -> None:
        """Return when the engine of a previous gateway has ended: its keepers end it.

        The wait has a limit, since another program's server may be at the same address.
        """
        if self.process is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timings.gpu_leftover_s):
                while await self.engine.ready(self.models[0]) is not Readiness.DOWN:  # noqa: ASYNC110
                    await asyncio.sleep(self._timings.gpu_poll_s)

    async def acquire(self) -> None:
        """Return when its first model is in memory; raises `BackendError`."""
        cold = self.process is not None and not (self.process.wanted and self.process.running)
        began = time.monotonic()
        if cold:
            assert self.process is not None  # noqa: S101 - it is what makes it cold
            await self.process.start()
        await self._wait_reachable()
        await self.engine.load(self.models[0])
        if cold:
            self.cold_s = time.monotonic() - began
        part = await self.engine.on_gpu(self.models[0])
        if part is not None and 0 < part < 1:  # none of it: there is no GPU
            text = "only %.0f %% of %s are on the GPU, the rest on the CPU, which is slow"
            log.warning(text, part * 100, self.models[0])

    async def _wait_reachable(self) -> None:
        """Return when it answers and has the model; raises `BackendError`."""
        began = time.monotonic()
        while True:
            readiness = await self.engine.ready(self.models[0])
            if readiness in (Readiness.READY, Readiness.ASLEEP):
                return
            if readiness is Readiness.ABSENT:
                raise Unsupported(f"{self.engine} does not have the model {self.models[0]}")
            if self.process is not None and not self.process.running:
                raise Unreachable(f"{self.engine} ended: {self.process.exit_report()}")
            if self.process is None and time.monotonic() - began > self.away_s:
                raise Unreachable(f"{self.engine} cannot be reached")
            await asyncio.sleep(self._timings.gpu_poll_s)

    async def release(self) -> None:
        """Return when its models have left the memory; raises `BackendError`."""
        try:
            for model in await self.engine.resident():
                await self.engine.unload(model)
        except (Unreachable, Broken):
            # An engine that is gone has no memory; whether that is free is checked next.
            if await self.engine.ready(self.models[0]) is not Readiness.DOWN:
                raise
        except Unsupported:
            if self.process is None:
                raise
            await self.stop()

    async def probe(self) -> None:
        """Return when it has generated a token; raises `BackendError`."""
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        raw = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in body.items()}
        with contextlib.suppress(Refused):  # it answers, only not to this
            await self.engine.fetch_answer(Call(CHAT, raw), self.models[0])

    async def stop(self) -> None:
        """End its process, where the gateway started it."""
        if self.process is not None:
            await self.process.stop(self._timings.engine_stop_s)


class FreeMemoryWait:
    """Waits until an engine's memory is free; `shortage` says what was missing at the last look.

    Args:
        engine: The engine that is to load.
        memory: Where the free memory is read.
        poll_s: Between two looks, seconds.
    """

    def __init__(self, engine: GpuEngine, memory: Memory, poll_s: float) -> None:
        self.shortage = ""
        self._engine = engine
        self._memory = memory
        self._poll_s = poll_s

    async def wait(self) -> None:
        """Return when there is room for the engine, as far as the memory can be read."""
        needs = self._engine.needs
        if needs is None:
            return
        if await self._engine.is_resident():
            return  # what it needs, it has
        while True:
            try:
                self.shortage = await asyncio.to_thread(needs.shortage, self._memory)
            except MemoryUnknown as exc:
                log.warning("cannot see the memory: %s", exc)
                return
            if not self.shortage:
                return
            await asyncio.sleep(self._poll_s)
