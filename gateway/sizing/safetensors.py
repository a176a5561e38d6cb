"""What a folder of safetensors weighs, from its config.json and the headers of its files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from gateway.errors import UsageError
from gateway.sizing.quantization import estimate_uniform_weights
from gateway.sizing.shapes import (
    FULL_ATTENTION_EVERY,
    SHAPE_HINT,
    Dtype,
    Shape,
    Weights,
    incomplete_file_error,
    latent_attention_error,
)

#: What a config.json must say of the shape.
REQUIRED = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size",
)  # fmt: skip
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def read_safetensors(folder: Path) -> Weights:
    """The weights of a folder with a config.json; without weight files, computed from that.

    Raises:
        UsageError: A file is broken or incomplete, or config.json lacks what is needed.
        OSError: A file cannot be read.
    """
    path = folder / "config.json"
    config = _read_config(path)
    if "kv_lora_rank" in config:
        raise latent_attention_error(path)
    tensors = list(_read_headers(folder))
    shape = _shape(path, config, {tensor.name: tensor.sizes for tensor in tensors})
    if not tensors:
        return _weights_without_files(folder, shape, config)
    quantization = _quantization(config)
    experts = next((config[key] for key in EXPERT_COUNTS if config.get(key)), 0)
    used = config.get("num_experts_per_tok", experts) / experts if experts else 1.0
    embedding = sum(tensor.size for tensor in tensors if "embed_tokens" in tensor.name)
    head = sum(tensor.size for tensor in tensors if tensor.name.startswith("lm_head"))
    body = sum(tensor.size for tensor in tensors) - embedding - head
    expert_bytes = sum(tensor.size for tensor in tensors if ".experts." in tensor.name)
    counts = {tensor.name: _parameters(tensor, quantization.bits) for tensor in tensors}
    return Weights(
        name=str(folder.resolve()),
        scheme=quantization.label,
        shape=shape,
        parameters=sum(counts.values()),
        active=round(
            sum(n * (used if ".experts." in name else 1) for name, n in counts.items())
        ),
        embedding=embedding,
        head=head,
        body=body,
        body_read=round(body - (1 - used) * expert_bytes),
        source=f"the headers of {folder.name}/*.safetensors",
        group=quantization.group,
        dtype=_dtype(quantization.bits, config),
        longest=_max_context(config),
    )  # fmt: skip


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a file: its dimensions, and its bytes."""

    name: str
    size: int
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class _Quantization:
    bits: int
    group: int | None
    method: str

    @property
    def label(self) -> str:
        return f"{self.method} {self.bits} bit" + (f", group {self.group}" if self.group else "")


def _read_config(path: Path) -> dict[str, Any]:
    """The config.json, with the settings of the text model on top."""
    try:
        config = msgspec.json.decode(path.read_bytes())
    except msgspec.DecodeError as exc:
        raise UsageError(f"{path} is not valid JSON: {exc}") from None
    if not isinstance(config, dict):
        raise UsageError(f"{path}: it is not a JSON object, so not the config.json of a model")
    return {**config, **config.get("text_config", {})}


def _read_headers(folder: Path) -> Iterator[_Tensor]:
    """Each tensor of all files; none where there are no files."""
    for path in sorted(folder.glob("*.safetensors")):
        length = path.stat().st_size
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > length - 8:
                raise UsageError(
                    f"{path} ends within its header: the download is incomplete, continue it"
                )
            try:
                header = msgspec.json.decode(file.read(size), type=dict[str, dict[str, Any]])
            except msgspec.DecodeError as exc:
                raise UsageError(f"{path} is not a safetensors file: {exc}") from None
        data_end = 0
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            data_end = max(data_end, end)
            yield _Tensor(name, end - begin, tuple(entry["shape"]))
        if 8 + size + data_end > length:
            raise incomplete_file_error(path, length, 8 + size + data_end)


def _parameters(tensor: _Tensor, bits: int) -> int:
    """Parameters in a tensor: one 32-bit number packs several, and scales are none."""
    if tensor.name.endswith(("scales", "qzeros", "g_idx", "_scale", "_zero_point", "_shape")):
        return 0
    packed = tensor.name.endswith(("qweight", "weight_packed")) and bits < 16
    return math.prod(tensor.sizes) * (32 // bits if packed else 1)


def _shape(path: Path, config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> Shape:
    embedding = next((sizes for name, sizes in tensors.items() if "embed_tokens" in name), None)
    numbers: dict[str, int] = {}
    for key in REQUIRED:
        value = config.get(key)
        if key == "vocab_size" and value is None and embedding:
            value = embedding[0]
        if isinstance(value, int) and value > 0:
            numbers[key] = value
    missing = [key for key in REQUIRED if key not in numbers]
    if missing:
        raise UsageError(f"{path}: {', '.join(missing)} missing. {SHAPE_HINT}")
    heads, hidden = numbers["num_attention_heads"], numbers["hidden_size"]
    model_type = str(config.get("model_type"))
    tied = bool(config.get("tie_word_embeddings", "gemma" in model_type))
    if tensors:
        tied = not any(name.startswith("lm_head") for name in tensors)
    window = config.get("sliding_window") or 0
    return Shape(
        layers=numbers["num_hidden_layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        intermediate=numbers["intermediate_size"],
        vocab=numbers["vocab_size"],
        head_dim=config.get("head_dim") or hidden // heads,
        tied=tied,
        bias=bool(config.get("attention_bias", model_type == "qwen2")),
        windowed=_windowed_layers(config, numbers["num_hidden_layers"]) if window else 0,
        window=window,
    )


def _windowed_layers(config: Mapping[str, Any], layers: int) -> int:
    """Layers that see only a sliding window."""
    types = config.get("layer_types")
    if isinstance(types, list):
        return types.count("sliding_attention")
    every = config.get("sliding_window_pattern") or FULL_ATTENTION_EVERY.get(
        str(config.get("model_type"))
    )
    return layers - layers // every if isinstance(every, int) and every > 1 else 0


def _quantization(config: Mapping[str, Any]) -> _Quantization:
    entry = config.get("quantization_config") or {}
    if not entry:
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        if dtype == "float32":
            return _Quantization(32, None, "float32")
        return _Quantization(16, None, dtype)
    method = str(entry.get("quant_method", "")).upper()
    groups: list[Any] = list((entry.get("config_groups") or {}).values())
    inner = groups[0].get("weights") or {} if groups else {}
    bits = entry.get("bits") or entry.get("w_bit") or inner.get("num_bits")
    bits = bits or (8 if method == "FP8" else 4)
    group = entry.get("group_size") or entry.get("q_group_size") or inner.get("group_size")
    return _Quantization(int(bits), int(group) if group and group > 0 else None, method)


def _dtype(bits: int, config: Mapping[str, Any]) -> Dtype:
    """The type to compute in: 4-bit kernels are made for float16, whose range Gemma exceeds."""
    return "float16" if bits < 16 and "gemma" not in str(config.get("model_type")) else "bfloat16"


def _max_context(config: Mapping[str, Any]) -> int | None:
    tokens = config.get("max_position_embeddings")
    return tokens if isinstance(tokens, int) and tokens > 0 else None


def _weights_without_files(folder: Path, shape: Shape, config: Mapping[str, Any]) -> Weights:
    """The weights computed from config.json, with the sum of the index where there is one."""
    if config.get("num_experts") or config.get("num_local_experts"):
        raise UsageError(
            f"{folder}: a mixture of experts; what one token reads is only in the headers of its "
            "*.safetensors, and none are in this folder"
        )
    quantization = _quantization(config)
    weights = estimate_uniform_weights(
        shape, quantization.bits, quantization.group, str(folder.resolve()), quantization.label,
        f"computed from {folder.name}/config.json",
    )  # fmt: skip
    weights = replace(
        weights, dtype=_dtype(quantization.bits, config), longest=_max_context(config)
    )
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return weights
    try:
        total = msgspec.json.decode(index.read_bytes())["metadata"]["total_size"]
    except (msgspec.DecodeError, KeyError, TypeError):
        raise UsageError(f"{index}: metadata.total_size is missing") from None
    body = int(total) - weights.embedding - weights.head
    return replace(weights, body=body, body_read=body, source=f"{folder.name}/{index.name}")
