"""`twolane doctor`: what is wrong and what to do first, one line each for what is well."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from gateway.doctor.judge import Finding, Level, examine
from gateway.doctor.look import look

#: Of the JSON. Names and levels do not change within one; checks may be added.
VERSION = 1

STYLES = {
    Level.PROBLEM: "bold red",
    Level.WARNING: "bold yellow",
    Level.UNKNOWN: "magenta",
    Level.NOTE: "cyan",
    Level.OK: "green",
    Level.NONE: "dim",
}

GUIDE = """\
examples:
  twolane doctor                           this machine, and the engines that are found on it
  twolane doctor --config twolane.yaml     the same for what the settings want
  twolane doctor --json | jq '.findings[] | select(.level == "problem")'
  twolane doctor --config twolane.yaml && twolane serve --config twolane.yaml

It looks and asks; nothing is changed, loaded or generated. Engines are best looked at while
they run, by a user who may see their processes (root, for those of other users).

levels:
  problem          it fails, or will
  warning          it may fail, or somebody else may use it
  unknown          nobody could tell; it says why
  note             worth knowing
  ok               as it should be
  not applicable   there is nothing here that it is about

exit code:
  0   no problem (there may be warnings)
  1   at least one problem
  2   the command line was not understood

--json:
  {"version": 1, "at": "2026-11-23T09:00:00+00:00", "problems": 0, "findings": [
    {"check": "port", "about": "", "level": "ok", "saw": "...", "why": "...", "do": "..."}]}
  `check` and `level` stay as they are. `about` is the card, engine or model, empty where there
  is one. Every check is there once at least. `do` is empty where there is nothing to do.
"""


def add_command(commands: Any) -> None:
    """Add `doctor` to the commands of `twolane`.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
    """
    parser = commands.add_parser(
        "doctor",
        help="look for what will fail, and say what to do",
        description="Look over this machine, its cards, the engines and the gateway's settings, "
        "and say of each thing what was seen, why it matters and what to do.",
        epilog=GUIDE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE",
        help="the gateway's settings, YAML (without: engines are looked for as `serve` does)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="as JSON, see below")
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> None:
    seen = asyncio.run(look(args.config))
    findings = examine(seen)
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
        *_together([one for one in findings if one.level is Level.NONE], "n/a"),
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
        about = f"{one.about}: " if one.about and one.level is not Level.NONE else ""
        reasons.setdefault(f"{about}{one.saw} {one.do}".rstrip(), []).append(one.check)
    table = Table.grid(padding=(0, 2, 0, 0))
    for reason, checks in reasons.items():
        names = ", ".join(dict.fromkeys(checks))
        style = STYLES[findings[0].level]
        table.add_row(Text(word, style), Text.assemble(names, (f": {reason}", "dim")))
    if findings:
        yield ""
        yield table
