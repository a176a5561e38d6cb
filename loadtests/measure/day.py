r"""A mixed day in small: people come and go, and each engine alone is the yardstick.

    python -m loadtests.measure.day --target ollama=http://127.0.0.1:11434=smollm2:135m \
        --target vllm=http://127.0.0.1:8001=SmolLM2-135M \
        --target gateway=http://127.0.0.1:8000=smollm2

So many people in each phase, each asking, reading for a while, and asking again. One
target at a time, since they share the machine, and phase by phase, so that what the
machine does over the minutes falls on all of them alike. Before a phase some seconds of
the one before are lived through without being counted: what that leaves behind in the
gateway (which lane it was on) is part of the measurement. The mean response time (from
send to last byte) of each phase is printed beside that of the lane it should match.
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

#: Ollama's own time is the measure of phases with up to so many people, vLLM's above.
MAX_OLLAMA_PEOPLE = 2


@dataclass
class Observation:
    """What one request showed; seconds from just before it was sent."""

    e2e_s: float = 0.0
    ttft_s: float | None = None
    tokens: int | None = None
    finish: str | None = None
    lane: str | None = None
    reason: str | None = None
    error: str | None = None

    def process_event(self, event: dict[str, Any], at_s: float) -> None:
        """Take note of one event of the stream."""
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
    """One request of one person."""

    target: str
    phase: int
    people: int
    person: int
    turn: int
    seen: Observation


@dataclass(frozen=True)
class Day:
    """Who is there, for how long, and how long they think."""

    people: Sequence[int] = (1, 12, 2, 24, 1)
    phase_s: float = 60.0
    lead_in_s: float = 10.0
    think_s: float = 3.0
    tokens: int = 64
    seed: int = field(default=7)

    def prompt(self, target: str, asked: str) -> str:
        """About 80 tokens: the same words for every target, after a number of its own.

        The gateway's engines are those of the other targets, and would have them cached.
        """
        number = random.Random(f"{self.seed}/{target}/{asked}").randrange(10**6)
        dice = random.Random(f"{self.seed}/{asked}")
        words = " ".join(dice.choices(PROMPT_WORDS, k=45))
        return (
            f"{number}. Write a long story about the {dice.choice(TOPICS)}, "
            f"and use these words: {words}."
        )


async def ask(client: httpx.AsyncClient, target: Target, prompt: str, tokens: int) -> Observation:
    """Ask once, streaming."""
    seen = Observation()
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
            seen.lane = answer.headers.get("x-gateway-lane")
            seen.reason = answer.headers.get("x-gateway-reason")
            if answer.status_code != httpx.codes.OK:
                seen.error = f"{answer.status_code}: {(await answer.aread()).decode()[:200]}"
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    seen.process_event(json.loads(line[6:]), time.perf_counter() - began)
    except httpx.HTTPError as exc:
        seen.error = f"{type(exc).__name__}: {exc}"
    seen.e2e_s = time.perf_counter() - began
    return seen


async def run(day: Day, targets: Sequence[Target], console: Console) -> list[DayRequest]:
    """The whole day on every target."""
    asked: list[DayRequest] = []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=600, limits=limits, trust_env=False) as client:
        for target in targets:
            await ask(client, target, "Say hello.", 4)  # loads what is to be loaded
        for phase, people in enumerate(day.people):
            turn = phase % len(targets)  # who is first, gains or loses: each is first in turn
            for target in (*targets[turn:], *targets[:turn]):
                if phase:
                    before = DayPhase(phase, day.people[phase - 1], day.lead_in_s, counts=False)
                    await run_phase(day, target, before, client)
                seen = await run_phase(day, target, DayPhase(phase, people, day.phase_s), client)
                asked += seen
                console.print(
                    f"  {people:3d} people on {target.label}: {len(seen):3d} answers, "
                    f"mean {statistics.mean(one.seen.e2e_s for one in seen):.2f} s"
                )
    return asked


@dataclass(frozen=True)
class DayPhase:
    """So many people for so long; those of a lead-in are not counted."""

    number: int
    people: int
    seconds: float
    counts: bool = True


async def run_phase(
    day: Day, target: Target, phase: DayPhase, client: httpx.AsyncClient
) -> list[DayRequest]:
    """One phase on one target, to its last answer."""
    asked: list[DayRequest] = []
    ends = time.perf_counter() + phase.seconds

    async def person(number: int) -> None:
        who = f"{phase.number}/{phase.counts}/{number}"
        dice = random.Random(f"{day.seed}/{who}")
        await asyncio.sleep(dice.uniform(0, day.think_s))
        turn = 0
        while time.perf_counter() < ends:
            prompt = day.prompt(target.label, f"{who}/{turn}")
            seen = await ask(client, target, prompt, day.tokens)
            asked.append(DayRequest(target.label, phase.number, phase.people, number, turn, seen))
            turn += 1
            await asyncio.sleep(day.think_s * dice.uniform(0.5, 1.5))

    await asyncio.gather(*(person(number) for number in range(phase.people)))
    return asked


@dataclass(frozen=True)
class PhaseResult:
    """A phase: mean seconds on each target, and the gateway against the lane to match."""

    phase: int
    people: int
    means: dict[str, float]
    answers: dict[str, int]
    errors: int
    on: dict[str, int]
    against: str
    ratio: float | None


def phase_results(
    day: Day, asked: Sequence[DayRequest], labels: Sequence[str]
) -> list[PhaseResult]:
    """The day's table. Means are over answers that came; errors are counted beside them."""
    table = []
    for phase, people in enumerate(day.people):
        here = [a for a in asked if a.phase == phase]
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
    """What is worse than allowed, in words."""
    said = [
        f"phase {row.phase + 1} ({row.people} people): {row.ratio:.2f}x of {row.against}'s own time"
        for row in table
        if row.ratio is not None and row.ratio > within
    ]
    errors = sum(row.errors for row in table)
    return [*said, *([f"{errors} requests failed"] if errors else [])]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the day; 1 where the gateway was worse than allowed."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.measure.day",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--target", action="append", required=True, type=target_of, metavar="LABEL=URL=MODEL",
        help="ollama, vllm and gateway are the labels the verdict looks for",
    )  # fmt: skip
    parser.add_argument("--people", type=people_of, default=(1, 12, 2, 24, 1), metavar="N,N,…")
    parser.add_argument("--phase-s", type=float, default=60.0, help="seconds a phase (60)")
    parser.add_argument(
        "--lead-in-s", type=float, default=10.0,
        help="seconds of the phase before, which are not counted (10)",
    )  # fmt: skip
    parser.add_argument(
        "--think-s", type=float, default=3.0, help="mean seconds of thought, give or take half (3)"
    )
    parser.add_argument("--tokens", type=int, default=64, help="most tokens an answer (64)")
    parser.add_argument("--within", type=float, default=1.15, help="allowed ratio (1.15)")
    parser.add_argument("--json", type=Path, help="write every request and the table here")
    args = parser.parse_args(arguments)
    day = Day(args.people, args.phase_s, args.lead_in_s, args.think_s, args.tokens)
    console = Console()
    for target in args.target:
        console.print(f"[bold]{target.label}[/] {target.url} {target.model}")
    asked = asyncio.run(run(day, args.target, console))
    labels = [target.label for target in args.target]
    table = phase_results(day, asked, labels)
    show(console, table, labels)
    if args.json:
        write(args.json, day, table, asked)
    problems = misses(table, args.within)
    for problem in problems:
        console.print(f"[red]{problem}[/]")
    return 1 if problems else 0


def show(console: Console, table: Sequence[PhaseResult], labels: Sequence[str]) -> None:
    """Print the day."""
    drawn = Table("people", *(f"{label}, s" for label in labels), "answered by", "against")
    for row in table:
        on = ", ".join(f"{lane} {count}" for lane, count in row.on.items())
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x {row.against}"
        means = (f"{row.means[label]:.2f}" if label in row.means else "-" for label in labels)
        drawn.add_row(str(row.people), *means, on, ratio)
    console.print(f"Mean seconds a request, {platform.processor() or platform.machine()}")
    console.print(drawn)


def write(path: Path, day: Day, table: Sequence[PhaseResult], asked: Sequence[DayRequest]) -> None:
    """Keep everything that was measured."""
    path.write_text(
        json.dumps(
            {
                "version": 1,
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
                "machine": platform.platform(),
                "command": sys.argv,
                "day": asdict(day),
                "table": [asdict(row) for row in table],
                "requests": [asdict(one) for one in asked],
            },
            indent=1,
        )
    )


def target_of(text: str) -> Target:
    """`LABEL=URL=MODEL`."""
    try:
        return Target.read(text)
    except BadTarget as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc


def people_of(text: str) -> tuple[int, ...]:
    """`1,12,2` as numbers."""
    try:
        people = tuple(int(part) for part in text.split(","))
    except ValueError:
        people = ()
    if not people or min(people) < 1 or max(people) > 512:  # a slip, not a small team
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers from 1 to 512, as 1,12,2")
    return people


if __name__ == "__main__":
    sys.exit(main())
