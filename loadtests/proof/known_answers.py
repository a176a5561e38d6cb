"""The requests and answers of the server of known times, encoded once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

KNOWN_MODEL = "known"
CHAT_PATH_BYTES = b"/v1/chat/completions"
COMPLETIONS_PATH = b"/v1/completions"


class StreamOptions(msgspec.Struct):
    """The `stream_options` of a request."""

    include_usage: bool = False


class CompletionRequest(msgspec.Struct):
    """The fields of a request that decide its answer."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


decode_request = msgspec.json.Decoder(CompletionRequest).decode


def json_response(status: str, content: object) -> bytes:
    """A whole HTTP response with a JSON body."""
    body = msgspec.json.encode(content)
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def bad_request(message: str) -> bytes:
    """A whole HTTP response that refuses a request, in OpenAI's form."""
    return json_response(
        "400 Bad Request", {"error": {"message": message, "type": "invalid_request"}}
    )


def _event(kind: str, choices: list[dict[str, Any]], **more: object) -> bytes:
    """A server-sent event as a chunk of a chunked body."""
    chunk = {
        "id": KNOWN_MODEL,
        "object": kind,
        "created": 0,
        "model": KNOWN_MODEL,
        "choices": choices,
        **more,
    }
    data = b"data: " + msgspec.json.encode(chunk) + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


@dataclass(frozen=True)
class AnswerEvents:
    """The encoded events of one kind of answer."""

    kind: str
    before: bytes
    token: bytes
    last: bytes

    def end(self, tokens: int, usage: StreamOptions | None) -> bytes:
        """The last token, with finish reason, usage and the end of the stream."""
        usage_event = b""
        if usage is not None and usage.include_usage:
            count = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1}
            usage_event = _event(self.kind, [], usage=count)
        return self.last + usage_event + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def _chat_events() -> AnswerEvents:
    kind = "chat.completion.chunk"

    def event(delta: dict[str, str], finish: str | None = None) -> bytes:
        return _event(kind, [{"index": 0, "delta": delta, "finish_reason": finish}])

    return AnswerEvents(
        kind,
        before=event({"role": "assistant", "content": ""}),
        token=event({"content": " word"}),
        last=event({"content": " word"}, "length"),
    )


def _completion_events() -> AnswerEvents:
    kind = "text_completion"

    def event(finish: str | None = None) -> bytes:
        return _event(kind, [{"index": 0, "text": " word", "finish_reason": finish}])

    return AnswerEvents(kind, before=b"", token=event(), last=event("length"))


EVENTS_BY_PATH = {CHAT_PATH_BYTES: _chat_events(), COMPLETIONS_PATH: _completion_events()}
KNOWN_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
KNOWN_PAGES = {
    b"/health": json_response("200 OK", {}),
    b"/v1/models": json_response(
        "200 OK",
        {"object": "list", "data": [{"id": KNOWN_MODEL, "object": "model", "owned_by": "twolane"}]},
    ),
}
KNOWN_NOT_FOUND = json_response(
    "404 Not Found", {"error": {"message": "no such page", "type": "not_found"}}
)
