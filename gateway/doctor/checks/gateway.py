"""Checks of the gateway itself: settings, exposure, port, lease, profiles."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from functools import partial

from backends.kinds import KINDS
from gateway.doctor.checks.check import Level, Verdict, guarded
from gateway.doctor.observations import (
    NO_SETTINGS,
    Observations,
    ObservedEngine,
    Unknown,
    require,
)
from gateway.routing.profile import Measured, Profile
from gateway.settings import Settings

#: A profile of this age is worth measuring again, seconds. Assumed.
OLD_S = 180 * 86_400.0


def settings_load(seen: Observations) -> Iterator[Verdict]:
    """Whether the settings can be used."""
    if isinstance(seen.settings, Unknown):
        yield Verdict(Level.PROBLEM, seen.settings.why, "Correct it: `twolane serve` would stop.")
    else:
        yield Verdict(Level.OK, f"{seen.source} can be used")


def require_settings(seen: Observations) -> Settings:
    """The settings; raises `NotObserved`, without the reason, which is said elsewhere."""
    return require(Unknown(NO_SETTINGS) if isinstance(seen.settings, Unknown) else seen.settings)


def exposure(seen: Observations) -> Iterator[Verdict]:
    """Who may use the gateway."""
    found = require(seen.exposure)
    if found.refused:
        yield Verdict(
            Level.PROBLEM, found.refused, "Set api_keys_file or api_keys, or host: 127.0.0.1."
        )
    elif found.anybody:
        yield Verdict(
            Level.WARNING,
            f"host {found.host} is open to other machines without a key, as "
            "allow_public_without_key says",
            "Set api_keys_file, unless something in front of it asks for a key.",
        )
    else:
        keys = f"{found.keys} key{'s' * (found.keys > 1)}" if found.keys else "no key"
        yield Verdict(Level.OK, f"host {found.host}, {keys}")


def port(seen: Observations) -> Iterator[Verdict]:
    """Whether the gateway can listen where it is to."""
    found = require(seen.port)
    where = f"{found.host}:{found.number}"
    if found.number == 0:
        yield Verdict(Level.NOT_APPLICABLE, "any free port is taken (port: 0)")
    elif not found.here:
        yield Verdict(
            Level.PROBLEM,
            f"host: {found.host} is no address of this machine",
            "Set host to one of this machine's, 127.0.0.1 or 0.0.0.0.",
        )
    elif found.ours:
        yield Verdict(Level.OK, f"a twolane gateway serves at {where}")
    elif found.taken:
        yield Verdict(
            Level.PROBLEM,
            f"{where} is taken by {found.by}",
            "Stop that, or choose another: `port:` in the settings, --port.",
        )
    else:
        yield Verdict(Level.OK, f"{where} is free")


def lease(seen: Observations) -> Iterator[Verdict]:
    """Whether the GPU is free to be owned."""
    own = require_settings(seen)
    if not any(model.placement == "exclusive" for model in own.models.values()):
        yield Verdict(Level.NOT_APPLICABLE, "no model is in an exclusive placement")
        return
    owner = require(seen.owner)
    if owner is None:
        yield Verdict(Level.OK, f"nobody owns the GPU ({require(seen.lease)})")
    elif owner.address == f"{own.host}:{own.port}":
        yield Verdict(Level.OK, f"the gateway that runs owns the GPU: {owner}")
    else:
        yield Verdict(
            Level.PROBLEM,
            f"another gateway owns the GPU: {owner}",
            f"Stop it; or, for other cards, name another file: gpu.lease ({require(seen.lease)}).",
        )


def profile(seen: Observations) -> Iterator[Verdict]:
    """What the gateway decides by."""
    found = require(seen.profiles)
    if not found:
        yield Verdict(
            Level.NOT_APPLICABLE, "no model of the settings has two lanes to choose between"
        )
    for model, measured in found.items():
        yield from guarded(partial(_profile, seen, model, measured), f"model {model}")


def _profile(seen: Observations, model: str, found: Profile | str | None) -> Iterator[Verdict]:
    again = "Measure it: `twolane calibrate`, and name the file in models.NAME.profile."
    if isinstance(found, str):
        yield Verdict(Level.PROBLEM, found, again)
        return
    if found is None or found.source != "measured":
        yield Verdict(
            Level.NOTE, "lanes are chosen by the assumed profile, not a measured one", again
        )
        return
    lanes = [
        (server, wanted.lane.model)
        for server in require(seen.servers)
        for wanted in server.wanted
        if wanted.model == model
    ]
    unmeasured = [server.kind for server, _ in lanes if server.kind not in found.lanes]
    changes = [change for server, name in lanes for change in _changes(found, server, name)]
    age_s = found.age_s(seen.at)
    if unmeasured:
        yield Verdict(Level.WARNING, f"it has nothing about {', '.join(unmeasured)}", again)
    elif changes:
        yield Verdict(Level.WARNING, "; ".join(changes), "Run `twolane calibrate` again.")
    elif age_s is not None and age_s > OLD_S:
        yield Verdict(Level.NOTE, f"it is old: {found.told(seen.at)}", again)
    else:
        yield Verdict(Level.OK, found.told(seen.at))


def _changes(found: Profile, server: ObservedEngine, model: str) -> list[str]:
    """What an engine is now that it was not when this was measured, as far as it tells."""
    if isinstance(server.identities, Unknown) or model not in server.identities:
        return []
    is_now = server.identities[model]
    slots = max((w.lane.slots or 0 for w in server.wanted if w.lane.model == model), default=0)
    now = Measured(
        server.kind,
        model,
        is_now.version,
        is_now.weights,
        is_now.slots or slots or KINDS[server.kind].slots,
        command=shlex.join(server.configured.command) if server.configured else "",
        digest=is_now.digest,
    )
    return [f"{server.kind}: {change}" for change in found.changed(server.kind, now)]
