"""A request to generate, read as far as the decision needs and no further.

Only the top level of the JSON is decoded; values stay the client's own bytes. The messages
are read once, for what they require of an engine.
"""

from __future__ import annotations

import codecs
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import msgspec

from backends import calls
from backends.calls import Body, Call
from gateway.errors import BadRequest, ClientGone, TooLarge
from gateway.relay.exchange import Request
from gateway.routing.needs import Needs

MAX_FIELDS = 1_000
MAX_MESSAGES = 10_000
MAX_PARTS = 10_000
MAX_NAME = 256
#: Commas in a body, those in its texts included. Each is a token to any model, so this is more
#: than fits; and reading millions of small values would block all other requests.
MAX_COMMAS = 500_000
#: Bytes of a field that is a name, a number or a few options.
MAX_SMALL = 4096
#: Assumed bytes of text per token, where no tokenizer has counted.
BYTES_PER_TOKEN = 4

#: Whole numbers of a request, and their bounds; a number outside them is refused.
BOUNDS = {
    "n": (1, 16),
    "best_of": (1, 16),
    "max_tokens": (1, 1_048_576),
    "max_completion_tokens": (1, 1_048_576),
    "min_tokens": (0, 1_048_576),
    "top_logprobs": (0, 20),
}

#: Fields that reach into the engine's template or code, and are refused. The exception is
#: `chat_template_kwargs` with the switches below, which models document.
UNSAFE = ("chat_template", "chat_template_kwargs", "mm_processor_kwargs", "logits_processors")
TEMPLATE_SWITCHES = frozenset(("enable_thinking", "thinking", "reasoning_effort"))


class _Key(str):
    """The name of a field at the top level; its own type, so that fields are counted."""

    __slots__ = ()


class _Role(str):
    """A message's role; its own type, so that messages are counted."""

    __slots__ = ()


class _Type(str):
    """The type of a part of a message's content; its own type, so that parts are counted."""

    __slots__ = ()


class _Limit:
    """Counts values of a type while they are decoded, and raises BadRequest at the limit."""

    def __init__(self, limit: int, what: str, param: str | None = None) -> None:
        self.count = 0
        self._limit = limit
        self._what = what
        self._param = param

    def __call__(self, kind: type[str], value: str) -> str:
        self.count += 1
        if self.count > self._limit:
            raise BadRequest(
                f"A request may contain up to {self._limit} {self._what}.", param=self._param
            )
        return kind(value)


class _Url(msgspec.Struct):
    url: str = ""


class _Part(msgspec.Struct):
    type: _Type
    image_url: _Url | str | None = None
    audio_url: _Url | str | None = None
    video_url: _Url | str | None = None


class _Message(msgspec.Struct):
    role: _Role
    content: msgspec.Raw = msgspec.Raw()


async def read_body(
    headers: Mapping[bytes, bytes],
    receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
    limit: int,
) -> bytes:
    """The whole body of a request.

    Raises:
        TooLarge: It is larger than `limit` bytes. Where `Content-Length` says so, nothing is
            read.
        BadRequest: It is compressed.
        ClientGone: The client hung up before its end.
    """
    if headers.get(b"content-encoding", b"identity") != b"identity":
        raise BadRequest("Send the body uncompressed.", param="content-encoding")
    announced = headers.get(b"content-length", b"")
    if announced.isdigit() and int(announced) > limit:
        raise TooLarge(f"The body is over {limit} bytes, the limit of this gateway.")
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise TooLarge(f"The body is over {limit} bytes, the limit of this gateway.")
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def parse(path: str, body: bytes, headers: Mapping[bytes, bytes]) -> Request:
    """Read the body of a request for one of the generating paths.

    Raises:
        BadRequest: It is malformed, or it has a field or an image that is not safe to pass on.
    """
    fields = _top_level(body)
    model = _typed(fields, "model", str)
    if not model:
        raise BadRequest("Name a `model`; GET /v1/models lists them.", param="model")
    if len(model) > MAX_NAME:
        raise BadRequest(f"`model` is over {MAX_NAME} characters.", param="model")
    numbers = _numbers(fields)
    _reject_unsafe_fields(fields)
    stream = bool(_typed(fields, "stream", bool)) and path != calls.EMBEDDINGS
    options = _typed(fields, "stream_options", dict) or {}
    call = Call(path, fields, stream=stream, wants_usage=options.get("include_usage") is True)
    needs = Needs(
        multiple_choices=max(numbers.get("n", 1), numbers.get("best_of", 1)) > 1,
        tokens=len(body) // BYTES_PER_TOKEN
        + max(numbers.get("max_tokens", 0), numbers.get("max_completion_tokens", 0)),
    )
    # Open WebUI sends the header with every request, empty where it asks for no task.
    background = bool(headers.get(b"x-task", b"").strip())
    if path == calls.CHAT:
        messages = _messages(fields)
        needs.chat = True
        needs.images = _have_image(messages)
        needs.tools = _is_filled_list(fields.get("tools"))
        if not needs.tools:
            fields.pop("tools", None)  # an empty list, which vLLM refuses, is no tools
        needs.forced_tools = needs.tools and _forces_tools(fields.get("tool_choice"))
        call.continues = messages[-1].role == "assistant" and not needs.tools
        background = background or (not stream and not needs.tools and _is_task(messages))
    elif path == calls.COMPLETIONS:
        if not _present(fields.get("prompt")):
            raise BadRequest("`prompt` is missing.", param="prompt")
    elif not _present(fields.get("input")):
        raise BadRequest("`input` is missing.", param="input")
    needs.embeddings = path == calls.EMBEDDINGS
    return Request(model, call, needs, background)


def _excerpt(raw: msgspec.Raw | None, size: int) -> bytes:
    """The first `size` bytes of a value; empty where there is no value."""
    return b"" if raw is None else bytes(memoryview(raw)[:size])


def _present(raw: msgspec.Raw | None) -> bool:
    """Whether a field has a value other than null."""
    return raw is not None and _excerpt(raw, 4) != b"null"


def _is_filled_list(raw: msgspec.Raw | None) -> bool:
    """Whether a field is a list that is not empty."""
    return _excerpt(raw, 1) == b"[" and _excerpt(raw, 16)[1:].lstrip()[:1] != b"]"


def _top_level(body: bytes) -> Body:
    """The fields of a JSON object, their values undecoded; raises BadRequest."""
    if len(body) > MAX_COMMAS and body.count(b",") > MAX_COMMAS:
        raise BadRequest("The body contains too many values.")
    limit = _Limit(MAX_FIELDS, "fields")
    try:
        if not body.isascii():
            _check_utf8(body)
        fields = msgspec.json.decode(body, type=dict[_Key, msgspec.Raw], dec_hook=limit)
    except msgspec.ValidationError:
        raise BadRequest("The body must be a JSON object.") from None
    except UnicodeDecodeError:
        raise BadRequest("The body is not UTF-8.") from None
    except msgspec.DecodeError as exc:
        raise BadRequest(f"The body is not valid JSON: {exc}.") from None
    except RecursionError:
        raise BadRequest("The body is nested too deeply.") from None
    if limit.count != len(fields):
        raise BadRequest("The body names a field twice.")
    return {str(name): value for name, value in fields.items()}


def _check_utf8(body: bytes) -> None:
    """Raise UnicodeDecodeError where the body is not UTF-8; in pieces, which are dropped."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    for start in range(0, len(body), 65536):
        decode(body[start : start + 65536])
    decode(b"", final=True)


def _typed(fields: Body, name: str, kind: type[Any]) -> Any:
    """The value of a small field; None where it is absent or null. Raises BadRequest."""
    raw = fields.get(name)
    if raw is None:
        return None
    if len(raw) > MAX_SMALL:
        raise BadRequest(f"`{name}` is over {MAX_SMALL} bytes.", param=name)
    try:
        return msgspec.json.decode(raw, type=kind | None)
    except (msgspec.DecodeError, RecursionError):
        expected = {
            str: "a string", bool: "true or false", dict: "an object", int: "a whole number",
        }[kind]  # fmt: skip
        raise BadRequest(f"`{name}` must be {expected}.", param=name) from None


def _numbers(fields: Body) -> dict[str, int]:
    """The numbers of `BOUNDS` that a request has; raises BadRequest outside the bounds."""
    numbers = {}
    for name, (low, high) in BOUNDS.items():
        value = _typed(fields, name, int)
        if value is None:
            continue
        if not low <= value <= high:
            raise BadRequest(f"`{name}` must be from {low} to {high}.", param=name)
        numbers[name] = value
    return numbers


def _reject_unsafe_fields(fields: Body) -> None:
    """Raise BadRequest for a field that reaches into the engine's template or code."""
    for name in UNSAFE:
        if not _present(fields.get(name)):
            continue
        if name == "chat_template_kwargs":
            switches = _typed(fields, name, dict)
            if TEMPLATE_SWITCHES.issuperset(switches) and not any(
                isinstance(value, dict | list) for value in switches.values()
            ):
                continue
        raise BadRequest(f"This gateway does not accept `{name}`.", param=name)


def _messages(fields: Body) -> list[_Message]:
    raw = fields.get("messages")
    if raw is None or _excerpt(raw, 1) != b"[":
        raise BadRequest("`messages` must be a list.", param="messages")
    limit = _Limit(MAX_MESSAGES, "messages", "messages")
    try:
        messages = msgspec.json.decode(raw, type=list[_Message], dec_hook=limit)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise BadRequest(
            f"`messages` is not a list of messages: {exc}.", param="messages"
        ) from None
    if not messages:
        raise BadRequest("`messages` is empty.", param="messages")
    return messages


def _have_image(messages: list[_Message]) -> bool:
    """Whether any message has an image.

    Raises:
        BadRequest: The engine would have to fetch an image, a sound or a video. It must not
            be made to call addresses of the client's choice.
    """
    has_image = False
    limit = _Limit(MAX_PARTS, "parts of content", "messages")
    for message in messages:
        if _excerpt(message.content, 1) != b"[":
            continue
        try:
            parts = msgspec.json.decode(message.content, type=list[_Part], dec_hook=limit)
        except (msgspec.DecodeError, RecursionError):
            raise BadRequest("A message's `content` is malformed.", param="messages") from None
        for part in parts:
            has_image = has_image or part.type == "image_url" or part.image_url is not None
            # Whatever the type is: vLLM reads all three fields of a part that has a `uuid`.
            for field in (part.image_url, part.audio_url, part.video_url):
                url = field.url if isinstance(field, _Url) else field
                if url is not None and not url.startswith("data:"):
                    raise BadRequest(
                        "Send images as data: URLs. This gateway fetches no addresses.",
                        param="messages",
                    )
    return has_image


def _forces_tools(choice: msgspec.Raw | None) -> bool:
    """Whether `tool_choice` requires a tool call."""
    return choice is not None and bytes(choice) not in (b'"auto"', b'"none"', b"null")


def _is_task(messages: list[_Message]) -> bool:
    """Whether this is Open WebUI's own call for a title, tags or follow-ups."""
    return any(m.role == "user" and _excerpt(m.content, 10) == b'"### Task:' for m in messages)
