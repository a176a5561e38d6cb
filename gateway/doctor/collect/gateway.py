"""Observes the gateway itself: who may use it, what it decides by, and its port."""

from __future__ import annotations

import json
from collections.abc import Mapping

from backends import base
from backends.transport import http
from backends.transport.origin import Origin
from gateway.doctor.collect.attempt import attempt
from gateway.doctor.collect.processes import SocketTable, can_bind, resolve
from gateway.doctor.observations import (
    Exposure,
    NotObserved,
    Port,
    Process,
    Unknown,
    is_loopback,
)
from gateway.routing import profile
from gateway.settings import Settings, SettingsError

#: Timeout of each step of the question whether a gateway listens there, seconds.
GATEWAY_ANSWERS_S = 2.0


def read_exposure(settings: Settings) -> Exposure:
    """Who may use the gateway, by its settings."""
    host = settings.published or settings.host
    try:
        settings.check_exposure()
        keys = len(settings.keys())
    except SettingsError as exc:
        return Exposure(host, refusal=str(exc))
    try:
        is_local = is_loopback(host)
    except ValueError:
        is_local = host == "localhost"
    is_open = settings.allow_public_without_key and not keys and not is_local
    return Exposure(host, keys, is_open)


def read_profiles(settings: Settings) -> Mapping[str, profile.Profile | str | None]:
    """The profiles of the models that have two lanes; a text where the file cannot be used."""
    profiles: dict[str, profile.Profile | str | None] = {
        name: None for name, lanes in settings.pair.items() if len(lanes) > 1
    }
    for name, model in settings.models.items():
        if len(model.lanes) > 1:
            try:
                profiles[name] = profile.load(model.profile) if model.profile else None
            except profile.ProfileError as exc:
                profiles[name] = str(exc)
    return profiles


async def observe_port(
    client: http.Client, settings: Settings, sockets: SocketTable
) -> Port | Unknown:
    """What listens on the gateway's address."""
    host, number = settings.host, settings.port
    if number == 0:
        return Port(host, number)
    try:
        own = await resolve(host)
    except NotObserved:
        return Port(host, number, is_local=False)
    if not any(map(can_bind, own)):
        return Port(host, number, is_local=False)
    listening = attempt(lambda: sockets.on(number))
    if isinstance(listening, Unknown):
        return listening
    # As the gateway listens: a name that has addresses of both families is bound as IPv4.
    own = tuple(address for address in own if (":" in address) == (":" in host))
    conflicts = tuple(s.address for s in listening if _conflict(s.address, own))
    if not conflicts or (set(conflicts) == {"::"} and ":" not in host and can_bind(host, number)):
        return Port(host, number)  # a socket on :: that accepts IPv6 only is not in the way
    process = attempt(lambda: sockets.process_on(number))
    listener = "a process that this user may not inspect"
    if isinstance(process, Process):
        listener = f"{process.name} (process {process.pid})"
    is_gateway = await _is_gateway(client, host, number)
    return Port(host, number, conflicts, listener, is_gateway=is_gateway)


async def _is_gateway(client: http.Client, host: str, number: int) -> bool:
    """Whether a twolane gateway answers at this address."""
    where = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - not bound to
    origin = Origin(where, number, tls=False)
    try:
        answer = await client.request(
            origin, "GET", "/ready", {}, b"",
            connect_s=GATEWAY_ANSWERS_S, head_s=GATEWAY_ANSWERS_S,
        )  # fmt: skip
        ready = json.loads(await answer.read_all(base.MAX_ERROR))
        answer.close(reuse=False)
    except (http.HttpError, ValueError):
        return False
    return isinstance(ready, dict) and {"ready", "waiting_for"} <= ready.keys()


def _conflict(address: str, own: tuple[str, ...]) -> bool:
    """Whether a socket that listens on `address` prevents one that listens on `own`."""
    wildcards = {"0.0.0.0", "::"}  # noqa: S104 - compared with
    return address in wildcards or address in own or not wildcards.isdisjoint(own)
