"""All observations."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from backends.transport import http
from gateway import settings
from gateway.doctor.collect.attempt import attempt
from gateway.doctor.collect.engines import EngineCollector, Sources
from gateway.doctor.collect.gateway import read_exposure, read_profiles
from gateway.doctor.collect.machine import _ram, ask_docker, count_nvidia_devices, read_disks
from gateway.doctor.collect.processes import listening_sockets, process
from gateway.doctor.observations import (
    NO_SETTINGS,
    Observations,
    ObservedEngine,
    Port,
    Unknown,
    require,
)
from gateway.gpu.lease import owner, usual_lease
from gateway.gpu.memory import Nvml


async def look(
    config: Path | None, *, nvml: Nvml | None = None, places: Sources | None = None
) -> Observations:
    """Everything there is to be seen.

    Args:
        config: The gateway's settings; without, engines are looked for on their usual ports.
        nvml: What speaks to the driver.
        places: Where the kernel and engines are looked for.
    """
    places = places or Sources()
    found = attempt(lambda: settings.load(config, {}, settings.environment()))
    # Why is said once, by the check of the settings themselves.
    read = Unknown(NO_SETTINGS) if isinstance(found, Unknown) else found
    listeners = attempt(lambda: list(listening_sockets(places.proc)))
    here = attempt(lambda: process(places.proc, os.getpid()))
    async with http.Client() as client:
        servers: tuple[ObservedEngine, ...] | Unknown
        port: Port | Unknown
        if isinstance(read, Unknown):
            servers = port = read
        else:
            eyes = EngineCollector(client, read, listeners, here, places)
            servers = await eyes.servers()
            port = await eyes.port()
    docker = await asyncio.to_thread(attempt, lambda: ask_docker(places.docker))
    loaded = (places.proc / "driver/nvidia/version").exists()
    return Observations(
        at=time.time(),
        source=str(config) if config else "the defaults and TWOLANE_* variables",
        settings=found,
        exposure=attempt(lambda: read_exposure(require(read))),
        port=port,
        lease=attempt(lambda: str(require(read).gpu.lease or usual_lease())),
        owner=attempt(lambda: owner(require(read).gpu.lease or usual_lease(), proc=places.proc)),
        profiles=attempt(lambda: read_profiles(require(read))),
        servers=servers,
        nvidia_on_bus=attempt(lambda: count_nvidia_devices(places.sys)),
        driver_loaded=loaded,
        driver=await asyncio.to_thread(attempt, (nvml or Nvml()).driver),
        docker=docker,
        ram=attempt(lambda: _ram(places.proc)),
        here=here,
        disks=attempt(lambda: tuple(read_disks(servers, docker))),
    )
