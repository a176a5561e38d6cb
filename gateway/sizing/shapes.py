"""A model in numbers: the shape of a decoder, and what its weights take in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from gateway.errors import UsageError

GIB = 2**30

#: The engines that a plan is made for.
PlannedEngine: TypeAlias = Literal["ollama", "vllm"]
Dtype: TypeAlias = Literal["float16", "bfloat16"]

#: What to do where neither a file nor a known name is at hand.
SHAPE_HINT = (
    "Give the file itself (a GGUF, or a folder with config.json), or the numbers of its "
    "config.json: --shape layers=80,hidden=8192,heads=64,kv-heads=8,intermediate=28672,vocab=128256"
)

#: By architecture: one layer in so many sees all tokens, the others a sliding window.
FULL_ATTENTION_EVERY: Mapping[str, int] = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6}


@dataclass(frozen=True)
class Shape:
    """A decoder, in the numbers of its config.json.

    Attributes:
        windowed: Layers that see only the last `window` tokens.
        other: Parameters beside the language model (a vision tower), which quantizers leave at
            16 bit.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    head_dim: int
    tied: bool = False
    bias: bool = False
    windowed: int = 0
    window: int = 0
    other: int = 0

    def kv_bytes(self, tokens: float, bits: float) -> float:
        """Bytes of KV cache of one sequence, at so many bits a value."""
        full = (self.layers - self.windowed) * tokens
        cached = full + self.windowed * min(tokens, self.window)
        return 2 * self.kv_heads * self.head_dim * bits / 8 * cached

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each weight matrix of a layer."""
        queries, values = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": (self.hidden, queries),
            "k": (self.hidden, values),
            "v": (self.hidden, values),
            "o": (queries, self.hidden),
            "gate": (self.hidden, self.intermediate),
            "up": (self.hidden, self.intermediate),
            "down": (self.intermediate, self.hidden),
        }

    @property
    def vectors(self) -> int:
        """Parameters that no quantizer touches: norms and biases."""
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim if self.bias else 0
        return self.layers * (2 * self.hidden + biases) + self.hidden

    @property
    def parameters(self) -> int:
        matrices = sum(rows * columns for rows, columns in self.matrices().values())
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * matrices + self.vectors + embeddings + self.other


@dataclass(frozen=True)
class Weights:
    """A model's weights as an engine loads them, in bytes.

    Attributes:
        active: Parameters that one token uses: fewer than `parameters` with experts.
        embedding: The input embedding, of which a token reads one row.
        head: The output matrix, read whole; 0 where it is the same tensor as the embedding.
        body: All other tensors.
        body_read: Bytes of the body that one token reads: fewer than `body` with experts.
        source: Where the sizes come from, for people to read.
        group: Inputs that share a scale, where that limits how a matrix may be split.
        longest: The longest context that the model was made for, tokens; None if not known.
    """

    name: str
    scheme: str
    shape: Shape
    parameters: int
    active: int
    embedding: int
    head: int
    body: int
    body_read: int
    source: str
    group: int | None = None
    dtype: Dtype = "float16"
    longest: int | None = None

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.body

    @property
    def read(self) -> int:
        """Bytes that must be read for one token of one stream."""
        return self.body_read + (self.head or self.embedding)

    def on_card(self, tensor: int, pipeline: int) -> float:
        """Bytes on the fullest card, at so many tensor and pipeline parallel ranks."""
        layers = math.ceil(self.shape.layers / pipeline) / self.shape.layers
        embeddings = self.embedding + self.head
        if pipeline > 1:  # the first stage has the embedding, the last has the head
            embeddings = max(self.embedding, self.head)
        return (self.body * layers + embeddings) / tensor


def parse_shape(text: str) -> Shape:
    """The shape written as `layers=80,hidden=8192,…`; `tied` and `bias` stand without a number.

    Raises:
        UsageError: A number is missing, or a part is not NAME=NUMBER.
    """
    numbers: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = part.strip().replace("-", "_").partition("=")
        if not value and name in ("tied", "bias"):
            numbers[name] = 1
            continue
        if name not in Shape.__dataclass_fields__ or not value.isdecimal() or int(value) < 1:
            raise UsageError(f"--shape: {part!r} is not NAME=NUMBER. {SHAPE_HINT}")
        numbers[name] = int(value)
    missing = {"layers", "hidden", "heads", "intermediate", "vocab"} - set(numbers)
    if missing:
        raise UsageError(f"--shape: {', '.join(sorted(missing))} missing. {SHAPE_HINT}")
    numbers.setdefault("kv_heads", numbers["heads"])
    numbers.setdefault("head_dim", numbers["hidden"] // numbers["heads"])
    tied, bias = bool(numbers.pop("tied", 0)), bool(numbers.pop("bias", 0))
    return Shape(**numbers, tied=tied, bias=bias)


def latent_attention_error(path: Path) -> UsageError:
    """The error for a model with multi-head latent attention, whose KV cache is not computed."""
    return UsageError(
        f"{path}: the model has latent attention (MLA), and the size of its KV cache cannot be "
        "computed here"
    )


def incomplete_file_error(path: Path, size: int, needed: int) -> UsageError:
    """The error for a model's file that is shorter than its header says."""
    return UsageError(
        f"{path} has {size / GIB:.2f} of {needed / GIB:.2f} GiB: the download is incomplete, "
        "continue it"
    )
