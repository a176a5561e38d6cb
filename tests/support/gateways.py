"""A gateway that serves on a real port, in the event loop of the test."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import httpx

from backends.transport import http
from gateway import settings
from gateway.app import Gateway
from gateway.gpu.cards import Nvml
from gateway.gpu.memory import Memory
from gateway.serve import GracefulServer, listen
from gateway.serving import discovery
from gateway.settings import Settings, Timings
from tests.support.plain_http import async_client
from tests.support.waiting import until


@dataclass(frozen=True, slots=True)
class Running:
    """A gateway that serves on a real port, and a client pointed at it."""

    url: str
    gateway: Gateway
    http: httpx.AsyncClient

    async def status(self, model: str) -> dict[str, Any]:
        """What `/status` says of a model."""
        entry: dict[str, Any] = (await self.http.get("/status")).json()["models"][model]
        return entry

    async def until(self, condition: Callable[[Gateway], object], within_s: float = 5.0) -> None:
        """Return when the condition holds of the gateway: a readiness, a count."""
        await until(lambda: condition(self.gateway), within_s)


StartGateway: TypeAlias = Callable[..., AbstractAsyncContextManager[Running]]


@asynccontextmanager
async def run_gateway(
    *,
    ports: discovery.Ports | None = None,
    upstream: http.Client | None = None,
    memory: Memory | None = None,
    nvml: Nvml | None = None,
    timings: Timings | None = None,
    **overrides: Any,
) -> AsyncIterator[Running]:
    """A gateway with these settings, as `twolane serve` runs it, in this event loop.

    Engines are searched on `ports` only: a contributor's own engines stay out of the tests.
    """
    read = settings.load(None, {"port": 0, "log": "off", **overrides}, {})
    async with Gateway(
        read, ports or {}, client=upstream, memory=memory, nvml=nvml, timings=timings
    ) as gateway:
        listener = listen(read)
        server = PromptServer(gateway, read)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            await until(lambda: server.started, every_s=0)
            async with async_client(url, timeout=20) as client:
                yield Running(url, gateway, client)
        finally:
            gateway.edge.draining = True  # a chat page reconnects at once
            gateway.edge.cut_all()
            server.stop()
            await serving


class PromptServer(GracefulServer):
    """The product's server, which stops as soon as it may.

    uvicorn's own looks ten times a second whether it shall stop, and sleeps 100 ms while it
    does: about 170 ms for each of some hundred gateways.
    """

    def __init__(self, gateway: Gateway, read: Settings) -> None:
        super().__init__(gateway, read)
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Serve what runs to its end, then return from `serve`."""
        self.should_exit = True
        self._stopping.set()

    async def main_loop(self) -> None:
        """uvicorn's, without the rest of the tick at the end."""
        ticks = 0
        while not await self.on_tick(ticks):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), 0.1)
            ticks += 1

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's, with conditions awaited in place of sleeps."""
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        state = self.server_state
        for connection in list(state.connections):
            connection.shutdown()
        await until(lambda: self.force_exit or not (state.connections or state.tasks), 60)
        for server in self.servers:
            await server.wait_closed()
