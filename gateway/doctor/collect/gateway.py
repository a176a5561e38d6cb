"""What the settings say of the gateway itself."""

from __future__ import annotations

from collections.abc import Mapping

from gateway.doctor.observations import (
    Exposure,
    is_loopback,
)
from gateway.routing import profile
from gateway.settings import Settings, SettingsError


def read_exposure(read: Settings) -> Exposure:
    """Who may use the gateway, by its settings."""
    at = read.published or read.host
    try:
        read.check_exposure()
        keys = len(read.keys())
    except SettingsError as exc:
        return Exposure(at, refused=str(exc))
    try:
        local = is_loopback(at)
    except ValueError:
        local = at == "localhost"
    anybody = read.allow_public_without_key and not keys and not local
    return Exposure(at, keys, anybody)


def read_profiles(read: Settings) -> Mapping[str, profile.Profile | str | None]:
    """Of the models that have a choice; text where the file cannot be used."""
    found: dict[str, profile.Profile | str | None] = {
        name: None for name, lanes in read.pair.items() if len(lanes) > 1
    }
    for name, model in read.models.items():
        if len(model.lanes) > 1:
            try:
                found[name] = profile.load(model.profile) if model.profile else None
            except profile.ProfileError as exc:
                found[name] = str(exc)
    return found
