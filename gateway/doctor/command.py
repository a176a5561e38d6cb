"""`twolane doctor`: what is wrong and what to do first, one line each for what is well."""

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

from gateway.doctor.checks.check import Finding, Level
from gateway.doctor.checks.table import run_checks
from gateway.doctor.collect.collector import look

#: Of the JSON. Names and levels do not change within one; checks may be added.
VERSION = 1

STYLES = {
    Level.PROBLEM: "bold red",
    Level.WARNING: "bold yellow",
    Level.UNKNOWN: "magenta",
    Level.NOTE: "cyan",
    Level.OK: "green",
    Level.NOT_APPLICABLE: "dim",
}


def run(args: argparse.Namespace) -> None:
    """Run the command and exit with its exit code."""
    seen = asyncio.run(look(args.config))
    findings = run_checks(seen)
    if args.json:
        sys.stdout.write(as_json(findings, seen.at) + "\n")
    else:
        Console(highlight=False).print(drawn(findings))
    sys.exit(any(finding.level is Level.PROBLEM for finding in findings))


def as_json(findings: Sequence[Finding], at: float) -> str:
    """The findings for a program to read, as the help describes them."""
    said = {
        "version": VERSION,
        "at": datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds"),
        "problems": sum(finding.level is Level.PROBLEM for finding in findings),
        "findings": [asdict(finding) for finding in findings],
    }
    return msgspec.json.format(msgspec.json.encode(said), indent=1).decode()


def drawn(findings: Sequence[Finding]) -> Group:
    """The findings for people, the worst first."""
    many = Counter(finding.level for finding in findings)
    head = ", ".join(
        f"{many[level]} {level}{'s' * (many[level] > 1 and level in _COUNTED)}"
        for level in Level
        if many[level]
    )
    bad = [one for one in findings if one.level in (Level.PROBLEM, Level.WARNING)]
    bad.sort(key=lambda one: one.level is not Level.PROBLEM)
    whole = (part for one in bad for part in _whole(one))
    return Group(
        Text(head, style="bold"),
        *whole,
        *_together([one for one in findings if one.level is Level.UNKNOWN], "unknown"),
        *_each([one for one in findings if one.level is Level.NOTE]),
        *_each([one for one in findings if one.level is Level.OK]),
        *_together([one for one in findings if one.level is Level.NOT_APPLICABLE], "n/a"),
    )


_COUNTED = (Level.PROBLEM, Level.WARNING, Level.NOTE)


def _whole(finding: Finding) -> Iterator[RenderableType]:
    """One finding with all it has to say."""
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


def _each(findings: Sequence[Finding]) -> Iterator[RenderableType]:
    """Findings that are not bad, a line each where it is wide enough."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for one in findings:
        saw = f"{one.about}: {one.saw}" if one.about else one.saw
        table.add_row(Text(one.level, STYLES[one.level]), one.check, Text(saw))
        if one.do:
            table.add_row("", "", Text(one.do, "dim"))
    if findings:
        yield ""
        yield table


def _together(findings: Sequence[Finding], word: str) -> Iterator[RenderableType]:
    """Findings that say nothing, by the reason why."""
    reasons: dict[str, list[str]] = {}
    for one in findings:
        about = f"{one.about}: " if one.about and one.level is not Level.NOT_APPLICABLE else ""
        reasons.setdefault(f"{about}{one.saw} {one.do}".rstrip(), []).append(one.check)
    table = Table.grid(padding=(0, 2, 0, 0))
    for reason, checks in reasons.items():
        names = ", ".join(dict.fromkeys(checks))
        style = STYLES[findings[0].level]
        table.add_row(Text(word, style), Text.assemble(names, (f": {reason}", "dim")))
    if findings:
        yield ""
        yield table
