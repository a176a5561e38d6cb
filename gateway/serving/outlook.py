"""Where a model is, where its requests went, and what a waiting request waits for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Residence(StrEnum):
    """Where a model is, in the words of llama.cpp's router."""

    LOADED = "loaded"
    LOADING = "loading"
    UNLOADED = "unloaded"


@dataclass(frozen=True, slots=True)
class Decision:
    """A request and where it went; `at` in seconds since the epoch."""

    at: float
    lane: str
    reason: str
    demand: int


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a request in the queue waits for.

    Attributes:
        granted: It has its slot already.
        lane: The lane that serves it or will; empty where none can.
        reason: Why that lane, or where the GPU is on its way; empty where it waits for a slot.
    """

    granted: bool
    lane: str
    reason: str
