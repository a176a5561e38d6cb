"""Which replicas may be given work: what they say of themselves, and what they did.

`Breaker` decides (no clock, no sockets); `Prober` asks the engines now and then.
A good health endpoint does not bring back a replica whose answers fail: only an
answer does.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from backends.base import Readiness
from backends.errors import BackendError, Busy, Unreachable

#: Failures in a row after which a replica is left alone.
FAILURES = 3
#: How long it is first left alone, and at most; doubled each time it fails on trial.
FIRST_EJECTION_S = 1.0
LONGEST_EJECTION_S = 60.0
#: A busy engine that does not say for how long.
BUSY_S = 1.0


@dataclass(slots=True)
class Breaker:
    """The standing of one replica; every method takes the time in seconds.

    Ejected after `FAILURES` in a row, then one request is let through on trial. If that
    fails too, or the next ones do, it is out for twice as long. A replica that came back
    is given one request at a time at first, and twice as many after each good answer.
    While it is out, what was sent before and ends now counts neither way: one crash that
    ends sixteen streams is one fault.
    """

    slots: int
    readiness: Readiness | None = None
    failures: int = 0
    ejections: int = 0
    out_until: float = 0.0
    busy_until: float = 0.0
    #: The GPU is not its engine's: that it sleeps, or is not even there, is as it should be.
    dormant: bool = False
    ramp: int = field(init=False)

    def __post_init__(self) -> None:
        self.ramp = self.slots

    def reported(self, readiness: Readiness) -> None:
        """What the replica says of itself."""
        if readiness is Readiness.READY and self.readiness not in (None, Readiness.READY):
            self.ramp = min(self.ramp, 1)
        self.readiness = readiness

    def woke(self) -> None:
        """It was given the GPU and has answered: nothing of before counts."""
        self.readiness = Readiness.READY
        self.failures = 0
        self.out_until = self.busy_until = 0.0
        self.ramp = self.slots

    def answered(self, now: float) -> None:
        """A good answer came."""
        if now < self.out_until:
            return
        self.failures = 0
        self.ramp = min(self.slots, max(1, self.ramp * 2))

    def failed(self, error: BackendError, now: float) -> None:
        """A request failed with this error."""
        if isinstance(error, Busy):
            self.busy_until = now + (error.retry_after or BUSY_S)
            return
        if not error.blame:
            return
        if isinstance(error, Unreachable):
            self.readiness = Readiness.DOWN
        if now < self.out_until:
            return
        self.failures += 1
        if self.failures >= FAILURES:
            if now - self.out_until > LONGEST_EJECTION_S:
                self.ejections = 0  # the last time is long ago
            length = min(LONGEST_EJECTION_S, FIRST_EJECTION_S * 2**self.ejections)
            self.ejections += 1
            self.out_until = now + length
            self.ramp = 1

    def room(self, now: float) -> int:
        """How many requests it may be given at once."""
        return 0 if self.trouble(now) else self.ramp

    def trouble(self, now: float) -> str:
        """Why it may be given none, in public words; empty where it may."""
        if self.dormant:
            return ""
        if self.readiness is None:
            return "has not been looked at yet"
        if self.readiness is not Readiness.READY:
            return {
                Readiness.LOADING: "is still loading its model",
                Readiness.ABSENT: "does not have the model",
                Readiness.ASLEEP: "is asleep",
            }.get(self.readiness, "cannot be reached")
        if now < self.out_until:
            return "failed too often and is left alone for a while"
        if now < self.busy_until:
            return "says it has too much to do"
        return ""

    def due(self, now: float) -> float | None:
        """When its standing changes by time alone, or None."""
        ends = [end for end in (self.out_until, self.busy_until) if end > now]
        return min(ends, default=None)
