"""One model name over the real Ollama and the real vLLM, as a user of the gateway sees it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from tests.engines import rig
from tests.support.gateways import Running, run_gateway

LANES = ["ollama", "vllm"]


@pytest.fixture
async def running(ollama: rig.Engine, vllm: rig.Engine) -> AsyncIterator[Running]:
    """A gateway as `twolane serve --pair smollm2=ollama:…,vllm:…` starts it."""
    async with run_gateway(
        engines={"ollama": {"urls": [ollama.url]}, "vllm": {"urls": [vllm.url]}},
        pair={"smollm2": {"ollama": ollama.model, "vllm": vllm.model}},
    ) as gateway:
        yield gateway


@pytest.fixture
async def client(running: Running) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{running.url}/v1", api_key="none", max_retries=0
    ) as made:
        yield made


def poem(number: int = 0, **fields: Any) -> dict[str, Any]:
    """A request whose prompt no engine has in its cache."""
    content = f"{number}: write a short poem about the sea."
    return {
        "model": "smollm2",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 32,
        **fields,
    }


async def ask(running: Running, **fields: Any) -> httpx.Response:
    answer = await running.http.post("/v1/chat/completions", json=poem(**fields), timeout=120)
    assert answer.status_code == 200, answer.text
    return answer


async def test_both_engines_are_behind_one_name(running: Running) -> None:
    listed = (await running.http.get("/v1/models")).json()["data"]

    assert [(model["id"], model["lanes"]) for model in listed] == [("smollm2", LANES)]


async def test_one_user_is_on_ollama_sixteen_move_to_vllm_and_one_comes_back(
    running: Running,
) -> None:
    alone = [(await ask(running, number=i)).headers["x-gateway-lane"] for i in range(3)]

    crowd = asyncio.gather(*(ask(running, number=100 + i) for i in range(16)))
    await running.until(
        lambda gateway: gateway.catalogue.models["smollm2"].admission.scheduler.policy.moves
    )
    crowded = await running.status("smollm2")
    lanes = Counter(answer.headers["x-gateway-lane"] for answer in await crowd)

    after = [await ask(running, number=200 + i) for i in range(5)]
    calm = await running.status("smollm2")

    assert alone == ["ollama"] * 3
    assert crowded["lane"] == "vllm"
    assert crowded["demand"] > 8
    assert crowded["lanes"]["vllm"]["running"] > 8  # the queue went along
    assert lanes["vllm"] >= 14  # one may have begun on Ollama before the others came
    # The first may still be on vLLM: the way back has to pay, too.
    assert after[-1].headers["x-gateway-lane"] == "ollama"
    assert "faster at demand 1" in after[-1].headers["x-gateway-reason"]
    assert calm["lane"] == "ollama"
    assert calm["moves"] == 2
    assert calm["decisions"][-1]["lane"] == "ollama"


@pytest.mark.parametrize("lane", LANES)
async def test_a_stream_has_text_usage_and_a_finish(client: openai.AsyncOpenAI, lane: str) -> None:
    stream = await client.chat.completions.create(
        **poem(model=f"smollm2@{lane}", stream=True, stream_options={"include_usage": True})
    )
    chunks = [chunk async for chunk in stream]

    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert chunks[-1].usage.completion_tokens > 0
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")


@pytest.mark.parametrize("lane", LANES)
async def test_stop_words_stop_the_answer(client: openai.AsyncOpenAI, lane: str) -> None:
    messages = [{"role": "user", "content": "Count: one two three four five six seven eight"}]
    whole = await client.chat.completions.create(
        **poem(model=f"smollm2@{lane}", messages=messages, stop=[" "], temperature=0)
    )

    assert whole.choices[0].finish_reason == "stop"
    assert " " not in (whole.choices[0].message.content or "").strip()


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_hang_up_frees_the_engine_at_once(
    running: Running, lane: str, *, stream: bool
) -> None:
    long = poem(model=f"smollm2@{lane}", stream=stream, max_tokens=1500, ignore_eos=True)
    with pytest.raises(httpx.ReadTimeout):  # noqa: PT012 - the stream is left from inside
        async with running.http.stream(
            "POST", "/v1/chat/completions", json=long, timeout=httpx.Timeout(5, read=0.4)
        ) as answer:
            async for _ in answer.aiter_bytes():
                if stream:
                    raise httpx.ReadTimeout("seen enough")

    began = time.monotonic()
    await running.until(lambda _: running.gateway.edge.in_flight == 0, within_s=1)
    await ask(running, number=300, model=f"smollm2@{lane}", max_tokens=2)

    # 1500 tokens take 20 s or more on either; Ollama's one slot would be taken so long.
    assert time.monotonic() - began < 8


@pytest.mark.parametrize("lane", LANES)
async def test_a_bad_request_keeps_the_engines_own_words(running: Running, lane: str) -> None:
    answer = await running.http.post(
        "/v1/chat/completions", json=poem(model=f"smollm2@{lane}", temperature="hot")
    )

    error = answer.json()["error"]
    assert answer.status_code == 400
    assert set(error) == {"message", "type", "param", "code"}
    assert "temperature" in error["message"]
    assert answer.headers["x-gateway-lane"] == lane
    assert answer.headers["x-request-id"].startswith("req_")


async def test_a_prompt_over_vllms_context_is_refused_with_its_param(running: Running) -> None:
    long = [{"role": "user", "content": "sea " * 4000}]
    answer = await running.http.post(
        "/v1/chat/completions", json=poem(model="smollm2@vllm", messages=long)
    )

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "input_tokens"


async def test_ollama_makes_the_embeddings_that_this_vllm_cannot(
    client: openai.AsyncOpenAI, running: Running
) -> None:
    made = await client.embeddings.create(model="smollm2", input=["The sea"])
    raw = await running.http.post("/v1/embeddings", json={"model": "smollm2", "input": "The sea"})

    assert len(made.data[0].embedding) == 576
    assert raw.headers["x-gateway-lane"] == "ollama"


async def test_tools_that_neither_engine_takes_are_left_out_and_named(running: Running) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    answer = await ask(running, tools=[tool])

    assert answer.headers["x-gateway-dropped"] == "tools"
