"""The gateway as its clients see it: keys, errors, headers, streams, drain."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import openai
import pytest

from backends.fake import DONE, FakeEngine, Pause, Serve, Silence, status
from gateway.settings import Timings
from tests.clients import needs_node, node, sdk
from tests.support.gateways import Running, StartGateway
from tests.support.models import alone, chat, pair
from tests.support.plain_http import async_client

CHAT = "/v1/chat/completions"
KEY = "sk-a-key-of-ours"
OTHER = "sk-another-of-ours"
FIVE = "token0 token1 token2 token3 token4"
PING = b": ping\n\n"
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


async def ask(
    running: Running, /, headers: dict[str, str] | None = None, **fields: Any
) -> httpx.Response:
    """The answer to a chat with `m`."""
    return await running.http.post(CHAT, json=chat(**fields), headers=headers)


def failure(answer: httpx.Response, code: int, name: str) -> dict[str, Any]:
    """The error of a response, whose form is checked."""
    assert answer.status_code == code, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert re.fullmatch(r"req_[0-9a-f]{32}", answer.headers["x-request-id"])
    assert answer.headers["x-gateway-lane"]
    assert answer.headers["x-gateway-reason"]
    assert answer.json().keys() == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == name
    return error


Logged: TypeAlias = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def logged(capsys: pytest.CaptureFixture[str]) -> Logged:
    """Reads the request log; the gateway needs `log="json"`."""
    written: list[str] = []

    def lines() -> list[dict[str, Any]]:
        written.extend(capsys.readouterr().err.splitlines())
        return [json.loads(line) for line in written if line.startswith("{")]

    return lines


# Keys

NO_KEYS = {
    "missing": None,
    "empty": "",
    "only the scheme": "Bearer",
    "another scheme": f"Basic {KEY}",
    "no scheme": KEY,
    "wrong": "Bearer sk-a-key-of-others",
    "its beginning": f"Bearer {KEY[:-1]}",
    "its beginning and more": f"Bearer {KEY}x",
    "two keys": f"Bearer {KEY} {OTHER}",
    "in quotes": f'Bearer "{KEY}"',
    "of other case": f"Bearer {KEY.upper()}",
    "SQL": "Bearer ' OR '1'='1",
}


async def test_a_request_without_a_known_key_is_refused(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm), api_keys=[KEY, OTHER]) as running:
        before = len(vllm.received)
        for name, sent in NO_KEYS.items():
            headers = {} if sent is None else {"authorization": sent}
            for method, path in (
                ("POST", CHAT),
                ("POST", "/v1/embeddings"),
                ("GET", "/v1/models"),
                ("GET", "/v1/models/m"),
                ("GET", "/status"),
                ("GET", "/nothing"),
            ):
                answer = await running.http.request(method, path, json=chat(), headers=headers)

                error = failure(answer, 401, "invalid_api_key")
                assert error["type"] == "authentication_error", name
                assert answer.headers["x-gateway-lane"] == "none"
                assert answer.headers["x-gateway-reason"] == "the gateway's own"
                assert KEY not in answer.text
        assert len(vllm.received) == before


@pytest.mark.parametrize(
    "sent",
    [f"Bearer {KEY}", f"bearer {OTHER}", f"BEARER {KEY}", f"Bearer  {KEY}"],
)
async def test_a_request_with_a_known_key_is_served(
    vllm: FakeEngine, start_gateway: StartGateway, sent: str
) -> None:
    async with start_gateway(**alone(vllm), api_keys=[KEY, OTHER]) as running:
        answer = await ask(running, {"authorization": sent})
        listed = await running.http.get("/v1/models", headers={"authorization": sent})

    assert (answer.status_code, listed.status_code) == (200, 200)


async def test_the_sdk_raises_an_authentication_error(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with (
        start_gateway(**alone(vllm), api_keys=[KEY]) as running,
        sdk(running.url, api_key="wrong-key") as client,
    ):
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.chat.completions.create(**chat())

    assert (caught.value.status_code, caught.value.code) == (401, "invalid_api_key")
    assert str(caught.value.request_id).startswith("req_")


async def test_health_and_documentation_need_no_key(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm), api_keys=[KEY]) as running:
        for path in ("/", "/health", "/ready", "/docs", "/openapi.json"):
            assert (await running.http.get(path)).status_code == 200


@pytest.mark.parametrize("own", [None, "the-engines-own-key"])
async def test_a_clients_key_reaches_no_engine(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway, own: str | None
) -> None:
    read = pair(ollama, vllm)
    for kind in ("ollama", "vllm"):
        read["engines"][kind]["api_key"] = own
    secrets = {
        "authorization": f"Bearer {KEY}",
        "api-key": KEY,
        "x-api-key": KEY,
        "cookie": f"token={KEY}",
        "proxy-authorization": f"Bearer {KEY}",
        "x-openwebui-user-email": f"{KEY}@example.org",
    }
    async with start_gateway(**read, api_keys=[KEY]) as running:
        for model in ("m@ollama", "m@vllm"):
            for streams in (True, False):
                answer = await ask(running, secrets, model=model, stream=streams)
                assert answer.status_code == 200
        for path in ("/v1/embeddings", "/v1/completions"):
            asked = {"model": "m", "input": "a", "prompt": "a"}
            assert (await running.http.post(path, json=asked, headers=secrets)).status_code == 200

    for request in (*ollama.received, *vllm.received):
        assert KEY not in f"{request.path} {request.query} {request.headers}"
        assert KEY.encode() not in request.raw
    for request in (*ollama.generations, *vllm.generations):
        assert request.headers.get("authorization") == (f"Bearer {own}" if own else None)


async def test_a_clients_key_is_in_no_log(
    vllm: FakeEngine, start_gateway: StartGateway, capfd: pytest.CaptureFixture[str]
) -> None:
    async with start_gateway(**alone(vllm), api_keys=[OTHER, KEY], log="json") as running:
        await ask(running, {"authorization": f"Bearer {KEY}"})
        await ask(running, {"authorization": "Bearer sk-a-key-of-others"})

    written = capfd.readouterr()
    good, bad = [json.loads(line) for line in written.err.splitlines() if line.startswith("{")]
    assert (good["key"], good["outcome"]) == ("key-2", "ok")
    assert (bad["key"], bad["outcome"], bad["status"]) == (None, "invalid_api_key", 401)
    assert "sk-" not in written.err + written.out


# Pages


async def test_models_are_listed_while_every_engine_hangs(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**pair(ollama, vllm)) as running:
        paths = ("/v1/models", "/health", "/api/tags", "/api/show", "/api/ps", "/metrics")
        for engine in (ollama, vllm):
            engine.script(then=Silence())
            for path in paths:
                engine.script(then=Silence(), path=path)
        stuck = [asyncio.create_task(ask(running, stream=True)) for _ in range(20)]
        await vllm.until(lambda _: ollama.running + vllm.running >= 20)

        began = time.monotonic()
        for path in ("/v1/models", "/v1/models/m", "/health", "/ready", "/status"):
            assert (await running.http.get(path)).status_code == 200
        took = time.monotonic() - began
        for task in stuck:
            task.cancel()
        await asyncio.gather(*stuck, return_exceptions=True)

    assert took < 0.5


async def test_models_are_listed_before_any_engine_is_up(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    vllm.down()
    async with start_gateway(**alone(vllm)) as running:
        listed = (await running.http.get("/v1/models")).json()

    assert [model["id"] for model in listed["data"]] == ["m"]


async def test_models_are_listed_as_openai_does_and_open_webui_reads(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**pair(ollama, vllm)) as running, sdk(running.url) as client:
        listed = (await running.http.get("/v1/models")).json()
        one = (await running.http.get("/v1/models/m")).json()
        models = [model async for model in client.models.list()]

    assert listed == {"object": "list", "data": [one]}
    assert (one["id"], one["object"], one["lanes"]) == ("m", "model", ["ollama", "vllm"])
    assert one["info"]["meta"]["capabilities"] == {
        "builtin_tools": False,
        "vision": False,
        "usage": True,
    }
    assert one["max_model_len"] == 2048
    assert not {"pipeline", "pipelines"} & one.keys()
    assert [(model.id, model.owned_by) for model in models] == [("m", "twolane")]


async def test_an_unknown_model_is_a_404_that_lists_no_others(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm)) as running, sdk(running.url) as client:
        for name in ("other", "m@ollama", "m@", "@vllm", "Small-1B", "../m", "m/m"):
            page = await running.http.get(f"/v1/models/{name}")
            asked = await ask(running, model=name)
            assert (
                failure(page, 404, page.json()["error"]["code"])["type"] == "invalid_request_error"
            )
            error = failure(asked, 404, "model_not_found")
            assert error["param"] == "model"
            assert "Small-1B" not in error["message"].replace(repr(name), "")
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("other")

    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_an_unknown_path_or_method_is_an_error_in_the_same_envelope(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm)) as running:
        for method, path in (
            ("GET", "/nothing"),
            ("POST", "/v1/responses"),
            ("GET", "/v1"),
            ("POST", "/api/pull"),
            ("GET", "/v1/chat/completions/"),
        ):
            failure(await running.http.request(method, path), 404, "not_found")
        for method, path in (
            ("GET", CHAT),
            ("DELETE", "/v1/embeddings"),
            ("PUT", "/v1/completions"),
            ("POST", "/v1/models"),
            ("DELETE", "/v1/models/m"),
            ("POST", "/health"),
        ):
            failure(await running.http.request(method, path), 405, "method_not_allowed")


async def test_ready_is_503_until_an_engine_is_up_and_again_while_draining(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    vllm.down()
    async with start_gateway(**alone(vllm)) as running:
        early = await running.http.get("/ready")
        lives = await running.http.get("/health")
        await vllm.up()
        async with asyncio.timeout(5):
            while (ready := await running.http.get("/ready")).status_code != 200:
                await asyncio.sleep(0.02)
        running.gateway.edge.draining = True
        late = await running.http.get("/ready")
        asked = await ask(running)

    assert (early.status_code, early.headers["retry-after"]) == (503, "5")
    assert early.json()["waiting_for"] == {"m": {"vllm": "cannot be reached"}}
    assert (lives.status_code, lives.json()) == (200, {"status": "ok"})
    assert (ready.json()["ready"], ready.json()["models"]) == (True, ["m"])
    assert (late.status_code, late.json()["draining"]) == (503, True)
    failure(asked, 503, "draining")
    assert asked.headers["retry-after"] == "10"


async def test_the_documentation_has_every_path(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm)) as running:
        page = await running.http.get("/docs")
        paths = (await running.http.get("/openapi.json")).json()["paths"]

    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert {CHAT, "/v1/completions", "/v1/embeddings", "/v1/models", "/ready"} <= paths.keys()


async def test_every_response_has_its_own_id_whatever_the_client_sends(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm)) as running, sdk(running.url) as client:
        answers = [await ask(running, {"x-request-id": "theirs"}) for _ in range(2)]
        answers += [await running.http.get("/health"), await running.http.get("/nothing")]
        said = await client.chat.completions.create(**chat())

    ids = {answer.headers["x-request-id"] for answer in answers} | {said._request_id}
    assert len(ids) == 5
    assert all(re.fullmatch("req_[0-9a-f]{32}", str(each)) for each in ids)


# Heartbeats


@asynccontextmanager
async def beating(engine: FakeEngine, start_gateway: StartGateway) -> AsyncIterator[Running]:
    async with start_gateway(**alone(engine), limits={"heartbeat_s": 0.05}) as running:
        yield running


async def test_a_stream_receives_comments_until_its_first_token(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with beating(vllm, start_gateway) as running:
        vllm.ttft_s = 0.4

        body = (await ask(running, stream=True)).content

    before, _, after = body.partition(b"data: ")
    assert before == PING * before.count(PING)
    assert 3 <= before.count(PING) <= 20
    assert after.endswith(DONE)


async def test_a_pause_in_a_stream_is_filled_with_comments_between_events(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with beating(vllm, start_gateway) as running:
        vllm.gap_s = 0.15

        body = (await ask(running, stream=True)).content

    assert body.count(PING) >= 4
    assert all(
        part.startswith((b"data: {", b"data: [DONE]", b": ping"))
        for part in body.split(b"\n\n")[:-1]
    )


async def test_a_flowing_stream_and_a_whole_answer_receive_no_comments(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm), limits={"heartbeat_s": 0.4}) as running:
        vllm.tokens, vllm.gap_s = 30, 0.02
        flows = await ask(running, stream=True)
        vllm.ttft_s = 0.5
        whole = await ask(running)

    assert PING not in flows.content
    assert whole.json()["usage"]["completion_tokens"] == 30
    assert PING not in whole.content


async def test_the_sdks_survive_comments(vllm: FakeEngine, start_gateway: StartGateway) -> None:
    async with beating(vllm, start_gateway) as running, sdk(running.url) as client:
        vllm.ttft_s, vllm.gap_s = 0.3, 0.1
        answer = await client.chat.completions.create(**chat(stream=True))
        parts = [part async for part in answer]
        seen = await node(running.url, chat(stream=True))

    assert "".join(part.choices[0].delta.content or "" for part in parts) == FIVE
    assert (seen["text"], seen["finish"], seen["error"]) == (FIVE, "stop", None)


async def test_a_refusal_after_comments_is_an_error_event(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with beating(vllm, start_gateway) as running, sdk(running.url) as client:
        vllm.script([Pause(0.2), *status(400, "too long")])
        answer = await client.chat.completions.create(**chat(stream=True))
        with pytest.raises(openai.APIError, match="too long"):
            await anext(answer)


async def test_no_other_lane_is_tried_once_comments_have_named_one(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**pair(ollama, vllm), limits={"heartbeat_s": 0.05}) as running:
        ollama.script([Pause(0.2), *status(500)])
        before = len(vllm.generations)

        answer = await ask(running, stream=True)

        assert answer.headers["x-gateway-lane"] == "ollama"
        assert answer.content.startswith(PING)
        assert b'"code":"engine_failed"' in answer.content
        assert answer.content.endswith(DONE)
        assert len(vllm.generations) == before


async def test_status_events_do_not_name_the_lane_any_sooner(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    often = Timings(status_event_s=0.05)
    async with start_gateway(**pair(ollama, vllm), status_events=True, timings=often) as running:
        ollama.script([Pause(0.3), *status(500)])

        answer = await ask(running, stream=True)

    assert answer.headers["x-gateway-lane"] == "vllm"
    assert PING not in answer.content


# Background calls

TITLE = [{"role": "user", "content": "### Task:\nGenerate a concise title."}]


@pytest.mark.parametrize(
    ("headers", "messages"),
    [({"x-task": "title_generation"}, None), ({}, TITLE)],
    ids=["header", "message"],
)
async def test_a_background_call_waits_behind_all_others_and_is_no_demand(
    vllm: FakeEngine,
    start_gateway: StartGateway,
    headers: dict[str, str],
    messages: list[dict[str, str]] | None,
) -> None:
    vllm.ttft_s = 1.0  # longer than a background call is held back
    task = {"messages": messages} if messages else {}
    async with start_gateway(**alone(vllm, slots=1)) as running, asyncio.TaskGroup() as group:
        before = len(vllm.generations)
        group.create_task(ask(running, user="first"))
        await vllm.until(lambda engine: engine.running == 1)
        group.create_task(ask(running, headers, user="background", **task))
        scheduler = running.gateway.catalogue.models["m"].admission.scheduler
        await running.until(lambda _: scheduler.waiting == 1)
        assert (await running.status("m"))["demand"] == 1
        group.create_task(ask(running, user="last"))
        await running.until(lambda _: scheduler.waiting == 2)
        assert (await running.status("m"))["demand"] == 2
        await vllm.until(lambda engine: len(engine.generations) == before + 3)

    users = [request.body["user"] for request in vllm.generations[before:]]
    assert users == ["first", "last", "background"]


async def test_a_title_requested_just_before_the_answer_is_generated_after_it(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    vllm.ttft_s = 1.0
    async with start_gateway(**alone(vllm, slots=1)) as running, asyncio.TaskGroup() as group:
        before = len(vllm.generations)
        group.create_task(ask(running, messages=TITLE, user="title"))
        await running.until(lambda gateway: gateway.edge.in_flight == 1)
        group.create_task(ask(running, user="answer"))

    users = [request.body["user"] for request in vllm.generations[before:]]
    assert users == ["answer", "title"]


@pytest.mark.parametrize(
    ("headers", "fields"),
    [
        ({"x-task": ""}, {}),
        ({}, {"messages": TITLE, "stream": True}),
        ({}, {"messages": TITLE, "tools": [TOOL]}),
        ({}, {"messages": [{"role": "user", "content": "What is ### Task: for?"}] * 2}),
        ({}, {"messages": [{"role": "system", "content": "### Task:"}, *chat()["messages"]]}),
    ],
    ids=["no task in the header", "stream", "tools", "said within", "system"],
)
async def test_a_chat_is_no_background_call(
    vllm: FakeEngine,
    start_gateway: StartGateway,
    logged: Logged,
    headers: dict[str, str],
    fields: dict[str, Any],
) -> None:
    async with start_gateway(**alone(vllm), log="json") as running:
        assert (await ask(running, headers, **fields)).status_code == 200

    [line] = logged()
    assert line["background"] is False


# Lanes


async def test_a_request_may_pin_its_lane(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**pair(ollama, vllm)) as running:
        for lane in ("ollama", "vllm"):
            by_name = await ask(running, model=f"m@{lane}")
            by_header = await ask(running, {"x-gateway-lane": lane})
            for answer in (by_name, by_header):
                assert answer.headers["x-gateway-lane"] == lane
                assert answer.headers["x-gateway-reason"] == "pinned by the request"
        both = await ask(running, {"x-gateway-lane": "ollama"}, model="m@vllm")
        unknown = await ask(running, {"x-gateway-lane": "elsewhere"})
        free = await ask(running)

    assert both.headers["x-gateway-lane"] == "vllm"
    assert unknown.headers["x-gateway-reason"] == free.headers["x-gateway-reason"]
    assert "faster at demand 1 by the assumed profile" in free.headers["x-gateway-reason"]
    assert [request.body["model"] for request in ollama.generations] == ["small:1b"] * 4
    assert vllm.generations[-1].body["model"] == "Small-1B"


async def test_a_pinned_lane_that_is_down_is_an_error_and_not_replaced(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**pair(ollama, vllm)) as running:
        vllm.down()

        first = await ask(running, model="m@vllm")
        then = await ask(running, model="m@vllm")
        free = await ask(running)

    assert "cannot be reached" in failure(first, 503, "no_engine")["message"]
    error = failure(then, 503, "no_engine")
    assert error["message"] == ("No engine can answer for this model now: vllm cannot be reached.")
    assert then.headers["retry-after"] == "5"
    assert free.headers["x-gateway-lane"] == "ollama"
    assert ollama.generations[-1].body["messages"]


async def test_tools_that_no_lane_accepts_are_dropped_and_named(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**pair(ollama, vllm)) as running:
        for lane, engine in (("ollama", ollama), ("vllm", vllm)):
            for streams in (True, False):
                answer = await ask(
                    running, model=f"m@{lane}", stream=streams, tools=[TOOL], tool_choice="auto",
                    parallel_tool_calls=False,
                )  # fmt: skip

                dropped = answer.headers["x-gateway-dropped"]
                assert answer.status_code == 200
                assert dropped == "tools,tool_choice,parallel_tool_calls"
                assert not {"tools", "tool_choice"} & engine.generations[-1].body.keys()


async def test_forced_tools_that_no_lane_accepts_are_a_400(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    named = {"type": "function", "function": {"name": "look"}}
    async with start_gateway(**pair(ollama, vllm)) as running:
        for choice in ("required", named):
            answer = await ask(running, tools=[TOOL], tool_choice=choice)

            assert failure(answer, 400, "bad_request")["param"] == "tools"


async def test_tools_go_to_the_lane_that_accepts_them(start_gateway: StartGateway) -> None:
    async with (
        FakeEngine("ollama", ["small:1b"]) as ollama,
        FakeEngine("vllm", ["Small-1B"], tools=True) as vllm,
        start_gateway(**pair(ollama, vllm)) as running,
    ):
        answer = await ask(running, tools=[TOOL])
        none = await ask(running, tools=[])

    assert answer.headers["x-gateway-lane"] == "vllm"
    assert answer.headers["x-gateway-reason"] == "ollama accepts no tools"
    assert "x-gateway-dropped" not in answer.headers
    assert vllm.generations[-1].body["tools"] == [TOOL]
    assert none.headers["x-gateway-lane"] == "ollama"  # an empty list is no tools


def image(url: Any, **more: Any) -> list[dict[str, Any]]:
    part = {"type": "image_url", "image_url": url, **more}
    return [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, part]}]


ADDRESS = "http://169.254.169.254/latest/meta-data"
FETCHED = {
    "http": image({"url": ADDRESS}),
    "https": image({"url": "https://example.org/cat.png", "detail": "low"}),
    "file": image({"url": "file:///etc/passwd"}),
    "no scheme": image({"url": "//example.org/cat.png"}),
    "spaces": image({"url": f" data:,{ADDRESS}"}),
    "empty": image({"url": ""}),
    "nothing": image({}),
    "as a string": image(ADDRESS),
    "as a text": image(ADDRESS, type="text", text="Hi", uuid="1"),
    "a film": image(None, type="video_url", video_url={"url": ADDRESS}),
    "a sound": image(None, type="audio_url", audio_url={"url": ADDRESS}),
    "the second": [*image({"url": "data:image/png;base64,AA=="}), *image({"url": ADDRESS})],
}


async def test_an_image_that_would_have_to_be_fetched_is_refused(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**pair(ollama, vllm)) as running:
        before = len(vllm.generations)
        for name, messages in FETCHED.items():
            error = failure(await ask(running, messages=messages), 400, "bad_request")

            assert error["param"] == "messages", name
            assert "data: URLs" in error["message"], name
        assert (len(ollama.generations), len(vllm.generations)) == (0, before)


async def test_an_image_in_the_request_goes_to_a_lane_that_may_accept_it(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    messages = image({"url": "data:image/png;base64,AA=="})
    async with start_gateway(**pair(ollama, vllm)) as running:
        answer = await ask(running, messages=messages)
    async with start_gateway(**alone(ollama, "small:1b")) as running:
        refused = await ask(running, messages=messages)

    assert answer.headers["x-gateway-lane"] == "vllm"
    assert answer.headers["x-gateway-reason"] == "ollama accepts no images"
    assert vllm.generations[-1].body["messages"] == messages
    assert failure(refused, 400, "bad_request")["message"] == "The model 'm' accepts no images."


async def test_embeddings_are_made_by_the_lane_that_can(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**pair(ollama, vllm)) as running, sdk(running.url) as client:
        made = await client.embeddings.create(model="m", input=["a", "b"])
        raw = await running.http.post("/v1/embeddings", json={"model": "m", "input": "a"})
        missing = await running.http.post("/v1/embeddings", json={"model": "m"})

    assert [entry.embedding for entry in made.data] == [
        [1.0, 0.5, -0.5, 0.25],
        [2.0, 0.5, -0.5, 0.25],
    ]
    assert raw.headers["x-gateway-lane"] == "ollama"
    assert failure(missing, 400, "bad_request")["param"] == "input"


async def test_a_model_made_for_embeddings_does_not_chat(start_gateway: StartGateway) -> None:
    async with (
        FakeEngine("vllm", [], embedding=["Small-1B"]) as vllm,
        start_gateway(**alone(vllm)) as running,
    ):
        made = await running.http.post("/v1/embeddings", json={"model": "m", "input": "a"})
        answer = await ask(running)

    assert len(made.json()["data"][0]["embedding"]) == 4
    error = failure(answer, 400, "bad_request")
    assert (error["message"], error["param"]) == ("The model 'm' does not chat.", "model")


async def test_several_choices_come_from_vllm(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**pair(ollama, vllm)) as running:
        answer = await ask(running, n=2)
        best = await running.http.post(
            "/v1/completions", json={"model": "m", "prompt": "a", "best_of": 2}
        )
        one = await ask(running, n=1)
        named = await ask(running, n=2, model="m@ollama")
    async with start_gateway(**alone(ollama, "small:1b")) as running:
        refused = await ask(running, n=2)

    assert len(answer.json()["choices"]) == 2
    assert answer.headers["x-gateway-reason"] == "ollama gives one answer at a time (n = 1)"
    assert (best.headers["x-gateway-lane"], one.headers["x-gateway-lane"]) == ("vllm", "ollama")
    assert named.headers["x-gateway-dropped"] == "n"  # who insists gets one, and is told
    assert failure(refused, 400, "bad_request")["param"] == "n"


# What the SDKs make of our failures


@asynccontextmanager
async def occupied(running: Running, engine: FakeEngine) -> AsyncIterator[None]:
    """Occupy the engine's only slot for as long as the context is open."""
    engine.script(Silence())
    before = len(engine.generations)
    holder = asyncio.create_task(ask(running))
    await engine.until(lambda engine: len(engine.generations) > before)
    try:
        yield
    finally:
        holder.cancel()
        await asyncio.gather(holder, return_exceptions=True)


FULL: dict[str, Any] = {
    "queue_full": {"lane": {"slots": 1, "queue": 0}, "limits": {}},
    "waited_too_long": {"lane": {"slots": 1}, "limits": {"max_wait_s": 0.2}},
}


async def python_error(url: str) -> str:
    async with sdk(url, max_retries=2) as client:
        said = await client.chat.completions.create(**chat())
    return said.choices[0].message.content or ""


async def node_error(url: str) -> str:
    seen = await node(url, chat(), maxRetries=2)
    assert seen["error"] is None
    return str(seen["text"])


@pytest.mark.parametrize("code", FULL)
@pytest.mark.parametrize("told", [python_error, node_error], ids=["python", "node"])
async def test_the_sdks_retry_after_the_header_and_are_served(
    vllm: FakeEngine,
    start_gateway: StartGateway,
    logged: Logged,
    code: str,
    told: Callable[[str], Awaitable[str]],
) -> None:
    def outcomes() -> list[str]:
        return [line["outcome"] for line in logged() if line["outcome"] != "cancelled"]

    if told is node_error:
        needs_node()
    how = FULL[code]
    async with start_gateway(
        **alone(vllm, **how["lane"]), limits=how["limits"], log="json"
    ) as running:
        async with occupied(running, vllm):
            refused = await ask(running)
            telling = asyncio.ensure_future(told(running.url))
            await running.until(lambda _: outcomes() == [code, code], within_s=15)
        text = await telling

    failure(refused, 429 if code == "queue_full" else 503, code)
    assert refused.headers["retry-after"] == "1"
    assert text == FIVE
    assert outcomes() == [code, code, "ok"]


async def test_a_busy_engine_is_retried_by_the_sdk(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with (
        start_gateway(**alone(vllm)) as running,
        sdk(running.url, max_retries=2) as client,
    ):
        vllm.script(status(429, "slow down"))
        raw = await client.chat.completions.with_raw_response.create(**chat())

    assert raw.parse().choices[0].message.content == FIVE
    assert raw.retries_taken >= 1


async def test_the_sdk_knows_what_went_wrong(vllm: FakeEngine, start_gateway: StartGateway) -> None:
    async with (
        start_gateway(**alone(vllm, slots=1, queue=0)) as running,
        sdk(running.url) as client,
        occupied(running, vllm),
    ):
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(**chat(stream=True))
        seen = await node(running.url, chat())

    error = caught.value
    assert (error.status_code, error.code, error.type) == (429, "queue_full", "rate_limit_error")
    assert str(error.request_id).startswith("req_")
    assert error.message.endswith("Too many requests wait for this model already. Try again later.")
    assert (seen["error"]["name"], seen["error"]["code"]) == ("RateLimitError", "queue_full")
    assert seen["error"]["requestID"].startswith("req_")


@pytest.mark.parametrize(
    ("code", "kind"), [(400, openai.BadRequestError), (408, openai.APIStatusError),
                       (409, openai.ConflictError), (422, openai.UnprocessableEntityError)]
)  # fmt: skip
async def test_a_request_that_an_engine_refuses_is_sent_once(
    vllm: FakeEngine,
    start_gateway: StartGateway,
    code: int,
    kind: type[openai.APIStatusError],
) -> None:
    said = {"message": "no", "type": "Bad", "param": "seed", "code": "why"}
    async with (
        start_gateway(**alone(vllm)) as running,
        sdk(running.url, max_retries=2) as client,
    ):
        before = len(vllm.generations)
        vllm.script(then=status(code, body={"error": said}))
        with pytest.raises(kind) as caught:
            await client.chat.completions.create(**chat())

    error = caught.value
    assert (error.status_code, error.code, error.param, error.type) == (code, "why", "seed", "Bad")
    assert error.response.headers["x-should-retry"] == "false"
    assert error.response.headers["x-gateway-lane"] == "vllm"
    assert len(vllm.generations) == before + 1


async def test_a_silent_engine_receives_one_request_whatever_the_sdk(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    limits = {"first_token_s": 0.2, "answer_s": 0.2}
    async with (
        start_gateway(**alone(vllm), limits=limits) as running,
        sdk(running.url, max_retries=2) as client,
    ):
        before = len(vllm.generations)
        vllm.script(then=Silence())
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(**chat(stream=True))
        seen = await node(running.url, chat(), maxRetries=2)

        assert len(vllm.generations) == before + 2
    assert (caught.value.status_code, caught.value.code) == (504, "engine_silent")
    assert (seen["error"]["status"], seen["error"]["code"]) == (504, "engine_silent")


# The end


class Served:
    """`twolane serve` in its own process."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self.url = url
        self._process = process

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    async def ended(self) -> tuple[int, str]:
        """Its exit status and its stderr, when it has ended."""
        async with asyncio.timeout(10):
            _, said = await self._process.communicate()
        assert self._process.returncode is not None
        return self._process.returncode, said.decode()


@asynccontextmanager
async def serving(folder: Path, engine: FakeEngine, drain_s: float) -> AsyncIterator[Served]:
    config = folder / "twolane.yaml"
    config.write_text(json.dumps({**alone(engine), "port": 0, "limits": {"drain_s": drain_s}}))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "serve", "--config", str(config),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=dict(os.environ),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        async with asyncio.timeout(20):
            while not (found := re.search(rb"serves at (\S+)", await process.stdout.readline())):
                assert process.returncode is None
        yield Served(process, found[1].decode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def test_on_sigterm_running_requests_finish_and_the_exit_status_is_0(
    vllm: FakeEngine, tmp_path: Path
) -> None:
    vllm.tokens, vllm.gap_s = 10, 0.1
    async with serving(tmp_path, vllm, drain_s=20) as served, sdk(served.url) as client:
        answer = await client.chat.completions.create(**chat(stream=True))
        seen = [await anext(answer)]
        served.terminate()
        seen += [part async for part in answer]
        with pytest.raises(openai.APIConnectionError):
            await client.models.list()
        code, said = await served.ended()

    assert "".join(part.choices[0].delta.content or "" for part in seen).endswith("token9")
    assert seen[-1].choices[0].finish_reason == "stop"
    assert code == 0
    assert "draining: 1 requests in flight have up to 20 s to end" in said
    assert "Traceback" not in said
    assert vllm.generations[-1].ended == "done"


async def test_at_the_drain_deadline_a_stream_ends_with_an_error_event(
    vllm: FakeEngine, tmp_path: Path
) -> None:
    async with serving(tmp_path, vllm, drain_s=0.5) as served:
        vllm.script([Serve(tokens=2), Silence()])
        async with (
            async_client(served.url) as client,
            client.stream("POST", CHAT, json=chat(stream=True)) as answer,
        ):
            parts = answer.aiter_bytes()
            body = await anext(parts)
            began = time.monotonic()
            served.terminate()
            async for part in parts:
                body += part
            took = time.monotonic() - began
        code, said = await served.ended()
        await vllm.until(lambda engine: engine.generations[-1].ended == "hung up", within_s=1)

    *_, error, done, rest = body.split(b"\n\n")
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "draining"
    assert (done, rest) == (b"data: [DONE]", b"")
    assert 0.49 <= took < 2  # a timer may be a millisecond early
    assert code == 0
    assert "Traceback" not in said
