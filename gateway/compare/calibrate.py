"""`twolane calibrate`: measure the profile that the gateway decides by."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from backends.transport import http
from gateway.compare.engines import LaneEntrants
from gateway.compare.interrupt import run_measurement
from gateway.compare.show import print_profile
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
        run_measurement(_calibrate(args, Console()))
    except (ExperimentError, SamplesError, VisitFailed, profile.ProfileError) as exc:
        raise UsageError(str(exc)) from exc


async def _calibrate(args: argparse.Namespace, console: Console) -> None:
    """Measure the lanes of one model, and write its profile."""
    plan = Plan(
        args.levels, 1, args.rounds, args.warm_up, args.tokens_in, args.tokens_out, args.cell_s,
        prompts=args.prompts or "",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="twolane-") as scratch:
        folder = Path(scratch)
        async with http.Client() as client:
            read, name, model = await configured_model(args, client)
            async with LaneEntrants(read, model, client, folder) as lanes:
                entrants = {entrant.label: entrant for entrant in lanes.entrants()}
                visits = [Visit(label, 1, plan.levels) for label in entrants]
                with ProgressBar(console, plan, visits) as view:
                    async with Session(folder, plan, entrants, view) as session:
                        await measure(session, plan.levels, args.minutes)
                        subjects = session.subjects
        cells = rows.closed_cells(samples.read(folder / experiment.RAW))
    measured = _profile(plan, subjects, cells)
    out = args.out or model.profile or Path(f"profile-{name}.json")
    profile.save(out, measured)
    print_profile(measured, console)
    console.print(f"written to [bold]{out}[/]")
    if model.profile != out:
        console.print(
            f"to let the gateway decide by it, set in twolane.yaml: models.{name}.profile: {out}"
        )


def _profile(plan: Plan, subjects: Mapping[str, Subject], cells: rows.Cells) -> profile.Profile:
    """The measurement as a profile."""
    table = rows.make_rows(cells, tokens_out=plan.tokens_out, limits=experiment.Limits())
    lanes = {}
    for label, subject in subjects.items():
        lane_rows = [row for row in table if row.target == label and row.e2e is not None]
        by_repetition = crossover.seconds_by_level(cells, label)
        means = {
            level: [sum(seconds) / len(seconds) for seconds in by_repetition[level]]
            for level in sorted(by_repetition)
        }
        lanes[label] = profile.LaneProfile(
            tuple(means),
            tuple(sum(of_level) / len(of_level) for of_level in means.values()),
            tuple(min(of_level) for of_level in means.values()),
            tuple(max(of_level) for of_level in means.values()),
            tuple(row.ttft.median if row.ttft else 0.0 for row in lane_rows),
            tuple(row.tokens_per_s.value for row in lane_rows),
            profile.MeasuredSetup(
                subject.engine, subject.model, subject.version, subject.weights, subject.slots,
                subject.context, subject.command, subject.digest,
            ),
        )  # fmt: skip
    machine = experiment.this_machine({})
    return profile.Profile(
        profile.VERSION,
        "measured",
        lanes,
        machine=f"{machine.cpu}, {machine.cores} cores"
        + "".join(f", {gpu}" for gpu in machine.gpus),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        tokens_in=plan.tokens_in,
        tokens_out=plan.tokens_out,
        crossover=_crossover(list(subjects), cells),
        command=command_line(),
    )


def _crossover(labels: Sequence[str], cells: rows.Cells) -> profile.Crossover | None:
    """The crossover of two lanes, without an interval where there is too little data for one."""
    if len(labels) != 2:
        return None
    estimate = crossover.find_crossover(
        *(crossover.seconds_by_level(cells, label) for label in labels)
    )
    if estimate.level is not None:
        return profile.Crossover(estimate.level, estimate.low, estimate.high)
    level = crossing_level(*(mean_seconds(cells, label) for label in labels))
    return profile.Crossover(level) if level is not None else None
