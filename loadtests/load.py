"""What is to be measured, as it is asked for on Locust's command line or its page."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests import samples, stopwatch
from loadtests.prompts import Prompts, PromptsError
from loadtests.stopwatch import BadTarget, Target

#: More at once than this measures the load generator.
MOST = 1024
#: How long a target may take to answer its first request: it may have to load the model.
FIRST_ANSWER_S = 900.0


class BadOptions(Exception):
    """What was asked for cannot be measured; the text says what to do."""


# What is measured


@dataclass(frozen=True)
class Cell:
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
    raw: Path
    run_s: float | None

    def rounds_of(self, cell: Cell) -> int | None:
        """How many of a user's requests count in this cell; None: all until the time is up."""
        if self.rounds is None:
            return None
        return max(self.rounds, math.ceil(self.at_least / cell.users))

    def cells(self) -> Iterator[Cell]:
        """Forth in odd repetitions, back in even ones."""
        number = itertools.count()
        for repetition in self.repetitions:
            for target in self.targets if repetition % 2 else reversed(self.targets):
                for level in self.levels:
                    yield Cell(next(number), target, self.loop, level, repetition)


def add_options(parser: Any) -> None:
    """Add ours to Locust's, in a group of their own, and to its page."""
    group = parser.add_argument_group("what is measured")

    def add(name: str, **how: Any) -> None:
        shown = how.pop("shown", True)
        action = group.add_argument(name, **how)
        action.include_in_web_ui = shown
        action.is_secret = action.is_required = action.is_multiple = False

    add(
        "--target",
        action="append",
        default=[],
        metavar="LABEL=URL=MODEL",
        help="whom to ask; may be repeated. Without: --host and --model",
    )
    add("--model", default="", help="its name of the model, for --host (the first it lists)")
    add(
        "--api-key",
        env_var="OPENAI_API_KEY",
        shown=False,  # what a page shows, anybody sees
        help="of the targets; written down nowhere",
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
    add("--rounds", type=int, default=10, help="requests of each user that count (10)")
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
    add("--seed", type=int, default=1, help="of the prompts' words (1)")
    add("--raw", default="", help="where every request is written, JSON lines (raw-DATE.jsonl)")


def read_options(options: Any, users: int | None) -> Load:
    """What the options ask for, with -u where it was given; raises `BadOptions`."""
    for name in (
        "rounds",
        "repetitions",
        "first_repetition",
        "tokens_in",
        "tokens_out",
        "arrivals",
    ):
        if getattr(options, name) < 1:
            raise BadOptions(f"--{name.replace('_', '-')} {getattr(options, name)}: 1 at the least")
    if options.warm_up < 0 or options.cell_s <= 0 or options.cooldown_s < 0:
        raise BadOptions("--warm-up, --cell-s and --cooldown-s are not below zero")
    first = options.first_repetition
    return Load(
        targets=_targets(options),
        loop="open" if options.rate else "closed",
        levels=numbers("--rate", options.rate) if options.rate else _levels(options, users),
        repetitions=range(first, first + options.repetitions),
        rounds=None if options.run_time and users else options.rounds,
        at_least=options.at_least,
        warm_up=options.warm_up,
        arrivals=options.arrivals,
        tokens_out=options.tokens_out,
        cell_s=options.cell_s,
        cooldown_s=options.cooldown_s,
        prompts=_prompts(options),
        raw=Path(options.raw or time.strftime("raw-%Y%m%d-%H%M%S.jsonl")),
        run_s=options.run_time,
    )


def _prompts(options: Any) -> Prompts:
    path = Path(options.prompts) if options.prompts else None
    try:
        return Prompts(options.tokens_in, options.seed, path)
    except PromptsError as exc:
        raise BadOptions(str(exc)) from exc


def _targets(options: Any) -> tuple[Target, ...]:
    # The page has one field for all of them.
    said = options.target.split() if isinstance(options.target, str) else options.target
    try:
        targets = tuple(Target.read(one, options.api_key) for one in said)
        if not targets:
            targets = (the_host(options),)
    except BadTarget as exc:
        raise BadOptions(str(exc)) from exc
    if len({target.label for target in targets}) < len(targets):
        raise BadOptions("--target: give every one a label of its own")
    return targets


def _levels(options: Any, users: int | None) -> tuple[float, ...]:
    levels = (float(users),) if users else numbers("--levels", options.levels)
    if max(levels) > MOST or any(level % 1 for level in levels):
        raise BadOptions(
            f"--levels {options.levels}: write whole numbers from 1 to {MOST}; more at once than "
            "that measures the load generator"
        )
    return levels


def numbers(option: str, text: str) -> tuple[float, ...]:
    """`1,4,16`; raises `BadOptions`."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < n < float("inf") for n in found):
        raise BadOptions(f"{option} {text}: write numbers above zero, as 1,4,16")
    return found


def the_host(options: Any) -> Target:
    """The one target of --host and --model; raises `BadTarget`."""
    if not options.host:
        raise BadTarget(
            "nobody to ask: give --host URL, or --target LABEL=URL=MODEL, as in "
            "--target ollama=http://127.0.0.1:11434=llama3.3:70b"
        )
    model = options.model or stopwatch.first_model(options.host, options.api_key)
    return Target.read(f"host={options.host}={model}", options.api_key)


def without_key(arguments: Sequence[str]) -> list[str]:
    """A command line less what nobody may read later."""
    kept = []
    words = iter(arguments)
    for word in words:
        if word == "--api-key":
            next(words, None)
        elif not word.startswith("--api-key="):
            kept.append(word)
    return kept


def preflight(target: Target) -> None:
    """See that a target answers, and have it load its model; raises `BadOptions`."""
    asked = stopwatch.body(target, [{"role": "user", "content": "Say hello."}], 4)
    timing = stopwatch.ask(target, asked, patience_s=FIRST_ANSWER_S)
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
