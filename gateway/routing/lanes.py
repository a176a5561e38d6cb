"""The lanes of a model, their replicas, and a request on its way to one of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Cause(StrEnum):
    """Why a request went to its lane, as one word for logs and metrics."""

    POLICY = "policy"
    ONLY_LANE = "only_lane"
    PIN = "pin"  # the operator's
    REQUEST_PIN = "request_pin"
    CAPABILITY = "capability"  # the policy's lane cannot serve it
    HEALTH = "health"  # that lane is not usable now
    FAILOVER = "failover"  # that lane has failed this request


#: After so many seconds another attempt makes sense where no better guess is known.
RETRY_AFTER_S = 5.0

#: The reason for a lane that the operator has pinned, in public words.
PINNED = "pinned by the operator"


@dataclass(eq=False, slots=True)
class Replica:
    """One server of a lane.

    Attributes:
        url: Its address.
        slots: Concurrent requests it is configured for.
        capacity: Concurrent requests it may receive now: fewer while it comes back from an
            ejection, none while it is ejected.
        running: Requests that run on it.
        unavailable_reason: Why the capacity is zero, in public words.
        retry_after_s: Seconds after which another attempt makes sense.
    """

    url: str
    slots: int
    capacity: int = 0
    running: int = 0
    unavailable_reason: str = "has not been probed yet"
    retry_after_s: float = RETRY_AFTER_S


@dataclass(eq=False, slots=True)
class Lane:
    """One model on one engine.

    Attributes:
        name: The engine's kind.
        replicas: Its servers.
        queue_limit: The most requests that may wait for it.
        service_s: Mean seconds for which a request holds a slot, as measured here.
        concurrency_s: Running requests, summed over time.
        concurrency2_s: Their squares, summed over time.
    """

    name: str
    replicas: list[Replica]
    queue_limit: int
    service_s: float = 0.0
    concurrency_s: float = 0.0
    concurrency2_s: float = 0.0

    @property
    def unavailable_reason(self) -> str:
        """Why one of its replicas has no capacity, in public words; empty: all have some."""
        return next((r.unavailable_reason for r in self.replicas if r.unavailable_reason), "")

    @property
    def running(self) -> int:
        """Requests that run on it."""
        return sum(replica.running for replica in self.replicas)

    @property
    def slots(self) -> int:
        """Concurrent requests it is configured for."""
        return sum(replica.slots for replica in self.replicas)

    @property
    def capacity(self) -> int:
        """Concurrent requests it may receive now, those that run included."""
        return sum(replica.capacity for replica in self.replicas)

    def free_replica(self, excluded: set[Replica]) -> Replica | None:
        """The replica with the fewest requests in flight that has a free slot, or None."""
        free = [r for r in self.replicas if r.running < r.capacity and r not in excluded]
        return min(free, key=lambda r: r.running, default=None)

    def is_up(self, excluded: set[Replica]) -> bool:
        """Whether any replica would accept a request once it has a free slot."""
        for replica in self.replicas:  # noqa: SIM110 - `any` of a generator costs five times as much
            if replica.capacity > 0 and replica not in excluded:
                return True
        return False


@dataclass(eq=False, slots=True)
class Ticket:
    """One request on its way through a model's queue.

    Attributes:
        key: Name of the client's API key; keys are served round robin.
        background: A chat page's own call; it waits behind all others and is not demand.
        pin: The lane that the request names.
        eligible: The lanes that can serve it; empty: all.
        exclusion_reason: Why the other lanes cannot, in public words.
        excluded: The replicas that have failed it.
        arrived: When it came last, seconds on the scheduler's clock.
        started: When it received its last slot.
        lane: Where it runs; None: it waits, or is over.
        replica: The replica on which it runs.
        cause: Why it runs there.
        reason: The same in words, for `X-Gateway-Reason`.
        usage_at_start: Concurrency summed over time when it started: of its lane, the
            squares of that, and of all lanes.
    """

    key: str = ""
    background: bool = False
    pin: str | None = None
    eligible: frozenset[str] = frozenset()
    exclusion_reason: str = ""
    excluded: set[Replica] = field(default_factory=set)
    arrived: float = 0.0
    started: float = 0.0
    lane: Lane | None = None
    replica: Replica | None = None
    cause: Cause = Cause.POLICY
    reason: str = ""
    usage_at_start: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def fits(self, lane: str) -> bool:
        """Whether a lane can serve it."""
        return not self.eligible or lane in self.eligible
