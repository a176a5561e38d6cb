"""The server behind a replica, and its errors as the circuit breaker understands them."""

from __future__ import annotations

from dataclasses import dataclass, field

from backends.base import Engine
from backends.errors import BackendError, Busy, Unreachable
from backends.reports import Activity, Readiness
from gateway.routing.breaker import DEFAULT_BUSY_S, Breaker, Failure, ReplicaState
from gateway.serving.prober import Prober

REPLICA_STATES = {
    Readiness.READY: ReplicaState.READY,
    Readiness.LOADING: ReplicaState.LOADING,
    Readiness.ABSENT: ReplicaState.ABSENT,
    Readiness.ASLEEP: ReplicaState.ASLEEP,
    Readiness.DOWN: ReplicaState.DOWN,
}


@dataclass(slots=True, eq=False)
class ReplicaServer:
    """The engine behind a replica, and what is known of it.

    Attributes:
        engine: Its engine.
        model: The engine's own name of the model.
        breaker: Its circuit breaker.
        prober: Probes whether it is ready.
        activity: What it last reported of itself.
        loaded: Whether it last reported that the model is in its memory.
    """

    engine: Engine
    model: str
    breaker: Breaker
    prober: Prober
    activity: Activity = field(default_factory=Activity)
    loaded: bool = False


def failure_of(error: BackendError) -> Failure:
    """An engine's error, translated for the circuit breaker."""
    busy_s = (error.retry_after or DEFAULT_BUSY_S) if isinstance(error, Busy) else None
    return Failure(error.engine_fault, isinstance(error, Unreachable), busy_s)
