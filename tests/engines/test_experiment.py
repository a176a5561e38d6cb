"""`twolane compare` and `twolane calibrate` on the real engines, and a gateway that learned."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from gateway.routing import profile
from loadtests.measure import samples
from tests.engines import experiment, rig
from tests.support.gateways import Running, run_gateway

#: A comparison starts vLLM twice, and all of this is measured on two cores.
pytestmark = pytest.mark.timeout(900)

LOW, HIGH = 1, 10


def twolane(*arguments: str | Path, within_s: float = 600) -> subprocess.CompletedProcess[str]:
    """The command, run to its end."""
    return subprocess.run(
        [sys.executable, "-m", "gateway", *arguments],
        capture_output=True,
        text=True,
        timeout=within_s,
        check=False,
    )


# compare


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short comparison of everything, engines started by the command itself."""
    missing = [part.name for part in rig.parts() if not part.is_complete()]
    if missing and os.environ.get("CI") != "true":
        pytest.skip(f"not installed: {', '.join(missing)}; {rig.GET_ENGINES}")
    scratch = tmp_path_factory.mktemp("compare")
    config = scratch / "twolane.yaml"
    config.write_text(yaml.safe_dump(experiment.configuration(experiment.ports())))
    folder = scratch / "report"
    done = twolane(
        "compare", "--config", config, "--levels", "1,4", "--repetitions", "1", "--rounds", "2",
        "--tokens-out", "24", "--out", folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_engine_and_the_gateway_are_measured_at_every_level(compared: Path) -> None:
    cells = samples.cells(samples.read(compared / "raw.jsonl"))

    assert [cell.outcome for cell in cells] == ["complete"] * 8
    assert {(cell.target, cell.level) for cell in cells} == {
        (label, level) for label in ("ollama", "ollama-16", "vllm", "gateway") for level in (1, 4)
    }


def test_every_request_is_whole_and_counted_by_its_server(compared: Path) -> None:
    asked = samples.requests(samples.read(compared / "raw.jsonl"))
    measured = [one for one in asked if one.phase == "measured"]

    assert len(measured) == 4 * (7 * 1 + 2 * 4)  # seven at the least, or two rounds
    assert [one.error for one in measured if one.error] == []
    assert all(one.ttft_s and one.tokens_out and one.tokens_in for one in measured)
    assert {one.lane for one in measured if one.target == "gateway"} <= {"ollama", "vllm"}


def test_the_report_knows_what_it_was_measured_on(compared: Path) -> None:
    said: dict[str, Any] = json.loads((compared / "experiment.json").read_text())
    subjects = {one["label"]: one for one in said["subjects"]}

    assert subjects["ollama"]["version"].startswith("0.")
    assert subjects["ollama"]["weights"] == "Q4_1"
    assert [subjects[label]["slots"] for label in ("ollama", "ollama-16")] == [1, 16]
    assert subjects["vllm"]["weights"] == "bfloat16"
    assert subjects["gateway"]["before"] == ["ollama", "ollama-16", "vllm"]


def test_the_report_is_there_for_every_kind_of_reader(compared: Path) -> None:
    there = {path.name for path in compared.iterdir()}

    assert {"report.html", "report.md", "report.json", "comparison.svg", "comparison.png"} <= there


# calibrate


@pytest.fixture(scope="module")
def measured(
    ollama: rig.Engine, vllm: rig.Engine, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A profile of both engines, that is measured in a minute or two."""
    scratch = tmp_path_factory.mktemp("calibrate")
    config = scratch / "twolane.yaml"
    config.write_text(yaml.safe_dump(settings(ollama, vllm)))
    out = scratch / "profile.json"
    done = twolane(
        "calibrate", "--config", config, "--levels", f"{LOW},{HIGH}", "--rounds", "2",
        "--tokens-out", "32", "--minutes", "1", "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def settings(ollama: rig.Engine, vllm: rig.Engine) -> dict[str, Any]:
    return {
        "engines": {"ollama": {"urls": [ollama.url]}, "vllm": {"urls": [vllm.url]}},
        "models": {
            "smollm2": {"lanes": {"ollama": {"model": ollama.model}, "vllm": {"model": vllm.model}}}
        },
    }


def test_the_profile_says_where_the_lanes_cross_and_on_what_it_was_measured(
    measured: Path,
) -> None:
    found = profile.load(measured)

    assert found.source == "measured"
    assert found.crossover is not None
    assert LOW <= found.crossover.level <= HIGH
    assert found.lanes["ollama"].at(LOW) < found.lanes["vllm"].at(LOW)
    assert found.lanes["ollama"].at(HIGH) > found.lanes["vllm"].at(HIGH)
    assert found.machine
    assert found.measured_at


async def test_a_gateway_that_loads_it_changes_lanes_where_the_lanes_cross(
    ollama: rig.Engine, vllm: rig.Engine, measured: Path
) -> None:
    configured = settings(ollama, vllm)
    configured["models"]["smollm2"]["profile"] = str(measured)
    async with run_gateway(**configured) as running:
        alone = await lanes(running, LOW, rounds=4)
        crowd = await lanes(running, HIGH, rounds=4)

    assert alone == Counter(ollama=LOW * 4)
    assert crowd["vllm"] > crowd["ollama"]


async def lanes(running: Running, people: int, rounds: int) -> Counter[str]:
    """Who answered so many people, each asking so often without a pause."""

    async def person(number: int) -> Sequence[str]:
        answered = []
        for turn in range(rounds):
            answer: httpx.Response = await running.http.post(
                "/v1/chat/completions",
                json={
                    "model": "smollm2",
                    "messages": [{"role": "user", "content": f"{number}/{turn}: the sea?"}],
                    "max_tokens": 24,
                },
                timeout=300,
            )
            assert answer.status_code == 200, answer.text
            assert "measured profile" in answer.headers["x-gateway-reason"] or people > LOW
            answered.append(answer.headers["x-gateway-lane"])
        return answered

    everyone = await asyncio.gather(*(person(number) for number in range(people)))
    return Counter(lane for answered in everyone for lane in answered)
