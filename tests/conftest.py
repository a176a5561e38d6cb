"""What all tests share: the event loop the gateway runs on, and a gateway to talk to."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import httpx
import pytest

from backends.transport import http
from gateway import settings
from gateway.app import Gateway
from gateway.gpu.memory import Memory, Nvml
from gateway.serve import GracefulServer, listen
from gateway.serving import discovery
from gateway.settings import Timings


@dataclass(frozen=True, slots=True)
class Running:
    """A gateway that serves on a real port, and a client pointed at it."""

    url: str
    gateway: Gateway
    http: httpx.AsyncClient

    async def status(self, model: str) -> dict[str, Any]:
        """What `/status` says of a model."""
        said: dict[str, Any] = (await self.http.get("/status")).json()["models"][model]
        return said

    async def until(self, condition: Callable[[Gateway], object], within_s: float = 5.0) -> None:
        """Return when the condition holds; a readiness, a count."""
        async with asyncio.timeout(within_s):
            while not condition(self.gateway):
                await asyncio.sleep(0.005)


StartGateway: TypeAlias = Callable[..., AbstractAsyncContextManager[Running]]


def unavailable(what: str) -> NoReturn:
    """Skip what cannot be done here, and fail in CI; `what` is missing, and how to get it."""
    if os.environ.get("CI") == "true":
        pytest.fail(what)
    pytest.skip(what)


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

    Engines are looked for on `ports` only: what a contributor's machine runs is not ours.
    """
    read = settings.load(None, {"port": 0, "log": "off", **overrides}, {})
    async with Gateway(
        read, ports or {}, client=upstream, memory=memory, nvml=nvml, timings=timings
    ) as gateway:
        listener = listen(read)
        server = GracefulServer(gateway, read)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            while not server.started:
                await asyncio.sleep(0.001)
            async with httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as client:
                yield Running(url, gateway, client)
        finally:
            gateway.edge.draining = True  # a chat page comes again at once
            gateway.edge.cut_all()
            server.should_exit = True
            await serving


@pytest.fixture
def start_gateway() -> StartGateway:
    """What starts a gateway, with the settings it is given, for an `async with`."""
    return run_gateway


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """The loop that the gateway runs on."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A contributor's own TWOLANE_* variables are not for the tests."""
    for name in os.environ:
        if name.startswith("TWOLANE_"):
            monkeypatch.delenv(name)
