"""`/ready` and `/status` are the structs of `observe.status`, and OpenAPI describes them."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest

from backends.fake import FakeEngine
from gateway.observe.status import GatewayStatus, ReadyReport
from tests.support.exclusive import Box, serving
from tests.support.gateways import Running, StartGateway
from tests.support.models import alone, chat

PRICES = {"watts": 350, "per_kwh": 0.3}


async def described(
    running: Running, path: str, struct: type[msgspec.Struct], status: int = 200
) -> dict[str, Any]:
    """The JSON of a page, which is this struct with no field more or less, as OpenAPI says."""
    answer = await running.http.get(path)
    document = (await running.http.get("/openapi.json")).json()
    responses = document["paths"][path]["get"]["responses"]
    schema = responses[str(status)]["content"]["application/json"]["schema"]
    value: dict[str, Any] = answer.json()
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert schema == {"$ref": f"#/components/schemas/{struct.__name__}"}
    assert msgspec.to_builtins(msgspec.convert(value, struct)) == value
    return value


@pytest.mark.parametrize("exclusive", [False, True])
async def test_status_and_readiness_are_what_openapi_describes(
    box: Box, vllm: FakeEngine, start_gateway: StartGateway, *, exclusive: bool
) -> None:
    settings = box.settings() if exclusive else alone(vllm)
    async with start_gateway(**settings, cost=PRICES) as running:
        await running.until(lambda gateway: gateway.ready().ready)
        asked = await running.http.post("/v1/chat/completions", json=chat())
        ready = await described(running, "/ready", ReadyReport)
        state = await described(running, "/status", GatewayStatus)

    assert asked.status_code == 200
    assert ("gpu" in ready, state["gpu"] is not None) == (exclusive, exclusive)
    assert state["models"]["m"]["decisions"]
    assert state["cost"]["lanes"]


async def test_hand_overs_are_as_openapi_describes_them(
    box: Box, start_gateway: StartGateway
) -> None:
    async with serving(start_gateway, box) as served:
        await served.pin("vllm")
        state = await described(served.running, "/status", GatewayStatus)

    assert {"from", "to", "steps"} <= state["gpu"]["passages"][0].keys()


async def test_a_gateway_that_is_not_ready_says_so_as_openapi_describes(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    vllm.down()
    async with start_gateway(**alone(vllm)) as running:
        ready = await described(running, "/ready", ReadyReport, 503)

    assert ready["waiting_for"] == {"m": {"vllm": "cannot be reached"}}


async def test_every_schema_that_is_named_is_in_the_document(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm)) as running:
        answer = await running.http.get("/openapi.json")

    named = set(re.findall(r'"#/components/schemas/(\w+)"', answer.text))
    assert "GatewayStatus" in named
    assert named <= answer.json()["components"]["schemas"].keys()
