"""Comments that keep a waiting stream alive."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from gateway.relay.reply import Reply
from gateway.serving.admission import TIMER_SLACK_S

#: A comment event, which clients ignore.
COMMENT = b": ping\n\n"


class Heartbeat:
    """Sends `message` whenever a stream was silent for a while, as long as the context is open.

    Args:
        reply: The stream.
        period_s: The longest silence, seconds.
        message: What to send now; empty: nothing.
    """

    def __init__(self, reply: Reply, period_s: float, message: Callable[[], bytes]) -> None:
        self._reply = reply
        self._period_s = period_s
        self._message = message
        self._sending: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._reply.last = time.monotonic()
        self._timer = self._loop.call_later(self._period_s, self._tick)

    def __exit__(self, *exc: object) -> None:
        self._timer.cancel()
        if self._sending is not None:
            self._sending.cancel()

    def _tick(self) -> None:
        left = self._reply.last + self._period_s - time.monotonic()
        if left <= TIMER_SLACK_S:
            idle = self._sending is None or self._sending.done()
            if idle and (message := self._message()):
                self._sending = self._loop.create_task(self._reply.events(message))
            left = self._period_s
        self._timer = self._loop.call_later(left, self._tick)
