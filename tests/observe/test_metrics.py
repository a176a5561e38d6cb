"""The metrics, parsed as Prometheus parses them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as classic

from backends.fake import GIB, FakeEngine, Silence, status
from backends.transport import sse
from gateway.errors import GatewayError
from gateway.gpu.cards import Nvml, Reading
from gateway.observe.counters import ENDINGS, FAILED_OUTCOMES, error_codes
from gateway.observe.metrics import Metrics
from gateway.observe.samples import COUNTERS, GAUGES
from gateway.relay.exchange import Exchange
from gateway.settings import Prices, SettingsError, Timings
from tests.gpu.test_memory import Info, NotSupported, Told, two_4090
from tests.support.exclusive import SHORT, Box, serving
from tests.support.gateways import Running, StartGateway
from tests.support.models import alone, chat, pair
from tests.support.plain_http import async_client

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
CHAT = "/v1/chat/completions"
KEY = "sk-a-key-of-ours"
OPEN_METRICS = "application/openmetrics-text; version=1.0.0"
#: The readings of a card in the driver's units: milliwatts and millijoules.
METERS: Mapping[str, Any] = {
    "PowerUsage": 350_000,
    "EnforcedPowerLimit": 450_000,
    "UtilizationRates": SimpleNamespace(gpu=97, memory=60),
    "TotalEnergyConsumption": 7_200_000,
}
#: A chat page's own call.
TASK = {"x-task": "title_generation"}


class Page:
    """The samples of one scrape."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.samples = [sample for family in classic(text) for sample in family.samples]

    def all(self, name: str, /, **labels: str) -> list[float]:
        """The values of all series of this name that have these labels."""
        return [
            sample.value
            for sample in self.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]

    def one(self, name: str, /, **labels: str) -> float | None:
        """The value of the only series of this name and labels; None where there is none."""
        found = self.all(name, **labels)
        assert len(found) <= 1, f"{name}{labels}: {found}"
        return found[0] if found else None


async def scrape(running: Running) -> Page:
    answer = await running.http.get("/metrics")
    assert answer.status_code == 200, answer.text
    return Page(answer.text)


async def scrape_with(
    running: Running, name: str, value: float | None = None, **labels: str
) -> Page:
    """A scrape that has this sample, and with this value, if one is given."""
    async with asyncio.timeout(5):
        while True:
            page = await scrape(running)
            found = page.all(name, **labels)
            if found and (value is None or value in found):
                return page
            await asyncio.sleep(0.01)


async def ask(running: Running, **fields: Any) -> httpx.Response:
    headers = fields.pop("headers", None)
    return await running.http.post(CHAT, json=chat(**fields), headers=headers)


#: The machine and the engines are looked at again and again.
OFTEN = Timings(meter_interval_s=0.01, probe_interval_healthy_s=0.05)


def cards(**says: Any) -> Nvml:
    """Two cards with these readings."""
    return Nvml(library=two_4090(**{**METERS, **says}))


# Requests


async def test_a_streamed_answer_is_counted_and_timed(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    ollama.ttft_s, ollama.gap_s, ollama.tokens = 0.06, 0.03, 5
    async with start_gateway(**pair(ollama, vllm)) as running:
        await ask(running, stream=True)
        page = await scrape(running)

    place = {"model": "m", "lane": "ollama"}
    assert (
        page.one(
            "twolane_requests_total", **place, outcome="ok", reason="policy", background="false"
        )
        == 1
    )
    assert page.one("twolane_prompt_tokens_total", **place, background="false") == 1
    assert page.one("twolane_generation_tokens_total", **place, background="false") == 5
    assert page.one("twolane_request_queue_time_seconds_count", model="m", background="false") == 1
    for name, least_s in (
        ("twolane_time_to_first_token_seconds", 0.06),
        ("twolane_time_per_output_token_seconds", 0.03),
        ("twolane_e2e_request_latency_seconds", 0.18),
    ):
        assert page.one(f"{name}_count", **place) == 1
        assert (page.one(f"{name}_sum", **place) or 0) > least_s * 0.95
        buckets = page.all(f"{name}_bucket", **place)
        assert buckets == sorted(buckets)
        assert page.one(f"{name}_bucket", **place, le="+Inf") == 1
    assert page.one("twolane_time_to_first_token_seconds_bucket", **place, le="0.05") == 0
    assert page.one("twolane_time_per_output_token_seconds_bucket", **place, le="0.02") == 0


async def test_a_whole_answer_has_no_first_token_to_time(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm)) as running:
        await ask(running)
        page = await scrape(running)

    assert page.one("twolane_e2e_request_latency_seconds_count", model="m", lane="vllm") == 1
    assert page.all("twolane_time_to_first_token_seconds_count") == []
    assert page.all("twolane_time_per_output_token_seconds_count") == []


async def test_embeddings_are_counted_and_not_timed(start_gateway: StartGateway) -> None:
    async with (
        FakeEngine("ollama", embedding=["e"]) as ollama,
        start_gateway(**alone(ollama, "e")) as running,
    ):
        answer = await running.http.post("/v1/embeddings", json={"model": "m", "input": "a b"})
        page = await scrape(running)

    assert answer.status_code == 200, answer.text
    assert page.one("twolane_requests_total", outcome="ok") == 1
    assert page.all("twolane_e2e_request_latency_seconds_count") == []


async def test_background_calls_are_counted_apart_and_not_timed(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm)) as running:
        await ask(running, headers=TASK, stream=True)
        page = await scrape(running)

    assert page.one("twolane_requests_total", background="true") == 1
    assert page.one("twolane_generation_tokens_total", background="true") == 5
    assert page.all("twolane_e2e_request_latency_seconds_count") == []


async def test_requests_are_counted_by_outcome(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    failures = "twolane_request_failures_total"
    async with start_gateway(**alone(vllm)) as running:
        before = await scrape_with(running, failures)
        await ask(running)
        vllm.script(status(400, "context"), status(500))
        await ask(running)
        await ask(running)
        await ask(running, messages="no list")
        await running.http.post(CHAT, content=b"{")
        vllm.script(Silence())
        asking = asyncio.create_task(ask(running))
        await vllm.until(lambda engine: engine.running)
        asking.cancel()
        await running.until(lambda gateway: not gateway.edge.in_flight)
        page = await scrape(running)

    counted = {
        sample.labels["outcome"]: (sample.labels["model"], sample.value)
        for sample in page.samples
        if sample.name == "twolane_requests_total"
    }
    assert counted["ok"] == ("m", 1)
    assert counted["engine_refused"] == ("m", 1)
    assert counted["engine_failed"] == ("m", 1)
    assert counted["cancelled"] == ("m", 1)
    assert counted["bad_request"][1] >= 1
    assert sum(value for _, value in counted.values()) == 6
    assert (before.one(failures, model="m"), page.one(failures, model="m")) == (0, 1)


async def test_a_request_given_up_in_the_queue_counts_as_queue_time(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm, slots=1)) as running:
        vllm.script(Silence())
        first = asyncio.create_task(ask(running))
        await vllm.until(lambda engine: engine.running)
        second = asyncio.create_task(ask(running))
        await scrape_with(running, "twolane_num_requests_waiting", 1)
        page = await scrape(running)
        for task in (second, first):
            task.cancel()
        await running.until(lambda gateway: not gateway.edge.in_flight)
        after = await scrape(running)

    assert page.one("twolane_demand", model="m") == 2
    assert page.one("twolane_num_requests_running", model="m", lane="vllm") == 1
    assert page.one("twolane_slots", model="m", lane="vllm") == 1
    assert page.all("twolane_request_queue_time_seconds_count") == []
    assert after.one("twolane_request_queue_time_seconds_count", model="m") == 2
    assert after.one("twolane_demand", model="m") == 0


# Why a lane was chosen


async def test_reasons_are_words_of_an_enumeration(start_gateway: StartGateway) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    async with (
        FakeEngine("ollama", ["small:1b"]) as ollama,
        FakeEngine("vllm", ["Small-1B"], tools=True) as vllm,
        start_gateway(**pair(ollama, vllm), timings=OFTEN) as running,
    ):
        await ask(running)
        await ask(running, model="m@vllm")
        await ask(running, tools=[tool])
        await running.http.post("/admin/pin", json={"lane": "vllm"})
        await ask(running)
        await running.http.post("/admin/pin", json={"lane": "auto"})
        ollama.script(status(500))
        await ask(running)
        ollama.down()
        await scrape_with(running, "twolane_replica_up", 0, lane="ollama")
        await ask(running)
        page = await scrape(running)

    reasons = {
        sample.labels["reason"]: sample.labels["lane"]
        for sample in page.samples
        if sample.name == "twolane_requests_total"
    }
    assert reasons == {
        "policy": "ollama",
        "request_pin": "vllm",
        "capability": "vllm",
        "pin": "vllm",
        "failover": "vllm",
        "health": "vllm",
    }
    assert page.one("twolane_retries_total", model="m") == 1
    # What was sent twice has not waited in the queue in between.
    assert page.one("twolane_request_queue_time_seconds_count", model="m") == 5


async def test_a_model_with_one_lane_has_the_reason_only(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm)) as running:
        await ask(running)
        page = await scrape(running)

    assert page.one("twolane_requests_total", reason="only_lane") == 1
    assert page.all("twolane_regret_request_seconds") == []


async def test_regret_and_price_of_a_shared_pair_are_exposed(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**pair(ollama, vllm)) as running:
        await ask(running)
        page = await scrape(running)

    assert page.one("twolane_model_info", model="m", placement="shared") == 1
    assert page.one("twolane_regret_request_seconds", model="m") == 0
    assert (page.one("twolane_move_price_request_seconds", model="m") or 0) > 0
    assert page.one("twolane_lane_chosen", model="m", lane="ollama") == 1
    assert page.one("twolane_lane_chosen", model="m", lane="vllm") == 0
    assert page.one("twolane_policy_moves_total", model="m") == 0


# Engines


async def test_an_engine_that_is_down_has_no_reported_values(
    ollama: FakeEngine, vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**pair(ollama, vllm), timings=OFTEN) as running:
        name = "twolane_engine_num_requests_running"
        before = await scrape_with(running, name, lane="vllm", replica="0")
        vllm.down()
        after = await scrape_with(running, "twolane_replica_up", 0, lane="vllm")

    assert before.one("twolane_replica_up", lane="vllm", replica="0") == 1
    assert before.one("twolane_slots_usable", lane="vllm") == 32
    assert after.one("twolane_slots_usable", lane="vllm") == 0
    assert after.one("twolane_replica_up", lane="ollama") == 1
    assert after.one(name, lane="vllm") is None


async def test_values_that_ollama_does_not_export_are_read_from_its_api(
    start_gateway: StartGateway,
) -> None:
    loaded, part = "twolane_engine_model_loaded", "twolane_engine_model_on_gpu_ratio"
    async with (
        FakeEngine("ollama", ["small:1b"], on_gpu=0.75) as ollama,
        start_gateway(**alone(ollama, "small:1b"), timings=OFTEN) as running,
    ):
        before = await scrape_with(running, loaded)
        await ask(running)
        await ollama.load("small:1b")
        after = await scrape_with(running, part)

    assert before.one(loaded, model="m", lane="ollama", replica="0") == 0
    assert before.one(part) is None, "what is not loaded is nowhere"
    assert after.one(part, model="m", lane="ollama") == pytest.approx(0.75, abs=0.01)


# The GPU


async def test_the_holder_of_the_gpu_and_the_cost_of_hand_overs_are_exposed(
    box: Box, start_gateway: StartGateway
) -> None:
    box.vllm.wake_s = 0.2
    async with serving(start_gateway, box) as served:
        before = await scrape(served.running)
        await served.pin("vllm")
        under_way = await scrape_with(served.running, "twolane_gpu_state", 1, state="loading")
        await served.ask("waits")
        await served.until("vllm")
        after = await scrape(served.running)
        await served.release()
        released = await scrape_with(served.running, "twolane_gpu_state", 1, state="free")

    assert before.one("twolane_model_info", placement="exclusive") == 1
    assert before.one("twolane_gpu_holder", engine="ollama") == 1
    assert under_way.one("twolane_gpu_holder", engine="none") == 1
    assert sum(under_way.all("twolane_gpu_state")) == 1
    assert after.one("twolane_gpu_holder", engine="vllm") == 1
    assert after.one("twolane_policy_moves_total") == 1
    move = {"source": "ollama", "target": "vllm", "outcome": "done"}
    assert after.one("twolane_gpu_handover_seconds_count", **move) == 1
    assert (after.one("twolane_gpu_handover_seconds_sum", **move) or 0) >= 0.2
    assert before.one("twolane_gpu_handover_seconds_count", **move) == 0, "not yet, but there"
    assert (after.one("twolane_gpu_handover_waited_request_seconds_total", **move) or 0) > 0
    assert released.one("twolane_gpu_released") == 1
    assert released.one("twolane_gpu_holder", engine="none") == 1


async def test_a_failed_hand_over_is_counted_as_failed_without_its_text(
    box: Box, start_gateway: StartGateway
) -> None:
    async with serving(start_gateway, box, **SHORT) as served:
        box.vllm.script(status(500, "words of an engine"), path="/wake_up")
        await served.pin("vllm")
        name = "twolane_gpu_handover_seconds_count"
        page = await scrape_with(served.running, name, target="vllm", outcome="failed")

    assert "words of an engine" not in page.text


async def test_readings_of_the_cards_are_in_base_units(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm), nvml=cards(), timings=OFTEN) as running:
        page = await scrape_with(running, "twolane_power_watts")

    first = {
        "twolane_gpu_memory_total_bytes": 24 * GIB,
        "twolane_gpu_memory_used_bytes": 21 * GIB,
        "twolane_gpu_power_watts": 350,
        "twolane_gpu_power_limit_watts": 450,
        "twolane_gpu_temperature_celsius": 61,
        "twolane_gpu_utilization_ratio": 0.97,
        "twolane_gpu_energy_joules_total": 7_200,
    }
    assert {name: page.one(name, gpu="0") for name in first} == first
    assert page.one("twolane_gpu_info", gpu="1", name="NVIDIA GeForce RTX 4090") == 1
    assert page.one("twolane_power_watts") == 700


async def test_a_reading_that_a_card_lacks_has_no_sample(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    silent = cards(**dict.fromkeys((*METERS, "Temperature"), NotSupported()))
    async with start_gateway(**alone(vllm), nvml=silent) as running:
        page = await scrape_with(running, "twolane_gpu_info")

    assert page.one("twolane_gpu_memory_total_bytes", gpu="0") == 24 * GIB
    for name in ("power_watts", "temperature_celsius", "utilization_ratio", "energy_joules_total"):
        assert page.all(f"twolane_gpu_{name}") == []
    assert page.one("twolane_power_watts") is None


async def test_without_a_driver_there_are_no_cards_and_no_watts(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm), nvml=Nvml(library=Told())) as running:
        await ask(running)
        page = await scrape_with(running, "twolane_used_seconds_total")
        said = (await running.http.get("/status")).json()

    for name in ("twolane_gpu_info", "twolane_power_watts", "twolane_energy_joules_total"):
        assert page.all(name) == []
    assert said["cost"] is None


class Hanging(Told):
    """A driver that does not answer until `answers` is set."""

    def __init__(self) -> None:
        super().__init__([Info(24 * GIB, 24 * GIB)])
        self.asked, self.answers = threading.Event(), threading.Event()

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self.asked.set()
        self.answers.wait(20)
        return super().nvmlDeviceGetCount()


async def test_a_driver_that_hangs_blocks_neither_a_scrape_nor_the_meter(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    driver = Hanging()
    given = {"cost": {"watts": 500}}
    async with start_gateway(
        **alone(vllm), **given, nvml=Nvml(library=driver), timings=OFTEN
    ) as running:
        try:
            await running.until(lambda _: driver.asked.is_set())
            page = await scrape_with(running, "twolane_energy_joules_total", lane="idle")
        finally:
            driver.answers.set()

    assert page.all("twolane_gpu_info") == []
    assert page.one("twolane_power_watts") == 500


def test_old_readings_of_cards_are_not_exposed() -> None:
    metrics = Metrics({}, Prices())
    metrics._cards = [Reading(0, "A card", 24 * GIB, GIB, watts=350)]
    metrics._cards_at = time.monotonic() - Timings().readings_valid_s
    metrics.sample(time.monotonic())

    assert page_of(metrics).all("twolane_gpu_info") == []
    assert metrics.meter.watts is None


# Prices


async def test_the_cost_of_tokens_is_in_the_metrics_and_in_the_status(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    vllm.gap_s = 0.03
    prices = {"per_kwh": 0.3, "rent_per_hour": 1.8, "api_per_million": 0.9, "currency": "USD"}
    async with start_gateway(**alone(vllm), cost=prices, nvml=cards(), timings=OFTEN) as running:
        await scrape_with(running, "twolane_power_watts")
        await ask(running)
        page = await scrape_with(
            running, "twolane_cost_per_million_tokens", of="electricity", lane="vllm"
        )
        said = (await running.http.get("/status")).json()["cost"]

    assert {
        sample.labels["of"]: sample.value
        for sample in page.samples
        if sample.name == "twolane_price" and sample.labels["currency"] == "USD"
    } == {name: price for name, price in prices.items() if name != "currency"}
    whole = said["whole"]
    assert (said["currency"], said["watts"], said["watts_are"]) == ("USD", 700, "measured")
    assert (whole["tokens"], said["lanes"]["vllm"]["tokens"]) == (5, 5)
    # By hand, from what it says was used.
    kwh, hours = whole["joules"] / 3.6e6, whole["seconds"] / 3600
    assert whole["per_million"]["electricity"] == pytest.approx(kwh * 0.3 / 5 * 1e6)
    assert whole["per_million"]["rent"] == pytest.approx(hours * 1.8 / 5 * 1e6)
    assert whole["per_million"]["api"] == 0.9
    assert page.one("twolane_cost_per_million_tokens", lane="all", of="api") == 0.9
    spent, tokens = sum(page.all("twolane_energy_joules_total")), 5
    assert page.one("twolane_tokens_per_joule", lane="all") == pytest.approx(tokens / spent)


# Labels


def exchange(**said: Any) -> Exchange:
    """An exchange that is over."""
    done = {"path": CHAT, "model": "m", "outcome": "ok", "began": 1.0, "sent": 1.1, "first": 1.2,
            "ended": 2.0, "attempts": 1, "stream": True, "usage": sse.Usage(7, 9)}  # fmt: skip
    return Exchange("req_1", **{**done, **said})


def page_of(metrics: Metrics) -> Page:
    return Page(metrics.exposition("")[0].decode())


def test_names_and_codes_of_others_make_no_series() -> None:
    metrics = Metrics({}, Prices())
    metrics.write(exchange(model="unknown", outcome="model_not_found", usage=None))
    metrics.write(exchange(model="unknown", outcome="engine_refused", usage=None))
    before = len(page_of(metrics).samples)
    for number in range(10_000):
        metrics.write(exchange(model=f"model-{number}", outcome="model_not_found", usage=None))
        metrics.write(exchange(outcome=f"code-{number}", usage=None))
    page = page_of(metrics)

    assert len(page.samples) == before
    assert page.one("twolane_requests_total", model="none", outcome="engine_refused") == 10_001


async def test_an_engines_own_error_code_is_no_label(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    said = {"message": "no", "type": "weird", "param": None, "code": "weird-2718"}
    async with start_gateway(**alone(vllm)) as running:
        vllm.script(status(400, body={"error": said}))
        answer = await ask(running)
        page = await scrape(running)

    assert "weird-2718" in answer.text
    assert "weird" not in page.text
    assert page.one("twolane_requests_total", outcome="engine_refused") == 1


async def test_no_prompt_no_key_and_no_address_is_in_the_metrics(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    key = {"authorization": f"Bearer {KEY}"}
    engines = alone(vllm)
    engines["engines"]["vllm"]["api_key"] = "sk-the-engines"
    async with start_gateway(**engines, api_keys=[KEY]) as running:
        await ask(running, messages=[{"role": "user", "content": "xylophone"}], headers=key)
        await ask(running, model="zither", headers=key)
        await ask(running, headers={"authorization": "Bearer sk-somebody"})
        text = (await running.http.get("/metrics", headers=key)).text

    assert "twolane_requests_total" in text
    for secret in ("xylophone", "zither", "sk-", "127.0.0.1", str(vllm.port)):
        assert secret not in text


def test_every_error_code_is_its_own_label() -> None:
    metrics = Metrics({}, Prices())
    codes = set(error_codes(GatewayError))
    for code in codes:
        metrics.write(exchange(outcome=code, usage=None))

    counted = [s for s in page_of(metrics).samples if s.name == "twolane_requests_total"]
    assert {"queue_full", "waited_too_long", "no_engine", "draining", "engine_silent"} <= codes
    assert {sample.labels["outcome"] for sample in counted} == codes
    assert not FAILED_OUTCOMES - codes - ENDINGS


# The text


@pytest.mark.parametrize(("accept", "parse", "kind"), [
    ("", classic, "text/plain; version=0.0.4"),
    (OPEN_METRICS, open_metrics, "application/openmetrics-text"),
])  # fmt: skip
async def test_the_parsers_of_prometheus_read_the_metrics(
    box: Box, start_gateway: StartGateway, accept: str, parse: Any, kind: str
) -> None:
    settings = {**box.settings(), "cost": {"per_kwh": 0.3, "watts": 700}, "nvml": cards()}
    async with start_gateway(**settings) as running:
        await running.until(lambda gateway: gateway.gpu and gateway.gpu.state.layout)
        await ask(running, stream=True)
        await scrape_with(running, "twolane_gpu_info")
        answer = await running.http.get("/metrics", headers={"accept": accept})

    families = {family.name: family for family in parse(answer.text)}
    assert answer.headers["content-type"].startswith(kind)
    assert answer.headers["cache-control"] == "no-store"
    assert families["twolane_time_to_first_token_seconds"].type == "histogram"
    assert families["twolane_requests"].type == "counter"
    assert not [name for name in families if name.endswith("_created")]
    assert "_created" not in answer.text


def documented() -> str:
    """The table that the document must have."""
    rows = [
        f"| `{name}` | {family.type} | {', '.join(names) or '-'} | {family.documentation} |"
        for family in Metrics({}, Prices())._registry.collect()
        if family.name.startswith("twolane_")
        for name in [family.name + ("_total" if family.type == "counter" else "")]
        for names in [labels_of(name)]
    ]
    return "\n".join(["| name | type | labels | |", "|---|---|---|---|", *sorted(rows)])


def labels_of(name: str) -> tuple[str, ...]:
    """The labels of a metric, whether looked up or counted by prometheus_client."""
    looked_up = {**GAUGES, **COUNTERS}
    if name in looked_up:
        return looked_up[name][1]
    counted = Metrics({}, Prices())._registry._names_to_collectors[name]
    labels: tuple[str, ...] = getattr(counted, "_labelnames", ())
    return labels


def test_every_metric_is_documented_as_it_is() -> None:
    assert documented() in DOCUMENT.read_text(), f"write this into {DOCUMENT.name}:\n{documented()}"


# Where it is served


@contextlib.asynccontextmanager
async def own_port(start_gateway: StartGateway, **settings: Any) -> AsyncIterator[Any]:
    """A gateway whose metrics have their own port, and a client for it."""
    async with FakeEngine("vllm", ["Small-1B"]) as vllm:
        settings = {**alone(vllm), "metrics": {"port": 0}, "api_keys": [KEY], **settings}
        async with start_gateway(**settings) as running:
            server = running.gateway.metrics_server
            assert server is not None
            async with async_client() as client:
                yield running, server, client


async def test_the_metrics_port_requires_no_key(start_gateway: StartGateway) -> None:
    async with own_port(start_gateway) as (_, server, client):
        page = await client.get(server.url)
        other = await client.get(server.url.replace("/metrics", "/status"))
        posted = await client.post(server.url)

    assert page.status_code == 200
    assert Page(page.text).one("twolane_build_info") == 1
    assert (other.status_code, posted.status_code) == (404, 405)


@pytest.mark.parametrize("headers", [
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"host": "evil.example"},
    {"host": "evil.example:9400"},
    {"host": "127.0.0.1.evil.example"},
    {"host": "[::1"},
    {"host": ""},
])  # fmt: skip
async def test_the_metrics_port_refuses_pages_of_other_sites(
    start_gateway: StartGateway, headers: dict[str, str]
) -> None:
    async with own_port(start_gateway) as (_, server, client):
        answer = await client.get(server.url, headers=headers)

    assert answer.status_code == 403, answer.text
    assert answer.json()["error"]["code"] == "forbidden"


@pytest.mark.parametrize(
    "host", ["127.0.0.1:9400", "[::1]:9400", "localhost", "gateway:9400", socket.gethostname()]
)
async def test_the_metrics_port_answers_local_names(start_gateway: StartGateway, host: str) -> None:
    async with own_port(start_gateway) as (_, server, client):
        answer = await client.get(server.url, headers={"host": host})

    assert answer.status_code == 200, answer.text


async def test_the_gateways_port_names_the_metrics_port(
    start_gateway: StartGateway,
) -> None:
    async with own_port(start_gateway) as (running, server, _):
        stranger = await running.http.get("/metrics")
        known = await running.http.get("/metrics", headers={"authorization": f"Bearer {KEY}"})

    assert stranger.status_code == 401
    assert known.status_code == 404
    assert str(server.port) in known.json()["error"]["message"]


async def test_without_their_own_port_metrics_are_behind_the_key(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    async with start_gateway(**alone(vllm), api_keys=[KEY]) as running:
        answers = [
            await running.http.get("/metrics", headers=headers)
            for headers in (
                {},
                {"authorization": "Bearer sk-somebody"},
                {"authorization": f"Bearer {KEY}", "host": "chat.example.com"},
            )
        ]

    assert [answer.status_code for answer in answers] == [401, 401, 200]


async def test_a_metrics_port_in_use_is_an_error_of_one_line(
    vllm: FakeEngine, start_gateway: StartGateway
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError) as caught:
            async with start_gateway(**alone(vllm), metrics={"port": port}):
                pass

    [line] = str(caught.value).splitlines()
    assert line.startswith(f"metrics: 127.0.0.1:{port} cannot be listened on (Address already in")
    assert line.endswith("choose another metrics.port")


async def test_metrics_cannot_have_the_gateways_own_port(start_gateway: StartGateway) -> None:
    with pytest.raises(SettingsError, match=r"metrics\.port: 8123 is the gateway's own"):
        async with start_gateway(port=8123, metrics={"port": 8123}):
            pass


async def test_the_metrics_port_is_closed_with_the_gateway(start_gateway: StartGateway) -> None:
    async with own_port(start_gateway) as (_, server, client):
        assert (await client.get(server.url)).status_code == 200

    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", server.port), timeout=5)


async def test_serve_prints_the_address_of_the_metrics_and_ends_with_them(
    vllm: FakeEngine, tmp_path: Path
) -> None:
    file = tmp_path / "twolane.yaml"
    file.write_text(json.dumps({**alone(vllm), "port": 0, "metrics": {"port": 0}}))
    serving = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "serve", "--config", str(file), stdout=subprocess.PIPE
    )
    try:
        assert serving.stdout is not None
        async with asyncio.timeout(20):
            while b"Metrics:" not in (line := await serving.stdout.readline()):
                assert line, "it ended"
        url = line.decode().split()[1]
        async with async_client() as client:
            answer = await client.get(url)
    finally:
        serving.terminate()
        await serving.communicate()

    assert Page(answer.text).one("twolane_build_info") == 1
    assert serving.returncode == 0
