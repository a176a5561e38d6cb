"""Models are loaded and unloaded by hand: `/models/load`, `/models/unload`, `status.value`."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from backends.fake import FakeEngine, Silence, status
from gateway.gpu.state import Step
from gateway.settings import Timings
from tests.support.exclusive import Box, failed, serving, stream_of
from tests.support.gateways import Running, StartGateway
from tests.support.models import alone, chat, pair
from tests.support.waiting import until

CHAT = "/v1/chat/completions"
KEY = "sk-a-key-of-ours"
ADMIN = "sk-the-operators"
PAGE = "sk-the-chat-pages"


async def load(running: Running, model: str = "m") -> httpx.Response:
    return await running.http.post("/models/load", json={"model": model})


async def unload(running: Running, model: str = "m") -> httpx.Response:
    return await running.http.post("/models/unload", json={"model": model})


async def listed(running: Running) -> str:
    """The `status.value` of the only model in the list."""
    [model] = (await running.http.get("/v1/models")).json()["data"]
    value: str = model["status"]["value"]
    return value


async def until_listed(running: Running, value: str) -> None:
    async def is_listed() -> bool:
        return await listed(running) == value

    await until(is_listed)


def assert_done(answer: httpx.Response, value: str) -> None:
    """The response is the one of llama.cpp's router, with this `status.value`."""
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"success": True, "status": {"value": value}}


# Both engines fit


async def test_loads_and_unloads_on_ollama_answer_when_they_are_done(
    ollama: FakeEngine, start_gateway: StartGateway
) -> None:
    ollama.load_s = ollama.unload_s = 0.2
    async with start_gateway(**alone(ollama, "small:1b")) as running:
        cold = await listed(running)
        loaded = await load(running)
        there = list(ollama.resident)
        warm = await listed(running)
        unloaded = await unload(running)
        gone = list(ollama.resident)
        after = await listed(running)

    assert_done(loaded, "loaded")
    assert_done(unloaded, "unloaded")
    assert (there, gone) == (["small:1b"], [])
    assert (cold, warm, after) == ("unloaded", "loaded", "unloaded")


async def test_a_model_that_has_answered_is_listed_as_loaded(
    ollama: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(ollama, "small:1b")) as running:
        cold = await listed(running)
        await running.http.post(CHAT, json=chat())
        warm = await listed(running)

    assert (cold, warm) == ("unloaded", "loaded")


async def test_loads_and_unloads_by_ollama_itself_are_listed(
    ollama: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(
        **alone(ollama, "small:1b"), timings=Timings(probe_interval_healthy_s=0.02)
    ) as running:
        await ollama.load("small:1b")
        await until_listed(running, "loaded")
        ollama.unload("small:1b")
        await until_listed(running, "unloaded")


async def test_a_model_is_listed_as_loading_while_it_loads(
    ollama: FakeEngine, start_gateway: StartGateway
) -> None:
    ollama.load_s = 0.3
    async with start_gateway(**alone(ollama, "small:1b")) as running:
        loading = asyncio.create_task(load(running))
        await ollama.until(lambda engine: engine.memory)
        on_its_way = await listed(running)
        assert_done(await loading, "loaded")

    assert on_its_way == "loading"


async def test_a_load_goes_on_when_its_client_hangs_up_and_is_not_begun_twice(
    ollama: FakeEngine, start_gateway: StartGateway
) -> None:
    ollama.load_s = 0.3
    async with start_gateway(**alone(ollama, "small:1b")) as running:
        impatient = asyncio.create_task(load(running))
        await ollama.until(lambda engine: engine.memory)
        impatient.cancel()  # Ollama gives a load up when its client hangs up
        assert_done(await load(running), "loaded")

    asked = [request for request in ollama.received if request.path == "/api/generate"]
    assert len(asked) == 1


async def test_a_long_load_is_answered_with_202(
    ollama: FakeEngine, start_gateway: StartGateway
) -> None:
    ollama.load_s = 0.3
    async with start_gateway(
        **alone(ollama, "small:1b"), timings=Timings(load_answer_s=0.05)
    ) as running:
        answer = await load(running)
        await until_listed(running, "loaded")

    assert answer.status_code == 202
    assert answer.json() == {"success": True, "status": {"value": "loading"}}


async def test_a_running_answer_ends_before_ollama_unloads(
    ollama: FakeEngine, start_gateway: StartGateway
) -> None:
    ollama.gap_s = 0.1
    async with start_gateway(**alone(ollama, "small:1b")) as running:
        answering = asyncio.create_task(running.http.post(CHAT, json=chat(stream=True)))
        await ollama.until(lambda engine: engine.running == 1)
        unloaded = await unload(running)
        over = answering.done()
        answer = await answering

    assert_done(unloaded, "unloaded")
    assert over, "the answer came first"
    assert answer.text.endswith("data: [DONE]\n\n")
    assert "error" not in answer.text


async def test_unloading_a_model_that_stays_in_use_is_a_409(
    ollama: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(
        **alone(ollama, "small:1b"), timings=Timings(shared_unload_s=0.2)
    ) as running:
        await load(running)
        ollama.unload_s = 60.0
        answer = await unload(running)
        after = await listed(running)

    assert "stays in memory" in failed(answer, 409, "in_use")
    assert answer.headers["x-should-retry"] == "false"
    assert after == "loaded"


async def test_unloading_from_a_vllm_that_keeps_its_model_is_a_400(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm)) as running:
        await until_listed(running, "loaded")
        loaded = await load(running)
        unloaded = await unload(running)

    assert_done(loaded, "loaded")
    assert "stop the engine instead" in failed(unloaded, 400, "bad_request")


async def test_a_vllm_with_sleep_mode_is_not_put_to_sleep_in_shared_placement(
    ollama: FakeEngine, start_gateway: StartGateway
) -> None:
    async with FakeEngine("vllm", ["Small-1B"], dev_mode=True) as vllm:
        async with start_gateway(**pair(ollama, vllm)) as running:
            await load(running, "m@ollama")
            unloaded = await unload(running)
            gone = list(ollama.resident)

        assert not vllm.asleep
    assert_done(unloaded, "loaded")  # vLLM has it still
    assert gone == []


async def test_a_load_can_name_its_lane(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**pair(ollama, vllm)) as running:
        assert_done(await load(running, "m@ollama"), "loaded")
        there = list(ollama.resident)
        refused = await unload(running, "m@vllm")

    assert there == ["small:1b"]
    failed(refused, 400, "bad_request")


async def test_the_error_of_a_failed_load_has_none_of_the_engines_words(
    ollama: FakeEngine, start_gateway: StartGateway
) -> None:
    ollama.script(then=status(500, "out of memory on 10.0.0.7"), path="load")
    async with start_gateway(**alone(ollama, "small:1b")) as running:
        answer = await load(running)
        after = await listed(running)

    assert failed(answer, 502, "engine_failed") == (
        "ollama failed to load or unload the model; the gateway's log has the reason."
    )
    assert after == "unloaded"


async def test_an_engine_that_is_down_loads_nothing(
    ollama: FakeEngine, start_gateway: StartGateway
) -> None:
    ollama.down()
    async with start_gateway(**alone(ollama, "small:1b")) as running:
        answer = await load(running)

    assert "cannot be reached" in failed(answer)


async def test_models_are_listed_while_a_load_hangs(
    ollama: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(
        **alone(ollama, "small:1b"), timings=Timings(load_answer_s=0.3)
    ) as running:
        ollama.script(Silence(), path="load")
        loading = asyncio.create_task(load(running))
        await until_listed(running, "loading")
        loading.cancel()
    # and the gateway has ended, although the load has not


# Only one fits


async def test_unloading_releases_the_gpu_and_the_next_request_acquires_it(
    box: Box, start_gateway: StartGateway
) -> None:
    async with serving(start_gateway, box) as served:
        held = await listed(served.running)
        assert_done(await unload(served.running), "unloaded")
        memory = dict(box.ollama.memory)
        step = served.owner.state.step
        again = await served.ask()
        after = await listed(served.running)

    assert (held, after) == ("loaded", "loaded")
    assert (memory, step) == ({}, Step.FREE)
    assert again.status_code == 200


async def test_loading_hands_the_gpu_to_the_lane_that_the_policy_chooses(
    box: Box, start_gateway: StartGateway
) -> None:
    async with serving(start_gateway, box) as served:
        await served.pin("vllm")
        await served.until("vllm")
        await unload(served.running)
        asleep = box.vllm.asleep
        assert_done(await load(served.running), "loaded")
        holder = served.owner.state.layout

    assert asleep
    assert holder == "vllm"


async def test_a_model_is_listed_as_loading_during_a_hand_over(
    box: Box, start_gateway: StartGateway
) -> None:
    box.ollama.load_s = 0.4
    async with serving(start_gateway, box, holder=None) as served:
        await served.until(Step.LOADING)
        on_its_way = await listed(served.running)
        await served.until("ollama")
        there = await listed(served.running)

    assert (on_its_way, there) == ("loading", "loaded")


async def test_a_running_answer_ends_before_the_gpu_is_released(
    box: Box, start_gateway: StartGateway
) -> None:
    box.ollama.gap_s = 0.15
    async with serving(start_gateway, box, drain_s=10) as served, stream_of(served, "runs") as runs:
        parts = runs.aiter_text()
        first = await anext(parts)
        unloading = asyncio.create_task(unload(served.running))
        await served.until(Step.DRAINING)
        waits = served.asking("comes while it drains")
        text = first + "".join([part async for part in parts])
        done_with = (await unloading).status_code
        late = await waits

    assert text.endswith("data: [DONE]\n\n")
    assert "error" not in text
    assert done_with == 200
    assert late.status_code == 200, "it waited, and the model was loaded for it again"


async def test_an_answer_beyond_the_deadline_is_not_cut_and_the_model_stays(
    box: Box, start_gateway: StartGateway
) -> None:
    box.ollama.gap_s = 0.3
    async with (
        serving(start_gateway, box, drain_s=0.2) as served,
        stream_of(served, "runs long") as runs,
    ):
        parts = runs.aiter_text()
        first = await anext(parts)
        answer = await unload(served.running)
        meanwhile = await served.ask("goes on", max_tokens=1)
        text = first + "".join([part async for part in parts])
        holder = served.owner.state.layout

    failed(answer, 409, "in_use")
    assert meanwhile.status_code == 200
    assert text.endswith("data: [DONE]\n\n")
    assert "error" not in text
    assert holder == "ollama"


async def test_unloading_a_model_that_is_not_in_memory_succeeds(
    box: Box, start_gateway: StartGateway
) -> None:
    async with serving(start_gateway, box) as served:
        assert_done(await unload(served.running, "m@vllm"), "loaded")
        holder = served.owner.state.layout
        assert_done(await unload(served.running), "unloaded")
        assert_done(await unload(served.running), "unloaded")

    assert holder == "ollama"


async def test_loading_a_lane_hands_the_gpu_to_it(box: Box, start_gateway: StartGateway) -> None:
    async with serving(start_gateway, box) as served:
        assert_done(await load(served.running, "m@vllm"), "loaded")
        holder = served.owner.state.layout

    assert holder == "vllm"


async def test_a_load_does_not_take_back_a_released_gpu(
    box: Box, start_gateway: StartGateway
) -> None:
    async with serving(start_gateway, box) as served:
        await served.release()
        await served.until(Step.FREE)
        answer = await load(served.running)
        await served.pin("auto")
        assert_done(await load(served.running), "loaded")

    assert "the operator has released the GPU" in failed(answer)


async def test_an_unload_during_a_hand_over_runs_after_it(
    box: Box, start_gateway: StartGateway
) -> None:
    box.vllm.wake_s = 0.3
    async with serving(start_gateway, box) as served:
        await served.pin("vllm")
        await served.until(Step.LOADING)
        assert_done(await unload(served.running), "unloaded")
        outcomes = served.outcomes

    assert outcomes == ["done", "done"]
    assert box.vllm.asleep


# Who may, and what may be said


@pytest.mark.parametrize("path", ["/models/load", "/models/unload"])
async def test_loading_requires_an_admin_key(
    ollama: FakeEngine, start_gateway: StartGateway, path: str
) -> None:
    settings = {**alone(ollama, "small:1b"), "api_keys": [KEY, PAGE], "admin_keys": [ADMIN, PAGE]}
    async with start_gateway(**settings) as running:

        async def ask(key: str) -> int:
            headers = {"authorization": f"Bearer {key}"} if key else {}
            answer = await running.http.post(path, json={"model": "m"}, headers=headers)
            return answer.status_code

        statuses = [await ask(key) for key in ("", KEY, "sk-somebody", ADMIN, PAGE)]
        page = {"authorization": f"Bearer {PAGE}"}
        chats = await running.http.post(CHAT, json=chat(), headers=page)
        lists = await running.http.get("/models", headers={"authorization": f"Bearer {KEY}"})

    assert statuses == [401, 401, 401, 200, 200]
    assert chats.status_code == 200, "a chat page whose key is in both lists has both"
    assert lists.status_code == 200


async def test_loading_an_unknown_model_is_a_404(box: Box, start_gateway: StartGateway) -> None:
    async with serving(start_gateway, box) as served:
        answers = [await load(served.running, "other"), await unload(served.running, "m@llamacpp")]

    for answer in answers:
        failed(answer, 404, "model_not_found")


@pytest.mark.parametrize("wish", [{}, {"model": None}, [], {"name": "m"}])
async def test_a_load_that_names_no_model_is_refused(
    ollama: FakeEngine, start_gateway: StartGateway, wish: object
) -> None:
    async with start_gateway(**alone(ollama, "small:1b")) as running:
        for path in ("/models/load", "/models/unload"):
            failed(await running.http.post(path, json=wish), 400, "bad_request")


async def test_the_list_is_also_at_the_path_of_llama_cpp(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm)) as running:
        there = (await running.http.get("/models")).json()
        usual = (await running.http.get("/v1/models")).json()

    assert there == usual
