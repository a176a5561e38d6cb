"""Makes all observations."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from backends.transport import http
from gateway import installation, settings
from gateway.doctor.collect.attempt import attempt
from gateway.doctor.collect.engines import EngineCollector
from gateway.doctor.collect.gateway import observe_port, read_exposure, read_profiles
from gateway.doctor.collect.machine import ask_docker, count_nvidia_devices, read_disks, read_ram
from gateway.doctor.collect.processes import SocketTable, read_process
from gateway.doctor.observations import (
    NO_SETTINGS,
    Observations,
    ObservedEngine,
    Port,
    Unknown,
    require,
)
from gateway.gpu.cards import Nvml
from gateway.gpu.lease import owner, usual_lease
from gateway.serving import discovery


@dataclass(frozen=True, slots=True)
class Sources:
    """Where to look. Tests name other places.

    Attributes:
        proc: Where the kernel shows processes.
        sys: Where the kernel shows devices.
        ports: By kind, where to look for engines if the settings name none.
        docker: The docker command.
    """

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    ports: discovery.Ports = field(default_factory=lambda: discovery.USUAL_PORTS)
    docker: str = "docker"


async def collect(
    config: Path | None, *, nvml: Nvml | None = None, sources: Sources | None = None
) -> Observations:
    """All observations. Never raises because of what it meets.

    Args:
        config: The gateway's settings. Without a file, engines are looked for on their usual ports.
        nvml: The connection to the driver.
        sources: Where to look.
    """
    sources = sources or Sources()
    loaded = attempt(lambda: settings.load(config, {}, settings.environment()))
    # The fault of the settings is the finding of one check; the others only refer to it.
    own = Unknown(NO_SETTINGS) if isinstance(loaded, Unknown) else loaded
    own_process = attempt(lambda: read_process(sources.proc, os.getpid()))
    engines: tuple[ObservedEngine, ...] | Unknown
    port: Port | Unknown
    if isinstance(own, Unknown):
        engines = port = own
    else:
        sockets = SocketTable(sources.proc)
        async with http.Client() as client:
            collector = EngineCollector(client, own, sockets, own_process)
            engines = await collector.engines(sources.ports)
            port = await observe_port(client, own, sockets)
    docker = await asyncio.to_thread(attempt, lambda: ask_docker(sources.docker))
    return Observations(
        at=time.time(),
        source=str(config) if config else "the defaults and TWOLANE_* variables",
        program=installation.program(),
        settings=loaded,
        exposure=attempt(lambda: read_exposure(require(own))),
        port=port,
        lease=attempt(lambda: str(require(own).gpu.lease or usual_lease())),
        owner=attempt(lambda: owner(require(own).gpu.lease or usual_lease(), proc=sources.proc)),
        profiles=attempt(lambda: read_profiles(require(own))),
        engines=engines,
        nvidia_devices=attempt(lambda: count_nvidia_devices(sources.sys)),
        driver_loaded=(sources.proc / "driver/nvidia/version").exists(),
        driver=await asyncio.to_thread(attempt, (nvml or Nvml()).driver),
        docker=docker,
        ram=attempt(lambda: read_ram(sources.proc)),
        own_process=own_process,
        disks=attempt(lambda: tuple(read_disks(engines, docker))),
    )
