"""What the doctor says of the real engines, on whatever machine this is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.doctor.checks.check import Finding, Level
from gateway.doctor.checks.table import run_checks
from gateway.doctor.collect.collector import look
from gateway.doctor.collect.engines import Sources
from gateway.doctor.observations import Process
from tests.engines import rig


@pytest.fixture
def config(tmp_path: Path, ollama: rig.Engine, vllm: rig.Engine) -> Path:
    """Settings that promise two slots of an Ollama that has one."""
    said: dict[str, Any] = {
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
    path.write_text(json.dumps(said))  # JSON is YAML
    return path


async def examined(config: Path) -> dict[tuple[str, str], Finding]:
    """The findings by check and engine."""
    findings = run_checks(await look(config, places=Sources(ports={})))
    return {(finding.check, finding.about.partition(" ")[0]): finding for finding in findings}


async def test_it_sees_what_the_engines_are(config: Path) -> None:
    told = await examined(config)

    for kind in ("ollama", "vllm"):
        assert told["engine", kind].level is Level.OK
        assert told["published", kind].level is Level.OK
        assert told["version", kind].saw.startswith(rig.VLLM_CPU if kind == "vllm" else "0.")
    assert told["dev-endpoints", "vllm"].saw == "it has no dev endpoints"


async def test_it_sees_how_their_processes_were_started(config: Path) -> None:
    seen = await look(config, places=Sources(ports={}))
    told = await examined(config)

    assert isinstance(seen.servers, tuple)
    assert all(isinstance(server.process, Process) for server in seen.servers)
    assert "sends 2 at once, and it answers 1" in told["slots", "ollama"].saw
    assert told["slots", "vllm"].saw == "32 at once, on both sides (--max-num-seqs)"
    assert told["context", "ollama"].level is Level.OK  # the model file names its own
    assert told["context", "vllm"].level is Level.PROBLEM


async def test_it_sees_where_a_loaded_model_is(config: Path, ollama: rig.Engine) -> None:
    async with httpx.AsyncClient(base_url=ollama.url, trust_env=False, timeout=60) as client:
        await client.post("/api/generate", json={"model": ollama.model, "keep_alive": -1})
    seen = await look(config, places=Sources(ports={}))
    told = await examined(config)

    if seen.nvidia_on_bus == 0:
        assert told["on-gpu", "ollama"].level is Level.NOTE
        assert "on the CPU as a whole" in told["on-gpu", "ollama"].saw
    else:
        assert told["on-gpu", "ollama"].level is not Level.UNKNOWN
