"""The crossover of two targets, with its confidence."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

from loadtests.analysis.rows import Cells

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: What a crossover needs: repetitions, requests of each target at each level it hangs on,
#: and the share of the draws that must say the same.
REPETITIONS = 3
REQUESTS = 20
AGREEING = 0.95
DRAWS = 2000
SEED = 20_261_123
#: Seconds of each request, by level and repetition.
Seconds: TypeAlias = Mapping[int, Sequence[Sequence[float]]]


class Crossover(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where the faster one of two, `a` and `b`, changes; mean E2E, straight lines between levels.

    Attributes:
        verdict: `crosses` once, `never` at the levels measured, or `unknown`.
        faster: Below the crossover, or everywhere.
        level: Requests at once.
        low: Of the 95 % confidence interval of `level`.
        high: The same.
        why: It is not known.
    """

    verdict: Literal["crosses", "never", "unknown"]
    faster: Literal["a", "b"] | None = None
    level: float | None = None
    low: float | None = None
    high: float | None = None
    why: str = ""

    def told(self, a: str, b: str) -> str:
        """In words, with the names of the two."""
        first, second = (a, b) if self.faster == "a" else (b, a)
        if self.verdict == "unknown":
            return f"not enough data: {self.why}"
        if self.verdict == "never":
            return f"no crossover: {first} is faster at every level measured"
        return (
            f"{first} is faster below {self.level:.1f} at once and {second} above it "
            f"(95 % confidence interval: {self.low:.1f} to {self.high:.1f})"
        )


def seconds_by_level(cells: Cells, target: str) -> dict[int, list[list[float]]]:
    """E2E of a target's measured requests that were answered, complete cells only."""
    found: dict[int, list[list[float]]] = {}
    for cell, requests in cells:
        if cell.target == target and cell.outcome == "complete":
            good = [one.e2e_s for one in requests if one.phase == "measured" and not one.error]
            if good:
                found.setdefault(int(cell.level), []).append(good)
    return found


def find_crossover(a: Seconds, b: Seconds) -> Crossover:
    """Where the faster one of two changes, with its confidence, or why it is not known.

    Drawn again and again from what was measured: repetitions first, then requests within
    each, since requests of one repetition are no independent witnesses.

    Args:
        a: Seconds of each request, by level and repetition.
        b: The same of the other.
    """
    import numpy as np  # noqa: PLC0415 - of the extra `load`

    levels = sorted(a.keys() & b.keys())
    if len(levels) < 2:
        return Crossover("unknown", why="both were measured at fewer than two levels")
    gap = np.array([[_mean(a[level]) - _mean(b[level]) for level in levels]])
    dice = np.random.default_rng(SEED)
    draws = np.stack([_drawn(a[level], dice) - _drawn(b[level], dice) for level in levels], axis=1)
    (place,), (changes,) = _crossings(gap, levels)
    places, drawn_changes = _crossings(draws, levels)
    if changes > 1:
        return Crossover("unknown", why=f"the faster one changes {changes} times")
    same = (drawn_changes == changes) & ((draws[:, 0] > 0) == (gap[0, 0] > 0))
    low, high = levels[0], levels[-1]
    if changes and same.any():
        low, high = np.percentile(places[same], (2.5, 97.5))
    if why := _too_few(a, b, _around(levels, low, high)):
        return Crossover("unknown", why=why)
    if same.mean() < AGREEING:
        what = f"crosses once, near {place:.1f}" if changes else "does not cross"
        return Crossover(
            "unknown",
            why=f"what was measured {what}, but so do only {same.mean():.0%} of {DRAWS} draws from "
            f"it, and {AGREEING:.0%} are needed",
        )
    faster: Literal["a", "b"] = "b" if gap[0, 0] > 0 else "a"
    if not changes:
        return Crossover("never", faster)
    return Crossover("crosses", faster, float(place), float(low), float(high))


def _mean(by_repetition: Sequence[Sequence[float]]) -> float:
    """Every repetition counts the same."""
    return statistics.fmean(statistics.fmean(one) for one in by_repetition)


def _drawn(
    by_repetition: Sequence[Sequence[float]], dice: np.random.Generator
) -> NDArray[np.float64]:
    """The mean, so many times: repetitions drawn from them, and requests from each."""
    import numpy as np  # noqa: PLC0415

    picks = dice.integers(len(by_repetition), size=(DRAWS, len(by_repetition)))
    means = np.empty(picks.shape)
    for number, values in enumerate(by_repetition):
        here = picks == number
        again = dice.integers(len(values), size=(int(here.sum()), len(values)))
        means[here] = np.asarray(values)[again].mean(axis=1)
    drawn: NDArray[np.float64] = means.mean(axis=1)
    return drawn


def _crossings(
    gaps: NDArray[np.float64], levels: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Of each row of differences: where its sign changes first, and how often it does."""
    import numpy as np  # noqa: PLC0415

    changes = np.diff(gaps > 0, axis=1)
    at = changes.argmax(axis=1)
    row = np.arange(len(gaps))
    left, right = gaps[row, at], gaps[row, at + 1]
    ends = np.asarray(levels, dtype=float)
    share = left / np.where(changes.any(axis=1), left - right, 1.0)
    return ends[at] + (ends[at + 1] - ends[at]) * share, changes.sum(axis=1)


def _around(levels: Sequence[int], low: float, high: float) -> list[int]:
    """The levels between which it lies, and all between those."""
    first = max((n for n in levels if n <= low), default=levels[0])
    last = min((n for n in levels if n >= high), default=levels[-1])
    return [n for n in levels if first <= n <= last]


def _too_few(a: Seconds, b: Seconds, levels: Iterable[int]) -> str:
    """What is missing at these levels; empty if nothing is."""
    for level in levels:
        repetitions = min(len(a[level]), len(b[level]))
        requests = min(sum(map(len, one[level])) for one in (a, b))
        for there, needed, what in (
            (repetitions, REPETITIONS, "repetitions"),
            (requests, REQUESTS, "requests of each"),
        ):
            if there < needed:
                return f"at {level} at once there are {there} {what}, {needed} are needed"
    return ""
