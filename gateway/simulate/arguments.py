"""The command line of `twolane simulate`. The command itself is imported when it is called."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from gateway.simulate.choices import MAX_PEOPLE, POLICIES, PROFILES, TRACES, TRACES_OF_ONE_TEAM

HANDOVERS_S = (5.0, 12.0, 25.0, 60.0)
HOURS = 8.0

SIMULATE_HELP = """\
examples:
  twolane simulate --people 12 --handover-s 12
      12 people on this kind of machine, where a hand-over takes 12 seconds
  twolane simulate --people 12 --profile profiles/chat.json
      the same with the profile that `twolane calibrate` measured on this machine
  twolane simulate --trace office-double --profile all --json -
      a working day of twice the team on every built-in profile, as JSON
  twolane simulate --trace people.csv
      your own day: lines of SECONDS,PEOPLE, each valid until the next; the last is the end
  twolane serve 2> gateway.log; twolane simulate --trace gateway.log
      the requests of a real day, at the times when they arrived
  twolane simulate
      every trace on every built-in profile at four hand-over times: takes minutes

how to read the result:
  During a hand-over every request waits. It pays only if the other engine stays the faster
  one for long enough afterwards, which nobody can know in advance. Two references say how
  good a policy was.
  Ratio: its mean seconds per request over those of the better single engine. 1.00 is as
  good as having known which of the two engines to install; less is better than either.
  Clairvoyant: the best plan for a day that is known in advance, found by dynamic
  programming in slices of 10 s, or the better single engine where no plan was better. No
  real policy reaches it, and none has a bound against it: a move costs as much as the
  demand that it delays.

"""


def add_command(commands: Any) -> None:
    """Add `simulate` to the commands of `twolane`.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
    """
    parser = commands.add_parser(
        "simulate",
        help="replay a day of demand and see what the policy would do",
        description="Replay a day of demand through the gateway's policy and through others, on "
        "a virtual clock. It is about models of which only one engine fits on the GPU. No engine "
        "is started or called. People ask, read, think and ask again; both engines answer in the "
        "seconds of a profile; a hand-over lets running answers end, and then every request waits.",
        epilog=SIMULATE_HELP + _choices(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_demand(parser)
    _add_machine(parser)
    _add_output(parser)
    parser.set_defaults(run=_run)


def _add_demand(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trace", nargs="+", metavar="NAME|FILE",
        help="how many people are there when, see below (default: all; with --people: "
        + ", ".join(TRACES_OF_ONE_TEAM) + ")",
    )  # fmt: skip
    parser.add_argument(
        "--people", nargs="+", type=_people, metavar="N",
        help="size of the team (default: as many as both engines serve equally well; 12 where one "
        "engine is always better)",
    )  # fmt: skip
    parser.add_argument(
        "--hours", type=_positive, default=HOURS, metavar="H",
        help=f"length of a built-in trace; a working day is stretched to it (default: {HOURS:g})",
    )  # fmt: skip
    parser.add_argument(
        "--think-s", type=_positive, metavar="S",
        help="mean seconds between an answer and the next question (default: 8 times what the "
        "faster engine takes for one request alone)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=1,
        help="seed of the random numbers: the same seed gives the same day (default: 1)",
    )  # fmt: skip


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile", nargs="+", metavar="NAME|FILE",
        help="seconds per request by lane and demand, see below; all: each built-in one (default: "
        "all; with --people or --trace: measured)",
    )  # fmt: skip
    parser.add_argument(
        "--handover-s", type=_numbers, default=HANDOVERS_S, metavar="S,S",
        help="seconds from the last answer of one engine to the first of the other "
        "(default: 5,12,25,60)",
    )  # fmt: skip
    parser.add_argument(
        "--policy", nargs="+", choices=tuple(POLICIES), default=tuple(POLICIES), metavar="POLICY",
        help=f"policies to compare: {', '.join(POLICIES)} (default: all)",
    )  # fmt: skip


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--jobs", type=_people, default=os.cpu_count() or 1, metavar="N",
        help="processes to use (default: one per processor)",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE|-", help="write every result here, as a list")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.svg", help="draw the results; .svg, .png or .pdf"
    )


def _choices() -> str:
    lines: list[str] = []
    for title, names in (
        ("traces (of a team of N, see --people):", TRACES),
        ("profiles:", PROFILES),
        ("policies:", POLICIES),
    ):
        lines += [title, *(f"  {name:<14} {meaning}" for name, meaning in names.items()), ""]
    return "\n".join(lines[:-1])


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")
    return number


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _people(text: str) -> int:
    number = _positive(text)
    if number != int(number) or number > MAX_PEOPLE:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {MAX_PEOPLE}")
    return int(number)


def _run(args: argparse.Namespace) -> None:
    from gateway.simulate import command  # noqa: PLC0415 - see the module's docstring

    command.run(args)
