"""From requests to figures: all that a report says in numbers is computed here, and nothing read.

A cell is a target at a level, once; a row is a target at a level, over all its repetitions.
Only measured requests that were answered make a latency; those that were not are counted
beside it. What is said of a second (tokens, requests, requests in flight) is said of the
window of a cell, from when its first measured request was sent to when its last one was
over, and there every request counts, whatever its phase, for it was load like any other.

Percentiles are linear between the two nearest values: of n sorted ones, p lies at place
p * (n - 1), counted from 0 (definition 7 of Hyndman and Fan, numpy's own).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

from loadtests.measure.samples import Cell, Line, Power, Request, by_cell
from loadtests.report.experiment import Cost as Prices
from loadtests.report.experiment import Limits

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: With fewer requests of each user than this, a median says little.
ENOUGH_ROUNDS = 10
#: Share of the requests that must keep the limits for a level to keep them.
KEEPING = 0.95
#: What the generator may use of a core in its busiest process: above that it queues itself.
CPU_MOST = 0.85
#: How late the generator may be, as a share of the median TTFT: in the median, where it
#: shows in every figure, and in the 99th percentile, where it shows in the tails alone.
LATE_P50 = 0.02
LATE_P99 = 0.25

#: Between two looks at the cards more than this, and nobody knows what they drew, seconds.
LONGEST_GAP_S = 5.0

#: What a crossover needs: repetitions, requests of each target at each level it hangs on,
#: and the share of the draws that must say the same.
REPETITIONS = 3
REQUESTS = 20
AGREEING = 0.95
DRAWS = 2000
SEED = 20_261_123

Cells: TypeAlias = Sequence[tuple[Cell, list[Request]]]
#: Seconds of each request, by level and repetition.
Seconds: TypeAlias = Mapping[int, Sequence[Sequence[float]]]
Quantity: TypeAlias = Literal["e2e", "ttft", "tpot", "tokens"]


def percentile(values: Sequence[float], p: float) -> float:
    """The value below which a share `p` of them lies; `values` need no order."""
    ordered = sorted(values)
    place = p * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class Spread(msgspec.Struct, frozen=True):
    """A value, and the lowest and highest of the repetitions it is the median of."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one repetition."""
        return cls(statistics.median(values), min(values), max(values))


class Summary(msgspec.Struct, frozen=True):
    """What the requests of all repetitions took, seconds.

    Attributes:
        low: Median of the repetition whose median is lowest.
        high: The same, highest.
    """

    count: int
    mean: float
    median: float
    p90: float
    p95: float
    p99: float
    low: float
    high: float

    @classmethod
    def of(cls, by_repetition: Iterable[Sequence[float]]) -> Summary | None:
        """None where there is no value at all."""
        there = [values for values in by_repetition if values]
        if not there:
            return None
        every = [value for values in there for value in values]
        medians = [statistics.median(values) for values in there]
        p90, p95, p99 = (percentile(every, p) for p in (0.9, 0.95, 0.99))
        mean, median = statistics.fmean(every), statistics.median(every)
        return cls(len(every), mean, median, p90, p95, p99, min(medians), max(medians))

    def overlaps(self, other: Summary) -> bool:
        """Whether there are repetitions of both that cannot be told apart."""
        return self.low <= other.high and other.low <= self.high


class Repetition(msgspec.Struct, frozen=True, omit_defaults=True):
    """A cell: medians in seconds of what was answered, and what is said of a second.

    Attributes:
        rounds: Requests that a user had answered, mean.
        at_once: Requests in flight, mean over the window.
        good_per_s: Requests a second that kept the limits.
        outcome: `complete`, or why it is not.
    """

    number: int
    began: float
    window_s: float
    rounds: float
    tokens_per_s: float
    requests_per_s: float
    good_per_s: float
    at_once: float
    cpu: float
    lag_p50_s: float
    lag_p99_s: float
    e2e_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    outcome: str = "complete"


class Row(msgspec.Struct, frozen=True, omit_defaults=True):
    """A target at a level.

    Attributes:
        asked: Measured requests, however they ended.
        errors: How many went wrong, by what was said of it.
        cut: How many we hung up on, because the time of the cell was over.
        early: Answers that ended before they had the tokens asked for.
        uncounted: Answers without `usage`: their tokens are chunks.
        good: Answers that kept the limits.
        gap_p50_s: Between two chunks.
        tokens_in: Of a prompt, median, by the server's count.
        tokens_out: Of an answer, median, by the server's count.
    """

    target: str
    level: int
    repetitions: tuple[Repetition, ...]
    asked: int
    tokens_per_s: Spread
    requests_per_s: Spread
    good_per_s: Spread
    at_once: Spread
    e2e: Summary | None = None
    ttft: Summary | None = None
    tpot: Summary | None = None
    gap_p50_s: float | None = None
    gap_p99_s: float | None = None
    tokens_in: float | None = None
    tokens_out: float | None = None
    errors: dict[str, int] = {}
    cut: int = 0
    early: int = 0
    uncounted: int = 0
    good: int = 0

    @property
    def failed(self) -> int:
        return sum(self.errors.values())

    @property
    def answered(self) -> int:
        return self.asked - self.failed - self.cut

    @property
    def early_share(self) -> float:
        return self.early / self.answered if self.answered else 0.0

    @property
    def keeps(self) -> bool:
        """Whether enough of its requests keep the limits; one that failed keeps none."""
        return self.asked > 0 and self.good >= KEEPING * self.asked

    @property
    def is_thin(self) -> bool:
        """Whether a user had too few answers in a repetition for a median."""
        return any(one.rounds < ENOUGH_ROUNDS for one in self.repetitions)

    @property
    def unfinished(self) -> list[str]:
        """Why repetitions of it are not complete."""
        return [
            f"repetition {one.number}: {one.outcome}"
            for one in self.repetitions
            if one.outcome != "complete"
        ]

    def by_repetition(self, quantity: Quantity) -> dict[int, float]:
        """Median of a quantity, or tokens a second, where there is any."""
        found = {
            one.number: {
                "e2e": one.e2e_s,
                "ttft": one.ttft_s,
                "tpot": one.tpot_s,
                "tokens": one.tokens_per_s or None,
            }[quantity]
            for one in self.repetitions
        }
        return {number: value for number, value in found.items() if value is not None}

    def value(self, quantity: Quantity) -> float | None:
        """Median of a quantity over all requests, or tokens a second."""
        if quantity == "tokens":
            return self.tokens_per_s.value or None
        summary: Summary | None = getattr(self, quantity)
        return None if summary is None else summary.median

    def saturation(self) -> str:
        """How the load generator was too busy to be believed; empty if it was not."""
        if self.ttft is None:
            return ""
        ttft = self.ttft.median
        for one in self.repetitions:
            late = one.lag_p50_s > LATE_P50 * ttft or one.lag_p99_s > LATE_P99 * ttft
            if late or one.cpu > CPU_MOST:
                return (
                    f"the load generator was saturated at {self.level} at once on {self.target}, "
                    f"repetition {one.number}: {one.cpu:.2f} of a core in its busiest process, "
                    f"late by {1000 * one.lag_p50_s:.1f} ms in the median and "
                    f"{1000 * one.lag_p99_s:.1f} ms in the 99th percentile, where the median "
                    f"TTFT was {1000 * ttft:.0f} ms"
                )
        return ""


def closed_cells(lines: Iterable[Line]) -> Cells:
    """The cells of the closed loop, each once: the last that is complete, or else the last.

    What other loops left in the file is no figure at so many at once.
    """
    best: dict[tuple[str, float, int], tuple[Cell, list[Request]]] = {}
    for cell, requests in by_cell(lines):
        key = cell.target, cell.level, cell.repetition
        worse = key in best and best[key][0].outcome == "complete" != cell.outcome
        if cell.loop == "closed" and not worse:
            best[key] = cell, requests
    return list(best.values())


def rows(cells: Cells, *, tokens_out: int, limits: Limits) -> list[Row]:
    """Every target at every level, targets in the order in which they came.

    Args:
        cells: As `closed_cells` has them.
        tokens_out: What was asked for; fewer is early.
        limits: What a good request keeps.
    """
    order = list(dict.fromkeys(cell.target for cell, _ in cells))
    by_row: dict[tuple[str, float], list[tuple[Cell, list[Request]]]] = {}
    for cell, requests in sorted(cells, key=lambda one: one[0].repetition):
        by_row.setdefault((cell.target, cell.level), []).append((cell, requests))
    keys = sorted(by_row, key=lambda key: (order.index(key[0]), key[1]))
    return [_row(by_row[key], tokens_out, limits) for key in keys]


def _row(cells: Cells, tokens_out: int, limits: Limits) -> Row:
    measured = [[one for one in its if one.phase == "measured"] for _, its in cells]
    answered = [[one for one in its if not one.error] for its in measured]
    every = [one for its in measured for one in its]
    good = [one for its in answered for one in its]
    gaps = [gap for one in good for gap in one.gaps_s]
    repetitions = tuple(_repetition(cell, its, limits) for cell, its in cells)
    return Row(
        target=cells[0][0].target,
        level=int(cells[0][0].level),
        repetitions=repetitions,
        asked=len(every),
        tokens_per_s=Spread.of([one.tokens_per_s for one in repetitions]),
        requests_per_s=Spread.of([one.requests_per_s for one in repetitions]),
        good_per_s=Spread.of([one.good_per_s for one in repetitions]),
        at_once=Spread.of([one.at_once for one in repetitions]),
        e2e=Summary.of([one.e2e_s for one in its] for its in answered),
        ttft=Summary.of(_there(one.ttft_s for one in its) for its in answered),
        tpot=Summary.of(_there(tpot_s(one) for one in its) for its in answered),
        gap_p50_s=percentile(gaps, 0.5) if gaps else None,
        gap_p99_s=percentile(gaps, 0.99) if gaps else None,
        tokens_in=_median(one.tokens_in for one in good),
        tokens_out=_median(one.tokens_out for one in good),
        errors=dict(Counter(one.error for one in every if one.error and one.error != "cut")),
        cut=sum(one.error == "cut" for one in every),
        early=sum(is_early(one, tokens_out) for one in good),
        uncounted=sum(not one.tokens_out for one in good),
        good=sum(keeps(one, limits) for one in good),
    )


def _repetition(cell: Cell, requests: Sequence[Request], limits: Limits) -> Repetition:
    window_s = max(cell.ended - cell.began, 1e-9)
    answered = [one for one in requests if one.phase == "measured" and not one.error]
    users = {one.user for one in requests if one.phase == "measured"}
    ended = [
        one
        for one in requests
        if not one.error and cell.began <= one.start + one.e2e_s <= cell.ended + 1e-3
    ]
    return Repetition(
        number=cell.repetition,
        began=cell.began,
        window_s=window_s,
        rounds=len(answered) / max(1, len(users)),
        tokens_per_s=tokens_per_s(cell, requests),
        requests_per_s=len(ended) / window_s,
        good_per_s=sum(keeps(one, limits) for one in ended) / window_s,
        at_once=at_once(cell, requests),
        cpu=cell.cpu,
        lag_p50_s=cell.lag_p50_s,
        lag_p99_s=cell.lag_p99_s,
        e2e_s=_median(one.e2e_s for one in answered),
        ttft_s=_median(one.ttft_s for one in answered),
        tpot_s=_median(tpot_s(one) for one in answered),
        outcome=cell.outcome,
    )


def _there(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _median(values: Iterable[float | None]) -> float | None:
    there = _there(values)
    return statistics.median(there) if there else None


def tpot_s(one: Request) -> float | None:
    """What a token took after the first; where the server counted none, what a chunk took."""
    if one.tokens_out is None and one.gaps_s:
        return statistics.fmean(one.gaps_s)
    return one.tpot_s


def is_early(one: Request, tokens_out: int) -> bool:
    """Whether an answer ended before it had the tokens asked for."""
    if one.tokens_out is None:
        return one.finish == "stop"
    return one.tokens_out < tokens_out


def keeps(one: Request, limits: Limits) -> bool:
    """Whether an answer kept what is stated; one of a single token has no TPOT to miss."""
    if limits.ttft_s is not None and (one.ttft_s is None or one.ttft_s > limits.ttft_s):
        return False
    if limits.tpot_s is not None and (tpot_s(one) or 0.0) > limits.tpot_s:
        return False
    return limits.e2e_s is None or one.e2e_s <= limits.e2e_s


def tokens_per_s(cell: Cell, requests: Iterable[Request]) -> float:
    """Tokens that came while the cell was measured, a second of it, whoever they were for.

    A token counts when its chunk came, and a chunk of a request is worth its tokens over
    its chunks; where the server told no tokens, the cell's median worth, or else one.
    """
    streamed = [one for one in requests if one.ttft_s is not None]
    told = [one.tokens_out / (len(one.gaps_s) + 1) for one in streamed if one.tokens_out]
    usual = statistics.median(told) if told else 1.0
    tokens = 0.0
    for one in streamed:
        first = one.start + (one.ttft_s or 0.0)
        came = itertools.accumulate(one.gaps_s, initial=first)
        inside = sum(cell.began <= at <= cell.ended for at in came)
        worth = one.tokens_out / (len(one.gaps_s) + 1) if one.tokens_out else usual
        tokens += inside * worth
    return tokens / max(cell.ended - cell.began, 1e-9)


class Energy(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a target drew at a level, and what tokens cost of it; None: not known.

    Attributes:
        watts: As given, or of the cards, mean over the window.
        electricity: For a million output tokens.
        rent: For the hours that a million output tokens take.
    """

    target: str
    level: int
    watts: Spread | None = None
    tokens_per_joule: Spread | None = None
    electricity: Spread | None = None
    rent: Spread | None = None


def energy(table: Iterable[Row], powers: Sequence[Power], prices: Prices) -> list[Energy]:
    """What is known of that, of every target at every level; nothing of whom nothing is."""
    found = [_energy(row, powers, prices) for row in table]
    return [one for one in found if one.watts or one.rent]


def _energy(row: Row, powers: Sequence[Power], prices: Prices) -> Energy:
    every = [(prices.watts or mean_watts(one, powers), one) for one in row.repetitions]
    known = [(watts, one.tokens_per_s) for watts, one in every if watts]
    efficiency = [tokens / watts for watts, tokens in known if tokens]
    paces = [one.tokens_per_s for one in row.repetitions if one.tokens_per_s]
    kwh, hour = prices.per_kwh, prices.rent_per_hour
    return Energy(
        row.target,
        row.level,
        _spread(watts for watts, _ in known),
        _spread(efficiency),
        None if kwh is None else _spread(1e6 / one / 3.6e6 * kwh for one in efficiency),
        None if hour is None else _spread(1e6 / pace / 3600 * hour for pace in paces),
    )


def mean_watts(one: Repetition, powers: Iterable[Power]) -> float | None:
    """What the cards drew in the window of a repetition; None where they were not looked at."""
    ended = one.began + one.window_s
    inside = [power for power in powers if one.began <= power.at <= ended]
    looks = [one.began, *(power.at for power in inside), ended]
    if not inside or max(b - a for a, b in itertools.pairwise(looks)) > LONGEST_GAP_S:
        return None
    return statistics.fmean(power.watts for power in inside)


def _spread(values: Iterable[float]) -> Spread | None:
    there = [*values]
    return Spread.of(there) if there else None


def at_once(cell: Cell, requests: Iterable[Request]) -> float:
    """Requests in flight, mean over the window."""
    inside = (
        min(cell.ended, one.start + one.e2e_s) - max(cell.began, one.start) for one in requests
    )
    return sum(max(0.0, seconds) for seconds in inside) / max(cell.ended - cell.began, 1e-9)


# --- two targets, side by side ------------------------------------------------------------


def ratio(above: Row, below: Row, quantity: Quantity) -> Spread | None:
    """One over the other: of the medians of all, and within each repetition of both."""
    a, b = above.value(quantity), below.value(quantity)
    if not a or not b:
        return None
    over, under = above.by_repetition(quantity), below.by_repetition(quantity)
    each = [over[number] / under[number] for number in over.keys() & under.keys()]
    return Spread(a / b, min([*each, a / b]), max([*each, a / b]))


class Kept(msgspec.Struct, frozen=True):
    """How far a target keeps the limits, by levels that were measured and nothing between them.

    Attributes:
        level: The highest up to which every level keeps them; None: not even the lowest.
        fails: The lowest that does not; None: all measured keep them.
    """

    target: str
    level: int | None
    fails: int | None

    @property
    def between(self) -> int | None:
        """The level to measure next to know it closer; None: it is known closely enough."""
        low = self.level or 0
        if self.fails is None or self.fails - low <= max(1, low // 8):
            return None
        return (low + self.fails) // 2


def kept(table: Iterable[Row]) -> list[Kept]:
    """Of every target; its levels in order."""
    found = []
    for target, its in itertools.groupby(table, key=lambda row: row.target):
        levels = list(its)
        keeping = list(itertools.takewhile(lambda row: row.keeps, levels))
        others = levels[len(keeping) :]
        level = keeping[-1].level if keeping else None
        found.append(Kept(target, level, others[0].level if others else None))
    return found


class Cost(msgspec.Struct, frozen=True):
    """What a gateway costs at a level, against the better of the lanes it stands before.

    Attributes:
        lane: The one whose median E2E is lower.
        e2e_s: Median, through the gateway and on the lane; `ttft_s` alike.
        is_noise: There are repetitions of both whose E2E cannot be told apart.
    """

    gateway: str
    level: int
    lane: str
    e2e_s: tuple[float, float]
    ttft_s: tuple[float, float]
    is_noise: bool


def costs(table: Iterable[Row], gateway: str, before: Sequence[str]) -> list[Cost]:
    """At every level at which the gateway and one of its lanes were measured."""
    found = []
    by_key = {(row.target, row.level): row for row in table}
    for (target, level), row in by_key.items():
        lanes = [by_key[label, level] for label in before if (label, level) in by_key]
        there = [(lane.e2e.median, lane) for lane in lanes if lane.e2e and lane.ttft]
        if target != gateway or row.e2e is None or row.ttft is None or not there:
            continue
        best = min(there, key=lambda one: one[0])[1]
        assert best.e2e is not None  # noqa: S101 - for the type checker
        assert best.ttft is not None  # noqa: S101
        found.append(
            Cost(
                gateway,
                level,
                best.target,
                (row.e2e.median, best.e2e.median),
                (row.ttft.median, best.ttft.median),
                row.e2e.overlaps(best.e2e),
            )
        )
    return found


# --- where the faster one changes ---------------------------------------------------------


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


def seconds(cells: Cells, target: str) -> dict[int, list[list[float]]]:
    """E2E of a target's measured requests that were answered, complete cells only."""
    found: dict[int, list[list[float]]] = {}
    for cell, requests in cells:
        if cell.target == target and cell.outcome == "complete":
            good = [one.e2e_s for one in requests if one.phase == "measured" and not one.error]
            if good:
                found.setdefault(int(cell.level), []).append(good)
    return found


def crossover(a: Seconds, b: Seconds) -> Crossover:
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
