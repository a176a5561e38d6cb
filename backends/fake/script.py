"""What a scripted answer is made of: a few steps, which can be put together into any fault.

An answer is a step or a list of steps, played in order on the wire:

    Reset()                                     no answer at all, the connection reset
    [Serve(tokens=3), Reset()]                  three tokens as usual, then reset
    [Serve(tokens=3), Close()]                  … then the end of the connection
    Serve(tokens=3)                             … then a proper end of the body, but no [DONE]
    [Cut(1000), Reset()]                        the first 1000 bytes as usual, then reset
    [Serve(tokens=3), Kill()]                   three tokens, then the engine is dead
    status(503, retry_after=2)                  an error with a JSON body
    stream(chunk("Hi"), chunk(finish="stop"), DONE)    a stream of one's own making

When the steps run out, the body is ended as HTTP wants it. Anything worse must be a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Head:
    """The status line and the headers, just as given; an SSE content type if none is.

    With a `length` the body goes out as it is, right or wrong. Otherwise it is chunked,
    or, where that is off, everything until the connection ends.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    length: int | None = None
    chunked: bool = True


@dataclass(frozen=True, slots=True)
class Send:
    """Some of the body. Before any `Head`: raw bytes on the wire, HTTP and all.

    `split` cuts it into pieces of so many bytes, each its own packet and its own chunk.
    """

    data: bytes
    split: int | None = None


@dataclass(frozen=True, slots=True)
class Pause:
    """Nothing for a while; ends at once when the client hangs up, as every wait here."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Silence:
    """Nothing, until the client hangs up."""


@dataclass(frozen=True, slots=True)
class Reset:
    """The connection ends with a TCP reset. What was sent before does arrive."""


@dataclass(frozen=True, slots=True)
class Close:
    """The connection ends with a FIN, wherever the answer is."""


@dataclass(frozen=True, slots=True)
class Kill:
    """The engine dies here, as by `kill -9`, and with it all it does for anybody."""


@dataclass(frozen=True, slots=True)
class Serve:
    """What the engine would have answered.

    With `tokens` only its beginning: so many tokens of a stream and nothing of its end,
    or of any other answer the head and half of the body. `headers` go on top of its own.
    """

    tokens: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cut:
    """An answer (as usual, if none is given) up to exactly so many bytes, head included."""

    after: int
    answer: Answer = Serve()


@dataclass(frozen=True, slots=True)
class Repeat:
    """Steps played again and again: `times`, or for ever."""

    answer: Answer
    times: int | None = None


Step: TypeAlias = Head | Send | Pause | Silence | Reset | Close | Kill | Serve | Cut | Repeat
Answer: TypeAlias = Step | Sequence[Step]


def steps(answer: Answer) -> Sequence[Step]:
    """The steps of an answer, one or many."""
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
    """One chunk of a chat, as OpenAI writes it; further arguments go into its delta.

    `chunk(role="assistant")`, `chunk(reasoning_content="Hm")`, `chunk(tool_calls=[…])`.
    """
    if content is not None:
        delta["content"] = content
    choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
    made: dict[str, Any] = {
        "id": "chatcmpl-scripted",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": "scripted",
        "choices": [choice],
    }
    if usage is not None:
        made["usage"] = usage
    return made


def usage(prompt: int = 0, completion: int = 0) -> dict[str, int]:
    """Token counts, for `chunk(usage=…)`; all zero as some engines send them first."""
    total = prompt + completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}


def usage_chunk(prompt: int, completion: int) -> dict[str, Any]:
    """The chunk that ends a stream with its token counts: it has no choices."""
    return chunk(usage=usage(prompt, completion)) | {"choices": []}


def stream(
    *parts: Mapping[str, Any] | bytes,
    split: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> list[Step]:
    """A 200 that streams these parts: JSON as events, bytes as they are."""
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
    """An answer in one piece: this JSON, or else an error in OpenAI's envelope."""
    if body is None:
        kind = "invalid_request_error" if code < 500 else "server_error"
        error = {"message": message, "type": kind, "param": None, "code": code}
        body = {"error": error}
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    fields = {"content-type": "application/json", **(headers or {})}
    if retry_after is not None:
        fields["retry-after"] = f"{retry_after:g}"
    return [Head(code, fields, length=len(data)), Send(data)]
