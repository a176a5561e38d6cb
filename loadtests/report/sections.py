"""The order of a report: lead, sections, appendices."""

from __future__ import annotations

from collections.abc import Iterator

from loadtests.report import charts, conditions, results
from loadtests.report.findings import Findings
from loadtests.report.formulas import FORMULAS
from loadtests.report.page import Block, Bullets, Chart, Grid, Key, Section, Text
from loadtests.report.wording import format_day


def lead(findings: Findings) -> Iterator[Block]:
    """Headline, machine, main results and workload."""
    if findings.doubts:
        yield Text(f"Do not trust these figures: {'; '.join(findings.doubts)}.", "banner")
    yield Text(f"{findings.headline}.", "loud")
    machine, plan = findings.experiment.machine, findings.experiment.plan
    yield Text(
        f"{machine.cpu}, {machine.cores} cores, {machine.memory_gib:g} GiB; "
        f"{'; '.join(machine.gpus) or 'no GPU'}; {format_day(findings.experiment.at)}"
    )
    yield Bullets(findings.short)
    yield Text(
        f"Workload: about {plan.tokens_in} tokens in and at most {plan.tokens_out} out, streamed, "
        "closed loop: one user per concurrent request, who sends the next request when the answer "
        "is complete. Other machines have other figures, and other ratios.",
        "small",
    )


def sections(findings: Findings, key: Key, lines: Chart, scatter: Chart) -> list[Section]:
    """Everything below the lead, in order; sections without content are left out."""
    rows, plan = findings.rows, findings.experiment.plan
    every = [
        Section("Claimed and measured", [*results.claims(findings.claims)]),
        Section("Latency and throughput by concurrency", [key, lines, Text(
            "Medians over all repetitions; bars and bands extend from the lowest median of a "
            "repetition to the highest.", "small")]),
        Section("Every request", [key, scatter, Text(
            "A point is a measured request, beside its concurrency; a cross is a failed one. "
            f"Of a target with more than {charts.MAX_POINTS:,} every n-th is drawn.", "small")]),
        Section("All cells", [*results.latencies(rows)]),
        Section("Goodput", [
            *results.goodput(findings.experiment.limits, findings.slo_brackets, rows)]),
        Section("Power, and the cost of tokens", [*results.energy(findings)]),
        Section("Crossover", [*results.crossovers(findings.crossings)]),
        Section("Errors", [*results.errors(findings)]),
        Section("Achieved concurrency and the load generator", [*conditions.load_generator(rows)]),
        Section("Answers that ended early", [*results.ended_early(plan.tokens_out, rows)]),
        Section("The gateway's overhead", [*results.gateway_overhead(findings.costs)]),
        Section("Fairness of the comparison", [Grid(
            ("", "verdict", "why"), [(one.what, one.verdict, one.why) for one in findings.fairness],
            numbers=False)]),
        Section("Machine, versions and command lines", [*conditions.setup(findings.experiment)]),
        Section("Formulas", [Grid(("", ""), [*FORMULAS.items()], numbers=False)]),
        Section("Appendix: the stopwatch against a server of known times", [
            *conditions.self_check(findings.selfcheck)]),
        Section("Appendix: agreement with other tools", [
            *conditions.tool_agreement(findings.agreement)]),
    ]  # fmt: skip
    return [section for section in every if section.blocks]
