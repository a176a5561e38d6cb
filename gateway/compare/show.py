"""`twolane profile show`: a profile as a table."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from backends.kinds import KINDS
from gateway import settings
from gateway.errors import UsageError
from gateway.routing import profile


def show_profile(args: argparse.Namespace) -> None:
    """Run `twolane profile show`."""
    file = args.file
    if file is None and args.config is not None:
        models = settings.load(args.config, {}, settings.environment()).models
        name = args.model or next(iter(models), "")
        if name not in models:
            raise UsageError(f"there is no model {name}; there are: {', '.join(models)}")
        file = models[name].profile
    try:
        show(profile.ASSUMED if file is None else profile.load(file), Console())
    except profile.ProfileError as exc:
        raise UsageError(str(exc)) from exc


def show(found: profile.Profile, console: Console) -> None:
    """A profile as a table, and its lanes side by side as bars."""
    console.print(f"[bold]{found.told(time.time())}[/] {found.machine}")
    lanes = list(found.lanes)
    levels = sorted({level for lane in found.lanes.values() for level in lane.at_once})
    longest = max(lane.at(level) for lane in found.lanes.values() for level in levels)
    table = Table("at once", "lane", "seconds", "", "spread", "TTFT, s", "tok/s", box=None)
    for level in levels:
        seconds = {label: found.lanes[label].at(level) for label in lanes}
        best = min(seconds, key=lambda label: seconds[label])
        for label in lanes:
            lane = found.lanes[label]
            here = lane.at_once.index(level) if level in lane.at_once else None
            table.add_row(
                str(level) if label == lanes[0] else "",
                f"[bold]{label}[/]" if label == best else label,
                f"{seconds[label]:.2f}" + ("" if here is not None else " ?"),
                Bar(
                    longest,
                    0,
                    seconds[label],
                    width=24,
                    color=KINDS[label].colour if label in KINDS else "default",
                ),
                _spread(lane, here),
                _at(lane.ttft_s, here, ".2f"),
                _at(lane.tokens_per_s, here, ".0f"),
            )
    console.print(table)
    console.print(_where(found))
    for label, lane in found.lanes.items():
        if lane.on is not None:
            said = [lane.on.engine, lane.on.version, lane.on.model, lane.on.weights]
            slots = lane.on.slots
            said += [f"{slots} slot{'s' * (slots > 1)}"] if slots else []
            console.print(f"{label}: {', '.join(part for part in said if part)}")


def _spread(lane: profile.Lane, here: int | None) -> str:
    if here is None or not lane.low_s or lane.low_s[here] == lane.high_s[here]:
        return ""
    return f"{lane.low_s[here]:.2f}-{lane.high_s[here]:.2f}"


def _at(values: Sequence[float], here: int | None, how: str) -> str:
    return format(values[here], how) if here is not None and values else ""


def _where(found: profile.Profile) -> str:
    """Where the faster lane changes, in words."""
    at = found.crossover
    if at is None:
        return "no crossover is known: see which lane is in bold"
    if at.low is None or at.high is None:
        return f"the lanes cross near {at.level:.1f} at once (not enough data for an interval)"
    return f"the lanes cross at {at.level:.1f} at once (95 %: {at.low:.1f} to {at.high:.1f})"
