"""The rounds of the benchmark: every way in turn, every measurement."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from loadtests.bench.fast_client import (
    FirstTokens,
    FirstTokensResult,
    Job,
    Jsons,
    JsonsResult,
    ProcessMeter,
    Result,
    Streams,
    StreamsResult,
    rotated,
)
from loadtests.bench.floors import (
    HANG_UP,
    JSON_CONNECTIONS,
    JSON_COST,
    JSON_RATE,
    RSS_IDLE,
    RSS_PEAK,
    STREAM_COST,
    STREAM_RATE,
    STREAM_READS,
    STREAM_WAKES,
    TTFT,
    Measured,
    Measures,
    add_ratios,
)
from loadtests.bench.script import BenchError
from loadtests.bench.ways import (
    CASES,
    DIRECT,
    GATEWAY,
    NGINX,
    WAYS,
    DisconnectTimer,
    Way,
    client_running,
    engine_log,
    engine_running,
    gateway_running,
    nginx_running,
)


@dataclass(frozen=True)
class Settings:
    """What to run; the floors are meant for the defaults."""

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
        """Milliseconds between two tokens of a stream."""
        return max(1, round(self.streams / self.rate * 1000))

    @property
    def offered(self) -> float:
        """Tokens per second of all streams together."""
        return self.streams * 1000 / self.period_ms

    @property
    def tokens(self) -> int:
        """Tokens of each stream."""
        return max(3, round(self.seconds * 1000 / self.period_ms))


@dataclass
class Bench:
    """Runs the rounds and collects their measures."""

    settings: Settings
    ways: Mapping[str, Way]
    engine: Way
    load: Callable[[Job], Result]
    say: Callable[[str], None]
    measures: Measures = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def record(self, measure: str, way: str, value: float) -> None:
        self.measures.setdefault(measure, {}).setdefault(way, []).append(value)

    def add_note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def run(self) -> None:
        """Run all rounds; raises `BenchError` if one has no result."""
        for way in self.ways.values():
            if way.proxy is not None:
                self.record(RSS_IDLE, way.name, ProcessMeter(way.proxy).rss_mb())
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
                self._disconnects(way)
        add_ratios(self.measures)

    def _streams(self, way: Way) -> None:
        wanted = self.settings
        job = Streams(
            way.port, way.proxy, wanted.streams, wanted.tokens, wanted.period_ms, wanted.spread
        )
        with self._naming_errors(way, "streams"):
            got = cast("StreamsResult", self.load(job))
        self.record(STREAM_RATE, way.name, got.events / got.elapsed_s)
        self.record(STREAM_READS, way.name, got.events / got.reads)
        if way.proxy is not None:
            self.record(STREAM_COST, way.name, got.events / self._usable_cpu_s(way, got.cpu_s))
            self.record(STREAM_WAKES, way.name, got.wakes / got.events)
            self.record(RSS_PEAK, way.name, got.peak_rss_mb)
        kept_up = wanted.tokens * wanted.period_ms / 1000 / got.elapsed_s
        if kept_up < 0.9:
            slow = f"{way.name} took {1 / kept_up:.2f} times as long as the tokens were spread over"
            if way.name == DIRECT and kept_up < 0.5:
                raise BenchError(f"{slow}: this machine is too slow for the load, lower --rate")
            self.add_note(f"{slow}: it fell behind, or the machine had other things to do")

    def _jsons(self, way: Way) -> None:
        wanted = self.settings
        job = Jsons(way.port, way.proxy, wanted.json_connections, wanted.seconds)
        before = engine_log(self.engine.port).connections
        with self._naming_errors(way, "JSON"):
            got = cast("JsonsResult", self.load(job))
        made = engine_log(self.engine.port).connections - before
        self.record(JSON_RATE, way.name, got.requests / got.elapsed_s)
        if way.proxy is not None:
            self.record(JSON_COST, way.name, got.requests / self._usable_cpu_s(way, got.cpu_s))
            self.record(JSON_CONNECTIONS, way.name, made / got.asked)

    def _first_tokens(self, turn: int) -> None:
        ports = {name: self.ways[name].port for name in rotated(tuple(self.ways), turn)}
        got = cast("FirstTokensResult", self.load(FirstTokens(ports, self.settings.ttft_requests)))
        for name, values in got.ttft_ms.items():
            self.record(TTFT, name, statistics.median(values))

    def _disconnects(self, way: Way) -> None:
        timer = DisconnectTimer(way, self.engine.port)
        for case in CASES:
            if case == "queued" and way.name != GATEWAY:
                continue  # only the gateway has a queue
            with self._naming_errors(way, f"client disconnect, {case}"):
                times = [timer.time_ms(case) for _ in range(self.settings.hang_ups)]
            self.record(HANG_UP[case], way.name, max(times))

    def _usable_cpu_s(self, way: Way, cpu_s: float) -> float:
        # The kernel counts CPU time in ticks of 10 ms.
        if cpu_s < 0.2:
            self.add_note(
                f"{way.name} used {cpu_s:.2f} CPU seconds: too few to divide by, run longer"
            )
        return max(0.01, cpu_s)

    @contextmanager
    def _naming_errors(self, way: Way, what: str) -> Iterator[None]:
        try:
            yield
        except BenchError as exc:
            raise type(exc)(f"{way.name}, {what}: {exc}") from exc


#: Load average per core before the start from which on the report has a note.
BUSY = 0.25


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
        # Other load changes caches and times, though less so the ratios.
        busy = os.getloadavg()[0]
        bench = Bench(settings, ways, Way("engine", port, pid), load, say)
        if busy > BUSY * (os.cpu_count() or 1):
            bench.add_note(f"the machine was not idle before the start: load average {busy:.1f}")
        bench.run()
        return bench.measures, bench.notes
