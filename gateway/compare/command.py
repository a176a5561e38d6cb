"""`twolane compare` and `twolane calibrate`: the lanes of a configuration on trial.

The measuring is `loadtests`'s, which knows URLs and nothing of us. Here is what it cannot
know: which engines a configuration has, how they are started, stopped and given the GPU,
what they say of themselves, and how a gateway is put in front of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from backends.base import Engine, Identity
from backends.errors import BackendError
from backends.kinds import KINDS, Kind
from backends.processes.supervised import Supervised
from backends.transport import http
from gateway import settings
from gateway.gpu.handover import Occupant
from gateway.gpu.memory import MemoryUnknown, Nvml, drawn
from gateway.routing import profile
from gateway.serving import discovery
from gateway.settings import Settings, SettingsError
from loadtests.analysis import crossover, rows
from loadtests.measure import calibrate, experiment, samples
from loadtests.measure import matrix as compare
from loadtests.measure.experiment import Experiment, ExperimentError, Plan, Subject
from loadtests.measure.generator import VisitFailed
from loadtests.measure.itinerary import Visit
from loadtests.measure.matrix import Entrant, Session
from loadtests.measure.options import shareable_command
from loadtests.measure.progress import ProgressBar
from loadtests.measure.samples import SamplesError
from loadtests.measure.stopwatch import BadTarget, Target
from loadtests.proof import selfcheck
from loadtests.report import report

NEEDS = "the experiment needs its extra: pip install 'twolane[load]'"
GATEWAY = "gateway"
#: How long a gateway may take to be ready, engines that it starts included, seconds.
READY_S = 900.0
#: Of what made the load, the versions that a report names.
PACKAGES = ("twolane", "locust", "gevent", "httpx", "plotly", "matplotlib")

COMPARE = """\
examples:
  twolane compare --config twolane.yaml
      every lane of the file's model, Ollama with one slot and with sixteen, and the gateway
      in front of them, at 1, 4, 8, 16 and 32 at once, three times over
  twolane compare --pair chat=ollama:llama3.3:70b,vllm:llama-70b-awq --levels 16,32
      the classic: engines that run already, found on their usual ports
  twolane compare --target a=http://127.0.0.1:8001=llama --target b=http://other:8000=llama
      anything that speaks OpenAI's API
  twolane compare --resume compare-20261123-0900
      go on after Ctrl-C, a crash or a power cut

Engines whose `command` is in the settings are started and stopped, one at a time; others
are used as they run, and in an exclusive placement the GPU is handed from one to the next.
Nobody else should use the machine meanwhile: every figure would be theirs, too.
"""

CALIBRATE = """\
examples:
  twolane calibrate --config twolane.yaml --out chat.json
      measure both lanes of the file's model, a quarter of an hour at most
  twolane calibrate --pair chat=ollama:llama3.3:70b,vllm:llama-70b-awq --minutes 5
      the same for engines that run already

Then write `profile: chat.json` under the model in twolane.yaml, and the gateway decides by
it; `twolane profile show chat.json` draws it.
"""


def add_commands(commands: Any, pair: Callable[[str], Any]) -> None:
    """Add `compare` and `calibrate` to the commands of `twolane`.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
        pair: Reads `NAME=ollama:MODEL,vllm:MODEL`.
    """
    compare = commands.add_parser(
        "compare",
        help="measure the engines against each other, and write a report",
        description="Measure every engine at every number of requests at once, several times "
        "over in alternating order, and write a report: report.html, report.md, report.json and "
        "pictures. The stopwatch is checked first.",
        epilog=COMPARE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_subjects(compare, pair)
    compare.add_argument(
        "--target", action="append", default=[], metavar="LABEL=URL=MODEL",
        help="measure this, in place of a configuration's lanes; may be repeated",
    )  # fmt: skip
    compare.add_argument(
        "--key", help="key of the targets (or OPENAI_API_KEY); it is written down nowhere"
    )
    compare.add_argument(
        "--levels", type=_levels, default=(1, 4, 8, 16, 32), metavar="N,N",
        help="requests at once (1,4,8,16,32)",
    )  # fmt: skip
    compare.add_argument(
        "--repetitions", type=_count, default=3, metavar="N", help="of the whole matrix (3)"
    )
    _add_load(compare, rounds=10)
    compare.add_argument(
        "--ollama-slots", type=_levels, default=(1, 16), metavar="N,N",
        help="OLLAMA_NUM_PARALLEL of each Ollama to measure, where we start it (1,16: as "
        "installed, and matched)",
    )  # fmt: skip
    compare.add_argument(
        "--no-gateway", action="store_true", help="measure the engines alone, not the gateway"
    )
    for name, what in (("ttft", "first token"), ("tpot", "token"), ("e2e", "whole answer")):
        compare.add_argument(
            f"--good-{name}-s", type=_seconds, metavar="S",
            help=f"an answer is good (goodput) within so many seconds a {what}; levels are added "
            "until it is known how many at once get good ones",
        )  # fmt: skip
    compare.add_argument("--out", type=Path, metavar="FOLDER", help="for everything (compare-DATE)")
    compare.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with what is there")
    compare.add_argument(
        "--unchecked", action="store_true",
        help="write a report even if the stopwatch did not pass its check; it will say so",
    )  # fmt: skip
    compare.add_argument(
        "--processes", type=_count, default=1, metavar="N", help="of the load generator (1)"
    )
    compare.set_defaults(run=_compare, parser=compare)

    calibrate = commands.add_parser(
        "calibrate",
        help="measure a profile for the gateway to decide by",
        description="Measure how long a request takes on each lane at each number at once, "
        "closer and closer around the point where the other lane becomes the faster one, and "
        "write the profile that the gateway decides by.",
        epilog=CALIBRATE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_subjects(calibrate, pair)
    calibrate.add_argument(
        "--levels", type=_levels, default=(1, 4, 16, 32), metavar="N,N",
        help="to begin with; more are added where the lanes cross (1,4,16,32)",
    )  # fmt: skip
    calibrate.add_argument(
        "--minutes", type=_seconds, default=15.0, metavar="M",
        help="after so many nothing new is begun (15)",
    )  # fmt: skip
    _add_load(calibrate, rounds=5)
    calibrate.add_argument(
        "--out", type=Path, metavar="FILE.json",
        help="the profile (where the settings' model has it, else profile-MODEL.json)",
    )  # fmt: skip
    calibrate.set_defaults(run=_calibrate)

    looked = commands.add_parser("profile", help="look at what the gateway decides by")
    actions = looked.add_subparsers(required=True, metavar="ACTION")
    shown = actions.add_parser(
        "show",
        help="draw a profile",
        description="Draw a profile: seconds a request on each lane at each number at once, the "
        "faster lane in bold, and where they cross. Without a file: what a model of the settings "
        "has, or the built-in one, which is assumed. A ? marks what lies between two "
        "measured levels or beyond the last.",
    )
    shown.add_argument("file", type=Path, nargs="?", metavar="FILE.json")
    shown.add_argument("--config", type=Path, metavar="FILE", help="the gateway's settings, YAML")
    shown.add_argument("--model", metavar="NAME", help="which of them (the first)")
    shown.set_defaults(run=_show)


def _add_subjects(parser: argparse.ArgumentParser, pair: Callable[[str], Any]) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="the gateway's settings, YAML")
    parser.add_argument("--model", metavar="NAME", help="which of them (the first with two lanes)")
    parser.add_argument(
        "--pair", action="append", default=[], type=pair, metavar="NAME=ollama:MODEL,vllm:MODEL",
        help="models of engines that run already",
    )  # fmt: skip


def _add_load(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    parser.add_argument(
        "--rounds", type=_count, default=rounds, metavar="N",
        help=f"measured requests of each user at each level ({rounds})",
    )  # fmt: skip
    parser.add_argument(
        "--warm-up", type=_count, default=1, metavar="N", help="requests before those (1)"
    )
    parser.add_argument(
        "--tokens-in", type=_count, default=80, metavar="N", help="of a prompt, about (80)"
    )
    parser.add_argument(
        "--tokens-out", type=_count, default=64, metavar="N", help="of an answer, at most (64)"
    )
    parser.add_argument("--prompts", metavar="FILE", help="prompts of your own, one a line")
    parser.add_argument(
        "--cell-s", type=_seconds, default=600.0, metavar="S", help="longest a level may take (600)"
    )


def _levels(text: str) -> tuple[int, ...]:
    try:
        levels = sorted({int(part) for part in text.split(",")})
    except ValueError:
        levels = []
    if not levels or levels[0] < 1 or levels[-1] > 1024:
        raise argparse.ArgumentTypeError(
            f"{text!r}: write numbers from 1 to 1024, as 1,4,16; more at once than that "
            "measures the load generator"
        )
    return tuple(levels)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 is needed")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 10**6:
        raise argparse.ArgumentTypeError(f"{text!r}: a number above 0 is needed")
    return seconds


# Who is measured


class Lanes:
    """The lanes of one model in a configuration, and how each is made to serve alone.

    Args:
        read: The settings.
        model: The settings of the model.
        client: What talks to the engines.
        folder: For what engines of ours say.
    """

    def __init__(
        self, read: Settings, model: settings.Model, client: http.Client, folder: Path
    ) -> None:
        self._read = read
        self._model = model
        self._client = client
        self._folder = folder
        self._running: list[Occupant] = []  # those that are not ours to stop

    def entrants(self, ollama_slots: Sequence[int | None] = (None,)) -> list[Entrant]:
        """Every lane; Ollama once for each number of slots, where it is ours to start."""
        found = []
        for kind, lane in self._model.lanes.items():
            ours = bool(self._read.engines[kind].command)
            several = ollama_slots if KINDS[kind].slots_variable and ours else (None,)
            found += [self._entrant(kind, lane, slots) for slots in several]
        return found

    def _entrant(self, kind: Kind, lane: settings.Lane, slots: int | None) -> Entrant:
        own = self._read.engines[kind]
        url = (lane.urls or own.urls)[0]
        key = own.api_key.get_secret_value() if own.api_key else None
        engine = KINDS[kind].engine(url, self._client, api_key=key)
        process = None
        if own.command:
            environment = dict(own.environment)
            if slots is not None:
                environment[KINDS[kind].slots_variable] = str(slots)
            log = own.log or self._folder / f"{kind}.log"
            process = Supervised(own.command, log, environment)
        occupant = Occupant(engine, [lane.model], process=process)
        if process is None:
            self._running.append(occupant)
        subject = Subject(
            label=kind if slots in (None, 1) else f"{kind}-{slots}",
            url=url,
            model=lane.model,
            engine=kind,
            slots=slots or lane.slots or KINDS[kind].slots,
            context=lane.context,
            command=shlex.join(shareable_command(own.command)),
        )
        target = Target(subject.label, url, lane.model, key)
        return Entrant(subject, target, partial(self._serving, occupant, subject))

    @asynccontextmanager
    async def _serving(self, occupant: Occupant, subject: Subject) -> AsyncIterator[Subject]:
        """The one engine that serves, where only one can."""
        try:
            async with asyncio.timeout(self._read.gpu.load_s):
                if self._model.placement == "exclusive":
                    for other in self._running:
                        if other is not occupant:
                            await other.give()
                await occupant.take()
            facts = await described(occupant.engine, subject)
        except TimeoutError:
            await occupant.stop()
            raise VisitFailed(
                f"{subject.label} does not serve after {self._read.gpu.load_s:g} s (gpu.load_s)"
            ) from None
        except BackendError as exc:
            await occupant.stop()
            raise VisitFailed(f"{subject.label} does not serve: {exc}") from exc
        try:
            yield facts
        finally:
            await occupant.stop()


def in_front(
    arguments: Sequence[str], read: Settings, name: str, before: Sequence[str], folder: Path
) -> Entrant:
    """A gateway of our own in front of the lanes, with everything on.

    Args:
        arguments: Of `twolane serve`, to serve what is measured.
        read: The settings that these lead to.
        name: The model's public name.
        before: Labels of the lanes behind it.
        folder: For what it says.
    """
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "gateway", "serve", *arguments, "--port", str(port)]
    environment = {k: v for k, v in settings.environment().items() if k.startswith("TWOLANE_")}
    process = Supervised(command, folder / "gateway.log", environment)
    subject = Subject(
        label=GATEWAY,
        url=url,
        model=name,
        engine=GATEWAY,
        version=metadata.version("twolane"),
        command=shlex.join(shareable_command(["twolane", "serve", *arguments])),
        before=tuple(before),
    )
    key = next(iter(read.keys()), None)

    @asynccontextmanager
    async def running() -> AsyncIterator[Subject]:
        try:
            await process.start()
            await _until_settled(url, process)
        except BackendError as exc:
            await process.stop()
            raise VisitFailed(f"the gateway does not serve: {exc}") from exc
        try:
            yield subject
        finally:
            await process.stop()

    return Entrant(subject, Target(GATEWAY, url, name, key), running)


async def _until_settled(url: str, process: Supervised) -> None:
    """Return when every lane serves that can, not just any; raises `BackendError`.

    A gateway answers as soon as one lane does; an engine that still loads beside it would be
    in every figure.
    """
    deadline = time.monotonic() + READY_S
    waits = "it says nothing"
    async with http.Client() as client:
        while process.running:
            with contextlib.suppress(http.HttpError, msgspec.DecodeError):
                answer = await client.request(
                    http.Origin.of(url), "GET", "/ready", {}, b"", connect_s=2, head_s=5
                )
                said = msgspec.json.decode(await answer.read_all(2**20))
                answer.close(reuse=False)
                gpu = said.get("gpu")  # who has it serves, and the other cannot
                settled = gpu["step"] == "held" if gpu else not said["waiting_for"]
                if said["ready"] and settled:
                    return
                waits = f"it waits for {said['waiting_for']}"
            if time.monotonic() > deadline:
                raise BackendError(f"after {READY_S:g} s {waits}")
            await asyncio.sleep(0.2)
    raise BackendError(process.last_words())


async def described(engine: Engine, subject: Subject) -> Subject:
    """A subject with what its engine says of itself, now that it serves."""
    found, context = Identity(), subject.context
    with contextlib.suppress(BackendError):
        found = await engine.identity(subject.model)
    with contextlib.suppress(BackendError):
        context = context or (await engine.capabilities(subject.model)).context
    return msgspec.structs.replace(
        subject,
        version=found.version,
        weights=found.weights or _precision(subject.command),
        digest=found.digest,
        slots=found.slots or subject.slots,
        context=context,
    )


def _precision(command: str) -> str:
    """What a vLLM was told about its weights, where we have its command line."""
    words = shlex.split(command)
    for flag in ("--quantization", "-q", "--dtype"):
        if flag in words[:-1]:
            return words[words.index(flag) + 1]
    return ""


async def _strangers(targets: Sequence[Target], client: http.Client) -> list[Entrant]:
    """Targets of which only the address is known."""
    found = []
    for target in targets:
        kind = await discovery.kind_of(client, target.url)
        subject = Subject(target.label, target.url, target.model, engine=kind or "")
        found.append(Entrant(subject, target, partial(compare.as_it_is, subject)))
    return found


async def _configured(
    args: argparse.Namespace, client: http.Client
) -> tuple[Settings, str, settings.Model]:
    """The settings, and the model of them that is to be measured; raises `SettingsError`."""
    overrides: dict[str, Any] = {"pair": dict(args.pair)} if args.pair else {}
    read = settings.load(args.config, overrides, settings.environment())
    if not read.engines:
        found = await discovery.find(client, discovery.USUAL, own_port=0)
        engines = {kind: settings.Engine(urls=(url,)) for kind, url in found.items()}
        read = read.model_copy(update={"engines": engines})
    models = read.served()
    if not models:
        raise SettingsError(
            "no model to measure: name one in the settings (--config), give one of each engine "
            "that runs (--pair), or any address (--target)"
        )
    name = args.model or max(models, key=lambda one: len(models[one].lanes))
    if name not in models:
        raise SettingsError(f"there is no model {name}; there are: {', '.join(models)}")
    for kind in models[name].lanes:
        if kind not in read.engines:
            raise SettingsError(
                f"{name} has a lane on {kind}, and no {kind} runs on its usual port: start it, or "
                f"say where it is in the settings (engines.{kind}.urls)"
            )
    return read, name, models[name]


def _gateway_arguments(args: argparse.Namespace) -> list[str]:
    """Of a gateway that serves what is measured."""
    arguments = ["--config", str(args.config)] if args.config else []
    for name, lanes in args.pair:
        pairs = ",".join(f"{kind}:{model}" for kind, model in lanes.items())
        arguments += ["--pair", f"{name}={pairs}"]
    return arguments


# compare


def _compare(args: argparse.Namespace) -> None:
    _need_the_extra()
    try:
        sys.exit(asyncio.run(_compared(args, Console())))
    except (ExperimentError, SamplesError, BadTarget) as exc:
        raise SettingsError(str(exc)) from exc


def _need_the_extra() -> None:
    missing = [name for name in ("locust", "plotly") if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(NEEDS)


def _begun(args: argparse.Namespace) -> tuple[argparse.Namespace, Path, Experiment]:
    """What to measure, and where: as said now, or as it was said of what is gone on with."""
    machine = experiment.this_machine(_packages())
    if args.resume:
        found = compare.resumed(args.resume, experiment.load(args.resume), machine)
        said = args.parser.parse_args([*shlex.split(found.command)[2:]])
        said.key, said.unchecked = args.key, args.unchecked
        return said, args.resume, found
    limits = experiment.Limits(args.good_ttft_s, args.good_tpot_s, args.good_e2e_s)
    plan = Plan(
        args.levels, args.repetitions, args.rounds, args.warm_up, args.tokens_in, args.tokens_out,
        args.cell_s, prompts=args.prompts or "",
    )  # fmt: skip
    begun = Experiment(
        experiment.EXPERIMENT_VERSION, time.time(), machine, plan, (), limits, _said(args.key)
    )
    folder = args.out or Path(time.strftime("compare-%Y%m%d-%H%M"))
    if (folder / experiment.EXPERIMENT).exists():
        raise ExperimentError(f"{folder} holds an experiment: go on with --resume {folder}")
    return args, folder, begun


def _said(key: str | None = None) -> str:
    """What this was called with."""
    return shlex.join(["twolane", *shareable_command(sys.argv[1:], key)])


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
            entrants = await _strangers([Target.read(one, key) for one in args.target], client)
        else:
            read, name, model = await _configured(args, client)
            entrants = Lanes(read, model, client, folder).entrants(args.ollama_slots)
            if not args.no_gateway:
                before = [one.label for one in entrants]
                arguments = _gateway_arguments(args)
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
            failures = await compare.run(folder, begun, entrants, console, await metered(Nvml()))
        except asyncio.CancelledError:
            console.print(f"\nkept in {folder}; go on with: twolane compare --resume {folder}")
            raise
    page = report.write(folder, unchecked=not checked)
    console.print(f"the report is [bold]{page}[/], and beside it report.md, report.json, pictures")
    return 1 if failures else 0


async def metered(nvml: Nvml) -> compare.Watts | None:
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


# calibrate


def _calibrate(args: argparse.Namespace) -> None:
    _need_the_extra()
    try:
        asyncio.run(_calibrated(args, Console()))
    except (ExperimentError, SamplesError, VisitFailed, profile.ProfileError) as exc:
        raise SettingsError(str(exc)) from exc


async def _calibrated(args: argparse.Namespace, console: Console) -> None:
    """Measure the lanes of one model, and write the profile."""
    plan = Plan(
        args.levels, 1, args.rounds, args.warm_up, args.tokens_in, args.tokens_out, args.cell_s,
        prompts=args.prompts or "",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="twolane-") as scratch:
        folder = Path(scratch)
        async with http.Client() as client:
            read, name, model = await _configured(args, client)
            lanes = Lanes(read, model, client, folder)
            entrants = {one.label: one for one in lanes.entrants()}
            visits = [Visit(label, 1, plan.levels) for label in entrants]
            with ProgressBar(console, plan, visits) as view:
                async with Session(folder, plan, entrants, view) as session:
                    await calibrate.measure(session, plan.levels, args.minutes)
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
        command=_said(),
    )


def _crossover(labels: Sequence[str], cells: rows.Cells) -> profile.Crossover | None:
    if len(labels) != 2:
        return None
    known = crossover.find_crossover(
        *(crossover.seconds_by_level(cells, label) for label in labels)
    )
    if known.level is not None:
        return profile.Crossover(known.level, known.low, known.high)
    level = calibrate.crossing_level(*(calibrate.mean_seconds(cells, label) for label in labels))
    return profile.Crossover(level) if level is not None else None


# profile


def _show(args: argparse.Namespace) -> None:
    file = args.file
    if file is None and args.config is not None:
        models = settings.load(args.config, {}, settings.environment()).models
        name = args.model or next(iter(models), "")
        if name not in models:
            raise SettingsError(f"there is no model {name}; there are: {', '.join(models)}")
        file = models[name].profile
    try:
        show(profile.ASSUMED if file is None else profile.load(file), Console())
    except profile.ProfileError as exc:
        raise SettingsError(str(exc)) from exc


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
