"""The memory that engines share: how much is free, on which card, and what a layout needs.

It is read and never computed: an engine that reports its model gone may still hold the bytes.
Reading waits for a driver or for files, up to a tenth of a second: do it in a thread. What
cannot be read raises `MemoryUnknown`, and serving goes on without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

GIB = 2**30


class MemoryUnknown(Exception):
    """The memory cannot be read; the text says why, and what would change it."""


class Memory(Protocol):
    """The memory that engines share. Every reading may raise `MemoryUnknown`."""

    def total(self) -> int:
        """Bytes of all cards together."""

    def free(self) -> int:
        """Free bytes of all cards together."""

    def least(self) -> int:
        """Free bytes of the fullest card."""

    def by_card(self) -> Sequence[tuple[str, int, int]]:
        """The name of each card, for people, and its bytes: in all, and free."""

    def processes(self) -> Sequence[tuple[int, int]]:
        """Processes and the bytes of each, the largest first.

        0 bytes where the driver does not say how many; empty where it names no process.
        """


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """What must be free before an engine loads.

    Attributes:
        size: Bytes in all.
        cards: It loads an equal share onto each of so many cards (tensor parallel). None: not
            known; then any number of cards may do, each with an equal share if `even` is set.
        even: The engine cannot spread a model unevenly over cards.
    """

    size: int
    cards: int | None = None
    even: bool = False

    def shortage(self, memory: Memory) -> str:
        """What is missing, for people; empty where there is room. Raises `MemoryUnknown`."""
        free = memory.free()
        if free < self.size:
            return f"{free / GIB:.1f} GiB are free of the {self.size / GIB:.1f} needed"
        if self.cards is None and not self.even:
            return ""  # it is spread as there is room
        cards = memory.by_card()
        shortages = [self._shortage_on(number, cards) for number in self._splits(cards)]
        return "" if "" in shortages else shortages[0]

    def _splits(self, cards: Sequence[tuple[str, int, int]]) -> Sequence[int]:
        """The numbers of cards that may have an equal share each, the smallest first."""
        if self.cards is not None:
            return (self.cards,)
        largest = max(total for _, total, _ in cards)
        return [n for n in range(1, len(cards) + 1) if self.size <= n * largest]

    def _shortage_on(self, number: int, cards: Sequence[tuple[str, int, int]]) -> str:
        """What is missing on the emptiest cards if so many have an equal share each."""
        share = self.size / number
        each = f"each of {number} cards" if number > 1 else "one card"
        return "; ".join(
            f"{name} has {free / GIB:.1f} GiB free of the {share / GIB:.1f} needed on {each}"
            for name, _, free in sorted(cards, key=lambda card: -card[2])[:number]
            if free < share
        )


def largest_first(sizes: dict[int, int]) -> list[tuple[int, int]]:
    """Processes and their bytes, the largest first, then by number."""
    return sorted(sizes.items(), key=lambda entry: (-entry[1], entry[0]))
