"""Which layout holds the GPU, and where a hand-over is: one frozen value.

A layout is the set of engines in GPU memory together. Today each layout is one engine and has
its name. `gateway.gpu.handover` makes every state and puts it into a `GpuStateRef`; policy,
scheduler, admission, status and metrics read it there, and nothing copies it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Step(StrEnum):
    """The steps from one layout to the next, and the states between hand-overs."""

    FREE = "free"
    HELD = "held"
    DRAINING = "draining"
    UNLOADING = "unloading"
    FREEING = "freeing"
    LOADING = "loading"
    PROBING = "probing"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class Move:
    """The policy's decision to hand the GPU over.

    Attributes:
        source: The layout that holds the GPU.
        target: The layout that shall hold it.
        reason: Why, in public words.
        forced: Not for speed: the operator pinned it, or requests waited for it long enough.
    """

    source: str
    target: str
    reason: str
    forced: bool = False


@dataclass(frozen=True, slots=True)
class GpuState:
    """The state of the GPU at a moment.

    Attributes:
        step: The step of the hand-over.
        layout: The layout that holds the GPU, or held it when the present hand-over began.
        target: The layout that holds the GPU or shall hold it next; empty: it is released.
        move: The policy's decision that is being carried out, if there is one.
        failure: Why no layout can be made to hold it; empty where one holds or is on its way.
        since: When the step began, seconds on the monotonic clock.
        released: The operator has released the GPU, until the next pin.
        held_before: A layout has held it since the gateway started.
    """

    step: Step = Step.FREE
    layout: str | None = None
    target: str = ""
    move: Move | None = None
    failure: str = ""
    since: float = 0.0
    released: bool = False
    held_before: bool = False

    def __str__(self) -> str:
        target = f" for {self.target}" if self.moving and self.target else ""
        failure = f": {self.failure}" if self.failure else ""
        return f"{self.step}{target}, {self.layout or 'no layout'} holds{failure}"

    @property
    def holder(self) -> str | None:
        """The layout whose requests may start now, or None."""
        return self.layout if self.step is Step.HELD and not self.released else None

    @property
    def reason(self) -> str:
        """Why the GPU moves, in public words; empty where no decision is carried out."""
        return self.move.reason if self.move is not None else ""

    @property
    def moving(self) -> bool:
        """Whether requests wait for the GPU now, and not for a slot."""
        return self.step not in (Step.HELD, Step.FREE, Step.DOWN) and not self.failure

    @property
    def movement(self) -> str:
        """The movement of the GPU in words; empty where it does not move."""
        if not self.moving:
            return ""
        way = f"goes to {self.target}" if self.target else "is released"
        return f"The GPU {way}: {self.step}"

    @property
    def blocked_reason(self) -> str:
        """Why no request can start for a while, in public words; empty where one will."""
        if self.released:
            return "is not loaded: the operator has released the GPU"
        if self.failure:
            return "could not be loaded; it is tried again"
        return ""

    def serves(self, lane: str) -> bool:
        """Whether requests of a lane may start: the layout that holds the GPU contains it."""
        return lane == self.holder


class GpuStateRef:
    """Where all parts read the GPU's present state; only its hand-over assigns one."""

    __slots__ = ("state",)

    def __init__(self, state: GpuState | None = None) -> None:
        self.state = state or GpuState()

    def __repr__(self) -> str:
        return f"<GpuStateRef {self.state}>"
