"""The answer on its way to the client, and the headers that it carries."""

from __future__ import annotations

import time

from backends.transport import sse
from gateway.errors import GatewayError
from gateway.relay.exchange import Exchange, Headers, Send


class Reply:
    """The answer on its way to the client; knows whether it has begun."""

    def __init__(self, send: Send, exchange: Exchange) -> None:
        self.begun = False
        self.last = 0.0
        self._send = send
        self._exchange = exchange

    async def whole(self, status: int, body: bytes, extra: Headers | None = None) -> None:
        """An answer in one piece, JSON."""
        self.begun = True
        self._exchange.status = status
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *gateway_headers(self._exchange),
            *(extra or ()),
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def events(self, data: bytes) -> None:
        """Some events of a stream, which begins with the first of them."""
        if not self.begun:
            self.begun = True
            self._exchange.status = 200
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
                *gateway_headers(self._exchange),
            ]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        self.last = time.monotonic()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        """The stream is over."""
        await self._send({"type": "http.response.body", "body": b""})

    async def error(self, error: GatewayError) -> None:
        """Tell the client of a failure: as an answer, or as an event where one has begun."""
        if not self.begun:
            await self.whole(error.status, error.envelope(), error.headers())
            return
        await self.events(b"data: " + error.envelope() + b"\n\n" + sse.DONE)
        await self.end()


def gateway_headers(exchange: Exchange) -> Headers:
    """The headers that every answer carries: its id, its lane and why."""
    headers = [
        (b"x-request-id", exchange.id.encode()),
        (b"x-gateway-lane", exchange.lane.encode() or b"none"),
        (b"x-gateway-reason", exchange.reason.encode("ascii", "replace") or b"the gateway's own"),
    ]
    if exchange.dropped:
        names = ",".join(exchange.dropped)[:512]
        safe = "".join(c if c.isprintable() else "?" for c in names)
        headers.append((b"x-gateway-dropped", safe.encode("ascii", "replace")))
    return headers
