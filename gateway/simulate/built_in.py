"""The built-in traces: how many people are present when, for a team of any size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from random import Random
from typing import TypeAlias

from gateway.simulate.choices import TRACES
from gateway.simulate.traces import PeopleTrace, Steps

#: A working day: until this part of it, this share of the team is at the chat. Two humps, with
#: lunch between them.
OFFICE_SHARES = (
    (0.12, 0.15), (0.25, 0.3), (0.36, 0.65), (0.42, 0.3), (0.55, 0.15), (0.65, 0.3), (0.76, 0.65),
    (0.88, 0.3), (1.0, 0.15),
)  # fmt: skip
#: Mean length of a visit to the chat, seconds.
VISIT_S = 1200.0

#: From the size of the team, the length in seconds and a random number generator to steps.
Shape: TypeAlias = Callable[[int, float, Random], Steps]


def built_in(
    name: str, people: int, hours: float, seed: int, slowdown: Mapping[str, Callable[[int], float]]
) -> PeopleTrace:
    """A built-in trace for this team.

    Args:
        name: One of `choices.TRACES`.
        people: The size of the team.
        hours: The length of the trace.
        seed: The same seed gives the same trace.
        slowdown: By lane, how many times slower than the faster lane it is at a demand.
    """
    ends_s = hours * 3600
    by_holder: dict[str, int] = {}
    if name == "adversary":
        levels = (1, 2 * people)
        by_holder = {lane: max(levels, key=slower) for lane, slower in slowdown.items()}
    # Seeded by name and size: which other traces are simulated must not change this one.
    generator = Random(f"{seed} {name} {people}")  # noqa: S311
    steps = SHAPES[name](people, ends_s, generator)
    return PeopleTrace(name, steps, ends_s, people, by_holder)


def _quarter(people: int) -> int:
    return max(1, people // 4)


def _constant(times: float) -> Shape:
    return lambda people, ends_s, generator: [(0.0, max(1, round(people * times)))]


def _office(times: int) -> Shape:
    """A working day with two humps, minute by minute.

    A visit to the chat takes 20 minutes on average. How soon a person is back depends on the
    time of day.
    """

    def steps(people: int, ends_s: float, generator: Random) -> Steps:
        present = [False] * (people * times)
        minutes: list[tuple[float, int]] = []
        for minute in range(math.ceil(ends_s / 60)):
            share = next(share for until, share in OFFICE_SHARES if minute * 60 < until * ends_s)
            leaves = 60 / VISIT_S
            arrives = leaves * share / (1 - share)
            for person, is_present in enumerate(present):
                if generator.random() < (leaves if is_present else arrives):
                    present[person] = not is_present
            minutes.append((minute * 60.0, sum(present)))
        return minutes

    return steps


def _bursts(people: int, ends_s: float, generator: Random) -> Steps:
    """A quarter of the team; about every ten minutes a crowd for a minute or two."""
    changes = [(0.0, _quarter(people))]
    at = generator.expovariate(1 / 600)
    while at < ends_s:
        crowd = round(people * generator.uniform(1, 2))
        leaves = at + 20 + generator.expovariate(1 / 80)
        changes += [(at, crowd), (leaves, -crowd)]
        at = leaves + generator.expovariate(1 / 600)
    return _sum_up(changes)


def _square(period_s: float) -> Shape:
    """A quarter of the team, then twice the team, then a quarter again, each for so long."""

    def steps(people: int, ends_s: float, generator: Random) -> Steps:
        levels = (_quarter(people), 2 * people)
        return [(n * period_s, levels[n % 2]) for n in range(math.ceil(ends_s / period_s))]

    return steps


def _flash_crowd(people: int, ends_s: float, generator: Random) -> Steps:
    """A quarter of the team; a crowd arrives within a minute and leaves slowly, twice."""
    changes = [(0.0, _quarter(people))]
    for part, size, stays_s in ((0.3, 4, 1200.0), (0.75, 2, 300.0)):
        for _ in range(size * people):
            at = part * ends_s + generator.uniform(0, 60)
            changes += [(at, 1), (at + stays_s + generator.expovariate(1 / 300), -1)]
    return _sum_up(changes)


def _sum_up(changes: Iterable[tuple[float, int]]) -> Steps:
    ordered = sorted(changes)
    return list(
        zip((at for at, _ in ordered), accumulate(change for _, change in ordered), strict=True)
    )


SHAPES: Mapping[str, Shape] = {
    "constant-low": _constant(1 / 4),
    "constant": _constant(1),
    "constant-high": _constant(2),
    "office": _office(1),
    "office-double": _office(2),
    "bursts": _bursts,
    "flash-crowd": _flash_crowd,
    **{
        name: _square(int(name.removeprefix("square-")))
        for name in TRACES
        if name.startswith("square-")
    },
    "adversary": _constant(1),
}
