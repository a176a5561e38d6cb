"""The order of a report: lead, sections, appendices."""

from __future__ import annotations

from collections.abc import Iterator

from loadtests.report import charts
from loadtests.report.conditions import _achieved, _agreement, _machine, _selfcheck
from loadtests.report.findings import Findings
from loadtests.report.formulas import FORMULAS
from loadtests.report.page import Block, Bullets, Chart, Grid, Key, Section, Text
from loadtests.report.results import (
    _cells,
    _claimed,
    _costs,
    _crossovers,
    _early,
    _energy,
    _errors,
    _goodput,
)
from loadtests.report.wording import _day


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
