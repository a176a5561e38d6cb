"""Every way in which a request or a command can fail, written for its sender.

    GatewayError
    ├── BadRequest          400  the request itself is wrong
    ├── Unauthorized        401  no API key, or an unknown one
    ├── Forbidden           403  sent by another site's page, through a browser
    ├── NotFound            404  no such path
    │   └── ModelNotFound   404  no such model
    ├── MethodNotAllowed    405  the path does not have this method
    ├── InUse               409  the model cannot be unloaded: it is answering a request
    ├── TooLarge            413  the body is over the limit
    ├── EngineRefused       4xx  the engine refused this request, in its own words
    ├── QueueFull           429  the queue of the model is full
    ├── WaitedTooLong       503  no slot became free in time; the request is not sent later
    ├── NoLane              503  no engine can serve the model now
    ├── EngineBusy          503  every engine of the model reports that it is overloaded
    ├── EngineFailed        502  the engine failed, and so did the other or there was none
    ├── EngineSilent        504  the engine accepted the request and did not answer in time
    └── Draining            503  the gateway is shutting down
    ClientGone                   the client hung up, so no answer is owed

    UsageError                   a command cannot work with what it was given
    └── SettingsError            the configuration cannot be used

A client receives OpenAI's envelope, `{"error": {message, type, param, code}}`. The messages
are public: they contain no address, no key and nothing of a prompt.
"""

from __future__ import annotations

import json
import math
from typing import ClassVar

#: Longest Retry-After, seconds: clients give up on a longer one.
MAX_RETRY_AFTER_S = 120


class UsageError(Exception):
    """A command cannot work with what it was given: an argument, a file, an address.

    The text says what is wrong and what to change. The command line prints it, without a
    traceback, and exits with 2.
    """


class SettingsError(UsageError):
    """The configuration cannot be used; the text says what to change."""


class ClientGone(Exception):
    """The client hung up, so no answer is owed."""


class GatewayError(Exception):
    """An error written for the caller, in OpenAI's shape.

    Raise it anywhere below the HTTP edge. The edge turns it into a response, or into an
    error event once a stream has begun.

    Args:
        message: What went wrong and what to do about it; public.
        param: The field of the request that is at fault.
        retry_after: Seconds after which a new attempt makes sense.
    """

    status: int = 500
    type: str = "api_error"
    code: str | None = None
    #: Whether SDKs should retry; None leaves it to their own rules.
    retry: ClassVar[bool | None] = None

    def __init__(
        self, message: str, *, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def envelope(self) -> bytes:
        """The error in OpenAI's envelope, as JSON."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        # The standard library's: whatever prints a UsageError imports this module, and is fast.
        return json.dumps({"error": error}, ensure_ascii=False, separators=(",", ":")).encode()

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The headers that tell a client whether and when to retry."""
        headers = []
        if self.retry_after is not None:
            seconds = min(MAX_RETRY_AFTER_S, max(1, math.ceil(self.retry_after)))
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
    """The request has no API key, or an unknown one."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class Forbidden(GatewayError):
    """The request was sent by another site's page, through a browser."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class NotFound(GatewayError):
    """The path does not exist."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    """The model does not exist."""

    code = "model_not_found"


class MethodNotAllowed(GatewayError):
    """The path exists, but not for this method."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class InUse(GatewayError):
    """The model is answering requests, and stays in memory."""

    status = 409
    type = "invalid_request_error"
    code = "in_use"
    # A client that retries by itself would compete with those that use the model.
    retry = False


class TooLarge(GatewayError):
    """The body is larger than the limit."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class EngineRefused(GatewayError):
    """The engine refused this request; its status, type, param and code are passed on.

    Args:
        message: The engine's own message.
        status: The engine's HTTP status, 4xx.
        kind: The engine's error `type`.
        param: The field at fault, if the engine named one.
        code: The engine's error code, if it is a word.
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
    """The queue of the model is full."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"


class WaitedTooLong(GatewayError):
    """No slot became free in time. The request is not sent later."""

    status = 503
    code = "waited_too_long"


class NoLane(GatewayError):
    """No engine can serve the model now."""

    status = 503
    code = "no_engine"


class EngineBusy(GatewayError):
    """Every engine of the model reports that it is overloaded."""

    status = 503
    code = "engine_busy"


class EngineFailed(GatewayError):
    """The engine failed, and so did the other one, or there was none."""

    status = 502
    code = "engine_failed"


class EngineSilent(GatewayError):
    """The engine accepted the request and did not answer in time."""

    status = 504
    code = "engine_silent"
    # Each of an SDK's retries would wait as long again.
    retry = False


class Draining(GatewayError):
    """The gateway is shutting down."""

    status = 503
    code = "draining"
