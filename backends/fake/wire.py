"""HTTP/1.1 of a server, down to the byte, and the moment when a client hung up.

It uses no framework, since the faults to be played lie below what a framework allows. One
task answers the requests of one connection in order. It is cancelled when the connection
ends, so every wait in an answer ends with its client.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Literal, cast
from urllib.parse import parse_qsl, unquote

import httptools
import msgspec


@dataclass(slots=True, eq=False)
class Received:
    """One request, as it came.

    Attributes:
        headers: Names in lower case.
        at: When it arrived, monotonic seconds.
        body: The JSON, or the bytes where it is not JSON.
        ended: None while the answer lasts; "done" when it was played to its end, whatever
            that was; otherwise the client hung up, or the engine went down.
    """

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    raw: bytes
    at: float
    body: Any = None
    keep_alive: bool = True
    ended: Literal["done", "hung up", "down"] | None = None


class Spent(Exception):
    """The allowance of bytes has been sent."""


class Reply:
    """The answer to one request. It ends as HTTP requires, unless a step ends it otherwise."""

    def __init__(self, connection: Connection, request: Received) -> None:
        self._connection = connection
        self._keep_alive = request.keep_alive
        self._only_head = request.method == "HEAD"
        self._framing: Literal["raw", "chunked", "length"] = "raw"
        #: Whether a head was sent.
        self.begun = False
        #: Bytes that may still be sent; None: no limit.
        self.allowance: int | None = None
        self.over = False

    async def head(
        self,
        status: int,
        headers: Mapping[str, str],
        *,
        length: int | None = None,
        chunked: bool = True,
    ) -> None:
        """Send the status line and the headers; they decide how the body is framed."""
        try:
            phrase = HTTPStatus(status).phrase
        except ValueError:
            phrase = ""
        self.begun = True
        lines = [f"HTTP/1.1 {status} {phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if length is not None:
            self._framing = "length"
            lines.append(f"content-length: {length}")
        elif chunked:
            self._framing = "chunked"
            lines.append("transfer-encoding: chunked")
        if not self._keep_alive:
            lines.append("connection: close")
        await self._write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))

    async def send(self, data: bytes, split: int | None = None) -> None:
        """Send a part of the body; return when the kernel has it."""
        if self._only_head:
            return
        if split is None:
            await self._write(self._framed(data))
            return
        for start in range(0, len(data), split):
            await self._write(self._framed(data[start : start + split]))
            await asyncio.sleep(0)  # so a reader in this loop receives the piece alone

    async def whole(
        self, status: int, body: bytes, headers: Mapping[str, str], *, close: bool = False
    ) -> None:
        """Send a whole answer with its length."""
        self._keep_alive = self._keep_alive and not close
        await self.head(status, headers, length=len(body))
        await self.send(body)

    async def end(self, *, close: bool = False) -> None:
        """End the body as HTTP requires; a body without framing ends with the connection."""
        if self.over:
            return
        if self._framing == "chunked":
            await self._write(b"0\r\n\r\n")
        if self._framing == "raw" or close or not self._keep_alive:
            self.close()
        self.over = True

    def close(self) -> None:
        """Close the connection; what was sent arrives."""
        self.over = True
        self._connection.close()

    def reset(self) -> None:
        """Close the connection with a reset."""
        self.over = True
        self._connection.reset()

    def _framed(self, data: bytes) -> bytes:
        if self._framing != "chunked" or not data:
            return data
        return b"%x\r\n%b\r\n" % (len(data), data)

    async def _write(self, data: bytes) -> None:
        if self.allowance is None:
            await self._connection.write(data)
            return
        allowed = data[: self.allowance]
        self.allowance -= len(allowed)
        await self._connection.write(allowed)
        if not self.allowance:
            raise Spent


class Connection(asyncio.Protocol):
    """One client's connection. `httptools` calls the `on_` methods, asyncio the others."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._requests: asyncio.Queue[Received] = asyncio.Queue()
        self._writable = asyncio.Event()
        self._writable.set()
        self._ended_by_us = False
        self._url = b""
        self._headers: dict[str, str] = {}
        self._body = bytearray()
        self._parser = httptools.HttpRequestParser(self)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast("asyncio.Transport", transport)  # uvloop has its own
        if not self._server.listening:  # accepted just before it went down
            self.reset()
        # A write ends when the kernel has all of it. Only then is the next one a packet of
        # its own, and only then does a reset not discard it.
        transport.set_write_buffer_limits(high=0)
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._server.connections.add(self)
        self._server.accepted += 1
        self._server.changed()
        self._task = asyncio.get_running_loop().create_task(self._answer_all())

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            body = b"not HTTP\n"
            self._transport.write(
                b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n"
                b"content-length: %d\r\n\r\n%b" % (len(body), body)
            )
            self.close()

    def eof_received(self) -> None:
        # Clients of these engines do not half-close, so this one has hung up.
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._server.changed()
        self._task.cancel()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # httptools

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        before = self._headers.get(key)
        self._headers[key] = text if before is None else f"{before}, {text}"

    def on_headers_complete(self) -> None:
        if self._headers.get("expect", "").lower() == "100-continue":
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        path, _, query = self._url.partition(b"?")
        raw = bytes(self._body)
        request = Received(
            method=self._parser.get_method().decode("latin-1"),
            path=unquote(path.decode("latin-1")),
            query=dict(parse_qsl(query.decode("latin-1"))),
            headers=self._headers,
            raw=raw,
            at=time.monotonic(),
            body=_json_or_bytes(raw),
            keep_alive=self._parser.should_keep_alive(),
        )
        self._url, self._headers, self._body = b"", {}, bytearray()
        self._requests.put_nowait(request)

    # Answering

    async def _answer_all(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._server.keep_alive_s):
                    request = await self._requests.get()
            except TimeoutError:
                self.close()  # idle for too long
                return
            reply = Reply(self, request)
            try:
                await self._server.answer(request, reply)
                await reply.end()
            except asyncio.CancelledError:
                # Reported only now, when the answer has released its slot.
                request.ended = "down" if self._ended_by_us else "hung up"
                self._server.ended(request)
                raise
            except Exception as exc:  # noqa: BLE001 - raised again when the engine closes
                # A mistake in this package, or in a script.
                self._server.mistakes.append(exc)
                self.reset()
            request.ended = "done"
            self._server.ended(request)
            if self._ended_by_us:
                return

    async def write(self, data: bytes) -> None:
        self._transport.write(data)
        await self._writable.wait()

    def close(self) -> None:
        self._ended_by_us = True
        self._transport.close()

    def reset(self) -> None:
        self._ended_by_us = True
        sock = self._transport.get_extra_info("socket")
        # Zero seconds of lingering: the kernel closes the connection with RST, not FIN.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    async def gone(self) -> None:
        await asyncio.wait([self._task])


@dataclass(eq=False)
class Server:
    """A server on a loopback port, which stays reserved while it is down.

    Args:
        answer: Writes the answer to one request.
        ended: Called when an answer is over, however it ended.
        changed: Called when a connection was made or lost.
        keep_alive_s: An idle connection is closed after so long.
    """

    answer: Callable[[Received, Reply], Awaitable[None]]
    ended: Callable[[Received], None] = lambda request: None
    changed: Callable[[], None] = lambda: None
    keep_alive_s: float | None = None
    host: str = "127.0.0.1"
    port: int = 0
    connections: set[Connection] = field(default_factory=set)
    accepted: int = 0
    mistakes: list[Exception] = field(default_factory=list)
    _claim: socket.socket | None = None
    _listening: socket.socket | None = None
    _accepting: asyncio.Server | None = None
    _filling: list[socket.socket] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Its base URL."""
        return f"http://{self.host}:{self.port}"

    @property
    def listening(self) -> bool:
        """Whether connections are accepted."""
        return self._accepting is not None

    async def up(self) -> None:
        """Listen; does nothing where it listens already."""
        if self._accepting is not None:
            return
        self.down()
        if self._claim is None:
            # Bound and never listening: it refuses connections, and reserves the port.
            self._claim = self._bound()
            self.port = self._claim.getsockname()[1]
        loop = asyncio.get_running_loop()
        self._accepting = await loop.create_server(
            lambda: Connection(self), sock=self._bound(), backlog=1024
        )

    def down(self) -> None:
        """Refuse connections from now on, and reset the open ones."""
        if self._accepting is not None:
            self._accepting.close()
            self._accepting = None
        for sock in self._filling:
            sock.close()
        self._filling.clear()
        for connection in list(self.connections):
            connection.reset()

    def deaf(self) -> None:
        """Answer no attempt to connect, not even with a refusal, as if packets were lost."""
        self.down()
        # A full backlog makes Linux drop each further SYN. It holds backlog + 1.
        listening = self._bound()
        listening.listen(0)
        filler = socket.socket()
        filler.connect((self.host, self.port))
        self._filling += [listening, filler]

    async def close(self) -> None:
        """Stop for good."""
        living = list(self.connections)
        self.down()
        for connection in living:
            await connection.gone()
        if self._claim is not None:
            self._claim.close()
            self._claim = None

    def _bound(self) -> socket.socket:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((self.host, self.port))
        return sock


def _json_or_bytes(raw: bytes) -> Any:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        return raw
