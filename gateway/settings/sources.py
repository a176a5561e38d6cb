"""The configuration read from its sources: command line, environment, YAML file, defaults.

The order is the order of precedence. All mistakes are reported together, each with its place.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource
from pydantic_settings import SettingsError as PydanticSettingsError

from gateway.errors import SettingsError
from gateway.settings.schema import Settings
from gateway.settings.spelling import misspelt_variable, problems


def load(path: Path | None, overrides: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    """Read the configuration.

    Args:
        path: The YAML file, if any.
        overrides: The values of the command line; they take precedence.
        environ: The environment, for its names only; pydantic-settings reads the values.

    Raises:
        SettingsError: Something is misspelt, missing or makes no sense.
    """
    misspelt = [problem for name in environ if (problem := misspelt_variable(Settings, name))]
    if misspelt:
        raise SettingsError("\n".join(misspelt))
    file_values = _file_values(path)
    try:
        values = _merged(file_values, EnvSettingsSource(Settings)())
        return _Configuration(**_merged(values, overrides))
    except ValidationError as exc:
        source = f"{path}: " if path else ""
        raise SettingsError("\n".join(source + line for line in problems(Settings, exc))) from None
    except PydanticSettingsError as exc:  # no JSON where a list or map is wanted
        raise SettingsError(f"{exc}: write lists and maps as JSON") from None


def environment() -> Mapping[str, str]:
    """The process's environment; read here and nowhere else."""
    return os.environ


class _Configuration(Settings):
    """The settings from values that are merged already: made once, and not at every load."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def _merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Both maps in one; where both have a value, `upper` takes precedence."""
    values = {**lower, **upper}
    for name in lower.keys() & upper.keys():
        if isinstance(lower[name], Mapping) and isinstance(upper[name], Mapping):
            values[name] = _merged(lower[name], upper[name])
    return values


def _file_values(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as exc:
        raise SettingsError(f"{path} cannot be read: {exc}") from None
    except yaml.YAMLError as exc:
        raise SettingsError(f"{path} is not valid YAML: {exc}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: the top level must be `name: value` lines")
    return values
