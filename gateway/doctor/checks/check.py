"""What a check is and what it returns, and how one is run for each engine or card."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial

from backends.kinds import Kind
from gateway.doctor.observations import (
    NO_SETTINGS,
    NotObserved,
    Observations,
    ObservedEngine,
    Unknown,
    require,
)
from gateway.gpu.cards import Card
from gateway.settings import Settings

GIB = 2**30
MIB = 2**20


class Level(StrEnum):
    """How serious a finding is, the worst first."""

    PROBLEM = "problem"  # it fails, or will
    WARNING = "warning"  # it may fail, or others may use the machine
    UNKNOWN = "unknown"  # it could not be observed; the finding has the reason
    NOTE = "note"  # worth knowing
    OK = "ok"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check returns.

    Attributes:
        level: How serious it is.
        saw: What was observed.
        do: What to do; empty where there is nothing to do.
        about: The card, engine or model; empty where there is only one.
    """

    level: Level
    saw: str
    do: str = ""
    about: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict, with the name and the reason of its check. Its fields are those of the JSON."""

    check: str
    about: str
    level: Level
    saw: str
    why: str
    do: str


@dataclass(frozen=True, slots=True)
class Check:
    """A named function of the observations.

    Attributes:
        name: Scripts rely on it: it does not change.
        why: Why the check matters.
        run: The check itself.
    """

    name: str
    why: str
    run: Callable[[Observations], Iterable[Verdict]]


def guarded(run: Callable[[], Iterable[Verdict]], about: str = "") -> Iterator[Verdict]:
    """The verdicts of a check; one of level `unknown` where it cannot be completed."""
    try:
        for verdict in run():
            yield replace(verdict, about=verdict.about or about)
    except NotObserved as exc:
        yield Verdict(Level.UNKNOWN, str(exc), about=about)
    except Exception as exc:  # noqa: BLE001 - one faulty check must not hide the others
        saw = f"the check itself failed: {type(exc).__name__}: {exc}"
        yield Verdict(Level.UNKNOWN, saw, "Please report this: it is a fault of twolane.", about)


def per_engine(
    run: Callable[[Observations, ObservedEngine], Iterable[Verdict]], *kinds: Kind
) -> Callable[[Observations], Iterator[Verdict]]:
    """A check that is made for each engine of these kinds."""

    def run_each(observed: Observations) -> Iterator[Verdict]:
        engines = [engine for engine in require(observed.engines) if engine.kind in kinds]
        if not engines:
            yield Verdict(
                Level.NOT_APPLICABLE, f"no {' or '.join(kinds)} is configured or was found"
            )
        for engine in engines:
            yield from guarded(partial(run, observed, engine), engine.label)

    return run_each


def per_card(
    run: Callable[[Card], Iterable[Verdict]],
) -> Callable[[Observations], Iterator[Verdict]]:
    """A check that is made for each NVIDIA card."""

    def run_each(observed: Observations) -> Iterator[Verdict]:
        cards = nvidia_cards(observed)
        if not cards:
            yield Verdict(Level.NOT_APPLICABLE, "no NVIDIA card")
        for card in cards:
            yield from guarded(partial(run, card), str(card))

    return run_each


def has_no_nvidia(observed: Observations) -> bool:
    """Whether it is certain that there is neither an NVIDIA card nor its driver."""
    return (
        isinstance(observed.driver, Unknown)
        and observed.nvidia_devices == 0
        and not observed.driver_loaded
    )


def nvidia_cards(observed: Observations) -> tuple[Card, ...]:
    """The NVIDIA cards; raises `NotObserved` where there may be some."""
    return () if has_no_nvidia(observed) else require(observed.driver).cards


def usable_settings(observed: Observations) -> Settings:
    """The settings; raises `NotObserved` without their fault, which has its own finding."""
    if isinstance(observed.settings, Unknown):
        raise NotObserved(NO_SETTINGS)
    return observed.settings


def format_bytes(size: float) -> str:
    """A size for people, in MiB or GiB."""
    if size < GIB:
        return f"{size / MIB:.0f} MiB"
    return f"{size / GIB:.0f} GiB" if size >= 100 * GIB else f"{size / GIB:.1f} GiB"
