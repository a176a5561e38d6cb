r"""The report of an experiment, made of its folder and made again whenever somebody likes.

    python -m loadtests.report FOLDER

Writes `report.html` (one file, opens offline), `report.md`, `report.json` and pictures beside
`raw.jsonl`. Where the stopwatch did not pass its check, or the load generator was saturated,
there is none, and it is said why; the raw data stays.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from loadtests.measure import samples
from loadtests.proof import agreement, selfcheck
from loadtests.proof.agreement import AGREEMENT, Agreement
from loadtests.proof.selfcheck import SelfCheck
from loadtests.report import analysis, charts, experiment, page
from loadtests.report.analysis import Cells, Energy, Row, Spread, Summary
from loadtests.report.experiment import RAW, SELFCHECK, Experiment, ExperimentError, Limits
from loadtests.report.findings import Crossing, Findings, find, spread
from loadtests.report.page import Block, Bullets, Chart, Code, Grid, Key, Section, Text, number

HTML = "report.html"
MARKDOWN = "report.md"
JSON = "report.json"
#: For a README: seconds and tokens against requests at once.
PICTURE = "comparison"
NEEDS = "a report needs the extra: pip install 'twolane[load]'"

FORMULAS = {
    "TTFT": "from just before a request is sent to the first delta that has content, reasoning "
    "or a tool call in it",
    "E2E": "from just before a request is sent to the last byte; each has its own connection, and "
    "making that is not counted",
    "chunk gap": "between two such deltas",
    "TPOT": "(last delta - first delta) / (tokens - 1), tokens by the server's usage; where it "
    "tells none, the mean chunk gap, and that is said",
    "window": "of a cell, from when its first measured request is sent to when its last one is "
    "over; users go on asking until then, so that the number at once holds",
    "tokens/s": "tokens whose chunk came in the window / window, of requests of all phases; a "
    "chunk is worth its request's tokens over its chunks, or the median worth of the cell where "
    "the request was cut or told no usage",
    "requests/s": "requests answered in the window / window",
    "achieved at once": "integral of the requests in flight over the window / window",
    "goodput": "requests a second that keep the stated limits; a level keeps them if "
    f"{analysis.KEEPING:.0%} of its measured requests do, where one that failed does not, and all "
    "levels below it do",
    "ended early": "answers with fewer tokens than asked for / answers; where no usage is told, "
    "those that say they stopped",
    "percentile": "linear between the two nearest values: of n sorted ones, p lies at place "
    "p (n - 1), from 0; over the answered requests of all repetitions. Of fewer than a hundred, "
    "p99 is little else than the slowest",
    "spread": "in brackets: the lowest and the highest repetition's median; of a ratio, the "
    "ratios within each repetition",
    "crossover": "where the difference of mean E2E changes sign, every repetition counting the "
    f"same, straight lines between levels; the interval is of {analysis.DRAWS} draws, repetitions "
    f"first, then requests within each. It needs {analysis.REPETITIONS} repetitions and "
    f"{analysis.REQUESTS} requests of each at the levels it hangs on, and that "
    f"{analysis.AGREEING:.0%} of the draws cross once. Of three repetitions it is rough: "
    "simulated, it held the truth 95 times in 100 where these differed by 1 %, and 77 times "
    "where by 5 %",
    "tokens/J": "tokens/s / watts; measured watts are the mean of what the cards of this machine "
    "drew in the window, together and about once a second, and the rest of the machine is not in "
    f"them. Not known where the driver said nothing for over {analysis.LONGEST_GAP_S:g} s",
    "cost of a million tokens": "output tokens: electricity by tokens/J, rent by tokens/s, both "
    "within the window, so a machine that idles between costs more; an API as it was given",
    "gateway's cost": "its median less the median of the lane behind it whose E2E is lower",
    "saturated": f"the generator's busiest process uses over {analysis.CPU_MOST:.0%} of a core, "
    f"or is late by over {analysis.LATE_P50:.0%} of the median TTFT in the median, or "
    f"{analysis.LATE_P99:.0%} of it in the 99th percentile",
}


class ReportError(ExperimentError):
    """There is no report to be had; the text says why and what to do. The raw data stays."""


def write(folder: Path, *, unchecked: bool = False) -> Path:
    """Make the report of a folder; returns the page.

    Args:
        folder: Of an experiment.
        unchecked: Make it even if the stopwatch cannot be trusted, and say so in it.

    Raises:
        ReportError: It cannot be trusted, or not be written.
        ExperimentError: The folder holds no experiment.
        samples.SamplesError: Nor what was measured.
    """
    if any(importlib.util.find_spec(name) is None for name in ("plotly", "matplotlib", "numpy")):
        raise ReportError(NEEDS)
    known = experiment.load(folder)
    lines = [*samples.read(folder / RAW)]
    cells = analysis.closed_cells(lines)
    if not cells:
        raise ReportError(f"nothing was measured in {folder} yet: go on with --resume")
    checked, doubts = _checked(folder, max(int(cell.level) for cell, _ in cells))
    agreed = agreement.load(folder) if (folder / AGREEMENT).exists() else None
    found = find(known, cells, doubts, checked, agreed, samples.powers(lines))
    if found.doubts and not unchecked:
        raise ReportError(
            f"no report of {folder}: {'; '.join(found.doubts)}. What was measured is kept; measure "
            "again on a quieter machine, or have a report that says so with --unchecked"
        )
    try:
        return _write(folder, found, cells)
    except OSError as exc:
        raise ReportError(f"{folder} cannot be written: {exc.strerror}") from exc


def _checked(folder: Path, level: int) -> tuple[SelfCheck | None, list[str]]:
    """What the stopwatch was held to, and what is wrong with that."""
    if not (folder / SELFCHECK).exists():
        return None, [f"nothing proves the stopwatch: there is no {SELFCHECK}"]
    checked = selfcheck.load(folder)
    doubts = []
    if not checked.passed:
        doubts.append(f"the stopwatch did not pass its check: {checked.why}")
    if checked.level < level:
        doubts.append(
            f"the stopwatch was checked at {checked.level} at once, and then {level} were measured"
        )
    return checked, doubts


def _write(folder: Path, found: Findings, cells: Cells) -> Path:
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped] # noqa: PLC0415

    looks = charts.looks(found.experiment.subjects)
    pictures = [folder / f"{PICTURE}{kind}" for kind in (".svg", ".png")]
    charts.draw_lines(found.rows, looks, pictures)
    points = _points(cells, found.rows)
    with tempfile.TemporaryDirectory() as scratch:
        scatter = Path(scratch, "scatter.png")
        charts.draw_scatter(points, found.rows, looks, scatter)
        shown = (
            Chart(
                "Latency, time to first token and tokens a second against requests at once",
                charts.line_plots(found.rows, looks),
                pictures[0],
                linked=True,
            ),
            Chart(
                "Every request by requests at once",
                [charts.scatter_plot(points, found.rows, looks)],
                scatter,
            ),
        )
        lead = [*_lead(found)]
        key = Key([(label, looks[label].colour, looks[label].dashes) for label in points])
        told = sections(found, key, *shown)
        html = page.as_html(found.headline, lead, told, get_plotlyjs())
    json = msgspec.json.format(msgspec.json.encode(found), indent=1)
    for name, content in (
        (JSON, json),
        (MARKDOWN, page.as_markdown(lead, told).encode()),
        (HTML, html.encode()),
    ):
        whole = folder / f"{name}.new"
        whole.write_bytes(content)
        whole.replace(folder / name)
    return folder / HTML


def _points(cells: Cells, table: Iterable[Row]) -> dict[str, list[samples.Request]]:
    """Measured requests, by target."""
    return {
        label: [
            one
            for cell, requests in cells
            for one in requests
            if cell.target == label and one.phase == "measured"
        ]
        for label in dict.fromkeys(row.target for row in table)
    }


# --- what is told -------------------------------------------------------------------------


def _lead(found: Findings) -> Iterator[Block]:
    if found.doubts:
        yield Text(f"Not to be trusted: {'; '.join(found.doubts)}.", "banner")
    yield Text(f"{found.headline}.", "loud")
    machine, plan = found.experiment.machine, found.experiment.plan
    yield Text(
        f"{machine.cpu}, {machine.cores} cores, {machine.memory_gib:g} GiB; "
        f"{'; '.join(machine.gpus) or 'no GPU'}; {_day(found.experiment.at)}"
    )
    yield Bullets(found.short)
    yield Text(
        f"About {plan.tokens_in} tokens in and at most {plan.tokens_out} out, streamed; as many "
        "users as requests at once, and each asks again when it has its answer. Another machine "
        "has other figures, and other ratios.",
        "small",
    )


def sections(found: Findings, key: Key, lines: Chart, scatter: Chart) -> list[Section]:
    """All that is under the headline, in order."""
    told = [
        Section("What is claimed, and what was measured here", [*_claimed(found)]),
        Section("Seconds and tokens against requests at once", [key, lines, Text(
            "Medians over all repetitions; bars and bands reach from the lowest repetition's "
            "median to the highest one's.", "small")]),
        Section("Every request", [key, scatter, Text(
            "A point is a measured request, beside its number at once; a cross is one that failed. "
            f"Of a target with more than {charts.POINTS:,} every n-th is drawn.", "small")]),
        Section("All cells", [*_cells(found.rows)]),
        Section("Goodput", [*_goodput(found)]),
        Section("Watts, and what tokens cost", [*_energy(found)]),
        Section("Where the faster one changes", [*_crossovers(found.crossings)]),
        Section("Errors", [*_errors(found)]),
        Section("Achieved concurrency, and the load generator itself", [*_achieved(found.rows)]),
        Section("Answers that ended early", [*_early(found)]),
        Section("What the gateway costs", [*_costs(found)]),
        Section("What was fair, and what was not", [Grid(
            ("", "verdict", "why"), [(one.what, one.verdict, one.why) for one in found.fairness],
            numbers=False)]),
        Section("Machine, versions and command lines", [*_machine(found.experiment)]),
        Section("Formulas", [Grid(("", ""), [*FORMULAS.items()], numbers=False)]),
        Section("Appendix: the stopwatch against a server of known times", [*_selfcheck(found)]),
        Section("Appendix: agreement with other tools", [*_agreement(found.agreement)]),
    ]  # fmt: skip
    return [section for section in told if section.blocks]


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


def _name(row: Row) -> str:
    return f"{row.target} at {row.level}"


def _each(table: Iterable[Row], cells: Callable[[Row], Iterable[str]]) -> Iterator[tuple[str, ...]]:
    """A row of a table for each row, named; an empty one where another target begins."""
    before = None
    for row in table:
        if before not in (None, row.target):
            yield ()
        before = row.target
        yield (_name(row), *cells(row))


def _counts(row: Row) -> tuple[str, str, str]:
    return str(row.answered), str(row.failed), str(row.cut)


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
            f"* fewer than {analysis.ENOUGH_ROUNDS} answers of each user in a repetition: such a "
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


def _achieved(table: Sequence[Row]) -> Iterator[Block]:
    yield Grid(
        ("", "at once, achieved", "busiest process, of a core", "late p50, ms", "late p99, ms"),
        [
            *_each(
                table,
                lambda row: (
                    spread(row.at_once),
                    f"{max(one.cpu for one in row.repetitions):.2f}",
                    f"{1000 * max(one.lag_p50_s for one in row.repetitions):.1f}",
                    f"{1000 * max(one.lag_p99_s for one in row.repetitions):.1f}",
                ),
            )
        ],
    )
    yield Text("Of the generator the worst repetition is shown.", "small")


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


def _machine(known: Experiment) -> Iterator[Block]:
    machine, plan = known.machine, known.plan
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    told = {
        "processor": f"{machine.cpu}, {machine.cores} cores",
        "memory": f"{machine.memory_gib:g} GiB",
        "GPU": "; ".join(machine.gpus) or "none",
        "driver": machine.driver,
        "system": machine.system,
        "Python": machine.python,
        "load by": packages,
        "levels": ", ".join(map(str, plan.levels)),
        "repetitions": str(plan.repetitions),
        "requests of a user": f"{plan.rounds} measured, after {plan.warm_up} to warm up",
        "tokens": f"about {plan.tokens_in} in, at most {plan.tokens_out} out",
        "prompts": plan.prompts,
    }
    yield Grid(("", ""), [(what, how) for what, how in told.items() if how], numbers=False)
    yield Grid(
        ("target", "engine", "version", "model", "weights", "slots", "context"),
        [
            (
                one.label,
                one.engine or "not known",
                one.version or "not known",
                one.model or "not known",
                one.weights or ("as its lanes" if one.before else "not known"),
                str(one.slots or ("as its lanes" if one.before else "not known")),
                str(one.context or ("as its lanes" if one.before else "not known")),
            )
            for one in known.subjects
        ],
        numbers=False,
    )
    commands = [f"# {one.label}\n{one.command}" for one in known.subjects if one.command]
    if known.command:
        commands.insert(0, f"# all of this\n{known.command}")
    if commands:
        yield Code("\n\n".join(commands))


def _selfcheck(found: Findings) -> Iterator[Block]:
    seen = found.selfcheck
    if seen is None:
        return
    passed = "It passed." if seen.passed else f"It did not pass: {seen.why}."
    yield Text(
        f"{seen.level} at once, {seen.requests} requests, {seen.errors} failed, on "
        f"{_day(seen.at)}. {passed} A median may be off by {selfcheck.WITHIN:.0%}."
    )
    yield Grid(
        ("", "truth", "measured", "ratio"),
        [
            (
                one.name,
                selfcheck.written(one.name, one.expected),
                selfcheck.written(one.name, one.measured),
                f"{one.ratio:.4f}",
            )
            for one in seen.quantities
        ],
    )
    yield Text(
        f"The generator used {seen.cpu:.2f} of a core in its busiest process and was late by "
        f"{1000 * seen.lag_p50_s:.1f} ms in the median, {1000 * seen.lag_p99_s:.1f} ms in the 99th "
        f"percentile; the server of known times was late itself by {1000 * seen.engine.p50:.1f} ms "
        f"and {1000 * seen.engine.p99:.1f} ms.",
        "small",
    )


def _agreement(seen: Agreement | None) -> Iterator[Block]:
    table = seen.rows() if seen else []
    if seen is None or not table:
        return
    tools = list(seen.tools)
    versions = ", ".join(f"{tool} {version}".strip() for tool, version in seen.tools.items())
    yield Text(f"Same servers, same workload, {_day(seen.at)}, on {seen.machine.cpu}: {versions}.")
    yield Grid(
        ("", "truth", *tools),
        [
            (
                f"{row.quantity}, {row.server} at {row.level}",
                "-" if row.truth is None else selfcheck.written(row.quantity, row.truth),
                *(_seen_by(row, tool) for tool in tools),
            )
            for row in table
        ],
    )
    disagreements = seen.disagreements()
    if disagreements:
        yield Text("Where ours is off by more than it may be:")
        yield Bullets(disagreements)
    else:
        yield Text(
            f"Ours is within {agreement.OF_TRUTH:.0%} of the truth and {agreement.OF_OTHERS:.0%} "
            "of the others, or, on a real server, within the spread of the runs."
        )
    strays = seen.strays()
    if strays:
        yield Text("Who is too far from the truth to hold ours against:")
        yield Bullets(strays)
    yield Text(
        "guidellm's inter-token latency is what is called TPOT here; its own TPOT has the wait "
        "for the first token in it. bench serve begins TTFT at the first event that has choices, "
        "even an empty one.",
        "small",
    )


def _seen_by(row: agreement.Row, tool: str) -> str:
    """A tool's median, the spread of its runs, and its share of the truth or else of ours."""
    seen = row.by_tool.get(tool)
    if seen is None:
        return "-"
    value = selfcheck.written(row.quantity, seen.value)
    if seen.high > seen.low:
        value += f" ±{(seen.high - seen.low) / 2 / seen.value:.1%}"
    share = row.to_truth(tool)
    if share is None and tool != agreement.OURS:
        share = 1 / row.shares[tool].value
    return value if share is None else f"{value} ({share:.3f})"


def _day(at: float) -> str:
    return dt.datetime.fromtimestamp(at, dt.UTC).strftime("%Y-%m-%d")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report of a folder; 1 where there is none to be had."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="of an experiment")
    parser.add_argument(
        "--unchecked",
        action="store_true",
        help="write it even if the stopwatch cannot be trusted; it will say so",
    )
    args = parser.parse_args(arguments)
    try:
        print(write(args.folder, unchecked=args.unchecked))
    except (ExperimentError, samples.SamplesError) as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0
