"""The list of all checks, in the order in which their findings are shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from backends.kinds import KINDS
from gateway.doctor.checks.cards import (
    check_docker,
    check_driver,
    check_heat,
    check_p2p,
    check_pcie,
    check_power,
)
from gateway.doctor.checks.check import (
    Check,
    Finding,
    Verdict,
    guarded,
    per_card,
    per_engine,
)
from gateway.doctor.checks.engines import (
    check_engine,
    check_fixed_context,
    check_reach,
    check_slots,
    check_version,
)
from gateway.doctor.checks.gateway import (
    check_exposure,
    check_lease,
    check_port,
    check_profiles,
    check_settings,
)
from gateway.doctor.checks.machine import check_disks, check_memlock, check_ram, check_shm
from gateway.doctor.checks.ollama import check_ollama_context, check_on_gpu
from gateway.doctor.checks.vllm import check_dev_endpoints, check_flags, check_nccl, check_sleep
from gateway.doctor.observations import Observations, ObservedEngine


def run_checks(observed: Observations, checks: Iterable[Check] | None = None) -> list[Finding]:
    """The findings of all checks, or of these, in their order. Never raises."""
    return [
        Finding(check.name, verdict.about, verdict.level, verdict.saw, check.why, verdict.do)
        for check in (CHECKS if checks is None else checks)
        for verdict in guarded(partial(check.run, observed))
    ]


def _check_context(observed: Observations, engine: ObservedEngine) -> Iterator[Verdict]:
    run = check_ollama_context if engine.kind == "ollama" else check_fixed_context
    yield from run(observed, engine)


CHECKS = (
    Check("settings", "The gateway does not start with settings that it cannot use.",
          check_settings),
    Check("exposure", "Without a key, all who can reach the address can use your cards.",
          check_exposure),
    Check("port", "The gateway does not start where another process listens.", check_port),
    Check("lease", "Only one gateway can hand a GPU over.", check_lease),
    Check("profile", "The gateway chooses lanes by the seconds that a request takes on each.",
          check_profiles),
    Check("driver", "Engines and the gateway reach the cards through the driver.",
          check_driver),
    Check("docker", "A container sees only the cards that Docker gives to it.", check_docker),
    Check("p2p", "Tensor parallelism exchanges data between the cards for every token.",
          check_p2p),
    Check("pcie", "Cards without P2P exchange all their data over PCIe.", per_card(check_pcie)),
    Check("power", "A card at its power limit is slower than its data sheet.",
          per_card(check_power)),
    Check("heat", "A hot card slows itself down.", per_card(check_heat)),
    Check("shm", "The processes of one vLLM share memory in /dev/shm, and fail if it is small.",
          check_shm),
    Check("memlock", "A vLLM that sleeps pins its weights in RAM.", check_memlock),
    Check("ram", "A vLLM that sleeps pins its weights in RAM, and keeps them pinned afterwards.",
          check_ram),
    Check("disk", "A download that fills the disk fails, and so may other programs.", check_disks),
    Check("engine", "A lane is served only while its engine answers and has the model.",
          per_engine(check_engine, *KINDS)),
    Check("version", "What twolane relies on was tested with certain releases of the engines.",
          per_engine(check_version, "ollama", "vllm")),
    Check("published", "Requests that reach an engine directly bypass keys and queue, and can make "
          "it load another model.",
          per_engine(check_reach, *KINDS)),
    Check("context", "Memory is context x slots: with too much of it layers move to the CPU, with "
          "too little prompts are cut.",
          per_engine(_check_context, "ollama", "vllm")),
    Check("slots", "If the two sides differ, requests wait inside the engine, or its memory is "
          "unused.",
          per_engine(check_slots, "ollama", "vllm")),
    Check("on-gpu", "The part of a model on the CPU determines the speed of the whole model.",
          per_engine(check_on_gpu, "ollama")),
    Check("dev-endpoints", "They put vLLM to sleep, and call into its workers (/collective_rpc).",
          per_engine(check_dev_endpoints, "vllm")),
    Check("sleep", "At a hand-over vLLM has to release its GPU memory.",
          per_engine(check_sleep, "vllm")),
    Check("nccl", "Without P2P neither NCCL's direct transport nor vLLM's own all-reduce works.",
          per_engine(check_nccl, "vllm")),
    Check("flags", "vLLM does not start with an option that it does not know.",
          per_engine(check_flags, "vllm")),
)  # fmt: skip
