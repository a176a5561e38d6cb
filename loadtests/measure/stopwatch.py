"""Sends one request and times its streamed answer as the client receives it.

TTFT is from just before the request is sent to the first delta with content, reasoning or a
tool call; gaps are between such deltas. TPOT is the time per token after the first, by the
server's own token count. E2E is to the last byte. Every request has a connection of its
own, so no server gains or loses by keep-alive; no figure includes opening it, since real
clients have theirs open.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, TypeAlias
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import msgspec

#: Timeouts of a read and of connecting, seconds.
READ_TIMEOUT_S = 600.0
CONNECT_TIMEOUT_S = 10.0
#: How much of an error response is read, bytes, and kept, characters.
MAX_ERROR_BYTES = 65536
MAX_ERROR_CHARS = 300
#: Most bytes of a stream that one read returns.
READ_BYTES = 65536

Body: TypeAlias = dict[str, Any]


class BadTarget(ValueError):
    """A text does not describe a target; the message says how to write one."""


@dataclass(frozen=True)
class Target:
    """A server with OpenAI's API, and a model of it.

    Attributes:
        label: Its name in tables.
        url: Base URL without `/v1`.
        model: The model's name at this server.
        key: API key, sent as a bearer token.
    """

    label: str
    url: str
    model: str
    key: str | None = field(default=None, repr=False)

    @classmethod
    def read(cls, text: str, key: str | None = None) -> Target:
        """The target that a text `LABEL=URL=MODEL` describes.

        Raises:
            BadTarget: The text has another form.
        """
        label, _, rest = text.partition("=")
        url, _, model = rest.partition("=")
        if not label or not model or not url.startswith(("http://", "https://")):
            raise BadTarget(
                f"{text!r} is not a target: write LABEL=URL=MODEL, as in "
                "ollama=http://127.0.0.1:11434=llama3.3:70b"
            )
        return cls(label, url.rstrip("/").removesuffix("/v1"), model, key)

    def __str__(self) -> str:
        return f"{self.label}={self.url}={self.model}"


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning_content or self.reasoning or self.tool_calls)


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Event)


@dataclass
class Timing:
    """The times of one streamed answer; seconds are counted from `began`.

    Attributes:
        began: Steady clock just before the request was sent.
        start: Unix time of the same moment.
        deltas_s: Arrival of each delta with content, reasoning or a tool call.
        lane: Header `x-gateway-lane`.
        reason: Header `x-gateway-reason`.
        error: The first error; None if there was none.
    """

    began: float = field(default_factory=time.perf_counter)
    start: float = field(default_factory=time.time)
    deltas_s: list[float] = field(default_factory=list)
    e2e_s: float = 0.0
    tokens_in: int | None = None
    tokens_out: int | None = None
    finish: str | None = None
    lane: str | None = None
    reason: str | None = None
    error: str | None = None
    text: str = ""
    _rest: bytes = b""
    _done: bool = False

    @property
    def ttft_s(self) -> float | None:
        return self.deltas_s[0] if self.deltas_s else None

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.deltas_s, self.deltas_s[1:], strict=False)]

    @property
    def tpot_s(self) -> float | None:
        if not self.tokens_out or self.tokens_out < 2 or not self.deltas_s:
            return None
        return (self.deltas_s[-1] - self.deltas_s[0]) / (self.tokens_out - 1)

    def feed(self, piece: bytes) -> None:
        """Take bytes of the event stream that have just arrived."""
        at_s = time.perf_counter() - self.began
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._process_event(line[5:].strip(), at_s)

    def complete(self) -> None:
        """Note the end of the stream, and an error if the answer is not whole."""
        self.e2e_s = time.perf_counter() - self.began
        if self.error is None:
            if not self._done and self.finish is None:
                self.error = "the stream broke off: neither [DONE] nor a finish reason"
            elif not self.deltas_s:
                self.error = "the answer was empty: it has no token"

    def fail(self, why: str) -> None:
        """Note the end of the request, and `why` it failed unless an error is known."""
        self.e2e_s = time.perf_counter() - self.began
        self.error = self.error or why

    def _process_event(self, data: bytes, at_s: float) -> None:
        if data == b"[DONE]":
            self._done = True
            return
        try:
            event = _decoder.decode(data)
        except msgspec.DecodeError as exc:
            self.error = self.error or f"not an event of OpenAI's API: {exc}"
            return
        if event.error:
            self.error = self.error or _error_text(msgspec.json.encode(event.error))
        if event.usage is not None:
            self.tokens_in = event.usage.prompt_tokens
            self.tokens_out = event.usage.completion_tokens
        for choice in event.choices:
            self.finish = choice.finish_reason or self.finish
            if choice.delta:
                self.deltas_s.append(at_s)
                self.text += choice.delta.content or ""


def request_body(target: Target, messages: list[dict[str, str]], tokens_out: int) -> Body:
    """The body of a streamed chat completion of at most `tokens_out` tokens, with usage."""
    return {
        "model": target.model,
        "messages": messages,
        "max_tokens": tokens_out,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def ask(
    target: Target, body: Body, timing: Timing | None = None, timeout_s: float = READ_TIMEOUT_S
) -> Timing:
    """Send a request and read its answer to the end; a failure is in the timing's `error`.

    The standard library's client needs a third of the CPU time of httpx. That matters where
    many users of one process start together, since each one's TTFT then contains a part of
    the CPU time of all others.

    Args:
        target: The server.
        body: From `request_body`.
        timing: The timing to fill, for a caller that may be interrupted meanwhile.
        timeout_s: Longest time without any byte.
    """
    headers = {"content-type": "application/json", "accept-encoding": "identity"}
    if target.key:
        headers["authorization"] = f"Bearer {target.key}"
    content = msgspec.json.encode(body)
    timing = timing or Timing()
    try:
        place = urlsplit(target.url)
        kind = HTTPSConnection if place.scheme == "https" else HTTPConnection
        with closing(
            kind(place.hostname or "", place.port, timeout=CONNECT_TIMEOUT_S)
        ) as connection:
            connection.connect()
            connection.sock.settimeout(timeout_s)
            # Not before connecting: users of one process connect one after another.
            timing.began, timing.start = time.perf_counter(), time.time()
            connection.request("POST", f"{place.path}/v1/chat/completions", content, headers)
            with connection.getresponse() as answer:
                timing.lane = answer.getheader("x-gateway-lane")
                timing.reason = answer.getheader("x-gateway-reason")
                if answer.status != HTTPStatus.OK:
                    timing.fail(f"{answer.status}: {_error_text(answer.read(MAX_ERROR_BYTES))}")
                    return timing
                while piece := answer.read1(READ_BYTES):
                    timing.feed(piece)
        timing.complete()
    except (HTTPException, OSError, ValueError) as exc:
        timing.fail(f"{type(exc).__name__}: {exc}")
    return timing


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def first_model(url: str, key: str | None) -> str:
    """The first model that a server lists; raises `BadTarget` if it lists none."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        if not url.startswith(("http://", "https://")):
            raise ValueError("it begins with neither http:// nor https://")
        request = Request(f"{url.rstrip('/').removesuffix('/v1')}/v1/models", headers=headers)  # noqa: S310 - checked
        with urlopen(request, timeout=CONNECT_TIMEOUT_S) as answer:  # noqa: S310 - checked
            return msgspec.json.decode(answer.read(), type=_Models).data[0].id
    except (HTTPException, OSError, ValueError, LookupError) as exc:
        raise BadTarget(f"{url} lists no model at /v1/models ({exc}): give --model") from exc


class _Refusal(msgspec.Struct):
    error: Any = None
    message: str | None = None


def _error_text(body: bytes) -> str:
    """The message of an error response, in one line."""
    try:
        refusal = msgspec.json.decode(body, type=_Refusal)
        message = refusal.error if refusal.error is not None else refusal.message
        if isinstance(message, dict):
            message = message.get("message", message)
    except msgspec.DecodeError:
        message = None
    text = str(message) if message is not None else body.decode(errors="replace")
    return " ".join(text.split())[:MAX_ERROR_CHARS]
