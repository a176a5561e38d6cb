"""What it means that was seen, why that matters, and what to do: plain functions of `Seen`.

A judgement that lacks what it needs says `unknown` and why, and so does one that fails.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial

from backends.kinds import KINDS, Kind
from backends.ollama import full
from backends.reports import Loaded
from gateway.doctor.seen import (
    NO_SETTINGS,
    NotSeen,
    Process,
    Seen,
    Server,
    Unseen,
    is_loopback,
    is_private,
    known,
)
from gateway.gpu.memory import Brake, Card
from gateway.routing.profile import Measured, Profile
from gateway.settings import Settings

GIB = 2**30
MIB = 2**20

#: What a 70B in 4 bit takes: AWQ for vLLM (37.0 GiB) and Q4_K_M for Ollama (39.6 GiB).
BIG_MODEL = 40 * GIB
#: … and what of RAM a vLLM pins that sleeps with it, level 1.
BIG_SLEEP = "44 to 50 GiB for a 70B in 4 bit"
#: What Docker gives a container as /dev/shm unless it is told otherwise.
DOCKER_SHM = 64 * MIB
#: Ollama's context where nobody sets one, by GPU memory from so many bytes on. Read in its
#: source, 0.24 and 0.33.
OLLAMA_CONTEXTS = ((47 * GIB, 262_144), (23 * GIB, 32_768), (0, 4_096))
#: A profile of this age is worth measuring again, seconds. Assumed.
OLD_S = 180 * 86_400.0
#: Full for all practical purposes: a log, a picture, and it is.
NEARLY_FULL = 1 * GIB
#: The slowest performance state in which a card works.
WORKING = 2

#: Releases that the tests run, and those that were read in their source only.
RUN: Mapping[Kind, Collection[tuple[int, int]]] = {"ollama": {(0, 24)}, "vllm": {(0, 32)}}
READ: Mapping[Kind, Collection[tuple[int, int]]] = {"ollama": {(0, 33)}, "vllm": {(0, 33)}}
#: From which release on an engine has a habit that breaks installations.
HABITS: Mapping[Kind, tuple[tuple[int, int], str]] = {
    "ollama": (
        (0, 30),
        "from 0.30 on it generates by a llama-server binary that must lie beside it",
    )
}
#: Options that vLLM had once; with one of them it does not start (read in 0.32 and 0.33).
GONE_FLAGS = ("--swap-space", "--disable-log-requests")


class Level(StrEnum):
    """How a finding is to be taken, the worst first."""

    PROBLEM = "problem"  # it fails, or will
    WARNING = "warning"  # it may fail, or somebody else may use it
    UNKNOWN = "unknown"  # nobody could tell; the finding says why
    NOTE = "note"  # worth knowing
    OK = "ok"
    NONE = "not applicable"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was seen and what to do. `about`: which card, engine, model; empty if there is one."""

    level: Level
    saw: str
    do: str = ""
    about: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict, with the name of its check and why that matters. Its fields are the JSON's."""

    check: str
    about: str
    level: Level
    saw: str
    why: str
    do: str


@dataclass(frozen=True, slots=True)
class Check:
    """A judgement with its name, which does not change, and why it is made."""

    name: str
    why: str
    judge: Callable[[Seen], Iterable[Verdict]]


def examine(seen: Seen, checks: Iterable[Check] | None = None) -> list[Finding]:
    """Every finding of every check, in their order. Never raises."""
    return [
        Finding(check.name, found.about, found.level, found.saw, check.why, found.do)
        for check in (CHECKS if checks is None else checks)
        for found in _attempted(partial(check.judge, seen))
    ]


def _attempted(judge: Callable[[], Iterable[Verdict]], about: str = "") -> Iterator[Verdict]:
    """What a judgement comes to, and `unknown` where it does not come to its end."""
    try:
        for verdict in judge():
            yield replace(verdict, about=verdict.about or about)
    except NotSeen as exc:
        yield Verdict(Level.UNKNOWN, str(exc), about=about)
    except Exception as exc:  # noqa: BLE001 - a doctor that falls over helps nobody
        said = f"the check itself failed: {type(exc).__name__}: {exc}"
        yield Verdict(Level.UNKNOWN, said, "Please report this, it is a fault of twolane.", about)


def _of_each(
    judge: Callable[[Seen, Server], Iterable[Verdict]], *kinds: Kind
) -> Callable[[Seen], Iterator[Verdict]]:
    """A judgement of each engine of these kinds."""

    def judged(seen: Seen) -> Iterator[Verdict]:
        servers = [server for server in known(seen.servers) if server.kind in kinds]
        if not servers:
            yield Verdict(Level.NONE, f"no {', '.join(kinds)} is configured or found")
        for server in servers:
            yield from _attempted(partial(judge, seen, server), server.label)

    return judged


def _size(size: float) -> str:
    if size < GIB:
        return f"{size / MIB:.0f} MiB"
    return f"{size / GIB:.0f} GiB" if size >= 100 * GIB else f"{size / GIB:.1f} GiB"


def without_cards(seen: Seen) -> bool:
    """Whether it is sure that there is neither an NVIDIA card nor its driver."""
    return isinstance(seen.driver, Unseen) and seen.nvidia_on_bus == 0 and not seen.driver_loaded


def cards(seen: Seen) -> tuple[Card, ...]:
    """The NVIDIA cards; raises `NotSeen` where there may be some."""
    return () if without_cards(seen) else known(seen.driver).cards


# The gateway itself


def settings_load(seen: Seen) -> Iterator[Verdict]:
    """Whether the settings can be used."""
    if isinstance(seen.settings, Unseen):
        yield Verdict(Level.PROBLEM, seen.settings.why, "Correct it: `twolane serve` would stop.")
    else:
        yield Verdict(Level.OK, f"{seen.source} can be used")


def _settings(seen: Seen) -> Settings:
    """The settings; raises `NotSeen`, without the reason, which is said elsewhere."""
    return known(Unseen(NO_SETTINGS) if isinstance(seen.settings, Unseen) else seen.settings)


def exposure(seen: Seen) -> Iterator[Verdict]:
    """Who may use the gateway."""
    found = known(seen.exposure)
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


def port(seen: Seen) -> Iterator[Verdict]:
    """Whether the gateway can listen where it is to."""
    found = known(seen.port)
    where = f"{found.host}:{found.number}"
    if found.number == 0:
        yield Verdict(Level.NONE, "any free port is taken (port: 0)")
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


def lease(seen: Seen) -> Iterator[Verdict]:
    """Whether the GPU is free to be owned."""
    own = _settings(seen)
    if not any(model.placement == "exclusive" for model in own.models.values()):
        yield Verdict(Level.NONE, "no model is in an exclusive placement")
        return
    owner = known(seen.owner)
    if owner is None:
        yield Verdict(Level.OK, f"nobody owns the GPU ({known(seen.lease)})")
    elif owner.address == f"{own.host}:{own.port}":
        yield Verdict(Level.OK, f"the gateway that runs owns the GPU: {owner}")
    else:
        yield Verdict(
            Level.PROBLEM,
            f"another gateway owns the GPU: {owner}",
            f"Stop it; or, for other cards, name another file: gpu.lease ({known(seen.lease)}).",
        )


def profile(seen: Seen) -> Iterator[Verdict]:
    """What the gateway decides by."""
    found = known(seen.profiles)
    if not found:
        yield Verdict(Level.NONE, "no model of the settings has two lanes to choose between")
    for model, measured in found.items():
        yield from _attempted(partial(_profile, seen, model, measured), f"model {model}")


def _profile(seen: Seen, model: str, found: Profile | str | None) -> Iterator[Verdict]:
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
        for server in known(seen.servers)
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


def _changes(found: Profile, server: Server, model: str) -> list[str]:
    """What an engine is now that it was not when this was measured, as far as it tells."""
    if isinstance(server.identities, Unseen) or model not in server.identities:
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


# The machine


def driver(seen: Seen) -> Iterator[Verdict]:
    """The driver and the cards it has."""
    if not isinstance(seen.driver, Unseen):
        found = seen.driver
        names = ", ".join(f"{card.name} {_size(card.memory)}" for card in found.cards)
        yield Verdict(Level.OK, f"driver {found.version}, CUDA up to {found.cuda}: {names}")
    elif without_cards(seen):
        yield Verdict(Level.NONE, "no NVIDIA card on the PCI bus, and no driver")
    elif isinstance(seen.nvidia_on_bus, Unseen) and not seen.driver_loaded:
        yield Verdict(Level.UNKNOWN, f"{seen.driver.why}; {seen.nvidia_on_bus.why}")
    else:
        yield Verdict(
            Level.PROBLEM,
            f"the machine has NVIDIA's {_where(seen)}, but: {seen.driver.why}",
            "Install the driver; after an update of it, restart the machine. In a container: give "
            "it the GPU capability `utility`.",
        )


def _where(seen: Seen) -> str:
    return "driver in the kernel" if seen.driver_loaded else "card on its PCI bus"


def docker(seen: Seen) -> Iterator[Verdict]:
    """Whether Docker can hand the cards to containers."""
    if seen.docker is None:
        yield Verdict(Level.NONE, "no docker command here")
        return
    if not cards(seen):
        yield Verdict(Level.NONE, "no NVIDIA card to hand to containers")
        return
    found = known(seen.docker)
    devices = [name for name in found.cdi if name.startswith("nvidia.com/gpu")]
    if "nvidia" in found.runtimes or devices:
        by = "its nvidia runtime" if "nvidia" in found.runtimes else "CDI"
        yield Verdict(Level.OK, f"Docker {found.version} can hand out the cards, by {by}")
    else:
        yield Verdict(
            Level.WARNING,
            f"Docker {found.version} has neither the nvidia runtime nor a CDI device of NVIDIA",
            "For engines in containers install nvidia-container-toolkit, then `sudo nvidia-ctk "
            "runtime configure --runtime=docker` and `sudo systemctl restart docker`.",
        )


def p2p(seen: Seen) -> Iterator[Verdict]:
    """Whether the cards read each other's memory."""
    found = cards(seen)
    if len(found) < 2:
        yield Verdict(Level.NONE, f"{len(found) or 'no'} NVIDIA card, so there is no pair")
    elif _peers(found):
        if any("4090" in card.name for card in found):
            yield Verdict(
                Level.NOTE,
                "the driver says that the cards read each other's memory; 4090s as sold do not",
                "Do not rely on it untried: NCCL_P2P_DISABLE=1, --disable-custom-all-reduce.",
            )
        else:
            yield Verdict(Level.OK, f"the {len(found)} cards read each other's memory")
    else:
        yield Verdict(
            Level.NOTE,
            "the cards do not read each other's memory: what they share goes through the host",
            "For a vLLM over both: NCCL_P2P_DISABLE=1 and --disable-custom-all-reduce.",
        )


def _peers(found: tuple[Card, ...]) -> bool:
    """Whether each card reads each other's memory; raises `NotSeen`."""
    for card in found:
        if card.peers is None:
            raise NotSeen(f"the driver does not tell whether {card} has P2P")
    return all(len(card.peers or ()) == len(found) - 1 for card in found)


def pcie(seen: Seen) -> Iterator[Verdict]:
    """The link of each card, against what it could be."""
    yield from _of_each_card(seen, _pcie)


def _of_each_card(seen: Seen, judge: Callable[[Card], Iterable[Verdict]]) -> Iterator[Verdict]:
    found = cards(seen)
    if not found:
        yield Verdict(Level.NONE, "no NVIDIA card")
    for card in found:
        yield from _attempted(partial(judge, card), str(card))


def _pcie(card: Card) -> Iterator[Verdict]:
    (width, widest), (generation, newest) = card.width, card.generation
    if width is None or widest is None or generation is None or newest is None:
        raise NotSeen("the driver does not tell its PCIe link")
    saw = f"x{width} of x{widest}, generation {generation} of {newest}"
    if width < min(8, widest):
        yield Verdict(Level.WARNING, saw, "Look at its slot, riser and the board's manual.")
    elif generation < newest and card.state is not None and card.state <= WORKING:
        yield Verdict(
            Level.WARNING,
            f"{saw}, though it works",
            "Look at its riser, and at the BIOS's link speed.",
        )
    elif generation < newest:
        yield Verdict(Level.NOTE, f"{saw}; a link may rest while nothing runs", "Look under load.")
    elif width < widest:
        yield Verdict(Level.NOTE, f"{saw}, as two cards on one desktop board usually have")
    else:
        yield Verdict(Level.OK, saw)


def power(seen: Seen) -> Iterator[Verdict]:
    """The power limit of each card, and whether power holds it back."""
    yield from _of_each_card(seen, _power)


def _power(card: Card) -> Iterator[Verdict]:
    limit, usual = card.power_w
    if limit is None:
        raise NotSeen("the driver does not tell its power limit")
    saw = f"limit {limit:.0f} W" + (f" of {usual:.0f} W as shipped" if usual else "")
    brakes = card.brakes or Brake(0)
    if brakes & (Brake.POWER_SUPPLY | Brake.HARDWARE):
        yield Verdict(
            Level.WARNING,
            f"{saw}; the hardware slows it down now",
            "Look at its power cables and supply, and at its cooling.",
        )
    elif Brake.POWER_LIMIT in brakes:
        yield Verdict(Level.NOTE, f"{saw}, and that limit is what holds it back now")
    elif usual and limit < usual:
        yield Verdict(Level.NOTE, f"{saw}: somebody has lowered it")
    else:
        yield Verdict(Level.OK, saw)


def heat(seen: Seen) -> Iterator[Verdict]:
    """The temperature of each card, and whether it holds it back."""
    yield from _of_each_card(seen, _heat)


def _heat(card: Card) -> Iterator[Verdict]:
    now, most = card.heat_c
    if now is None:
        raise NotSeen("the driver does not tell its temperature")
    saw = f"{now} °C" + (f", slowed down at {most}" if most else "")
    slowed = (card.brakes or Brake(0)) & (Brake.HEAT | Brake.HARDWARE_HEAT)
    if slowed or (most is not None and now >= most):
        yield Verdict(
            Level.WARNING,
            f"{saw}{', as it is now' if slowed else ''}",
            "More air between the cards, or a lower power limit: `nvidia-smi -pl WATTS`.",
        )
    else:
        yield Verdict(Level.OK, saw)


def _of_vllm(seen: Seen) -> list[tuple[str, Process]]:
    """The processes of vLLM that run here and can be looked at, and what to call them."""
    return [
        (server.label, server.process)
        for server in known(seen.servers)
        if server.kind == "vllm"
        and isinstance(server.process, Process)
        and server.process.pid is not None
    ]


def shm(seen: Seen) -> Iterator[Verdict]:
    """How much of /dev/shm vLLM has."""
    running = _of_vllm(seen)
    for about, process in running or [("", known(seen.here))]:
        size = known(process.shm)
        if size <= DOCKER_SHM:
            yield Verdict(
                Level.WARNING, f"{_size(size)}, which is what Docker gives",
                "Start vLLM's container with `ipc: host` (docker run --ipc=host).", about,
            )  # fmt: skip
        elif running:
            yield Verdict(Level.OK, _size(size), about=about)
        else:
            yield Verdict(Level.OK, f"{_size(size)} here; a container has its own")


def _takes_turns(seen: Seen) -> list[tuple[Server, float | None]]:
    """The vLLMs that give the GPU to another engine at times, and the GiB they are said to take."""
    turns = []
    for server in known(seen.servers):
        sizes = [w.lane.memory_gib for w in server.wanted if w.exclusive]
        if server.kind == "vllm" and sizes:
            turns.append((server, max((size for size in sizes if size), default=None)))
    return turns


def memlock(seen: Seen) -> Iterator[Verdict]:
    """How much memory a vLLM that sleeps may pin."""
    if not _takes_turns(seen):
        yield Verdict(Level.NONE, "no vLLM that sleeps (no exclusive placement)")
        return
    if without_cards(seen):
        yield Verdict(Level.NONE, "no NVIDIA card here, so nothing is pinned")
        return
    running = _of_vllm(seen)
    for about, process in running or [("", known(seen.here))]:
        limit = known(process.memlock)
        if limit is None:
            yield Verdict(
                Level.OK, "without limit" if running else "without limit here", about=about
            )
        else:
            yield Verdict(
                Level.WARNING if running else Level.NOTE,
                f"{_size(limit)}" + ("" if running else " in this shell; a container has its own"),
                "Start vLLM with `ulimits: {memlock: -1}` (docker run --ulimit memlock=-1).",
                about,
            )


def ram(seen: Seen) -> Iterator[Verdict]:
    """Whether there is the RAM that a vLLM takes when it sleeps."""
    found, turns = known(seen.ram), _takes_turns(seen)
    has = f"{_size(found.total)} of RAM, {_size(found.available)} available"
    if not turns:
        yield Verdict(Level.NONE, f"{has}; no vLLM that sleeps (no exclusive placement)")
    elif _settings(seen).gpu.budget_gib is not None:
        yield Verdict(Level.NONE, f"{has}; the engines share a part of it (gpu.budget_gib)")
    else:
        for server, gib in turns:
            yield from _attempted(partial(_ram, seen, server, gib), server.label)


def _ram(seen: Seen, server: Server, gib: float | None) -> Iterator[Verdict]:
    found = known(seen.ram)
    has = f"{_size(found.total)} of RAM, {_size(found.available)} available"
    if not server.here:
        if without_cards(seen) or not all(map(is_private, known(server.addresses))):
            raise NotSeen("it may run on another machine, whose RAM is not seen from here")
        has = f"if it runs on this machine, which has {has}"
    elif without_cards(seen):
        yield Verdict(Level.NONE, "no NVIDIA card here, so nothing is pinned")
        return
    if gib is None:
        yield Verdict(
            Level.NOTE,
            f"{has}: asleep it pins about its weights in RAM, {BIG_SLEEP}",
            "Name memory_gib under its lane, and this compares.",
        )
    elif found.total < gib * GIB:
        yield Verdict(
            Level.PROBLEM if server.here else Level.WARNING,
            f"{has}: asleep it may pin {gib:g} GiB (memory_gib)",
            "More RAM, a smaller model, or let the gateway stop and start it: engines.vllm.command "
            "without dev mode.",
        )
    elif found.available < gib * GIB and server.asleep is not True:
        yield Verdict(
            Level.WARNING,
            f"{has}: asleep it may pin {gib:g} GiB (memory_gib)",
            "Free some before it sleeps for the first time.",
        )
    else:
        asleep = "pins" if server.asleep is True else "may pin"
        yield Verdict(Level.OK, f"{has}: asleep it {asleep} up to {gib:g} GiB (memory_gib)")


def disk(seen: Seen) -> Iterator[Verdict]:
    """Whether there is room for models."""
    for found in known(seen.disks):
        missing = _missing_gib(seen, found.holds)
        saw = f"{_size(found.free)} free at {found.path}"
        if found.free < NEARLY_FULL:
            level, do = Level.WARNING, "Make room before anything is downloaded."
        elif missing and found.free < missing * GIB:
            level, do = Level.WARNING, "Make room, or put the models elsewhere."
            saw += f"; models that are missing take up to {missing:g} GiB (memory_gib)"
        elif found.free < BIG_MODEL:
            level, do = Level.NOTE, ""
            saw += ", less than a 70B in 4 bit takes (37 to 40 GiB)"
        else:
            level, do = Level.OK, ""
        yield Verdict(level, saw, do, f"models of {found.holds}")


def _missing_gib(seen: Seen, kind: str) -> float:
    """What the models take, by the settings, that this kind of engine does not have yet."""
    servers = () if isinstance(seen.servers, Unseen) else seen.servers
    return sum(
        wanted.lane.memory_gib or 0.0
        for server in servers
        if server.kind == kind and not isinstance(server.models, Unseen)
        for wanted in server.wanted
        if not _has(server, server.models, wanted.lane.model)
    )


# The engines


def _has(server: Server, models: Collection[str], model: str) -> bool:
    return KINDS[server.kind].engine.full_name(model) in models


def engine(seen: Seen, server: Server) -> Iterator[Verdict]:
    """Whether it answers, is what it is said to be, and has the models."""
    if isinstance(server.answers, Unseen):
        if server.ours:
            yield Verdict(Level.NOTE, "it does not run; the gateway will start it")
        else:
            yield Verdict(
                Level.WARNING, f"it does not answer: {server.answers.why}",
                f"Start it, or correct engines.{server.kind}.urls.",
            )  # fmt: skip
        return
    if server.answers != server.kind:
        is_a = server.answers or "something that is no engine we know"
        yield Verdict(
            Level.PROBLEM, f"what answers is {is_a}", f"Correct engines.{server.kind}.urls."
        )
        return
    models = known(server.models)
    absent = [w.lane.model for w in server.wanted if not _has(server, models, w.lane.model)]
    for name in dict.fromkeys(absent):
        mend = {
            "ollama": f"`ollama pull {name}`, or correct the lane's `model`.",
            "vllm": "Start it with --served-model-name, or correct the lane's `model`.",
        }.get(server.kind, "Correct the lane's `model`.")
        yield Verdict(Level.PROBLEM, f"it has no {name}; it has {_few(models)}", mend)
    if not absent:
        yield Verdict(Level.OK, f"answers, and has {_few(models)}")


def _few(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:3])
    return (shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "no model"


def version(seen: Seen, server: Server) -> Iterator[Verdict]:
    """Whether this version of it is one that twolane knows."""
    told = known(server.version)
    numbers = re.match(r"(\d+)\.(\d+)", told)
    if numbers is None:
        raise NotSeen(f"it calls its version {told!r}")
    release = (int(numbers[1]), int(numbers[2]))
    since, habit = HABITS.get(server.kind, ((release[0] + 1, 0), ""))
    habit = f"; {habit}" if release >= since else ""
    if release in RUN[server.kind]:
        yield Verdict(Level.OK, f"{told}, as in twolane's own tests{habit}")
    else:
        run = ", ".join(f"{major}.{minor}" for major, minor in sorted(RUN[server.kind]))
        read = ", whose source was read" if release in READ[server.kind] else ""
        yield Verdict(Level.NOTE, f"{told}{read}; twolane's own tests run {run}{habit}")


def published(seen: Seen, server: Server) -> Iterator[Verdict]:
    """Who reaches it past the gateway."""
    addresses = known(server.addresses)
    if not server.here:
        if all(map(is_private, addresses)):
            yield Verdict(Level.OK, f"at {', '.join(addresses)}, a private address")
        else:
            yield Verdict(
                Level.WARNING, f"at {', '.join(addresses)}, a public address",
                "Put it behind a firewall that lets this machine in and nobody else.",
            )  # fmt: skip
        return
    sockets = known(server.sockets)
    outside = [address for address in sockets if not is_loopback(address)]
    if outside:
        bind = {"ollama": "OLLAMA_HOST=127.0.0.1", "vllm": "--host 127.0.0.1"}
        yield Verdict(
            Level.WARNING,
            f"port {server.port} listens on {', '.join(outside)}: other machines reach it, unless "
            "a firewall keeps them out",
            f"{bind.get(server.kind, '--host 127.0.0.1')}; in Docker publish no port, or "
            f"127.0.0.1:{server.port}:{server.port}.",
        )
    elif sockets:
        yield Verdict(Level.OK, f"listens on {', '.join(sockets)} alone")
    elif isinstance(server.answers, Unseen):
        yield Verdict(Level.NONE, f"nothing listens on port {server.port}")
    else:
        raise NotSeen(
            f"it answers, but no socket of this machine listens on port {server.port}: Docker may "
            "publish it by firewall rules"
        )


def context(seen: Seen, server: Server) -> Iterator[Verdict]:
    """How many tokens of context it takes, and who says so."""
    known(server.contexts)
    yield from _ollama_context(seen, server) if server.kind == "ollama" else _fixed_context(server)


def _fixed_context(server: Server) -> Iterator[Verdict]:
    for model, tokens in known(server.contexts).items():
        promised = max(
            (w.lane.context or 0 for w in server.wanted if w.lane.model == model), default=0
        )
        if tokens is not None and promised > tokens:
            yield Verdict(
                Level.PROBLEM, f"{model}: {tokens:,} tokens, and the settings promise {promised:,}",
                "Start it with a larger --max-model-len, or lower the lane's `context`.",
            )  # fmt: skip
        else:
            yield Verdict(
                Level.OK, f"{model}: {tokens:,} tokens" if tokens else f"{model}: as the model has"
            )


def _ollama_context(seen: Seen, server: Server) -> Iterator[Verdict]:
    loaded = {one.model: one for one in known(server.loaded)}
    own = known(server.contexts)
    for wanted in server.wanted:
        if not wanted.lane.context:
            continue
        one = loaded.get(full(wanted.lane.model))
        tokens = (one.context if one else None) or own.get(wanted.lane.model)
        if tokens is not None and tokens < wanted.lane.context:
            yield Verdict(
                Level.WARNING,
                f"{wanted.lane.model}: {tokens:,} tokens, and the settings promise "
                f"{wanted.lane.context:,}: longer prompts are cut without a word",
                f"OLLAMA_CONTEXT_LENGTH={wanted.lane.context}, or lower the lane's `context`.",
            )
    for one in loaded.values():
        if one.context == OLLAMA_CONTEXTS[0][1]:
            yield Verdict(
                Level.WARNING, f"{one.model} is loaded with {one.context:,} tokens a slot",
                "Set OLLAMA_CONTEXT_LENGTH: 8192, say.",
            )  # fmt: skip
    yield _ollama_default(seen, server, own)


def _ollama_default(seen: Seen, server: Server, own: Mapping[str, int | None]) -> Verdict:
    """What Ollama takes where nothing else is said."""
    if own and all(own.values()) and len(own) == len({w.lane.model for w in server.wanted}):
        told = ", ".join(f"{model} {tokens:,}" for model, tokens in own.items())
        return Verdict(Level.OK, f"tokens a slot, as the models themselves say: {told}")
    environment = known(known(server.process).environment)
    said = environment.get("OLLAMA_CONTEXT_LENGTH", "")
    if said and said != "0":
        return Verdict(Level.OK, f"OLLAMA_CONTEXT_LENGTH={said}")
    memory = sum(card.memory for card in cards(seen))
    tokens = next(tokens for least, tokens in OLLAMA_CONTEXTS if memory >= least)
    return Verdict(
        Level.WARNING,
        f"OLLAMA_CONTEXT_LENGTH is not set: with {_size(memory) if memory else 'no'} NVIDIA memory "
        f"Ollama takes {tokens:,} tokens a slot where the model says nothing",
        "Set OLLAMA_CONTEXT_LENGTH to what you need: 8192, say.",
    )


def slots(seen: Seen, server: Server) -> Iterator[Verdict]:
    """Whether it answers as many at once as it is sent."""
    wanted = max((w.lane.slots or KINDS[server.kind].slots for w in server.wanted), default=0)
    ours = wanted or KINDS[server.kind].slots
    process = known(server.process)
    if server.kind == "ollama":
        name = "OLLAMA_NUM_PARALLEL"
        said = known(process.environment).get(name) or "1"
    else:
        name = "--max-num-seqs"
        said = process.flag(name) or ""
    if not said.isdecimal() or said == "0":
        raise NotSeen(f"it was given no number for {name}; the gateway sends {ours} at once")
    theirs = int(said)
    if ours > theirs:
        yield Verdict(
            Level.WARNING,
            f"the gateway sends {ours} at once, and it answers {theirs} ({name}): the others wait "
            "inside, where the gateway cannot order or time them out",
            f"Set the lane's `slots: {theirs}`, or {name} to {ours}.",
        )
    elif ours < theirs:
        yield Verdict(
            Level.NOTE,
            f"it could answer {theirs} at once ({name}), the gateway sends {ours}",
            f"Set the lane's `slots: {theirs}`.",
        )
    else:
        yield Verdict(Level.OK, f"{ours} at once, on both sides ({name})")


def on_gpu(seen: Seen, server: Server) -> Iterator[Verdict]:
    """Whether the models it has loaded are in GPU memory."""
    loaded = known(server.loaded)
    if not loaded:
        raise NotSeen("no model is loaded now; ask it something, then look again")
    for one in loaded:
        yield from _attempted(partial(_on_gpu, seen, server, one), server.label)


def _on_gpu(seen: Seen, server: Server, one: Loaded) -> Iterator[Verdict]:
    if one.on_gpu >= one.size:
        yield Verdict(Level.OK, f"{one.model} is in GPU memory as a whole ({_size(one.size)})")
    elif one.on_gpu:
        yield Verdict(
            Level.PROBLEM,
            f"{one.model}: {_size(one.size - one.on_gpu)} of {_size(one.size)} are on the CPU",
            "Less context or fewer slots (it pays for context x slots), OLLAMA_KV_CACHE_TYPE=q8_0, "
            "or a smaller quantization; in an exclusive placement name memory_gib.",
        )
    elif not server.here:
        yield Verdict(
            Level.WARNING,
            f"{one.model} is on the CPU as a whole, on that machine",
            "If it has a card, see Ollama's log there for why it was not found.",
        )
    elif not cards(seen):
        yield Verdict(Level.NOTE, f"{one.model} is on the CPU as a whole: no NVIDIA card here")
    else:
        yield Verdict(
            Level.PROBLEM,
            f"{one.model} is on the CPU as a whole, though there is a card",
            "See Ollama's log for why it found none; a container needs its GPU reservation.",
        )


def dev_endpoints(seen: Seen, server: Server) -> Iterator[Verdict]:
    """Who reaches the endpoints that vLLM has in dev mode."""
    if not known(server.sleeps):
        yield Verdict(Level.OK, "it has no dev endpoints")
        return
    addresses = known(server.addresses)
    outside = [address for address in addresses if not is_private(address)]
    if server.here:
        outside = [address for address in known(server.sockets) if not is_loopback(address)]
    if outside:
        yield Verdict(
            Level.PROBLEM,
            f"/is_sleeping answers, and its port listens on {', '.join(outside)}"
            if server.here
            else f"/is_sleeping answers at {', '.join(outside)}, a public address",
            "--host 127.0.0.1, or publish no port; its --api-key does not guard these.",
        )
    elif server.here:
        yield Verdict(Level.OK, "they answer, to this machine alone")
    else:
        yield Verdict(Level.NOTE, f"they answer at {', '.join(addresses)}: to that network, too")


def sleep(seen: Seen, server: Server) -> Iterator[Verdict]:
    """Whether it can give its memory back."""
    if not any(wanted.exclusive for wanted in server.wanted):
        yield Verdict(Level.NONE, "it need not sleep (no exclusive placement)")
        return
    if not known(server.sleeps):
        if server.ours:
            yield Verdict(Level.NOTE, "it is stopped and started; a 70B takes 60 to 150 s to start")
        else:
            yield Verdict(
                Level.PROBLEM,
                "it cannot sleep, and the gateway cannot stop it: it never gives its memory back",
                "VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode, or engines.vllm.command.",
            )
        return
    if server.here and not cards(seen):
        yield Verdict(
            Level.WARNING, "it can be told to sleep, and on a CPU that frees no memory",
            "Without dev mode, and with engines.vllm.command, the gateway stops and starts it.",
        )  # fmt: skip
        return
    if known(server.process).flag("--enable-sleep-mode") is None:
        yield Verdict(
            Level.PROBLEM, "it was started without --enable-sleep-mode: asleep it frees nothing",
            "Start it with --enable-sleep-mode.",
        )  # fmt: skip
    else:
        yield Verdict(Level.OK, "it sleeps, with --enable-sleep-mode")


def nccl(seen: Seen, server: Server) -> Iterator[Verdict]:
    """Whether a vLLM on several cards was told that they have no P2P."""
    found = cards(seen)
    if len(found) < 2 or _peers(found):
        yield Verdict(Level.NONE, "no pair of cards without P2P")
        return
    process = known(server.process)
    tensor = process.flag("--tensor-parallel-size", "-tp") or "1"
    pipeline = process.flag("--pipeline-parallel-size", "-pp") or "1"
    if (tensor, pipeline) == ("1", "1"):
        yield Verdict(Level.NONE, "it uses one card")
        return
    missing = []
    if known(process.environment).get("NCCL_P2P_DISABLE") != "1":
        missing.append("NCCL_P2P_DISABLE=1")
    if tensor != "1" and process.flag("--disable-custom-all-reduce") is None:
        missing.append("--disable-custom-all-reduce")
    if missing:
        told = " and ".join(missing)
        yield Verdict(Level.WARNING, f"it was started without {told}", f"Start it with {told}.")
    else:
        yield Verdict(Level.OK, "started as cards without P2P want it")


def flags(seen: Seen, server: Server) -> Iterator[Verdict]:
    """Whether the command that is to start it has options that are gone."""
    words = server.configured.command if server.configured else ()
    gone = [name for name in GONE_FLAGS if any(word.partition("=")[0] == name for word in words)]
    if gone:
        yield Verdict(
            Level.PROBLEM,
            f"engines.vllm.command has {' and '.join(gone)}, which vLLM no longer knows",
            "Leave it out.",
        )
    elif words:
        yield Verdict(Level.OK, "no option in engines.vllm.command that vLLM has dropped")
    else:
        yield Verdict(Level.NONE, "the gateway does not start it")


CHECKS = (
    Check("settings", "A gateway with settings it cannot use does not start.", settings_load),
    Check("exposure", "Without a key, whoever reaches the address uses your cards.", exposure),
    Check("port", "The gateway does not start where something else listens.", port),
    Check("lease", "One GPU can be handed over by one gateway only.", lease),
    Check("profile", "The gateway chooses lanes by what a request takes on each.", profile),
    Check("driver", "Engines reach the cards through it; so does who looks at memory.", driver),
    Check("docker", "A container sees no card that Docker does not hand to it.", docker),
    Check("p2p", "Tensor parallel exchanges data between the cards for every token.", p2p),
    Check("pcie", "Cards without P2P exchange everything over it.", pcie),
    Check("power", "A card at its power limit is slower than its data sheet.", power),
    Check("heat", "A hot card slows itself down.", heat),
    Check("shm", "The processes of one vLLM share memory there, and fail where it is small.", shm),
    Check("memlock", "A vLLM that sleeps pins its weights in RAM.", memlock),
    Check("ram", "A vLLM that sleeps pins its weights in RAM, also after it woke.", ram),
    Check("disk", "A download that fills the disk ends half-way, and harms its neighbours.", disk),
    Check(
        "engine",
        "A lane is served while its engine answers and has the model.",
        _of_each(engine, *KINDS),
    ),
    Check(
        "version",
        "What twolane knows of an engine was read and run in certain versions.",
        _of_each(version, "ollama", "vllm"),
    ),
    Check(
        "published",
        "Who reaches an engine passes by keys and queue, and can have it reload.",
        _of_each(published, *KINDS),
    ),
    Check(
        "context",
        "Memory is context x slots: too much goes to the CPU, too little cuts prompts.",
        _of_each(context, "ollama", "vllm"),
    ),
    Check(
        "slots",
        "Where both sides differ, requests wait unseen, or memory lies idle.",
        _of_each(slots, "ollama", "vllm"),
    ),
    Check(
        "on-gpu",
        "The part that is on the CPU sets the pace of the whole.",
        _of_each(on_gpu, "ollama"),
    ),
    Check(
        "dev-endpoints",
        "Who reaches them puts vLLM to sleep, or calls into its workers (/collective_rpc).",
        _of_each(dev_endpoints, "vllm"),
    ),
    Check(
        "sleep",
        "To hand the GPU over, vLLM has to give its memory back.",
        _of_each(sleep, "vllm"),
    ),
    Check(
        "nccl",
        "Cards without P2P can use neither NCCL's direct way nor vLLM's own all-reduce.",
        _of_each(nccl, "vllm"),
    ),
    Check("flags", "vLLM stops at an option that it does not know.", _of_each(flags, "vllm")),
)
