r"""A small mixed day: users come and go, and each engine alone is the reference.

    python -m loadtests.measure.day --target ollama=http://127.0.0.1:11434=smollm2:135m \
        --target vllm=http://127.0.0.1:8001=SmolLM2-135M \
        --target gateway=http://127.0.0.1:8000=smollm2

Each phase has a number of users who send a request, read for a while, and send the next. The
targets share the machine, so they are measured one at a time, phase by phase, and a drift of
the machine affects all alike. Before a phase the previous one is repeated for some seconds
without being measured, since the state it leaves in the gateway (its current lane) is part of
the measurement. The mean E2E of each phase is printed beside that of the lane it should
match.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from loadtests.measure.prompts import PROMPT_WORDS, TOPICS
from loadtests.measure.stopwatch import BadTarget, Target

#: Phases with up to so many users are compared with Ollama alone, others with vLLM alone.
MAX_OLLAMA_PEOPLE = 2


@dataclass
class Observation:
    """The observations of one request; seconds are from just before it was sent."""

    e2e_s: float = 0.0
    ttft_s: float | None = None
    tokens: int | None = None
    finish: str | None = None
    lane: str | None = None
    reason: str | None = None
    error: str | None = None

    def process_event(self, event: dict[str, Any], at_s: float) -> None:
        """Take one event of the stream that arrived at `at_s`."""
        if event.get("error"):
            self.error = str(event["error"])
        if event.get("usage"):
            self.tokens = event["usage"]["completion_tokens"]
        for choice in event.get("choices") or ():
            self.finish = choice.get("finish_reason") or self.finish
            if choice["delta"].get("content") and self.ttft_s is None:
                self.ttft_s = at_s


@dataclass(frozen=True)
class DayRequest:
    """One request of one user."""

    target: str
    phase: int
    people: int
    person: int
    turn: int
    seen: Observation


@dataclass(frozen=True)
class Day:
    """The users of each phase, its length, and their think time."""

    people: Sequence[int] = (1, 12, 2, 24, 1)
    phase_s: float = 60.0
    lead_in_s: float = 10.0
    think_s: float = 3.0
    tokens: int = 64
    seed: int = field(default=7)

    def prompt(self, target: str, place: str) -> str:
        """A prompt of about 80 tokens: the same words for every target, after its own number.

        The engines behind the gateway are those of the other targets; without the number
        they would have it in their prefix cache.
        """
        number = random.Random(f"{self.seed}/{target}/{place}").randrange(10**6)
        rng = random.Random(f"{self.seed}/{place}")
        words = " ".join(rng.choices(PROMPT_WORDS, k=45))
        return (
            f"{number}. Write a long story about the {rng.choice(TOPICS)}, "
            f"and use these words: {words}."
        )


async def ask(client: httpx.AsyncClient, target: Target, prompt: str, tokens: int) -> Observation:
    """Send one streamed request, and observe its answer."""
    observed = Observation()
    body = {
        "model": target.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began = time.perf_counter()
    try:
        async with client.stream("POST", f"{target.url}/v1/chat/completions", json=body) as answer:
            observed.lane = answer.headers.get("x-gateway-lane")
            observed.reason = answer.headers.get("x-gateway-reason")
            if answer.status_code != httpx.codes.OK:
                observed.error = f"{answer.status_code}: {(await answer.aread()).decode()[:200]}"
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    observed.process_event(json.loads(line[6:]), time.perf_counter() - began)
    except httpx.HTTPError as exc:
        observed.error = f"{type(exc).__name__}: {exc}"
    observed.e2e_s = time.perf_counter() - began
    return observed


async def run(day: Day, targets: Sequence[Target], console: Console) -> list[DayRequest]:
    """Run the whole day on every target."""
    requests: list[DayRequest] = []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=600, limits=limits, trust_env=False) as client:
        for target in targets:
            await ask(client, target, "Say hello.", 4)  # loads the model
        for phase, people in enumerate(day.people):
            turn = phase % len(targets)  # each target is first in turn, since that may help or hurt
            for target in (*targets[turn:], *targets[:turn]):
                if phase:
                    before = DayPhase(phase, day.people[phase - 1], day.lead_in_s, counts=False)
                    await run_phase(day, target, before, client)
                seen = await run_phase(day, target, DayPhase(phase, people, day.phase_s), client)
                requests += seen
                console.print(
                    f"  {people:3d} users on {target.label}: {len(seen):3d} answers, "
                    f"mean {statistics.mean(one.seen.e2e_s for one in seen):.2f} s"
                )
    return requests


@dataclass(frozen=True)
class DayPhase:
    """A number of users for a time; a lead-in does not count."""

    number: int
    people: int
    seconds: float
    counts: bool = True


async def run_phase(
    day: Day, target: Target, phase: DayPhase, client: httpx.AsyncClient
) -> list[DayRequest]:
    """Run one phase on one target to its last answer; returns its requests."""
    requests: list[DayRequest] = []
    ends = time.perf_counter() + phase.seconds

    async def person(number: int) -> None:
        who = f"{phase.number}/{phase.counts}/{number}"
        rng = random.Random(f"{day.seed}/{who}")
        await asyncio.sleep(rng.uniform(0, day.think_s))
        turn = 0
        while time.perf_counter() < ends:
            prompt = day.prompt(target.label, f"{who}/{turn}")
            seen = await ask(client, target, prompt, day.tokens)
            requests.append(
                DayRequest(target.label, phase.number, phase.people, number, turn, seen)
            )
            turn += 1
            await asyncio.sleep(day.think_s * rng.uniform(0.5, 1.5))

    await asyncio.gather(*(person(number) for number in range(phase.people)))
    return requests


@dataclass(frozen=True)
class PhaseResult:
    """A phase: mean seconds on each target, and the gateway's ratio to the lane to match."""

    phase: int
    people: int
    means: dict[str, float]
    answers: dict[str, int]
    errors: int
    on: dict[str, int]
    against: str
    ratio: float | None


def phase_results(
    day: Day, requests: Sequence[DayRequest], labels: Sequence[str]
) -> list[PhaseResult]:
    """The results of all phases; means are over answered requests, errors are counted."""
    table = []
    for phase, people in enumerate(day.people):
        here = [a for a in requests if a.phase == phase]
        good = {
            label: [a for a in here if a.target == label and not a.seen.error] for label in labels
        }
        means = {label: statistics.mean(a.seen.e2e_s for a in g) for label, g in good.items() if g}
        lanes = [a.seen.lane or "?" for a in good.get("gateway", [])]
        against = "ollama" if people <= MAX_OLLAMA_PEOPLE else "vllm"
        ratio = means["gateway"] / means[against] if {"gateway", against} <= means.keys() else None
        table.append(
            PhaseResult(
                phase,
                people,
                means,
                {label: len(g) for label, g in good.items()},
                sum(1 for a in here if a.seen.error),
                {lane: lanes.count(lane) for lane in sorted(set(lanes))},
                against,
                ratio,
            )
        )
    return table


def misses(table: Sequence[PhaseResult], within: float) -> list[str]:
    """The phases in which the gateway was slower than allowed, and failures, in words."""
    slow = [
        f"phase {row.phase + 1} ({row.people} users): {row.ratio:.2f}x the time of {row.against}"
        for row in table
        if row.ratio is not None and row.ratio > within
    ]
    errors = sum(row.errors for row in table)
    return [*slow, *([f"{errors} requests failed"] if errors else [])]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the day; the exit status, 1 if the gateway was slower than allowed."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.measure.day",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--target", action="append", required=True, type=target_of, metavar="LABEL=URL=MODEL",
        help="a target; the verdict needs the labels ollama, vllm and gateway",
    )  # fmt: skip
    parser.add_argument("--people", type=people_of, default=(1, 12, 2, 24, 1), metavar="N,N,…")
    parser.add_argument("--phase-s", type=float, default=60.0, help="seconds a phase (60)")
    parser.add_argument(
        "--lead-in-s", type=float, default=10.0,
        help="seconds of the previous phase before each phase, not measured (10)",
    )  # fmt: skip
    parser.add_argument(
        "--think-s",
        type=float,
        default=3.0,
        help="mean think time in seconds, plus or minus half (3)",
    )
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of an answer (64)")
    parser.add_argument(
        "--within", type=float, default=1.15, help="highest allowed ratio to the lane (1.15)"
    )
    parser.add_argument("--json", type=Path, help="write every request and the table here")
    args = parser.parse_args(arguments)
    day = Day(args.people, args.phase_s, args.lead_in_s, args.think_s, args.tokens)
    console = Console()
    for target in args.target:
        console.print(f"[bold]{target.label}[/] {target.url} {target.model}")
    requests = asyncio.run(run(day, args.target, console))
    labels = [target.label for target in args.target]
    table = phase_results(day, requests, labels)
    show(console, table, labels)
    if args.json:
        write(args.json, day, table, requests)
    problems = misses(table, args.within)
    for problem in problems:
        console.print(f"[red]{problem}[/]")
    return 1 if problems else 0


def show(console: Console, table: Sequence[PhaseResult], labels: Sequence[str]) -> None:
    """Print the results of the day."""
    drawn = Table("users", *(f"{label}, s" for label in labels), "answered by", "against")
    for row in table:
        on = ", ".join(f"{lane} {count}" for lane, count in row.on.items())
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x {row.against}"
        means = (f"{row.means[label]:.2f}" if label in row.means else "-" for label in labels)
        drawn.add_row(str(row.people), *means, on, ratio)
    console.print(f"Mean seconds of a request, {platform.processor() or platform.machine()}")
    console.print(drawn)


def write(
    path: Path, day: Day, table: Sequence[PhaseResult], requests: Sequence[DayRequest]
) -> None:
    """Write the results and every request to a JSON file."""
    path.write_text(
        json.dumps(
            {
                "version": 1,
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
                "machine": platform.platform(),
                "command": sys.argv,
                "day": asdict(day),
                "table": [asdict(row) for row in table],
                "requests": [asdict(one) for one in requests],
            },
            indent=1,
        )
    )


def target_of(text: str) -> Target:
    """The target that a text `LABEL=URL=MODEL` describes."""
    try:
        return Target.read(text)
    except BadTarget as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def people_of(text: str) -> tuple[int, ...]:
    """The numbers of a text like `1,12,2`."""
    try:
        people = tuple(int(part) for part in text.split(","))
    except ValueError:
        people = ()
    if not people or min(people) < 1 or max(people) > 512:  # a slip, not a small team
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers from 1 to 512, as 1,12,2")
    return people


if __name__ == "__main__":
    sys.exit(main())
