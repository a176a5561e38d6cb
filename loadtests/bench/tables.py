"""The benchmark's tables, and its file."""

from __future__ import annotations

import datetime as dt
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from loadtests.bench.floors import MEASURES, Measures, RoundsSpread, verdicts_of
from loadtests.bench.rounds import Settings
from loadtests.bench.script import BenchError
from loadtests.bench.ways import (
    find_nginx,
)


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
            spread = RoundsSpread.of(ways[way])
            table.add_row(
                shown, way, *(_figure(v) for v in (spread.low, spread.median, spread.high))
            )
    console.print(table)
    floors = Table(title="The gateway against its floors", title_justify="left")
    floors.add_column("median of the rounds")
    for name in ("measured", "floor", "goal", ""):
        floors.add_column(name, justify="right")
    for verdict in verdicts_of(measures):
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
    verdicts = verdicts_of(measures)
    report = {
        "machine": machine(argv),
        "settings": settings,
        "rounds": measures,
        "summary": {
            measure: {way: RoundsSpread.of(values) for way, values in ways.items()}
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
