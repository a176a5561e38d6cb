"""Every way a request or a command can fail, written for the person who sent it.

    GatewayError
    ├── BadRequest          400  the request itself is wrong
    ├── Unauthorized        401  no key, or not one of ours
    ├── Forbidden           403  asked from where nobody should ask
    ├── NotFound            404  no such path
    │   └── ModelNotFound   404  no such model
    ├── MethodNotAllowed    405
    ├── InUse               409  the model cannot be unloaded: somebody is being answered
    ├── TooLarge            413  the body is over the limit
    ├── EngineRefused       4xx  the engine refused this request, in its own words
    ├── QueueFull           429  too many wait already
    ├── WaitedTooLong       503  no slot came free in time; it will not be sent later
    ├── NoLane              503  no engine can answer for this model now
    ├── EngineBusy          503  every engine says that it has too much to do
    ├── EngineFailed        502  the engine failed, and so did the other or there was none
    ├── EngineSilent        504  the engine took the request and said nothing
    └── Draining            503  the gateway is shutting down
    ClientGone                   the caller hung up: there is nobody to tell

    UsageError                   a command cannot work with what it was given
    └── SettingsError            the configuration cannot be used

What is shown to a client is OpenAI's envelope, `{"error": {message, type, param, code}}`.
The messages are public: no address, no key, nothing of a prompt.
"""

from __future__ import annotations

import math
from typing import ClassVar

import msgspec

#: Clients give up on a Retry-After over this, seconds.
MAX_RETRY_AFTER = 120


class UsageError(Exception):
    """A command cannot work with what it was given: an argument, a file, an address.

    The text says what is wrong and what to change. The command line prints it, without a
    traceback, and exits with 2.
    """


class SettingsError(UsageError):
    """The configuration cannot be used; the text says what to change."""


class ClientGone(Exception):
    """The caller hung up. No answer is owed."""


class GatewayError(Exception):
    """An error written for the caller, in OpenAI's shape.

    Raise it anywhere below the HTTP edge; the edge turns it into an answer, or into
    an error event once an answer has begun.

    Args:
        message: What went wrong and what to do about it; public.
        param: The field of the request that is at fault.
        retry_after: Seconds after which a new attempt makes sense.
    """

    status: int = 500
    type: str = "api_error"
    code: str | None = None
    #: Whether SDKs should try again; None leaves it to their own rules.
    retry: ClassVar[bool | None] = None

    def __init__(
        self, message: str, *, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def envelope(self) -> bytes:
        """The error as OpenAI would write it, JSON."""
        return msgspec.json.encode(
            {
                "error": {
                    "message": self.message,
                    "type": self.type,
                    "param": self.param,
                    "code": self.code,
                }
            }
        )

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What tells a client whether and when to try again."""
        headers = []
        if self.retry_after is not None:
            seconds = min(MAX_RETRY_AFTER, max(1, math.ceil(self.retry_after)))
            headers.append((b"retry-after", str(seconds).encode()))
        if self.retry is not None:
            headers.append((b"x-should-retry", b"true" if self.retry else b"false"))
        return headers


class BadRequest(GatewayError):
    """The request itself is wrong."""

    status = 400
    type = "invalid_request_error"
    code = "bad_request"


class Unauthorized(GatewayError):
    """No key, or not one of ours."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(GatewayError):
    """Asked from where nobody should ask: by another site's page in a browser."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class NotFound(GatewayError):
    """No such path."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    """No such model."""

    code = "model_not_found"


class MethodNotAllowed(GatewayError):
    """The path is there, but not for this method."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class InUse(GatewayError):
    """The model is being used, and stays where it is."""

    status = 409
    type = "invalid_request_error"
    code = "in_use"
    # A client that asks again by itself would fight with those who use it.
    retry = False


class TooLarge(GatewayError):
    """The body is over the limit."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class EngineRefused(GatewayError):
    """The engine refused this request; its own status, type, param and code are passed on.

    Args:
        message: The engine's own words.
        status: Its HTTP status, 4xx.
        kind: What it calls `type`.
        param: The field at fault, if it named one.
        code: Its error code, if it is a word.
    """

    retry = False

    def __init__(
        self, message: str, *, status: int, kind: str, param: str | None, code: str | None
    ) -> None:
        super().__init__(message, param=param)
        self.status = status
        self.type = kind
        self.code = code


class QueueFull(GatewayError):
    """Too many wait for this model already."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class WaitedTooLong(GatewayError):
    """No slot came free in time. This request will not be sent later."""

    status = 503
    code = "waited_too_long"


class NoLane(GatewayError):
    """No engine can answer for this model now."""

    status = 503
    code = "no_engine"


class EngineBusy(GatewayError):
    """Every engine of this model says that it has too much to do."""

    status = 503
    code = "engine_busy"


class EngineFailed(GatewayError):
    """The engine failed, and there was no other to ask."""

    status = 502
    code = "engine_failed"


class EngineSilent(GatewayError):
    """The engine took the request and did not answer in time."""

    status = 504
    code = "engine_silent"
    # Another attempt would wait as long again, three times over.
    retry = False


class Draining(GatewayError):
    """The gateway is shutting down."""

    status = 503
    code = "draining"
