"""Every policy over the same demand on the same machine, and how each compares."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

import msgspec

from backends.kinds import KINDS
from gateway.routing.profile import ASSUMED, VERSION, Lane, Profile
from gateway.simulate import hindsight, rivals, traces
from gateway.simulate.machine import Decider, Machine, Outcome, run
from gateway.simulate.traces import Crowd, People, Trace

#: How long people read and think, in answers of the faster lane to one alone: the longer
#: the answers, the less often they are asked for. Assumed.
THINK = 8.0
#: A team where the engines do not say which size makes a difference.
TEAM = 12
#: Slices of time in which the clairvoyant plans, seconds.
SLICE_S = 10.0
#: How much more than it should a hand-over costs in the clairvoyant's plans: the best counts.
CAUTION = (1.0, 2.0)

OURS = "ours"
CLAIRVOYANT = "clairvoyant"
ALWAYS = "always"
POLICIES = (OURS, ALWAYS, "crossover", "high-low", CLAIRVOYANT)

#: Profiles by name, and what each is for.
PROFILES: Mapping[str, tuple[Profile, str]] = {
    "measured": (
        Profile(
            VERSION, "measured",
            {
                "ollama": Lane((1, 2, 4, 8, 16, 24), (0.73, 1.43, 2.59, 4.86, 9.11, 11.86)),
                "vllm": Lane((1, 2, 4, 8, 16, 24), (1.37, 1.44, 1.43, 1.97, 2.67, 3.33)),
            },
            machine="two CPU cores, SmolLM2-135M, Ollama 0.24 with one slot, vLLM 0.32",
        ),
        "Ollama 0.24 and vLLM 0.32 on two CPU cores, SmolLM2-135M: equal at 2 at once",
    ),
    "built-in": (
        ASSUMED, "what the gateway assumes until a profile is measured: equal at 4 at once"
    ),
    "70b": (
        Profile(
            VERSION, "assumed",
            {
                "ollama": Lane((1, 2, 4, 8, 16, 32), (13.7, 27.4, 54.8, 109.6, 219.2, 438.4)),
                "vllm": Lane((1, 4, 8, 16, 32), (7.7, 8.4, 9.0, 10.2, 13.6)),
            },
            machine="two RTX 4090 by their bandwidth, 70B in 4 bit, 500 tokens in, 250 out",
        ),
        "a 70B on two RTX 4090, by bandwidth (assumed): vLLM is faster even for one",
    ),
    "close": (
        Profile(
            VERSION, "assumed",
            {
                "ollama": Lane((1, 2, 4, 8, 16, 32), (1.0, 1.4, 2.3, 4.2, 8.0, 15.6)),
                "vllm": Lane((1, 2, 4, 8, 16, 32), (1.15, 1.5, 2.3, 4.0, 7.3, 13.8)),
            },
            machine="made up",
        ),
        "two engines close to each other (made up): a crossover, but little to gain",
    ),
}  # fmt: skip


class Record(msgspec.Struct, frozen=True):
    """One trace on one machine under one policy.

    Attributes:
        ratio_fixed: Its mean seconds against the better single lane's, known afterwards.
        ratio_clairvoyant: Against the best found by who knew everything beforehand.
        better: The better single lane.
        held: Share of the time that each lane held the GPU.
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
        trace: The name of a built-in one, or one that was read.
        label: What the profile is called.
        lanes: Those that take part; the policies begin on the first.
        think_s: Mean seconds between an answer and the next question.
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
        """The trace itself."""
        if not isinstance(self.trace, str):
            return self.trace
        slower = {lane: partial(self._slower, lane) for lane in self.lanes}
        return traces.built_in(self.trace, self.people, self.hours, self.seed, slower)

    def _slower(self, lane: str, demand: int) -> float:
        best = min(_seconds(self.profile, other, demand) for other in self.lanes)
        return _seconds(self.profile, lane, demand) / best


def lanes_of(profile: Profile) -> tuple[str, ...]:
    """The lanes a profile knows, Ollama first and the embedded engine only if it must be."""
    known = tuple(kind for kind in KINDS if kind in profile.lanes)
    return known[:2]


def think_s(profile: Profile) -> float:
    """How long people think who are answered this fast."""
    return THINK * min(profile.lanes[lane].at(1) for lane in lanes_of(profile))


def team(profile: Profile, think_s: float) -> int:
    """How many people both lanes serve equally well: the team that makes the choice a choice.

    12 where one lane is better for any number up to a hundred.
    """
    lanes = lanes_of(profile)

    def there(lane: str, people: int) -> float:
        return traces.equilibrium(people, partial(_seconds, profile, lane), think_s)

    first = there(lanes[0], 1) < there(lanes[1], 1)
    for people in range(2, 101):
        if (there(lanes[0], people) < there(lanes[1], people)) != first:
            return people
    return TEAM


def _seconds(profile: Profile, lane: str, demand: int) -> float:
    return profile.seconds(lane, demand) or math.inf


def study(cases: Sequence[Case], jobs: int) -> Iterator[list[Record]]:
    """The records of each case, as they come."""
    if jobs == 1 or len(cases) == 1:
        yield from map(compare, cases)
        return
    with ProcessPoolExecutor(min(jobs, len(cases)), get_context("spawn")) as pool:
        for done in as_completed([pool.submit(compare, case) for case in cases]):
            yield done.result()


def compare(case: Case) -> list[Record]:
    """Run every policy of a case, each at every hand-over time."""
    demand = case.demand()
    records: list[Record] = []
    base = _Hindsight(case, demand)
    for handover_s in case.handovers_s:
        machine = _machine(case, handover_s)
        for name in _named(case):
            known = base
            if name == CLAIRVOYANT:
                outcome = base.best(handover_s)
            elif name.startswith(ALWAYS) and not _minds(demand):
                outcome = base.fixed[name.removeprefix(f"{ALWAYS}-")]
            else:
                decider = rivals.make(name, case.lanes, case.profile, handover_s)
                outcome, seen = _run(machine, demand, decider, case)
                if seen is not None:
                    known = _Hindsight(case, seen)
            records.append(_record(case, demand, name, handover_s, outcome, known))
    return records


def _named(case: Case) -> list[str]:
    names: list[str] = []
    for name in case.policies:
        if name == ALWAYS:
            names += [f"{ALWAYS}-{lane}" for lane in case.lanes]
        elif name != CLAIRVOYANT or not _minds(case.trace):
            names.append(name)
    return names


def _minds(trace: str | Trace) -> bool:
    """Whether demand depends on the lane: then each policy has a day of its own."""
    return trace == "adversary" or (isinstance(trace, People) and bool(trace.worse))


def _machine(case: Case, handover_s: float) -> Machine:
    slots = {name: kind.slots for name, kind in KINDS.items() if name in case.lanes}
    return Machine(case.profile, slots, handover_s)


def _run(
    machine: Machine, trace: Trace, decider: Decider, case: Case
) -> tuple[Outcome, People | None]:
    """How it went, and the trace as it was where it depended on that."""
    demand = trace.begin(case.think_s, case.seed)
    outcome = run(machine, demand, decider, SLICE_S)
    if isinstance(trace, People) and isinstance(demand, Crowd) and trace.worse:
        return outcome, replace(trace, steps=tuple(demand.seen), worse={})
    return outcome, None


class _Hindsight:
    """What could have been made of a trace."""

    def __init__(self, case: Case, trace: Trace) -> None:
        self._case = case
        self._trace = trace
        self._best: dict[float, Outcome] = {}
        machine = _machine(case, 0.0)
        self.fixed: dict[str, Outcome] = {}
        if not _minds(trace):
            self.fixed = {
                lane: _run(machine, trace, rivals.Always(lane), case)[0] for lane in case.lanes
            }

    @property
    def better(self) -> str:
        """The better single lane."""
        return min(self.fixed, key=lambda lane: self.fixed[lane].mean_s)

    def best(self, handover_s: float) -> Outcome:
        """The best plan that was found, or a single lane where none was better."""
        if handover_s not in self._best:
            machine = _machine(self._case, handover_s)
            found = [self.fixed[self.better]]
            for caution in CAUTION:
                plan = hindsight.plan(
                    machine, self._trace, self.fixed, self._case.think_s, SLICE_S, caution
                )
                if len(plan) > 1:
                    found.append(_run(machine, self._trace, rivals.Schedule(plan), self._case)[0])
            self._best[handover_s] = min(found, key=lambda outcome: outcome.mean_s)
        return self._best[handover_s]


def _record(
    case: Case, trace: Trace, name: str, handover_s: float, outcome: Outcome, known: _Hindsight
) -> Record:
    hours = trace.ends_s / 3600
    held = math.fsum(outcome.held_s.values()) or 1.0
    return Record(
        trace=trace.name,
        profile=case.label,
        handover_s=handover_s,
        policy=name,
        people=trace.people,
        hours=round(hours, 4),
        seed=case.seed,
        requests=len(outcome.seconds),
        mean_s=round(outcome.mean_s, 4),
        p95_s=round(outcome.p95_s, 4),
        moves=len(outcome.moved_at),
        moves_per_hour=round(len(outcome.moved_at) / hours, 4),
        ratio_fixed=_ratio(outcome, known.fixed[known.better]),
        ratio_clairvoyant=_ratio(outcome, known.best(handover_s)),
        better=known.better,
        held={lane: round(seconds / held, 4) for lane, seconds in outcome.held_s.items()},
    )


def _ratio(outcome: Outcome, best: Outcome) -> float:
    return round(outcome.mean_s / best.mean_s, 4) if best.mean_s else 1.0
