"""A small team's day, as a Locust file: people who chat, read, think, and sometimes give up.

    locust -f loadtests/chat.py --host http://127.0.0.1:8000 --model chat -u 8 -t 10m

Each person has chats of several turns. What was said so far goes along with every question, so
prompts grow as they do in a chat page. Between an answer and the next question people
think, mostly for a short while and now and then for a long one; some hang up in the middle of
an answer. Every request is a line of the raw file (`samples`, loop `chat`); Locust's tables
show TTFT and E2E. Works with Locust's page, its own load shapes and --processes.
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

#: What a chat page says before anything else.
CHAT_SYSTEM_PROMPT = "You are a helpful assistant. Answer shortly where you can."
#: Spread of the time people think, of its logarithm: some are back at once, some get a coffee.
THINK_TIME_SIGMA = 1.0
#: What people wait after an answer that failed, seconds.
CHAT_RETRY_S = 5.0


class ChatUser(User):
    """One person of the team."""

    def on_start(self) -> None:
        """Take a next_user, and a moment: not everybody begins at once."""
        self._team: Team = self.environment.team
        self._seat = self._team.next_user()
        self._dice = random.Random(f"{self._team.seed}/{self._seat}")
        self._number = 0
        gevent.sleep(self._dice.uniform(0, self._team.think_s))

    @task
    def chat(self) -> None:
        """One chat, from its first question to its last."""
        topic = self._dice.choice(TOPICS)
        said = [{"role": "system", "content": CHAT_SYSTEM_PROMPT}]
        for turn in range(self._dice.randint(1, 2 * self._team.turns - 1)):
            question = self._team.prompts.prompt(topic, turn, 0, self._seat, self._number)
            said.append({"role": "user", "content": question})
            timing = self._ask(said)
            gevent.sleep(self._thinks_s() if timing.error is None else CHAT_RETRY_S)
            if timing.error is not None:
                return  # a new chat, as people do
            said.append({"role": "assistant", "content": timing.text})

    def _ask(self, said: list[dict[str, str]]) -> Timing:
        """One turn; who loses patience hangs up somewhere in the answer."""
        team, timing = self._team, Timing()
        longest = max(1, round(team.tokens_out * self._dice.lognormvariate(-0.125, 0.5)))
        asked = stopwatch.request_body(team.target, said, min(longest, 4 * team.tokens_out))
        leaves = self._dice.random() < team.hang_up
        answer = gevent.spawn(stopwatch.ask, team.target, asked, timing)
        try:
            patience_s = self._dice.uniform(0, team.patience_s) if leaves else None
            answer.join(patience_s)
        finally:
            if not answer.ready():  # our own patience, or the end of the test
                answer.kill()
                timing.fail("cut")
            team.notes.add(
                timing, target=team.target.label, loop="chat", level=team.people, repetition=1,
                user=self._seat, number=self._number, phase=team.phase,
            )  # fmt: skip
            self._number += 1
        return timing

    def _thinks_s(self) -> float:
        mean = math.log(self._team.think_s) - THINK_TIME_SIGMA**2 / 2
        return min(20 * self._team.think_s, self._dice.lognormvariate(mean, THINK_TIME_SIGMA))


class Team:
    """What all people of this process have in common.

    Raises:
        BadOptions: What was asked for makes no sense.
        BadTarget: Nobody was named to ask.
        SamplesError: The raw file cannot be written.
    """

    def __init__(self, environment: Environment) -> None:
        options: Any = environment.parsed_options
        require_positive(options, "think_s", "patience_s")
        require_at_least(1, options, "turns", "tokens_in", "tokens_out")
        if not 0 <= options.hang_up <= 1:
            raise BadOptions(f"--hang-up {options.hang_up}: it is a share, from 0 to 1")
        self.target: Target = host_target(options)
        self.think_s: float = options.think_s
        self.patience_s: float = options.patience_s
        self.hang_up: float = options.hang_up
        self.turns: int = options.turns
        self.tokens_out: int = options.tokens_out
        self.seed: int = options.seed
        self.prompts = Prompts(options.tokens_in, options.seed)
        self.people: int = options.num_users or 1
        self.phase: samples.Phase = "warm-up"
        self._environment = environment
        self._writer = Writer(Path(options.raw))
        self.notes = RequestLog(environment, self._writer)
        self._seats = 0

    def begin(self) -> None:
        """Say in the raw file how it was called, and see that anybody answers."""
        self._writer.write(run_line(self._environment))
        preflight(self.target)

    def next_user(self) -> int:
        """A number for a person."""
        its = runner(self._environment)
        first = USERS_PER_WORKER * max(0, its.worker_index) if isinstance(its, WorkerRunner) else 0
        self._seats += 1
        return first + self._seats - 1

    def complete(self, people: int) -> None:
        """Everybody has come, in all processes: from now on requests count."""
        self.people = people
        self.phase = "measured"


@events.init_command_line_parser.add_listener
def _add_options(parser: Any, **_: Any) -> None:
    add = option_adder(parser, "a team's day")
    add("--think-s", type=float, default=20.0, help="between answer and question, mean (20)")
    add("--turns", type=int, default=4, help="of a chat, mean (4)")
    add("--hang-up", type=float, default=0.05, help="share of answers nobody waits for (0.05)")
    add("--patience-s", type=float, default=10.0, help="the longest that those wait (10)")
    add("--tokens-in", type=int, default=60, help="of a question, about (60)")
    add("--tokens-out", type=int, default=150, help="of an answer, mean of the limits (150)")


@events.init.add_listener
def _take_part(environment: Environment, **_: Any) -> None:
    """Before anybody comes."""

    def all_are_here(user_count: int, **_: Any) -> None:
        environment.team.complete(user_count)  # type: ignore[attr-defined]

    environment.events.spawning_complete.add_listener(all_are_here)
    if is_leader(environment):
        runner(environment).register_message("broken", on_write_failure)
    if _at_once(environment):
        _gather(environment)


@events.test_start.add_listener
def _start(environment: Environment, **_: Any) -> None:
    if not _at_once(environment):
        _gather(environment)


def _at_once(environment: Environment) -> bool:
    """Whether the team can gather before the start, so that -t has no loading of a model in it.

    A page may change what is asked for, and workers hear of a refusal once they are there.
    """
    options: Any = environment.parsed_options
    return options.headless and isinstance(environment.runner, LocalRunner)


def _gather(environment: Environment) -> None:
    """Make the team of this process; where that cannot be, nothing is asked."""
    environment.process_exit_code = None
    try:
        team = Team(environment)
        if is_leader(environment):
            team.begin()
    except (BadOptions, BadTarget, SamplesError) as exc:
        abort_start(environment, str(exc))
        raise gevent.GreenletExit from exc  # the start is off; the page is still there
    environment.team = team  # type: ignore[attr-defined]


if __name__ == "__main__":
    run_as_locust(__file__)
