"""One streamed answer, timed as its reader sees it.

TTFT is from just before the request is sent to the first delta that has something in it:
content, reasoning or a tool call. Gaps are between such deltas. TPOT is what a token takes
after the first, by the server's own count of tokens. E2E is to the last byte. Every
request has a connection of its own, so that no server gains or loses by keeping one open;
making it is in no figure, for real clients have theirs already.
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

#: Longest a server may be silent, seconds, and longest it may take to accept a connection.
READ_TIMEOUT_S = 600.0
CONNECT_TIMEOUT_S = 10.0
#: How much of a server's refusal is read, bytes, and kept, characters.
MAX_ERROR_BYTES = 65536
MAX_ERROR_CHARS = 300
#: How much of a stream is read at once, bytes.
READ_BYTES = 65536

Body: TypeAlias = dict[str, Any]


class BadTarget(ValueError):
    """What was written is no target; the text says how one is."""


@dataclass(frozen=True)
class Target:
    """Something that speaks OpenAI's API.

    Attributes:
        label: What it is called in tables.
        url: Without `/v1`.
        model: Its name of the model.
        key: Sent as a bearer token, where one is needed.
    """

    label: str
    url: str
    model: str
    key: str | None = field(default=None, repr=False)

    @classmethod
    def read(cls, text: str, key: str | None = None) -> Target:
        """`LABEL=URL=MODEL`.

        Raises:
            BadTarget: It is not.
        """
        label, _, rest = text.partition("=")
        url, _, model = rest.partition("=")
        if not label or not model or not url.startswith(("http://", "https://")):
            raise BadTarget(
                f"{text!r} is no LABEL=URL=MODEL, as in ollama=http://127.0.0.1:11434=llama3.3:70b"
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
    """A streamed answer so far. Feed it what arrives; seconds are since `began`.

    Attributes:
        start: Unix time of the beginning.
        deltas_s: When each delta with something in it arrived.
        error: What went wrong, if anything.
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
        """Bytes of an event stream that have just arrived."""
        at_s = time.perf_counter() - self.began
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._process_event(line[5:].strip(), at_s)

    def complete(self) -> None:
        """The last byte is here: what has to be true of a whole answer?"""
        self.e2e_s = time.perf_counter() - self.began
        if self.error is None:
            if not self._done and self.finish is None:
                self.error = "the stream broke off: neither [DONE] nor a finish reason"
            elif not self.deltas_s:
                self.error = "the answer was empty: no token came"

    def fail(self, why: str) -> None:
        """It is over, and not as it should be."""
        self.e2e_s = time.perf_counter() - self.began
        self.error = self.error or why

    def _process_event(self, data: bytes, at_s: float) -> None:
        if data == b"[DONE]":
            self._done = True
            return
        try:
            event = _decoder.decode(data)
        except msgspec.DecodeError as exc:
            self.error = self.error or f"no event of the OpenAI API: {exc}"
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
    """A streamed chat completion of at most so many tokens, usage included."""
    return {
        "model": target.model,
        "messages": messages,
        "max_tokens": tokens_out,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def ask(
    target: Target, asked: Body, timing: Timing | None = None, patience_s: float = READ_TIMEOUT_S
) -> Timing:
    """Ask once and read to the end; whatever goes wrong is in `error`.

    The standard library's client takes a third of the processor's time that httpx takes for a
    request. Where many users of one process start together, each one's TTFT has a part
    of that of all the others in it.

    Args:
        target: Whom.
        asked: As `body` makes it.
        timing: Where to write it down, for who may be interrupted meanwhile.
        patience_s: The longest silence.
    """
    headers = {"content-type": "application/json", "accept-encoding": "identity"}
    if target.key:
        headers["authorization"] = f"Bearer {target.key}"
    content = msgspec.json.encode(asked)
    timing = timing or Timing()
    try:
        place = urlsplit(target.url)
        kind = HTTPSConnection if place.scheme == "https" else HTTPConnection
        with closing(
            kind(place.hostname or "", place.port, timeout=CONNECT_TIMEOUT_S)
        ) as connection:
            connection.connect()
            connection.sock.settimeout(patience_s)
            # Users of one process connect in turn: each would wait for all that connect with it.
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
    """The first model that a server lists; raises `BadTarget` where it lists none."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        if not url.startswith(("http://", "https://")):
            raise ValueError("it begins with neither http:// nor https://")
        asked = Request(f"{url.rstrip('/').removesuffix('/v1')}/v1/models", headers=headers)  # noqa: S310 - seen
        with urlopen(asked, timeout=CONNECT_TIMEOUT_S) as answer:  # noqa: S310 - seen just before
            return msgspec.json.decode(answer.read(), type=_Models).data[0].id
    except (HTTPException, OSError, ValueError, LookupError) as exc:
        raise BadTarget(f"{url} names no model at /v1/models ({exc}): say --model") from exc


class _Refusal(msgspec.Struct):
    error: Any = None
    message: str | None = None


def _error_text(said: bytes) -> str:
    """What a server says of a failure, in one line."""
    try:
        refusal = msgspec.json.decode(said, type=_Refusal)
        told = refusal.error if refusal.error is not None else refusal.message
        if isinstance(told, dict):
            told = told.get("message", told)
    except msgspec.DecodeError:
        told = None
    text = str(told) if told is not None else said.decode(errors="replace")
    return " ".join(text.split())[:MAX_ERROR_CHARS]
