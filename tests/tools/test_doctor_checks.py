"""The doctor's checks, on machines made of plain data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from backends.fake import GIB
from backends.reports import Identity, Loaded
from gateway import settings
from gateway.doctor.checks.all_checks import CHECKS, run_checks
from gateway.doctor.checks.check import Check, Level, Verdict
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
from gateway.gpu.cards import Brake, Card, Driver
from gateway.gpu.lease import Owner
from gateway.routing import profile
from tests.support.machines import (
    DAY_S,
    MIB,
    NOW,
    OLLAMA_URL,
    SHELL,
    card,
    exclusive,
    expected,
    finding_of,
    findings_of,
    machine,
    ollama,
    two_cards,
    vllm,
)

NOT_FINE = (Level.PROBLEM, Level.WARNING, Level.UNKNOWN)


# All checks


def test_every_check_has_a_finding_and_a_reason() -> None:
    findings = run_checks(machine())

    assert list(dict.fromkeys(finding.check for finding in findings)) == [c.name for c in CHECKS]
    assert all(finding.saw and finding.why for finding in findings)


def test_a_machine_without_cards_has_no_problem_with_cards() -> None:
    assert [finding for finding in run_checks(machine()) if finding.level in NOT_FINE] == []


def test_a_healthy_machine_with_two_cards_and_both_engines_has_no_problem() -> None:
    observed = machine(
        **two_cards(),
        settings=exclusive(),
        docker=Docker("28.2", ("runc", "nvidia"), (), "/var/lib/docker"),
        engines=(
            ollama(
                environment={"OLLAMA_NUM_PARALLEL": "16", "OLLAMA_CONTEXT_LENGTH": "1536"},
                lanes=expected("big:70b", exclusive=True, slots=16, memory_gib=42),
                loaded=(Loaded("big:70b", 42 * GIB, 42 * GIB, 1536),),
            ),
            vllm(
                "--tensor-parallel-size=2", "--disable-custom-all-reduce", "--enable-sleep-mode",
                environment={"NCCL_P2P_DISABLE": "1"},
                lanes=expected(exclusive=True, memory_gib=44),
                has_dev_endpoints=True,
            ),
        ),
    )  # fmt: skip

    assert {f.check: f.saw for f in run_checks(observed) if f.level in NOT_FINE} == {}


def test_a_check_that_raises_is_a_finding_and_stops_no_other_check() -> None:
    def fails(observed: Observations) -> Iterator[Verdict]:
        yield Verdict(Level.OK, "so far")
        raise ZeroDivisionError("of all things")

    checks = (Check("odd", "It matters.", fails), *CHECKS)
    findings = run_checks(machine(), checks)

    assert [f.level for f in findings[:2]] == [Level.OK, Level.UNKNOWN]
    assert "ZeroDivisionError: of all things" in findings[1].saw
    assert findings[2:] == run_checks(machine())


def test_what_was_not_observed_is_unknown_with_its_reason_in_every_check() -> None:
    unknown = Unknown("it is dark")
    observed = machine(
        **dict.fromkeys(
            ("exposure", "port", "owner", "lease", "profiles", "engines", "nvidia_devices",
             "docker", "ram", "own_process", "disks"), unknown,
        ),
        settings=exclusive(), driver=unknown,
    )  # fmt: skip

    findings = {f.check: (f.level, f.saw) for f in run_checks(observed)}
    assert findings.pop("settings")[0] is Level.OK
    assert {level for level, _ in findings.values()} == {Level.UNKNOWN}
    assert all("it is dark" in saw for _, saw in findings.values())


# The gateway itself


@pytest.mark.parametrize(
    ("exposure", "level", "text"),
    [
        (Exposure("127.0.0.1"), Level.OK, "no key"),
        (Exposure("10.0.0.5", keys=2), Level.OK, "2 keys"),
        (Exposure("10.0.0.5", is_open=True), Level.WARNING, "without a key"),
        (Exposure("10.0.0.5", refusal="no API key is set"), Level.PROBLEM, "no API key"),
    ],
)
def test_exposure(exposure: Exposure, level: Level, text: str) -> None:
    finding = finding_of("exposure", machine(exposure=exposure))

    assert finding.level is level
    assert text in finding.saw


@pytest.mark.parametrize(
    ("port", "level", "text"),
    [
        (Port("127.0.0.1", 8000), Level.OK, "is free"),
        (Port("127.0.0.1", 0), Level.NOT_APPLICABLE, "a free port"),
        (
            Port("10.9.8.7", 8000, is_local=False),
            Level.PROBLEM,
            "is not an address of this machine",
        ),
        (
            Port("127.0.0.1", 8000, ("::",), "vllm (process 7)"),
            Level.PROBLEM,
            "in use by vllm",
        ),
        (
            Port("127.0.0.1", 8000, ("127.0.0.1",), "x", is_gateway=True),
            Level.OK,
            "a twolane gateway",
        ),
    ],
)
def test_port(port: Port, level: Level, text: str) -> None:
    finding = finding_of("port", machine(port=port))

    assert finding.level is level
    assert text in finding.saw


@pytest.mark.parametrize(
    ("owner", "level"),
    [
        (None, Level.OK),
        (Owner(7, "127.0.0.1:8000", "today"), Level.OK),
        (Owner(7, "127.0.0.1:9000", "today"), Level.PROBLEM),
    ],
)
def test_a_lease_that_another_gateway_has_is_a_problem(owner: Owner | None, level: Level) -> None:
    finding = finding_of("lease", machine(settings=exclusive(), owner=owner))

    assert finding.level is level
    assert finding_of("lease", machine(owner=owner)).level is Level.NOT_APPLICABLE


def measured(days: float = 1, **more: Any) -> profile.Profile:
    at = datetime.fromtimestamp(NOW - days * DAY_S, UTC).isoformat()
    on = profile.MeasuredSetup("vllm", "Big", "0.32.0", slots=32)
    lanes = {
        "ollama": profile.LaneProfile((1,), (1.0,)),
        "vllm": profile.LaneProfile((1,), (1.0,), on=on),
    }
    return profile.Profile(1, "measured", **{"lanes": lanes, "measured_at": at, **more})


@pytest.mark.parametrize(
    ("profile_of_chat", "level", "text"),
    [
        (None, Level.NOTE, "assumed"),
        (profile.ASSUMED, Level.NOTE, "assumed"),
        ("chat.json is not a profile", Level.PROBLEM, "is not a profile"),
        (measured(), Level.OK, "1 day ago"),
        (measured(179), Level.OK, "179 days"),
        (measured(181), Level.NOTE, "the profile is old"),
        (
            measured(lanes={"vllm": profile.LaneProfile((1,), (1.0,))}),
            Level.WARNING,
            "no figures for ollama",
        ),
    ],
)
def test_profile(profile_of_chat: Any, level: Level, text: str) -> None:
    engines = (ollama(lanes=expected("big:70b")), vllm(lanes=expected()))
    finding = finding_of("profile", machine(profiles={"chat": profile_of_chat}, engines=engines))

    assert (finding.level, finding.about) == (level, "model chat")
    assert text in finding.saw


def test_a_profile_measured_with_another_version_of_the_engine_is_a_warning() -> None:
    now = vllm(lanes=expected(), identities={"Big": Identity("0.33.0")})
    finding = finding_of(
        "profile",
        machine(profiles={"chat": measured()}, engines=(ollama(lanes=expected("x")), now)),
    )

    assert finding.level is Level.WARNING
    assert finding.saw == "vllm: version 0.33.0 now, measured with 0.32.0"


# The machine


@pytest.mark.parametrize(
    ("parts", "level", "text"),
    [
        ({}, Level.NOT_APPLICABLE, "no NVIDIA card"),
        (two_cards(), Level.OK, "driver 570.86, CUDA up to 12.8: NVIDIA GeForce RTX 4090 24.0 GiB"),
        (
            {"nvidia_devices": 1},
            Level.PROBLEM,
            "an NVIDIA card on its PCI bus, but: the NVIDIA driver reports",
        ),
        ({"driver_loaded": True}, Level.PROBLEM, "an NVIDIA driver in its kernel"),
        ({"nvidia_devices": Unknown("no bus")}, Level.UNKNOWN, "no bus"),
    ],
)
def test_driver(parts: dict[str, Any], level: Level, text: str) -> None:
    finding = finding_of("driver", machine(**parts))

    assert finding.level is level
    assert text in finding.saw


@pytest.mark.parametrize(
    ("runtimes", "cdi", "level"),
    [
        (("runc", "nvidia"), (), Level.OK),
        (("runc",), ("nvidia.com/gpu=all",), Level.OK),
        (("runc",), ("amd.com/gpu=all",), Level.WARNING),
    ],
)
def test_docker_access_to_the_cards(
    runtimes: tuple[str, ...], cdi: tuple[str, ...], level: Level
) -> None:
    docker = Docker("28.2", runtimes, cdi, "/")

    assert finding_of("docker", machine(**two_cards(), docker=docker)).level is level
    assert finding_of("docker", machine(docker=docker)).level is Level.NOT_APPLICABLE
    assert finding_of("docker", machine(**two_cards())).level is Level.NOT_APPLICABLE


def test_cards_without_p2p_are_a_note_with_the_options_for_vllm() -> None:
    without = finding_of("p2p", machine(**two_cards()))
    unlikely = finding_of(
        "p2p", machine(driver=Driver("1", "1", (card(0, peers=(1,)), card(1, peers=(0,)))))
    )
    silent = finding_of("p2p", machine(**two_cards(peers=None)))
    single = finding_of("p2p", machine(driver=Driver("1", "1", (card(),))))

    assert without.level is Level.NOTE
    assert "NCCL_P2P_DISABLE=1 and --disable-custom-all-reduce" in without.do
    assert (unlikely.level, silent.level, single.level) == (
        Level.NOTE,
        Level.UNKNOWN,
        Level.NOT_APPLICABLE,
    )
    assert "4090s as sold do not" in unlikely.saw


@pytest.mark.parametrize(
    ("words", "environment", "level", "text"),
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
def test_a_vllm_on_cards_without_p2p_needs_options(
    words: tuple[str, ...], environment: dict[str, str], level: Level, text: str
) -> None:
    finding = finding_of(
        "nccl", machine(**two_cards(), engines=(vllm(*words, environment=environment),))
    )

    assert finding.level is level
    assert text in finding.saw


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
def test_pcie_link(parts: dict[str, Any], level: Level) -> None:
    assert {f.level for f in findings_of("pcie", machine(**two_cards(**parts)))} == {level}


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
def test_power_limit(parts: dict[str, Any], level: Level) -> None:
    assert {f.level for f in findings_of("power", machine(**two_cards(**parts)))} == {level}


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
def test_temperature(parts: dict[str, Any], level: Level) -> None:
    assert {f.level for f in findings_of("heat", machine(**two_cards(**parts)))} == {level}


@pytest.mark.parametrize(("size", "level"), [(64 * MIB, Level.WARNING), (65 * MIB, Level.OK)])
def test_shm_is_that_of_a_running_vllm_and_else_that_of_this_shell(size: int, level: Level) -> None:
    small = replace(SHELL, shm=size)

    assert finding_of("shm", machine(own_process=small)).level is level
    assert (
        finding_of("shm", machine(own_process=SHELL, engines=(vllm(process=small),))).level is level
    )


def test_the_locked_memory_limit_of_a_sleeping_vllm() -> None:
    sleeper = vllm(lanes=expected(exclusive=True))
    limited = replace(SHELL, memlock=8 * MIB)

    def level(**parts: Any) -> Level:
        return finding_of("memlock", machine(**parts)).level

    assert level(**two_cards(), engines=(vllm(lanes=expected()),)) is Level.NOT_APPLICABLE
    assert level(engines=(sleeper,)) is Level.NOT_APPLICABLE  # on the CPU
    assert level(**two_cards(), engines=(sleeper,)) is Level.OK
    running = replace(sleeper, process=limited)
    assert level(**two_cards(), engines=(running,)) is Level.WARNING
    away = replace(sleeper, process=Unknown("in a container"))
    assert level(**two_cards(), engines=(away,), own_process=limited) is Level.NOTE


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
def test_ram_for_the_weights_of_a_sleeping_vllm(
    *, total: float, available: float, asleep: bool, memory_gib: float | None, level: Level
) -> None:
    engine = vllm(lanes=expected(exclusive=True, memory_gib=memory_gib), is_asleep=asleep)
    observed = machine(
        **two_cards(),
        settings=exclusive(),
        engines=(engine,),
        ram=Ram(int(total * GIB), int(available * GIB)),
    )

    assert finding_of("ram", observed).level is level
    assert finding_of("ram", replace(observed, engines=())).level is Level.NOT_APPLICABLE
    assert (
        finding_of("ram", replace(observed, settings=exclusive(gpu={"budget_gib": 4}))).level
        is Level.NOT_APPLICABLE
    )


def test_ram_of_another_machine_is_unknown_and_that_of_a_container_is_probably_ours() -> None:
    lane = expected(exclusive=True, memory_gib=100)
    public = vllm(lanes=lane, is_local=False, addresses=("8.8.8.8",))
    container = vllm(lanes=lane, is_local=False, addresses=("172.18.0.3",))

    def level(engine: ObservedEngine, **parts: Any) -> Level:
        return finding_of("ram", machine(settings=exclusive(), engines=(engine,), **parts)).level

    assert level(public, **two_cards()) is Level.UNKNOWN
    assert level(container, **two_cards()) is Level.WARNING
    assert level(container) is Level.UNKNOWN


def test_a_vllm_on_the_cpu_pins_no_memory() -> None:
    engine = vllm(lanes=expected(exclusive=True, memory_gib=100))

    assert (
        finding_of("ram", machine(settings=exclusive(), engines=(engine,))).level
        is Level.NOT_APPLICABLE
    )


@pytest.mark.parametrize(
    ("free", "models", "level"),
    [
        (500, ("big:70b",), Level.OK),
        (39.9, ("big:70b",), Level.NOTE),
        (50, (), Level.WARNING),  # 60 GiB of it are missing
        (61, (), Level.OK),
        (0.9, ("big:70b",), Level.WARNING),
    ],
)
def test_disk_space_for_models(free: float, models: tuple[str, ...], level: Level) -> None:
    engine = ollama(lanes=expected("big:70b", memory_gib=60), models=models)
    disks = (Disk("ollama", "/models", int(free * GIB)),)

    assert finding_of("disk", machine(engines=(engine,), disks=disks)).level is level


# The engines


@pytest.mark.parametrize(
    ("parts", "level", "text"),
    [
        ({}, Level.OK, "big:70b"),
        ({"answering_kind": Unknown("connection refused")}, Level.WARNING, "connection refused"),
        ({"answering_kind": "vllm"}, Level.PROBLEM, "vllm answers at this address"),
        ({"answering_kind": None}, Level.PROBLEM, "something that is not a known engine"),
        ({"lanes": expected("big:70b")}, Level.OK, "big:70b"),
        ({"lanes": expected("small")}, Level.PROBLEM, "it does not have small; it has big:70b"),
        ({"lanes": expected("small"), "models": ("small:latest",)}, Level.OK, "small"),
    ],
)
def test_engine(parts: dict[str, Any], level: Level, text: str) -> None:
    finding = finding_of("engine", machine(engines=(ollama(**parts),)))

    assert finding.level is level
    assert text in finding.saw


def test_an_engine_that_the_gateway_starts_may_be_stopped() -> None:
    configured = settings.EngineSettings(urls=(OLLAMA_URL,), command=("ollama", "serve"))
    engine = ollama(answering_kind=Unknown("refused"), configured=configured)

    assert finding_of("engine", machine(engines=(engine,))).level is Level.NOTE


@pytest.mark.parametrize(
    ("version", "level", "text"),
    [
        ("0.24.0", Level.OK, "0.24.0"),
        ("0.24.9-rc1", Level.OK, "0.24.9-rc1"),
        ("0.29.1", Level.NOTE, "tests run 0.24"),
        ("0.30.0", Level.NOTE, "llama-server binary"),
        ("0.33.0", Level.NOTE, "whose source was read"),
        ("dev", Level.UNKNOWN, "'dev'"),
    ],
)
def test_version_of_ollama(version: str, level: Level, text: str) -> None:
    finding = finding_of("version", machine(engines=(ollama(version=version),)))

    assert finding.level is level
    assert text in finding.saw
    assert ("llama-server" in finding.saw) is (version in ("0.30.0", "0.33.0"))


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
def test_an_engine_that_other_machines_can_reach_directly(sockets: Any, level: Level) -> None:
    assert finding_of("published", machine(engines=(ollama(listening_on=sockets),))).level is level


def test_an_engine_on_another_machine_at_a_public_address_is_a_warning() -> None:
    def level(address: str) -> Level:
        engine = ollama(is_local=False, addresses=(address,))
        return finding_of("published", machine(engines=(engine,))).level

    assert (level("172.18.0.2"), level("8.8.8.8")) == (Level.OK, Level.WARNING)


@pytest.mark.parametrize(
    ("environment", "contexts", "lane", "level", "text"),
    [
        ({}, {}, (), Level.WARNING, "no NVIDIA memory Ollama takes 4,096"),
        ({"OLLAMA_CONTEXT_LENGTH": "8192"}, {}, (), Level.OK, "OLLAMA_CONTEXT_LENGTH=8192"),
        ({"OLLAMA_CONTEXT_LENGTH": "0"}, {}, (), Level.WARNING, "is not set"),
        ({}, {"big:70b": 2048}, expected("big:70b"), Level.OK, "big:70b 2,048"),
        ({}, {"big:70b": None}, expected("big:70b"), Level.WARNING, "is not set"),
    ],
)
def test_context_of_ollama(
    environment: dict[str, str],
    contexts: dict[str, int | None],
    lane: tuple[ExpectedLane, ...],
    level: Level,
    text: str,
) -> None:
    engine = ollama(environment=environment, contexts=contexts, lanes=lane)
    finding = finding_of("context", machine(engines=(engine,)))

    assert finding.level is level
    assert text in finding.saw


@pytest.mark.parametrize(
    ("gib", "tokens"), [(22.9, "4,096"), (23, "32,768"), (46.9, "32,768"), (47, "262,144")]
)
def test_default_context_of_ollama_depends_on_gpu_memory(gib: float, tokens: str) -> None:
    one = Card(0, "Some card", int(gib * GIB))
    finding = finding_of("context", machine(driver=Driver("1", "1", (one,)), engines=(ollama(),)))

    assert f"takes {tokens} tokens per slot" in finding.saw


def test_a_model_loaded_with_the_largest_default_context_is_a_warning() -> None:
    engine = ollama(
        environment={"OLLAMA_CONTEXT_LENGTH": "262144"},
        loaded=(Loaded("big:70b", 60 * GIB, 60 * GIB, 262_144),),
    )

    assert [f.level for f in findings_of("context", machine(engines=(engine,)))] == [
        Level.WARNING,
        Level.OK,
    ]


def test_an_engine_with_less_context_than_the_settings_promise() -> None:
    lane = expected("big:70b", context=8192)
    short = ollama(lanes=lane, loaded=(Loaded("big:70b", 1, 1, 4096),),
                   environment={"OLLAMA_CONTEXT_LENGTH": "4096"})  # fmt: skip
    less = vllm(lanes=expected(context=8193))
    enough = vllm(lanes=expected(context=8192))

    assert (
        "cuts longer prompts without an error"
        in findings_of("context", machine(engines=(short,)))[0].saw
    )
    assert finding_of("context", machine(engines=(less,))).level is Level.PROBLEM
    assert finding_of("context", machine(engines=(enough,))).level is Level.OK


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
def test_slots_of_ollama(environment: dict[str, str], slots: int | None, level: Level) -> None:
    engine = ollama(environment=environment, lanes=expected("big:70b", slots=slots))

    assert finding_of("slots", machine(engines=(engine,))).level is level


def test_slots_of_vllm() -> None:
    def level(*words: str) -> Level:
        process = Process(8, ("vllm", *words), {}, GIB, None)
        return finding_of("slots", machine(engines=(vllm(process=process),))).level

    assert level("--max-num-seqs=32") is Level.OK
    assert level("--max-num-seqs", "16") is Level.WARNING
    assert level("--max-num-seqs", "64") is Level.NOTE
    assert level() is Level.UNKNOWN


@pytest.mark.parametrize(
    ("on_gpu", "is_local", "cards", "level", "text"),
    [
        (44, True, True, Level.OK, "entirely in GPU memory (44.0 GiB)"),
        (43, True, True, Level.PROBLEM, "1.0 GiB of 44.0 GiB are on the CPU"),
        (0, True, True, Level.PROBLEM, "although this machine has a card"),
        (0, True, False, Level.NOTE, "this machine has no NVIDIA card"),
        (0, False, False, Level.WARNING, "on the CPU of that machine"),
    ],
)
def test_a_model_on_the_cpu(
    *, on_gpu: int, is_local: bool, cards: bool, level: Level, text: str
) -> None:
    loaded = (Loaded("big:70b", 44 * GIB, on_gpu * GIB, 4096),)
    engine = ollama(loaded=loaded, is_local=is_local)
    finding = finding_of("on-gpu", machine(**(two_cards() if cards else {}), engines=(engine,)))

    assert finding.level is level
    assert text in finding.saw


def test_without_a_loaded_model_its_place_is_unknown() -> None:
    assert finding_of("on-gpu", machine(engines=(ollama(),))).level is Level.UNKNOWN


@pytest.mark.parametrize(
    ("parts", "level"),
    [
        ({"has_dev_endpoints": False}, Level.OK),
        ({}, Level.OK),
        ({"listening_on": ("0.0.0.0",)}, Level.PROBLEM),  # noqa: S104
        ({"is_local": False, "addresses": ("172.18.0.3",)}, Level.NOTE),
        ({"is_local": False, "addresses": ("8.8.8.8",)}, Level.PROBLEM),
        ({"has_dev_endpoints": Unknown("it does not answer")}, Level.UNKNOWN),
    ],
)
def test_dev_endpoints(parts: dict[str, Any], level: Level) -> None:
    engine = vllm(**{"has_dev_endpoints": True, **parts})

    assert finding_of("dev-endpoints", machine(engines=(engine,))).level is level


def test_whether_a_vllm_can_release_its_memory() -> None:
    lane = expected(exclusive=True)
    ours = settings.EngineSettings(urls=("http://127.0.0.1:8001",), command=("vllm",))

    def level(engine: ObservedEngine, **parts: Any) -> Level:
        return finding_of("sleep", machine(**parts, engines=(engine,))).level

    assert level(vllm(lanes=expected())) is Level.NOT_APPLICABLE
    assert level(vllm(lanes=lane)) is Level.PROBLEM
    assert level(vllm(lanes=lane, configured=ours)) is Level.NOTE
    assert level(vllm(lanes=lane, has_dev_endpoints=True)) is Level.WARNING  # on a CPU
    sleepy = vllm("--enable-sleep-mode", lanes=lane, has_dev_endpoints=True)
    assert level(sleepy, **two_cards()) is Level.OK
    assert level(vllm(lanes=lane, has_dev_endpoints=True), **two_cards()) is Level.PROBLEM
    hidden = vllm(lanes=lane, has_dev_endpoints=True, process=Unknown("in a container"))
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
def test_removed_options_of_vllm(words: tuple[str, ...], level: Level) -> None:
    configured = settings.EngineSettings(urls=("http://127.0.0.1:8001",), command=words)

    assert finding_of("flags", machine(engines=(vllm(configured=configured),))).level is level
