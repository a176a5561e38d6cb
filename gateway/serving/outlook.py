"""Whether a model is in memory, which lanes its requests took, what a waiting one waits for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Residence(StrEnum):
    """Whether a model is in memory, in the terms of llama.cpp's router."""

    LOADED = "loaded"
    LOADING = "loading"
    UNLOADED = "unloaded"


@dataclass(frozen=True, slots=True)
class Decision:
    """A request and the lane that served it; `at` in seconds since the epoch."""

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
        reason: Why that lane, or the step of the hand-over; empty where it waits for a slot.
    """

    granted: bool
    lane: str
    reason: str
