"""Comments that keep a waiting stream alive."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from gateway.relay.reply import Reply

HEARTBEAT = b": ping\n\n"
#: A timer may be as early.
EARLY_S = 0.001


class Heart:
    """Keeps a waiting stream alive: sends what `beat` says whenever nothing was sent for a while.

    An empty beat is none.
    """

    def __init__(self, reply: Reply, period_s: float, beat: Callable[[], bytes]) -> None:
        self._reply = reply
        self._period_s = period_s
        self._beat = beat
        self._beating: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._reply.last = time.monotonic()
        self._timer = self._loop.call_later(self._period_s, self._due)

    def __exit__(self, *exc: object) -> None:
        self._timer.cancel()
        if self._beating is not None:
            self._beating.cancel()

    def _due(self) -> None:
        left = self._reply.last + self._period_s - time.monotonic()
        if left <= EARLY_S:
            if (self._beating is None or self._beating.done()) and (beat := self._beat()):
                self._beating = self._loop.create_task(self._reply.events(beat))
            left = self._period_s
        self._timer = self._loop.call_later(left, self._due)
