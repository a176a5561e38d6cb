"""So many at once, on one target after another: the experiment, as a Locust file.

    locust -f loadtests/concurrency.py --headless --levels 16,32 \
        --target ollama=http://127.0.0.1:11434=llama3.3:70b --target vllm=http://127.0.0.1:8001=llama

A cell is one target at one level, once. Its users start together and ask without a pause:
first the warm-up, then the rounds that count, then on, so that the level is kept until the
last one's last counted answer is there. Every request is a line of the raw file (`samples`);
Locust's tables show TTFT and E2E. The process that is_leader (`CellsShape`) goes from cell to cell;
those that have users (`UserPool`) are told by messages, and tell when a user has all its answers.
`python -m loadtests.concurrency --help` lists its options: Locust's own help comes too early.
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

#: Seconds a person waits after a request that failed: who is down need not be beaten.
RETRY_PAUSE_S = 0.5
#: Arrivals within so many seconds of an open loop do not count.
OPEN_WARM_UP_S = 5.0
#: How long workers may take to tell how they fared, seconds.
METER_TIMEOUT_S = 5.0

Ticks: TypeAlias = Generator[tuple[int, float], None, None]


# In every process that has users


class ConcurrentUser(User):
    """Asks without a pause for as long as the cell lasts; in an open loop, lets others come."""

    @task
    def live(self) -> None:
        """The whole life; Locust ends it with the cell."""
        pool: UserPool = self.environment.user_pool
        cell = pool.cell
        if cell is None:
            gevent.sleep(LAG_SAMPLE_S)
        elif cell.loop == "open":
            self._run_open_loop(pool, cell)
        else:
            self._run_closed_loop(pool, cell)

    def _run_closed_loop(self, pool: UserPool, cell: PlannedCell) -> None:
        next_user = pool.next_user()
        warm_up, rounds = pool.load.warm_up, pool.load.rounds_of(cell)
        for number in itertools.count():
            phase: samples.Phase = "measured"
            if number < warm_up:
                phase = "warm-up"
            elif rounds is not None and number >= warm_up + rounds:
                phase = "trailing"
            answered = pool.ask(cell, next_user, number, phase)
            if rounds is not None and number == warm_up + rounds - 1:
                pool.finished(cell)
            if not answered:
                gevent.sleep(RETRY_PAUSE_S)

    def _run_open_loop(self, pool: UserPool, cell: PlannedCell) -> None:
        """Arrivals of a Poisson process; each worker has its share of them."""
        place = pool.load.seed, cell.repetition, cell.level, pool.next_user()
        dice = random.Random(str(place))  # the same moments for every target
        share = max(1, pool.load.arrivals // pool.workers)
        left = [share]
        people: Any = gevent.pool.Group()

        def arrive(phase: samples.Phase) -> None:
            pool.ask(cell, pool.next_user(), 0, phase)
            if phase == "measured":
                left[0] -= 1
                if not left[0]:
                    pool.finished(cell)

        began = time.perf_counter()
        due_s = 0.0
        measured = 0
        try:
            while True:
                due_s += dice.expovariate(cell.level / pool.workers)
                gevent.sleep(max(0.0, began + due_s - time.perf_counter()))
                phase: samples.Phase = "trailing"
                if due_s < OPEN_WARM_UP_S:
                    phase = "warm-up"
                elif measured < share:
                    phase = "measured"
                    measured += 1
                people.spawn(arrive, phase)
        finally:
            people.kill()


# In the one process that is_leader


class CellsShape(LoadTestShape):
    """Leads from cell to cell; Locust asks it every second how many users there should be."""

    use_common_options: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.users: int | None = None  # -u, where it was given
        self._leading: Ticks | None = None
        self._began: float | None = None  # the first cell
        self._number = -1  # of the cell
        self._finished = 0
        self._given_up = ""
        self._metered: list[dict[str, float]] = []

    def tick(self) -> tuple[int, float] | None:
        """How many users there should be, and how many may start a second; None at the end."""
        if self._leading is None:
            self._began = None
            self._leading = self._lead()
        try:
            return next(self._leading, None)
        except (BadOptions, SamplesError) as exc:
            tell = abort_start if self._began is None else report_failure
            tell(self._environment, str(exc))
            return None

    def ended(self, **_: Any) -> None:
        """The test is over, whether we led it to its end or not."""
        if self._leading is not None:
            try:
                self._leading.close()
            except SamplesError as exc:
                report_failure(self._environment, str(exc))
            self._leading = None

    def _lead(self) -> Ticks:
        """Cell after cell; in between everybody leaves."""
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
                while not (ending := self._ending(users, load, until)):
                    yield users, users
                outcome = ending
                yield 0, users
                self._runner.send_message("over", {"number": cell.number})
                until = time.monotonic() + METER_TIMEOUT_S
                while len(self._metered) < self._workers and time.monotonic() < until:
                    yield 0, users
            finally:
                writer.write(self._measured(cell, outcome, began))
                if outcome != "complete":
                    print_message(f"{cell.name}: {outcome}")
            if self._time_is_up(load):
                return
            rested = time.monotonic() + load.cooldown_s
            while time.monotonic() < rested:
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
        told = {
            "number": cell.number, "target": load.targets.index(cell.target), "loop": cell.loop,
            "level": cell.level, "repetition": cell.repetition, "users": self.users,
            "options": options, "workers": self._workers,
        }  # fmt: skip
        self._runner.send_message("cell", told)

    def _ending(self, users: int, load: Load, until: float) -> str:
        """How the cell ends, if it does: all that counts is there, or will not come any more."""
        if self._finished >= users:
            return "complete"
        if self._given_up:
            return self._given_up
        if self._time_is_up(load):
            return "complete" if load.rounds is None else "interrupted"
        if load.rounds is not None and time.monotonic() > until:
            return f"not over after {load.cell_s:g} s"
        return ""

    def _time_is_up(self, load: Load) -> bool:
        """Whether -t is over, which begins when the targets have their models loaded."""
        if load.run_s is None or self._began is None:
            return False
        return time.monotonic() - self._began > load.run_s

    def _measured(self, cell: PlannedCell, outcome: str, began: float) -> samples.Cell:
        told = self._metered
        return samples.Cell(
            cell.target.label, cell.loop, cell.level, cell.repetition,
            min((one["began"] for one in told if one["began"]), default=began),
            max((one["ended"] for one in told if one["ended"]), default=time.time()),
            outcome,
            max((one["cpu"] for one in told), default=0.0),
            max((one["lag_p50_s"] for one in told), default=0.0),
            max((one["lag_p99_s"] for one in told), default=0.0),
        )  # fmt: skip

    # What workers tell

    def finished(self, environment: Environment, msg: Any, **_: Any) -> None:
        """A user has all its answers."""
        self._finished += msg.data["number"] == self._number

    def hopeless(self, environment: Environment, msg: Any, **_: Any) -> None:
        """Nothing but failures."""
        if msg.data["number"] == self._number:
            self._given_up = f"every request failed: {msg.data['why']}"

    def metered(self, environment: Environment, msg: Any, **_: Any) -> None:
        """How a worker fared."""
        if msg.data["number"] == self._number:
            self._metered.append(msg.data)


@events.init_command_line_parser.add_listener
def _add_options(parser: Any, **_: Any) -> None:
    add_options(parser)


@events.init.add_listener
def _take_part(environment: Environment, **_: Any) -> None:
    """Before anything is asked: learn to listen."""
    shape, options = environment.shape_class, environment.parsed_options
    assert options is not None  # noqa: S101 - Locust was called with them
    if not isinstance(environment.runner, MasterRunner):
        environment.user_pool = UserPool(environment)  # type: ignore[attr-defined]
    if isinstance(shape, CellsShape) and is_leader(environment):
        for name in ("finished", "hopeless", "metered"):
            runner(environment).register_message(name, getattr(shape, name))
        runner(environment).register_message("broken", on_write_failure)
        environment.events.test_stop.add_listener(shape.ended)
        # Locust heeds SIGTERM only after the shape has ended.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        shape.users = options.num_users  # Locust makes it 1 later on
        # The page has our levels in place of its number of users.
        shape.use_common_options = options.headless  # type: ignore[misc]


if __name__ == "__main__":
    run_as_locust(__file__)
