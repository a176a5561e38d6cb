"""Values, environment and command of a systemd unit."""

from __future__ import annotations

import shlex
from pathlib import Path

DEPLOY = Path(__file__).parents[2] / "deploy"
SYSTEMD = DEPLOY / "systemd"


def values(unit: Path, key: str) -> list[str]:
    """All values of a key, in order; a line that ends in a backslash goes on in the next."""
    lines = unit.read_text().replace("\\\n", " ").splitlines()
    return [line.partition("=")[2] for line in lines if line.startswith(f"{key}=")]


def environment(unit: Path) -> dict[str, str]:
    """The variables it sets; specifiers such as %t stay as they are."""
    pairs = [pair for value in values(unit, "Environment") for pair in shlex.split(value)]
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def command(unit: Path) -> list[str]:
    """Program and arguments."""
    [start] = values(unit, "ExecStart")
    return shlex.split(start)


def option(arguments: list[str], name: str) -> str:
    """The value of an option."""
    return arguments[arguments.index(name) + 1]
