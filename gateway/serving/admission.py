"""A slot on a replica, for as long as a request needs it.

The scheduler decides, this module waits: it gives the decisions their clock, wakes who
may start, and gives every slot back in one `__aexit__`, however the exchange ended.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType

from backends.base import Engine
from backends.errors import BackendError, Busy, Unreachable
from backends.reports import Activity, Readiness
from gateway.errors import WaitedTooLong
from gateway.gpu.handover import Gpu
from gateway.routing.breaker import DEFAULT_BUSY_S, Breaker, Failure, ReplicaState
from gateway.routing.scheduler import Action, Move, Refuse, Replica, Scheduler, Start, Ticket
from gateway.serving.prober import Prober


@dataclass(slots=True, eq=False)
class Server:
    """What stands behind a replica: the engine, its name of the model, its standing.

    `activity` is what it last said of itself, and so is `loaded`: the model is in its memory.
    """

    engine: Engine
    model: str
    breaker: Breaker
    prober: Prober
    activity: Activity = field(default_factory=Activity)
    loaded: bool = False


class Residence(StrEnum):
    """Where a model is, in the words of llama.cpp's router."""

    LOADED = "loaded"
    LOADING = "loading"
    UNLOADED = "unloaded"


@dataclass(frozen=True, slots=True)
class Decision:
    """A request and where it went."""

    at: float  # seconds since the epoch
    lane: str
    reason: str
    demand: int


class Admission:
    """The way into one model's lanes.

    Args:
        scheduler: Decides who is next.
        servers: What each of its replicas stands for.
        max_wait_s: The longest time in the queue, hand-overs not counted.
        gpu: What its lanes share in an exclusive placement.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        servers: Mapping[Replica, Server],
        *,
        max_wait_s: float,
        gpu: Gpu | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.servers = servers
        self.decisions: deque[Decision] = deque(maxlen=20)
        self._max_wait_s = max_wait_s
        self._waiting: dict[Ticket, asyncio.Future[None]] = {}
        self._tick: asyncio.TimerHandle | None = None
        self._lanes = {one: lane for lane in scheduler.lanes.values() for one in lane.replicas}
        self._breaker_ticks: dict[Replica, asyncio.TimerHandle] = {}
        self.active_at = _now()
        self._gpu = gpu
        if gpu is not None:
            gpu.join(self)

    @property
    def gpu(self) -> Gpu | None:
        """What its lanes share in an exclusive placement."""
        return self._gpu

    @property
    def movement(self) -> str:
        """What who waits here waits for, if that is the GPU and not a slot; else empty."""
        return self._gpu.movement if self._gpu is not None else ""

    def residence(self, pin: str | None = None) -> Residence:
        """Whether any lane, or the named one, has the model in memory, as was last heard."""
        lanes = [lane for lane in self.scheduler.lanes.values() if pin in (None, lane.name)]
        if any(self.servers[one].loaded for lane in lanes if lane.holds for one in lane.replicas):
            return Residence.LOADED
        toward = self._gpu.toward if self._gpu is not None and self._gpu.moving else None
        coming = any(lane.name == toward for lane in lanes)
        return Residence.LOADING if coming else Residence.UNLOADED

    def heading(self, ticket: Ticket) -> str:
        """The lane that is to serve who waits for the GPU; empty where none can.

        The one that the GPU goes to, whatever the policy would take were it free to choose.
        """
        toward = self._gpu.toward if self._gpu is not None else ""
        fits = ticket.pin is None and (not ticket.able or toward in ticket.able)
        if toward in self.scheduler.lanes and fits:
            return toward
        return self.scheduler.lane_for(ticket) or ""

    def slot(self, ticket: Ticket, *, again: bool = False) -> Slot:
        """Hold a slot of one of the model's replicas for as long as the context is open.

        Entering waits until a slot is free. Leaving gives it back, however the block
        ends: a finished answer, an error, or a caller who hung up while in the queue.

        Raises:
            QueueFull: Too many wait already.
            WaitedTooLong: No slot came free within `max_wait_s`.
            NoLane: No engine can answer now.
        """
        return Slot(self, ticket, again=again)

    # What the GPU sees of it, and says to it

    @property
    def demand(self) -> int:
        """Foreground requests that run or wait."""
        return self.scheduler.demand

    @property
    def waiting(self) -> int:
        """Requests in the queue, background calls included."""
        return self.scheduler.waiting

    def running(self, lane: str) -> int:
        """Requests that run on a lane."""
        known = self.scheduler.lanes.get(lane)
        return known.running if known is not None else 0

    def hold(self, lane: str | None, *, barred: str = "") -> None:
        """The GPU is this lane's from now on; see `handover.Tenant`."""
        now = _now()
        held_before = [one for one in self.scheduler.lanes.values() if one.holds]
        self.scheduler.hold(lane, barred)
        for one in self.scheduler.lanes.values():
            for replica in one.replicas:
                server = self.servers[replica]
                if one.holds and one not in held_before:
                    server.loaded = True
                    server.breaker.reset()
                    server.prober.discard_pending()
                self._look(replica, now)
        self._act(self.scheduler.changed(now))

    def pin(self, lane: str | None) -> None:
        """The operator keeps this model at a lane, or (None) leaves it to the policy."""
        self.scheduler.policy.pin = lane
        self._act(self.scheduler.changed(_now()))

    def served(self, ticket: Ticket, tokens: int) -> None:
        """A request was answered to its end; call it before its slot is given back."""
        self.scheduler.served(ticket, tokens, _now())

    # What is learned of the replicas

    def reported(self, replica: Replica, readiness: Readiness) -> None:
        """A replica says whether it is ready."""
        self.servers[replica].breaker.on_probe(_STATES[readiness])
        self._refresh(replica)

    def answered(self, replica: Replica) -> None:
        """A replica gave a good answer, so it has the model in memory."""
        self.servers[replica].loaded = True
        breaker = self.servers[replica].breaker
        if breaker.failures or breaker.ramp < breaker.slots:
            breaker.on_answer(_now())
            self._refresh(replica)

    def failed(self, replica: Replica, error: BackendError) -> None:
        """A request failed on a replica."""
        server = self.servers[replica]
        server.breaker.on_failure(failure_of(error), _now())
        if error.engine_fault:
            server.prober.probe_now()
        self._refresh(replica)

    def _refresh(self, replica: Replica) -> None:
        now = _now()
        if self._look(replica, now):
            self._act(self.scheduler.changed(now))

    def _look(self, replica: Replica, now: float) -> bool:
        """Take over what the breaker says; True where the replica's room has changed."""
        breaker = self.servers[replica].breaker
        #: Its engine does not hold the GPU: that it sleeps, or is down, is as it should be.
        dormant = not self._lanes[replica].holds
        if (tick := self._breaker_ticks.pop(replica, None)) is not None:
            tick.cancel()
        if (due := breaker.next_change_at(now)) is not None:
            loop = asyncio.get_running_loop()
            self._breaker_ticks[replica] = loop.call_later(
                due - now + 0.001, self._refresh, replica
            )
        replica.back_s = due - now if due is not None else 5.0
        room = breaker.ramp if dormant else breaker.capacity(now)
        if room and not replica.room and not dormant:
            for ticket in self._waiting:  # it is back: whom it has failed may go there again
                ticket.without.discard(replica)
        replica.trouble = "" if dormant else breaker.unavailable_reason(now)
        changed = room != replica.room
        replica.room = room
        return changed

    # Deciding and acting

    def enter(self, ticket: Ticket, *, again: bool) -> asyncio.Future[None] | None:
        """Let a ticket in: None where it has its slot, else what to wait for.

        Raises:
            GatewayError: It was refused at once.
        """
        self.active_at = _now()
        for action in self._act(self.scheduler.arrived(ticket, self.active_at, again=again)):
            if isinstance(action, Refuse):
                raise action.error
        if ticket.lane is not None:
            return None
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = future
        return future

    async def wait(self, ticket: Ticket, future: asyncio.Future[None]) -> None:
        """Return when the ticket has its slot; raises `GatewayError`."""
        ends = self._queue_clock() + self._max_wait_s
        try:
            while not future.done():
                left_s = ends - self._queue_clock()
                if left_s <= 0:
                    raise self._waited_too_long(ticket)
                await asyncio.wait((future,), timeout=left_s)
            future.result()
        finally:
            del self._waiting[ticket]

    def _queue_clock(self) -> float:
        """Seconds; stands still during a hand-over, whose steps have deadlines of their own."""
        return _now() - (self._gpu.moving_s() if self._gpu is not None else 0.0)

    def _waited_too_long(self, ticket: Ticket) -> WaitedTooLong:
        lane = self.scheduler.lanes.get(self.scheduler.lane_for(ticket) or "")
        return WaitedTooLong(
            f"No slot came free within {self._max_wait_s:g} s. Try again later.",
            retry_after=self.scheduler.wait_s(lane) if lane else 5,
        )

    def leave(self, ticket: Ticket) -> None:
        """Give back whatever the ticket holds: its slot, or its place in the queue."""
        self.active_at = _now()
        self._act(self.scheduler.left(ticket, self.active_at))

    def _act(self, actions: list[Action]) -> list[Start | Refuse]:
        """Wake who waits; return the actions that concern nobody who waits yet."""
        fresh: list[Start | Refuse] = []
        hand_over = False
        for action in actions:
            if isinstance(action, Move):
                hand_over = True
                continue
            if isinstance(action, Start):
                self._note(action.ticket)
            future = self._waiting.get(action.ticket)
            if future is None:
                fresh.append(action)
            elif not future.done():
                if isinstance(action, Start):
                    future.set_result(None)
                else:
                    future.set_exception(action.error)
        if hand_over and self._gpu is not None:
            self._gpu.wanted()
        self._plan_tick()
        return fresh

    def _note(self, ticket: Ticket) -> None:
        assert ticket.lane is not None  # noqa: S101 - it was just started
        self.decisions.append(
            Decision(time.time(), ticket.lane.name, ticket.reason, self.scheduler.demand)
        )

    def _plan_tick(self) -> None:
        """Look again when the rent reaches the price, if anybody waits for that.

        A GPU is handed over for the sake of those who run, too.
        """
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None
        if not self._waiting and self._gpu is None:
            return
        due = self.scheduler.policy.due()
        if due < math.inf:
            loop = asyncio.get_running_loop()
            self._tick = loop.call_later(max(0.001, due - _now()), self._passed)

    def _passed(self) -> None:
        self._tick = None
        self._act(self.scheduler.passed(_now()))

    def close(self) -> None:
        """Stop every timer."""
        for timer in (self._tick, *self._breaker_ticks.values()):
            if timer is not None:
                timer.cancel()


class Slot:
    """See `Admission.slot`."""

    __slots__ = ("_admission", "_again", "_ticket")

    def __init__(self, admission: Admission, ticket: Ticket, *, again: bool) -> None:
        self._admission = admission
        self._ticket = ticket
        self._again = again

    async def __aenter__(self) -> Replica:
        ticket = self._ticket
        future = self._admission.enter(ticket, again=self._again)
        if future is not None:
            try:
                await self._admission.wait(ticket, future)
            except BaseException:
                self._admission.leave(ticket)
                raise
        replica = ticket.replica
        assert replica is not None  # noqa: S101 - admitted
        return replica

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._admission.leave(self._ticket)


_STATES = {
    Readiness.READY: ReplicaState.READY,
    Readiness.LOADING: ReplicaState.LOADING,
    Readiness.ABSENT: ReplicaState.ABSENT,
    Readiness.ASLEEP: ReplicaState.ASLEEP,
    Readiness.DOWN: ReplicaState.DOWN,
}


def failure_of(error: BackendError) -> Failure:
    """An engine's error, translated for the circuit breaker."""
    busy_s = (error.retry_after or DEFAULT_BUSY_S) if isinstance(error, Busy) else None
    return Failure(error.engine_fault, isinstance(error, Unreachable), busy_s)


def _now() -> float:
    return time.monotonic()
