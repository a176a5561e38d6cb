"""Observes the machine: the PCI bus, Docker, RAM and disks."""

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

#: In sysfs: the vendor, and how the class of a display device begins.
NVIDIA_VENDOR = "0x10de"
DISPLAY_CLASS = "0x03"
#: Timeout of `docker info`, seconds: its daemon may hang.
DOCKER_INFO_S = 10.0
#: The models of an Ollama that was installed as a service.
OLLAMA_SERVICE_MODELS = Path("/usr/share/ollama/.ollama/models")


def count_nvidia_devices(sys: Path) -> int:
    """The number of NVIDIA display devices on the PCI bus."""
    bus = sys / "bus/pci/devices"
    if not bus.is_dir():
        raise NotObserved("this kernel does not show the PCI bus")
    return sum(
        (device / "vendor").read_text().strip() == NVIDIA_VENDOR
        and (device / "class").read_text().startswith(DISPLAY_CLASS)
        for device in bus.iterdir()
    )


class _Device(msgspec.Struct):
    ID: str = ""


class _Info(msgspec.Struct):
    """The part of `docker info` that is used. Without its daemon Docker reports null."""

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
        result = subprocess.run(  # noqa: S603 - the user's docker, with fixed arguments
            [program, "info", "--format", "{{json .}}"],
            capture_output=True,
            timeout=DOCKER_INFO_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NotObserved(f"`docker info` has not answered for {DOCKER_INFO_S:g} s") from None
    if result.returncode:
        last = " ".join(result.stderr.decode("utf-8", "replace").strip().splitlines()[-1:])
        raise NotObserved(f"`docker info` failed: {last or f'exit code {result.returncode}'}")
    try:
        info = msgspec.json.decode(result.stdout, type=_Info)
    except msgspec.DecodeError as exc:
        raise NotObserved(f"the output of `docker info` is not understood: {exc}") from exc
    devices = [device.ID for device in info.DiscoveredDevices or ()]
    for folder in info.CDISpecDirs or ():  # older releases list folders only
        devices += [kind for file in sorted(Path(folder).glob("*")) for kind in _cdi_kinds(file)]
    return Docker(
        info.ServerVersion, tuple(info.Runtimes or ()), tuple(devices), info.DockerRootDir
    )


def _cdi_kinds(file: Path) -> list[str]:
    try:
        return re.findall(r"\"?\bkind\"?:\s*\"?([\w.-]+/[\w.-]+)", file.read_text())
    except (OSError, UnicodeDecodeError):
        return []


def read_ram(proc: Path) -> Ram:
    """The machine's memory, from /proc/meminfo."""
    lines = (proc / "meminfo").read_text().splitlines()
    sizes = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    return Ram(int(sizes["MemTotal"][0]) * 1024, int(sizes["MemAvailable"][0]) * 1024)


def read_disks(
    engines: tuple[ObservedEngine, ...] | Unknown, docker: Docker | Unknown | None
) -> Iterator[Disk]:
    """The free space where engines of this machine keep models, or would."""
    known = () if isinstance(engines, Unknown) else engines
    for kind, folder in (("ollama", _ollama_models), ("vllm", _hub_cache)):
        of_kind = [engine for engine in known if engine.kind == kind]
        local = [engine for engine in of_kind if engine.is_local]
        if of_kind and not local:
            continue
        processes = (e.process for e in local if isinstance(e.process, Process))
        process = next(processes, None)
        environment = settings.environment()
        if process is not None and not isinstance(process.environment, Unknown):
            environment = process.environment
        path = folder(environment)
        yield Disk(kind, str(path), _free(path))
    if isinstance(docker, Docker) and docker.root:
        yield Disk("docker", docker.root, _free(Path(docker.root)))


def _ollama_models(environment: Mapping[str, str]) -> Path:
    folder = environment.get("OLLAMA_MODELS")
    if not folder and OLLAMA_SERVICE_MODELS.is_dir():
        return OLLAMA_SERVICE_MODELS
    return Path(folder or Path(environment.get("HOME", "/")) / ".ollama/models")


def _hub_cache(environment: Mapping[str, str]) -> Path:
    """The folder of models from Hugging Face, by the variables of its library."""
    cache = environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME", "/")) / ".cache"
    home = environment.get("HF_HOME") or Path(cache) / "huggingface"
    return Path(environment.get("HF_HUB_CACHE") or Path(home) / "hub")


def _free(path: Path) -> int:
    """Bytes that are free for this user on the disk of this folder, which need not exist yet."""
    while not path.exists() and path != path.parent:
        path = path.parent
    size = os.statvfs(path)
    return size.f_bavail * size.f_frsize
