"""Second attempts, as a share of all requests."""

from __future__ import annotations

#: Of all requests, how many may be tried a second time (case: an engine dies under
#: load, and every request to it is sent again to the one that is left), and how many
#: such attempts may be saved up, if no server has more slots.
RETRY_SHARE = 0.2
RETRY_SAVED = 10.0


class RetryBudget:
    """Second attempts as a share of all requests, so that no failure is multiplied.

    What is saved up is enough for all that one server may have at once: its death is one
    fault, and none of those that it had not begun to answer shall be lost to it.
    """

    def __init__(self) -> None:
        self._most = self._saved = RETRY_SAVED

    def earn(self, slots: int) -> None:
        """A request came, for servers of so many slots at most."""
        if slots > self._most:
            self._saved += slots - self._most
            self._most = slots
        self._saved = min(self._most, self._saved + RETRY_SHARE)

    def spend(self) -> bool:
        """Whether one may be tried again."""
        if self._saved < 1:
            return False
        self._saved -= 1
        return True
