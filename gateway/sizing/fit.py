"""What fits on the cards, and how fast it can be at most: arithmetic, and nothing else.

Nothing here reads the state of a machine. What cannot be computed is assumed, in `assumptions`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import msgspec

from gateway.errors import UsageError
from gateway.sizing.assumptions import (
    DEFAULT_CONTEXT,
    HOST_RAM_RESERVE_GIB,
    MAX_OLLAMA_SLOTS,
    MIN_SHARED_STREAMS,
    PINNED_RAM_FACTORS,
    SHARED_MARGIN_GIB,
    VLLM_OVERHEAD_GIB,
)
from gateway.sizing.cards import Cards
from gateway.sizing.figures import (
    LanePlan,
    Placement,
    Plan,
    Requirements,
    SharedSplit,
    describe_alternatives,
)
from gateway.sizing.known import KNOWN_MODELS, weights_by_name
from gateway.sizing.ollama_fit import OllamaPlanner
from gateway.sizing.shapes import GIB, PlannedEngine, Weights
from gateway.sizing.vllm_fit import VllmPlanner, parallel_ranks


def make_plan(
    ollama: Weights | None, vllm: Weights | None, cards: Cards, required: Requirements
) -> Plan:
    """The plan for these weights on these cards; None where an engine is not to be used.

    Raises:
        UsageError: What is required makes no sense: ranks that do not divide the model, more
            ranks than cards, a KV cache that the cards cannot have.
    """
    return Planner.of(ollama, vllm, cards, required).plan()


@dataclass(frozen=True)
class Planner:
    """The arithmetic over one pair of models, one set of cards, and the requirements."""

    ollama: Weights | None
    vllm: Weights | None
    cards: Cards
    requirements: Requirements
    ollama_planner: OllamaPlanner
    vllm_planner: VllmPlanner

    @classmethod
    def of(
        cls, ollama: Weights | None, vllm: Weights | None, cards: Cards, required: Requirements
    ) -> Planner:
        """The planner for these weights; raises `UsageError` as `make_plan` does."""
        if ollama is None and vllm is None:
            raise UsageError("no model is named: give a name, or --ollama and --vllm")
        kv = required.vllm_kv or ("fp8" if cards.fp8 else "auto")
        if kv == "fp8" and not cards.fp8:
            raise UsageError(
                f"--vllm-kv fp8: {cards.name} has no fp8 arithmetic (compute capability 8.9); "
                "take --vllm-kv auto"
            )
        required = _limit_context(required, [w for w in (ollama, vllm) if w])
        tensor, pipeline = parallel_ranks(vllm, cards, required) if vllm else (1, 1)
        return cls(
            ollama,
            vllm,
            cards,
            required,
            OllamaPlanner(cards, required),
            VllmPlanner(cards, required, kv, tensor, pipeline),
        )

    def plan(self) -> Plan:
        """The lanes in the required placement, or in the better one that fits."""
        split = self._shared_split(self.ollama, self.vllm) if self.ollama and self.vllm else None
        placement = self.requirements.placement or ("shared" if split else "exclusive")
        if placement == "shared" and self.ollama and self.vllm:
            lanes, faults = self._shared(self.ollama, self.vllm, split)
        else:
            lanes, faults = self._by_turns(placement)
        notes: list[str] = []
        pinned = None
        if self.vllm and self.ollama and placement == "exclusive":
            low, high = (self.vllm.total / GIB * factor for factor in PINNED_RAM_FACTORS)
            pinned = (low, high)
            faults += self._ram_faults(low, high)
            notes += self._ram_notes(self.ollama, high)
        notes += _context_notes(lanes, self.requirements)
        return Plan(
            cards=self.cards,
            requirements=self.requirements,
            placement=placement,
            placement_why=self._placement_reason(placement, lanes),
            lanes=lanes,
            pinned_ram_gib=pinned,
            faults=tuple(faults),
            notes=tuple(notes),
        )

    def _by_turns(self, placement: Placement) -> tuple[dict[PlannedEngine, LanePlan], list[str]]:
        """Each lane with all of the cards, and why one does not fit."""
        lanes: dict[PlannedEngine, LanePlan] = {}
        faults: list[str | None] = []
        vllm_sleeps = bool(self.vllm and self.ollama and placement == "exclusive")
        if self.ollama:
            lanes["ollama"] = self.ollama_planner.lane(self.ollama, vllm_sleeps=vllm_sleeps)
        if self.vllm:
            utilization = self.requirements.utilization
            lanes["vllm"] = self.vllm_planner.lane(self.vllm, utilization, placement)
            faults.append(self.vllm_planner.fault(lanes["vllm"]))
        if self.ollama:
            faults.append(self.ollama_planner.fault(lanes["ollama"], vllm_sleeps=vllm_sleeps))
        return lanes, [fault for fault in faults if fault]

    def _shared(
        self, ollama: Weights, vllm: Weights, split: SharedSplit | None
    ) -> tuple[dict[PlannedEngine, LanePlan], list[str]]:
        """Both lanes on the same cards, and why they do not fit."""
        faults = [] if split else [self._shared_fault(ollama, vllm)]
        required = self.requirements
        split = split or SharedSplit(
            required.ollama_slots or 1, required.context or DEFAULT_CONTEXT, 0.0
        )
        return {
            "ollama": self.ollama_planner.lane(ollama, vllm_sleeps=False, split=split),
            "vllm": self.vllm_planner.lane(vllm, split.utilization, "shared"),
        }, faults

    def _shared_split(self, ollama: Weights, vllm: Weights) -> SharedSplit | None:
        """How both fit on the same cards together, each over all of them; None if they do not.

        Ollama has as many slots as leave vLLM a KV cache for `MIN_SHARED_STREAMS` requests.
        """
        required = self.requirements
        context = required.context or DEFAULT_CONTEXT
        fitting: SharedSplit | None = None
        candidates = [required.ollama_slots] if required.ollama_slots else [MAX_OLLAMA_SLOTS, 2, 1]
        for slots in candidates:
            ollama_gib = self.ollama_planner.memory_gib(ollama, slots, context) / self.cards.count
            left = (self.cards.gib - ollama_gib - SHARED_MARGIN_GIB) / self.cards.gib
            utilization = min(required.utilization, math.floor(left * 100) / 100)
            tokens = self.vllm_planner.kv_tokens(vllm, utilization, self.vllm_planner.kv)
            if tokens < max(context, required.tokens):
                continue
            fitting = SharedSplit(slots, context, utilization)
            if tokens >= MIN_SHARED_STREAMS * required.tokens:
                return fitting
        return fitting

    def _shared_fault(self, ollama: Weights, vllm: Weights) -> str:
        """The reason why both do not fit together, with what would."""
        planner, count = self.vllm_planner, self.cards.count
        context = self.requirements.context or DEFAULT_CONTEXT
        slots = self.requirements.ollama_slots or 1
        vllm_card = vllm.on_card(planner.tensor, planner.pipeline) / GIB + VLLM_OVERHEAD_GIB
        kv = planner.kv_bytes(vllm.shape, planner.kv) * context / GIB
        needed = self.ollama_planner.memory_gib(ollama, slots, context)
        needed += vllm_card * count + kv + SHARED_MARGIN_GIB * count
        smaller = [
            name
            for name, model in KNOWN_MODELS.items()
            if model.shape.parameters < min(ollama.parameters, vllm.parameters)
            and self._shared_split(weights_by_name(name, "ollama"), weights_by_name(name, "vllm"))
        ]
        alternatives = ["--placement exclusive"]
        if smaller:
            largest = max(smaller, key=lambda name: KNOWN_MODELS[name].shape.parameters)
            alternatives.append(f"a smaller model, {largest} in 4 bit")
        return (
            f"shared: both with one request of {context:,} tokens each need {needed:.1f} GiB, and "
            f"the cards have {self.cards.total:.1f} GiB. {describe_alternatives(alternatives)}"
        )

    def _ram_faults(self, low: float, high: float) -> list[str]:
        ram = self.requirements.ram_gib
        if ram is None or high + HOST_RAM_RESERVE_GIB <= ram:
            return []
        fault = (
            f"RAM: a sleeping vLLM pins {low:.0f} to {high:.0f} GiB, and everything else needs "
            f"{HOST_RAM_RESERVE_GIB:g} GiB: {ram:g} GiB are not enough. What would fit: more RAM; "
            "or a smaller model; or a vLLM that the gateway stops and starts instead "
            "(engines.vllm.command)"
        )
        return [fault]

    def _ram_notes(self, ollama: Weights, pinned: float) -> list[str]:
        ram = self.requirements.ram_gib
        left = 0.0 if ram is None else ram - pinned - HOST_RAM_RESERVE_GIB
        if ram is None or left < 0 or left >= ollama.total / GIB:
            return []
        note = (
            f"{left:.0f} of {ram:g} GiB of RAM remain for the page cache while vLLM sleeps, and "
            f"Ollama's weights are {ollama.total / GIB:.0f} GiB: part of each load comes from the "
            "disk"
        )
        return [note]

    def _placement_reason(
        self, placement: Placement, lanes: Mapping[PlannedEngine, LanePlan]
    ) -> str:
        if self.ollama is None or self.vllm is None:
            return "one engine alone"
        sizes = [self.ollama.total / GIB, self.vllm.total / GIB]
        weights = f"{sizes[0]:.1f} + {sizes[1]:.1f} = {sum(sizes):.1f} GiB of weights"
        available = f"{self.cards.total:.1f} GiB on the cards"
        if placement == "exclusive":
            return f"one engine holds the cards at a time: {weights}, {available}"
        share = lanes["vllm"].utilization
        return f"both fit together: {weights}, {available}; vLLM takes {share:.0%} of each card"


def _limit_context(required: Requirements, models: Sequence[Weights]) -> Requirements:
    """The requirements with no more context than the models were made for."""
    for model in models:
        if model.longest is not None and model.longest < (required.context or DEFAULT_CONTEXT):
            if required.context is not None:
                raise UsageError(
                    f"--context {required.context}: {model.name} was made for {model.longest} "
                    "tokens"
                )
            required = msgspec.structs.replace(required, context=model.longest)
    return required


def _context_notes(lanes: Mapping[PlannedEngine, LanePlan], required: Requirements) -> list[str]:
    notes = [
        f"{lane.engine}: requests of {required.tokens:,} tokens are longer than its context of "
        f"{lane.context:,}"
        for lane in lanes.values()
        if required.tokens > lane.context
    ]
    contexts = {lane.context for lane in lanes.values()}
    for small, large in pairwise(sorted(contexts)):
        notes.append(
            f"Requests of more than {small:,} tokens, up to {large:,}, can be served on one lane "
            "only"
        )
    if "vllm" in lanes and lanes["vllm"].pipeline > 1 and required.pipeline is None:
        notes.append(
            "vLLM: the cards cannot share each layer (tensor parallel), so they share the layers "
            "(pipeline parallel)"
        )
    return notes
