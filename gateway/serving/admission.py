"""Gives a request a slot of one model, for as long as it needs one.

The scheduler decides, this module waits: it passes the time to the scheduler, wakes the
requests that may start, and takes every slot back in one `__aexit__`, however the exchange
ended. Whatever happens is an event in one queue, which models on one GPU share. Events flow
in and actions flow out: `_act` never runs inside itself.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType

from backends.errors import BackendError
from backends.reports import Readiness
from gateway.errors import GatewayError, WaitedTooLong
from gateway.gpu.handover import Gpu
from gateway.gpu.state import GpuState
from gateway.routing.events import EventQueue
from gateway.routing.lanes import RETRY_AFTER_S, Replica, Ticket
from gateway.routing.scheduler import Action, Refuse, RequestGpu, Scheduler, Start
from gateway.serving.outlook import Decision, Outlook, Residence
from gateway.serving.replica_server import REPLICA_STATES, ReplicaServer, failure_of

#: A timer may fire so much early, seconds.
TIMER_SLACK_S = 0.001


class Admission:
    """Gives the slots of one model's lanes to its requests.

    Args:
        scheduler: Decides which request is next.
        servers: The server behind each of its replicas.
        max_wait_s: The longest time in the queue, hand-overs not counted.
        gpu: The GPU that its lanes share in an exclusive placement; None in a shared one.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        servers: Mapping[Replica, ReplicaServer],
        *,
        max_wait_s: float,
        gpu: Gpu | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.servers = servers
        self.gpu = gpu
        self.decisions: deque[Decision] = deque(maxlen=20)
        self.active_at = _now()
        self._max_wait_s = max_wait_s
        self._events = EventQueue() if gpu is None else gpu.states.events
        self._waiting: dict[Ticket, asyncio.Future[None]] = {}
        self._refused: dict[Ticket, GatewayError] = {}  # on arrival, before they waited
        self._tick: asyncio.TimerHandle | None = None
        self._lanes = {each: lane for lane in scheduler.lanes.values() for each in lane.replicas}
        self._breaker_ticks: dict[Replica, asyncio.TimerHandle] = {}
        if gpu is not None:
            gpu.states.join(self)

    def slot(self, ticket: Ticket) -> Slot:
        """Hold a slot of one of the model's replicas for as long as the context is open.

        Entering waits until a slot is free. Leaving gives it back, however the block ends:
        a finished answer, an error, or a client that hung up in the queue. A ticket whose
        replica has failed it may be used again: it goes to another, before all others.

        Raises:
            QueueFull: Too many requests wait already.
            WaitedTooLong: No slot came free within `max_wait_s`.
            NoLane: No engine can answer now.
        """
        return Slot(self, ticket)

    def outlook(self, ticket: Ticket) -> Outlook:
        """What a request waits for now."""
        if ticket.lane is not None:
            return Outlook(granted=True, lane=ticket.lane.name, reason=ticket.reason)
        movement = self.gpu.state.movement if self.gpu is not None else ""
        return Outlook(granted=False, lane=self._heading(ticket), reason=movement)

    def residence(self, pin: str | None = None) -> Residence:
        """Whether any lane, or the named one, has the model in memory, as last reported."""
        lanes = [lane for lane in self.scheduler.lanes.values() if pin in (None, lane.name)]
        resident = (lane for lane in lanes if self.scheduler.is_resident(lane))
        if any(self.servers[replica].loaded for lane in resident for replica in lane.replicas):
            return Residence.LOADED
        state = self.gpu.state if self.gpu is not None else GpuState()
        coming = state.moving and any(lane.name == state.target for lane in lanes)
        return Residence.LOADING if coming else Residence.UNLOADED

    def _heading(self, ticket: Ticket) -> str:
        """The lane that will serve a request; empty where none can.

        During a hand-over it is the target's lane, whatever the policy would choose.
        """
        target = self.gpu.state.target if self.gpu is not None else ""
        if target in self.scheduler.lanes and ticket.pin is None and ticket.fits(target):
            return target
        return self.scheduler.lane_for(ticket) or ""

    # What the GPU's hand-over reads

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

    # Events

    def on_gpu_change(self, before: GpuState, after: GpuState) -> None:
        """The GPU's state has changed."""
        now = _now()
        for lane in self.scheduler.lanes.values():
            acquired = after.serves(lane.name) and not before.serves(lane.name)
            for replica in lane.replicas:
                if acquired:
                    server = self.servers[replica]
                    server.loaded = True
                    server.breaker.reset()
                    server.prober.discard_pending()
                self._update_capacity(replica, now)
        self._act(self.scheduler.changed(now))

    def pin(self, lane: str | None) -> None:
        """The operator keeps this model at a lane, or (None) leaves it to the policy."""

        def on_pin() -> None:
            self.scheduler.policy.pin = lane
            self._act(self.scheduler.changed(_now()))

        self._events.post(on_pin)

    def on_probe(self, replica: Replica, readiness: Readiness) -> None:
        """A replica was probed for whether it is ready."""

        def on_result() -> None:
            self.servers[replica].breaker.on_probe(REPLICA_STATES[readiness])
            self._refresh(replica)

        self._events.post(on_result)

    def on_answer(self, ticket: Ticket, replica: Replica, tokens: int | None) -> None:
        """A request was answered to its end, so its replica has the model in memory."""

        def on_good_answer() -> None:
            server, now = self.servers[replica], _now()
            server.loaded = True
            breaker = server.breaker
            if tokens is not None:
                self.scheduler.served(ticket, tokens, now)
            if breaker.failures or breaker.ramp < breaker.slots:
                breaker.on_answer(now)
                self._refresh(replica)

        self._events.post(on_good_answer)

    def on_failure(self, replica: Replica, error: BackendError) -> None:
        """A request failed on a replica."""

        def on_bad_answer() -> None:
            server = self.servers[replica]
            server.breaker.on_failure(failure_of(error), _now())
            if error.engine_fault:
                server.prober.probe_now()
            self._refresh(replica)

        self._events.post(on_bad_answer)

    def _on_arrival(self, ticket: Ticket) -> None:
        self.active_at = _now()
        again = ticket.started > 0
        self._act(self.scheduler.arrived(ticket, self.active_at, again=again))

    def _on_leave(self, ticket: Ticket) -> None:
        self.active_at = _now()
        self._act(self.scheduler.left(ticket, self.active_at))

    def _on_tick(self) -> None:
        self._tick = None
        self._act(self.scheduler.passed(_now()))

    def _refresh(self, replica: Replica) -> None:
        now = _now()
        if self._update_capacity(replica, now):
            self._act(self.scheduler.changed(now))

    def _update_capacity(self, replica: Replica, now: float) -> bool:
        """Take over what the breaker allows; True where the replica's capacity has changed."""
        breaker = self.servers[replica].breaker
        # Where its engine does not hold the GPU, that it sleeps or is down is as it should be.
        dormant = not self.scheduler.is_resident(self._lanes[replica])
        if (tick := self._breaker_ticks.pop(replica, None)) is not None:
            tick.cancel()
        due = breaker.next_change_at(now)
        if due is not None:
            refresh = partial(self._refresh, replica)
            self._breaker_ticks[replica] = self._post_later(due - now + TIMER_SLACK_S, refresh)
        replica.retry_after_s = due - now if due is not None else RETRY_AFTER_S
        capacity = breaker.ramp if dormant else breaker.capacity(now)
        if capacity and not replica.capacity and not dormant:
            for ticket in self._waiting:  # it is back: requests it has failed may go there again
                ticket.excluded.discard(replica)
        replica.unavailable_reason = "" if dormant else breaker.unavailable_reason(now)
        changed = capacity != replica.capacity
        replica.capacity = capacity
        return changed

    def _post_later(self, seconds: float, event: Callable[[], None]) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(seconds, self._events.post, event)

    # Actions

    def _act(self, actions: list[Action]) -> None:
        """Carry out what the scheduler has decided."""
        for action in actions:
            if isinstance(action, RequestGpu):
                assert self.gpu is not None  # noqa: S101 - only an exclusive placement needs it
                self.gpu.request(action.move)
                continue
            if isinstance(action, Start):
                self._note(action.ticket)
            future = self._waiting.get(action.ticket)
            if future is None:
                if isinstance(action, Refuse):
                    self._refused[action.ticket] = action.error
            elif not future.done():
                if isinstance(action, Start):
                    future.set_result(None)
                else:
                    future.set_exception(action.error)
        self._plan_tick()

    def _note(self, ticket: Ticket) -> None:
        assert ticket.lane is not None  # noqa: S101 - it was just started
        self.decisions.append(
            Decision(time.time(), ticket.lane.name, ticket.reason, self.scheduler.demand)
        )

    def _plan_tick(self) -> None:
        """Decide again when the regret reaches its threshold, if any request waits for that.

        A GPU is handed over for the sake of running requests, too.
        """
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None
        if not self._waiting and self.gpu is None:
            return
        due = self.scheduler.policy.due()
        if due < math.inf:
            self._tick = self._post_later(max(TIMER_SLACK_S, due - _now()), self._on_tick)

    # Waiting

    async def enter(self, ticket: Ticket) -> Replica:
        """Return the ticket's replica once it has a slot; raises `GatewayError`."""
        try:
            self._events.post(partial(self._on_arrival, ticket))
            if (error := self._refused.pop(ticket, None)) is not None:
                raise error
            if ticket.lane is None:
                await self._wait(ticket)
        except BaseException:
            self._refused.pop(ticket, None)  # still there if another event failed
            self.leave(ticket)
            raise
        assert ticket.replica is not None  # noqa: S101 - it has a slot
        return ticket.replica

    def leave(self, ticket: Ticket) -> None:
        """Give back what the ticket holds: its slot, or its place in the queue."""
        self._events.post(partial(self._on_leave, ticket))

    async def _wait(self, ticket: Ticket) -> None:
        """Return when the ticket has its slot; raises `GatewayError`."""
        future = self._waiting[ticket] = asyncio.get_running_loop().create_future()
        try:
            self._plan_tick()
            ends = self._queue_clock() + self._max_wait_s
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
        return _now() - (self.gpu.states.moving_s() if self.gpu is not None else 0.0)

    def _waited_too_long(self, ticket: Ticket) -> WaitedTooLong:
        lane = self.scheduler.lanes.get(self.scheduler.lane_for(ticket) or "")
        return WaitedTooLong(
            f"No slot came free within {self._max_wait_s:g} s. Try again later.",
            retry_after=self.scheduler.wait_s(lane) if lane else RETRY_AFTER_S,
        )

    def close(self) -> None:
        """Stop every timer."""
        for timer in (self._tick, *self._breaker_ticks.values()):
            if timer is not None:
                timer.cancel()


class Grant:
    """A slot that a request holds: where it may be sent, and how it went there.

    Attributes:
        engine: The engine to ask.
        model: That engine's own name of the model.
        lane: The lane that serves the request.
        cause: Why that lane, in a word.
        reason: Why that lane, in public words.
    """

    __slots__ = ("_admission", "_replica", "_ticket", "cause", "engine", "lane", "model", "reason")

    def __init__(self, admission: Admission, ticket: Ticket, replica: Replica) -> None:
        server = admission.servers[replica]
        self.engine = server.engine
        self.model = server.model
        self.lane = ticket.lane.name if ticket.lane is not None else ""
        self.cause = ticket.cause
        self.reason = ticket.reason
        self._admission = admission
        self._ticket = ticket
        self._replica = replica

    def answered(self, tokens: int | None = None) -> None:
        """The request was answered to its end, with so many output tokens if that is known."""
        self._admission.on_answer(self._ticket, self._replica, tokens)

    def failed(self, error: BackendError) -> None:
        """The engine has failed the request: another attempt goes to another replica."""
        self._ticket.excluded.add(self._replica)
        self._admission.on_failure(self._replica, error)

    def loaded(self) -> None:
        """The model is in the engine's memory now."""
        self._admission.servers[self._replica].loaded = True


class Slot:
    """See `Admission.slot`."""

    __slots__ = ("_admission", "_ticket")

    def __init__(self, admission: Admission, ticket: Ticket) -> None:
        self._admission = admission
        self._ticket = ticket

    async def __aenter__(self) -> Grant:
        replica = await self._admission.enter(self._ticket)
        return Grant(self._admission, self._ticket, replica)

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._admission.leave(self._ticket)


def _now() -> float:
    return time.monotonic()
