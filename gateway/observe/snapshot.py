"""The gateway's state at this moment, as the structs of `observe.status`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from gateway.gpu.handover import Gpu
from gateway.observe.status import (
    DecisionStatus,
    GpuProgress,
    GpuStatus,
    HandoverStatus,
    LaneStatus,
    ModelStatus,
    ProfileStatus,
    ReadyReport,
    RefinementStatus,
    ReplicaStatus,
)
from gateway.routing.lanes import Lane
from gateway.serving.catalogue import Catalogue, Model


def ready_report(catalogue: Catalogue, gpu: Gpu | None, *, draining: bool) -> ReadyReport:
    """Whether any model can be answered now, and what the others wait for."""
    models = catalogue.models
    waiting = {
        name: {
            lane.name: reason
            for lane in _lanes(model)
            if (reason := _unavailable_reason(model, lane))
        }
        for name, model in models.items()
    }
    usable = [
        name
        for name, model in models.items()
        if not model.admission.scheduler.blocked_reason
        and any(lane.capacity for lane in _lanes(model))
    ]
    starting = (
        gpu is not None
        and not gpu.state.held_before
        and all(model.admission.scheduler.exclusive for model in models.values())
    )
    return ReadyReport(
        ready=bool(usable) and not draining and not starting,
        draining=draining,
        models=usable,
        waiting_for={name: reasons for name, reasons in waiting.items() if reasons},
        gpu=None if gpu is None else gpu_progress(gpu),
    )


def gpu_status(gpu: Gpu) -> GpuStatus:
    """The GPU's state, and its last hand-overs."""
    progress, policy = gpu_progress(gpu), gpu.policy
    return GpuStatus(
        holder=progress.holder,
        step=progress.step,
        to=progress.to,
        since_s=progress.since_s,
        deadline_s=progress.deadline_s,
        trouble=progress.trouble,
        pin=policy.pin,
        released=gpu.state.released,
        regret=round(policy.regret, 2),
        price=round(policy.price, 2),
        moves=policy.moves,
        passages=[
            HandoverStatus(
                record.at, record.source, record.target, record.why, dict(record.steps),
                record.outcome, round(record.waited, 2),
            )
            for record in gpu.records
        ],
    )  # fmt: skip


def gpu_progress(gpu: Gpu) -> GpuProgress:
    """Which layout holds the GPU, and which step of a hand-over is under way."""
    state = gpu.state
    return GpuProgress(
        holder=state.layout,
        step=state.step.value,
        to=state.target,
        since_s=round(time.monotonic() - state.since, 1),
        deadline_s=gpu.deadlines.of(state.step) if state.moving else None,
        trouble=state.failure,
    )


def model_statuses(models: Mapping[str, Model], now: float) -> dict[str, ModelStatus]:
    """The state of each model at a time, seconds since the epoch."""
    return {name: _model_status(model, now) for name, model in models.items()}


def _lanes(model: Model) -> Iterable[Lane]:
    return model.admission.scheduler.lanes.values()


def _unavailable_reason(model: Model, lane: Lane) -> str:
    """Why a lane accepts no request now; empty where it does."""
    if blocked := model.admission.scheduler.blocked_reason:
        return blocked
    return "" if lane.capacity else lane.unavailable_reason or "is full"


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
        told=known.summary(now),
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
                room=replica.capacity,
                state=replica.unavailable_reason or "ready",
                engine_running=activity.running,
                engine_waiting=activity.waiting,
            )
        )
    return LaneStatus(lane.running, lane.capacity, round(lane.service_s, 3), replicas)
