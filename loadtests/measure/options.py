"""What is to be measured, as it is asked for on Locust's command line or its page."""

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

#: More at once than this measures the load generator.
MAX_LEVEL = 1024
#: Requests of each user that count, where nobody says how many: a median needs ten.
ROUNDS = 10
#: How long a target may take to answer its first request: it may have to load the model.
LOAD_TIMEOUT_S = 900.0


class BadOptions(Exception):
    """What was asked for cannot be measured; the text says what to do."""


# What is measured


@dataclass(frozen=True)
class PlannedCell:
    """One target at one level, once; what workers are told."""

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
        unit = "/s" if self.loop == "open" else " at once"
        return f"{self.target.label}, {self.level:g}{unit}"


@dataclass(frozen=True)
class Load:
    """How all cells are measured.

    Attributes:
        rounds: Requests of each user that count, more where users are few; None: all until the
            time is up.
        at_least: Requests of a cell that count.
        arrivals: Requests that count in an open loop.
        run_s: After so many seconds it is over, whatever is left.
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
        """How many of a user's requests count in this cell; None: all until the time is up."""
        if self.rounds is None:
            return None
        return max(self.rounds, math.ceil(self.at_least / cell.users))

    def cells(self) -> Iterator[PlannedCell]:
        """Forth in odd repetitions, back in even ones."""
        number = itertools.count()
        for repetition in self.repetitions:
            for target in self.targets if repetition % 2 else reversed(self.targets):
                for level in self.levels:
                    yield PlannedCell(next(number), target, self.loop, level, repetition)


def option_adder(parser: Any, title: str) -> Callable[..., None]:
    """What adds options to Locust's, in a group of their own, and to its page.

    Those that every Locust file of ours has are there already.
    """
    group = parser.add_argument_group(title)

    def add(name: str, *, shown: bool = True, **how: Any) -> None:
        variable = "LOCUST" + name.removeprefix("-").replace("-", "_").upper()
        action = group.add_argument(name, **{"env_var": variable, **how})
        action.include_in_web_ui = shown
        action.is_secret = action.is_required = action.is_multiple = False

    add("--model", default="", help="its name of the model, for --host (the first it lists)")
    add(
        "--api-key",
        env_var="OPENAI_API_KEY",
        shown=False,  # what a page shows, anybody sees
        help="of whom is asked; written down nowhere",
    )
    add("--seed", type=int, default=1, help="of all dice (1)")
    add(
        "--raw",
        default=time.strftime("raw-%Y%m%d-%H%M%S.jsonl"),
        help="where every request is written, JSON lines; added to if it is there (raw-DATE.jsonl)",
    )
    return add


def add_options(parser: Any) -> None:
    """Add what `read_options` reads."""
    add = option_adder(parser, "what is measured")
    add(
        "--target",
        action="append",
        metavar="LABEL=URL=MODEL",
        help="whom to ask; may be repeated. Without: --host and --model",
    )
    add(
        "--levels",
        default="1,4,8,16,32",
        help="requests at once, one level after another (1,4,8,16,32); -u N is one level",
    )
    add(
        "--rate",
        default="",
        help="instead of levels: so many requests arrive a second, however many wait, as 0.5,1,2",
    )
    add("--arrivals", type=int, default=60, help="requests that count, with --rate (60)")
    add("--warm-up", type=int, default=1, help="requests of each user that do not count (1)")
    add(
        "--rounds",
        default="",
        help="requests of each user that count (10; with -u and -t as many as there is time for)",
    )
    add("--at-least", type=int, default=1, help="requests that count at a level: more rounds (1)")
    add("--repetitions", type=int, default=1, help="of everything, in alternating order (1)")
    add("--first-repetition", type=int, default=1, help="number of the first of them (1)")
    add("--tokens-in", type=int, default=80, help="of a prompt, about (80)")
    add("--tokens-out", type=int, default=64, help="of an answer, at most (64)")
    add(
        "--prompts",
        default="",
        help='a file of prompts: a line each, or JSON strings or {"prompt": …}',
    )
    add("--cell-s", type=float, default=600.0, help="longest a level may take, seconds (600)")
    add("--cooldown-s", type=float, default=2.0, help="pause before the next one, seconds (2)")


def read_options(options: Any, users: int | None) -> Load:
    """What the options ask for, with -u where it was given; raises `BadOptions`."""
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
    """See that these options are not below; raises `BadOptions`."""
    for name in names:
        if not getattr(options, name) >= least:
            raise BadOptions(f"{_flag(name)} {getattr(options, name)}: {least} at the least")


def require_positive(options: Any, *names: str) -> None:
    """See that these options are; raises `BadOptions`."""
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
    said = options.target or []
    if isinstance(said, str):  # the page has one field for all of them
        said = said.replace(",", " ").split()
    try:
        targets = tuple(Target.read(one, options.api_key) for one in said)
        if not targets:
            targets = (host_target(options),)
    except BadTarget as exc:
        raise BadOptions(str(exc)) from exc
    if len({target.label for target in targets}) < len(targets):
        raise BadOptions("--target: give every one a label of its own")
    return targets


def _levels(options: Any, users: int | None) -> tuple[float, ...]:
    option, text = ("--levels", options.levels) if users is None else ("-u", str(users))
    levels = parse_numbers(option, text)
    if max(levels) > MAX_LEVEL or any(level % 1 for level in levels):
        raise BadOptions(
            f"{option} {text}: write whole numbers from 1 to {MAX_LEVEL}; more at once than that "
            "measures the load generator"
        )
    return levels


def _rates(options: Any) -> tuple[float, ...]:
    rates = parse_numbers("--rate", options.rate)
    if max(rates) > MAX_LEVEL:
        raise BadOptions(
            f"--rate {options.rate}: at most {MAX_LEVEL} requests per second; a higher rate "
            "measures the load generator"
        )
    return rates


def parse_numbers(option: str, text: str) -> tuple[float, ...]:
    """`1,4,16`, each once; raises `BadOptions`."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < n < float("inf") for n in found):
        raise BadOptions(f"{option} {text}: write numbers above zero, as 1,4,16")
    return tuple(dict.fromkeys(found))


def host_target(options: Any) -> Target:
    """The one target of --host and --model; raises `BadTarget`."""
    if not options.host:
        raise BadTarget(
            "nobody to ask: give --host URL, or --target LABEL=URL=MODEL, as in "
            "--target ollama=http://127.0.0.1:11434=llama3.3:70b"
        )
    model = options.model or stopwatch.first_model(options.host, options.api_key)
    return Target.read(f"host={options.host}={model}", options.api_key)


def shareable_command(arguments: Sequence[str], key: str | None = None) -> list[str]:
    """A command line that others may read: without the key, and without anybody's folders."""
    shown = list(arguments)
    for place, short in ((str(Path.cwd()), "."), (str(Path.home()), "~")):
        if place != "/":
            shown = [word.replace(place, short) for word in shown]
    if key:
        hidden = [word.removesuffix(f"={key}") for word in shown]
        shown = ["..." if word == key else word for word in hidden]
    return shown


def preflight(target: Target) -> None:
    """See that a target answers, and have it load its model; raises `BadOptions`."""
    asked = stopwatch.request_body(target, [{"role": "user", "content": "Say hello."}], 4)
    timing = stopwatch.ask(target, asked, patience_s=LOAD_TIMEOUT_S)
    if timing.error is None:
        return
    hint = "is it running, and is this its address?"
    if timing.error.startswith(("401", "403")):
        hint = "give its key with --api-key or OPENAI_API_KEY"
    elif timing.error.startswith(("400", "404", "422")):
        hint = f"is {target.model} its own name of the model? See {target.url}/v1/models"
    elif timing.error[:1] == "5":
        hint = "it is there and cannot answer: look into its log"
    raise BadOptions(f"{target.label} at {target.url} does not answer ({timing.error}): {hint}")
