"""`twolane plan`, compared with published sizes, with what engines log, and with the facts."""

from __future__ import annotations

import json
import re
import shlex
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from gateway import cli, settings
from gateway.cli import main
from gateway.errors import UsageError
from gateway.gpu.cards import Nvml
from gateway.plan.machine import detect_cards
from gateway.serving import discovery
from gateway.sizing.assumptions import SLEEPING_VLLM_GIB, VLLM_OVERHEAD_GIB
from gateway.sizing.cards import Cards, parse_cards
from gateway.sizing.figures import Plan, Requirements
from gateway.sizing.files import read_weights
from gateway.sizing.fit import make_plan
from gateway.sizing.known import KNOWN_MODELS, weights_by_name
from gateway.sizing.quantization import estimate_weights
from gateway.sizing.shapes import GIB, PlannedEngine, Shape, Weights
from gateway.sizing.vllm_fit import VllmPlanner
from tests.gpu.test_memory import Driver, Info

ROOT = Path(__file__).parents[2]
PAIRS = sorted((ROOT / "deploy/pairs").glob("*.env"))
WRITTEN = [ROOT / ".env.example", *PAIRS]
SMOLLM2 = ROOT / ".engines/smollm2"

#: The box of the facts: two RTX 4090, 96 GB.
BOX = Cards(2, 23.5, "2x24", "4090", 1008, 165.2)
AWQ, Q4_K_M = weights_by_name("llama-3.3-70b", "vllm"), weights_by_name("llama-3.3-70b", "ollama")
NEEDS_SMOLLM2 = pytest.mark.skipif(
    not (SMOLLM2 / "config.json").exists(), reason="no weights for vLLM: make engines"
)


def planned(
    ollama: Weights | None = Q4_K_M, vllm: Weights | None = AWQ, cards: Cards = BOX, **required: Any
) -> Plan:
    return make_plan(ollama, vllm, cards, Requirements(**{"ram_gib": 96.0, **required}))


def tokens_s(streams: int) -> float:
    """The bound on so many streams of vLLM, whether or not their KV cache fits."""
    bound = VllmPlanner(BOX, Requirements(), "auto", 2, 1).tokens_s(AWQ, streams)
    assert bound is not None
    return bound


# The facts: every figure of the tables "What fits" and "Speed limits" that can be computed


def facts() -> dict[str, tuple[float, float, float]]:
    """Each computed figure, and the least and most that the facts say."""
    box, qwen = planned(), weights_by_name("qwen2.5:72b", "ollama")
    ollama, vllm = box.lanes["ollama"], box.lanes["vllm"]
    assert box.pinned_ram_gib
    assert ollama.speed
    assert vllm.speed
    return {
        "Llama-70B AWQ, GiB": (vllm.weights_gib, 36.95, 37.05),
        "and on each card": (vllm.weights_card_gib, 18.45, 18.55),
        "Llama-70B Q4_K_M, GiB": (ollama.weights_gib, 39.55, 39.65),
        "Qwen2.5-72B Q4_K_M, GiB": (qwen.total / GIB, 43.5, 44.5),
        "both, GiB": (ollama.weights_gib + vllm.weights_gib, 76.55, 76.65),
        "KV a token, fp16, KiB": (vllm.kv_kib["auto"], 320, 320),
        "KV a token, fp8, KiB": (vllm.kv_kib["fp8"], 160, 160),
        "KV a token, q8_0, KiB": (ollama.kv_kib["q8_0"], 170, 170),
        "vLLM's KV tokens at 0.95, fp16": (vllm.tokens_alone["auto"], 15_000, 18_000),
        "vLLM's KV tokens at 0.95, fp8": (vllm.tokens_alone["fp8"], 29_000, 36_000),
        "Ollama's KV tokens, f16": (ollama.tokens_alone["f16"], 13_500, 14_500),
        "Ollama's KV tokens, q8_0": (ollama.tokens_alone["q8_0"], 26_000, 27_500),
        "the same beside a sleeping vLLM": (ollama.tokens_beside["q8_0"], 8_000, 12_000),
        "RAM that it pins, least, GiB": (box.pinned_ram_gib[0], 43.5, 44.5),
        "RAM that it pins, most, GiB": (box.pinned_ram_gib[1], 49.5, 50.5),
        "one stream, vLLM, tok/s": (vllm.speed.one_stream, 53, 54),
        "with all-reduces": (tokens_s(1), 44, 45),
        "one stream, Ollama": (ollama.speed.one_stream, 23.5, 24.5),
        # The facts do not say with how many tokens a stream: 1,500 in 16 bit make these two.
        "16 streams": (tokens_s(16), 541 * 0.995, 541 * 1.005),
        "32 streams": (tokens_s(32), 858 * 0.995, 858 * 1.005),
        "prefill": (vllm.speed.prefill, 2_340 * 0.995, 2_340 * 1.005),
    }


@pytest.mark.parametrize("what", facts())
def test_the_plan_agrees_with_the_facts(what: str) -> None:
    computed, least, most = facts()[what]

    assert least <= computed <= most


def test_two_70b_are_never_resident_together() -> None:
    asked = planned(placement="shared")

    assert planned().placement == "exclusive"
    assert "the cards have 47.0 GiB" in asked.faults[0]
    assert "--placement exclusive" in asked.faults[0]


def test_the_kv_cache_limits_a_70b_to_21_of_32_requests() -> None:
    of_16, of_32 = planned().lanes["vllm"].load_points

    assert (of_32.needed_tokens, of_32.running, of_32.queued) == (48_000, 21, 11)
    assert (of_16.needed_tokens, of_16.queued) == (24_000, 0)


def test_qwen_72b_in_q4_k_m_runs_partly_on_the_cpu_and_the_fault_says_what_would_fit() -> None:
    asked = planned(
        weights_by_name("qwen2.5:72b", "ollama"), weights_by_name("qwen2.5-72b", "vllm")
    )
    smaller = planned(
        weights_by_name("qwen2.5:72b-instruct-q4_K_S", "ollama"),
        weights_by_name("qwen2.5-72b", "vllm"),
    )

    assert asked.lanes["ollama"].on_cpu_gib > 0
    assert "Q4_K_S (40.9 GiB, 1 x 3,072 tokens)" in asked.faults[0]
    assert smaller.faults == ()
    assert smaller.lanes["ollama"].context == 3072


# Sizes, compared with what is published and with what real engines log


@pytest.mark.parametrize(
    ("model", "gigabytes"),
    [
        # Files of bartowski's quantizations of Llama-3.1-70B and the others on Hugging Face.
        ("llama3.3:70b-instruct-q8_0", 74.98),
        ("llama3.3:70b-instruct-q6_K", 57.89),
        ("llama3.3:70b-instruct-q5_K_M", 49.95),
        ("llama3.3:70b", 42.52),
        ("llama3.3:70b-instruct-q4_K_S", 40.35),
        ("llama3.3:70b-instruct-q4_0", 40.12),
        ("llama3.3:70b-instruct-q3_K_M", 34.27),
        ("llama3.1:8b", 4.92),
        ("qwen2.5:32b", 19.85),
        ("qwen2.5:14b", 8.99),
        ("qwen2.5:7b", 4.68),
        ("qwen3:32b", 19.76),
        ("mistral-small:24b", 14.33),
    ],
)
def test_the_computed_size_of_a_gguf_is_its_published_size(model: str, gigabytes: float) -> None:
    assert weights_by_name(model, "ollama").total / 1e9 == pytest.approx(gigabytes, rel=0.005)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-3.3-70b", 70.55), ("llama-3.1-8b", 8.03), ("qwen2.5-72b", 72.71),
     ("qwen2.5-32b", 32.76), ("qwen2.5-14b", 14.77), ("qwen2.5-7b", 7.62), ("qwen3-32b", 32.76),
     ("qwen3-14b", 14.77), ("mistral-small-24b", 23.57), ("gemma-3-27b", 27.43)],
)  # fmt: skip
def test_each_known_shape_has_the_models_parameters(name: str, billions: float) -> None:
    assert KNOWN_MODELS[name].shape.parameters / 1e9 == pytest.approx(billions, rel=0.001)


def test_every_known_model_has_its_parameters_tested() -> None:
    mark = test_each_known_shape_has_the_models_parameters.pytestmark[0]  # type: ignore[attr-defined]

    assert {name for name, _ in mark.args[1]} == set(KNOWN_MODELS)


def test_embeddings_stay_at_16_bit_in_awq() -> None:
    assert AWQ.embedding == AWQ.head == 128256 * 8192 * 2
    assert AWQ.body * 8 / (AWQ.parameters - 2 * 128256 * 8192) == pytest.approx(4.156, abs=0.002)


@NEEDS_SMOLLM2
def test_the_kv_cache_is_as_large_as_in_real_engines() -> None:
    """As logged here by Ollama 0.24 (45.00 MiB, 2048 cells, f16) and vLLM 0.32 (1 GiB)."""
    shape = read_weights(SMOLLM2).shape

    assert shape.kv_bytes(2048, 16) == 45 * 1024**2
    assert GIB / shape.kv_bytes(1, 16) // 16 * 16 == 46_592


# Files


@pytest.mark.skipif(discovery.packaged_model() is None, reason="no extra `embedded`")
def test_the_packaged_gguf_is_read() -> None:
    path = discovery.packaged_model()
    assert path
    read = read_weights(path)

    assert (read.scheme, read.parameters) == ("Q4_1", 134_515_008)
    assert read.shape.kv_heads == 3
    assert read.shape.tied
    assert 0 < path.stat().st_size - read.total < 2e6  # the rest is the header


@NEEDS_SMOLLM2
def test_the_same_model_in_safetensors_has_the_same_shape() -> None:
    read = read_weights(SMOLLM2)
    path = discovery.packaged_model()

    assert (read.parameters, read.scheme) == (134_515_008, "bfloat16 16 bit")
    assert read.total == 2 * read.parameters
    assert path is None or read_weights(path).shape == read.shape


F32, Q4_K = 0, 12


def gguf(path: Path, **metadata: Any) -> Path:
    """A small GGUF; `metadata` changes its metadata, `kind` its tensors' type, `cut` its end."""
    kind = metadata.pop("kind", F32)
    cut = metadata.pop("cut", None)
    extra = metadata.pop("extra", {})
    tensors = {"token_embd.weight": (256, 32), "blk.0.ffn_up.weight": (256, 512),
               "output.weight": (256, 32), **extra}  # fmt: skip
    arch = metadata.pop("arch", "llama")
    pairs = {
        "general.architecture": arch, f"{arch}.block_count": 2, f"{arch}.embedding_length": 256,
        f"{arch}.attention.head_count": 4, f"{arch}.attention.head_count_kv": 2,
        f"{arch}.feed_forward_length": 512, "tokenizer.ggml.tokens": ["word"] * 5000,
        "tokenizer.ggml.scores": [0] * 5000,
        **metadata,
    }  # fmt: skip

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def pair(value: Any) -> bytes:
        if isinstance(value, str):
            return struct.pack("<I", 8) + text(value)
        if isinstance(value, list):
            inner = 8 if isinstance(value[0], str) else 4
            items = [text(v) if inner == 8 else struct.pack("<I", v) for v in value]
            return struct.pack("<IIQ", 9, inner, len(value)) + b"".join(items)
        return struct.pack("<II", 4, value)

    body = b"".join(text(k) + pair(v) for k, v in pairs.items() if v is not None)
    offset = 0
    for name, sizes in tensors.items():
        body += text(name) + struct.pack("<I", len(sizes)) + struct.pack(f"<{len(sizes)}Q", *sizes)
        body += struct.pack("<IQ", kind, offset)
        count = 1
        for size in sizes:
            count *= size
        offset += count * 4 if kind == F32 else count // 256 * 144
    data = b"GGUF" + struct.pack(
        "<IQQ", 3, len(tensors), sum(v is not None for v in pairs.values())
    )
    data += body
    data += bytes(-len(data) % 32 + offset)
    path.write_bytes(data[:cut])
    return path


def test_the_sizes_of_a_gguf_follow_from_its_tensor_types(tmp_path: Path) -> None:
    read = read_weights(gguf(tmp_path / "a.gguf", kind=Q4_K))

    assert (read.embedding, read.body) == (256 * 32 * 4.5 / 8, 256 * 512 * 4.5 / 8)
    assert read.shape == Shape(2, 256, 4, 2, 512, 32, 64)


def test_all_parts_of_a_split_gguf_count(tmp_path: Path) -> None:
    for n in (1, 2):
        gguf(tmp_path / f"a-0000{n}-of-00002.gguf", **{"split.count": 2})
    whole, part = (tmp_path / "a-00002-of-00002.gguf", read_weights(gguf(tmp_path / "b.gguf")))

    assert read_weights(whole).parameters == 2 * part.parameters
    (tmp_path / "a-00001-of-00002.gguf").unlink()
    with pytest.raises(UsageError, match="a-00001-of-00002"):
        read_weights(whole)


def test_a_token_reads_only_the_experts_that_it_uses(tmp_path: Path) -> None:
    experts = {"blk.0.ffn_up_exps.weight": (256, 512, 8)}
    used = {"llama.expert_count": 8, "llama.expert_used_count": 2}
    dense = read_weights(gguf(tmp_path / "a.gguf"))
    mixed = read_weights(gguf(tmp_path / "b.gguf", extra=experts, **used))

    assert mixed.total - dense.total == 8 * 256 * 512 * 4
    assert mixed.read - dense.read == 2 * 256 * 512 * 4
    assert mixed.active - dense.active == 2 * 256 * 512


def test_layers_with_a_window_cache_no_more_than_the_window(tmp_path: Path) -> None:
    metadata = {"gemma3.attention.sliding_window": 100, "gemma3.block_count": 12}
    path = gguf(tmp_path / "a.gguf", arch="gemma3", **metadata)
    shape = read_weights(path).shape

    assert (shape.windowed, shape.window) == (10, 100)
    assert shape.kv_bytes(1000, 16) == 2 * 2 * 64 * 2 * (2 * 1000 + 10 * 100)


CONFIG = {
    "model_type": "llama", "num_hidden_layers": 80, "hidden_size": 8192, "vocab_size": 128256,
    "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 28672,
}  # fmt: skip
GROUPS_OF_128 = {"quant_method": "awq", "bits": 4, "group_size": 128}


def folder(
    path: Path, tensors: dict[str, tuple[str, list[int]]] | None = None, **config_changes: Any
) -> Path:
    path.mkdir(exist_ok=True)
    config = {
        key: value for key, value in {**CONFIG, **config_changes}.items() if value is not None
    }
    (path / "config.json").write_text(json.dumps(config))
    if tensors:
        sizes = {"F16": 2, "I32": 4, "BF16": 2}
        header, at = {}, 0
        for name, (dtype, shape) in tensors.items():
            count = sizes[dtype]
            for one in shape:
                count *= one
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + count]}
            at += count
        text = json.dumps(header).encode()
        (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))
    return path


def test_a_config_alone_is_enough_for_the_arithmetic(tmp_path: Path) -> None:
    read = read_weights(folder(tmp_path / "m", quantization_config=GROUPS_OF_128) / "config.json")

    assert read.total == AWQ.total
    assert (read.group, read.scheme) == (128, "AWQ 4 bit, group 128")


def test_the_index_has_the_sum(tmp_path: Path) -> None:
    path = folder(tmp_path / "m")
    (path / "model.safetensors.index.json").write_text('{"metadata": {"total_size": 141107412992}}')

    assert read_weights(path).total == 141_107_412_992


def test_packed_weights_are_counted_from_safetensors_headers(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": ("F16", [32, 64]),
        "model.layers.0.mlp.up_proj.qweight": ("I32", [64, 16]),  # 64 x 128 in 4 bit
        "model.layers.0.mlp.up_proj.scales": ("F16", [1, 128]),
        "lm_head.weight": ("F16", [32, 64]),
    }
    read = read_weights(
        folder(tmp_path / "m", tensors, quantization_config=GROUPS_OF_128, num_hidden_layers=1)
    )

    assert (read.embedding, read.head, read.body) == (4096, 4096, 4096 + 256)
    assert read.parameters == 2 * 32 * 64 + 64 * 128


# Names


@pytest.mark.parametrize(
    ("text", "engine", "scheme", "key"),
    [
        ("llama3.3:70b", "ollama", "Q4_K_M", "llama-3.3-70b"),
        ("llama3.3:70b-instruct-q8_0", "ollama", "Q8_0", "llama-3.3-70b"),
        ("meta-llama/Llama-3.3-70B-Instruct", "vllm", "BF16", "llama-3.3-70b"),
        ("hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4", "vllm", "AWQ", "llama-3.1-8b"),
        ("Qwen/Qwen2.5-14B-Instruct-GPTQ-Int4", "vllm", "GPTQ", "qwen2.5-14b"),
        ("Qwen/Qwen3-32B-FP8", "vllm", "FP8", "qwen3-32b"),
        ("mistralai/Mistral-Small-24B-Instruct-2501", "vllm", "BF16", "mistral-small-24b"),
        ("gemma3:27b", "ollama", "Q4_K_M", "gemma-3-27b"),
    ],
)
def test_the_engines_own_names_are_understood(
    text: str, engine: PlannedEngine, scheme: str, key: str
) -> None:
    read = weights_by_name(text, engine)

    assert (read.name, read.scheme) == (text, scheme)
    assert read.shape == KNOWN_MODELS[key].shape


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_every_known_name_fits_on_the_box_or_says_what_would(name: str) -> None:
    plan = planned(weights_by_name(name, "ollama"), weights_by_name(name, "vllm"))

    assert all("What would fit" in fault for fault in plan.faults)
    assert set(plan.lanes) == {"ollama", "vllm"}


# Properties


MODELS = [(weights_by_name(name, "ollama"), weights_by_name(name, "vllm")) for name in KNOWN_MODELS]
SIZES = st.sampled_from([16.0, 23.5, 47.0, 79.0])


@given(
    pair=st.sampled_from(MODELS),
    gib=SIZES,
    slots=st.integers(1, 64),
    context=st.integers(512, 32768),
)
def test_more_slots_and_more_context_never_need_less(
    pair: tuple[Weights, Weights], gib: float, slots: int, context: int
) -> None:
    def needs(n: int, tokens: int) -> float:
        endless = replace(pair[0], longest=None)
        plan = planned(endless, None, structs.replace(BOX, gib=gib), ollama_slots=n, context=tokens)
        return plan.lanes["ollama"].memory_gib

    assert needs(slots, context) <= needs(slots + 1, context)
    assert needs(slots, context) <= needs(slots, context + 512)


@given(
    pair=st.sampled_from(MODELS), gib=SIZES, tokens=st.integers(100, 20_000), n=st.integers(1, 200)
)
def test_longer_requests_never_run_more_concurrently_and_every_request_is_counted(
    pair: tuple[Weights, Weights], gib: float, tokens: int, n: int
) -> None:
    cards = structs.replace(BOX, gib=gib)
    short = (
        planned(None, pair[1], cards, tokens=tokens, concurrency=(n,)).lanes["vllm"].load_points[0]
    )
    long = (
        planned(None, pair[1], cards, tokens=tokens + 100, concurrency=(n,))
        .lanes["vllm"]
        .load_points[0]
    )

    assert long.running <= short.running <= n
    assert short.running + short.queued == n


@given(pair=st.sampled_from(MODELS), gib=st.floats(4, 100), more=st.floats(0, 20))
def test_larger_cards_never_hold_less(
    pair: tuple[Weights, Weights], gib: float, more: float
) -> None:
    small = planned(*pair, cards=structs.replace(BOX, gib=gib), placement="exclusive")
    large = planned(*pair, cards=structs.replace(BOX, gib=gib + more), placement="exclusive")

    for engine in small.lanes:
        for kind, tokens in small.lanes[engine].tokens_alone.items():
            assert tokens <= large.lanes[engine].tokens_alone[kind]
    assert len(large.faults) <= len(small.faults)


@given(pair=st.sampled_from(MODELS), gib=SIZES)
def test_a_shared_placement_fits_on_each_card(pair: tuple[Weights, Weights], gib: float) -> None:
    plan = planned(*pair, cards=structs.replace(BOX, gib=gib), ram_gib=None)
    if plan.placement != "shared":
        return
    ollama, vllm = plan.lanes["ollama"], plan.lanes["vllm"]

    assert ollama.memory_gib / 2 + vllm.utilization * gib <= gib
    assert vllm.weights_card_gib + VLLM_OVERHEAD_GIB < vllm.utilization * gib
    assert vllm.tokens >= vllm.context
    assert ollama.environment["OLLAMA_SCHED_SPREAD"] == "1"


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_two_ranks_hold_half_of_the_weights_each(tensor: int, pipeline: int) -> None:
    lane = planned(tensor=tensor, pipeline=pipeline).lanes["vllm"]

    assert lane.weights_card_gib == pytest.approx(18.5, abs=0.05)
    assert lane.tokens == pytest.approx(32_855, rel=0.01)


def test_pipeline_parallel_is_slower_for_one_stream_and_not_for_prefill() -> None:
    tp, pp = (planned(tensor=t, pipeline=3 - t).lanes["vllm"] for t in (2, 1))
    assert tp.speed
    assert pp.speed

    assert pp.speed.one_stream == pytest.approx(tp.speed.one_stream / 2)
    assert pp.speed.prefill == pytest.approx(tp.speed.prefill)


def test_a_model_with_an_odd_number_of_heads_is_pipeline_parallel() -> None:
    nine = estimate_weights(Shape(30, 576, 9, 3, 1536, 49152, 64), "BF16", "m", "")
    lane = planned(None, nine).lanes["vllm"]

    assert (lane.tensor, lane.pipeline) == (1, 2)


def test_cards_without_fp8_get_a_16_bit_kv_cache() -> None:
    assert planned(cards=parse_cards("2x3090")).lanes["vllm"].kv == "auto"


def test_too_little_ram_for_a_sleeping_vllm_is_a_fault() -> None:
    assert "pins 44 to 50 GiB" in planned(ram_gib=48).faults[0]
    assert planned(ram_gib=96).faults == ()


def test_an_engine_alone_is_planned_too() -> None:
    assert list(planned(vllm=None).lanes) == ["ollama"]
    assert planned(vllm=None).lanes["ollama"].slots == 3  # all of the cards are its own


# The cards of this machine


@dataclass
class ReservedInfo(Info):
    reserved: int = 0


class NamedDriver(Driver):
    """The driver of tests.gpu, with cards that have names and reserve some memory."""

    NVMLError_FunctionNotFound = Driver.NVMLError_NotSupported
    nvmlMemory_v2 = 2  # noqa: N815 - the library's name
    name = "NVIDIA GeForce RTX 4090"

    def nvmlDeviceGetName(self, handle: tuple[int, int]) -> str:  # noqa: N802
        self.card(handle)
        return self.name

    def nvmlDeviceGetMemoryInfo(  # noqa: N802
        self, handle: tuple[int, int], version: int = 1
    ) -> Info:
        info = super().nvmlDeviceGetMemoryInfo(handle)
        if version == 2 and not isinstance(info, ReservedInfo):
            raise self.NVMLError_FunctionNotFound
        return info


def test_the_usable_memory_of_the_cards_is_detected() -> None:
    driver = NamedDriver([ReservedInfo(24 * GIB, 0, GIB // 2), ReservedInfo(24 * GIB, 0, GIB // 4)])
    cards = detect_cards(Nvml(library=driver))

    assert (cards.count, cards.gib, cards.name, cards.spec) == (2, 23.5, "4090", "2x23.50@4090")
    assert parse_cards(cards.spec) == cards  # the written command makes the same plan elsewhere


def test_an_old_driver_and_an_unknown_card_are_supported() -> None:
    driver = NamedDriver([Info(16 * GIB, 0)])
    driver.name = "NVIDIA Something"
    cards = detect_cards(Nvml(library=driver))

    assert (cards.count, cards.gib, cards.name) == (1, 16.0, None)
    assert planned(None, weights_by_name("llama-3.1-8b", "vllm"), cards).lanes["vllm"].speed is None


@pytest.mark.parametrize(
    ("text", "gib", "name"),
    [("2x24", 23.5, "4090"), ("2x23.5", 23.5, None), ("2x4090", 23.5, "4090"),
     ("1x5090", 31.33, "5090"), ("4x48", 47.0, None), ("2x24.0", 24.0, "4090"),
     ("2x23.6@3090", 23.6, "3090")],
)  # fmt: skip
def test_cards_are_named_by_size_or_kind(text: str, gib: float, name: str | None) -> None:
    cards = parse_cards(text)

    assert (round(cards.gib, 2), cards.name) == (gib, name)


# The command


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    ended = 0
    try:
        main(["plan", *arguments])
    except SystemExit as exc:
        ended = int(str(exc.code))
    assert ended == code
    output = capsys.readouterr()
    return output.err if code == 2 else output.out


@pytest.mark.parametrize("file", WRITTEN, ids=lambda path: path.name)
def test_plan_writes_the_files_of_the_repository(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [command] = re.findall(r"^#   (twolane plan .*) --write$", file.read_text(), re.MULTILINE)

    run(capsys, *shlex.split(command)[2:], "--write", str(tmp_path))

    assert (tmp_path / ".env").read_bytes() == file.read_bytes()
    read = settings.load(tmp_path / "twolane.yaml", {}, {})
    [(name, model)] = read.models.items()
    variables = dict(re.findall(r"^([A-Z_]+)=(.*)$", file.read_text(), re.MULTILINE))
    assert variables["MODEL"] == name
    assert variables["PLACEMENT"] == model.placement
    assert variables["VLLM_MODEL"] == model.lanes["vllm"].model
    assert int(variables["OLLAMA_CONTEXT"]) == model.lanes["ollama"].context


def test_the_example_is_the_70b_pair_and_both_placements_have_a_pair() -> None:
    placements = {re.findall("^PLACEMENT=(.*)$", f.read_text(), re.MULTILINE)[0] for f in PAIRS}

    assert (ROOT / ".env.example").read_bytes() == (
        ROOT / "deploy/pairs/llama-3.3-70b.env"
    ).read_bytes()
    assert placements == {"exclusive", "shared"}


def test_every_variable_of_compose_is_written() -> None:
    names = re.findall(r"^([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)

    assert names == [
        "MODEL", "PLACEMENT", "OLLAMA_MODEL", "OLLAMA_SLOTS", "OLLAMA_CONTEXT",
        "OLLAMA_KV_CACHE_TYPE", "OLLAMA_MEMORY_GIB", "VLLM_MODEL", "VLLM_SLOTS", "VLLM_CONTEXT",
        "VLLM_KV_CACHE_DTYPE", "VLLM_TENSOR_PARALLEL", "VLLM_PIPELINE_PARALLEL",
        "VLLM_GPU_MEMORY_UTILIZATION", "VLLM_MEMORY_GIB", "VLLM_EXTRA_ARGS", "GATEWAY_BIND",
        "GATEWAY_PORT", "WEBUI_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT", "CURRENCY",
        "ELECTRICITY_PER_KWH", "RENT_PER_HOUR", "API_PER_MILLION", "MACHINE_WATTS",
    ]  # fmt: skip


@pytest.mark.parametrize("file", PAIRS, ids=lambda path: path.name)
def test_the_required_memory_can_be_free_beside_a_sleeping_vllm(file: Path) -> None:
    variables = dict(re.findall(r"^([A-Z_]+)=(.*)$", file.read_text(), re.MULTILINE))
    asleep = 2 * SLEEPING_VLLM_GIB if variables["PLACEMENT"] == "exclusive" else 0

    assert float(variables["OLLAMA_MEMORY_GIB"]) <= 47 - asleep
    assert float(variables["VLLM_MEMORY_GIB"]) <= 47 - asleep


LLAMA = ["llama-3.3-70b", "--cards", "2x24", "--ram", "96"]


def test_a_file_is_overwritten_only_with_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".env").write_text("MINE=1\n")

    output = run(capsys, *LLAMA, "--write", str(tmp_path), code=2)

    assert ".env exists already, so nothing was written; to overwrite it add --force" in output
    assert not (tmp_path / "twolane.yaml").exists()
    assert (tmp_path / ".env").read_text() == "MINE=1\n"
    assert "written:" in run(capsys, *LLAMA, "--write", str(tmp_path), "--force")
    assert "MODEL=llama-3.3-70b" in (tmp_path / ".env").read_text()


def test_a_plan_that_does_not_fit_is_not_written_and_exits_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = run(capsys, "qwen2.5-72b", "--cards", "2x24", "--write", str(tmp_path), code=1)

    assert "would run on the CPU" in " ".join(output.split())
    assert list(tmp_path.iterdir()) == []


def test_one_engine_alone_writes_no_env(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "--ollama", "llama3.1:8b", "--cards", "1x24", "--write", str(tmp_path))

    assert [path.name for path in tmp_path.iterdir()] == ["twolane.yaml"]
    assert list(settings.load(tmp_path / "twolane.yaml", {}, {}).models) == ["llama-3.1-8b"]


def test_the_plan_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    output = " ".join(run(capsys, *LLAMA).split())

    for words in (
        "fits, exclusive: one engine holds the cards at a time: 39.6 + 37.0 = 76.6 GiB",
        "--tensor-parallel-size 2", "--kv-cache-dtype fp8", "--enable-sleep-mode",
        "NCCL_P2P_DISABLE=1 VLLM_SERVER_DEV_MODE=1", "OLLAMA_CONTEXT_LENGTH=8192",
        "pins 44 to 50 GiB", "53.5", "assumed",
    ):  # fmt: skip
        assert words in output


def test_the_plan_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    printed = json.loads(run(capsys, *LLAMA, "--json"))

    assert printed["fits"] is True
    assert printed["lanes"]["vllm"]["at"][1]["running"] == 21
    assert printed["lanes"]["ollama"]["weights"]["scheme"] == "Q4_K_M"
    assert printed["command"] == "twolane plan llama-3.3-70b --cards 2x24 --ram 96"


def test_a_model_is_given_by_its_shape(capsys: pytest.CaptureFixture[str]) -> None:
    shape = "layers=80,hidden=8192,heads=64,kv-heads=8,intermediate=28672,vocab=128256"
    printed = json.loads(
        run(capsys, "--ollama", "my-70b", "--vllm", "my-70b-awq", "--shape", shape, "--cards",
            "2x24", "--json")
    )  # fmt: skip

    assert printed["name"] == "my-70b"
    assert printed["lanes"]["vllm"]["weights_gib"] == pytest.approx(AWQ.total / GIB)


def test_every_example_of_the_help_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--help"])
    output = capsys.readouterr().out.replace("\\\n", "")
    examples = re.findall(r"^  twolane (plan .*)$", output, re.MULTILINE)

    assert ended.value.code == 0
    assert len(examples) == 7
    for example in examples:
        assert cli._parser().parse_args(shlex.split(example)).run


BROKEN: dict[str, Callable[[Path], object]] = {
    "cut.gguf": lambda path: gguf(path, cut=300),
    "half.gguf": lambda path: gguf(path, cut=-1000),
    "empty.gguf": lambda path: path.write_bytes(b""),
    "not.gguf": lambda path: path.write_bytes(b"PK\x03\x04 and so on"),
    "new.gguf": lambda path: gguf(path, kind=99),
    "less.gguf": lambda path: gguf(path, **{"llama.block_count": None}),
    "mla.gguf": lambda path: gguf(path, **{"llama.attention.kv_lora_rank": 512}),
    "nokeys": lambda path: folder(path, hidden_size=None, num_hidden_layers=None),
    "nojson": lambda path: (folder(path) / "config.json").write_text("{"),
    "short": lambda path: (folder(path, {"a": ("F16", [8])}) / "model.safetensors").write_bytes(
        struct.pack("<Q", 999)
    ),
    "noconfig": lambda path: path.mkdir(),
}


@pytest.mark.parametrize(
    ("engine", "name", "message"),
    [
        ("ollama", "no.gguf", "there is no such file"),
        ("ollama", "cut.gguf", "ends within its header, after 300 bytes"),
        ("ollama", "half.gguf", "the download is incomplete"),
        ("ollama", "empty.gguf", "is not a GGUF file"),
        ("ollama", "not.gguf", "is not a GGUF file"),
        ("ollama", "new.gguf", "is of type 99, which is not known here"),
        ("ollama", "less.gguf", "its header has no llama.block_count"),
        ("ollama", "mla.gguf", "latent attention"),
        ("vllm", "nokeys", "num_hidden_layers, hidden_size missing"),
        ("vllm", "nojson", "is not valid JSON"),
        ("vllm", "short", "ends within its header"),
        ("vllm", "noconfig", "No such file"),
        ("vllm", "no/config.json", "there is no such file"),
    ],
)
def test_an_unusable_file_is_reported(
    engine: str, name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in BROKEN:
        BROKEN[name](tmp_path / name)

    assert message in run(capsys, f"--{engine}", str(tmp_path / name), "--cards", "2x24", code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lama-3.3-70b"], "nearest: llama-3.3-70b"),
        (["llama3.3:70b"], "do you mean llama-3.3-70b?"),
        (["--ollama", "qwen2.5:42b"], "--shape layers=80"),
        (["--ollama", "zzz"], "(llama-3.3-70b, llama-3.1-8b"),
        (["--vllm", "qwen2.5-7b-q4_k_m"], "known are BF16, FP8, GPTQ, AWQ"),
        (["--vllm", "x", "--shape", "layers=80"], "heads, hidden, intermediate, vocab missing"),
        (["--vllm", "x", "--shape", "layers=many"], "is not NAME=NUMBER"),
        ([], "no model is named"),
        (["llama-3.3-70b", "--cards", "0x24"], "does not name cards"),
        (["llama-3.3-70b", "--cards", "24"], "does not name cards"),
        (["llama-3.3-70b", "--cards", "2x0.2"], "is not known here"),
        (["llama-3.3-70b", "--cards", "2xTITAN"], "cards known by name"),
        (["llama-3.3-70b", "--cards", "2x24@TITAN"], "TITAN is not known here"),
        (["llama-3.3-70b", "--tp", "3"], "3 ranks, and there are 2 cards"),
        (["llama-3.3-70b", "--cards", "3x24", "--tp", "3"], "it has 64 heads. Take --tp 1 or 2"),
        (["qwen2.5-7b", "--cards", "8x24", "--tp", "8"], "it has 28 heads"),
        (["llama-3.3-70b", "--pp", "99", "--cards", "99x24"], "the model has 80 layers"),
        (["llama-3.3-70b", "--cards", "2x3090", "--vllm-kv", "fp8"], "take --vllm-kv auto"),
        (["llama-3.3-70b", "--context", "0"], "is not a whole number above zero"),
        (["llama-3.3-70b", "--utilization", "95"], "is not a share of a card"),
        (["llama-3.3-70b", "--ram", "-1"], "is not a number above zero"),
    ],
)
def test_a_mistake_is_reported_in_a_line_with_what_to_do(
    arguments: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cards = [] if "--cards" in arguments else ["--cards", "2x24"]

    assert message in run(capsys, *arguments, *cards, code=2)


def test_awq_groups_that_two_cards_cannot_halve_are_reported() -> None:
    unpadded = estimate_weights(KNOWN_MODELS["qwen2.5-72b"].shape, "AWQ", "m", "")

    with pytest.raises(UsageError, match="231 groups of 128"):
        planned(None, unpadded, tensor=2)
    assert planned(None, unpadded).lanes["vllm"].pipeline == 2
    assert weights_by_name("qwen2.5-72b", "vllm").shape.intermediate == 29696


@pytest.mark.parametrize("cards", ["1x24", "1x8"])
def test_what_fits_nowhere_is_reported_with_what_would_fit(
    cards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = " ".join(run(capsys, "llama-3.3-70b", "--cards", cards, code=1).split())

    assert (output.count("does not fit vLLM"), output.count("does not fit Ollama")) == (1, 1)
    if cards == "1x24":
        assert output.count("a smaller model") == 2


def test_no_more_context_is_planned_than_a_model_was_made_for(tmp_path: Path) -> None:
    short = read_weights(folder(tmp_path / "m", max_position_embeddings=4096,
                                quantization_config=GROUPS_OF_128))  # fmt: skip

    assert planned(None, short).lanes["vllm"].context == 4096
    with pytest.raises(UsageError, match="was made for 4096 tokens"):
        planned(None, short, context=8192)


def test_a_model_partly_on_the_cpu_has_no_speed_bound() -> None:
    lane = planned(weights_by_name("qwen2.5:72b", "ollama"), None, context=8192).lanes["ollama"]

    assert lane.on_cpu_gib > 0
    assert lane.speed is None
    assert {one.bound_tokens_s for one in lane.load_points} == {None}


def test_a_context_that_does_not_fit_is_reported_with_one_that_does() -> None:
    [fault] = planned(vllm=None, context=65536).faults

    assert "--ollama-slots 1 --context 25600;" in fault
