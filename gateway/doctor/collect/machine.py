"""What the kernel and Docker say of the machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from gateway import settings
from gateway.doctor.observations import (
    Disk,
    Docker,
    NotObserved,
    ObservedEngine,
    Process,
    Ram,
    Unknown,
)

NVIDIA = "0x10de"
DISPLAY = "0x03"
#: For Docker to tell of itself: its daemon may hang.
DOCKER_S = 10.0
#: Where Ollama's installer puts models, for a user of its own.
OLLAMA_SERVICE = Path("/usr/share/ollama/.ollama/models")


def count_nvidia_devices(root: Path) -> int:
    """The number of NVIDIA display devices on the PCI bus."""
    bus = root / "bus/pci/devices"
    if not bus.is_dir():
        raise NotObserved("this kernel does not show the PCI bus")
    return sum(
        (device / "vendor").read_text().strip() == NVIDIA
        and (device / "class").read_text().startswith(DISPLAY)
        for device in bus.iterdir()
    )


class _Device(msgspec.Struct):
    ID: str = ""


class _Info(msgspec.Struct):
    """What of `docker info` is read; null is what a daemon that is down says."""

    ServerVersion: str = ""
    Runtimes: dict[str, msgspec.Raw] | None = None
    CDISpecDirs: list[str] | None = None
    DiscoveredDevices: list[_Device] | None = None
    DockerRootDir: str = ""


def ask_docker(command: str) -> Docker | None:
    """What `docker info` reports; None without a docker command."""
    program = shutil.which(command)
    if program is None:
        return None
    try:
        said = subprocess.run(  # noqa: S603 - the user's own docker, no word of it from outside
            [program, "info", "--format", "{{json .}}"],
            capture_output=True,
            timeout=DOCKER_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NotObserved(f"Docker has not answered for {DOCKER_S:g} s") from None
    if said.returncode:
        last = said.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise NotObserved(
            f"Docker does not tell: {' '.join(last) or f'it ended with {said.returncode}'}"
        )
    try:
        found = msgspec.json.decode(said.stdout, type=_Info)
    except msgspec.DecodeError as exc:
        raise NotObserved(f"what `docker info` says makes no sense: {exc}") from exc
    devices = [device.ID for device in found.DiscoveredDevices or ()]
    for folder in found.CDISpecDirs or ():  # older ones do not list devices
        devices += [kind for file in sorted(Path(folder).glob("*")) for kind in _cdi_kinds(file)]
    return Docker(
        found.ServerVersion, tuple(found.Runtimes or ()), tuple(devices), found.DockerRootDir
    )


def _cdi_kinds(file: Path) -> list[str]:
    try:
        return re.findall(r"\"?\bkind\"?:\s*\"?([\w.-]+/[\w.-]+)", file.read_text())
    except (OSError, UnicodeDecodeError):
        return []


def _ram(proc: Path) -> Ram:
    lines = (proc / "meminfo").read_text().splitlines()
    sizes = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    return Ram(int(sizes["MemTotal"][0]) * 1024, int(sizes["MemAvailable"][0]) * 1024)


def read_disks(
    servers: tuple[ObservedEngine, ...] | Unknown, docker: Docker | Unknown | None
) -> Iterator[Disk]:
    """Where the engines of this machine keep models, or would."""
    found = () if isinstance(servers, Unknown) else servers
    for kind, folder in (("ollama", _ollama_models), ("vllm", _hub_cache)):
        of_kind = [server for server in found if server.kind == kind]
        here = [server for server in of_kind if server.here]
        if of_kind and not here:
            continue
        seen = next((one.process for one in here if isinstance(one.process, Process)), None)
        environment = settings.environment()
        if seen is not None and not isinstance(seen.environment, Unknown):
            environment = seen.environment
        path = folder(environment)
        yield Disk(kind, str(path), _free(path))
    if isinstance(docker, Docker) and docker.root:
        yield Disk("containers", docker.root, _free(Path(docker.root)))


def _ollama_models(environment: Mapping[str, str]) -> Path:
    named = environment.get("OLLAMA_MODELS")
    if not named and OLLAMA_SERVICE.is_dir():
        return OLLAMA_SERVICE
    return Path(named or Path(environment.get("HOME", "/")) / ".ollama/models")


def _hub_cache(environment: Mapping[str, str]) -> Path:
    """Where Hugging Face's library keeps what it gets, by its own variables."""
    cache = environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME", "/")) / ".cache"
    home = environment.get("HF_HOME") or Path(cache) / "huggingface"
    return Path(environment.get("HF_HUB_CACHE") or Path(home) / "hub")


def _free(path: Path) -> int:
    """Free for this user on the disk that this folder is on, or would be."""
    while not path.exists() and path != path.parent:
        path = path.parent
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize
