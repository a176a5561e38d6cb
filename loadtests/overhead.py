"""What the gateway costs, measured beside nginx and beside no proxy at all.

Three ways to one fast fake engine, taken in turns on the same machine in the same
minutes, so that what is reported is a ratio and not the weather. Everything is watched
from outside: CPU seconds and memory of the proxy's whole process tree, what arrives at
a client, and when the engine sees a connection end. Nothing of the gateway is imported.

It is one file, long as it is, so that who doubts a number can read the whole stopwatch:
the exchange and what makes it whole, the engine, the load, the processes, the hang-ups,
the arithmetic, the report.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import datetime as dt
import http.client
import itertools
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Self, TypeAlias, cast

import httptools
import msgspec
import psutil
import uvloop
from rich.console import Console
from rich.table import Table

# --- what is promised ---------------------------------------------------------------------

DIRECT, NGINX, GATEWAY = "direct", "nginx", "gateway"
WAYS = (DIRECT, NGINX, GATEWAY)
CASES = ("queued", "before headers", "mid-stream", "non-stream")

STREAM_COST = "streams, chunks per CPU second"
STREAM_SHARE = "streams, share of nginx's"
STREAM_RATE = "streams, chunks per second"
STREAM_READS = "streams, chunks per read"
STREAM_WAKES = "streams, wake-ups per chunk"
JSON_COST = "JSON, requests per CPU second"
JSON_SHARE = "JSON, share of nginx's"
JSON_RATE = "JSON, requests per second"
JSON_CONNECTIONS = "JSON, engine connections per request"
TTFT = "TTFT p50, ms"
ADDED_TTFT = "TTFT p50 added to direct, ms"
RSS_IDLE = "RSS idle, MB"
RSS_PEAK = "RSS peak in the streams, MB"
HANG_UP = {case: f"hang-up {case}, ms" for case in CASES}
MEASURES = (
    STREAM_COST, STREAM_SHARE, STREAM_RATE, STREAM_READS, STREAM_WAKES, JSON_COST, JSON_SHARE,
    JSON_RATE, JSON_CONNECTIONS, TTFT, ADDED_TTFT, RSS_IDLE, RSS_PEAK, *HANG_UP.values(),
)  # fmt: skip


@dataclass(frozen=True)
class Floor:
    """A line that the gateway's median must not cross, and the one it is on its way to."""

    measure: str
    limit: float
    goal: float
    at_least: bool = False

    def holds(self, value: float) -> bool:
        """Whether a median is on the right side; the line itself is."""
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


# Below a floor a release does not go out; the goals are where this project wants to be.
FLOORS = (
    Floor(STREAM_SHARE, 0.25, goal=0.4, at_least=True),
    Floor(JSON_SHARE, 0.045, goal=0.13, at_least=True),
    Floor(ADDED_TTFT, 1.5, goal=1.5),
    Floor(RSS_PEAK, 100, goal=80),
    *(Floor(HANG_UP[case], 50, goal=50) for case in CASES),
)


class BenchError(Exception):
    """There is no result; the message says why, and what to do where that is known."""


class BrokenAnswer(BenchError):
    """An answer was not what the engine said: a fast proxy that breaks answers is not fast."""


# --- the exchange, and what makes it whole ------------------------------------------------

MODEL = "bench"
NARROW = "narrow"  # the same lane with a single slot, so that a request can be made to wait
API_KEY = "bench-key-0123456789"
CHAT = "/v1/chat/completions"

# No two neighbours are alike, and each stream begins at another one: a token that is lost,
# doubled, swapped or taken from the stream next door shows in the text.
WORDS = tuple(f" w{n:02d}" for n in range(97))
JSON_TEXT = "It is done: " + "".join(WORDS[:12])


class Script(msgspec.Struct, omit_defaults=True):
    """What the fake engine is to do; it travels as the user's message, which no proxy touches.

    `spread`: the streams of this period take turns within it; else they all step at once.
    `hold`: after `tokens` tokens say nothing more until the client is gone; with none of
    them not even the head. `marker`: keep a note of when this came and when it was cut.
    """

    tokens: int = 0
    period_ms: int = 1
    spread: bool = False
    first: int = 0
    hold: bool = False
    marker: str = ""

    def text(self) -> str:
        """All that a whole answer says."""
        words = itertools.islice(itertools.cycle(WORDS), self.first, self.first + self.tokens)
        return "".join(words)


# About what a chat page sends in front of a first question.
SYSTEM = (
    "You are a helpful assistant. Answer in the language of the question, briefly and "
    "to the point. Where you are not certain, say so. Use lists only where they help, and "
    "put code into fenced blocks that name the language. Do not repeat the question. "
)


def chat_request(script: Script, *, stream: bool = True, model: str = MODEL) -> bytes:
    """A whole HTTP request for a chat, head and body, as an OpenAI client writes it."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": msgspec.json.encode(script).decode()},
        ],
        "max_tokens": script.tokens or 16,
        "temperature": 0.7,
    }
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    content = msgspec.json.encode(body)
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: application/json\r\n"
        f"content-type: application/json\r\nuser-agent: overhead\r\n"
        f"authorization: Bearer {API_KEY}\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


class _Delta(msgspec.Struct):
    content: str | None = None


class _Said(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    message: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None


class _Tokens(msgspec.Struct):
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Said] = []
    usage: _Tokens | None = None
    error: msgspec.Raw = msgspec.Raw()


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as it came: when it was asked for, and each piece of its body with its time."""

    asked_at: float
    status: int
    pieces: Sequence[tuple[float, bytes]]

    def body(self) -> bytes:
        """The whole body."""
        return b"".join(piece for _, piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Stream:
    """A whole stream: how many events it had, and when the first word was there."""

    events: int
    first_word_at: float


def read_stream(answer: Answer, script: Script) -> Stream:
    """Check a stream from its first byte to its last.

    Raises:
        BrokenAnswer: A word is missing, doubled or foreign, or the finish reason, the
            token count or [DONE] is not where it must be.
    """
    if answer.status != 200:
        raise BrokenAnswer(f"status {answer.status}: {answer.body()[:300]!r}")
    events = 0
    first_word_at = 0.0
    words: list[str] = []
    finish: str | None = None
    usage: _Tokens | None = None
    done = False
    for at, data in _events(answer.pieces):
        if done:
            raise BrokenAnswer(f"an event after [DONE]: {data[:200]!r}")
        events += 1
        if data == b"[DONE]":
            done = True
            continue
        chunk = _read_chunk(data)
        usage = chunk.usage or usage
        for said in chunk.choices:
            finish = said.finish_reason or finish
            if said.delta.content:
                words.append(said.delta.content)
                first_word_at = first_word_at or at
    if not done:
        raise BrokenAnswer(f"a stream ended without [DONE], after {events} events")
    if "".join(words) != script.text():
        raise BrokenAnswer(
            f"a stream of {script.tokens} tokens said something else, in {len(words)} of them"
        )
    if finish != "stop" or usage is None or usage.completion_tokens != script.tokens:
        raise BrokenAnswer(f"a stream ended with finish reason {finish!r} and usage {usage}")
    return Stream(events, first_word_at)


def _events(pieces: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The data of each event, and when the last of it came."""
    rest = b""
    for at, piece in pieces:
        *whole, rest = (rest + piece).split(b"\n\n")
        for event in whole:
            if event.startswith(b"data: "):
                yield at, event[6:]
            elif not event.startswith(b":"):  # a comment is a heartbeat: allowed, but no chunk
                raise BrokenAnswer(f"not an event that belongs here: {event[:200]!r}")
    if rest:
        raise BrokenAnswer(f"a stream ended within an event: {rest[:200]!r}")


def _read_chunk(data: bytes) -> _Chunk:
    try:
        chunk = _decode_chunk(data)
    except msgspec.DecodeError as exc:
        raise BrokenAnswer(f"not a chunk ({exc}): {data[:200]!r}") from exc
    if chunk.error:
        raise BrokenAnswer(f"an error: {data[:300]!r}")
    return chunk


def check_json(answer: Answer) -> None:
    """Check an answer that was not streamed; raises `BrokenAnswer`."""
    body = answer.body()
    if answer.status != 200:
        raise BrokenAnswer(f"status {answer.status}: {body[:300]!r}")
    chat = _read_chunk(body)
    if [said.message.content for said in chat.choices] != [JSON_TEXT] or chat.usage is None:
        raise BrokenAnswer(f"an answer that says something else: {body[:300]!r}")


# --- the engine ---------------------------------------------------------------------------


def _http(status: str, body: object, kind: str = "application/json") -> bytes:
    content = body if isinstance(body, bytes) else msgspec.json.encode(body)
    head = f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(content)}\r\n\r\n"
    return head.encode() + content


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _event(
    choices: list[dict[str, Any]], usage: dict[str, int] | None = None, **extra: object
) -> bytes:
    chunk: dict[str, Any] = {
        "id": "chatcmpl-8f1d5c52b0a94e57a1c64e1f9f7d3b6a",
        "object": "chat.completion.chunk",
        "created": 1758000000,
        "model": MODEL,
        "choices": choices,
        **extra,
    }
    if usage is not None:
        chunk["usage"] = usage
    return _framed(b"data: " + msgspec.json.encode(chunk) + b"\n\n")


def _choice(delta: dict[str, str], finish: str | None = None) -> list[dict[str, Any]]:
    return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 80, "total_tokens": 80 + tokens, "completion_tokens": tokens}


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
ROLE_EVENT = _event(_choice({"role": "assistant", "content": ""}))
WORD_EVENTS = tuple(_event(_choice({"content": word})) for word in WORDS)
FINISH_EVENT = _event(_choice({}, "stop"))
STREAM_END = _framed(b"data: [DONE]\n\n") + b"0\r\n\r\n"
JSON_ANSWER = _http(
    "200 OK",
    {
        "id": "chatcmpl-8f1d5c52b0a94e57a1c64e1f9f7d3b6a",
        "object": "chat.completion",
        "created": 1758000000,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": JSON_TEXT},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": _usage(26),
    },
)
PAGES = {
    b"/health": _http("200 OK", b""),
    b"/version": _http("200 OK", {"version": "0.32.0"}),
    b"/v1/models": _http(
        "200 OK",
        {
            "object": "list",
            "data": [{"id": MODEL, "object": "model", "owned_by": "vllm", "max_model_len": 32768}],
        },
    ),
    b"/openapi.json": _http("200 OK", {"paths": {CHAT: {}, "/v1/completions": {}}}),
    b"/metrics": _http(
        "200 OK",
        b'vllm:num_requests_running{model_name="bench"} 0.0\n'
        b'vllm:num_requests_waiting{model_name="bench"} 0.0\n'
        b'vllm:kv_cache_usage_perc{model_name="bench"} 0.0\n',
        "text/plain; version=0.0.4",
    ),
}
NOT_FOUND = _http("404 Not Found", {"detail": "Not Found"})
SEEN = "/bench/seen"


class Note(msgspec.Struct):
    """When the engine had a marked request in hand, and when its connection was gone.

    Both on CLOCK_MONOTONIC, which all processes of a Linux machine share.
    """

    came_at: float
    lost_at: float | None = None


class Seen(msgspec.Struct):
    """What the engine has seen: connections made to it, and marked requests by marker."""

    connections: int
    notes: dict[str, Note]


class _Ask(msgspec.Struct):
    messages: list[_Delta]
    stream: bool = False
    stream_options: dict[str, Any] | None = None


_decode_ask = msgspec.json.Decoder(_Ask).decode
_decode_script = msgspec.json.Decoder(Script).decode


class _Metronome:
    """Gives every stream a token each period: all of them at once, or spread over it.

    At once is how an engine that batches sends them: a step of vLLM makes a token for
    every stream that runs. Each is still a chunk and a write of its own, and a proxy
    reads and writes it alone; only its waking up is shared by the step. That makes it the
    load to compare proxies with. Spread evenly, a proxy wakes for nearly every chunk, and
    what that costs, in the kernel and the same for all, hides what they differ in (a bare
    relay in Python came to 0.8 of nginx, and to 0.5 in steps); besides, it then matters
    how busy the machine is with other things. A load as fast as it goes was no choice
    either: chunks pile up in the sockets and are relayed by the dozen.

    Event loops count in milliseconds, and spread tokens are closer, so the beats come from
    the kernel (`timerfd`).
    """

    BEAT_US = 100  # when spread; a stream gets one of these in the period and keeps it

    def __init__(self, loop: asyncio.AbstractEventLoop, period_ms: int, *, spread: bool) -> None:
        beats = period_ms * 1000 // self.BEAT_US if spread else 1
        self._beat_ns = period_ms * 1_000_000 // beats
        self._beats: list[dict[_Exchange, None]] = [{} for _ in range(beats)]
        self._next = 0
        self._last_given = 0
        self._streams = 0
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._timer = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK)
        if self._timer < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        loop.add_reader(self._timer, self._tick)

    def add(self, exchange: _Exchange) -> None:
        self._last_given = (self._last_given + 1) % len(self._beats)
        self._beats[self._last_given][exchange] = None
        self._streams += 1
        if self._streams == 1:
            self._beat_every(self._beat_ns)

    def _beat_every(self, nanoseconds: int) -> None:
        # struct itimerspec: interval and first time, each in seconds and nanoseconds.
        times = (ctypes.c_long * 4)(0, nanoseconds, 0, nanoseconds)
        if self._libc.timerfd_settime(self._timer, 0, times, None) < 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def _tick(self) -> None:
        try:
            beats = int.from_bytes(os.read(self._timer, 8), sys.byteorder)
        except BlockingIOError:
            return  # it was set anew in the meantime
        # Late or not, a stream gets one token in a go: two would be read as one. The load
        # sees that it was late, by the time that the streams took.
        for _ in range(min(beats, len(self._beats))):
            beat = self._beats[self._next]
            for exchange in tuple(beat):
                if not exchange.token():
                    del beat[exchange]
                    self._streams -= 1
            self._next = (self._next + 1) % len(self._beats)
        if not self._streams:
            self._beat_every(0)


class _Exchange(asyncio.Protocol):
    """A connection of the engine's; where it streams, the stream."""

    def __init__(self, engine: _Engine) -> None:
        self._engine = engine
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body = b""
        self._script = Script()
        self._sent = 0
        self._wants_usage = False
        self._gone = False
        self._note: Note | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._engine.seen.connections += 1

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone = True
        if self._note is not None:
            self._note.lost_at = time.monotonic()

    # Called by the parser

    def on_message_begin(self) -> None:
        self._url = self._body = b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._url != CHAT.encode():
            if self._url == SEEN.encode():
                self._transport.write(_http("200 OK", self._engine.seen))
            else:
                self._transport.write(PAGES.get(self._url, NOT_FOUND))
            return
        ask = _decode_ask(self._body)
        said = ask.messages[-1].content or "{}"
        self._script = _decode_script(said) if said.startswith("{") else Script(tokens=1)
        self._note = None
        if self._script.marker:
            self._note = self._engine.seen.notes[self._script.marker] = Note(time.monotonic())
        if self._script.hold and not self._script.tokens:
            return
        if ask.stream:
            self._begin(ask)
        elif not self._script.hold:
            self._transport.write(JSON_ANSWER)

    # A stream

    def _begin(self, ask: _Ask) -> None:
        self._sent = 0
        self._wants_usage = (ask.stream_options or {}).get("include_usage") is True
        self._transport.write(STREAM_HEAD + ROLE_EVENT)
        # The first word goes at once: a TTFT through a proxy is then all the proxy's.
        if self.token():
            self._engine.metronome(self._script).add(self)

    def token(self) -> bool:
        """Send what is next; whether anything is after it."""
        if self._gone:
            return False
        script = self._script
        if self._sent < script.tokens:
            word = WORD_EVENTS[(script.first + self._sent) % len(WORD_EVENTS)]
            self._transport.write(word)
            self._sent += 1
            return True
        if not script.hold:
            usage = _event([], _usage(script.tokens)) if self._wants_usage else b""
            self._transport.write(FINISH_EVENT + usage + STREAM_END)
        return False


class _Engine:
    """What the connections share: what was seen, and who keeps the time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.seen = Seen(0, {})
        self._loop = loop
        self._metronomes: dict[tuple[int, bool], _Metronome] = {}

    def metronome(self, script: Script) -> _Metronome:
        key = (script.period_ms, script.spread)
        if key not in self._metronomes:
            self._metronomes[key] = _Metronome(self._loop, script.period_ms, spread=script.spread)
        return self._metronomes[key]


async def serve_engine() -> None:
    """Be the engine, say the port on stdout, and end with stdin: no orphan is left."""
    loop = asyncio.get_running_loop()
    engine = _Engine(loop)
    server = await loop.create_server(lambda: _Exchange(engine), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    over = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), over.set)
    await over.wait()


# --- the load -----------------------------------------------------------------------------


class Meter:
    """CPU seconds, wake-ups and memory of a process and all below it."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)

    def _tree(self) -> list[psutil.Process]:
        return [self._root, *self._root.children(recursive=True)]

    def cpu_s(self) -> float:
        """User and system time; of children that have ended, too."""
        return sum(sum(process.cpu_times()[:4]) for process in self._tree())

    def wakes(self) -> int:
        """How often it had gone to sleep and was woken."""
        return sum(process.num_ctx_switches().voluntary for process in self._tree())

    def rss_mb(self) -> float:
        """Resident memory in 10^6 bytes; pages that two processes share count twice."""
        return sum(process.memory_info().rss for process in self._tree()) / 1e6

    def peak_mb(self) -> float:
        """The most it has had since it began, as the kernel saw it: no sample can miss it."""
        total = 0
        for process in self._tree():
            status = Path(f"/proc/{process.pid}/status").read_text()
            total += int(status.partition("VmHWM:")[2].split()[0]) * 1024
        return total / 1e6


class Streams(msgspec.Struct, tag=True):
    """So many streams at once, each of `tokens` tokens, one every `period_ms`."""

    port: int
    proxy: int | None
    streams: int
    tokens: int
    period_ms: int
    spread: bool = False

    def patience_s(self) -> float:
        """A proxy that needs longer than this does not keep up, it is stuck."""
        return 20 + 10 * self.tokens * self.period_ms / 1000


class Jsons(msgspec.Struct, tag=True):
    """Short answers, as fast as `connections` clients get them that ask without a pause."""

    port: int
    proxy: int | None
    connections: int
    seconds: float

    def patience_s(self) -> float:
        """As above."""
        return 20 + 2 * self.seconds


class FirstTokens(msgspec.Struct, tag=True):
    """One short stream at a time, a request to each port in turn."""

    ports: dict[str, int]
    requests: int

    def patience_s(self) -> float:
        """As above."""
        return 20 + 0.2 * self.requests * len(self.ports)


class Streamed(msgspec.Struct, tag=True):
    """What the streams came to. `elapsed_s` is from the first request to the last [DONE]."""

    events: int
    reads: int
    elapsed_s: float
    cpu_s: float = 0.0
    wakes: int = 0
    peak_rss_mb: float = 0.0


class Answered(msgspec.Struct, tag=True):
    """What the short answers came to."""

    requests: int
    elapsed_s: float
    cpu_s: float = 0.0
    asked: int = 0  # the warm-up included


class Started(msgspec.Struct, tag=True):
    """The TTFT of every request, in milliseconds."""

    ttft_ms: dict[str, list[float]]


class Failed(msgspec.Struct, tag=True):
    """An answer was broken."""

    why: str


Job: TypeAlias = Streams | Jsons | FirstTokens
Result: TypeAlias = Streamed | Answered | Started | Failed


class Connection(asyncio.Protocol):
    """A client's connection: one request at a time, answers in the pieces they came in.

    It only keeps the pieces. What is in them is looked at when the clock has stopped, so
    that a careful client is not a slow one.
    """

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
        """The whole answer; raises `BrokenAnswer` where the connection ended before it."""
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
    """A connection to each port, for as long as the block runs."""
    connections: list[Connection] = []
    try:
        for port in ports:
            connections.append(await Connection.open(port))  # noqa: PERF401 - all are closed
        yield connections
    finally:
        for connection in connections:
            connection.close()
        await asyncio.sleep(0)  # a loop closes them in its next turn


async def load_streams(job: Streams) -> Streamed:
    """Run the streams and check every one of them; raises `BrokenAnswer`.

    What is counted begins with the requests and ends with the last [DONE], so that the
    proxy pays for reading, admitting and logging the requests as well; connections on
    both sides are made before, by a short stream on each.
    """
    scripts = [
        Script(tokens=job.tokens, period_ms=job.period_ms, spread=job.spread, first=n % len(WORDS))
        for n in range(job.streams)
    ]
    requests = [chat_request(script) for script in scripts]
    hello = Script(tokens=2, period_ms=job.period_ms)
    meter = None if job.proxy is None else Meter(job.proxy)
    async with connected(itertools.repeat(job.port, job.streams)) as connections:
        warm = await asyncio.gather(*(c.ask(chat_request(hello)) for c in connections))
        for answer in warm:
            read_stream(answer, hello)
        cpu_s, wakes = (0.0, 0) if meter is None else (meter.cpu_s(), meter.wakes())
        began = time.monotonic()
        asked = zip(connections, requests, strict=True)
        answers = await asyncio.gather(*(c.ask(request) for c, request in asked))
        result = Streamed(0, 0, time.monotonic() - began)
        if meter is not None:
            result.cpu_s, result.wakes = meter.cpu_s() - cpu_s, meter.wakes() - wakes
            result.peak_rss_mb = meter.peak_mb()
    for answer, script in zip(answers, scripts, strict=True):
        result.events += read_stream(answer, script).events
        result.reads += len({at for at, _ in answer.pieces})
    return result


async def load_jsons(job: Jsons) -> Answered:
    """Ask without a pause and check every answer; raises `BrokenAnswer`."""
    request = chat_request(Script(), stream=False)
    good: set[bytes] = set()  # bodies that were looked into: most answers are the same bytes
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

    meter = None if job.proxy is None else Meter(job.proxy)
    async with connected(itertools.repeat(job.port, job.connections)) as connections:
        users = asyncio.gather(*(user(connection) for connection in connections))
        await asyncio.sleep(min(0.5, job.seconds / 4))  # until the pools of both are warm
        cpu_s = 0.0 if meter is None else meter.cpu_s()
        began, before = time.monotonic(), answered
        await asyncio.sleep(job.seconds)
        result = Answered(answered - before, time.monotonic() - began)
        if meter is not None:
            result.cpu_s = meter.cpu_s() - cpu_s
        over = True
        await users
    result.asked = answered
    return result


async def load_first_tokens(job: FirstTokens) -> Started:
    """One short stream after the other, the ways in another order each time."""
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
    return Started(ttft_ms)


async def do(job: Job) -> Result:
    """Whatever the job is; a broken answer is a result as well."""
    try:
        async with asyncio.timeout(job.patience_s()):
            match job:
                case Streams():
                    return await load_streams(job)
                case Jsons():
                    return await load_jsons(job)
                case FirstTokens():
                    return await load_first_tokens(job)
    except BrokenAnswer as broken:
        return Failed(str(broken))
    except TimeoutError:
        return Failed(f"no end after {job.patience_s():g} s: an answer never came or never ended")


def generate_load() -> None:
    """Be the client: a job a line on stdin, its result a line on stdout."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for line in sys.stdin:
            result = runner.run(do(msgspec.json.decode(line, type=Job)))
            print(msgspec.json.encode(result).decode(), flush=True)


# --- the processes ------------------------------------------------------------------------

NGINX_CONF = """\
# As somebody would set up nginx in front of an engine that streams, and nothing more:
# no key is looked at, no queue kept, no line logged.
daemon off;
worker_processes 1;
pid {scratch}/nginx.pid;
error_log stderr error;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path {scratch}/body;
  proxy_temp_path {scratch}/proxy;
  fastcgi_temp_path {scratch}/fastcgi;
  uwsgi_temp_path {scratch}/uwsgi;
  scgi_temp_path {scratch}/scgi;
  keepalive_requests 100000000;
  upstream engine {{
    server 127.0.0.1:{engine};
    keepalive 1024;
    keepalive_requests 100000000;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://engine;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 3600s;
    }}
  }}
}}
"""

# Nothing is switched off: keys, admission, telemetry, health. (JSON is YAML as well.)
GATEWAY_LANES = {MODEL: {"slots": 1024, "queue": 1024}, NARROW: {"slots": 1, "queue": 16}}


@dataclass(frozen=True)
class Way:
    """A way to the engine: the port to ask, and the proxy's process, if there is one."""

    name: str
    port: int
    proxy: int | None = None


def free_port() -> int:
    """A port that nobody has just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fetch(port: int, path: str, timeout_s: float = 5.0) -> tuple[int, bytes]:
    """Status and body of a GET."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", path, headers={"authorization": f"Bearer {API_KEY}"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def seen(engine: int) -> Seen:
    """What the engine has seen so far."""
    return msgspec.json.decode(fetch(engine, SEEN)[1], type=Seen)


def until(happened: Callable[[], bool], what: str, within_s: float = 5.0) -> None:
    """Return when it has happened; raises `BenchError` where it does not."""
    deadline = time.monotonic() + within_s
    while not happened():
        if time.monotonic() > deadline:
            raise BenchError(f"{what}: not within {within_s:g} s")
        time.sleep(0.001)


@contextmanager
def running(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A child process for as long as the block runs."""
    process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        if process.stdin is not None:
            process.stdin.close()
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def engine_running() -> Iterator[tuple[int, int]]:
    """The fake engine in a process of its own: its port and its pid."""
    command = [sys.executable, "-m", "loadtests.overhead", "engine"]
    with running(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None  # noqa: S101 - for the type checker
        port = process.stdout.readline()
        if not port:
            raise BenchError("the fake engine did not start; what it said is above")
        yield int(port), process.pid


@contextmanager
def client_running() -> Iterator[Callable[[Job], Result]]:
    """The load generator in a process of its own, as a function that does a job.

    The function raises `BrokenAnswer` where an answer was broken.
    """
    command = [sys.executable, "-m", "loadtests.overhead", "client"]
    with running(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None  # noqa: S101 - for the type checker
        assert stdout is not None  # noqa: S101 - for the type checker

        def give(job: Job) -> Result:
            stdin.write(msgspec.json.encode(job) + b"\n")
            stdin.flush()
            line = stdout.readline()
            if not line:
                raise BenchError("the load generator died; what it said is above")
            result: Result = msgspec.json.decode(line, type=Result)
            if isinstance(result, Failed):
                raise BrokenAnswer(result.why)
            return result

        yield give


@contextmanager
def proxy_running(
    name: str, command: Sequence[str], port: int, path: str, scratch: Path
) -> Iterator[Way]:
    """A proxy in a process of its own, once it answers 200 at `path`.

    Raises:
        BenchError: It did not start; with the end of what it said.
    """
    log = scratch / f"{name}.log"

    def is_ready() -> bool:
        if process.poll() is not None:
            raise BenchError(f"{name} ended with {process.returncode}:\n{_tail(log)}")
        with suppress(OSError, http.client.HTTPException):
            return fetch(port, path)[0] == 200
        return False

    with (
        log.open("wb") as output,
        running(
            command, cwd=scratch, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        ) as process,
    ):
        try:
            until(is_ready, f"200 from {name} at {path}", within_s=30)
        except BenchError as exc:
            raise BenchError(f"{exc}\n{_tail(log)}") from exc
        yield Way(name, port, process.pid)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:].strip()


def nginx_running(engine: int, scratch: Path) -> contextlib.AbstractContextManager[Way]:
    """The engine behind nginx, which has one worker."""
    port = free_port()
    conf = scratch / "nginx.conf"
    conf.write_text(NGINX_CONF.format(scratch=scratch, engine=engine, port=port))
    command = [find_nginx(), "-c", str(conf), "-p", str(scratch)]
    return proxy_running(NGINX, command, port, "/health", scratch)


def find_nginx(path: str | None = None) -> str:
    """The nginx on this path, by default the user's; raises `BenchError` where there is none."""
    if path is None:  # Debian keeps it in /usr/sbin, which is not on everybody's
        path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin"))
    found = shutil.which("nginx", path=path)
    if found is None:
        raise BenchError(
            "nginx is not on PATH, and it is what the gateway is measured against: "
            "apt-get install nginx"
        )
    return found


def gateway_running(engine: int, scratch: Path) -> contextlib.AbstractContextManager[Way]:
    """The engine behind the gateway, which is started as a user starts it."""
    port = free_port()
    config = {
        "host": "127.0.0.1",
        "port": port,
        "api_keys": [API_KEY],
        "engines": {"vllm": {"urls": [f"http://127.0.0.1:{engine}"]}},
        "models": {
            name: {"lanes": {"vllm": {"model": MODEL, **lane}}}
            for name, lane in GATEWAY_LANES.items()
        },
    }
    path = scratch / "gateway.yaml"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(config)))
    command = [sys.executable, "-m", "gateway", "serve", "--config", str(path)]
    return proxy_running(GATEWAY, command, port, "/ready", scratch)


# --- hang-ups -----------------------------------------------------------------------------

# A proxy that has not closed by then is taken not to close at all: this is its time.
NEVER_MS = 2000.0


class Caller:
    """A client of one request, on a plain socket, which can be hung up at an exact time."""

    def __init__(self, port: int, request: bytes) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=5)
        self._socket.sendall(request)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    def hear(self, events: int) -> None:
        """Return when so many events have come; raises `BenchError` where they do not."""
        heard = b""
        while heard.count(b"data: ") < events:
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                data = b""
            if not data:
                raise BenchError(f"a stream went silent before its event {events}: {heard!r}")
            heard += data

    def hang_up(self) -> float:
        """Close; the time just before."""
        now = time.monotonic()
        self._socket.close()
        return now


class HangUps:
    """Hangs up on one way to the engine and tells how long the engine did not know."""

    def __init__(self, way: Way, engine: int) -> None:
        self._way = way
        self._engine = engine
        self._markers = (f"{way.name}-{time.monotonic_ns()}-{n}" for n in itertools.count())
        self._leavers: set[str] = set()

    def time_ms(self, case: str) -> float:
        """Milliseconds from the client's close, in one of `CASES`."""
        if case == "queued":
            return self._queued_ms()
        # Mid-stream, the engine is silent when the client leaves: a proxy that finds out
        # only when it writes the next token would not find out at all.
        script = Script(
            tokens=3 if case == "mid-stream" else 0, hold=True, marker=next(self._markers)
        )
        request = chat_request(script, stream=case != "non-stream")
        with Caller(self._way.port, request) as caller:
            self._until_one_came(script.marker)
            if case == "mid-stream":
                caller.hear(4)  # the role and three words
            closed_at = caller.hang_up()
        with suppress(BenchError):
            until(lambda: self._lost_at(script.marker) is not None, case, NEVER_MS / 1000)
        lost_at = self._lost_at(script.marker)
        return NEVER_MS if lost_at is None else (lost_at - closed_at) * 1000

    def _queued_ms(self) -> float:
        # One holds the only slot, two wait. The first of them hangs up and must never be
        # sent; that the one behind it is sent, when the slot is free, shows the queue moved.
        holder, leaver, behind = (
            Script(tokens=1, hold=True, marker=next(self._markers)) for _ in range(3)
        )
        waits = "a request that waits for the only slot"
        with ExitStack() as calls:

            def call(script: Script) -> Caller:
                request = chat_request(script, model=NARROW)
                return calls.enter_context(Caller(self._way.port, request))

            holding = call(holder)
            holding.hear(1)
            leaving = call(leaver)
            until(lambda: self._waiting() == 1, waits)
            call(behind)
            until(lambda: self._waiting() == 2, f"{waits}, behind another")
            closed_at = leaving.hang_up()
            with suppress(BenchError):
                until(lambda: self._waiting() == 1, "the queue to be shorter", NEVER_MS / 1000)
            dropped_ms = min(NEVER_MS, (time.monotonic() - closed_at) * 1000)
            holding.hang_up()
            self._until_one_came(behind.marker, leaver.marker)
            self._leavers.add(leaver.marker)  # with those of earlier tries: not later either
            if not self._notes().keys().isdisjoint(self._leavers):
                raise BrokenAnswer("a request was sent whose client had hung up in the queue")
        return dropped_ms

    def _notes(self) -> dict[str, Note]:
        return seen(self._engine).notes

    def _lost_at(self, marker: str) -> float | None:
        return self._notes()[marker].lost_at

    def _until_one_came(self, *markers: str) -> None:
        until(lambda: not self._notes().keys().isdisjoint(markers), "a request at the engine")

    def _waiting(self) -> int:
        status, body = fetch(self._way.port, "/status")
        if status != 200:
            raise BenchError(f"GET /status says {status}: {body[:300]!r}")
        return int(msgspec.json.decode(body)["models"][NARROW]["waiting"])


# --- the arithmetic -----------------------------------------------------------------------

Measures: TypeAlias = dict[str, dict[str, list[float]]]
"""Measure, then way, then one value a round."""
Measured: TypeAlias = tuple[Measures, list[str]]
"""And what has to be remarked."""


@dataclass(frozen=True)
class Spread:
    """What the rounds came to."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(min(values), statistics.median(values), max(values))


@dataclass(frozen=True)
class Verdict:
    """A floor and what was measured; None where it was not, which is not a pass."""

    floor: Floor
    median: float | None

    @property
    def missed(self) -> bool:
        return self.median is not None and not self.floor.holds(self.median)

    def __str__(self) -> str:
        if self.median is None:
            return f"{self.floor.measure}: not measured"
        return f"{self.floor.measure}: {self.median:.3g}, the floor is {self.floor}"


def rotated(ways: Sequence[str], turn: int) -> tuple[str, ...]:
    """The ways, beginning with another one each turn: none is always first after a pause."""
    shift = turn % len(ways)
    return (*ways[shift:], *ways[:shift])


def compare(measures: Measures) -> None:
    """Add the ratios and differences, each formed within its round."""

    def per_round(
        measure: str, way: str, base: str, form: Callable[[float, float], float]
    ) -> list[float]:
        values = measures.get(measure, {})
        pairs = zip(values.get(way, ()), values.get(base, ()), strict=False)
        return [form(value, against) for value, against in pairs]

    for share, cost in ((STREAM_SHARE, STREAM_COST), (JSON_SHARE, JSON_COST)):
        if values := per_round(cost, GATEWAY, NGINX, lambda ours, theirs: ours / theirs):
            measures[share] = {GATEWAY: values}
    for way in (NGINX, GATEWAY):
        if values := per_round(TTFT, way, DIRECT, lambda proxied, direct: proxied - direct):
            measures.setdefault(ADDED_TTFT, {})[way] = values


def judge(measures: Measures) -> list[Verdict]:
    """Every floor beside the median of its rounds."""
    verdicts = []
    for floor in FLOORS:
        values = measures.get(floor.measure, {}).get(GATEWAY)
        verdicts.append(Verdict(floor, Spread.of(values).median if values else None))
    return verdicts


# --- a run --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What to run; the defaults are what the floors are meant for."""

    ways: tuple[str, ...] = WAYS
    rounds: int = 5
    seconds: float = 5.0
    streams: int = 256
    rate: int = 10_240
    spread: bool = False
    json_connections: int = 64
    ttft_requests: int = 100
    hang_ups: int = 10

    @property
    def period_ms(self) -> int:
        """Between two tokens of a stream."""
        return max(1, round(self.streams / self.rate * 1000))

    @property
    def offered(self) -> float:
        """Tokens a second in all streams."""
        return self.streams * 1000 / self.period_ms

    @property
    def tokens(self) -> int:
        """Of each stream."""
        return max(3, round(self.seconds * 1000 / self.period_ms))


@dataclass
class Bench:
    """Runs the rounds and collects what they measure."""

    settings: Settings
    ways: Mapping[str, Way]
    engine: Way
    load: Callable[[Job], Result]
    say: Callable[[str], None]
    measures: Measures = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def note(self, measure: str, way: str, value: float) -> None:
        self.measures.setdefault(measure, {}).setdefault(way, []).append(value)

    def remark(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def run(self) -> None:
        """All rounds; raises `BenchError` where one has no result."""
        for way in self.ways.values():
            if way.proxy is not None:
                self.note(RSS_IDLE, way.name, Meter(way.proxy).rss_mb())
        for turn in range(self.settings.rounds):
            order = [self.ways[name] for name in rotated(tuple(self.ways), turn)]
            self.say(
                f"round {turn + 1} of {self.settings.rounds}: {', '.join(w.name for w in order)}"
            )
            for way in order:
                self._streams(way)
            for way in order:
                self._jsons(way)
            self._first_tokens(turn)
            for way in order:
                self._hang_ups(way)
        compare(self.measures)

    def _streams(self, way: Way) -> None:
        wanted = self.settings
        job = Streams(
            way.port, way.proxy, wanted.streams, wanted.tokens, wanted.period_ms, wanted.spread
        )
        with self._naming(way, "streams"):
            got = cast("Streamed", self.load(job))
        self.note(STREAM_RATE, way.name, got.events / got.elapsed_s)
        self.note(STREAM_READS, way.name, got.events / got.reads)
        if way.proxy is not None:
            self.note(STREAM_COST, way.name, got.events / self._enough(way, got.cpu_s))
            self.note(STREAM_WAKES, way.name, got.wakes / got.events)
            self.note(RSS_PEAK, way.name, got.peak_rss_mb)
        kept_up = wanted.tokens * wanted.period_ms / 1000 / got.elapsed_s
        if kept_up < 0.9:
            slow = f"{way.name} took {1 / kept_up:.2f} times as long as the tokens were spread over"
            if way.name == DIRECT and kept_up < 0.5:
                raise BenchError(f"{slow}: this machine is too slow for the load, lower --rate")
            self.remark(f"{slow}: it fell behind, or the machine had other things to do")

    def _jsons(self, way: Way) -> None:
        wanted = self.settings
        job = Jsons(way.port, way.proxy, wanted.json_connections, wanted.seconds)
        before = seen(self.engine.port).connections
        with self._naming(way, "JSON"):
            got = cast("Answered", self.load(job))
        made = seen(self.engine.port).connections - before
        self.note(JSON_RATE, way.name, got.requests / got.elapsed_s)
        if way.proxy is not None:
            self.note(JSON_COST, way.name, got.requests / self._enough(way, got.cpu_s))
            self.note(JSON_CONNECTIONS, way.name, made / got.asked)

    def _first_tokens(self, turn: int) -> None:
        ports = {name: self.ways[name].port for name in rotated(tuple(self.ways), turn)}
        got = cast("Started", self.load(FirstTokens(ports, self.settings.ttft_requests)))
        for name, values in got.ttft_ms.items():
            self.note(TTFT, name, statistics.median(values))

    def _hang_ups(self, way: Way) -> None:
        hang_ups = HangUps(way, self.engine.port)
        for case in CASES:
            if case == "queued" and way.name != GATEWAY:
                continue  # only the gateway has a queue
            with self._naming(way, f"hang-up, {case}"):
                times = [hang_ups.time_ms(case) for _ in range(self.settings.hang_ups)]
            self.note(HANG_UP[case], way.name, max(times))

    def _enough(self, way: Way, cpu_s: float) -> float:
        # The kernel tells CPU time in ticks of 10 ms.
        if cpu_s < 0.2:
            self.remark(
                f"{way.name} used {cpu_s:.2f} CPU seconds: too few to divide by, run longer"
            )
        return max(0.01, cpu_s)

    @contextmanager
    def _naming(self, way: Way, what: str) -> Iterator[None]:
        try:
            yield
        except BenchError as exc:
            raise type(exc)(f"{way.name}, {what}: {exc}") from exc


BUSY = 0.25  # load average a core from which on a report says so


def measure(settings: Settings, say: Callable[[str], None]) -> Measured:
    """Start everything, run all rounds, stop everything; raises `BenchError`."""
    with tempfile.TemporaryDirectory(prefix="overhead-") as made, ExitStack() as stack:
        scratch = Path(made)
        port, pid = stack.enter_context(engine_running())
        ways = {}
        if DIRECT in settings.ways:
            ways[DIRECT] = Way(DIRECT, port)
        if NGINX in settings.ways:
            ways[NGINX] = stack.enter_context(nginx_running(port, scratch))
        if GATEWAY in settings.ways:
            ways[GATEWAY] = stack.enter_context(gateway_running(port, scratch))
        load = stack.enter_context(client_running())
        # What others do here is in the caches and in the times, if less so in the ratios.
        busy = os.getloadavg()[0]
        bench = Bench(settings, ways, Way("engine", port, pid), load, say)
        if busy > BUSY * (os.cpu_count() or 1):
            bench.remark(f"the machine was not idle before the start: load average {busy:.1f}")
        bench.run()
        return bench.measures, bench.notes


# --- the report ---------------------------------------------------------------------------


def machine(argv: Sequence[str]) -> dict[str, Any]:
    """Where and how this was run."""
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    packages = ("uvloop", "httptools", "uvicorn", "fastapi", "msgspec")
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "nginx": _nginx_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": ["python", "-m", "loadtests.overhead", *argv],
    }


def _nginx_version() -> str | None:
    try:
        said = subprocess.run([find_nginx(), "-v"], capture_output=True, text=True, check=True)
    except BenchError:
        return None
    return said.stderr.partition("nginx/")[2].strip()


def show(console: Console, settings: Settings, measures: Measures, notes: Sequence[str]) -> None:
    """The tables, and what has to be known to read them."""
    table = Table(title=f"What was measured, over {settings.rounds} rounds", title_justify="left")
    for name in ("measure", "way"):
        table.add_column(name)
    for name in ("min", "median", "max"):
        table.add_column(name, justify="right")
    for measure, ways in ((name, measures[name]) for name in MEASURES if name in measures):
        for shown, way in zip((measure, *[""] * len(ways)), ways, strict=False):
            spread = Spread.of(ways[way])
            table.add_row(
                shown, way, *(_figure(v) for v in (spread.low, spread.median, spread.high))
            )
    console.print(table)
    floors = Table(title="The gateway against its floors", title_justify="left")
    floors.add_column("median of the rounds")
    for name in ("measured", "floor", "goal", ""):
        floors.add_column(name, justify="right")
    for verdict in judge(measures):
        floor, median = verdict.floor, verdict.median
        floors.add_row(
            floor.measure,
            "" if median is None else _figure(median),
            str(floor),
            f"{floor.goal:g}",
            "not measured" if median is None else "MISSED" if verdict.missed else "holds",
        )
    console.print(floors)
    for text in _reading(settings):
        console.print(text, style="dim")
    for text in notes:
        console.print(f"note: {text}")


def _reading(settings: Settings) -> Iterator[str]:
    """What has to be known to read the tables."""
    yield (
        f"Streams: {settings.streams} at once, {settings.tokens} tokens each, one every "
        f"{settings.period_ms} ms, "
        + ("spread evenly" if settings.spread else "all in one step as vLLM sends them")
        + f" ({settings.offered:,.0f} a second). Chunks are SSE events that arrived at the client."
    )
    yield (
        f"JSON: {settings.json_connections} connections that ask without a pause. Both: CPU "
        "seconds and memory are those of the proxy's whole process tree."
    )
    yield (
        f"TTFT: {settings.ttft_requests} requests a round, one at a time on a machine that does "
        "nothing else, the ways in turn request by request."
    )
    yield (
        f"Hang-up: from close() until the engine saw its connection end (queued: until GET "
        f"/status did not count it), one at a time; the slowest of {settings.hang_ups} a round."
    )
    yield "Shares and differences are formed within a round, and the median is of these."


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def save(
    path: Path,
    argv: Sequence[str],
    settings: Settings,
    measures: Measures,
    notes: Sequence[str],
) -> None:
    """Write everything that was measured, each round of it."""
    verdicts = judge(measures)
    report = {
        "machine": machine(argv),
        "settings": settings,
        "rounds": measures,
        "summary": {
            measure: {way: Spread.of(values) for way, values in ways.items()}
            for measure, ways in measures.items()
        },
        "floors": [
            {
                "measure": verdict.floor.measure,
                "median": verdict.median,
                "floor": str(verdict.floor),
                "goal": verdict.floor.goal,
                "missed": verdict.missed,
            }
            for verdict in verdicts
        ],
        "notes": notes,
    }
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")


HELP = """\
Three ways lead to one fast fake engine: direct, through nginx, through the gateway. Each
round measures all of them, in an order that is rotated, and the median of the rounds is
held against the floors. It takes about four minutes, wants nginx (apt-get install nginx)
and a machine that does nothing else, and uses the loopback interface only.

  streams   {streams} chat streams at once: chunks per CPU second of the proxy, and its memory
  JSON      short answers, {json_connections} connections: requests per CPU second of the proxy
  TTFT      one stream at a time, request by request in turn: what is added to direct
  hang-up   from the client's close() until the engine sees its connection end; for a
            request in the queue, until the gateway's GET /status no longer counts it
"""

EXAMPLES = """\
examples:
  python -m loadtests.overhead                                what `make bench` runs
  python -m loadtests.overhead --json bench.json              and keep every round
  python -m loadtests.overhead --rounds 1 --seconds 2         a quick look; do not quote it
  python -m loadtests.overhead --only direct,nginx            is the harness itself sound?

Every answer is checked, word by word; one that is broken ends the run without a result.
exit status: 0 all floors hold (or were not measured), 1 a floor is missed, 2 no result
"""


def _ways(text: str) -> tuple[str, ...]:
    ways = tuple(text.split(","))
    if unknown := set(ways) - set(WAYS):
        raise argparse.ArgumentTypeError(f"no such way: {', '.join(unknown)}; {', '.join(WAYS)}")
    return tuple(way for way in WAYS if way in ways)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    usual = Settings()
    made = argparse.ArgumentParser(
        prog="python -m loadtests.overhead",
        description=HELP.format(streams=usual.streams, json_connections=usual.json_connections),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--rounds", type=int, default=usual.rounds, help="default %(default)s; floors want 5")
    add(
        "--seconds",
        type=float,
        default=usual.seconds,
        help="of each measurement of streams and JSON (default %(default)g)",
    )
    add("--streams", type=int, default=usual.streams, help="at once (default %(default)s)")
    add(
        "--rate",
        type=int,
        default=usual.rate,
        help="tokens a second in all streams (default %(default)s); lower it where the "
        "machine is too slow for its own load",
    )
    add(
        "--spread",
        action="store_true",
        help="spread the tokens of the streams evenly, instead of all in one step as vLLM "
        "sends them: dearer for every proxy, kinder in the ratio; the floors are not meant for it",
    )
    add(
        "--only",
        type=_ways,
        default=WAYS,
        metavar="WAYS",
        help="some of direct,nginx,gateway; floors that need another are not measured",
    )
    add("--json", type=Path, metavar="PATH", help="write all rounds and the machine there")
    return made


def main(
    argv: Sequence[str],
    measure: Callable[[Settings, Callable[[str], None]], Measured] = measure,
) -> int:
    """Run the benchmark; the exit status."""
    asked = parser().parse_args(argv)
    settings = Settings(
        ways=asked.only,
        rounds=asked.rounds,
        seconds=asked.seconds,
        streams=asked.streams,
        rate=asked.rate,
        spread=asked.spread,
    )
    console, progress = Console(), Console(stderr=True)
    try:
        measures, notes = measure(settings, progress.print)
    except BenchError as exc:
        progress.print(f"no result: {exc}", style="red", markup=False)
        return 2
    show(console, settings, measures, notes)
    if asked.json is not None:
        save(asked.json, argv, settings, measures, notes)
    missed = [verdict for verdict in judge(measures) if verdict.missed]
    for verdict in missed:
        progress.print(f"missed: {verdict}", style="red", markup=False)
    return 1 if missed else 0


if __name__ == "__main__":
    # The engine and the client are this file again, in processes of their own.
    match sys.argv[1:]:
        case ["engine"]:
            uvloop.run(serve_engine())
        case ["client"]:
            generate_load()
        case arguments:
            sys.exit(main(arguments))
