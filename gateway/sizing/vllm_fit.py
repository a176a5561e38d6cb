"""What fits into vLLM's share of the cards, and how fast it can be at most."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gateway.errors import UsageError
from gateway.sizing.assumptions import (
    ALL_REDUCE_BYTES_S,
    ALL_REDUCE_S,
    DEFAULT_CONTEXT,
    KV_BITS,
    MIN_CONTEXT,
    SLEEPING_VLLM_GIB,
    VLLM_OVERHEAD_GIB,
    round_context,
)
from gateway.sizing.cards import Cards
from gateway.sizing.figures import (
    LanePlan,
    Placement,
    Requirements,
    SpeedBounds,
    describe_alternatives,
    load_point,
)
from gateway.sizing.known import KNOWN_MODELS, weights_by_name
from gateway.sizing.quantization import VLLM_SCHEMES, estimate_weights
from gateway.sizing.shapes import GIB, Shape, Weights


@dataclass(frozen=True)
class VllmPlanner:
    """The arithmetic of vLLM over one set of cards and requirements.

    Attributes:
        kv: Type of the KV cache.
        tensor: Tensor parallel ranks: cards that share each layer.
        pipeline: Pipeline parallel stages: cards that take turns.
    """

    cards: Cards
    requirements: Requirements
    kv: str
    tensor: int
    pipeline: int

    def kv_tokens(self, weights: Weights, utilization: float, kv: str) -> int:
        """KV tokens that fit into this share of each card."""
        room = (utilization * self.cards.gib - VLLM_OVERHEAD_GIB) * GIB
        room -= weights.on_card(self.tensor, self.pipeline)
        return max(0, math.floor(room / self._kv_bytes_on_card(weights.shape, kv)))

    def kv_bytes(self, shape: Shape, kv: str) -> float:
        """KV bytes a token on all cards, at the planned length of a request."""
        tokens = self.requirements.tokens
        return shape.kv_bytes(tokens, KV_BITS["vllm"][kv]) / tokens

    def _kv_bytes_on_card(self, shape: Shape, kv: str) -> float:
        layers = math.ceil(shape.layers / self.pipeline) / shape.layers
        heads = max(1, math.ceil(shape.kv_heads / self.tensor)) / shape.kv_heads
        return self.kv_bytes(shape, kv) * layers * heads

    def lane(self, weights: Weights, utilization: float, placement: Placement) -> LanePlan:
        """The plan of vLLM with this share of each card."""
        cards, required, kv = self.cards, self.requirements, self.kv
        tokens = self.kv_tokens(weights, utilization, kv)
        context = required.context or round_context(min(DEFAULT_CONTEXT, tokens)) or DEFAULT_CONTEXT
        running = [
            min(n, required.vllm_slots, tokens // required.tokens) for n in required.concurrency
        ]
        asleep = SLEEPING_VLLM_GIB if placement == "exclusive" else 0.0
        return LanePlan(
            engine="vllm",
            weights=weights,
            weights_gib=weights.total / GIB,
            weights_card_gib=weights.on_card(self.tensor, self.pipeline) / GIB,
            kv=kv,
            kv_kib={kind: self.kv_bytes(weights.shape, kind) / 1024 for kind in KV_BITS["vllm"]},
            tokens_alone={
                kind: self.kv_tokens(weights, required.utilization, kind)
                for kind in KV_BITS["vllm"]
            },
            tokens_beside={},
            tokens=tokens,
            slots=required.vllm_slots,
            context=context,
            # What it keeps while it sleeps is never seen free.
            memory_gib=self.tensor * self.pipeline * (utilization * cards.gib - asleep),
            on_cpu_gib=0.0,
            load_points=tuple(
                load_point(n, runs, required.tokens, tokens, self.tokens_s(weights, runs))
                for n, runs in zip(required.concurrency, running, strict=True)
            ),
            speed=self._speed_bounds(weights),
            arguments=self._arguments(weights, utilization, context, placement),
            environment=self._environment(placement),
            tensor=self.tensor,
            pipeline=self.pipeline,
            utilization=utilization,
        )

    def tokens_s(self, weights: Weights, streams: int) -> float | None:
        """An upper bound on output tokens a second of so many streams together.

        A step reads the weights once and each stream's KV, or computes for each stream,
        whichever takes longer. Tensor parallel cards do that together and add two all-reduces
        a layer. Pipeline stages take turns: with fewer streams than stages some are idle.
        """
        gbs, tflops = self.cards.gbs, self.cards.tflops
        if gbs is None or tflops is None:
            return None
        if streams < 1:
            return 0.0
        kv = self.kv_bytes(weights.shape, self.kv) * self.requirements.tokens
        stages = min(streams, self.pipeline)
        reading = (weights.read + streams / stages * kv) / (self.tensor * gbs * 1e9)
        computing = 2 * weights.active * streams / stages / (self.tensor * tflops * 1e12)
        step = max(reading, computing)
        if self.tensor > 1 and not self.cards.p2p:
            reduced = streams / stages * weights.shape.hidden * 2 / ALL_REDUCE_BYTES_S
            step += 2 * weights.shape.layers * (ALL_REDUCE_S + reduced)
        return streams / step

    def _speed_bounds(self, weights: Weights) -> SpeedBounds | None:
        gbs, tflops = self.cards.gbs, self.cards.tflops
        with_all_reduces = self.tokens_s(weights, 1)
        if gbs is None or tflops is None or with_all_reduces is None:
            return None
        return SpeedBounds(
            one_stream=self.tensor * gbs * 1e9 / weights.read,
            one_stream_all_reduce=with_all_reduces,
            prefill=self.tensor * self.pipeline * tflops * 1e12 / (2 * weights.active),
        )

    def _arguments(
        self, weights: Weights, utilization: float, context: int, placement: Placement
    ) -> tuple[str, ...]:
        slots = str(self.requirements.vllm_slots)
        arguments = [
            "--tensor-parallel-size", str(self.tensor),
            "--pipeline-parallel-size", str(self.pipeline),
            "--dtype", weights.dtype,
            "--gpu-memory-utilization", f"{utilization:.2f}",
            "--kv-cache-dtype", self.kv,
            "--max-model-len", str(context),
            "--max-num-seqs", slots,
            "--max-cudagraph-capture-size", slots,
            "--max-num-queued-reqs", "128",
        ]  # fmt: skip
        if self.tensor > 1 and not self.cards.p2p:
            arguments.append("--disable-custom-all-reduce")
        if placement == "exclusive":
            arguments.append("--enable-sleep-mode")
        return tuple(arguments)

    def _environment(self, placement: Placement) -> dict[str, str]:
        variables = {}
        if self.tensor * self.pipeline > 1 and not self.cards.p2p:
            variables["NCCL_P2P_DISABLE"] = "1"
        if placement == "exclusive":
            variables["VLLM_SERVER_DEV_MODE"] = "1"  # /sleep and /wake_up
        return variables

    def fault(self, lane: LanePlan) -> str | None:
        """The reason why the lane does not fit, with what would; None if it fits."""
        if lane.tokens >= max(lane.context, MIN_CONTEXT):
            return None
        share = self.cards.gib * lane.utilization
        rest = (
            f"only {lane.tokens:,} KV tokens are left"
            if lane.tokens
            else "nothing is left for a KV cache"
        )
        return (
            f"vLLM: {lane.weights.name} ({lane.weights.scheme}) takes "
            f"{lane.weights_card_gib:.1f} + {VLLM_OVERHEAD_GIB:g} GiB of the {share:.1f} GiB that "
            f"vLLM may use on each card, and {rest}. "
            f"{describe_alternatives(self._alternatives(lane.weights))}"
        )

    def _alternatives(self, weights: Weights) -> list[str]:
        """What would fit in its place: less context, a smaller scheme, a smaller model."""
        alternatives: list[str] = []
        context = round_context(self.kv_tokens(weights, self.requirements.utilization, self.kv))
        if context >= MIN_CONTEXT:
            alternatives.append(f"--context {context}")
        if weights.total >= 8 * GIB or not alternatives:
            schemes = (estimate_weights(weights.shape, scheme, "", "") for scheme in VLLM_SCHEMES)
            smaller = [w for w in schemes if w.total < weights.total and self._fits(w)]
            if smaller:
                largest = max(smaller, key=lambda w: w.total)
                alternatives.append(f"{largest.scheme} ({largest.total / GIB:.1f} GiB)")
        models = ((name, weights_by_name(name, "vllm")) for name in KNOWN_MODELS)
        fitting = [
            (name, w) for name, w in models if w.total < weights.total and self._fits(w)
        ]  # fmt: skip
        if fitting:
            name, model = max(fitting, key=lambda pair: pair[1].total)
            alternatives.append(f"a smaller model, {name} in {model.scheme}")
        return alternatives

    def _fits(self, weights: Weights) -> bool:
        """Whether these weights leave a KV cache for one whole context."""
        if indivisible_reason(weights, self.tensor):
            return False
        wanted = self.requirements.context or DEFAULT_CONTEXT
        return self.kv_tokens(weights, self.requirements.utilization, self.kv) >= wanted


def parallel_ranks(weights: Weights, cards: Cards, required: Requirements) -> tuple[int, int]:
    """Tensor and pipeline parallel ranks: all cards, tensor parallel where the model divides.

    Raises:
        UsageError: There are more ranks than cards or layers, or they do not divide the model.
    """
    if required.tensor is None and required.pipeline is None:
        if indivisible_reason(weights, cards.count) is None:
            return cards.count, 1
        return 1, min(cards.count, weights.shape.layers)
    pipeline = required.pipeline or max(1, cards.count // (required.tensor or 1))
    tensor = required.tensor or max(1, cards.count // pipeline)
    if tensor * pipeline > cards.count:
        raise UsageError(
            f"--tp {tensor} x --pp {pipeline} are {tensor * pipeline} ranks, and there are "
            f"{cards.count} cards"
        )
    if pipeline > weights.shape.layers:
        raise UsageError(f"--pp {pipeline}: the model has {weights.shape.layers} layers")
    reason = indivisible_reason(weights, tensor)
    if reason is not None:
        divisors = [
            str(n) for n in range(1, cards.count + 1) if indivisible_reason(weights, n) is None
        ]
        raise UsageError(
            f"--tp {tensor} does not divide {weights.name}: {reason}. Take --tp "
            f"{' or '.join(divisors)}, or --pp {tensor}, which divides no layer"
        )
    return tensor, pipeline


def indivisible_reason(weights: Weights, tensor: int) -> str | None:
    """The reason why so many ranks cannot share each matrix; None if they can."""
    shape, group = weights.shape, weights.group or 1
    if shape.heads % tensor:
        return f"it has {shape.heads} heads"
    if shape.kv_heads % tensor and tensor % shape.kv_heads:
        return f"it has {shape.kv_heads} KV heads"
    if shape.intermediate % (tensor * group):
        return (
            f"its intermediate size is {shape.intermediate}"
            + (f", {shape.intermediate / group:g} groups of {group}" if group > 1 else "")
            + " (makers of such models pad it: take a padded version)"
        )
    return None
