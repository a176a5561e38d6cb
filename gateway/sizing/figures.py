"""What goes into a plan and what comes out of it: plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import msgspec

from gateway.sizing.cards import Cards
from gateway.sizing.shapes import PlannedEngine, Weights

Placement: TypeAlias = Literal["exclusive", "shared"]


class Requirements(msgspec.Struct, frozen=True):
    """What the engines are required to do; None leaves the choice to the plan.

    Attributes:
        context: Tokens of a slot, prompt and answer.
        tokens: Tokens of a typical request, prompt and answer.
        concurrency: Numbers of concurrent requests to compute.
        utilization: Share of each card for vLLM where it is alone.
        ram_gib: RAM of the machine, GiB.
    """

    context: int | None = None
    tokens: int = 1500
    concurrency: tuple[int, ...] = msgspec.field(default=(16, 32), name="at")
    ollama_slots: int | None = None
    ollama_kv: str = "q8_0"
    vllm_slots: int = 32
    vllm_kv: str | None = None
    tensor: int | None = None
    pipeline: int | None = None
    utilization: float = 0.95
    placement: Placement | None = None
    ram_gib: float | None = msgspec.field(default=None, name="ram")


@dataclass(frozen=True)
class LoadPoint:
    """One number of concurrent requests: their KV tokens, how many run, how many wait.

    `bound_tokens_s` is the upper bound on output tokens a second of those that run.
    """

    requests: int
    needed_tokens: int
    resident_tokens: int
    running: int
    queued: int
    bound_tokens_s: float | None


@dataclass(frozen=True)
class SpeedBounds:
    """Upper bounds by the cards' data sheets, tokens a second; real engines stay below.

    Attributes:
        one_stream: Of one stream, by reading the weights.
        one_stream_all_reduce: The same with the assumed time of the all-reduces.
        prefill: Of prompts, by arithmetic.
    """

    one_stream: float
    one_stream_all_reduce: float
    prefill: float


class LanePlan(msgspec.Struct, frozen=True):
    """One engine's part of a plan; memory in GiB, on all cards together unless it says otherwise.

    Attributes:
        kv: Type of the KV cache.
        kv_kib: KV cache of one token, KiB, by type.
        tokens_alone: KV tokens that fit with nothing else on the cards, by type.
        tokens_beside: KV tokens that fit beside a sleeping vLLM, by type; empty if none sleeps.
        tokens: KV tokens that fit as planned.
        memory_gib: Memory that must be free before the engine loads.
        on_cpu_gib: The part that does not fit, which Ollama would run on the CPU.
        arguments: Arguments of `vllm serve`, and `environment` the variables of either engine.
    """

    engine: PlannedEngine
    weights: Weights
    weights_gib: float
    weights_card_gib: float
    kv: str
    kv_kib: Mapping[str, float]
    tokens_alone: Mapping[str, int]
    tokens_beside: Mapping[str, int]
    tokens: int
    slots: int
    context: int
    memory_gib: float
    on_cpu_gib: float
    load_points: tuple[LoadPoint, ...] = msgspec.field(name="at")
    speed: SpeedBounds | None
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    tensor: int = 1
    pipeline: int = 1
    utilization: float = 0.0


class Plan(msgspec.Struct, frozen=True):
    """What would be served on these cards, whether it fits, and if not what would.

    Attributes:
        placement: As required, or `shared` where both fit together.
        placement_why: The reason for it, with the figures.
        pinned_ram_gib: Least and most RAM that a sleeping vLLM pins; None where none sleeps.
        faults: The reasons why it does not fit, each with what would; empty if it fits.
        notes: Other things to know.
    """

    cards: Cards
    requirements: Requirements = msgspec.field(name="wish")
    placement: Placement
    placement_why: str
    lanes: Mapping[PlannedEngine, LanePlan]
    pinned_ram_gib: tuple[float, float] | None
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SharedSplit:
    """How both engines share the cards: Ollama's slots and context, vLLM's share of each card."""

    slots: int
    context: int
    utilization: float


def load_point(
    requests: int, running: int, request_tokens: int, kv_tokens: int, bound: float | None
) -> LoadPoint:
    """The load point at so many concurrent requests of this length."""
    return LoadPoint(
        requests=requests, needed_tokens=requests * request_tokens, resident_tokens=kv_tokens,
        running=running, queued=requests - running, bound_tokens_s=bound,
    )  # fmt: skip


def describe_alternatives(alternatives: Sequence[str]) -> str:
    """A sentence on what would fit in place of what does not."""
    if not alternatives:
        return "Nothing known here would fit: it takes larger cards, or more of them"
    return "What would fit: " + "; or ".join(alternatives)
