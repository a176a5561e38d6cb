"""Checks of vLLM: its dev endpoints, its sleep, and how it was started."""

from __future__ import annotations

from collections.abc import Iterator

from gateway.doctor.checks.cards import have_p2p
from gateway.doctor.checks.check import Level, Verdict, nvidia_cards
from gateway.doctor.observations import (
    Observations,
    ObservedEngine,
    is_loopback,
    is_private,
    require,
)

#: Options that vLLM has removed; with one of them it does not start. Read in 0.32 and 0.33.
REMOVED_FLAGS = ("--swap-space", "--disable-log-requests")


def check_dev_endpoints(observed: Observations, engine: ObservedEngine) -> Iterator[Verdict]:
    """Who can reach the endpoints of vLLM's dev mode."""
    if not require(engine.has_dev_endpoints):
        yield Verdict(Level.OK, "it has no dev endpoints")
        return
    addresses = require(engine.addresses)
    public = [address for address in addresses if not is_private(address)]
    if engine.is_local:
        public = [address for address in require(engine.listening_on) if not is_loopback(address)]
    if public:
        yield Verdict(
            Level.PROBLEM,
            f"/is_sleeping answers, and its port listens on {', '.join(public)}"
            if engine.is_local
            else f"/is_sleeping answers at {', '.join(public)}, a public address",
            "Start it with --host 127.0.0.1, or publish no port. Its --api-key does not protect "
            "these endpoints.",
        )
    elif engine.is_local:
        yield Verdict(Level.OK, "they answer, but only to this machine")
    else:
        yield Verdict(
            Level.NOTE, f"they answer at {', '.join(addresses)}: to all machines of that network"
        )


def check_sleep(observed: Observations, engine: ObservedEngine) -> Iterator[Verdict]:
    """Whether it can release its GPU memory."""
    if not any(expected.exclusive for expected in engine.lanes):
        yield Verdict(Level.NOT_APPLICABLE, "it need not sleep (no exclusive placement)")
        return
    if not require(engine.has_dev_endpoints):
        if engine.is_managed:
            yield Verdict(
                Level.NOTE,
                "the gateway stops and starts it; the start of a 70B takes 60 to 150 s",
            )
        else:
            yield Verdict(
                Level.PROBLEM,
                "it cannot sleep and the gateway cannot stop it: it never releases its memory",
                "Start it with VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode, or let the gateway "
                "start it: engines.vllm.command.",
            )
        return
    if engine.is_local and not nvidia_cards(observed):
        yield Verdict(
            Level.WARNING,
            "it can sleep, but on a CPU that releases no memory",
            "Leave out VLLM_SERVER_DEV_MODE and set engines.vllm.command: then the gateway stops "
            "and starts it.",
        )
        return
    if require(engine.process).flag("--enable-sleep-mode") is None:
        yield Verdict(
            Level.PROBLEM,
            "it was started without --enable-sleep-mode: its sleep releases no memory",
            "Start it with --enable-sleep-mode.",
        )
    else:
        yield Verdict(Level.OK, "it can sleep (--enable-sleep-mode)")


def check_nccl(observed: Observations, engine: ObservedEngine) -> Iterator[Verdict]:
    """Whether a vLLM on several cards without P2P was started for that."""
    cards = nvidia_cards(observed)
    if len(cards) < 2 or have_p2p(cards):
        yield Verdict(Level.NOT_APPLICABLE, "no pair of cards without P2P")
        return
    process = require(engine.process)
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
        both = " and ".join(missing)
        yield Verdict(Level.WARNING, f"it was started without {both}", f"Start it with {both}.")
    else:
        yield Verdict(Level.OK, "it was started with the options for cards without P2P")


def check_flags(observed: Observations, engine: ObservedEngine) -> Iterator[Verdict]:
    """Whether the command that the gateway starts it with has only options that exist."""
    words = engine.configured.command if engine.configured else ()
    removed = [
        name for name in REMOVED_FLAGS if any(word.partition("=")[0] == name for word in words)
    ]
    if removed:
        yield Verdict(
            Level.PROBLEM,
            f"engines.vllm.command has {' and '.join(removed)}, which vLLM has removed",
            f"Remove {' and '.join(removed)} from engines.vllm.command.",
        )
    elif words:
        yield Verdict(Level.OK, "engines.vllm.command has no option that vLLM has removed")
    else:
        yield Verdict(Level.NOT_APPLICABLE, "the gateway does not start it")
