"""What our Locust files share: the log of requests, and how a start is aborted."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Any

import gevent
from locust.argument_parser import default_args_dict, get_parser
from locust.env import Environment
from locust.runners import MasterRunner, Runner, WorkerRunner

from loadtests.measure import samples
from loadtests.measure.options import shareable_command
from loadtests.measure.samples import Loop, Phase, Request, Run, SamplesError, Writer
from loadtests.measure.stopwatch import Timing

#: Users of worker n have numbers from n times this on, so numbers are unique.
USERS_PER_WORKER = 10_000
#: How long workers have to receive the message to quit, seconds.
QUIT_GRACE_S = 0.5
#: Locust's own options that the raw file's first line has, besides ours.
SHOWN_LOCUST_OPTIONS = {"host", "run_time"}


class RequestLog:
    """The log of this process's requests: lines of the raw file, and Locust's own tables.

    Args:
        environment: Locust's environment; its run ends if the raw file cannot be written.
        writer: Writer of the raw file.
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
        """Add a request that is over, however it ended."""
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
        if phase == "measured" and timing.error != "cut":
            unit = {"closed": " concurrent", "open": "/s", "chat": " users"}[loop]
            self._show(timing, f"{target}, {level:g}{unit}")

    def _show(self, timing: Timing, name: str) -> None:
        """Add a request to Locust's own tables."""
        failed = RuntimeError(timing.error) if timing.error else None
        for kind, seconds in (("TTFT", timing.ttft_s), ("E2E", timing.e2e_s)):
            if seconds is not None and (kind == "E2E" or failed is None):
                self._environment.events.request.fire(
                    request_type=kind, name=name, response_time=1000 * seconds,
                    response_length=timing.tokens_out or 0, exception=failed, context={},
                )  # fmt: skip


def runner(environment: Environment) -> Runner:
    """Locust's runner, which exists from its `init` event on."""
    assert environment.runner is not None  # noqa: S101 - Locust has made it
    return environment.runner


def is_leader(environment: Environment) -> bool:
    """Whether this process leads the run: the only process, or the master of others."""
    return not isinstance(environment.runner, WorkerRunner)


def run_line(environment: Environment) -> Run:
    """The first line of a run: its time and options, without the key."""
    options = vars(environment.parsed_options)
    others = default_args_dict().keys() - SHOWN_LOCUST_OPTIONS
    shown: dict[str, str | int | float | None] = {}
    for name, value in options.items():
        if name not in others and name != "api_key" and value not in (None, "", []):
            words = value if isinstance(value, list) else [value]
            shown[name] = value if isinstance(value, int | float) else " ".join(words)
    return Run(
        samples.SAMPLES_VERSION, time.time(), shareable_command(sys.argv, options["api_key"]), shown
    )


def report_failure(environment: Environment, why: str) -> None:
    """Report once why the run failed, in one line; Locust will exit with status 2."""
    options: Any = environment.parsed_options
    if environment.process_exit_code is not None:
        return
    environment.process_exit_code = 2
    if options.headless:
        print_message(why)
    else:
        logging.getLogger("twolane").error(why)  # the page shows it among its logs


def abort_start(environment: Environment, why: str) -> None:
    """Report why the run cannot start; without a page Locust exits at once, without tables."""
    report_failure(environment, why)
    options: Any = environment.parsed_options
    if not options.headless:
        return
    if isinstance(environment.runner, MasterRunner):
        environment.runner.send_message("quit")  # otherwise workers wait for a minute
        gevent.sleep(QUIT_GRACE_S)
    raise SystemExit(2)


def on_write_failure(environment: Environment, msg: Any, **_: Any) -> None:
    """Handle the message that a process cannot write its lines; several may send it."""
    if environment.process_exit_code is None:
        report_failure(environment, msg.data["why"])
        gevent.spawn(_stop, environment)


def _stop(environment: Environment) -> None:
    options: Any = environment.parsed_options
    its = runner(environment)
    (its.quit if options.headless else its.stop)()


def print_message(line: str) -> None:
    """Print one line for the user on stderr, with the prefix that callers look for."""
    print(f"twolane: {line}", file=sys.stderr, flush=True)


def run_as_locust(file: str) -> None:
    """Run a Locust file, as `locust -f` does: `python -m loadtests.concurrency`.

    Locust prints its help before it reads a file; here, the help has the file's options.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        get_parser().parse_args(["--help"])
    command = [sys.executable, "-m", "locust", "-f", file, *sys.argv[1:]]
    os.execv(sys.executable, command)  # noqa: S606 - our own arguments
