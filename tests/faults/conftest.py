"""A model with a fake engine on each of its lanes, and a gateway before them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from backends.fake import FakeEngine


@pytest.fixture
async def ollama() -> AsyncIterator[FakeEngine]:
    async with FakeEngine("ollama", ["small:1b"]) as engine:
        yield engine


@pytest.fixture
async def vllm() -> AsyncIterator[FakeEngine]:
    async with FakeEngine("vllm", ["Small-1B"]) as engine:
        yield engine


def pair(ollama: FakeEngine, vllm: FakeEngine, **lane: Any) -> dict[str, Any]:
    """Settings that serve both engines' models as `m`; `lane` applies to both lanes."""
    return {
        "engines": {"ollama": {"urls": [ollama.url]}, "vllm": {"urls": [vllm.url]}},
        "models": {
            "m": {
                "lanes": {
                    "ollama": {"model": "small:1b", **lane},
                    "vllm": {"model": "Small-1B", **lane},
                }
            }
        },
    }


def alone(engine: FakeEngine, model: str = "Small-1B", **lane: Any) -> dict[str, Any]:
    """Settings that serve one engine's model as `m`."""
    return {
        "engines": {engine.kind: {"urls": [engine.url]}},
        "models": {"m": {"lanes": {engine.kind: {"model": model, **lane}}}},
    }


def chat(**fields: Any) -> dict[str, Any]:
    """A chat request for `m`."""
    return {"model": "m", "messages": [{"role": "user", "content": "Hello"}], **fields}
