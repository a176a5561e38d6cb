"""The benchmark's load generator: it takes jobs, and meters a proxy during each of them.

A connection only keeps the bytes with their time of arrival. Streams are parsed and checked
after the measurement, so the checks do not slow the client down.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeAlias, cast

import httptools
import msgspec
import psutil
import uvloop

from loadtests.bench.script import (
    ANSWER_WORDS,
    Answer,
    BrokenAnswer,
    Script,
    chat_request,
    check_json,
    read_stream,
)

# --- the meter ----------------------------------------------------------------------------


class ProcessMeter:
    """CPU seconds, wake-ups and memory of a process tree."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)

    def _tree(self) -> list[psutil.Process]:
        return [self._root, *self._root.children(recursive=True)]

    def cpu_s(self) -> float:
        """User and system time, including children that have ended."""
        return sum(sum(process.cpu_times()[:4]) for process in self._tree())

    def wakes(self) -> int:
        """Voluntary context switches: how often it went to sleep and was woken."""
        return sum(process.num_ctx_switches().voluntary for process in self._tree())

    def rss_mb(self) -> float:
        """Resident memory in 10^6 bytes; pages that two processes share count twice."""
        return sum(process.memory_info().rss for process in self._tree()) / 1e6

    def peak_mb(self) -> float:
        """Peak resident memory since its start by the kernel's count, in 10^6 bytes."""
        total = 0
        for process in self._tree():
            status = Path(f"/proc/{process.pid}/status").read_text()
            total += int(status.partition("VmHWM:")[2].split()[0]) * 1024
        return total / 1e6


# --- jobs and results ---------------------------------------------------------------------


class Streams(msgspec.Struct, tag=True):
    """A job of concurrent streams, each of `tokens` tokens, one every `period_ms`."""

    port: int
    proxy: int | None
    streams: int
    tokens: int
    period_ms: int
    spread: bool = False

    def timeout_s(self) -> float:
        """Seconds after which a proxy is stuck, not slow."""
        return 20 + 10 * self.tokens * self.period_ms / 1000


class Jsons(msgspec.Struct, tag=True):
    """A job of short JSON answers, on `connections` connections without a pause."""

    port: int
    proxy: int | None
    connections: int
    seconds: float

    def timeout_s(self) -> float:
        """Seconds after which a proxy is stuck, not slow."""
        return 20 + 2 * self.seconds


class FirstTokens(msgspec.Struct, tag=True):
    """A job of short streams, one at a time, a request to each port in turn."""

    ports: dict[str, int]
    requests: int

    def timeout_s(self) -> float:
        """Seconds after which a proxy is stuck, not slow."""
        return 20 + 0.2 * self.requests * len(self.ports)


class StreamsResult(msgspec.Struct, tag=True):
    """The result of `Streams`; `elapsed_s` is from the first request to the last [DONE]."""

    events: int
    reads: int
    elapsed_s: float
    cpu_s: float = 0.0
    wakes: int = 0
    peak_rss_mb: float = 0.0


class JsonsResult(msgspec.Struct, tag=True):
    """The result of `Jsons`."""

    requests: int
    elapsed_s: float
    cpu_s: float = 0.0
    asked: int = 0  # including the warm-up


class FirstTokensResult(msgspec.Struct, tag=True):
    """The result of `FirstTokens`: TTFT of every request by way, milliseconds."""

    ttft_ms: dict[str, list[float]]


class JobFailed(msgspec.Struct, tag=True):
    """A job without a result, because an answer was broken."""

    why: str


Job: TypeAlias = Streams | Jsons | FirstTokens
Result: TypeAlias = StreamsResult | JsonsResult | FirstTokensResult | JobFailed


# --- the load -----------------------------------------------------------------------------


class Connection(asyncio.Protocol):
    """A client's connection: one request at a time; answers stay in the pieces received."""

    @classmethod
    async def open(cls, port: int) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, "127.0.0.1", port)
        return connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._loop = asyncio.get_running_loop()
        self._answered: asyncio.Future[None] | None = None

    async def ask(self, request: bytes) -> Answer:
        """The whole answer; raises `BrokenAnswer` if the connection ends before it."""
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[tuple[float, bytes]] = []
        self._answered = self._loop.create_future()
        asked_at = time.monotonic()
        self._transport.write(request)
        try:
            await self._answered
        finally:
            self._answered = None
        return Answer(asked_at, self._parser.get_status_code(), self._pieces)

    def close(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._answered is None:
            self._transport.abort()
            return
        self._read_at = time.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self._fail(f"not HTTP: {exc}")

    def on_body(self, body: bytes) -> None:
        self._pieces.append((self._read_at, body))

    def on_message_complete(self) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the connection was lost before the answer's end ({exc or 'closed'})")

    def _fail(self, why: str) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(BrokenAnswer(why))


@asynccontextmanager
async def connected(ports: Iterable[int]) -> AsyncIterator[list[Connection]]:
    """A connection to each port while the context is open."""
    connections: list[Connection] = []
    try:
        for port in ports:
            connections.append(await Connection.open(port))  # noqa: PERF401 - all are closed
        yield connections
    finally:
        for connection in connections:
            connection.close()
        await asyncio.sleep(0)  # a loop closes them in its next turn


async def load_streams(job: Streams) -> StreamsResult:
    """Run the streams and check every one of them; raises `BrokenAnswer`.

    The measurement begins with the requests and ends with the last [DONE], so it includes
    reading, admitting and logging the requests. Connections on both sides are opened
    before, by a short stream on each.
    """
    scripts = [
        Script(
            tokens=job.tokens,
            period_ms=job.period_ms,
            spread=job.spread,
            first=n % len(ANSWER_WORDS),
        )
        for n in range(job.streams)
    ]
    requests = [chat_request(script) for script in scripts]
    hello = Script(tokens=2, period_ms=job.period_ms)
    meter = None if job.proxy is None else ProcessMeter(job.proxy)
    async with connected(itertools.repeat(job.port, job.streams)) as connections:
        warm = await asyncio.gather(*(c.ask(chat_request(hello)) for c in connections))
        for answer in warm:
            read_stream(answer, hello)
        cpu_s, wakes = (0.0, 0) if meter is None else (meter.cpu_s(), meter.wakes())
        began = time.monotonic()
        pairs = zip(connections, requests, strict=True)
        answers = await asyncio.gather(*(c.ask(request) for c, request in pairs))
        result = StreamsResult(0, 0, time.monotonic() - began)
        if meter is not None:
            result.cpu_s, result.wakes = meter.cpu_s() - cpu_s, meter.wakes() - wakes
            result.peak_rss_mb = meter.peak_mb()
    for answer, script in zip(answers, scripts, strict=True):
        result.events += read_stream(answer, script).events
        result.reads += len({at for at, _ in answer.pieces})
    return result


async def load_jsons(job: Jsons) -> JsonsResult:
    """Send requests without a pause and check every answer; raises `BrokenAnswer`."""
    request = chat_request(Script(), stream=False)
    good: set[bytes] = set()  # bodies that passed the check: most answers are the same bytes
    answered = 0
    over = False

    async def user(connection: Connection) -> None:
        nonlocal answered
        while not over:
            answer = await connection.ask(request)
            if answer.status != 200 or answer.body() not in good:
                check_json(answer)
                good.add(answer.body())
            answered += 1

    meter = None if job.proxy is None else ProcessMeter(job.proxy)
    async with connected(itertools.repeat(job.port, job.connections)) as connections:
        users = asyncio.gather(*(user(connection) for connection in connections))
        await asyncio.sleep(min(0.5, job.seconds / 4))  # until the pools of both are warm
        cpu_s = 0.0 if meter is None else meter.cpu_s()
        began, before = time.monotonic(), answered
        await asyncio.sleep(job.seconds)
        result = JsonsResult(answered - before, time.monotonic() - began)
        if meter is not None:
            result.cpu_s = meter.cpu_s() - cpu_s
        over = True
        await users
    result.asked = answered
    return result


async def load_first_tokens(job: FirstTokens) -> FirstTokensResult:
    """Measure one short stream after the other, rotating the order of the ways."""
    script = Script(tokens=2)
    request = chat_request(script)
    ttft_ms: dict[str, list[float]] = {way: [] for way in job.ports}
    async with connected(job.ports.values()) as opened:
        connections = dict(zip(job.ports, opened, strict=True))
        for connection in opened:
            for _ in range(5):
                read_stream(await connection.ask(request), script)
        for n in range(job.requests):
            for way in rotated(tuple(job.ports), n):
                answer = await connections[way].ask(request)
                stream = read_stream(answer, script)
                ttft_ms[way].append((stream.first_word_at - answer.asked_at) * 1000)
    return FirstTokensResult(ttft_ms)


def rotated(ways: Sequence[str], turn: int) -> tuple[str, ...]:
    """The ways rotated by the turn, so that none is always first after a pause."""
    shift = turn % len(ways)
    return (*ways[shift:], *ways[:shift])


async def run_job(job: Job) -> Result:
    """The result of a job; a broken answer is a `JobFailed`."""
    try:
        async with asyncio.timeout(job.timeout_s()):
            match job:
                case Streams():
                    return await load_streams(job)
                case Jsons():
                    return await load_jsons(job)
                case FirstTokens():
                    return await load_first_tokens(job)
    except BrokenAnswer as broken:
        return JobFailed(str(broken))
    except TimeoutError:
        return JobFailed(f"no end after {job.timeout_s():g} s: an answer never came or never ended")


def serve_jobs() -> None:
    """Run the jobs on stdin, one a line, and print each result as a line."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for line in sys.stdin:
            result = runner.run(run_job(msgspec.json.decode(line, type=Job)))
            print(msgspec.json.encode(result).decode(), flush=True)
