"""Asks each replica, again and again, whether it is ready."""

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
    """Asks one replica again and again whether it is ready for one model.

    Args:
        engine: The replica.
        model: The engine's own name of the model.
        timings: How often it is asked.
    """

    def __init__(self, engine: Engine, model: str, timings: Timings) -> None:
        self._engine = engine
        self._model = model
        self._timings = timings
        self._doubt = asyncio.Event()
        self._asked = 0

    def doubt(self) -> None:
        """Ask again at once: a request has just failed."""
        self._doubt.set()

    def disregard(self) -> None:
        """What is being asked now is out of date already: the engine has just been woken."""
        self._asked += 1
        self._doubt.set()

    async def run(self, tell: Callable[[Readiness], Awaitable[None]]) -> None:
        """Ask for ever, often while it is not ready, and tell every answer."""
        last: Readiness | None = None
        while True:
            self._doubt.clear()
            asked = self._asked
            readiness = await self._engine.ready(self._model)
            if asked != self._asked:
                continue
            if readiness is not last:
                log.info("%s for %s: %s", self._engine, self._model, readiness)
                last = readiness
            await tell(readiness)
            if readiness is Readiness.READY:
                pause = self._timings.probe_interval_healthy_s
            else:
                pause = self._timings.probe_interval_unhealthy_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._doubt.wait()
