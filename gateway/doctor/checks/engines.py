"""Checks of every engine: is it there, who can reach it, do slots and context match."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from backends.kinds import KINDS, Kind
from gateway.doctor.checks.check import Level, Verdict
from gateway.doctor.observations import (
    NotObserved,
    Observations,
    ObservedEngine,
    Unknown,
    is_loopback,
    is_private,
    require,
)

#: By kind, a change that breaks installations, and the release that brought it.
BREAKING_CHANGES: Mapping[Kind, tuple[tuple[int, int], str]] = {
    "ollama": (
        (0, 30),
        "since 0.30 it needs a llama-server binary in its own folder",
    )
}


def has_model(engine: ObservedEngine, models: Collection[str], model: str) -> bool:
    """Whether an engine's list of models contains this one."""
    return KINDS[engine.kind].engine.full_name(model) in models


def check_engine(observed: Observations, engine: ObservedEngine) -> Iterator[Verdict]:
    """Whether it answers, is of the expected kind, and has its models."""
    if isinstance(engine.answering_kind, Unknown):
        if engine.is_managed:
            yield Verdict(Level.NOTE, "it does not run; the gateway will start it")
        else:
            yield Verdict(
                Level.WARNING,
                f"it does not answer: {engine.answering_kind.reason}",
                f"Start it{_start_command(engine)}, or correct engines.{engine.kind}.urls.",
            )
        return
    if engine.answering_kind != engine.kind:
        answers = engine.answering_kind or "something that is not a known engine"
        yield Verdict(
            Level.PROBLEM,
            f"{answers} answers at this address",
            f"Correct engines.{engine.kind}.urls.",
        )
        return
    models = require(engine.models)
    names = dict.fromkeys(expected.lane.model for expected in engine.lanes)
    missing = [name for name in names if not has_model(engine, models, name)]
    for name in missing:
        do = {
            "ollama": f"Run `ollama pull {name}`, or correct the lane's `model`.",
            "vllm": f"Start it with --served-model-name {name}, or correct the lane's `model`.",
        }.get(engine.kind, "Correct the lane's `model`.")
        yield Verdict(Level.PROBLEM, f"it does not have {name}; it has {_some(models)}", do)
    if not missing:
        yield Verdict(Level.OK, f"it answers, and has {_some(models)}")


def _start_command(engine: ObservedEngine) -> str:
    """How to start it by hand on this machine, where that is known."""
    model = next((expected.lane.model for expected in engine.lanes), "MODEL")
    commands = {"ollama": "ollama serve", "vllm": f"vllm serve {model} --port {engine.port}"}
    if not engine.is_local or engine.kind not in commands:
        return ""
    return f" (by hand: `{commands[engine.kind]}`)"


def _some(names: Collection[str]) -> str:
    """The first names, and how many more there are."""
    first = ", ".join(list(names)[:3])
    return (first + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "no model"


def check_version(observed: Observations, engine: ObservedEngine) -> Iterator[Verdict]:
    """Whether twolane was tested with its release."""
    version = require(engine.version)
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None:
        raise NotObserved(f"its version {version!r} is not a number")
    release = (int(numbers[1]), int(numbers[2]))
    since, change = BREAKING_CHANGES.get(engine.kind, ((release[0] + 1, 0), ""))
    change = f"; {change}" if release >= since else ""
    kind = KINDS[engine.kind]
    if release in kind.tested_releases:
        yield Verdict(Level.OK, f"{version}, a release that twolane's tests run{change}")
    else:
        tested = ", ".join(f"{a}.{b}" for a, b in sorted(kind.tested_releases))
        read = ", whose source was read" if release in kind.read_releases else ""
        yield Verdict(Level.NOTE, f"{version}{read}; twolane's tests run {tested}{change}")


def check_reach(observed: Observations, engine: ObservedEngine) -> Iterator[Verdict]:
    """Who can reach it without the gateway."""
    addresses = require(engine.addresses)
    if not engine.is_local:
        if all(map(is_private, addresses)):
            yield Verdict(Level.OK, f"at {', '.join(addresses)}, a private address")
        else:
            yield Verdict(
                Level.WARNING,
                f"at {', '.join(addresses)}, a public address",
                "Put it behind a firewall that lets only this machine in.",
            )
        return
    sockets = require(engine.listening_on)
    public = [address for address in sockets if not is_loopback(address)]
    if public:
        option = {"ollama": "OLLAMA_HOST=127.0.0.1"}.get(engine.kind, "--host 127.0.0.1")
        yield Verdict(
            Level.WARNING,
            f"port {engine.port} listens on {', '.join(public)}: other machines can reach it, "
            "unless a firewall prevents it",
            f"Start it with {option}. In Docker publish no port, or "
            f"127.0.0.1:{engine.port}:{engine.port}.",
        )
    elif sockets:
        yield Verdict(Level.OK, f"listens on {', '.join(sockets)} only")
    elif isinstance(engine.answering_kind, Unknown):
        yield Verdict(Level.NOT_APPLICABLE, f"nothing listens on port {engine.port}")
    else:
        raise NotObserved(
            f"it answers, but no socket of this machine listens on port {engine.port}: Docker may "
            "publish it by firewall rules"
        )


def check_slots(observed: Observations, engine: ObservedEngine) -> Iterator[Verdict]:
    """Whether the gateway and the engine agree on the number of concurrent requests."""
    usual = KINDS[engine.kind].slots
    ours = max((expected.lane.slots or usual for expected in engine.lanes), default=0) or usual
    process = require(engine.process)
    if name := KINDS[engine.kind].slots_variable:
        value = require(process.environment).get(name) or "1"
    else:
        name = "--max-num-seqs"
        value = process.flag(name) or ""
    if not value.isdecimal() or value == "0":
        raise NotObserved(
            f"it was started without a number for {name}; the gateway sends up to {ours} "
            "concurrent requests"
        )
    theirs = int(value)
    if ours > theirs:
        yield Verdict(
            Level.WARNING,
            f"the gateway sends up to {ours} concurrent requests, but the engine answers {theirs} "
            f"({name}): the others wait in its own queue, without the gateway's order and timeouts",
            f"Set the lane's `slots: {theirs}`, or start the engine with {name} {ours}.",
        )
    elif ours < theirs:
        yield Verdict(
            Level.NOTE,
            f"the engine answers up to {theirs} concurrent requests ({name}), but the gateway "
            f"sends {ours}",
            f"Set the lane's `slots: {theirs}`.",
        )
    else:
        yield Verdict(Level.OK, f"{ours} concurrent requests on both sides ({name})")


def check_fixed_context(observed: Observations, engine: ObservedEngine) -> Iterator[Verdict]:
    """Whether the context of an engine that was started with one is what the settings promise."""
    for model, tokens in require(engine.contexts).items():
        promised = max(
            (e.lane.context or 0 for e in engine.lanes if e.lane.model == model), default=0
        )
        if tokens is not None and promised > tokens:
            yield Verdict(
                Level.PROBLEM,
                f"{model}: {tokens:,} tokens, but the settings promise {promised:,}",
                "Start it with a larger --max-model-len, or lower the lane's `context`.",
            )
        else:
            size = f"{tokens:,} tokens" if tokens else "all that the model has"
            yield Verdict(Level.OK, f"{model}: {size}")
