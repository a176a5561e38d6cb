"""How an engine can fail.

    BackendError
    ├── Unreachable     no connection: nothing was sent
    ├── NoAnswer        connected, but no answer within the deadline
    ├── Broken          the connection or the answer broke before its first event
    ├── ServerError     it answered 5xx
    ├── Busy            it answered 429, or 503 because it has too much to do
    ├── Refused         it answered 4xx: the request is at fault, not the engine
    ├── Unsupported     this engine cannot do this as it was started
    └── BrokeOff        the answer broke after its first event was handed out

All but `BrokeOff` are raised before a single byte of the answer was handed out, so the
type alone says whether another engine may still be asked.
"""

from __future__ import annotations

from typing import ClassVar


class BackendError(Exception):
    """An engine did not answer as asked. The text is for the log, not for clients."""

    #: Whether another replica or lane may receive the request instead.
    retryable: ClassVar[bool] = True
    #: Whether the engine is at fault. Its circuit breaker counts these.
    engine_fault: ClassVar[bool] = True


class Unreachable(BackendError):
    """No connection could be made; nothing was sent."""


class NoAnswer(BackendError):
    """The engine took the request and did not answer before the deadline."""


class Broken(BackendError):
    """The answer broke, or made no sense, before its first event."""


class ServerError(BackendError):
    """The engine answered that it failed (5xx)."""

    def __init__(self, message: str, *, status: int = 500) -> None:
        super().__init__(message)
        self.status = status


class Busy(BackendError):
    """The engine has too much to do, and is otherwise healthy.

    `retry_after` is in seconds, where the engine names them.
    """

    engine_fault = False

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Refused(BackendError):
    """The engine refused this request (4xx); another engine would do the same."""

    retryable = False
    engine_fault = False

    def __init__(
        self,
        message: str,
        *,
        status: int,
        type: str = "invalid_request_error",  # noqa: A002 - OpenAI's name for it
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.param = param
        self.code = code


class Unsupported(BackendError):
    """This engine cannot do this as it was started; the text says how to start it."""

    retryable = False
    engine_fault = False


class BrokeOff(BackendError):
    """The answer broke after its first event: it can be neither repaired nor repeated."""

    retryable = False
