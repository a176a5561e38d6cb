"""What a model weighs: told by its files, or reckoned from its shape and quantization.

Of a file only the header is read, and nothing is ever downloaded. What is reckoned goes
tensor by tensor as the quantizers do it, since a "4-bit" model is not 4 bits a weight: AWQ
keeps both embeddings at 16 bit, and llama.cpp's mixes take 6 bits where it matters.
"""

from __future__ import annotations

import difflib
import math
import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from gateway.settings import SettingsError

GIB = 1024**3

Engine: TypeAlias = Literal["ollama", "vllm"]

#: How to say it where neither a file nor a known name is at hand.
BY_HAND = (
    "Give the file itself (a GGUF, or a folder with config.json), or the shape by hand, from its "
    "config.json: --shape layers=80,hidden=8192,heads=64,kv-heads=8,intermediate=28672,vocab=128256"
)


@dataclass(frozen=True)
class Shape:
    """A decoder, in the numbers of its config.json.

    `windowed` of the layers see only the last `window` tokens. `other` are parameters beside
    the language model (a vision tower), which quantizers leave at 16 bit.
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
        """Bytes that one sequence of so many tokens keeps, at so many bits a value."""
        seen = (self.layers - self.windowed) * tokens + self.windowed * min(tokens, self.window)
        return 2 * self.kv_heads * self.head_dim * bits / 8 * seen

    def linear(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each matrix of a layer."""
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
        """Parameters that nobody quantizes: norms, biases."""
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim if self.bias else 0
        return self.layers * (2 * self.hidden + biases) + self.hidden

    @property
    def parameters(self) -> int:
        matrices = sum(rows * columns for rows, columns in self.linear().values())
        ends = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * matrices + self.vectors + ends + self.other


@dataclass(frozen=True)
class Weights:
    """A model's weights as an engine would load them, in bytes.

    `embedding` is read a row a token, `head` whole; where both are one tensor `head` is 0.
    `body_read` is what of the body a token needs: less than `body` where it has experts.
    `group` is how many inputs share a scale, where that limits how it may be split. `longest` is
    the most tokens it was made for, where that is known.
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
    dtype: Literal["float16", "bfloat16"] = "float16"
    longest: int | None = None

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.body

    @property
    def read(self) -> int:
        """Bytes that must be read for one token of one stream."""
        return self.body_read + (self.head or self.embedding)

    def on_card(self, tensor: int, pipeline: int) -> float:
        """Bytes on the fullest card of so many ranks."""
        layers = math.ceil(self.shape.layers / pipeline) / self.shape.layers
        ends = self.embedding + self.head
        if pipeline > 1:  # the first stage has the one, the last the other
            ends = max(self.embedding, self.head)
        return (self.body * layers + ends) / tensor


# How the quantizers do it

#: Bits a weight with the scales of its block, by llama.cpp's type.
BITS: Mapping[str, float] = {
    "F32": 32, "F16": 16, "BF16": 16, "Q8_0": 8.5, "Q6_K": 6.5625, "Q5_1": 6, "Q5_K": 5.5,
    "Q5_0": 5.5, "Q4_K": 4.5, "Q4_0": 4.5, "IQ4_NL": 4.5, "Q3_K": 3.4375,
}  # fmt: skip

#: llama.cpp's mixes, the largest first, and the type each is made of.
MIXES: Mapping[str, str] = {
    "BF16": "BF16", "F16": "F16", "Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K_M": "Q5_K",
    "Q4_K_M": "Q4_K", "Q4_K_S": "Q4_K", "Q4_0": "Q4_0", "Q3_K_M": "Q3_K",
}  # fmt: skip

#: Blocks of 256 need rows that 256 divides; elsewhere the next type with blocks of 32 is taken.
#: Qwen2.5-72B's rows of 29,568 are such: it is why its Q4_K_M is 44 GiB and not 41.
FALLBACK = {"Q3_K": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
BLOCK = 256

#: What vLLM is given, the largest first: bits of a weight, inputs that share a scale. Embeddings
#: and lm_head stay at 16 bit in all of them.
SCHEMES: Mapping[str, tuple[int, int | None]] = {
    "BF16": (16, None), "FP8": (8, None), "GPTQ": (4, 128), "AWQ": (4, 128),
}  # fmt: skip
USUAL: Mapping[Engine, str] = {"ollama": "Q4_K_M", "vllm": "BF16"}


def _type_of(mix: str, part: str, layer: int, layers: int) -> str:  # noqa: PLR0911 - a table
    """The type llama.cpp's quantizer gives a tensor (src/llama-quant.cpp, read 2026-11)."""
    base = MIXES[mix]
    if base in ("BF16", "F16", "Q8_0", "Q6_K"):
        return base
    if part == "head":
        return "Q6_K"
    eighth = layers // 8
    more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    large = layers == 80  # the 70B class, whose small matrix of values is worth a bit more
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


def _fits(kind: str, row: int) -> str:
    return FALLBACK.get(kind, kind) if row % BLOCK else kind


def of(shape: Shape, scheme: str, name: str, source: str) -> Weights:
    """A dense model's weights, reckoned: a mix of llama.cpp's, or a scheme of vLLM's.

    Norms and biases count as llama.cpp's F32 in a mix and as 16 bit elsewhere.
    """
    ends = shape.vocab * shape.hidden
    if scheme in SCHEMES:
        bits, group = SCHEMES[scheme]
        return _even(shape, bits, group, name, scheme, source)
    body = shape.vectors * 32.0 + shape.other * 16
    for layer in range(shape.layers):
        for part, (row, columns) in shape.linear().items():
            kind = _fits(_type_of(scheme, part, layer, shape.layers), row)
            body += row * columns * BITS[kind]
    head = ends * BITS[_fits(_type_of(scheme, "head", 0, shape.layers), shape.hidden)]
    embedding = ends * BITS[_fits(MIXES[scheme], shape.hidden)]
    return Weights(
        name=name, scheme=scheme, shape=shape, parameters=shape.parameters,
        active=shape.parameters, embedding=round((head if shape.tied else embedding) / 8),
        head=0 if shape.tied else round(head / 8), body=round(body / 8),
        body_read=round(body / 8), source=source,
    )  # fmt: skip


def _even(
    shape: Shape, bits: int, group: int | None, name: str, scheme: str, source: str
) -> Weights:
    """The same bits for every matrix of a layer, with a scale and a zero point a group."""
    each = bits + ((16 + bits) / group if group else 0)
    matrices = sum(rows * columns for rows, columns in shape.linear().values())
    body = round((shape.layers * matrices * each + (shape.vectors + shape.other) * 16) / 8)
    ends = shape.vocab * shape.hidden * 2
    return Weights(
        name=name, scheme=scheme, shape=shape, parameters=shape.parameters,
        active=shape.parameters, embedding=ends, head=0 if shape.tied else ends, body=body,
        body_read=body, source=source, group=group,
        dtype="bfloat16" if bits == 16 else "float16",
    )  # fmt: skip


# Names


@dataclass(frozen=True)
class Known:
    """A model whose shape we know, from the config.json of `source`.

    `tag` is Ollama's name of it in Q4_K_M, `repository` a 4-bit one for vLLM and `scheme` its
    quantization. `padded` is the intermediate size its 4-bit makers had to take.
    """

    shape: Shape
    tag: str
    repository: str
    source: str
    longest: int
    scheme: str = "AWQ"
    padded: int | None = None
    dtype: Literal["float16", "bfloat16"] = "float16"


KNOWN: Mapping[str, Known] = {
    "llama-3.3-70b": Known(
        Shape(80, 8192, 64, 8, 28672, 128256, 128),
        "llama3.3:70b",
        "casperhansen/llama-3.3-70b-instruct-awq",
        "meta-llama/Llama-3.3-70B-Instruct",
        131072,
    ),
    "llama-3.1-8b": Known(
        Shape(32, 4096, 32, 8, 14336, 128256, 128),
        "llama3.1:8b",
        "hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4",
        "meta-llama/Llama-3.1-8B-Instruct",
        131072,
    ),
    "qwen2.5-72b": Known(
        Shape(80, 8192, 64, 8, 29568, 152064, 128, bias=True),
        "qwen2.5:72b",
        "Qwen/Qwen2.5-72B-Instruct-AWQ",
        "Qwen/Qwen2.5-72B-Instruct",
        32768,
        padded=29696,  # 29568 / 128 is odd: two cards could not halve it
    ),
    "qwen2.5-32b": Known(
        Shape(64, 5120, 40, 8, 27648, 152064, 128, bias=True),
        "qwen2.5:32b",
        "Qwen/Qwen2.5-32B-Instruct-AWQ",
        "Qwen/Qwen2.5-32B-Instruct",
        32768,
    ),
    "qwen2.5-14b": Known(
        Shape(48, 5120, 40, 8, 13824, 152064, 128, bias=True),
        "qwen2.5:14b",
        "Qwen/Qwen2.5-14B-Instruct-AWQ",
        "Qwen/Qwen2.5-14B-Instruct",
        32768,
    ),
    "qwen2.5-7b": Known(
        Shape(28, 3584, 28, 4, 18944, 152064, 128, bias=True),
        "qwen2.5:7b",
        "Qwen/Qwen2.5-7B-Instruct-AWQ",
        "Qwen/Qwen2.5-7B-Instruct",
        32768,
    ),
    "qwen3-32b": Known(
        Shape(64, 5120, 64, 8, 25600, 151936, 128),
        "qwen3:32b",
        "Qwen/Qwen3-32B-AWQ",
        "Qwen/Qwen3-32B",
        40960,
    ),
    "qwen3-14b": Known(
        Shape(40, 5120, 40, 8, 17408, 151936, 128),
        "qwen3:14b",
        "Qwen/Qwen3-14B-AWQ",
        "Qwen/Qwen3-14B",
        40960,
    ),
    "mistral-small-24b": Known(
        Shape(40, 5120, 32, 8, 32768, 131072, 128),
        "mistral-small:24b",
        "casperhansen/mistral-small-24b-instruct-2501-awq",
        "mistralai/Mistral-Small-24B-Instruct-2501",
        32768,
    ),
    "gemma-3-27b": Known(
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

#: Words of a model's name that change nothing of its weights' size.
NOISE = re.compile(r"\b(instruct|chat|it|meta|int4|4b|128g|text|latest|gguf|2501|v\d+(\.\d+)*)\b")
SAID = re.compile(
    r"(?<![a-z0-9])(q[3-8]_k_[ms]|q[3-8]_k|q[48]_0|bf16|fp16|f16|fp8|awq|gptq|int4|w4a16)"
    r"(?![a-z0-9])"
)
SAME = {"FP16": "F16", "INT4": "GPTQ", "W4A16": "GPTQ"}


def known(text: str) -> str | None:
    """The key in `KNOWN` of a model that an engine calls so; None: not one of them."""
    wanted = _plain(text)
    for name, model in KNOWN.items():
        if wanted in (_plain(name), _plain(model.tag), _plain(model.repository)):
            return name
    return None


def _plain(text: str) -> str:
    """A name without its organisation, quantization, and words that say nothing."""
    words = SAID.sub(" ", text.lower().split("/")[-1])
    words = NOISE.sub(" ", words.replace("_", " ").replace("-", " "))
    return re.sub(r"[^a-z0-9]", "", words)


def named(text: str, engine: Engine, shape: Shape | None = None) -> Weights:
    """What a model of this name weighs on this engine.

    The quantization is read from the name; without one it is what the engine takes then:
    Q4_K_M of Ollama's library, 16 bit on vLLM.

    Args:
        text: The engine's own name of it, or one of `KNOWN`.
        engine: Which would serve it.
        shape: Of a model that is not known.

    Raises:
        SettingsError: It is not known, or this engine does not take that quantization.
    """
    key = known(text)
    if key is None and shape is None:
        raise SettingsError(f"{text}: not one of the models known here{_near(text)}. {BY_HAND}")
    scheme = _scheme(text, engine)
    if key is None and shape is not None:
        return of(shape, scheme, text, "reckoned from the shape given by hand")
    model = KNOWN[key or ""]
    if engine == "vllm" and text == key:
        text, scheme = model.repository, model.scheme
    elif text == key:
        text = model.tag
    shape = model.shape
    if model.padded and SCHEMES.get(scheme, (16, None))[1]:
        shape = replace(shape, intermediate=model.padded)
    made = of(shape, scheme, text, f"reckoned from the shape of {model.source}")
    dtype = "bfloat16" if scheme == "BF16" else model.dtype
    return replace(made, dtype=dtype, longest=model.longest)


def _scheme(text: str, engine: Engine) -> str:
    found = SAID.search(text.lower())
    scheme = found[0].upper() if found else USUAL[engine]
    scheme = SAME.get(scheme, scheme)
    if engine == "vllm" and scheme == "F16":
        scheme = "BF16"  # as many bits
    takes = MIXES if engine == "ollama" else SCHEMES
    if scheme not in takes:
        raise SettingsError(
            f"{text}: no size is known of {scheme} on {engine}; known are {', '.join(takes)}. "
            "Give the file itself, and its own sizes count"
        )
    return scheme


def _near(text: str) -> str:
    names = {_plain(name): name for name in KNOWN}
    near = difflib.get_close_matches(_plain(text), list(names), n=3, cutoff=0.5)
    if near:
        return f"; nearest: {', '.join(names[one] for one in near)}"
    return f" ({', '.join(KNOWN)})"


def by_hand(text: str) -> Shape:
    """`layers=80,hidden=8192,…` as a shape; `tied` and `bias` stand alone.

    Raises:
        SettingsError: A number is missing, or is none.
    """
    said: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = part.strip().replace("-", "_").partition("=")
        if not value and name in ("tied", "bias"):
            said[name] = 1
            continue
        if name not in Shape.__dataclass_fields__ or not value.isdecimal() or int(value) < 1:
            raise SettingsError(f"--shape: {part!r} is no NAME=NUMBER. {BY_HAND}")
        said[name] = int(value)
    missing = {"layers", "hidden", "heads", "intermediate", "vocab"} - set(said)
    if missing:
        raise SettingsError(f"--shape: {', '.join(sorted(missing))} missing. {BY_HAND}")
    said.setdefault("kv_heads", said["heads"])
    said.setdefault("head_dim", said["hidden"] // said["heads"])
    tied, bias = bool(said.pop("tied", 0)), bool(said.pop("bias", 0))
    return Shape(**said, tied=tied, bias=bias)


# Files


def read(path: Path) -> Weights:
    """What the model in a file or folder weighs.

    Args:
        path: A GGUF file (one of a split set reads them all), a folder of safetensors, or its
            config.json.

    Raises:
        SettingsError: There is no such file, it is broken, or it says too little.
    """
    try:
        if path.is_dir() or path.name == "config.json":
            return _safetensors(path if path.is_dir() else path.parent)
        if path.suffix == ".safetensors":
            return _safetensors(path.parent)
        return _gguf(path)
    except OSError as exc:
        raise SettingsError(f"{exc.filename or path}: {exc.strerror or exc}") from exc


#: GGUF's tensor types: name, weights in a block, bytes of a block (ggml.h).
TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}  # fmt: skip

#: GGUF's `general.file_type`, of those that people have (llama.h).
FILE_TYPES: Mapping[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K",
    11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S",
    17: "Q5_K_M", 18: "Q6_K", 25: "IQ4_NL", 30: "IQ4_XS", 32: "BF16", 38: "MXFP4",
}  # fmt: skip

#: Every so-manyth layer sees all tokens, the others a window (by architecture).
WINDOWS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6}
#: GGUF's kinds of value, as `struct` calls them.
SCALARS = dict(enumerate("BbHhIif?")) | dict(enumerate("Qqd", start=10))
STRING, ARRAY = 8, 9
#: Longer arrays are vocabularies: walked over, not kept.
KEPT = 1024


@dataclass(frozen=True)
class _Tensor:
    name: str
    row: int
    count: int
    kind: str
    end: int
    size: int


class _Header:
    """A GGUF's header, read once from its beginning.

    The package `gguf` reads it, too, but brings numpy and requests along and makes an object of
    each of a hundred thousand words.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 4
        version, tensors, pairs = self._one("I"), self._one("Q"), self._one("Q")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version} is not known here")
        self.said: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._text()
            self.said[key] = self._value(self._one("I"))
        found = [self._tensor() for _ in range(tensors)]
        aligned = int(self.said.get("general.alignment", 32)) or 32
        start = math.ceil(self._at / aligned) * aligned
        self.tensors = [replace(one, end=start + one.end + one.size) for one in found]

    def _one(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self._data, self._at)[0]
        self._at += struct.calcsize(code)
        return value

    def _text(self) -> str:
        length = self._one("Q")
        self._at += length
        if self._at > len(self._data):
            raise struct.error
        return self._data[self._at - length : self._at].decode(errors="replace")

    def _value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self._one(SCALARS[kind])
        if kind == STRING:
            return self._text()
        if kind != ARRAY:
            raise ValueError(f"a value of kind {kind} is not known here")
        inner, length = self._one("I"), self._one("Q")
        if inner in SCALARS and length > KEPT:
            self._at += length * struct.calcsize(SCALARS[inner])
            return None
        found = (self._value(inner) for _ in range(length))
        if length <= KEPT:
            return list(found)
        for _ in found:
            pass
        return None

    def _tensor(self) -> _Tensor:
        name = self._text()
        sizes = [self._one("Q") for _ in range(self._one("I"))]
        kind, offset = self._one("I"), self._one("Q")
        if kind not in TYPES:
            raise ValueError(f"tensor {name} is of type {kind}, which is not known here")
        label, block, size = TYPES[kind]
        count = math.prod(sizes)
        return _Tensor(name, sizes[0] if sizes else 1, count, label, offset, count // block * size)


def _gguf(path: Path) -> Weights:
    header = _header(path)
    parts = int(header.said.get("split.count") or 0)
    tensors = list(header.tensors)
    if parts > 1:
        match = re.fullmatch(r"(.*)-\d{5}-of-\d{5}\.gguf", path.name)
        if match is None:
            raise SettingsError(f"{path} is one of {parts} parts, named unlike them")
        files = [path.parent / f"{match[1]}-{n:05}-of-{parts:05}.gguf" for n in range(1, parts + 1)]
        header, tensors = _header(files[0]), []
        for file in files:
            tensors += _header(file).tensors
    return _weights_of(path, header.said, tensors)


def _header(path: Path) -> _Header:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise SettingsError(f"{path} is no GGUF file (its first bytes are not GGUF). {BY_HAND}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header = _Header(data)
            except (struct.error, OverflowError, MemoryError):
                raise SettingsError(
                    f"{path} ends within its header, after {len(data):,} bytes: it was not "
                    "downloaded whole"
                ) from None
            except ValueError as exc:
                raise SettingsError(f"{path}: {exc}") from None
            end = max((one.end for one in header.tensors), default=0)
            if end > len(data):
                raise SettingsError(
                    f"{path} has {len(data) / GIB:.2f} of {end / GIB:.2f} GiB: it was not "
                    "downloaded whole"
                )
    return header


def _weights_of(path: Path, said: Mapping[str, Any], tensors: list[_Tensor]) -> Weights:
    kind = str(said.get("general.architecture"))

    def number(key: str, default: int | None = None) -> int:
        found = said.get(f"{kind}.{key}", default)
        found = max(found, default=None) if isinstance(found, list) else found  # one a layer
        if not isinstance(found, int | float):
            raise SettingsError(f"{path}: its header has no {kind}.{key}. {BY_HAND}")
        return int(found)

    if f"{kind}.attention.kv_lora_rank" in said:
        raise SettingsError(_latent(path))
    heads, layers, hidden = (
        number("attention.head_count"),
        number("block_count"),
        number("embedding_length"),
    )
    by_name = {one.name: one for one in tensors}
    embedding, head = by_name.get("token_embd.weight"), by_name.get("output.weight")
    if embedding is None:
        raise SettingsError(f"{path}: no token_embd.weight in it; is it a language model?")
    window = number("attention.sliding_window", 0) if kind in WINDOWS else 0
    shape = Shape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        intermediate=number("feed_forward_length", 0),
        vocab=embedding.count // hidden,
        head_dim=number("attention.key_length", hidden // heads),
        tied=head is None,
        windowed=layers - layers // WINDOWS[kind] if window else 0,
        window=window,
    )
    body = [one for one in tensors if one not in (embedding, head)]
    experts = number("expert_count", 0)
    used = number("expert_used_count", 0) / experts if experts else 1.0
    idle = [one for one in body if "_exps" in one.name]
    count = sum(one.count for one in tensors)
    size = sum(one.size for one in body)
    kinds: dict[str, int] = {}
    for one in tensors:
        kinds[one.kind] = kinds.get(one.kind, 0) + one.size
    most = max(kinds, key=lambda name: kinds[name])
    return Weights(
        name=path.stem.lower(),
        scheme=FILE_TYPES.get(said.get("general.file_type", -1), most),
        shape=shape,
        parameters=count,
        active=round(count - (1 - used) * sum(one.count for one in idle)),
        embedding=embedding.size,
        head=head.size if head else 0,
        body=size,
        body_read=round(size - (1 - used) * sum(one.size for one in idle)),
        source=f"the header of {path.name}",
        longest=number("context_length", 0) or None,
    )


def _latent(path: Path) -> str:
    return f"{path}: latent attention (MLA), whose KV cache cannot be reckoned here"


def _safetensors(folder: Path) -> Weights:
    path = folder / "config.json"
    try:
        said = msgspec.json.decode(path.read_bytes())
    except msgspec.DecodeError as exc:
        raise SettingsError(f"{path} is no JSON: {exc}") from None
    if not isinstance(said, dict):
        raise SettingsError(f"{path}: no settings of a model in it")
    config = {**said, **said.get("text_config", {})}
    if "kv_lora_rank" in config:
        raise SettingsError(_latent(path))
    tensors = list(_headers(folder))
    shape = _configured(path, config, {name: sizes for name, _, sizes in tensors})
    bits, group, method = _quantized(config)
    scheme = f"{method} {bits} bit" + (f", group {group}" if group else "")
    name = str(folder.resolve())
    if not tensors:
        return _without(folder, shape, bits, group, name, scheme, config)
    experts = next(
        (config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts")
         if config.get(key)),
        0,
    )  # fmt: skip
    used = config.get("num_experts_per_tok", experts) / experts if experts else 1.0
    embedding = sum(size for name, size, _ in tensors if "embed_tokens" in name)
    head = sum(size for name, size, _ in tensors if name.startswith("lm_head"))
    body = sum(size for _, size, _ in tensors) - embedding - head
    idle = sum(size for name, size, _ in tensors if ".experts." in name)
    counts = {name: _count(name, sizes, bits) for name, _, sizes in tensors}
    return Weights(
        name=name,
        scheme=scheme,
        shape=shape,
        parameters=sum(counts.values()),
        active=round(
            sum(n * (used if ".experts." in name else 1) for name, n in counts.items())
        ),
        embedding=embedding,
        head=head,
        body=body,
        body_read=round(body - (1 - used) * idle),
        source=f"the headers of {folder.name}/*.safetensors",
        group=group,
        dtype=_dtype(bits, config),
        longest=_longest(config),
    )  # fmt: skip


def _headers(folder: Path) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Name, bytes and sizes of each tensor of all files; none where there are no files."""
    for path in sorted(folder.glob("*.safetensors")):
        length = path.stat().st_size
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > length - 8:
                raise SettingsError(f"{path} ends within its header: it was not downloaded whole")
            try:
                said = msgspec.json.decode(file.read(size), type=dict[str, dict[str, Any]])
            except msgspec.DecodeError as exc:
                raise SettingsError(f"{path} is no safetensors file: {exc}") from None
        end = 0
        for name, one in said.items():
            if name == "__metadata__":
                continue
            begins, ends = one["data_offsets"]
            end = max(end, ends)
            yield name, ends - begins, tuple(one["shape"])
        if 8 + size + end > length:
            raise SettingsError(
                f"{path} has {length / GIB:.2f} of {(8 + size + end) / GIB:.2f} GiB: it was not "
                "downloaded whole"
            )


def _count(name: str, sizes: tuple[int, ...], bits: int) -> int:
    """Parameters in a tensor: eight of 4 bits are packed in a number, scales are none."""
    if name.endswith(("scales", "qzeros", "g_idx", "_scale", "_zero_point", "_shape")):
        return 0
    packed = 32 // bits if name.endswith(("qweight", "weight_packed")) and bits < 16 else 1
    return math.prod(sizes) * packed


def _configured(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]
) -> Shape:
    embedding = next((sizes for name, sizes in tensors.items() if "embed_tokens" in name), None)
    numbers: dict[str, int] = {}
    for key in (
        "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size",
        "vocab_size",
    ):  # fmt: skip
        found = config.get(key)
        if key == "vocab_size" and found is None and embedding:
            found = embedding[0]
        if isinstance(found, int) and found > 0:
            numbers[key] = found
    missing = [
        key
        for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size",
                    "vocab_size")
        if key not in numbers
    ]  # fmt: skip
    if missing:
        raise SettingsError(f"{path}: {', '.join(missing)} missing. {BY_HAND}")
    layers, heads = numbers["num_hidden_layers"], numbers["num_attention_heads"]
    hidden, kind = numbers["hidden_size"], str(config.get("model_type"))
    each = config.get("layer_types")
    pattern = config.get("sliding_window_pattern") or WINDOWS.get(kind)
    windowed = 0
    if isinstance(each, list):
        windowed = each.count("sliding_attention")
    elif isinstance(pattern, int) and pattern > 1:
        windowed = layers - layers // pattern
    window = config.get("sliding_window") or 0
    tied = bool(config.get("tie_word_embeddings", "gemma" in kind))
    if tensors:
        tied = not any(name.startswith("lm_head") for name in tensors)
    return Shape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        intermediate=numbers["intermediate_size"],
        vocab=numbers["vocab_size"],
        head_dim=config.get("head_dim") or hidden // heads,
        tied=tied,
        bias=bool(config.get("attention_bias", kind == "qwen2")),
        windowed=windowed if window else 0,
        window=window,
    )


def _quantized(config: Mapping[str, Any]) -> tuple[int, int | None, str]:
    """Bits, group and method of a config.json."""
    said = config.get("quantization_config") or {}
    method = str(said.get("quant_method", "")).upper()
    groups: list[Any] = list((said.get("config_groups") or {}).values())
    inner = groups[0].get("weights") or {} if groups else {}
    if not said:
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        return (32, None, "float32") if dtype == "float32" else (16, None, dtype)
    bits = said.get("bits") or said.get("w_bit") or inner.get("num_bits")
    bits = bits or (8 if method == "FP8" else 4)
    group = said.get("group_size") or said.get("q_group_size") or inner.get("group_size")
    return int(bits), int(group) if group and group > 0 else None, method


def _dtype(bits: int, config: Mapping[str, Any]) -> Literal["float16", "bfloat16"]:
    """Gemma's activations leave the range of float16; else 4-bit kernels like it best."""
    return "float16" if bits < 16 and "gemma" not in str(config.get("model_type")) else "bfloat16"


def _longest(config: Mapping[str, Any]) -> int | None:
    said = config.get("max_position_embeddings")
    return said if isinstance(said, int) and said > 0 else None


def _without(
    folder: Path,
    shape: Shape,
    bits: int,
    group: int | None,
    name: str,
    scheme: str,
    config: Mapping[str, Any],
) -> Weights:
    """Of a folder without its weights: by the index's sum where there is one."""
    if config.get("num_experts") or config.get("num_local_experts"):
        raise SettingsError(
            f"{folder}: a mixture of experts; what one token reads is only in the headers of its "
            "*.safetensors, and there are none"
        )
    made = _even(shape, bits, group, name, scheme, f"reckoned from {folder.name}/config.json")
    made = replace(made, dtype=_dtype(bits, config), longest=_longest(config))
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return made
    try:
        total = msgspec.json.decode(index.read_bytes())["metadata"]["total_size"]
    except (msgspec.DecodeError, KeyError, TypeError):
        raise SettingsError(f"{index}: no metadata.total_size in it") from None
    body = int(total) - made.embedding - made.head
    return replace(made, body=body, body_read=body, source=f"{folder.name}/{index.name}")
