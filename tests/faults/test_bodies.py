"""Cases 33-37: malformed bodies, and fields that ask for too much."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as some

from backends import calls
from backends.fake import FakeEngine
from gateway.errors import GatewayError
from gateway.http.request import (
    BOUNDS,
    MAX_COMMAS,
    MAX_FIELDS,
    MAX_MESSAGES,
    MAX_PARTS,
    UNSAFE,
    parse,
)
from tests.clients import sdk
from tests.support.gateways import Running, StartGateway
from tests.support.models import alone, chat, pair

CHAT = "/v1/chat/completions"
LARGEST = 16 * 1024 * 1024  # limits.max_body_mb as installed


def filled(before: bytes, item: bytes, after: bytes, times: int | None = None) -> bytes:
    """A body that repeats an item `times` times, or as often as fits into the largest body."""
    fits = (LARGEST - len(before) - len(after)) // (len(item) + 1)
    return before + b",".join([item] * (fits if times is None else times)) + after


def numbered(before: bytes, times: int, after: bytes) -> bytes:
    return before + b",".join(b'"%x":0' % i for i in range(times)) + after


START = b'{"model":"m","messages":['
ASKED = START + b'{"role":"user","content":"Hello"}],'
CONTENT = START + b'{"role":"user","content":['
FULL = MAX_COMMAS - 9  # of the smallest values, as many as are looked at
#: Bodies that no engine may get, by what they are, and how the answer names the fault.
BAD = {
    "nothing": (b"", "not valid JSON"),
    "truncated": (b'{"model":"m"', "not valid JSON"),
    "trailing comma": (b'{"model":"m",}', "not valid JSON"),
    "two values": (b"{}{}", "not valid JSON"),
    "single quotes": (b"{'model':'m'}", "not valid JSON"),
    "an array": (b"[]", "must be a JSON object"),
    "a number": (b"5", "must be a JSON object"),
    "a string": (b'"m"', "must be a JSON object"),
    "null": (b"null", "must be a JSON object"),
    "no UTF-8": (ASKED + b'"user":"\xff"}', "not UTF-8"),
    "half a character": (ASKED + b'"user":"\xf0\x9f"}', "not UTF-8"),
    "UTF-16": (json.dumps(chat()).encode("utf-16"), "not UTF-8"),
    "NaN": (ASKED + b'"temperature":NaN}', "not valid JSON"),
    "Infinity": (ASKED + b'"temperature":-Infinity}', "not valid JSON"),
    "a field twice": (ASKED + b'"n":1,"n":1}', "names a field twice"),
    "a field twice, escaped": (ASKED + b'"n":1,"\\u006e":1}', "names a field twice"),
    "the model twice": (b'{"model":"m","messages":[],"model":"x"}', "names a field twice"),
    "10,000 deep": (ASKED + b'"x":' + b"[" * 10_000 + b"]" * 10_000 + b"}", "too deep"),
    "10,000 deep objects": (ASKED + b'"x":' + b'{"a":' * 10_000, "too deep"),
    "10,000 deep content": (CONTENT + b"[" * 10_000, "too deep"),
    "no model": (b'{"messages":[]}', "Name a `model`"),
    "a model that is none": (b'{"model":5}', "`model` must be a string"),
    "no messages": (b'{"model":"m"}', "`messages` must be a list"),
    "empty messages": (b'{"model":"m","messages":[]}', "`messages` is empty"),
    "messages that are none": (b'{"model":"m","messages":["Hello"]}', "not a list of messages"),
    "a message without role": (b'{"model":"m","messages":[{}]}', "not a list of messages"),
    "content that is none": (CONTENT + b"5]}]}", "`content` is malformed"),
    "a part without type": (CONTENT + b'{"text":"a"}]}]}', "`content` is malformed"),
    "options that are none": (ASKED + b'"stream_options":[]}', "`stream_options` must be"),
    "a stream that is none": (ASKED + b'"stream":"yes"}', "`stream` must be"),
}
#: The same, as large as they may come: they must not hold up anybody else. Made when needed.
LARGE: dict[str, tuple[Callable[[], bytes], str]] = {
    "1 M messages": (partial(filled, START, b'{"role":""}', b"]}", 10**6), "too many values"),
    "messages": (partial(filled, START, b'{"role":"a"}', b"]}", FULL), "10000 messages"),
    "escaped messages": (
        partial(filled, START, b'{"r\\u006fle":""}', b"]}", FULL), "10000 messages",
    ),
    "empty messages": (partial(filled, START, b"{}", b"]}"), "too many values"),
    "parts to be read": (partial(filled, CONTENT, b'{"type":"a"}', b"]}]}", FULL), "10000 parts"),
    "parts": (partial(filled, CONTENT, b"{}", b"]}]}"), "too many values"),
    "fields to be read": (partial(numbered, b"{", FULL, b"}"), "1000 fields"),
    "the same field": (partial(filled, b"{", b'"a":0', b"}", FULL), "1000 fields"),
    "fields": (partial(numbered, b"{", 1_500_000, b"}"), "too many values"),
    "options": (partial(numbered, ASKED + b'"stream_options":{', FULL, b"}}"), "over 4096 bytes"),
    "template switches": (
        partial(numbered, ASKED + b'"chat_template_kwargs":{', FULL, b"}}"), "over 4096 bytes",
    ),
    "a model's name": (
        lambda: b'{"model":"' + rb"\ud83d\udc4b" * (LARGEST // 12 - 1) + b'"}', "over 4096 bytes",
    ),
    "a number": (
        lambda: ASKED + b'"max_tokens":' + b"9" * (LARGEST - 200) + b"}", "over 4096 bytes",
    ),
    "an array": (partial(filled, b"[", b"0", b"]"), "too many values"),
    "a string": (lambda: b'"' + b"x" * (LARGEST - 2) + b'"', "a JSON object"),
    "truncated": (partial(filled, ASKED + b'"x":[', b'{"a":[]}', b"", FULL), "not valid JSON"),
    "no UTF-8 at its end": (
        lambda: ASKED + b'"x":"' + "wörld 你 👋 ".encode() * 600_000 + b"\xff", "not UTF-8",
    ),
    "deep": (lambda: b'{"a":' + b"[" * (LARGEST - 5), "too deep"),
}  # fmt: skip


async def post(running: Running, body: bytes, path: str = CHAT) -> httpx.Response:
    headers = {"content-type": "application/json"}
    return await running.http.post(path, content=body, headers=headers)


def refused(answer: httpx.Response, param: str | None = None) -> str:
    """The message of a 400 in OpenAI's envelope."""
    assert answer.status_code == 400
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.headers["x-gateway-lane"] == "none"
    said = answer.json()
    assert said.keys() == {"error"}
    error = said["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "bad_request")
    assert error["param"] == param
    message: str = error["message"]
    return message


@dataclass(slots=True)
class Engines:
    """Both engines, and the number of requests (probes) they had before a test."""

    ollama: FakeEngine
    vllm: FakeEngine
    before: tuple[int, int]

    @property
    def asked(self) -> bool:
        return (len(self.ollama.generations), len(self.vllm.generations)) != self.before


@pytest.fixture
async def both(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> AsyncIterator[tuple[Running, Engines]]:
    """A gateway over both engines."""
    async with start_gateway(**pair(ollama, vllm)) as running:
        yield running, Engines(ollama, vllm, (len(ollama.generations), len(vllm.generations)))


# 33: what is no request


async def test_33_a_malformed_body_is_a_400_with_its_reason_and_reaches_no_engine(
    both: tuple[Running, Engines],
) -> None:
    running, engines = both
    for name, (body, fault) in BAD.items():
        answer = await post(running, body)

        assert fault in refused(answer, answer.json()["error"]["param"]), name
    assert not engines.asked
    assert (await post(running, json.dumps(chat()).encode())).status_code == 200


async def test_33_the_sdk_raises_a_bad_request_once(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with (
        start_gateway(**alone(vllm)) as running,
        sdk(running.url, max_retries=2) as client,
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="m", messages=[])

    assert (caught.value.code, caught.value.param) == ("bad_request", "messages")
    assert caught.value.message.endswith("`messages` is empty.")
    assert str(caught.value.request_id).startswith("req_")


@given(some.binary(max_size=200) | some.text(max_size=200).map(str.encode))
def test_33_any_bytes_are_refused_and_nothing_else_happens(body: bytes) -> None:
    with pytest.raises(GatewayError) as caught:
        parse(calls.CHAT, body, {})

    assert caught.value.status == 400


JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats(allow_nan=False) | some.text(),
    lambda inner: some.lists(inner) | some.dictionaries(some.text(), inner),
    max_leaves=10,
)
FIELDS = some.sampled_from(
    ["model", "messages", "prompt", "input", "stream", "stream_options", "tools", "tool_choice",
     *BOUNDS, *UNSAFE]
)  # fmt: skip


@given(
    some.sampled_from([calls.CHAT, calls.COMPLETIONS, calls.EMBEDDINGS]),
    some.dictionaries(FIELDS, JSON),
)
def test_33_any_values_in_known_fields_are_accepted_or_refused(
    path: str, fields: dict[str, Any]
) -> None:
    body = json.dumps(fields).encode()
    try:
        request = parse(path, body, {})
    except GatewayError as error:
        assert error.status == 400  # noqa: PT017 - either is right
    else:
        assert request.model == fields["model"]
        assert json.loads(request.call.body["model"]) == fields["model"]


async def test_33_a_large_bad_body_does_not_block_other_requests(
    both: tuple[Running, Engines],
) -> None:
    running, engines = both
    stalls: dict[str, float] = {}
    for name, (made, fault) in LARGE.items():
        body = made()
        assert 1_000_000 < len(body) <= LARGEST, name
        for _ in range(5):  # the best of five: what else this machine does is not ours
            async with ticking() as gaps:
                answer = await asyncio.to_thread(sent_from_a_thread, running.url, body)
            assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n"), name
            assert fault.encode() in answer, name
            stalls[name] = min(max(gaps), stalls.get(name, 1.0))
            if stalls[name] < 0.025:
                break  # no doubt any more

    assert {name: stall for name, stall in stalls.items() if stall >= 0.05} == {}
    assert not engines.asked


@asynccontextmanager
async def ticking() -> AsyncIterator[list[float]]:
    """The stalls of the gateway's event loop while the context is open, seconds."""
    gaps = [0.0]

    async def tick() -> None:
        last, waited = time.perf_counter(), without_cpu()
        while True:
            await asyncio.sleep(0.001)
            now, waits = time.perf_counter(), without_cpu()
            gaps.append(now - last - (waits - waited))
            last, waited = now, waits

    gc.collect()
    gc.freeze()  # what the tests have piled up is not the gateway's to look through
    ticker = asyncio.create_task(tick())
    await asyncio.sleep(0.005)
    try:
        yield gaps
    finally:
        await asyncio.sleep(0.005)
        ticker.cancel()
        gc.unfreeze()


def without_cpu() -> float:
    """Seconds in which this thread was ready to run and other programs ran."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0  # a kernel that does not tell


def sent_from_a_thread(url: str, body: bytes) -> bytes:
    """The response to a body that is sent from another thread, outside of the loop."""
    port = int(url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
            f"content-length: {len(body)}\r\n\r\n".encode()
        )
        connection.sendall(body)
        got = b""
        while part := connection.recv(65536):
            got += part
    return got


async def test_33_a_body_just_within_the_limits_is_served(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    vllm.context = 100_000
    messages = [{"role": "user", "content": "a"}] * MAX_MESSAGES
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}] * MAX_PARTS}]
    fields = {f"x{i}": 0 for i in range(MAX_FIELDS - 2)}
    async with start_gateway(**alone(vllm)) as running:
        for asked in ({"messages": messages}, {"messages": parts}, fields):
            assert (await running.http.post(CHAT, json=chat(**asked))).status_code == 200

        more = await running.http.post(CHAT, json=chat(messages=[*messages, messages[0]]))
        assert refused(more, "messages") == f"A request may contain up to {MAX_MESSAGES} messages."
        more = await running.http.post(CHAT, json=chat(**fields, more=0))
        assert refused(more) == f"A request may contain up to {MAX_FIELDS} fields."
        parts[0]["content"] = [*parts[0]["content"], {"type": "text", "text": "a"}]
        more = await running.http.post(CHAT, json=chat(messages=parts))
        assert (
            refused(more, "messages")
            == f"A request may contain up to {MAX_PARTS} parts of content."
        )


# 34: numbers

ALLOWED = {
    "n": (1, 16),
    "best_of": (1, 16),
    "max_tokens": (1, 2**20),
    "max_completion_tokens": (1, 2**20),
    "min_tokens": (0, 2**20),
    "top_logprobs": (0, 20),
}


async def test_34_a_number_out_of_bounds_is_a_400(both: tuple[Running, Engines]) -> None:
    running, engines = both
    for name, (low, high) in ALLOWED.items():
        for value in (low - 1, -1, high + 1, 10**30, -(10**30)):
            answer = await running.http.post(CHAT, json=chat(**{name: value}))

            assert refused(answer, name) == f"`{name}` must be from {low} to {high}."
    assert not engines.asked


async def test_34_a_number_of_another_type_is_a_400(both: tuple[Running, Engines]) -> None:
    running, engines = both
    odd: list[Any] = [1.5, 1.0, "1", True, [1], {"value": 1}]
    raw = [json.dumps(value).encode() for value in odd]
    for name in ALLOWED:
        for value in (*raw, b"1e400", b"-1e400", b"9" * 400, b"0.1e1"):
            answer = await post(running, ASKED + b'"%b":%b}' % (name.encode(), value))

            assert f"`{name}` must be" in refused(answer, name), value
    assert not engines.asked


async def test_34_a_number_within_bounds_goes_to_the_engine_as_it_is(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    vllm.context = 2**22
    async with start_gateway(**alone(vllm)) as running:
        for name, (low, high) in ALLOWED.items():
            for value in (low, low + 1, high, None):
                answer = await running.http.post(CHAT, json=chat(**{name: value}))

                assert answer.status_code == 200, answer.text
                assert vllm.generations[-1].body[name] == value


# 35: max_completion_tokens


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "whole"])
async def test_35_max_completion_tokens_bounds_the_answer_of_ollama(
    ollama: FakeEngine, start_gateway: StartGateway, *, streams: bool
) -> None:
    asked = chat(max_completion_tokens=3, stream=streams)
    async with start_gateway(**alone(ollama, "small:1b")) as running, sdk(running.url) as client:
        raw = await client.chat.completions.with_raw_response.create(**asked)
        answer = raw.parse()
        said = [part async for part in answer] if streams else [answer]

    text = "".join(
        (choice.delta if streams else choice.message).content or ""
        for part in said
        for choice in part.choices
    )
    assert text == "token0 token1 token2"
    assert said[-1].choices[0].finish_reason == "length"
    assert "x-gateway-dropped" not in raw.headers  # it was not dropped but translated
    assert ollama.generations[-1].body["max_tokens"] == 3
    assert "max_completion_tokens" not in ollama.generations[-1].body


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ({"max_completion_tokens": 3, "max_tokens": 4}, 3),
        ({"max_completion_tokens": None, "max_tokens": 4}, 4),
        ({"max_tokens": 4}, 4),
    ],
    ids=["both", "null", "the old name"],
)
async def test_35_of_two_limits_ollama_receives_the_newer_field(
    ollama: FakeEngine, start_gateway: StartGateway, asked: dict[str, Any], sent: int
) -> None:
    async with start_gateway(**alone(ollama, "small:1b")) as running:
        answer = await running.http.post(CHAT, json=chat(**asked))

    assert answer.json()["usage"]["completion_tokens"] == sent
    assert ollama.generations[-1].body["max_tokens"] == sent


# 36: what reaches into the engine

HARMFUL = {
    "chat_template": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "chat_template_kwargs": {"chat_template": "{{ evil }}"},
    "mm_processor_kwargs": {"num_crops": 10**9},
    "logits_processors": ["os.system"],
}


@pytest.mark.parametrize("name", UNSAFE)
async def test_36_a_field_that_reaches_into_template_or_code_is_a_400(
    both: tuple[Running, Engines], name: str
) -> None:
    running, engines = both

    answer = await running.http.post(CHAT, json=chat(**{name: HARMFUL[name]}))
    escaped = await post(running, json.dumps(chat(x=HARMFUL[name])).encode().replace(
        b'"x"', b'"\\u%04x%b"' % (ord(name[0]), name[1:].encode())
    ))  # fmt: skip

    assert refused(answer, name) == f"This gateway does not accept `{name}`."
    assert refused(escaped, name) == f"This gateway does not accept `{name}`."
    assert not engines.asked


@pytest.mark.parametrize(
    "switches",
    [
        {"enable_thinking": False, "other": 1},
        {"enable_thinking": ["a"]},
        {"enable_thinking": {"a": 1}},
        {"Enable_Thinking": False},
    ],
)
async def test_36_unknown_template_switches_are_a_400(
    both: tuple[Running, Engines], switches: dict[str, Any]
) -> None:
    running, engines = both

    answer = await running.http.post(CHAT, json=chat(chat_template_kwargs=switches))

    refused(answer, "chat_template_kwargs")
    assert not engines.asked


@pytest.mark.parametrize("switch", ["enable_thinking", "thinking", "reasoning_effort"])
async def test_36_known_template_switches_go_to_vllm_and_are_named_where_dropped(
    both: tuple[Running, Engines], switch: str
) -> None:
    running, engines = both
    asked = chat(chat_template_kwargs={switch: "low"})

    on_vllm = await running.http.post(CHAT, json={**asked, "model": "m@vllm"})
    on_ollama = await running.http.post(CHAT, json={**asked, "model": "m@ollama"})

    assert (on_vllm.status_code, on_ollama.status_code) == (200, 200)
    assert engines.vllm.generations[-1].body["chat_template_kwargs"] == {switch: "low"}
    assert "x-gateway-dropped" not in on_vllm.headers
    assert "chat_template_kwargs" not in engines.ollama.generations[-1].body
    assert on_ollama.headers["x-gateway-dropped"] == "chat_template_kwargs"


async def test_36_an_unsafe_field_that_is_null_is_accepted(both: tuple[Running, Engines]) -> None:
    running, _ = both

    answer = await running.http.post(CHAT, json=chat(**dict.fromkeys(UNSAFE)))

    assert answer.status_code == 200


# 37: what is not known

UNKNOWN: dict[str, Any] = {
    "top_k": 40,
    "repetition_penalty": 1.1,
    "guided_json": {"type": "object", "deep": [{"a": "👋"}]},
    "x-more": None,
    "large": 12345678901234567890123,
    "precise": 0.1234567890123456789,
}


async def test_37_unknown_fields_go_to_vllm_as_they_are(both: tuple[Running, Engines]) -> None:
    running, engines = both
    asked = json.dumps(chat(model="m@vllm", **UNKNOWN)).encode()

    answer = await post(running, asked)

    got = engines.vllm.generations[-1]
    assert answer.status_code == 200
    assert "x-gateway-dropped" not in answer.headers
    assert {name: got.body[name] for name in UNKNOWN} == UNKNOWN
    assert b"12345678901234567890123" in got.raw  # as the client wrote it: nothing is rounded


@pytest.mark.parametrize("streams", [True, False], ids=["stream", "whole"])
async def test_37_unknown_fields_are_dropped_for_ollama_and_named(
    both: tuple[Running, Engines], *, streams: bool
) -> None:
    running, engines = both
    asked = chat(model="m@ollama", stream=streams, temperature=0.5, **UNKNOWN)

    answer = await running.http.post(CHAT, json=asked)

    got = engines.ollama.generations[-1]
    assert answer.status_code == 200
    assert answer.headers["x-gateway-dropped"] == ",".join(UNKNOWN)
    assert got.body["temperature"] == 0.5
    assert not UNKNOWN.keys() & got.body.keys()


async def test_37_the_name_of_a_dropped_field_cannot_forge_a_header(
    both: tuple[Running, Engines],
) -> None:
    running, _ = both
    evil = {"a\r\nset-cookie: b=c": 1, "grüße": 2, "z" * 1000: 3}

    answer = await running.http.post(CHAT, json=chat(model="m@ollama", **evil))

    assert answer.status_code == 200
    assert "set-cookie" not in answer.headers
    named = answer.headers["x-gateway-dropped"]
    assert named.startswith("a??set-cookie: b=c,gr??e,zzz")
    assert len(named) == 512


async def test_37_the_log_names_the_dropped_fields(
    ollama: FakeEngine, start_gateway: StartGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    async with start_gateway(**alone(ollama, "small:1b"), log="json") as running:
        await running.http.post(CHAT, json=chat(top_k=40))

    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert json.loads(line)["dropped"] == ["top_k"]
