"""The sections of a report that show what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from loadtests.analysis import rows
from loadtests.analysis.energy import Energy
from loadtests.analysis.rows import Row
from loadtests.analysis.spread import Spread, Summary
from loadtests.measure.experiment import Limits
from loadtests.report.findings import Findings
from loadtests.report.headline import Crossing
from loadtests.report.page import Block, Bullets, Grid, Text, number
from loadtests.report.wording import _counts, _each, _name, spread


def _claimed(found: Findings) -> Iterator[Block]:
    if found.claims:
        yield Grid(
            ("", "claimed", "measured here"),
            [(one.what, one.claimed, one.measured) for one in found.claims],
            numbers=False,
        )
        yield Text(
            "The claimed figures were published for another machine and another model; they are "
            "in no other figure of this report. Seconds of two machines do not compare; the "
            "ratios may.",
            "small",
        )


def _cells(table: Sequence[Row]) -> Iterator[Block]:
    pick: dict[str, Callable[[Row], Summary | None]] = {
        "E2E, seconds": lambda row: row.e2e,
        "TTFT, seconds": lambda row: row.ttft,
        "TPOT, seconds": lambda row: row.tpot,
    }
    for title, of in pick.items():
        yield Text(title, "sub")
        yield _latencies(table, of)
    yield Text("Chunk gaps, seconds, and what is said of a second", "sub")
    yield Grid(
        ("", "gap p50", "gap p99", "tokens/s", "requests/s", "answered", "failed", "cut"),
        [
            *_each(
                table,
                lambda row: (
                    number(row.gap_p50_s),
                    number(row.gap_p99_s),
                    spread(row.tokens_per_s),
                    spread(row.requests_per_s),
                    *_counts(row),
                ),
            )
        ],
    )
    if any(row.is_thin for row in table):
        yield Text(
            f"* fewer than {rows.ENOUGH_ROUNDS} answers of each user in a repetition: such a "
            "median is ill-defined, for it hangs on how the users fell into step.",
            "small",
        )
    uncounted = [_name(row) for row in table if row.uncounted]
    if uncounted:
        yield Text(
            f"No usage was told by {', '.join(uncounted)}: there TPOT is what a chunk takes, and "
            "tokens are chunks.",
            "small",
        )
    unfinished = [f"{_name(row)}, {why}" for row in table for why in row.unfinished]
    if unfinished:
        yield Text("Not complete, so that slow answers may be missing:", "small")
        yield Bullets(unfinished)


def _latencies(table: Sequence[Row], of: Callable[[Row], Summary | None]) -> Grid:
    head = ("", "median", "mean", "p90", "p95", "p99", "answered", "failed", "cut")
    return Grid(head, [*_each(table, lambda row: (*_summary(of(row), row), *_counts(row)))])


def _summary(seen: Summary | None, row: Row) -> Iterator[str]:
    """Median with spread, mean and percentiles; a star where the median is ill-defined."""
    if seen is None:
        yield from ("-",) * 5
        return
    star = "*" if row.is_thin else ""
    yield spread(Spread(seen.median, seen.low, seen.high)) + star
    yield from map(number, (seen.mean, seen.p90, seen.p95, seen.p99))


def _limits(limits: Limits) -> str:
    stated = (("TTFT", limits.ttft_s), ("TPOT", limits.tpot_s), ("E2E", limits.e2e_s))
    return ", ".join(f"{name} at most {value:g} s" for name, value in stated if value is not None)


def _goodput(found: Findings) -> Iterator[Block]:
    limits = _limits(found.experiment.limits)
    if not limits:
        yield Text(
            "No limits were stated, so every answer was good enough, and goodput is requests a "
            "second. State some with --good-ttft-s, --good-tpot-s or --good-e2e-s."
        )
        return
    yield Text(f"Good is an answer with {limits}.")
    told = []
    for one in found.kept:
        if one.level is None:
            told.append(f"{one.target}: none of the levels measured keeps them.")
        elif one.fails is None:
            told.append(f"{one.target}: all measured keep them, up to {one.level} at once.")
        else:
            told.append(f"{one.target}: up to {one.level} at once; {one.fails} do not keep them.")
    yield Bullets(told)
    yield Grid(
        ("", "good requests/s", "share that was good", "answered", "failed", "cut"),
        [
            *_each(
                found.rows,
                lambda row: (
                    spread(row.good_per_s),
                    f"{row.good / max(1, row.asked):.1%}",
                    *_counts(row),
                ),
            )
        ],
    )


def _energy(found: Findings) -> Iterator[Block]:
    prices = found.experiment.cost
    if not found.energy:
        yield Text(
            "Not known: no card of this machine told what it draws, and neither watts nor a rent "
            "was given. Say what there is in the settings, under cost (watts, the price of a kWh, "
            "the rent of an hour), and twolane compare --resume on this folder writes the report "
            "again."
        )
        return
    given = {
        "for a kWh": prices.per_kwh,
        "for an hour of a rented machine": prices.rent_per_hour,
        "for a million output tokens of an API": prices.api_per_million,
    }
    paid = ", ".join(f"{price:g} {what}" for what, price in given.items() if price is not None)
    source = "not known: no card of this machine told them"
    if prices.watts:
        source = f"given: {prices.watts:g} W"
    elif any(one.watts for one in found.energy):
        source = "measured: what the cards drew"
    yield Text(
        f"Watts are {source}. "
        + (f"Prices are given, in {prices.currency}: {paid}." if paid else "No price was given.")
    )
    columns: dict[str, Callable[[Energy], str]] = {
        "watts": lambda one: spread(one.watts),
        "tokens/J": lambda one: spread(one.tokens_per_joule),
        "electricity": lambda one: spread(one.electricity),
        "rent": lambda one: spread(one.rent),
        "an API": lambda _: number(prices.api_per_million),
    }
    shown = {name: of for name, of in columns.items() if {"-"} != {*map(of, found.energy)}}
    by_row = {(one.target, one.level): one for one in found.energy}
    yield Grid(
        ("", *shown),
        [
            *_each(
                [row for row in found.rows if (row.target, row.level) in by_row],
                lambda row: (of(by_row[row.target, row.level]) for of in shown.values()),
            )
        ],
    )
    if paid:
        yield Text(f"Costs are {prices.currency} a million output tokens.", "small")


def _crossovers(crossings: Sequence[Crossing]) -> Iterator[Block]:
    if crossings:
        yield Grid(
            ("", "mean E2E, straight lines between the levels measured"),
            [(f"{one.a} and {one.b}", one.told) for one in crossings],
            numbers=False,
        )


def _errors(found: Findings) -> Iterator[Block]:
    asked = sum(row.asked for row in found.rows)
    failed = sum(row.failed for row in found.rows)
    cut = sum(row.cut for row in found.rows)
    yield Text(
        f"{asked:,} measured requests; failed: {failed:,}; cut, because the time of their cell was "
        f"over: {cut:,}."
    )
    told = [(_name(row), str(n), why) for row in found.rows for why, n in row.errors.items()]
    if told:
        yield Grid(("", "how many", "what was said"), told, numbers=False)
    there = {(row.target, row.level) for row in found.rows}
    missing = [
        f"{one.label} at {level}"
        for one in found.experiment.subjects
        for level in found.experiment.plan.levels
        if (one.label, level) not in there
    ]
    if missing:
        yield Text(f"Not measured at all: {', '.join(missing)}.")


def _early(found: Findings) -> Iterator[Block]:
    asked = found.experiment.plan.tokens_out
    early = [row for row in found.rows if row.early]
    if not early:
        yield Text(f"None: every answer has the {asked} tokens that were asked for.")
        return
    yield Text(
        f"Answers with fewer than the {asked} tokens asked for; they are over sooner, and so the "
        "E2E of whoever has more of them looks better than it is."
    )
    yield Grid(
        ("", "share", "early", "answered", "tokens out, median"),
        [
            *_each(
                early,
                lambda row: (
                    f"{row.early_share:.1%}",
                    str(row.early),
                    str(row.answered),
                    number(row.tokens_out),
                ),
            )
        ],
    )


def _costs(found: Findings) -> Iterator[Block]:
    if not found.costs:
        return
    yield Text(
        "Medians, against the better of the lanes it stands before. It chooses a lane by what is "
        "asked of it, and beside its own work there is what a wrong choice costs."
    )
    yield Grid(
        (
            "", "E2E, s", "lane", "lane's E2E, s", "difference, ms", "ratio",
            "TTFT difference, ms", "told apart",
        ),
        [
            (
                f"{one.gateway} at {one.level}",
                number(one.e2e_s[0]),
                one.lane,
                number(one.e2e_s[1]),
                f"{1000 * (one.e2e_s[0] - one.e2e_s[1]):+,.0f}",
                f"{one.e2e_s[0] / one.e2e_s[1]:.3f}",
                f"{1000 * (one.ttft_s[0] - one.ttft_s[1]):+,.0f}",
                "no" if one.is_noise else "yes",
            )
            for one in found.costs
        ],
    )  # fmt: skip
    yield Text(
        "Not told apart: the repetitions of both overlap, and the difference may be noise.", "small"
    )
