"""A Locust file: a small team that chats, reads, thinks, and sometimes gives up.

    locust -f loadtests/chat.py --host http://127.0.0.1:8000 --model chat -u 8 -t 10m

Each user has chats of several turns. Every request contains the conversation so far, so prompts
grow as they do in a chat page. Think times between an answer and the next question are mostly
short and sometimes long; some users disconnect during an answer. Every request is a line of
the raw file (`samples`, loop `chat`); Locust's tables show TTFT and E2E. It works with
Locust's page, its load shapes and --processes.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import gevent
from locust import User, events, task
from locust.env import Environment
from locust.runners import LocalRunner, WorkerRunner

from loadtests.measure import samples, stopwatch
from loadtests.measure.locustfile import (
    USERS_PER_WORKER,
    RequestLog,
    abort_start,
    is_leader,
    on_write_failure,
    run_as_locust,
    run_line,
    runner,
)
from loadtests.measure.options import (
    BadOptions,
    host_target,
    option_adder,
    preflight,
    require_at_least,
    require_positive,
)
from loadtests.measure.prompts import TOPICS, Prompts
from loadtests.measure.samples import SamplesError, Writer
from loadtests.measure.stopwatch import BadTarget, Target, Timing

#: The system prompt of the chats.
CHAT_SYSTEM_PROMPT = "You are a helpful assistant. Answer shortly where you can."
#: Standard deviation of the logarithm of think times: most are short, some very long.
THINK_TIME_SIGMA = 1.0
#: Pause of a user after a failed answer, seconds.
CHAT_RETRY_S = 5.0


class ChatUser(User):
    """One user of the team."""

    def on_start(self) -> None:
        """Get a number, and wait for a moment, so that not all users begin together."""
        self._team: Team = self.environment.team
        self._user = self._team.next_user()
        self._dice = random.Random(f"{self._team.seed}/{self._user}")
        self._number = 0
        gevent.sleep(self._dice.uniform(0, self._team.think_s))

    @task
    def chat(self) -> None:
        """Run one chat, from its first question to its last."""
        topic = self._dice.choice(TOPICS)
        messages = [{"role": "system", "content": CHAT_SYSTEM_PROMPT}]
        for turn in range(self._dice.randint(1, 2 * self._team.turns - 1)):
            question = self._team.prompts.prompt(topic, turn, 0, self._user, self._number)
            messages.append({"role": "user", "content": question})
            timing = self._ask(messages)
            gevent.sleep(self._think_time_s() if timing.error is None else CHAT_RETRY_S)
            if timing.error is not None:
                return  # a user begins a new chat then
            messages.append({"role": "assistant", "content": timing.text})

    def _ask(self, messages: list[dict[str, str]]) -> Timing:
        """Send one turn; an impatient user disconnects somewhere in the answer."""
        team, timing = self._team, Timing()
        longest = max(1, round(team.tokens_out * self._dice.lognormvariate(-0.125, 0.5)))
        body = stopwatch.request_body(team.target, messages, min(longest, 4 * team.tokens_out))
        leaves = self._dice.random() < team.hang_up
        answer = gevent.spawn(stopwatch.ask, team.target, body, timing)
        try:
            patience_s = self._dice.uniform(0, team.patience_s) if leaves else None
            answer.join(patience_s)
        finally:
            if not answer.ready():  # the user lost patience, or the test is over
                answer.kill()
                timing.fail("cut")
            team.log.add(
                timing, target=team.target.label, loop="chat", level=team.users, repetition=1,
                user=self._user, number=self._number, phase=team.phase,
            )  # fmt: skip
            self._number += 1
        return timing

    def _think_time_s(self) -> float:
        mean = math.log(self._team.think_s) - THINK_TIME_SIGMA**2 / 2
        return min(20 * self._team.think_s, self._dice.lognormvariate(mean, THINK_TIME_SIGMA))


class Team:
    """The options, the log and the phase that all users of this process share.

    Raises:
        BadOptions: An option has no valid value.
        BadTarget: No target was given.
        SamplesError: The raw file cannot be written.
    """

    def __init__(self, environment: Environment) -> None:
        options: Any = environment.parsed_options
        require_positive(options, "think_s", "patience_s")
        require_at_least(1, options, "turns", "tokens_in", "tokens_out")
        if not 0 <= options.hang_up <= 1:
            raise BadOptions(f"--hang-up {options.hang_up}: write a share from 0 to 1")
        self.target: Target = host_target(options)
        self.think_s: float = options.think_s
        self.patience_s: float = options.patience_s
        self.hang_up: float = options.hang_up
        self.turns: int = options.turns
        self.tokens_out: int = options.tokens_out
        self.seed: int = options.seed
        self.prompts = Prompts(options.tokens_in, options.seed)
        self.users: int = options.num_users or 1
        self.phase: samples.Phase = "warm-up"
        self._environment = environment
        self._writer = Writer(Path(options.raw))
        self.log = RequestLog(environment, self._writer)
        self._users = 0

    def begin(self) -> None:
        """Write the raw file's first line, and have the target load its model."""
        self._writer.write(run_line(self._environment))
        preflight(self.target)

    def next_user(self) -> int:
        """A user number that is unique across all processes."""
        its = runner(self._environment)
        first = USERS_PER_WORKER * max(0, its.worker_index) if isinstance(its, WorkerRunner) else 0
        self._users += 1
        return first + self._users - 1

    def start_measuring(self, users: int) -> None:
        """Measure from now on, since all users of all processes have started."""
        self.users = users
        self.phase = "measured"


@events.init_command_line_parser.add_listener
def _add_options(parser: Any, **_: Any) -> None:
    add = option_adder(parser, "chats of a team")
    add("--think-s", type=float, default=20.0, help="mean think time before a question (20)")
    add("--turns", type=int, default=4, help="mean number of turns of a chat (4)")
    add("--hang-up", type=float, default=0.05, help="share of answers users abandon (0.05)")
    add("--patience-s", type=float, default=10.0, help="longest wait before they do (10)")
    add("--tokens-in", type=int, default=60, help="tokens of a question, about (60)")
    add("--tokens-out", type=int, default=150, help="mean token limit of an answer (150)")


@events.init.add_listener
def _take_part(environment: Environment, **_: Any) -> None:
    """Register for events and messages, before any user starts."""

    def on_spawning_complete(user_count: int, **_: Any) -> None:
        environment.team.start_measuring(user_count)  # type: ignore[attr-defined]

    environment.events.spawning_complete.add_listener(on_spawning_complete)
    if is_leader(environment):
        runner(environment).register_message("broken", on_write_failure)
    if _starts_with_locust(environment):
        _make_team(environment)


@events.test_start.add_listener
def _start(environment: Environment, **_: Any) -> None:
    if not _starts_with_locust(environment):
        _make_team(environment)


def _starts_with_locust(environment: Environment) -> bool:
    """Whether the team is made before the test starts, so that -t contains no model loading.

    A page may still change the options, and workers must be connected to see a failure.
    """
    options: Any = environment.parsed_options
    return options.headless and isinstance(environment.runner, LocalRunner)


def _make_team(environment: Environment) -> None:
    """Make the team of this process; if that fails, the start is aborted."""
    environment.process_exit_code = None
    try:
        team = Team(environment)
        if is_leader(environment):
            team.begin()
    except (BadOptions, BadTarget, SamplesError) as exc:
        abort_start(environment, str(exc))
        raise gevent.GreenletExit from exc  # ends this start; Locust's page stays
    environment.team = team  # type: ignore[attr-defined]


if __name__ == "__main__":
    run_as_locust(__file__)
