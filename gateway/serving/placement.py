"""The GPU of the models in exclusive placement, put together: lease, engines, policy, memory."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from backends.errors import BackendError
from backends.kinds import Kind
from gateway.gpu.handover import Deadlines, Gpu, Occupant
from gateway.gpu.lease import Lease, LeaseError, usual_lease
from gateway.gpu.memory import Budget, Memory, MemoryUnknown
from gateway.routing.policy import HandOver, Policy, Served
from gateway.serving.engines import EnginePool
from gateway.serving.publisher import model_profile
from gateway.settings import ModelSettings, Settings, SettingsError

GIB = 2**30


def acquire_lease(read: Settings) -> Lease:
    """Lock the GPU for this gateway; raises SettingsError where another gateway has it."""
    try:
        lease = Lease(read.gpu.lease or usual_lease())
        lease.acquire(f"{read.host}:{read.port}")
    except LeaseError as exc:
        raise SettingsError(str(exc)) from exc
    return lease


async def make_gpu(
    read: Settings, models: Mapping[str, ModelSettings], pool: EnginePool, memory: Memory
) -> Gpu:
    """The GPU that these models share.

    Args:
        read: The settings.
        models: The models in exclusive placement, by public name.
        pool: Their engines.
        memory: Where the GPU's memory is read from, unless a budget stands for it.

    Raises:
        SettingsError: An engine cannot release the GPU, a model does not fit, or a profile
            cannot be used.
    """
    own = read.gpu
    kinds = list(dict.fromkeys(kind for model in models.values() for kind in model.lanes))
    occupants = {kind: await _occupant(kind, read, models, pool) for kind in kinds}
    policy = Policy(
        kinds,
        {name: Served(tuple(model.lanes), model_profile(model)) for name, model in models.items()},
        HandOver(own.handover_s, own.moves_per_hour, own.patience_s),
    )
    policy.pin = next((model.pin for model in models.values() if model.pin), None)
    deadlines = Deadlines(own.drain_s, own.unload_s, own.free_s, own.load_s, own.probe_s)
    ours = [o.process for o in occupants.values() if o.process is not None]
    if own.budget_gib is not None:
        size = int(own.budget_gib * GIB)
        memory = Budget(size, lambda: [p.pid for p in ours if p.pid is not None])
    _check_memory(models, memory)
    return Gpu(policy, occupants, deadlines, memory, idle_release_s=own.idle_release_s)


async def _occupant(
    kind: Kind, read: Settings, models: Mapping[str, ModelSettings], pool: EnginePool
) -> Occupant:
    """One engine of the GPU; raises SettingsError where it cannot release the memory."""
    lanes = [model.lanes[kind] for model in models.values() if kind in model.lanes]
    process = pool.process(kind)
    engine = pool.engine(kind, pool.urls[kind][0])
    if process is None:
        with contextlib.suppress(BackendError):  # one that is down cannot be asked yet
            if obstacle := await engine.release_obstacle():
                raise SettingsError(
                    f"{engine.url} cannot give its GPU memory back. {obstacle}, or let the "
                    f"gateway start and stop it: engines.{kind}.command"
                )
    needs = max((lane.memory_gib for lane in lanes if lane.memory_gib), default=None)
    return Occupant(
        engine,
        [lane.model for lane in lanes],
        process=process,
        needs=int(needs * GIB) if needs else None,
        away_s=read.gpu.away_s,
    )


def _check_memory(models: Mapping[str, ModelSettings], memory: Memory) -> None:
    """Raise SettingsError where a lane needs more memory than the GPU has."""
    with contextlib.suppress(MemoryUnknown):
        total = memory.total()
        for name, model in models.items():
            for kind, lane in model.lanes.items():
                if lane.memory_gib and lane.memory_gib * GIB > total:
                    raise SettingsError(
                        f"models.{name}.lanes.{kind}.memory_gib: {lane.memory_gib:g} GiB do "
                        f"not fit in the GPU's {total / GIB:.1f}; take a smaller model, a "
                        "smaller quantization or less context"
                    )
