"""Checks of vLLM."""

from __future__ import annotations

from collections.abc import Iterator

from gateway.doctor.checks.cards import have_p2p
from gateway.doctor.checks.check import Level, Verdict, cards
from gateway.doctor.observations import (
    Observations,
    ObservedEngine,
    is_loopback,
    is_private,
    require,
)

#: Options that vLLM had once; with one of them it does not start (read in 0.32 and 0.33).
GONE_FLAGS = ("--swap-space", "--disable-log-requests")


def dev_endpoints(seen: Observations, server: ObservedEngine) -> Iterator[Verdict]:
    """Who reaches the endpoints that vLLM has in dev mode."""
    if not require(server.sleeps):
        yield Verdict(Level.OK, "it has no dev endpoints")
        return
    addresses = require(server.addresses)
    outside = [address for address in addresses if not is_private(address)]
    if server.here:
        outside = [address for address in require(server.sockets) if not is_loopback(address)]
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


def sleep(seen: Observations, server: ObservedEngine) -> Iterator[Verdict]:
    """Whether it can give its memory back."""
    if not any(wanted.exclusive for wanted in server.wanted):
        yield Verdict(Level.NOT_APPLICABLE, "it need not sleep (no exclusive placement)")
        return
    if not require(server.sleeps):
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
    if require(server.process).flag("--enable-sleep-mode") is None:
        yield Verdict(
            Level.PROBLEM, "it was started without --enable-sleep-mode: asleep it frees nothing",
            "Start it with --enable-sleep-mode.",
        )  # fmt: skip
    else:
        yield Verdict(Level.OK, "it sleeps, with --enable-sleep-mode")


def nccl(seen: Observations, server: ObservedEngine) -> Iterator[Verdict]:
    """Whether a vLLM on several cards was told that they have no P2P."""
    found = cards(seen)
    if len(found) < 2 or have_p2p(found):
        yield Verdict(Level.NOT_APPLICABLE, "no pair of cards without P2P")
        return
    process = require(server.process)
    tensor = process.flag("--tensor-parallel-size", "-tp") or "1"
    pipeline = process.flag("--pipeline-parallel-size", "-pp") or "1"
    if (tensor, pipeline) == ("1", "1"):
        yield Verdict(Level.NOT_APPLICABLE, "it uses one card")
        return
    missing = []
    if require(process.environment).get("NCCL_P2P_DISABLE") != "1":
        missing.append("NCCL_P2P_DISABLE=1")
    if tensor != "1" and process.flag("--disable-custom-all-reduce") is None:
        missing.append("--disable-custom-all-reduce")
    if missing:
        told = " and ".join(missing)
        yield Verdict(Level.WARNING, f"it was started without {told}", f"Start it with {told}.")
    else:
        yield Verdict(Level.OK, "started as cards without P2P want it")


def flags(seen: Observations, server: ObservedEngine) -> Iterator[Verdict]:
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
        yield Verdict(Level.NOT_APPLICABLE, "the gateway does not start it")
