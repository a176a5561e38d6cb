"""Who is served next, and by which replica of which lane.

The whole decision for one model lives here and nothing else does: no clock, no sockets,
no tasks. Each method takes one event and returns the actions it calls for. No method is
a coroutine, so none can be interrupted halfway and no lock is needed.

What waits is not bound to a lane until it starts: when the policy moves, or an engine
goes away, the whole queue goes with it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from gateway.errors import GatewayError, NoLane, QueueFull
from gateway.routing.policy import Demand, Policy
from gateway.routing.refine import Refined

#: How much the newest of the measured service times counts.
NEWEST = 0.1
#: How often what was learned of the service times is made known to the policy, seconds.
REFINE_S = 30.0
#: A request's time tells of a number at once if that number was steady, and another lane
#: of the model had hardly anything to do: relative standard deviation, and share.
STEADY = 0.25
ALONE = 0.05


class Cause(StrEnum):
    """Why a request went where it went, in a word that can be counted by."""

    POLICY = "policy"
    ONLY_LANE = "only_lane"
    PIN = "pin"  # the operator's
    REQUEST_PIN = "request_pin"
    CAPABILITY = "capability"  # the policy's lane cannot take it
    HEALTH = "health"  # that lane is not usable now
    FAILOVER = "failover"  # that lane has failed this request


@dataclass(eq=False, slots=True)
class Replica:
    """One server of a lane.

    `room` is how many requests it may be given now: its slots when all is well, fewer
    while it comes back, none while it is out. `trouble` says why, in public words, and
    `back_s` in how many seconds another attempt makes sense.
    """

    url: str
    slots: int
    room: int = 0
    running: int = 0
    trouble: str = "has not been probed yet"
    back_s: float = 5.0


@dataclass(eq=False, slots=True)
class Lane:
    """One model on one engine.

    `waiting` bounds the queue in front of it. `service_s` is the mean time a request
    holds a slot, as seen here. `holds`: its engine has the GPU; always so where both fit.
    `barred` says why it will not have it for a while, in public words. `ran` and `ran2` are
    the requests that ran here and their squares, summed over time.
    """

    name: str
    replicas: list[Replica]
    waiting: int
    service_s: float = 0.0
    holds: bool = True
    barred: str = ""
    ran: float = 0.0
    ran2: float = 0.0

    @property
    def running(self) -> int:
        return sum(replica.running for replica in self.replicas)

    @property
    def slots(self) -> int:
        """Requests it answers at once when all is well."""
        return sum(replica.slots for replica in self.replicas)

    @property
    def room(self) -> int:
        """Slots that may be used now, taken ones included."""
        return sum(replica.room for replica in self.replicas)

    def free(self, without: set[Replica]) -> Replica | None:
        """The replica with the least in flight that has a slot free, or None."""
        if not self.holds:
            return None
        able = [r for r in self.replicas if r.running < r.room and r not in without]
        return min(able, key=lambda r: r.running, default=None)

    def usable(self, without: set[Replica]) -> bool:
        """Whether any replica would take a request: now, when a slot is free, or the GPU its."""
        if self.barred:
            return False
        for replica in self.replicas:  # noqa: SIM110 - `any` of a generator costs five times as much
            if replica.room > 0 and replica not in without:
                return True
        return False


@dataclass(eq=False, slots=True)
class Ticket:
    """One request on its way through a model's queue.

    `pin` is a lane that somebody named, `able` the lanes that can take the request
    (all when empty), each with the words that explain it in `why`. `without` are the
    replicas that have failed it already. `key` is whose turn it is. `before` is what had
    run when it started: on its lane, that squared, and on all.
    """

    key: str = ""
    background: bool = False
    pin: str | None = None
    able: frozenset[str] = frozenset()
    why: str = ""
    without: set[Replica] = field(default_factory=set)
    arrived: float = 0.0
    started: float = 0.0
    lane: Lane | None = None
    replica: Replica | None = None
    cause: Cause = Cause.POLICY
    reason: str = ""
    before: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Start:
    """Send this request now, to `ticket.replica`."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell this waiting request that it will not be served."""

    ticket: Ticket
    error: GatewayError


@dataclass(frozen=True, slots=True)
class Move:
    """See to it that the GPU comes to the policy's lane; nothing starts before it is there."""


Action: TypeAlias = Start | Refuse | Move


_NONE: Mapping[str, int] = {}


class Scheduler:
    """The queue and the slots of one model.

    Args:
        lanes: Its lanes.
        policy: Where its requests should go; in an exclusive placement that of all models.
        model: Its name, to the policy.
        exclusive: Its lanes do not fit together: only the one that holds the GPU may start any.
        refined: Learns what its requests take, and the policy from that.
    """

    def __init__(
        self,
        lanes: list[Lane],
        policy: Policy,
        *,
        model: str = "",
        exclusive: bool = False,
        refined: Refined | None = None,
    ) -> None:
        self.lanes: Mapping[str, Lane] = {lane.name: lane for lane in lanes}
        #: Slots of the server that has the most.
        self.largest = max((r.slots for lane in lanes for r in lane.replicas), default=0)
        self.policy = policy
        self.model = model
        self.exclusive = exclusive
        self.refined = refined
        self.demand = 0
        self.held = False  # in an exclusive placement: whether any engine has the GPU
        self._foreground: OrderedDict[str, deque[Ticket]] = OrderedDict()
        self._background: deque[Ticket] = deque()
        self._counted_at = 0.0  # who runs, up to here
        self._refined_at = 0.0

    def __repr__(self) -> str:
        lanes = ", ".join(f"{lane.name} {lane.running}/{lane.room}" for lane in self.lanes.values())
        return f"<Scheduler {lanes}, {self.waiting} waiting, demand {self.demand}>"

    @property
    def waiting(self) -> int:
        """Requests in the queue, background calls included."""
        return sum(map(len, self._foreground.values())) + len(self._background)

    # Events

    def arrived(self, ticket: Ticket, now: float, *, again: bool = False) -> list[Action]:
        """A request wants a slot; `again` if it had one and its replica failed."""
        if self._choose(ticket) is None:
            return [Refuse(ticket, self._no_lane(ticket))]
        ticket.arrived = now
        self._enter(ticket, front=again)
        actions = self._assign(now)
        # The policy may just have moved the queue: only what is left now can be too much.
        if not again and ticket.lane is None and (error := self._too_many(ticket)):
            self._leave(ticket)
            actions.append(Refuse(ticket, error))
        return actions

    def left(self, ticket: Ticket, now: float) -> list[Action]:
        """A request is over, however it ended, or has left the queue."""
        lane = ticket.lane
        if lane is None:
            return self._assign(now) if self._leave(ticket) else []
        assert ticket.replica is not None  # noqa: S101 - set together with the lane
        if self.refined is not None:
            self._count(now)
        ticket.replica.running -= 1
        ticket.replica = ticket.lane = None
        held = now - ticket.started
        lane.service_s += (held - lane.service_s) * (NEWEST if lane.service_s else 1.0)
        if not ticket.background:
            self.demand -= 1
        return self._assign(now)

    def served(self, ticket: Ticket, tokens: int, now: float) -> None:
        """A request that still has its slot was answered to the end, with so many tokens."""
        lane, refined = ticket.lane, self.refined
        seconds = now - ticket.started
        if refined is None or lane is None or ticket.background or seconds <= 0:
            return
        self._count(now)
        ran, ran2, all_ran = self._ran(lane)
        mine = ran - ticket.before[0]
        others = all_ran - ticket.before[2] - mine
        at_once = mine / seconds
        variance = (ran2 - ticket.before[1]) / seconds - at_once**2
        if others > ALONE * mine or variance > (STEADY * at_once) ** 2:
            return
        refined.learn(lane.name, at_once, seconds, tokens)
        if now - self._refined_at >= REFINE_S:
            self._refined_at = now
            if (profile := refined.told()) is not None:
                self.policy.refine(now, self.model, profile)

    def passed(self, now: float) -> list[Action]:
        """Time has passed: the policy may have made up its mind."""
        return self._assign(now)

    def changed(self, now: float) -> list[Action]:
        """The room of a replica or the operator's pin has changed."""
        actions: list[Action] = []
        for ticket in self._in_turn():
            if self._choose(ticket) is None:
                self._leave(ticket)
                actions.append(Refuse(ticket, self._no_lane(ticket)))
        return actions + self._assign(now)

    def hold(self, name: str | None, barred: str = "") -> None:
        """The GPU is with the engine of this name, which may be none of ours, or with nobody."""
        self.held = name is not None
        for lane in self.lanes.values():
            lane.holds, lane.barred = lane.name == name, barred

    # What it decides

    def lane_for(self, ticket: Ticket) -> str | None:
        """The name of the lane a request would take now, or None."""
        lane = self._choose(ticket)
        return None if lane is None else lane.name

    def wait_s(self, lane: Lane) -> float:
        """Seconds until a place in the queue comes free, by the measured service time."""
        return lane.service_s / max(1, lane.room)

    def _choose(self, ticket: Ticket) -> Lane | None:
        """The lane for this request now.

        In order: operator's pin, request's pin, what the lane can take, health, policy.
        """
        if pin := self._pin(ticket):
            pinned = self.lanes.get(pin)
            return pinned if pinned is not None and pinned.usable(ticket.without) else None
        if ticket.without and self._failed_by_holder(ticket):
            return None
        chosen = self.lanes.get(self.policy.lane)
        if chosen is not None and self._takes(chosen, ticket) and chosen.usable(ticket.without):
            return chosen
        for lane in self.lanes.values():
            if lane is not chosen and self._takes(lane, ticket) and lane.usable(ticket.without):
                return lane
        return None

    def _failed_by_holder(self, ticket: Ticket) -> bool:
        """Whether the engine that has the GPU has failed it, and is well: no reason to move."""
        return self.exclusive and any(
            lane.holds and replica.room > 0 and replica in ticket.without
            for lane in self.lanes.values()
            for replica in lane.replicas
        )

    def _pin(self, ticket: Ticket) -> str | None:
        """The lane that somebody has named, the operator before the request."""
        pin = self.policy.pin
        if pin in self.lanes and self.held and self.policy.lane in self.lanes:
            return self.policy.lane  # the GPU could not be brought to the pin: serve where it is
        return pin or ticket.pin

    def _why(self, ticket: Ticket, lane: Lane) -> tuple[Cause, str]:
        """The reason for this choice, in a word and for people."""
        if pin := self.policy.pin:
            if lane.name == pin:
                return Cause.PIN, "pinned by the operator"
            return (
                Cause.HEALTH,
                f"the GPU could not be brought to {pin}, where the operator wants it",
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
        if not self._takes(chosen, ticket):
            return Cause.CAPABILITY, ticket.why
        failed = any(replica in ticket.without for replica in chosen.replicas)
        cause = Cause.FAILOVER if failed else Cause.HEALTH
        return cause, f"{chosen.name} {self._trouble(chosen, ticket)}"

    def _takes(self, lane: Lane, ticket: Ticket) -> bool:
        return not ticket.able or lane.name in ticket.able

    def _trouble(self, lane: Lane, ticket: Ticket) -> str:
        if any(replica in ticket.without for replica in lane.replicas):
            return "failed this request"
        if lane.barred:
            return lane.barred
        return next((r.trouble for r in lane.replicas if r.trouble), "is not usable")

    def _no_lane(self, ticket: Ticket) -> NoLane:
        pin = self._pin(ticket)
        if pin and pin not in self.lanes:
            message = f"The operator keeps the GPU at {pin}, which does not have this model."
            return NoLane(message, retry_after=60)
        names = [pin] if pin else [lane for lane in self.lanes if lane in ticket.able] or self.lanes
        troubles = "; ".join(f"{name} {self._trouble(self.lanes[name], ticket)}" for name in names)
        back_s = min(replica.back_s for name in names for replica in self.lanes[name].replicas)
        message = f"No engine can answer for this model now: {troubles}."
        return NoLane(message, retry_after=back_s)

    def _too_many(self, ticket: Ticket) -> QueueFull | None:
        """Why a ticket that waits may not; None where it may."""
        lane = self._choose(ticket)
        if lane is None or self.waiting <= lane.waiting:
            return None
        before = sum(
            other.background == ticket.background and self._choose(other) is lane
            for other in self._in_turn()
        )
        if before <= lane.waiting:
            return None
        return QueueFull(
            "Too many requests wait for this model already. Try again later.",
            retry_after=self.wait_s(lane),
        )

    def _assign(self, now: float) -> list[Action]:
        """Start whoever can start now, in turn."""
        actions: list[Action] = []
        if self._decide(now):
            self.hold(None)
            actions.append(Move())
        if not self._foreground and not self._background:
            return actions
        free = sum(
            max(0, replica.room - replica.running)
            for lane in self.lanes.values()
            if lane.holds
            for replica in lane.replicas
        )
        if not free:
            return actions
        if self.refined is not None:
            self._count(now)
        for ticket in self._in_turn():
            chosen = self._choose(ticket)
            replica = chosen.free(ticket.without) if chosen else None
            if chosen is None or replica is None:
                continue
            self._dequeue(ticket)
            ticket.lane, ticket.replica, ticket.started = chosen, replica, now
            ticket.cause, ticket.reason = self._why(ticket, chosen)
            if self.refined is not None:
                ticket.before = self._ran(chosen)
            replica.running += 1
            actions.append(Start(ticket))
            free -= 1
            if not free:
                break
        return actions

    def _count(self, now: float) -> None:
        """Add up who ran until now; what runs changes next."""
        passed = now - self._counted_at
        self._counted_at = now
        for lane in self.lanes.values():
            if running := lane.running:
                lane.ran += running * passed
                lane.ran2 += running * running * passed

    def _ran(self, lane: Lane) -> tuple[float, float, float]:
        return lane.ran, lane.ran2, sum(one.ran for one in self.lanes.values())

    def _decide(self, now: float) -> bool:
        """Tell the policy how things stand; True where the GPU has to be handed over first."""
        running = {name: lane.running for name, lane in self.lanes.items()}
        if not self.exclusive:
            self.policy.observe(now, self.model, Demand(self.demand, running, _NONE))
            return False
        # Where nobody holds, everybody waits for the GPU, and none for a lane in particular.
        stranded = self._stranded() if self.held else _NONE
        decided = self.policy.observe(now, self.model, Demand(self.demand, running, stranded))
        nobody = not self.held and not self.policy.moving
        return decided or (nobody and self.waiting > 0)

    def _stranded(self) -> dict[str, int]:
        """Foreground requests that wait for a lane without the GPU, which no other can serve."""
        stranded: dict[str, int] = {}
        for line in self._foreground.values():
            for ticket in line:
                chosen = self._choose(ticket)
                if chosen is not None and not chosen.holds:
                    stranded[chosen.name] = stranded.get(chosen.name, 0) + 1
        return stranded

    # The queue: one line a key, the keys in turn, background calls behind everyone

    def _in_turn(self) -> Iterator[Ticket]:
        lines = [list(line) for line in self._foreground.values()]
        for rank in range(max(map(len, lines), default=0)):
            yield from (line[rank] for line in lines if rank < len(line))
        yield from list(self._background)

    def _enter(self, ticket: Ticket, *, front: bool) -> None:
        if ticket.background:
            line = self._background
        else:
            self.demand += 1
            line = self._foreground.setdefault(ticket.key, deque())
        if front:
            line.appendleft(ticket)
            if not ticket.background:
                self._foreground.move_to_end(ticket.key, last=False)
        else:
            line.append(ticket)

    def _dequeue(self, ticket: Ticket) -> None:
        """Take out of the queue; a key that was served goes behind the others."""
        if ticket.background:
            self._background.remove(ticket)
            return
        line = self._foreground[ticket.key]
        line.remove(ticket)
        if line:
            self._foreground.move_to_end(ticket.key)
        else:
            del self._foreground[ticket.key]

    def _leave(self, ticket: Ticket) -> bool:
        """Leave the queue without having been served; False where it was not in it."""
        if ticket.background:
            if ticket not in self._background:
                return False
            self._background.remove(ticket)
            return True
        line = self._foreground.get(ticket.key)
        if line is None or ticket not in line:
            return False
        line.remove(ticket)
        if not line:
            del self._foreground[ticket.key]
        self.demand -= 1
        return True
