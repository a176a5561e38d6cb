"""`/metrics`, for Prometheus: among the gateway's pages, or on its own port.

On its own port it requires no key, so another site's page must not read it through a browser
in the same network. A request with an `Origin`, a cross-site fetch, and a `Host` that could
be another site's name are refused. With such a `Host` a site can make a browser believe that
our address is the site's own (DNS rebinding).
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

#: The metrics and their content type, for an `Accept` header; may raise GatewayError.
Exposition: TypeAlias = Callable[[str], tuple[bytes, str]]
Page: TypeAlias = Callable[[Request], Awaitable[Response]]


def page(exposition: Exposition) -> Page:
    """The endpoint of `/metrics`."""

    async def metrics(request: Request) -> Response:
        """The metrics, in the format that the client accepts."""
        text, kind = exposition(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": kind, "cache-control": "no-store"})

    return metrics


def _same_network_only(answer: Page) -> Page:
    """The page, which raises Forbidden where another site reads it through a browser."""

    async def guarded(request: Request) -> Response:
        headers = request.headers
        if "origin" in headers or headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            raise Forbidden("Pages of other sites may not read metrics.")
        if not _is_local_name(headers.get("host", "")):
            raise Forbidden(
                "Use this machine's address, its host name, or a name without a dot for metrics."
            )
        return await answer(request)

    return guarded


def _is_local_name(host: str) -> bool:
    """Whether a `Host` cannot be another site's name."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    plain = bool(name) and name.replace("-", "").replace("_", "").isalnum()  # as in Docker
    return plain or name == socket.gethostname().lower()


class MetricsServer(uvicorn.Server):
    """Serves `/metrics` alone, on its own port, for as long as the gateway runs.

    Args:
        exposition: Writes the metrics.
        host: Address to listen on.
        port: Port to listen on; 0: any free port.

    Attributes:
        port: The port it listens on.
        url: The address of the page.

    Raises:
        OSError: It cannot listen on this port.
    """

    def __init__(self, exposition: Exposition, host: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://{host}:{self.port}{PATH}"
        self._serving: asyncio.Task[None] | None = None
        app = Starlette(
            routes=[Route(PATH, _same_network_only(page(exposition)), methods=["GET"])],
            exception_handlers={GatewayError: _error_response},
        )
        super().__init__(
            uvicorn.Config(
                app,
                loop="none",  # the running one
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
        """Handle no signals: the gateway handles them."""
        yield

    def start(self) -> None:
        """Serve until `stop`."""
        self._serving = asyncio.create_task(self.serve(sockets=[self._listener]))

    async def stop(self) -> None:
        """Return when it no longer serves."""
        self.should_exit = self.force_exit = True
        if self._serving is not None:
            await self._serving


async def _error_response(_: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)  # noqa: S101 - it is called for no other
    return Response(error.envelope(), error.status, media_type="application/json")
