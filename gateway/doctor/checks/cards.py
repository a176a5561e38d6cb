"""Checks of the driver and the cards."""

from __future__ import annotations

from collections.abc import Iterator

from gateway.doctor.checks.check import Level, Verdict, cards, format_bytes, has_no_nvidia, per_card
from gateway.doctor.observations import (
    NotObserved,
    Observations,
    Unknown,
    require,
)
from gateway.gpu.memory import Brake, Card

#: The slowest performance state in which a card works.
WORKING = 2


def driver(seen: Observations) -> Iterator[Verdict]:
    """The driver and the cards it has."""
    if not isinstance(seen.driver, Unknown):
        found = seen.driver
        names = ", ".join(f"{card.name} {format_bytes(card.memory)}" for card in found.cards)
        yield Verdict(Level.OK, f"driver {found.version}, CUDA up to {found.cuda}: {names}")
    elif has_no_nvidia(seen):
        yield Verdict(Level.NOT_APPLICABLE, "no NVIDIA card on the PCI bus, and no driver")
    elif isinstance(seen.nvidia_on_bus, Unknown) and not seen.driver_loaded:
        yield Verdict(Level.UNKNOWN, f"{seen.driver.why}; {seen.nvidia_on_bus.why}")
    else:
        yield Verdict(
            Level.PROBLEM,
            f"the machine has NVIDIA's {_where(seen)}, but: {seen.driver.why}",
            "Install the driver; after an update of it, restart the machine. In a container: give "
            "it the GPU capability `utility`.",
        )


def _where(seen: Observations) -> str:
    return "driver in the kernel" if seen.driver_loaded else "card on its PCI bus"


def docker(seen: Observations) -> Iterator[Verdict]:
    """Whether Docker can hand the cards to containers."""
    if seen.docker is None:
        yield Verdict(Level.NOT_APPLICABLE, "no docker command here")
        return
    if not cards(seen):
        yield Verdict(Level.NOT_APPLICABLE, "no NVIDIA card to hand to containers")
        return
    found = require(seen.docker)
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


def p2p(seen: Observations) -> Iterator[Verdict]:
    """Whether the cards read each other's memory."""
    found = cards(seen)
    if len(found) < 2:
        yield Verdict(
            Level.NOT_APPLICABLE, f"{len(found) or 'no'} NVIDIA card, so there is no pair"
        )
    elif have_p2p(found):
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


def have_p2p(found: tuple[Card, ...]) -> bool:
    """Whether each card reads each other's memory; raises `NotObserved`."""
    for card in found:
        if card.peers is None:
            raise NotObserved(f"the driver does not tell whether {card} has P2P")
    return all(len(card.peers or ()) == len(found) - 1 for card in found)


def pcie(seen: Observations) -> Iterator[Verdict]:
    """The link of each card, against what it could be."""
    yield from per_card(seen, _pcie)


def _pcie(card: Card) -> Iterator[Verdict]:
    (width, widest), (generation, newest) = card.width, card.generation
    if width is None or widest is None or generation is None or newest is None:
        raise NotObserved("the driver does not tell its PCIe link")
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


def power(seen: Observations) -> Iterator[Verdict]:
    """The power limit of each card, and whether power holds it back."""
    yield from per_card(seen, _power)


def _power(card: Card) -> Iterator[Verdict]:
    limit, usual = card.power_w
    if limit is None:
        raise NotObserved("the driver does not tell its power limit")
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


def heat(seen: Observations) -> Iterator[Verdict]:
    """The temperature of each card, and whether it holds it back."""
    yield from per_card(seen, _heat)


def _heat(card: Card) -> Iterator[Verdict]:
    now, most = card.heat_c
    if now is None:
        raise NotObserved("the driver does not tell its temperature")
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
