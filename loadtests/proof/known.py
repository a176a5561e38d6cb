"""A server of known times, to check a stopwatch against.

    python -m loadtests.proof.known --ttft-s 0.3 --gap-s 0.02 --tokens 64 --port 8009

Token k of a request, from 0, is sent at its arrival + TTFT + k * gap, at any concurrency.
Each token has its own due time, counted from the arrival, so lag does not add up. The kernel
keeps the time (`timerfd`), since event loops count in milliseconds. `GET /lateness` returns
the remaining lag, so that a check does not blame the client for it.
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
from functools import partial
from typing import cast

import httptools
import msgspec
import uvloop

from loadtests.proof.known_answers import (
    EVENTS_BY_PATH,
    KNOWN_NOT_FOUND,
    KNOWN_PAGES,
    KNOWN_STREAM_HEAD,
    AnswerEvents,
    CompletionRequest,
    bad_request,
    decode_request,
    json_response,
)

LATENESS_PATH = b"/lateness"
#: The quantities that a stopwatch is checked in: seconds, and tokens per second.
QUANTITIES = ("TTFT", "TPOT", "E2E", "output tok/s")
#: How long the server may take to start, and to end, seconds.
START_S = 20.0
END_S = 5.0
#: Most tokens of an answer.
MAX_TOKENS = 100_000

_TFD_TIMER_ABSTIME = 1


class Times(msgspec.Struct, frozen=True):
    """When the tokens of an answer are sent, and how many if the request names no limit."""

    ttft_s: float = 0.3
    gap_s: float = 0.02
    tokens: int = 64

    @property
    def e2e_s(self) -> float:
        """From the request's arrival to the last byte, which is sent with the last token."""
        return self.ttft_s + (self.tokens - 1) * self.gap_s

    def truth(self, level: int) -> dict[str, float]:
        """The true value of each quantity with `level` concurrent requests."""
        rate = level * self.tokens / self.e2e_s
        return dict(zip(QUANTITIES, (self.ttft_s, self.gap_s, self.e2e_s, rate), strict=True))


class Lateness(msgspec.Struct, frozen=True):
    """How late tokens were sent, seconds, and their number."""

    p50: float = 0.0
    p99: float = 0.0
    tokens: int = 0


class _TokenClock:
    """Has streams send their tokens at the due times, and records the lag."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._due: list[tuple[float, int, _Stream]] = []
        self._numbers = itertools.count()  # breaks ties in the heap: streams have no order
        self._late = array("d")
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._timer = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK)
        if self._timer < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        loop.add_reader(self._timer, self._on_timer)

    def schedule(self, stream: _Stream) -> None:
        """Have the stream send its next token when it is due."""
        entry = (stream.due, next(self._numbers), stream)
        heapq.heappush(self._due, entry)
        if self._due[0] is entry:
            self._set(stream.due)

    def lateness(self) -> Lateness:
        """The lag of all tokens so far."""
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
            return  # the timer was set again in the meantime
        now = time.monotonic()
        sent = []
        while self._due and self._due[0][0] <= now:
            due, _, stream = heapq.heappop(self._due)
            if stream.send_token():
                sent.append(due)
                if stream.left:
                    heapq.heappush(self._due, (stream.due, next(self._numbers), stream))
        # The loop sends the written bytes before its next turn: the lag ends there.
        self._loop.call_soon(self._record_lateness, sent)
        if self._due:
            self._set(self._due[0][0])

    def _record_lateness(self, dues: list[float]) -> None:
        now = time.monotonic()
        self._late.extend(now - due for due in dues)


class _Stream:
    """A streamed answer in progress."""

    __slots__ = ("_events", "_gap_s", "_start", "_tokens", "_transport", "_usage", "left")

    def __init__(
        self,
        transport: asyncio.Transport,
        events: AnswerEvents,
        ask: CompletionRequest,
        times: Times,
        at: float,
    ) -> None:
        asked = ask.max_completion_tokens or ask.max_tokens or times.tokens
        self._transport = transport
        self._events = events
        self._usage = ask.stream_options
        self._start = at + times.ttft_s
        self._gap_s = times.gap_s
        self._tokens = self.left = max(1, min(asked, MAX_TOKENS))
        transport.write(KNOWN_STREAM_HEAD)

    @property
    def due(self) -> float:
        """When the next token is to be sent."""
        return self._start + (self._tokens - self.left) * self._gap_s

    def send_token(self) -> bool:
        """Send the next token; False if the client has disconnected."""
        if self._transport.is_closing():
            return False
        events = self._events.before if self.left == self._tokens else b""
        self.left -= 1
        events += self._events.token if self.left else self._events.end(self._tokens, self._usage)
        self._transport.write(events)
        return True


class _Connection(asyncio.Protocol):
    """A client's connection."""

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
            self._transport.write(json_response("200 OK", self._clock.lateness()))
        else:
            self._transport.write(KNOWN_PAGES.get(self._url, KNOWN_NOT_FOUND))

    def _answer(self, events: AnswerEvents) -> None:
        try:
            ask = decode_request(self._body)
        except msgspec.DecodeError as exc:
            self._transport.write(bad_request(f"the request cannot be read: {exc}"))
            return
        if not ask.stream:
            self._transport.write(bad_request("this server only streams: send stream=true"))
            return
        self._clock.schedule(_Stream(self._transport, events, ask, self._times, self._at))


# --- the server ---------------------------------------------------------------------------


async def serve(times: Times, port: int, *, end_with_stdin: bool) -> None:
    """Serve until terminated; print the URL on stdout as soon as requests are accepted."""
    loop = asyncio.get_running_loop()
    exchange = partial(_Connection, _TokenClock(loop), times)
    server = await loop.create_server(exchange, "127.0.0.1", port, backlog=4096)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    over = asyncio.Event()
    if end_with_stdin:
        loop.add_reader(sys.stdin.fileno(), over.set)
    await over.wait()


class KnownServer:
    """A running server of known times, by its URL."""

    def __init__(self, url: str) -> None:
        self.url = url

    def lateness(self) -> Lateness:
        """The lag of the server itself so far."""
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"{self.url}{LATENESS_PATH.decode()}", timeout=START_S) as answer:
            return msgspec.json.decode(answer.read(), type=Lateness)


@contextmanager
def known_server(times: Times) -> Iterator[KnownServer]:
    """A server in a process of its own while the context is open; it ends with this process."""
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
    """Run the server; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.proof.known",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--ttft-s", type=float, default=0.3, help="seconds to the first token (0.3)")
    add("--gap-s", type=float, default=0.02, help="seconds between two tokens (0.02)")
    add("--tokens", type=int, default=64, help="tokens if the request names no limit (64)")
    add("--port", type=int, default=0, help="port; 0 is any free one (0)")
    add("--end-with-stdin", action="store_true", help="end when stdin does")
    args = parser.parse_args(arguments)
    times = Times(args.ttft_s, args.gap_s, args.tokens)
    try:
        uvloop.run(serve(times, args.port, end_with_stdin=args.end_with_stdin))
    except OSError as exc:
        print(
            f"port {args.port} cannot be used: {exc.strerror or exc}; free it or choose another "
            "with --port",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
