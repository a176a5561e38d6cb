"""Events are handled one after the other: what an event causes begins after that event has ended.

Handlers may post further events. The first caller of `post` drains the queue, in one loop, so no
handler is ever entered while another runs, and each sees the effects of all before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class EventQueue:
    """Events in the order in which they were posted; models that share a GPU share one queue."""

    def __init__(self) -> None:
        self._events: deque[Callable[[], None]] = deque()
        self._draining = False

    def post(self, event: Callable[[], None]) -> None:
        """Handle an event: now, or, while another is being handled, after it.

        Raises:
            Exception: The first that a handler raised, after all events were handled; only
                to the caller that drains the queue.
        """
        self._events.append(event)
        if self._draining:
            return
        self._draining = True
        error: Exception | None = None
        try:
            while self._events:
                try:
                    self._events.popleft()()
                except Exception as exc:  # noqa: BLE001 - raised below; the others must not be lost
                    error = error or exc
        finally:
            self._draining = False
        if error is not None:
            raise error
