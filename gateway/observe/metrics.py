"""What Prometheus is told: everything that passes through us, and how things stand now.

What is over is counted when it is over, by prometheus_client. All else is looked up when
somebody asks, from what the gateway knows anyway. Labels are models, lanes and words of
ours: a model that was asked for and is not there, a key, a prompt or an address never
becomes one. What is not known has no sample, rather than a zero.

Names and units are the field's: base units, `_total` for what only grows, and vLLM's names
where there is one.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import TypeAlias

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from backends import calls
from gateway.errors import GatewayError
from gateway.gpu.handover import Gpu, Passage, Step
from gateway.gpu.memory import MemoryUnknown, Nvml, Reading, drawn
from gateway.observe.cost import Meter, bill
from gateway.observe.status import Bill
from gateway.relay.exchange import Exchange
from gateway.routing.breaker import ReplicaState
from gateway.routing.scheduler import Lane
from gateway.serving.catalogue import Model
from gateway.settings import Prices, Timings

#: Upper bounds of the histograms' buckets, seconds.
TTFT_S = (0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)
TPOT_S = (0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1)
E2E_S = (0.25, 0.5, 1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 120, 240, 600)
QUEUE_S = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 45, 60, 120, 600)
MOVE_S = (0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 900)

#: In place of a label that there is none of.
NONE = "none"
#: How an exchange ends besides with an error for its client.
ENDINGS = frozenset(("ok", "cancelled", "truncated", "internal_error"))
#: An engine's refusal comes with the engine's own code, which may be any word.
REFUSED = "engine_refused"
#: It was not the sender's doing, nor the operator's.
FAILURES = frozenset(
    (
        "engine_busy", "engine_failed", "engine_silent", "internal_error",
        "no_engine", "queue_full", "truncated", "waited_too_long",
    )
)  # fmt: skip
#: Who ended like this without a slot has waited for one in vain.
IN_VAIN = frozenset(("cancelled", "waited_too_long"))

#: What is looked up when somebody asks: what it is, and its labels.
GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "twolane_build_info": ("1; which version this is.", ("version",)),
    "twolane_model_info": ("1 for each model; where its lanes are.", ("model", "placement")),
    "twolane_demand": ("Foreground requests that run or wait.", ("model",)),
    "twolane_num_requests_waiting": ("Requests in the queue, background too.", ("model",)),
    "twolane_regret_request_seconds": (
        "Lost by staying on the lane, net. One sum for all models in exclusive placement.",
        ("model",),
    ),
    "twolane_move_price_request_seconds": (
        "What leaving the lane costs now: at this regret it is left.",
        ("model",),
    ),
    "twolane_lane_chosen": ("1: the policy sends requests here.", ("model", "lane")),
    "twolane_num_requests_running": ("Requests that have a slot.", ("model", "lane")),
    "twolane_slots": ("Slots when all is well.", ("model", "lane")),
    "twolane_slots_usable": (
        "Slots that may be used now, taken ones included.",
        ("model", "lane"),
    ),
    "twolane_replica_up": ("1: it may be given work.", ("model", "lane", "replica")),
    "twolane_engine_num_requests_running": (
        "By the engine's own count.",
        ("model", "lane", "replica"),
    ),
    "twolane_engine_num_requests_waiting": (
        "By the engine's own count.",
        ("model", "lane", "replica"),
    ),
    "twolane_engine_model_loaded": (
        "1: in memory, by the engine's word.",
        ("model", "lane", "replica"),
    ),
    "twolane_engine_model_on_gpu_ratio": (
        "Which part of a loaded model is in GPU memory; the rest is on the CPU, and slow.",
        ("model", "lane", "replica"),
    ),
    "twolane_gpu_holder": ("1: this engine holds the GPU.", ("engine",)),
    "twolane_gpu_state": ("1: where the GPU is now.", ("state",)),
    "twolane_gpu_released": ("1: the operator has released it.", ()),
    "twolane_gpu_info": ("1 for each card.", ("gpu", "name")),
    "twolane_gpu_memory_total_bytes": ("Memory of the card.", ("gpu",)),
    "twolane_gpu_memory_used_bytes": ("Of it, what somebody has.", ("gpu",)),
    "twolane_gpu_power_watts": ("What it draws.", ("gpu",)),
    "twolane_gpu_power_limit_watts": ("What it may draw.", ("gpu",)),
    "twolane_gpu_temperature_celsius": ("Of the chip.", ("gpu",)),
    "twolane_gpu_utilization_ratio": ("Share of the time in which it computed.", ("gpu",)),
    "twolane_power_watts": ("Drawn now: by the cards, or as given.", ()),
    "twolane_price": (
        "As given: of a kWh, of an hour of a rented machine, of a million tokens elsewhere.",
        ("of", "currency"),
    ),
    "twolane_tokens_per_joule": (
        "Output tokens a joule since the start, idle energy included; `all` is the machine.",
        ("lane",),
    ),
    "twolane_cost_per_million_tokens": (
        "Of output tokens since the start, idle time included; `all` is the machine.",
        ("lane", "of", "currency"),
    ),
}
COUNTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "twolane_policy_moves_total": (
        "How often the policy has moved. One number for all models in exclusive placement.",
        ("model",),
    ),
    "twolane_gpu_energy_joules_total": (
        "Since the card's driver was loaded, as it counts.",
        ("gpu",),
    ),
    "twolane_used_seconds_total": (
        "Seconds of the machine by who ran; `idle` while nobody did.",
        ("lane",),
    ),
    "twolane_energy_joules_total": (
        "Energy by who ran; `idle` while nobody did. Of the cards, or of the given watts.",
        ("lane",),
    ),
}
#: Name, values of its labels, value; None: not known.
Told: TypeAlias = tuple[str, tuple[str, ...], float | None]


class Metrics(Collector):
    """Counts what is over, looks at the cards, and tells all of it to who asks.

    Args:
        models: Those that are served, by name, as they are at the moment.
        prices: What energy and hours cost, as far as somebody said so.

    Attributes:
        gpu: What the models in an exclusive placement share, if there is any; see `follow`.
        meter: What the machine has used.
    """

    def __init__(
        self, models: Mapping[str, Model], prices: Prices, timings: Timings | None = None
    ) -> None:
        self.gpu: Gpu | None = None
        self.meter = Meter()
        self._models = models
        self._prices = prices
        self._timings = timings or Timings()
        self._version = importlib.metadata.version("twolane")
        self._outcomes = ENDINGS | set(_codes(GatewayError))
        self._cards: Sequence[Reading] = ()
        self._cards_at = -math.inf
        self._registry = registry = CollectorRegistry()
        # Else there is a series beside each that nobody reads.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry.register(self)
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "twolane_requests_total",
            "Requests that are over. `reason` is why the lane was chosen, `background` a chat "
            "page's own call for a title and the like.",
            ("model", "lane", "outcome", "reason", "background"),
            registry=registry,
        )
        self._failures = Counter(
            "twolane_request_failures_total",
            "Of those in the foreground, what failed and was not their sender's doing.",
            ("model",),
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "twolane_prompt_tokens_total",
            "Tokens of prompts, as engines counted them.",
            ("model", "lane", "background"),
            registry=registry,
        )
        self._generation_tokens = Counter(
            "twolane_generation_tokens_total",
            "Tokens of answers, as engines counted them.",
            ("model", "lane", "background"),
            registry=registry,
        )
        self._retries = Counter(
            "twolane_retries_total",
            "Second attempts, on another replica or lane.",
            ("model",),
            registry=registry,
        )
        self._ttft = Histogram(
            "twolane_time_to_first_token_seconds",
            "From a streamed request to the first of its answer, foreground.",
            ("model", "lane"),
            registry=registry,
            buckets=TTFT_S,
        )
        self._tpot = Histogram(
            "twolane_time_per_output_token_seconds",
            "(last - first) / (tokens - 1) of a streamed answer, foreground.",
            ("model", "lane"),
            registry=registry,
            buckets=TPOT_S,
        )
        self._e2e = Histogram(
            "twolane_e2e_request_latency_seconds",
            "From a request to the end of its answer, foreground; not embeddings.",
            ("model", "lane"),
            registry=registry,
            buckets=E2E_S,
        )
        self._queued = Histogram(
            "twolane_request_queue_time_seconds",
            "From a request to its slot, or until it was given up; not of second attempts.",
            ("model", "background"),
            registry=registry,
            buckets=QUEUE_S,
        )
        self._moved = Histogram(
            "twolane_gpu_handover_seconds",
            "What hand-overs of the GPU took.",
            ("source", "target", "outcome"),
            registry=registry,
            buckets=MOVE_S,
        )
        self._waited = Counter(
            "twolane_gpu_handover_waited_request_seconds_total",
            "Request-seconds that people waited because of hand-overs.",
            ("source", "target", "outcome"),
            registry=registry,
        )

    def follow(self, gpu: Gpu) -> None:
        """Tell of who has the GPU, and count the times it changes hands."""
        self.gpu = gpu
        gpu.on_passage = self.passed
        # Prometheus sees no growth in what comes up as one; what is rare has to be there before.
        for target in gpu.occupants:
            for source in {NONE, *gpu.occupants} - {target}:
                self._moved.labels(source, target, "done")
                self._waited.labels(source, target, "done")

    # Counting

    def write(self, exchange: Exchange) -> None:
        """An exchange is over; as `edge.Log`."""
        model = exchange.model if exchange.model in self._models else NONE
        lane = exchange.lane or NONE
        outcome = exchange.outcome if exchange.outcome in self._outcomes else REFUSED
        background = "true" if exchange.background else "false"
        self._requests.labels(model, lane, outcome, exchange.cause or NONE, background).inc()
        if outcome in FAILURES and not exchange.background:
            self._failures.labels(model).inc()
        if exchange.attempts > 1:
            self._retries.labels(model).inc(exchange.attempts - 1)
        elif model != NONE and (exchange.sent or outcome in IN_VAIN):
            waited = (exchange.sent or exchange.ended) - exchange.began
            self._queued.labels(model, background).observe(waited)
        if (usage := exchange.usage) is not None:
            self._prompt_tokens.labels(model, lane, background).inc(usage.prompt_tokens)
            self._generation_tokens.labels(model, lane, background).inc(usage.completion_tokens)
            self.meter.add_tokens(lane, usage.completion_tokens)
        if outcome == "ok" and not exchange.background and exchange.path != calls.EMBEDDINGS:
            self._time(exchange, model, lane)

    def _time(self, exchange: Exchange, model: str, lane: str) -> None:
        self._e2e.labels(model, lane).observe(exchange.ended - exchange.began)
        if exchange.stream and exchange.first:
            self._ttft.labels(model, lane).observe(exchange.first - exchange.began)
            tokens = exchange.usage.completion_tokens if exchange.usage is not None else 0
            if tokens > 1:
                took = (exchange.ended - exchange.first) / (tokens - 1)
                self._tpot.labels(model, lane).observe(took)

    def passed(self, passage: Passage) -> None:
        """A hand-over is over; for `handover.Gpu.on_passage`."""
        outcome = passage.outcome.partition(":")[0]
        labels = (passage.source or NONE, passage.target, outcome)
        self._moved.labels(*labels).observe(sum(passage.steps.values()))
        self._waited.labels(*labels).inc(passage.waited)

    # Looking

    async def watch(self, nvml: Nvml) -> None:
        """Look once a second at who runs and what the cards draw, until cancelled."""
        async with asyncio.TaskGroup() as both:
            both.create_task(self._read(nvml))
            both.create_task(self._look())

    async def _read(self, nvml: Nvml) -> None:
        """Ask the driver again and again, however long an answer takes."""
        while True:
            try:
                self._cards = await asyncio.to_thread(nvml.readings)
            except MemoryUnknown:
                self._cards = ()
            self._cards_at = time.monotonic()
            timings = self._timings
            await asyncio.sleep(timings.meter_interval_s if self._cards else timings.driver_retry_s)

    async def _look(self) -> None:
        while True:
            self.sample(time.monotonic())
            await asyncio.sleep(self._timings.meter_interval_s)

    def sample(self, now: float) -> None:
        """At this moment, by the steady clock, somebody looks at what the machine uses."""
        running: dict[str, int] = {}
        for model in self._models.values():
            self._failures.labels(model.name)  # to be there before the first, as in `follow`
            for name, lane in model.admission.scheduler.lanes.items():
                running[name] = running.get(name, 0) + lane.running
        self.meter.sample(now, self._prices.watts or drawn(self._known(now)), running)

    def _known(self, now: float) -> Sequence[Reading]:
        """What the cards have said, as long as that is worth something."""
        return self._cards if now - self._cards_at < self._timings.readings_valid_s else ()

    # Telling

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """All of it as text, and the content type; `accept` is what the asker reads."""
        encode, kind = choose_encoder(accept)
        return encode(self._registry), kind

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        """What is looked up, as prometheus_client asks for it."""
        families = {
            name: kind(name, about, labels=labels)
            for kind, told in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS))
            for name, (about, labels) in told.items()
        }
        for name, labels, value in self._told():
            if value is not None:
                families[name].add_metric(labels, value)
        return families.values()

    def _told(self) -> Iterator[Told]:
        yield "twolane_build_info", (self._version,), 1
        for model in self._models.values():
            yield from _standing(model)
        if self.gpu is not None:
            yield from _holding(self.gpu)
        for card in self._known(time.monotonic()):
            yield from _shown(card)
        yield from self._used()

    def _used(self) -> Iterator[Told]:
        """What was used, and what a token has cost of it."""
        meter, prices = self.meter, self._prices
        for lane, use in {"idle": meter.idle, **meter.busy}.items():
            yield "twolane_used_seconds_total", (lane,), use.seconds
            yield "twolane_energy_joules_total", (lane,), use.joules or None
        yield "twolane_power_watts", (), meter.watts
        for price in ("per_kwh", "rent_per_hour", "api_per_million"):
            yield "twolane_price", (price, prices.currency), getattr(prices, price)
        for lane, use in {"all": meter.total(), **meter.shares()}.items():
            yield "twolane_tokens_per_joule", (lane,), use.tokens_per_joule
            costs = bill(use, prices)
            for part in fields(Bill):
                labels = (lane, part.name, prices.currency)
                yield "twolane_cost_per_million_tokens", labels, getattr(costs, part.name)


def _standing(model: Model) -> Iterator[Told]:
    """How a model and its lanes stand now."""
    name, scheduler = model.name, model.admission.scheduler
    policy = scheduler.policy
    placement = "exclusive" if scheduler.exclusive else "shared"
    yield "twolane_model_info", (name, placement), 1
    yield "twolane_demand", (name,), scheduler.demand
    yield "twolane_num_requests_waiting", (name,), scheduler.waiting
    yield "twolane_policy_moves_total", (name,), policy.moves
    if len(scheduler.lanes) > 1 or scheduler.exclusive:
        yield "twolane_regret_request_seconds", (name,), policy.regret
        yield "twolane_move_price_request_seconds", (name,), policy.price
    for lane in scheduler.lanes.values():
        place = (name, lane.name)
        yield "twolane_lane_chosen", place, lane.name == policy.lane
        yield "twolane_num_requests_running", place, lane.running
        yield "twolane_slots", place, lane.slots
        yield "twolane_slots_usable", place, 0 if lane.barred else lane.room
        yield from _replicas(model, lane)


def _replicas(model: Model, lane: Lane) -> Iterator[Told]:
    """How a lane's servers stand, and what they say of themselves."""
    for number, replica in enumerate(lane.replicas):
        place = (model.name, lane.name, str(number))
        server = model.admission.servers[replica]
        yield "twolane_replica_up", place, replica.room > 0 and not lane.barred
        if server.breaker.state is ReplicaState.READY:  # else what it said before is over
            said = server.activity
            yield "twolane_engine_num_requests_running", place, said.running
            yield "twolane_engine_num_requests_waiting", place, said.waiting
            yield "twolane_engine_model_loaded", place, server.loaded
            yield "twolane_engine_model_on_gpu_ratio", place, said.on_gpu


def _holding(gpu: Gpu) -> Iterator[Told]:
    """Who has the GPU, and where it is on its way."""
    holder = gpu.holder if gpu.step is Step.HELD and gpu.holder else NONE
    for name in (*gpu.occupants, NONE):
        yield "twolane_gpu_holder", (name,), name == holder
    for step in Step:
        yield "twolane_gpu_state", (step.value,), step is gpu.step
    yield "twolane_gpu_released", (), gpu.released


def _shown(card: Reading) -> Iterator[Told]:
    """What a card's meters show."""
    one = (str(card.index),)
    yield "twolane_gpu_info", (*one, card.name), 1
    yield "twolane_gpu_memory_total_bytes", one, card.memory_total
    yield "twolane_gpu_memory_used_bytes", one, card.memory_used
    yield "twolane_gpu_power_watts", one, card.watts
    yield "twolane_gpu_power_limit_watts", one, card.watts_limit
    yield "twolane_gpu_temperature_celsius", one, card.celsius
    yield "twolane_gpu_utilization_ratio", one, card.utilization
    yield "twolane_gpu_energy_joules_total", one, card.joules


def _codes(kind: type[GatewayError]) -> Iterator[str]:
    """The codes of an error and of all below it."""
    if kind.code is not None:
        yield kind.code
    for below in kind.__subclasses__():
        yield from _codes(below)
