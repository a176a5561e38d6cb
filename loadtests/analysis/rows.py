"""From requests to rows: the figures of a target at a level, over all repetitions.

A cell is a target at a level in one repetition; a row has all repetitions of it. A latency is
made of answered requests of the phase `measured`; failed ones are counted beside it. A rate
(tokens, requests or requests in flight) refers to the window of a cell: from the start of
its first measured request to the end of its last one. There requests of all phases count,
since all of them were load.
"""

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

#: With fewer answers per user than this a median is ill-defined.
MIN_ROUNDS = 10
#: Share of the measured requests that must meet the SLO for a level to meet it.
SLO_SHARE = 0.95
#: CPU share of one core that a process of the load generator may use: above it, it queues itself.
MAX_CPU = 0.85
#: Scheduling lag that the generator may have, as a share of the median TTFT: at the median,
#: where it shows in every figure, and at the 99th percentile, where only tails show it.
MAX_LAG_P50 = 0.02
MAX_LAG_P99 = 0.25
Cells: TypeAlias = Sequence[tuple[Cell, list[Request]]]
Quantity: TypeAlias = Literal["e2e", "ttft", "tpot", "tokens"]


class Repetition(msgspec.Struct, frozen=True, omit_defaults=True):
    """The figures of one cell: medians in seconds, and rates over its window.

    Attributes:
        rounds: Answered measured requests per user, mean.
        concurrency: Requests in flight, mean over the window.
        good_per_s: Goodput: requests per second that meet the SLO.
        outcome: `complete`, or the reason why it is not.
    """

    number: int
    began: float
    window_s: float
    rounds: float
    tokens_per_s: float
    requests_per_s: float
    good_per_s: float
    concurrency: float = msgspec.field(name="at_once")
    cpu: float
    lag_p50_s: float
    lag_p99_s: float
    e2e_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    outcome: str = "complete"


class Row(msgspec.Struct, frozen=True, omit_defaults=True):
    """The figures of a target at a level.

    Attributes:
        asked: Measured requests, however they ended.
        concurrency: Requests in flight, mean over the window.
        errors: Failed requests, by error message.
        cut: Requests that the generator cancelled because the cell's time was up.
        ended_early: Answers that ended before the requested number of tokens.
        uncounted: Answers without `usage`: their chunks are counted as tokens.
        good: Answers that meet the SLO.
        gap_p50_s: Median time between two chunks.
        tokens_in: Tokens of a prompt by the server's count, median.
        tokens_out: Tokens of an answer by the server's count, median.
    """

    target: str
    level: int
    repetitions: tuple[Repetition, ...]
    asked: int
    tokens_per_s: Spread
    requests_per_s: Spread
    good_per_s: Spread
    concurrency: Spread = msgspec.field(name="at_once")
    e2e: Summary | None = None
    ttft: Summary | None = None
    tpot: Summary | None = None
    gap_p50_s: float | None = None
    gap_p99_s: float | None = None
    tokens_in: float | None = None
    tokens_out: float | None = None
    errors: dict[str, int] = {}
    cut: int = 0
    ended_early: int = msgspec.field(default=0, name="early")
    uncounted: int = 0
    good: int = 0

    @property
    def failed(self) -> int:
        return sum(self.errors.values())

    @property
    def answered(self) -> int:
        return self.asked - self.failed - self.cut

    @property
    def ended_early_share(self) -> float:
        return self.ended_early / self.answered if self.answered else 0.0

    @property
    def meets_slo(self) -> bool:
        """Whether enough of its requests meet the SLO; a failed one does not."""
        return self.asked > 0 and self.good >= SLO_SHARE * self.asked

    @property
    def has_few_samples(self) -> bool:
        """Whether a repetition has fewer than `MIN_ROUNDS` answers per user."""
        return any(one.rounds < MIN_ROUNDS for one in self.repetitions)

    @property
    def unfinished(self) -> list[str]:
        """The reasons why repetitions are not complete."""
        return [
            f"repetition {one.number}: {one.outcome}"
            for one in self.repetitions
            if one.outcome != "complete"
        ]

    def by_repetition(self, quantity: Quantity) -> dict[int, float]:
        """The median of a quantity, or the tokens per second, of each repetition that has it."""
        values = {
            one.number: {
                "e2e": one.e2e_s,
                "ttft": one.ttft_s,
                "tpot": one.tpot_s,
                "tokens": one.tokens_per_s or None,
            }[quantity]
            for one in self.repetitions
        }
        return {number: value for number, value in values.items() if value is not None}

    def value(self, quantity: Quantity) -> float | None:
        """The median of a quantity over all requests, or the tokens per second."""
        if quantity == "tokens":
            return self.tokens_per_s.value or None
        summary: Summary | None = getattr(self, quantity)
        return None if summary is None else summary.median

    def saturation(self) -> str:
        """How the load generator was saturated, in words; empty if it was not."""
        if self.ttft is None:
            return ""
        ttft = self.ttft.median
        for one in self.repetitions:
            late = one.lag_p50_s > MAX_LAG_P50 * ttft or one.lag_p99_s > MAX_LAG_P99 * ttft
            if late or one.cpu > MAX_CPU:
                return (
                    f"the load generator was saturated at concurrency {self.level} on "
                    f"{self.target}, repetition {one.number}: its busiest process used "
                    f"{one.cpu:.2f} of a core and lagged by {1000 * one.lag_p50_s:.1f} ms (p50) "
                    f"and {1000 * one.lag_p99_s:.1f} ms (p99), at a median TTFT of "
                    f"{1000 * ttft:.0f} ms"
                )
        return ""


def closed_cells(lines: Iterable[Line]) -> Cells:
    """The cells of the closed loop, each once: its last complete run, or else its last run.

    Cells of other loops are left out: they have no fixed concurrency.
    """
    best: dict[tuple[str, float, int], tuple[Cell, list[Request]]] = {}
    for cell, requests in by_cell(lines):
        key = cell.target, cell.level, cell.repetition
        worse = key in best and best[key][0].outcome == "complete" != cell.outcome
        if cell.loop == "closed" and not worse:
            best[key] = cell, requests
    return list(best.values())


def make_rows(cells: Cells, *, tokens_out: int, limits: Limits) -> list[Row]:
    """A row for every target and level, targets in the order of the cells.

    Args:
        cells: From `closed_cells`.
        tokens_out: Requested tokens of an answer; one with fewer ended early.
        limits: The SLO of a request.
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
        concurrency=Spread.of([one.concurrency for one in repetitions]),
        e2e=Summary.of([one.e2e_s for one in its] for its in answered),
        ttft=Summary.of(_known(one.ttft_s for one in its) for its in answered),
        tpot=Summary.of(_known(tpot_s(one) for one in its) for its in answered),
        gap_p50_s=percentile(gaps, 0.5) if gaps else None,
        gap_p99_s=percentile(gaps, 0.99) if gaps else None,
        tokens_in=_median(one.tokens_in for one in good),
        tokens_out=_median(one.tokens_out for one in good),
        errors=dict(Counter(one.error for one in every if one.error and one.error != "cut")),
        cut=sum(one.error == "cut" for one in every),
        ended_early=sum(ended_early(one, tokens_out) for one in good),
        uncounted=sum(not one.tokens_out for one in good),
        good=sum(meets_slo(one, limits) for one in good),
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
        good_per_s=sum(meets_slo(one, limits) for one in ended) / window_s,
        concurrency=mean_concurrency(cell, requests),
        cpu=cell.cpu,
        lag_p50_s=cell.lag_p50_s,
        lag_p99_s=cell.lag_p99_s,
        e2e_s=_median(one.e2e_s for one in answered),
        ttft_s=_median(one.ttft_s for one in answered),
        tpot_s=_median(tpot_s(one) for one in answered),
        outcome=cell.outcome,
    )


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _median(values: Iterable[float | None]) -> float | None:
    known = _known(values)
    return statistics.median(known) if known else None


def tpot_s(one: Request) -> float | None:
    """Seconds per output token after the first; seconds per chunk if the server sent no usage."""
    if one.tokens_out is None and one.gaps_s:
        return statistics.fmean(one.gaps_s)
    return one.tpot_s


def ended_early(one: Request, tokens_out: int) -> bool:
    """Whether an answer ended before the requested number of tokens."""
    if one.tokens_out is None:
        return one.finish == "stop"
    return one.tokens_out < tokens_out


def meets_slo(one: Request, limits: Limits) -> bool:
    """Whether an answer meets every stated limit; one of a single token has no TPOT to miss."""
    if limits.ttft_s is not None and (one.ttft_s is None or one.ttft_s > limits.ttft_s):
        return False
    if limits.tpot_s is not None and (tpot_s(one) or 0.0) > limits.tpot_s:
        return False
    return limits.e2e_s is None or one.e2e_s <= limits.e2e_s


def tokens_per_s(cell: Cell, requests: Iterable[Request]) -> float:
    """Output tokens per second of a cell's window, of requests of all phases.

    A token counts at the time of its chunk. A chunk has its request's tokens over chunks;
    without usage it has the median of the cell's other requests, or else one token.
    """
    streamed = [one for one in requests if one.ttft_s is not None]
    counted = [one.tokens_out / (len(one.gaps_s) + 1) for one in streamed if one.tokens_out]
    usual = statistics.median(counted) if counted else 1.0
    tokens = 0.0
    for request in streamed:
        first = request.start + (request.ttft_s or 0.0)
        arrivals = itertools.accumulate(request.gaps_s, initial=first)
        inside = sum(cell.began <= at <= cell.ended for at in arrivals)
        chunks = len(request.gaps_s) + 1
        tokens += inside * (request.tokens_out / chunks if request.tokens_out else usual)
    return tokens / max(cell.ended - cell.began, 1e-9)


def mean_concurrency(cell: Cell, requests: Iterable[Request]) -> float:
    """Requests in flight, mean over the window."""
    inside = (
        min(cell.ended, one.start + one.e2e_s) - max(cell.began, one.start) for one in requests
    )
    return sum(max(0.0, seconds) for seconds in inside) / max(cell.ended - cell.began, 1e-9)


def ratio(above: Row, below: Row, quantity: Quantity) -> Spread | None:
    """`above` over `below`: of the overall medians, with the ratios within each repetition."""
    a, b = above.value(quantity), below.value(quantity)
    if not a or not b:
        return None
    over, under = above.by_repetition(quantity), below.by_repetition(quantity)
    ratios = [over[number] / under[number] for number in over.keys() & under.keys()]
    return Spread(a / b, min([*ratios, a / b]), max([*ratios, a / b]))
