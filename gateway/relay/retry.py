"""Second attempts, as a share of all requests."""

from __future__ import annotations

#: The share of all requests that may be tried a second time, and how many such attempts may
#: be saved up if no server has more slots. The case: an engine dies under load, and every
#: request to it is sent again to the one that is left.
RETRY_SHARE = 0.2
RETRY_SAVED = 10.0


class RetryBudget:
    """Limits second attempts to a share of all requests, so that no failure is multiplied.

    As many may be saved up as one server has slots: its death is one fault, and no request
    that it had not begun to answer shall be lost.
    """

    def __init__(self) -> None:
        self._limit = self._saved = RETRY_SAVED

    def earn(self, slots: int) -> None:
        """A request has come, for servers of so many slots at most."""
        if slots > self._limit:
            self._saved += slots - self._limit
            self._limit = slots
        self._saved = min(self._limit, self._saved + RETRY_SHARE)

    def spend(self) -> bool:
        """Whether one request may be tried again; counts it."""
        if self._saved < 1:
            return False
        self._saved -= 1
        return True
