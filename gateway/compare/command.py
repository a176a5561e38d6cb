"""`twolane compare` and `twolane calibrate`: the lanes of a configuration on trial.

The measuring is `loadtests`'s, which knows URLs and nothing of us. Here is what it cannot
know: which engines a configuration has, how they are started, stopped and given the GPU,
what they say of themselves, and how a gateway is put in front of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shlex
import sys
import time
from importlib import metadata
from pathlib import Path

import msgspec
from rich.console import Console

from backends.transport import http
from gateway import settings
from gateway.compare.engines import Lanes
from gateway.compare.front import gateway_arguments, in_front
from gateway.compare.targets import command_line, configured_model, other_targets
from gateway.errors import UsageError
from gateway.gpu.memory import MemoryUnknown, Nvml, drawn
from loadtests.measure import experiment, matrix
from loadtests.measure.experiment import Experiment, ExperimentError, Plan
from loadtests.measure.samples import SamplesError
from loadtests.measure.stopwatch import BadTarget, Target
from loadtests.proof import selfcheck
from loadtests.report import report

#: Of what made the load, the versions that a report names.
PACKAGES = ("twolane", "locust", "gevent", "httpx", "plotly", "matplotlib")


def compare(args: argparse.Namespace) -> None:
    """Run `twolane compare`; exits with 1 where a target could not be measured."""
    try:
        sys.exit(asyncio.run(_compared(args, Console())))
    except (ExperimentError, SamplesError, BadTarget) as exc:
        raise UsageError(str(exc)) from exc


def _begun(args: argparse.Namespace) -> tuple[argparse.Namespace, Path, Experiment]:
    """What to measure, and where: as said now, or as it was said of what is gone on with."""
    machine = experiment.this_machine(_packages())
    if args.resume:
        found = matrix.check_same_machine(args.resume, experiment.load(args.resume), machine)
        said = args.parser.parse_args([*shlex.split(found.command)[2:]])
        said.key, said.unchecked = args.key, args.unchecked
        return said, args.resume, found
    limits = experiment.Limits(args.good_ttft_s, args.good_tpot_s, args.good_e2e_s)
    plan = Plan(
        args.levels, args.repetitions, args.rounds, args.warm_up, args.tokens_in, args.tokens_out,
        args.cell_s, prompts=args.prompts or "",
    )  # fmt: skip
    begun = Experiment(
        experiment.EXPERIMENT_VERSION,
        time.time(),
        machine,
        plan,
        (),
        limits,
        command_line(args.key),
    )
    folder = args.out or Path(time.strftime("compare-%Y%m%d-%H%M"))
    if (folder / experiment.EXPERIMENT).exists():
        raise ExperimentError(f"{folder} holds an experiment: go on with --resume {folder}")
    return args, folder, begun


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


async def _compared(asked: argparse.Namespace, console: Console) -> int:
    """Check, measure, report; 0 where every target could be measured."""
    args, folder, begun = _begun(asked)
    async with http.Client() as client:
        cost = settings.load(args.config, {}, settings.environment()).cost
        if args.target:
            key = args.key or settings.environment().get("OPENAI_API_KEY")
            entrants = await other_targets([Target.read(one, key) for one in args.target], client)
        else:
            read, name, model = await configured_model(args, client)
            entrants = Lanes(read, model, client, folder).entrants(args.ollama_slots)
            if not args.no_gateway:
                before = [one.label for one in entrants]
                arguments = gateway_arguments(args)
                entrants.append(in_front(arguments, read, name, before, folder))
        labels = [one.label for one in entrants]
        if len(set(labels)) < len(labels):
            raise BadTarget(f"every target needs a label of its own: {', '.join(labels)}")
        if begun.subjects and [one.label for one in begun.subjects] != labels:
            raise ExperimentError(f"{folder} was begun with other targets: begin a new one")
        begun = msgspec.structs.replace(
            begun,
            subjects=tuple(one.subject for one in entrants),
            cost=experiment.Prices(**cost.model_dump()),
        )
        checked = await _checked(args, folder, begun, console)
        console.print(f"measuring {', '.join(labels)} into [bold]{folder}[/]")
        try:
            failures = await matrix.run(folder, begun, entrants, console, await metered(Nvml()))
        except asyncio.CancelledError:
            console.print(f"\nkept in {folder}; go on with: twolane compare --resume {folder}")
            raise
    page = report.write(folder, unchecked=not checked)
    console.print(f"the report is [bold]{page}[/], and beside it report.md, report.json, pictures")
    return 1 if failures else 0


async def metered(nvml: Nvml) -> matrix.Watts | None:
    """What reads the watts of these cards; None where there is none that tells them."""

    async def watts() -> float | None:
        try:
            return drawn(await asyncio.to_thread(nvml.readings))
        except MemoryUnknown:
            return None

    return None if await watts() is None else watts


async def _checked(
    args: argparse.Namespace, folder: Path, begun: Experiment, console: Console
) -> bool:
    """Whether the stopwatch can be trusted here; raises `ExperimentError` if it must be."""
    level = max(begun.plan.levels)
    found = selfcheck.load(folder) if (folder / experiment.SELFCHECK).exists() else None
    if found is None or not found.passed or found.level < level:
        console.print(f"checking the stopwatch on a server of known times, {level} at once")
        found = await asyncio.to_thread(selfcheck.check, level, processes=args.processes)
        found.save(folder)
    if not found.passed and not args.unchecked:
        raise ExperimentError(f"the stopwatch is off, so nothing was measured: {found.why}")
    return found.passed
