"""What people see who chat with the gateway in Open WebUI."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest
from playwright.async_api import expect

from backends.fake import FakeEngine, Reset, Serve
from gateway.app import Gateway
from gateway.gpu.state import Step
from tests.browser.conftest import KEY, OpenPage, StartGateway, smollm2
from tests.engines import rig
from tests.support.exclusive import Box, Served

pytestmark = pytest.mark.timeout(150)

#: How long an engine may work on for somebody who has pressed Stop.
STOPPED_S = 2.0


def logged(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The gateway's log since it was last looked at."""
    lines = capsys.readouterr().err.splitlines()
    known = [json.loads(line) for line in lines if line.startswith("{")]
    return [line for line in known if line["outcome"] != "draining"]  # not even read


def chats(gateway: Gateway) -> int:
    """Foreground requests that run or wait."""
    return sum(model.admission.demand for model in gateway.catalogue.models.values())


async def until_quiet(gateway: Gateway, seconds: float = 1.5) -> None:
    """Return when no request came for so long: title, follow-ups and tags come one by one."""
    quiet_since = time.monotonic()
    while time.monotonic() - quiet_since < seconds:
        if gateway.edge.in_flight:
            quiet_since = time.monotonic()
        await asyncio.sleep(0.05)


def slow(kind: Any, model: str, **how: Any) -> FakeEngine:
    """An engine whose answers last long enough to be looked at."""
    return FakeEngine(kind, [model], **{"ttft_s": 0.1, "gap_s": 0.1, "tokens": 20, **how})


def lane(engine: FakeEngine, **settings: Any) -> dict[str, Any]:
    """Settings that serve a fake engine's model as `smollm2`."""
    return {
        "engines": {engine.kind: {"urls": [engine.url]}},
        "models": {"smollm2": {"lanes": {engine.kind: {"model": engine.models[0], "slots": 4}}}},
        **settings,
    }


# With the real Ollama


async def test_the_gateways_models_are_in_the_list(
    ollama: rig.Engine, start: StartGateway, open_page: OpenPage
) -> None:
    settings = smollm2(ollama)
    settings["models"]["another"] = settings["models"]["smollm2"]
    async with start(**settings):
        page = await open_page()
        await page.open_list()
        await expect(page.options).to_have_count(2)
        names = [name.strip() for name in await page.options.all_inner_texts()]

    assert sorted(names) == ["another", "smollm2"]


async def test_words_appear_before_the_answer_is_complete_and_a_second_turn_knows_the_first(
    ollama: rig.Engine,
    start: StartGateway,
    open_page: OpenPage,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with start(**smollm2(ollama), log="json") as running:
        page = await open_page()
        await page.say("Tell me a short story about a ship in three sentences.")
        await page.shows_words()
        early, unfinished = await page.read(), chats(running.gateway)
        whole = await page.finished()
        await page.say("Where does it take place? Answer in one sentence.")
        second = await page.finished(2)
        await page.open_list()
        await page.shot("chat")  # docs/open-webui.png is one of these

    turns = [line for line in logged(capsys) if not line["background"]]
    assert unfinished
    assert len(whole) > len(early) > 0
    assert second
    assert [turn["outcome"] for turn in turns] == ["ok", "ok"]
    assert turns[1]["tokens_in"] > turns[0]["tokens_in"] + turns[0]["tokens_out"]


async def test_who_presses_stop_leaves_ollama_free(
    ollama: rig.Engine,
    start: StartGateway,
    open_page: OpenPage,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def ended() -> int:
        """Chats that Ollama has noted as over."""
        return ollama.log.read_text(errors="replace").count('"/v1/chat/completions"')

    # With one slot nothing else of the page's is at Ollama as long as the answer is.
    async with start(**smollm2(ollama, slots=1), log="json") as running:
        page = await open_page()
        before = ended()
        await page.say("Tell me a very long story about a ship and the sea.")
        await page.shows_words()
        at_work = ended()
        await page.stop()
        await running.until(lambda _: ended() > before, within_s=STOPPED_S)

    [chat] = [line for line in logged(capsys) if not line["background"]]
    assert at_work == before
    assert chat["outcome"] == "cancelled"


async def resident(ollama: rig.Engine) -> list[str]:
    """What Ollama has in memory, by its own word."""
    async with httpx.AsyncClient(trust_env=False) as client:
        told = (await client.get(f"{ollama.url}/api/ps")).json()
    return [model["model"] for model in told["models"]]


async def test_the_dot_shows_what_is_loaded_and_the_eject_button_unloads_it(
    ollama: rig.Engine, start: StartGateway, open_page: OpenPage
) -> None:
    async with start(**smollm2(ollama)) as running:
        operator = {"authorization": f"Bearer {KEY}"}
        wish = {"model": "smollm2"}
        loaded = await running.http.post("/models/load", json=wish, headers=operator)
        before = await resident(ollama)
        page = await open_page()
        await page.open_list()
        await expect(page.dot).to_be_visible()
        await page.shot("loaded")
        await page.eject()
        await expect(page.dot).to_have_count(0)
        after = await resident(ollama)

    assert loaded.status_code == 200
    assert before == [ollama.model]
    assert after == []


async def test_the_administrators_buttons_load_and_unload(
    ollama: rig.Engine, start: StartGateway, open_page: OpenPage
) -> None:
    async with start(**smollm2(ollama)) as running:
        operator = {"authorization": f"Bearer {KEY}"}
        await running.http.post("/models/unload", json={"model": "smollm2"}, headers=operator)
        page = await open_page()
        await page.manage()
        await page.press("Load Model", then="loaded")
        loaded = await resident(ollama)
        await page.press("Unload Model", then="unloaded")
        unloaded = await resident(ollama)

    assert loaded == [ollama.model]
    assert unloaded == []


# Where failures and times are needed: with engines that are played


async def test_stop_reaches_the_engine_at_once(start: StartGateway, open_page: OpenPage) -> None:
    async with slow("vllm", "Small-1B", tokens=600) as engine, start(**lane(engine)):
        page = await open_page()
        await page.say("Count to a thousand.")
        await page.shows_words()
        await page.stop()
        await engine.until(lambda _: engine.hang_ups, within_s=STOPPED_S)


async def test_titles_and_tags_are_not_counted_as_load_and_change_no_lane(
    start: StartGateway, open_page: OpenPage, capsys: pytest.CaptureFixture[str]
) -> None:
    async with (
        slow("ollama", "small:1b", slots=4) as ollama,
        slow("vllm", "Small-1B") as vllm,
    ):
        both = lane(ollama)
        both["engines"] |= lane(vllm)["engines"]
        both["models"]["smollm2"]["lanes"] |= lane(vllm)["models"]["smollm2"]["lanes"]
        async with start(**both, log="json") as running:
            page = await open_page()
            await page.say("Hello")
            await page.finished()
            await until_quiet(running.gateway)
            said = running.gateway.status().models["smollm2"]

    lines = logged(capsys)
    background = [line for line in lines if line["background"]]
    assert [line["stream"] for line in lines if not line["background"]] == [True]
    assert len(background) >= 2, "a title and tags"
    assert {line["outcome"] for line in background} == {"ok"}
    assert max(decision.demand for decision in said.decisions) == 1
    assert said.moves == 0
    assert {line["lane"] for line in lines} == {"ollama"}


async def test_a_failure_in_mid_answer_is_shown_below_the_text(
    start: StartGateway, open_page: OpenPage
) -> None:
    async with slow("vllm", "Small-1B") as engine, start(**lane(engine)):
        engine.script(then=[Serve(tokens=5), Reset()])
        page = await open_page()
        await page.say("Hello")
        told = "The engine's answer broke off before its end."
        await expect(page.answers.get_by_text(told)).to_be_visible()
        said = await page.read()

    assert "token0 token1 token2 token3 token4" in said


async def test_a_wrong_key_is_explained_on_the_page(
    start: StartGateway, open_page: OpenPage
) -> None:
    async with slow("vllm", "Small-1B") as engine:
        async with start(**lane(engine)):
            page = await open_page()
        async with start(**lane(engine, api_keys=["sk-a-new-one"])):
            await page.say("Hello")
            told = "This API key is not valid for this path."
            await expect(page.answers.get_by_text(told)).to_be_visible()


async def test_who_comes_before_any_engine_is_loaded_reads_what_it_waits_for(
    box: Box, start: StartGateway, open_page: OpenPage
) -> None:
    async with start(**exclusive(box)) as running:
        served = Served.of(running, box)
        await served.until("ollama")
        page = await open_page()
        await served.owner.unload()
        box.ollama.load_s = 5.0
        await page.say("Hello")
        await expect(page.page.get_by_text("The GPU goes to ollama: loading")).to_be_visible()
        await page.shot("waiting")
        answer = await page.finished()

    assert "token0" in answer


async def test_who_waits_for_the_gpu_to_change_hands_reads_so_and_is_answered(
    box: Box, start: StartGateway, open_page: OpenPage
) -> None:
    box.vllm.wake_s = 5.0
    async with start(**exclusive(box)) as running:
        served = Served.of(running, box)
        await served.until("ollama")
        page = await open_page()
        served.owner.pin("vllm")
        await served.until(Step.LOADING)
        await page.say("Hello")
        await expect(page.page.get_by_text("The GPU goes to vllm: loading")).to_be_visible()
        answer = await page.finished()

    assert "token0" in answer
    assert box.answered_by("Hello") == ["vllm"]


async def test_two_people_are_answered_whole_while_the_gpu_changes_hands(
    box: Box, start: StartGateway, open_page: OpenPage
) -> None:
    for engine in box.engines:
        engine.gap_s, engine.tokens = 0.1, 40
    box.vllm.wake_s = 1.0
    async with start(**exclusive(box)) as running:
        served = Served.of(running, box)
        await served.until("ollama")
        anna, ben = await asyncio.gather(open_page(), open_page())
        await asyncio.gather(anna.say("I am Anna."), ben.say("I am Ben."))
        await asyncio.gather(anna.shows_words(), ben.shows_words())
        served.owner.pin("vllm")
        await served.until(Step.DRAINING)
        first = await asyncio.gather(anna.finished(), ben.finished())
        await served.until("vllm")
        await asyncio.gather(anna.say("And now?"), ben.say("And then?"))
        second = await asyncio.gather(anna.finished(2), ben.finished(2))

    for answer in (*first, *second):
        assert "token0" in answer
        assert "token39" in answer
    # Its first message is what a chat begins with, in the second turn as well.
    assert box.answered_by("I am Anna.") == box.answered_by("I am Ben.") == ["ollama", "vllm"]


def exclusive(box: Box) -> dict[str, Any]:
    """Settings of a gateway whose two engines do not fit, that tells Open WebUI so."""
    settings = box.settings()
    settings["models"] = {"smollm2": box.model("ollama", "vllm")}
    return {**settings, "status_events": True}
