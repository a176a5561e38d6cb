"""The mixed day on the real engines of the rig: `make day`.

Starts the real Ollama and the real vLLM on this machine's CPU, measures their profile, starts
a gateway that decides by it, and runs `loadtests.measure.day` on all three.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx
import msgspec
from rich.console import Console

from gateway.routing.profile import VERSION, LaneProfile, Profile
from loadtests.measure import day
from loadtests.measure.stopwatch import Target
from tests.engines import rig

START_S = 30.0
#: Concurrencies at which the profile is measured, and the seconds of each.
LEVELS = (1, 2, 4, 8, 16, 24)
LEVEL_S = 8.0


def main() -> int:
    """Run the day with the arguments of `loadtests.measure.day`, the targets filled in."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing is left running
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("--assumed", action="store_true", help="use the assumed profile")
    own, arguments = parser.parse_known_args()
    with rig.ollama() as ollama, rig.vllm() as vllm, tempfile.TemporaryDirectory() as scratch:
        lanes = [
            Target("ollama", ollama.url, ollama.model),
            Target("vllm", vllm.url, vllm.model),
        ]
        model: dict[str, object] = {
            "lanes": {lane.label: {"model": lane.model} for lane in lanes},
        }
        if not own.assumed:
            path = Path(scratch, "profile.json")
            path.write_bytes(msgspec.json.encode(asyncio.run(measured(lanes, Console()))))
            model["profile"] = str(path)
        environment = os.environ | {
            "TWOLANE_ENGINES__OLLAMA__URLS": json.dumps([ollama.url]),
            "TWOLANE_ENGINES__VLLM__URLS": json.dumps([vllm.url]),
            "TWOLANE_MODELS": json.dumps({"smollm2": model}),
            "TWOLANE_LOG": "off",
        }
        with gateway(environment) as url:
            targets = [*lanes, Target("gateway", url, "smollm2")]
            flags = [f"--target={one.label}={one.url}={one.model}" for one in targets]
            return day.main([*flags, *arguments])


async def measured(lanes: Sequence[Target], console: Console) -> Profile:
    """The profile of both lanes, measured at every level without a pause."""
    steady = day.Day(think_s=0.0, seed=1)
    times: dict[str, list[float]] = {lane.label: [] for lane in lanes}
    async with httpx.AsyncClient(timeout=600, trust_env=False) as client:
        for level in LEVELS:
            for lane in lanes:
                warm_up = day.DayPhase(level, level, 1.0, counts=False)
                await day.run_phase(steady, lane, warm_up, client)
                seen = await day.run_phase(
                    steady, lane, day.DayPhase(level, level, LEVEL_S), client
                )
                mean_s = statistics.mean(one.seen.e2e_s for one in seen)
                times[lane.label].append(mean_s)
                console.print(f"  {level:3d} concurrent on {lane.label}: {mean_s:.2f} s")
    return Profile(
        version=VERSION,
        source="measured",
        lanes={label: LaneProfile(LEVELS, tuple(seconds)) for label, seconds in times.items()},
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


@contextmanager
def gateway(environment: dict[str, str]) -> Iterator[str]:
    """The URL of a gateway with these environment variables."""
    port = rig.free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway", "serve", "--port", str(port)], env=environment
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(f"{url}/ready")
        yield url
    finally:
        process.terminate()
        process.wait(60)


def wait_until_ready(url: str) -> None:
    """Return when it answers 200; raises TimeoutError."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=2):  # noqa: S310 - our own gateway
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise TimeoutError(f"the gateway is not ready at {url}")


if __name__ == "__main__":
    sys.exit(main())
