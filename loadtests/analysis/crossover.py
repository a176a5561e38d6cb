"""The crossover of two targets: up to how many concurrent requests which one is faster.

The confidence interval is a bootstrap in two steps, repetitions first and then requests
within each, since requests of one repetition are not independent of each other.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

from loadtests.analysis.rows import Cells

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: What a crossover needs: repetitions, requests of each target at each level around it,
#: and the share of the bootstrap draws that must agree.
MIN_REPETITIONS = 3
MIN_REQUESTS = 20
MIN_SHARE_OF_DRAWS = 0.95
BOOTSTRAP_DRAWS = 2000
SEED = 20_261_123
#: Seconds of each request, by level and repetition.
Seconds: TypeAlias = Mapping[int, Sequence[Sequence[float]]]


class Crossover(msgspec.Struct, frozen=True, omit_defaults=True):
    """The crossover of two targets `a` and `b`, by mean E2E interpolated between levels.

    Attributes:
        verdict: `crosses` once, `never` at the levels measured, or `unknown`.
        faster: The target that is faster below the crossover, or at every level.
        level: Concurrent requests at the crossover.
        low: Lower end of the 95 % confidence interval of `level`.
        high: Upper end of the same interval.
        why: The reason why it is unknown.
    """

    verdict: Literal["crosses", "never", "unknown"]
    faster: Literal["a", "b"] | None = None
    level: float | None = None
    low: float | None = None
    high: float | None = None
    why: str = ""

    def sentence(self, a: str, b: str) -> str:
        """The verdict in words, with the display names of the two."""
        first, second = (a, b) if self.faster == "a" else (b, a)
        if self.verdict == "unknown":
            return f"not enough data: {self.why}"
        if self.verdict == "never":
            return f"no crossover: {first} is faster at every level measured"
        return (
            f"{first} is faster below {self.level:.1f} concurrent requests and {second} above "
            f"that (95 % confidence interval: {self.low:.1f} to {self.high:.1f})"
        )


def seconds_by_level(cells: Cells, target: str) -> dict[int, list[list[float]]]:
    """E2E of a target's answered, measured requests, a list for each complete cell of a level."""
    by_level: dict[int, list[list[float]]] = {}
    for cell, requests in cells:
        if cell.target == target and cell.outcome == "complete":
            e2e_s = [one.e2e_s for one in requests if one.phase == "measured" and not one.error]
            if e2e_s:
                by_level.setdefault(int(cell.level), []).append(e2e_s)
    return by_level


def find_crossover(a: Seconds, b: Seconds) -> Crossover:
    """The crossover with its confidence interval, or the reason why it is not known.

    Args:
        a: Seconds of each request of one target, by level and repetition.
        b: Seconds of each request of the other target, alike.
    """
    import numpy as np  # noqa: PLC0415 - of the extra `load`

    levels = sorted(a.keys() & b.keys())
    if len(levels) < 2:
        return Crossover("unknown", why="fewer than two levels were measured for both")
    gap = np.array(
        [[_mean_of_repetitions(a[level]) - _mean_of_repetitions(b[level]) for level in levels]]
    )
    random = np.random.default_rng(SEED)
    draws = np.stack(
        [_bootstrap_means(a[n], random) - _bootstrap_means(b[n], random) for n in levels], axis=1
    )
    (place,), (changes,) = _sign_changes(gap, levels)
    places, changes_of_draws = _sign_changes(draws, levels)
    if changes > 1:
        return Crossover("unknown", why=f"the faster target changes {changes} times")
    same = (changes_of_draws == changes) & ((draws[:, 0] > 0) == (gap[0, 0] > 0))
    low, high = levels[0], levels[-1]
    if changes and same.any():
        low, high = np.percentile(places[same], (2.5, 97.5))
    if why := _missing_samples(a, b, _levels_around(levels, low, high)):
        return Crossover("unknown", why=why)
    if same.mean() < MIN_SHARE_OF_DRAWS:
        what = f"cross once, near {place:.1f}" if changes else "do not cross"
        return Crossover(
            "unknown",
            why=f"the measured means {what}, but only {same.mean():.0%} of {BOOTSTRAP_DRAWS} "
            f"bootstrap draws agree, and {MIN_SHARE_OF_DRAWS:.0%} are needed",
        )
    faster: Literal["a", "b"] = "b" if gap[0, 0] > 0 else "a"
    if not changes:
        return Crossover("never", faster)
    return Crossover("crosses", faster, float(place), float(low), float(high))


def _mean_of_repetitions(by_repetition: Sequence[Sequence[float]]) -> float:
    """Mean seconds of a request; every repetition has the same weight."""
    return statistics.fmean(statistics.fmean(one) for one in by_repetition)


def _bootstrap_means(
    by_repetition: Sequence[Sequence[float]], random: np.random.Generator
) -> NDArray[np.float64]:
    """`BOOTSTRAP_DRAWS` means: repetitions drawn with replacement, and requests within each."""
    import numpy as np  # noqa: PLC0415

    picks = random.integers(len(by_repetition), size=(BOOTSTRAP_DRAWS, len(by_repetition)))
    means = np.empty(picks.shape)
    for number, values in enumerate(by_repetition):
        picked = picks == number
        resample = random.integers(len(values), size=(int(picked.sum()), len(values)))
        means[picked] = np.asarray(values)[resample].mean(axis=1)
    of_draws: NDArray[np.float64] = means.mean(axis=1)
    return of_draws


def _sign_changes(
    gaps: NDArray[np.float64], levels: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The level at which each row of differences first changes sign, and how often it does."""
    import numpy as np  # noqa: PLC0415

    changes = np.diff(gaps > 0, axis=1)
    at = changes.argmax(axis=1)
    row = np.arange(len(gaps))
    left, right = gaps[row, at], gaps[row, at + 1]
    ends = np.asarray(levels, dtype=float)
    share = left / np.where(changes.any(axis=1), left - right, 1.0)
    return ends[at] + (ends[at + 1] - ends[at]) * share, changes.sum(axis=1)


def _levels_around(levels: Sequence[int], low: float, high: float) -> list[int]:
    """The levels that enclose `low` to `high`, and those in between."""
    first = max((n for n in levels if n <= low), default=levels[0])
    last = min((n for n in levels if n >= high), default=levels[-1])
    return [n for n in levels if first <= n <= last]


def _missing_samples(a: Seconds, b: Seconds, levels: Iterable[int]) -> str:
    """The samples that are missing at these levels, in words; empty if none are."""
    for level in levels:
        repetitions = min(len(a[level]), len(b[level]))
        requests = min(sum(map(len, one[level])) for one in (a, b))
        for count, needed, what in (
            (repetitions, MIN_REPETITIONS, "repetitions"),
            (requests, MIN_REQUESTS, "requests of each"),
        ):
            if count < needed:
                return f"at concurrency {level} there are {count} {what}, {needed} are needed"
    return ""
