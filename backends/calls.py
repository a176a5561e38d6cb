"""A request to an engine, and its answer: streamed or whole.

A request keeps the client's own bytes: only the fields that an engine needs in other words
are replaced. An answer is relayed as it came, event by event.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from backends.errors import BrokeOff
from backends.transport import http, sse

#: The top level of a JSON body; the values are the client's own bytes.
Body = dict[str, msgspec.Raw]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"

TRUE = msgspec.Raw(b"true")
FALSE = msgspec.Raw(b"false")
_ONLY_USAGE = msgspec.Raw(b'{"include_usage":true}')


@dataclass(slots=True)
class Call:
    """One request to generate, as the gateway read it.

    Attributes:
        path: One of the paths above.
        body: The client's body.
        stream: Whether the answer is to be streamed.
        wants_usage: Whether the client asked for a usage event in its stream.
        continues: Whether the last message is the assistant's, for the engine to continue.
    """

    path: str
    body: Body
    stream: bool = False
    wants_usage: bool = False
    continues: bool = False


@dataclass(frozen=True, slots=True)
class BridgedRequest:
    """A request in the words of one engine; `dropped` names fields that it cannot take."""

    body: Body
    dropped: tuple[str, ...] = ()


@dataclass(slots=True)
class StreamedAnswer:
    """A good answer, open from its first event on. Always `close()` it.

    Attributes:
        response: The HTTP response. Its connection is reused only if all was read.
        filter: What passes the bytes on; it holds usage and finish reason.
        dropped: Names of the request's fields that the engine could not take.
        reusable: Whether the engine keeps the connection open after a stream.
        pending: The first events, read but not handed out yet.
    """

    response: http.Response
    filter: sse.StreamFilter
    dropped: tuple[str, ...] = ()
    reusable: bool = True
    pending: bytes = b""
    _ended: bool = False

    async def read(self) -> bytes:
        """The next whole events, as they came; empty at the end of a good stream.

        Raises:
            BrokeOff: The stream broke, fell silent, or ended before it was complete.
        """
        if self.pending:
            data, self.pending = self.pending, b""
            return data
        while not self._ended:
            if self.filter.error is not None:
                raise BrokeOff(self.filter.error)
            try:
                raw = await self.response.read()
            except http.HttpError as exc:
                raise BrokeOff(str(exc)) from exc
            if raw:
                if data := self.filter.feed(raw):
                    return data
            else:
                self._ended = True
                if not self.filter.complete:
                    raise BrokeOff("the stream ended before it was complete")
                return self.filter.terminator()
        return b""

    def close(self) -> None:
        """Give the connection back, or cut it where the answer was not read to its end."""
        self.response.close(reuse=self.reusable)


@dataclass(slots=True)
class WholeAnswer:
    """A good answer in one piece; `dropped` names fields that the engine could not take."""

    body: bytes
    usage: sse.Usage | None
    finish: str | None
    dropped: tuple[str, ...] = ()


class AnswerChoice(msgspec.Struct):
    """One choice of a whole answer, as far as it is read."""

    finish_reason: str | None = None


class AnswerBody(msgspec.Struct):
    """The body of a whole answer, as far as it is read."""

    usage: sse.Usage | None = None
    choices: list[AnswerChoice] = []
    error: msgspec.Raw = msgspec.Raw()

    @property
    def finish(self) -> str | None:
        """The finish reason of the first choice."""
        return self.choices[0].finish_reason if self.choices else None


decode_answer = msgspec.json.Decoder(AnswerBody).decode
_decode_options = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def body_for(call: Call, model: str, **changes: msgspec.Raw | None) -> Body:
    """The body of a call under the engine's name of the model.

    Args:
        call: The call. A stream is made to report usage, whether the client wants it or not.
        model: The engine's name of the model.
        changes: Fields to be set, or removed where None.
    """
    body = dict(call.body)
    body["model"] = msgspec.Raw(msgspec.json.encode(model))
    if call.stream:
        body["stream_options"] = _with_usage(body.get("stream_options"))
    for name, value in changes.items():
        if value is None:
            body.pop(name, None)
        else:
            body[name] = value
    return body


def _with_usage(options: msgspec.Raw | None) -> msgspec.Raw:
    """Stream options that ask for usage, in addition to what the client asked for."""
    if options is None or bytes(options) == b"null":
        return _ONLY_USAGE
    try:
        asked = _decode_options(options)
    except msgspec.DecodeError:
        return _ONLY_USAGE
    asked["include_usage"] = TRUE
    return msgspec.Raw(msgspec.json.encode(asked))
