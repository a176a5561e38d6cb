"""What simulated people write down: a line for each request, and Locust's own tables."""

from __future__ import annotations

import os
import sys

from locust.argument_parser import get_parser
from locust.env import Environment
from locust.runners import Runner

from loadtests.samples import Loop, Phase, Request, SamplesError, Writer
from loadtests.stopwatch import Timing


class Notes:
    """Where the requests of this process are written down.

    Args:
        environment: Locust's, for its tables, and to end it where nothing can be written.
        writer: Of the raw file.
    """

    def __init__(self, environment: Environment, writer: Writer) -> None:
        self._environment = environment
        self._writer = writer

    def add(
        self,
        timing: Timing,
        *,
        target: str,
        loop: Loop,
        level: float,
        repetition: int,
        user: int,
        number: int,
        phase: Phase,
    ) -> None:
        """A request is over, however it ended."""
        try:
            self._writer.write(
                Request(
                    target, loop, level, repetition, user, number, phase, timing.start,
                    timing.e2e_s, timing.ttft_s, timing.gaps_s, timing.tpot_s, timing.tokens_in,
                    timing.tokens_out, timing.finish, timing.lane, timing.reason, timing.error,
                )
            )  # fmt: skip
        except SamplesError as exc:
            runner(self._environment).send_message("broken", {"why": str(exc)})
        if phase != "warm-up" and timing.error != "cut":
            unit = {"closed": " at once", "open": "/s", "chat": " people"}[loop]
            self._show(timing, f"{target}, {level:g}{unit}")

    def _show(self, timing: Timing, name: str) -> None:
        """In Locust's own tables."""
        failed = RuntimeError(timing.error) if timing.error else None
        for kind, seconds in (("TTFT", timing.ttft_s), ("E2E", timing.e2e_s)):
            if seconds is not None and (kind == "E2E" or failed is None):
                self._environment.events.request.fire(
                    request_type=kind, name=name, response_time=1000 * seconds,
                    response_length=timing.tokens_out or 0, exception=failed, context={},
                )  # fmt: skip


def runner(environment: Environment) -> Runner:
    """What runs the users; there once Locust's `init` event has come."""
    assert environment.runner is not None  # noqa: S101 - Locust has made it
    return environment.runner


def say(line: str) -> None:
    """One line for people, where callers look for it."""
    print(f"twolane: {line}", file=sys.stderr, flush=True)


def as_program(file: str) -> None:
    """Run one of our Locust files: `python -m loadtests.concurrency`, as `locust -f` does.

    Locust gives its help before it reads a file; here, help has the file's own options.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        get_parser().parse_args(["--help"])
    command = [sys.executable, "-m", "locust", "-f", file, *sys.argv[1:]]
    os.execv(sys.executable, command)  # noqa: S606 - what we were called with
