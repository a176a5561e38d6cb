"""A vLLM of two ranks, as on two cards: each has half of every layer."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from tests.engines import rig
from tests.engines.conftest import running


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[rig.Engine]:
    yield from running(
        rig.vllm(
            "--tensor-parallel-size", "2",
            weights=rig.TINY,
            max_model_len=512,
            max_num_seqs=2,
            environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        )
    )  # fmt: skip


@pytest.mark.timeout(300)
def test_two_ranks_give_one_answer(two_ranks: rig.Engine) -> None:
    asked = {
        "model": two_ranks.model,
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 8,
        "ignore_eos": True,
    }
    with httpx.Client(base_url=two_ranks.url, timeout=60, trust_env=False) as client:
        answer = client.post("/v1/chat/completions", json=asked)

    said = two_ranks.log.read_text(errors="replace")
    assert answer.status_code == 200, answer.text
    assert json.loads(answer.content)["usage"]["completion_tokens"] == 8
    assert "world_size=2 rank=1" in said
