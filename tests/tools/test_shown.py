"""What `profile show` and `status` print of a profile, in a terminal of eighty columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from backends.fake import FakeEngine
from gateway.routing import profile
from gateway.routing.profile import Crossover, LaneProfile, MeasuredSetup, Profile
from tests.support.command import run_command
from tests.support.gateways import StartGateway
from tests.support.models import alone, chat

FULL = Profile(
    version=1,
    source="measured",
    machine="AMD EPYC 7763, 2 cores",
    measured_at="2026-11-20T12:00:00+00:00",
    tokens_in=80,
    tokens_out=64,
    crossover=Crossover(5.5, 4.0, 7.0),
    lanes={
        "ollama": LaneProfile(
            (1, 4, 16),
            (1.2, 4.1, 15.0),
            (1.1, 4.0, 14.0),
            (1.3, 4.2, 16.5),
            (0.3, 2.9, 13.8),
            (53.0, 62.0, 68.0),
            MeasuredSetup("ollama", "small:1", "0.24.0", "Q4_1", 1),
        ),
        "vllm": LaneProfile(
            (1, 4, 16),
            (3.0, 4.5, 7.5),
            (2.9, 4.4, 7.1),
            (3.1, 4.6, 7.9),
            (0.2, 0.4, 1.1),
            (21.0, 57.0, 136.0),
            MeasuredSetup("vllm", "Small-1B", "0.32.0", "bfloat16", 16),
        ),
    },
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "chat.json"
    profile.save(path, FULL)
    return path


def configured(folder: Path, **models: Any) -> str:
    """A settings file with these models on one vLLM."""
    lanes = {"vllm": {"model": "A"}}
    content = {
        "engines": {"vllm": {"urls": ["http://127.0.0.1:9"]}},
        "models": {name: {"lanes": lanes, **model} for name, model in models.items()},
    }
    path = folder / "twolane.yaml"
    path.write_text(json.dumps(content))  # JSON is YAML
    return str(path)


def test_a_profile_is_printed_with_every_measured_figure(file: Path) -> None:
    shown = run_command("profile", "show", str(file))

    drawn = shown.stdout
    assert shown.returncode == 0, shown.stderr
    assert max(map(len, drawn.splitlines())) <= 80
    for part in (
        "AMD EPYC 7763, 2 cores", "measured", "ago", "15.00", "14.00-16.50", "13.80", "136", "█",
        "cross at 5.5", "4.0 to 7.0", "0.24.0", "Q4_1", "bfloat16", "16 slots",
    ):  # fmt: skip
        assert part in drawn, drawn


def test_without_a_file_the_assumed_profile_is_printed() -> None:
    shown = run_command("profile", "show")

    drawn = shown.stdout
    assert shown.returncode == 0, shown.stderr
    assert max(map(len, drawn.splitlines())) <= 80
    assert "assumed" in drawn
    assert "measured" not in drawn
    assert "32.80" in drawn


def test_the_profile_of_a_configured_model_is_printed(tmp_path: Path, file: Path) -> None:
    settings = configured(tmp_path, other={}, chat={"profile": str(file)})

    chat, other, none = [
        run_command("profile", "show", "--config", settings, "--model", name)
        for name in ("chat", "other", "none")
    ]

    assert "AMD EPYC" in chat.stdout
    assert "assumed" in other.stdout
    assert (none.returncode, none.stdout) == (2, "")
    assert "there is no model none in the settings; they have: other, chat" in none.stderr


def test_a_missing_profile_is_reported(tmp_path: Path) -> None:
    shown = run_command("profile", "show", str(tmp_path / "none.json"))

    assert shown.returncode == 2
    assert "none.json cannot be read: No such file" in shown.stderr


async def test_status_prints_the_profile_its_corrections_and_its_warnings(
    start_gateway: StartGateway, file: Path
) -> None:
    async with FakeEngine("vllm", ["Small-1B"], ttft_s=0.01) as vllm:
        vllm.version = "0.33.0"
        how = alone(vllm, slots=16)
        how["models"]["m"]["profile"] = str(file)
        async with start_gateway(**how) as running:
            await running.until(lambda gateway: gateway.catalogue.models["m"].changed)
            await running.http.post("/v1/chat/completions", json=chat())
            shown = await anyio.to_thread.run_sync(run_command, "status", "--url", running.url)

    drawn = " ".join(shown.stdout.replace("│", " ").split())
    assert "m (measured profile)" in drawn
    assert "days ago, refined by 1 request: vllm +0 %" in drawn
    assert "vllm: version 0.33.0 now, measured with 0.32.0: run `twolane calibrate`" in drawn
