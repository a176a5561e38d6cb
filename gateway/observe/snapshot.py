"""The gateway's state at this moment, as the structs of `observe.status`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from gateway.gpu.handover import Gpu
from gateway.observe.status import (
    DecisionStatus,
    GpuProgress,
    GpuStatus,
    LaneStatus,
    ModelStatus,
    ProfileStatus,
    ReadyReport,
    RefinementStatus,
    ReplicaStatus,
)
from gateway.routing.scheduler import Lane
from gateway.serving.catalogue import Catalogue, Model


def ready_report(catalogue: Catalogue, gpu: Gpu | None, *, draining: bool) -> ReadyReport:
    """Whether any model can be answered now, and what the others wait for."""
    models = catalogue.models
    waiting = {
        name: {lane.name: trouble for lane in _lanes(model) if (trouble := _lane_trouble(lane))}
        for name, model in models.items()
    }
    usable = [
        name
        for name, model in models.items()
        if any(lane.room and not lane.barred for lane in _lanes(model))
    ]
    starting = (
        gpu is not None
        and not gpu.held_once
        and all(model.admission.scheduler.exclusive for model in models.values())
    )
    return ReadyReport(
        ready=bool(usable) and not draining and not starting,
        draining=draining,
        models=usable,
        waiting_for={name: troubles for name, troubles in waiting.items() if troubles},
        gpu=None if gpu is None else msgspec.convert(gpu.progress(), GpuProgress),
    )


def gpu_status(gpu: Gpu) -> GpuStatus:
    """The GPU's state, and its last hand-overs."""
    return msgspec.convert(gpu.status(), GpuStatus)


def model_statuses(models: Mapping[str, Model], now: float) -> dict[str, ModelStatus]:
    """The state of each model at a time, seconds since the epoch."""
    return {name: _model_status(model, now) for name, model in models.items()}


def _lanes(model: Model) -> Iterable[Lane]:
    return model.admission.scheduler.lanes.values()


def _lane_trouble(lane: Lane) -> str:
    """Why a lane accepts nothing now; empty where it does."""
    if lane.barred:
        return lane.barred
    return "" if lane.room else next((r.trouble for r in lane.replicas if r.trouble), "is full")


def _model_status(model: Model, now: float) -> ModelStatus:
    scheduler = model.admission.scheduler
    policy = scheduler.policy
    return ModelStatus(
        placement="exclusive" if scheduler.exclusive else "shared",
        lane=policy.lane,
        reason=policy.reason(model.name),
        profile=_profile_status(model, now),
        demand=scheduler.demand,
        waiting=scheduler.waiting,
        moves=policy.moves,
        lanes={lane.name: _lane_status(model, lane) for lane in _lanes(model)},
        decisions=[
            DecisionStatus(d.at, d.lane, d.reason, d.demand) for d in model.admission.decisions
        ],
    )


def _profile_status(model: Model, now: float) -> ProfileStatus:
    known, refined = model.profile, model.admission.scheduler.refined
    age_s = known.age_s(now)
    refinement = None
    if refined is not None:
        factors = {
            lane: {str(n): round(factor, 3) for n, factor in by_level.items()}
            for lane, by_level in refined.factors.items()
            if lane in model.lanes
        }
        refinement = RefinementStatus(refined.requests, factors)
    return ProfileStatus(
        source=known.source,
        told=known.told(now),
        measured_at=known.measured_at or None,
        age_s=None if age_s is None else round(age_s),
        machine=known.machine,
        warnings=list(dict.fromkeys(warning for warning in model.changed.values() if warning)),
        refined=refinement,
    )


def _lane_status(model: Model, lane: Lane) -> LaneStatus:
    replicas = []
    for replica in lane.replicas:
        activity = model.admission.servers[replica].activity
        replicas.append(
            ReplicaStatus(
                running=replica.running,
                slots=replica.slots,
                room=replica.room,
                state=replica.trouble or "ready",
                engine_running=activity.running,
                engine_waiting=activity.waiting,
            )
        )
    return LaneStatus(lane.running, lane.room, round(lane.service_s, 3), replicas)
