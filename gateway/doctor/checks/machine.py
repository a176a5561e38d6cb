"""Checks of the machine's memory and disks, against what the engines need."""

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
    usable_settings,
)
from gateway.doctor.checks.engines import has_model
from gateway.doctor.observations import (
    NotObserved,
    Observations,
    ObservedEngine,
    Process,
    Unknown,
    is_private,
    require,
)

#: The size of a 70B in 4 bit: 37.0 GiB as AWQ for vLLM, 39.6 GiB as Q4_K_M for Ollama.
BIG_MODEL = 40 * GIB
#: The host RAM that a sleeping vLLM (level 1) pins for such a model.
PINNED_BY_BIG_MODEL = "44 to 50 GiB for a 70B in 4 bit"
#: The size of a container's /dev/shm by default, bytes.
DOCKER_SHM = 64 * MIB
#: With less free space a disk will soon be full, without any model.
NEARLY_FULL = 1 * GIB


def _vllm_processes(observed: Observations) -> list[tuple[str, Process]]:
    """The label and process of each vLLM that runs here and whose process can be read."""
    return [
        (engine.label, engine.process)
        for engine in require(observed.engines)
        if engine.kind == "vllm"
        and isinstance(engine.process, Process)
        and engine.process.pid is not None
    ]


def check_shm(observed: Observations) -> Iterator[Verdict]:
    """The size of the /dev/shm that vLLM has."""
    running = _vllm_processes(observed)
    for about, process in running or [("", require(observed.own_process))]:
        size = require(process.shm)
        if size <= DOCKER_SHM:
            yield Verdict(
                Level.WARNING,
                f"{format_bytes(size)}, Docker's default",
                "Start vLLM's container with `ipc: host` (docker run --ipc=host).",
                about,
            )
        elif running:
            yield Verdict(Level.OK, format_bytes(size), about=about)
        else:
            yield Verdict(Level.OK, f"{format_bytes(size)} on the host; a container has its own")


def _sleeping_engines(observed: Observations) -> list[tuple[ObservedEngine, float | None]]:
    """The vLLMs that release the GPU for another engine, and their `memory_gib`."""
    engines = []
    for engine in require(observed.engines):
        sizes = [expected.lane.memory_gib for expected in engine.lanes if expected.exclusive]
        if engine.kind == "vllm" and sizes:
            engines.append((engine, max((size for size in sizes if size), default=None)))
    return engines


def check_memlock(observed: Observations) -> Iterator[Verdict]:
    """How much memory a sleeping vLLM may pin."""
    if not _sleeping_engines(observed):
        yield Verdict(Level.NOT_APPLICABLE, "no vLLM has to sleep (no exclusive placement)")
        return
    if has_no_nvidia(observed):
        yield Verdict(Level.NOT_APPLICABLE, "no NVIDIA card, so no memory is pinned")
        return
    running = _vllm_processes(observed)
    for about, process in running or [("", require(observed.own_process))]:
        limit = require(process.memlock)
        if limit is None:
            yield Verdict(
                Level.OK, "no limit" if running else "no limit in this shell", about=about
            )
        else:
            where = "" if running else " in this shell; a container has its own limit"
            yield Verdict(
                Level.WARNING if running else Level.NOTE,
                f"{format_bytes(limit)}{where}",
                "Start vLLM with `ulimits: {memlock: -1}` (docker run --ulimit memlock=-1).",
                about,
            )


def check_ram(observed: Observations) -> Iterator[Verdict]:
    """Whether the RAM suffices for the weights of a sleeping vLLM."""
    ram, sleeping = require(observed.ram), _sleeping_engines(observed)
    total = f"{format_bytes(ram.total)} of RAM, {format_bytes(ram.available)} available"
    if not sleeping:
        yield Verdict(
            Level.NOT_APPLICABLE, f"{total}; no vLLM has to sleep (no exclusive placement)"
        )
    elif usable_settings(observed).gpu.budget_gib is not None:
        yield Verdict(Level.NOT_APPLICABLE, f"{total}; the engines share gpu.budget_gib of it")
    else:
        for engine, gib in sleeping:
            yield from guarded(partial(_check_ram, observed, engine, gib), engine.label)


def _check_ram(
    observed: Observations, engine: ObservedEngine, gib: float | None
) -> Iterator[Verdict]:
    ram = require(observed.ram)
    total = f"{format_bytes(ram.total)} of RAM, {format_bytes(ram.available)} available"
    if not engine.is_local:
        if has_no_nvidia(observed) or not all(map(is_private, require(engine.addresses))):
            raise NotObserved("it may run on another machine, whose RAM cannot be read from here")
        total = f"if it runs on this machine, which has {total}"
    elif has_no_nvidia(observed):
        yield Verdict(Level.NOT_APPLICABLE, "no NVIDIA card, so no memory is pinned")
        return
    if gib is None:
        yield Verdict(
            Level.NOTE,
            f"{total}: asleep it pins about its weights in RAM, {PINNED_BY_BIG_MODEL}",
            "Set memory_gib of its lane; then this check compares the two.",
        )
    elif ram.total < gib * GIB:
        yield Verdict(
            Level.PROBLEM if engine.is_local else Level.WARNING,
            f"{total}: asleep it may pin {gib:g} GiB (memory_gib)",
            "Add RAM, or choose a smaller model. Or let the gateway stop and start it: set "
            "engines.vllm.command and leave out VLLM_SERVER_DEV_MODE.",
        )
    elif ram.available < gib * GIB and engine.is_asleep is not True:
        yield Verdict(
            Level.WARNING,
            f"{total}: asleep it may pin {gib:g} GiB (memory_gib)",
            "Free some RAM before its first sleep.",
        )
    else:
        pins = "pins" if engine.is_asleep is True else "may pin"
        yield Verdict(Level.OK, f"{total}: asleep it {pins} up to {gib:g} GiB (memory_gib)")


def check_disks(observed: Observations) -> Iterator[Verdict]:
    """Whether the disks have room for the models."""
    for disk in require(observed.disks):
        missing = _missing_gib(observed, disk.used_by)
        saw = f"{format_bytes(disk.free)} free at {disk.path}"
        if disk.free < NEARLY_FULL:
            level, do = Level.WARNING, "Free some space before you download anything."
        elif missing and disk.free < missing * GIB:
            level, do = Level.WARNING, "Free some space, or keep the models on another disk."
            saw += f"; models that are not there yet take up to {missing:g} GiB (memory_gib)"
        elif disk.free < BIG_MODEL:
            level, do = Level.NOTE, ""
            saw += ", less than a 70B in 4 bit takes (37 to 40 GiB)"
        else:
            level, do = Level.OK, ""
        what = "images" if disk.used_by == "docker" else "models"
        yield Verdict(level, saw, do, f"{disk.used_by} {what}")


def _missing_gib(observed: Observations, kind: str) -> float:
    """The sizes, by the settings, of models that an engine of this kind does not have yet."""
    engines = () if isinstance(observed.engines, Unknown) else observed.engines
    return sum(
        expected.lane.memory_gib or 0.0
        for engine in engines
        if engine.kind == kind and not isinstance(engine.models, Unknown)
        for expected in engine.lanes
        if not has_model(engine, engine.models, expected.lane.model)
    )
