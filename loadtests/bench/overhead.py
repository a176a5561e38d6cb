"""The overhead of the gateway, measured beside nginx and beside no proxy at all.

Three ways lead to one fast fake engine. They are measured in turns on the same machine in
the same minutes, so that the result is a ratio. Everything is observed from outside: CPU
seconds and memory of the proxy's whole process tree, the bytes that arrive at a client, and
when the engine sees a connection end. Nothing of the gateway is imported.

This module is the command. `floors` has the measures and limits, `rounds` what a round does, and
`tables` the output. `script` has the requests and the check of every answer. `fast_engine` and
`fast_client` are the two ends, and `ways` has the processes and the client disconnects.
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

HELP = """\
Three ways lead to one fast fake engine: direct, through nginx, through the gateway. Each
round measures all of them in rotated order, and the median of the rounds is compared with
the floors. It takes about four minutes, needs nginx (apt-get install nginx) and an
otherwise idle machine, and uses the loopback interface only.

  streams      {streams} concurrent chat streams: chunks per CPU second of the proxy, its memory
  JSON         short answers, {json_connections} connections: requests per CPU second of the proxy
  TTFT         one stream at a time, alternating between the ways: the time added to direct
  disconnects  from the client's close() until the engine sees its connection end; for a
               queued request, until the gateway's GET /status no longer counts it
"""

EXAMPLES = """\
examples:
  python -m loadtests.bench.overhead                                what `make bench` runs
  python -m loadtests.bench.overhead --json bench.json              and keep every round
  python -m loadtests.bench.overhead --rounds 1 --seconds 2         quick, too short to quote
  python -m loadtests.bench.overhead --only direct,nginx            checks the harness itself

Every answer is checked word by word; a broken one ends the run without a result.
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
    add("--rounds", type=int, default=usual.rounds, help="default %(default)s; the floors need 5")
    add(
        "--seconds",
        type=float,
        default=usual.seconds,
        help="seconds of each measurement of streams and JSON (default %(default)g)",
    )
    add("--streams", type=int, default=usual.streams, help="concurrent (default %(default)s)")
    add(
        "--rate",
        type=int,
        default=usual.rate,
        help="tokens per second of all streams (default %(default)s); lower it if the machine "
        "is too slow for its own load",
    )
    add(
        "--spread",
        action="store_true",
        help="spread the tokens of the streams evenly, not all in one step as vLLM sends them: "
        "every proxy needs more CPU, and ratios are closer to 1; the floors do not apply",
    )
    add(
        "--only",
        type=_ways,
        default=WAYS,
        metavar="WAYS",
        help="some of direct,nginx,gateway; floors that need others are not measured",
    )
    add("--json", type=Path, metavar="PATH", help="write all rounds and the machine to this file")
    return made


def main(
    argv: Sequence[str],
    measure: Callable[[Settings, Callable[[str], None]], Measured] = measure,
) -> int:
    """Run the benchmark; the exit status, see `--help`."""
    args = parser().parse_args(argv)
    settings = Settings(
        ways=args.only,
        rounds=args.rounds,
        seconds=args.seconds,
        streams=args.streams,
        rate=args.rate,
        spread=args.spread,
    )
    console, progress = Console(), Console(stderr=True)
    try:
        measures, notes = measure(settings, progress.print)
    except BenchError as exc:
        progress.print(f"no result: {exc}", style="red", markup=False)
        return 2
    show(console, settings, measures, notes)
    if args.json is not None:
        save(args.json, argv, settings, measures, notes)
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
