"""The command line of `twolane doctor`. The command itself is imported when it is called."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

DOCTOR_HELP = """\
examples:
  twolane doctor                           this machine, and the engines that run on it
  twolane doctor --config twolane.yaml     also what these settings need
  twolane doctor --json | jq '.findings[] | select(.level == "problem")'
  twolane doctor --config twolane.yaml && twolane serve --config twolane.yaml

It only reads: it changes nothing, loads no model and generates no token. Run it while
the engines run, as a user who may see their processes (root, for those of other users).

levels:
  problem          it fails, or will
  warning          it may fail, or others may use the machine
  unknown          it could not be observed; the line has the reason
  note             worth knowing
  ok               as it should be
  not applicable   this machine has nothing that the check is about

exit code:
  0   no problem (there may be warnings)
  1   at least one problem
  2   the command line was not understood

--json:
  {"version": 1, "at": "2026-11-23T09:00:00+00:00", "problems": 0, "findings": [
    {"check": "port", "about": "", "level": "ok", "saw": "...", "why": "...", "do": "..."}]}
  Names of checks and levels do not change. `about` is the card, engine or model; it is empty
  where there is only one. Every check has at least one finding. `do` is empty where there is
  nothing to do.
"""


def add_command(commands: Any) -> None:
    """Add `doctor` to the commands of `twolane`.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
    """
    parser = commands.add_parser(
        "doctor",
        help="find what fails or will fail, and say what to do",
        description="Check this machine, its cards, the engines and the gateway's settings. Each "
        "finding says what was seen, why it matters and what to do.",
        epilog=DOCTOR_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE",
        help="the gateway's settings, YAML (default: look for engines as `twolane serve` does)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON, see below")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from gateway.doctor import command  # noqa: PLC0415 - see the module's docstring

    command.run(args)
