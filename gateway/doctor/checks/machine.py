"""Checks of the machine: shared memory, RAM, disks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from gateway.doctor.checks.check import (
    GIB,
    MIB,
    Level,
    Verdict,
    format_bytes,
    guarded,
    has_no_nvidia,
)
from gateway.doctor.checks.engines import has_model
from gateway.doctor.checks.gateway import require_settings
from gateway.doctor.observations import (
    NotObserved,
    Observations,
    ObservedEngine,
    Process,
    Unknown,
    is_private,
    require,
)

#: What a 70B in 4 bit takes: AWQ for vLLM (37.0 GiB) and Q4_K_M for Ollama (39.6 GiB).
BIG_MODEL = 40 * GIB
#: … and what of RAM a vLLM pins that sleeps with it, level 1.
BIG_SLEEP = "44 to 50 GiB for a 70B in 4 bit"
#: What Docker gives a container as /dev/shm unless it is told otherwise.
DOCKER_SHM = 64 * MIB
#: Full for all practical purposes: a log, a picture, and it is.
NEARLY_FULL = 1 * GIB


def _of_vllm(seen: Observations) -> list[tuple[str, Process]]:
    """The processes of vLLM that run here and can be looked at, and what to call them."""
    return [
        (server.label, server.process)
        for server in require(seen.servers)
        if server.kind == "vllm"
        and isinstance(server.process, Process)
        and server.process.pid is not None
    ]


def shm(seen: Observations) -> Iterator[Verdict]:
    """How much of /dev/shm vLLM has."""
    running = _of_vllm(seen)
    for about, process in running or [("", require(seen.here))]:
        size = require(process.shm)
        if size <= DOCKER_SHM:
            yield Verdict(
                Level.WARNING, f"{format_bytes(size)}, which is what Docker gives",
                "Start vLLM's container with `ipc: host` (docker run --ipc=host).", about,
            )  # fmt: skip
        elif running:
            yield Verdict(Level.OK, format_bytes(size), about=about)
        else:
            yield Verdict(Level.OK, f"{format_bytes(size)} here; a container has its own")


def _takes_turns(seen: Observations) -> list[tuple[ObservedEngine, float | None]]:
    """The vLLMs that give the GPU to another engine at times, and the GiB they are said to take."""
    turns = []
    for server in require(seen.servers):
        sizes = [w.lane.memory_gib for w in server.wanted if w.exclusive]
        if server.kind == "vllm" and sizes:
            turns.append((server, max((size for size in sizes if size), default=None)))
    return turns


def memlock(seen: Observations) -> Iterator[Verdict]:
    """How much memory a vLLM that sleeps may pin."""
    if not _takes_turns(seen):
        yield Verdict(Level.NOT_APPLICABLE, "no vLLM that sleeps (no exclusive placement)")
        return
    if has_no_nvidia(seen):
        yield Verdict(Level.NOT_APPLICABLE, "no NVIDIA card here, so nothing is pinned")
        return
    running = _of_vllm(seen)
    for about, process in running or [("", require(seen.here))]:
        limit = require(process.memlock)
        if limit is None:
            yield Verdict(
                Level.OK, "without limit" if running else "without limit here", about=about
            )
        else:
            yield Verdict(
                Level.WARNING if running else Level.NOTE,
                f"{format_bytes(limit)}"
                + ("" if running else " in this shell; a container has its own"),
                "Start vLLM with `ulimits: {memlock: -1}` (docker run --ulimit memlock=-1).",
                about,
            )


def ram(seen: Observations) -> Iterator[Verdict]:
    """Whether there is the RAM that a vLLM takes when it sleeps."""
    found, turns = require(seen.ram), _takes_turns(seen)
    has = f"{format_bytes(found.total)} of RAM, {format_bytes(found.available)} available"
    if not turns:
        yield Verdict(Level.NOT_APPLICABLE, f"{has}; no vLLM that sleeps (no exclusive placement)")
    elif require_settings(seen).gpu.budget_gib is not None:
        yield Verdict(
            Level.NOT_APPLICABLE, f"{has}; the engines share a part of it (gpu.budget_gib)"
        )
    else:
        for server, gib in turns:
            yield from guarded(partial(_ram, seen, server, gib), server.label)


def _ram(seen: Observations, server: ObservedEngine, gib: float | None) -> Iterator[Verdict]:
    found = require(seen.ram)
    has = f"{format_bytes(found.total)} of RAM, {format_bytes(found.available)} available"
    if not server.here:
        if has_no_nvidia(seen) or not all(map(is_private, require(server.addresses))):
            raise NotObserved("it may run on another machine, whose RAM is not seen from here")
        has = f"if it runs on this machine, which has {has}"
    elif has_no_nvidia(seen):
        yield Verdict(Level.NOT_APPLICABLE, "no NVIDIA card here, so nothing is pinned")
        return
    if gib is None:
        yield Verdict(
            Level.NOTE,
            f"{has}: asleep it pins about its weights in RAM, {BIG_SLEEP}",
            "Name memory_gib under its lane, and this compares.",
        )
    elif found.total < gib * GIB:
        yield Verdict(
            Level.PROBLEM if server.here else Level.WARNING,
            f"{has}: asleep it may pin {gib:g} GiB (memory_gib)",
            "More RAM, a smaller model, or let the gateway stop and start it: engines.vllm.command "
            "without dev mode.",
        )
    elif found.available < gib * GIB and server.asleep is not True:
        yield Verdict(
            Level.WARNING,
            f"{has}: asleep it may pin {gib:g} GiB (memory_gib)",
            "Free some before it sleeps for the first time.",
        )
    else:
        asleep = "pins" if server.asleep is True else "may pin"
        yield Verdict(Level.OK, f"{has}: asleep it {asleep} up to {gib:g} GiB (memory_gib)")


def disk(seen: Observations) -> Iterator[Verdict]:
    """Whether there is room for models."""
    for found in require(seen.disks):
        missing = _missing_gib(seen, found.holds)
        saw = f"{format_bytes(found.free)} free at {found.path}"
        if found.free < NEARLY_FULL:
            level, do = Level.WARNING, "Make room before anything is downloaded."
        elif missing and found.free < missing * GIB:
            level, do = Level.WARNING, "Make room, or put the models elsewhere."
            saw += f"; models that are missing take up to {missing:g} GiB (memory_gib)"
        elif found.free < BIG_MODEL:
            level, do = Level.NOTE, ""
            saw += ", less than a 70B in 4 bit takes (37 to 40 GiB)"
        else:
            level, do = Level.OK, ""
        yield Verdict(level, saw, do, f"models of {found.holds}")


def _missing_gib(seen: Observations, kind: str) -> float:
    """What the models take, by the settings, that this kind of engine does not have yet."""
    servers = () if isinstance(seen.servers, Unknown) else seen.servers
    return sum(
        wanted.lane.memory_gib or 0.0
        for server in servers
        if server.kind == kind and not isinstance(server.models, Unknown)
        for wanted in server.wanted
        if not has_model(server, server.models, wanted.lane.model)
    )
