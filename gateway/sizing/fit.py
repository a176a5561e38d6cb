"""What fits on the cards, and how fast it can be at most: arithmetic, and nothing else.

Nothing here asks a machine. What cannot be computed is assumed, in the constants below, each
with where it comes from. GiB are 2**30 bytes; GB/s and TFLOPS are powers of ten, as on the
cards' data sheets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal, TypeAlias

from gateway.settings import SettingsError
from gateway.sizing.weights import GIB, KNOWN, MIXES, SCHEMES, Engine, Shape, Weights, named, of

Placement: TypeAlias = Literal["exclusive", "shared"]

#: Bits of a value in the KV cache; q8_0 and q4_0 have a 16-bit scale for 32 of them.
KV_BITS: Mapping[Engine, Mapping[str, float]] = {
    "ollama": {"f16": 16, "q8_0": 8.5, "q4_0": 4.5},
    "vllm": {"auto": 16, "fp8": 8},
}

# Assumed, in GiB a card. What engines hold beside weights and KV: the CUDA context, buffers for
# activations and logits, CUDA graphs, NCCL. Chosen so that a 70B on 2 x 23.5 GiB has the KV tokens
# people report (vLLM 15-18k at 16 bit, Ollama 14k); not measured by us.
VLLM_BESIDE = 1.3
OLLAMA_BESIDE = 1.55
#: What a vLLM asleep at level 1 keeps on each card (measured by others, vllm#28714).
ASLEEP = 1.2
#: Left free on each card where both engines live on it.
MARGIN = 0.25
#: RAM that a sleeping vLLM pins, as a multiple of its weights: the allocator rounds up to powers
#: of two, so it is more than 1 (arithmetic; not given back after waking, vllm#16663).
PINNED = (1.2, 1.35)
#: RAM for all else on the machine, GiB.
ELSE_RAM = 8.0
#: An all-reduce through the host's memory, where cards cannot reach each other: seconds to begin
#: one, bytes a second (assumed, PCIe 4.0 x8). A layer has two.
ALL_REDUCE_S = 20e-6
ALL_REDUCE_BYTES_S = 11e9

#: Ollama's slots are for a few: no more are planned unless they are asked for.
FEW = 4
#: A lane for many should hold so many requests at once before Ollama gets more slots.
MANY = 16
#: Contexts are planned in such steps; one of less than two is of no use in a chat.
STEP = 1024
LEAST_CONTEXT = 2 * STEP
CONTEXT = 8192


@dataclass(frozen=True)
class Cards:
    """The cards, all alike: of cards of different size the smallest counts.

    Attributes:
        count: How many.
        gib: What can be used of each, GiB.
        told: As `--cards` says it.
        name: What they are; None if that is not known, and then there are no bounds on speed.
        gbs: Memory bandwidth of each, GB/s.
        tflops: Dense 16-bit matrix arithmetic of each with 32-bit sums, TFLOPS.
        fp8: Whether they compute in fp8, which vLLM's fp8 KV cache wants.
        p2p: Whether they reach each other without the host.
        assumed: Whether the name is a guess by the size.
    """

    count: int
    gib: float
    told: str
    name: str | None = None
    gbs: float | None = None
    tflops: float | None = None
    fp8: bool = True
    p2p: bool = False
    assumed: bool = False

    @property
    def total(self) -> float:
        return self.count * self.gib


@dataclass(frozen=True)
class Wish:
    """What is wanted of the engines; None leaves it to the plan.

    Attributes:
        tokens: Of a request, prompt and answer.
        at: Numbers of requests at once to think through.
        ram: The machine's, GiB.
    """

    context: int | None = None
    tokens: int = 1500
    at: tuple[int, ...] = (16, 32)
    ollama_slots: int | None = None
    ollama_kv: str = "q8_0"
    vllm_slots: int = 32
    vllm_kv: str | None = None
    tensor: int | None = None
    pipeline: int | None = None
    utilization: float = 0.95
    placement: Placement | None = None
    ram: float | None = None


@dataclass(frozen=True)
class AtOnce:
    """So many requests at once, in tokens: what they need, what is there, who waits."""

    requests: int
    needed_tokens: int
    resident_tokens: int
    running: int
    queued: int
    bound_tokens_s: float | None


@dataclass(frozen=True)
class Speed:
    """Bounds, tokens a second: what the cards' data sheets allow, not what will be.

    Attributes:
        one_stream: Of one stream, by reading the weights.
        one_stream_all_reduce: The same with the assumed time of the all-reduces.
        prefill: Of prompts, by arithmetic.
    """

    one_stream: float
    one_stream_all_reduce: float
    prefill: float


@dataclass(frozen=True)
class Lane:
    """One engine's part of a plan; memory in GiB, on all cards together if not said otherwise.

    Attributes:
        kv_kib: Of a token, KiB, by type of KV cache.
        tokens_alone: KV tokens that fit with nothing else on the cards, by type.
        tokens_beside: The same beside a vLLM that sleeps; empty if there is none.
        tokens: KV tokens that fit as planned.
        memory_gib: What must be free before it loads.
        on_cpu_gib: What of it does not fit; Ollama would run that on the CPU.
    """

    engine: Engine
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
    at: tuple[AtOnce, ...]
    speed: Speed | None
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    tensor: int = 1
    pipeline: int = 1
    utilization: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What would be served, whether it fits, and if not what would.

    Attributes:
        placement: As asked for, or `shared` where both fit together.
        placement_why: In words, with the figures.
        pinned_ram_gib: Least and most RAM that a sleeping vLLM pins; None where it need not sleep.
        faults: Why it does not fit, each with what would. Empty: it fits.
        notes: What to know besides.
    """

    cards: Cards
    wish: Wish
    placement: Placement
    placement_why: str
    lanes: Mapping[Engine, Lane]
    pinned_ram_gib: tuple[float, float] | None
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())


def plan(ollama: Weights | None, vllm: Weights | None, cards: Cards, wish: Wish) -> Plan:
    """Think through what these two would be on these cards.

    Raises:
        SettingsError: What is wished makes no sense: ranks that do not divide the model, more
            ranks than cards, a KV cache that the cards cannot have.
    """
    if ollama is None and vllm is None:
        raise SettingsError("no model is named: give a name, or --ollama and --vllm")
    kv = wish.vllm_kv or ("fp8" if cards.fp8 else "auto")
    if kv == "fp8" and not cards.fp8:
        raise SettingsError(
            f"--vllm-kv fp8: {cards.name} has no fp8 arithmetic (compute capability 8.9); "
            "take --vllm-kv auto"
        )
    wish = _within(wish, [one for one in (ollama, vllm) if one])
    tensor, pipeline = _ranks(vllm, cards, wish) if vllm else (1, 1)
    thinking = _Thinking(cards, wish, kv, tensor, pipeline)
    both = thinking.together(ollama, vllm) if ollama and vllm else None
    placement = wish.placement or ("shared" if both else "exclusive")
    faults: list[str | None] = []
    notes: list[str] = []
    lanes: dict[Engine, Lane] = {}
    sleeps = vllm is not None and ollama is not None and placement == "exclusive"
    if placement == "shared" and ollama and vllm:
        shared = both or _Together(wish.ollama_slots or 1, wish.context or CONTEXT, 0.0)
        if both is None:
            faults.append(thinking.not_together(ollama, vllm))
        lanes["vllm"] = thinking.vllm(vllm, shared.utilization, placement)
        lanes["ollama"] = thinking.ollama(ollama, sleeps=False, given=shared)
    else:
        if vllm:
            lanes["vllm"] = thinking.vllm(vllm, wish.utilization, placement)
            faults.append(thinking.vllm_fault(lanes["vllm"]))
        if ollama:
            lanes["ollama"] = thinking.ollama(ollama, sleeps=sleeps)
            faults.append(thinking.ollama_fault(lanes["ollama"], sleeps=sleeps))
    pinned = None
    if sleeps and vllm:
        low, high = (vllm.total / GIB * much for much in PINNED)
        pinned = (low, high)
        if wish.ram is not None and high + ELSE_RAM > wish.ram:
            faults.append(
                f"RAM: a sleeping vLLM pins {low:.0f} to {high:.0f} GiB, and with "
                f"{ELSE_RAM:g} GiB for all else {wish.ram:g} GiB are too few. More RAM or a "
                "smaller model would do; or let the gateway stop and start vLLM instead "
                "(engines.vllm.command)"
            )
        elif wish.ram is not None and ollama and wish.ram - high - ELSE_RAM < ollama.total / GIB:
            notes.append(
                f"Of {wish.ram:g} GiB of RAM {wish.ram - high - ELSE_RAM:.0f} remain to keep "
                f"Ollama's {ollama.total / GIB:.0f} GiB in the page cache while vLLM sleeps: part "
                "of each load comes from the disk"
            )
    notes += _notes(lanes, wish)
    engines: tuple[Engine, ...] = ("ollama", "vllm")
    lanes = {engine: lanes[engine] for engine in engines if engine in lanes}
    return Plan(
        cards=cards, wish=wish, placement=placement,
        placement_why=_why(ollama, vllm, cards, placement, lanes), lanes=lanes,
        pinned_ram_gib=pinned, faults=tuple(filter(None, faults)), notes=tuple(notes),
    )  # fmt: skip


def _within(wish: Wish, models: Sequence[Weights]) -> Wish:
    """The wish, with no more context than the models were made for."""
    for one in models:
        if one.longest is not None and one.longest < (wish.context or CONTEXT):
            if wish.context is not None:
                raise SettingsError(
                    f"--context {wish.context}: {one.name} was made for {one.longest} tokens"
                )
            wish = replace(wish, context=one.longest)
    return wish


def _ranks(weights: Weights, cards: Cards, wish: Wish) -> tuple[int, int]:
    """Tensor and pipeline parallel ranks: all cards, tensor first where the model divides."""
    if wish.tensor is None and wish.pipeline is None:
        if _indivisible(weights, cards.count) is None:
            return cards.count, 1
        return 1, min(cards.count, weights.shape.layers)
    pipeline = wish.pipeline or max(1, cards.count // (wish.tensor or 1))
    tensor = wish.tensor or max(1, cards.count // pipeline)
    if tensor * pipeline > cards.count:
        raise SettingsError(
            f"--tp {tensor} x --pp {pipeline} are {tensor * pipeline} ranks, and there are "
            f"{cards.count} cards"
        )
    if pipeline > weights.shape.layers:
        raise SettingsError(f"--pp {pipeline}: the model has {weights.shape.layers} layers")
    why = _indivisible(weights, tensor)
    if why is not None:
        fits = [str(n) for n in range(1, cards.count + 1) if _indivisible(weights, n) is None]
        raise SettingsError(
            f"--tp {tensor} does not divide {weights.name}: {why}. --tp {' or '.join(fits)} would, "
            f"and --pp {tensor} needs no dividing"
        )
    return tensor, pipeline


def _indivisible(weights: Weights, tensor: int) -> str | None:
    """Why so many ranks cannot share each of its matrices; None: they can."""
    shape, group = weights.shape, weights.group or 1
    if shape.heads % tensor:
        return f"it has {shape.heads} heads"
    if shape.kv_heads % tensor and tensor % shape.kv_heads:
        return f"it has {shape.kv_heads} KV heads"
    if shape.intermediate % (tensor * group):
        return (
            f"its intermediate size is {shape.intermediate}"
            + (f", {shape.intermediate / group:g} groups of {group}" if group > 1 else "")
            + " (makers of such models pad it: take one that is padded)"
        )
    return None


@dataclass(frozen=True)
class _Together:
    """How both share the cards: Ollama's slots and context, and vLLM's share of each card."""

    slots: int
    context: int
    utilization: float


@dataclass(frozen=True)
class _Thinking:
    """The arithmetic over one set of cards and wishes."""

    cards: Cards
    wish: Wish
    vllm_kv: str
    tensor: int
    pipeline: int

    # vLLM

    def vllm_tokens(self, weights: Weights, utilization: float, kv: str) -> int:
        """KV tokens that vLLM has at this share of each card."""
        room = utilization * self.cards.gib - VLLM_BESIDE
        room = room * GIB - weights.on_card(self.tensor, self.pipeline)
        return max(0, math.floor(room / self._vllm_kv_bytes(weights.shape, kv, on_card=True)))

    def _vllm_kv_bytes(self, shape: Shape, kv: str, *, on_card: bool = False) -> float:
        """Bytes a token, at the planned length of a request."""
        whole = shape.kv_bytes(self.wish.tokens, KV_BITS["vllm"][kv]) / self.wish.tokens
        if not on_card:
            return whole
        stages = math.ceil(shape.layers / self.pipeline) / shape.layers
        return whole * stages * max(1, math.ceil(shape.kv_heads / self.tensor)) / shape.kv_heads

    def vllm(self, weights: Weights, utilization: float, placement: Placement) -> Lane:
        cards, wish, kv = self.cards, self.wish, self.vllm_kv
        tokens = self.vllm_tokens(weights, utilization, kv)
        context = wish.context or _stepped(min(CONTEXT, tokens)) or CONTEXT
        running = [min(n, wish.vllm_slots, tokens // wish.tokens) for n in wish.at]
        ranks = self.tensor * self.pipeline
        asleep = ASLEEP if placement == "exclusive" else 0.0
        return Lane(
            engine="vllm",
            weights=weights,
            weights_gib=weights.total / GIB,
            weights_card_gib=weights.on_card(self.tensor, self.pipeline) / GIB,
            kv=kv,
            kv_kib={one: self._vllm_kv_bytes(weights.shape, one) / 1024 for one in KV_BITS["vllm"]},
            tokens_alone={
                one: self.vllm_tokens(weights, wish.utilization, one) for one in KV_BITS["vllm"]
            },
            tokens_beside={},
            tokens=tokens,
            slots=wish.vllm_slots,
            context=context,
            # It holds on to a little while it sleeps, and that is never seen free.
            memory_gib=ranks * (utilization * cards.gib - asleep),
            on_cpu_gib=0.0,
            at=tuple(
                self._at(n, runs, tokens, self.vllm_tokens_s(weights, runs))
                for n, runs in zip(wish.at, running, strict=True)
            ),
            speed=self._vllm_speed(weights),
            arguments=self._vllm_arguments(weights, utilization, context, placement),
            environment=self._vllm_environment(placement),
            tensor=self.tensor,
            pipeline=self.pipeline,
            utilization=utilization,
        )

    def vllm_tokens_s(
        self, weights: Weights, streams: int, *, all_reduce: bool = True
    ) -> float | None:
        """Tokens a second of so many streams together, at most.

        A step reads the weights once and each stream's KV, or computes for each stream,
        whichever takes longer. Tensor parallel cards do that together and add two all-reduces
        a layer. Pipeline stages take turns: with fewer streams than stages some stand idle.
        """
        gbs, tflops = self.cards.gbs, self.cards.tflops
        if gbs is None or tflops is None:
            return None
        if streams < 1:
            return 0.0
        kv = self._vllm_kv_bytes(weights.shape, self.vllm_kv) * self.wish.tokens
        busy = min(streams, self.pipeline)
        reading = (weights.read + streams / busy * kv) / (self.tensor * gbs * 1e9)
        computing = 2 * weights.active * streams / busy / (self.tensor * tflops * 1e12)
        step = max(reading, computing)
        if all_reduce and self.tensor > 1 and not self.cards.p2p:
            moved = streams / busy * weights.shape.hidden * 2 / ALL_REDUCE_BYTES_S
            step += 2 * weights.shape.layers * (ALL_REDUCE_S + moved)
        return streams / step

    def _vllm_speed(self, weights: Weights) -> Speed | None:
        gbs, tflops = self.cards.gbs, self.cards.tflops
        reduced = self.vllm_tokens_s(weights, 1)
        if gbs is None or tflops is None or reduced is None:
            return None
        return Speed(
            one_stream=self.tensor * gbs * 1e9 / weights.read,
            one_stream_all_reduce=reduced,
            prefill=self.tensor * self.pipeline * tflops * 1e12 / (2 * weights.active),
        )

    def _vllm_arguments(
        self, weights: Weights, utilization: float, context: int, placement: Placement
    ) -> tuple[str, ...]:
        slots = str(self.wish.vllm_slots)
        arguments = [
            "--tensor-parallel-size", str(self.tensor),
            "--pipeline-parallel-size", str(self.pipeline),
            "--dtype", weights.dtype,
            "--gpu-memory-utilization", f"{utilization:.2f}",
            "--kv-cache-dtype", self.vllm_kv,
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

    def _vllm_environment(self, placement: Placement) -> dict[str, str]:
        said = {}
        if self.tensor * self.pipeline > 1 and not self.cards.p2p:
            said["NCCL_P2P_DISABLE"] = "1"
        if placement == "exclusive":
            said["VLLM_SERVER_DEV_MODE"] = "1"  # /sleep and /wake_up
        return said

    def vllm_fault(self, lane: Lane) -> str | None:
        if lane.tokens >= max(lane.context, LEAST_CONTEXT):
            return None
        card = self.cards.gib * lane.utilization
        has = (
            f"{lane.tokens:,} KV tokens are left"
            if lane.tokens
            else "nothing is left for a KV cache"
        )
        return (
            f"vLLM: {lane.weights.name} ({lane.weights.scheme}) takes "
            f"{lane.weights_card_gib:.1f} + {VLLM_BESIDE:g} GiB of the {card:.1f} that it has of "
            f"each card, and {has}. {self._vllm_would(lane.weights)}"
        )

    def _vllm_would(self, weights: Weights) -> str:
        would: list[str] = []
        tokens = self.vllm_tokens(weights, self.wish.utilization, self.vllm_kv)
        if _stepped(tokens) >= LEAST_CONTEXT:
            would.append(f"--context {_stepped(tokens)}")
        want = self.wish.context or CONTEXT

        def fits(other: Weights) -> bool:
            if _indivisible(other, self.tensor):
                return False
            return self.vllm_tokens(other, self.wish.utilization, self.vllm_kv) >= want

        if weights.total >= 8 * GIB or not would:
            smaller = (of(weights.shape, scheme, "", "") for scheme in SCHEMES)
            found = _largest(one for one in smaller if one.total < weights.total and fits(one))
            if found:
                would.append(f"{found.scheme} ({found.total / GIB:.1f} GiB)")
        models = ((name, named(name, "vllm")) for name in KNOWN)
        best = max(
            (pair for pair in models if pair[1].total < weights.total and fits(pair[1])),
            key=lambda pair: pair[1].total, default=None,
        )  # fmt: skip
        if best:
            would.append(f"a smaller model, {best[0]} in {best[1].scheme}")
        return _would(would)

    # Ollama

    def ollama_room(self, weights: Weights, *, sleeps: bool) -> float:
        """GiB for KV, with all cards and nobody else on them but a vLLM that sleeps."""
        taken = OLLAMA_BESIDE + (ASLEEP if sleeps else 0.0)
        return self.cards.total - weights.total / GIB - self.cards.count * taken

    def ollama_tokens(self, weights: Weights, kv: str, *, sleeps: bool) -> int:
        each = self._ollama_kv_gib(weights.shape, CONTEXT, kv) / CONTEXT
        return max(0, math.floor(self.ollama_room(weights, sleeps=sleeps) / each))

    def _ollama_kv_gib(self, shape: Shape, context: int, kv: str) -> float:
        """Of one slot, which Ollama takes whole when it loads."""
        return shape.kv_bytes(context, KV_BITS["ollama"][kv]) / GIB

    def ollama_needs(self, weights: Weights, slots: int, context: int) -> float:
        kv = slots * self._ollama_kv_gib(weights.shape, context, self.wish.ollama_kv)
        return weights.total / GIB + kv + self.cards.count * OLLAMA_BESIDE

    def ollama(self, weights: Weights, *, sleeps: bool, given: _Together | None = None) -> Lane:
        cards, wish, kv = self.cards, self.wish, self.wish.ollama_kv
        slots, context = (given.slots, given.context) if given else self._slots(weights, sleeps)
        tokens = slots * context
        needs = self.ollama_needs(weights, slots, context)
        there = cards.total - (cards.count * ASLEEP if sleeps else 0.0)
        runs = [min(n, slots) for n in wish.at]
        on_cpu = max(0.0, needs - there)
        environment = {
            "OLLAMA_NUM_PARALLEL": str(slots),
            "OLLAMA_CONTEXT_LENGTH": str(context),
            "OLLAMA_KV_CACHE_TYPE": kv,
            "OLLAMA_FLASH_ATTENTION": "1",
            "OLLAMA_MAX_LOADED_MODELS": "1",
            "OLLAMA_KEEP_ALIVE": "-1",
            "OLLAMA_NO_CLOUD": "1",
        }
        if given and cards.count > 1:  # or it takes one card, and vLLM's share of that is gone
            environment["OLLAMA_SCHED_SPREAD"] = "1"
        return Lane(
            engine="ollama",
            weights=weights,
            weights_gib=weights.total / GIB,
            weights_card_gib=weights.total / GIB / cards.count,
            kv=kv,
            kv_kib={
                one: self._ollama_kv_gib(weights.shape, CONTEXT, one) / CONTEXT * 1024**2
                for one in KV_BITS["ollama"]
            },
            tokens_alone={
                one: self.ollama_tokens(weights, one, sleeps=False) for one in KV_BITS["ollama"]
            },
            tokens_beside={
                one: self.ollama_tokens(weights, one, sleeps=True) for one in KV_BITS["ollama"]
            }
            if sleeps
            else {},
            tokens=tokens,
            slots=slots,
            context=context,
            memory_gib=needs,
            on_cpu_gib=on_cpu,
            at=tuple(
                self._at(n, run, tokens, None if on_cpu else self.ollama_tokens_s(weights, run))
                for n, run in zip(wish.at, runs, strict=True)
            ),
            speed=None if on_cpu else self._ollama_speed(weights),
            arguments=(),
            environment=environment,
        )

    def _slots(self, weights: Weights, sleeps: bool) -> tuple[int, int]:  # noqa: FBT001 - ours
        """As many slots of the wished context as fit, up to a few; of less if none does."""
        room = self.ollama_room(weights, sleeps=sleeps)
        context = self.wish.context or CONTEXT
        each = self._ollama_kv_gib(weights.shape, context, self.wish.ollama_kv)
        slots = self.wish.ollama_slots or max(1, min(FEW, math.floor(room / each)))
        if self.wish.context is None and slots * each > room > 0:
            context = _stepped(room / each * context / slots)
        return slots, max(context, LEAST_CONTEXT)

    def ollama_tokens_s(self, weights: Weights, streams: int) -> float | None:
        """Tokens a second of so many streams together, at most.

        Layers lie on one card or the other and one works at a time: the bandwidth and the
        arithmetic are those of a single card. Nothing is said of what runs on the CPU.
        """
        gbs, tflops = self.cards.gbs, self.cards.tflops
        if gbs is None or tflops is None:
            return None
        bits = KV_BITS["ollama"][self.wish.ollama_kv]
        kv = weights.shape.kv_bytes(self.wish.tokens, bits)
        reading = (weights.read + streams * kv) / (gbs * 1e9)
        return streams / max(reading, 2 * weights.active * streams / (tflops * 1e12))

    def _ollama_speed(self, weights: Weights) -> Speed | None:
        gbs, tflops = self.cards.gbs, self.cards.tflops
        if gbs is None or tflops is None:
            return None
        one = gbs * 1e9 / weights.read
        whole = self.cards.count * tflops * 1e12 / (2 * weights.active)
        return Speed(one_stream=one, one_stream_all_reduce=one, prefill=whole)

    def ollama_fault(self, lane: Lane, *, sleeps: bool) -> str | None:
        if not lane.on_cpu_gib:
            return None
        there = self.cards.total - (self.cards.count * ASLEEP if sleeps else 0.0)
        beside = " beside a sleeping vLLM" if sleeps else ""
        return (
            f"Ollama: {lane.weights.name} ({lane.weights.scheme}) needs {lane.memory_gib:.1f} GiB "
            f"({lane.weights_gib:.1f} of weights, {lane.slots} x {lane.context:,} tokens of KV, "
            f"{OLLAMA_BESIDE:g} a card besides) and {there:.1f} are there{beside}: "
            f"{lane.on_cpu_gib:.1f} GiB would run on the CPU, many times slower. "
            f"{self._ollama_would(lane.weights, sleeps=sleeps)}"
        )

    def _ollama_would(self, weights: Weights, *, sleeps: bool) -> str:
        would: list[str] = []
        slots = self.wish.ollama_slots or 1
        tokens = self.ollama_tokens(weights, self.wish.ollama_kv, sleeps=sleeps) // slots
        if _stepped(tokens) >= LEAST_CONTEXT:
            would.append(f"--ollama-slots {slots} --context {_stepped(tokens)}")

        def fits(other: Weights) -> int:
            found = self.ollama_tokens(other, self.wish.ollama_kv, sleeps=sleeps) // slots
            return _stepped(min(found, self.wish.context or CONTEXT))

        least = self.wish.context or LEAST_CONTEXT
        # A file that is not reckoned so, a mixture of experts perhaps, has no mixes to offer.
        alike = abs(weights.shape.parameters / weights.parameters - 1) < 0.03
        mixes = [of(weights.shape, mix, "", "") for mix in MIXES] if alike else []
        smaller = [one for one in mixes if one.total < weights.total and fits(one) >= least]
        would += [
            f"{one.scheme} ({one.total / GIB:.1f} GiB, {slots} x {fits(one):,} tokens)"
            for one in smaller[:2]
        ]
        models = ((name, named(name, "ollama")) for name in KNOWN)
        best = max(
            (pair for pair in models
             if pair[1].total < weights.total and fits(pair[1]) >= (self.wish.context or CONTEXT)),
            key=lambda pair: pair[1].total, default=None,
        )  # fmt: skip
        if best:
            would.append(f"a smaller model, {best[0]} in {best[1].scheme}")
        return _would(would)

    # Both

    def together(self, ollama: Weights, vllm: Weights) -> _Together | None:
        """How both fit on the same cards at once, each over all of them; None: not at all.

        Ollama has as many slots as leave vLLM a KV cache for `MANY` requests.
        """
        context = self.wish.context or CONTEXT
        found: _Together | None = None
        wanted = [self.wish.ollama_slots] if self.wish.ollama_slots else [FEW, 2, 1]
        for slots in wanted:
            share = self.ollama_needs(ollama, slots, context) / self.cards.count
            left = (self.cards.gib - share - MARGIN) / self.cards.gib
            utilization = min(self.wish.utilization, math.floor(left * 100) / 100)
            tokens = self.vllm_tokens(vllm, utilization, self.vllm_kv)
            if tokens < max(context, self.wish.tokens):
                continue
            found = _Together(slots, context, utilization)
            if tokens >= MANY * self.wish.tokens:
                return found
        return found

    def not_together(self, ollama: Weights, vllm: Weights) -> str:
        context = self.wish.context or CONTEXT
        slots = self.wish.ollama_slots or 1
        needs = self.ollama_needs(ollama, slots, context)
        card = vllm.on_card(self.tensor, self.pipeline) / GIB + VLLM_BESIDE
        kv = self._vllm_kv_bytes(vllm.shape, self.vllm_kv) * context / GIB
        needs += card * self.cards.count + kv + MARGIN * self.cards.count
        best = max(
            (name for name, one in KNOWN.items()
             if one.shape.parameters < min(ollama.parameters, vllm.parameters)
             and self.together(named(name, "ollama"), named(name, "vllm"))),
            key=lambda name: KNOWN[name].shape.parameters, default=None,
        )  # fmt: skip
        would = ["--placement exclusive"]
        if best:
            would.append(f"a smaller model, {best} in 4 bit")
        return (
            f"shared: both with one request of {context:,} tokens each need {needs:.1f} GiB, and "
            f"there are {self.cards.total:.1f}. {_would(would)}"
        )

    def _at(self, requests: int, running: int, tokens: int, bound: float | None) -> AtOnce:
        return AtOnce(
            requests=requests, needed_tokens=requests * self.wish.tokens, resident_tokens=tokens,
            running=running, queued=requests - running, bound_tokens_s=bound,
        )  # fmt: skip


def _stepped(tokens: float) -> int:
    return max(0, math.floor(tokens / STEP)) * STEP


def _largest(found: Iterable[Weights]) -> Weights | None:
    return max(found, key=lambda one: one.total, default=None)


def _would(ways: list[str]) -> str:
    if not ways:
        return "Nothing known here would fit: it takes larger cards, or more of them"
    return "What would fit: " + "; or ".join(ways)


def _why(
    ollama: Weights | None,
    vllm: Weights | None,
    cards: Cards,
    placement: Placement,
    lanes: Mapping[Engine, Lane],
) -> str:
    if ollama is None or vllm is None:
        return "one engine alone"
    sizes = [ollama.total / GIB, vllm.total / GIB]
    weights = f"{sizes[0]:.1f} + {sizes[1]:.1f} = {sum(sizes):.1f} GiB of weights"
    there = f"{cards.total:.1f} on the cards"
    if placement == "exclusive":
        return f"one engine has the cards at a time: {weights}, {there}"
    share = lanes["vllm"].utilization
    return f"both at once: {weights}, {there}; vLLM takes {share:.0%} of each card"


def _notes(lanes: Mapping[Engine, Lane], wish: Wish) -> list[str]:
    notes = [
        f"{lane.engine}: requests of {wish.tokens:,} tokens are longer than its context of "
        f"{lane.context:,}"
        for lane in lanes.values()
        if wish.tokens > lane.context
    ]
    contexts = {lane.context for lane in lanes.values()}
    for small, large in pairwise(sorted(contexts)):
        notes.append(
            f"Requests of more than {small:,} tokens, up to {large:,}, can be served on one lane "
            "only"
        )
    if "vllm" in lanes and lanes["vllm"].pipeline > 1 and wish.pipeline is None:
        notes.append("vLLM: the model cannot be halved by heads, so its layers are (pipeline)")
    return notes
