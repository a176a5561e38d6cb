"""What somebody would have done who knew who would come when."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from gateway.simulate.machine import Machine, Outcome
from gateway.simulate.traces import Trace

#: What a move costs while nobody is there, request-seconds: else it would be made for nothing.
FOR_NOTHING = 0.01


@dataclass(frozen=True, slots=True)
class _Way:
    """The least that was spent up to here, and by which way."""

    spent: float
    lane: str
    moved_at: float
    before: _Way | None


def plan(
    machine: Machine,
    trace: Trace,
    fixed: Mapping[str, Outcome],
    think_s: float,
    slice_s: float,
    caution: float = 1.0,
) -> list[tuple[float, str]]:
    """The best lanes by time for who knows who comes when.

    Found by dynamic programming over slices of time. What a slice costs on a lane is what
    so many people make of it; what a hand-over costs is what waits through it and until that
    has been worked off, as many times as `caution` says. In a closed loop the least
    request-seconds are the least mean seconds as well.

    Returns:
        From when on which lane, the first from the beginning.
    """
    load: dict[str, list[float]] = {}
    for lane, outcome in fixed.items():
        seconds = partial(_seconds, machine, lane)
        load[lane] = trace.load(seconds, think_s, slice_s, outcome)
    slices = min(map(len, load.values()))
    best: list[dict[str, _Way]] = [{} for _ in range(slices + 1)]
    best[0] = {lane: _Way(0.0, lane, 0.0, None) for lane in load}

    def offer(at: int, way: _Way) -> None:
        known = best[min(at, slices)].get(way.lane)
        if known is None or way.spent < known.spent:
            best[min(at, slices)][way.lane] = way

    for at in range(slices):
        began_s = at * slice_s
        for lane, way in list(best[at].items()):
            there = load[lane][at]
            offer(at + 1, _Way(way.spent + there * slice_s, lane, way.moved_at, way.before))
            takes_s = _drain_s(machine, lane, there) + machine.hand_over_s
            pieces = max(1, math.ceil(takes_s / slice_s))
            piece_s = takes_s / pieces
            waits = piece_s * math.fsum(
                trace.waiting(began_s, began_s + (number + 0.5) * piece_s, there, think_s)
                for number in range(pieces)
            )
            left = trace.waiting(began_s, began_s + takes_s, there, think_s)
            for other in load:
                if other == lane:
                    continue
                usual = load[other][min(at + pieces, slices - 1)]
                after = max(0.0, left - usual) * _seconds(machine, other, left) / 2
                # The hand-over ends within a slice; the rest of that is as usual.
                rest = max(0.0, pieces * slice_s - takes_s) * usual
                cost = caution * (waits + after) + rest + FOR_NOTHING
                offer(at + pieces, _Way(way.spent + cost, other, began_s, way))
    last: _Way | None = min(best[slices].values(), key=lambda way: way.spent)
    found: list[tuple[float, str]] = []
    while last is not None:
        found.append((last.moved_at, last.lane))
        last = last.before
    return found[::-1]


def _seconds(machine: Machine, lane: str, there: float) -> float:
    return machine.profile.seconds(lane, max(1.0, there)) or math.inf


def _drain_s(machine: Machine, lane: str, there: float) -> float:
    """Seconds until what runs has ended, one after the other."""
    running = min(round(there), machine.slots[lane])
    return math.fsum(_seconds(machine, lane, left) / left for left in range(1, running + 1))
