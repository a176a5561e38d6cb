"""What is looked up at each scrape: demand, queues, slots, regret, health, GPUs, costs.

`GAUGES` and `COUNTERS` are the tables of their names. A value that is not known has no
sample, rather than a zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import TypeAlias

from gateway.gpu.cards import Reading
from gateway.gpu.handover import Gpu
from gateway.gpu.state import Step
from gateway.observe.cost import Meter, bill
from gateway.observe.counters import NONE
from gateway.observe.status import Bill
from gateway.routing.breaker import ReplicaState
from gateway.routing.lanes import Lane
from gateway.serving.catalogue import Model
from gateway.settings import Prices

#: Name of the metric, values of its labels, value; None: not known.
Sample: TypeAlias = tuple[str, tuple[str, ...], float | None]
#: By name: the HELP text and the labels.
Families: TypeAlias = Mapping[str, tuple[str, tuple[str, ...]]]

GAUGES: Families = {
    "twolane_build_info": ("1, with the gateway's version as a label.", ("version",)),
    "twolane_model_info": (
        "1 for each model, with its placement as a label.",
        ("model", "placement"),
    ),
    "twolane_demand": ("Foreground requests running or waiting.", ("model",)),
    "twolane_num_requests_waiting": (
        "Requests in the queue, background calls included.",
        ("model",),
    ),
    "twolane_regret_request_seconds": (
        "Net request-seconds lost by staying on the lane; one sum for all in exclusive placement.",
        ("model",),
    ),
    "twolane_move_price_request_seconds": (
        "Request-seconds that leaving the lane costs: it is left when regret reaches this.",
        ("model",),
    ),
    "twolane_lane_chosen": ("1 if the policy sends requests to the lane.", ("model", "lane")),
    "twolane_num_requests_running": ("Requests that hold a slot.", ("model", "lane")),
    "twolane_slots": ("Configured concurrency limit.", ("model", "lane")),
    "twolane_slots_usable": (
        "Concurrency limit at present, slots in use included.",
        ("model", "lane"),
    ),
    "twolane_replica_up": ("1 if the replica accepts requests.", ("model", "lane", "replica")),
    "twolane_engine_num_requests_running": (
        "Requests running in the engine, as it reports them.",
        ("model", "lane", "replica"),
    ),
    "twolane_engine_num_requests_waiting": (
        "Requests queued in the engine, as it reports them.",
        ("model", "lane", "replica"),
    ),
    "twolane_engine_model_loaded": (
        "1 if the model is in memory, as the engine reports it.",
        ("model", "lane", "replica"),
    ),
    "twolane_engine_model_on_gpu_ratio": (
        "Share of a loaded model that is in GPU memory; the rest is on the CPU, which is slow.",
        ("model", "lane", "replica"),
    ),
    "twolane_gpu_holder": ("1 for the engine that holds the GPU.", ("engine",)),
    "twolane_gpu_state": ("1 for the state that the GPU is in.", ("state",)),
    "twolane_gpu_released": ("1 if the operator has released the GPU.", ()),
    "twolane_gpu_info": ("1 for each GPU, with its name as a label.", ("gpu", "name")),
    "twolane_gpu_memory_total_bytes": ("GPU memory, bytes.", ("gpu",)),
    "twolane_gpu_memory_used_bytes": ("GPU memory in use, bytes.", ("gpu",)),
    "twolane_gpu_power_watts": ("Power draw, watts.", ("gpu",)),
    "twolane_gpu_power_limit_watts": ("Power limit, watts.", ("gpu",)),
    "twolane_gpu_temperature_celsius": ("GPU temperature, degrees Celsius.", ("gpu",)),
    "twolane_gpu_utilization_ratio": ("Share of the time in which the GPU computed.", ("gpu",)),
    "twolane_power_watts": ("Power draw of all GPUs, or as configured, watts.", ()),
    "twolane_price": (
        "Configured prices: a kWh, an hour of rent, a million output tokens of a hosted API.",
        ("of", "currency"),
    ),
    "twolane_tokens_per_joule": (
        "Output tokens per joule since the start, idle included; `all` is the machine.",
        ("lane",),
    ),
    "twolane_cost_per_million_tokens": (
        "Cost of a million output tokens since the start, idle included; `all` is the machine.",
        ("lane", "of", "currency"),
    ),
}
COUNTERS: Families = {
    "twolane_policy_moves_total": (
        "Moves that the policy has made. Models in exclusive placement share one number.",
        ("model",),
    ),
    "twolane_gpu_energy_joules_total": (
        "Energy since the GPU's driver was loaded, joules.",
        ("gpu",),
    ),
    "twolane_used_seconds_total": (
        "Seconds of the machine, by the lane that ran; `idle` while none ran.",
        ("lane",),
    ),
    "twolane_energy_joules_total": (
        "Energy by the lane that ran, joules, of GPUs or as configured; `idle` while none ran.",
        ("lane",),
    ),
}


def model_samples(model: Model) -> Iterator[Sample]:
    """The state of a model and its lanes."""
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
        labels = (name, lane.name)
        yield "twolane_lane_chosen", labels, lane.name == policy.lane
        yield "twolane_num_requests_running", labels, lane.running
        yield "twolane_slots", labels, lane.slots
        yield "twolane_slots_usable", labels, 0 if scheduler.blocked_reason else lane.capacity
        yield from _replica_samples(model, lane)


def _replica_samples(model: Model, lane: Lane) -> Iterator[Sample]:
    """The state of a lane's replicas, and what their engines report."""
    blocked = model.admission.scheduler.blocked_reason
    for number, replica in enumerate(lane.replicas):
        labels = (model.name, lane.name, str(number))
        server = model.admission.servers[replica]
        yield "twolane_replica_up", labels, replica.capacity > 0 and not blocked
        if server.breaker.state is ReplicaState.READY:  # otherwise its last report is out of date
            report = server.activity
            yield "twolane_engine_num_requests_running", labels, report.running
            yield "twolane_engine_num_requests_waiting", labels, report.waiting
            yield "twolane_engine_model_loaded", labels, server.loaded
            yield "twolane_engine_model_on_gpu_ratio", labels, report.on_gpu


def gpu_samples(gpu: Gpu) -> Iterator[Sample]:
    """Which engine holds the GPU, and the state that the GPU is in."""
    state = gpu.state
    holder = state.holder or NONE
    for name in (*gpu.layouts, NONE):
        yield "twolane_gpu_holder", (name,), name == holder
    for step in Step:
        yield "twolane_gpu_state", (step.value,), step is state.step
    yield "twolane_gpu_released", (), state.released


def card_samples(card: Reading) -> Iterator[Sample]:
    """The readings of one card."""
    label = (str(card.index),)
    yield "twolane_gpu_info", (*label, card.name), 1
    yield "twolane_gpu_memory_total_bytes", label, card.memory_total
    yield "twolane_gpu_memory_used_bytes", label, card.memory_used
    yield "twolane_gpu_power_watts", label, card.watts
    yield "twolane_gpu_power_limit_watts", label, card.watts_limit
    yield "twolane_gpu_temperature_celsius", label, card.celsius
    yield "twolane_gpu_utilization_ratio", label, card.utilization
    yield "twolane_gpu_energy_joules_total", label, card.joules


def cost_samples(meter: Meter, prices: Prices) -> Iterator[Sample]:
    """What was used, by lane, and what output tokens have cost."""
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
