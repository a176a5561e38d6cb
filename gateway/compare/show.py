"""`twolane profile show`: a profile as a table and bars."""

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
from gateway.routing.profile import ASSUMED, LaneProfile, Profile, ProfileError, load


def show_profile(args: argparse.Namespace) -> None:
    """Run `twolane profile show`."""
    file = args.file
    if file is None and args.config is not None:
        models = settings.load(args.config, {}, settings.environment()).models
        name = args.model or next(iter(models), "")
        if name not in models:
            raise UsageError(
                f"there is no model {name} in the settings; they have: {', '.join(models)}"
            )
        file = models[name].profile
    try:
        print_profile(ASSUMED if file is None else load(file), Console())
    except ProfileError as exc:
        raise UsageError(str(exc)) from exc


def print_profile(profile: Profile, console: Console) -> None:
    """Print a profile: one row a level and lane, with a bar as long as its seconds."""
    console.print(f"[bold]{profile.summary(time.time())}[/] {profile.machine}")
    lanes = list(profile.lanes)
    levels = sorted({level for lane in profile.lanes.values() for level in lane.at_once})
    longest = max(lane.at(level) for lane in profile.lanes.values() for level in levels)
    table = Table("concurrent", "lane", "seconds", "", "spread", "TTFT, s", "tok/s", box=None)
    for level in levels:
        seconds = {label: profile.lanes[label].at(level) for label in lanes}
        best = min(seconds, key=lambda label: seconds[label])
        for label in lanes:
            lane = profile.lanes[label]
            index = lane.at_once.index(level) if level in lane.at_once else None
            table.add_row(
                str(level) if label == lanes[0] else "",
                f"[bold]{label}[/]" if label == best else label,
                f"{seconds[label]:.2f}" + ("" if index is not None else " ?"),
                Bar(
                    longest,
                    0,
                    seconds[label],
                    width=24,
                    color=KINDS[label].colour if label in KINDS else "default",
                ),
                _spread(lane, index),
                _value(lane.ttft_s, index, ".2f"),
                _value(lane.tokens_per_s, index, ".0f"),
            )
    console.print(table)
    console.print(_describe_crossover(profile))
    for label, lane in profile.lanes.items():
        if lane.on is not None:
            facts = [lane.on.engine, lane.on.version, lane.on.model, lane.on.weights]
            slots = lane.on.slots
            facts += [f"{slots} slot{'s' * (slots > 1)}"] if slots else []
            console.print(f"{label}: {', '.join(fact for fact in facts if fact)}")


def _spread(lane: LaneProfile, index: int | None) -> str:
    if index is None or not lane.low_s or lane.low_s[index] == lane.high_s[index]:
        return ""
    return f"{lane.low_s[index]:.2f}-{lane.high_s[index]:.2f}"


def _value(values: Sequence[float], index: int | None, style: str) -> str:
    return format(values[index], style) if index is not None and values else ""


def _describe_crossover(profile: Profile) -> str:
    crossover = profile.crossover
    if crossover is None:
        return "no crossover is known; the faster lane of each level is in bold"
    level, low, high = crossover.level, crossover.low, crossover.high
    if low is None or high is None:
        note = "(not enough data for an interval)"
        return f"the lanes cross near {level:.1f} concurrent requests {note}"
    return f"the lanes cross at {level:.1f} concurrent requests (95 %: {low:.1f} to {high:.1f})"
