"""Machines as the doctor may observe them, from plain data."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from backends.fake import GIB
from gateway import settings
from gateway.doctor.checks.all_checks import run_checks
from gateway.doctor.checks.check import Finding
from gateway.doctor.observations import (
    Disk,
    ExpectedLane,
    Exposure,
    Observations,
    ObservedEngine,
    Port,
    Process,
    Ram,
    Unknown,
)
from gateway.gpu.cards import Brake, Card, Driver
from gateway.settings import Settings

MIB = 1024**2
DAY_S = 86_400.0
NOW = datetime(2026, 11, 23, tzinfo=UTC).timestamp()
OLLAMA_URL = "http://127.0.0.1:11434"

SHELL = Process(1, ("bash",), {}, 16 * GIB, None)
NO_DRIVER = Unknown("the NVIDIA driver reports: NVML Shared Library Not Found")


def machine(**parts: Any) -> Observations:
    """A machine without a GPU and without engines; `parts` replace what was observed."""
    defaults: dict[str, Any] = {
        "at": NOW,
        "source": "twolane.yaml",
        "program": "twolane",
        "settings": settings.load(None, {}, {}),
        "exposure": Exposure("127.0.0.1"),
        "port": Port("127.0.0.1", 8000),
        "lease": "/run/gpu.lease",
        "owner": None,
        "profiles": {},
        "engines": (),
        "nvidia_devices": 0,
        "driver_loaded": False,
        "driver": NO_DRIVER,
        "docker": None,
        "ram": Ram(96 * GIB, 80 * GIB),
        "own_process": SHELL,
        "disks": (Disk("ollama", "/models", 500 * GIB),),
    }
    return Observations(**defaults | parts)


def card(index: int = 0, **parts: Any) -> Card:
    """A healthy RTX 4090."""
    defaults: dict[str, Any] = {
        "width": (16, 16),
        "generation": (4, 4),
        "state": 2,
        "power_w": (450.0, 450.0),
        "heat_c": (61, 84),
        "brakes": Brake(0),
        "peers": (),
    }
    return Card(index, "NVIDIA GeForce RTX 4090", 24 * GIB, **defaults | parts)


def two_cards(**parts: Any) -> dict[str, Any]:
    """The parts of a machine that differ with two RTX 4090."""
    cards = (card(0, **parts), card(1, **parts))
    return {
        "driver": Driver("570.86", "12.8", cards),
        "nvidia_devices": 2,
        "driver_loaded": True,
    }


def ollama(*, environment: Mapping[str, str] | None = None, **parts: Any) -> ObservedEngine:
    """A healthy Ollama on this machine."""
    process = Process(7, ("/usr/bin/ollama", "serve"), environment or {}, 16 * GIB, None)
    defaults: dict[str, Any] = {
        "answering_kind": "ollama",
        "version": "0.24.0",
        "models": ("big:70b",),
        "loaded": (),
        "contexts": {},
        "identities": {},
        "addresses": ("127.0.0.1",),
        "listening_on": ("127.0.0.1",),
        "process": process,
    }
    return ObservedEngine("ollama", OLLAMA_URL, 11434, **defaults | parts)


def vllm(*words: str, environment: Mapping[str, str] | None = None, **parts: Any) -> ObservedEngine:
    """A healthy vLLM on this machine."""
    command = ("/usr/bin/vllm", "serve", "Big", "--max-num-seqs", "32", *words)
    defaults: dict[str, Any] = {
        "answering_kind": "vllm",
        "version": "0.32.0",
        "models": ("Big",),
        "contexts": {"Big": 8192},
        "identities": {},
        "has_dev_endpoints": False,
        "is_asleep": False,
        "addresses": ("127.0.0.1",),
        "listening_on": ("127.0.0.1",),
        "process": Process(8, command, environment or {}, 16 * GIB, None),
    }
    return ObservedEngine("vllm", "http://127.0.0.1:8001", 8001, **defaults | parts)


def expected(
    model: str = "Big", *, exclusive: bool = False, **lane: Any
) -> tuple[ExpectedLane, ...]:
    """The only lane that the settings expect of an engine."""
    return (ExpectedLane("chat", settings.LaneSettings(model=model, **lane), exclusive),)


def exclusive(**more: Any) -> Settings:
    """Settings with a model whose engines take turns."""
    return settings.load(
        None,
        {
            "engines": {
                "ollama": {"urls": [OLLAMA_URL]},
                "vllm": {"urls": ["http://127.0.0.1:8001"]},
            },
            "models": {
                "chat": {
                    "placement": "exclusive",
                    "lanes": {"ollama": {"model": "big:70b"}, "vllm": {"model": "Big"}},
                }
            },
            **more,
        },
        {},
    )


def findings_of(check: str, observed: Observations) -> list[Finding]:
    """The findings of one check."""
    return [finding for finding in run_checks(observed) if finding.check == check]


def finding_of(check: str, observed: Observations) -> Finding:
    """The only finding of one check."""
    [finding] = findings_of(check, observed)
    return finding
