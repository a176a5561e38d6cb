"""Settings that serve the model `m` on fake engines, and a chat request for it."""

from __future__ import annotations

from typing import Any

from backends.fake import FakeEngine


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
