"""How an engine can fail.

    BackendError
    ├── Unreachable     no connection: nothing was sent
    ├── Silent          connected, but no answer within the deadline
    ├── Broken          the connection or the answer broke before its first event
    ├── Sick            it said 5xx
    ├── Busy            it said 429, or 503 because it has too much to do
    ├── Refused         it said 4xx: the request is at fault, not the engine
    ├── Unsupported     this engine cannot do what was asked, whoever asks
    └── BrokeOff        the answer broke after its first event was handed out

All but `BrokeOff` are raised before a single byte of the answer was handed out,
so the type alone says whether another engine may still be asked.
"""

from __future__ import annotations

from typing import ClassVar


class BackendError(Exception):
    """An engine did not answer as asked. The text is for the log, not for strangers."""

    #: Whether another replica or lane may be asked instead.
    elsewhere: ClassVar[bool] = True
    #: Whether the engine is to blame.
    blame: ClassVar[bool] = True


class Unreachable(BackendError):
    """No connection could be made; nothing was sent."""


class Silent(BackendError):
    """The engine took the request and did not answer in time."""


class Broken(BackendError):
    """The answer broke, or made no sense, before its first event."""


class Sick(BackendError):
    """The engine said that it failed (5xx)."""

    def __init__(self, message: str, *, status: int = 500) -> None:
        super().__init__(message)
        self.status = status


class Busy(BackendError):
    """The engine has too much to do. It is not ill."""

    blame = False

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Refused(BackendError):
    """The engine refused this request (4xx); asking elsewhere would not help."""

    elsewhere = False
    blame = False

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
    """This engine has no way to do this; the text says what would give it one."""

    elsewhere = False
    blame = False


class BrokeOff(BackendError):
    """The answer broke after its first event: it can be neither repaired nor repeated."""

    elsewhere = False
