"""`twolane compare`: measure the configured lanes against each other, and write a report.

`loadtests` measures; it knows URLs and nothing of the gateway. This package knows the rest:
which engines a configuration has, how they are started, stopped and given the GPU, and what they
report. It also puts a gateway in front of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from importlib import metadata
from pathlib import Path

import msgspec
from rich.console import Console

from backends.transport import http
from gateway import installation, settings
from gateway.compare.engines import LaneEntrants
from gateway.compare.front import gateway_arguments, gateway_entrant
from gateway.compare.interrupt import run_measurement
from gateway.compare.targets import command_line, configured_model, server_entrants
from gateway.errors import UsageError
from gateway.gpu.cards import Nvml, total_watts
from gateway.gpu.memory import MemoryUnknown
from loadtests.measure import matrix
from loadtests.measure.experiment import (
    EXPERIMENT,
    EXPERIMENT_VERSION,
    SELFCHECK,
    Experiment,
    ExperimentError,
    Limits,
    Plan,
    Prices,
    load,
    this_machine,
)
from loadtests.measure.matrix import Entrant
from loadtests.measure.samples import SamplesError
from loadtests.measure.stopwatch import BadTarget, Target
from loadtests.proof import selfcheck
from loadtests.report import report

#: Packages whose versions a report names.
PACKAGES = ("twolane", "locust", "gevent", "httpx", "plotly", "matplotlib")


def compare(args: argparse.Namespace) -> None:
    """Run `twolane compare`; exits with 1 where a target could not be measured."""
    try:
        sys.exit(run_measurement(_compare(args, Console())))
    except (ExperimentError, SamplesError, BadTarget) as exc:
        raise UsageError(str(exc)) from exc


def _experiment(args: argparse.Namespace) -> tuple[argparse.Namespace, Path, Experiment]:
    """The arguments, folder and experiment: new ones, or those of the experiment to resume."""
    machine = this_machine(_packages())
    if args.resume:
        resumed = matrix.check_same_machine(args.resume, load(args.resume), machine)
        original = args.parser.parse_args([*shlex.split(resumed.command)[2:]])
        original.key, original.unchecked = args.key, args.unchecked
        return original, args.resume, resumed
    limits = Limits(args.good_ttft_s, args.good_tpot_s, args.good_e2e_s)
    plan = Plan(
        args.levels, args.repetitions, args.rounds, args.warm_up, args.tokens_in, args.tokens_out,
        args.cell_s, prompts=args.prompts or "",
    )  # fmt: skip
    new = Experiment(
        EXPERIMENT_VERSION,
        time.time(),
        machine,
        plan,
        (),
        limits,
        command_line(args.key),
    )
    folder = args.out or Path(time.strftime("compare-%Y%m%d-%H%M"))
    if (folder / EXPERIMENT).exists():
        raise ExperimentError(
            f"{folder} holds an experiment already; to continue it: --resume {folder}"
        )
    return args, folder, new


def _packages() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


async def _compare(given: argparse.Namespace, console: Console) -> int:
    """Check, measure, report; the exit code: 0 where every target could be measured."""
    args, folder, experiment = _experiment(given)
    async with http.Client() as client, AsyncExitStack() as opened:
        entrants = await _entrants(args, folder, client, opened)
        experiment = _with_entrants(args, folder, experiment, entrants)
        passed = await _stopwatch_passed(args, folder, experiment, console)
        labels = ", ".join(entrant.label for entrant in entrants)
        console.print(f"measuring {labels} into [bold]{folder}[/]")
        watts = await power_meter(Nvml())
        try:
            failures = await matrix.run(folder, experiment, entrants, console, watts)
        except asyncio.CancelledError:
            command = f"{installation.program()} compare --resume {folder}"
            console.print(f"\nstopped; {folder} has what is measured, to continue: {command}")
            raise
    page = report.write(folder, unchecked=not passed)
    console.print(
        f"the report is [bold]{page}[/], with report.md, report.json and charts beside it"
    )
    return 1 if failures else 0


async def _entrants(
    args: argparse.Namespace, folder: Path, client: http.Client, opened: AsyncExitStack
) -> list[Entrant]:
    """The given targets, or the lanes of a configured model with a gateway in front of them."""
    if args.target:
        key = args.key or settings.environment().get("OPENAI_API_KEY")
        return await server_entrants([Target.read(text, key) for text in args.target], client)
    read, name, model = await configured_model(args, client)
    lanes = await opened.enter_async_context(LaneEntrants(read, model, client, folder))
    entrants = lanes.entrants(args.ollama_slots)
    if not args.no_gateway:
        before = [entrant.label for entrant in entrants]
        entrants.append(gateway_entrant(gateway_arguments(args), read, name, before, folder))
    return entrants


def _with_entrants(
    args: argparse.Namespace, folder: Path, experiment: Experiment, entrants: Sequence[Entrant]
) -> Experiment:
    """The experiment with these entrants, and the prices of the settings.

    Raises:
        BadTarget: Two entrants have one label.
        ExperimentError: The experiment to resume has other entrants.
    """
    labels = [entrant.label for entrant in entrants]
    if len(set(labels)) < len(labels):
        raise BadTarget(f"each target needs its own label, and these are: {', '.join(labels)}")
    if experiment.subjects and [subject.label for subject in experiment.subjects] != labels:
        raise ExperimentError(f"{folder} has other targets: begin a new experiment with --out")
    cost = settings.load(args.config, {}, settings.environment()).cost
    return msgspec.structs.replace(
        experiment,
        subjects=tuple(entrant.subject for entrant in entrants),
        cost=Prices(**cost.model_dump()),
    )


async def power_meter(nvml: Nvml) -> matrix.Watts | None:
    """Reads the power draw of all cards, watts; None where a card does not report it."""

    async def watts() -> float | None:
        try:
            return total_watts(await asyncio.to_thread(nvml.readings))
        except MemoryUnknown:
            return None

    return None if await watts() is None else watts


async def _stopwatch_passed(
    args: argparse.Namespace, folder: Path, experiment: Experiment, console: Console
) -> bool:
    """Whether the stopwatch passed its check here; a passed check of the folder counts.

    Raises:
        ExperimentError: It did not pass, and `--unchecked` is not given.
    """
    level = max(experiment.plan.levels)
    check = selfcheck.load(folder) if (folder / SELFCHECK).exists() else None
    if check is None or not check.passed or check.level < level:
        console.print(
            f"checking the stopwatch with {level} concurrent requests on a server of known times"
        )
        check = await asyncio.to_thread(selfcheck.check, level, processes=args.processes)
        check.save(folder)
    if not check.passed and not args.unchecked:
        raise ExperimentError(
            f"the stopwatch failed its check, so nothing was measured: {check.why}"
        )
    return check.passed
