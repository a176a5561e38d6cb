"""Simulates a GPU with room for one engine, on the CPU with real engines: `make switch`.

A gateway starts the real Ollama and the real vLLM itself. A memory budget stands for the GPU:
the two do not fit into it together, so the gateway must stop one engine, or unload its model,
before the other may load. One user sends requests, then six, then one again, each without
a pause; the GPU moves to vLLM and, after an idle time, to Ollama. The record has every request
and, twice a second, the holder of the GPU, the demand, regret and switch cost.

    python -m tests.engines.switch --picture docs/switch.svg --json switch.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from tests.engines import rig
from tests.support.waiting import until

CROWD = 6
#: Seconds of a request by concurrency, measured by `make day` on two CPU cores, so the faster
#: lane is known. On another machine the times differ more than their ratios.
PROFILE = {
    "version": 1,
    "source": "measured",
    "machine": "two CPU cores, SmolLM2-135M",
    "lanes": {
        "ollama": {"at_once": [1, 2, 4, 8, 16], "seconds": [0.73, 1.43, 2.59, 4.86, 9.11]},
        "vllm": {"at_once": [1, 2, 4, 8, 16], "seconds": [1.37, 1.44, 1.43, 1.97, 2.67]},
    },
}
#: GiB. vLLM uses about 3.3 on the CPU, Ollama about 0.4 with its model and 0.1 without.
BUDGET_GIB = 4.0
NEEDS_GIB = {"ollama": 3.0, "vllm": 3.8}
#: Resident memory from which on a vLLM process has its model loaded, bytes.
LOADED_BYTES = 2**30
#: Longest time until the GPU has moved after a change of demand, seconds.
MOVE_TIMEOUT_S = 900.0
#: How often status and memory are sampled, seconds.
SAMPLE_S = 0.5


@dataclass
class TimedRequest:
    """One request: when it was sent and was over, seconds since the start, and how it ended."""

    person: int
    sent_s: float
    over_s: float = 0.0
    status: int = 0
    lane: str = ""
    reason: str = ""
    pings: int = 0
    finish: str | None = None
    error: str | None = None


@dataclass
class Record:
    """The whole run; `moments` are samples of the gateway's status and of loaded engines."""

    requests: list[TimedRequest] = field(default_factory=list)
    moments: list[dict[str, Any]] = field(default_factory=list)
    passages: list[dict[str, Any]] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None
    left: list[str] = field(default_factory=list)


@dataclass
class Stage:
    """The running gateway, and the ports of its engines."""

    url: str
    process: subprocess.Popen[bytes]
    ports: dict[str, int]
    began: float

    @property
    def now_s(self) -> float:
        return time.monotonic() - self.began


def configuration(ports: dict[str, int], port: int, scratch: Path) -> dict[str, Any]:
    """The settings that an operator would write, with a memory budget in place of a GPU."""
    ollama = f"http://127.0.0.1:{ports['ollama']}"
    models = {"ollama": rig.OLLAMA_MODEL, "vllm": rig.VLLM_MODEL}
    return {
        "port": port,
        "engines": {
            "ollama": {
                "urls": [ollama],
                "command": ["ollama", "serve"],
                "environment": rig.ollama_environment(ollama, None),
                "log": str(scratch / "ollama.log"),
            },
            "vllm": {
                "urls": [f"http://127.0.0.1:{ports['vllm']}"],
                "command": rig.vllm_command(ports["vllm"]),
                "environment": rig.vllm_environment(),
                "log": str(scratch / "vllm.log"),
            },
        },
        "models": {
            "smollm2": {
                "placement": "exclusive",
                "profile": str(scratch / "profile.json"),
                "lanes": {
                    kind: {"model": models[kind], "memory_gib": NEEDS_GIB[kind]} for kind in models
                },
            }
        },
        "gpu": {
            "budget_gib": BUDGET_GIB,
            "handover_s": 5,
            "idle_release_s": 15,
            "load_s": 300,
            "lease": str(scratch / "lease"),
        },
        "limits": {"heartbeat_s": 2},
    }


@contextlib.contextmanager
def staged(scratch: Path) -> Iterator[Stage]:
    """A gateway with its own engines; all of them end with the context."""
    ports = {"ollama": rig.free_port(), "vllm": rig.free_port()}
    port = rig.free_port()
    config = scratch / "twolane.yaml"
    (scratch / "profile.json").write_text(json.dumps(PROFILE))
    config.write_text(yaml.safe_dump(configuration(ports, port, scratch)))
    with (scratch / "gateway.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway", "serve", "--config", str(config)], stderr=log
        )
    try:
        yield Stage(f"http://127.0.0.1:{port}", process, ports, time.monotonic())
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(120)


async def play(stage: Stage, record: Record, *, patient: bool = False) -> None:
    """One user, six, one; returns when the GPU is back at Ollama and has answered there.

    After the six users there are no requests until the memory is released, so the next user
    finds the GPU free. With `patient` one user keeps sending instead, until regret exceeds
    the switch cost of the way back, a quarter of an hour.
    """
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=stage.url, timeout=600, limits=limits) as client,
        watched(stage, client, record),
    ):
        await until_gpu(client, lambda gpu: gpu["step"] == "held", within_s=120)
        for _ in range(3):
            await ask(stage, client, record, 0)
        async with asking(stage, client, record, CROWD):
            await until_gpu(client, held_by("vllm"))
            await asyncio.sleep(15)
        if patient:
            async with asking(stage, client, record, 1):
                await until_gpu(client, held_by("ollama"))
        else:
            await until_gpu(client, lambda gpu: gpu["step"] == "free")
        for _ in range(3):
            await ask(stage, client, record, 0)
        record.passages = (await status(client))["gpu"]["passages"]


def held_by(kind: str) -> Callable[[dict[str, Any]], bool]:
    return lambda gpu: gpu["step"] == "held" and gpu["holder"] == kind


async def status(client: httpx.AsyncClient) -> dict[str, Any]:
    content: dict[str, Any] = (await client.get("/status")).json()
    return content


async def until_gpu(
    client: httpx.AsyncClient,
    happened: Callable[[dict[str, Any]], bool],
    within_s: float = MOVE_TIMEOUT_S,
) -> None:
    """Return when this holds of the GPU; raises TimeoutError with its last state."""
    gpu: dict[str, Any] = {}

    async def holds() -> bool:
        with contextlib.suppress(httpx.TransportError):  # the gateway is still starting
            gpu.update((await status(client))["gpu"])
            return happened(gpu)
        return False

    await until(holds, within_s, every_s=SAMPLE_S, describe=lambda: gpu)


@contextlib.asynccontextmanager
async def asking(
    stage: Stage, client: httpx.AsyncClient, record: Record, people: int
) -> AsyncIterator[None]:
    """Users who send requests without a pause; leaving waits for their last answers."""
    active = [True]

    async def person(number: int) -> None:
        while active[0]:
            await ask(stage, client, record, number)

    tasks = [asyncio.create_task(person(number)) for number in range(people)]
    try:
        yield
    finally:
        active[0] = False
        await asyncio.gather(*tasks)


async def ask(stage: Stage, client: httpx.AsyncClient, record: Record, person: int) -> None:
    """Send one streamed request, and record how it ended."""
    timed = TimedRequest(person, stage.now_s)
    record.requests.append(timed)
    body = {
        "model": "smollm2",
        "messages": [
            {"role": "user", "content": f"{len(record.requests)}: write a story about the sea."}
        ],
        "max_tokens": 64,
        "stream": True,
    }
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            timed.status = answer.status_code
            timed.lane = answer.headers["x-gateway-lane"]
            timed.reason = answer.headers["x-gateway-reason"]
            async for line in answer.aiter_lines():
                timed.pings += line.startswith(":")
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        timed.error = str(event["error"])
                    for choice in event.get("choices") or ():
                        timed.finish = choice.get("finish_reason") or timed.finish
    except httpx.HTTPError as exc:
        timed.error = f"{type(exc).__name__}: {exc}"
    timed.over_s = stage.now_s


@contextlib.asynccontextmanager
async def watched(stage: Stage, client: httpx.AsyncClient, record: Record) -> AsyncIterator[None]:
    """Meanwhile the gateway's status and the loaded engines are sampled into the record."""

    async def watch() -> None:
        while True:
            moment: dict[str, Any] = {"at_s": round(stage.now_s, 2)}
            with contextlib.suppress(httpx.TransportError):
                content = await status(client)
                model = content["models"]["smollm2"]
                moment |= {
                    "demand": model["demand"],
                    "waiting": model["waiting"],
                    **{
                        name: content["gpu"][name]
                        for name in ("holder", "step", "regret", "price", "moves")
                    },
                }
            moment["resident"] = await resident(stage)
            record.moments.append(moment)
            await asyncio.sleep(SAMPLE_S)

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


async def resident(stage: Stage) -> list[str]:
    """The engines with a model in memory, by Ollama's API and by vLLM's resident memory."""
    loaded = []
    async with httpx.AsyncClient(timeout=5) as client:
        with contextlib.suppress(httpx.TransportError):
            answer = await client.get(f"http://127.0.0.1:{stage.ports['ollama']}/api/ps")
            if answer.json()["models"]:
                loaded.append("ollama")
    if await asyncio.to_thread(_vllm_loaded, stage):
        loaded.append("vllm")
    return loaded


def _vllm_loaded(stage: Stage) -> bool:
    sizes = [_size(process) for process in processes_of(stage, "vllm")]
    return max(sizes, default=0) > LOADED_BYTES


def _size(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0  # it has ended


def processes_of(stage: Stage, kind: str) -> list[psutil.Process]:
    """The processes of one engine, wherever they are in the process tree."""
    marks = {"vllm": str(stage.ports["vllm"]), "ollama": f":{stage.ports['ollama']}"}
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            marked = marks[kind] in " ".join(process.cmdline())
            if kind == "ollama":
                marked = process.environ().get("OLLAMA_HOST", "").endswith(marks[kind])
            if marked and process.pid != stage.process.pid:
                found |= {process, *process.children(recursive=True)}
    return list(found)


def run(scratch: Path, *, patient: bool = False) -> Record:
    """Run the whole scenario, including start and end of the engines."""
    record = Record()
    with staged(scratch) as stage:
        asyncio.run(play(stage, record, patient=patient))
    record.exit_code = stage.process.returncode
    record.left = [
        f"{process.pid} {kind}" for kind in stage.ports for process in processes_of(stage, kind)
    ]
    lines = (scratch / "gateway.log").read_text().splitlines()
    record.log = [json.loads(line) for line in lines if line.startswith("{")]
    return record


def draw(record: Record, path: Path) -> None:
    """Draw the timeline: demand, holder, regret beside switch cost, waiting, response times."""
    import matplotlib as mpl  # noqa: PLC0415 - only a picture needs it

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    colours = {"ollama": "#2a7f62", "vllm": "#c8553d", "moving": "#c9c9c9"}
    seen = [moment for moment in record.moments if "step" in moment]
    times = [moment["at_s"] for moment in seen]
    holders: list[tuple[str, float, float]] = []
    for one, after in itertools.pairwise(seen):
        holder = one["holder"] if one["step"] == "held" else "moving"
        first = holders.pop()[1] if holders and holders[-1][0] == holder else one["at_s"]
        holders.append((holder, first, after["at_s"]))
    figure, (people, rent, answers) = plt.subplots(
        3, 1, sharex=True, figsize=(10, 7.5), height_ratios=(2, 2, 2), layout="constrained"
    )
    for axes in (people, rent, answers):
        for holder, first, last in holders:
            axes.axvspan(first, last, color=colours[holder], alpha=0.18, linewidth=0)
    people.step(times, [m["demand"] for m in seen], where="post", color="black", label="demand")
    people.fill_between(
        times, [m["waiting"] for m in seen], step="post", color="black", alpha=0.3, label="waiting"
    )
    people.set_ylabel("requests")
    rent.plot(times, [m["regret"] for m in seen], color="black", label="regret")
    rent.plot(times, [m["price"] for m in seen], color="black", linestyle=":", label="switch cost")
    rent.set_ylabel("request-seconds")
    for lane in ("ollama", "vllm"):
        good = [a for a in record.requests if a.lane == lane and not a.error]
        answers.scatter(
            [a.over_s for a in good],
            [a.over_s - a.sent_s for a in good],
            s=12,
            color=colours[lane],
            label=f"answered by {lane}",
        )
    answers.set_yscale("log")
    answers.set_yticks([0.5, 1, 2, 5, 10, 20, 50])
    answers.yaxis.set_major_formatter("{x:g}")
    answers.yaxis.set_minor_formatter("")
    answers.set_ylabel("response time, s")
    answers.set_xlabel("seconds; green: Ollama holds, red: vLLM holds, grey: the GPU moves")
    for axes in (people, rent, answers):
        axes.legend(loc="upper right", fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> int:
    """Run the scenario, and write its record."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.engines.switch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--picture", type=Path, help="draw the timeline here (.svg or .png)")
    parser.add_argument("--json", type=Path, help="write the whole record here")
    parser.add_argument(
        "--patient",
        action="store_true",
        help="wait until regret moves the GPU back, a quarter of an hour",
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        record = run(Path(scratch), patient=args.patient)
    for passage in record.passages:
        print(passage)  # noqa: T201 - a command's way to speak
    if args.json:
        args.json.write_text(json.dumps(asdict(record), indent=1))
    if args.picture:
        draw(record, args.picture)
    return os.EX_OK if not record.left else os.EX_SOFTWARE


if __name__ == "__main__":
    sys.exit(main())
