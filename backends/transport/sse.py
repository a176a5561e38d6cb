"""An engine's event stream: cut into whole events, read on the way, and made safe to relay.

`StreamFilter` reads from each event what is counted (first content, usage, finish reason,
error) and passes it on as it came. Only whole events go out. An answer that breaks off
inside one can still be ended with an event that every client understands.

Real clients break on two things, so these change on the way:
- Blocks without data are left out: comments, and an `id`, which openai-python keeps and
  crashes on at our next comment.
- Usage that the client did not ask for is removed; reasoning gets both of its names.
"""

from __future__ import annotations

from typing import Any

import msgspec

#: The largest event, bytes. A stream with a larger one has failed.
MAX_EVENT = 1024 * 1024

DONE = b"data: [DONE]\n\n"


class Usage(msgspec.Struct):
    """Tokens of one exchange, as the engine counted them; false where it reported none."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __bool__(self) -> bool:
        return self.prompt_tokens > 0 or self.completion_tokens > 0


class _Delta(msgspec.Struct):
    content: msgspec.Raw = msgspec.Raw()
    reasoning: msgspec.Raw = msgspec.Raw()
    reasoning_content: msgspec.Raw = msgspec.Raw()
    tool_calls: msgspec.Raw = msgspec.Raw()


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: msgspec.Raw = msgspec.Raw()
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: Usage | None = None
    error: msgspec.Raw = msgspec.Raw()


_decode = msgspec.json.Decoder(_Event).decode
_EMPTY = frozenset((b"", b'""', b"null", b"[]", b"{}", b"false", b"0"))


def truthy(raw: msgspec.Raw) -> bool:
    """Whether clients would take a piece of JSON for true in an `if`."""
    return bytes(raw) not in _EMPTY


def data_of(event: bytes) -> bytes:
    """The data of one event with LF line ends, its lines joined; empty where it has none."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2:
        return event[6:-2]  # what every engine sends nearly always
    lines = []
    for line in event.split(b"\n"):
        name, _, value = line.partition(b":")
        if name == b"data":
            lines.append(value.removeprefix(b" "))
    return b"\n".join(lines)


class StreamFilter:
    """Filters one stream: bytes in any cut go in, whole events come out.

    Args:
        usage: Whether the client asked for the usage event.

    Attributes:
        content: Whether content, reasoning or a tool call has passed.
        usage: The last usage reported, if any.
        finish: The last finish reason, if any.
        done: Whether `[DONE]` has passed.
        error_event: The data of an error event; empty: there was none.
        error: Why the stream has failed; None: it has not. Nothing passes after it.
    """

    __slots__ = ("_cr", "_tail", "_wants_usage", "content", "done", "error", "error_event",
                 "finish", "usage")  # fmt: skip

    def __init__(self, *, usage: bool) -> None:
        self.content = False
        self.usage: Usage | None = None
        self.finish: str | None = None
        self.done = False
        self.error_event = b""
        self.error: str | None = None
        self._wants_usage = usage
        self._tail = b""
        self._cr = False

    @property
    def complete(self) -> bool:
        """Whether a stream that ends now has ended well."""
        return self.error is None and (self.done or self.finish is not None)

    @property
    def _over(self) -> bool:
        return self.done or self.error is not None

    def terminator(self) -> bytes:
        """What a client still needs at the end of a good stream: `[DONE]`, or nothing."""
        return b"" if self.done else DONE

    def feed(self, data: bytes) -> bytes:
        """The events that `data` completes, as they are to be relayed."""
        if self._over:
            return b""  # nothing after [DONE] is part of the answer
        if self._cr or b"\r" in data:
            data = self._only_lf(data)
        if self._tail:
            data = self._tail + data
        end = data.rfind(b"\n\n") + 2
        if end == 1:  # no event ends here
            self._keep(data)
            return b""
        self._tail = b""
        if end < len(data):
            self._keep(data[end:])
        if data.find(b"\n\n") == end - 2:  # one event: the usual case
            return self.process_event(data if end == len(data) else data[:end])
        out = []
        for event in data[: end - 2].split(b"\n\n"):
            out.append(self.process_event(event + b"\n\n"))
            if self._over:
                break
        return b"".join(out)

    def _keep(self, tail: bytes) -> None:
        if len(tail) > MAX_EVENT:
            self.error = f"an event of over {MAX_EVENT} bytes"
            tail = b""
        self._tail = tail

    def _only_lf(self, data: bytes) -> bytes:
        """The data with LF as line end, also where a CR LF was cut in two."""
        if self._cr:
            data = b"\n" + data.removeprefix(b"\n")
        self._cr = data.endswith(b"\r")
        if self._cr:
            data = data[:-1]
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def process_event(self, event: bytes) -> bytes:  # noqa: C901, PLR0911, PLR0912 - one pass
        """One event as it is to be relayed; empty where it is to be left out."""
        data = data_of(event)
        if not data or data.isspace():
            return b""  # comments, id, retry: blocks without data crash real clients
        if len(event) != len(data) + 8 or not event.startswith(b"data: "):
            event = _event(data)
        if data.startswith(b"[DONE]"):
            self.done = True  # enough for a good end: Ollama may stop without a finish reason
            return event
        try:
            if not data.isascii():
                data.decode()
            decoded = _decode(data)
        except msgspec.ValidationError:
            if data.lstrip()[:1] == b"{":
                return event  # an object of another shape is the client's to read
            self.error = "an event that is not an object"
            return b""
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            self.error = "an event that is not valid JSON"
            return b""
        if truthy(decoded.error):
            self.error_event = data
            self.error = "the engine reported an error in the stream"
            return b""
        if decoded.choices:
            self.inspect(decoded.choices)
            if b'"reasoning' in data:
                both = both_reasoning_names(data, "delta")
                if both is not data:
                    event = _event(both)
        if decoded.usage is not None:
            if decoded.usage:
                self.usage = decoded.usage
            if not self._wants_usage or (decoded.choices and not decoded.usage):
                return _without_usage(event) if decoded.choices else b""
        return event

    def inspect(self, choices: list[_Choice]) -> None:
        """Note the finish reason, and whether there is content."""
        for choice in choices:
            if choice.finish_reason is not None:
                self.finish = choice.finish_reason
            if self.content:
                continue
            delta = choice.delta
            self.content = truthy(choice.text) or (
                delta is not None
                and (
                    truthy(delta.content)
                    or truthy(delta.reasoning)
                    or truthy(delta.reasoning_content)
                    or truthy(delta.tool_calls)
                )
            )


def _event(data: bytes) -> bytes:
    """One event with this data."""
    return b"data: " + data.replace(b"\n", b"\ndata: ") + b"\n\n"


def _without_usage(event: bytes) -> bytes:
    chunk = msgspec.json.decode(data_of(event))
    del chunk["usage"]
    return _event(msgspec.json.encode(chunk))


def both_reasoning_names(data: bytes, part: str) -> bytes:
    """An answer or chunk that has its reasoning under both names in use.

    vLLM and Ollama write `reasoning`; many clients read only `reasoning_content`.
    `part` is the field of a choice that holds it: `delta` or `message`.
    """
    body: dict[str, Any] = msgspec.json.decode(data)
    changed = False
    for choice in body.get("choices") or []:
        inner = choice.get(part)
        if not isinstance(inner, dict):
            continue
        reasoning = inner.get("reasoning") or inner.get("reasoning_content")
        if reasoning and not (inner.get("reasoning") and inner.get("reasoning_content")):
            inner["reasoning"] = inner["reasoning_content"] = reasoning
            changed = True
    return msgspec.json.encode(body) if changed else data
