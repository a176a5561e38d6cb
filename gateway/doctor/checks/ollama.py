"""Checks of Ollama."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from backends.ollama import full
from backends.reports import Loaded
from gateway.doctor.checks.check import GIB, Level, Verdict, cards, format_bytes, guarded
from gateway.doctor.observations import (
    NotObserved,
    Observations,
    ObservedEngine,
    require,
)

#: Ollama's context where nobody sets one, by GPU memory from so many bytes on. Read in its
#: source, 0.24 and 0.33.
OLLAMA_CONTEXTS = ((47 * GIB, 262_144), (23 * GIB, 32_768), (0, 4_096))


def ollama_context(seen: Observations, server: ObservedEngine) -> Iterator[Verdict]:
    """How many tokens of context an Ollama has per slot, and where that is set."""
    loaded = {one.model: one for one in require(server.loaded)}
    own = require(server.contexts)
    for wanted in server.wanted:
        if not wanted.lane.context:
            continue
        one = loaded.get(full(wanted.lane.model))
        tokens = (one.context if one else None) or own.get(wanted.lane.model)
        if tokens is not None and tokens < wanted.lane.context:
            yield Verdict(
                Level.WARNING,
                f"{wanted.lane.model}: {tokens:,} tokens, and the settings promise "
                f"{wanted.lane.context:,}: longer prompts are cut without a word",
                f"OLLAMA_CONTEXT_LENGTH={wanted.lane.context}, or lower the lane's `context`.",
            )
    for one in loaded.values():
        if one.context == OLLAMA_CONTEXTS[0][1]:
            yield Verdict(
                Level.WARNING, f"{one.model} is loaded with {one.context:,} tokens a slot",
                "Set OLLAMA_CONTEXT_LENGTH: 8192, say.",
            )  # fmt: skip
    yield _ollama_default(seen, server, own)


def _ollama_default(
    seen: Observations, server: ObservedEngine, own: Mapping[str, int | None]
) -> Verdict:
    """What Ollama takes where nothing else is said."""
    if own and all(own.values()) and len(own) == len({w.lane.model for w in server.wanted}):
        told = ", ".join(f"{model} {tokens:,}" for model, tokens in own.items())
        return Verdict(Level.OK, f"tokens a slot, as the models themselves say: {told}")
    environment = require(require(server.process).environment)
    said = environment.get("OLLAMA_CONTEXT_LENGTH", "")
    if said and said != "0":
        return Verdict(Level.OK, f"OLLAMA_CONTEXT_LENGTH={said}")
    memory = sum(card.memory for card in cards(seen))
    tokens = next(tokens for least, tokens in OLLAMA_CONTEXTS if memory >= least)
    return Verdict(
        Level.WARNING,
        f"OLLAMA_CONTEXT_LENGTH is not set: with {format_bytes(memory) if memory else 'no'} NVIDIA "
        f"memory Ollama takes {tokens:,} tokens a slot where the model says nothing",
        "Set OLLAMA_CONTEXT_LENGTH to what you need: 8192, say.",
    )


def on_gpu(seen: Observations, server: ObservedEngine) -> Iterator[Verdict]:
    """Whether the models it has loaded are in GPU memory."""
    loaded = require(server.loaded)
    if not loaded:
        raise NotObserved("no model is loaded now; ask it something, then look again")
    for one in loaded:
        yield from guarded(partial(_on_gpu, seen, server, one), server.label)


def _on_gpu(seen: Observations, server: ObservedEngine, one: Loaded) -> Iterator[Verdict]:
    if one.on_gpu >= one.size:
        yield Verdict(
            Level.OK, f"{one.model} is in GPU memory as a whole ({format_bytes(one.size)})"
        )
    elif one.on_gpu:
        yield Verdict(
            Level.PROBLEM,
            f"{one.model}: {format_bytes(one.size - one.on_gpu)} of {format_bytes(one.size)} are "
            "on the CPU",
            "Less context or fewer slots (it pays for context x slots), OLLAMA_KV_CACHE_TYPE=q8_0, "
            "or a smaller quantization; in an exclusive placement name memory_gib.",
        )
    elif not server.here:
        yield Verdict(
            Level.WARNING,
            f"{one.model} is on the CPU as a whole, on that machine",
            "If it has a card, see Ollama's log there for why it was not found.",
        )
    elif not cards(seen):
        yield Verdict(Level.NOTE, f"{one.model} is on the CPU as a whole: no NVIDIA card here")
    else:
        yield Verdict(
            Level.PROBLEM,
            f"{one.model} is on the CPU as a whole, though there is a card",
            "See Ollama's log for why it found none; a container needs its GPU reservation.",
        )
