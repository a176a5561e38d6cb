"""The engines' contract, on the real engines: it checks what the fakes claim."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from backends.ollama import Ollama
from backends.transport import http
from backends.vllm import VLLM
from tests.engines import rig
from tests.support.contract import Contract, Subject


class TestOllama(Contract):
    """The real Ollama, as installed."""

    @pytest.fixture
    async def subject(self, ollama: rig.Engine) -> AsyncIterator[Subject]:
        async with http.Client() as client:
            engine = Ollama(ollama.url, client)
            yield Subject(engine, ollama.model)
            await engine.close()

    async def test_an_unload_frees_the_memory(self, subject: Subject) -> None:
        assert isinstance(subject.engine, Ollama)
        await subject.engine.load(subject.model)
        assert subject.model in await subject.engine.resident()

        await subject.engine.unload(subject.model)

        assert subject.model not in await subject.engine.resident()


class TestVLLM(Contract):
    """The real vLLM, on the CPU."""

    @pytest.fixture
    async def subject(self, vllm: rig.Engine) -> AsyncIterator[Subject]:
        async with http.Client() as client:
            yield Subject(VLLM(vllm.url, client), vllm.model)

    async def test_a_server_without_tool_parser_takes_no_tools(self, subject: Subject) -> None:
        assert (await subject.engine.capabilities(subject.model)).tools is False

    async def test_running_requests_are_reported(self, subject: Subject) -> None:
        call = subject.call(stream=True, max_tokens=1500, ignore_eos=True)
        answer = await subject.engine.open_stream(call, subject.model)
        await answer.read()

        running = (await subject.engine.activity(subject.model)).running
        answer.close()

        assert running == 1
