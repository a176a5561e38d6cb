"""The engines' contract, on the fakes of every kind and on the real embedded engine."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from backends.fake import FakeEngine
from backends.kinds import KINDS, Kind
from backends.llamacpp import LlamaCpp
from backends.processes.supervised import Supervised
from backends.transport import http
from gateway.serving.discovery import packaged_model
from tests.support.contract import Contract, Subject


class TestFake(Contract):
    """What the other tests rely on when they use a fake."""

    @pytest.fixture(params=["ollama", "vllm", "vllm that sleeps", "llamacpp"])
    async def subject(self, request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
        kind: Kind = request.param.split()[0]
        async with (
            FakeEngine(kind, ["sea:1b"], tokens=20, dev_mode="sleeps" in request.param) as fake,
            http.Client() as client,
        ):
            engine = KINDS[kind].engine(fake.url, client)
            yield Subject(engine, "sea:1b")
            await engine.close()


class TestEmbedded(Contract):
    """llama.cpp for real, as `twolane serve` starts it."""

    @pytest.fixture
    async def subject(self, embedded: Supervised) -> AsyncIterator[Subject]:
        async with http.Client() as client:
            yield Subject(LlamaCpp(embedded.url, client), "smollm2")

    @pytest.fixture(scope="class")
    async def embedded(self, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Supervised]:
        gguf = packaged_model()
        assert gguf is not None
        command = [sys.executable, "-m", "backends.llamacpp", str(gguf), "--name", "smollm2"]
        log = Path(tmp_path_factory.mktemp("embedded")) / "log"
        process = Supervised(command, log, reports_url=True)
        await process.start(deadline_s=60)
        yield process
        await process.stop()
