"""The load generator: Locust in a process of its own, for one visit to one target."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import msgspec

from loadtests.measure import samples
from loadtests.measure.experiment import (
    Plan,
)
from loadtests.measure.itinerary import Visit
from loadtests.measure.stopwatch import Target

LOCUSTFILE = Path(__file__).parents[1] / "concurrency.py"
#: File for Locust's output, beside the raw file.
LOG = "locust.log"
#: How often the raw file is read for progress, seconds.
POLL_S = 0.5
#: How long Locust may take after SIGTERM to write its last lines, seconds.
TERMINATE_S = 15.0
#: How much of Locust's output is shown when it fails, characters.
EXCERPT_CHARS = 600


class VisitFailed(Exception):
    """A target could not be measured; the message says why and what to do."""


def locust_command(
    target: Target, plan: Plan, visit: Visit, raw: Path, *, processes: int = 1
) -> list[str]:
    """The command line that measures this visit; the API key is not in it."""
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless"]
    command += ["--only-summary", "--loglevel", "WARNING", "--exit-code-on-error", "0"]
    command += ["--raw", str(raw)]
    command += ["--target", str(target), "--levels", ",".join(map(str, visit.levels))]
    command += ["--first-repetition", str(visit.repetition), "--repetitions", "1"]
    command += ["--rounds", str(plan.rounds), "--warm-up", str(plan.warm_up)]
    command += ["--at-least", str(plan.at_least)]
    command += ["--tokens-in", str(plan.tokens_in), "--tokens-out", str(plan.tokens_out)]
    command += ["--cell-s", f"{plan.cell_s:g}", "--cooldown-s", f"{plan.cooldown_s:g}"]
    if plan.prompts:
        command += ["--prompts", plan.prompts]
    if processes > 1:
        command += ["--processes", str(processes)]
    return command


async def terminate(locust: asyncio.subprocess.Process) -> None:
    """End Locust and its workers: SIGTERM lets it write its last lines, then SIGKILL."""
    if locust.returncode is not None:
        return
    with suppress(ProcessLookupError):
        os.killpg(locust.pid, signal.SIGTERM)
    try:
        async with asyncio.timeout(TERMINATE_S):
            await locust.wait()
    except TimeoutError:
        with suppress(ProcessLookupError):
            os.killpg(locust.pid, signal.SIGKILL)
        await locust.wait()


def failure_excerpt(log: Path, since: int) -> str:
    """The messages for the user in Locust's log from offset `since` on, or its last lines."""
    with log.open("rb") as file:
        file.seek(since)
        output = file.read().decode(errors="replace")
    lines = [line for line in output.splitlines() if line.startswith("twolane: ")]
    if lines:
        return "; ".join(line.removeprefix("twolane: ") for line in lines)
    return f"the load generator failed, {log} ends with:\n{output[-EXCERPT_CHARS:].strip()}"


class RawTail:
    """The lines that are appended to a raw file from now on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def read(self) -> list[samples.Line]:
        """The whole lines since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text.rfind(b"\n") + 1
        self._offset += whole
        lines = []
        for line in text[:whole].splitlines():
            with suppress(msgspec.DecodeError):
                lines.append(samples.decode(line))
        return lines
