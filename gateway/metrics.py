"""What Prometheus is told: everything that passes through us, and how things stand now.

A request costs a few plain additions, when it is over. All else is looked up when somebody
asks, from what the gateway knows anyway, so that who does not ask pays nothing. Labels are
models, lanes and words of ours: a model that was asked for and is not there, a key, a prompt
or an address never becomes one. What is not known has no sample, rather than a zero.

Names and units are the field's: base units, `_total` for what only grows, and vLLM's names
where there is one.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import math
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from typing import TypeAlias

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from backends import base
from backends.base import Readiness
from gateway.catalogue import Model
from gateway.cost import Bill, Meter, Use, bill
from gateway.errors import GatewayError
from gateway.gpu import MemoryUnknown, Nvml, Reading
from gateway.handover import Gpu, Passage, Step
from gateway.relay import Exchange
from gateway.settings import Cost

#: How often the machine is looked at: who runs, what the cards draw.
LOOK_S = 1.0
#: How long the driver is not asked again after it could not answer: there may be none.
NO_DRIVER_S = 60.0
#: What the cards have said is worth so long, if the driver hangs.
STALE_S = 10.0

#: Upper bounds of the histograms' buckets, seconds.
TTFT_S = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0)
TPOT_S = (0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
E2E_S = (0.25, 0.5, 1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 120.0, 240.0, 600.0)
QUEUE_S = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0, 120.0, 600.0)
MOVE_S = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0, 900.0)

#: In place of a label that there is none of.
NONE = "none"
#: How an exchange ends besides with an error for its client.
ENDINGS = frozenset(("ok", "cancelled", "truncated", "internal_error"))
#: An engine's refusal comes with the engine's own code, which may be any word.
REFUSED = "engine_refused"
#: Who ended like this without a slot has waited for one in vain.
IN_VAIN = frozenset(("cancelled", "waited_too_long"))

Family: TypeAlias = (
    CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily | InfoMetricFamily
)
#: Model, lane.
Place: TypeAlias = tuple[str, str]


class Histogram:
    """How many values lie below each bound, and their sum."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """One more value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def into(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Add it to a family, as Prometheus wants it: cumulated."""
        buckets = []
        total = 0
        for bound, count in zip((*self._bounds, math.inf), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == math.inf else str(bound), float(total)))
        family.add_metric(labels, buckets, self._sum)


@dataclass(slots=True)
class Latency:
    """What the answers of one lane took."""

    ttft: Histogram = field(default_factory=lambda: Histogram(TTFT_S))
    tpot: Histogram = field(default_factory=lambda: Histogram(TPOT_S))
    e2e: Histogram = field(default_factory=lambda: Histogram(E2E_S))


@dataclass(slots=True)
class Moved:
    """The hand-overs of one kind."""

    took: Histogram = field(default_factory=lambda: Histogram(MOVE_S))
    waited: float = 0.0  # request-seconds


class Metrics(Collector):
    """Counts what is over, looks at the cards, and tells all of it to who asks.

    Args:
        models: Those that are served, by name, as they are at the moment.
        prices: What energy and hours cost, as far as somebody said so.

    Attributes:
        gpu: What the models in an exclusive placement share, if there is any.
    """

    def __init__(self, models: Mapping[str, Model], prices: Cost) -> None:
        self.gpu: Gpu | None = None
        self.meter = Meter()
        self._models = models
        self._prices = prices
        self._outcomes = ENDINGS | set(_codes(GatewayError))
        self._cards: Sequence[Reading] = ()
        self._cards_at = -math.inf
        self._requests: dict[tuple[str, str, str, str, bool], int] = {}
        self._latency: dict[Place, Latency] = {}
        self._queued: dict[tuple[str, bool], Histogram] = {}
        self._tokens: dict[tuple[str, str, bool], list[int]] = {}
        self._retries: dict[str, int] = {}
        self._moved: dict[tuple[str, str, str], Moved] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    # Counting

    def write(self, exchange: Exchange) -> None:
        """An exchange is over; as `edge.Log`."""
        model = exchange.model if exchange.model in self._models else NONE
        lane = exchange.lane or NONE
        outcome = exchange.outcome if exchange.outcome in self._outcomes else REFUSED
        background = exchange.background
        key = (model, lane, outcome, exchange.cause or NONE, background)
        self._requests[key] = self._requests.get(key, 0) + 1
        if exchange.attempts > 1:
            self._retries[model] = self._retries.get(model, 0) + exchange.attempts - 1
        elif model != NONE and (exchange.sent or outcome in IN_VAIN):
            queued = self._queued.get((model, background))
            if queued is None:
                queued = self._queued[model, background] = Histogram(QUEUE_S)
            queued.observe((exchange.sent or exchange.ended) - exchange.began)
        usage = exchange.usage
        if usage is not None:
            tokens = self._tokens.setdefault((model, lane, background), [0, 0])
            tokens[0] += usage.prompt_tokens
            tokens[1] += usage.completion_tokens
            self.meter.came(lane, usage.completion_tokens)
        if outcome == "ok" and not background and exchange.path != base.EMBEDDINGS:
            self._time(exchange, (model, lane))

    def _time(self, exchange: Exchange, place: Place) -> None:
        seen = self._latency.get(place)
        if seen is None:
            seen = self._latency[place] = Latency()
        seen.e2e.observe(exchange.ended - exchange.began)
        if exchange.stream and exchange.first:
            seen.ttft.observe(exchange.first - exchange.began)
            tokens = exchange.usage.completion_tokens if exchange.usage is not None else 0
            if tokens > 1:
                seen.tpot.observe((exchange.ended - exchange.first) / (tokens - 1))

    def passed(self, passage: Passage) -> None:
        """A hand-over is over; for `handover.Gpu.on_passage`."""
        outcome = passage.outcome.partition(":")[0]
        key = (passage.source or NONE, passage.target, outcome)
        moved = self._moved.setdefault(key, Moved())
        moved.took.observe(sum(passage.steps.values()))
        moved.waited += passage.waited

    # Looking

    async def watch(self, nvml: Nvml) -> None:
        """Look once a second at who runs and what the cards draw, until cancelled."""
        ask_at = -math.inf
        while True:
            now = time.monotonic()
            cards: Sequence[Reading] = ()
            if now >= ask_at:
                try:
                    cards = await asyncio.to_thread(nvml.readings)
                except MemoryUnknown:
                    ask_at = now + NO_DRIVER_S
            self.looked(time.monotonic(), cards)
            await asyncio.sleep(LOOK_S)

    def looked(self, now: float, cards: Sequence[Reading]) -> None:
        """The cards say this now; none where nobody can tell."""
        self._cards, self._cards_at = cards, now
        drawn = [card.watts for card in cards if card.watts is not None]
        watts = sum(drawn) if drawn and len(drawn) == len(cards) else None
        running: dict[str, int] = {}
        for model in self._models.values():
            for name, lane in model.admission.scheduler.lanes.items():
                running[name] = running.get(name, 0) + lane.running
        self.meter.looked(now, self._prices.watts or watts, running)

    # Telling

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """All of it as text, and the content type; `accept` is what the asker reads."""
        encode, kind = choose_encoder(accept)
        return encode(self._registry), kind

    def cost(self) -> dict[str, object] | None:
        """What tokens have cost so far, as JSON; None where nothing is known of it."""
        prices = self._prices
        priced = (prices.per_kwh, prices.rent_per_hour, prices.api_per_million)
        whole = self.meter.whole()
        if not whole.joules and self.meter.watts is None and all(price is None for price in priced):
            return None
        return {
            "currency": prices.currency,
            "watts": self.meter.watts,
            "watts_of": "the machine, as given" if prices.watts else "the cards",
            "idle": _account(self.meter.idle, prices),
            "whole": _account(whole, prices),
            "lanes": {lane: _account(self.meter.of(lane), prices) for lane in self.meter.busy},
        }

    def collect(self) -> Iterable[Family]:
        """As prometheus_client asks for it."""
        about = InfoMetricFamily("twolane_build", "The gateway.")
        about.add_metric((), {"version": importlib.metadata.version("twolane")})
        yield about
        yield from self._counted()
        yield from self._latencies()
        yield from _standing(self._models)
        if self.gpu is not None:
            yield from _holding(self.gpu)
            yield from self._moves()
        if time.monotonic() - self._cards_at < STALE_S:
            yield from _cards(self._cards)
        yield from self._costs()

    def _counted(self) -> Iterator[Family]:
        requests = CounterMetricFamily(
            "twolane_requests",
            "Requests that are over. `reason` is why the lane was chosen, `background` a chat "
            "page's own call for a title and the like.",
            labels=("model", "lane", "outcome", "reason", "background"),
        )
        for (*labels, background), count in self._requests.items():
            requests.add_metric([*labels, _flag(background)], count)
        yield requests
        labels = ("model", "lane", "background")
        prompt = CounterMetricFamily(
            "twolane_prompt_tokens", "Tokens of prompts, as engines counted them.", labels=labels
        )
        generated = CounterMetricFamily(
            "twolane_generation_tokens", "Tokens of answers, as engines counted them.", labels=labels
        )
        for (model, lane, background), (went_in, came_out) in self._tokens.items():
            prompt.add_metric((model, lane, _flag(background)), went_in)
            generated.add_metric((model, lane, _flag(background)), came_out)
        yield prompt
        yield generated
        retries = CounterMetricFamily(
            "twolane_retries", "Second attempts, on another replica or lane.", labels=("model",)
        )
        for model, count in self._retries.items():
            retries.add_metric((model,), count)
        yield retries

    def _latencies(self) -> Iterator[Family]:
        labels = ("model", "lane")
        told = {
            "ttft": ("twolane_time_to_first_token_seconds",
                     "From a streamed request to the first of its answer, foreground."),
            "tpot": ("twolane_time_per_output_token_seconds",
                     "(last - first) / (tokens - 1) of a streamed answer, foreground."),
            "e2e": ("twolane_e2e_request_latency_seconds",
                    "From a request to the end of its answer, foreground; not embeddings."),
        }  # fmt: skip
        for name, (metric, about) in told.items():
            family = HistogramMetricFamily(metric, about, labels=labels)
            for place, seen in self._latency.items():
                histogram: Histogram = getattr(seen, name)
                histogram.into(family, place)
            yield family
        queued = HistogramMetricFamily(
            "twolane_request_queue_time_seconds",
            "From a request to its slot, or until it was given up; not of second attempts.",
            labels=("model", "background"),
        )
        for (model, background), histogram in self._queued.items():
            histogram.into(queued, (model, _flag(background)))
        yield queued

    def _moves(self) -> Iterator[Family]:
        labels = ("source", "target", "outcome")
        took = HistogramMetricFamily(
            "twolane_gpu_handover_seconds", "What hand-overs of the GPU took.", labels=labels
        )
        waited = CounterMetricFamily(
            "twolane_gpu_handover_waited_request_seconds",
            "Request-seconds that people waited because of hand-overs.",
            labels=labels,
        )
        for key, moved in self._moved.items():
            moved.took.into(took, key)
            waited.add_metric(key, moved.waited)
        yield took
        yield waited

    def _costs(self) -> Iterator[Family]:
        meter, prices = self.meter, self._prices
        used = {"idle": meter.idle, **meter.busy}
        seconds = CounterMetricFamily(
            "twolane_used_seconds",
            "Seconds of the machine by who ran; `idle` while nobody did.",
            labels=("lane",),
        )
        joules = CounterMetricFamily(
            "twolane_energy_joules",
            "Energy by who ran; `idle` while nobody did. Of the cards, or of the given watts.",
            labels=("lane",),
        )
        for lane, use in used.items():
            seconds.add_metric((lane,), use.seconds)
            joules.add_metric((lane,), use.joules)
        yield seconds
        if meter.watts is not None or meter.whole().joules:
            yield joules
        if meter.watts is not None:
            yield _gauge("twolane_power_watts", "Drawn now: by the cards, or as given.", meter.watts)
        price = GaugeMetricFamily(
            "twolane_price",
            "What was said to be paid: a kWh, an hour of a rented machine, a million of "
            "somebody's output tokens.",
            labels=("of", "currency"),
        )
        for name in ("per_kwh", "rent_per_hour", "api_per_million"):
            if (value := getattr(prices, name)) is not None:
                price.add_metric((name, prices.currency), value)
        yield price
        yield from self._per_token()

    def _per_token(self) -> Iterator[Family]:
        """What a token has taken since the start, idle time shared by the lanes."""
        efficiency = GaugeMetricFamily(
            "twolane_tokens_per_joule",
            "Output tokens a joule since the start, idle energy included; `all` is the machine.",
            labels=("lane",),
        )
        cost = GaugeMetricFamily(
            "twolane_cost_per_million_tokens",
            "Of output tokens since the start, idle time included; `all` is the machine.",
            labels=("lane", "of", "currency"),
        )
        uses = {"all": self.meter.whole()} | {la: self.meter.of(la) for la in self.meter.busy}
        for lane, use in uses.items():
            if (tokens := use.tokens_per_joule) is not None:
                efficiency.add_metric((lane,), tokens)
            told = bill(use, self._prices)
            for part in fields(Bill):
                if (value := getattr(told, part.name)) is not None:
                    cost.add_metric((lane, part.name, self._prices.currency), value)
        yield efficiency
        yield cost


def _standing(models: Mapping[str, Model]) -> Iterator[Family]:
    """How every model, lane and replica stands now."""
    of_lane, of_replica = ("model", "lane"), ("model", "lane", "replica")
    placed = GaugeMetricFamily(
        "twolane_model_info", "1 for each model; where its lanes are.", labels=("model", "placement")
    )
    demand = GaugeMetricFamily(
        "twolane_demand", "Foreground requests that run or wait.", labels=("model",)
    )
    waiting = GaugeMetricFamily(
        "twolane_num_requests_waiting", "Requests in the queue, background too.", labels=("model",)
    )
    regret = GaugeMetricFamily(
        "twolane_regret_request_seconds",
        "Lost by staying on the lane, net. One sum for all models in exclusive placement.",
        labels=("model",),
    )
    price = GaugeMetricFamily(
        "twolane_move_price_request_seconds",
        "What leaving the lane costs now: at this regret it is left.",
        labels=("model",),
    )
    moves = CounterMetricFamily(
        "twolane_policy_moves",
        "How often the policy has moved. One number for all models in exclusive placement.",
        labels=("model",),
    )
    chosen = GaugeMetricFamily(
        "twolane_lane_chosen", "1: the policy sends requests here.", labels=of_lane
    )
    running = GaugeMetricFamily(
        "twolane_num_requests_running", "Requests that have a slot.", labels=of_lane
    )
    slots = GaugeMetricFamily("twolane_slots", "Slots when all is well.", labels=of_lane)
    usable = GaugeMetricFamily(
        "twolane_slots_usable", "Slots that may be used now, taken ones included.", labels=of_lane
    )
    up = GaugeMetricFamily("twolane_replica_up", "1: it may be given work.", labels=of_replica)
    busy = GaugeMetricFamily(
        "twolane_engine_num_requests_running", "By the engine's own count.", labels=of_replica
    )
    queued = GaugeMetricFamily(
        "twolane_engine_num_requests_waiting", "By the engine's own count.", labels=of_replica
    )
    loaded = GaugeMetricFamily(
        "twolane_engine_model_loaded", "1: in memory, by the engine's word.", labels=of_replica
    )
    on_gpu = GaugeMetricFamily(
        "twolane_engine_model_on_gpu_ratio",
        "Which part of a loaded model is in GPU memory; the rest is on the CPU, and slow.",
        labels=of_replica,
    )
    for name, model in models.items():
        scheduler = model.admission.scheduler
        policy = scheduler.policy
        placed.add_metric((name, "exclusive" if scheduler.exclusive else "shared"), 1)
        demand.add_metric((name,), scheduler.demand)
        waiting.add_metric((name,), scheduler.waiting)
        moves.add_metric((name,), policy.moves)
        if len(scheduler.lanes) > 1 or scheduler.exclusive:
            regret.add_metric((name,), policy.regret)
            price.add_metric((name,), policy.price)
        for lane in scheduler.lanes.values():
            place = (name, lane.name)
            chosen.add_metric(place, lane.name == policy.lane)
            running.add_metric(place, lane.running)
            slots.add_metric(place, lane.slots)
            usable.add_metric(place, 0 if lane.barred else lane.room)
            for number, replica in enumerate(lane.replicas):
                labels = (*place, str(number))
                server = model.admission.servers[replica]
                up.add_metric(labels, replica.room > 0 and not lane.barred)
                if server.breaker.readiness is not Readiness.READY:
                    continue  # what it said before is over
                said = server.activity
                for family, value in (
                    (busy, said.running),
                    (queued, said.waiting),
                    (loaded, said.loaded),
                    (on_gpu, said.on_gpu),
                ):
                    if value is not None:
                        family.add_metric(labels, value)
    yield from (placed, demand, waiting, regret, price, moves, chosen, running, slots, usable)
    yield from (up, busy, queued, loaded, on_gpu)


def _holding(gpu: Gpu) -> Iterator[Family]:
    """Who has the GPU, and where it is on its way."""
    holder = GaugeMetricFamily(
        "twolane_gpu_holder", "1: this engine holds the GPU.", labels=("engine",)
    )
    holds = gpu.holder if gpu.step is Step.HELD and gpu.holder else NONE
    for name in (*gpu.occupants, NONE):
        holder.add_metric((name,), name == holds)
    yield holder
    state = GaugeMetricFamily("twolane_gpu_state", "1: where the GPU is now.", labels=("state",))
    for step in Step:
        state.add_metric((step.value,), step is gpu.step)
    yield state
    yield _gauge("twolane_gpu_released", "1: the operator has released it.", gpu.released)


def _cards(cards: Iterable[Reading]) -> Iterator[Family]:
    """What the driver says; a card that does not know something has no sample of it."""
    told = {
        "memory_total": ("twolane_gpu_memory_total_bytes", "Memory of the card."),
        "memory_used": ("twolane_gpu_memory_used_bytes", "Of it, what somebody has."),
        "watts": ("twolane_gpu_power_watts", "What it draws."),
        "watts_limit": ("twolane_gpu_power_limit_watts", "What it may draw."),
        "celsius": ("twolane_gpu_temperature_celsius", "Of the chip."),
        "utilization": ("twolane_gpu_utilization_ratio", "Share of the time in which it computed."),
    }
    for name, (metric, about) in told.items():
        family = GaugeMetricFamily(metric, about, labels=("gpu",))
        for card in cards:
            if (value := getattr(card, name)) is not None:
                family.add_metric((str(card.index),), value)
        yield family
    energy = CounterMetricFamily(
        "twolane_gpu_energy_joules", "Since its driver was loaded, as it counts.", labels=("gpu",)
    )
    names = GaugeMetricFamily("twolane_gpu_info", "1 for each card.", labels=("gpu", "name"))
    for card in cards:
        names.add_metric((str(card.index), card.name), 1)
        if card.joules is not None:
            energy.add_metric((str(card.index),), card.joules)
    yield energy
    yield names


def _account(use: Use, prices: Cost) -> dict[str, object]:
    told = bill(use, prices)
    efficiency = use.tokens_per_joule
    return {
        "seconds": round(use.seconds, 1),
        "joules": round(use.joules, 1) if use.joules else None,
        "tokens": use.tokens,
        "tokens_per_joule": None if efficiency is None else round(efficiency, 4),
        "per_million": {
            part.name: None if value is None else round(value, 4)
            for part, value in zip(fields(Bill), astuple(told), strict=True)
        },
    }


def _gauge(name: str, about: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, about, value=value)


def _flag(value: bool) -> str:  # noqa: FBT001 - a label
    return "true" if value else "false"


def _codes(kind: type[GatewayError]) -> Iterator[str]:
    """The codes of an error and of all below it."""
    if kind.code is not None:
        yield kind.code
    for below in kind.__subclasses__():
        yield from _codes(below)
