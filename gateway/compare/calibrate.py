"""`twolane calibrate`: the profile of one model, measured."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from backends.transport import http
from gateway.compare.engines import Lanes
from gateway.compare.show import show
from gateway.compare.targets import command_line, configured_model
from gateway.errors import UsageError
from gateway.routing import profile
from loadtests.analysis import crossover, rows
from loadtests.measure import experiment, samples
from loadtests.measure.calibrate import crossing_level, mean_seconds, measure
from loadtests.measure.experiment import ExperimentError, Plan, Subject
from loadtests.measure.generator import VisitFailed
from loadtests.measure.itinerary import Visit
from loadtests.measure.matrix import Session
from loadtests.measure.progress import ProgressBar
from loadtests.measure.samples import SamplesError


def calibrate(args: argparse.Namespace) -> None:
    """Run `twolane calibrate`."""
    try:
        asyncio.run(_calibrated(args, Console()))
    except (ExperimentError, SamplesError, VisitFailed, profile.ProfileError) as exc:
        raise UsageError(str(exc)) from exc


async def _calibrated(args: argparse.Namespace, console: Console) -> None:
    """Measure the lanes of one model, and write the profile."""
    plan = Plan(
        args.levels, 1, args.rounds, args.warm_up, args.tokens_in, args.tokens_out, args.cell_s,
        prompts=args.prompts or "",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="twolane-") as scratch:
        folder = Path(scratch)
        async with http.Client() as client:
            read, name, model = await configured_model(args, client)
            lanes = Lanes(read, model, client, folder)
            entrants = {one.label: one for one in lanes.entrants()}
            visits = [Visit(label, 1, plan.levels) for label in entrants]
            with ProgressBar(console, plan, visits) as view:
                async with Session(folder, plan, entrants, view) as session:
                    await measure(session, plan.levels, args.minutes)
                    subjects = session.subjects
        cells = rows.closed_cells(samples.read(folder / experiment.RAW))
    found = _profile(plan, subjects, cells)
    out = args.out or model.profile or Path(f"profile-{name}.json")
    profile.save(out, found)
    show(found, console)
    console.print(f"written to [bold]{out}[/]")
    if model.profile != out:
        console.print(f"let the gateway decide by it: models.{name}.profile: {out}")


def _profile(plan: Plan, subjects: Mapping[str, Subject], cells: rows.Cells) -> profile.Profile:
    """What was measured, as the gateway reads it."""
    table = rows.make_rows(cells, tokens_out=plan.tokens_out, limits=experiment.Limits())
    lanes = {}
    for label, subject in subjects.items():
        mine = [row for row in table if row.target == label and row.e2e is not None]
        by_repetition = crossover.seconds_by_level(cells, label)
        means = {n: [sum(of) / len(of) for of in by_repetition[n]] for n in sorted(by_repetition)}
        lanes[label] = profile.Lane(
            tuple(means),
            tuple(sum(of) / len(of) for of in means.values()),
            tuple(min(of) for of in means.values()),
            tuple(max(of) for of in means.values()),
            tuple(row.ttft.median if row.ttft else 0.0 for row in mine),
            tuple(row.tokens_per_s.value for row in mine),
            profile.Measured(
                subject.engine, subject.model, subject.version, subject.weights, subject.slots,
                subject.context, subject.command, subject.digest,
            ),
        )  # fmt: skip
    machine = experiment.this_machine({})
    return profile.Profile(
        profile.VERSION,
        "measured",
        lanes,
        machine=f"{machine.cpu}, {machine.cores} cores" + "".join(f", {g}" for g in machine.gpus),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        tokens_in=plan.tokens_in,
        tokens_out=plan.tokens_out,
        crossover=_crossover(list(subjects), cells),
        command=command_line(),
    )


def _crossover(labels: Sequence[str], cells: rows.Cells) -> profile.Crossover | None:
    if len(labels) != 2:
        return None
    known = crossover.find_crossover(
        *(crossover.seconds_by_level(cells, label) for label in labels)
    )
    if known.level is not None:
        return profile.Crossover(known.level, known.low, known.high)
    level = crossing_level(*(mean_seconds(cells, label) for label in labels))
    return profile.Crossover(level) if level is not None else None
