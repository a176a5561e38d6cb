"""Rows."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

import msgspec

from loadtests.analysis.spread import Spread, Summary, percentile
from loadtests.measure.experiment import Limits
from loadtests.measure.samples import Cell, Line, Request, by_cell

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
Cells: TypeAlias = Sequence[tuple[Cell, list[Request]]]
Quantity: TypeAlias = Literal["e2e", "ttft", "tpot", "tokens"]


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


def make_rows(cells: Cells, *, tokens_out: int, limits: Limits) -> list[Row]:
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


def at_once(cell: Cell, requests: Iterable[Request]) -> float:
    """Requests in flight, mean over the window."""
    inside = (
        min(cell.ended, one.start + one.e2e_s) - max(cell.began, one.start) for one in requests
    )
    return sum(max(0.0, seconds) for seconds in inside) / max(cell.ended - cell.began, 1e-9)


def ratio(above: Row, below: Row, quantity: Quantity) -> Spread | None:
    """One over the other: of the medians of all, and within each repetition of both."""
    a, b = above.value(quantity), below.value(quantity)
    if not a or not b:
        return None
    over, under = above.by_repetition(quantity), below.by_repetition(quantity)
    each = [over[number] / under[number] for number in over.keys() & under.keys()]
    return Spread(a / b, min([*each, a / b]), max([*each, a / b]))
