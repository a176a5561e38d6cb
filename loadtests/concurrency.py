"""A Locust file: measures targets at fixed concurrencies, one target after another.

    locust -f loadtests/concurrency.py --headless --levels 16,32 \
        --target ollama=http://127.0.0.1:11434=llama3.3:70b --target vllm=http://127.0.0.1:8001=llama

A cell is one target at one level in one repetition. Its users start together and send
requests without a pause: warm-up, then measured rounds, then trailing requests, so that the
concurrency stays the same until the last measured answer is complete. Every request is a
line of the raw file (`samples`); Locust's tables show TTFT and E2E. The leading process
(`CellsShape`) goes from cell to cell; processes with users (`UserPool`) receive each cell by a
message, and report when a user has all its measured answers.

`python -m loadtests.concurrency --help` lists the options; Locust prints its own help before
it reads this file.
"""

from __future__ import annotations

import itertools
import random
import signal
import time
from collections.abc import Generator
from typing import Any, ClassVar, TypeAlias

import gevent
import gevent.pool
from locust import LoadTestShape, User, events, task
from locust.env import Environment
from locust.runners import MasterRunner, Runner

from loadtests.measure import samples
from loadtests.measure.locustfile import (
    abort_start,
    is_leader,
    on_write_failure,
    print_message,
    report_failure,
    run_as_locust,
    run_line,
    runner,
)
from loadtests.measure.options import (
    BadOptions,
    Load,
    PlannedCell,
    add_options,
    preflight,
    read_options,
)
from loadtests.measure.samples import SamplesError, Writer
from loadtests.measure.user_pool import LAG_SAMPLE_S, UserPool

#: Pause of a user after a failed request, seconds, so that a failed server is not flooded.
RETRY_PAUSE_S = 0.5
#: Warm-up of an open loop, seconds: arrivals in it are not measured.
OPEN_WARM_UP_S = 5.0
#: How long workers may take to report their load after a cell, seconds.
METER_TIMEOUT_S = 5.0

Ticks: TypeAlias = Generator[tuple[int, float], None, None]


# In every process with users


class ConcurrentUser(User):
    """A user who sends requests without a pause; in an open loop, the source of arrivals."""

    @task
    def live(self) -> None:
        """Send requests until Locust ends this user with the cell."""
        pool: UserPool = self.environment.user_pool
        cell = pool.cell
        if cell is None:
            gevent.sleep(LAG_SAMPLE_S)
        elif cell.loop == "open":
            self._run_open_loop(pool, cell)
        else:
            self._run_closed_loop(pool, cell)

    def _run_closed_loop(self, pool: UserPool, cell: PlannedCell) -> None:
        user = pool.next_user()
        warm_up, rounds = pool.load.warm_up, pool.load.rounds_of(cell)
        for number in itertools.count():
            phase: samples.Phase = "measured"
            if number < warm_up:
                phase = "warm-up"
            elif rounds is not None and number >= warm_up + rounds:
                phase = "trailing"
            answered = pool.ask(cell, user, number, phase)
            if rounds is not None and number == warm_up + rounds - 1:
                pool.finish_user(cell)
            if not answered:
                gevent.sleep(RETRY_PAUSE_S)

    def _run_open_loop(self, pool: UserPool, cell: PlannedCell) -> None:
        """Send requests by a Poisson process; each worker sends its share of them."""
        place = pool.load.seed, cell.repetition, cell.level, pool.next_user()
        arrivals = random.Random(str(place))  # the same times for every target
        share = max(1, pool.load.arrivals // pool.workers)
        left = [share]
        requests: Any = gevent.pool.Group()

        def arrive(phase: samples.Phase) -> None:
            pool.ask(cell, pool.next_user(), 0, phase)
            if phase == "measured":
                left[0] -= 1
                if not left[0]:
                    pool.finish_user(cell)

        began = time.perf_counter()
        due_s = 0.0
        measured = 0
        try:
            while True:
                due_s += arrivals.expovariate(cell.level / pool.workers)
                gevent.sleep(max(0.0, began + due_s - time.perf_counter()))
                phase: samples.Phase = "trailing"
                if due_s < OPEN_WARM_UP_S:
                    phase = "warm-up"
                elif measured < share:
                    phase = "measured"
                    measured += 1
                requests.spawn(arrive, phase)
        finally:
            requests.kill()


# In the leading process


class CellsShape(LoadTestShape):
    """Leads through all cells; Locust calls it every second for the wanted number of users."""

    use_common_options: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.users: int | None = None  # -u, if given
        self._ticks: Ticks | None = None
        self._began: float | None = None  # start of the first cell
        self._number = -1  # number of the current cell
        self._finished = 0
        self._given_up = ""
        self._metered: list[dict[str, float]] = []

    def tick(self) -> tuple[int, float] | None:
        """The wanted number of users, and how many may start per second; None at the end."""
        if self._ticks is None:
            self._began = None
            self._ticks = self._run_cells()
        try:
            return next(self._ticks, None)
        except (BadOptions, SamplesError) as exc:
            report = abort_start if self._began is None else report_failure
            report(self._environment, str(exc))
            return None

    def on_test_stop(self, **_: Any) -> None:
        """Write the last line when Locust ends the run, complete or not."""
        if self._ticks is not None:
            try:
                self._ticks.close()
            except SamplesError as exc:
                report_failure(self._environment, str(exc))
            self._ticks = None

    def _run_cells(self) -> Ticks:
        """Run one cell after another; all users stop in between."""
        self._environment.process_exit_code = None
        load = read_options(self._environment.parsed_options, self.users)
        writer = Writer(load.raw)
        writer.write(run_line(self._environment))
        for target in load.targets:
            preflight(target)
        self._began = time.monotonic()
        for cell in load.cells():
            users = self._workers if cell.loop == "open" else cell.users
            outcome = "interrupted"
            self._announce(cell, load)
            began = time.time()
            try:
                until = time.monotonic() + load.cell_s
                while not (ended := self._outcome(users, load, until)):
                    yield users, users
                outcome = ended
                yield 0, users
                self._runner.send_message("over", {"number": cell.number})
                until = time.monotonic() + METER_TIMEOUT_S
                while len(self._metered) < self._workers and time.monotonic() < until:
                    yield 0, users
            finally:
                writer.write(self._cell_line(cell, outcome, began))
                if outcome != "complete":
                    print_message(f"{cell.name}: {outcome}")
            if self._time_is_up(load):
                return
            next_start = time.monotonic() + load.cooldown_s
            while time.monotonic() < next_start:
                yield 0, users

    @property
    def _runner(self) -> Runner:
        assert self.runner is not None  # noqa: S101 - Locust has set it
        return self.runner

    @property
    def _environment(self) -> Environment:
        return self._runner.environment

    @property
    def _workers(self) -> int:
        return self._runner.worker_count if isinstance(self._runner, MasterRunner) else 1

    def _announce(self, cell: PlannedCell, load: Load) -> None:
        self._number = cell.number
        self._finished = 0
        self._given_up = ""
        self._metered = []
        # A worker's own options may be of an earlier start, and name no model.
        options = {**vars(self._environment.parsed_options), "target": [*map(str, load.targets)]}
        message = {
            "number": cell.number, "target": load.targets.index(cell.target), "loop": cell.loop,
            "level": cell.level, "repetition": cell.repetition, "users": self.users,
            "options": options, "workers": self._workers,
        }  # fmt: skip
        self._runner.send_message("cell", message)

    def _outcome(self, users: int, load: Load, until: float) -> str:
        """The outcome of the current cell if it has ended, else nothing."""
        if self._finished >= users:
            return "complete"
        if self._given_up:
            return self._given_up
        if self._time_is_up(load):
            return "complete" if load.rounds is None else "interrupted"
        if load.rounds is not None and time.monotonic() > until:
            return f"not complete after {load.cell_s:g} s"
        return ""

    def _time_is_up(self, load: Load) -> bool:
        """Whether the run time -t is up; it starts when the targets have loaded their models."""
        if load.run_s is None or self._began is None:
            return False
        return time.monotonic() - self._began > load.run_s

    def _cell_line(self, cell: PlannedCell, outcome: str, began: float) -> samples.Cell:
        loads = self._metered
        return samples.Cell(
            cell.target.label, cell.loop, cell.level, cell.repetition,
            min((one["began"] for one in loads if one["began"]), default=began),
            max((one["ended"] for one in loads if one["ended"]), default=time.time()),
            outcome,
            max((one["cpu"] for one in loads), default=0.0),
            max((one["lag_p50_s"] for one in loads), default=0.0),
            max((one["lag_p99_s"] for one in loads), default=0.0),
        )  # fmt: skip

    # Messages of workers

    def on_finished(self, environment: Environment, msg: Any, **_: Any) -> None:
        """Count a user that has all its measured answers."""
        self._finished += msg.data["number"] == self._number

    def on_hopeless(self, environment: Environment, msg: Any, **_: Any) -> None:
        """Give up a target of which every request fails."""
        if msg.data["number"] == self._number:
            self._given_up = f"every request failed: {msg.data['why']}"

    def on_metered(self, environment: Environment, msg: Any, **_: Any) -> None:
        """Keep a worker's load for the line of the cell."""
        if msg.data["number"] == self._number:
            self._metered.append(msg.data)


@events.init_command_line_parser.add_listener
def _add_options(parser: Any, **_: Any) -> None:
    add_options(parser)


@events.init.add_listener
def _take_part(environment: Environment, **_: Any) -> None:
    """Register for messages and signals, before any request is sent."""
    shape, options = environment.shape_class, environment.parsed_options
    assert options is not None  # noqa: S101 - Locust was called with them
    if not isinstance(environment.runner, MasterRunner):
        environment.user_pool = UserPool(environment)  # type: ignore[attr-defined]
    if isinstance(shape, CellsShape) and is_leader(environment):
        for name in ("finished", "hopeless", "metered"):
            runner(environment).register_message(name, getattr(shape, f"on_{name}"))
        runner(environment).register_message("broken", on_write_failure)
        environment.events.test_stop.add_listener(shape.on_test_stop)
        # Locust handles SIGTERM only after the shape has ended.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        shape.users = options.num_users  # Locust makes it 1 later on
        # On the page our levels replace Locust's number of users.
        shape.use_common_options = options.headless  # type: ignore[misc]


if __name__ == "__main__":
    run_as_locust(__file__)
