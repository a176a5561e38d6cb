"""Which request is served next, and by which replica of which lane.

The whole decision for one model is made here, without a clock, sockets or tasks. Each method
takes one event and returns the actions it calls for. No method is a coroutine, so none can be
interrupted halfway and no lock is needed.

A waiting request is not bound to a lane until it starts: when the policy moves, or an engine
goes away, the whole queue goes with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from gateway.errors import GatewayError, NoLane, QueueFull
from gateway.gpu.state import GpuStateRef, Move
from gateway.routing.fair_queue import FairQueue
from gateway.routing.lanes import PINNED, Cause, Lane, Ticket
from gateway.routing.policy_exclusive import ExclusivePolicy
from gateway.routing.policy_shared import SharedPolicy
from gateway.routing.refine import ProfileRefiner
from gateway.routing.regret import NO_LANES, ModelDemand

#: The weight of the newest service time in the mean.
NEWEST_SERVICE = 0.1
#: How often the policy receives a refined profile, seconds.
REFINE_INTERVAL_S = 30.0
#: A request's time counts for a concurrency if that was steady (relative standard deviation)
#: and the model's other lanes had hardly anything to do (share of the requests).
STEADY = 0.25
ALONE = 0.05


@dataclass(frozen=True, slots=True)
class Start:
    """Send this request now, to `ticket.replica`."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Refuse:
    """This waiting request will not be served."""

    ticket: Ticket
    error: GatewayError


@dataclass(frozen=True, slots=True)
class RequestGpu:
    """Requests need the GPU: hand it over as decided, or (None) load a layout, as none holds."""

    move: Move | None = None


Action: TypeAlias = Start | Refuse | RequestGpu


class Scheduler:
    """The queue and the slots of one model.

    Args:
        lanes: Its lanes.
        policy: Where its requests should go; in an exclusive placement that of all models.
        model: Its name, to the policy.
        gpu: In an exclusive placement, the state of the GPU: only lanes of the layout that
            holds it may start requests. None: the lanes are resident together.
        refined: Learns what its requests take, and the policy from that.
    """

    def __init__(
        self,
        lanes: list[Lane],
        policy: SharedPolicy | ExclusivePolicy,
        *,
        model: str = "",
        gpu: GpuStateRef | None = None,
        refined: ProfileRefiner | None = None,
    ) -> None:
        self.lanes: Mapping[str, Lane] = {lane.name: lane for lane in lanes}
        #: Slots of the server that has the most.
        self.largest = max((r.slots for lane in lanes for r in lane.replicas), default=0)
        self.policy = policy
        self.model = model
        self.refined = refined
        self.demand = 0
        self._gpu = gpu
        self._queue = FairQueue()
        self._counted_at = 0.0  # concurrency is summed up to here
        self._refined_at = 0.0

    def __repr__(self) -> str:
        lanes = ", ".join(
            f"{lane.name} {lane.running}/{lane.capacity}" for lane in self.lanes.values()
        )
        return f"<Scheduler {lanes}, {self.waiting} waiting, demand {self.demand}>"

    @property
    def waiting(self) -> int:
        """Requests in the queue, background calls included."""
        return len(self._queue)

    @property
    def exclusive(self) -> bool:
        """Whether its lanes share a GPU on which only one layout fits."""
        return self._gpu is not None

    @property
    def blocked_reason(self) -> str:
        """Why no lane can start a request for a while, in public words; empty where one will."""
        return self._gpu.state.blocked_reason if self._gpu is not None else ""

    def is_resident(self, lane: Lane) -> bool:
        """Whether a lane may start requests: it holds the GPU, or shares none."""
        return self._gpu is None or self._gpu.state.serves(lane.name)

    # Events

    def arrived(self, ticket: Ticket, now: float, *, again: bool = False) -> list[Action]:
        """A request needs a slot; `again` if it had one and its replica failed."""
        if self._choose(ticket) is None:
            return [Refuse(ticket, self._no_lane(ticket))]
        ticket.arrived = now
        if not ticket.background:
            self.demand += 1
        self._queue.enter(ticket, front=again)
        actions = self._assign(now)
        # The policy may just have moved the queue: only what is left now can be too much.
        if again or ticket.lane is not None or _begins_move(actions):
            return actions
        if error := self._too_many(ticket):
            self._leave_queue(ticket)
            actions.append(Refuse(ticket, error))
        return actions

    def left(self, ticket: Ticket, now: float) -> list[Action]:
        """A request is over, however it ended, or has left the queue."""
        lane = ticket.lane
        if lane is None:
            return self._assign(now) if self._leave_queue(ticket) else []
        assert ticket.replica is not None  # noqa: S101 - set together with the lane
        if self.refined is not None:
            self._sum_concurrency(now)
        ticket.replica.running -= 1
        ticket.replica = ticket.lane = None
        held_s = now - ticket.started
        lane.service_s += (held_s - lane.service_s) * (NEWEST_SERVICE if lane.service_s else 1.0)
        if not ticket.background:
            self.demand -= 1
        return self._assign(now)

    def served(self, ticket: Ticket, tokens: int, now: float) -> None:
        """A request was answered to its end with so many tokens; without a slot it is ignored."""
        lane, refined = ticket.lane, self.refined
        seconds = now - ticket.started
        if refined is None or lane is None or ticket.background or seconds <= 0:
            return
        self._sum_concurrency(now)
        own, own2, total = self._usage(lane)
        mine = own - ticket.usage_at_start[0]
        others = total - ticket.usage_at_start[2] - mine
        concurrency = mine / seconds
        variance = (own2 - ticket.usage_at_start[1]) / seconds - concurrency**2
        if others > ALONE * mine or variance > (STEADY * concurrency) ** 2:
            return
        refined.learn(lane.name, concurrency, seconds, tokens)
        if now - self._refined_at >= REFINE_INTERVAL_S:
            self._refined_at = now
            if (profile := refined.corrected()) is not None:
                self.policy.refine(now, self.model, profile)

    def passed(self, now: float) -> list[Action]:
        """Time has passed: the policy may decide now."""
        return self._assign(now)

    def changed(self, now: float) -> list[Action]:
        """A replica's capacity, the operator's pin or the GPU's state has changed."""
        actions: list[Action] = []
        for ticket in self._queue.in_turn():
            if self._choose(ticket) is None:
                self._leave_queue(ticket)
                actions.append(Refuse(ticket, self._no_lane(ticket)))
        return actions + self._assign(now)

    # What it decides

    def lane_for(self, ticket: Ticket) -> str | None:
        """The name of the lane that a request would take now, or None."""
        lane = self._choose(ticket)
        return None if lane is None else lane.name

    def wait_s(self, lane: Lane) -> float:
        """Seconds until a place in the queue comes free, by the measured service time."""
        return lane.service_s / max(1, lane.capacity)

    def _choose(self, ticket: Ticket) -> Lane | None:
        """The lane for this request now.

        In order: operator's pin, request's pin, what the lane can serve, health, policy.
        """
        if self.blocked_reason:
            return None
        if pin := self._pin(ticket):
            pinned = self.lanes.get(pin)
            return pinned if pinned is not None and pinned.is_up(ticket.excluded) else None
        if ticket.excluded and self._failed_by_holder(ticket):
            return None
        chosen = self.lanes.get(self.policy.lane)
        if chosen is not None and ticket.fits(chosen.name) and chosen.is_up(ticket.excluded):
            return chosen
        for lane in self.lanes.values():
            if lane is not chosen and ticket.fits(lane.name) and lane.is_up(ticket.excluded):
                return lane
        return None

    def _failed_by_holder(self, ticket: Ticket) -> bool:
        """Whether the engine that holds the GPU has failed it, but is up: no reason to move."""
        return self.exclusive and any(
            replica.capacity > 0 and replica in ticket.excluded
            for lane in self.lanes.values()
            if self.is_resident(lane)
            for replica in lane.replicas
        )

    def _pin(self, ticket: Ticket) -> str | None:
        """The lane that a pin names, the operator's before the request's."""
        return self.policy.pinned_lane(self.lanes) or ticket.pin

    def _why(self, ticket: Ticket, lane: Lane) -> tuple[Cause, str]:
        """The reason for this choice, in a word and for people."""
        if pin := self.policy.pin:
            if lane.name == pin:
                return Cause.PIN, PINNED
            return (
                Cause.HEALTH,
                f"the GPU could not be moved to {pin}, which the operator has pinned",
            )
        if ticket.pin:
            return Cause.REQUEST_PIN, "pinned by the request"
        chosen = self.lanes.get(self.policy.lane)
        if chosen is None:
            return Cause.ONLY_LANE, "the model's only lane"
        if lane is chosen:
            cause = Cause.POLICY if len(self.lanes) > 1 else Cause.ONLY_LANE
            return cause, self.policy.reason(self.model)
        return self._why_not(chosen, ticket)

    def _why_not(self, chosen: Lane, ticket: Ticket) -> tuple[Cause, str]:
        """Why the policy's own lane was passed over."""
        if not ticket.fits(chosen.name):
            return Cause.CAPABILITY, ticket.exclusion_reason
        failed = any(replica in ticket.excluded for replica in chosen.replicas)
        cause = Cause.FAILOVER if failed else Cause.HEALTH
        return cause, f"{chosen.name} {self._unavailable_reason(chosen, ticket)}"

    def _unavailable_reason(self, lane: Lane, ticket: Ticket) -> str:
        if any(replica in ticket.excluded for replica in lane.replicas):
            return "failed this request"
        if self.blocked_reason:
            return self.blocked_reason
        return lane.unavailable_reason or "is not usable"

    def _no_lane(self, ticket: Ticket) -> NoLane:
        pin = self._pin(ticket)
        if pin and pin not in self.lanes:
            message = f"The operator keeps the GPU at {pin}, which does not have this model."
            return NoLane(message, retry_after=60)
        eligible = [lane for lane in self.lanes if lane in ticket.eligible]
        names = [pin] if pin else eligible or self.lanes
        reasons = "; ".join(
            f"{name} {self._unavailable_reason(self.lanes[name], ticket)}" for name in names
        )
        retry_after = min(
            replica.retry_after_s for name in names for replica in self.lanes[name].replicas
        )
        message = f"No engine can answer for this model now: {reasons}."
        return NoLane(message, retry_after=retry_after)

    def _too_many(self, ticket: Ticket) -> QueueFull | None:
        """Why a waiting ticket may not wait; None where it may."""
        lane = self._choose(ticket)
        if lane is None or self.waiting <= lane.queue_limit:
            return None
        waiting = sum(
            other.background == ticket.background and self._choose(other) is lane
            for other in self._queue.in_turn()
        )
        if waiting <= lane.queue_limit:
            return None
        return QueueFull(
            "Too many requests wait for this model already. Try again later.",
            retry_after=self.wait_s(lane),
        )

    def _assign(self, now: float) -> list[Action]:
        """Start every request that can start now, in turn."""
        if (request := self._decide(now)) is not None:
            return [request]  # nothing starts before the GPU has come
        actions: list[Action] = []
        if not self._queue:
            return actions
        free = sum(
            max(0, replica.capacity - replica.running)
            for lane in self.lanes.values()
            if self.is_resident(lane)
            for replica in lane.replicas
        )
        if not free:
            return actions
        if self.refined is not None:
            self._sum_concurrency(now)
        for ticket in self._queue.in_turn():
            chosen = self._choose(ticket)
            if chosen is None or not self.is_resident(chosen):
                continue
            replica = chosen.free_replica(ticket.excluded)
            if replica is None:
                continue
            self._queue.serve(ticket)
            ticket.lane, ticket.replica, ticket.started = chosen, replica, now
            ticket.cause, ticket.reason = self._why(ticket, chosen)
            if self.refined is not None:
                ticket.usage_at_start = self._usage(chosen)
            replica.running += 1
            actions.append(Start(ticket))
            free -= 1
            if not free:
                break
        return actions

    def _leave_queue(self, ticket: Ticket) -> bool:
        left = self._queue.leave(ticket)
        if left and not ticket.background:
            self.demand -= 1
        return left

    def _sum_concurrency(self, now: float) -> None:
        """Sum up the running requests until now; what runs changes next."""
        passed = now - self._counted_at
        self._counted_at = now
        for lane in self.lanes.values():
            if running := lane.running:
                lane.concurrency_s += running * passed
                lane.concurrency2_s += running * running * passed

    def _usage(self, lane: Lane) -> tuple[float, float, float]:
        total = sum(other.concurrency_s for other in self.lanes.values())
        return lane.concurrency_s, lane.concurrency2_s, total

    def _decide(self, now: float) -> RequestGpu | None:
        """Give the policy the present demand; what it needs of the GPU, if anything."""
        running = {name: lane.running for name, lane in self.lanes.items()}
        if self._gpu is None:
            self.policy.observe(now, self.model, ModelDemand(self.demand, running, NO_LANES))
            return None
        # While no layout holds, all wait for the GPU, and none for a lane in particular.
        held = self._gpu.state.holder is not None
        stranded = self._stranded() if held else NO_LANES
        demand = ModelDemand(self.demand, running, stranded)
        move = self.policy.observe(now, self.model, demand)
        if isinstance(move, Move):
            return RequestGpu(move)
        idle = not held and self._gpu.state.move is None
        return RequestGpu() if idle and self._queue else None

    def _stranded(self) -> dict[str, int]:
        """Foreground requests that wait for a lane without the GPU, which no other can serve."""
        stranded: dict[str, int] = {}
        for ticket in self._queue.foreground():
            chosen = self._choose(ticket)
            if chosen is not None and not self.is_resident(chosen):
                stranded[chosen.name] = stranded.get(chosen.name, 0) + 1
        return stranded


def _begins_move(actions: list[Action]) -> bool:
    """Whether a move begins with these: the queue is that of its target once they are done."""
    return any(isinstance(action, RequestGpu) and action.move is not None for action in actions)
