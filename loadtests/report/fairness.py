"""Was the comparison fair? What was equal for all targets, what was not, and what is unknown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias
from urllib.parse import urlsplit

import msgspec

from loadtests.analysis import crossover
from loadtests.analysis.rows import Row
from loadtests.measure.experiment import Subject

#: Largest relative difference of the prompt tokens of two targets, by their own counts.
MAX_PROMPT_DIFFERENCE = 0.1
#: Largest difference of the shares of answers that ended early.
MAX_ENDED_EARLY_DIFFERENCE = 0.05
Verdict: TypeAlias = Literal["fair", "not fair", "not known"]


class Judgement(msgspec.Struct, frozen=True):
    """Whether one condition was equal for all targets, and what it was."""

    what: str
    verdict: Verdict
    why: str


def fairness(subjects: Sequence[Subject], table: Sequence[Row]) -> Iterator[Judgement]:
    """The judgement of every condition."""
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
            f"{who} sent no usage: there a chunk counts as a token",
        )


def unequal_sentences(judgements: Iterable[Judgement]) -> Iterator[str]:
    """The sentences on unfair conditions that belong beside the headline."""
    if any((one.what, one.verdict) == ("repetitions", "not fair") for one in judgements):
        yield "Too few repetitions: how much of this is chance is not known."
    unequal = [one.what for one in judgements if one.verdict == "not fair"]
    if unequal:
        yield f"Not equal for all: {', '.join(unequal)}; see below for what that means."


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{label}: {value or 'not known'}" for label, value in values.items())


def _equal(what: str, values: Mapping[str, str]) -> Judgement:
    """Fair if all targets have the same value."""
    if not all(values.values()):
        return Judgement(what, "not known", _listed(values))
    if len(set(values.values())) == 1:
        return Judgement(what, "fair", f"{next(iter(values.values()))}, all of them")
    return Judgement(what, "not fair", _listed(values))


def _slots(engines: Sequence[Subject], highest: int) -> Judgement:
    """Fair if all have as many slots; with fewer slots than requests an engine queues."""
    slots = {one.label: str(one.slots or "") for one in engines}
    if not all(slots.values()):
        return Judgement("slots", "not known", _listed(slots))
    short = [one for one in engines if (one.slots or 0) < highest]
    if not short:
        return Judgement(
            "slots", "fair", f"{_listed(slots)}; at most {highest} concurrent requests"
        )
    queueing = ", ".join(one.label for one in short)
    return Judgement(
        "slots",
        "fair" if len({one.slots for one in engines}) == 1 else "not fair",
        f"{_listed(slots)}; with more concurrent requests than slots, requests queue in {queueing}",
    )


def _prompts(table: Iterable[Row]) -> Judgement:
    """Fair if the prompts have about as many tokens by the servers' counts, templates included."""
    by_target: dict[str, list[float]] = {}
    for row in table:
        if row.tokens_in:
            by_target.setdefault(row.target, []).append(row.tokens_in)
    means = {label: sum(of) / len(of) for label, of in by_target.items()}
    if not means:
        return Judgement("prompts", "not known", "no server counted their tokens")
    text = ", ".join(f"{label}: {tokens:.0f} tokens" for label, tokens in means.items())
    alike = max(means.values()) <= (1 + MAX_PROMPT_DIFFERENCE) * min(means.values())
    why = f"{text}, by their own count; every prompt has a prefix of its own, so no cache helps"
    return Judgement("prompts", "fair" if alike else "not fair", why)


def _lengths(table: Iterable[Row]) -> Judgement:
    """Fair if about as many answers of each target ended early."""
    by_target: dict[str, list[Row]] = {}
    for row in table:
        by_target.setdefault(row.target, []).append(row)
    shares = {
        label: sum(row.ended_early for row in rows) / max(1, sum(row.answered for row in rows))
        for label, rows in by_target.items()
    }
    text = ", ".join(f"{label}: {share:.0%}" for label, share in shares.items())
    alike = max(shares.values()) - min(shares.values()) <= MAX_ENDED_EARLY_DIFFERENCE
    why = f"ended before the requested number of tokens: {text}"
    return Judgement("length of answers", "fair" if alike else "not fair", why)


def _order(table: Iterable[Row]) -> Judgement:
    """Fair if the first target alternates; else a drift of the machine falls on one target."""
    starts: dict[int, dict[str, float]] = {}
    for row in table:
        for repetition in row.repetitions:
            by_target = starts.setdefault(repetition.number, {})
            earlier = by_target.get(row.target, repetition.began)
            by_target[row.target] = min(repetition.began, earlier)
    firsts = [min(of, key=lambda label: of[label]) for _, of in sorted(starts.items())]
    targets = {label for by_target in starts.values() for label in by_target}
    alternates = len(set(firsts)) > 1 or len(targets) == 1
    why = f"first in each repetition: {', '.join(firsts)}; one at a time"
    return Judgement("order", "fair" if alternates else "not fair", why)


def _repeated(table: Iterable[Row]) -> Judgement:
    """Fair if every row has enough repetitions to show a spread."""
    fewest = min(len(row.repetitions) for row in table)
    enough = fewest >= crossover.MIN_REPETITIONS
    why = f"at least {fewest} of every cell"
    if not enough:
        why += f"; fewer than {crossover.MIN_REPETITIONS} show no spread"
    return Judgement("repetitions", "fair" if enough else "not fair", why)


def _failures(table: Iterable[Row]) -> Judgement:
    """Fair if no request failed or was cancelled."""
    lost: dict[str, int] = {}
    for row in table:
        lost[row.target] = lost.get(row.target, 0) + row.failed + row.cut
    counts = ", ".join(f"{label}: {count}" for label, count in lost.items() if count)
    if not counts:
        return Judgement("failures", "fair", "none")
    why = f"{counts}; a failed or cancelled request has no latency, which favours its target"
    return Judgement("failures", "not fair", why)


def _load(subjects: Iterable[Subject]) -> Judgement:
    """Fair if the load generator ran on the machine of all targets, or of none."""
    hosts = {one.label: urlsplit(one.url).hostname or "" for one in subjects}
    local = {label: host in {"127.0.0.1", "localhost", "::1"} for label, host in hosts.items()}
    if not all(hosts.values()):
        return Judgement("load generator", "not known", _listed(hosts))
    if all(local.values()):
        why = "on the same machine as the engines: it takes a little CPU time from all alike"
        return Judgement("load generator", "fair", why)
    if not any(local.values()):
        return Judgement(
            "load generator", "fair", "on another machine: all times include the network"
        )
    remote = ", ".join(label for label, is_local in local.items() if not is_local)
    why = f"on the same machine as all but {remote}: only their times include the network"
    return Judgement("load generator", "not fair", why)
