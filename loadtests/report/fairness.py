"""What was equal for all targets, what was not, and what is not known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias
from urllib.parse import urlsplit

import msgspec

from loadtests.analysis import crossover
from loadtests.analysis.rows import Row
from loadtests.measure.experiment import Subject

#: How far prompts of two targets may differ by their own counts, and shares that ended early.
LIKE = 0.1
EARLY = 0.05
Verdict: TypeAlias = Literal["fair", "not fair", "not known"]


class Judgement(msgspec.Struct, frozen=True):
    """Whether something was equal for all, and how it was."""

    what: str
    verdict: Verdict
    why: str


def fairness(subjects: Sequence[Subject], table: Sequence[Row]) -> Iterator[Judgement]:
    """What was equal for all, what was not, and what nobody can tell."""
    engines = [one for one in subjects if not one.before]
    yield _equal("weights and precision", {one.label: one.weights for one in engines})
    yield _slots(engines, max(row.level for row in table))
    contexts = {one.label: f"{one.context} tokens" if one.context else "" for one in engines}
    yield _equal("context", contexts)
    yield _prompts(table)
    yield _lengths(table)
    yield _order(table)
    yield _repeated(table)
    yield _load(subjects)
    yield _failures(table)
    if any(row.uncounted for row in table):
        who = ", ".join(sorted({row.target for row in table if row.uncounted}))
        yield Judgement(
            "counting tokens",
            "not fair",
            f"{who} told no usage: there a chunk counts as a token",
        )


def _unequal(judgements: Iterable[Judgement]) -> Iterator[str]:
    """What must be said beside every headline."""
    if any((one.what, one.verdict) == ("repetitions", "not fair") for one in judgements):
        yield "Repeated too little: how much of this is chance is not known."
    unequal = [one.what for one in judgements if one.verdict == "not fair"]
    if unequal:
        yield f"Not equal for all: {', '.join(unequal)}. What that means is told below."


def _listed(told: Mapping[str, str]) -> str:
    return ", ".join(f"{label}: {what or 'not known'}" for label, what in told.items())


def _equal(what: str, told: Mapping[str, str]) -> Judgement:
    """Whether all say the same."""
    if not all(told.values()):
        return Judgement(what, "not known", _listed(told))
    if len(set(told.values())) == 1:
        return Judgement(what, "fair", f"{next(iter(told.values()))}, all of them")
    return Judgement(what, "not fair", _listed(told))


def _slots(engines: Sequence[Subject], highest: int) -> Judgement:
    """Whoever has fewer slots than requests lets them wait."""
    told = {one.label: str(one.slots or "") for one in engines}
    if not all(told.values()):
        return Judgement("slots", "not known", _listed(told))
    short = [one for one in engines if (one.slots or 0) < highest]
    if not short:
        return Judgement("slots", "fair", f"{_listed(told)}; at most {highest} were asked at once")
    waits = ", ".join(one.label for one in short)
    return Judgement(
        "slots",
        "fair" if len({one.slots for one in engines}) == 1 else "not fair",
        f"{_listed(told)}; with more at once than that, requests wait in {waits}",
    )


def _prompts(table: Iterable[Row]) -> Judgement:
    """By the servers' own counts, which templates are part of."""
    by_target: dict[str, list[float]] = {}
    for row in table:
        if row.tokens_in:
            by_target.setdefault(row.target, []).append(row.tokens_in)
    told = {label: sum(of) / len(of) for label, of in by_target.items()}
    if not told:
        return Judgement("prompts", "not known", "no server counted their tokens")
    text = ", ".join(f"{label}: {tokens:.0f} tokens" for label, tokens in told.items())
    like = max(told.values()) <= (1 + LIKE) * min(told.values())
    why = f"{text}, by their own count; each begins differently, so no cache helps"
    return Judgement("prompts", "fair" if like else "not fair", why)


def _lengths(table: Iterable[Row]) -> Judgement:
    by_target: dict[str, list[Row]] = {}
    for row in table:
        by_target.setdefault(row.target, []).append(row)
    shares = {
        label: sum(row.early for row in rows) / max(1, sum(row.answered for row in rows))
        for label, rows in by_target.items()
    }
    text = ", ".join(f"{label}: {share:.0%}" for label, share in shares.items())
    like = max(shares.values()) - min(shares.values()) <= EARLY
    why = f"ended before they had the tokens asked for: {text}"
    return Judgement("length of answers", "fair" if like else "not fair", why)


def _order(table: Iterable[Row]) -> Judgement:
    """Who was first must change, or what the machine does over time falls on one of them."""
    began: dict[int, dict[str, float]] = {}
    for row in table:
        for one in row.repetitions:
            first = began.setdefault(one.number, {})
            first[row.target] = min(one.began, first.get(row.target, one.began))
    firsts = [min(its, key=lambda label: its[label]) for _, its in sorted(began.items())]
    targets = {label for its in began.values() for label in its}
    turns = len(set(firsts)) > 1 or len(targets) == 1
    why = f"first in each repetition: {', '.join(firsts)}; one at a time"
    return Judgement("order", "fair" if turns else "not fair", why)


def _repeated(table: Iterable[Row]) -> Judgement:
    fewest = min(len(row.repetitions) for row in table)
    enough = fewest >= crossover.REPETITIONS
    why = f"at least {fewest} of everything"
    if not enough:
        why += f"; fewer than {crossover.REPETITIONS} show no spread"
    return Judgement("repetitions", "fair" if enough else "not fair", why)


def _failures(table: Iterable[Row]) -> Judgement:
    lost: dict[str, int] = {}
    for row in table:
        lost[row.target] = lost.get(row.target, 0) + row.failed + row.cut
    told = ", ".join(f"{label}: {count}" for label, count in lost.items() if count)
    if not told:
        return Judgement("failures", "fair", "none")
    why = f"{told}; a request that failed or was cut has no latency, which flatters who lost it"
    return Judgement("failures", "not fair", why)


def _load(subjects: Iterable[Subject]) -> Judgement:
    """Where the load came from: on the machine of the engines it takes some of what they need."""
    hosts = {one.label: urlsplit(one.url).hostname or "" for one in subjects}
    here = {label: host in {"127.0.0.1", "localhost", "::1"} for label, host in hosts.items()}
    if not all(hosts.values()):
        return Judgement("load generator", "not known", _listed(hosts))
    if all(here.values()):
        why = "on the machine of the engines: it takes a little of it from all alike"
        return Judgement("load generator", "fair", why)
    if not any(here.values()):
        return Judgement(
            "load generator", "fair", "on another machine: the network is in all times"
        )
    far = ", ".join(label for label, is_here in here.items() if not is_here)
    why = f"on its machine for all but {far}: the network is in their times alone"
    return Judgement("load generator", "not fair", why)
