"""The gateway's configuration: read once at the start, never changed.

    parts     each part of it, its fields documented
    checks    rules between parts
    schema    the whole, `Settings`
    spelling  the nearest right name for a misspelt one
    sources   command line, environment, file: `load`
    timings   intervals that no operator sets

A name that is none of ours stops the start, since a setting that is silently not set is
worse than none.
"""

from gateway.errors import SettingsError
from gateway.settings.parts import (
    EmbeddedSettings,
    EngineSettings,
    GpuSettings,
    LaneSettings,
    LimitSettings,
    MetricsSettings,
    ModelSettings,
    Prices,
)
from gateway.settings.schema import Settings
from gateway.settings.sources import environment, load
from gateway.settings.timings import Timings

__all__ = [
    "EmbeddedSettings",
    "EngineSettings",
    "GpuSettings",
    "LaneSettings",
    "LimitSettings",
    "MetricsSettings",
    "ModelSettings",
    "Prices",
    "Settings",
    "SettingsError",
    "Timings",
    "environment",
    "load",
]
