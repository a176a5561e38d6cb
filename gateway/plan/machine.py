"""The cards and the RAM of this machine, as a plan takes them."""

from __future__ import annotations

import math
import os

from gateway.errors import UsageError
from gateway.gpu.cards import Nvml
from gateway.gpu.memory import MemoryUnknown
from gateway.sizing.cards import DATA_SHEETS, Cards, make_cards
from gateway.sizing.shapes import GIB


def detect_cards(nvml: Nvml) -> Cards:
    """The cards of this machine.

    Raises:
        UsageError: No card is visible.
    """
    try:
        cards = nvml.cards()
    except MemoryUnknown as exc:
        raise UsageError(
            f"no card is visible on this machine ({exc}). Name the cards: --cards 2x24"
        ) from exc
    label, _ = cards[0]
    kind = next(
        (name for name in DATA_SHEETS if name.lower() in label.lower().replace(" ", "")), None
    )
    gib = math.floor(min(size for _, size in cards) / GIB * 100) / 100
    spec = f"{len(cards)}x{gib:.2f}" + (f"@{kind}" if kind else "")
    return make_cards(len(cards), gib, kind, spec)


def machine_ram_gib() -> float:
    """RAM of this machine, GiB."""
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1)
