"""What the gateway costs, measured beside nginx and beside no proxy at all.

Three ways to one fast fake engine, taken in turns on the same machine in the same
minutes, so that what is reported is a ratio and not the weather. Everything is watched
from outside: CPU seconds and memory of the proxy's whole process tree, what arrives at
a client, and when the engine sees a connection end. Nothing of the gateway is imported.

Here are the floors, the rounds, the arithmetic and the report. Who doubts a number reads
on in `fast_engine` (what is answered, and what makes it whole), `fast_client` (the load
and the meter) and `ways` (the processes and the hang-ups).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import uvloop
from rich.console import Console

from loadtests.bench.fast_client import (
    serve_jobs,
)
from loadtests.bench.fast_engine import serve_engine
from loadtests.bench.floors import Measured, verdicts_of
from loadtests.bench.rounds import Settings, measure
from loadtests.bench.script import BenchError
from loadtests.bench.tables import save, show
from loadtests.bench.ways import (
    WAYS,
)

# --- what is promised ---------------------------------------------------------------------


# --- the arithmetic -----------------------------------------------------------------------

"""Measure, then way, then one value a round."""
"""And what has to be remarked."""


# --- a run --------------------------------------------------------------------------------


# --- the report ---------------------------------------------------------------------------


HELP = """\
Three ways lead to one fast fake engine: direct, through nginx, through the gateway. Each
round measures all of them, in an order that is rotated, and the median of the rounds is
held against the floors. It takes about four minutes, wants nginx (apt-get install nginx)
and a machine that does nothing else, and uses the loopback interface only.

  streams   {streams} chat streams at once: chunks per CPU second of the proxy, and its memory
  JSON      short answers, {json_connections} connections: requests per CPU second of the proxy
  TTFT      one stream at a time, request by request in turn: what is added to direct
  hang-up   from the client's close() until the engine sees its connection end; for a
            request in the queue, until the gateway's GET /status no longer counts it
"""

EXAMPLES = """\
examples:
  python -m loadtests.bench.overhead                                what `make bench` runs
  python -m loadtests.bench.overhead --json bench.json              and keep every round
  python -m loadtests.bench.overhead --rounds 1 --seconds 2         a quick look; do not quote it
  python -m loadtests.bench.overhead --only direct,nginx            is the harness itself sound?

Every answer is checked, word by word; one that is broken ends the run without a result.
exit status: 0 all floors hold (or were not measured), 1 a floor is missed, 2 no result
"""


def _ways(text: str) -> tuple[str, ...]:
    ways = tuple(text.split(","))
    if unknown := set(ways) - set(WAYS):
        raise argparse.ArgumentTypeError(f"no such way: {', '.join(unknown)}; {', '.join(WAYS)}")
    return tuple(way for way in WAYS if way in ways)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    usual = Settings()
    made = argparse.ArgumentParser(
        prog="python -m loadtests.bench.overhead",
        description=HELP.format(streams=usual.streams, json_connections=usual.json_connections),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--rounds", type=int, default=usual.rounds, help="default %(default)s; floors want 5")
    add(
        "--seconds",
        type=float,
        default=usual.seconds,
        help="of each measurement of streams and JSON (default %(default)g)",
    )
    add("--streams", type=int, default=usual.streams, help="at once (default %(default)s)")
    add(
        "--rate",
        type=int,
        default=usual.rate,
        help="tokens a second in all streams (default %(default)s); lower it where the "
        "machine is too slow for its own load",
    )
    add(
        "--spread",
        action="store_true",
        help="spread the tokens of the streams evenly, instead of all in one step as vLLM "
        "sends them: dearer for every proxy, kinder in the ratio; the floors are not meant for it",
    )
    add(
        "--only",
        type=_ways,
        default=WAYS,
        metavar="WAYS",
        help="some of direct,nginx,gateway; floors that need another are not measured",
    )
    add("--json", type=Path, metavar="PATH", help="write all rounds and the machine there")
    return made


def main(
    argv: Sequence[str],
    measure: Callable[[Settings, Callable[[str], None]], Measured] = measure,
) -> int:
    """Run the benchmark; the exit status."""
    asked = parser().parse_args(argv)
    settings = Settings(
        ways=asked.only,
        rounds=asked.rounds,
        seconds=asked.seconds,
        streams=asked.streams,
        rate=asked.rate,
        spread=asked.spread,
    )
    console, progress = Console(), Console(stderr=True)
    try:
        measures, notes = measure(settings, progress.print)
    except BenchError as exc:
        progress.print(f"no result: {exc}", style="red", markup=False)
        return 2
    show(console, settings, measures, notes)
    if asked.json is not None:
        save(asked.json, argv, settings, measures, notes)
    missed = [verdict for verdict in verdicts_of(measures) if verdict.missed]
    for verdict in missed:
        progress.print(f"missed: {verdict}", style="red", markup=False)
    return 1 if missed else 0


if __name__ == "__main__":
    # The engine and the client are this command again, in processes of their own.
    match sys.argv[1:]:
        case ["engine"]:
            uvloop.run(serve_engine())
        case ["client"]:
            serve_jobs()
        case arguments:
            sys.exit(main(arguments))
