"""Runs `twolane simulate`: from its arguments to tables, JSON and a picture."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from gateway import installation
from gateway.errors import UsageError
from gateway.routing import profile
from gateway.routing.profile import Profile, ProfileError
from gateway.simulate import profiles, trace_file
from gateway.simulate.choices import PROFILES, TRACES, TRACES_OF_ONE_TEAM
from gateway.simulate.comparison import Case, SimulationRecord, compare_all
from gateway.simulate.plot import check_plot, draw
from gateway.simulate.traces import Trace


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        UsageError: A trace, a profile or an output file cannot be used.
    """
    if args.plot is not None:
        check_plot(args.plot)
    cases = _cases(args)
    records: list[SimulationRecord] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("simulating", total=len(cases))
        for of_case in compare_all(cases, args.jobs):
            records += of_case
            progress.advance(task)
    order = {(case.label, _name(case.trace), case.people): n for n, case in enumerate(cases)}
    records.sort(key=lambda r: (order[r.profile, r.trace, r.people], r.handover_s))
    console = Console(stderr=args.json == "-")  # stdout has the JSON and nothing else
    for table in _tables(records):
        console.print(table)
    if args.json is not None:
        _write(args.json, records)
    if args.plot is not None:
        draw(args.plot, records)


# From arguments to cases


def _cases(args: argparse.Namespace) -> list[Case]:
    wanted = args.trace or (TRACES_OF_ONE_TEAM if args.people else ("all",))
    names = [of for name in wanted for of in (TRACES if name == "all" else (name,))]
    traces = [name if name in TRACES else _read(name) for name in dict.fromkeys(names)]
    default = ("measured",) if args.people or args.trace else ("all",)
    labelled = [pair for name in args.profile or default for pair in _profiles(name)]
    return [
        Case(
            trace=trace, label=label, profile=by, lanes=profiles.lanes_of(by),
            think_s=args.think_s or profiles.think_s(by),
            people=people if isinstance(trace, str) else trace.people,
            hours=args.hours, seed=args.seed, handovers_s=args.handover_s,
            policies=tuple(args.policy),
        )
        for label, by in labelled
        for trace in traces
        for people in dict.fromkeys(_teams(args, by) if isinstance(trace, str) else (0,))
    ]  # fmt: skip


def _teams(args: argparse.Namespace, by: Profile) -> Sequence[int]:
    think_s = args.think_s or profiles.think_s(by)
    return args.people or (profiles.balanced_team(by, think_s),)


def _read(name: str) -> Trace:
    path = Path(name)
    if not path.exists():
        raise UsageError(f"--trace {name}: neither a file nor one of {', '.join(TRACES)}, all")
    return trace_file.read(path)


def _profiles(name: str) -> list[tuple[str, Profile]]:
    if name == "all":
        return list(profiles.BUILT_IN.items())
    if name in profiles.BUILT_IN:
        return [(name, profiles.BUILT_IN[name])]
    path = Path(name)
    if not path.exists():
        raise UsageError(f"--profile {name}: neither a file nor one of {', '.join(PROFILES)}, all")
    try:
        by = profile.load(path)
    except ProfileError as exc:
        raise UsageError(str(exc)) from exc
    if len(profiles.lanes_of(by)) < 2:
        raise UsageError(
            f"--profile {name}: a simulation needs a profile of two lanes, and this one has "
            f"{', '.join(by.lanes) or 'none'}. Measure both: `{installation.program()} calibrate`."
        )
    return [(path.stem, by)]


def _name(trace: str | Trace) -> str:
    return trace if isinstance(trace, str) else trace.name


# From records to text


def _tables(records: Sequence[SimulationRecord]) -> list[Table]:
    """One table per profile."""
    by_profile: dict[str, list[SimulationRecord]] = defaultdict(list)
    for record in records:
        by_profile[record.profile].append(record)
    return [_table(label, of_profile) for label, of_profile in by_profile.items()]


def _table(label: str, records: Sequence[SimulationRecord]) -> Table:
    """A line per policy, a section per trace and hand-over time."""
    table = Table(
        title=f"{label}: mean seconds per request, ratio to the better single engine",
        title_justify="left",
        pad_edge=False,
        padding=(0, 2, 0, 0),
        box=None,
    )
    for name in ("trace", "people", "hand-over", "policy"):
        table.add_column(name, no_wrap=True)
    for name in ("mean s", "ratio", "p95 s", "moves/h"):
        table.add_column(name, justify="right", no_wrap=True)
    sections = groupby(records, key=lambda r: (r.trace, r.people, r.handover_s))
    for (trace, people, handover_s), of_day in sections:
        day = (trace, str(people or "?"), f"{handover_s:g} s")
        for record in of_day:
            table.add_row(
                *day, record.policy, f"{record.mean_s:.2f}", _ratio(record),
                f"{record.p95_s:.1f}", f"{record.moves_per_hour:.2f}",
            )  # fmt: skip
            day = ("", "", "")
        table.add_row()
    return table


def _ratio(record: SimulationRecord) -> str:
    style = "red" if record.ratio_fixed > 1.12 else "green" if record.ratio_fixed < 0.98 else "dim"
    return f"[{style}]{record.ratio_fixed:.2f}[/]"


def _write(where: str, records: Sequence[SimulationRecord]) -> None:
    text = msgspec.json.format(msgspec.json.encode(records), indent=1)
    if where == "-":
        sys.stdout.write(text.decode() + "\n")
        return
    try:
        Path(where).write_bytes(text + b"\n")
    except OSError as exc:
        raise UsageError(f"--json {where}: {exc.strerror}") from exc
