"""The script of a fake engine's answer, which a request carries, and the check of the answer.

A stream is checked against its script word by word: a proxy that breaks answers has no result,
however fast it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec


class BenchError(Exception):
    """The benchmark has no result; the message says why, and what to do if that is known."""


class BrokenAnswer(BenchError):
    """An answer is not what the engine sent."""


BENCH_MODEL = "bench"
API_KEY = "bench-key-0123456789"
CHAT_PATH = "/v1/chat/completions"
# No two neighbours are alike, and each stream begins at another one: a token that is lost,
# doubled, swapped or taken from the stream next door shows in the text.
ANSWER_WORDS = tuple(f" w{n:02d}" for n in range(97))
JSON_TEXT = "It is done: " + "".join(ANSWER_WORDS[:12])


class Script(msgspec.Struct, omit_defaults=True):
    """What the fake engine must do; sent as the user's message, which no proxy changes.

    Attributes:
        tokens: Tokens to send.
        period_ms: Milliseconds between two tokens.
        spread: The streams of this period take turns within it; otherwise all step together.
        first: Index of the first word.
        hold: Send nothing after `tokens` tokens, until the client disconnects; with no tokens
            not even the response head.
        marker: Log when this request arrives and when its connection is lost.
    """

    tokens: int = 0
    period_ms: int = 1
    spread: bool = False
    first: int = 0
    hold: bool = False
    marker: str = ""

    def text(self) -> str:
        """The text of the whole answer."""
        words = itertools.islice(
            itertools.cycle(ANSWER_WORDS), self.first, self.first + self.tokens
        )
        return "".join(words)


#: About as long as the system prompt of a chat page.
BENCH_SYSTEM_PROMPT = (
    "You are a helpful assistant. Answer in the language of the question, briefly and "
    "to the point. Where you are not certain, say so. Use lists only where they help, and "
    "put code into fenced blocks that name the language. Do not repeat the question. "
)


def chat_request(script: Script, *, stream: bool = True, model: str = BENCH_MODEL) -> bytes:
    """A whole HTTP request for a chat, head and body, as an OpenAI client writes it."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [
            {"role": "system", "content": BENCH_SYSTEM_PROMPT},
            {"role": "user", "content": msgspec.json.encode(script).decode()},
        ],
        "max_tokens": script.tokens or 16,
        "temperature": 0.7,
    }
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    content = msgspec.json.encode(body)
    head = (
        f"POST {CHAT_PATH} HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: application/json\r\n"
        f"content-type: application/json\r\nuser-agent: overhead\r\n"
        f"authorization: Bearer {API_KEY}\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    message: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None


class _Tokens(msgspec.Struct):
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Tokens | None = None
    error: msgspec.Raw = msgspec.Raw()


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as received: the time of its request, and each piece of the body with its time."""

    asked_at: float
    status: int
    pieces: Sequence[tuple[float, bytes]]

    def body(self) -> bytes:
        """The whole body."""
        return b"".join(piece for _, piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Stream:
    """A whole stream: the number of its events, and the arrival of its first word."""

    events: int
    first_word_at: float


def read_stream(answer: Answer, script: Script) -> Stream:
    """Check a stream from its first byte to its last.

    Raises:
        BrokenAnswer: A word is missing, doubled or foreign, or the finish reason, the
            token count or [DONE] is missing or misplaced.
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
        for choice in chunk.choices:
            finish = choice.finish_reason or finish
            if choice.delta.content:
                words.append(choice.delta.content)
                first_word_at = first_word_at or at
    if not done:
        raise BrokenAnswer(f"a stream ended without [DONE], after {events} events")
    if "".join(words) != script.text():
        raise BrokenAnswer(
            f"a stream of {script.tokens} tokens has other words, {len(words)} of them"
        )
    if finish != "stop" or usage is None or usage.completion_tokens != script.tokens:
        raise BrokenAnswer(f"a stream ended with finish reason {finish!r} and usage {usage}")
    return Stream(events, first_word_at)


def _events(pieces: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The data of each event, with the arrival of its last byte."""
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
    if [one.message.content for one in chat.choices] != [JSON_TEXT] or chat.usage is None:
        raise BrokenAnswer(f"an answer with another text: {body[:300]!r}")
