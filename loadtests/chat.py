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
import sys
import time
from pathlib import Path
from typing import Any

import gevent
from locust import User, events, task
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

from loadtests import samples, stopwatch
from loadtests.load import BadOptions, preflight, the_host, without_key
from loadtests.people import Notes, as_program, runner, say
from loadtests.prompts import TOPICS, Prompts
from loadtests.samples import SamplesError, Writer
from loadtests.stopwatch import BadTarget, Target, Timing

#: What a chat page says before anything else.
SYSTEM = "You are a helpful assistant. Answer shortly where you can."
#: Spread of the time people think, of its logarithm: some are back at once, some get a coffee.
SPREAD = 1.0
#: What people wait after an answer that failed, seconds.
AFTER_A_FAILURE_S = 5.0


class Member(User):
    """One person of the team."""

    def on_start(self) -> None:
        """Take a seat, and a moment: not everybody begins at once."""
        self._team: Team = self.environment.team
        self._seat = self._team.seat()
        self._dice = random.Random(f"{self._team.seed}/{self._seat}")
        self._number = 0
        gevent.sleep(self._dice.uniform(0, self._team.think_s))

    @task
    def chat(self) -> None:
        """One chat, from its first question to its last."""
        topic = self._dice.choice(TOPICS)
        said = [{"role": "system", "content": SYSTEM}]
        for turn in range(self._dice.randint(1, 2 * self._team.turns - 1)):
            question = self._team.prompts.prompt(topic, turn, 0, self._seat, self._number)
            said.append({"role": "user", "content": question})
            timing = self._ask(said)
            gevent.sleep(self._thinks_s() if timing.error is None else AFTER_A_FAILURE_S)
            if timing.error is not None:
                return  # a new chat, as people do
            said.append({"role": "assistant", "content": timing.text})

    def _ask(self, said: list[dict[str, str]]) -> Timing:
        """One turn; who loses patience hangs up somewhere in the answer."""
        team, timing = self._team, Timing()
        longest = max(1, round(team.tokens_out * self._dice.lognormvariate(-0.125, 0.5)))
        asked = stopwatch.body(team.target, said, min(longest, 4 * team.tokens_out))
        leaves = self._dice.random() < team.hang_up
        answer = gevent.spawn(stopwatch.ask, team.target, asked, timing)
        try:
            patience_s = self._dice.uniform(0, team.patience_s) if leaves else None
            answer.join(patience_s)
        finally:
            if not answer.ready():  # our own patience, or the end of the test
                answer.kill()
                timing.failed("cut")
            team.notes.add(
                timing, target=team.target.label, loop="chat", level=team.people, repetition=1,
                user=self._seat, number=self._number, phase="measured",
            )  # fmt: skip
            self._number += 1
        return timing

    def _thinks_s(self) -> float:
        mean = math.log(self._team.think_s) - SPREAD**2 / 2
        return min(20 * self._team.think_s, self._dice.lognormvariate(mean, SPREAD))


class Team:
    """What all people of this process have in common.

    Raises:
        BadOptions: What was asked for makes no sense.
        BadTarget: Nobody was named to ask.
        SamplesError: The raw file cannot be written.
    """

    def __init__(self, environment: Environment) -> None:
        options: Any = environment.parsed_options
        for name in ("think_s", "patience_s", "turns", "tokens_in", "tokens_out"):
            if getattr(options, name) <= 0:
                raise BadOptions(f"--{name.replace('_', '-')} must be above zero")
        if not 0 <= options.hang_up <= 1:
            raise BadOptions("--hang-up is a share, from 0 to 1")
        self.target: Target = the_host(options)
        self.think_s: float = options.think_s
        self.patience_s: float = options.patience_s
        self.hang_up: float = options.hang_up
        self.turns: int = options.turns
        self.tokens_out: int = options.tokens_out
        self.seed: int = options.seed
        self.prompts = Prompts(options.tokens_in, options.seed)
        self._environment = environment
        self._writer = Writer(Path(options.raw or time.strftime("chat-%Y%m%d-%H%M%S.jsonl")))
        self.notes = Notes(environment, self._writer)
        self._seats = 0

    @property
    def people(self) -> int:
        """How many there are to be, of all processes."""
        options: Any = self._environment.parsed_options
        return options.num_users or 1

    def begin(self) -> None:
        """Say in the raw file how it was called, and see that anybody answers."""
        preflight(self.target)
        self._writer.write(samples.Run(samples.VERSION, time.time(), without_key(sys.argv)))

    def seat(self) -> int:
        """A number for a person."""
        its = runner(self._environment)
        first = 10_000 * max(0, its.worker_index) if isinstance(its, WorkerRunner) else 0
        self._seats += 1
        return first + self._seats - 1


@events.init_command_line_parser.add_listener
def _add_options(parser: Any, **_: Any) -> None:
    group = parser.add_argument_group("a team's day")

    def add(name: str, *, shown: bool = True, **how: Any) -> None:
        action = group.add_argument(name, **how)
        action.include_in_web_ui = shown
        action.is_secret = action.is_required = action.is_multiple = False

    add("--model", default="", help="the host's name of the model (the first it lists)")
    add("--api-key", env_var="OPENAI_API_KEY", shown=False, help="written down nowhere")
    add("--think-s", type=float, default=20.0, help="between answer and question, mean (20)")
    add("--turns", type=int, default=4, help="of a chat, mean (4)")
    add("--hang-up", type=float, default=0.05, help="share of answers nobody waits for (0.05)")
    add("--patience-s", type=float, default=10.0, help="the longest that those wait (10)")
    add("--tokens-in", type=int, default=60, help="of a question, about (60)")
    add("--tokens-out", type=int, default=150, help="of an answer, mean of the limits (150)")
    add("--seed", type=int, default=1, help="of everybody's dice (1)")
    add("--raw", default="", help="where every request is written (chat-DATE.jsonl)")


@events.init.add_listener
def _take_part(environment: Environment, **_: Any) -> None:
    """Before anybody comes: refuse what makes no sense, and learn how the writing may fail."""

    def broken(environment: Environment, msg: Any, **_: Any) -> None:
        if environment.process_exit_code is None:
            say(msg.data["why"])
        environment.process_exit_code = 2
        gevent.spawn(runner(environment).quit)

    if not isinstance(environment.runner, WorkerRunner):
        runner(environment).register_message("broken", broken)
    options: Any = environment.parsed_options
    if options.headless or isinstance(environment.runner, WorkerRunner):
        _gather(environment)


@events.test_start.add_listener
def _start(environment: Environment, **_: Any) -> None:
    options: Any = environment.parsed_options
    if not options.headless:  # the page may have changed what is asked for
        _gather(environment)


def _gather(environment: Environment) -> None:
    """Make the team of this process; ends it with 2 where that cannot be."""
    if isinstance(environment.runner, MasterRunner):
        return
    try:
        team = Team(environment)
        if not isinstance(environment.runner, WorkerRunner):
            team.begin()
    except (BadOptions, BadTarget, SamplesError) as exc:
        say(str(exc))
        raise SystemExit(2) from exc
    environment.team = team  # type: ignore[attr-defined]


if __name__ == "__main__":
    as_program(__file__)
