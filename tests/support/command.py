"""The command `twolane`, run in this process: a process of its own takes a second to start."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

import pytest

from gateway.cli import main


@dataclass(frozen=True)
class Finished:
    """How a command ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def words(self) -> str:
        """What it printed to stdout, whatever the width of the terminal."""
        return " ".join(self.stdout.split())


def run_command(*arguments: object, columns: int = 80, **variables: str) -> Finished:
    """Run `twolane` with these arguments and environment variables, as its program does."""
    stdout, stderr = io.StringIO(), io.StringIO()
    returncode = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(stdout),
        redirect_stderr(stderr),
    ):
        patch.setattr(sys, "argv", ["twolane", *map(str, arguments)])
        for name, value in {"COLUMNS": str(columns), **variables}.items():
            patch.setenv(name, value)
        try:
            main()
        except SystemExit as exc:
            returncode = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    return Finished(returncode, stdout.getvalue(), stderr.getvalue())
