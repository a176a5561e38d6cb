"""Scripted answers: a few steps that combine into any fault.

An answer is a step or a list of steps, which are played in order:

    Reset()                                     no answer at all, the connection reset
    [Serve(tokens=3), Reset()]                  three tokens as usual, then reset
    [Serve(tokens=3), Close()]                  … then the end of the connection
    Serve(tokens=3)                             … then a proper end of the body, but no [DONE]
    [Cut(1000), Reset()]                        the first 1000 bytes as usual, then reset
    [Serve(tokens=3), Kill()]                   three tokens, then the engine is dead
    status(503, retry_after=2)                  an error with a JSON body
    stream(chunk("Hi"), chunk(finish="stop"), DONE)    a stream of these events

After the last step the body ends as HTTP requires. Any other end must be a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Head:
    """The status line and these headers; the content type is SSE unless they name one.

    With a `length`, right or wrong, the body is sent as it is. Otherwise it is chunked, or,
    with `chunked` off, lasts until the connection ends.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    length: int | None = None
    chunked: bool = True


@dataclass(frozen=True, slots=True)
class Send:
    """A part of the body. Before any `Head`: raw bytes, HTTP included.

    `split` cuts it into pieces of so many bytes, each a packet and a chunk of its own.
    """

    data: bytes
    split: int | None = None


@dataclass(frozen=True, slots=True)
class Pause:
    """Nothing for so long; as every wait, it ends at once when the client hangs up."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Silence:
    """Nothing, until the client hangs up."""


@dataclass(frozen=True, slots=True)
class Reset:
    """The connection ends with a TCP reset; what was sent before arrives."""


@dataclass(frozen=True, slots=True)
class Close:
    """The connection ends with a FIN, even inside the answer."""


@dataclass(frozen=True, slots=True)
class Kill:
    """The engine dies, as by `kill -9`, and all its requests with it."""


@dataclass(frozen=True, slots=True)
class Serve:
    """The engine's normal answer.

    With `tokens` only its beginning: so many tokens of a stream without its end, or the head
    and half of the body of a whole answer. `headers` are added to its own.
    """

    tokens: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cut:
    """The first `after` bytes of an answer, head included; by default of the normal one."""

    after: int
    answer: Answer = Serve()


@dataclass(frozen=True, slots=True)
class Repeat:
    """An answer played `times` times, or for ever."""

    answer: Answer
    times: int | None = None


Step: TypeAlias = Head | Send | Pause | Silence | Reset | Close | Kill | Serve | Cut | Repeat
Answer: TypeAlias = Step | Sequence[Step]


def steps(answer: Answer) -> Sequence[Step]:
    """The steps of an answer."""
    return answer if isinstance(answer, Sequence) else (answer,)


def event(data: object) -> bytes:
    """One server-sent event with this JSON as its data."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def chunk(
    content: str | None = None,
    *,
    finish: str | None = None,
    usage: Mapping[str, int] | None = None,
    logprobs: object = None,
    **delta: object,
) -> dict[str, Any]:
    """One chunk of a chat in OpenAI's form; further arguments go into its delta.

    `chunk(role="assistant")`, `chunk(reasoning_content="Hm")`, `chunk(tool_calls=[…])`.
    """
    if content is not None:
        delta["content"] = content
    choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
    built: dict[str, Any] = {
        "id": "chatcmpl-scripted",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": "scripted",
        "choices": [choice],
    }
    if usage is not None:
        built["usage"] = usage
    return built


def usage(prompt: int = 0, completion: int = 0) -> dict[str, int]:
    """Token counts, for `chunk(usage=…)`; all zero by default, as some engines send first."""
    total = prompt + completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}


def usage_chunk(prompt: int, completion: int) -> dict[str, Any]:
    """The usage chunk at the end of a stream: it has no choices."""
    return chunk(usage=usage(prompt, completion)) | {"choices": []}


def stream(
    *parts: Mapping[str, Any] | bytes,
    split: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> list[Step]:
    """A 200 that streams these parts: JSON becomes events, bytes stay as they are."""
    sent = (part if isinstance(part, bytes) else event(part) for part in parts)
    return [Head(headers=headers or {}), *(Send(data, split) for data in sent)]


def status(
    code: int,
    message: str = "scripted",
    *,
    retry_after: float | None = None,
    body: object = None,
    headers: Mapping[str, str] | None = None,
) -> list[Step]:
    """An answer in one piece: this JSON, or an error in OpenAI's envelope."""
    if body is None:
        kind = "invalid_request_error" if code < 500 else "server_error"
        error = {"message": message, "type": kind, "param": None, "code": code}
        body = {"error": error}
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    fields = {"content-type": "application/json", **(headers or {})}
    if retry_after is not None:
        fields["retry-after"] = f"{retry_after:g}"
    return [Head(code, fields, length=len(data)), Send(data)]
