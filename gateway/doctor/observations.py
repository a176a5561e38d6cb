"""What was seen, as plain data. What could not be seen is `Unknown`, with the reason.

Sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import TypeVar

from backends.kinds import Kind
from backends.reports import Identity, Loaded
from gateway.gpu.lease import Owner
from gateway.gpu.memory import Driver
from gateway.routing.profile import Profile
from gateway.settings import EngineSettings, LaneSettings, Settings

T = TypeVar("T")

#: Why nothing is seen of what the settings tell, where these cannot be used.
NO_SETTINGS = "the settings cannot be used"


@dataclass(frozen=True, slots=True)
class Unknown:
    """It could not be looked at, or does not tell; `why` is for people."""

    why: str


class NotObserved(Exception):
    """A judgement needs what was not seen; the text says why it was not."""


def require(part: T | Unknown) -> T:
    """What was seen; raises `NotObserved` where it was not."""
    if isinstance(part, Unknown):
        raise NotObserved(part.why)
    return part


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches this address."""
    found = ip_address(address)
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def is_private(address: str) -> bool:
    """Whether this address is of a local network and not of the internet."""
    found = ip_address(address)
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_private


@dataclass(frozen=True, slots=True)
class Process:
    """A process, as far as the kernel tells of it.

    Attributes:
        pid: None where it does not run, and the rest is how it would be started.
        shm: All of the /dev/shm it sees.
        memlock: What it may lock in memory; None: without limit.
    """

    pid: int | None
    command: tuple[str, ...]
    environment: Mapping[str, str] | Unknown
    shm: int | Unknown
    memlock: int | Unknown | None

    @property
    def name(self) -> str:
        """Its program, without the folder."""
        return self.command[0].rpartition("/")[2] if self.command else "?"

    def flag(self, *names: str) -> str | None:
        """The value of a command line option; empty for one without, None where it is not there."""
        for at, word in enumerate(self.command):
            name, equals, value = word.partition("=")
            if name not in names:
                continue
            after = self.command[at + 1 : at + 2]
            return value if equals or not after or after[0].startswith("-") else after[0]
        return None


@dataclass(frozen=True, slots=True)
class Docker:
    """What Docker says of itself.

    Attributes:
        cdi: The devices that it can hand to containers by name.
        root: Where it keeps images and volumes.
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
    """Where somebody keeps models, or would, and what is free there."""

    holds: str
    path: str
    free: int


@dataclass(frozen=True, slots=True)
class Port:
    """The port that the gateway is to listen on.

    Attributes:
        taken: The addresses on which something listens already that is in our way.
        by: What that is, as far as can be told.
        ours: It is a twolane gateway.
        here: The address is one of this machine's.
    """

    host: str
    number: int
    taken: tuple[str, ...] = ()
    by: str = ""
    ours: bool = False
    here: bool = True


@dataclass(frozen=True, slots=True)
class Exposure:
    """Who may use the gateway.

    Attributes:
        anybody: Whoever reaches this address, and other machines do, as the settings allow it.
        refused: Why it would not start; empty where it would.
    """

    host: str
    keys: int = 0
    anybody: bool = False
    refused: str = ""


@dataclass(frozen=True, slots=True)
class ExpectedLane:
    """A lane that the settings want of an engine."""

    model: str
    lane: LaneSettings
    exclusive: bool


@dataclass(frozen=True, slots=True)
class ObservedEngine:
    """One engine at one URL.

    Attributes:
        answers: The kind that answers there; None: nothing that we know.
        contexts: By model, tokens: of vLLM `--max-model-len`, of Ollama the model file's own.
        sleeps: Whether a vLLM has its sleep endpoints.
        addresses: What its host name stands for.
        here: One of these is this machine's.
        sockets: Addresses of this machine on which something listens on its port.
        process: The engine's own; where the gateway is to start it, how it would be started.
    """

    kind: Kind
    url: str
    port: int
    answers: Kind | Unknown | None
    wanted: tuple[ExpectedLane, ...] = ()
    configured: EngineSettings | None = None
    version: str | Unknown = Unknown("it was not asked")
    models: tuple[str, ...] | Unknown = Unknown("it was not asked")
    loaded: tuple[Loaded, ...] | Unknown = Unknown("it was not asked")
    contexts: Mapping[str, int | None] | Unknown = Unknown("it was not asked")
    identities: Mapping[str, Identity] | Unknown = Unknown("it was not asked")
    sleeps: bool | Unknown = Unknown("it was not asked")
    asleep: bool | Unknown = Unknown("it was not asked")
    addresses: tuple[str, ...] | Unknown = Unknown("it was not looked up")
    here: bool = True
    sockets: tuple[str, ...] | Unknown = Unknown("it was not looked for")
    process: Process | Unknown = Unknown("it was not looked for")

    @property
    def label(self) -> str:
        """What to call it."""
        return f"{self.kind} at {self.url.removeprefix('http://')}"

    @property
    def ours(self) -> bool:
        """Whether the gateway starts it."""
        return self.configured is not None and bool(self.configured.command)


@dataclass(frozen=True, slots=True)
class Observations:
    """All of it.

    Attributes:
        at: When, Unix time.
        source: Where the settings are from, for people.
        nvidia_on_bus: NVIDIA display devices on the PCI bus.
        driver_loaded: Whether the kernel has NVIDIA's driver.
        docker: None where there is no docker command.
        here: This very process, for what an engine started from this shell would have.
        owner: Of the GPU's lease; None: nobody. `lease` is its file.
        profiles: By model, None for the assumed one, text for a file that cannot be used.
    """

    at: float
    source: str
    settings: Settings | Unknown
    exposure: Exposure | Unknown
    port: Port | Unknown
    lease: str | Unknown
    owner: Owner | Unknown | None
    profiles: Mapping[str, Profile | str | None] | Unknown
    servers: tuple[ObservedEngine, ...] | Unknown
    nvidia_on_bus: int | Unknown
    driver_loaded: bool
    driver: Driver | Unknown
    docker: Docker | Unknown | None
    ram: Ram | Unknown
    here: Process | Unknown
    disks: tuple[Disk, ...] | Unknown = field(default=())
