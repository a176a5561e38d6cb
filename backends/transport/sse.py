"""What is seen in an OpenAI stream while its bytes pass by.

`Watch` cuts the bytes into whole events, looks into each for what is counted (first
content, usage, finish, error) and hands the event on as it came. Only whole events go
out, so that an answer which breaks off in the middle of one can still be ended with an
event that every client understands. Two things are changed on the way, because real
clients break on them: what is no data is left out (comments, and an `id`, which sticks
and makes openai-python crash at our next comment), and what the client did not ask for
(usage) or would miss (the other name of `reasoning`) is taken out or put in.
"""

from __future__ import annotations

from typing import Any

import msgspec

#: The largest event, bytes. More than this without an end is no event.
MAX_EVENT = 1024 * 1024

DONE = b"data: [DONE]\n\n"


class Usage(msgspec.Struct):
    """Tokens of one exchange, as the engine counted them."""

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
    """Whether a piece of JSON would count as something in the clients' `if`."""
    return bytes(raw) not in _EMPTY


def data_of(event: bytes) -> bytes:
    """The data of one event (LF line ends), its lines joined; empty where it has none."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2:
        return event[6:-2]  # what every engine sends nearly always
    lines = []
    for line in event.split(b"\n"):
        name, _, value = line.partition(b":")
        if name == b"data":
            lines.append(value.removeprefix(b" "))
    return b"\n".join(lines)


class Watch:
    """Watches one stream. Feed it bytes in any cut; it returns whole events.

    Args:
        usage: Whether the client asked for the usage event.

    What it has seen is in its attributes. After a `fault` it takes nothing more.
    """

    __slots__ = ("_cr", "_tail", "_wants_usage", "content", "done", "error", "fault", "finish",
                 "usage")  # fmt: skip

    def __init__(self, *, usage: bool) -> None:
        self.content = False  # some content, reasoning or tool call has passed
        self.usage: Usage | None = None
        self.finish: str | None = None
        self.done = False
        self.error = b""  # the data of an error event
        self.fault: str | None = None  # why this is no good stream (any more)
        self._wants_usage = usage
        self._tail = b""
        self._cr = False

    @property
    def complete(self) -> bool:
        """Whether a stream that ends now has ended well."""
        return self.fault is None and (self.done or self.finish is not None)

    @property
    def _over(self) -> bool:
        return self.done or self.fault is not None

    def ending(self) -> bytes:
        """What a good stream still owes its client at its end."""
        return b"" if self.done else DONE

    def feed(self, data: bytes) -> bytes:
        """The events that `data` completes, ready to be relayed."""
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
            return self._pass(data if end == len(data) else data[:end])
        out = []
        for event in data[: end - 2].split(b"\n\n"):
            out.append(self._pass(event + b"\n\n"))
            if self._over:
                break
        return b"".join(out)

    def _keep(self, tail: bytes) -> None:
        if len(tail) > MAX_EVENT:
            self.fault = f"an event of over {MAX_EVENT} bytes"
            tail = b""
        self._tail = tail

    def _only_lf(self, data: bytes) -> bytes:
        """Line ends as LF, also where a CR LF was cut in two."""
        if self._cr:
            data = b"\n" + data.removeprefix(b"\n")
        self._cr = data.endswith(b"\r")
        if self._cr:
            data = data[:-1]
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _pass(self, event: bytes) -> bytes:  # noqa: C901, PLR0911, PLR0912 - one look, all to be seen
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
            seen = _decode(data)
        except msgspec.ValidationError:
            if data.lstrip()[:1] == b"{":
                return event  # an object of another shape: the client's business
            self.fault = "an event that is no object"
            return b""
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            self.fault = "an event that is no valid JSON"
            return b""
        if truthy(seen.error):
            self.error = data
            self.fault = "the engine reported an error in the stream"
            return b""
        if seen.choices:
            self._look(seen.choices)
            if b'"reasoning' in data:
                both = both_reasoning_names(data, "delta")
                if both is not data:
                    event = _event(both)
        if seen.usage is not None:
            if seen.usage:
                self.usage = seen.usage
            if not self._wants_usage or (seen.choices and not seen.usage):
                return _without_usage(event) if seen.choices else b""
        return event

    def _look(self, choices: list[_Choice]) -> None:
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
    return b"data: " + data.replace(b"\n", b"\ndata: ") + b"\n\n"


def _without_usage(event: bytes) -> bytes:
    said = msgspec.json.decode(data_of(event))
    del said["usage"]
    return _event(msgspec.json.encode(said))


def both_reasoning_names(data: bytes, part: str) -> bytes:
    """An answer or chunk whose reasoning is there under both names in use.

    vLLM and Ollama say `reasoning`; many clients read only `reasoning_content`.
    `part` is where it stands in a choice: `delta` or `message`.
    """
    said: dict[str, Any] = msgspec.json.decode(data)
    changed = False
    for choice in said.get("choices") or []:
        inner = choice.get(part)
        if not isinstance(inner, dict):
            continue
        reasoning = inner.get("reasoning") or inner.get("reasoning_content")
        if reasoning and not (inner.get("reasoning") and inner.get("reasoning_content")):
            inner["reasoning"] = inner["reasoning_content"] = reasoning
            changed = True
    return msgspec.json.encode(said) if changed else data
