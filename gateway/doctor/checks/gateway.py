"""Checks of the gateway itself: its settings, its address, the GPU lease and the profiles."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from functools import partial

from backends.kinds import KINDS
from gateway.doctor.checks.check import Level, Verdict, guarded, usable_settings
from gateway.doctor.observations import Observations, ObservedEngine, Unknown, require
from gateway.routing.profile import MeasuredSetup, Profile

#: From this age on a profile should be measured again, seconds. Assumed.
OLD_PROFILE_S = 180 * 86_400.0


def check_settings(observed: Observations) -> Iterator[Verdict]:
    """Whether the settings can be used."""
    if isinstance(observed.settings, Unknown):
        yield Verdict(
            Level.PROBLEM,
            observed.settings.reason,
            f"Correct it: until then `{observed.program} serve` does not start.",
        )
    else:
        yield Verdict(Level.OK, f"{observed.source} can be used")


def check_exposure(observed: Observations) -> Iterator[Verdict]:
    """Who may use the gateway."""
    exposure = require(observed.exposure)
    if exposure.refusal:
        yield Verdict(
            Level.PROBLEM,
            exposure.refusal,
            "Set api_keys_file or api_keys; or let only this machine in: host: 127.0.0.1.",
        )
    elif exposure.is_open:
        yield Verdict(
            Level.WARNING,
            f"host {exposure.host} is open to other machines without a key, because "
            "allow_public_without_key is set",
            "Set api_keys_file, unless a proxy in front of the gateway checks a key.",
        )
    else:
        keys = f"{exposure.keys} key{'s' * (exposure.keys > 1)}" if exposure.keys else "no key"
        yield Verdict(Level.OK, f"host {exposure.host}, {keys}")


def check_port(observed: Observations) -> Iterator[Verdict]:
    """Whether the gateway can listen on its address."""
    port = require(observed.port)
    address = f"{port.host}:{port.number}"
    if port.number == 0:
        yield Verdict(Level.NOT_APPLICABLE, "the system chooses a free port (port: 0)")
    elif not port.is_local:
        yield Verdict(
            Level.PROBLEM,
            f"host: {port.host} is not an address of this machine",
            "Set host to an address of this machine, to 127.0.0.1 or to 0.0.0.0.",
        )
    elif port.is_gateway:
        yield Verdict(Level.OK, f"a twolane gateway serves at {address}")
    elif port.conflicts:
        yield Verdict(
            Level.PROBLEM,
            f"{address} is in use by {port.listener}",
            "Stop that process, or choose another port: `port:` in the settings, or "
            f"`{observed.program} serve --port N`.",
        )
    else:
        yield Verdict(Level.OK, f"{address} is free")


def check_lease(observed: Observations) -> Iterator[Verdict]:
    """Whether this gateway can get the GPU lease."""
    own = usable_settings(observed)
    if not any(model.placement == "exclusive" for model in own.models.values()):
        yield Verdict(Level.NOT_APPLICABLE, "no model has an exclusive placement")
        return
    owner = require(observed.owner)
    if owner is None:
        yield Verdict(Level.OK, f"no gateway has the GPU lease ({require(observed.lease)})")
    elif owner.address == f"{own.host}:{own.port}":
        yield Verdict(Level.OK, f"the running gateway has the GPU lease: {owner}")
    else:
        yield Verdict(
            Level.PROBLEM,
            f"another gateway has the GPU lease: {owner}",
            "Stop that gateway. If it serves other cards, name another file here: gpu.lease (now "
            f"{require(observed.lease)}).",
        )


def check_profiles(observed: Observations) -> Iterator[Verdict]:
    """Whether the gateway decides by a profile that was measured and still applies."""
    profiles = require(observed.profiles)
    if not profiles:
        yield Verdict(
            Level.NOT_APPLICABLE, "no model of the settings has two lanes to choose between"
        )
    for model, profile in profiles.items():
        yield from guarded(partial(_check_profile, observed, model, profile), f"model {model}")


def _check_profile(
    observed: Observations, model: str, profile: Profile | str | None
) -> Iterator[Verdict]:
    calibrate = f"`{observed.program} calibrate`"
    measure = f"Run {calibrate}, and name its file in the settings: models.NAME.profile."
    if isinstance(profile, str):
        yield Verdict(Level.PROBLEM, profile, measure)
        return
    if profile is None or profile.source != "measured":
        yield Verdict(
            Level.NOTE,
            "lanes are chosen by the assumed profile, which was not measured on this machine",
            measure,
        )
        return
    lanes = [
        (engine, expected.lane.model)
        for engine in require(observed.engines)
        for expected in engine.lanes
        if expected.model == model
    ]
    unmeasured = [engine.kind for engine, _ in lanes if engine.kind not in profile.lanes]
    changes = [change for engine, name in lanes for change in _changes(profile, engine, name)]
    age_s = profile.age_s(observed.at)
    if unmeasured:
        yield Verdict(
            Level.WARNING, f"the profile has no figures for {', '.join(unmeasured)}", measure
        )
    elif changes:
        yield Verdict(Level.WARNING, "; ".join(changes), f"Run {calibrate} again.")
    elif age_s is not None and age_s > OLD_PROFILE_S:
        yield Verdict(Level.NOTE, f"the profile is old: {profile.summary(observed.at)}", measure)
    else:
        yield Verdict(Level.OK, profile.summary(observed.at))


def _changes(profile: Profile, engine: ObservedEngine, model: str) -> list[str]:
    """What has changed about an engine since this profile was measured, as far as it reports."""
    if isinstance(engine.identities, Unknown) or model not in engine.identities:
        return []
    identity = engine.identities[model]
    slots = max((e.lane.slots or 0 for e in engine.lanes if e.lane.model == model), default=0)
    now = MeasuredSetup(
        engine.kind,
        model,
        identity.version,
        identity.weights,
        identity.slots or slots or KINDS[engine.kind].slots,
        command=shlex.join(engine.configured.command) if engine.configured else "",
        digest=identity.digest,
    )
    return [f"{engine.kind}: {change}" for change in profile.changed(engine.kind, now)]
