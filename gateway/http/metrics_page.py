"""`/metrics`, for Prometheus: among the gateway's pages, or on a port of its own.

On its own port it asks for no key, so it must not be read through a browser that stands in
the same network: what comes from another site's page is refused, by its `Origin` or by what
the browser says of it, and so is a `Host` that is a stranger's name, with which a site can
make a browser believe that our address is its own (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeAlias
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.errors import Forbidden, GatewayError

PATH = "/metrics"

#: Text and content type, for what the asker accepts.
Exposition: TypeAlias = Callable[[str], tuple[bytes, str]]
Page: TypeAlias = Callable[[Request], Awaitable[Response]]


def page(exposition: Exposition) -> Page:
    """What answers at `/metrics`."""

    async def metrics(request: Request) -> Response:
        """Everything that Prometheus may want to know."""
        text, kind = exposition(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": kind, "cache-control": "no-store"})

    return metrics


def _for_neighbours(answer: Page) -> Page:
    """The same page, but Forbidden where another site asks through somebody's browser."""

    async def guarded(request: Request) -> Response:
        headers = request.headers
        if "origin" in headers or headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            raise Forbidden("Metrics are not for other sites' pages.")
        if not _is_near(headers.get("host", "")):
            raise Forbidden(
                "Ask for metrics by address, by this machine's name, or by a name without a dot."
            )
        return await answer(request)

    return guarded


def _is_near(host: str) -> bool:
    """Whether this `Host` cannot be the name of somebody's site."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    plain = bool(name) and name.replace("-", "").replace("_", "").isalnum()  # as Docker's are
    return plain or name == socket.gethostname().lower()


class MetricsServer(uvicorn.Server):
    """Serves `/metrics` alone, beside the gateway and as long as it.

    Args:
        exposition: What it says.
        host: Address to listen on.
        port: Port to listen on; 0: any.

    Attributes:
        port: Where it listens.
        url: Of the page.

    Raises:
        OSError: It cannot listen there.
    """

    def __init__(self, exposition: Exposition, host: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://{host}:{self.port}{PATH}"
        self._serving: asyncio.Task[None] | None = None
        app = Starlette(
            routes=[Route(PATH, _for_neighbours(page(exposition)), methods=["GET"])],
            exception_handlers={GatewayError: _error_response},
        )
        super().__init__(
            uvicorn.Config(
                app,
                loop="none",  # the one that runs
                lifespan="off",
                access_log=False,
                log_config=None,
                log_level="warning",
                server_header=False,
                ws="none",
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None: they are the gateway's."""
        yield

    def start(self) -> None:
        """Serve until `stop`."""
        self._serving = asyncio.create_task(self.serve(sockets=[self._listener]))

    async def stop(self) -> None:
        """Return when it serves no more."""
        self.should_exit = self.force_exit = True
        if self._serving is not None:
            await self._serving


async def _error_response(_: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)  # noqa: S101 - it is called for no other
    return Response(error.envelope(), error.status, media_type="application/json")
