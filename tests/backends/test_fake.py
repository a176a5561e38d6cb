"""The fake engine answers as the real ones do: in its bodies, its times, and its faults."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest

from backends.fake import (
    DONE,
    Answer,
    Close,
    Cut,
    FakeEngine,
    Head,
    Kill,
    Pause,
    Repeat,
    Reset,
    Send,
    Serve,
    Silence,
    chunk,
    event,
    status,
    stream,
    usage,
    usage_chunk,
)
from backends.fake.control import Control, read_answer
from tests.support.plain_http import async_client

CHAT = "/v1/chat/completions"
KINDS: list[str] = ["ollama", "vllm", "llamacpp"]
HELLO = [{"role": "user", "content": "Hello there"}]


def body(**more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": HELLO, **more}


@asynccontextmanager
async def client_of(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with async_client(engine.url, timeout=10) as client:
        yield client


async def on_the_wire(engine: FakeEngine, **more: Any) -> tuple[bytes, str]:
    """Every byte of an answer to a streaming chat, and how the connection ended."""
    return await raw_answer(engine, "POST", CHAT, body(stream=True, **more))


async def raw_answer(
    engine: FakeEngine, method: str, path: str, sent: object = None
) -> tuple[bytes, str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", engine.port)
    data = b"" if sent is None else json.dumps(sent).encode()
    head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    received = b""
    try:
        while part := await reader.read(65536):
            received += part
            if received.endswith(b"\r\n0\r\n\r\n"):
                return received, "end of body"
        return received, "end of connection"  # noqa: TRY300 - one of three ends
    except ConnectionResetError:
        return received, "reset"
    finally:
        writer.close()


async def until_quiet(engine: FakeEngine, awaited: bytes) -> bytes:
    """What arrives until the answer falls silent, `awaited` included; then the client hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", engine.port)
    data = json.dumps(body(stream=True)).encode()
    writer.write(f"POST {CHAT} HTTP/1.1\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
    await engine.until(lambda engine: engine.running == 1)
    received = b""
    try:
        while awaited not in received:
            received += await reader.read(65536)
        async with asyncio.timeout(0.1):
            while part := await reader.read(65536):
                received += part
        return received + b"<end>"  # it did not go silent
    except TimeoutError:
        return received
    finally:
        writer.transport.abort()


def events_of(text: str) -> list[dict[str, Any]]:
    """The JSON of a stream's events; it must end with [DONE]."""
    datas = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert datas.pop() == "[DONE]"
    return [json.loads(data) for data in datas]


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(
        choice["delta"].get("content") or "" for item in events for choice in item["choices"]
    )


# The answers of each kind


@pytest.mark.parametrize("kind", KINDS)
async def test_chat_is_answered_whole(kind: str) -> None:
    async with FakeEngine(kind) as engine, client_of(engine) as client:
        answer_body = (await client.post(CHAT, json=body())).json()

    assert answer_body["choices"][0]["message"]["content"] == "token0 token1 token2 token3 token4"
    assert answer_body["choices"][0]["finish_reason"] == "stop"
    assert (answer_body["usage"]["prompt_tokens"], answer_body["usage"]["completion_tokens"]) == (
        2,
        5,
    )


@pytest.mark.parametrize("kind", KINDS)
async def test_chat_is_answered_as_a_stream(kind: str) -> None:
    async with FakeEngine(kind) as engine, client_of(engine) as client:
        answer = await client.post(
            CHAT, json=body(stream=True, max_tokens=2, stream_options={"include_usage": True})
        )
    *rest, last = events_of(answer.text)

    assert answer.headers["content-type"].startswith("text/event-stream")
    assert text_of(rest) == "token0 token1"
    assert rest[-1]["choices"][0]["finish_reason"] == "length"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("kind", KINDS)
async def test_usage_is_streamed_only_on_request(kind: str) -> None:
    async with FakeEngine(kind) as engine, client_of(engine) as client:
        answer = await client.post(CHAT, json=body(stream=True))

    assert all("usage" not in item for item in events_of(answer.text))


async def test_the_first_delta_differs_by_kind() -> None:
    first: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        async with FakeEngine(kind) as engine, client_of(engine) as client:
            answer = await client.post(CHAT, json=body(stream=True))
        first[kind] = events_of(answer.text)[0]["choices"][0]["delta"]

    assert first == {
        "ollama": {"role": "assistant", "content": "token0"},
        "vllm": {"role": "assistant", "content": ""},
        "llamacpp": {"role": "assistant", "content": None},
    }


@pytest.mark.parametrize("kind", KINDS)
async def test_completions_are_answered_whole_and_as_a_stream(kind: str) -> None:
    request = {"model": "m", "prompt": "Hello", "max_tokens": 2}
    async with FakeEngine(kind) as engine, client_of(engine) as client:
        whole = (await client.post("/v1/completions", json=request)).json()
        streamed = await client.post("/v1/completions", json=request | {"stream": True})

    assert whole["choices"][0]["text"] == "token0 token1"
    results = events_of(streamed.text)
    assert "".join(item["choices"][0]["text"] for item in results) == "token0 token1"
    assert results[-1]["choices"][0]["finish_reason"] == "length"


async def test_ollama_streams_completions_with_zero_usage_until_the_end() -> None:
    request = {
        "model": "m",
        "prompt": "Hello",
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with FakeEngine("ollama") as engine, client_of(engine) as client:
        results = events_of((await client.post("/v1/completions", json=request)).text)

    assert [item["usage"]["completion_tokens"] for item in results] == [0] * 6 + [5]


async def test_only_ollama_ignores_max_completion_tokens() -> None:
    length: dict[str, int] = {}
    for kind in KINDS:
        async with FakeEngine(kind) as engine, client_of(engine) as client:
            answer_body = (await client.post(CHAT, json=body(max_completion_tokens=2))).json()
        length[kind] = answer_body["usage"]["completion_tokens"]

    assert length == {"ollama": 5, "vllm": 2, "llamacpp": 2}


async def test_a_stop_word_ends_an_answer() -> None:
    async with FakeEngine("vllm") as engine, client_of(engine) as client:
        answer_body = (await client.post(CHAT, json=body(stop=["token2"]))).json()

    assert answer_body["choices"][0]["message"]["content"] == "token0 token1"
    assert answer_body["choices"][0]["finish_reason"] == "stop"


async def test_ignore_eos_fixes_the_length_of_an_answer() -> None:
    async with FakeEngine("vllm", tokens=5) as engine, client_of(engine) as client:
        answer_body = (await client.post(CHAT, json=body(max_tokens=20, ignore_eos=True))).json()

    assert answer_body["usage"]["completion_tokens"] == 20
    assert answer_body["choices"][0]["finish_reason"] == "length"


async def test_several_choices_are_given_by_engines_that_support_them() -> None:
    many: dict[str, int] = {}
    for kind in KINDS:
        async with FakeEngine(kind) as engine, client_of(engine) as client:
            answer = await client.post(CHAT, json=body(n=2, stream=True))
        choices = [choice for item in events_of(answer.text) for choice in item["choices"]]
        many[kind] = len({choice["index"] for choice in choices})

    assert many == {"ollama": 1, "vllm": 2, "llamacpp": 2}


async def test_unknown_model_is_refused_in_the_engines_own_words() -> None:
    results: dict[str, tuple[int, Any]] = {}
    for kind in KINDS:
        async with FakeEngine(kind) as engine, client_of(engine) as client:
            answer = await client.post(CHAT, json=body() | {"model": "nope"})
        results[kind] = (answer.status_code, answer.json().get("error"))

    message = "The model `nope` does not exist. Valid aliases: m."
    assert results == {
        "ollama": (
            404,
            {
                "message": "model 'nope' not found",
                "type": "not_found_error",
                "param": None,
                "code": None,
            },
        ),
        "vllm": (
            404,
            {"message": message, "type": "NotFoundError", "param": "model", "code": 404},
        ),
        "llamacpp": (200, None),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sent", [b"{", b"", b"[1]", b"null"])
async def test_a_body_that_is_not_a_request_is_refused(kind: str, sent: bytes) -> None:
    async with FakeEngine(kind) as engine, client_of(engine) as client:
        answer = await client.post(CHAT, content=sent)

    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_body_of_wrong_types_is_refused(kind: str) -> None:
    async with FakeEngine(kind, embedding=["m"]) as engine, client_of(engine) as client:
        options = await client.post(CHAT, json=body(stream=True, stream_options=7))
        stop = await client.post(CHAT, json=body(stop=7))
        empty = await client.post("/v1/embeddings", json={"model": "m", "input": []})

    assert [answer.status_code for answer in (options, stop, empty)] == [400, 400, 400]


@pytest.mark.parametrize("kind", KINDS)
async def test_the_openai_client_reads_every_answer(kind: str) -> None:
    async with (
        FakeEngine(kind) as engine,
        openai.AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="k", max_retries=0) as client,
    ):
        streamed = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "Hi"}], stream=True
        )
        results = [part.choices[0].delta.content or "" async for part in streamed]
        engine.script(stream({"error": {"message": "boom", "code": 500}}))
        broken = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "Hi"}], stream=True
        )
        with pytest.raises(openai.APIError, match="boom"):
            [part async for part in broken]

    assert "".join(results) == "token0 token1 token2 token3 token4"


async def test_a_prompt_over_the_context_is_refused_or_cut_as_by_the_engine() -> None:
    results: dict[str, tuple[int, Any]] = {}
    messages = [{"role": "user", "content": "word " * 50}]
    for kind in KINDS:
        async with FakeEngine(kind, context=40) as engine, client_of(engine) as client:
            answer = await client.post(CHAT, json={"model": "m", "messages": messages})
        error = answer.json().get("error") or {}
        results[kind] = (answer.status_code, error.get("param") or error.get("type"))

    assert results == {
        "ollama": (200, None),
        "vllm": (400, "input_tokens"),
        "llamacpp": (400, "exceed_context_size_error"),
    }


async def test_tools_are_refused_by_engines_without_them() -> None:
    results: dict[tuple[str, bool], int] = {}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for kind in KINDS:
        for able in (False, True):
            async with FakeEngine(kind, tools=able) as engine, client_of(engine) as client:
                answer = await client.post(CHAT, json=body(tools=tools))
            results[kind, able] = answer.status_code

    assert results == {
        ("ollama", False): 400,
        ("ollama", True): 200,
        ("vllm", False): 400,
        ("vllm", True): 200,
        ("llamacpp", False): 200,
        ("llamacpp", True): 200,
    }


@pytest.mark.parametrize("kind", KINDS)
async def test_models_are_listed(kind: str) -> None:
    async with FakeEngine(kind, ["a:1b", "b:1b"]) as engine, client_of(engine) as client:
        listed = (await client.get("/v1/models")).json()["data"]

    owner = {"ollama": "library", "vllm": "vllm", "llamacpp": "llamacpp"}[kind]
    names = ["a:1b"] if kind == "llamacpp" else ["a:1b", "b:1b"]
    assert [(entry["id"], entry["owned_by"]) for entry in listed] == [(n, owner) for n in names]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("form", "packed"), [("float", list), ("base64", str)])
async def test_embeddings_have_one_vector_for_each_text(kind: str, form: str, packed: type) -> None:
    request = {"model": "e", "input": ["a", "b c"], "encoding_format": form}
    async with FakeEngine(kind, [], embedding=["e"]) as engine, client_of(engine) as client:
        answer_body = (await client.post("/v1/embeddings", json=request)).json()

    assert [entry["index"] for entry in answer_body["data"]] == [0, 1]
    assert isinstance(answer_body["data"][0]["embedding"], packed)
    assert answer_body["usage"]["prompt_tokens"] == 3


async def test_embeddings_without_an_embedding_model_are_answered_as_by_the_engine() -> None:
    results: dict[str, int] = {}
    for kind in KINDS:
        async with FakeEngine(kind) as engine, client_of(engine) as client:
            answer = await client.post("/v1/embeddings", json={"model": "m", "input": "a"})
        results[kind] = answer.status_code

    assert results == {"ollama": 200, "vllm": 404, "llamacpp": 501}


async def test_ollama_refuses_public_host_names() -> None:
    results: dict[str, int] = {}
    async with FakeEngine("ollama") as engine, client_of(engine) as client:
        for host in ("127.0.0.1:1", "[::1]:1", "localhost", "ollama.internal:1", "gateway", "a.b"):
            answer = await client.get("/v1/models", headers={"host": host})
            results[host] = answer.status_code

    assert list(results.values()) == [200, 200, 200, 200, 403, 403]


# Ollama's memory


@pytest.mark.alone
async def test_ollama_loads_for_the_first_request() -> None:
    async with FakeEngine("ollama", load_s=0.1) as engine, client_of(engine) as client:
        before = (await client.get("/api/ps")).json()["models"]
        started = time.monotonic()
        await client.post(CHAT, json=body())
        first = time.monotonic() - started
        await client.post(CHAT, json=body())
        second = time.monotonic() - started - first
        [loaded] = (await client.get("/api/ps")).json()["models"]

    assert before == []
    assert first >= 0.1 > second
    assert loaded["name"] == "m:latest"
    assert loaded["size_vram"] == loaded["size"]


async def test_ollama_ends_a_load_whose_client_hung_up() -> None:
    async with FakeEngine("ollama", load_s=0.2) as engine, client_of(engine) as client:
        load = {"model": "m", "keep_alive": -1}
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/api/generate", json=load, timeout=0.05)
        await engine.until(lambda engine: engine.hang_ups)
        await asyncio.sleep(0.3)
        never = list(engine.resident)
        results = (await client.post("/api/generate", json=load)).json()

        assert never == []
        assert results["done_reason"] == "load"
        assert engine.resident == ["m:latest"]


async def test_ollama_confirms_an_unload_before_it_is_done() -> None:
    async with FakeEngine("ollama", unload_s=0.1) as engine, client_of(engine) as client:
        await client.post("/api/generate", json={"model": "m", "keep_alive": -1})
        results = (await client.post("/api/generate", json={"model": "m", "keep_alive": 0})).json()
        right_after = list(engine.resident)
        await engine.until(lambda engine: not engine.resident)

    assert results["done_reason"] == "unload"
    assert right_after == ["m:latest"]


async def test_ollama_reports_its_models() -> None:
    async with FakeEngine("ollama", tools=True, context=99) as engine, client_of(engine) as client:
        version = (await client.get("/api/version")).json()
        tags = (await client.get("/api/tags")).json()["models"]
        model_info = (await client.post("/api/show", json={"model": "m"})).json()
        unknown = await client.post("/api/show", json={"model": "nope"})

    assert version["version"]
    assert [tag["name"] for tag in tags] == ["m:latest"]
    assert model_info["capabilities"] == ["completion", "tools"]
    assert model_info["model_info"]["llama.context_length"] == 99
    assert (unknown.status_code, unknown.json()) == (404, {"error": "model 'nope' not found"})


# vLLM's sleep


async def test_vllm_cannot_sleep_without_dev_mode() -> None:
    async with FakeEngine("vllm") as engine, client_of(engine) as client:
        assert (await client.post("/sleep")).status_code == 404
        assert (await client.get("/is_sleeping")).status_code == 404


async def test_vllm_asleep_is_healthy_and_answers_when_it_wakes() -> None:
    async with FakeEngine("vllm", dev_mode=True) as engine, client_of(engine) as client:
        await client.post("/sleep?level=1&mode=wait")
        request = asyncio.create_task(client.post(CHAT, json=body()))
        await engine.until(lambda engine: engine.waiting == 1)
        healthy = (await client.get("/health")).status_code
        asleep = (await client.get("/is_sleeping")).json()
        metrics = (await client.get("/metrics")).text
        await client.post("/wake_up")

        assert (await request).status_code == 200
    assert healthy == 200
    assert asleep == {"is_sleeping": True}
    assert 'vllm:num_requests_waiting{engine="0",model_name="m"} 1.0' in metrics


@pytest.mark.parametrize(("mode", "finish"), [("wait", "stop"), ("abort", "abort")])
async def test_vllm_falls_asleep_after_running_requests_or_aborts_them(
    mode: str, finish: str
) -> None:
    async with (
        FakeEngine("vllm", dev_mode=True, gap_s=0.03) as engine,
        client_of(engine) as client,
    ):
        request = asyncio.create_task(client.post(CHAT, json=body(stream=True)))
        await engine.until(lambda engine: engine.running == 1)
        await asyncio.sleep(0.05)
        await client.post(f"/sleep?level=1&mode={mode}")
        running = engine.running
        answer = await request

    assert running == 0
    assert events_of(answer.text)[-1]["choices"][0]["finish_reason"] == finish


async def test_vllm_lists_the_paths_its_model_can_serve() -> None:
    async with FakeEngine("vllm", [], embedding=["e"]) as engine, client_of(engine) as client:
        paths = (await client.get("/openapi.json")).json()["paths"]

    assert "/v1/embeddings" in paths
    assert CHAT not in paths


# llama.cpp's connections and slots


async def test_llamacpp_answers_503_while_it_loads() -> None:
    async with FakeEngine("llamacpp", loading=True) as engine, client_of(engine) as client:
        health = await client.get("/health")
        chat = await client.post(CHAT, json=body())
        engine.loading = False
        later = (await client.get("/health")).json()

    error = {"code": 503, "message": "Loading model", "type": "unavailable_error"}
    assert (health.status_code, health.json()) == (503, {"error": error})
    assert chat.status_code == 503
    assert later == {"status": "ok"}


async def test_llamacpp_closes_after_a_stream_and_only_then() -> None:
    async with FakeEngine("llamacpp") as engine, client_of(engine) as client:
        whole = await client.post(CHAT, json=body())
        await client.post(CHAT, json=body())
        one = engine.accepted
        received, end = await on_the_wire(engine)
        await engine.until(lambda engine: engine.connections == 1)

    assert whole.headers["keep-alive"]
    assert one == 1
    assert received.endswith(b"\r\n0\r\n\r\n")
    assert end == "end of body"


async def test_llamacpp_reports_its_slots() -> None:
    async with FakeEngine("llamacpp", slots=3, context=99) as engine, client_of(engine) as client:
        props = (await client.get("/props")).json()
        slots = (await client.get("/slots")).json()
        metrics = (await client.get("/metrics")).text

    assert props["default_generation_settings"]["n_ctx"] == 99
    assert (props["total_slots"], len(slots)) == (3, 3)
    assert "\nllamacpp:requests_deferred 0\n" in metrics


# Time and slots


@pytest.mark.alone
@pytest.mark.parametrize("kind", KINDS)
async def test_tokens_are_sent_at_their_times(kind: str) -> None:
    async with (
        FakeEngine(kind, ttft_s=0.1, gap_s=0.01, tokens=40) as engine,
        client_of(engine) as client,
    ):
        times: list[float] = []
        await client.post(CHAT, json=body())  # the first pays for imports and the connection
        started = time.monotonic()
        async with client.stream("POST", CHAT, json=body(stream=True)) as answer:
            async for part in answer.aiter_raw():
                times += [time.monotonic() - started] * (b'"content":"token' in part)
                times += [time.monotonic() - started] * (b'"content":" token' in part)

    assert len(times) == 40
    assert 0.1 <= times[0] < 0.15
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert statistics.median(gaps) == pytest.approx(0.01, rel=0.1)
    assert times[-1] - times[0] == pytest.approx(0.39, abs=0.04)  # no drift


async def test_slots_are_granted_in_order() -> None:
    async with FakeEngine("vllm", slots=2, ttft_s=0.05) as engine, client_of(engine) as client:
        ended: list[int] = []

        async def ask(number: int) -> None:
            await client.post(CHAT, json=body(max_tokens=1))
            ended.append(number)

        async with asyncio.TaskGroup() as group:
            for number in range(6):
                group.create_task(ask(number))
                await engine.until(lambda engine, n=number: len(engine.generations) == n + 1)  # type: ignore[misc]
            most_waiting = engine.waiting
        peak, left = engine.peak_running, (engine.running, engine.waiting)

    assert most_waiting >= 3
    assert peak == 2
    assert left == (0, 0)
    assert ended == sorted(ended)


async def test_a_waiting_client_that_hangs_up_leaves_the_queue() -> None:
    async with FakeEngine("vllm", slots=1, ttft_s=0.3) as engine, client_of(engine) as client:
        first = asyncio.create_task(client.post(CHAT, json=body()))
        await engine.until(lambda engine: engine.running == 1)
        second = asyncio.create_task(client.post(CHAT, json=body()))
        await engine.until(lambda engine: engine.waiting == 1)
        second.cancel()
        await engine.until(lambda engine: engine.hang_ups)

        assert (engine.running, engine.waiting) == (1, 0)
        assert (await first).status_code == 200
        assert [request.ended for request in engine.generations] == ["done", "hung up"]


@pytest.mark.alone
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streamed", [True, False])
async def test_a_hang_up_frees_the_slot_at_once(kind: str, *, streamed: bool) -> None:
    async with FakeEngine(kind, gap_s=5.0) as engine, client_of(engine) as client:
        request = asyncio.create_task(client.post(CHAT, json=body(stream=streamed)))
        await engine.until(lambda engine: engine.running == 1)
        left = time.monotonic()
        request.cancel()
        await engine.until(lambda engine: engine.hang_ups)

        assert engine.running == 0
        assert engine.hang_ups[0] - left < 0.05


async def test_waiting_in_vain_raises_the_state() -> None:
    async with FakeEngine("vllm") as engine:
        with pytest.raises(TimeoutError, match=r"<FakeEngine vllm .* running=0/16 waiting=0"):
            await engine.until(lambda engine: engine.running, within_s=0.01)


# Scripts


async def test_a_script_is_played_once_before_normal_service() -> None:
    async with FakeEngine("vllm") as engine, client_of(engine) as client:
        engine.script(status(500), status(503, retry_after=2), status(422, body={"detail": []}))
        answers = [await client.post(CHAT, json=body()) for _ in range(4)]
        health = await client.get("/health")

    assert [answer.status_code for answer in answers] == [500, 503, 422, 200]
    assert answers[1].headers["retry-after"] == "2"
    assert answers[2].json() == {"detail": []}
    assert health.status_code == 200


async def test_a_script_can_last_until_it_is_cleared() -> None:
    async with FakeEngine("vllm") as engine, client_of(engine) as client:
        engine.script(Serve(), then=status(500))
        answers = [(await client.post(CHAT, json=body())).status_code for _ in range(3)]
        engine.heal()
        answers.append((await client.post(CHAT, json=body())).status_code)

    assert answers == [200, 500, 500, 200]


async def test_a_script_can_be_for_another_path() -> None:
    async with FakeEngine("vllm") as engine, client_of(engine) as client:
        engine.script(status(503), path="/health")

        assert (await client.post(CHAT, json=body())).status_code == 200
        assert (await client.get("/health")).status_code == 503
        assert (await client.get("/health")).status_code == 200


THREE = b" token2"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("answer", "end"),
    [
        (Serve(tokens=3), "end of body"),
        ([Serve(tokens=3), Close()], "end of connection"),
        ([Serve(tokens=3), Reset()], "reset"),
    ],
)
async def test_a_stream_can_end_in_each_bad_way(kind: str, answer: Answer, end: str) -> None:
    async with FakeEngine(kind) as engine:
        engine.script(answer)
        received, how = await on_the_wire(engine)

        assert how == end
        assert THREE in received
        assert b"token3" not in received
        assert b"DONE" not in received
        assert b'"stop"' not in received
        assert not engine.hang_ups


@pytest.mark.parametrize("after", [0, 1, 20, 333])
async def test_an_answer_can_be_cut_at_any_byte(after: int) -> None:
    async with FakeEngine("vllm") as engine:
        engine.script([Cut(after), Reset()])
        received, how = await on_the_wire(engine)

    assert (len(received), how) == (after, "reset")


async def test_an_engine_can_accept_a_request_and_stay_silent() -> None:
    async with FakeEngine("vllm") as engine:
        engine.script(Silence(), [Serve(tokens=0), Silence()], [Serve(tokens=2), Silence()])
        silences = [b"", b"transfer-encoding: chunked\r\n\r\n", b"token1"]
        results: list[bytes] = []
        for number, awaited in enumerate(silences, start=1):
            results.append(await until_quiet(engine, awaited))
            await engine.until(lambda engine, n=number: len(engine.hang_ups) == n)  # type: ignore[misc]

    nothing, head, some = results
    assert nothing == b""
    assert head.endswith(silences[1])
    assert b"token2" not in some
    assert not some.endswith(b"<end>")


@pytest.mark.alone
async def test_a_pause_is_as_long_as_scripted() -> None:
    async with FakeEngine("vllm") as engine, client_of(engine) as client:
        engine.script([Pause(0.1), Serve()])
        started = time.monotonic()
        await client.post(CHAT, json=body())

    assert 0.1 <= time.monotonic() - started < 0.2


async def test_bytes_can_be_sent_one_by_one() -> None:
    sent = event(chunk("é🙂")).replace(b"\n", b"\r\n") + DONE
    async with FakeEngine("vllm") as engine, client_of(engine) as client:
        engine.script(stream(sent, split=1))
        async with client.stream("POST", CHAT, json=body(stream=True)) as answer:
            parts = [part async for part in answer.aiter_raw()]

    assert b"".join(parts) == sent
    assert len(parts) > len(sent) // 2  # the reader may find a few at once


async def test_raw_bytes_may_be_any_http() -> None:
    raw = b"HTTP/1.1 299 Whatever\r\nContent-Length: 99\r\n\r\nshort"
    async with FakeEngine("vllm") as engine:
        engine.script(Send(raw, split=7))

        assert await on_the_wire(engine) == (raw, "end of connection")


async def test_the_content_length_can_be_wrong() -> None:
    async with FakeEngine("vllm") as engine, client_of(engine) as client:
        engine.script([Head(length=10), Send(b"{}"), Close()])
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post(CHAT, json=body())


async def test_headers_can_be_added_to_the_normal_answer() -> None:
    async with FakeEngine("vllm") as engine, client_of(engine) as client:
        engine.script(Serve(headers={"set-cookie": "a=b", "server": "secret"}))
        answer = await client.post(CHAT, json=body())

    assert answer.headers["set-cookie"] == "a=b"
    assert answer.headers["server"] == "secret"
    assert answer.json()["choices"]


async def test_answer_can_be_compressed() -> None:
    packed = gzip.compress(event(chunk("Hi")) + DONE)
    async with FakeEngine("vllm") as engine, client_of(engine) as client:
        engine.script([Head(headers={"content-encoding": "gzip"}), Send(packed)])
        answer = await client.post(CHAT, json=body(stream=True))

    assert text_of(events_of(answer.text)) == "Hi"


async def test_a_stream_can_be_made_of_given_events() -> None:
    call = [{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}]
    async with FakeEngine("vllm") as engine, client_of(engine) as client:
        engine.script(
            stream(
                b": ping\n\n",
                chunk(role="assistant"),
                chunk(reasoning_content="Hm"),
                chunk("Hi", usage=usage()),
                chunk(tool_calls=call),
                chunk(finish="tool_calls"),
                usage_chunk(3, 2),
                DONE,
            )
        )
        answer = await client.post(CHAT, json=body(stream=True))
    comment, *rest = answer.text.split("\n\n")
    results = events_of("\n\n".join(rest))

    assert comment == ": ping"
    assert [list(choice["delta"]) for item in results for choice in item["choices"]] == [
        ["role"],
        ["reasoning_content"],
        ["content"],
        ["tool_calls"],
        [],
    ]
    assert results[-1]["usage"]["total_tokens"] == 5


async def test_steps_can_be_repeated() -> None:
    async with FakeEngine("vllm") as engine, client_of(engine) as client:
        engine.script([Head(), Repeat(Send(b"x" * 1000), times=1000)])
        answer = await client.post(CHAT, json=body())

    assert answer.content == b"x" * 1_000_000


@pytest.mark.parametrize(
    "answer", [Serve(tokens=10**9), [Head(), Repeat(Send(b"x" * 65536))], [Head(), Repeat(())]]
)
async def test_an_endless_answer_ends_with_its_client(answer: Answer) -> None:
    async with FakeEngine("vllm") as engine, client_of(engine) as client:
        engine.script(answer)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await client.post(CHAT, json=body(stream=True))
        await engine.until(lambda engine: engine.hang_ups)


async def test_an_endless_answer_ends_with_a_client_that_never_read() -> None:
    async with FakeEngine("vllm") as engine:
        engine.script([Head(), Repeat(Send(b"x" * 65536))])
        _, writer = await asyncio.open_connection("127.0.0.1", engine.port)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(f"POST {CHAT} HTTP/1.1\r\ncontent-length: 0\r\n\r\n".encode())
        await engine.until(lambda engine: engine.running == 1)
        await asyncio.sleep(0.05)  # the kernel's buffers are full by now
        writer.transport.abort()
        await engine.until(lambda engine: engine.hang_ups)

        assert engine.running == 0


async def test_a_mistake_in_a_script_is_raised_when_the_engine_closes() -> None:
    engine = FakeEngine("vllm")
    await engine.__aenter__()
    engine.script(Send("text"))  # type: ignore[arg-type]
    await on_the_wire(engine)

    with pytest.raises(TypeError):
        await engine.__aexit__(None, None, None)


# The port


async def test_an_engine_that_is_down_refuses_connections_and_returns_on_its_port() -> None:
    async with FakeEngine("vllm", gap_s=5.0) as engine, client_of(engine) as client:
        url = engine.url
        request = asyncio.create_task(client.post(CHAT, json=body()))
        await engine.until(lambda engine: engine.running == 1)
        engine.down()
        with pytest.raises(httpx.ReadError):
            await request
        with pytest.raises(httpx.ConnectError):
            await client.get("/health")
        await engine.up()

        assert (await client.get("/health")).status_code == 200
        assert engine.url == url
        assert not engine.hang_ups
        assert engine.generations[0].ended == "down"


async def test_a_deaf_engine_answers_no_attempt_to_connect() -> None:
    async with FakeEngine("vllm") as engine, client_of(engine) as client:
        engine.deaf()
        with pytest.raises(httpx.ConnectTimeout):
            await client.get("/health", timeout=0.1)
        await engine.up()

        assert (await client.get("/health")).status_code == 200


async def test_an_idle_connection_is_closed_after_its_keep_alive() -> None:
    async with FakeEngine("vllm", keep_alive_s=0.1) as engine, client_of(engine) as client:
        for _ in range(3):
            await client.post(CHAT, json=body(stream=True))
        kept = engine.connections
        await engine.until(lambda engine: engine.connections == 0)

        assert (kept, engine.accepted) == (1, 1)
        assert not engine.hang_ups


async def test_a_request_is_recorded_as_it_arrived() -> None:
    async with FakeEngine("vllm") as engine, client_of(engine) as client:
        await client.get("/v1/models?a=1", headers={"X-One": "1"})
        await client.post(CHAT, json=body(), headers={"Authorization": "Bearer k"})
        listed, request = engine.received

    assert (listed.method, listed.path, listed.query) == ("GET", "/v1/models", {"a": "1"})
    assert listed.headers["x-one"] == "1"
    assert request.body == body()
    assert json.loads(request.raw) == body()
    assert request.headers["authorization"] == "Bearer k"
    assert request.ended == "done"


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with FakeEngine("vllm") as engine:
        reader, writer = await asyncio.open_connection("127.0.0.1", engine.port)
        get = "GET {} HTTP/1.1\r\nhost: x\r\n\r\n"
        writer.write((get.format("/version") + get.format("/nope")).encode())
        received = b""
        while b"Not Found" not in received.partition(b"0.32")[2]:
            received += await reader.read(65536)
        writer.close()

    assert received.index(b"200 OK") < received.index(b"404 Not Found")


async def test_bytes_that_are_not_http_are_answered_400() -> None:
    async with FakeEngine("vllm") as engine:
        reader, writer = await asyncio.open_connection("127.0.0.1", engine.port)
        writer.write(b"\x16\x03\x01 hello\r\n\r\n")
        received = await reader.read()
        writer.close()

    assert received.startswith(b"HTTP/1.1 400 ")


# From another process


async def test_control_port_watches_and_scripts() -> None:
    async with (
        FakeEngine("vllm") as engine,
        Control(engine) as control,
        client_of(engine) as client,
        async_client(control.url) as remote,
    ):
        await remote.post("/script", json=[{"status": 503, "retry_after": 2}])
        await remote.post("/script", json={"answer": {"status": 500}, "times": 2})
        await remote.post("/script", json={"answer": ["reset"], "path": "/health", "times": None})
        codes = [(await client.post(CHAT, json=body())).status_code for _ in range(4)]
        with pytest.raises(httpx.ReadError):
            await client.get("/health")
        await remote.delete("/script")
        healthy = (await client.get("/health")).status_code
        await remote.post("/down")
        with pytest.raises(httpx.ConnectError):
            await client.get("/health")
        await remote.post("/up")
        state = (await remote.get("/")).json()
        wrong = await remote.post("/script", json=["dance"])

    assert codes == [503, 500, 500, 200]
    assert healthy == 200
    assert (state["up"], state["received"], state["running"]) == (True, 6, 0)
    assert (wrong.status_code, wrong.json()) == (400, {"error": "not a step: 'dance'"})


def test_every_step_can_be_written_as_json() -> None:
    described = [
        {"head": {"status": 200, "headers": {"a": "b"}, "length": 5}},
        {"send": "text", "split": 1},
        {"event": {"a": 1}},
        {"pause": 0.5},
        {"serve": {"tokens": 3}},
        {"cut": 10, "answer": "serve"},
        {"repeat": ["silence"], "times": 2},
        "close",
        "kill",
        "reset",
    ]

    assert read_answer(described) == [
        Head(200, {"a": "b"}, length=5),
        Send(b"text", split=1),
        Send(b'data: {"a":1}\n\n'),
        Pause(0.5),
        Serve(tokens=3),
        Cut(10, Serve()),
        Repeat([Silence()], times=2),
        Close(),
        Kill(),
        Reset(),
    ]


async def test_the_program_serves_until_sigterm() -> None:
    program = [sys.executable, "-m", "backends.fake", "--kind", "ollama", "--model", "x:1b"]
    process = await asyncio.create_subprocess_exec(
        *program, "--control-port", "0", stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    results = (await process.stdout.readline()).decode()
    kind, _, url, _, _, control = results.replace(",", "").split()
    async with async_client() as client:
        listed = (await client.get(f"{url}/v1/models")).json()
        state = (await client.get(control)).json()
    process.send_signal(signal.SIGTERM)

    assert await process.wait() == 0
    assert kind == "ollama"
    assert listed["data"][0]["id"] == "x:1b"
    assert state["received"] == 1
