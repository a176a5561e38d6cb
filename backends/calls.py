"""A request to an engine, and its answer, streamed or whole."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from backends.errors import (
    BrokeOff,
)
from backends.transport import http, sse

Body = dict[str, msgspec.Raw]
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
TRUE = msgspec.Raw(b"true")
FALSE = msgspec.Raw(b"false")


@dataclass(slots=True)
class Call:
    """One request to generate, as the gateway read it.

    `body` holds the top level only; its values are the client's own bytes.
    `wants_usage`: the client asked for a usage event in its stream.
    `continues`: the last message is the assistant's, to be gone on with.
    """

    path: str
    body: Body
    stream: bool = False
    wants_usage: bool = False
    continues: bool = False


@dataclass(frozen=True, slots=True)
class Bridged:
    """A request as one engine wants it, and the fields it could not be given."""

    body: Body
    dropped: tuple[str, ...] = ()


@dataclass(slots=True)
class Answer:
    """A good answer, open from its first event on.

    `dropped` names the fields of the request the engine was not given. Always
    `close()` it; the connection is used again only if all was read.
    """

    response: http.Response
    watch: sse.Watch
    dropped: tuple[str, ...] = ()
    reusable: bool = True
    _pending: bytes = b""
    _ended: bool = False

    async def read(self) -> bytes:
        """The next whole events, as they came; empty at the end of a good stream.

        Raises:
            BrokeOff: The stream broke, went silent, or ended before its end.
        """
        if self._pending:
            data, self._pending = self._pending, b""
            return data
        while not self._ended:
            if self.watch.fault is not None:
                raise BrokeOff(self.watch.fault)
            try:
                raw = await self.response.read()
            except http.HttpError as exc:
                raise BrokeOff(str(exc)) from exc
            if raw:
                if data := self.watch.feed(raw):
                    return data
            else:
                self._ended = True
                if not self.watch.complete:
                    raise BrokeOff("the stream ended before its end")
                return self.watch.ending()
        return b""

    def close(self) -> None:
        """Give the connection back, or end it where the answer was not read to its end."""
        self.response.close(reuse=self.reusable)


@dataclass(slots=True)
class Whole:
    """A good answer that came in one piece."""

    body: bytes
    usage: sse.Usage | None
    finish: str | None
    dropped: tuple[str, ...] = ()


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Whole(msgspec.Struct):
    usage: sse.Usage | None = None
    choices: list[_Choice] = []
    error: msgspec.Raw = msgspec.Raw()


decode_whole = msgspec.json.Decoder(_Whole).decode
_decode_body = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def renamed(call: Call, model: str, **changes: msgspec.Raw | None) -> Body:
    """The body under the engine's name of the model, fields set, or removed where None."""
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


_ONLY_USAGE = msgspec.Raw(b'{"include_usage":true}')


def _with_usage(options: msgspec.Raw | None) -> msgspec.Raw:
    if options is None or bytes(options) == b"null":
        return _ONLY_USAGE
    try:
        given = _decode_body(options)
    except msgspec.DecodeError:
        return _ONLY_USAGE
    given["include_usage"] = TRUE
    return msgspec.Raw(msgspec.json.encode(given))
