"""A plan as the files that `compose.yaml` and `twolane serve` read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from backends.kinds import KINDS
from gateway.errors import UsageError
from gateway.plan.text import (
    describe_cards,
    pinned_ram,
    rate,
    round_up,
    start_command,
    thousands_by_type,
)
from gateway.sizing.assumptions import OLLAMA_OVERHEAD_GIB, SLEEPING_VLLM_GIB
from gateway.sizing.figures import LanePlan, LoadPoint, Plan

#: The part of `.env` that does not depend on the plan.
COMMON_SETTINGS = """
# Addresses of this machine. For others to reach it (0.0.0.0) the gateway requires a key in
# secrets/api_keys.
GATEWAY_BIND=127.0.0.1
GATEWAY_PORT=8000
WEBUI_PORT=3000
# Used with --profile metrics only.
PROMETHEUS_PORT=9090
GRAFANA_PORT=3001

# Prices for the cost in `twolane status` and the metrics; empty: not computed. Electricity a kWh,
# and to compare with: renting such a machine an hour, an API's price a million output tokens.
CURRENCY=EUR
ELECTRICITY_PER_KWH=
RENT_PER_HOUR=
API_PER_MILLION=
# Power draw of the whole machine, watts, if you measured it; empty: what the cards report.
MACHINE_WATTS=
"""


def files(name: str, command: str, plan: Plan) -> dict[str, str]:
    """The texts of the files to write, by name."""
    texts = {"twolane.yaml": config_yaml(name, command, plan)}
    if len(plan.lanes) == 2:  # compose.yaml serves both
        texts = {".env": dotenv(name, command, plan), **texts}
    return texts


def write_files(folder: Path, texts: Mapping[str, str], *, force: bool) -> list[Path]:
    """Write all of the files or none; their paths.

    Raises:
        UsageError: A file exists already, or the folder cannot be written to.
    """
    existing = [str(folder / name) for name in texts if (folder / name).exists()]
    if existing and not force:
        verb, them = ("exist", "them") if len(existing) > 1 else ("exists", "it")
        raise UsageError(
            f"{' and '.join(existing)} {verb} already, so nothing was written; to overwrite "
            f"{them} add --force"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text)
    except OSError as exc:
        raise UsageError(f"--write {folder}: {exc.strerror}") from exc
    return [folder / name for name in texts]


def dotenv(name: str, command: str, plan: Plan) -> str:
    """The `.env` that compose.yaml reads, with the plan's figures in its comments."""
    lines = [
        *_model_lines(name, command, plan),
        "",
        *_ollama_lines(plan.lanes["ollama"]),
        "",
        *_vllm_lines(plan.lanes["vllm"], plan),
    ]
    return "\n".join(lines) + "\n" + COMMON_SETTINGS


def _model_lines(name: str, command: str, plan: Plan) -> Iterator[str]:
    yield f"# {name} on {describe_cards(plan.cards)}, for compose.yaml."
    yield "# Written by:"
    yield f"#   {command} --write"
    yield "# Change what you like. The figures in the comments were computed for the values as they"
    yield "# were written, nothing was measured; `twolane plan` computes them for other values."
    yield ""
    yield "# The model's public name, which the chat page shows."
    yield f"MODEL={_quoted(name)}"
    yield f"# {plan.placement}: {plan.placement_why}."
    pinned = pinned_ram(plan)
    if pinned:
        yield f"# While Ollama holds the cards, the sleeping vLLM pins {pinned} of RAM."
    yield f"PLACEMENT={plan.placement}"


def _ollama_lines(lane: LanePlan) -> Iterator[str]:
    fits = (
        f"{thousands_by_type(lane.tokens_beside)} tokens fit beside a sleeping vLLM."
        if lane.tokens_beside
        else "for more, lower vLLM's share below."
    )
    yield "# Ollama: for one or a few concurrent requests."
    yield from (f"# {sentence}" for sentence in _sentences(lane))
    yield f"OLLAMA_MODEL={_quoted(lane.weights.name)}"
    yield "# Concurrent requests, and the tokens of each, prompt and answer. When it loads,"
    yield f"# Ollama allocates slots x context; {fits}"
    yield f"OLLAMA_SLOTS={lane.slots}"
    yield f"OLLAMA_CONTEXT={lane.context}"
    yield "# f16, q8_0 or q4_0."
    yield f"OLLAMA_KV_CACHE_TYPE={lane.kv}"
    yield "# GiB on all cards that must be free before it loads: weights, KV and"
    yield f"# {OLLAMA_OVERHEAD_GIB:g} more on each card (assumed)."
    yield f"OLLAMA_MEMORY_GIB={round_up(lane.memory_gib):.1f}"


def _vllm_lines(lane: LanePlan, plan: Plan) -> Iterator[str]:
    yield (
        f"# vLLM: for many concurrent requests, here of {plan.requirements.tokens:,} tokens each."
    )
    yield from (f"# {sentence}" for sentence in _sentences(lane))
    yield f"VLLM_MODEL={_quoted(lane.weights.name)}"
    yield "# Requests batched at most, and the most tokens of one. They share the KV cache as they"
    yield (
        "# use it, so not every slot needs a whole context: "
        f"{thousands_by_type({lane.kv: lane.tokens})} tokens fit."
    )
    yield f"VLLM_SLOTS={lane.slots}"
    yield f"VLLM_CONTEXT={lane.context}"
    yield "# fp8, or auto: 16 bit, and half the tokens."
    yield f"VLLM_KV_CACHE_DTYPE={lane.kv}"
    yield "# Cards that share each layer, times cards that take turns. Without NVLink vLLM's own"
    yield "# advice for many requests is 1 and 2; for a single stream 2 and 1 is faster."
    yield f"VLLM_TENSOR_PARALLEL={lane.tensor}"
    yield f"VLLM_PIPELINE_PARALLEL={lane.pipeline}"
    yield "# Its share of each card, which it never exceeds" + (
        "; the rest is Ollama's." if plan.placement == "shared" else "."
    )
    yield f"VLLM_GPU_MEMORY_UTILIZATION={lane.utilization:.2f}"
    yield (
        "# GiB on all cards that must be free before it wakes: its share, less the "
        f"{SLEEPING_VLLM_GIB:g} a card that it keeps."
        if plan.pinned_ram_gib
        else "# The same in GiB on all cards."
    )
    yield f"VLLM_MEMORY_GIB={round_up(lane.memory_gib):.1f}"
    yield "# More flags. vLLM accepts tools only with --enable-auto-tool-choice"
    yield "# --tool-call-parser hermes (Qwen), llama3_json (Llama) or mistral, in double quotes."
    yield f"VLLM_EXTRA_ARGS={_quoted(_extra_arguments(lane))}"


def _sentences(lane: LanePlan) -> Iterator[str]:
    """The meaning of a lane's figures, one sentence a line."""
    yield (
        f"{lane.weights.scheme}: {lane.weights_gib:.1f} GiB of weights, "
        f"{round(lane.kv_kib[lane.kv], 1):g} KiB of KV a token ({lane.kv})."
    )
    yield from map(_load_sentence, lane.load_points)
    if lane.speed:
        yield (
            f"At most {rate(lane.speed.one_stream)} tok/s for one stream, by bandwidth; "
            f"prompts {lane.speed.prefill:,.0f} tok/s."
        )


def _load_sentence(point: LoadPoint) -> str:
    run = "1 runs" if point.running == 1 else f"{point.running} run"
    wait = "1 waits" if point.queued == 1 else f"{point.queued} wait"
    return (
        f"{point.requests} concurrent need {point.needed_tokens:,} tokens of KV, "
        f"{point.resident_tokens:,} fit: {run}{f', {wait}' if point.queued else ''}."
    )


def _quoted(text: str) -> str:
    """A value in the syntax of `.env` files."""
    return text if re.fullmatch(r"[\w.:/@+-]*", text) else json.dumps(text)


def _extra_arguments(lane: LanePlan) -> str:
    """The arguments that compose.yaml does not set itself."""
    return "" if lane.weights.dtype == "float16" else f"--dtype {lane.weights.dtype}"


def config_yaml(name: str, command: str, plan: Plan) -> str:
    """The twolane.yaml for engines that are started by hand on this machine."""
    order = list(plan.lanes)[::-1]  # vLLM first: it starts only on free cards
    shared = plan.placement == "shared" or len(order) < 2
    lines = [
        f"# {name} on {describe_cards(plan.cards)}: twolane serve --config twolane.yaml",
        "# (twolane.example.yaml explains every setting). Written by:",
        f"#   {command} --write",
        "#",
        "# Start the engines first" + (", vLLM before Ollama:" if len(order) > 1 else ":"),
        *(f"#   {start_command(plan.lanes[kind], port=KINDS[kind].ports[0])}" for kind in order),
        "",
        "engines:",
        *(f"  {kind}: {{urls: [{json.dumps(KINDS[kind].usual_url)}]}}" for kind in order),
        "models:",
        f"  {json.dumps(name)}:",
        f"    placement: {'shared' if shared else 'exclusive'}    # {plan.placement_why}",
        "    lanes:",
    ]
    for kind in order:
        lane = plan.lanes[kind]
        lines += [
            f"      {kind}:",
            f"        model: {json.dumps(lane.weights.name)}",
            f"        slots: {lane.slots}",
            f"        context: {lane.context}",
        ]
        if not shared:
            lines.append(f"        memory_gib: {round_up(lane.memory_gib):.1f}")
    return "\n".join(lines) + "\n"
