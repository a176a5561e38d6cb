"""Cases 13-24: streams that break off, fall silent, are malformed, or only unusual."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import time
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeAlias

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as some
from openai._streaming import SSEDecoder

from backends.fake import (
    DONE,
    Answer,
    Close,
    Cut,
    FakeEngine,
    Head,
    Pause,
    Repeat,
    Reset,
    Send,
    Serve,
    Silence,
    Step,
    chunk,
    event,
    status,
    stream,
    usage,
    usage_chunk,
)
from backends.transport.sse import MAX_EVENT, StreamFilter
from tests.clients import langchain, node, sdk
from tests.support.gateways import Running, StartGateway
from tests.support.models import alone, chat, pair

CHAT = "/v1/chat/completions"
THREE = "token0 token1 token2"
BROKE_OFF = {
    "message": "The engine's answer broke off before its end.",
    "type": "api_error",
    "param": None,
    "code": "engine_failed",
}
Logged: TypeAlias = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def logged(capsys: pytest.CaptureFixture[str]) -> Logged:
    """Reads the request log; the gateway needs `log="json"`."""
    written: list[str] = []

    def lines() -> list[dict[str, Any]]:
        written.extend(capsys.readouterr().err.splitlines())
        return [json.loads(line) for line in written if line.startswith("{")]

    return lines


async def streamed(running: Running, **fields: Any) -> bytes:
    """The body of a streamed answer, byte for byte."""
    answer = await running.http.post(CHAT, json=chat(stream=True, **fields))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    return answer.content


def datas(body: bytes) -> list[str]:
    """The data of each event, as the SDK's reader parses them; [DONE] must be the last."""
    assert body.endswith(b"\n\n"), "no whole event at the end"
    found = [sent.data for sent in SSEDecoder().iter_bytes(iter([body]))]
    assert found[-1] == "[DONE]"
    return found[:-1]


def events(body: bytes) -> list[dict[str, Any]]:
    return [json.loads(data) for data in datas(body)]


def text(chunks: list[dict[str, Any]]) -> str:
    return "".join(
        choice["delta"].get("content") or "" for made in chunks for choice in made["choices"]
    )


def broken_off(body: bytes) -> str:
    """The text of a stream that must end with an error, and must not look finished."""
    *chunks, last = events(body)
    assert last == {"error": BROKE_OFF}
    assert body.count(b"[DONE]") == 1
    assert not any(choice["finish_reason"] for made in chunks for choice in made["choices"])
    return text(chunks)


# 13, 14: the end that is none


async def test_13_a_reset_after_three_tokens_becomes_an_error_event(
    vllm: FakeEngine, start_gateway: StartGateway, logged: Logged
) -> None:
    async with start_gateway(**alone(vllm), log="json") as running:
        vllm.script([Serve(tokens=3), Reset()])

        body = await streamed(running)

    assert broken_off(body) == THREE
    [line] = logged()
    assert (line["outcome"], line["status"], line["attempts"]) == ("truncated", 200, 1)


async def test_13_the_sdk_has_the_text_and_then_an_error(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm)) as running, sdk(running.url) as client:
        vllm.script([Serve(tokens=3), Reset()])
        answer = await client.chat.completions.create(**chat(stream=True))
        seen = []
        with pytest.raises(openai.APIError) as caught:  # noqa: PT012 - raised while it is read
            async for part in answer:
                seen += [choice.delta.content or "" for choice in part.choices]

    assert "".join(seen) == THREE
    assert caught.value.message == BROKE_OFF["message"]
    assert (caught.value.code, caught.value.type) == ("engine_failed", "api_error")
    assert not isinstance(caught.value, openai.APIConnectionError)


async def test_13_openai_for_node_has_the_text_and_then_an_error(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm)) as running:
        vllm.script([Serve(tokens=3), Reset()])

        seen = await node(running.url, chat(stream=True))

    assert (seen["text"], seen["finish"]) == (THREE, None)
    assert (seen["error"]["name"], seen["error"]["code"]) == ("APIError", "engine_failed")


@pytest.mark.parametrize("fault", [Reset(), Close()], ids=["reset", "close"])
async def test_13_a_stream_that_has_begun_is_never_restarted(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway, fault: Step
) -> None:
    async with start_gateway(**pair(ollama, vllm)) as running:
        ollama.script([Serve(tokens=3), fault])
        before = len(vllm.generations)

        body = await streamed(running)

        assert broken_off(body) == THREE
        assert len(ollama.generations) == 1
        assert len(vllm.generations) == before


async def test_13_a_stream_cut_anywhere_ends_in_whole_events_and_an_error(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm)) as running:
        whole = "token0 token1 token2 token3 token4"
        texts = set()
        for after in range(300, 1500, 61):
            vllm.script([Cut(after), Reset()])
            answer = await running.http.post(CHAT, json=chat(stream=True))
            if answer.status_code == 200:
                texts.add(broken_off(answer.content))
            else:  # cut before its first event
                assert answer.status_code == 502
                assert answer.json()["error"]["code"] == "engine_failed"
            assert text(events(await streamed(running))) == whole  # and not left alone for it

    assert len(texts) > 3
    assert all(whole.startswith(seen) for seen in texts)


@pytest.mark.parametrize(
    "answer",
    [[Serve(tokens=3), Close()], Serve(tokens=3)],
    ids=["end of the connection", "end of the body"],
)
async def test_14_an_end_without_finish_or_done_is_an_error(
    vllm: FakeEngine, start_gateway: StartGateway, logged: Logged, answer: Answer
) -> None:
    async with start_gateway(**alone(vllm), log="json") as running:
        vllm.script(answer)

        body = await streamed(running)

    assert broken_off(body) == THREE
    assert logged()[-1]["outcome"] == "truncated"


async def test_14_a_finish_without_done_is_an_end_and_receives_its_done(
    vllm: FakeEngine, start_gateway: StartGateway, logged: Logged
) -> None:
    async with start_gateway(**alone(vllm), log="json") as running:
        vllm.script(stream(chunk("Hi"), chunk(finish="stop")))

        body = await streamed(running)

    assert body == event(chunk("Hi")) + event(chunk(finish="stop")) + DONE
    assert logged()[-1]["outcome"] == "ok"


async def test_14_a_done_without_finish_is_an_end(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm)) as running:
        vllm.script(stream(chunk("Hi"), DONE, chunk("nobody asked")))

        body = await streamed(running)

    assert body == event(chunk("Hi")) + DONE


# 15: silence


async def test_15_silence_ends_a_stream_and_its_upstream_connection(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm), limits={"idle_s": 0.3}) as running:
        vllm.script([Serve(tokens=3), Silence()])
        began = time.monotonic()

        async with asyncio.timeout(5):
            body = await streamed(running)

        took = time.monotonic() - began
        await vllm.until(lambda engine: engine.generations[-1].ended == "hung up", within_s=1)
        assert broken_off(body) == THREE
        assert 0.29 <= took < 1.3  # a timer may be a millisecond early
        assert vllm.running == 0


async def test_15_a_slow_stream_is_not_ended(vllm: FakeEngine, start_gateway: StartGateway) -> None:
    vllm.gap_s = 0.2
    async with start_gateway(**alone(vllm), limits={"idle_s": 0.5}) as running:
        began = time.monotonic()

        chunks = events(await streamed(running))

    assert text(chunks) == "token0 token1 token2 token3 token4"
    assert time.monotonic() - began > 0.5


# 16: a 200 that is none


def error_first(code: object, message: str = "too long", **more: Any) -> list[Any]:
    said = {"message": message, "type": "BadRequestError", "param": "messages", "code": code}
    return stream({"error": {**said, **more}}, DONE)


async def test_16_an_error_as_first_event_has_its_real_status(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway, logged: Logged
) -> None:
    async with (
        start_gateway(**pair(ollama, vllm), log="json") as running,
        sdk(running.url) as client,
    ):
        ollama.script(error_first(400))
        before = len(vllm.generations)
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(**chat(stream=True))

        assert caught.value.body == {
            "message": "too long",
            "type": "BadRequestError",
            "param": "messages",
            "code": None,
        }
        assert caught.value.request_id
        assert len(vllm.generations) == before  # another engine would say the same
        assert logged()[-1]["status"] == 400


@pytest.mark.parametrize("code", [500, 503, "boom", None])
async def test_16_an_error_of_the_engines_own_goes_to_the_other_lane(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway, code: object
) -> None:
    async with start_gateway(**pair(ollama, vllm)) as running:
        ollama.script(error_first(code))

        answer = await running.http.post(CHAT, json=chat(stream=True))

    assert text(events(answer.content)) == "token0 token1 token2 token3 token4"
    assert answer.headers["x-gateway-lane"] == "vllm"


async def test_16_without_another_lane_it_is_a_502_and_no_stream(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm)) as running, sdk(running.url) as client:
        vllm.script(error_first(500, "CUDA error at http://10.0.0.7"))
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(**chat(stream=True))

    assert (caught.value.status_code, caught.value.code) == (502, "engine_failed")
    assert "CUDA" not in str(caught.value)


async def test_16_an_error_after_the_first_event_is_an_error_event(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    failure = {"error": {"message": "boom", "type": "server_error", "code": 500}}
    async with start_gateway(**alone(vllm)) as running:
        vllm.script([Serve(tokens=3), Send(event(failure)), Send(DONE)])

        body = await streamed(running)

    assert broken_off(body) == THREE


# 17: what is no JSON

NO_JSON = {
    "truncated": b'data: {"choi\n\n',
    "a number": b"data: 5\n\n",
    "a list": b"data: []\n\n",
    "two in one": b'data: {"choices":[]}{"choices":[]}\n\n',
    "text": b"data: Internal Server Error\n\n",
    "deep": b"data: " + b'{"a":' * 100_000 + b"\n\n",
    "no UTF-8": event(chunk("XX")).replace(b"XX", b"\xff\xfe"),
}


@pytest.mark.parametrize("said", NO_JSON.values(), ids=NO_JSON)
async def test_17_an_event_that_is_not_json_becomes_an_error_event(
    vllm: FakeEngine, start_gateway: StartGateway, said: bytes
) -> None:
    async with start_gateway(**alone(vllm)) as running:
        vllm.script([Serve(tokens=3), Send(said), Send(DONE)])

        body = await streamed(running)
        after = await streamed(running)

    assert broken_off(body) == THREE
    assert text(events(after)) == "token0 token1 token2 token3 token4"


async def test_17_the_engine_is_at_fault_and_ejected_after_three(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**pair(ollama, vllm)) as running:
        ollama.script(then=[Serve(tokens=3), Send(NO_JSON["truncated"]), Send(DONE)])
        for _ in range(3):
            broken_off(await streamed(running))

        answer = await running.http.post(CHAT, json=chat(stream=True))
        lane = (await running.status("m"))["lanes"]["ollama"]

    assert answer.headers["x-gateway-lane"] == "vllm"
    assert text(events(answer.content)) == "token0 token1 token2 token3 token4"
    assert "failed too often" in lane["replicas"][0]["state"]


# 18: any cut of the same bytes

NEWLINES = some.sampled_from(["\n", "\r\n"])
NOISE = some.sampled_from(
    ["", ": ping\n\n", "id: 7\n\n", "retry: 5\n\n", "data:\n\n", "\n", ":\n\n"]
)
CONTENT = some.text(max_size=12) | some.sampled_from(
    ["👋", "👩\u200d👩\u200d👧", "Grüße", "\u2028", "\r\n\n"]
)


@some.composite
def engine_stream(draw: some.DrawFn) -> tuple[list[str], bytes]:
    """Some contents, and a stream of them as an engine might write it."""
    contents = draw(some.lists(CONTENT, max_size=6))
    parts = []
    for content in contents:
        more: dict[str, Any] = draw(
            some.sampled_from([{}, {"reasoning": "Hm", "reasoning_content": "Hm"}])
        )
        said = json.dumps(
            chunk(content, **more),
            ensure_ascii=draw(some.booleans()),
            indent=draw(some.sampled_from([None, 1])),
        )
        space = draw(some.sampled_from(["", " "]))
        lines = "\n".join(f"data:{space}{line}" for line in said.split("\n"))
        parts += [draw(NOISE), draw(some.sampled_from(["", "id: 1\n", ": so\n"])), lines, "\n\n"]
    parts += [draw(NOISE), "data: [DONE]\n\n"]
    return contents, "".join(parts).replace("\n", draw(NEWLINES)).encode()


@given(engine_stream(), some.lists(some.integers(0, 2000)))
def test_18_any_cut_of_a_stream_gives_the_same_content(
    stream_of: tuple[list[str], bytes], cuts: list[int]
) -> None:
    contents, raw = stream_of
    ends = sorted({0, len(raw), *(cut % len(raw) for cut in cuts)})

    whole, cut = StreamFilter(usage=False), StreamFilter(usage=False)
    out = whole.feed(raw)
    pieces = b"".join(cut.feed(raw[a:b]) for a, b in pairwise(ends))

    assert pieces == out
    assert whole.done
    assert cut.done
    assert [made["choices"][0]["delta"]["content"] for made in events(out)] == contents


@given(engine_stream())
def test_18_a_stream_cut_at_every_byte_gives_the_same_content(
    stream_of: tuple[list[str], bytes],
) -> None:
    contents, raw = stream_of
    passed = StreamFilter(usage=False)

    out = b"".join(passed.feed(bytes([byte])) for byte in raw)

    assert [made["choices"][0]["delta"]["content"] for made in events(out)] == contents


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
async def test_18_a_stream_sent_byte_by_byte_arrives_as_it_was(
    vllm: FakeEngine, start_gateway: StartGateway, newline: bytes
) -> None:
    words = ["Grüße", " 👋", " 👩\u200d👩\u200d👧", " fin"]
    made = [chunk(word) for word in words]
    lines = json.dumps(made[-1], ensure_ascii=False, indent=2).encode().split(b"\n")
    in_lines = b"".join(b"data: " + line + b"\n" for line in lines) + b"\n"
    sent = [*map(event, made[:-1]), in_lines, event(chunk(finish="stop")), DONE]
    async with start_gateway(**alone(vllm)) as running, sdk(running.url) as client:
        vllm.script(then=stream(b"".join(sent).replace(b"\n", newline), split=1))

        chunks = events(await streamed(running))
        answer = await client.chat.completions.create(**chat(stream=True))
        parts = [part async for part in answer]

    assert chunks == [*made, chunk(finish="stop")]
    assert [part.choices[0].delta.content for part in parts] == [*words, None]


# 19: lines without end


@pytest.mark.parametrize("times", [160, None], ids=["10 MB", "endless"])
async def test_19_a_line_without_end_is_an_error_and_not_buffered(
    vllm: FakeEngine, start_gateway: StartGateway, times: int | None
) -> None:
    line = Repeat(Send(b"x" * 65536), times)
    async with start_gateway(**alone(vllm)) as running:
        vllm.script([Serve(tokens=3), Send(b"data: "), line])
        await running.http.get("/health")
        tracemalloc.start()
        try:
            body = await streamed(running)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        await vllm.until(lambda engine: engine.generations[-1].ended == "hung up", within_s=1)

    assert broken_off(body) == THREE
    assert peak < 6 * MAX_EVENT  # of ten, or of all there is


async def test_19_a_first_line_without_end_is_a_502(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm)) as running:
        vllm.script([Head(), Repeat(Send(b"x" * 65536))])

        answer = await running.http.post(CHAT, json=chat(stream=True))
        await vllm.until(lambda engine: engine.generations[-1].ended == "hung up", within_s=1)

    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "engine_failed"


async def test_19_an_event_of_nearly_a_megabyte_is_an_event(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    large = "👋" * 200_000
    async with start_gateway(**alone(vllm)) as running:
        vllm.script(stream(chunk(large), chunk(finish="stop"), DONE))

        chunks = events(await streamed(running))

    assert text(chunks) == large


# 20: what is no data

ODD: list[bytes | dict[str, Any]] = [
    b": ping\n\n",
    b"retry: 5\n\n",
    chunk(role="assistant"),
    b"id: 7\n\n",
    b"data:\n\n",
    b"data: \n\n",
    b"data:  \n\n",
    b"event: ping\n\n",
    b"event: ping\ndata:\n\n",
    chunk("Hi"),
    b":\n\n",
    b"\n",
    b"id: 8\nretry: 9\n\n",
    chunk(" there"),
    chunk(finish="stop"),
    b": so long\n\n",
    DONE,
]


async def test_20_an_event_without_data_is_not_passed_on(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm)) as running:
        vllm.script(stream(*ODD))

        body = await streamed(running)

    kept = [part for part in ODD if isinstance(part, dict)]
    assert body == b"".join(map(event, kept)) + DONE


async def test_20_the_sdk_finishes_normally(vllm: FakeEngine, start_gateway: StartGateway) -> None:
    async with start_gateway(**alone(vllm)) as running, sdk(running.url) as client:
        vllm.script(stream(*ODD))
        answer = await client.chat.completions.create(**chat(stream=True))
        parts = [part async for part in answer]

    assert "".join(part.choices[0].delta.content or "" for part in parts) == "Hi there"
    assert parts[-1].choices[0].finish_reason == "stop"


async def test_20_an_id_beside_data_does_not_crash_the_sdk_at_our_next_comment(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with (
        start_gateway(**alone(vllm), limits={"heartbeat_s": 0.05}) as running,
        sdk(running.url) as client,
    ):
        rest = event(chunk(" there")) + event(chunk(finish="stop")) + DONE
        vllm.script([Head(), Send(b"id: 1\n" + event(chunk("Hi"))), Pause(0.3), Send(rest)])
        answer = await client.chat.completions.create(**chat(stream=True))
        parts = [part async for part in answer]

    assert "".join(part.choices[0].delta.content or "" for part in parts) == "Hi there"


async def test_20_openai_for_node_finishes_normally(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm)) as running:
        vllm.script(stream(*ODD))

        seen = await node(running.url, chat(stream=True))

    assert seen["error"] is None
    assert (seen["text"], seen["finish"], seen["chunks"]) == ("Hi there", "stop", 4)


async def test_20_langchain_finishes_normally(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm)) as running:
        vllm.script(stream(*ODD))
        model = langchain(running.url)
        parts = [part async for part in model.astream("Hello")]
        await model.root_async_client.close()

    assert "".join(str(part.content) for part in parts) == "Hi there"
    assert any(part.response_metadata.get("finish_reason") == "stop" for part in parts)


# 21: usage


@pytest.mark.parametrize("asked", [{}, {"stream_options": {"include_usage": False}}])
@pytest.mark.parametrize("kind", ["ollama", "vllm"])
async def test_21_usage_is_counted_but_not_sent_to_a_client_that_did_not_ask(
    ollama: FakeEngine,
    vllm: FakeEngine,
    start_gateway: StartGateway,
    logged: Logged,
    kind: str,
    asked: dict[str, Any],
) -> None:
    async with start_gateway(**pair(ollama, vllm), log="json") as running:
        body = await streamed(running, model=f"m@{kind}", max_tokens=4, **asked)

    assert b'"usage":{' not in body
    assert all(made["choices"] for made in events(body))
    [line] = logged()
    assert (line["lane"], line["tokens_in"], line["tokens_out"]) == (kind, 1, 4)


@pytest.mark.parametrize("kind", ["ollama", "vllm"])
async def test_21_a_client_that_asked_receives_usage_once_and_last(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway, kind: str
) -> None:
    asked = chat(model=f"m@{kind}", stream=True, stream_options={"include_usage": True})
    async with start_gateway(**pair(ollama, vllm)) as running, sdk(running.url) as client:
        answer = await client.chat.completions.create(**asked)
        parts = [part async for part in answer]
        seen = await node(running.url, asked)

    assert [part.usage is not None for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].choices == []
    assert (parts[-1].usage.prompt_tokens, parts[-1].usage.completion_tokens) == (1, 5)
    assert (seen["usage"]["completion_tokens"], seen["error"]) == (5, None)


@pytest.mark.parametrize("wants", [True, False])
async def test_21_a_zero_usage_on_every_chunk_is_no_usage(
    vllm: FakeEngine, start_gateway: StartGateway, logged: Logged, *, wants: bool
) -> None:
    parts = [chunk("a", usage=usage()), chunk("b", usage=usage())]
    last = chunk(finish="stop", usage=usage(3, 2))
    options = {"stream_options": {"include_usage": True}} if wants else {}
    async with start_gateway(**alone(vllm), log="json") as running:
        vllm.script(stream(*parts, last, DONE))

        chunks = events(await streamed(running, **options))

    assert text(chunks) == "ab"
    assert [made.get("usage") for made in chunks] == [None, None, usage(3, 2) if wants else None]
    assert (logged()[-1]["tokens_in"], logged()[-1]["tokens_out"]) == (3, 2)


async def test_21_usage_that_never_comes_is_unknown(
    vllm: FakeEngine, start_gateway: StartGateway, logged: Logged
) -> None:
    options = {"stream_options": {"include_usage": True}}
    async with start_gateway(**alone(vllm), log="json") as running:
        vllm.script(stream(chunk("Hi"), chunk(finish="stop"), DONE))

        body = await streamed(running, **options)

    assert b"usage" not in body
    assert (logged()[-1]["tokens_in"], logged()[-1]["tokens_out"]) == (None, None)


async def test_21_text_completions_of_ollama_carry_usage_only_where_it_is_real(
    ollama: FakeEngine, start_gateway: StartGateway, logged: Logged
) -> None:
    asked = {"model": "m", "prompt": "Hello", "stream": True}
    options = {"stream_options": {"include_usage": True}}
    async with start_gateway(**alone(ollama, "small:1b"), log="json") as running:
        silent = await running.http.post("/v1/completions", json=asked)
        told = await running.http.post("/v1/completions", json=asked | options)

    assert b"usage" not in silent.content
    assert [made.get("usage") for made in events(told.content)][-1] == usage(1, 5)
    assert told.content.count(b'"usage"') == 1
    assert [line["tokens_out"] for line in logged()] == [5, 5]


# 22: when it began


@pytest.mark.parametrize(
    "empty",
    [
        [chunk(role="assistant")],
        [chunk("", role="assistant")],
        [chunk(role="assistant"), chunk(""), chunk(None, tool_calls=[])],
        [chunk(role="assistant", reasoning_content="", reasoning=None)],
        [usage_chunk(3, 0)],
    ],
    ids=["role", "empty content", "several", "empty reasoning", "usage"],
)
async def test_22_a_first_delta_without_content_is_no_first_token(
    vllm: FakeEngine, start_gateway: StartGateway, logged: Logged, empty: list[dict[str, Any]]
) -> None:
    async with start_gateway(**alone(vllm), log="json") as running:
        rest: list[Step] = [
            Pause(0.3),
            Send(event(chunk("Hi")) + event(chunk(finish="stop")) + DONE),
        ]
        vllm.script([*stream(*empty), *rest])

        await streamed(running)

    [line] = logged()
    assert 0.29 <= line["ttft_s"] <= line["total_s"]  # a timer may be a millisecond early


@pytest.mark.parametrize(
    "first",
    [chunk("Hi"), chunk(reasoning="Hm"), chunk(reasoning_content="Hm"),
     chunk(tool_calls=[{"index": 0, "id": "a", "function": {"name": "f", "arguments": ""}}])],
    ids=["content", "reasoning", "reasoning_content", "tool call"],
)  # fmt: skip
async def test_22_content_reasoning_or_a_tool_call_is_a_first_token(
    vllm: FakeEngine, start_gateway: StartGateway, logged: Logged, first: dict[str, Any]
) -> None:
    async with start_gateway(**alone(vllm), log="json") as running:
        vllm.script([*stream(first), Pause(0.3), Send(event(chunk(finish="stop")) + DONE)])

        await streamed(running)

    [line] = logged()
    assert line["total_s"] - line["ttft_s"] >= 0.29  # a timer may be a millisecond early


async def test_22_an_answer_without_any_content_has_no_first_token(
    vllm: FakeEngine, start_gateway: StartGateway, logged: Logged
) -> None:
    async with start_gateway(**alone(vllm), log="json") as running:
        vllm.script(stream(chunk(role="assistant"), chunk(finish="stop"), DONE))

        await streamed(running)

    assert logged()[-1]["ttft_s"] is None


# 23: HTTP that is not for the client


async def on_the_wire(running: Running, **fields: Any) -> tuple[str, dict[str, list[str]], bytes]:
    """An answer as it is on the wire: status line, headers, body with its framing undone."""
    host, port = "127.0.0.1", int(running.url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection(host, port)
    sent = json.dumps(chat(**fields)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {len(sent)}"
    writer.write(head.encode() + b"\r\n\r\n" + sent)
    got = await reader.read(-1)
    writer.close()
    top, _, body = got.partition(b"\r\n\r\n")
    first, *lines = top.decode("ascii").split("\r\n")
    headers: dict[str, list[str]] = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers.setdefault(name.lower(), []).append(value.strip())
    if "transfer-encoding" not in headers:
        assert headers["content-length"] == [str(len(body))]
        return first, headers, body
    assert headers["transfer-encoding"] == ["chunked"]
    assert "content-length" not in headers
    return first, headers, unchunked(body)


def unchunked(body: bytes) -> bytes:
    parts = []
    while True:
        length, _, body = body.partition(b"\r\n")
        size = int(length, 16)
        assert body[size : size + 2] == b"\r\n"
        parts.append(body[:size])
        body = body[size + 2 :]
        if not size:
            assert body == b""
            return b"".join(parts)


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "whole"])
async def test_23_no_header_of_the_engine_reaches_the_client(
    vllm: FakeEngine, start_gateway: StartGateway, *, streams: bool
) -> None:
    secret = {
        "connection": "x-hop",
        "x-hop": "1",
        "keep-alive": "timeout=5",
        "trailer": "x-after",
        "set-cookie": "a=b",
        "server": "secret",
        "x-request-id": "theirs",
        "content-disposition": "attachment",
    }
    async with start_gateway(**alone(vllm)) as running:
        vllm.script(Serve(headers=secret))

        first, headers, body = await on_the_wire(running, stream=streams)

    assert first == "HTTP/1.1 200 OK"
    assert b"token4" in body
    frame = {"transfer-encoding", "cache-control", "x-accel-buffering"}
    own = {"date", "connection", "content-type", "x-request-id", "x-gateway-lane"}
    assert set(headers) == own | {"x-gateway-reason"} | (frame if streams else {"content-length"})
    assert headers["connection"] == ["close"]
    assert re.fullmatch(r"req_[0-9a-f]{32}", headers["x-request-id"][0])


JSON_HEAD = {"content-type": "application/json"}


@pytest.mark.parametrize(
    "answer",
    [
        [Head(headers=JSON_HEAD, length=1000), Send(b"{}"), Close()],
        [Head(headers=JSON_HEAD, length=1), Send(b"{}")],
        Send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}"),
        Send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}"),
        Send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n"),
        Send(b"SSH-2.0-OpenSSH_9.6\r\n"),
    ],
    ids=["too long", "too short", "two lengths", "length and chunked", "no chunks", "no HTTP"],
)
async def test_23_a_wrong_length_is_a_502_and_never_the_clients(
    vllm: FakeEngine, start_gateway: StartGateway, answer: Answer
) -> None:
    async with start_gateway(**alone(vllm)) as running:
        vllm.script(answer)

        first, headers, body = await on_the_wire(running)
        after = await running.http.post(CHAT, json=chat())

    assert first == "HTTP/1.1 502 Bad Gateway"
    assert headers["content-type"] == ["application/json"]
    assert json.loads(body)["error"]["code"] == "engine_failed"
    assert after.json()["choices"][0]["message"]["content"].startswith("token0")


async def test_23_a_stream_shorter_than_its_length_breaks_off(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm)) as running:
        vllm.script([Head(length=10_000), Send(event(chunk("Hi"))), Close()])

        _, _, body = await on_the_wire(running, stream=True)

    assert broken_off(body) == "Hi"


async def test_23_a_stream_ended_by_its_connection_is_framed_anew(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    sent = event(chunk("Hi")) + event(chunk(finish="stop")) + DONE
    async with start_gateway(**alone(vllm)) as running:
        vllm.script([Head(chunked=False), Send(sent), Close()])

        first, headers, body = await on_the_wire(running, stream=True)

    assert first == "HTTP/1.1 200 OK"
    assert headers["transfer-encoding"] == ["chunked"]
    assert body == sent


@pytest.mark.parametrize("split", [None, 1], ids=["at once", "byte by byte"])
async def test_23_a_compressed_stream_is_decompressed(
    vllm: FakeEngine, start_gateway: StartGateway, split: int | None
) -> None:
    sent = event(chunk("Hi 👋")) + event(chunk(finish="stop")) + DONE
    async with start_gateway(**alone(vllm)) as running:
        vllm.script(
            [Head(headers={"content-encoding": "gzip"}), Send(gzip.compress(sent), split=split)]
        )

        _, headers, body = await on_the_wire(running, stream=True)

    assert body == sent
    assert "content-encoding" not in headers


async def test_23_a_compressed_whole_answer_is_decompressed(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    message = {"role": "assistant", "content": "Hi"}
    said = {"id": "a", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    packed = gzip.compress(json.dumps(said).encode())
    async with start_gateway(**alone(vllm)) as running:
        vllm.script(status(200, body=packed, headers={"content-encoding": "gzip"}))

        _, headers, body = await on_the_wire(running)

    assert json.loads(body) == said
    assert "content-encoding" not in headers


@pytest.mark.parametrize(
    ("encoding", "data"),
    [("gzip", b"this is not gzip"), ("br", b"whatever")],
    ids=["not what it says", "unknown"],
)
async def test_23_an_answer_that_cannot_be_decompressed_is_a_502(
    vllm: FakeEngine, start_gateway: StartGateway, encoding: str, data: bytes
) -> None:
    async with start_gateway(**alone(vllm)) as running:
        vllm.script([Head(headers={"content-encoding": encoding}), Send(data), Send(DONE)])

        first, _, body = await on_the_wire(running, stream=True)

    assert first == "HTTP/1.1 502 Bad Gateway"
    assert json.loads(body)["error"]["code"] == "engine_failed"


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "whole"])
async def test_23_a_decompression_bomb_is_not_decompressed(
    vllm: FakeEngine, start_gateway: StartGateway, *, streams: bool
) -> None:
    packed = gzip.compress(event(chunk("x" * 100_000_000)), 1)
    async with start_gateway(**alone(vllm)) as running:
        vllm.script([Head(headers={"content-encoding": "gzip"}), Send(packed), Send(DONE)])
        tracemalloc.start()
        try:
            first, _, body = await on_the_wire(running, stream=streams)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

    assert first == "HTTP/1.1 502 Bad Gateway"
    assert json.loads(body)["error"]["code"] == "engine_failed"
    assert peak < 25_000_000


# 24: deltas that are no content

TOOL_CALL = [
    chunk(role="assistant", content=None),
    chunk(tool_calls=[{"index": 0, "id": "call_1", "type": "function",
                       "function": {"name": "look", "arguments": ""}}]),
    chunk(tool_calls=[{"index": 0, "function": {"arguments": '{"for": "'}}]),
    chunk(tool_calls=[{"index": 0, "function": {"arguments": "reasoning\\n👋"}}]),
    chunk(tool_calls=[{"index": 1, "id": "call_2", "type": "function",
                       "function": {"name": "wait", "arguments": "{}"}}]),
    chunk(tool_calls=[{"index": 0, "function": {"arguments": '"}'}}]),
    chunk(finish="tool_calls"),
]  # fmt: skip
LOGPROBS = {"content": [
    {"token": "Hi", "logprob": -1.2345678901234567e-07, "bytes": [72, 105],
     "top_logprobs": [{"token": "Ho", "logprob": -17.000000000000004, "bytes": None}]},
]}  # fmt: skip


async def test_24_tool_calls_and_logprobs_arrive_byte_for_byte(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    made = [*TOOL_CALL[:-1], chunk("Hi", logprobs=LOGPROBS), TOOL_CALL[-1]]
    async with start_gateway(**alone(vllm)) as running:
        vllm.script(stream(*made, DONE))

        body = await streamed(running)

    assert body == b"".join(map(event, made)) + DONE


async def test_24_the_sdk_assembles_the_tool_calls(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    calls: dict[int, tuple[str, str]] = {}
    async with start_gateway(**alone(vllm)) as running, sdk(running.url) as client:
        vllm.script(stream(*TOOL_CALL, DONE))
        answer = await client.chat.completions.create(**chat(stream=True))
        parts = [part async for part in answer]

    for part in parts:
        for call in part.choices[0].delta.tool_calls or ():
            name, arguments = calls.get(call.index, ("", ""))
            calls[call.index] = (
                name + (call.function.name or ""),
                arguments + (call.function.arguments or ""),
            )
    assert calls == {0: ("look", '{"for": "reasoning\\n👋"}'), 1: ("wait", "{}")}
    assert parts[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
async def test_24_reasoning_has_both_names_in_its_order(
    vllm: FakeEngine, start_gateway: StartGateway, name: str
) -> None:
    thoughts: list[dict[str, Any]] = [{name: "Hm"}, {name: ", 👋"}, {name: ""}]
    sent = [chunk(role="assistant"), *(chunk(**thought) for thought in thoughts), chunk("Hi")]
    async with start_gateway(**alone(vllm)) as running:
        vllm.script(stream(*sent, chunk(finish="stop"), DONE))

        deltas = [made["choices"][0]["delta"] for made in events(await streamed(running))]

    both = [{"reasoning": said, "reasoning_content": said} for said in ("Hm", ", 👋")]
    assert deltas == [{"role": "assistant"}, *both, {name: ""}, {"content": "Hi"}, {}]


async def test_24_reasoning_beside_logprobs_changes_neither(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm)) as running:
        vllm.script(stream(chunk(reasoning="Hm", logprobs=LOGPROBS), chunk(finish="stop"), DONE))

        first, _ = events(await streamed(running))

    assert first == chunk(reasoning="Hm", reasoning_content="Hm", logprobs=LOGPROBS)


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
async def test_24_reasoning_of_a_whole_answer_has_both_names(
    vllm: FakeEngine, start_gateway: StartGateway, name: str
) -> None:
    message = {"role": "assistant", "content": "Hi", name: "Hm"}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": LOGPROBS}
    async with start_gateway(**alone(vllm)) as running:
        vllm.script(status(200, body={"id": "a", "choices": [choice]}))

        said = (await running.http.post(CHAT, json=chat())).json()

    both = message | {"reasoning": "Hm", "reasoning_content": "Hm"}
    assert said["choices"] == [choice | {"message": both}]
