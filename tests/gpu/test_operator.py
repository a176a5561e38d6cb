"""What the operator says to a running gateway, and what it says to him."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import pytest

from backends.fake import GIB, FakeEngine, FakeGpu, Silence
from gateway.gpu.state import Step
from gateway.settings import SettingsError, Timings
from tests.support.exclusive import SHORT, Box, failed, serving
from tests.support.gateways import StartGateway
from tests.support.models import alone, chat, pair

KEY = "sk-a-key-of-ours"
ADMIN = "sk-the-operators"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def twolane(*arguments: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command to its end."""
    return await anyio.run_process(
        [sys.executable, "-m", "gateway", *arguments],
        check=False,
        env={**os.environ, "COLUMNS": "160", **variables},
    )


# Who may


@pytest.mark.parametrize("path", ["/admin/pin", "/admin/release"])
async def test_only_an_admin_key_changes_what_the_gateway_does(
    box: Box, start_gateway: StartGateway, path: str
) -> None:
    settings = {**box.settings(), "api_keys": [KEY], "admin_keys": [ADMIN]}
    async with start_gateway(**settings) as running:
        owner = running.gateway.gpu
        assert owner is not None
        wish = {"lane": "vllm"}
        refused = [
            await running.http.post(path, json=wish, headers=headers)
            for headers in ({}, bearer(KEY), bearer("sk-somebody"), {"authorization": ADMIN})
        ]
        before = (owner.policy.pin, owner.state.released)
        let_in = await running.http.post(path, json=wish, headers=bearer(ADMIN))
        after = (owner.policy.pin, owner.state.released)
        asks = await running.http.get("/v1/models", headers=bearer(ADMIN))

    for answer in refused:
        failed(answer, 401, "invalid_api_key")
    assert before == (None, False)
    assert let_in.status_code == 200
    assert after == (("vllm", False) if path == "/admin/pin" else (None, True))
    assert asks.status_code == 401, "it is no key for anything else"


async def test_without_keys_of_its_own_every_key_is_the_operators(
    box: Box, start_gateway: StartGateway
) -> None:
    async with start_gateway(**box.settings(), api_keys=[KEY]) as running:
        without = await running.http.post("/admin/pin", json={"lane": "auto"})
        let_in = await running.http.post("/admin/pin", json={"lane": "auto"}, headers=bearer(KEY))

    assert (without.status_code, let_in.status_code) == (401, 200)


# What may be said


async def test_what_is_no_pin_is_refused_and_changes_nothing(
    box: Box, start_gateway: StartGateway
) -> None:
    wishes: tuple[Any, ...] = (
        {},
        {"lane": "gpu"},
        {"lane": None},
        {"lane": "vllm", "for": "ever"},
        [],
        "vllm",
    )
    async with serving(start_gateway, box) as served:
        answers = [await served.running.http.post("/admin/pin", json=wish) for wish in wishes]
        pin = served.owner.policy.pin

    for answer in answers:
        failed(answer, 400, "bad_request")
    assert pin is None


async def test_a_lane_that_no_model_has_cannot_be_pinned(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm)) as running:
        answer = await running.http.post("/admin/pin", json={"lane": "ollama"})

    message = failed(answer, 400, "bad_request")
    assert message == "No model is served by ollama. The lanes are: vllm."


async def test_where_no_gpu_is_shared_there_is_none_to_release(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm)) as running:
        answer = await running.http.post("/admin/release")
        ready = await running.http.get("/ready")

    assert "no GPU to release" in failed(answer, 400, "bad_request")
    assert "gpu" not in ready.json()


async def test_where_both_engines_fit_a_pin_is_followed_at_once(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**pair(ollama, vllm)) as running:
        lanes = []
        for lane in ("vllm", "ollama", "auto"):
            said = await running.http.post("/admin/pin", json={"lane": lane})
            assert said.json()["gpu"] is None
            answer = await running.http.post("/v1/chat/completions", json=chat())
            lanes.append((answer.headers["x-gateway-lane"], answer.headers["x-gateway-reason"]))

    assert lanes[0] == ("vllm", "pinned by the operator")
    assert lanes[1] == ("ollama", "pinned by the operator")
    assert lanes[2][0] == "ollama"
    assert "pinned" not in lanes[2][1]


async def test_a_pin_in_the_settings_can_be_taken_back(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    read = pair(ollama, vllm)
    read["models"]["m"]["pin"] = "vllm"
    async with start_gateway(**read) as running:
        before = await running.http.post("/v1/chat/completions", json=chat())
        await running.http.post("/admin/pin", json={"lane": "auto"})
        after = await running.http.post("/v1/chat/completions", json=chat())

    assert (before.headers["x-gateway-lane"], after.headers["x-gateway-lane"]) == ("vllm", "ollama")


# What it says of the GPU


async def test_it_is_not_ready_before_the_gpu_was_held_and_says_how_far_it_is(
    box: Box, start_gateway: StartGateway
) -> None:
    box.ollama.load_s = 0.6
    async with serving(start_gateway, box, holder=None) as served:
        await served.until(Step.LOADING)
        loading = await served.running.http.get("/ready")
        waits = await served.ask("comes before it is there")
        held = await served.running.http.get("/ready")

    assert loading.status_code == 503
    assert loading.headers["retry-after"]
    assert loading.json()["gpu"] == {
        "holder": None, "step": "loading", "to": "ollama", "trouble": "",
        "since_s": pytest.approx(0, abs=0.6), "deadline_s": 900.0,
    }  # fmt: skip
    assert waits.status_code == held.status_code == 200
    assert held.json()["gpu"] | {"since_s": 0} == {
        "holder": "ollama", "step": "held", "to": "ollama", "trouble": "",
        "since_s": 0, "deadline_s": None,
    }  # fmt: skip


async def test_a_hand_over_can_be_followed_and_is_remembered_step_by_step(
    box: Box, start_gateway: StartGateway
) -> None:
    box.vllm.wake_s = 0.4
    async with serving(start_gateway, box, load_s=30) as served:
        pinned = await served.running.http.post("/admin/pin", json={"lane": "vllm"})
        await served.until(Step.LOADING)
        while_loading = (await served.running.http.get("/status")).json()["gpu"]
        ready = await served.running.http.get("/ready")
        await served.until("vllm")
        after = (await served.running.http.get("/status")).json()["gpu"]

    assert pinned.json()["gpu"]["pin"] == "vllm"
    assert (while_loading["step"], while_loading["to"]) == ("loading", "vllm")
    assert while_loading["deadline_s"] == 30
    assert while_loading["passages"][-1]["outcome"] == "under way"
    assert ready.status_code == 200, "people wait for it, and are served"
    assert (after["holder"], after["step"], after["moves"]) == ("vllm", "held", 1)
    first, second = after["passages"]
    assert (first["from"], first["to"], first["outcome"]) == (None, "ollama", "done")
    assert (second["from"], second["to"], second["outcome"]) == ("ollama", "vllm", "done")
    assert "the operator has pinned it" in second["why"]
    assert list(second["steps"]) == ["draining", "unloading", "freeing", "loading", "probing"]
    assert second["steps"]["loading"] >= 0.4


async def test_waiting_is_recorded_with_the_hand_over_it_was_for(
    box: Box, start_gateway: StartGateway
) -> None:
    box.vllm.wake_s = box.ollama.load_s = 0.3
    async with serving(start_gateway, box) as served:
        await served.pin("vllm")
        await served.until(Step.LOADING)
        await served.ask("waits")
        await served.pin("ollama")
        await served.until("ollama")
        there, back = [passage.waited for passage in served.owner.records][1:]

    assert there > 0
    assert back == 0


async def test_a_failure_is_in_the_status_until_it_is_over(
    box: Box, start_gateway: StartGateway
) -> None:
    box.timings = Timings(gpu_retry_min_s=0.3, gpu_retry_max_s=0.3)
    async with serving(start_gateway, box, **SHORT) as served:
        for engine in box.engines:
            engine.kill()
        await served.pin("vllm")
        await served.until(Step.DOWN)
        down = (await served.running.http.get("/status")).json()
        drawn = await twolane("status", "--url", served.running.url)
        ready = await served.running.http.get("/ready")
        for engine in box.engines:
            box.revive(engine.kind)
            await engine.up()
        await served.until("vllm")
        after = (await served.running.http.get("/status")).json()["gpu"]

    assert "cannot be reached" in down["gpu"]["trouble"]
    assert down["gpu"]["holder"] is None
    assert b"cannot be reached" in drawn.stdout
    assert ready.status_code == 503
    assert ready.json()["models"] == []
    assert set(ready.json()["waiting_for"]["m"]) == {"ollama", "vllm"}
    assert (after["trouble"], after["holder"]) == ("", "vllm")


# The command


async def test_the_command_pins_releases_and_leaves_it_to_the_policy(
    box: Box, start_gateway: StartGateway
) -> None:
    async with serving(start_gateway, box) as served:
        url = served.running.url
        pinned = await twolane("pin", "vllm", "--url", url)
        await served.until("vllm")
        held = await twolane("status", "--url", url)
        released = await twolane("release", "--url", url)
        await served.until(Step.FREE)
        unpinned = await twolane("pin", "auto", "--url", url)
        wanted = (served.owner.policy.pin, served.owner.state.released)

    for ended in (pinned, held, released, unpinned):
        assert (ended.returncode, ended.stderr) == (0, b"")
    assert b"pinned to vllm;" in pinned.stdout
    assert b"vllm holds the GPU, for " in held.stdout
    assert b"the operator has pinned it" in held.stdout
    assert b"released by `twolane release`" in released.stdout
    assert wanted == (None, False)
    assert b"free" in unpinned.stdout
    assert b"released by `twolane release`" not in unpinned.stdout


async def test_the_command_draws_a_hand_over_that_is_under_way(
    box: Box, start_gateway: StartGateway
) -> None:
    async with serving(start_gateway, box, load_s=30) as served:
        box.vllm.script(Silence(), path="/wake_up")
        await served.pin("vllm")
        await served.until(Step.LOADING)
        drawn = await twolane("status", "--url", served.running.url)

    assert b"hand-over to vllm: loading, " in drawn.stdout
    assert b" of 30 s" in drawn.stdout
    assert b"under way" in drawn.stdout


async def test_the_command_sends_the_operators_key(box: Box, start_gateway: StartGateway) -> None:
    settings = {**box.settings(), "api_keys": [KEY], "admin_keys": [ADMIN]}
    async with start_gateway(**settings) as running:

        async def pin(*arguments: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
            return await twolane("pin", "vllm", "--url", running.url, *arguments, **variables)

        others = await pin("--key", KEY)
        keys = {"TWOLANE_ADMIN_KEYS": json.dumps([ADMIN]), "TWOLANE_API_KEYS": json.dumps([KEY])}
        variable = await pin(**keys)

    assert (others.returncode, variable.returncode) == (2, 0)
    assert b"give it with --key" in others.stderr
    assert b"Traceback" not in others.stderr


async def test_a_refusal_is_one_line(vllm: FakeEngine, start_gateway: StartGateway) -> None:
    async with start_gateway(**alone(vllm)) as running:
        ended = await twolane("pin", "ollama", "--url", running.url)

    assert ended.returncode == 2
    assert ended.stderr.decode().splitlines() == [
        "twolane: No model is served by ollama. The lanes are: vllm."
    ]


# What cannot work stops the start


async def refused(start_gateway: StartGateway, settings: Mapping[str, Any]) -> str:
    """What is said of settings with which the gateway does not start."""
    with pytest.raises(SettingsError) as caught:
        async with start_gateway(**settings):
            pass
    return str(caught.value)


async def test_a_lane_larger_than_the_memory_stops_the_start(
    box: Box, start_gateway: StartGateway
) -> None:
    box.models["m"]["lanes"]["vllm"]["memory_gib"] = 101

    said = await refused(start_gateway, box.settings())

    assert "models.m.lanes.vllm.memory_gib: 101 GiB do not fit in the GPU's 100.0" in said
    assert "take a smaller model" in said


async def test_a_vllm_that_can_neither_sleep_nor_be_stopped_stops_the_start(
    tmp_path: Path, start_gateway: StartGateway
) -> None:
    gpu = FakeGpu(100 * GIB)
    async with (
        FakeEngine("ollama", ["small:1b"], gpu=gpu) as ollama,
        FakeEngine("vllm", ["Small-1B"], gpu=gpu) as vllm,
    ):
        said = await refused(start_gateway, Box(gpu, ollama, vllm, tmp_path).settings())

    assert "--enable-sleep-mode and VLLM_SERVER_DEV_MODE=1" in said
    assert "engines.vllm.command" in said


async def test_a_second_gateway_for_one_gpu_does_not_start_and_names_the_first(
    box: Box, start_gateway: StartGateway
) -> None:
    async with serving(start_gateway, box) as served:
        said = await refused(start_gateway, box.settings())
        answer = await served.ask()
    async with serving(start_gateway, box) as third:
        after = await third.ask()

    assert f"process {os.getpid()}, at 127.0.0.1:" in said
    assert "gpu.lease" in said
    assert answer.status_code == after.status_code == 200


async def test_an_engine_that_is_down_is_no_reason_not_to_start(
    box: Box, start_gateway: StartGateway
) -> None:
    box.vllm.down()
    async with serving(start_gateway, box) as served:
        assert (await served.ask()).headers["x-gateway-lane"] == "ollama"
