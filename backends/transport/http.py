"""The one HTTP client that talks to engines.

Made for relaying: a body is handed over as it arrives, a connection that is closed
early is really closed, and a deadline costs nothing per chunk. No redirects, no
cookies, no proxies, no retries but one: a kept connection that the engine had closed
already. The parser is httptools (llhttp, Node's); connections are plain asyncio.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self, cast
from urllib.parse import urlsplit

import httptools

from backends.transport import tls

#: Bytes that may wait here for a slow reader before the engine is made to wait.
HIGH_WATER = 256 * 1024
MAX_HEAD = 64 * 1024
#: Engines keep idle connections for 5 s (uvicorn, cpp-httplib); ours go before that.
KEEP_S = 4.0


class HttpError(Exception):
    """The exchange failed; the text says how."""


class ConnectFailed(HttpError):
    """No connection: refused, unresolved, or no answer to it in time."""


class TimedOut(HttpError):
    """Nothing came within the deadline."""


class Disconnected(HttpError):
    """The connection ended before the answer did."""


class Malformed(HttpError):
    """What came is not HTTP, or more of it than allowed."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where to connect, and the path every request there begins with."""

    host: str
    port: int
    tls: bool
    prefix: str = ""

    @classmethod
    def of(cls, url: str) -> Origin:
        """The origin of a base URL; raises ValueError on anything that is none."""
        parts = urlsplit(url)
        more = parts.query or parts.fragment or parts.username  # would be lost on the way
        if parts.scheme not in ("http", "https") or not parts.hostname or more:
            msg = f"{url!r} is no base URL: write http://HOST:PORT"
            raise ValueError(msg)
        tls = parts.scheme == "https"
        port = parts.port or (443 if tls else 80)
        return cls(parts.hostname, port, tls, parts.path.rstrip("/"))

    @property
    def authority(self) -> str:
        """What the Host header says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

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
            self.abort()  # bytes that nobody asked for: whose answer would they be?
            return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as exc:
            if not response.complete:
                response.fail(Malformed(f"not HTTP: {exc}"))
            self.abort()
            return
        response.arrived()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if self.response is not None:
            self.response.ended(exc)

    def abort(self) -> None:
        self.lost = True
        self.transport.abort()


class Response:
    """An answer, from its head on; `read()` gives the body as it arrives."""

    def __init__(self, connection: _Connection, pool: _Pool, head_s: float) -> None:
        self.status = 0
        self.complete = False
        self._idle_s = head_s
        self._connection = connection
        self._pool = pool
        self._loop = connection.loop
        self._headers: dict[bytes, bytes] = {}
        self._head_size = 0
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._paused = False
        self._framed = False
        self._keeps = False
        self._inflate: zlib._Decompress | None = None
        self._error: HttpError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._heard = self._loop.time()
        self._strict = True  # the time runs whatever comes: a comment is no first token
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
        if status < 200:  # 100 Continue and its like come before the real head
            self._headers.clear()
            return
        self.status = status
        headers = self._headers
        self._framed = b"content-length" in headers or b"transfer-encoding" in headers
        encoding = headers.get(b"content-encoding", b"").lower()
        if encoding in (b"gzip", b"x-gzip", b"deflate"):
            self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)
        elif encoding not in (b"", b"identity"):
            self._error = Malformed(f"content encoding {encoding.decode('latin-1')!r}")

    def on_body(self, data: bytes) -> None:
        self._chunks.append(data)
        self._buffered += len(data)

    def on_message_complete(self) -> None:
        if self.status:
            self.complete = True
            self._keeps = self._connection.parser.should_keep_alive()

    # Called by the connection

    def arrived(self) -> None:
        if not self._strict:
            self._heard = self._loop.time()
        if self._buffered > HIGH_WATER and not self._paused:
            self._paused = True
            self._connection.transport.pause_reading()
        self._wake()

    def ended(self, exc: Exception | None) -> None:
        if not self.complete:
            if self.status and not self._framed and exc is None:
                self.complete = True  # no length was given: the end of the line is the end
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

    # One lazy timer an exchange: hearing something only notes the time.

    def _watch_time(self) -> None:
        if self._waiter is None and not self._strict:
            # The reader is busy: the silence is ours, not the engine's.
            self._heard = self._loop.time()
        left = self._heard + self._idle_s - self._loop.time()
        if left <= 0:
            missed = "no answer" if self._strict else "nothing"
            self.fail(TimedOut(f"{missed} came for {self._idle_s:g} s"))
            self._connection.abort()
        else:
            self._timer = self._loop.call_later(left, self._watch_time)

    def allow_silence(self, seconds: float) -> None:
        """How long the engine may say nothing from now on; until then all of it counts."""
        self._idle_s = seconds
        self._strict = False
        self._heard = self._loop.time()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._watch_time)

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    async def head(self) -> None:
        """Return when the status is known; raises `HttpError`."""
        self._timer = self._loop.call_later(self._idle_s, self._watch_time)
        while not self.status and self._error is None:
            await self._wait()
        if self._error is not None:
            raise self._error

    async def read(self) -> bytes:
        """What has come since the last call, at least a byte; empty at the end.

        Raises:
            HttpError: The answer broke off; what came before was handed out.
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
                self._heard = self._loop.time()
                self._connection.transport.resume_reading()
        if self._inflate is not None:
            return self._inflated(data) or await self.read()
        return data

    def _inflated(self, data: bytes) -> bytes:
        assert self._inflate is not None  # noqa: S101 - the caller looked
        try:
            out = self._inflate.decompress(data, 16 * HIGH_WATER)
        except zlib.error as exc:
            raise Malformed(f"not the compression it names: {exc}") from exc
        if self._inflate.unconsumed_tail:
            raise Malformed("it unpacks to more than an answer can be")
        return out

    async def read_all(self, limit: int) -> bytes:
        """The whole body; raises `HttpError`, also when it is over `limit` bytes."""
        parts: list[bytes] = []
        size = 0
        while data := await self.read():
            size += len(data)
            if size > limit:
                raise Malformed(f"the answer is over {limit} bytes")
            parts.append(data)
        return b"".join(parts)

    def close(self, *, reuse: bool) -> None:
        """End the exchange: keep the connection where it is whole, cut it where not."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        whole = self.complete and self._error is None and not self._chunks
        if reuse and whole and self._keeps:
            self._pool.keep(self._connection)
        else:
            self._connection.abort()


class _Pool:
    """The idle connections to one origin, the freshest first."""

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
        stale = self._loop.time() - KEEP_S
        while self._idle and (self._idle[0].lost or self._idle[0].idle_since < stale):
            self._idle.popleft().abort()

    def close(self) -> None:
        while self._idle:
            self._idle.pop().abort()


class Client:
    """Connections to any number of engines. Make one a process, close it at the end.

    Args:
        resolve: The address of a host, asked for each connection, so that a name may move;
            raises OSError where it has none. As it is, the system's resolver does it.
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
        """Send a request and return its answer once the head is there.

        `head_s` bounds the time to the whole answer, or, once `allow_silence` was called,
        the time until then.

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
                    kept = None  # the engine had closed it while it was idle: make another
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
