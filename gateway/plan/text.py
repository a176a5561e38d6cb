"""The figures of a plan in words, as the terminal and the written files say them."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping

from gateway.sizing.assumptions import (
    ALL_REDUCE_BYTES_S,
    ALL_REDUCE_S,
    OLLAMA_OVERHEAD_GIB,
    SLEEPING_VLLM_GIB,
    VLLM_OVERHEAD_GIB,
)
from gateway.sizing.cards import Cards
from gateway.sizing.figures import LanePlan, Plan


def describe_cards(cards: Cards) -> str:
    """`2 x 23.5 GiB (RTX 4090, assumed)`."""
    kind = f"RTX {cards.name}" if str(cards.name).isdecimal() else cards.name
    suffix = f" ({kind}{', assumed' if cards.assumed else ''})" if kind else ""
    return f"{cards.count} x {cards.gib:.4g} GiB{suffix}"


def pinned_ram(plan: Plan) -> str | None:
    """How much RAM a sleeping vLLM pins: `44 to 50 GiB of 96`; None where none sleeps."""
    if plan.pinned_ram_gib is None:
        return None
    low, high = plan.pinned_ram_gib
    ram = plan.requirements.ram_gib
    return f"{low:.0f} to {high:.0f} GiB" + ("" if ram is None else f" of {ram:g}")


def round_up(gib: float) -> float:
    """The next tenth of a GiB."""
    return math.ceil(round(gib * 10, 6)) / 10


def rate(tokens_s: float) -> str:
    """Tokens a second, with a decimal below 100."""
    return f"{tokens_s:,.0f}" if tokens_s >= 100 else f"{tokens_s:.1f}"


def by_type(values: Mapping[str, str]) -> str:
    """`fp8 160, auto 320`."""
    return ", ".join(f"{kind} {value}" for kind, value in values.items())


def thousands_by_type(tokens: Mapping[str, int]) -> str:
    """`fp8 32.9k`."""
    return by_type({kind: f"{count / 1000:,.1f}k" for kind, count in tokens.items()})


def start_command(lane: LanePlan, port: int | None = None) -> str:
    """The command that starts this engine by hand."""
    variables = " ".join(f"{name}={value}" for name, value in lane.environment.items())
    if lane.engine == "ollama":
        return f"{variables} ollama serve"
    address = ["--host", "127.0.0.1", "--port", str(port)] if port else []
    words = shlex.join(["vllm", "serve", lane.weights.name, *address, *lane.arguments])
    return f"{variables} {words}".strip()


def assumptions(plan: Plan) -> Iterator[str]:
    """Where the figures come from and what is assumed, one statement a line."""
    for lane in plan.lanes.values():
        yield f"{lane.engine}: weights {lane.weights.source}"
    overhead = {"ollama": OLLAMA_OVERHEAD_GIB, "vllm": VLLM_OVERHEAD_GIB}
    held = ", ".join(f"{overhead[engine]:g} by {engine}" for engine in plan.lanes)
    asleep = f", {SLEEPING_VLLM_GIB:g} by a sleeping vLLM" if plan.pinned_ram_gib else ""
    yield f"assumed: GiB on each card beside weights and KV: {held}{asleep}"
    if plan.cards.gbs is not None:
        reduces = not plan.cards.p2p and any(lane.tensor > 1 for lane in plan.lanes.values())
        yield (
            "bounds: a step takes max((weights + streams x KV) / bandwidth, streams x 2 x "
            "parameters / TFLOPS)"
            + (
                f"; vLLM's two all-reduces a layer {ALL_REDUCE_S * 1e6:.0f} us each and "
                f"{ALL_REDUCE_BYTES_S / 1e9:.0f} GB/s (assumed)"
                if reduces
                else ""
            )
        )
