"""Probes each replica, again and again, for whether it is ready."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from backends.base import Engine
from backends.reports import Readiness
from gateway.settings import Timings

log = logging.getLogger("gateway.health")


class Prober:
    """Probes one replica for whether it is ready to serve one model.

    Args:
        engine: The replica.
        model: The engine's own name of the model.
        timings: The pauses between two probes.
    """

    def __init__(self, engine: Engine, model: str, timings: Timings) -> None:
        self._engine = engine
        self._model = model
        self._timings = timings
        self._due = asyncio.Event()
        self._generation = 0

    def probe_now(self) -> None:
        """Probe at once: a request has just failed."""
        self._due.set()

    def discard_pending(self) -> None:
        """Drop the result of the probe under way, and probe again: the engine has just woken."""
        self._generation += 1
        self._due.set()

    async def run(self, on_result: Callable[[Readiness], Awaitable[None]]) -> None:
        """Probe until cancelled, more often while the replica is not ready.

        Args:
            on_result: Called with the result of each probe.
        """
        last: Readiness | None = None
        while True:
            self._due.clear()
            generation = self._generation
            readiness = await self._engine.ready(self._model)
            if generation != self._generation:
                continue
            if readiness is not last:
                log.info("%s for %s: %s", self._engine, self._model, readiness)
                last = readiness
            await on_result(readiness)
            if readiness is Readiness.READY:
                pause_s = self._timings.probe_interval_healthy_s
            else:
                pause_s = self._timings.probe_interval_unhealthy_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._due.wait()
