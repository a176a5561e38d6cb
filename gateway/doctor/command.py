"""Runs `twolane doctor`: shows the problems and warnings in full, all else in a line each."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime

import msgspec
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from gateway.doctor.checks.all_checks import run_checks
from gateway.doctor.checks.check import Finding, Level
from gateway.doctor.collect.collector import collect

#: The version of the JSON. Within one, names and levels do not change; checks may be added.
JSON_VERSION = 1

STYLES = {
    Level.PROBLEM: "bold red",
    Level.WARNING: "bold yellow",
    Level.UNKNOWN: "magenta",
    Level.NOTE: "cyan",
    Level.OK: "green",
    Level.NOT_APPLICABLE: "dim",
}
#: The levels whose names have a plural.
COUNTABLE = (Level.PROBLEM, Level.WARNING, Level.NOTE)


def run(args: argparse.Namespace) -> None:
    """Run the command and exit: with 1 if there is a problem, else with 0."""
    observed = asyncio.run(collect(args.config))
    findings = run_checks(observed)
    if args.json:
        sys.stdout.write(as_json(findings, observed.at) + "\n")
    else:
        Console(highlight=False).print(as_text(findings))
    sys.exit(any(finding.level is Level.PROBLEM for finding in findings))


def as_json(findings: Sequence[Finding], at: float) -> str:
    """The findings as JSON, in the format that the help describes.

    Args:
        findings: All findings.
        at: When they were observed, Unix time.
    """
    report = {
        "version": JSON_VERSION,
        "at": datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds"),
        "problems": sum(finding.level is Level.PROBLEM for finding in findings),
        "findings": [asdict(finding) for finding in findings],
    }
    return msgspec.json.format(msgspec.json.encode(report), indent=1).decode()


def as_text(findings: Sequence[Finding]) -> Group:
    """The findings for the terminal, the worst first."""
    counts = Counter(finding.level for finding in findings)
    summary = ", ".join(
        f"{counts[level]} {level}{'s' * (counts[level] > 1 and level in COUNTABLE)}"
        for level in Level
        if counts[level]
    )
    by_level = {level: [f for f in findings if f.level is level] for level in Level}
    urgent = by_level[Level.PROBLEM] + by_level[Level.WARNING]
    return Group(
        Text(summary, style="bold"),
        *(part for finding in urgent for part in _in_full(finding)),
        *_grouped(by_level[Level.UNKNOWN], "unknown"),
        *_in_lines(by_level[Level.NOTE]),
        *_in_lines(by_level[Level.OK]),
        *_grouped(by_level[Level.NOT_APPLICABLE], "n/a"),
    )


def _in_full(finding: Finding) -> Iterator[RenderableType]:
    """A finding with all its texts."""
    yield ""
    yield Text.assemble(
        (finding.level.upper(), STYLES[finding.level]),
        f"  {finding.check}" + (f", {finding.about}" if finding.about else ""),
    )
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    for name, text in (("saw", finding.saw), ("why", finding.why), ("do", finding.do)):
        if text:
            table.add_row(f"  {name}", Text(text))
    yield table


def _in_lines(findings: Sequence[Finding]) -> Iterator[RenderableType]:
    """Each finding in a line of its own, and what to do in a second."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for finding in findings:
        saw = f"{finding.about}: {finding.saw}" if finding.about else finding.saw
        table.add_row(Text(finding.level, STYLES[finding.level]), finding.check, Text(saw))
        if finding.do:
            table.add_row("", "", Text(finding.do, "dim"))
    if findings:
        yield ""
        yield table


def _grouped(findings: Sequence[Finding], label: str) -> Iterator[RenderableType]:
    """One line per reason, with the names of all checks that it is the reason of."""
    reasons: dict[str, list[str]] = {}
    for finding in findings:
        has_about = finding.about and finding.level is not Level.NOT_APPLICABLE
        about = f"{finding.about}: " if has_about else ""
        reason = f"{about}{finding.saw} {finding.do}".rstrip()
        reasons.setdefault(reason, []).append(finding.check)
    table = Table.grid(padding=(0, 2, 0, 0))
    for reason, checks in reasons.items():
        names = ", ".join(dict.fromkeys(checks))
        style = STYLES[findings[0].level]
        table.add_row(Text(label, style), Text.assemble(names, (f": {reason}", "dim")))
    if findings:
        yield ""
        yield table
