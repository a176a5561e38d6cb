"""The outermost ASGI callable: every request comes in here, every answer is marked here.

The paths that generate go straight to the relay; everything else is FastAPI's. No
middleware, no dependency injection on the way of a stream: what they cost is paid for
each of a stream's chunks.
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
from gateway.relay.reply import Reply, told

log = logging.getLogger("gateway")

GENERATING = frozenset((calls.CHAT, calls.COMPLETIONS, calls.EMBEDDINGS))
#: What changes the gateway, or what its engines have in memory, is below these.
ADMIN = ("/admin", "/models/")
#: What anybody may see: whether it lives, and how to use it.
OPEN = frozenset(("/", "/health", "/ready", "/docs", "/openapi.json"))


class ExchangeLog(Protocol):
    """Takes note of every exchange that is over."""

    def write(self, exchange: Exchange) -> None: ...


class InternalError(GatewayError):
    """A fault of the gateway's own."""

    code = "internal_error"


class Edge:
    """The gateway as an ASGI application.

    Args:
        relay: Serves what generates.
        pages: Serves everything else (FastAPI).
        keys: Who is let in.
        admins: Who may change what the gateway does.
        logs: Are told of every exchange.
        max_body: The largest body, bytes.
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
        """Requests being served."""
        return len(self._open)

    def cut_all(self) -> None:
        """End what still runs: the time for draining is over."""
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
            await reply.error(InternalError("The gateway failed. This is our fault, not yours."))
        finally:
            exchange.ended = time.monotonic()
            for each in self._logs:
                each.write(exchange)

    async def _answer(
        self, scope: Message, receive: Receive, reply: Reply, exchange: Exchange
    ) -> None:
        if scope["method"] != "POST":
            raise MethodNotAllowed(f"Use POST for {scope['path']}.")
        if self.draining:
            raise Draining("The gateway is shutting down.", retry_after=10)
        headers: Mapping[bytes, bytes] = dict(scope["headers"])
        exchange.key = self._keys.holder(headers)
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
        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *told(exchange)]
            await send(message)

        try:
            if scope["path"] not in OPEN:
                keys = self._admins if scope["path"].startswith(ADMIN) else self._keys
                keys.holder(dict(scope["headers"]))
        except Unauthorized as error:
            await Reply(send, exchange).error(error)
            return
        await self._pages(scope, receive, marked)
