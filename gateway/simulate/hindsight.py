"""The best schedule of hand-overs for a day that is known in advance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from gateway.simulate.profiles import seconds_on
from gateway.simulate.simulator import Machine, SimulationResult
from gateway.simulate.traces import Trace

#: What a hand-over costs without any demand, request-seconds: else the plan would make them
#: without a gain.
IDLE_MOVE_COST = 0.01


@dataclass(frozen=True, slots=True)
class _Path:
    """The cheapest way to hold the GPU with `lane` at the end of a slice.

    Attributes:
        cost: Request-seconds since the beginning.
        lane: The lane that holds the GPU.
        since: When the hand-over to `lane` began.
        previous: The path before that hand-over.
    """

    cost: float
    lane: str
    since: float
    previous: _Path | None


def best_schedule(
    machine: Machine,
    trace: Trace,
    fixed: Mapping[str, SimulationResult],
    think_s: float,
    slice_s: float,
    caution: float = 1.0,
) -> list[tuple[float, str]]:
    """The schedule with the least request-seconds, found by dynamic programming over slices.

    A slice costs what its mean load on that lane costs. A hand-over costs the waiting during it
    and until the backlog is worked off, multiplied by `caution`. In a closed loop the least
    request-seconds are also the least mean seconds per request.

    Args:
        machine: What is simulated.
        trace: The demand, known in advance.
        fixed: By lane, the result of that lane holding the GPU all day.
        think_s: Mean seconds between an answer and the next question.
        slice_s: Length of a slice, seconds.
        caution: Factor on the cost of a hand-over.

    Returns:
        Seconds from the beginning, and the lane from then on; the first entry is the start.
    """
    load: dict[str, list[float]] = {}
    for lane, result in fixed.items():
        seconds = partial(seconds_on, machine.profile, lane)
        load[lane] = trace.mean_load(seconds, think_s, slice_s, result)
    slices = min(map(len, load.values()))
    best: list[dict[str, _Path]] = [{} for _ in range(slices + 1)]
    best[0] = {lane: _Path(0.0, lane, 0.0, None) for lane in load}

    def offer(number: int, path: _Path) -> None:
        known = best[min(number, slices)].get(path.lane)
        if known is None or path.cost < known.cost:
            best[min(number, slices)][path.lane] = path

    for number in range(slices):
        start_s = number * slice_s
        for lane, path in list(best[number].items()):
            present = load[lane][number]
            stay = path.cost + present * slice_s
            offer(number + 1, _Path(stay, lane, path.since, path.previous))
            pause = _pause(machine, trace, lane, start_s, present, think_s, slice_s)
            for other in load:
                if other == lane:
                    continue
                usual = load[other][min(number + pause.slices, slices - 1)]
                seconds_each = _seconds(machine, other, pause.backlog)
                catching_up = max(0.0, pause.backlog - usual) * seconds_each / 2
                # The hand-over ends within a slice; the rest of that slice has the usual load.
                rest = max(0.0, pause.slices * slice_s - pause.takes_s) * usual
                cost = caution * (pause.waiting + catching_up) + rest + IDLE_MOVE_COST
                offer(number + pause.slices, _Path(path.cost + cost, other, start_s, path))
    return _moves(min(best[slices].values(), key=lambda path: path.cost))


@dataclass(frozen=True, slots=True)
class _Pause:
    """What a hand-over away from a lane does to the requests.

    Attributes:
        takes_s: Seconds from the decision until the other lane answers.
        slices: The number of slices that it touches.
        waiting: Request-seconds of waiting during it.
        backlog: Requests that wait at its end.
    """

    takes_s: float
    slices: int
    waiting: float
    backlog: float


def _pause(
    machine: Machine,
    trace: Trace,
    lane: str,
    start_s: float,
    present: float,
    think_s: float,
    slice_s: float,
) -> _Pause:
    takes_s = _drain_s(machine, lane, present) + machine.hand_over_s
    pieces = max(1, math.ceil(takes_s / slice_s))
    piece_s = takes_s / pieces
    waiting = piece_s * math.fsum(
        trace.backlog(start_s, start_s + (piece + 0.5) * piece_s, present, think_s)
        for piece in range(pieces)
    )
    backlog = trace.backlog(start_s, start_s + takes_s, present, think_s)
    return _Pause(takes_s, pieces, waiting, backlog)


def _moves(path: _Path) -> list[tuple[float, str]]:
    moves: list[tuple[float, str]] = []
    last: _Path | None = path
    while last is not None:
        moves.append((last.since, last.lane))
        last = last.previous
    return moves[::-1]


def _seconds(machine: Machine, lane: str, present: float) -> float:
    return seconds_on(machine.profile, lane, max(1.0, present))


def _drain_s(machine: Machine, lane: str, present: float) -> float:
    """Seconds until the running requests have ended, one after the other."""
    running = min(round(present), machine.slots[lane])
    return math.fsum(_seconds(machine, lane, left) / left for left in range(1, running + 1))
