"""The benchmark's result as tables and as a JSON file."""

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

from loadtests.bench.floors import LABELS, MEASURES, Measures, RoundsSpread, verdicts_of
from loadtests.bench.rounds import Settings
from loadtests.bench.script import BenchError
from loadtests.bench.ways import (
    find_nginx,
)


def machine(argv: Sequence[str]) -> dict[str, Any]:
    """The machine, the versions and the command line of this run."""
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
        output = subprocess.run([find_nginx(), "-v"], capture_output=True, text=True, check=True)
    except BenchError:
        return None
    return output.stderr.partition("nginx/")[2].strip()


def show(console: Console, settings: Settings, measures: Measures, notes: Sequence[str]) -> None:
    """Print the tables, and what a reader has to know of them."""
    table = Table(title=f"Measured over {settings.rounds} rounds", title_justify="left")
    for name in ("measure", "way"):
        table.add_column(name)
    for name in ("min", "median", "max"):
        table.add_column(name, justify="right")
    for measure, ways in ((name, measures[name]) for name in MEASURES if name in measures):
        label = LABELS.get(measure, measure)
        for shown, way in zip((label, *[""] * len(ways)), ways, strict=False):
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
            LABELS.get(floor.measure, floor.measure),
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
    """The conditions of each measure, a sentence each."""
    yield (
        f"Streams: {settings.streams} concurrent, {settings.tokens} tokens each, one every "
        f"{settings.period_ms} ms, "
        + ("spread evenly" if settings.spread else "all in one step as vLLM sends them")
        + f" ({settings.offered:,.0f} per second). Chunks are SSE events received by the client."
    )
    yield (
        f"JSON: {settings.json_connections} connections that send requests without a pause. Both: "
        "CPU seconds and memory are those of the proxy's whole process tree."
    )
    yield (
        f"TTFT: {settings.ttft_requests} requests a round, one at a time on an otherwise idle "
        "machine, alternating between the ways request by request."
    )
    yield (
        "Disconnect: from the client's close() until the engine sees its connection end "
        "(while queued: until GET /status no longer counts the request), one at a time; the "
        f"slowest of {settings.hang_ups} in each round."
    )
    yield "Shares and differences are computed within a round; the median is of these."


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def save(
    path: Path,
    argv: Sequence[str],
    settings: Settings,
    measures: Measures,
    notes: Sequence[str],
) -> None:
    """Write all rounds, their summary and the floors to a JSON file."""
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
