"""What fits on the cards with Ollama, and how fast it can be at most."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gateway.sizing.assumptions import (
    DEFAULT_CONTEXT,
    KV_BITS,
    MAX_OLLAMA_SLOTS,
    MIN_CONTEXT,
    OLLAMA_OVERHEAD_GIB,
    SLEEPING_VLLM_GIB,
    round_context,
)
from gateway.sizing.cards import Cards
from gateway.sizing.figures import (
    LanePlan,
    Requirements,
    SharedSplit,
    SpeedBounds,
    describe_alternatives,
    load_point,
)
from gateway.sizing.known import KNOWN_MODELS, weights_by_name
from gateway.sizing.quantization import GGUF_MIXES, estimate_weights
from gateway.sizing.shapes import GIB, Shape, Weights


@dataclass(frozen=True)
class OllamaPlanner:
    """The arithmetic of Ollama over one set of cards and requirements.

    Where `vllm_sleeps` is true, a sleeping vLLM keeps a little of each card.
    """

    cards: Cards
    requirements: Requirements

    def kv_tokens(self, weights: Weights, kv: str, *, vllm_sleeps: bool) -> int:
        """KV tokens that fit on all cards."""
        per_token = self._slot_kv_gib(weights.shape, DEFAULT_CONTEXT, kv) / DEFAULT_CONTEXT
        return max(0, math.floor(self._kv_room_gib(weights, vllm_sleeps=vllm_sleeps) / per_token))

    def _kv_room_gib(self, weights: Weights, *, vllm_sleeps: bool) -> float:
        taken = OLLAMA_OVERHEAD_GIB + (SLEEPING_VLLM_GIB if vllm_sleeps else 0.0)
        return self.cards.total - weights.total / GIB - self.cards.count * taken

    def _slot_kv_gib(self, shape: Shape, context: int, kv: str) -> float:
        """KV cache of one slot, which Ollama allocates whole when it loads, GiB."""
        return shape.kv_bytes(context, KV_BITS["ollama"][kv]) / GIB

    def _available_gib(self, *, vllm_sleeps: bool) -> float:
        return self.cards.total - (self.cards.count * SLEEPING_VLLM_GIB if vllm_sleeps else 0.0)

    def memory_gib(self, weights: Weights, slots: int, context: int) -> float:
        """Memory that Ollama takes on all cards, GiB."""
        kv = slots * self._slot_kv_gib(weights.shape, context, self.requirements.ollama_kv)
        return weights.total / GIB + kv + self.cards.count * OLLAMA_OVERHEAD_GIB

    def lane(
        self, weights: Weights, *, vllm_sleeps: bool, split: SharedSplit | None = None
    ) -> LanePlan:
        """The plan of Ollama, alone on the cards or with this split beside vLLM."""
        required, kv = self.requirements, self.requirements.ollama_kv
        if split is None:
            slots, context = self._slots_and_context(weights, vllm_sleeps=vllm_sleeps)
        else:
            slots, context = split.slots, split.context
        tokens = slots * context
        memory = self.memory_gib(weights, slots, context)
        on_cpu = max(0.0, memory - self._available_gib(vllm_sleeps=vllm_sleeps))
        running = [min(n, slots) for n in required.concurrency]
        return LanePlan(
            engine="ollama",
            weights=weights,
            weights_gib=weights.total / GIB,
            weights_card_gib=weights.total / GIB / self.cards.count,
            kv=kv,
            kv_kib={
                kind: self._slot_kv_gib(weights.shape, DEFAULT_CONTEXT, kind)
                / DEFAULT_CONTEXT
                * 1024**2
                for kind in KV_BITS["ollama"]
            },
            tokens_alone=self._kv_tokens_by_type(weights, vllm_sleeps=False),
            tokens_beside=self._kv_tokens_by_type(weights, vllm_sleeps=True) if vllm_sleeps else {},
            tokens=tokens,
            slots=slots,
            context=context,
            memory_gib=memory,
            on_cpu_gib=on_cpu,
            load_points=tuple(
                load_point(
                    n, runs, required.tokens, tokens,
                    None if on_cpu else self.tokens_s(weights, runs),
                )
                for n, runs in zip(required.concurrency, running, strict=True)
            ),
            speed=None if on_cpu else self._speed_bounds(weights),
            arguments=(),
            environment=self._environment(slots, context, spread=split is not None),
        )  # fmt: skip

    def _kv_tokens_by_type(self, weights: Weights, *, vllm_sleeps: bool) -> dict[str, int]:
        return {
            kind: self.kv_tokens(weights, kind, vllm_sleeps=vllm_sleeps)
            for kind in KV_BITS["ollama"]
        }

    def _environment(self, slots: int, context: int, *, spread: bool) -> dict[str, str]:
        variables = {
            "OLLAMA_NUM_PARALLEL": str(slots),
            "OLLAMA_CONTEXT_LENGTH": str(context),
            "OLLAMA_KV_CACHE_TYPE": self.requirements.ollama_kv,
            "OLLAMA_FLASH_ATTENTION": "1",
            "OLLAMA_MAX_LOADED_MODELS": "1",
            "OLLAMA_KEEP_ALIVE": "-1",
            "OLLAMA_NO_CLOUD": "1",
        }
        if spread and self.cards.count > 1:  # else it fills one card, and with it vLLM's share
            variables["OLLAMA_SCHED_SPREAD"] = "1"
        return variables

    def _slots_and_context(self, weights: Weights, *, vllm_sleeps: bool) -> tuple[int, int]:
        """As many slots of the required context as fit, up to a few; less context if none does."""
        required = self.requirements
        room = self._kv_room_gib(weights, vllm_sleeps=vllm_sleeps)
        context = required.context or DEFAULT_CONTEXT
        slot = self._slot_kv_gib(weights.shape, context, required.ollama_kv)
        slots = required.ollama_slots or max(1, min(MAX_OLLAMA_SLOTS, math.floor(room / slot)))
        if required.context is None and slots * slot > room > 0:
            context = round_context(room / slot * context / slots)
        return slots, max(context, MIN_CONTEXT)

    def tokens_s(self, weights: Weights, streams: int) -> float | None:
        """An upper bound on output tokens a second of so many streams together.

        Layers lie on one card or another and one card works at a time: bandwidth and arithmetic
        are those of a single card. What runs on the CPU has no bound here.
        """
        gbs, tflops = self.cards.gbs, self.cards.tflops
        if gbs is None or tflops is None:
            return None
        bits = KV_BITS["ollama"][self.requirements.ollama_kv]
        kv = weights.shape.kv_bytes(self.requirements.tokens, bits)
        reading = (weights.read + streams * kv) / (gbs * 1e9)
        return streams / max(reading, 2 * weights.active * streams / (tflops * 1e12))

    def _speed_bounds(self, weights: Weights) -> SpeedBounds | None:
        gbs, tflops = self.cards.gbs, self.cards.tflops
        if gbs is None or tflops is None:
            return None
        one_stream = gbs * 1e9 / weights.read
        prefill = self.cards.count * tflops * 1e12 / (2 * weights.active)
        return SpeedBounds(one_stream=one_stream, one_stream_all_reduce=one_stream, prefill=prefill)

    def fault(self, lane: LanePlan, *, vllm_sleeps: bool) -> str | None:
        """The reason why the lane does not fit, with what would; None if it fits."""
        if not lane.on_cpu_gib:
            return None
        available = self._available_gib(vllm_sleeps=vllm_sleeps)
        beside = " beside a sleeping vLLM" if vllm_sleeps else ""
        alternatives = self._alternatives(lane.weights, vllm_sleeps=vllm_sleeps)
        return (
            f"Ollama: {lane.weights.name} ({lane.weights.scheme}) needs {lane.memory_gib:.1f} GiB "
            f"({lane.weights_gib:.1f} of weights, {lane.slots} x {lane.context:,} tokens of KV, "
            f"{OLLAMA_OVERHEAD_GIB:g} more on each card), and the cards have {available:.1f} GiB"
            f"{beside}: {lane.on_cpu_gib:.1f} GiB would run on the CPU, many times slower. "
            f"{describe_alternatives(alternatives)}"
        )

    def _alternatives(self, weights: Weights, *, vllm_sleeps: bool) -> list[str]:
        """What would fit in its place: less context, a smaller mix, a smaller model."""
        required = self.requirements
        slots = required.ollama_slots or 1

        def context_per_slot(other: Weights) -> int:
            tokens = self.kv_tokens(other, required.ollama_kv, vllm_sleeps=vllm_sleeps)
            return round_context(tokens // slots)

        def planned_context(other: Weights) -> int:
            return min(context_per_slot(other), round_context(required.context or DEFAULT_CONTEXT))

        alternatives: list[str] = []
        if context_per_slot(weights) >= MIN_CONTEXT:
            alternatives.append(f"--ollama-slots {slots} --context {context_per_slot(weights)}")
        # A file that its shape does not explain, such as a mixture of experts, has no mixes.
        dense = abs(weights.shape.parameters / weights.parameters - 1) < 0.03
        mixes = [estimate_weights(weights.shape, mix, "", "") for mix in GGUF_MIXES if dense]
        needed = required.context or MIN_CONTEXT
        smaller = [
            w for w in mixes if w.total < weights.total and planned_context(w) >= needed
        ]  # fmt: skip
        alternatives += [
            f"{w.scheme} ({w.total / GIB:.1f} GiB, {slots} x {planned_context(w):,} tokens)"
            for w in smaller[:2]
        ]
        models = ((name, weights_by_name(name, "ollama")) for name in KNOWN_MODELS)
        wanted = required.context or DEFAULT_CONTEXT
        fitting = [
            (name, w)
            for name, w in models
            if w.total < weights.total and planned_context(w) >= wanted
        ]
        if fitting:
            name, model = max(fitting, key=lambda pair: pair[1].total)
            alternatives.append(f"a smaller model, {name} in {model.scheme}")
        return alternatives
