"""What a check is, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial

from backends.kinds import Kind
from gateway.doctor.observations import (
    NotObserved,
    Observations,
    ObservedEngine,
    Unknown,
    require,
)
from gateway.gpu.memory import Card

GIB = 2**30
MIB = 2**20


class Level(StrEnum):
    """How a finding is to be taken, the worst first."""

    PROBLEM = "problem"  # it fails, or will
    WARNING = "warning"  # it may fail, or somebody else may use it
    UNKNOWN = "unknown"  # nobody could tell; the finding says why
    NOTE = "note"  # worth knowing
    OK = "ok"
    NOT_APPLICABLE = "not applicable"


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
    judge: Callable[[Observations], Iterable[Verdict]]


def guarded(judge: Callable[[], Iterable[Verdict]], about: str = "") -> Iterator[Verdict]:
    """What a judgement comes to, and `unknown` where it does not come to its end."""
    try:
        for verdict in judge():
            yield replace(verdict, about=verdict.about or about)
    except NotObserved as exc:
        yield Verdict(Level.UNKNOWN, str(exc), about=about)
    except Exception as exc:  # noqa: BLE001 - a doctor that falls over helps nobody
        said = f"the check itself failed: {type(exc).__name__}: {exc}"
        yield Verdict(Level.UNKNOWN, said, "Please report this, it is a fault of twolane.", about)


def per_engine(
    judge: Callable[[Observations, ObservedEngine], Iterable[Verdict]], *kinds: Kind
) -> Callable[[Observations], Iterator[Verdict]]:
    """A judgement of each engine of these kinds."""

    def judged(seen: Observations) -> Iterator[Verdict]:
        servers = [server for server in require(seen.servers) if server.kind in kinds]
        if not servers:
            yield Verdict(Level.NOT_APPLICABLE, f"no {', '.join(kinds)} is configured or found")
        for server in servers:
            yield from guarded(partial(judge, seen, server), server.label)

    return judged


def format_bytes(size: float) -> str:
    """A size for people, in MiB or GiB."""
    if size < GIB:
        return f"{size / MIB:.0f} MiB"
    return f"{size / GIB:.0f} GiB" if size >= 100 * GIB else f"{size / GIB:.1f} GiB"


def has_no_nvidia(seen: Observations) -> bool:
    """Whether it is sure that there is neither an NVIDIA card nor its driver."""
    return isinstance(seen.driver, Unknown) and seen.nvidia_on_bus == 0 and not seen.driver_loaded


def cards(seen: Observations) -> tuple[Card, ...]:
    """The NVIDIA cards; raises `NotObserved` where there may be some."""
    return () if has_no_nvidia(seen) else require(seen.driver).cards


def per_card(seen: Observations, judge: Callable[[Card], Iterable[Verdict]]) -> Iterator[Verdict]:
    """The verdicts of a check that looks at one card at a time."""
    found = cards(seen)
    if not found:
        yield Verdict(Level.NOT_APPLICABLE, "no NVIDIA card")
    for card in found:
        yield from guarded(partial(judge, card), str(card))
