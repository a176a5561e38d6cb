"""The GPU of the models in exclusive placement, put together: lease, engines, policy, memory."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

from backends.errors import BackendError
from backends.kinds import KINDS, Kind
from gateway.gpu.budget import Budget
from gateway.gpu.engine import GpuEngine
from gateway.gpu.handover import Gpu
from gateway.gpu.lease import Lease, LeaseError, usual_lease
from gateway.gpu.memory import GIB, Memory, MemoryNeed, MemoryUnknown
from gateway.gpu.record import Deadlines
from gateway.gpu.state import GpuStateRef
from gateway.routing.policy_exclusive import ExclusivePolicy
from gateway.routing.regret import RoutedModel
from gateway.routing.switch_cost import HandoverCost
from gateway.serving.engines import EnginePool
from gateway.serving.publisher import model_profile
from gateway.settings import ModelSettings, Settings, SettingsError, Timings


def acquire_lease(settings: Settings) -> Lease:
    """Lock the GPU for this gateway; raises SettingsError where another gateway has it."""
    try:
        lease = Lease(settings.gpu.lease or usual_lease())
        lease.acquire(f"{settings.host}:{settings.port}")
    except LeaseError as exc:
        raise SettingsError(str(exc)) from exc
    return lease


async def make_gpu(
    settings: Settings,
    models: Mapping[str, ModelSettings],
    pool: EnginePool,
    memory: Memory,
    timings: Timings,
) -> Gpu:
    """The GPU that these models share.

    Args:
        settings: The gateway's configuration.
        models: The models in exclusive placement, by public name.
        pool: Their engines.
        memory: Where the GPU's memory is read from, unless a budget takes its place.
        timings: The interval between two looks of the hand-over, and its pauses.

    Raises:
        SettingsError: An engine cannot release the GPU, a model does not fit, or a profile
            cannot be used.
    """
    own = settings.gpu
    kinds = list(dict.fromkeys(kind for model in models.values() for kind in model.lanes))
    layouts = {kind: await _gpu_engine(kind, settings, models, pool, timings) for kind in kinds}
    ref = GpuStateRef()
    policy = ExclusivePolicy(
        kinds,
        {
            name: RoutedModel(tuple(model.lanes), model_profile(model))
            for name, model in models.items()
        },
        HandoverCost(own.handover_s, own.moves_per_hour, own.patience_s),
        ref,
        pin=next((model.pin for model in models.values() if model.pin), None),
    )
    deadlines = Deadlines(own.drain_s, own.unload_s, own.free_s, own.load_s, own.probe_s)
    ours = [e.process for e in layouts.values() if e.process is not None]
    if own.budget_gib is not None:
        size = int(own.budget_gib * GIB)
        memory = Budget(size, lambda: [p.pid for p in ours if p.pid is not None])
    _check_memory(models, memory)
    return Gpu(
        policy, layouts, deadlines, memory, ref,
        idle_release_s=own.idle_release_s, timings=timings,
    )  # fmt: skip


async def _gpu_engine(
    kind: Kind,
    settings: Settings,
    models: Mapping[str, ModelSettings],
    pool: EnginePool,
    timings: Timings,
) -> GpuEngine:
    """One engine of the GPU; raises SettingsError where it cannot release the memory."""
    lanes = [model.lanes[kind] for model in models.values() if kind in model.lanes]
    process = pool.process(kind)
    engine = pool.engine(kind, pool.urls[kind][0])
    if process is None:
        with contextlib.suppress(BackendError):  # unknown while the engine is down
            if obstacle := await engine.release_obstacle():
                raise SettingsError(
                    f"{engine.url} cannot give its GPU memory back. {obstacle}, or let the "
                    f"gateway start and stop it: engines.{kind}.command"
                )
    configured = settings.engines.get(kind)
    needs = max((lane.memory_gib for lane in lanes if lane.memory_gib), default=None)
    return GpuEngine(
        engine,
        [lane.model for lane in lanes],
        process=process,
        needs=_memory_need(kind, needs, configured.command if configured is not None else ()),
        away_s=settings.gpu.away_s,
        timings=timings,
    )


def _memory_need(kind: Kind, gib: float | None, command: Sequence[str]) -> MemoryNeed | None:
    """What must be free before an engine of this kind loads, if that is known."""
    if gib is None:
        return None
    options = KINDS[kind].parallel_options
    return MemoryNeed(int(gib * GIB), KINDS[kind].cards(command), even=bool(options))


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
