"""The options of our Locust files, from the command line or Locust's page, and their checks."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests.measure import samples, stopwatch
from loadtests.measure.prompts import Prompts, PromptsError
from loadtests.measure.stopwatch import BadTarget, Target

#: Highest number of concurrent requests, or requests per second: above it, the load generator
#: would be measured.
MAX_LEVEL = 1024
#: Default of measured requests per user: a median needs ten.
ROUNDS = 10
#: Timeout of a target's first answer, seconds: it may have to load the model.
LOAD_TIMEOUT_S = 900.0


class BadOptions(Exception):
    """The options cannot be measured; the message says what to do."""


@dataclass(frozen=True)
class PlannedCell:
    """One target at one level in one repetition, before it is measured."""

    number: int
    target: Target
    loop: samples.Loop
    level: float
    repetition: int

    @property
    def users(self) -> int:
        return 1 if self.loop == "open" else int(self.level)

    @property
    def name(self) -> str:
        unit = "/s" if self.loop == "open" else " concurrent"
        return f"{self.target.label}, {self.level:g}{unit}"


@dataclass(frozen=True)
class Load:
    """How all cells are measured.

    Attributes:
        rounds: Measured requests per user; None: all until the time is up.
        at_least: Measured requests of a cell at least: with few users, each has more rounds.
        arrivals: Measured requests in an open loop.
        run_s: Seconds after which the run ends, whatever is left.
    """

    targets: tuple[Target, ...]
    loop: samples.Loop
    levels: tuple[float, ...]
    repetitions: range
    rounds: int | None
    at_least: int
    warm_up: int
    arrivals: int
    tokens_out: int
    cell_s: float
    cooldown_s: float
    prompts: Prompts
    seed: int
    raw: Path
    run_s: float | None

    def rounds_of(self, cell: PlannedCell) -> int | None:
        """Measured requests per user in this cell; None: all until the time is up."""
        if self.rounds is None:
            return None
        return max(self.rounds, math.ceil(self.at_least / cell.users))

    def cells(self) -> Iterator[PlannedCell]:
        """All cells in order; even repetitions go through the targets in reverse."""
        number = itertools.count()
        for repetition in self.repetitions:
            for target in self.targets if repetition % 2 else reversed(self.targets):
                for level in self.levels:
                    yield PlannedCell(next(number), target, self.loop, level, repetition)


def option_adder(parser: Any, title: str) -> Callable[..., None]:
    """A function that adds an option to Locust's command line and page, in a group `title`.

    The options that all our Locust files have are added here.
    """
    group = parser.add_argument_group(title)

    def add(name: str, *, shown: bool = True, **how: Any) -> None:
        variable = "LOCUST" + name.removeprefix("-").replace("-", "_").upper()
        action = group.add_argument(name, **{"env_var": variable, **how})
        action.include_in_web_ui = shown
        action.is_secret = action.is_required = action.is_multiple = False

    add("--model", default="", help="model to request at --host (the first one it lists)")
    add(
        "--api-key",
        env_var="OPENAI_API_KEY",
        shown=False,  # everybody who opens the page could read it
        help="API key of the targets; it is sent and written nowhere",
    )
    add("--seed", type=int, default=1, help="seed of all random numbers (1)")
    add(
        "--raw",
        default=time.strftime("runs/raw-%Y%m%d-%H%M%S.jsonl"),
        help="file for every request, JSON lines; an existing file is appended to "
        "(runs/raw-DATE.jsonl)",
    )
    return add


def add_options(parser: Any) -> None:
    """Add the options that `read_options` reads."""
    add = option_adder(parser, "measurement")
    add(
        "--target",
        action="append",
        metavar="LABEL=URL=MODEL",
        help="a target to measure; may be repeated. Without it: --host and --model",
    )
    add(
        "--levels",
        default="1,4,8,16,32",
        help="numbers of concurrent requests, one after another (1,4,8,16,32); -u N is one level",
    )
    add(
        "--rate",
        default="",
        help="open loop instead of levels: requests per second, however many wait, as 0.5,1,2",
    )
    add("--arrivals", type=int, default=60, help="measured requests, with --rate (60)")
    add("--warm-up", type=int, default=1, help="requests per user before the measured ones (1)")
    add(
        "--rounds",
        default="",
        help="measured requests per user (10; with -u and -t as many as there is time for)",
    )
    add(
        "--at-least",
        type=int,
        default=1,
        help="measured requests of a level at least, by more rounds if need be (1)",
    )
    add("--repetitions", type=int, default=1, help="runs of all levels, in alternating order (1)")
    add("--first-repetition", type=int, default=1, help="number of the first repetition (1)")
    add("--tokens-in", type=int, default=80, help="tokens of a prompt, about (80)")
    add("--tokens-out", type=int, default=64, help="most tokens of an answer (64)")
    add(
        "--prompts",
        default="",
        help='a file of prompts, one a line: text, a JSON string or {"prompt": …}',
    )
    add("--cell-s", type=float, default=600.0, help="longest time of a level, seconds (600)")
    add("--cooldown-s", type=float, default=2.0, help="pause between two levels, seconds (2)")


def read_options(options: Any, users: int | None) -> Load:
    """The load that the options describe; `users` is -u if given. Raises `BadOptions`."""
    require_at_least(1, options, "repetitions", "first_repetition", "at_least", "arrivals")
    require_at_least(1, options, "tokens_in", "tokens_out")
    require_at_least(0, options, "warm_up", "cooldown_s")
    require_positive(options, "cell_s")
    first = options.first_repetition
    return Load(
        targets=_targets(options),
        loop="open" if options.rate else "closed",
        levels=_rates(options) if options.rate else _levels(options, users),
        repetitions=range(first, first + options.repetitions),
        rounds=_rounds(options, users),
        at_least=options.at_least,
        warm_up=options.warm_up,
        arrivals=options.arrivals,
        tokens_out=options.tokens_out,
        cell_s=options.cell_s,
        cooldown_s=options.cooldown_s,
        prompts=_prompts(options),
        seed=options.seed,
        raw=Path(options.raw),
        run_s=options.run_time,
    )


def require_at_least(least: int, options: Any, *names: str) -> None:
    """Raise `BadOptions` unless these options are `least` or more."""
    for name in names:
        if not getattr(options, name) >= least:
            raise BadOptions(f"{_flag(name)} {getattr(options, name)}: it must be at least {least}")


def require_positive(options: Any, *names: str) -> None:
    """Raise `BadOptions` unless these options are finite numbers above zero."""
    for name in names:
        if not 0 < getattr(options, name) < float("inf"):
            raise BadOptions(f"{_flag(name)} {getattr(options, name)}: write a number above zero")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _rounds(options: Any, users: int | None) -> int | None:
    if not options.rounds:
        return None if options.run_time and users else ROUNDS
    rounds = parse_numbers("--rounds", options.rounds)
    if len(rounds) > 1 or rounds[0] % 1:
        raise BadOptions(f"--rounds {options.rounds}: write one whole number")
    return int(rounds[0])


def _prompts(options: Any) -> Prompts:
    path = Path(options.prompts) if options.prompts else None
    try:
        return Prompts(options.tokens_in, options.seed, path)
    except PromptsError as exc:
        raise BadOptions(str(exc)) from exc


def _targets(options: Any) -> tuple[Target, ...]:
    texts = options.target or []
    if isinstance(texts, str):  # the page has one field for all of them
        texts = texts.replace(",", " ").split()
    try:
        targets = tuple(Target.read(text, options.api_key) for text in texts)
        if not targets:
            targets = (host_target(options),)
    except BadTarget as exc:
        raise BadOptions(str(exc)) from exc
    if len({target.label for target in targets}) < len(targets):
        raise BadOptions("--target: give every target a label of its own")
    return targets


def _levels(options: Any, users: int | None) -> tuple[float, ...]:
    option, text = ("--levels", options.levels) if users is None else ("-u", str(users))
    levels = parse_numbers(option, text)
    if max(levels) > MAX_LEVEL or any(level % 1 for level in levels):
        raise BadOptions(
            f"{option} {text}: write whole numbers from 1 to {MAX_LEVEL}; with more concurrent "
            "requests the load generator would be measured"
        )
    return levels


def _rates(options: Any) -> tuple[float, ...]:
    rates = parse_numbers("--rate", options.rate)
    if max(rates) > MAX_LEVEL:
        raise BadOptions(
            f"--rate {options.rate}: at most {MAX_LEVEL} requests per second; at a higher "
            "rate the load generator would be measured"
        )
    return rates


def parse_numbers(option: str, text: str) -> tuple[float, ...]:
    """The numbers of a text like `1,4,16`, each once; raises `BadOptions`."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 < n < float("inf") for n in numbers):
        raise BadOptions(f"{option} {text}: write numbers above zero, as 1,4,16")
    return tuple(dict.fromkeys(numbers))


def host_target(options: Any) -> Target:
    """The target that --host and --model name; raises `BadTarget`."""
    if not options.host:
        raise BadTarget(
            "no target: give --host URL, or --target LABEL=URL=MODEL, as in "
            "--target ollama=http://127.0.0.1:11434=llama3.3:70b"
        )
    model = options.model or stopwatch.first_model(options.host, options.api_key)
    return Target.read(f"host={options.host}={model}", options.api_key)


def shareable_command(arguments: Sequence[str], key: str | None = None) -> list[str]:
    """A command line for others to read: without the key, and with `.` and `~` for folders."""
    shown = list(arguments)
    for place, short in ((str(Path.cwd()), "."), (str(Path.home()), "~")):
        if place != "/":
            shown = [word.replace(place, short) for word in shown]
    if key:
        hidden = [word.removesuffix(f"={key}") for word in shown]
        shown = ["..." if word == key else word for word in hidden]
    return shown


def preflight(target: Target) -> None:
    """Send a first request, so that a target loads its model; raises `BadOptions` if it fails."""
    body = stopwatch.request_body(target, [{"role": "user", "content": "Say hello."}], 4)
    timing = stopwatch.ask(target, body, timeout_s=LOAD_TIMEOUT_S)
    if timing.error is None:
        return
    hint = "is it running, and is this its address?"
    if timing.error.startswith(("401", "403")):
        hint = "give its key with --api-key or OPENAI_API_KEY"
    elif timing.error.startswith(("400", "404", "422")):
        hint = f"does it list the model {target.model}? See {target.url}/v1/models"
    elif timing.error[:1] == "5":
        hint = "it runs, but cannot answer: see its log"
    raise BadOptions(f"{target.label} at {target.url} does not answer ({timing.error}): {hint}")
