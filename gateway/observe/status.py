"""What `/ready` and `/status` report: the fields and their types.

The structs are the contract: the pages answer with them, the OpenAPI document describes
them, and the command line reads them. They hold no key and no prompt. How they are filled
is `observe.snapshot`'s; this module imports nothing of the gateway, so a command that only
reads a status starts at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec


class GpuProgress(msgspec.Struct):
    """Which engine holds the GPU, or which step of a hand-over is under way."""

    holder: str | None
    step: str
    to: str
    since_s: float
    deadline_s: float | None
    trouble: str


class HandoverStatus(msgspec.Struct):
    """One hand-over: seconds by step, and request-seconds that requests waited for it."""

    at: float
    source: str | None = msgspec.field(name="from")
    target: str = msgspec.field(name="to")
    why: str
    steps: dict[str, float]
    outcome: str
    waited: float


class GpuStatus(GpuProgress):
    """The GPU of the models in exclusive placement; regret and price in request-seconds."""

    pin: str | None
    released: bool
    regret: float
    price: float
    moves: int
    passages: list[HandoverStatus]


class ReadyReport(msgspec.Struct, omit_defaults=True):
    """Whether any model can be answered, and what the others wait for."""

    ready: bool
    draining: bool
    models: list[str]
    waiting_for: dict[str, dict[str, str]]
    gpu: GpuProgress | None = None


class RefinementStatus(msgspec.Struct):
    """How live requests have corrected a profile: factors by lane and concurrency."""

    requests: int
    factors: dict[str, dict[str, float]]


class ProfileStatus(msgspec.Struct):
    """The profile by which a model's lane is chosen, and reasons why it may be out of date."""

    source: str
    told: str
    measured_at: str | None
    age_s: int | None
    machine: str
    warnings: list[str]
    refined: RefinementStatus | None


class ReplicaStatus(msgspec.Struct):
    """One server of a lane; `room` is how many of its slots may be used now."""

    running: int
    slots: int
    room: int
    state: str
    engine_running: int | None
    engine_waiting: int | None


class LaneStatus(msgspec.Struct):
    """One lane; `slots` may be used now, `service_s` is the mean time a slot is held."""

    running: int
    slots: int
    service_s: float
    replicas: list[ReplicaStatus]


class DecisionStatus(msgspec.Struct):
    """A request and the lane it was sent to; `at` is in seconds since the epoch."""

    at: float
    lane: str
    reason: str
    demand: int


class ModelStatus(msgspec.Struct):
    """One model: the lane that the policy has chosen and why, demand, lanes, last decisions."""

    placement: str
    lane: str
    reason: str
    profile: ProfileStatus
    demand: int
    waiting: int
    moves: int
    lanes: dict[str, LaneStatus]
    decisions: list[DecisionStatus]


@dataclass(frozen=True, slots=True)
class Bill:
    """Cost of a million output tokens, in the currency of the prices. None: not known.

    `api` is the price of a hosted API for as many tokens.
    """

    electricity: float | None
    rent: float | None
    api: float | None


class Account(msgspec.Struct):
    """What was used and what came of it: seconds, joules, output tokens."""

    seconds: float
    joules: float | None
    tokens: int
    tokens_per_joule: float | None
    per_million: Bill


class CostStatement(msgspec.Struct):
    """What was used since the start and what it has cost, in all, idle, and by lane."""

    currency: str
    watts: float | None
    watts_are: str
    idle: Account
    whole: Account
    lanes: dict[str, Account]


class GatewayStatus(msgspec.Struct):
    """The body of `/status`: the process, the GPU, costs, and each model."""

    version: str
    up_s: float
    in_flight: int
    draining: bool
    gpu: GpuStatus | None
    cost: CostStatement | None
    models: dict[str, ModelStatus]
