"""The GPU cards that a plan is made for, and what their data sheets say of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from gateway.errors import UsageError


class Cards(msgspec.Struct, frozen=True):
    """The cards of a machine, all alike: where sizes differ, the smallest counts.

    Attributes:
        count: Number of cards.
        gib: Usable memory of each, GiB.
        spec: The cards as `--cards` takes them.
        name: The kind of card; None if not known, and then there are no bounds on speed.
        gbs: Memory bandwidth of each, GB/s.
        tflops: Dense 16-bit matrix arithmetic of each with 32-bit sums, TFLOPS.
        fp8: Whether they compute in fp8, which vLLM's fp8 KV cache needs.
        p2p: Whether they reach each other without the host's memory.
        assumed: Whether the name is a guess from the size.
    """

    count: int
    gib: float
    spec: str = msgspec.field(name="told")
    name: str | None = None
    gbs: float | None = None
    tflops: float | None = None
    fp8: bool = True
    p2p: bool = False
    assumed: bool = False

    @property
    def total(self) -> float:
        """Usable memory of all cards, GiB."""
        return self.count * self.gib


class DataSheet(NamedTuple):
    """What NVIDIA's data sheet says of a card; GeForce has no P2P from the 4090 on."""

    gib: float
    gbs: float
    tflops: float
    fp8: bool
    p2p: bool


DATA_SHEETS: Mapping[str, DataSheet] = {
    "3090": DataSheet(24, 936, 71.2, fp8=False, p2p=False),
    "4090": DataSheet(24, 1008, 165.2, fp8=True, p2p=False),
    "5090": DataSheet(32, 1792, 209.5, fp8=True, p2p=False),
    "A6000": DataSheet(48, 768, 154.8, fp8=False, p2p=True),
    "L40S": DataSheet(48, 864, 362.0, fp8=True, p2p=True),
    "H100": DataSheet(80, 3350, 989.4, fp8=True, p2p=True),
    "H200": DataSheet(140, 4800, 989.4, fp8=True, p2p=True),
}
#: The driver keeps a little of each card: 23.5 of 24 GiB can be used.
USABLE_SHARE = 23.5 / 24
#: The kind of card that a size alone is taken for.
CARD_BY_SIZE_GIB = {24: "4090"}


def parse_cards(text: str) -> Cards:
    """The cards written as `2x24`, `2x23.5`, `2x4090` or `2x23.6@4090`.

    Raises:
        UsageError: It is not written so, or the kind of card is not known here.
    """
    match = re.fullmatch(r"(\d{1,3})x([\w.]+)(?:@(\w+))?", text)
    if match is None or not int(match[1]):
        raise UsageError(
            f"{text!r} does not name cards: write NUMBERxGIB, as 2x24, or NUMBERxCARD, as 2x4090"
        )
    count, size, name = int(match[1]), match[2], match[3]
    if name is None and size in DATA_SHEETS:
        return make_cards(count, DATA_SHEETS[size].gib * USABLE_SHARE, size, text)
    try:
        gib = float(size)
    except ValueError:
        gib = 0.0
    if not 1 <= gib < 1000:
        raise UsageError(
            f"{text!r}: a card of {size} GiB is not known here; cards known by name: "
            f"{', '.join(DATA_SHEETS)}"
        )
    if name is not None and name not in DATA_SHEETS:
        raise UsageError(f"{text!r}: {name} is not known here; known: {', '.join(DATA_SHEETS)}")
    guess = CARD_BY_SIZE_GIB.get(round(gib)) if name is None and gib == int(gib) else None
    usable = gib * USABLE_SHARE if name is None and "." not in size else gib
    return make_cards(count, usable, name or guess, text, assumed=guess is not None)


def make_cards(
    count: int, gib: float, name: str | None, spec: str, *, assumed: bool = False
) -> Cards:
    """Cards of this usable size, with the data sheet of their kind where it is known."""
    if name is None:
        return Cards(count, gib, spec)
    sheet = DATA_SHEETS[name]
    return Cards(
        count, gib, spec, name, sheet.gbs, sheet.tflops, sheet.fp8, sheet.p2p, assumed
    )  # fmt: skip
