"""The command line of `twolane doctor`. The command itself is imported when it is called."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

GUIDE = """\
examples:
  twolane doctor                           this machine, and the engines that are found on it
  twolane doctor --config twolane.yaml     the same for what the settings want
  twolane doctor --json | jq '.findings[] | select(.level == "problem")'
  twolane doctor --config twolane.yaml && twolane serve --config twolane.yaml

It looks and asks; nothing is changed, loaded or generated. Engines are best looked at while
they run, by a user who may see their processes (root, for those of other users).

levels:
  problem          it fails, or will
  warning          it may fail, or somebody else may use it
  unknown          nobody could tell; it says why
  note             worth knowing
  ok               as it should be
  not applicable   there is nothing here that it is about

exit code:
  0   no problem (there may be warnings)
  1   at least one problem
  2   the command line was not understood

--json:
  {"version": 1, "at": "2026-11-23T09:00:00+00:00", "problems": 0, "findings": [
    {"check": "port", "about": "", "level": "ok", "saw": "...", "why": "...", "do": "..."}]}
  `check` and `level` stay as they are. `about` is the card, engine or model, empty where there
  is one. Every check is there once at least. `do` is empty where there is nothing to do.
"""


def add_command(commands: Any) -> None:
    """Add `doctor` to the commands of `twolane`.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
    """
    parser = commands.add_parser(
        "doctor",
        help="look for what will fail, and say what to do",
        description="Look over this machine, its cards, the engines and the gateway's settings, "
        "and say of each thing what was seen, why it matters and what to do.",
        epilog=GUIDE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE",
        help="the gateway's settings, YAML (without: engines are looked for as `serve` does)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="as JSON, see below")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from gateway.doctor import command  # noqa: PLC0415 - see the module's docstring

    command.run(args)
