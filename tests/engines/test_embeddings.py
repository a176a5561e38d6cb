"""A real vLLM that embeds: one start serves its contract and the gateway in front of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from backends import calls
from backends.transport import http
from backends.vllm import VLLM
from tests.engines import rig
from tests.engines.conftest import running as started
from tests.support.contract import Subject
from tests.support.gateways import run_gateway


@pytest.fixture(scope="module")
def vllm_embeddings() -> Iterator[rig.Engine]:
    yield from started(rig.vllm(embeddings=True))


async def test_an_embedding_model_embeds_and_does_not_chat(vllm_embeddings: rig.Engine) -> None:
    async with http.Client() as client:
        subject = Subject(VLLM(vllm_embeddings.url, client), vllm_embeddings.model)

        can = await subject.engine.capabilities(subject.model)
        body, answer = await subject.ask(calls.EMBEDDINGS)

    assert can.embeddings
    assert not can.chat
    assert len(body["data"][0]["embedding"]) > 100
    assert answer.usage is not None


async def test_a_vllm_that_embeds_is_served_too(vllm_embeddings: rig.Engine) -> None:
    async with run_gateway(engines={"vllm": {"urls": [vllm_embeddings.url]}}) as running:
        raw = await running.http.post(
            "/v1/embeddings", json={"model": vllm_embeddings.model, "input": "The sea"}
        )

    assert raw.status_code == 200, raw.text
    assert len(raw.json()["data"][0]["embedding"]) == 576
    assert raw.headers["x-gateway-lane"] == "vllm"
