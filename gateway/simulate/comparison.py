"""Simulates every policy on the same demand and the same machine, and compares the results."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

import msgspec

from backends.kinds import KINDS
from gateway.routing.profile import Profile
from gateway.simulate.built_in import built_in
from gateway.simulate.choices import ALWAYS, CLAIRVOYANT
from gateway.simulate.hindsight import best_schedule
from gateway.simulate.policies import FixedLane, Schedule, make_policy
from gateway.simulate.profiles import seconds_on
from gateway.simulate.simulator import Machine, SimulatedPolicy, SimulationResult, simulate
from gateway.simulate.traces import PeopleTrace, Trace
from gateway.simulate.workload import ClosedLoop, workload_of

#: The slices of time of the clairvoyant's plan, seconds.
SLICE_S = 10.0
#: Factors on the cost of a hand-over in the clairvoyant's plans. The best plan counts.
CAUTION = (1.0, 2.0)


class SimulationRecord(msgspec.Struct, frozen=True):
    """One trace on one machine under one policy. Its fields are those of the JSON output.

    Attributes:
        ratio_fixed: Its mean seconds over those of the better single lane.
        ratio_clairvoyant: Its mean seconds over those of the best plan for a known day.
        better: The better single lane.
        held: By lane, the share of the time that it held the GPU.
    """

    trace: str
    profile: str
    handover_s: float
    policy: str
    people: int
    hours: float
    seed: int
    requests: int
    mean_s: float
    p95_s: float
    moves: int
    moves_per_hour: float
    ratio_fixed: float
    ratio_clairvoyant: float
    better: str
    held: Mapping[str, float]


@dataclass(frozen=True)
class Case:
    """One trace on one profile, at several hand-over times.

    Attributes:
        trace: The name of a built-in trace, or a trace from a file.
        label: The name of the profile.
        profile: Seconds per request by lane and demand.
        lanes: The lanes that take part; the policies begin on the first.
        think_s: Mean seconds between an answer and the next question.
        people: The size of the team.
        hours: The length of a built-in trace.
        seed: Of the random numbers.
        handovers_s: Seconds that a hand-over takes.
        policies: Names of `choices.POLICIES`.
    """

    trace: str | Trace
    label: str
    profile: Profile
    lanes: tuple[str, ...]
    think_s: float
    people: int
    hours: float
    seed: int
    handovers_s: tuple[float, ...]
    policies: tuple[str, ...]

    def demand(self) -> Trace:
        """The trace itself, for this team."""
        if not isinstance(self.trace, str):
            return self.trace
        slowdown = {lane: partial(self._slowdown, lane) for lane in self.lanes}
        return built_in(self.trace, self.people, self.hours, self.seed, slowdown)

    def _slowdown(self, lane: str, demand: int) -> float:
        best = min(seconds_on(self.profile, other, demand) for other in self.lanes)
        return seconds_on(self.profile, lane, demand) / best


def compare_all(cases: Sequence[Case], jobs: int) -> Iterator[list[SimulationRecord]]:
    """The records of each case as they are ready, computed in so many processes."""
    if jobs == 1 or len(cases) == 1:
        yield from map(compare, cases)
        return
    with ProcessPoolExecutor(min(jobs, len(cases)), get_context("spawn")) as pool:
        for future in as_completed([pool.submit(compare, case) for case in cases]):
            yield future.result()


def compare(case: Case) -> list[SimulationRecord]:
    """The records of a case: every policy at every hand-over time."""
    return [outcome.record() for outcome in outcomes(case)]


def outcomes(case: Case) -> Iterator[Outcome]:
    """Each policy's day at each hand-over time, not compared with the clairvoyant yet."""
    demand = case.demand()
    common = References(case, demand)
    for handover_s in case.handovers_s:
        machine = _machine(case, handover_s)
        for name in _policy_names(case):
            references = common
            if name == CLAIRVOYANT:
                result = common.clairvoyant(handover_s)
            elif name.startswith(ALWAYS) and not _depends_on_holder(demand):
                result = common.fixed[name.removeprefix(f"{ALWAYS}-")]
            else:
                policy = make_policy(name, case.lanes, case.profile, handover_s)
                result, own_demand = _simulate(machine, demand, policy, case)
                if own_demand is not None:
                    references = References(case, own_demand)
            yield Outcome(case, demand, name, handover_s, result, references)


def _policy_names(case: Case) -> list[str]:
    names: list[str] = []
    for name in case.policies:
        if name == ALWAYS:
            names += [f"{ALWAYS}-{lane}" for lane in case.lanes]
        elif name != CLAIRVOYANT or not _depends_on_holder(case.trace):
            names.append(name)
    return names


def _depends_on_holder(trace: str | Trace) -> bool:
    """Whether the demand depends on the lane that holds the GPU: then it differs by policy."""
    return trace == "adversary" or (isinstance(trace, PeopleTrace) and bool(trace.by_holder))


def _machine(case: Case, handover_s: float) -> Machine:
    slots = {name: kind.slots for name, kind in KINDS.items() if name in case.lanes}
    return Machine(case.profile, slots, handover_s)


def _simulate(
    machine: Machine, trace: Trace, policy: SimulatedPolicy, case: Case
) -> tuple[SimulationResult, PeopleTrace | None]:
    """The result, and the demand as it was where it depended on the policy."""
    workload = workload_of(trace, case.think_s, case.seed)
    result = simulate(machine, workload, policy, SLICE_S)
    if isinstance(trace, PeopleTrace) and isinstance(workload, ClosedLoop) and trace.by_holder:
        return result, replace(trace, steps=tuple(workload.steps_taken), by_holder={})
    return result, None


class References:
    """What a policy is compared with on one trace: single lanes, and the clairvoyant."""

    def __init__(self, case: Case, trace: Trace) -> None:
        self._case = case
        self._trace = trace
        self._best: dict[float, SimulationResult] = {}
        machine = _machine(case, 0.0)
        self.fixed: dict[str, SimulationResult] = {}
        if not _depends_on_holder(trace):
            self.fixed = {
                lane: _simulate(machine, trace, FixedLane(lane), case)[0] for lane in case.lanes
            }

    @property
    def better(self) -> str:
        """The better single lane."""
        return min(self.fixed, key=lambda lane: self.fixed[lane].mean_s)

    def clairvoyant(self, handover_s: float) -> SimulationResult:
        """The result of the best plan that was found, or of the better single lane."""
        if handover_s not in self._best:
            machine = _machine(self._case, handover_s)
            results = [self.fixed[self.better]]
            for caution in CAUTION:
                moves = best_schedule(
                    machine, self._trace, self.fixed, self._case.think_s, SLICE_S, caution
                )
                if len(moves) > 1:
                    results.append(_simulate(machine, self._trace, Schedule(moves), self._case)[0])
            self._best[handover_s] = min(results, key=lambda result: result.mean_s)
        return self._best[handover_s]


@dataclass(frozen=True)
class Outcome:
    """A policy's day at one hand-over time.

    Attributes:
        case: What was simulated.
        trace: The demand.
        policy: Its name; of a fixed lane `always-LANE`.
        handover_s: Seconds that a hand-over takes.
        result: What the day was like.
        references: What it is compared with.
    """

    case: Case
    trace: Trace
    policy: str
    handover_s: float
    result: SimulationResult
    references: References

    @property
    def moves(self) -> int:
        """The number of hand-overs."""
        return len(self.result.moved_at)

    @property
    def moves_per_hour(self) -> float:
        """Hand-overs per hour."""
        return self.moves / (self.trace.ends_s / 3600)

    @property
    def ratio_fixed(self) -> float:
        """Its mean seconds over those of the better single lane."""
        return _ratio(self.result, self.references.fixed[self.references.better])

    def record(self) -> SimulationRecord:
        """All figures. Computes the clairvoyant's plan, which may take longer than the day."""
        result, references = self.result, self.references
        held_s = math.fsum(result.held_s.values()) or 1.0
        return SimulationRecord(
            trace=self.trace.name,
            profile=self.case.label,
            handover_s=self.handover_s,
            policy=self.policy,
            people=self.trace.people,
            hours=round(self.trace.ends_s / 3600, 4),
            seed=self.case.seed,
            requests=len(result.seconds),
            mean_s=round(result.mean_s, 4),
            p95_s=round(result.p95_s, 4),
            moves=self.moves,
            moves_per_hour=round(self.moves_per_hour, 4),
            ratio_fixed=self.ratio_fixed,
            ratio_clairvoyant=_ratio(result, references.clairvoyant(self.handover_s)),
            better=references.better,
            held={lane: round(seconds / held_s, 4) for lane, seconds in result.held_s.items()},
        )


def _ratio(result: SimulationResult, reference: SimulationResult) -> float:
    return round(result.mean_s / reference.mean_s, 4) if reference.mean_s else 1.0
