"""The GPU that fake engines share: its bytes, and the processes that have them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

GIB = 1024**3


class OutOfMemory(Exception):
    """A process asked for more bytes than are free."""


@dataclass(slots=True, eq=False)
class Allocation:
    """Bytes that one process has until it releases them."""

    pid: int
    size: int


class FakeGpu:
    """Cards of equal size; every allocation is spread evenly over them.

    It has the interface of the gateway's `Memory`, so it can stand in for real cards.

    Args:
        total: Bytes of all cards together.
        cards: How many there are.
        remainder: Bytes that a sleeping vLLM keeps on each card.
    """

    def __init__(self, total: int, *, cards: int = 1, remainder: int = 6 * GIB // 5) -> None:
        self.cards = cards
        self.remainder = remainder
        #: The most bytes in use at any time.
        self.peak = 0
        self._total = total
        self._allocations: set[Allocation] = set()
        self._pids = itertools.count(1001)

    def __repr__(self) -> str:
        has = ", ".join(f"{pid}: {size / GIB:.1f} GiB" for pid, size in self.processes())
        return f"<FakeGpu {self.free() / GIB:.1f} of {self._total / GIB:.1f} GiB free {{{has}}}>"

    # The interface of the gateway's Memory

    def total(self) -> int:
        return self._total

    def free(self) -> int:
        return self._total - sum(allocation.size for allocation in tuple(self._allocations))

    def least(self) -> int:
        return self.free() // self.cards

    def by_card(self) -> list[tuple[str, int, int]]:
        total, free = self._total // self.cards, self.free() // self.cards
        return [(f"card {number}", total, free) for number in range(self.cards)]

    def processes(self) -> list[tuple[int, int]]:
        sizes: dict[int, int] = {}
        for allocation in tuple(self._allocations):  # a copy: a thread reads it, too
            sizes[allocation.pid] = sizes.get(allocation.pid, 0) + allocation.size
        return sorted(sizes.items(), key=lambda entry: -entry[1])

    # For fake processes, and for a test that plays one

    def new_pid(self) -> int:
        """A process id that no other process has."""
        return next(self._pids)

    def allocate(self, pid: int, size: int) -> Allocation:
        """Give a process so many bytes; raises `OutOfMemory`."""
        if size > self.free():
            raise OutOfMemory(f"{size / GIB:.1f} GiB wanted: {self!r}")
        allocation = Allocation(pid, size)
        self._allocations.add(allocation)
        self.peak = max(self.peak, self._total - self.free())
        return allocation

    def release(self, allocation: Allocation) -> None:
        """Take an allocation back; a second time does nothing."""
        self._allocations.discard(allocation)

    def process_ended(self, pid: int) -> None:
        """Take back all that a process has."""
        self._allocations = {
            allocation for allocation in self._allocations if allocation.pid != pid
        }
