"""What a plan assumes because it cannot be computed, each with where it comes from.

GiB are 2**30 bytes. GB/s and TFLOPS are powers of ten, as on the cards' data sheets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from gateway.sizing.shapes import PlannedEngine

#: Bits of a value in the KV cache; q8_0 and q4_0 have a 16-bit scale for every 32 values.
KV_BITS: Mapping[PlannedEngine, Mapping[str, float]] = {
    "ollama": {"f16": 16, "q8_0": 8.5, "q4_0": 4.5},
    "vllm": {"auto": 16, "fp8": 8},
}

# Memory of an engine beside weights and KV cache, GiB a card: the CUDA context, buffers for
# activations and logits, CUDA graphs, NCCL. Chosen so that a 70B on 2 x 23.5 GiB has the KV tokens
# that people report (vLLM 15-18k at 16 bit, Ollama 14k); not measured by us.
VLLM_OVERHEAD_GIB = 1.3
OLLAMA_OVERHEAD_GIB = 1.55
#: Memory that a vLLM asleep at level 1 keeps on each card (measured by others, vllm#28714).
SLEEPING_VLLM_GIB = 1.2
#: Left free on each card where both engines use it, GiB.
SHARED_MARGIN_GIB = 0.25
#: RAM that a sleeping vLLM pins, as a multiple of its weights, least and most: the allocator rounds
#: up to powers of two (computed; not given back after waking, vllm#16663).
PINNED_RAM_FACTORS = (1.2, 1.35)
#: RAM for everything else on the machine, GiB.
HOST_RAM_RESERVE_GIB = 8.0
#: An all-reduce through the host's memory, where cards cannot reach each other: seconds to begin
#: one, and bytes a second (PCIe 4.0 x8). Each layer has two.
ALL_REDUCE_S = 20e-6
ALL_REDUCE_BYTES_S = 11e9

#: Ollama serves a few requests well: more slots are planned only where they are asked for.
MAX_OLLAMA_SLOTS = 4
#: vLLM's KV cache holds this many requests before Ollama gets more slots beside it.
MIN_SHARED_STREAMS = 16
#: Contexts are planned in steps of so many tokens; fewer than two steps are useless in a chat.
CONTEXT_STEP = 1024
MIN_CONTEXT = 2 * CONTEXT_STEP
DEFAULT_CONTEXT = 8192


def round_context(tokens: float) -> int:
    """The tokens rounded down to a whole number of steps, at least 0."""
    return max(0, math.floor(tokens / CONTEXT_STEP)) * CONTEXT_STEP
