"""The HTTP client that talks to engines.

It is made for relaying: a body is handed out as it arrives, a response that is closed early
closes its connection, and a deadline costs nothing per chunk. It follows no redirect, keeps
no cookie and uses no proxy. It repeats a request in one case: the engine had closed a kept
connection while it was idle. The parser is httptools (llhttp, Node's); connections are
plain asyncio.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import Self, cast

import httptools

from backends.transport import compression, tls
from backends.transport.compression import Inflater
from backends.transport.origin import Origin

#: Unread bytes of a response from which on the engine has to wait.
HIGH_WATER = 256 * 1024
#: The largest head of a response, bytes.
MAX_HEAD = 64 * 1024
#: How long idle connections are kept, seconds. Engines close theirs after 5 s (uvicorn,
#: cpp-httplib), so ours must go before.
KEEP_ALIVE_S = 4.0


class HttpError(Exception):
    """An exchange failed; the text says how."""


class ConnectFailed(HttpError):
    """There was no connection: refused, unresolved, or not accepted in time."""


class TimedOut(HttpError):
    """Nothing arrived before the deadline."""


class Disconnected(HttpError):
    """The connection ended before the answer did."""


class Malformed(HttpError):
    """What arrived is not HTTP, or more of it than allowed."""


class _Connection(asyncio.Protocol):
    """One connection, with one exchange at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.transport: asyncio.Transport
        self.idle_since = 0.0
        self.lost = False
        self.response: Response | None = None

    def begin(self, response: Response) -> None:
        self.response = response
        self.parser = httptools.HttpResponseParser(response)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        response = self.response
        if response is None or response.complete:
            self.abort()  # bytes that belong to no request
            return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as exc:
            if not response.complete:
                response.fail(Malformed(f"not HTTP: {exc}"))
            self.abort()
            return
        response.on_data()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if self.response is not None:
            self.response.on_connection_lost(exc)

    def abort(self) -> None:
        self.lost = True
        self.transport.abort()


class Response:
    """A response, from its head on; `read()` returns the body as it arrives."""

    def __init__(self, connection: _Connection, pool: _Pool, head_s: float) -> None:
        self.status = 0
        self.complete = False
        self._timeout_s = head_s
        self._connection = connection
        self._pool = pool
        self._loop = connection.loop
        self._headers: dict[bytes, bytes] = {}
        self._head_size = 0
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._paused = False
        self._has_length = False
        self._keep_alive = False
        self._inflater: Inflater | None = None
        self._error: HttpError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer_from = self._loop.time()
        # At first the deadline holds whatever arrives: a comment is not a first token.
        self._deadline_is_absolute = True
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def header(self, name: str) -> str:
        """A header's value, or the empty string."""
        return self._headers.get(name.encode(), b"").decode("latin-1")

    # Called by the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_size += len(name) + len(value)
        if self._head_size > MAX_HEAD:
            raise ValueError("the head is too large")
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        status = self._connection.parser.get_status_code()
        if status < 200:  # 100 Continue and the like precede the real head
            self._headers.clear()
            return
        self.status = status
        headers = self._headers
        self._has_length = b"content-length" in headers or b"transfer-encoding" in headers
        encoding = headers.get(b"content-encoding", b"").lower()
        if encoding in compression.GZIP_OR_DEFLATE:
            self._inflater = Inflater(16 * HIGH_WATER)
        elif encoding not in compression.NONE:
            self._error = Malformed(f"content encoding {encoding.decode('latin-1')!r}")

    def on_body(self, data: bytes) -> None:
        self._chunks.append(data)
        self._buffered += len(data)

    def on_message_complete(self) -> None:
        if self.status:
            self.complete = True
            self._keep_alive = self._connection.parser.should_keep_alive()

    # Called by the connection

    def on_data(self) -> None:
        if not self._deadline_is_absolute:
            self._timer_from = self._loop.time()
        if self._buffered > HIGH_WATER and not self._paused:
            self._paused = True
            self._connection.transport.pause_reading()
        self._wake()

    def on_connection_lost(self, exc: Exception | None) -> None:
        if not self.complete:
            if self.status and not self._has_length and exc is None:
                self.complete = True  # without a length the body ends with the connection
            else:
                self.fail(Disconnected(f"the connection was lost ({exc or 'closed early'})"))
        self._wake()

    def fail(self, error: HttpError) -> None:
        if self._error is None:
            self._error = error
        self._wake()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # One lazy timer for each exchange: data that arrives only sets `_timer_from`.

    def _check_deadline(self) -> None:
        if self._waiter is None and not self._deadline_is_absolute:
            # The reader is busy, so the silence is not the engine's.
            self._timer_from = self._loop.time()
        left = self._timer_from + self._timeout_s - self._loop.time()
        if left <= 0:
            missing = "no answer" if self._deadline_is_absolute else "no data"
            self.fail(TimedOut(f"{missing} for {self._timeout_s:g} s"))
            self._connection.abort()
        else:
            self._timer = self._loop.call_later(left, self._check_deadline)

    def set_idle_timeout(self, seconds: float) -> None:
        """Let the engine be silent for so long from now on; until now one deadline held for all."""
        self._timeout_s = seconds
        self._deadline_is_absolute = False
        self._timer_from = self._loop.time()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._check_deadline)

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    async def head(self) -> None:
        """Return when the status is known; raises `HttpError`."""
        self._timer = self._loop.call_later(self._timeout_s, self._check_deadline)
        while not self.status and self._error is None:
            await self._wait()
        if self._error is not None:
            raise self._error

    async def read(self) -> bytes:
        """What has arrived since the last call, at least one byte; empty at the end.

        Raises:
            HttpError: The response broke off; what arrived before was handed out.
        """
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self.complete:
                return b""
            await self._wait()
        chunks = self._chunks
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._chunks = []
        self._buffered = 0
        if self._paused:
            self._paused = False
            if not self._connection.lost:
                self._timer_from = self._loop.time()
                self._connection.transport.resume_reading()
        if self._inflater is None:
            return data
        try:
            return self._inflater.feed(data) or await self.read()
        except ValueError as exc:
            raise Malformed(str(exc)) from exc

    async def read_all(self, limit: int) -> bytes:
        """The whole body; raises `HttpError`, also when it is over `limit` bytes."""
        parts: list[bytes] = []
        size = 0
        while data := await self.read():
            size += len(data)
            if size > limit:
                raise Malformed(f"the answer has over {limit} bytes")
            parts.append(data)
        return b"".join(parts)

    def close(self, *, reuse: bool) -> None:
        """End the exchange: keep the connection after a whole response, else cut it."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        whole = self.complete and self._error is None and not self._chunks
        if reuse and whole and self._keep_alive:
            self._pool.keep(self._connection)
        else:
            self._connection.abort()


class _Pool:
    """The idle connections to one origin; the one used last is taken first."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._idle: deque[_Connection] = deque()

    def keep(self, connection: _Connection) -> None:
        if connection.lost:
            return
        connection.response = None
        connection.idle_since = self._loop.time()
        self._idle.append(connection)
        self._drop_stale()

    def take(self) -> _Connection | None:
        self._drop_stale()
        while self._idle:
            connection = self._idle.pop()
            if not connection.lost:
                return connection
        return None

    def _drop_stale(self) -> None:
        stale = self._loop.time() - KEEP_ALIVE_S
        while self._idle and (self._idle[0].lost or self._idle[0].idle_since < stale):
            self._idle.popleft().abort()

    def close(self) -> None:
        while self._idle:
            self._idle.pop().abort()


class Client:
    """Connections to any number of engines. Make one for the process, close it at the end.

    Args:
        resolve: Returns the address of a host, for each connection anew, so that a name may
            move; raises OSError where it has none. By default the system resolves names.
    """

    def __init__(self, resolve: Callable[[str], str] = str) -> None:
        self._resolve = resolve
        self._pools: dict[Origin, _Pool] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End every idle connection."""
        for pool in self._pools.values():
            pool.close()

    async def request(
        self,
        origin: Origin,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        *,
        connect_s: float,
        head_s: float,
    ) -> Response:
        """Send a request and return its response once the head is there.

        `head_s` bounds the time to the end of the response, or to the call of its
        `set_idle_timeout`.

        Raises:
            HttpError: `ConnectFailed` where nothing was sent.
        """
        loop = asyncio.get_running_loop()
        pool = self._pools.get(origin)
        if pool is None:
            pool = self._pools[origin] = _Pool(loop)
        lines = [
            f"{method} {origin.prefix}{path} HTTP/1.1",
            f"host: {origin.authority}",
            "accept-encoding: identity",
            f"content-length: {len(body)}",
        ]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
        kept = pool.take()
        while True:
            connection = kept or await self._connect(origin, loop, connect_s)
            response = Response(connection, pool, head_s)
            connection.begin(response)
            connection.transport.write(head + body)
            try:
                await response.head()
            except Disconnected:
                response.close(reuse=False)
                if kept is not None:
                    kept = None  # the engine had closed it while it was idle
                    continue
                raise
            except BaseException:
                response.close(reuse=False)
                raise
            return response

    async def _connect(
        self, origin: Origin, loop: asyncio.AbstractEventLoop, connect_s: float
    ) -> _Connection:
        try:
            async with asyncio.timeout(connect_s):
                _, connection = await loop.create_connection(
                    lambda: _Connection(loop),
                    self._resolve(origin.host),
                    origin.port,
                    ssl=tls.context() if origin.tls else None,
                    server_hostname=origin.host if origin.tls else None,
                )
        except TimeoutError as exc:
            raise ConnectFailed(f"no connection within {connect_s:g} s") from exc
        except OSError as exc:
            raise ConnectFailed(f"no connection: {exc.strerror or exc}") from exc
        return connection
