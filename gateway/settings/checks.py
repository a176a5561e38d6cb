"""Rules that hold between parts of the configuration. Each raises ValueError with the place."""

from __future__ import annotations

from collections.abc import Mapping

from backends.kinds import KINDS, Kind
from gateway.settings.parts import (
    EngineSettings,
    GpuSettings,
    LaneSettings,
    LimitSettings,
    ModelSettings,
)


def check_engines_exist(
    engines: Mapping[Kind, EngineSettings],
    models: Mapping[str, ModelSettings],
    pairs: Mapping[str, Mapping[Kind, str]],
) -> None:
    """Each lane has an engine, or its own URLs; engines that are discovered are not checked."""
    for name, model in models.items():
        for kind, lane in model.lanes.items():
            if not lane.urls and kind not in engines:
                raise ValueError(
                    f"models.{name}.lanes.{kind}: no engine is configured for it; "
                    f"add engines.{kind}.urls"
                )
    if not engines and not models:
        return
    for name, lanes in pairs.items():
        for kind in lanes:
            if kind not in engines:
                raise ValueError(
                    f"pair.{name}.{kind}: no engine is configured for it; add engines.{kind}.urls"
                )


def check_exclusive_placement(
    engines: Mapping[Kind, EngineSettings],
    models: Mapping[str, ModelSettings],
    gpu: GpuSettings,
    limits: LimitSettings,
) -> None:
    """The models in exclusive placement can take turns on one GPU."""
    exclusive = {name: model for name, model in models.items() if model.placement == "exclusive"}
    pins = {model.pin for model in exclusive.values() if model.pin}
    if len(pins) > 1:
        raise ValueError(f"pin: one GPU cannot be kept at {' and '.join(sorted(pins))}")
    if exclusive and gpu.patience_s >= limits.max_wait_s:
        raise ValueError(
            f"gpu.patience_s ({gpu.patience_s:g}) must be below limits.max_wait_s "
            f"({limits.max_wait_s:g}): else a request that waits for the GPU is refused first"
        )
    for name, model in exclusive.items():
        for kind, lane in model.lanes.items():
            _check_exclusive_lane(f"models.{name}.lanes.{kind}", kind, lane, engines, gpu)


def _check_exclusive_lane(
    where: str,
    kind: Kind,
    lane: LaneSettings,
    engines: Mapping[Kind, EngineSettings],
    gpu: GpuSettings,
) -> None:
    if lane.urls or len(engines[kind].urls) > 1:
        raise ValueError(f"{where}: one GPU has one server of an engine, not replicas")
    if not KINDS[kind].unloads and not engines[kind].command:
        raise ValueError(
            f"{where}: a {KINDS[kind].server} cannot unload its model; give "
            f"engines.{kind}.command, so that the gateway can stop and start it"
        )
    if gpu.budget_gib and lane.memory_gib and lane.memory_gib > gpu.budget_gib:
        raise ValueError(
            f"{where}.memory_gib: {lane.memory_gib:g} is more than the whole budget "
            f"of {gpu.budget_gib:g} GiB; choose a smaller model or context"
        )
