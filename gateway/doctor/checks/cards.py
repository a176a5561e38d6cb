"""Checks of the cards: the driver, Docker's access to them, and the state of each card."""

from __future__ import annotations

from collections.abc import Iterator

from gateway.doctor.checks.check import Level, Verdict, format_bytes, has_no_nvidia, nvidia_cards
from gateway.doctor.observations import NotObserved, Observations, Unknown, require
from gateway.gpu.cards import Brake, Card

#: The highest-numbered performance state in which a card works; at rest it is in a higher one.
WORKING_STATE = 2


def check_driver(observed: Observations) -> Iterator[Verdict]:
    """Whether the driver works, and which cards it has."""
    if not isinstance(observed.driver, Unknown):
        driver = observed.driver
        names = ", ".join(f"{card.name} {format_bytes(card.memory)}" for card in driver.cards)
        yield Verdict(Level.OK, f"driver {driver.version}, CUDA up to {driver.cuda}: {names}")
    elif has_no_nvidia(observed):
        yield Verdict(Level.NOT_APPLICABLE, "no NVIDIA card on the PCI bus, and no driver")
    elif isinstance(observed.nvidia_devices, Unknown) and not observed.driver_loaded:
        yield Verdict(Level.UNKNOWN, f"{observed.driver.reason}; {observed.nvidia_devices.reason}")
    else:
        trace = "driver in its kernel" if observed.driver_loaded else "card on its PCI bus"
        yield Verdict(
            Level.PROBLEM,
            f"the machine has an NVIDIA {trace}, but: {observed.driver.reason}",
            "Install the driver; after an update of the driver restart the machine. In a "
            "container: give it the GPU capability `utility`.",
        )


def check_docker(observed: Observations) -> Iterator[Verdict]:
    """Whether Docker can give the cards to containers."""
    if observed.docker is None:
        yield Verdict(Level.NOT_APPLICABLE, "this machine has no docker command")
        return
    if not nvidia_cards(observed):
        yield Verdict(Level.NOT_APPLICABLE, "no NVIDIA card to give to containers")
        return
    docker = require(observed.docker)
    devices = [name for name in docker.cdi if name.startswith("nvidia.com/gpu")]
    if "nvidia" in docker.runtimes or devices:
        by = "its nvidia runtime" if "nvidia" in docker.runtimes else "CDI"
        yield Verdict(
            Level.OK, f"Docker {docker.version} can give the cards to containers, by {by}"
        )
    else:
        yield Verdict(
            Level.WARNING,
            f"Docker {docker.version} has neither the nvidia runtime nor a CDI device of NVIDIA",
            "For engines in containers install nvidia-container-toolkit, then run `sudo nvidia-ctk "
            "runtime configure --runtime=docker` and `sudo systemctl restart docker`.",
        )


def check_p2p(observed: Observations) -> Iterator[Verdict]:
    """Whether the cards can read each other's memory."""
    cards = nvidia_cards(observed)
    if len(cards) < 2:
        yield Verdict(
            Level.NOT_APPLICABLE, f"{len(cards) or 'no'} NVIDIA card, so there is no pair"
        )
    elif have_p2p(cards):
        if any("4090" in card.name for card in cards):
            yield Verdict(
                Level.NOTE,
                "the driver reports P2P between the cards, but RTX 4090s as sold do not have it",
                "Test it before you rely on it. To do without: NCCL_P2P_DISABLE=1 and "
                "--disable-custom-all-reduce.",
            )
        else:
            yield Verdict(Level.OK, f"the {len(cards)} cards can read each other's memory (P2P)")
    else:
        yield Verdict(
            Level.NOTE,
            "the cards cannot read each other's memory (no P2P): data between them passes through "
            "the host",
            "For a vLLM on both cards: NCCL_P2P_DISABLE=1 and --disable-custom-all-reduce.",
        )


def have_p2p(cards: tuple[Card, ...]) -> bool:
    """Whether each card can read the memory of every other; raises `NotObserved`."""
    for card in cards:
        if card.peers is None:
            raise NotObserved(f"the driver does not report whether {card} has P2P")
    return all(len(card.peers or ()) == len(cards) - 1 for card in cards)


def check_pcie(card: Card) -> Iterator[Verdict]:
    """Whether the PCIe link of a card has its full width and speed."""
    (width, widest), (generation, newest) = card.width, card.generation
    if width is None or widest is None or generation is None or newest is None:
        raise NotObserved("the driver does not report its PCIe link")
    saw = f"x{width} of x{widest}, generation {generation} of {newest}"
    if width < min(8, widest):
        yield Verdict(
            Level.WARNING, saw, "Check its slot and riser against the manual of the mainboard."
        )
    elif generation < newest and card.state is not None and card.state <= WORKING_STATE:
        yield Verdict(
            Level.WARNING,
            f"{saw}, under load",
            "Check its riser, and the link speed in the BIOS.",
        )
    elif generation < newest:
        yield Verdict(
            Level.NOTE, f"{saw}; an idle card may slow its link down", "Run this again under load."
        )
    elif width < widest:
        yield Verdict(Level.NOTE, f"{saw}, as usual with two cards on a desktop mainboard")
    else:
        yield Verdict(Level.OK, saw)


def check_power(card: Card) -> Iterator[Verdict]:
    """The power limit of a card, and whether power slows it down."""
    limit, usual = card.power_w
    if limit is None:
        raise NotObserved("the driver does not report its power limit")
    saw = f"limit {limit:.0f} W" + (f" of {usual:.0f} W as shipped" if usual else "")
    brakes = card.brakes or Brake(0)
    if brakes & (Brake.POWER_SUPPLY | Brake.HARDWARE):
        yield Verdict(
            Level.WARNING,
            f"{saw}; the hardware slows it down now",
            "Check its power cables, the power supply and the cooling.",
        )
    elif Brake.POWER_LIMIT in brakes:
        yield Verdict(Level.NOTE, f"{saw}; this limit slows it down now")
    elif usual and limit < usual:
        yield Verdict(Level.NOTE, f"{saw}: it was lowered")
    else:
        yield Verdict(Level.OK, saw)


def check_heat(card: Card) -> Iterator[Verdict]:
    """The temperature of a card, and whether heat slows it down."""
    now, limit = card.heat_c
    if now is None:
        raise NotObserved("the driver does not report its temperature")
    slowed = (card.brakes or Brake(0)) & (Brake.HEAT | Brake.HARDWARE_HEAT)
    saw = f"{now} °C" + (f" of {limit} °C" if limit else "")
    if slowed or (limit is not None and now >= limit):
        yield Verdict(
            Level.WARNING,
            f"{saw}; heat slows it down now"
            if slowed
            else f"{saw}, where the driver slows it down",
            "Give the cards more air, or lower the power limit: `sudo nvidia-smi -pl WATTS`.",
        )
    else:
        yield Verdict(Level.OK, saw)
