"""The benchmark's fake engine: it sends prepared events by the script in each request.

Tokens are sent at the pace of a `_Metronome`, and marked requests are logged with the time at
which their connection was lost.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import time
from typing import Any, cast

import httptools
import msgspec

from loadtests.bench.script import ANSWER_WORDS, BENCH_MODEL, CHAT_PATH, JSON_TEXT, Script


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
        "model": BENCH_MODEL,
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
WORD_EVENTS = tuple(_event(_choice({"content": word})) for word in ANSWER_WORDS)
FINISH_EVENT = _event(_choice({}, "stop"))
STREAM_END = _framed(b"data: [DONE]\n\n") + b"0\r\n\r\n"
JSON_ANSWER = _http(
    "200 OK",
    {
        "id": "chatcmpl-8f1d5c52b0a94e57a1c64e1f9f7d3b6a",
        "object": "chat.completion",
        "created": 1758000000,
        "model": BENCH_MODEL,
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
            "data": [
                {"id": BENCH_MODEL, "object": "model", "owned_by": "vllm", "max_model_len": 32768}
            ],
        },
    ),
    b"/openapi.json": _http("200 OK", {"paths": {CHAT_PATH: {}, "/v1/completions": {}}}),
    b"/metrics": _http(
        "200 OK",
        b'vllm:num_requests_running{model_name="bench"} 0.0\n'
        b'vllm:num_requests_waiting{model_name="bench"} 0.0\n'
        b'vllm:kv_cache_usage_perc{model_name="bench"} 0.0\n',
        "text/plain; version=0.0.4",
    ),
}
NOT_FOUND = _http("404 Not Found", {"detail": "Not Found"})
ENGINE_LOG_PATH = "/bench/seen"


class MarkedRequest(msgspec.Struct):
    """When the engine received a marked request, and when it lost its connection.

    Both by CLOCK_MONOTONIC, which all processes of a Linux machine share.
    """

    came_at: float
    lost_at: float | None = None


class EngineLog(msgspec.Struct):
    """The engine's log: the connections made to it, and marked requests by marker."""

    connections: int
    notes: dict[str, MarkedRequest]


class _Message(msgspec.Struct):
    content: str | None = None


class _ChatRequest(msgspec.Struct):
    messages: list[_Message]
    stream: bool = False
    stream_options: dict[str, Any] | None = None


_decode_request = msgspec.json.Decoder(_ChatRequest).decode
_decode_script = msgspec.json.Decoder(Script).decode


class _Metronome:
    """Sends a token to every stream in each period: all in one step, or spread over it.

    One step is how a batching engine sends them: a step of vLLM makes a token for every
    running stream, each a chunk and a write of its own. With spread tokens a proxy wakes for
    nearly every chunk. That cost in the kernel is the same for all proxies, and hides how they
    differ: a bare relay in Python reached 0.8 of nginx with spread tokens, and 0.5 in steps.
    Without a pace, chunks pile up in the sockets and are relayed by the dozen.

    Event loops count in milliseconds, and spread tokens are closer together, so the beats
    come from the kernel (`timerfd`).
    """

    BEAT_US = 100  # when spread; a stream keeps one of these beats of the period

    def __init__(self, loop: asyncio.AbstractEventLoop, period_ms: int, *, spread: bool) -> None:
        beats = period_ms * 1000 // self.BEAT_US if spread else 1
        self._beat_ns = period_ms * 1_000_000 // beats
        self._beats: list[dict[_EngineConnection, None]] = [{} for _ in range(beats)]
        self._next = 0
        self._last_given = 0
        self._streams = 0
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._timer = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK)
        if self._timer < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        loop.add_reader(self._timer, self._tick)

    def add(self, exchange: _EngineConnection) -> None:
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
            return  # the timer was set again in the meantime
        # Late or not, a stream gets one token at a time: two would be read as one. The load
        # generator notices the lag by the time that the streams take.
        for _ in range(min(beats, len(self._beats))):
            beat = self._beats[self._next]
            for exchange in tuple(beat):
                if not exchange.token():
                    del beat[exchange]
                    self._streams -= 1
            self._next = (self._next + 1) % len(self._beats)
        if not self._streams:
            self._beat_every(0)


class _EngineConnection(asyncio.Protocol):
    """A client's connection to the engine, with the stream on it."""

    def __init__(self, engine: _Engine) -> None:
        self._engine = engine
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body = b""
        self._script = Script()
        self._sent = 0
        self._wants_usage = False
        self._gone = False
        self._note: MarkedRequest | None = None

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
        if self._url != CHAT_PATH.encode():
            if self._url == ENGINE_LOG_PATH.encode():
                self._transport.write(_http("200 OK", self._engine.seen))
            else:
                self._transport.write(PAGES.get(self._url, NOT_FOUND))
            return
        ask = _decode_request(self._body)
        text = ask.messages[-1].content or "{}"
        self._script = _decode_script(text) if text.startswith("{") else Script(tokens=1)
        self._note = None
        if self._script.marker:
            self._note = self._engine.seen.notes[self._script.marker] = MarkedRequest(
                time.monotonic()
            )
        if self._script.hold and not self._script.tokens:
            return
        if ask.stream:
            self._begin(ask)
        elif not self._script.hold:
            self._transport.write(JSON_ANSWER)

    # A stream

    def _begin(self, ask: _ChatRequest) -> None:
        self._sent = 0
        self._wants_usage = (ask.stream_options or {}).get("include_usage") is True
        self._transport.write(STREAM_HEAD + ROLE_EVENT)
        # The first word is sent without delay, so TTFT through a proxy is the proxy's alone.
        if self.token():
            self._engine.metronome(self._script).add(self)

    def token(self) -> bool:
        """Send the next token or the end; whether another token follows later."""
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
    """What all connections share: the log and the metronomes."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.seen = EngineLog(0, {})
        self._loop = loop
        self._metronomes: dict[tuple[int, bool], _Metronome] = {}

    def metronome(self, script: Script) -> _Metronome:
        key = (script.period_ms, script.spread)
        if key not in self._metronomes:
            self._metronomes[key] = _Metronome(self._loop, script.period_ms, spread=script.spread)
        return self._metronomes[key]


async def serve_engine() -> None:
    """Serve until stdin ends, so that no orphan is left; print the port on stdout first."""
    loop = asyncio.get_running_loop()
    engine = _Engine(loop)
    server = await loop.create_server(
        lambda: _EngineConnection(engine), "127.0.0.1", 0, backlog=4096
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    over = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), over.set)
    await over.wait()
