"""What each engine says: its endpoints, its words for an error, the forms of its streams.

Nearly all of it is decided and nothing waited for: a kind waits only where the engine
makes its client wait (loading, falling asleep). How the three differ is in the modules
named after them.
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
    """An answer in one piece: JSON, or text, or bytes."""

    body: object
    status: int = 200
    type: str | None = None

    @property
    def encoded(self) -> bytes:
        """Its bytes."""
        match self.body:
            case bytes():
                return self.body
            case str():
                return self.body.encode()
        return msgspec.json.encode(self.body)


class Refusal(Exception):
    """The request cannot be served; this is what the engine says instead."""

    def __init__(self, answer: PlainAnswer) -> None:
        super().__init__(answer)
        self.answer = answer


@dataclass(slots=True)
class Job:
    """One answer to be generated."""

    id: str
    created: int
    path: str
    model: str
    prompt_tokens: int
    tokens: int
    finish: str
    stream: bool = False
    usage: bool = False  # whether the stream tells its token counts
    choices: int = 1
    inputs: int = 1  # texts to be embedded
    base64: bool = False  # … packed, not as numbers

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(text(index) for index in range(self.tokens))

    @property
    def counts(self) -> dict[str, int]:
        """Its usage."""
        return usage(self.prompt_tokens, self.tokens * self.choices)


def text(index: int) -> str:
    """The text of one token."""
    return f" token{index}" if index else "token0"


class Behaviour(ABC):
    """What one kind of engine answers. It keeps no state: that is the process's."""

    name: ClassVar[str]
    #: Whether a stream's head comes at once, before there is a slot, or with its first token.
    head_first: ClassVar[bool] = False
    #: Whether a model takes memory when somebody asks for it, and not when the process starts.
    loads_when_asked: ClassVar[bool] = False
    closes_after_stream: ClassVar[bool] = False
    closes_after_error: ClassVar[bool] = False
    #: After so long it closes idle connections; None: never.
    keep_alive_s: ClassVar[float | None] = None
    json_type: ClassVar[str] = "application/json"
    stream_type: ClassVar[str] = "text/event-stream"
    id_prefix: ClassVar[Mapping[str, str]] = {CHAT: "chatcmpl-", COMPLETIONS: "cmpl-"}

    def __init__(self, process: FakeProcess) -> None:
        self.process = process
        self._ids = itertools.count(1)

    # What each does its own way

    def headers(self) -> dict[str, str]:
        """What it says of itself in each answer."""
        return {"date": formatdate(usegmt=True)}

    def stream_headers(self) -> dict[str, str]:
        """The headers of a stream."""
        return {**self.headers(), "content-type": self.stream_type}

    @abstractmethod
    def refuse(
        self, status: int, message: str, kind: str = "", param: str | None = None
    ) -> Refusal:
        """The refusal in its own words, to be raised."""

    def admit(self, request: Received) -> None:  # noqa: B027 - most take any
        """Let this request in, whatever it asks for, or raise `Refusal`."""

    def operation(self, request: Received) -> str:
        """What this asks for where one path stands for several things, else nothing."""
        return ""

    @abstractmethod
    async def control(self, request: Received) -> PlainAnswer:
        """The answer to a request that generates nothing; raises `Refusal`."""

    @abstractmethod
    def job(self, request: Received) -> Job:
        """What is to be generated; raises `Refusal`."""

    async def prepare(self, job: Job) -> None:  # noqa: B027 - most are always
        """Return when the model is where it can start on this."""

    @abstractmethod
    def token(self, job: Job, index: int) -> Iterable[bytes]:
        """What is sent with one token: each a write of its own."""

    @abstractmethod
    def closing(self, job: Job) -> Iterable[bytes]:
        """What is sent right after the last token."""

    @abstractmethod
    def whole(self, job: Job) -> bytes:
        """The answer in one piece."""

    # What they have in common

    def names(self) -> list[str]:
        """All its models."""
        return [*self.process.models, *self.process.embedding]

    def new_job(self, request: Received, body: Json, limit: object = None) -> Job:
        """A job for a body that was found good; `limit` is the longest answer asked for."""
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
        given = body.get("input")
        # One text may come as a list, too: of its tokens.
        texts = given if isinstance(given, list) and isinstance(given[0], str | list) else [given]
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
            inputs=len(texts),
            base64=body.get("encoding_format") == "base64",
        )


def prompt_tokens(body: Json) -> int:
    """The tokens of a prompt: one for each word, as everything here has one."""

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
    """One short vector for each text, its first number telling which."""
    made: list[Json] = []
    for index in range(job.inputs):
        numbers = [index + 1.0, 0.5, -0.5, 0.25]
        packed = base64.b64encode(struct.pack("<4f", *numbers)).decode()
        vector = packed if job.base64 else numbers
        made.append({"object": "embedding", "index": index, "embedding": vector})
    return made
