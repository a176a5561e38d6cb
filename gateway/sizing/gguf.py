"""What a GGUF file weighs, from its header."""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gateway.errors import UsageError
from gateway.sizing.shapes import (
    FULL_ATTENTION_EVERY,
    SHAPE_HINT,
    Shape,
    Weights,
    incomplete_file_error,
    latent_attention_error,
)

#: Tensor types by number: name, weights in a block, bytes of a block (ggml.h).
TENSOR_TYPES: Mapping[int, tuple[str, int, int]] = {
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

#: The common values of `general.file_type` (llama.h).
FILE_TYPES: Mapping[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K",
    11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S",
    17: "Q5_K_M", 18: "Q6_K", 25: "IQ4_NL", 30: "IQ4_XS", 32: "BF16", 38: "MXFP4",
}  # fmt: skip

#: The numbers of the scalar types of metadata, as `struct` format characters.
SCALAR_FORMATS = dict(enumerate("BbHhIif?")) | dict(enumerate("Qqd", start=10))
STRING_TYPE, ARRAY_TYPE = 8, 9
#: Longer arrays are vocabularies: the reader skips them.
MAX_ARRAY = 1024


def read_gguf(path: Path) -> Weights:
    """The weights of a GGUF file; one part of a split model stands for all of its parts.

    Raises:
        UsageError: It is not a GGUF file, it is incomplete, or its header lacks what is needed.
        OSError: It cannot be read.
    """
    header = _read_header(path)
    parts = int(header.metadata.get("split.count") or 0)
    tensors = list(header.tensors)
    if parts > 1:
        match = re.fullmatch(r"(.*)-\d{5}-of-\d{5}\.gguf", path.name)
        if match is None:
            raise UsageError(
                f"{path} is one of {parts} parts, and its name is not NAME-00001-of-{parts:05}.gguf"
            )
        files = [path.parent / f"{match[1]}-{n:05}-of-{parts:05}.gguf" for n in range(1, parts + 1)]
        header, tensors = _read_header(files[0]), []
        for file in files:
            tensors += _read_header(file).tensors
    return _weights(path, header.metadata, tensors)


@dataclass(frozen=True)
class _Tensor:
    """One tensor; `end` is where its data end in the file, and `size` their bytes."""

    name: str
    count: int
    type: str
    end: int
    size: int


class _Header:
    """A GGUF's header, read once from its beginning.

    The package `gguf` reads it, too, but depends on numpy and requests and makes an object of
    each of a hundred thousand words.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 4
        version, tensors, pairs = self._scalar("I"), self._scalar("Q"), self._scalar("Q")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version} is not known here")
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("I"))
        by_offset = [self._tensor() for _ in range(tensors)]
        alignment = int(self.metadata.get("general.alignment", 32)) or 32
        start = math.ceil(self._at / alignment) * alignment
        self.tensors = [
            replace(tensor, end=start + tensor.end + tensor.size) for tensor in by_offset
        ]

    def _scalar(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self._data, self._at)[0]
        self._at += struct.calcsize(code)
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        self._at += length
        if self._at > len(self._data):
            raise struct.error
        return self._data[self._at - length : self._at].decode(errors="replace")

    def _value(self, value_type: int) -> Any:
        if value_type in SCALAR_FORMATS:
            return self._scalar(SCALAR_FORMATS[value_type])
        if value_type == STRING_TYPE:
            return self._string()
        if value_type != ARRAY_TYPE:
            raise ValueError(f"a value of type {value_type} is not known here")
        inner, length = self._scalar("I"), self._scalar("Q")
        if inner in SCALAR_FORMATS and length > MAX_ARRAY:
            self._at += length * struct.calcsize(SCALAR_FORMATS[inner])
            return None
        values = (self._value(inner) for _ in range(length))
        if length <= MAX_ARRAY:
            return list(values)
        for _ in values:
            pass
        return None

    def _tensor(self) -> _Tensor:
        """A tensor whose `end` is still its offset in the data."""
        name = self._string()
        sizes = [self._scalar("Q") for _ in range(self._scalar("I"))]
        number, offset = self._scalar("I"), self._scalar("Q")
        if number not in TENSOR_TYPES:
            raise ValueError(f"tensor {name} is of type {number}, which is not known here")
        label, block, size = TENSOR_TYPES[number]
        count = math.prod(sizes)
        return _Tensor(name, count, label, offset, count // block * size)


def _read_header(path: Path) -> _Header:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UsageError(
                f"{path} is not a GGUF file (its first bytes are not GGUF). {SHAPE_HINT}"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header = _Header(data)
            except (struct.error, OverflowError, MemoryError):
                raise UsageError(
                    f"{path} ends within its header, after {len(data):,} bytes: the download is "
                    "incomplete, continue it"
                ) from None
            except ValueError as exc:
                raise UsageError(f"{path}: {exc}") from None
            end = max((tensor.end for tensor in header.tensors), default=0)
            if end > len(data):
                raise incomplete_file_error(path, len(data), end)
    return header


def _weights(path: Path, metadata: Mapping[str, Any], tensors: list[_Tensor]) -> Weights:
    by_name = {tensor.name: tensor for tensor in tensors}
    embedding, head = by_name.get("token_embd.weight"), by_name.get("output.weight")
    if embedding is None:
        raise UsageError(f"{path}: no token_embd.weight in it; is it a language model?")
    shape = _shape(path, metadata, embedding, tied=head is None)
    experts = _number(path, metadata, "expert_count", 0)
    used = _number(path, metadata, "expert_used_count", 0) / experts if experts else 1.0
    body = [tensor for tensor in tensors if tensor not in (embedding, head)]
    expert_tensors = [tensor for tensor in body if "_exps" in tensor.name]
    count = sum(tensor.count for tensor in tensors)
    size = sum(tensor.size for tensor in body)
    size_by_type: dict[str, int] = {}
    for tensor in tensors:
        size_by_type[tensor.type] = size_by_type.get(tensor.type, 0) + tensor.size
    main_type = max(size_by_type, key=lambda name: size_by_type[name])
    return Weights(
        name=path.stem.lower(),
        scheme=FILE_TYPES.get(metadata.get("general.file_type", -1), main_type),
        shape=shape,
        parameters=count,
        active=round(count - (1 - used) * sum(tensor.count for tensor in expert_tensors)),
        embedding=embedding.size,
        head=head.size if head else 0,
        body=size,
        body_read=round(size - (1 - used) * sum(tensor.size for tensor in expert_tensors)),
        source=f"the header of {path.name}",
        longest=_number(path, metadata, "context_length", 0) or None,
    )


def _shape(path: Path, metadata: Mapping[str, Any], embedding: _Tensor, *, tied: bool) -> Shape:
    architecture = _architecture(metadata)
    if f"{architecture}.attention.kv_lora_rank" in metadata:
        raise latent_attention_error(path)

    def number(key: str, default: int | None = None) -> int:
        return _number(path, metadata, key, default)

    heads, layers, hidden = (
        number("attention.head_count"),
        number("block_count"),
        number("embedding_length"),
    )
    every = FULL_ATTENTION_EVERY.get(architecture)
    window = number("attention.sliding_window", 0) if every else 0
    return Shape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        intermediate=number("feed_forward_length", 0),
        vocab=embedding.count // hidden,
        head_dim=number("attention.key_length", hidden // heads),
        tied=tied,
        windowed=layers - layers // every if every and window else 0,
        window=window,
    )


def _number(path: Path, metadata: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A number of the architecture; of a list with one number a layer, the largest."""
    architecture = _architecture(metadata)
    value = metadata.get(f"{architecture}.{key}", default)
    value = max(value, default=None) if isinstance(value, list) else value
    if not isinstance(value, int | float):
        raise UsageError(f"{path}: its header has no {architecture}.{key}. {SHAPE_HINT}")
    return int(value)


def _architecture(metadata: Mapping[str, Any]) -> str:
    return str(metadata.get("general.architecture"))
