"""The command lines of `twolane compare`, `twolane calibrate` and `twolane profile show`.

Nothing heavy is imported here: the work is imported when a command is called.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gateway import installation
from gateway.errors import UsageError

COMPARE_EXAMPLES = """\
examples:
  twolane compare --config twolane.yaml
      every lane of the file's model, Ollama with one slot and with sixteen, and a gateway in
      front of them, with 1, 4, 8, 16 and 32 concurrent requests, three times over
  twolane compare --pair chat=ollama:llama3.3:70b,vllm:llama-70b-awq --levels 16,32
      engines that run already, found on their usual ports
  twolane compare --target a=http://127.0.0.1:8001=llama --target b=http://other:8000=llama
      any servers that speak OpenAI's API
  twolane compare --resume compare-20261123-0900
      continue after Ctrl-C, a crash or a power cut

Engines whose `command` is in the settings are started and stopped, one at a time. Other
engines are measured as they run; in an exclusive placement the GPU is handed from one to the
next. Leave the machine idle meanwhile: other work on it changes every figure.
"""

CALIBRATE_EXAMPLES = """\
examples:
  twolane calibrate --config twolane.yaml --out chat.json
      measure both lanes of the file's model, for a quarter of an hour at most
  twolane calibrate --pair chat=ollama:llama3.3:70b,vllm:llama-70b-awq --minutes 5
      the same for engines that run already

Then write `profile: chat.json` under the model in twolane.yaml, and the gateway decides by
it. `twolane profile show chat.json` prints it.
"""


def add_commands(commands: Any, pair: Callable[[str], Any]) -> None:
    """Add `compare`, `calibrate` and `profile` to the commands of `twolane`.

    Args:
        commands: The result of `ArgumentParser.add_subparsers`.
        pair: Parses `NAME=ollama:MODEL,vllm:MODEL`.
    """
    _add_compare(commands, pair)
    _add_calibrate(commands, pair)
    _add_profile(commands)


def _add_compare(commands: Any, pair: Callable[[str], Any]) -> None:
    parser = commands.add_parser(
        "compare",
        help="measure the engines against each other, and write a report",
        description="Measure every engine at every concurrency, several times over in alternating "
        "order, and write a report: report.html, report.md, report.json and charts. The "
        "stopwatch is checked first.",
        epilog=COMPARE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_subjects(parser, pair)
    parser.add_argument(
        "--target", action="append", default=[], metavar="LABEL=URL=MODEL",
        help="a server to measure in place of a configuration's lanes; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--key", help="API key of the targets (default: OPENAI_API_KEY); never written to a file"
    )
    parser.add_argument(
        "--levels", type=_levels, default=(1, 4, 8, 16, 32), metavar="N,N",
        help="numbers of concurrent requests (1,4,8,16,32)",
    )  # fmt: skip
    parser.add_argument(
        "--repetitions", type=_count, default=3, metavar="N", help="of the whole matrix (3)"
    )
    _add_load(parser, rounds=10)
    parser.add_argument(
        "--ollama-slots", type=_levels, default=(1, 16), metavar="N,N",
        help="values of OLLAMA_NUM_PARALLEL to measure, where the gateway starts Ollama (1,16: as "
        "installed, and to match vLLM)",
    )  # fmt: skip
    parser.add_argument(
        "--no-gateway", action="store_true", help="measure the engines alone, not the gateway"
    )
    _add_latency_limits(parser)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for all results (compare-DATE)")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="continue an experiment")
    parser.add_argument(
        "--unchecked", action="store_true",
        help="write a report even if the stopwatch failed its check; the report then says so",
    )  # fmt: skip
    parser.add_argument(
        "--processes", type=_count, default=1, metavar="N", help="of the load generator (1)"
    )
    parser.set_defaults(run=_compare, parser=parser)


def _add_latency_limits(parser: argparse.ArgumentParser) -> None:
    limits = parser.add_argument_group(
        "limits for goodput",
        "Goodput counts the answers within these limits. With a limit, levels are added until the "
        "highest concurrency that meets it is known.",
    )
    for name, what in (
        ("ttft", "time to the first token"),
        ("tpot", "time per output token"),
        ("e2e", "time of the whole answer"),
    ):
        limits.add_argument(f"--good-{name}-s", type=_seconds, metavar="S", help=f"{what}, seconds")


def _add_calibrate(commands: Any, pair: Callable[[str], Any]) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="measure a profile for the gateway to decide by",
        description="Measure how long a request takes on each lane at each concurrency, in "
        "smaller steps around the crossover, where the other lane becomes faster, and write the "
        "profile that the gateway decides by.",
        epilog=CALIBRATE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_subjects(parser, pair)
    parser.add_argument(
        "--levels", type=_levels, default=(1, 4, 16, 32), metavar="N,N",
        help="numbers of concurrent requests to begin with; more are added around the crossover "
        "(1,4,16,32)",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=_seconds, default=15.0, metavar="M",
        help="no new level begins after this time (15)",
    )  # fmt: skip
    _add_load(parser, rounds=5)
    parser.add_argument(
        "--out", type=Path, metavar="FILE.json",
        help="the profile (default: the file that the settings name, else profile-MODEL.json)",
    )  # fmt: skip
    parser.set_defaults(run=_calibrate)


def _add_profile(commands: Any) -> None:
    parser = commands.add_parser("profile", help="show the profile that the gateway decides by")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    show = actions.add_parser(
        "show",
        help="print a profile",
        description="Print a profile: seconds per request on each lane at each concurrency, the "
        "faster lane in bold, and the crossover. Without a file: the profile of a model of the "
        "settings, or the built-in one, which is assumed. A ? marks values between two measured "
        "levels or beyond the last.",
    )
    show.add_argument(
        "file", type=Path, nargs="?", metavar="FILE.json",
        help="the profile (default: that of the settings, else the built-in one)",
    )  # fmt: skip
    show.add_argument("--config", type=Path, metavar="FILE", help="the gateway's settings, YAML")
    show.add_argument("--model", metavar="NAME", help="model of the settings (the first)")
    show.set_defaults(run=_show)


def _add_subjects(parser: argparse.ArgumentParser, pair: Callable[[str], Any]) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="the gateway's settings, YAML")
    parser.add_argument(
        "--model", metavar="NAME", help="model of the settings (the first with two lanes)"
    )
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
        "--warm-up", type=_count, default=1, metavar="N",
        help="requests of each user before the measured ones (1)",
    )  # fmt: skip
    parser.add_argument(
        "--tokens-in", type=_count, default=80, metavar="N", help="tokens of a prompt, about (80)"
    )
    parser.add_argument(
        "--tokens-out", type=_count, default=64, metavar="N", help="most tokens of an answer (64)"
    )
    parser.add_argument("--prompts", metavar="FILE", help="your own prompts, one a line")
    parser.add_argument(
        "--cell-s", type=_seconds, default=600.0, metavar="S",
        help="longest time for one level of one target, seconds (600)",
    )  # fmt: skip


def _levels(text: str) -> tuple[int, ...]:
    try:
        levels = sorted({int(part) for part in text.split(",")})
    except ValueError:
        levels = []
    if not levels or levels[0] < 1 or levels[-1] > 1024:
        raise argparse.ArgumentTypeError(
            f"{text!r}: write numbers from 1 to 1024, as 1,4,16; with more concurrent requests the "
            "load generator is what is measured"
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


# The commands themselves


def _compare(args: argparse.Namespace) -> None:
    _require_load_extra()
    from gateway.compare.command import compare  # noqa: PLC0415 - only when it is called

    compare(args)


def _calibrate(args: argparse.Namespace) -> None:
    _require_load_extra()
    from gateway.compare.calibrate import calibrate  # noqa: PLC0415 - only when it is called

    calibrate(args)


def _show(args: argparse.Namespace) -> None:
    from gateway.compare.show import show_profile  # noqa: PLC0415 - only when it is called

    show_profile(args)


def _require_load_extra() -> None:
    missing = [name for name in ("locust", "plotly") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} not installed; measuring needs the extra `load`: "
            + installation.install("load")
        )
