"""A gateway as a whole: the engines it finds, the models it serves, its status."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from backends.fake import FakeEngine, status
from backends.transport import http
from gateway import settings
from gateway.app import Gateway
from gateway.serving import discovery
from gateway.settings import SettingsError
from tests.support.gateways import Running, StartGateway
from tests.support.models import alone, chat


async def ask(running: Running, **fields: object) -> str:
    """Send a chat, and return the lane that answered."""
    answer = await running.http.post("/v1/chat/completions", json=chat(**fields))
    assert answer.status_code == 200, answer.text
    return answer.headers["x-gateway-lane"]


async def test_each_engine_is_recognized_by_a_path_that_only_it_serves() -> None:
    async with (
        FakeEngine("ollama", ["a"]) as ollama,
        FakeEngine("vllm", ["b"]) as vllm,
        FakeEngine("llamacpp", ["c"]) as llamacpp,
        http.Client() as client,
    ):
        everywhere = (llamacpp.port, vllm.port, ollama.port)
        ports: discovery.Ports = {"ollama": everywhere, "vllm": everywhere, "llamacpp": everywhere}
        found = await discovery.find(client, ports, own_port=0)

    assert found == {"ollama": ollama.url, "vllm": vllm.url, "llamacpp": llamacpp.url}


async def test_a_discovered_model_is_served_under_its_own_name(start_gateway: StartGateway) -> None:
    async with (
        FakeEngine("ollama", ["a:1b"]) as ollama,
        FakeEngine("vllm", ["B"]) as vllm,
        start_gateway(ports={"ollama": (ollama.port,), "vllm": (vllm.port,)}) as running,
    ):
        listed = (await running.http.get("/v1/models")).json()["data"]

        assert {m["id"]: m["lanes"] for m in listed} == {"a:1b": ["ollama"], "B": ["vllm"]}
        assert await ask(running, model="a:1b") == "ollama"
        assert await ask(running, model="B") == "vllm"


async def test_latest_may_be_left_out_as_with_ollama(start_gateway: StartGateway) -> None:
    async with (
        FakeEngine("ollama", ["a"]) as ollama,
        start_gateway(ports={"ollama": (ollama.port,)}) as running,
    ):
        assert await ask(running, model="a") == "ollama"
        assert await ask(running, model="a:latest") == "ollama"


async def test_a_pair_is_one_name_and_its_parts_are_not_listed(
    start_gateway: StartGateway,
) -> None:
    async with (
        FakeEngine("ollama", ["a:1b", "other:1b"]) as ollama,
        FakeEngine("vllm", ["A"]) as vllm,
        start_gateway(
            ports={"ollama": (ollama.port,), "vllm": (vllm.port,)},
            pair={"chat": {"ollama": "a:1b", "vllm": "A"}},
        ) as running,
    ):
        listed = (await running.http.get("/v1/models")).json()["data"]

        assert [model["id"] for model in listed] == ["chat", "other:1b"]
        assert await ask(running, model="chat") == "ollama"
        assert await ask(running, model="chat@vllm") == "vllm"


async def test_the_same_name_on_two_engines_is_one_model(start_gateway: StartGateway) -> None:
    async with (
        FakeEngine("ollama", ["a:1b"]) as ollama,
        FakeEngine("vllm", ["a:1b"]) as vllm,
        start_gateway(ports={"ollama": (ollama.port,), "vllm": (vllm.port,)}) as running,
    ):
        listed = (await running.http.get("/v1/models")).json()["data"]

    assert [(m["id"], m["lanes"]) for m in listed] == [("a:1b", ["ollama", "vllm"])]


async def test_an_engine_that_is_down_at_the_start_is_used_when_it_comes_up(
    start_gateway: StartGateway,
) -> None:
    async with FakeEngine("vllm", ["A"]) as vllm:
        vllm.down()
        models = {"m": {"lanes": {"vllm": {"model": "A"}}}}
        async with start_gateway(engines={"vllm": {"urls": [vllm.url]}}, models=models) as running:
            before = await running.http.get("/ready")
            await vllm.up()
            await running.until(lambda gateway: gateway.ready().ready)

            assert before.status_code == 503
            assert before.json()["waiting_for"] == {"m": {"vllm": "cannot be reached"}}
            assert await ask(running) == "vllm"


async def test_without_any_engine_the_embedded_one_answers(start_gateway: StartGateway) -> None:
    async with start_gateway() as running:
        assert await ask(running, model="smollm2", max_tokens=4) == "llamacpp"
        embedded = running.gateway.engines.embedded
        assert embedded is not None
        pid = embedded.pid
        assert pid is not None
        made = await running.http.post(
            "/v1/embeddings", json={"model": "smollm2", "input": "The sea"}
        )

    assert len(made.json()["data"][0]["embedding"]) == 576
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_missing_model_file_stops_the_start(start_gateway: StartGateway) -> None:
    with pytest.raises(SettingsError, match=r"embedded\.model: there is no file /no/such\.gguf"):
        async with start_gateway(embedded={"model": "/no/such.gguf"}):
            pass


async def test_a_broken_model_file_stops_the_start_and_shows_the_log(
    start_gateway: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # its log stays behind
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no model")

    with pytest.raises(SettingsError, match="does not start"):
        async with start_gateway(embedded={"model": str(broken)}):
            pass


async def test_a_context_longer_than_the_engines_stops_the_start(
    start_gateway: StartGateway,
) -> None:
    async with FakeEngine("vllm", ["m"], context=2048) as vllm:
        how = alone(vllm, "m", context=32768)
        with pytest.raises(SettingsError, match=r"m.lanes.vllm.context: 32768 .* than the 2048"):
            async with start_gateway(**how):
                pass


async def test_models_are_served_for_as_long_as_their_engine_lists_them() -> None:
    async with (
        FakeEngine("ollama", ["a:1b"]) as first,
        FakeEngine("ollama", ["b:1b"]) as second,
    ):
        read = settings.load(None, {"port": 0, "log": "off"}, {})
        async with Gateway(read, {"ollama": (first.port,)}) as gateway:
            before = list(gateway.catalogue.models)
            gateway.engines.urls["ollama"] = (second.url,)  # as if other models had been pulled
            await gateway.listing.relist()
            after = list(gateway.catalogue.models)

            second.down()
            await gateway.listing.relist()
            down = list(gateway.catalogue.models)

    assert (before, after, down) == (["a:1b"], ["b:1b"], ["b:1b"])


async def test_replicas_share_the_work(start_gateway: StartGateway) -> None:
    async with (
        FakeEngine("vllm", ["A"], ttft_s=0.2) as one,
        FakeEngine("vllm", ["A"], ttft_s=0.2) as two,
        start_gateway(
            engines={"vllm": {"urls": [one.url, two.url]}},
            models={"m": {"lanes": {"vllm": {"model": "A", "slots": 4}}}},
        ) as running,
    ):
        await asyncio.gather(*(ask(running) for _ in range(8)))

    asked = [[g for g in e.generations if "tools" not in g.body] for e in (one, two)]
    assert [len(generations) for generations in asked] == [4, 4]


async def test_status_shows_lanes_demand_and_decisions(start_gateway: StartGateway) -> None:
    async with (
        FakeEngine("vllm", ["A"], ttft_s=0.3) as vllm,
        start_gateway(
            engines={"vllm": {"urls": [vllm.url]}},
            models={"m": {"lanes": {"vllm": {"model": "A", "slots": 1}}}},
        ) as running,
    ):
        asking = asyncio.gather(ask(running), ask(running))
        await running.until(lambda gateway: gateway.edge.in_flight == 2)
        busy = await running.status("m")
        await asking
        calm = await running.status("m")

    assert (busy["demand"], busy["waiting"], busy["lanes"]["vllm"]["running"]) == (2, 1, 1)
    assert (calm["demand"], calm["waiting"], calm["lanes"]["vllm"]["running"]) == (0, 0, 0)
    assert [d["lane"] for d in calm["decisions"]] == ["vllm", "vllm"]
    assert calm["profile"]["source"] == "assumed"


async def test_an_engine_with_a_command_runs_as_long_as_the_gateway(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "backends.fake", "--kind", "ollama", "--port", str(port)]
    engine = {"urls": [f"http://127.0.0.1:{port}"], "command": command, "log": tmp_path / "log"}
    async with start_gateway(
        engines={"ollama": engine}, models={"chat": {"lanes": {"ollama": {"model": "m"}}}}
    ) as running:
        await running.until(
            lambda gateway: gateway.ready().ready and not gateway.ready().waiting_for, 20
        )
        lane = await ask(running, model="chat")

    assert lane == "ollama"
    with socket.socket() as client:
        assert client.connect_ex(("127.0.0.1", port)) != 0


# The profile that it decides by


def measured_profile(folder: Path, vllm: FakeEngine, **on: object) -> str:
    """A three days old profile of a fake vLLM; `on` is what its lane was measured on."""
    was = {"engine": "vllm", "model": "A", "version": "0.32.0", "slots": 4, **on}
    lane = {
        "at_once": [1, 4],
        "seconds": [0.01, 0.02],
        "ttft_s": [0.005, 0.01],
        "on": was,
    }
    days_ago = datetime.now(UTC) - timedelta(days=3, hours=1)
    said = {
        "version": 1,
        "source": "measured",
        "machine": f"what plays {vllm.kind}",
        "measured_at": days_ago.isoformat(),
        "tokens_out": 5,
        "lanes": {"vllm": lane},
    }
    file = folder / "profile.json"
    file.write_text(json.dumps(said))
    return str(file)


def profiled(vllm: FakeEngine, file: str, **model: object) -> dict[str, Any]:
    """Settings of one model with one lane and this profile."""
    lanes = {"vllm": {"model": "A", "slots": 4}}
    return {
        "engines": {"vllm": {"urls": [vllm.url]}},
        "models": {"m": {"lanes": lanes, "profile": file, **model}},
    }


async def test_status_has_the_age_of_the_profile_and_no_warning(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    async with (
        FakeEngine("vllm", ["A"]) as vllm,
        start_gateway(**profiled(vllm, measured_profile(tmp_path, vllm))) as running,
    ):
        await running.until(lambda gateway: gateway.catalogue.models["m"].changed)
        said = (await running.status("m"))["profile"]

    assert said["told"] == "measured 3 days ago"
    assert said["age_s"] == pytest.approx(3 * 86400 + 3600, abs=60)
    assert said["machine"] == "what plays vllm"
    assert said["warnings"] == []


async def test_an_engine_other_than_the_measured_one_is_a_warning(
    start_gateway: StartGateway, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with FakeEngine("vllm", ["A"]) as vllm:
        how = profiled(vllm, measured_profile(tmp_path, vllm, slots=16, digest="A"))
        async with start_gateway(**how) as running:
            await running.until(lambda gateway: gateway.catalogue.models["m"].changed)
            before = (await running.status("m"))["profile"]["warnings"]
            vllm.down()
            await running.until(lambda gateway: not gateway.ready().ready, 10)
            vllm.version = "0.33.0"
            await vllm.up()
            await running.until(
                lambda gateway: "0.33.0" in gateway.catalogue.models["m"].changed[vllm.url], 10
            )
            after = (await running.status("m"))["profile"]["warnings"]

    slots = "slots 4 now, measured with 16"
    assert before == [f"vllm: {slots}: run `twolane calibrate` again"]
    assert after == [
        f"vllm: version 0.33.0 now, measured with 0.32.0; {slots}: run `twolane calibrate` again"
    ]
    logged = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert logged == [f"m: the profile may be out of date: {told}" for told in before + after]


async def test_an_engine_that_reports_no_identity_still_serves(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    async with FakeEngine("vllm", ["A"]) as vllm:
        vllm.script(then=status(500), path="/version")
        async with start_gateway(**profiled(vllm, measured_profile(tmp_path, vllm))) as running:
            lane = await ask(running)
            said = (await running.status("m"))["profile"]

    assert lane == "vllm"
    assert said["warnings"] == []


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_refine_a_measured_profile(
    start_gateway: StartGateway, tmp_path: Path, *, stream: bool
) -> None:
    async with (
        FakeEngine("vllm", ["A"], ttft_s=0.05) as vllm,
        start_gateway(**profiled(vllm, measured_profile(tmp_path, vllm))) as running,
    ):
        for _ in range(3):
            await ask(running, stream=stream)
        said = (await running.status("m"))["profile"]["refined"]

    assert said["requests"] == 3
    assert said["factors"]["vllm"]["1"] > 1  # the first was told to the policy at once


@pytest.mark.parametrize("fields", [{"n": 2}, {"messages": "none"}])
async def test_several_choices_and_failures_do_not_refine_the_profile(
    start_gateway: StartGateway, tmp_path: Path, fields: dict[str, Any]
) -> None:
    async with (
        FakeEngine("vllm", ["A"]) as vllm,
        start_gateway(**profiled(vllm, measured_profile(tmp_path, vllm))) as running,
    ):
        await running.http.post("/v1/chat/completions", json=chat(**fields))
        said = (await running.status("m"))["profile"]["refined"]

    assert said["requests"] == 0


@pytest.mark.parametrize("model", [{"refine": False}, {"profile": None}])
async def test_no_profile_is_refined_that_is_assumed_or_set_not_to_be(
    start_gateway: StartGateway, tmp_path: Path, model: dict[str, Any]
) -> None:
    async with FakeEngine("vllm", ["A"]) as vllm:
        how = profiled(vllm, measured_profile(tmp_path, vllm))
        how["models"]["m"] |= model
        async with start_gateway(**how) as running:
            await ask(running)
            said = (await running.status("m"))["profile"]["refined"]

    assert said is None
