"""An engine of known times, to hold a stopwatch against.

    python -m loadtests.proof.known --ttft-s 0.3 --gap-s 0.02 --tokens 64 --port 8009

Token k of a request, from 0, leaves at its arrival + TTFT + k * gap, however many ask. Each
token has its own moment, counted from the arrival, so that no lateness adds up, and the
kernel keeps the time, since event loops count in milliseconds. What it was late all the
same is told by `GET /lateness`: a check must not blame the client for it.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import heapq
import itertools
import math
import os
import subprocess
import sys
import time
import urllib.request
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import httptools
import msgspec
import uvloop

KNOWN_MODEL = "known"
CHAT_PATH_BYTES = b"/v1/chat/completions"
COMPLETIONS_PATH = b"/v1/completions"
LATENESS_PATH = b"/lateness"
#: What a stopwatch is held to: seconds, and tokens a second.
QUANTITIES = ("TTFT", "TPOT", "E2E", "output tok/s")
#: How long it may take to start, and to end, seconds.
START_S = 20.0
END_S = 5.0
#: No answer is longer, tokens.
MAX_TOKENS = 100_000

_TFD_TIMER_ABSTIME = 1


class Times(msgspec.Struct, frozen=True):
    """When the tokens of an answer leave, and how many there are where nobody says."""

    ttft_s: float = 0.3
    gap_s: float = 0.02
    tokens: int = 64

    @property
    def e2e_s(self) -> float:
        """From the request's arrival to the last byte, which leaves with the last token."""
        return self.ttft_s + (self.tokens - 1) * self.gap_s

    def truth(self, level: int) -> dict[str, float]:
        """What there is to be measured with so many at once, by `QUANTITIES`."""
        rate = level * self.tokens / self.e2e_s
        return dict(zip(QUANTITIES, (self.ttft_s, self.gap_s, self.e2e_s, rate), strict=True))


class Lateness(msgspec.Struct, frozen=True):
    """How late tokens left, seconds, and how many did."""

    p50: float = 0.0
    p99: float = 0.0
    tokens: int = 0


# --- what is said -------------------------------------------------------------------------


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _CompletionRequest(msgspec.Struct):
    stream: bool = False
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


_decode_request = msgspec.json.Decoder(_CompletionRequest).decode


def _http(status: str, content: object) -> bytes:
    body = msgspec.json.encode(content)
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def _refusal(message: str) -> bytes:
    return _http("400 Bad Request", {"error": {"message": message, "type": "invalid_request"}})


def _event(kind: str, choices: list[dict[str, Any]], **more: object) -> bytes:
    """A server-sent event as a chunk of a chunked body."""
    chunk = {
        "id": KNOWN_MODEL,
        "object": kind,
        "created": 0,
        "model": KNOWN_MODEL,
        "choices": choices,
        **more,
    }
    data = b"data: " + msgspec.json.encode(chunk) + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


@dataclass(frozen=True)
class _AnswerEvents:
    """The events of a kind of answer, encoded once."""

    kind: str
    before: bytes
    token: bytes
    last: bytes

    def end(self, tokens: int, usage: _StreamOptions | None) -> bytes:
        """The last token with all that follows it."""
        told = b""
        if usage is not None and usage.include_usage:
            count = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1}
            told = _event(self.kind, [], usage=count)
        return self.last + told + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def _chat_events() -> _AnswerEvents:
    kind = "chat.completion.chunk"

    def event(delta: dict[str, str], finish: str | None = None) -> bytes:
        return _event(kind, [{"index": 0, "delta": delta, "finish_reason": finish}])

    return _AnswerEvents(
        kind,
        before=event({"role": "assistant", "content": ""}),
        token=event({"content": " word"}),
        last=event({"content": " word"}, "length"),
    )


def _completion_events() -> _AnswerEvents:
    kind = "text_completion"

    def event(finish: str | None = None) -> bytes:
        return _event(kind, [{"index": 0, "text": " word", "finish_reason": finish}])

    return _AnswerEvents(kind, before=b"", token=event(), last=event("length"))


EVENTS_BY_PATH = {CHAT_PATH_BYTES: _chat_events(), COMPLETIONS_PATH: _completion_events()}
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
_PAGES = {
    b"/health": _http("200 OK", {}),
    b"/v1/models": _http(
        "200 OK",
        {"object": "list", "data": [{"id": KNOWN_MODEL, "object": "model", "owned_by": "twolane"}]},
    ),
}
_NOT_FOUND = _http("404 Not Found", {"error": {"message": "no such page", "type": "not_found"}})


# --- when it is said ----------------------------------------------------------------------


class _TokenClock:
    """Calls streams at their moments, and keeps account of how late it was."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._due: list[tuple[float, int, _Stream]] = []
        self._numbers = itertools.count()  # for the heap: streams have no order
        self._late = array("d")
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._timer = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK)
        if self._timer < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        loop.add_reader(self._timer, self._on_timer)

    def schedule(self, stream: _Stream) -> None:
        """Have the stream say its next token when that is due."""
        entry = (stream.due, next(self._numbers), stream)
        heapq.heappush(self._due, entry)
        if self._due[0] is entry:
            self._set(stream.due)

    def lateness(self) -> Lateness:
        """Of every token so far."""
        late = sorted(self._late)
        if not late:
            return Lateness()
        return Lateness(late[len(late) // 2], late[int(len(late) * 0.99)], len(late))

    def _set(self, due: float) -> None:
        # struct itimerspec: no interval, and the first time. All zero would mean never.
        fraction, whole = math.modf(due)
        times = (ctypes.c_long * 4)(0, 0, int(whole), max(1, int(fraction * 1e9)))
        if self._libc.timerfd_settime(self._timer, _TFD_TIMER_ABSTIME, times, None) < 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def _on_timer(self) -> None:
        try:
            os.read(self._timer, 8)
        except BlockingIOError:
            return  # it was set anew in the meantime
        now = time.monotonic()
        said = []
        while self._due and self._due[0][0] <= now:
            due, _, stream = heapq.heappop(self._due)
            if stream.send_token():
                said.append(due)
                if stream.left:
                    heapq.heappush(self._due, (stream.due, next(self._numbers), stream))
        # What was written leaves before the loop's next turn, and is late until then.
        self._loop.call_soon(self._record_lateness, said)
        if self._due:
            self._set(self._due[0][0])

    def _record_lateness(self, dues: list[float]) -> None:
        now = time.monotonic()
        self._late.extend(now - due for due in dues)


class _Stream:
    """An answer that is being given."""

    __slots__ = ("_gap_s", "_start", "_tokens", "_transport", "_usage", "_words", "left")

    def __init__(
        self,
        transport: asyncio.Transport,
        words: _AnswerEvents,
        ask: _CompletionRequest,
        times: Times,
        at: float,
    ) -> None:
        asked = ask.max_completion_tokens or ask.max_tokens or times.tokens
        self._transport = transport
        self._words = words
        self._usage = ask.stream_options
        self._start = at + times.ttft_s
        self._gap_s = times.gap_s
        self._tokens = self.left = max(1, min(asked, MAX_TOKENS))
        transport.write(_STREAM_HEAD)

    @property
    def due(self) -> float:
        """When the next token leaves."""
        return self._start + (self._tokens - self.left) * self._gap_s

    def send_token(self) -> bool:
        """Send the next token; whether anybody was there to hear it."""
        if self._transport.is_closing():
            return False
        said = self._words.before if self.left == self._tokens else b""
        self.left -= 1
        said += self._words.token if self.left else self._words.end(self._tokens, self._usage)
        self._transport.write(said)
        return True


class _Connection(asyncio.Protocol):
    """A connection."""

    def __init__(self, clock: _TokenClock, times: Times) -> None:
        self._clock = clock
        self._times = times
        self._parser = httptools.HttpRequestParser(self)
        self._url = self._body = b""
        self._at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._at = time.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.abort()

    # Called by the parser

    def on_message_begin(self) -> None:
        self._url = self._body = b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._url in EVENTS_BY_PATH:
            self._answer(EVENTS_BY_PATH[self._url])
        elif self._url == LATENESS_PATH:
            self._transport.write(_http("200 OK", self._clock.lateness()))
        else:
            self._transport.write(_PAGES.get(self._url, _NOT_FOUND))

    def _answer(self, words: _AnswerEvents) -> None:
        try:
            ask = _decode_request(self._body)
        except msgspec.DecodeError as exc:
            self._transport.write(_refusal(f"the request cannot be read: {exc}"))
            return
        if not ask.stream:
            self._transport.write(_refusal("this engine only streams: ask with stream=true"))
            return
        self._clock.schedule(_Stream(self._transport, words, ask, self._times, self._at))


# --- the server ---------------------------------------------------------------------------


async def serve(times: Times, port: int, *, end_with_stdin: bool) -> None:
    """Serve until somebody ends it, and say the URL on stdout as soon as it can be asked."""
    loop = asyncio.get_running_loop()
    exchange = partial(_Connection, _TokenClock(loop), times)
    server = await loop.create_server(exchange, "127.0.0.1", port, backlog=4096)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    over = asyncio.Event()
    if end_with_stdin:
        loop.add_reader(sys.stdin.fileno(), over.set)
    await over.wait()


class KnownServer:
    """An engine of known times in a process of its own."""

    def __init__(self, url: str) -> None:
        self.url = url

    def lateness(self) -> Lateness:
        """How late it was itself, so far."""
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"{self.url}{LATENESS_PATH.decode()}", timeout=START_S) as answer:
            return msgspec.json.decode(answer.read(), type=Lateness)


@contextmanager
def known_server(times: Times) -> Iterator[KnownServer]:
    """Run the engine for as long as the context is open; it ends with us, however we end."""
    command = [sys.executable, "-m", "loadtests.proof.known", "--end-with-stdin", "--port", "0"]
    command += ["--ttft-s", str(times.ttft_s), "--gap-s", str(times.gap_s)]
    process = subprocess.Popen(
        [*command, "--tokens", str(times.tokens)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdin is not None  # noqa: S101 - both are pipes
        assert process.stdout is not None  # noqa: S101
        try:
            yield KnownServer(process.stdout.readline().decode().strip())
        finally:
            process.stdin.close()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()


def main(arguments: Sequence[str] | None = None) -> int:
    """Be the engine."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.proof.known",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ttft-s", type=float, default=0.3, help="to the first token (0.3)")
    parser.add_argument("--gap-s", type=float, default=0.02, help="between two tokens (0.02)")
    parser.add_argument("--tokens", type=int, default=64, help="where nobody says how many (64)")
    parser.add_argument("--port", type=int, default=0, help="0: one that is free (0)")
    parser.add_argument("--end-with-stdin", action="store_true", help="end when stdin does")
    args = parser.parse_args(arguments)
    times = Times(args.ttft_s, args.gap_s, args.tokens)
    try:
        uvloop.run(serve(times, args.port, end_with_stdin=args.end_with_stdin))
    except OSError as exc:
        print(f"port {args.port} cannot be had: {exc.strerror or exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
