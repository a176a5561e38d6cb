"""`twolane simulate`: what the policy would do, without an engine and in seconds."""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from gateway.routing import profile
from gateway.routing.profile import Profile, ProfileError
from gateway.settings import SettingsError
from gateway.simulate import study, traces
from gateway.simulate.study import ALWAYS, CLAIRVOYANT, OURS, Case, Record

#: What answers "what if we were N people": a day, and the ways N people may be there.
ONE_SIZE = ("constant", "office", "bursts", "flash-crowd")
HANDOVERS_S = (5.0, 12.0, 25.0, 60.0)
HOURS = 8.0

EXAMPLES = """\
examples:
  twolane simulate --people 12 --handover-s 12
      what would happen here with 12 people, if a hand-over takes 12 seconds
  twolane simulate --people 12 --profile profiles/chat.json
      the same on this machine, by the profile that was measured on it
  twolane simulate --trace office-double --profile all --json -
      a working day of twice the team on every built-in profile, for a program to read
  twolane simulate --trace people.csv
      a day of your own: lines of SECONDS,PEOPLE, each until the next, the last one ends it
  twolane serve 2> gateway.log; twolane simulate --trace gateway.log
      the requests that really came, as they came
  twolane simulate
      every trace on every built-in profile at four hand-over times: minutes

how to read it:
  A hand-over makes everybody wait, and pays only if the other engine stays the faster one
  for long enough afterwards, which nobody can know. So a policy is held against the better
  single engine in hindsight (ratio 1.00: as good as having known which of the two to
  install; below: better than either), and against the best plan found by somebody who knew
  who would come when (clairvoyant: by dynamic programming in slices of 10 s, or a single
  engine where no plan was better; nobody can reach it). Against that one no policy has a
  bound: a move costs as much as the demand that it delays.

"""


def add_command(commands: Any) -> None:
    """Add `simulate` to the commands of `twolane`.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
    """
    parser = commands.add_parser(
        "simulate",
        help="replay a day of demand and see what the policy would do",
        description="Replay demand through the gateway's own policy and others, on a virtual "
        "clock, for models of which only one engine fits on the GPU: nothing is started and "
        "nothing is asked. People ask, read, think and ask again; both engines serve as a "
        "profile says; a hand-over lets running answers end and then makes everybody wait.",
        epilog=EXAMPLES + _choices(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--trace", nargs="+", metavar="NAME|FILE",
        help="who is there when, see below (all; with --people: " + ", ".join(ONE_SIZE) + ")",
    )  # fmt: skip
    parser.add_argument(
        "--profile", nargs="+", metavar="NAME|FILE",
        help="seconds a request by lane and demand, see below; all: each built-in one (all; "
        "with --people or --trace: measured)",
    )  # fmt: skip
    parser.add_argument(
        "--handover-s", type=_numbers, default=HANDOVERS_S, metavar="S,S",
        help="seconds from the last answer of one engine to the first of the other (5,12,25,60)",
    )  # fmt: skip
    parser.add_argument(
        "--people",
        nargs="+",
        type=_people,
        metavar="N",
        help="size of the team (so many as "
        "both engines serve equally well; 12 where one is always better)",
    )
    parser.add_argument(
        "--hours", type=_positive, default=HOURS, metavar="H",
        help=f"how long a built-in trace is; a working day is stretched to it ({HOURS:g})",
    )  # fmt: skip
    parser.add_argument(
        "--think-s", type=_positive, metavar="S",
        help="mean seconds between an answer and the next question (8 times what the faster "
        "lane takes for one alone)",
    )  # fmt: skip
    parser.add_argument(
        "--policy", nargs="+", choices=study.POLICIES, default=study.POLICIES, metavar="POLICY",
        help=f"which to compare: {', '.join(study.POLICIES)} (all)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=1, help="of the dice; same seed, same day (1)")
    parser.add_argument(
        "--jobs", type=_people, default=os.cpu_count() or 1, metavar="N",
        help="processes to use (as many as there are processors)",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE|-", help="write every result here, as a list")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.svg", help="draw the results; .svg, .png or .pdf"
    )
    parser.set_defaults(run=_simulate)


def _choices() -> str:
    lines = ["traces (of a team of N, see --people):"]
    lines += [f"  {name:<14} {what}" for name, (_, what) in traces.BUILT_IN.items()]
    lines += ["", "profiles:"]
    lines += [f"  {name:<14} {what}" for name, (_, what) in study.PROFILES.items()]
    lines += [
        "",
        "policies:",
        "  ours           the gateway's: moves when staying has lost what a move costs",
        "  always         each engine by itself",
        "  crossover      the faster engine at this demand, at once",
        "  high-low       more than 8 go to vLLM, fewer than 3 come back, 30 s dwell",
        "  clairvoyant    knows who will come when",
    ]
    return "\n".join(lines)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above zero")
    return number


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _people(text: str) -> int:
    number = _positive(text)
    if number != int(number) or number > traces.MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to {traces.MOST}")
    return int(number)


# What it does


def _simulate(args: argparse.Namespace) -> None:
    if args.plot is not None:
        _can_draw(args.plot)
    cases = _cases(args)
    records: list[Record] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating", total=len(cases))
        for found in study.study(cases, args.jobs):
            records += found
            progress.advance(task)
    order = {(case.label, _name(case.trace), case.people): n for n, case in enumerate(cases)}
    records.sort(key=lambda one: (order[one.profile, one.trace, one.people], one.handover_s))
    console = Console(stderr=args.json == "-")  # what a program reads is that alone
    for table in _tables(records):
        console.print(table)
    if args.json is not None:
        _write(args.json, records)
    if args.plot is not None:
        _draw(args.plot, records)


def _cases(args: argparse.Namespace) -> list[Case]:
    wanted = args.trace or (ONE_SIZE if args.people else ("all",))
    names = [one for name in wanted for one in (traces.BUILT_IN if name == "all" else (name,))]
    found = [name if name in traces.BUILT_IN else _read(name) for name in dict.fromkeys(names)]
    usual = ("measured",) if args.people or args.trace else ("all",)
    known = [pair for name in args.profile or usual for pair in _profiles(name)]
    return [
        Case(
            trace=trace, label=label, profile=by, lanes=study.lanes_of(by),
            think_s=args.think_s or study.think_s(by),
            people=people if isinstance(trace, str) else trace.people,
            hours=args.hours, seed=args.seed, handovers_s=args.handover_s,
            policies=tuple(args.policy),
        )
        for label, by in known
        for trace in found
        for people in dict.fromkeys(_teams(args, by) if isinstance(trace, str) else (0,))
    ]  # fmt: skip


def _teams(args: argparse.Namespace, by: Profile) -> Sequence[int]:
    return args.people or (study.team(by, args.think_s or study.think_s(by)),)


def _read(name: str) -> traces.Trace:
    path = Path(name)
    if not path.exists():
        raise SettingsError(
            f"--trace {name}: neither a file nor one of {', '.join(traces.BUILT_IN)}, all"
        )
    return traces.read(path)


def _profiles(name: str) -> list[tuple[str, Profile]]:
    if name == "all":
        return [(label, by) for label, (by, _) in study.PROFILES.items()]
    if name in study.PROFILES:
        return [(name, study.PROFILES[name][0])]
    path = Path(name)
    if not path.exists():
        raise SettingsError(
            f"--profile {name}: neither a file nor one of {', '.join(study.PROFILES)}, all"
        )
    try:
        by = profile.load(path)
    except ProfileError as exc:
        raise SettingsError(str(exc)) from exc
    if len(study.lanes_of(by)) < 2:
        raise SettingsError(
            f"--profile {name}: it takes two lanes to choose between, and it has "
            f"{', '.join(by.lanes) or 'none'}"
        )
    return [(path.stem, by)]


def _name(trace: str | traces.Trace) -> str:
    return trace if isinstance(trace, str) else trace.name


# What it shows


def _tables(records: Sequence[Record]) -> list[Table]:
    """One table a profile: a line a trace and hand-over time, a column a policy."""
    by_profile: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_profile[record.profile].append(record)
    return [_table(label, found) for label, found in by_profile.items()]


def _table(label: str, records: Sequence[Record]) -> Table:
    policies = list(dict.fromkeys(record.policy for record in records))
    table = Table(
        title=f"{label}: mean seconds a request (against the better single lane); p95 of ours",
        title_justify="left",
        pad_edge=False,
    )
    table.add_column("trace", min_width=max(len(record.trace) for record in records))
    for name in ("people", "hand-over"):
        table.add_column(name)
    for policy in policies:
        table.add_column(policy, justify="right")
    if OURS in policies:
        table.add_column("our p95", justify="right")
        table.add_column("moves/h", justify="right")
    rows: dict[tuple[str, int, float], dict[str, Record]] = defaultdict(dict)
    for record in records:
        rows[record.trace, record.people, record.handover_s][record.policy] = record
    for (trace, people, handover_s), row in rows.items():
        cells = [_cell(row[policy]) if policy in row else "" for policy in policies]
        if OURS in policies:
            cells += [f"{row[OURS].p95_s:.1f}", f"{row[OURS].moves_per_hour:.2f}"]
        table.add_row(trace, str(people or "?"), f"{handover_s:g} s", *cells)
    return table


def _cell(record: Record) -> str:
    ratio = f"{record.ratio_fixed:.2f}"
    style = "red" if record.ratio_fixed > 1.12 else "green" if record.ratio_fixed < 0.98 else "dim"
    return f"{record.mean_s:.2f} [{style}]{ratio}[/]"


def _write(where: str, records: Sequence[Record]) -> None:
    said = msgspec.json.format(msgspec.json.encode(records), indent=1)
    if where == "-":
        sys.stdout.write(said.decode() + "\n")
        return
    try:
        Path(where).write_bytes(said + b"\n")
    except OSError as exc:
        raise SettingsError(f"--json {where}: {exc.strerror}") from exc


# What it draws


def _can_draw(path: Path) -> None:
    """Say what is missing before the minutes of work, not after."""
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise SettingsError(f"--plot {path}: write a name that ends in .svg, .png or .pdf")
    try:
        import matplotlib as mpl  # noqa: PLC0415 - only who draws needs it
    except ImportError as exc:
        raise SettingsError(
            "--plot needs matplotlib, which comes with the extra `load`: "
            "pip install 'twolane[load]'"
        ) from exc
    mpl.use("agg")


def _draw(path: Path, records: Sequence[Record]) -> None:
    """A panel a profile: for each trace, every policy against the better single lane."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - see `_can_draw`

    labels = list(dict.fromkeys(record.profile for record in records))
    names = list(dict.fromkeys(f"{record.trace} ({record.people})" for record in records))
    policies = [
        policy
        for policy in dict.fromkeys(record.policy for record in records)
        if not policy.startswith(ALWAYS)
    ]
    figure = Figure(figsize=(4 + 4 * len(labels), 2 + 0.35 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(labels), sharey=True, squeeze=False)[0]
    marks = {OURS: ("o", "tab:blue"), CLAIRVOYANT: ("|", "tab:green")}
    for panel, label in zip(panels, labels, strict=True):
        for policy in policies:
            found = [one for one in records if one.profile == label and one.policy == policy]
            mark, colour = marks.get(policy, ("x", "tab:orange" if "-" in policy else "tab:red"))
            panel.scatter(
                [one.ratio_fixed for one in found],
                [names.index(f"{one.trace} ({one.people})") for one in found],
                marker=mark, color=colour, label=policy, alpha=0.7,
            )  # fmt: skip
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.set_xscale("log")
        panel.set_title(label)
        panel.set_xlabel("mean seconds, against the better single lane")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    panels[-1].legend()
    try:
        figure.savefig(path)
    except OSError as exc:
        raise SettingsError(f"--plot {path}: {exc.strerror}") from exc
