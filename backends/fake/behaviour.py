"""What one kind of engine answers: its endpoints, its error bodies, the form of its streams.

A behaviour decides and sends nothing. It waits only where the real engine makes its client
wait (loading, falling asleep). The modules named after the engines have their differences.
"""

from __future__ import annotations

import base64
import itertools
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any, ClassVar

import msgspec

from backends.fake.process import FakeProcess
from backends.fake.script import usage
from backends.fake.wire import Received

Json = dict[str, Any]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
GENERATING = frozenset((CHAT, COMPLETIONS, EMBEDDINGS))


@dataclass(frozen=True, slots=True)
class PlainAnswer:
    """An answer in one piece: JSON, text, or bytes."""

    body: object
    status: int = 200
    type: str | None = None

    @property
    def encoded(self) -> bytes:
        """The body, as bytes."""
        match self.body:
            case bytes():
                return self.body
            case str():
                return self.body.encode()
        return msgspec.json.encode(self.body)


class Refusal(Exception):
    """The request cannot be served; `answer` is what the engine sends instead."""

    def __init__(self, answer: PlainAnswer) -> None:
        super().__init__(answer)
        self.answer = answer


@dataclass(slots=True)
class Job:
    """One answer to be generated, as the request asks for it."""

    id: str
    created: int
    path: str
    model: str
    prompt_tokens: int
    tokens: int
    finish: str
    stream: bool = False
    usage: bool = False  # whether the stream has a usage event
    choices: int = 1
    inputs: int = 1  # texts to be embedded …
    base64: bool = False  # … as packed numbers

    @property
    def text(self) -> str:
        """The whole text of the answer."""
        return "".join(text(index) for index in range(self.tokens))

    @property
    def counts(self) -> dict[str, int]:
        """The token counts, as in `usage`."""
        return usage(self.prompt_tokens, self.tokens * self.choices)


def text(index: int) -> str:
    """The text of one token."""
    return f" token{index}" if index else "token0"


class Behaviour(ABC):
    """What one kind of engine answers. It keeps no state: that is the process's."""

    name: ClassVar[str]
    #: Whether a stream's head comes at once, before a slot is free, or with its first token.
    head_first: ClassVar[bool] = False
    #: Whether a model takes memory when it is requested, and not when the process starts.
    loads_when_asked: ClassVar[bool] = False
    closes_after_stream: ClassVar[bool] = False
    closes_after_error: ClassVar[bool] = False
    #: Idle connections are closed after so long, seconds; None: never.
    keep_alive_s: ClassVar[float | None] = None
    json_type: ClassVar[str] = "application/json"
    stream_type: ClassVar[str] = "text/event-stream"
    id_prefix: ClassVar[Mapping[str, str]] = {CHAT: "chatcmpl-", COMPLETIONS: "cmpl-"}

    def __init__(self, process: FakeProcess) -> None:
        self.process = process
        self._ids = itertools.count(1)

    # What differs

    def headers(self) -> dict[str, str]:
        """The headers of every answer."""
        return {"date": formatdate(usegmt=True)}

    def stream_headers(self) -> dict[str, str]:
        """The headers of a stream."""
        return {**self.headers(), "content-type": self.stream_type}

    @abstractmethod
    def refuse(
        self, status: int, message: str, kind: str = "", param: str | None = None
    ) -> Refusal:
        """The refusal in this engine's words, to be raised."""

    def admit(self, request: Received) -> None:  # noqa: B027 - most take any
        """Check a request before it is read; raises `Refusal`."""

    def operation(self, request: Received) -> str:
        """The operation a request asks for, on a path with several; elsewhere empty."""
        return ""

    @abstractmethod
    async def control(self, request: Received) -> PlainAnswer:
        """The answer to a request that generates nothing; raises `Refusal`."""

    @abstractmethod
    def job(self, request: Received) -> Job:
        """What is to be generated; raises `Refusal`."""

    async def prepare(self, job: Job) -> None:  # noqa: B027 - most are always
        """Return when the model can start on this."""

    @abstractmethod
    def token(self, job: Job, index: int) -> Iterable[bytes]:
        """What is sent with one token, each item in a write of its own."""

    @abstractmethod
    def closing(self, job: Job) -> Iterable[bytes]:
        """What is sent right after the last token."""

    @abstractmethod
    def whole(self, job: Job) -> bytes:
        """The answer in one piece."""

    # What all have in common

    def names(self) -> list[str]:
        """The names of all its models."""
        return [*self.process.models, *self.process.embedding]

    def new_job(self, request: Received, body: Json, limit: object = None) -> Job:
        """A job for a valid body; `limit` is the longest answer that it asks for, tokens."""
        tokens, finish = self.process.tokens, "stop"
        if isinstance(limit, int) and (limit < tokens or body.get("ignore_eos")):
            tokens, finish = limit, "length"
        if stops := body.get("stop"):
            stops = [stops] if isinstance(stops, str) else stops
            stopped = (i for i in range(tokens) if any(stop in text(i) for stop in stops))
            if (index := next(stopped, None)) is not None:
                tokens, finish = index, "stop"
        stream = bool(body.get("stream")) and request.path != EMBEDDINGS
        options = body.get("stream_options") or {}
        inputs = body.get("input")
        # A single text may also come as the list of its tokens.
        several = isinstance(inputs, list) and isinstance(inputs[0], str | list)
        return Job(
            id=f"{self.id_prefix.get(request.path, '')}{next(self._ids)}",
            created=int(time.time()),
            path=request.path,
            model=str(body.get("model", "")),
            prompt_tokens=prompt_tokens(body),
            tokens=tokens if request.path != EMBEDDINGS else 1,
            finish=finish,
            stream=stream,
            usage=stream and bool(options.get("include_usage")),
            inputs=len(body["input"]) if several else 1,
            base64=body.get("encoding_format") == "base64",
        )


def prompt_tokens(body: Json) -> int:
    """The tokens of a prompt: one for each word."""

    def words(value: object) -> int:
        match value:
            case str():
                return len(value.split())
            case dict():
                return sum(words(value[key]) for key in ("content", "text") if key in value)
            case list():
                return sum(words(item) for item in value)
            case int():
                return 1
        return 0

    return max(1, sum(words(body.get(name)) for name in ("messages", "prompt", "input")))


def vectors(job: Job) -> list[Json]:
    """One short vector for each text; the first number is that of the text."""
    embeddings: list[Json] = []
    for index in range(job.inputs):
        numbers = [index + 1.0, 0.5, -0.5, 0.25]
        packed = base64.b64encode(struct.pack("<4f", *numbers)).decode()
        vector = packed if job.base64 else numbers
        embeddings.append({"object": "embedding", "index": index, "embedding": vector})
    return embeddings
