"""What the gateway costs, measured beside nginx and beside no proxy at all.

Three ways to one fast fake engine, taken in turns on the same machine in the same
minutes, so that what is reported is a ratio and not the weather. Everything is watched
from outside: CPU seconds and memory of the proxy's whole process tree, what arrives at
a client, and when the engine sees a connection end. Nothing of the gateway is imported.

Here are the floors, the rounds, the arithmetic and the report. Who doubts a number reads
on in `fast_engine` (what is answered, and what makes it whole), `fast_client` (the load
and the meter) and `ways` (the processes and the hang-ups).
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias, cast

import msgspec
import uvloop
from rich.console import Console
from rich.table import Table

from loadtests.bench.fast_client import (
    Answered,
    FirstTokens,
    Job,
    Jsons,
    Meter,
    Result,
    Started,
    Streamed,
    Streams,
    generate_load,
    rotated,
)
from loadtests.bench.fast_engine import BenchError, serve_engine
from loadtests.bench.ways import (
    CASES,
    DIRECT,
    GATEWAY,
    NGINX,
    WAYS,
    HangUps,
    Way,
    client_running,
    engine_running,
    find_nginx,
    gateway_running,
    nginx_running,
    seen,
)

# --- what is promised ---------------------------------------------------------------------

STREAM_COST = "streams, chunks per CPU second"
STREAM_SHARE = "streams, share of nginx's"
STREAM_RATE = "streams, chunks per second"
STREAM_READS = "streams, chunks per read"
STREAM_WAKES = "streams, wake-ups per chunk"
JSON_COST = "JSON, requests per CPU second"
JSON_SHARE = "JSON, share of nginx's"
JSON_RATE = "JSON, requests per second"
JSON_CONNECTIONS = "JSON, engine connections per request"
TTFT = "TTFT p50, ms"
ADDED_TTFT = "TTFT p50 added to direct, ms"
RSS_IDLE = "RSS idle, MB"
RSS_PEAK = "RSS peak in the streams, MB"
HANG_UP = {case: f"hang-up {case}, ms" for case in CASES}
MEASURES = (
    STREAM_COST, STREAM_SHARE, STREAM_RATE, STREAM_READS, STREAM_WAKES, JSON_COST, JSON_SHARE,
    JSON_RATE, JSON_CONNECTIONS, TTFT, ADDED_TTFT, RSS_IDLE, RSS_PEAK, *HANG_UP.values(),
)  # fmt: skip


@dataclass(frozen=True)
class Floor:
    """A line that the gateway's median must not cross, and the one it is on its way to."""

    measure: str
    limit: float
    goal: float
    at_least: bool = False

    def holds(self, value: float) -> bool:
        """Whether a median is on the right side; the line itself is."""
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


# Below a floor a release does not go out; the goals are where this project wants to be.
FLOORS = (
    Floor(STREAM_SHARE, 0.25, goal=0.4, at_least=True),
    Floor(JSON_SHARE, 0.045, goal=0.13, at_least=True),
    Floor(ADDED_TTFT, 1.5, goal=1.5),
    Floor(RSS_PEAK, 100, goal=80),
    *(Floor(HANG_UP[case], 50, goal=50) for case in CASES),
)


# --- the arithmetic -----------------------------------------------------------------------

Measures: TypeAlias = dict[str, dict[str, list[float]]]
"""Measure, then way, then one value a round."""
Measured: TypeAlias = tuple[Measures, list[str]]
"""And what has to be remarked."""


@dataclass(frozen=True)
class Spread:
    """What the rounds came to."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(min(values), statistics.median(values), max(values))


@dataclass(frozen=True)
class Verdict:
    """A floor and what was measured; None where it was not, which is not a pass."""

    floor: Floor
    median: float | None

    @property
    def missed(self) -> bool:
        return self.median is not None and not self.floor.holds(self.median)

    def __str__(self) -> str:
        if self.median is None:
            return f"{self.floor.measure}: not measured"
        return f"{self.floor.measure}: {self.median:.3g}, the floor is {self.floor}"


def compare(measures: Measures) -> None:
    """Add the ratios and differences, each formed within its round."""

    def per_round(
        measure: str, way: str, base: str, form: Callable[[float, float], float]
    ) -> list[float]:
        values = measures.get(measure, {})
        pairs = zip(values.get(way, ()), values.get(base, ()), strict=False)
        return [form(value, against) for value, against in pairs]

    for share, cost in ((STREAM_SHARE, STREAM_COST), (JSON_SHARE, JSON_COST)):
        if values := per_round(cost, GATEWAY, NGINX, lambda ours, theirs: ours / theirs):
            measures[share] = {GATEWAY: values}
    for way in (NGINX, GATEWAY):
        if values := per_round(TTFT, way, DIRECT, lambda proxied, direct: proxied - direct):
            measures.setdefault(ADDED_TTFT, {})[way] = values


def judge(measures: Measures) -> list[Verdict]:
    """Every floor beside the median of its rounds."""
    verdicts = []
    for floor in FLOORS:
        values = measures.get(floor.measure, {}).get(GATEWAY)
        verdicts.append(Verdict(floor, Spread.of(values).median if values else None))
    return verdicts


# --- a run --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What to run; the defaults are what the floors are meant for."""

    ways: tuple[str, ...] = WAYS
    rounds: int = 5
    seconds: float = 5.0
    streams: int = 256
    rate: int = 10_240
    spread: bool = False
    json_connections: int = 64
    ttft_requests: int = 100
    hang_ups: int = 10

    @property
    def period_ms(self) -> int:
        """Between two tokens of a stream."""
        return max(1, round(self.streams / self.rate * 1000))

    @property
    def offered(self) -> float:
        """Tokens a second in all streams."""
        return self.streams * 1000 / self.period_ms

    @property
    def tokens(self) -> int:
        """Of each stream."""
        return max(3, round(self.seconds * 1000 / self.period_ms))


@dataclass
class Bench:
    """Runs the rounds and collects what they measure."""

    settings: Settings
    ways: Mapping[str, Way]
    engine: Way
    load: Callable[[Job], Result]
    say: Callable[[str], None]
    measures: Measures = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def note(self, measure: str, way: str, value: float) -> None:
        self.measures.setdefault(measure, {}).setdefault(way, []).append(value)

    def remark(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def run(self) -> None:
        """All rounds; raises `BenchError` where one has no result."""
        for way in self.ways.values():
            if way.proxy is not None:
                self.note(RSS_IDLE, way.name, Meter(way.proxy).rss_mb())
        for turn in range(self.settings.rounds):
            order = [self.ways[name] for name in rotated(tuple(self.ways), turn)]
            self.say(
                f"round {turn + 1} of {self.settings.rounds}: {', '.join(w.name for w in order)}"
            )
            for way in order:
                self._streams(way)
            for way in order:
                self._jsons(way)
            self._first_tokens(turn)
            for way in order:
                self._hang_ups(way)
        compare(self.measures)

    def _streams(self, way: Way) -> None:
        wanted = self.settings
        job = Streams(
            way.port, way.proxy, wanted.streams, wanted.tokens, wanted.period_ms, wanted.spread
        )
        with self._naming(way, "streams"):
            got = cast("Streamed", self.load(job))
        self.note(STREAM_RATE, way.name, got.events / got.elapsed_s)
        self.note(STREAM_READS, way.name, got.events / got.reads)
        if way.proxy is not None:
            self.note(STREAM_COST, way.name, got.events / self._enough(way, got.cpu_s))
            self.note(STREAM_WAKES, way.name, got.wakes / got.events)
            self.note(RSS_PEAK, way.name, got.peak_rss_mb)
        kept_up = wanted.tokens * wanted.period_ms / 1000 / got.elapsed_s
        if kept_up < 0.9:
            slow = f"{way.name} took {1 / kept_up:.2f} times as long as the tokens were spread over"
            if way.name == DIRECT and kept_up < 0.5:
                raise BenchError(f"{slow}: this machine is too slow for the load, lower --rate")
            self.remark(f"{slow}: it fell behind, or the machine had other things to do")

    def _jsons(self, way: Way) -> None:
        wanted = self.settings
        job = Jsons(way.port, way.proxy, wanted.json_connections, wanted.seconds)
        before = seen(self.engine.port).connections
        with self._naming(way, "JSON"):
            got = cast("Answered", self.load(job))
        made = seen(self.engine.port).connections - before
        self.note(JSON_RATE, way.name, got.requests / got.elapsed_s)
        if way.proxy is not None:
            self.note(JSON_COST, way.name, got.requests / self._enough(way, got.cpu_s))
            self.note(JSON_CONNECTIONS, way.name, made / got.asked)

    def _first_tokens(self, turn: int) -> None:
        ports = {name: self.ways[name].port for name in rotated(tuple(self.ways), turn)}
        got = cast("Started", self.load(FirstTokens(ports, self.settings.ttft_requests)))
        for name, values in got.ttft_ms.items():
            self.note(TTFT, name, statistics.median(values))

    def _hang_ups(self, way: Way) -> None:
        hang_ups = HangUps(way, self.engine.port)
        for case in CASES:
            if case == "queued" and way.name != GATEWAY:
                continue  # only the gateway has a queue
            with self._naming(way, f"hang-up, {case}"):
                times = [hang_ups.time_ms(case) for _ in range(self.settings.hang_ups)]
            self.note(HANG_UP[case], way.name, max(times))

    def _enough(self, way: Way, cpu_s: float) -> float:
        # The kernel tells CPU time in ticks of 10 ms.
        if cpu_s < 0.2:
            self.remark(
                f"{way.name} used {cpu_s:.2f} CPU seconds: too few to divide by, run longer"
            )
        return max(0.01, cpu_s)

    @contextmanager
    def _naming(self, way: Way, what: str) -> Iterator[None]:
        try:
            yield
        except BenchError as exc:
            raise type(exc)(f"{way.name}, {what}: {exc}") from exc


BUSY = 0.25  # load average a core from which on a report says so


def measure(settings: Settings, say: Callable[[str], None]) -> Measured:
    """Start everything, run all rounds, stop everything; raises `BenchError`."""
    with tempfile.TemporaryDirectory(prefix="overhead-") as made, ExitStack() as stack:
        scratch = Path(made)
        port, pid = stack.enter_context(engine_running())
        ways = {}
        if DIRECT in settings.ways:
            ways[DIRECT] = Way(DIRECT, port)
        if NGINX in settings.ways:
            ways[NGINX] = stack.enter_context(nginx_running(port, scratch))
        if GATEWAY in settings.ways:
            ways[GATEWAY] = stack.enter_context(gateway_running(port, scratch))
        load = stack.enter_context(client_running())
        # What others do here is in the caches and in the times, if less so in the ratios.
        busy = os.getloadavg()[0]
        bench = Bench(settings, ways, Way("engine", port, pid), load, say)
        if busy > BUSY * (os.cpu_count() or 1):
            bench.remark(f"the machine was not idle before the start: load average {busy:.1f}")
        bench.run()
        return bench.measures, bench.notes


# --- the report ---------------------------------------------------------------------------


def machine(argv: Sequence[str]) -> dict[str, Any]:
    """Where and how this was run."""
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    packages = ("uvloop", "httptools", "uvicorn", "fastapi", "msgspec")
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "nginx": _nginx_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": ["python", "-m", "loadtests.bench.overhead", *argv],
    }


def _nginx_version() -> str | None:
    try:
        said = subprocess.run([find_nginx(), "-v"], capture_output=True, text=True, check=True)
    except BenchError:
        return None
    return said.stderr.partition("nginx/")[2].strip()


def show(console: Console, settings: Settings, measures: Measures, notes: Sequence[str]) -> None:
    """The tables, and what has to be known to read them."""
    table = Table(title=f"What was measured, over {settings.rounds} rounds", title_justify="left")
    for name in ("measure", "way"):
        table.add_column(name)
    for name in ("min", "median", "max"):
        table.add_column(name, justify="right")
    for measure, ways in ((name, measures[name]) for name in MEASURES if name in measures):
        for shown, way in zip((measure, *[""] * len(ways)), ways, strict=False):
            spread = Spread.of(ways[way])
            table.add_row(
                shown, way, *(_figure(v) for v in (spread.low, spread.median, spread.high))
            )
    console.print(table)
    floors = Table(title="The gateway against its floors", title_justify="left")
    floors.add_column("median of the rounds")
    for name in ("measured", "floor", "goal", ""):
        floors.add_column(name, justify="right")
    for verdict in judge(measures):
        floor, median = verdict.floor, verdict.median
        floors.add_row(
            floor.measure,
            "" if median is None else _figure(median),
            str(floor),
            f"{floor.goal:g}",
            "not measured" if median is None else "MISSED" if verdict.missed else "holds",
        )
    console.print(floors)
    for text in _reading(settings):
        console.print(text, style="dim")
    for text in notes:
        console.print(f"note: {text}")


def _reading(settings: Settings) -> Iterator[str]:
    """What has to be known to read the tables."""
    yield (
        f"Streams: {settings.streams} at once, {settings.tokens} tokens each, one every "
        f"{settings.period_ms} ms, "
        + ("spread evenly" if settings.spread else "all in one step as vLLM sends them")
        + f" ({settings.offered:,.0f} a second). Chunks are SSE events that arrived at the client."
    )
    yield (
        f"JSON: {settings.json_connections} connections that ask without a pause. Both: CPU "
        "seconds and memory are those of the proxy's whole process tree."
    )
    yield (
        f"TTFT: {settings.ttft_requests} requests a round, one at a time on a machine that does "
        "nothing else, the ways in turn request by request."
    )
    yield (
        f"Hang-up: from close() until the engine saw its connection end (queued: until GET "
        f"/status did not count it), one at a time; the slowest of {settings.hang_ups} a round."
    )
    yield "Shares and differences are formed within a round, and the median is of these."


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def save(
    path: Path,
    argv: Sequence[str],
    settings: Settings,
    measures: Measures,
    notes: Sequence[str],
) -> None:
    """Write everything that was measured, each round of it."""
    verdicts = judge(measures)
    report = {
        "machine": machine(argv),
        "settings": settings,
        "rounds": measures,
        "summary": {
            measure: {way: Spread.of(values) for way, values in ways.items()}
            for measure, ways in measures.items()
        },
        "floors": [
            {
                "measure": verdict.floor.measure,
                "median": verdict.median,
                "floor": str(verdict.floor),
                "goal": verdict.floor.goal,
                "missed": verdict.missed,
            }
            for verdict in verdicts
        ],
        "notes": notes,
    }
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")


HELP = """\
Three ways lead to one fast fake engine: direct, through nginx, through the gateway. Each
round measures all of them, in an order that is rotated, and the median of the rounds is
held against the floors. It takes about four minutes, wants nginx (apt-get install nginx)
and a machine that does nothing else, and uses the loopback interface only.

  streams   {streams} chat streams at once: chunks per CPU second of the proxy, and its memory
  JSON      short answers, {json_connections} connections: requests per CPU second of the proxy
  TTFT      one stream at a time, request by request in turn: what is added to direct
  hang-up   from the client's close() until the engine sees its connection end; for a
            request in the queue, until the gateway's GET /status no longer counts it
"""

EXAMPLES = """\
examples:
  python -m loadtests.bench.overhead                                what `make bench` runs
  python -m loadtests.bench.overhead --json bench.json              and keep every round
  python -m loadtests.bench.overhead --rounds 1 --seconds 2         a quick look; do not quote it
  python -m loadtests.bench.overhead --only direct,nginx            is the harness itself sound?

Every answer is checked, word by word; one that is broken ends the run without a result.
exit status: 0 all floors hold (or were not measured), 1 a floor is missed, 2 no result
"""


def _ways(text: str) -> tuple[str, ...]:
    ways = tuple(text.split(","))
    if unknown := set(ways) - set(WAYS):
        raise argparse.ArgumentTypeError(f"no such way: {', '.join(unknown)}; {', '.join(WAYS)}")
    return tuple(way for way in WAYS if way in ways)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    usual = Settings()
    made = argparse.ArgumentParser(
        prog="python -m loadtests.bench.overhead",
        description=HELP.format(streams=usual.streams, json_connections=usual.json_connections),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--rounds", type=int, default=usual.rounds, help="default %(default)s; floors want 5")
    add(
        "--seconds",
        type=float,
        default=usual.seconds,
        help="of each measurement of streams and JSON (default %(default)g)",
    )
    add("--streams", type=int, default=usual.streams, help="at once (default %(default)s)")
    add(
        "--rate",
        type=int,
        default=usual.rate,
        help="tokens a second in all streams (default %(default)s); lower it where the "
        "machine is too slow for its own load",
    )
    add(
        "--spread",
        action="store_true",
        help="spread the tokens of the streams evenly, instead of all in one step as vLLM "
        "sends them: dearer for every proxy, kinder in the ratio; the floors are not meant for it",
    )
    add(
        "--only",
        type=_ways,
        default=WAYS,
        metavar="WAYS",
        help="some of direct,nginx,gateway; floors that need another are not measured",
    )
    add("--json", type=Path, metavar="PATH", help="write all rounds and the machine there")
    return made


def main(
    argv: Sequence[str],
    measure: Callable[[Settings, Callable[[str], None]], Measured] = measure,
) -> int:
    """Run the benchmark; the exit status."""
    asked = parser().parse_args(argv)
    settings = Settings(
        ways=asked.only,
        rounds=asked.rounds,
        seconds=asked.seconds,
        streams=asked.streams,
        rate=asked.rate,
        spread=asked.spread,
    )
    console, progress = Console(), Console(stderr=True)
    try:
        measures, notes = measure(settings, progress.print)
    except BenchError as exc:
        progress.print(f"no result: {exc}", style="red", markup=False)
        return 2
    show(console, settings, measures, notes)
    if asked.json is not None:
        save(asked.json, argv, settings, measures, notes)
    missed = [verdict for verdict in judge(measures) if verdict.missed]
    for verdict in missed:
        progress.print(f"missed: {verdict}", style="red", markup=False)
    return 1 if missed else 0


if __name__ == "__main__":
    # The engine and the client are this command again, in processes of their own.
    match sys.argv[1:]:
        case ["engine"]:
            uvloop.run(serve_engine())
        case ["client"]:
            generate_load()
        case arguments:
            sys.exit(main(arguments))
