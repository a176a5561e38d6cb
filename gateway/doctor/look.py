"""What there is to be seen: read, asked, and never changed.

The driver is asked through `gpu`, engines through `backends`, all else is the kernel's. What
cannot be seen is `Unseen` and no error: one closed eye must not close the others.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from typing import TypeVar

import msgspec

from backends import base, errors, reports
from backends.base import Timeouts
from backends.errors import BackendError, Unreachable
from backends.kinds import KINDS, Kind
from backends.transport import http
from gateway import settings
from gateway.doctor.seen import (
    NO_SETTINGS,
    Disk,
    Docker,
    Exposure,
    NotSeen,
    Port,
    Process,
    Ram,
    Seen,
    Server,
    Unseen,
    Wanted,
    is_loopback,
    known,
)
from gateway.gpu.lease import LeaseError, owner, usual_lease
from gateway.gpu.memory import MemoryUnknown, Nvml
from gateway.routing import profile
from gateway.serving import discovery
from gateway.settings import Settings, SettingsError

T = TypeVar("T")

NVIDIA = "0x10de"
DISPLAY = "0x03"
#: For Docker to tell of itself: its daemon may hang.
DOCKER_S = 10.0
CONNECT_S = 2.0
#: The state of a socket that listens, in the kernel's table.
LISTENS = "0A"
#: Where Ollama's installer puts models, for a user of its own.
OLLAMA_SERVICE = Path("/usr/share/ollama/.ollama/models")


@dataclass(frozen=True, slots=True)
class Places:
    """Where to look; others only for tests."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    ports: discovery.Ports = field(default_factory=lambda: discovery.USUAL)
    docker: str = "docker"


def _tried(look: Callable[[], T]) -> T | Unseen:
    """What a look finds, or why it finds nothing."""
    try:
        return look()
    except (NotSeen, MemoryUnknown, LeaseError, SettingsError) as exc:
        return Unseen(str(exc))
    except OSError as exc:
        return Unseen(f"{exc.filename or 'it'} cannot be read: {exc.strerror or exc}")
    except Exception as exc:  # noqa: BLE001 - one closed eye must not close the others
        return Unseen(f"the look failed: {type(exc).__name__}: {exc}")


async def _asked(answer: Awaitable[T]) -> T | Unseen:
    """What an engine answers, or why it does not."""
    try:
        return await answer
    except BackendError as exc:
        return Unseen(re.sub(r"^<\S+ (\S+)>:? ", r"\1 ", str(exc)))
    except NotSeen as exc:
        return Unseen(str(exc))
    except Exception as exc:  # noqa: BLE001 - as above
        return Unseen(f"the look failed: {type(exc).__name__}: {exc}")


async def look(config: Path | None, *, nvml: Nvml | None = None, places: Places = Places()) -> Seen:
    """Everything there is to be seen.

    Args:
        config: The gateway's settings; without, engines are looked for on their usual ports.
        nvml: What speaks to the driver.
        places: Where the kernel and engines are looked for.
    """
    found = _tried(lambda: settings.load(config, {}, settings.environment()))
    # Why is said once, by the check of the settings themselves.
    read = Unseen(NO_SETTINGS) if isinstance(found, Unseen) else found
    listeners = _tried(lambda: list(listening(places.proc)))
    here = _tried(lambda: process(places.proc, os.getpid()))
    async with http.Client() as client:
        servers: tuple[Server, ...] | Unseen
        port: Port | Unseen
        if isinstance(read, Unseen):
            servers = port = read
        else:
            eyes = _Eyes(client, read, listeners, here, places)
            servers = await eyes.servers()
            port = await eyes.port()
    docker = await asyncio.to_thread(_tried, lambda: _docker(places.docker))
    loaded = (places.proc / "driver/nvidia/version").exists()
    return Seen(
        at=time.time(),
        source=str(config) if config else "the defaults and TWOLANE_* variables",
        settings=found,
        exposure=_tried(lambda: _exposure(known(read))),
        port=port,
        lease=_tried(lambda: str(known(read).gpu.lease or usual_lease())),
        owner=_tried(lambda: owner(known(read).gpu.lease or usual_lease(), proc=places.proc)),
        profiles=_tried(lambda: _profiles(known(read))),
        servers=servers,
        nvidia_on_bus=_tried(lambda: _on_bus(places.sys)),
        driver_loaded=loaded,
        driver=await asyncio.to_thread(_tried, (nvml or Nvml()).driver),
        docker=docker,
        ram=_tried(lambda: _ram(places.proc)),
        here=here,
        disks=_tried(lambda: tuple(_disks(servers, docker))),
    )


# The gateway itself


def _exposure(read: Settings) -> Exposure:
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


def _profiles(read: Settings) -> Mapping[str, profile.Profile | str | None]:
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


# The machine


def _on_bus(root: Path) -> int:
    bus = root / "bus/pci/devices"
    if not bus.is_dir():
        raise NotSeen("this kernel does not show the PCI bus")
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


def _docker(command: str) -> Docker | None:
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
        raise NotSeen(f"Docker has not answered for {DOCKER_S:g} s") from None
    if said.returncode:
        last = said.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise NotSeen(
            f"Docker does not tell: {' '.join(last) or f'it ended with {said.returncode}'}"
        )
    try:
        found = msgspec.json.decode(said.stdout, type=_Info)
    except msgspec.DecodeError as exc:
        raise NotSeen(f"what `docker info` says makes no sense: {exc}") from exc
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


def _disks(servers: tuple[Server, ...] | Unseen, docker: Docker | Unseen | None) -> Iterator[Disk]:
    """Where the engines of this machine keep models, or would."""
    found = () if isinstance(servers, Unseen) else servers
    for kind, folder in (("ollama", _ollama_models), ("vllm", _hub_cache)):
        of_kind = [server for server in found if server.kind == kind]
        here = [server for server in of_kind if server.here]
        if of_kind and not here:
            continue
        seen = next((one.process for one in here if isinstance(one.process, Process)), None)
        environment = settings.environment()
        if seen is not None and not isinstance(seen.environment, Unseen):
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


# Sockets and processes


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket of this machine that listens."""

    address: str
    port: int
    inode: int


def listening(proc: Path) -> Iterator[Listener]:
    """The TCP sockets that listen in this network namespace."""
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / table).read_text().splitlines()[1:]
        except FileNotFoundError:
            if table == "tcp":
                raise
            continue  # no IPv6 here
        for line in lines:
            fields = line.split()
            if fields[3] != LISTENS:
                continue
            address, _, port = fields[1].partition(":")
            words = (int(address[at : at + 8], 16) for at in range(0, len(address), 8))
            packed = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
            yield Listener(str(ip_address(packed)), int(port, 16), int(fields[9]))


def holder(proc: Path, inodes: set[int]) -> int | None:
    """The first process that has one of these sockets; None where none is seen to."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    pids = sorted(int(entry.name) for entry in proc.iterdir() if entry.name.isdecimal())
    for pid in pids:
        try:
            if any(str(fd.readlink()) in wanted for fd in (proc / str(pid) / "fd").iterdir()):
                return pid
        except OSError:  # it has ended, or is another user's
            continue
    return None


def process(proc: Path, pid: int) -> Process:
    """What the kernel tells of a process."""
    folder = proc / str(pid)
    return Process(
        pid,
        tuple((folder / "cmdline").read_text(errors="replace").strip("\0").split("\0")),
        _tried(lambda: _environment(folder)),
        _tried(lambda: _shm(folder)),
        _tried(lambda: _memlock(folder)),
    )


def _environment(folder: Path) -> Mapping[str, str]:
    entries = (folder / "environ").read_text(errors="replace").split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def _shm(folder: Path) -> int:
    place = folder / "root/dev/shm"
    if not os.path.ismount(place):
        raise NotSeen("it has no /dev/shm, or not one that this user may look at")
    found = os.statvfs(place)
    return found.f_blocks * found.f_frsize


def _memlock(folder: Path) -> int | None:
    for line in (folder / "limits").read_text().splitlines():
        if line.startswith("Max locked memory"):
            soft = line.split()[3]
            return None if soft == "unlimited" else int(soft)
    raise NotSeen("this kernel does not tell how much memory it may lock")


def _is_here(address: str, port: int = 0) -> bool:
    """Whether this address is one of this machine's, and the port free if one is named."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except OSError:
        return False
    return True


async def _addresses(host: str) -> tuple[str, ...]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:  # the second: it cannot even be asked for
        raise NotSeen(f"{host} is no address and no known name") from exc
    return tuple(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))


# The engines, and what has our port


class _Eyes:
    """What looks at engines: the settings, a client, and what was seen before."""

    def __init__(
        self,
        client: http.Client,
        read: Settings,
        listeners: list[Listener] | Unseen,
        here: Process | Unseen,
        places: Places,
    ) -> None:
        self._client = client
        self._read = read
        self._listeners = listeners
        self._here = here
        self._places = places

    async def servers(self) -> tuple[Server, ...]:
        """The engines of the settings, or those that answer on their usual ports."""
        read = self._read
        wanted: dict[tuple[Kind, str], list[Wanted]] = {
            (kind, url): [] for kind, engine in read.engines.items() for url in engine.urls
        }
        if not read.engines and not read.models:
            found = await discovery.find(self._client, self._places.ports, own_port=read.port)
            wanted = {(kind, url): [] for kind, url in found.items()}
            for lanes in read.pair.values():
                for kind in lanes.keys() - found.keys():
                    wanted[kind, KINDS[kind].usual_url] = []
        for name, model in read.served().items():
            for kind, lane in model.lanes.items():
                own = lane.urls or tuple(url for of, url in wanted if of == kind)
                for url in own:
                    needs = Wanted(name, lane, exclusive=model.placement == "exclusive")
                    wanted.setdefault((kind, url), []).append(needs)
        looks = (self._server(kind, url, tuple(of)) for (kind, url), of in wanted.items())
        return tuple(await asyncio.gather(*looks))

    async def _server(self, kind: Kind, url: str, wanted: tuple[Wanted, ...]) -> Server:
        origin, configured = http.Origin.of(url), self._read.engines.get(kind)
        key = configured.api_key.get_secret_value() if configured and configured.api_key else None
        engine = KINDS[kind].engine(
            url, self._client, api_key=key, timeouts=Timeouts(connect_s=CONNECT_S)
        )
        addresses = await _asked(_addresses(origin.host))
        seen = () if isinstance(addresses, Unseen) else addresses
        server = Server(
            kind,
            url,
            origin.port,
            addresses if isinstance(addresses, Unseen) else await self._answers(engine),
            wanted,
            configured,
            addresses=addresses,
            here=any(map(_is_here, seen)),
        )
        server = replace(
            server,
            sockets=_tried(lambda: tuple(one.address for one in self._on(origin.port))),
            process=await asyncio.to_thread(_tried, lambda: self._process(server)),
        )
        try:
            return await self._told(server, engine)
        finally:
            await engine.close()

    async def _answers(self, engine: base.Engine) -> Kind | Unseen | None:
        """Which kind of engine is there; None: something that is none."""
        found = await discovery.kind_of(self._client, engine.url)
        if found is not None:
            return found
        try:
            await engine.models()
        except (Unreachable, errors.Silent) as exc:
            return Unseen(str(exc).removeprefix(f"{engine}: "))
        except BackendError:
            return None
        return engine.kind  # it took its time

    async def _told(self, server: Server, engine: base.Engine) -> Server:
        """What it says of itself."""
        if server.answers != server.kind:
            why = Unseen(
                "it does not answer" if isinstance(server.answers, Unseen) else "it is another kind"
            )
            return replace(
                server, version=why, models=why, loaded=why, contexts=why, identities=why,
                sleeps=why, asleep=why,
            )  # fmt: skip
        models = await _asked(engine.models())
        wanted = tuple(dict.fromkeys(lane.lane.model for lane in server.wanted))
        return replace(
            server,
            models=models if isinstance(models, Unseen) else tuple(models),
            version=await _asked(engine.version()),
            identities=await _asked(_of_lanes(server, engine.identity)),
            loaded=await _asked(_loaded(engine)),
            contexts=await _asked(engine.contexts(wanted)),
            sleeps=await _asked(engine.sleeps()),
            asleep=await _asked(engine.asleep()),
        )

    def _on(self, port: int) -> list[Listener]:
        return [one for one in known(self._listeners) if one.port == port]

    def _process(self, server: Server) -> Process:
        """The engine's own process; as it would be started, where it does not run."""
        configured = server.configured
        if isinstance(server.answers, Unseen) and configured and configured.command:
            here = known(self._here)
            environment = {**settings.environment(), **configured.environment}
            return Process(None, configured.command, environment, here.shm, here.memlock)
        if not server.here:
            raise NotSeen("it runs on another machine or in a container: its flags are not seen")
        found = self._held(server.port)
        if found is None:
            raise NotSeen("its process is not seen: another user's, or in a container")
        if not KINDS[server.kind].is_process(found.name, " ".join(found.command)):
            raise NotSeen(
                f"what listens for it is {found.name} (process {found.pid}), not the engine itself"
            )
        return found

    def _held(self, port: int) -> Process | None:
        pid = holder(self._places.proc, {one.inode for one in self._on(port)})
        return None if pid is None else process(self._places.proc, pid)

    async def port(self) -> Port | Unseen:
        """Who is where the gateway is to listen."""
        host, number = self._read.host, self._read.port
        if number == 0:
            return Port(host, number)
        try:
            own = await _addresses(host)
        except NotSeen:
            return Port(host, number, here=False)
        if not any(map(_is_here, own)):
            return Port(host, number, here=False)
        listeners = _tried(lambda: self._on(number))
        if isinstance(listeners, Unseen):
            return listeners
        # As the gateway listens: a name that stands for both is taken in the older family.
        own = tuple(address for address in own if (":" in address) == (":" in host))
        taken = tuple(one.address for one in listeners if _collide(one.address, own))
        if not taken or (set(taken) == {"::"} and ":" not in host and _is_here(host, number)):
            return Port(host, number)  # the second: one that takes no IPv4 is not in the way
        found = _tried(lambda: self._held(number))
        by = "something that this user cannot look at"
        if isinstance(found, Process):
            by = f"{found.name} (process {found.pid})"
        return Port(host, number, taken, by, ours=await self._is_ours(host, number))

    async def _is_ours(self, host: str, number: int) -> bool:
        """Whether what listens there answers as a gateway does."""
        where = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - not bound to
        origin = http.Origin(where, number, tls=False)
        try:
            answer = await self._client.request(
                origin, "GET", "/ready", {}, b"", connect_s=CONNECT_S, head_s=CONNECT_S
            )
            said = json.loads(await answer.read_all(base.MAX_ERROR))
            answer.close(reuse=False)
        except (http.HttpError, ValueError):
            return False
        return isinstance(said, dict) and {"ready", "waiting_for"} <= said.keys()


def _collide(address: str, own: tuple[str, ...]) -> bool:
    """Whether who listens there is in the way of who wants to listen here."""
    anywhere = {"0.0.0.0", "::"}  # noqa: S104 - compared with
    return address in anywhere or address in own or not anywhere.isdisjoint(own)


async def _loaded(engine: base.Engine) -> tuple[reports.Loaded, ...]:
    return tuple(await engine.loaded())


async def _of_lanes(server: Server, question: Callable[[str], Awaitable[T]]) -> Mapping[str, T]:
    """What an engine says of each model that the settings want of it, and that it has."""
    found = {}
    for name in dict.fromkeys(wanted.lane.model for wanted in server.wanted):
        try:
            found[name] = await question(name)
        except errors.Refused:
            continue  # it does not have it, which is said elsewhere
    return found
