"""One exchange: what is known of it, and the line to its client."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeAlias

from backends.calls import Call
from backends.transport import sse
from gateway.errors import ClientGone
from gateway.routing.needs import Needs

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Headers: TypeAlias = list[tuple[bytes, bytes]]


@dataclass(slots=True)
class Exchange:
    """What is known of one exchange; filled on its way, logged at its end.

    Times are seconds on the monotonic clock, zero where the exchange did not get so far.
    """

    id: str
    path: str = ""
    key: str = ""
    model: str = ""
    stream: bool = False
    background: bool = False
    lane: str = ""
    cause: str = ""
    reason: str = ""
    dropped: tuple[str, ...] = ()
    attempts: int = 0
    outcome: str = ""
    status: int = 0
    began: float = 0.0
    sent: float = 0.0
    first: float = 0.0
    ended: float = 0.0
    usage: sse.Usage | None = None


class Lifeline:
    """Ends its block when the client hangs up, or when `cut` is called.

    The client is watched as soon as its request is read: while the request waits, before
    the engine has answered, and between any two bytes.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._cause: BaseException | None = None

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - the block runs in one
        self._task = task
        self._watcher = asyncio.get_running_loop().create_task(self._watch())
        return self

    def cut(self, cause: BaseException) -> None:
        """End the block with this exception."""
        if self._cause is None:
            self._cause = cause
            self._task.cancel()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.cut(ClientGone())

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._watcher.cancel()
        if self._cause is not None and kind is asyncio.CancelledError:
            self._task.uncancel()
            raise self._cause from None


@dataclass(slots=True)
class Request:
    """A request to generate: the engine's call, and what the choice of a lane requires.

    `background`: the chat page's own call (for a title, tags), for which no user waits.
    """

    model: str
    call: Call
    needs: Needs
    background: bool = False
