"""The GPU passes from one engine to the other, over real sockets, between fake engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from backends.fake import GIB, FakeEngine, FakeGpu
from gateway.handover import Gpu, Step
from tests.conftest import Running, StartGateway
from tests.faults.conftest import chat

SIZE = 40 * GIB


@dataclass(frozen=True)
class Box:
    """Two engines that do not fit on one GPU together, and how to set a gateway before them."""

    gpu: FakeGpu
    ollama: FakeEngine
    vllm: FakeEngine
    lease: Path

    def settings(self, **gpu: Any) -> dict[str, Any]:
        return {
            "memory": self.gpu,
            "engines": {
                "ollama": {"urls": [self.ollama.url]},
                "vllm": {"urls": [self.vllm.url]},
            },
            "models": {
                "m": {
                    "placement": "exclusive",
                    "lanes": {
                        "ollama": {"model": "small:1b", "memory_gib": 40},
                        "vllm": {"model": "Small-1B", "memory_gib": 40},
                    },
                }
            },
            "gpu": {"handover_s": 0.1, "lease": str(self.lease), **gpu},
        }


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Box]:
    gpu = FakeGpu(48 * GIB)
    async with (
        FakeEngine("ollama", ["small:1b"], gpu=gpu, size=SIZE, slots=1) as ollama,
        FakeEngine("vllm", ["Small-1B"], gpu=gpu, size=SIZE, dev_mode=True, asleep=True) as vllm,
    ):
        yield Box(gpu, ollama, vllm, tmp_path / "lease")


@asynccontextmanager
async def served(
    start_gateway: StartGateway, box: Box, **gpu: Any
) -> AsyncIterator[tuple[Running, Gpu]]:
    """A gateway whose GPU is held by Ollama."""
    async with start_gateway(**box.settings(**gpu)) as running:
        owner = running.gateway.gpu
        assert owner is not None
        await running.until(lambda _: owner.step is Step.HELD)
        yield running, owner


async def ask(running: Running, **fields: Any) -> httpx.Response:
    return await running.http.post("/v1/chat/completions", json=chat(**fields))


async def test_the_first_lane_is_loaded_at_the_start(
    box: Box, start_gateway: StartGateway
) -> None:
    async with served(start_gateway, box) as (running, owner):
        answer = await ask(running)

    assert owner.holder == "ollama"
    assert answer.headers["x-gateway-lane"] == "ollama"
    assert box.vllm.generations == []


async def test_the_operator_moves_the_gpu_there_and_back(
    box: Box, start_gateway: StartGateway
) -> None:
    async with served(start_gateway, box) as (running, owner):
        pinned = await running.http.post("/admin/pin", json={"lane": "vllm"})
        assert pinned.status_code == 200
        await running.until(lambda _: owner.holder == "vllm" and owner.step is Step.HELD)
        assert box.ollama.resident == []
        there = await ask(running)
        await running.http.post("/admin/pin", json={"lane": "ollama"})
        await running.until(lambda _: owner.holder == "ollama" and owner.step is Step.HELD)
        assert box.vllm.asleep
        back = await ask(running)

    assert there.headers["x-gateway-lane"] == "vllm"
    assert back.headers["x-gateway-lane"] == "ollama"
    assert [p.outcome for p in owner.passages] == ["done", "done", "done"]
    assert box.gpu.peak <= 48 * GIB


async def test_a_crowd_moves_the_gpu_and_nobody_is_lost(
    box: Box, start_gateway: StartGateway
) -> None:
    box.ollama.ttft_s = 0.2
    async with served(start_gateway, box) as (running, owner):
        answers = await asyncio.gather(*(ask(running) for _ in range(40)))

    lanes = [answer.headers["x-gateway-lane"] for answer in answers]
    assert {answer.status_code for answer in answers} == {200}
    assert {"ollama", "vllm"} == set(lanes)
    assert len(box.ollama.generations) + len(box.vllm.generations) == 40 + 2  # and two probes
    assert owner.policy.moves == 1
