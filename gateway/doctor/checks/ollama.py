"""Checks of Ollama: its context, and where its loaded models are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from backends.kinds import KINDS
from backends.reports import Loaded
from gateway.doctor.checks.check import GIB, Level, Verdict, format_bytes, guarded, nvidia_cards
from gateway.doctor.observations import NotObserved, Observations, ObservedEngine, require

#: Ollama's default context in tokens, by the least GPU memory in bytes. Read in the source of
#: 0.24 and 0.33.
OLLAMA_CONTEXTS = ((47 * GIB, 262_144), (23 * GIB, 32_768), (0, 4_096))


def check_ollama_context(observed: Observations, engine: ObservedEngine) -> Iterator[Verdict]:
    """How many tokens of context each slot has, and what sets that number."""
    own = require(engine.contexts)
    loaded = {model.model: model for model in require(engine.loaded)}
    for expected in engine.lanes:
        lane = expected.lane
        if not lane.context:
            continue
        model = loaded.get(KINDS[engine.kind].engine.full_name(lane.model))
        tokens = (model.context if model else None) or own.get(lane.model)
        if tokens is not None and tokens < lane.context:
            yield Verdict(
                Level.WARNING,
                f"{lane.model}: {tokens:,} tokens, but the settings promise {lane.context:,}: "
                "Ollama cuts longer prompts without an error",
                f"Set OLLAMA_CONTEXT_LENGTH={lane.context}, or lower the lane's `context`.",
            )
    for model in loaded.values():
        if model.context == OLLAMA_CONTEXTS[0][1]:
            yield Verdict(
                Level.WARNING,
                f"{model.model} is loaded with {model.context:,} tokens per slot",
                "Set OLLAMA_CONTEXT_LENGTH to what you need, for example 8192.",
            )
    yield _default_context(observed, engine, own)


def _default_context(
    observed: Observations, engine: ObservedEngine, own: Mapping[str, int | None]
) -> Verdict:
    """The context of a request that does not ask for one."""
    names = {expected.lane.model for expected in engine.lanes}
    if own and all(own.values()) and len(own) == len(names):
        each = ", ".join(f"{model} {tokens:,}" for model, tokens in own.items())
        return Verdict(Level.OK, f"tokens per slot, from the model files: {each}")
    value = require(require(engine.process).environment).get("OLLAMA_CONTEXT_LENGTH", "")
    if value and value != "0":
        return Verdict(Level.OK, f"OLLAMA_CONTEXT_LENGTH={value}")
    memory = sum(card.memory for card in nvidia_cards(observed))
    tokens = next(tokens for least, tokens in OLLAMA_CONTEXTS if memory >= least)
    return Verdict(
        Level.WARNING,
        f"OLLAMA_CONTEXT_LENGTH is not set: with {format_bytes(memory) if memory else 'no'} NVIDIA "
        f"memory Ollama takes {tokens:,} tokens per slot where the model file names no number",
        "Set OLLAMA_CONTEXT_LENGTH to what you need, for example 8192.",
    )


def check_on_gpu(observed: Observations, engine: ObservedEngine) -> Iterator[Verdict]:
    """Whether its loaded models are in GPU memory."""
    loaded = require(engine.loaded)
    if not loaded:
        raise NotObserved("no model is loaded now; send it a request, then run this again")
    for model in loaded:
        yield from guarded(partial(_check_loaded, observed, engine, model), engine.label)


def _check_loaded(
    observed: Observations, engine: ObservedEngine, model: Loaded
) -> Iterator[Verdict]:
    if model.on_gpu >= model.size:
        yield Verdict(
            Level.OK, f"{model.model} is entirely in GPU memory ({format_bytes(model.size)})"
        )
    elif model.on_gpu:
        yield Verdict(
            Level.PROBLEM,
            f"{model.model}: {format_bytes(model.size - model.on_gpu)} of "
            f"{format_bytes(model.size)} are on the CPU",
            "Set less context or fewer slots (Ollama allocates context x slots), or "
            "OLLAMA_KV_CACHE_TYPE=q8_0, or choose a smaller quantization. In an exclusive "
            "placement set the lane's memory_gib.",
        )
    elif not engine.is_local:
        yield Verdict(
            Level.WARNING,
            f"{model.model} is entirely on the CPU of that machine",
            "If that machine has a card: Ollama's log there says why it was not used.",
        )
    elif not nvidia_cards(observed):
        yield Verdict(
            Level.NOTE, f"{model.model} is entirely on the CPU: this machine has no NVIDIA card"
        )
    else:
        yield Verdict(
            Level.PROBLEM,
            f"{model.model} is entirely on the CPU, although this machine has a card",
            "Ollama's log says why it did not use the card. A container needs a GPU reservation.",
        )
