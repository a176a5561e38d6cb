"""The gateway's metrics: what is counted, what is sampled every second, what is looked up.

What is over is counted when it is over, by prometheus_client (`counters`). All else is
looked up at each scrape, from what the gateway knows anyway (`samples`). Names and units
are the field's: base units, `_total` for counters, and vLLM's names where there is one.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from gateway.gpu.cards import Nvml, Reading, total_watts
from gateway.gpu.handover import Gpu
from gateway.gpu.memory import MemoryUnknown
from gateway.observe.cost import Meter
from gateway.observe.counters import NONE, HandoverCounters, LatencyHistograms, RequestCounters
from gateway.observe.samples import (
    COUNTERS,
    GAUGES,
    Sample,
    card_samples,
    cost_samples,
    gpu_samples,
    model_samples,
)
from gateway.relay.exchange import Exchange
from gateway.serving.catalogue import Model
from gateway.settings import Prices, Timings


class Metrics(Collector):
    """Counts requests and hand-overs, reads the GPUs, and exposes all of it to Prometheus.

    Args:
        models: The models that are served, by name; the map may change.
        prices: Prices of energy, rent and a hosted API, as far as they are configured.
        timings: How often the machine is sampled.

    Attributes:
        gpu: The GPU that the models in exclusive placement share, if there are any; see `follow`.
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
        self._cards: Sequence[Reading] = ()
        self._cards_at = -math.inf
        self._registry = CollectorRegistry()
        # Otherwise each counter has a second series, `_created`, that has no use.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        self._requests = RequestCounters(self._registry)
        self._latencies = LatencyHistograms(self._registry)
        self._handovers = HandoverCounters(self._registry)

    def follow(self, gpu: Gpu) -> None:
        """Expose the GPU's state, and count its hand-overs."""
        self.gpu = gpu
        gpu.on_record = self._handovers.count
        self._handovers.expect(gpu.layouts)

    def write(self, exchange: Exchange) -> None:
        """Count an exchange that is over; for `edge.ExchangeLog`."""
        model = exchange.model if exchange.model in self._models else NONE
        self._requests.count(exchange, model)
        self._latencies.observe(exchange, model, self._requests.outcome(exchange))
        if exchange.usage is not None:
            self.meter.add_tokens(exchange.lane or NONE, exchange.usage.completion_tokens)

    # Sampling

    async def watch(self, nvml: Nvml) -> None:
        """Sample running requests and the GPUs' readings every second, until cancelled."""
        async with asyncio.TaskGroup() as both:
            both.create_task(self._read_cards(nvml))
            both.create_task(self._sample_machine())

    async def _read_cards(self, nvml: Nvml) -> None:
        """Read the GPUs in a thread, so that a driver that hangs holds up nothing else."""
        while True:
            try:
                self._cards = await asyncio.to_thread(nvml.readings)
            except MemoryUnknown:
                self._cards = ()
            self._cards_at = time.monotonic()
            timings = self._timings
            await asyncio.sleep(timings.meter_interval_s if self._cards else timings.driver_retry_s)

    async def _sample_machine(self) -> None:
        while True:
            self.sample(time.monotonic())
            await asyncio.sleep(self._timings.meter_interval_s)

    def sample(self, now: float) -> None:
        """Sample what the machine uses; `now` is in seconds on the monotonic clock."""
        self._requests.expect(self._models)
        running: dict[str, int] = {}
        for model in self._models.values():
            for name, lane in model.admission.scheduler.lanes.items():
                running[name] = running.get(name, 0) + lane.running
        self.meter.sample(
            now, self._prices.watts or total_watts(self._valid_readings(now)), running
        )

    def _valid_readings(self, now: float) -> Sequence[Reading]:
        """The GPUs' readings, none where they are too old."""
        return self._cards if now - self._cards_at < self._timings.readings_valid_s else ()

    # Exposing

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """All metrics as text, and its content type; `accept` is the scraper's header."""
        encode, kind = choose_encoder(accept)
        return encode(self._registry), kind

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        """What is looked up at a scrape; prometheus_client calls this."""
        families = {
            name: kind(name, help_text, labels=labels)
            for kind, table in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS))
            for name, (help_text, labels) in table.items()
        }
        for name, labels, value in self._samples():
            if value is not None:
                families[name].add_metric(labels, value)
        return families.values()

    def _samples(self) -> Iterator[Sample]:
        yield "twolane_build_info", (self._version,), 1
        for model in self._models.values():
            yield from model_samples(model)
        if self.gpu is not None:
            yield from gpu_samples(self.gpu)
        for card in self._valid_readings(time.monotonic()):
            yield from card_samples(card)
        yield from cost_samples(self.meter, self._prices)
