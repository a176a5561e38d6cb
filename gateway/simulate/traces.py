"""Who is there when: the built-in traces, and one's own from a file.

A trace says how many people are there, in steps. Whoever is there asks, reads the answer,
thinks, and asks again; whoever leaves lets the last answer come first. So demand follows
from how fast the answers are, as it does with people. The gateway's own log is replayed
as it came instead: the times are given, and whoever wrote it does not wait for us.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import TypeAlias

import msgspec

from gateway.settings import SettingsError
from gateway.simulate.machine import Outcome

#: The most people a trace may have: a slip above that, not a team.
MOST = 10_000

#: A working day: until this part of it, this share of the team is at the chat. They come,
#: work, have lunch, work, and go.
OFFICE = (
    (0.12, 0.15), (0.25, 0.3), (0.36, 0.65), (0.42, 0.3), (0.55, 0.15), (0.65, 0.3), (0.76, 0.65),
    (0.88, 0.3), (1.0, 0.15),
)  # fmt: skip
#: How long somebody stays at the chat, seconds on average.
VISIT_S = 1200.0
#: A log tells how many were there at a moment; what is usual around then is a mean over this.
SMOOTH_S = 60.0

Steps: TypeAlias = Sequence[tuple[float, int]]


@dataclass(frozen=True)
class People:
    """So many people are there, from each of these moments on.

    Attributes:
        name: What it is called in the results.
        steps: Seconds from the beginning, and people from then on.
        ends_s: When the last one leaves.
        people: The team it was made for; the most at once where it was read.
        worse: Where they mind who serves them: people by the lane that holds.
    """

    name: str
    steps: Steps
    ends_s: float
    people: int
    worse: Mapping[str, int] = field(default_factory=dict)

    def begin(self, think_s: float, seed: int) -> Crowd:
        """These people from the beginning, who think so long on average."""
        return Crowd(self, think_s, seed)

    def there(self, at: float) -> int:
        """How many people are there."""
        index = bisect_left(self.steps, (at, MOST + 1)) - 1
        return self.steps[index][1] if index >= 0 and at < self.ends_s else 0

    def load(
        self, seconds: Callable[[int], float], think_s: float, slice_s: float, served: Outcome
    ) -> list[float]:
        """How many are there in each slice on average, if a lane serves all the time.

        What so many people make of a lane is known exactly: arrivals slow down and answers
        speed up with the number there, step by step (a birth-death chain in equilibrium).
        """
        found: dict[int, float] = {}
        loads: list[float] = []
        for number in range(math.ceil(self.ends_s / slice_s)):
            people = self.there((number + 0.5) * slice_s)
            if people not in found:
                found[people] = equilibrium(people, seconds, think_s)
            loads.append(found[people])
        return loads

    def waiting(self, since: float, until: float, began: float, think_s: float) -> float:
        """How many will wait if from `since` to `until` nobody is answered."""
        people = self.there(until)
        return max(began, people - (people - began) * math.exp((since - until) / think_s))


@dataclass(frozen=True)
class Requests:
    """Requests as they came, whatever becomes of those before.

    Attributes:
        name: What it is called in the results.
        at: Seconds from the beginning, in order.
        work: How much work each is, 1 on average.
        ends_s: After the last.
        people: 0: nobody knows how many they were.
    """

    name: str
    at: Sequence[float]
    work: Sequence[float]
    ends_s: float
    people: int = 0

    def begin(self, think_s: float, seed: int) -> Replay:
        """These requests from the beginning."""
        return Replay(self)

    def load(
        self, seconds: Callable[[int], float], think_s: float, slice_s: float, served: Outcome
    ) -> list[float]:
        """How many are there in each slice on average, if a lane serves all the time.

        As it was when that lane did, a minute for one.
        """
        size = max(1, round(SMOOTH_S / slice_s))
        loads = served.load
        return [
            math.fsum(loads[n - n % size : n - n % size + size]) / size for n in range(len(loads))
        ]

    def waiting(self, since: float, until: float, began: float, think_s: float) -> float:
        """How many will wait if from `since` to `until` nobody is answered."""
        return began + bisect_left(self.at, until) - bisect_left(self.at, since)


Trace: TypeAlias = People | Requests


def equilibrium(people: int, seconds: Callable[[int], float], think_s: float) -> float:
    """How many of these people wait or are answered on average, where others think."""
    weight = total = 1.0
    there = 0.0
    for number in range(1, people + 1):
        weight *= (people - number + 1) / think_s * seconds(number) / number
        total += weight
        there += weight * number
    return there / total


class Crowd:
    """People who ask, read and think.

    Each has dice of their own, so that every policy meets the same people: their n-th
    thought and their n-th question do not depend on it.
    """

    def __init__(self, trace: People, think_s: float, seed: int) -> None:
        self.next = 0.0
        self.seen: list[tuple[float, int]] = []  # the steps as they were, for `worse`
        self._worse = trace.worse
        self._steps = [*trace.steps, (trace.ends_s, 0)]
        self._ends_s = trace.ends_s
        self._step = 0
        self._think_s = think_s
        self._seed = seed
        self._there = 0
        self._away: set[int] = set()
        self._dice: list[Callable[[], float]] = []
        self._coming: list[tuple[float, int]] = []
        self._plan()

    def take(self, now: float) -> tuple[int, float] | None:
        """See `Demand.take`."""
        asked = None
        if self._step < len(self._steps) and self._steps[self._step][0] <= now:
            people = self._steps[self._step][1]
            self._step += 1
            if not self._worse or not people:
                self._are_there(now, people)
        else:
            _, who = heappop(self._coming)
            if who < self._there:
                asked = who, -math.log(1.0 - self._dice[who]())
            else:
                self._away.add(who)
        self._plan()
        return asked

    def answered(self, now: float, who: int) -> None:
        """See `Demand.answered`."""
        if who < self._there:
            self._think(now, who)
            self._plan()
        else:
            self._away.add(who)

    def held(self, now: float, lane: str) -> None:
        """See `Demand.held`."""
        if self._worse and now < self._ends_s:
            self._are_there(now, self._worse[lane])
            self._plan()

    def _are_there(self, now: float, people: int) -> None:
        self.seen.append((now, people))
        while len(self._dice) < people:
            self._away.add(len(self._dice))
            self._dice.append(Random(f"{self._seed} {len(self._dice)}").random)  # noqa: S311
        self._there = people
        for who in sorted(who for who in self._away if who < people):
            self._away.discard(who)
            self._think(now, who)

    def _think(self, now: float, who: int) -> None:
        heappush(self._coming, (now - self._think_s * math.log(1.0 - self._dice[who]()), who))

    def _plan(self) -> None:
        comes = self._coming[0][0] if self._coming else math.inf
        step = self._steps[self._step][0] if self._step < len(self._steps) else math.inf
        self.next = min(comes, step)


class Replay:
    """Requests out of a log."""

    def __init__(self, trace: Requests) -> None:
        self._trace = trace
        self._index = 0
        self.next = trace.at[0]

    def take(self, now: float) -> tuple[int, float] | None:
        """See `Demand.take`."""
        who = self._index
        self._index += 1
        self.next = self._trace.at[self._index] if self._index < len(self._trace.at) else math.inf
        return who, self._trace.work[who]

    def answered(self, now: float, who: int) -> None:
        """Nobody asks again."""

    def held(self, now: float, lane: str) -> None:
        """Nobody minds."""


# Built in: how many are there, by the size of the team


def _few(people: int) -> int:
    return max(1, people // 4)


def _constant(times: float) -> Callable[[int, float, Random], Steps]:
    return lambda people, ends_s, dice: [(0.0, max(1, round(people * times)))]


def _office(times: int) -> Callable[[int, float, Random], Steps]:
    """A working day with its two humps: each is at the chat for 20 minutes on average.

    How soon they come back depends on the time of day. Minute by minute.
    """

    def steps(people: int, ends_s: float, dice: Random) -> Steps:
        there = [False] * (people * times)
        found: list[tuple[float, int]] = []
        for minute in range(math.ceil(ends_s / 60)):
            share = next(share for until, share in OFFICE if minute * 60 < until * ends_s)
            leaves = 60 / VISIT_S
            comes = leaves * share / (1 - share)
            for who, is_there in enumerate(there):
                if dice.random() < (leaves if is_there else comes):
                    there[who] = not is_there
            found.append((minute * 60.0, sum(there)))
        return found

    return steps


def _bursts(people: int, ends_s: float, dice: Random) -> Steps:
    """A few all the time; every ten minutes or so a crowd for a minute or two."""
    changes = [(0.0, _few(people))]
    at = dice.expovariate(1 / 600)
    while at < ends_s:
        crowd = round(people * dice.uniform(1, 2))
        leaves = at + 20 + dice.expovariate(1 / 80)
        changes += [(at, crowd), (leaves, -crowd)]
        at = leaves + dice.expovariate(1 / 600)
    return _summed(changes)


def _square(holds_s: float) -> Callable[[int, float, Random], Steps]:
    """Few, then twice the team, then few again, each for so long."""

    def steps(people: int, ends_s: float, dice: Random) -> Steps:
        levels = (_few(people), 2 * people)
        return [(n * holds_s, levels[n % 2]) for n in range(math.ceil(ends_s / holds_s))]

    return steps


def _flash_crowd(people: int, ends_s: float, dice: Random) -> Steps:
    """A quarter of the team; twice everybody comes within a minute and goes slowly."""
    changes = [(0.0, max(1, people // 4))]
    for part, size, stays_s in ((0.3, 4, 1200.0), (0.75, 2, 300.0)):
        for _ in range(size * people):
            at = part * ends_s + dice.uniform(0, 60)
            changes += [(at, 1), (at + stays_s + dice.expovariate(1 / 300), -1)]
    return _summed(changes)


def _summed(changes: Iterable[tuple[float, int]]) -> Steps:
    ordered = sorted(changes)
    return list(
        zip((at for at, _ in ordered), accumulate(change for _, change in ordered), strict=True)
    )


#: What is built in, and what it is for.
BUILT_IN: Mapping[str, tuple[Callable[[int, float, Random], Steps], str]] = {
    "constant-low": (_constant(1 / 4), "a quarter of the team, all the time"),
    "constant": (_constant(1), "the whole team, all the time"),
    "constant-high": (_constant(2), "twice the team, all the time"),
    "office": (_office(1), "a working day: they come, have lunch, go, and are away in between"),
    "office-double": (_office(2), "the same with twice the team"),
    "bursts": (_bursts, "a few; every ten minutes or so a crowd for a minute or two"),
    "flash-crowd": (_flash_crowd, "a quarter of the team; twice a crowd comes within a minute"),
    **{
        f"square-{holds_s}": (
            _square(holds_s), f"few, then twice the team, each for {holds_s} s"
        )
        for holds_s in (30, 60, 120, 300, 600, 1800)
    },
    "adversary": (_constant(1), "always the demand that is worse for the lane that holds"),
}  # fmt: skip


def built_in(
    name: str, people: int, hours: float, seed: int, lanes: Mapping[str, Callable[[int], float]]
) -> People:
    """A trace of this team.

    Args:
        name: One of `BUILT_IN`.
        people: The team.
        hours: How long.
        seed: Whoever has the same has the same day.
        lanes: For each lane, how many times slower than the fastest it is at a demand.
    """
    ends_s = hours * 3600
    steps, _ = BUILT_IN[name]
    worse: dict[str, int] = {}
    if name == "adversary":
        levels = (1, 2 * people)
        worse = {lane: max(levels, key=slower) for lane, slower in lanes.items()}
    # A team's day must not depend on which other traces were asked for.
    made = steps(people, ends_s, Random(f"{seed} {name} {people}"))  # noqa: S311
    return People(name, made, ends_s, people, worse)


# From a file


def read(path: Path) -> Trace:
    """A trace from a file: `seconds,people` lines, the same as JSON, or the gateway's log.

    Raises:
        SettingsError: It cannot be read, is empty, or a line is not understood.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsError(f"the trace {path} cannot be read: {exc}") from exc
    lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise SettingsError(f"the trace {path} is empty")
    objects = [(n, _object(path, n, line)) for n, line in lines if line.startswith("{")]
    if any("total_s" in said for _, said in objects):
        return _replayed(path, objects)  # other lines are what the gateway said besides
    if objects:
        rows = [(n, said.get("seconds"), said.get("people")) for n, said in objects]
        if len(objects) < len(lines):
            strange = next(n for n, line in lines if not line.startswith("{"))
            raise SettingsError(f"the trace {path}, line {strange}: is no JSON object")
        return _stepped(path, rows)
    cells = [(n, [cell.strip() for cell in line.split(",")]) for n, line in lines]
    if [cell.lower() for cell in cells[0][1]] == ["seconds", "people"]:
        del cells[0]
    return _stepped(path, [(n, row[0], row[1] if len(row) == 2 else None) for n, row in cells])


def _object(path: Path, number: int, line: str) -> dict[str, object]:
    try:
        return msgspec.json.decode(line, type=dict[str, object])
    except msgspec.DecodeError as exc:
        raise SettingsError(f"the trace {path}, line {number}: {exc}") from exc


def _stepped(path: Path, rows: Iterable[tuple[int, object, object]]) -> People:
    steps: list[tuple[float, int]] = []
    for number, seconds, people in rows:
        try:
            step = msgspec.convert((seconds, people), tuple[float, int], strict=False)
        except msgspec.ValidationError:
            step = (math.nan, 0)
        if not (math.isfinite(step[0]) and step[0] >= 0 and 0 <= step[1] <= MOST):
            raise SettingsError(
                f"the trace {path}, line {number}: write the seconds from the beginning and the "
                f"people (0 to {MOST}) that are there from then on, as 3600,12"
            )
        steps.append(step)
        if len(steps) > 1 and steps[-2][0] >= step[0]:
            raise SettingsError(f"the trace {path}, line {number}: the seconds must grow")
    if len(steps) < 2 or not any(people for _, people in steps[:-1]):
        raise SettingsError(
            f"the trace {path} has nobody in it: it takes two lines at least, the last of which "
            "says when it ends"
        )
    return People(path.stem, steps[:-1], steps[-1][0], max(people for _, people in steps[:-1]))


def _replayed(path: Path, objects: Iterable[tuple[int, Mapping[str, object]]]) -> Requests:
    """The foreground requests of a log that an engine answered."""
    found: list[tuple[float, float]] = []
    for number, said in objects:
        if "total_s" not in said or said.get("background") or not said.get("lane"):
            continue
        at, tokens = said.get("at"), said.get("tokens_out")
        if not isinstance(at, int | float) or not isinstance(tokens, int | float | None):
            raise SettingsError(f"the trace {path}, line {number}: is no line of the gateway's log")
        found.append((float(at), float(tokens or 0)))
    if not found:
        raise SettingsError(f"the trace {path} has no request in it that an engine answered")
    found.sort()
    began = found[0][0]
    known = [tokens for _, tokens in found if tokens > 0]
    mean = math.fsum(known) / len(known) if known else 1.0
    work = [tokens / mean if tokens > 0 else 1.0 for _, tokens in found]
    at_s = [at - began for at, _ in found]
    return Requests(path.stem, at_s, work, at_s[-1] + 1.0)
