"""The models whose shape is known here, and what the engines' names of them mean."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gateway.errors import UsageError
from gateway.sizing.quantization import (
    DEFAULT_SCHEMES,
    GGUF_MIXES,
    VLLM_SCHEMES,
    estimate_weights,
)
from gateway.sizing.shapes import SHAPE_HINT, Dtype, PlannedEngine, Shape, Weights


@dataclass(frozen=True)
class KnownModel:
    """A model whose shape is known, from the config.json of `source`.

    Attributes:
        tag: Ollama's name of it in Q4_K_M.
        repository: A 4-bit version for vLLM, and `scheme` its quantization.
        longest: The longest context that it was made for, tokens.
        padded: The intermediate size that the makers of its 4-bit version had to take.
    """

    shape: Shape
    tag: str
    repository: str
    source: str
    longest: int
    scheme: str = "AWQ"
    padded: int | None = None
    dtype: Dtype = "float16"


KNOWN_MODELS: Mapping[str, KnownModel] = {
    "llama-3.3-70b": KnownModel(
        Shape(80, 8192, 64, 8, 28672, 128256, 128),
        "llama3.3:70b",
        "casperhansen/llama-3.3-70b-instruct-awq",
        "meta-llama/Llama-3.3-70B-Instruct",
        131072,
    ),
    "llama-3.1-8b": KnownModel(
        Shape(32, 4096, 32, 8, 14336, 128256, 128),
        "llama3.1:8b",
        "hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4",
        "meta-llama/Llama-3.1-8B-Instruct",
        131072,
    ),
    "qwen2.5-72b": KnownModel(
        Shape(80, 8192, 64, 8, 29568, 152064, 128, bias=True),
        "qwen2.5:72b",
        "Qwen/Qwen2.5-72B-Instruct-AWQ",
        "Qwen/Qwen2.5-72B-Instruct",
        32768,
        padded=29696,  # 29568 / 128 is odd: two cards could not halve it
    ),
    "qwen2.5-32b": KnownModel(
        Shape(64, 5120, 40, 8, 27648, 152064, 128, bias=True),
        "qwen2.5:32b",
        "Qwen/Qwen2.5-32B-Instruct-AWQ",
        "Qwen/Qwen2.5-32B-Instruct",
        32768,
    ),
    "qwen2.5-14b": KnownModel(
        Shape(48, 5120, 40, 8, 13824, 152064, 128, bias=True),
        "qwen2.5:14b",
        "Qwen/Qwen2.5-14B-Instruct-AWQ",
        "Qwen/Qwen2.5-14B-Instruct",
        32768,
    ),
    "qwen2.5-7b": KnownModel(
        Shape(28, 3584, 28, 4, 18944, 152064, 128, bias=True),
        "qwen2.5:7b",
        "Qwen/Qwen2.5-7B-Instruct-AWQ",
        "Qwen/Qwen2.5-7B-Instruct",
        32768,
    ),
    "qwen3-32b": KnownModel(
        Shape(64, 5120, 64, 8, 25600, 151936, 128),
        "qwen3:32b",
        "Qwen/Qwen3-32B-AWQ",
        "Qwen/Qwen3-32B",
        40960,
    ),
    "qwen3-14b": KnownModel(
        Shape(40, 5120, 40, 8, 17408, 151936, 128),
        "qwen3:14b",
        "Qwen/Qwen3-14B-AWQ",
        "Qwen/Qwen3-14B",
        40960,
    ),
    "mistral-small-24b": KnownModel(
        Shape(40, 5120, 32, 8, 32768, 131072, 128),
        "mistral-small:24b",
        "casperhansen/mistral-small-24b-instruct-2501-awq",
        "mistralai/Mistral-Small-24B-Instruct-2501",
        32768,
    ),
    "gemma-3-27b": KnownModel(
        Shape(
            62, 5376, 32, 16, 21504, 262208, 128,
            tied=True, windowed=52, window=1024, other=423_000_000,
        ),
        "gemma3:27b",
        "ISTA-DASLab/gemma-3-27b-it-GPTQ-4b-128g",
        "google/gemma-3-27b-it",
        131072,
        scheme="GPTQ",
        dtype="bfloat16",  # its activations leave the range of float16
    ),
}  # fmt: skip

#: Words of a model's name that change nothing about the size of its weights.
NEUTRAL_WORDS = re.compile(
    r"\b(instruct|chat|it|meta|int4|4b|128g|text|latest|gguf|2501|v\d+(\.\d+)*)\b"
)
QUANTIZATION_WORD = re.compile(
    r"(?<![a-z0-9])(q[3-8]_k_[ms]|q[3-8]_k|q[48]_0|bf16|fp16|f16|fp8|awq|gptq|int4|w4a16)"
    r"(?![a-z0-9])"
)
SCHEME_SYNONYMS = {"FP16": "F16", "INT4": "GPTQ", "W4A16": "GPTQ"}


def find_known(text: str) -> str | None:
    """The key in `KNOWN_MODELS` that an engine's name of a model means; None if there is none."""
    wanted = _bare_name(text)
    for name, model in KNOWN_MODELS.items():
        if wanted in (_bare_name(name), _bare_name(model.tag), _bare_name(model.repository)):
            return name
    return None


def weights_by_name(text: str, engine: PlannedEngine, shape: Shape | None = None) -> Weights:
    """The weights of a model of this name on this engine.

    The quantization is read from the name. A name without one means the engine's default:
    Q4_K_M of Ollama's library, 16 bit on vLLM.

    Args:
        text: The engine's own name of the model, or a key of `KNOWN_MODELS`.
        engine: The engine that would serve it.
        shape: The shape of a model that is not known here.

    Raises:
        UsageError: The model is not known, or this engine does not support its quantization.
    """
    key = find_known(text)
    if key is None and shape is None:
        raise UsageError(
            f"{text}: not one of the models known here{_similar_names(text)}. {SHAPE_HINT}"
        )
    scheme = _scheme(text, engine)
    if key is None and shape is not None:
        return estimate_weights(shape, scheme, text, "computed from the shape given with --shape")
    model = KNOWN_MODELS[key or ""]
    if engine == "vllm" and text == key:
        text, scheme = model.repository, model.scheme
    elif text == key:
        text = model.tag
    shape = model.shape
    if model.padded and VLLM_SCHEMES.get(scheme, (16, None))[1]:
        shape = replace(shape, intermediate=model.padded)
    weights = estimate_weights(shape, scheme, text, f"computed from the shape of {model.source}")
    dtype = "bfloat16" if scheme == "BF16" else model.dtype
    return replace(weights, dtype=dtype, longest=model.longest)


def _scheme(text: str, engine: PlannedEngine) -> str:
    match = QUANTIZATION_WORD.search(text.lower())
    scheme = match[0].upper() if match else DEFAULT_SCHEMES[engine]
    scheme = SCHEME_SYNONYMS.get(scheme, scheme)
    if engine == "vllm" and scheme == "F16":
        scheme = "BF16"  # as many bits
    supported = GGUF_MIXES if engine == "ollama" else VLLM_SCHEMES
    if scheme not in supported:
        raise UsageError(
            f"{text}: the size of {scheme} on {engine} cannot be computed; known are "
            f"{', '.join(supported)}. Give the file itself: its header has the sizes"
        )
    return scheme


def _bare_name(text: str) -> str:
    """A name without its organisation, its quantization and its neutral words."""
    words = QUANTIZATION_WORD.sub(" ", text.lower().split("/")[-1])
    words = NEUTRAL_WORDS.sub(" ", words.replace("_", " ").replace("-", " "))
    return re.sub(r"[^a-z0-9]", "", words)


def _similar_names(text: str) -> str:
    names = {_bare_name(name): name for name in KNOWN_MODELS}
    near = difflib.get_close_matches(_bare_name(text), list(names), n=3, cutoff=0.5)
    if near:
        return f"; nearest: {', '.join(names[bare] for bare in near)}"
    return f" ({', '.join(KNOWN_MODELS)})"
