"""Every check, in the order in which it is shown."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from backends.kinds import KINDS
from gateway.doctor.checks.cards import docker, driver, heat, p2p, pcie, power
from gateway.doctor.checks.check import Check, Finding, guarded, per_engine
from gateway.doctor.checks.engines import context, engine, published, slots, version
from gateway.doctor.checks.gateway import exposure, lease, port, profile, settings_load
from gateway.doctor.checks.machine import disk, memlock, ram, shm
from gateway.doctor.checks.ollama import on_gpu
from gateway.doctor.checks.vllm import dev_endpoints, flags, nccl, sleep
from gateway.doctor.observations import (
    Observations,
)


def run_checks(seen: Observations, checks: Iterable[Check] | None = None) -> list[Finding]:
    """Every finding of every check, in their order. Never raises."""
    return [
        Finding(check.name, found.about, found.level, found.saw, check.why, found.do)
        for check in (CHECKS if checks is None else checks)
        for found in guarded(partial(check.judge, seen))
    ]


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
        per_engine(engine, *KINDS),
    ),
    Check(
        "version",
        "What twolane knows of an engine was read and run in certain versions.",
        per_engine(version, "ollama", "vllm"),
    ),
    Check(
        "published",
        "Who reaches an engine passes by keys and queue, and can have it reload.",
        per_engine(published, *KINDS),
    ),
    Check(
        "context",
        "Memory is context x slots: too much goes to the CPU, too little cuts prompts.",
        per_engine(context, "ollama", "vllm"),
    ),
    Check(
        "slots",
        "Where both sides differ, requests wait unseen, or memory lies idle.",
        per_engine(slots, "ollama", "vllm"),
    ),
    Check(
        "on-gpu",
        "The part that is on the CPU sets the pace of the whole.",
        per_engine(on_gpu, "ollama"),
    ),
    Check(
        "dev-endpoints",
        "Who reaches them puts vLLM to sleep, or calls into its workers (/collective_rpc).",
        per_engine(dev_endpoints, "vllm"),
    ),
    Check(
        "sleep",
        "To hand the GPU over, vLLM has to give its memory back.",
        per_engine(sleep, "vllm"),
    ),
    Check(
        "nccl",
        "Cards without P2P can use neither NCCL's direct way nor vLLM's own all-reduce.",
        per_engine(nccl, "vllm"),
    ),
    Check("flags", "vLLM stops at an option that it does not know.", per_engine(flags, "vllm")),
)
