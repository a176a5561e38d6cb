"""What quantized weights take in memory, computed tensor by tensor as the quantizers do it.

A "4-bit" model does not have 4 bits a weight: AWQ keeps both embeddings at 16 bit, and
llama.cpp's mixes spend 6 bits on the tensors that matter most.
"""

from __future__ import annotations

from collections.abc import Mapping

from gateway.sizing.shapes import PlannedEngine, Shape, Weights

#: Bits a weight with the scales of its block, by llama.cpp's tensor type.
BITS_PER_WEIGHT: Mapping[str, float] = {
    "F32": 32, "F16": 16, "BF16": 16, "Q8_0": 8.5, "Q6_K": 6.5625, "Q5_1": 6, "Q5_K": 5.5,
    "Q5_0": 5.5, "Q4_K": 4.5, "Q4_0": 4.5, "IQ4_NL": 4.5, "Q3_K": 3.4375,
}  # fmt: skip

#: llama.cpp's mixes, the largest first, and the tensor type that most of each is made of.
GGUF_MIXES: Mapping[str, str] = {
    "BF16": "BF16", "F16": "F16", "Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K_M": "Q5_K",
    "Q4_K_M": "Q4_K", "Q4_K_S": "Q4_K", "Q4_0": "Q4_0", "Q3_K_M": "Q3_K",
}  # fmt: skip

#: Types with blocks of 256 need rows that 256 divides; other rows take a type with blocks of 32.
#: Qwen2.5-72B has rows of 29,568, and so its Q4_K_M is 44 GiB and not 41.
FALLBACK_TYPES = {"Q3_K": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
K_QUANT_BLOCK = 256

#: vLLM's schemes, the largest first: bits of a weight, inputs that share a scale. Embeddings and
#: lm_head stay at 16 bit in all of them.
VLLM_SCHEMES: Mapping[str, tuple[int, int | None]] = {
    "BF16": (16, None), "FP8": (8, None), "GPTQ": (4, 128), "AWQ": (4, 128),
}  # fmt: skip
#: The quantization that a name without one means.
DEFAULT_SCHEMES: Mapping[PlannedEngine, str] = {"ollama": "Q4_K_M", "vllm": "BF16"}


def estimate_weights(shape: Shape, scheme: str, name: str, source: str) -> Weights:
    """The weights of a dense model in one of llama.cpp's mixes or of vLLM's schemes.

    Norms and biases count as llama.cpp's F32 in a mix, and as 16 bit elsewhere.
    """
    if scheme in VLLM_SCHEMES:
        bits, group = VLLM_SCHEMES[scheme]
        return estimate_uniform_weights(shape, bits, group, name, scheme, source)
    body = shape.vectors * 32.0 + shape.other * 16
    for layer in range(shape.layers):
        for part, (row, columns) in shape.matrices().items():
            tensor_type = _storable_type(_mix_type(scheme, part, layer, shape.layers), row)
            body += row * columns * BITS_PER_WEIGHT[tensor_type]
    ends = shape.vocab * shape.hidden
    head_type = _storable_type(_mix_type(scheme, "head", 0, shape.layers), shape.hidden)
    head = ends * BITS_PER_WEIGHT[head_type]
    embedding = ends * BITS_PER_WEIGHT[_storable_type(GGUF_MIXES[scheme], shape.hidden)]
    return Weights(
        name=name, scheme=scheme, shape=shape, parameters=shape.parameters,
        active=shape.parameters, embedding=round((head if shape.tied else embedding) / 8),
        head=0 if shape.tied else round(head / 8), body=round(body / 8),
        body_read=round(body / 8), source=source,
    )  # fmt: skip


def estimate_uniform_weights(
    shape: Shape, bits: int, group: int | None, name: str, scheme: str, source: str
) -> Weights:
    """The weights of a dense model with the same bits in every matrix of a layer.

    Each group of inputs adds a 16-bit scale and a zero point.
    """
    bits_per_weight = bits + ((16 + bits) / group if group else 0)
    matrices = shape.layers * sum(rows * columns for rows, columns in shape.matrices().values())
    body = round((matrices * bits_per_weight + (shape.vectors + shape.other) * 16) / 8)
    ends = shape.vocab * shape.hidden * 2
    return Weights(
        name=name, scheme=scheme, shape=shape, parameters=shape.parameters,
        active=shape.parameters, embedding=ends, head=0 if shape.tied else ends, body=body,
        body_read=body, source=source, group=group,
        dtype="bfloat16" if bits == 16 else "float16",
    )  # fmt: skip


def _mix_type(mix: str, part: str, layer: int, layers: int) -> str:  # noqa: PLR0911 - a table
    """The type that llama.cpp's quantizer gives a tensor (src/llama-quant.cpp, read 2026-11)."""
    base = GGUF_MIXES[mix]
    if base in ("BF16", "F16", "Q8_0", "Q6_K"):
        return base
    if part == "head":
        return "Q6_K"
    eighth = layers // 8
    more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    large = layers == 80  # the 70B class, whose small matrix of values gets one bit more
    match mix, part:
        case (("Q4_K_M" | "Q5_K_M"), ("v" | "down")) if more:
            return "Q6_K"
        case "Q4_K_S", "down" if layer < eighth:
            return "Q5_K"
        case "Q3_K_M", "down":
            return "Q5_K" if layer < layers // 16 else "Q4_K"
        case "Q3_K_M", "o":
            return "Q4_K"
        case "Q4_K_S", "v" if layer < 4:
            return "Q5_K"
        case "Q3_K_M", "v":
            return "Q5_K" if large or layer < 2 else "Q4_K"
        case (("Q4_K_M" | "Q4_K_S"), "v") if large:
            return "Q5_K"
        case _:
            return base


def _storable_type(tensor_type: str, row: int) -> str:
    """The type itself, or its fallback where its blocks do not divide the row."""
    return FALLBACK_TYPES.get(tensor_type, tensor_type) if row % K_QUANT_BLOCK else tensor_type
