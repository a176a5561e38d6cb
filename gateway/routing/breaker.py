"""The circuit breaker of one replica: how many requests it may receive now, and why not more.

It decides from plain values: the state that the replica's last probe found, and the answers
and failures of its requests. `gateway.serving.replica_server` translates an engine's errors into
them. A good probe does not bring back a replica whose answers fail: only an answer does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

#: Failures in a row after which a replica is ejected.
FAILURES = 3
#: The first ejection and the longest, seconds; each failed trial doubles it.
FIRST_EJECTION_S = 1.0
LONGEST_EJECTION_S = 60.0
#: How long a busy replica is left out if it does not say for how long, seconds.
DEFAULT_BUSY_S = 1.0


class ReplicaState(StrEnum):
    """What the last probe of a replica found."""

    READY = "ready"
    LOADING = "loading"
    ABSENT = "absent"
    ASLEEP = "asleep"
    DOWN = "down"


_REASONS = {
    ReplicaState.LOADING: "is still loading its model",
    ReplicaState.ABSENT: "does not have the model",
    ReplicaState.ASLEEP: "is asleep",
    ReplicaState.DOWN: "cannot be reached",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """What a failed request says about its replica.

    Attributes:
        at_fault: The replica is to blame, and not the request.
        unreachable: No connection could be made.
        busy_s: For how many seconds it must receive no requests; None: it is not busy.
    """

    at_fault: bool
    unreachable: bool = False
    busy_s: float | None = None


@dataclass(slots=True)
class Breaker:
    """The circuit breaker of one replica; `now` is in seconds on any steady clock.

    After `FAILURES` in a row the replica is ejected, then one request is let through on
    trial. If that fails too, the ejection lasts twice as long. A replica that came back
    receives one request at a time at first, and twice as many after each good answer.
    While it is ejected, requests that were sent before count neither way: one crash that
    ends sixteen streams is one fault.
    """

    slots: int
    state: ReplicaState | None = None
    failures: int = 0
    ejections: int = 0
    out_until: float = 0.0
    busy_until: float = 0.0
    ramp: int = field(init=False)

    def __post_init__(self) -> None:
        self.ramp = self.slots

    def on_probe(self, state: ReplicaState) -> None:
        """A probe found the replica in this state."""
        if state is ReplicaState.READY and self.state not in (None, ReplicaState.READY):
            self.ramp = min(self.ramp, 1)
        self.state = state

    def reset(self) -> None:
        """The replica was given the GPU and has answered: nothing from before counts."""
        self.state = ReplicaState.READY
        self.failures = 0
        self.out_until = self.busy_until = 0.0
        self.ramp = self.slots

    def on_answer(self, now: float) -> None:
        """A request was answered well."""
        if now < self.out_until:
            return
        self.failures = 0
        self.ramp = min(self.slots, max(1, self.ramp * 2))

    def on_failure(self, failure: Failure, now: float) -> None:
        """A request failed."""
        if failure.busy_s is not None:
            self.busy_until = now + failure.busy_s
            return
        if not failure.at_fault:
            return
        if failure.unreachable:
            self.state = ReplicaState.DOWN
        if now < self.out_until:
            return
        self.failures += 1
        if self.failures >= FAILURES:
            if now - self.out_until > LONGEST_EJECTION_S:
                self.ejections = 0  # the last ejection is long ago
            length = min(LONGEST_EJECTION_S, FIRST_EJECTION_S * 2**self.ejections)
            self.ejections += 1
            self.out_until = now + length
            self.ramp = 1

    def capacity(self, now: float) -> int:
        """How many concurrent requests the replica may receive."""
        return 0 if self.unavailable_reason(now) else self.ramp

    def unavailable_reason(self, now: float) -> str:
        """Why the replica may receive no request, in public words; empty where it may."""
        if self.state is None:
            return "has not been probed yet"
        if self.state is not ReplicaState.READY:
            return _REASONS[self.state]
        if now < self.out_until:
            return "failed too often and is ejected for a while"
        if now < self.busy_until:
            return "reports that it is busy"
        return ""

    def next_change_at(self, now: float) -> float | None:
        """When the capacity changes by time alone, or None."""
        ends = [end for end in (self.out_until, self.busy_until) if end > now]
        return min(ends, default=None)
