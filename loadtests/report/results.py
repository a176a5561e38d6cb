"""The sections of a report that show what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from loadtests.analysis import rows
from loadtests.analysis.energy import Energy
from loadtests.analysis.gateway_cost import GatewayCost
from loadtests.analysis.rows import Row
from loadtests.analysis.slo import SloBracket
from loadtests.analysis.spread import Spread, Summary
from loadtests.measure.experiment import Limits, Prices
from loadtests.report.findings import Findings
from loadtests.report.headline import Claim, Crossing
from loadtests.report.page import Block, Bullets, Grid, Text, format_number
from loadtests.report.wording import format_spread, grid_rows, outcome_counts, row_name

ROW_HEAD = "target at concurrency"
OUTCOMES = ("answered", "failed", "cancelled")


def claims(published: Sequence[Claim]) -> Iterator[Block]:
    """The published claims beside the measured figures."""
    if published:
        yield Grid(
            ("", "claimed", "measured here"),
            [(claim.what, claim.claimed, claim.measured) for claim in published],
            numbers=False,
        )
        yield Text(
            "The claims were published for another machine and another model; no other figure of "
            "this report contains them. Seconds of two machines cannot be compared; ratios may be.",
            "small",
        )


def latencies(table: Sequence[Row]) -> Iterator[Block]:
    """Latencies, chunk gaps and rates of every row, with what limits their meaning."""
    summaries: dict[str, Callable[[Row], Summary | None]] = {
        "E2E, seconds": lambda row: row.e2e,
        "TTFT, seconds": lambda row: row.ttft,
        "TPOT, seconds": lambda row: row.tpot,
    }
    for title, summary_of in summaries.items():
        yield Text(title, "sub")
        yield _latency_grid(table, summary_of)
    yield Text("Chunk gaps, seconds, and rates", "sub")
    yield Grid(
        (ROW_HEAD, "gap p50", "gap p99", "tokens/s", "requests/s", *OUTCOMES),
        [
            *grid_rows(
                table,
                lambda row: (
                    format_number(row.gap_p50_s),
                    format_number(row.gap_p99_s),
                    format_spread(row.tokens_per_s),
                    format_spread(row.requests_per_s),
                    *outcome_counts(row),
                ),
            )
        ],
    )
    yield from _latency_notes(table)


def _latency_notes(table: Sequence[Row]) -> Iterator[Block]:
    if any(row.has_few_samples for row in table):
        yield Text(
            f"* fewer than {rows.MIN_ROUNDS} answers per user in a repetition: this median is "
            "ill-defined, since it depends on how the users' requests happen to interleave.",
            "small",
        )
    uncounted = [row_name(row) for row in table if row.uncounted]
    if uncounted:
        yield Text(
            f"No usage from {', '.join(uncounted)}: there TPOT is the time per chunk, and chunks "
            "are counted as tokens.",
            "small",
        )
    unfinished = [f"{row_name(row)}, {why}" for row in table for why in row.unfinished]
    if unfinished:
        yield Text("Not complete, so slow answers may be missing:", "small")
        yield Bullets(unfinished)


def _latency_grid(table: Sequence[Row], summary_of: Callable[[Row], Summary | None]) -> Grid:
    head = (ROW_HEAD, "median", "mean", "p90", "p95", "p99", *OUTCOMES)
    return Grid(
        head,
        [*grid_rows(table, lambda row: (*_summary(summary_of(row), row), *outcome_counts(row)))],
    )


def _summary(summary: Summary | None, row: Row) -> Iterator[str]:
    """Median with spread, mean and percentiles; a star where the median is ill-defined."""
    if summary is None:
        yield from ("-",) * 5
        return
    star = "*" if row.has_few_samples else ""
    yield format_spread(Spread(summary.median, summary.low, summary.high)) + star
    yield from map(format_number, (summary.mean, summary.p90, summary.p95, summary.p99))


def goodput(
    limits: Limits, brackets: Sequence[SloBracket], table: Sequence[Row]
) -> Iterator[Block]:
    """Requests per second that meet the SLO, and the levels that meet it."""
    slo = _slo(limits)
    if not slo:
        yield Text(
            "No SLO was stated, so every answer counts and goodput is requests/s. State one with "
            "--good-ttft-s, --good-tpot-s or --good-e2e-s."
        )
        return
    yield Text(f"SLO of a request: {slo}.")
    yield Bullets([*map(_bracket_sentence, brackets)])
    yield Grid(
        (ROW_HEAD, "goodput, requests/s", "share that meets the SLO", *OUTCOMES),
        [
            *grid_rows(
                table,
                lambda row: (
                    format_spread(row.good_per_s),
                    f"{row.good / max(1, row.asked):.1%}",
                    *outcome_counts(row),
                ),
            )
        ],
    )


def _slo(limits: Limits) -> str:
    stated = (("TTFT", limits.ttft_s), ("TPOT", limits.tpot_s), ("E2E", limits.e2e_s))
    return ", ".join(f"{name} at most {value:g} s" for name, value in stated if value is not None)


def _bracket_sentence(bracket: SloBracket) -> str:
    if bracket.level is None:
        return f"{bracket.target}: no measured level meets it."
    if bracket.fails is None:
        return f"{bracket.target}: every measured level meets it, up to {bracket.level} concurrent."
    return f"{bracket.target}: met up to {bracket.level} concurrent, missed with {bracket.fails}."


def energy(findings: Findings) -> Iterator[Block]:
    """Power of each row, and the cost of its tokens."""
    prices = findings.experiment.cost
    if not findings.energy:
        yield Text(
            "Not known: no card of this machine reported its power, and neither watts nor a rent "
            "are configured. Set cost in the settings (watts, price of a kWh, rent of an hour), "
            "then twolane compare --resume on this folder writes the report again."
        )
        return
    yield Text(_sources(findings.energy, prices))
    columns: dict[str, Callable[[Energy], str]] = {
        "watts": lambda one: format_spread(one.watts),
        "tokens/J": lambda one: format_spread(one.tokens_per_joule),
        "electricity": lambda one: format_spread(one.electricity),
        "rent": lambda one: format_spread(one.rent),
        "an API": lambda _: format_number(prices.api_per_million),
    }
    shown = {name: of for name, of in columns.items() if {"-"} != {*map(of, findings.energy)}}
    by_row = {(one.target, one.level): one for one in findings.energy}
    yield Grid(
        (ROW_HEAD, *shown),
        [
            *grid_rows(
                [row for row in findings.rows if (row.target, row.level) in by_row],
                lambda row: (of(by_row[row.target, row.level]) for of in shown.values()),
            )
        ],
    )
    if _prices(prices):
        yield Text(f"Costs are in {prices.currency} per million output tokens.", "small")


def _sources(energies: Sequence[Energy], prices: Prices) -> str:
    source = "not known: no card of this machine reported its power"
    if prices.watts:
        source = f"configured: {prices.watts:g} W"
    elif any(one.watts for one in energies):
        source = "measured: the power of the cards"
    paid = _prices(prices)
    priced = f"Prices are configured, in {prices.currency}: {paid}." if paid else "No price is set."
    return f"Watts are {source}. {priced}"


def _prices(prices: Prices) -> str:
    stated = {
        "per kWh": prices.per_kwh,
        "per hour of a rented machine": prices.rent_per_hour,
        "per million output tokens of an API": prices.api_per_million,
    }
    return ", ".join(f"{price:g} {what}" for what, price in stated.items() if price is not None)


def crossovers(crossings: Sequence[Crossing]) -> Iterator[Block]:
    """Up to how many concurrent requests which target is faster."""
    if crossings:
        yield Grid(
            ("", "by mean E2E, with straight lines between the measured levels"),
            [(f"{one.a} and {one.b}", one.sentence) for one in crossings],
            numbers=False,
        )


def errors(findings: Findings) -> Iterator[Block]:
    """Failed and cancelled requests, and what was not measured at all."""
    asked = sum(row.asked for row in findings.rows)
    failed = sum(row.failed for row in findings.rows)
    cut = sum(row.cut for row in findings.rows)
    yield Text(
        f"{asked:,} measured requests; failed: {failed:,}; cancelled, because the time of their "
        f"cell was up: {cut:,}."
    )
    table = [(row_name(row), str(n), why) for row in findings.rows for why, n in row.errors.items()]
    if table:
        yield Grid((ROW_HEAD, "count", "error"), table, numbers=False)
    measured = {(row.target, row.level) for row in findings.rows}
    missing = [
        f"{subject.label} at {level}"
        for subject in findings.experiment.subjects
        for level in findings.experiment.plan.levels
        if (subject.label, level) not in measured
    ]
    if missing:
        yield Text(f"Not measured at all: {', '.join(missing)}.")


def ended_early(tokens_out: int, table: Sequence[Row]) -> Iterator[Block]:
    """Answers with fewer tokens than requested."""
    early = [row for row in table if row.ended_early]
    if not early:
        yield Text(f"None: every answer has the {tokens_out} requested tokens.")
        return
    yield Text(
        f"Answers with fewer than the {tokens_out} requested tokens. They take less time, so a "
        "target with more of them has a lower E2E than it should."
    )
    yield Grid(
        (ROW_HEAD, "share", "ended early", "answered", "tokens out, median"),
        [
            *grid_rows(
                early,
                lambda row: (
                    f"{row.ended_early_share:.1%}",
                    str(row.ended_early),
                    str(row.answered),
                    format_number(row.tokens_out),
                ),
            )
        ],
    )


def gateway_overhead(costs: Sequence[GatewayCost]) -> Iterator[Block]:
    """The latency that a gateway adds; nothing if none was measured."""
    if not costs:
        return
    yield Text(
        "Medians, beside the faster of the lanes behind the gateway. It chooses a lane by the "
        "current demand, so the difference contains its own work and the cost of wrong choices."
    )
    yield Grid(
        (
            "gateway at concurrency", "E2E, s", "lane", "lane's E2E, s", "difference, ms", "ratio",
            "TTFT difference, ms", "significant",
        ),
        [
            (
                f"{cost.gateway} at {cost.level}",
                format_number(cost.e2e_s[0]),
                cost.lane,
                format_number(cost.e2e_s[1]),
                f"{1000 * (cost.e2e_s[0] - cost.e2e_s[1]):+,.0f}",
                f"{cost.e2e_s[0] / cost.e2e_s[1]:.3f}",
                f"{1000 * (cost.ttft_s[0] - cost.ttft_s[1]):+,.0f}",
                "no" if cost.is_noise else "yes",
            )
            for cost in costs
        ],
    )  # fmt: skip
    yield Text(
        "Not significant: the E2E medians of the repetitions overlap, so the difference may be "
        "noise.",
        "small",
    )
