"""The outermost ASGI callable: each request enters here, each response is labelled here.

The generating paths go straight to the relay; FastAPI serves everything else. There is no
middleware and no dependency injection in a stream's way: their cost would be paid for each
chunk.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from backends import calls
from gateway.errors import (
    ClientGone,
    Draining,
    GatewayError,
    MethodNotAllowed,
    Unauthorized,
)
from gateway.http.auth import Keys
from gateway.http.request import parse, read_body
from gateway.relay.exchange import Exchange, Lifeline, Message, Receive, Send
from gateway.relay.relay import Relay
from gateway.relay.reply import Reply, gateway_headers

log = logging.getLogger("gateway")

GENERATING = frozenset((calls.CHAT, calls.COMPLETIONS, calls.EMBEDDINGS))
#: Paths that change the gateway, or what is in its engines' memory; they take an admin key.
ADMIN = ("/admin", "/models/")
#: Paths that need no key: liveness, readiness, documentation.
OPEN = frozenset(("/", "/health", "/ready", "/docs", "/openapi.json"))


class ExchangeLog(Protocol):
    """Records exchanges that are over."""

    def write(self, exchange: Exchange) -> None:
        """Record one exchange."""


class InternalError(GatewayError):
    """The gateway itself has failed."""

    code = "internal_error"


class Edge:
    """The gateway as an ASGI application.

    Args:
        relay: Serves the generating paths.
        pages: Serves all other paths (FastAPI).
        keys: The API keys.
        admins: The keys for the paths of `ADMIN`.
        logs: Record every exchange when it is over.
        max_body: Size of the largest request body, bytes.

    Attributes:
        draining: Whether the gateway is shutting down: new requests receive 503.
    """

    def __init__(
        self,
        relay: Relay,
        pages: Callable[..., Any],
        keys: Keys,
        admins: Keys,
        logs: Sequence[ExchangeLog],
        *,
        max_body: int,
    ) -> None:
        self.draining = False
        self._relay = relay
        self._pages = pages
        self._keys = keys
        self._admins = admins
        self._logs = logs
        self._max_body = max_body
        self._open: set[Lifeline] = set()

    @property
    def in_flight(self) -> int:
        """Number of requests that are being served."""
        return len(self._open)

    def cut_all(self) -> None:
        """End every request that still runs: the time for draining is over."""
        for line in tuple(self._open):
            line.cut(Draining("The gateway is shutting down; the answer is not complete."))

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        exchange = Exchange(f"req_{os.urandom(16).hex()}", scope["path"])
        exchange.began = time.monotonic()
        if scope["path"] in GENERATING:
            await self._generate(scope, receive, Reply(send, exchange), exchange)
        else:
            await self._page(scope, receive, send, exchange)

    async def _generate(
        self, scope: Message, receive: Receive, reply: Reply, exchange: Exchange
    ) -> None:
        try:
            await self._answer(scope, receive, reply, exchange)
            exchange.outcome = "ok"
        except ClientGone:
            exchange.outcome = "cancelled"
        except GatewayError as error:
            exchange.outcome = "truncated" if reply.begun else error.code or error.type
            await reply.error(error)
        except Exception:
            log.exception("%s failed", exchange.id)
            exchange.outcome = "truncated" if reply.begun else "internal_error"
            await reply.error(
                InternalError(
                    "The gateway has failed. The request is not at fault; the log has the details."
                )
            )
        finally:
            exchange.ended = time.monotonic()
            for exchange_log in self._logs:
                exchange_log.write(exchange)

    async def _answer(
        self, scope: Message, receive: Receive, reply: Reply, exchange: Exchange
    ) -> None:
        if scope["method"] != "POST":
            raise MethodNotAllowed(f"Use POST for {scope['path']}.")
        if self.draining:
            raise Draining("The gateway is shutting down.", retry_after=10)
        headers: Mapping[bytes, bytes] = dict(scope["headers"])
        exchange.key = self._keys.name_of(headers)
        request = parse(scope["path"], await read_body(headers, receive, self._max_body), headers)
        exchange.model = request.model[:80]
        pin = headers.get(b"x-gateway-lane", b"").decode("latin-1") or None
        with Lifeline(receive) as line:
            self._open.add(line)
            try:
                await self._relay.serve(request, pin, exchange, reply)
            finally:
                self._open.discard(line)

    async def _page(self, scope: Message, receive: Receive, send: Send, exchange: Exchange) -> None:
        async def send_labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *gateway_headers(exchange)]
            await send(message)

        try:
            if scope["path"] not in OPEN:
                keys = self._admins if scope["path"].startswith(ADMIN) else self._keys
                keys.name_of(dict(scope["headers"]))
        except Unauthorized as error:
            await Reply(send, exchange).error(error)
            return
        await self._pages(scope, receive, send_labelled)
