"""The record of a hand-over, the deadlines of its steps, and the error of a failed step."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.gpu.state import Step


@dataclass(frozen=True, slots=True)
class Deadlines:
    """The longest each step may take, seconds."""

    drain_s: float = 60.0
    unload_s: float = 120.0
    free_s: float = 30.0
    load_s: float = 900.0
    probe_s: float = 60.0

    def of(self, step: Step) -> float:
        """The deadline of one step."""
        return {
            Step.DRAINING: self.drain_s,
            Step.UNLOADING: self.unload_s,
            Step.FREEING: self.free_s,
            Step.LOADING: self.load_s,
            Step.PROBING: self.probe_s,
        }[step]


class StepFailed(Exception):
    """A step of a hand-over failed; the text says why."""

    def __init__(self, step: Step, layout: str, why: str) -> None:
        super().__init__(f"{step} {layout}: {why}")
        self.step = step
        self.why = why


@dataclass(slots=True)
class HandoverRecord:
    """One hand-over.

    Attributes:
        at: When it began, seconds since the epoch.
        source: The layout that held the GPU; None: none did.
        target: The layout that was to hold it.
        why: What it was made for, in public words.
        steps: Seconds of each step.
        outcome: How it ended.
        waited: Request-seconds that requests waited because of it.
    """

    at: float
    source: str | None
    target: str
    why: str
    steps: dict[str, float] = field(default_factory=dict)
    outcome: str = "under way"
    waited: float = 0.0
