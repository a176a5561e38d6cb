"""The response on its way to the client, and the headers that it carries."""

from __future__ import annotations

import time

from backends.transport import sse
from gateway.errors import GatewayError
from gateway.relay.exchange import Exchange, Headers, Send


class Reply:
    """The response to one client: JSON or a stream; `begun` once its headers are out.

    Attributes:
        begun: Whether the headers were sent.
        last: When an event was sent last, seconds on the monotonic clock.
    """

    def __init__(self, send: Send, exchange: Exchange) -> None:
        self.begun = False
        self.last = 0.0
        self._send = send
        self._exchange = exchange

    async def whole(self, status: int, body: bytes, extra: Headers | None = None) -> None:
        """Send a JSON response in one piece."""
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
        """Send events of a stream; the first ones begin it."""
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
        """End the stream."""
        await self._send({"type": "http.response.body", "body": b""})

    async def error(self, error: GatewayError) -> None:
        """Send a failure: as the response, or as an event where a stream has begun."""
        if not self.begun:
            await self.whole(error.status, error.envelope(), error.headers())
            return
        await self.events(b"data: " + error.envelope() + b"\n\n" + sse.DONE)
        await self.end()


def gateway_headers(exchange: Exchange) -> Headers:
    """The headers of every response: request id, lane, and why that lane."""
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
