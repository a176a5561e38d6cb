"""What the collectors observed, as plain data. What could not be observed is `Unknown`.

Sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import TypeVar

from backends.kinds import Kind
from backends.reports import Identity, Loaded
from gateway.gpu.cards import Driver
from gateway.gpu.lease import Owner
from gateway.routing.profile import Profile
from gateway.settings import EngineSettings, LaneSettings, Settings

T = TypeVar("T")

#: The reason of all that depends on the settings, where these cannot be used.
NO_SETTINGS = "the settings cannot be used"


@dataclass(frozen=True, slots=True)
class Unknown:
    """It could not be observed; `reason` is for people."""

    reason: str


class NotObserved(Exception):
    """A check needs what was not observed; the text is the reason."""


def require(value: T | Unknown) -> T:
    """The observed value; raises `NotObserved` where it is unknown."""
    if isinstance(value, Unknown):
        raise NotObserved(value.reason)
    return value


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach this address."""
    parsed = ip_address(address)
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def is_private(address: str) -> bool:
    """Whether this address belongs to a local network and not to the internet."""
    parsed = ip_address(address)
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_private


@dataclass(frozen=True, slots=True)
class Process:
    """A process, as the kernel shows it.

    Attributes:
        pid: None where it does not run; the rest is how the gateway would start it.
        command: Its program and arguments.
        environment: Its environment variables.
        shm: Size of the /dev/shm that it sees.
        memlock: The limit of the memory that it may lock; None: no limit.
    """

    pid: int | None
    command: tuple[str, ...]
    environment: Mapping[str, str] | Unknown
    shm: int | Unknown
    memlock: int | Unknown | None

    @property
    def name(self) -> str:
        """The name of its program, without the folder."""
        return self.command[0].rpartition("/")[2] if self.command else "?"

    def flag(self, *names: str) -> str | None:
        """The value of a command line option; empty for a switch, None where it is absent."""
        for at, word in enumerate(self.command):
            name, equals, value = word.partition("=")
            if name not in names:
                continue
            after = self.command[at + 1 : at + 2]
            return value if equals or not after or after[0].startswith("-") else after[0]
        return None


@dataclass(frozen=True, slots=True)
class Docker:
    """What `docker info` reports.

    Attributes:
        version: The version of the Docker Engine.
        runtimes: The names of its container runtimes.
        cdi: The devices that containers can request by name.
        root: The folder of its images and volumes.
    """

    version: str
    runtimes: tuple[str, ...]
    cdi: tuple[str, ...]
    root: str


@dataclass(frozen=True, slots=True)
class Ram:
    """The machine's memory."""

    total: int
    available: int


@dataclass(frozen=True, slots=True)
class Disk:
    """The free space where models are kept, or would be.

    Attributes:
        used_by: A kind of engine, or `docker`.
        path: The folder.
        free: Free for this user.
    """

    used_by: str
    path: str
    free: int


@dataclass(frozen=True, slots=True)
class Port:
    """The address on which the gateway should listen.

    Attributes:
        host: Its address or name.
        number: The port.
        conflicts: The addresses of sockets that already listen and are in the way.
        listener: The process that listens there, for people.
        is_gateway: Whether a twolane gateway answers there.
        is_local: Whether the address belongs to this machine.
    """

    host: str
    number: int
    conflicts: tuple[str, ...] = ()
    listener: str = ""
    is_gateway: bool = False
    is_local: bool = True


@dataclass(frozen=True, slots=True)
class Exposure:
    """Who may use the gateway.

    Attributes:
        host: The address that clients use.
        keys: The number of API keys.
        is_open: Whether other machines can use it without a key, as the settings allow it.
        refusal: Why the gateway refuses to start; empty where it starts.
    """

    host: str
    keys: int = 0
    is_open: bool = False
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class ExpectedLane:
    """A lane that the settings expect of an engine.

    Attributes:
        model: The name that clients use.
        lane: Its settings.
        exclusive: Whether the model's engines take turns on the GPU.
    """

    model: str
    lane: LaneSettings
    exclusive: bool


#: Why nothing is known of an engine that was not queried.
NOT_ASKED = Unknown("it was not queried")
NOT_SEARCHED = Unknown("it was not looked for")


@dataclass(frozen=True, slots=True)
class ObservedEngine:
    """One engine at one URL.

    Attributes:
        kind: The kind that the settings expect.
        url: Its base URL.
        port: Its port.
        answering_kind: The kind that answers; None: something that is not an engine we know.
        lanes: The lanes that the settings expect of it.
        configured: Its settings, where there are some.
        version: The version that it reports.
        models: The models that it has.
        loaded: The models that are in memory.
        contexts: Tokens by model: vLLM's `--max-model-len`; what the model file of an Ollama says.
        identities: By model, what a profile records about it.
        has_dev_endpoints: Whether a vLLM has the endpoints of its dev mode (sleep, wake up).
        is_asleep: Whether a vLLM sleeps now.
        addresses: The addresses of its host name.
        is_local: Whether one of these belongs to this machine.
        listening_on: The addresses of this machine on which a socket listens on its port.
        process: Its process. Where the gateway would start it: how it would be started.
    """

    kind: Kind
    url: str
    port: int
    answering_kind: Kind | Unknown | None
    lanes: tuple[ExpectedLane, ...] = ()
    configured: EngineSettings | None = None
    version: str | Unknown = NOT_ASKED
    models: tuple[str, ...] | Unknown = NOT_ASKED
    loaded: tuple[Loaded, ...] | Unknown = NOT_ASKED
    contexts: Mapping[str, int | None] | Unknown = NOT_ASKED
    identities: Mapping[str, Identity] | Unknown = NOT_ASKED
    has_dev_endpoints: bool | Unknown = NOT_ASKED
    is_asleep: bool | Unknown = NOT_ASKED
    addresses: tuple[str, ...] | Unknown = NOT_SEARCHED
    is_local: bool = True
    listening_on: tuple[str, ...] | Unknown = NOT_SEARCHED
    process: Process | Unknown = NOT_SEARCHED

    @property
    def label(self) -> str:
        """Its name in a finding, `KIND at HOST:PORT`."""
        return f"{self.kind} at {self.url.removeprefix('http://')}"

    @property
    def is_managed(self) -> bool:
        """Whether the gateway starts and stops it."""
        return self.configured is not None and bool(self.configured.command)


@dataclass(frozen=True, slots=True)
class Observations:
    """Everything that was observed.

    Attributes:
        at: When, Unix time.
        source: The origin of the settings, for people.
        program: What to type for `twolane` on this installation.
        settings: The gateway's settings.
        exposure: Who may use the gateway.
        port: Where it should listen.
        lease: The path of the GPU lease.
        owner: The gateway that has the GPU lease; None: it is free.
        profiles: By model; None for the assumed profile, a text for a file that cannot be used.
        engines: The engines of the settings, or those that were found.
        nvidia_devices: The number of NVIDIA display devices on the PCI bus.
        driver_loaded: Whether the kernel has loaded NVIDIA's driver.
        driver: The driver and the cards.
        docker: None without a docker command.
        ram: The machine's memory.
        own_process: This process, for the limits of an engine that is started from this shell.
        disks: Where models are kept, or would be.
    """

    at: float
    source: str
    program: str
    settings: Settings | Unknown
    exposure: Exposure | Unknown
    port: Port | Unknown
    lease: str | Unknown
    owner: Owner | Unknown | None
    profiles: Mapping[str, Profile | str | None] | Unknown
    engines: tuple[ObservedEngine, ...] | Unknown
    nvidia_devices: int | Unknown
    driver_loaded: bool
    driver: Driver | Unknown
    docker: Docker | Unknown | None
    ram: Ram | Unknown
    own_process: Process | Unknown
    disks: tuple[Disk, ...] | Unknown = field(default=())
