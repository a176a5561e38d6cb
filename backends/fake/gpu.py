"""The GPU that fake engines share: its bytes, and who has them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

GIB = 1024**3


class OutOfMemory(Exception):
    """So many bytes are not free."""


@dataclass(slots=True, eq=False)
class Allocation:
    """Bytes that one process has until it gives them back."""

    pid: int
    size: int


class FakeGpu:
    """Cards of one size, over which all that is taken is spread evenly.

    It can be read as the gateway reads real cards.

    Args:
        total: Bytes of all cards together.
        cards: How many there are.
        remainder: Bytes that a sleeping vLLM keeps of each.
    """

    def __init__(self, total: int, *, cards: int = 1, remainder: int = 6 * GIB // 5) -> None:
        self.cards = cards
        self.remainder = remainder
        #: The most there was in use at any time.
        self.peak = 0
        self._total = total
        self._taken: set[Allocation] = set()
        self._pids = itertools.count(1001)

    def __repr__(self) -> str:
        has = ", ".join(f"{pid}: {size / GIB:.1f} GiB" for pid, size in self.who())
        return f"<FakeGpu {self.free() / GIB:.1f} of {self._total / GIB:.1f} GiB free {{{has}}}>"

    # As the gateway's Memory

    def total(self) -> int:
        return self._total

    def free(self) -> int:
        return self._total - sum(taken.size for taken in tuple(self._taken))

    def least(self) -> int:
        return self.free() // self.cards

    def by_card(self) -> list[tuple[str, int, int]]:
        total, free = self._total // self.cards, self.free() // self.cards
        return [(f"card {number}", total, free) for number in range(self.cards)]

    def who(self) -> list[tuple[int, int]]:
        sizes: dict[int, int] = {}
        for taken in tuple(self._taken):  # a copy: it is asked in a thread, too
            sizes[taken.pid] = sizes.get(taken.pid, 0) + taken.size
        return sorted(sizes.items(), key=lambda entry: -entry[1])

    # For its processes, and for a test that wants to be one

    def new_pid(self) -> int:
        """A process of its own."""
        return next(self._pids)

    def allocate(self, pid: int, size: int) -> Allocation:
        """Have so many bytes; raises `OutOfMemory`."""
        if size > self.free():
            raise OutOfMemory(f"{size / GIB:.1f} GiB wanted: {self!r}")
        taken = Allocation(pid, size)
        self._taken.add(taken)
        self.peak = max(self.peak, self._total - self.free())
        return taken

    def release(self, taken: Allocation) -> None:
        """Give them back; again does no harm."""
        self._taken.discard(taken)

    def process_ended(self, pid: int) -> None:
        """Give back all that a process had."""
        self._taken = {taken for taken in self._taken if taken.pid != pid}
