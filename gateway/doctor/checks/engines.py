"""Checks of every engine."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from backends.kinds import KINDS, Kind
from gateway.doctor.checks.check import Level, Verdict
from gateway.doctor.checks.ollama import ollama_context
from gateway.doctor.observations import (
    NotObserved,
    Observations,
    ObservedEngine,
    Unknown,
    is_loopback,
    is_private,
    require,
)

#: Releases that the tests run, and those that were read in their source only.
RUN: Mapping[Kind, Collection[tuple[int, int]]] = {"ollama": {(0, 24)}, "vllm": {(0, 32)}}
READ: Mapping[Kind, Collection[tuple[int, int]]] = {"ollama": {(0, 33)}, "vllm": {(0, 33)}}
#: From which release on an engine has a habit that breaks installations.
HABITS: Mapping[Kind, tuple[tuple[int, int], str]] = {
    "ollama": (
        (0, 30),
        "from 0.30 on it generates by a llama-server binary that must lie beside it",
    )
}


def has_model(server: ObservedEngine, models: Collection[str], model: str) -> bool:
    """Whether an engine's list of models has this one."""
    return KINDS[server.kind].engine.full_name(model) in models


def engine(seen: Observations, server: ObservedEngine) -> Iterator[Verdict]:
    """Whether it answers, is what it is said to be, and has the models."""
    if isinstance(server.answers, Unknown):
        if server.ours:
            yield Verdict(Level.NOTE, "it does not run; the gateway will start it")
        else:
            yield Verdict(
                Level.WARNING, f"it does not answer: {server.answers.why}",
                f"Start it, or correct engines.{server.kind}.urls.",
            )  # fmt: skip
        return
    if server.answers != server.kind:
        is_a = server.answers or "something that is no engine we know"
        yield Verdict(
            Level.PROBLEM, f"what answers is {is_a}", f"Correct engines.{server.kind}.urls."
        )
        return
    models = require(server.models)
    absent = [w.lane.model for w in server.wanted if not has_model(server, models, w.lane.model)]
    for name in dict.fromkeys(absent):
        mend = {
            "ollama": f"`ollama pull {name}`, or correct the lane's `model`.",
            "vllm": "Start it with --served-model-name, or correct the lane's `model`.",
        }.get(server.kind, "Correct the lane's `model`.")
        yield Verdict(Level.PROBLEM, f"it has no {name}; it has {_few(models)}", mend)
    if not absent:
        yield Verdict(Level.OK, f"answers, and has {_few(models)}")


def _few(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:3])
    return (shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "no model"


def version(seen: Observations, server: ObservedEngine) -> Iterator[Verdict]:
    """Whether this version of it is one that twolane knows."""
    told = require(server.version)
    numbers = re.match(r"(\d+)\.(\d+)", told)
    if numbers is None:
        raise NotObserved(f"it calls its version {told!r}")
    release = (int(numbers[1]), int(numbers[2]))
    since, habit = HABITS.get(server.kind, ((release[0] + 1, 0), ""))
    habit = f"; {habit}" if release >= since else ""
    if release in RUN[server.kind]:
        yield Verdict(Level.OK, f"{told}, as in twolane's own tests{habit}")
    else:
        run = ", ".join(f"{major}.{minor}" for major, minor in sorted(RUN[server.kind]))
        read = ", whose source was read" if release in READ[server.kind] else ""
        yield Verdict(Level.NOTE, f"{told}{read}; twolane's own tests run {run}{habit}")


def published(seen: Observations, server: ObservedEngine) -> Iterator[Verdict]:
    """Who reaches it past the gateway."""
    addresses = require(server.addresses)
    if not server.here:
        if all(map(is_private, addresses)):
            yield Verdict(Level.OK, f"at {', '.join(addresses)}, a private address")
        else:
            yield Verdict(
                Level.WARNING, f"at {', '.join(addresses)}, a public address",
                "Put it behind a firewall that lets this machine in and nobody else.",
            )  # fmt: skip
        return
    sockets = require(server.sockets)
    outside = [address for address in sockets if not is_loopback(address)]
    if outside:
        bind = {"ollama": "OLLAMA_HOST=127.0.0.1", "vllm": "--host 127.0.0.1"}
        yield Verdict(
            Level.WARNING,
            f"port {server.port} listens on {', '.join(outside)}: other machines reach it, unless "
            "a firewall keeps them out",
            f"{bind.get(server.kind, '--host 127.0.0.1')}; in Docker publish no port, or "
            f"127.0.0.1:{server.port}:{server.port}.",
        )
    elif sockets:
        yield Verdict(Level.OK, f"listens on {', '.join(sockets)} alone")
    elif isinstance(server.answers, Unknown):
        yield Verdict(Level.NOT_APPLICABLE, f"nothing listens on port {server.port}")
    else:
        raise NotObserved(
            f"it answers, but no socket of this machine listens on port {server.port}: Docker may "
            "publish it by firewall rules"
        )


def context(seen: Observations, server: ObservedEngine) -> Iterator[Verdict]:
    """How many tokens of context it takes, and who says so."""
    require(server.contexts)
    yield from ollama_context(seen, server) if server.kind == "ollama" else _fixed_context(server)


def _fixed_context(server: ObservedEngine) -> Iterator[Verdict]:
    for model, tokens in require(server.contexts).items():
        promised = max(
            (w.lane.context or 0 for w in server.wanted if w.lane.model == model), default=0
        )
        if tokens is not None and promised > tokens:
            yield Verdict(
                Level.PROBLEM, f"{model}: {tokens:,} tokens, and the settings promise {promised:,}",
                "Start it with a larger --max-model-len, or lower the lane's `context`.",
            )  # fmt: skip
        else:
            yield Verdict(
                Level.OK, f"{model}: {tokens:,} tokens" if tokens else f"{model}: as the model has"
            )


def slots(seen: Observations, server: ObservedEngine) -> Iterator[Verdict]:
    """Whether it answers as many at once as it is sent."""
    wanted = max((w.lane.slots or KINDS[server.kind].slots for w in server.wanted), default=0)
    ours = wanted or KINDS[server.kind].slots
    process = require(server.process)
    if server.kind == "ollama":
        name = "OLLAMA_NUM_PARALLEL"
        said = require(process.environment).get(name) or "1"
    else:
        name = "--max-num-seqs"
        said = process.flag(name) or ""
    if not said.isdecimal() or said == "0":
        raise NotObserved(f"it was given no number for {name}; the gateway sends {ours} at once")
    theirs = int(said)
    if ours > theirs:
        yield Verdict(
            Level.WARNING,
            f"the gateway sends {ours} at once, and it answers {theirs} ({name}): the others wait "
            "inside, where the gateway cannot order or time them out",
            f"Set the lane's `slots: {theirs}`, or {name} to {ours}.",
        )
    elif ours < theirs:
        yield Verdict(
            Level.NOTE,
            f"it could answer {theirs} at once ({name}), the gateway sends {ours}",
            f"Set the lane's `slots: {theirs}`.",
        )
    else:
        yield Verdict(Level.OK, f"{ours} at once, on both sides ({name})")
