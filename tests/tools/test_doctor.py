"""What the doctor says of a machine, of engines, and of what it cannot see."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import pytest

from backends.fake import GIB, FakeEngine
from backends.reports import Identity, Loaded
from gateway import settings
from gateway.cli import main
from gateway.doctor.checks.check import Check, Finding, Level, Verdict
from gateway.doctor.checks.table import CHECKS, run_checks
from gateway.doctor.collect.collector import look
from gateway.doctor.collect.engines import Sources
from gateway.doctor.collect.processes import ListeningSocket, listening_sockets
from gateway.doctor.command import as_json
from gateway.doctor.observations import (
    Disk,
    Docker,
    ExpectedLane,
    Exposure,
    Observations,
    ObservedEngine,
    Port,
    Process,
    Ram,
    Unknown,
)
from gateway.gpu.lease import Lease, Owner
from gateway.gpu.memory import Brake, Card, Driver, Nvml
from gateway.routing import profile
from gateway.serving import discovery
from gateway.settings import Settings
from tests.gpu.test_memory import two_4090
from tests.support.gateways import StartGateway
from tests.support.models import alone
from tests.support.plain_http import async_client

MIB = 1024**2
DAY_S = 86_400.0
NOW = datetime(2026, 11, 23, tzinfo=UTC).timestamp()
FINE = "http://127.0.0.1:11434"
BAD = (Level.PROBLEM, Level.WARNING, Level.UNKNOWN)

SHELL = Process(1, ("bash",), {}, 16 * GIB, None)
NO_DRIVER = Unknown("the NVIDIA driver says: NVML Shared Library Not Found")


def box(**parts: Any) -> Observations:
    """A machine without a GPU, and nothing on it."""
    usual: dict[str, Any] = {
        "at": NOW,
        "source": "twolane.yaml",
        "settings": settings.load(None, {}, {}),
        "exposure": Exposure("127.0.0.1"),
        "port": Port("127.0.0.1", 8000),
        "lease": "/run/gpu.lease",
        "owner": None,
        "profiles": {},
        "servers": (),
        "nvidia_on_bus": 0,
        "driver_loaded": False,
        "driver": NO_DRIVER,
        "docker": None,
        "ram": Ram(96 * GIB, 80 * GIB),
        "here": SHELL,
        "disks": (Disk("ollama", "/models", 500 * GIB),),
    }
    return Observations(**usual | parts)


def card(index: int = 0, **parts: Any) -> Card:
    """One RTX 4090 of two, as it should be."""
    usual: dict[str, Any] = {
        "width": (16, 16),
        "generation": (4, 4),
        "state": 2,
        "power_w": (450.0, 450.0),
        "heat_c": (61, 84),
        "brakes": Brake(0),
        "peers": (),
    }
    return Card(index, "NVIDIA GeForce RTX 4090", 24 * GIB, **usual | parts)


def two_cards(**parts: Any) -> dict[str, Any]:
    """What is seen of the machine this is for."""
    cards = (card(0, **parts), card(1, **parts))
    return {
        "driver": Driver("570.86", "12.8", cards),
        "nvidia_on_bus": 2,
        "driver_loaded": True,
    }


def ollama(*, environment: Mapping[str, str] | None = None, **parts: Any) -> ObservedEngine:
    """An Ollama on this machine, as it should be."""
    started = Process(7, ("/usr/bin/ollama", "serve"), environment or {}, 16 * GIB, None)
    usual: dict[str, Any] = {
        "answers": "ollama",
        "version": "0.24.0",
        "models": ("big:70b",),
        "loaded": (),
        "contexts": {},
        "identities": {},
        "addresses": ("127.0.0.1",),
        "sockets": ("127.0.0.1",),
        "process": started,
    }
    return ObservedEngine("ollama", FINE, 11434, **usual | parts)


def vllm(*words: str, environment: Mapping[str, str] | None = None, **parts: Any) -> ObservedEngine:
    """A vLLM on this machine, as it should be."""
    command = ("/usr/bin/vllm", "serve", "Big", "--max-num-seqs", "32", *words)
    usual: dict[str, Any] = {
        "answers": "vllm",
        "version": "0.32.0",
        "models": ("Big",),
        "contexts": {"Big": 8192},
        "identities": {},
        "sleeps": False,
        "asleep": False,
        "addresses": ("127.0.0.1",),
        "sockets": ("127.0.0.1",),
        "process": Process(8, command, environment or {}, 16 * GIB, None),
    }
    return ObservedEngine("vllm", "http://127.0.0.1:8001", 8001, **usual | parts)


def wanted(model: str = "Big", *, exclusive: bool = False, **lane: Any) -> tuple[ExpectedLane, ...]:
    return (ExpectedLane("chat", settings.LaneSettings(model=model, **lane), exclusive),)


def exclusive(**more: Any) -> Settings:
    """Settings with a model whose engines take turns."""
    return settings.load(
        None,
        {
            "engines": {"ollama": {"urls": [FINE]}, "vllm": {"urls": ["http://127.0.0.1:8001"]}},
            "models": {
                "chat": {
                    "placement": "exclusive",
                    "lanes": {"ollama": {"model": "big:70b"}, "vllm": {"model": "Big"}},
                }
            },
            **more,
        },
        {},
    )


def of(check: str, seen: Observations) -> list[Finding]:
    """What one check finds."""
    return [finding for finding in run_checks(seen) if finding.check == check]


def only(check: str, seen: Observations) -> Finding:
    [finding] = of(check, seen)
    return finding


# What holds of every check


def test_every_check_finds_something_and_says_why_it_matters() -> None:
    findings = run_checks(box())

    assert list(dict.fromkeys(finding.check for finding in findings)) == [c.name for c in CHECKS]
    assert all(finding.saw and finding.why for finding in findings)


def test_a_machine_without_cards_has_no_problem_with_cards() -> None:
    assert [finding for finding in run_checks(box()) if finding.level in BAD] == []


def test_the_box_this_is_for_has_no_problem_when_all_is_well() -> None:
    seen = box(
        **two_cards(),
        settings=exclusive(),
        docker=Docker("28.2", ("runc", "nvidia"), (), "/var/lib/docker"),
        servers=(
            ollama(
                environment={"OLLAMA_NUM_PARALLEL": "16", "OLLAMA_CONTEXT_LENGTH": "1536"},
                wanted=wanted("big:70b", exclusive=True, slots=16, memory_gib=42),
                loaded=(Loaded("big:70b", 42 * GIB, 42 * GIB, 1536),),
            ),
            vllm(
                "--tensor-parallel-size=2", "--disable-custom-all-reduce", "--enable-sleep-mode",
                environment={"NCCL_P2P_DISABLE": "1"},
                wanted=wanted(exclusive=True, memory_gib=44),
                sleeps=True,
            ),
        ),
    )  # fmt: skip

    assert {f.check: f.saw for f in run_checks(seen) if f.level in BAD} == {}


def test_a_check_that_fails_is_a_finding_and_stops_no_other() -> None:
    def fails(seen: Observations) -> Iterator[Verdict]:
        yield Verdict(Level.OK, "so far")
        raise ZeroDivisionError("of all things")

    checks = (Check("odd", "It matters.", fails), *CHECKS)
    findings = run_checks(box(), checks)

    assert [f.level for f in findings[:2]] == [Level.OK, Level.UNKNOWN]
    assert "ZeroDivisionError: of all things" in findings[1].saw
    assert findings[2:] == run_checks(box())


def test_what_nobody_could_see_is_unknown_with_its_reason_in_every_check() -> None:
    dark = Unknown("it is dark")
    blind = box(
        **dict.fromkeys(
            ("exposure", "port", "owner", "lease", "profiles", "servers", "nvidia_on_bus",
             "docker", "ram", "here", "disks"), dark,
        ),
        settings=exclusive(), driver=dark,
    )  # fmt: skip

    told = {f.check: (f.level, f.saw) for f in run_checks(blind)}
    assert told.pop("settings")[0] is Level.OK
    assert {level for level, _ in told.values()} == {Level.UNKNOWN}
    assert all("it is dark" in saw for _, saw in told.values())


async def test_a_look_that_fails_is_unknown_with_the_exceptions_name(tmp_path: Path) -> None:
    class Odd:
        NVMLError = RuntimeError

        def nvmlInit(self) -> None:  # noqa: N802
            raise ZeroDivisionError("of all things")

    (tmp_path / "bus/pci/devices").mkdir(parents=True)
    seen = await look(None, nvml=Nvml(library=Odd()), places=nowhere(tmp_path))

    assert isinstance(seen.driver, Unknown)
    assert seen.driver.why == "the look failed: ZeroDivisionError: of all things"


# The gateway itself


@pytest.mark.parametrize(
    ("found", "level", "said"),
    [
        (Exposure("127.0.0.1"), Level.OK, "no key"),
        (Exposure("10.0.0.5", keys=2), Level.OK, "2 keys"),
        (Exposure("10.0.0.5", anybody=True), Level.WARNING, "without a key"),
        (Exposure("10.0.0.5", refused="no API key is set"), Level.PROBLEM, "no API key"),
    ],
)
def test_who_may_use_it(found: Exposure, level: Level, said: str) -> None:
    told = only("exposure", box(exposure=found))

    assert told.level is level
    assert said in told.saw


@pytest.mark.parametrize(
    ("found", "level", "said"),
    [
        (Port("127.0.0.1", 8000), Level.OK, "is free"),
        (Port("127.0.0.1", 0), Level.NOT_APPLICABLE, "any free port"),
        (Port("10.9.8.7", 8000, here=False), Level.PROBLEM, "no address of this machine"),
        (Port("127.0.0.1", 8000, ("0.0.0.0",), "vllm (process 7)"), Level.PROBLEM, "by vllm"),  # noqa: S104
        (Port("127.0.0.1", 8000, ("127.0.0.1",), "x", ours=True), Level.OK, "a twolane gateway"),
    ],
)
def test_whether_it_can_listen(found: Port, level: Level, said: str) -> None:
    told = only("port", box(port=found))

    assert told.level is level
    assert said in told.saw


@pytest.mark.parametrize(
    ("owner", "level"),
    [
        (None, Level.OK),
        (Owner(7, "127.0.0.1:8000", "today"), Level.OK),
        (Owner(7, "127.0.0.1:9000", "today"), Level.PROBLEM),
    ],
)
def test_a_lease_of_another_gateway_is_a_problem(owner: Owner | None, level: Level) -> None:
    told = only("lease", box(settings=exclusive(), owner=owner))

    assert told.level is level
    assert only("lease", box(owner=owner)).level is Level.NOT_APPLICABLE


def measured(days: float = 1, **more: Any) -> profile.Profile:
    at = datetime.fromtimestamp(NOW - days * DAY_S, UTC).isoformat()
    on = profile.Measured("vllm", "Big", "0.32.0", slots=32)
    lanes = {
        "ollama": profile.Lane((1,), (1.0,)),
        "vllm": profile.Lane((1,), (1.0,), on=on),
    }
    return profile.Profile(1, "measured", **{"lanes": lanes, "measured_at": at, **more})


@pytest.mark.parametrize(
    ("found", "level", "said"),
    [
        (None, Level.NOTE, "assumed"),
        (profile.ASSUMED, Level.NOTE, "assumed"),
        ("chat.json is no profile", Level.PROBLEM, "is no profile"),
        (measured(), Level.OK, "1 day ago"),
        (measured(179), Level.OK, "179 days"),
        (measured(181), Level.NOTE, "it is old"),
        (measured(lanes={"vllm": profile.Lane((1,), (1.0,))}), Level.WARNING, "about ollama"),
    ],
)
def test_what_is_decided_by(found: Any, level: Level, said: str) -> None:
    servers = (ollama(wanted=wanted("big:70b")), vllm(wanted=wanted()))
    told = only("profile", box(profiles={"chat": found}, servers=servers))

    assert (told.level, told.about) == (level, "model chat")
    assert said in told.saw


def test_a_profile_of_another_version_of_the_engine_is_doubted() -> None:
    now = vllm(wanted=wanted(), identities={"Big": Identity("0.33.0")})
    told = only(
        "profile", box(profiles={"chat": measured()}, servers=(ollama(wanted=wanted("x")), now))
    )

    assert told.level is Level.WARNING
    assert told.saw == "vllm: version 0.33.0 now, measured with 0.32.0"


# The machine


@pytest.mark.parametrize(
    ("parts", "level", "said"),
    [
        ({}, Level.NOT_APPLICABLE, "no NVIDIA card"),
        (two_cards(), Level.OK, "driver 570.86, CUDA up to 12.8: NVIDIA GeForce RTX 4090 24.0 GiB"),
        ({"nvidia_on_bus": 1}, Level.PROBLEM, "card on its PCI bus, but: the NVIDIA driver says"),
        ({"driver_loaded": True}, Level.PROBLEM, "driver in the kernel"),
        ({"nvidia_on_bus": Unknown("no bus")}, Level.UNKNOWN, "no bus"),
    ],
)
def test_the_driver(parts: dict[str, Any], level: Level, said: str) -> None:
    told = only("driver", box(**parts))

    assert told.level is level
    assert said in told.saw


@pytest.mark.parametrize(
    ("runtimes", "cdi", "level"),
    [
        (("runc", "nvidia"), (), Level.OK),
        (("runc",), ("nvidia.com/gpu=all",), Level.OK),
        (("runc",), ("amd.com/gpu=all",), Level.WARNING),
    ],
)
def test_docker_and_the_cards(
    runtimes: tuple[str, ...], cdi: tuple[str, ...], level: Level
) -> None:
    found = Docker("28.2", runtimes, cdi, "/")

    assert only("docker", box(**two_cards(), docker=found)).level is level
    assert only("docker", box(docker=found)).level is Level.NOT_APPLICABLE
    assert only("docker", box(**two_cards())).level is Level.NOT_APPLICABLE


def test_cards_that_do_not_see_each_other_are_said_with_what_follows() -> None:
    without = only("p2p", box(**two_cards()))
    unlikely = only("p2p", box(driver=Driver("1", "1", (card(0, peers=(1,)), card(1, peers=(0,))))))
    silent = only("p2p", box(**two_cards(peers=None)))
    single = only("p2p", box(driver=Driver("1", "1", (card(),))))

    assert without.level is Level.NOTE
    assert "NCCL_P2P_DISABLE=1 and --disable-custom-all-reduce" in without.do
    assert (unlikely.level, silent.level, single.level) == (
        Level.NOTE,
        Level.UNKNOWN,
        Level.NOT_APPLICABLE,
    )
    assert "4090s as sold do not" in unlikely.saw


@pytest.mark.parametrize(
    ("words", "environment", "level", "said"),
    [
        (("-tp", "2", "--disable-custom-all-reduce"), {"NCCL_P2P_DISABLE": "1"}, Level.OK, ""),
        (("-tp", "2"), {"NCCL_P2P_DISABLE": "1"}, Level.WARNING, "--disable-custom-all-reduce"),
        (("-tp=2", "--disable-custom-all-reduce"), {}, Level.WARNING, "NCCL_P2P_DISABLE=1"),
        (("--pipeline-parallel-size", "2"), {"NCCL_P2P_DISABLE": "1"}, Level.OK, ""),
        (("--pipeline-parallel-size", "2"), {}, Level.WARNING, "NCCL_P2P_DISABLE=1"),
        (("--tensor-parallel-size", "1"), {}, Level.NOT_APPLICABLE, "one card"),
        ((), {}, Level.NOT_APPLICABLE, "one card"),
    ],
)
def test_a_vllm_over_such_cards_needs_to_be_told(
    words: tuple[str, ...], environment: dict[str, str], level: Level, said: str
) -> None:
    told = only("nccl", box(**two_cards(), servers=(vllm(*words, environment=environment),)))

    assert told.level is level
    assert said in told.saw


@pytest.mark.parametrize(
    ("parts", "level"),
    [
        ({}, Level.OK),
        ({"width": (8, 16)}, Level.NOTE),
        ({"width": (4, 16)}, Level.WARNING),
        ({"width": (4, 4)}, Level.OK),
        ({"generation": (1, 4), "state": 8}, Level.NOTE),
        ({"generation": (3, 4), "state": 2}, Level.WARNING),
        ({"generation": (None, 4)}, Level.UNKNOWN),
    ],
)
def test_the_link_of_a_card(parts: dict[str, Any], level: Level) -> None:
    assert {f.level for f in of("pcie", box(**two_cards(**parts)))} == {level}


@pytest.mark.parametrize(
    ("parts", "level"),
    [
        ({}, Level.OK),
        ({"power_w": (300.0, 450.0)}, Level.NOTE),
        ({"brakes": Brake.POWER_LIMIT}, Level.NOTE),
        ({"brakes": Brake.POWER_SUPPLY | Brake.POWER_LIMIT}, Level.WARNING),
        ({"brakes": Brake.HARDWARE}, Level.WARNING),
        ({"power_w": (None, None)}, Level.UNKNOWN),
    ],
)
def test_the_power_of_a_card(parts: dict[str, Any], level: Level) -> None:
    assert {f.level for f in of("power", box(**two_cards(**parts)))} == {level}


@pytest.mark.parametrize(
    ("parts", "level"),
    [
        ({}, Level.OK),
        ({"heat_c": (83, 84)}, Level.OK),
        ({"heat_c": (84, 84)}, Level.WARNING),
        ({"brakes": Brake.HEAT}, Level.WARNING),
        ({"heat_c": (60, None)}, Level.OK),
        ({"heat_c": (None, 84)}, Level.UNKNOWN),
    ],
)
def test_the_heat_of_a_card(parts: dict[str, Any], level: Level) -> None:
    assert {f.level for f in of("heat", box(**two_cards(**parts)))} == {level}


@pytest.mark.parametrize(("size", "level"), [(64 * MIB, Level.WARNING), (65 * MIB, Level.OK)])
def test_shm_is_that_of_vllm_where_it_runs_and_of_this_shell_where_not(
    size: int, level: Level
) -> None:
    small = replace(SHELL, shm=size)

    assert only("shm", box(here=small)).level is level
    assert only("shm", box(here=SHELL, servers=(vllm(process=small),))).level is level


def test_what_a_vllm_that_sleeps_may_pin() -> None:
    sleeper = vllm(wanted=wanted(exclusive=True))
    limited = replace(SHELL, memlock=8 * MIB)

    def level(**parts: Any) -> Level:
        return only("memlock", box(**parts)).level

    assert level(**two_cards(), servers=(vllm(wanted=wanted()),)) is Level.NOT_APPLICABLE
    assert level(servers=(sleeper,)) is Level.NOT_APPLICABLE  # on the CPU
    assert level(**two_cards(), servers=(sleeper,)) is Level.OK
    running = replace(sleeper, process=limited)
    assert level(**two_cards(), servers=(running,)) is Level.WARNING
    away = replace(sleeper, process=Unknown("in a container"))
    assert level(**two_cards(), servers=(away,), here=limited) is Level.NOTE


@pytest.mark.parametrize(
    ("total", "available", "asleep", "memory_gib", "level"),
    [
        (96, 80, False, 44, Level.OK),
        (43.9, 40, False, 44, Level.PROBLEM),
        (44, 44, False, 44, Level.OK),
        (96, 43.9, False, 44, Level.WARNING),
        (96, 30, True, 44, Level.OK),
        (96, 80, False, None, Level.NOTE),
    ],
)
def test_ram_for_a_vllm_that_sleeps(
    *, total: float, available: float, asleep: bool, memory_gib: float | None, level: Level
) -> None:
    server = vllm(wanted=wanted(exclusive=True, memory_gib=memory_gib), asleep=asleep)
    seen = box(
        **two_cards(),
        settings=exclusive(),
        servers=(server,),
        ram=Ram(int(total * GIB), int(available * GIB)),
    )

    assert only("ram", seen).level is level
    assert only("ram", replace(seen, servers=())).level is Level.NOT_APPLICABLE
    assert (
        only("ram", replace(seen, settings=exclusive(gpu={"budget_gib": 4}))).level
        is Level.NOT_APPLICABLE
    )


def test_ram_of_another_machine_is_unknown_and_of_a_container_likely_ours() -> None:
    lane = wanted(exclusive=True, memory_gib=100)
    public = vllm(wanted=lane, here=False, addresses=("8.8.8.8",))
    container = vllm(wanted=lane, here=False, addresses=("172.18.0.3",))

    def level(server: ObservedEngine, **parts: Any) -> Level:
        return only("ram", box(settings=exclusive(), servers=(server,), **parts)).level

    assert level(public, **two_cards()) is Level.UNKNOWN
    assert level(container, **two_cards()) is Level.WARNING
    assert level(container) is Level.UNKNOWN


def test_a_vllm_on_the_cpu_pins_nothing() -> None:
    server = vllm(wanted=wanted(exclusive=True, memory_gib=100))

    assert only("ram", box(settings=exclusive(), servers=(server,))).level is Level.NOT_APPLICABLE


@pytest.mark.parametrize(
    ("free", "models", "level"),
    [
        (500, ("big:70b",), Level.OK),
        (39.9, ("big:70b",), Level.NOTE),
        (50, (), Level.WARNING),  # 60 GiB of it are not there yet
        (61, (), Level.OK),
        (0.9, ("big:70b",), Level.WARNING),
    ],
)
def test_room_for_models(free: float, models: tuple[str, ...], level: Level) -> None:
    server = ollama(wanted=wanted("big:70b", memory_gib=60), models=models)
    disks = (Disk("ollama", "/models", int(free * GIB)),)

    assert only("disk", box(servers=(server,), disks=disks)).level is level


# The engines


@pytest.mark.parametrize(
    ("parts", "level", "said"),
    [
        ({}, Level.OK, "big:70b"),
        ({"answers": Unknown("connection refused")}, Level.WARNING, "connection refused"),
        ({"answers": "vllm"}, Level.PROBLEM, "what answers is vllm"),
        ({"answers": None}, Level.PROBLEM, "no engine we know"),
        ({"wanted": wanted("big:70b")}, Level.OK, "big:70b"),
        ({"wanted": wanted("small")}, Level.PROBLEM, "it has no small; it has big:70b"),
        ({"wanted": wanted("small"), "models": ("small:latest",)}, Level.OK, "small"),
    ],
)
def test_whether_an_engine_serves(parts: dict[str, Any], level: Level, said: str) -> None:
    told = only("engine", box(servers=(ollama(**parts),)))

    assert told.level is level
    assert said in told.saw


def test_an_engine_that_the_gateway_starts_need_not_run() -> None:
    configured = settings.EngineSettings(urls=(FINE,), command=("ollama", "serve"))
    server = ollama(answers=Unknown("refused"), configured=configured)

    assert only("engine", box(servers=(server,))).level is Level.NOTE


@pytest.mark.parametrize(
    ("version", "level", "said"),
    [
        ("0.24.0", Level.OK, "0.24.0"),
        ("0.24.9-rc1", Level.OK, "0.24.9-rc1"),
        ("0.29.1", Level.NOTE, "tests run 0.24"),
        ("0.30.0", Level.NOTE, "llama-server binary"),
        ("0.33.0", Level.NOTE, "whose source was read"),
        ("dev", Level.UNKNOWN, "'dev'"),
    ],
)
def test_the_version_of_an_ollama(version: str, level: Level, said: str) -> None:
    told = only("version", box(servers=(ollama(version=version),)))

    assert told.level is level
    assert said in told.saw
    assert ("llama-server" in told.saw) is (version in ("0.30.0", "0.33.0"))


@pytest.mark.parametrize(
    ("sockets", "level"),
    [
        (("127.0.0.1",), Level.OK),
        (("127.0.0.1", "::1"), Level.OK),
        (("::ffff:127.0.0.1",), Level.OK),
        (("0.0.0.0",), Level.WARNING),  # noqa: S104
        (("127.0.0.1", "::"), Level.WARNING),
        (("192.168.1.5",), Level.WARNING),
        ((), Level.UNKNOWN),
        (Unknown("no /proc"), Level.UNKNOWN),
    ],
)
def test_an_engine_that_others_reach_past_the_gateway(sockets: Any, level: Level) -> None:
    assert only("published", box(servers=(ollama(sockets=sockets),))).level is level


def test_an_engine_elsewhere_is_at_a_private_address_or_not() -> None:
    def level(address: str) -> Level:
        server = ollama(here=False, addresses=(address,))
        return only("published", box(servers=(server,))).level

    assert (level("172.18.0.2"), level("8.8.8.8")) == (Level.OK, Level.WARNING)


@pytest.mark.parametrize(
    ("environment", "contexts", "lane", "level", "said"),
    [
        ({}, {}, (), Level.WARNING, "no NVIDIA memory Ollama takes 4,096"),
        ({"OLLAMA_CONTEXT_LENGTH": "8192"}, {}, (), Level.OK, "OLLAMA_CONTEXT_LENGTH=8192"),
        ({"OLLAMA_CONTEXT_LENGTH": "0"}, {}, (), Level.WARNING, "is not set"),
        ({}, {"big:70b": 2048}, wanted("big:70b"), Level.OK, "big:70b 2,048"),
        ({}, {"big:70b": None}, wanted("big:70b"), Level.WARNING, "is not set"),
    ],
)
def test_ollamas_context(
    environment: dict[str, str],
    contexts: dict[str, int | None],
    lane: tuple[ExpectedLane, ...],
    level: Level,
    said: str,
) -> None:
    server = ollama(environment=environment, contexts=contexts, wanted=lane)
    told = only("context", box(servers=(server,)))

    assert told.level is level
    assert said in told.saw


@pytest.mark.parametrize(
    ("gib", "tokens"), [(22.9, "4,096"), (23, "32,768"), (46.9, "32,768"), (47, "262,144")]
)
def test_ollamas_own_context_goes_by_memory(gib: float, tokens: str) -> None:
    one = Card(0, "Some card", int(gib * GIB))
    told = only("context", box(driver=Driver("1", "1", (one,)), servers=(ollama(),)))

    assert f"takes {tokens} tokens a slot" in told.saw


def test_a_model_loaded_with_all_the_context_there_is_stands_out() -> None:
    server = ollama(
        environment={"OLLAMA_CONTEXT_LENGTH": "262144"},
        loaded=(Loaded("big:70b", 60 * GIB, 60 * GIB, 262_144),),
    )

    assert [f.level for f in of("context", box(servers=(server,)))] == [Level.WARNING, Level.OK]


def test_a_context_that_the_settings_promise_and_the_engine_has_not() -> None:
    lane = wanted("big:70b", context=8192)
    short = ollama(wanted=lane, loaded=(Loaded("big:70b", 1, 1, 4096),),
                   environment={"OLLAMA_CONTEXT_LENGTH": "4096"})  # fmt: skip
    less = vllm(wanted=wanted(context=8193))
    enough = vllm(wanted=wanted(context=8192))

    assert "cut without a word" in of("context", box(servers=(short,)))[0].saw
    assert only("context", box(servers=(less,))).level is Level.PROBLEM
    assert only("context", box(servers=(enough,))).level is Level.OK


@pytest.mark.parametrize(
    ("environment", "slots", "level"),
    [
        ({}, None, Level.OK),  # one, on both sides
        ({}, 2, Level.WARNING),
        ({"OLLAMA_NUM_PARALLEL": "16"}, 16, Level.OK),
        ({"OLLAMA_NUM_PARALLEL": "16"}, None, Level.NOTE),
        ({"OLLAMA_NUM_PARALLEL": "many"}, 1, Level.UNKNOWN),
    ],
)
def test_ollamas_slots(environment: dict[str, str], slots: int | None, level: Level) -> None:
    server = ollama(environment=environment, wanted=wanted("big:70b", slots=slots))

    assert only("slots", box(servers=(server,))).level is level


def test_vllms_slots() -> None:
    def level(*words: str) -> Level:
        process = Process(8, ("vllm", *words), {}, GIB, None)
        return only("slots", box(servers=(vllm(process=process),))).level

    assert level("--max-num-seqs=32") is Level.OK
    assert level("--max-num-seqs", "16") is Level.WARNING
    assert level("--max-num-seqs", "64") is Level.NOTE
    assert level() is Level.UNKNOWN


@pytest.mark.parametrize(
    ("on_gpu", "here", "cards", "level", "said"),
    [
        (44, True, True, Level.OK, "as a whole (44.0 GiB)"),
        (43, True, True, Level.PROBLEM, "1.0 GiB of 44.0 GiB are on the CPU"),
        (0, True, True, Level.PROBLEM, "though there is a card"),
        (0, True, False, Level.NOTE, "no NVIDIA card here"),
        (0, False, False, Level.WARNING, "on that machine"),
    ],
)
def test_a_model_on_the_cpu(
    *, on_gpu: int, here: bool, cards: bool, level: Level, said: str
) -> None:
    loaded = (Loaded("big:70b", 44 * GIB, on_gpu * GIB, 4096),)
    server = ollama(loaded=loaded, here=here)
    told = only("on-gpu", box(**(two_cards() if cards else {}), servers=(server,)))

    assert told.level is level
    assert said in told.saw


def test_with_nothing_loaded_nobody_can_say_where_it_would_be() -> None:
    assert only("on-gpu", box(servers=(ollama(),))).level is Level.UNKNOWN


@pytest.mark.parametrize(
    ("parts", "level"),
    [
        ({"sleeps": False}, Level.OK),
        ({}, Level.OK),
        ({"sockets": ("0.0.0.0",)}, Level.PROBLEM),  # noqa: S104
        ({"here": False, "addresses": ("172.18.0.3",)}, Level.NOTE),
        ({"here": False, "addresses": ("8.8.8.8",)}, Level.PROBLEM),
        ({"sleeps": Unknown("it does not answer")}, Level.UNKNOWN),
    ],
)
def test_who_reaches_the_dev_endpoints(parts: dict[str, Any], level: Level) -> None:
    server = vllm(**{"sleeps": True, **parts})

    assert only("dev-endpoints", box(servers=(server,))).level is level


def test_whether_a_vllm_can_give_its_memory_back() -> None:
    lane = wanted(exclusive=True)
    ours = settings.EngineSettings(urls=("http://127.0.0.1:8001",), command=("vllm",))

    def level(server: ObservedEngine, **parts: Any) -> Level:
        return only("sleep", box(**parts, servers=(server,))).level

    assert level(vllm(wanted=wanted())) is Level.NOT_APPLICABLE
    assert level(vllm(wanted=lane)) is Level.PROBLEM
    assert level(vllm(wanted=lane, configured=ours)) is Level.NOTE
    assert level(vllm(wanted=lane, sleeps=True)) is Level.WARNING  # on a CPU
    sleepy = vllm("--enable-sleep-mode", wanted=lane, sleeps=True)
    assert level(sleepy, **two_cards()) is Level.OK
    assert level(vllm(wanted=lane, sleeps=True), **two_cards()) is Level.PROBLEM
    hidden = vllm(wanted=lane, sleeps=True, process=Unknown("in a container"))
    assert level(hidden, **two_cards()) is Level.UNKNOWN


@pytest.mark.parametrize(
    ("words", "level"),
    [
        (("vllm", "serve", "--swap-space", "4"), Level.PROBLEM),
        (("vllm", "serve", "--swap-space=4"), Level.PROBLEM),
        (("vllm", "serve", "--disable-log-requests"), Level.PROBLEM),
        (("vllm", "serve"), Level.OK),
        ((), Level.NOT_APPLICABLE),
    ],
)
def test_options_that_vllm_no_longer_has(words: tuple[str, ...], level: Level) -> None:
    configured = settings.EngineSettings(urls=("http://127.0.0.1:8001",), command=words)

    assert only("flags", box(servers=(vllm(configured=configured),))).level is level


# Looking, for real


def nowhere(folder: Path, **places: Any) -> Sources:
    """This machine's kernel, a PCI bus of our own, no usual ports, no Docker."""
    return Sources(sys=folder, ports={}, docker="no-such-docker", **places)


def file(folder: Path, **said: Any) -> Path:
    """These settings, on a port that is free."""
    path = folder / "twolane.yaml"
    path.write_text(json.dumps({"port": 0, **said}))  # JSON is YAML
    return path


async def twolane(*arguments: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command to its end, in a terminal of eighty columns."""
    command = [sys.executable, "-m", "gateway", "doctor", *arguments]
    environment = {**os.environ, "COLUMNS": "80", **variables}
    return await anyio.run_process(command, check=False, env=environment)


async def found(config: Path | None, places: Sources, **parts: Any) -> dict[str, Finding]:
    """What is found by each check, its first finding; `parts` take the place of what was seen."""
    seen = await look(config, places=places)
    findings = run_checks(replace(seen, **parts))
    return {finding.check: finding for finding in reversed(findings)}


@pytest.mark.integration
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_sockets_that_listen_are_read_from_the_kernel(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as listens, socket.socket(family) as idle:
        try:
            listens.bind((address, 0))
        except OSError as exc:
            pytest.skip(f"no {address} here: {exc}")
        listens.listen()
        idle.bind((address, 0))
        there = set(listening_sockets(Path("/proc")))
        inode, port = os.fstat(listens.fileno()).st_ino, listens.getsockname()[1]
        other = idle.getsockname()[1]

    assert ListeningSocket(address, port, inode) in there
    assert other not in {one.port for one in there}


def on_every_address(folder: Path, port: int) -> Path:
    """A kernel that says that this port listens on all addresses, and nothing else."""
    proc = folder / "proc"
    (proc / "net").mkdir(parents=True)
    line = f"0: 00000000:{port:04X} 00000000:0000 0A 0:0 00:0 0 0 0 77 1 0"
    (proc / "net/tcp").write_text(f"header\n{line}\n")
    return proc


async def test_a_vllm_whose_dev_endpoints_others_reach_is_a_problem(tmp_path: Path) -> None:
    async with FakeEngine("vllm", ["Small-1B"], dev_mode=True) as engine:
        config = file(tmp_path, **alone(engine))
        closed = await found(config, nowhere(tmp_path))
        proc = on_every_address(tmp_path, engine.port)
        open_ = await found(config, nowhere(tmp_path, proc=proc))
        engine.dev_mode = False
        without = await found(config, nowhere(tmp_path, proc=proc))

    assert closed["dev-endpoints"].level is Level.OK
    assert open_["dev-endpoints"].level is Level.PROBLEM
    assert open_["published"].level is Level.WARNING
    assert "0.0.0.0" in open_["dev-endpoints"].saw  # noqa: S104
    assert without["dev-endpoints"].level is Level.OK


async def loaded_engine(engine: FakeEngine) -> None:
    async with async_client(engine.url) as client:
        await client.post("/api/generate", json={"model": "small:1b", "keep_alive": -1})


async def test_a_model_partly_on_the_cpu_ends_the_command_with_1(tmp_path: Path) -> None:
    async with FakeEngine("ollama", ["small:1b"], on_gpu=0.5, size=2 * GIB) as engine:
        await loaded_engine(engine)
        ended = await twolane("--config", str(file(tmp_path, **alone(engine, "small:1b"))))

    drawn = ended.stdout.decode()
    assert ended.returncode == 1, drawn
    assert "1.0 GiB of 2.0 GiB are on the CPU" in drawn
    assert drawn.index("PROBLEM  on-gpu") < drawn.index("ok ")
    assert max(map(len, drawn.splitlines())) <= 80
    assert ended.stderr == b""


async def test_a_model_on_the_cpu_of_a_machine_without_a_card_is_no_problem(
    tmp_path: Path,
) -> None:
    async with FakeEngine("ollama", ["small:1b"], on_gpu=0.0) as engine:
        await loaded_engine(engine)
        config = file(tmp_path, **alone(engine, "small:1b"))
        cpu = await found(
            config, nowhere(tmp_path), driver=NO_DRIVER, nvidia_on_bus=0, driver_loaded=False
        )
        gpu = await found(config, nowhere(tmp_path), **two_cards())

    assert (cpu["on-gpu"].level, gpu["on-gpu"].level) == (Level.NOTE, Level.PROBLEM)


@contextmanager
def started(folder: Path, name: str, **environment: str) -> Iterator[tuple[int, str]]:
    """A fake Ollama in a process of its own that is called so; its pid and URL."""
    program = folder / name
    program.symlink_to(sys.executable)
    with subprocess.Popen(
        [program, "-m", "backends.fake", "--kind", "ollama", "--model", "small:1b"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield process.pid, process.stdout.readline().split()[2]
        finally:
            process.terminate()


async def test_slots_and_context_are_read_from_the_engines_own_process(tmp_path: Path) -> None:
    variables = {"OLLAMA_NUM_PARALLEL": "4", "OLLAMA_CONTEXT_LENGTH": "1536"}
    with started(tmp_path, "ollama", **variables) as (pid, url):
        config = file(
            tmp_path,
            engines={"ollama": {"urls": [url]}},
            models={"m": {"lanes": {"ollama": {"model": "small:1b", "slots": 16}}}},
        )
        seen = await look(config, places=nowhere(tmp_path))
        told = await found(config, nowhere(tmp_path))

    assert isinstance(seen.servers, tuple)
    process = seen.servers[0].process
    assert isinstance(process, Process)
    assert process.pid == pid
    assert told["slots"].level is Level.WARNING
    assert "sends 16 at once, and it answers 4 (OLLAMA_NUM_PARALLEL)" in told["slots"].saw
    assert "`slots: 4`" in told["slots"].do
    assert isinstance(process.environment, dict)
    assert process.environment["OLLAMA_CONTEXT_LENGTH"] == "1536"


async def test_the_variables_of_another_program_are_not_taken_for_the_engines(
    tmp_path: Path,
) -> None:
    with started(tmp_path, "ssh", OLLAMA_NUM_PARALLEL="16") as (pid, url):
        config = file(tmp_path, engines={"ollama": {"urls": [url]}})
        told = await found(config, nowhere(tmp_path))

    assert told["slots"].level is Level.UNKNOWN
    assert f"ssh (process {pid})" in told["slots"].saw


async def test_engines_are_found_where_no_settings_name_them(tmp_path: Path) -> None:
    async with FakeEngine("ollama", ["small:1b"]) as engine:
        ports: discovery.Ports = {"ollama": (engine.port,)}
        told = await found(None, replace(nowhere(tmp_path), ports=ports))

    assert told["engine"].level is Level.OK
    assert told["engine"].about == f"ollama at 127.0.0.1:{engine.port}"


async def test_an_engine_whose_name_nobody_knows_is_said_to_be_that(tmp_path: Path) -> None:
    nobody = "x" * 64  # longer than any name: no server of names is asked
    config = file(tmp_path, engines={"vllm": {"urls": [f"http://{nobody}:8000"]}})
    told = await found(config, nowhere(tmp_path))

    assert told["engine"].level is Level.WARNING
    assert f"{nobody} is no address and no known name" in told["engine"].saw
    assert told["published"].level is Level.UNKNOWN
    assert "the look failed" not in told["published"].saw


async def test_what_answers_is_told_apart(tmp_path: Path) -> None:
    async with FakeEngine("ollama", ["small:1b"]) as other, FakeEngine("vllm", ["A"]) as silent:
        silent.down()
        config = file(
            tmp_path, engines={"vllm": {"urls": [other.url]}, "ollama": {"urls": [silent.url]}}
        )
        seen = await look(config, places=nowhere(tmp_path))

    told = {f.about.partition(" ")[0]: f for f in of("engine", seen)}
    assert told["vllm"].level is Level.PROBLEM
    assert told["vllm"].saw == "what answers is ollama"
    assert told["ollama"].level is Level.WARNING
    assert {f.level for f in of("version", seen)} == {Level.UNKNOWN}


async def test_a_port_that_something_else_has_is_named_with_its_process(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = file(tmp_path, port=taken.getsockname()[1])
        told = await found(config, nowhere(tmp_path))

    assert told["port"].level is Level.PROBLEM
    assert f"(process {os.getpid()})" in told["port"].saw


async def test_a_port_that_a_gateway_has_is_as_it_should_be(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    async with (
        FakeEngine("vllm", ["Small-1B"]) as engine,
        start_gateway(**alone(engine)) as running,
    ):
        config = file(tmp_path, port=int(running.url.rpartition(":")[2]))
        told = await found(config, nowhere(tmp_path))

    assert told["port"].level is Level.OK
    assert "a twolane gateway serves" in told["port"].saw


async def test_a_lease_that_somebody_holds_is_seen_and_left_alone(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "gpu.lease")
    lease.acquire("127.0.0.1:9999")
    said = exclusive().model_dump(mode="json", include={"engines", "models"})
    config = file(tmp_path, **said, gpu={"lease": str(lease.path)})
    held = await found(config, nowhere(tmp_path))
    lease.release()
    free = await found(config, nowhere(tmp_path))

    assert held["lease"].level is Level.PROBLEM
    assert f"process {os.getpid()}, at 127.0.0.1:9999" in held["lease"].saw
    assert free["lease"].level is Level.OK


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            {"ServerVersion": "28.2", "Runtimes": {"runc": {}, "nvidia": {}}, "DockerRootDir": "/"},
            Docker("28.2", ("runc", "nvidia"), (), "/"),
        ),
        (
            {"ServerVersion": "29.0", "Runtimes": None, "CDISpecDirs": ["FOLDER"],
             "DiscoveredDevices": [{"ID": "nvidia.com/gpu=0"}], "DockerRootDir": "/"},
            Docker("29.0", (), ("nvidia.com/gpu=0", "nvidia.com/gpu"), "/"),
        ),
    ],
)  # fmt: skip
async def test_docker_is_asked(tmp_path: Path, said: dict[str, Any], expected: Docker) -> None:
    (tmp_path / "nvidia.yaml").write_text("cdiVersion: 0.5.0\nkind: nvidia.com/gpu\ndevices: []\n")
    docker = tmp_path / "docker"
    answer = json.dumps(said).replace("FOLDER", str(tmp_path))
    docker.write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\n")
    docker.chmod(0o755)
    seen = await look(None, places=replace(nowhere(tmp_path), docker=str(docker)))

    assert seen.docker == expected


async def test_a_docker_whose_daemon_is_down_is_unknown_in_its_own_words(tmp_path: Path) -> None:
    docker = tmp_path / "docker"
    docker.write_text("#!/bin/sh\necho '{}'\necho 'Cannot connect to the daemon' >&2\nexit 1\n")
    docker.chmod(0o755)
    places = replace(nowhere(tmp_path), docker=str(docker))
    told = await found(None, places, **two_cards())

    assert told["docker"].level is Level.UNKNOWN
    assert "Cannot connect to the daemon" in told["docker"].saw


@pytest.mark.parametrize(
    ("vendor", "kind", "cards"),
    [("0x10de", "0x030000", 1), ("0x10de", "0x040300", 0), ("0x1002", "0x030000", 0)],
)
async def test_cards_on_the_bus_are_counted(
    tmp_path: Path, vendor: str, kind: str, cards: int
) -> None:
    device = tmp_path / "bus/pci/devices/0000:01:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")

    assert (await look(None, places=nowhere(tmp_path))).nvidia_on_bus == cards


async def test_a_driver_is_judged_by_what_it_tells(tmp_path: Path) -> None:
    seen = await look(None, nvml=Nvml(library=two_4090()), places=nowhere(tmp_path))
    told = {finding.check: finding for finding in run_checks(seen)}

    assert told["driver"].saw.startswith("driver 570.86.10, CUDA up to 12.8: NVIDIA GeForce")
    assert told["p2p"].level is Level.NOTE
    assert told["power"].level is Level.NOTE


async def test_this_machines_memory_is_what_the_kernel_says(tmp_path: Path) -> None:
    seen = await look(None, places=nowhere(tmp_path))

    assert isinstance(seen.ram, Ram)
    assert seen.ram.total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert isinstance(seen.here, Process)
    assert seen.here.pid == os.getpid()
    assert isinstance(seen.disks, tuple)
    assert all(one.free > 0 for one in seen.disks)


# The command


KEYS = ["check", "about", "level", "saw", "why", "do"]


async def test_this_machine_is_looked_over_without_a_traceback() -> None:
    drawn = await twolane()
    told = await twolane("--json")

    said = json.loads(told.stdout)
    for ended in (drawn, told):
        assert ended.returncode == (said["problems"] > 0)
        assert ended.stderr == b""
    text = drawn.stdout.decode()
    assert "the check itself failed" not in text
    assert "the look failed" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert {finding["check"] for finding in said["findings"]} == {check.name for check in CHECKS}


async def test_the_json_is_as_the_help_says(capsys: pytest.CaptureFixture[str]) -> None:
    said = json.loads((await twolane("--json")).stdout)
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    guide = capsys.readouterr().out

    assert list(said) == ["version", "at", "problems", "findings"]
    assert said["version"] == 1
    assert abs(datetime.fromisoformat(said["at"]).timestamp() - time.time()) < DAY_S
    assert all(list(finding) == KEYS for finding in said["findings"])
    assert {finding["level"] for finding in said["findings"]} <= set(Level)
    for word in [*KEYS, *said, *Level, "exit code", "--config FILE"]:
        assert word in guide, word


def test_the_json_counts_problems() -> None:
    findings = [Finding("a", "", level, "s", "w", "d") for level in Level]

    assert json.loads(as_json(findings, NOW))["problems"] == 1


async def test_settings_that_cannot_be_used_are_a_problem_and_all_else_is_looked_at(
    tmp_path: Path,
) -> None:
    bad = file(tmp_path, prot=1)
    drawn = await twolane("--config", str(bad))
    told = await twolane("--json", "--config", str(tmp_path / "none.yaml"))

    assert drawn.returncode == told.returncode == 1
    assert b"PROBLEM  settings" in drawn.stdout
    assert drawn.stdout.count(b"did you mean port?") == 1
    assert drawn.stderr == told.stderr == b""
    findings = {finding["check"]: finding for finding in json.loads(told.stdout)["findings"]}
    assert "none.yaml cannot be read" in findings["settings"]["saw"]
    assert findings["slots"]["level"] == "unknown"
    assert findings["disk"]["level"] != "unknown"


async def test_a_misspelt_variable_is_a_problem_too() -> None:
    ended = await twolane(TWOLANE_PROT="1")

    assert ended.returncode == 1
    assert b"did you mean TWOLANE_PORT?" in ended.stdout


async def test_an_address_open_to_all_without_a_key_is_a_problem(tmp_path: Path) -> None:
    config = file(tmp_path, host="0.0.0.0")  # noqa: S104 - nobody listens
    ended = await twolane("--config", str(config))

    assert ended.returncode == 1
    assert b"PROBLEM  exposure" in ended.stdout


async def test_a_word_it_does_not_know_ends_with_2() -> None:
    assert (await twolane("--jsno")).returncode == 2
