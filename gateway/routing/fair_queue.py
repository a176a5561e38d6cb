"""The queue of one model: round robin over API keys, background calls last."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from gateway.routing.lanes import Ticket


class FairQueue:
    """The requests that wait for a slot.

    One key with fifty requests delays the next key by one request, not by fifty.
    """

    def __init__(self) -> None:
        self._foreground: OrderedDict[str, deque[Ticket]] = OrderedDict()
        self._background: deque[Ticket] = deque()

    def __len__(self) -> int:
        return sum(map(len, self._foreground.values())) + len(self._background)

    def __bool__(self) -> bool:
        return bool(self._foreground or self._background)

    def in_turn(self) -> Iterator[Ticket]:
        """All that wait, in the order in which they are served."""
        lines = [list(line) for line in self._foreground.values()]
        for rank in range(max(map(len, lines), default=0)):
            yield from (line[rank] for line in lines if rank < len(line))
        yield from list(self._background)

    def foreground(self) -> Iterator[Ticket]:
        """All that wait, background calls excluded, in any order."""
        for line in self._foreground.values():
            yield from line

    def enter(self, ticket: Ticket, *, front: bool) -> None:
        """Wait at the end of the key's line, or before all others."""
        if ticket.background:
            line = self._background
        else:
            line = self._foreground.setdefault(ticket.key, deque())
        if front:
            line.appendleft(ticket)
            if not ticket.background:
                self._foreground.move_to_end(ticket.key, last=False)
        else:
            line.append(ticket)

    def serve(self, ticket: Ticket) -> None:
        """Take a ticket out of the queue; its key goes behind the others."""
        if ticket.background:
            self._background.remove(ticket)
            return
        line = self._foreground[ticket.key]
        line.remove(ticket)
        if line:
            self._foreground.move_to_end(ticket.key)
        else:
            del self._foreground[ticket.key]

    def leave(self, ticket: Ticket) -> bool:
        """Leave the queue without having been served; False where it was not in it."""
        if ticket.background:
            if ticket not in self._background:
                return False
            self._background.remove(ticket)
            return True
        line = self._foreground.get(ticket.key)
        if line is None or ticket not in line:
            return False
        line.remove(ticket)
        if not line:
            del self._foreground[ticket.key]
        return True
