"""The simulated users of one Locust process, and the load of that process itself."""

from __future__ import annotations

import itertools
import statistics
import time
from argparse import Namespace
from typing import Any

import gevent
import gevent.pool
from locust.env import Environment
from locust.runners import WorkerRunner

from loadtests.measure import samples, stopwatch
from loadtests.measure.locustfile import (
    USERS_PER_WORKER,
    RequestLog,
    runner,
)
from loadtests.measure.options import BadOptions, Load, PlannedCell, read_options
from loadtests.measure.samples import SamplesError, Writer
from loadtests.measure.stopwatch import Timing

#: A target is given up after so many failed requests, if none was answered.
GIVE_UP_AFTER_FAILURES = 5
#: Period of the timer by which the generator samples its scheduling lag, seconds.
LAG_SAMPLE_S = 0.01


class UserPool:
    """The users of this process: the current cell, their requests and the process's load.

    The leading process announces each cell by a message and receives messages back: when a
    user has all measured answers, when a target is hopeless, and the load at the end.

    Args:
        environment: Locust's environment.
    """

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._runner = runner(environment)
        self._options: dict[str, Any] = {}
        self._log: RequestLog | None = None
        self._load: Load | None = None
        self.cell: PlannedCell | None = None
        self.workers = 1
        self._users = itertools.count()
        self._first = self._last = 0.0
        self._answered = self._failed = 0
        self._meter = GeneratorMeter()
        self._runner.register_message("cell", self._begin)
        self._runner.register_message("over", self._end)

    @property
    def load(self) -> Load:
        assert self._load is not None  # noqa: S101 - set with the first cell
        return self._load

    def next_user(self) -> int:
        """A user number that is unique in this cell, across all processes."""
        index = self._runner.worker_index if isinstance(self._runner, WorkerRunner) else 0
        return USERS_PER_WORKER * max(0, index) + next(self._users)

    def _begin(self, environment: Environment, msg: Any, **_: Any) -> None:
        cell = msg.data
        if cell["options"] != self._options:
            try:
                self._load = read_options(Namespace(**cell["options"]), cell["users"])
                self._log = RequestLog(environment, Writer(self._load.raw))
            except (BadOptions, SamplesError) as exc:
                self._runner.send_message("broken", {"why": str(exc)})
                return
            self._options = cell["options"]
        target = self.load.targets[cell["target"]]
        self.cell = PlannedCell(
            cell["number"], target, cell["loop"], cell["level"], cell["repetition"]
        )
        self.workers = cell["workers"]
        self._users = itertools.count()
        self._first = self._last = 0.0
        self._answered = self._failed = 0
        self._meter.start()

    def _end(self, environment: Environment, msg: Any, **_: Any) -> None:
        cpu, lag_p50_s, lag_p99_s = self._meter.stop()
        self._send(
            "metered", msg.data["number"], cpu=cpu, lag_p50_s=lag_p50_s, lag_p99_s=lag_p99_s,
            began=self._first, ended=self._last,
        )  # fmt: skip

    def ask(self, cell: PlannedCell, user: int, number: int, phase: samples.Phase) -> bool:
        """Send one request and log it however it ends; returns whether it was answered."""
        place = cell.target.label, cell.repetition, cell.level, user, number
        question = {"role": "user", "content": self.load.prompts.prompt(*place)}
        body = stopwatch.request_body(cell.target, [question], self.load.tokens_out)
        timing = Timing()
        try:
            stopwatch.ask(cell.target, body, timing)
        except gevent.GreenletExit:
            timing.fail("cut")
            raise
        finally:
            self._record(cell, user, number, phase, timing)
        return timing.error is None

    def _record(
        self, cell: PlannedCell, user: int, number: int, phase: samples.Phase, timing: Timing
    ) -> None:
        assert self._log is not None  # noqa: S101 - set with the first cell
        self._log.add(
            timing, target=cell.target.label, loop=cell.loop, level=cell.level,
            repetition=cell.repetition, user=user, number=number, phase=phase,
        )  # fmt: skip
        if phase == "measured":
            self._first = min(self._first or timing.start, timing.start)
            self._last = max(self._last, timing.start + timing.e2e_s)
        if timing.error is None:
            self._answered += 1
        elif timing.error != "cut":
            self._failed += 1
            if not self._answered and self._failed >= max(
                GIVE_UP_AFTER_FAILURES, cell.users / self.workers
            ):
                self._send("hopeless", cell.number, why=timing.error)

    def finish_user(self, cell: PlannedCell) -> None:
        """Report that a user has all its measured answers."""
        self._send("finished", cell.number)

    def _send(self, message: str, number: int, **more: Any) -> None:
        self._runner.send_message(message, {"number": number, **more})


class GeneratorMeter:
    """CPU use of this process, and its scheduling lag: how late a timer fires in it."""

    def __init__(self) -> None:
        self._sampling: gevent.Greenlet | None = None
        self._lags: list[float] = []
        self._began = self._cpu = 0.0

    def start(self) -> None:
        """Measure from now on."""
        self.stop()
        self._lags = []
        self._began, self._cpu = time.perf_counter(), time.process_time()
        self._sampling = gevent.spawn(self._sample_lag)

    def stop(self) -> tuple[float, float, float]:
        """CPU share of one core, and the lag's median and 99th percentile in seconds."""
        if self._sampling is not None:
            self._sampling.kill()
            self._sampling = None
        if len(self._lags) < 2:
            return 0.0, 0.0, 0.0
        cuts = statistics.quantiles(self._lags, n=100, method="inclusive")
        passed = time.perf_counter() - self._began
        return (time.process_time() - self._cpu) / passed, cuts[49], cuts[98]

    def _sample_lag(self) -> None:
        while True:
            due = time.perf_counter() + LAG_SAMPLE_S
            gevent.sleep(LAG_SAMPLE_S)
            self._lags.append(time.perf_counter() - due)
