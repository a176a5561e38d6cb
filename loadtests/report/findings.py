"""What an experiment found, whole and in words: the content of `report.json`.

Nothing is read or written here. Where a figure is claimed by others it stands beside the
measured one and is never mixed with it; where something is not known, that is what is said.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias
from urllib.parse import urlsplit

import msgspec

from loadtests.measure.samples import Power
from loadtests.proof.agreement import Agreement
from loadtests.proof.selfcheck import SelfCheck
from loadtests.report import analysis
from loadtests.report.analysis import Cells, Cost, Crossover, Energy, Kept, Row, Spread
from loadtests.report.experiment import Experiment, Subject
from loadtests.report.page import number

VERSION = 1

#: The level that the claim is about, and the one from which it says that things get worse.
CLAIMED_AT = 16
DECLINES_AT = 32
#: How far prompts of two targets may differ by their own counts, and shares that ended early.
LIKE = 0.1
EARLY = 0.05

Verdict: TypeAlias = Literal["fair", "not fair", "not known"]


class Claim(msgspec.Struct, frozen=True):
    """A figure that others published for another machine, beside what was measured here."""

    what: str
    claimed: str
    measured: str


class Crossing(msgspec.Struct, frozen=True):
    """Where the faster one of two targets changes; `told` is that in words."""

    a: str
    b: str
    found: Crossover
    told: str


class Judgement(msgspec.Struct, frozen=True):
    """Whether something was equal for all, and how it was."""

    what: str
    verdict: Verdict
    why: str


class Findings(msgspec.Struct, frozen=True, omit_defaults=True):
    """All of it. Seconds, tokens and requests are by the formulas of the report.

    Attributes:
        doubts: Why this should not have been written; empty as a rule.
        headline: The one sentence to remember.
        short: What else there is to remember.
        energy: Watts, and what tokens cost, as far as it is known.
    """

    version: int
    doubts: tuple[str, ...]
    headline: str
    short: tuple[str, ...]
    experiment: Experiment
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    kept: tuple[Kept, ...]
    crossings: tuple[Crossing, ...]
    costs: tuple[Cost, ...]
    fairness: tuple[Judgement, ...]
    selfcheck: SelfCheck | None = None
    agreement: Agreement | None = None
    energy: tuple[Energy, ...] = ()


def find(
    experiment: Experiment,
    cells: Cells,
    doubts: Iterable[str],
    selfcheck: SelfCheck | None,
    agreement: Agreement | None,
    powers: Sequence[Power] = (),
) -> Findings:
    """All that the cells say.

    Args:
        experiment: What was measured.
        cells: At least one, as `analysis.closed_cells` has them.
        doubts: What is wrong with the stopwatch; what is wrong with a cell is added.
        selfcheck: What the stopwatch was held to.
        agreement: What other tools saw.
        powers: What the cards drew.
    """
    table = analysis.rows(cells, tokens_out=experiment.plan.tokens_out, limits=experiment.limits)
    subjects = _subjects(experiment, table)
    sight = Sight(subjects, table)
    engines = [one for one in subjects if not one.before]
    crossings = tuple(
        _crossing(a.label, b.label, cells, sight.names)
        for a, b in itertools.combinations(engines, 2)
        if a.engine != b.engine or not a.engine
    )
    costs = tuple(
        cost
        for one in subjects
        if one.before
        for cost in analysis.costs(table, one.label, one.before)
    )
    judgements = tuple(fairness(subjects, table))
    return Findings(
        version=VERSION,
        doubts=(*doubts, *filter(None, (row.saturation() for row in table))),
        headline=sight.headline(),
        short=(*sight.short(crossings, costs), *_unequal(judgements)),
        experiment=msgspec.structs.replace(experiment, subjects=tuple(subjects)),
        rows=tuple(table),
        claims=tuple(sight.claims()),
        kept=tuple(analysis.kept(table)),
        crossings=crossings,
        costs=costs,
        fairness=judgements,
        selfcheck=selfcheck,
        agreement=agreement,
        energy=tuple(analysis.energy(table, powers, experiment.cost)),
    )


def _subjects(experiment: Experiment, table: Sequence[Row]) -> list[Subject]:
    """Those of the experiment, and those that only the raw file knows."""
    known = {one.label: one for one in experiment.subjects}
    strangers = {row.target for row in table} - known.keys()
    return [*known.values(), *(Subject(label, "", "") for label in sorted(strangers))]


def names(subjects: Iterable[Subject]) -> dict[str, str]:
    """What a target is called in a sentence, by label."""
    found: dict[str, str] = {}
    for one in subjects:
        name = one.label
        if one.engine == "ollama":
            name = "Ollama"
            if one.slots:
                name += " as installed" if one.slots == 1 else f" with {one.slots} slots"
        elif one.engine == "vllm":
            name = "vLLM"
        elif one.before:
            name = "the gateway"
        found[one.label] = name if name not in found.values() else f"{name} ({one.label})"
    return found


def spread(seen: Spread | None, unit: str = "") -> str:
    """A value, and what its repetitions were, where they can be told apart."""
    if seen is None:
        return "-"
    low, value, high = number(seen.low), number(seen.value), number(seen.high)
    return f"{value}{unit}" if low == high else f"{value}{unit} ({low} to {high})"


class Sight:
    """A table of rows, and what there is to be said of it in sentences.

    Args:
        subjects: Whom it is about.
        table: Every target at every level.
    """

    def __init__(self, subjects: Sequence[Subject], table: Sequence[Row]) -> None:
        self.names = names(subjects)
        self._by_key = {(row.target, row.level): row for row in table}
        self._engines = [one for one in subjects if not one.before]
        self._pair = self._ollama_and_vllm()
        self._level = self._telling_level()

    def headline(self) -> str:
        """The sentence to remember: who is how much faster, where the claim is about."""
        rows = [row for row in self._seen(self._level) if row.e2e]
        if self._pair:
            rows = [row for row in rows if row.target in self._pair]
        ordered = sorted(rows, key=lambda row: row.value("e2e") or 0.0)
        if not ordered:
            return "Nothing was answered"
        fast, slow = ordered[0], ordered[-1]
        if fast is slow:
            taken = number(fast.value("e2e"))
            return f"At {self._level} at once {self.names[fast.target]} answers in {taken} s"
        return f"At {self._level} at once {self._compared(fast, slow)}, on this machine"

    def _compared(self, fast: Row, slow: Row) -> str:
        times = analysis.ratio(slow, fast, "e2e")
        a, b = self.names[fast.target], self.names[slow.target]
        if times is None or times.low <= 1:
            return f"{a} and {b} cannot be told apart"
        return f"{a} answers {times.value:.{1 if times.value >= 1.1 else 2}f}x as fast as {b}"

    def short(self, crossings: Iterable[Crossing], costs: Iterable[Cost]) -> Iterator[str]:
        """What else there is to remember, a sentence each."""
        if self._pair:
            yield from self._of_the_pair(*self._pair)
        for one in crossings:
            if one.found.verdict != "unknown":
                yield f"{one.told[0].upper()}{one.told[1:]}."
        for cost in costs:
            if cost.level == self._level:
                covered = ", which is within the spread of the repetitions" if cost.is_noise else ""
                yield (
                    f"Through {self.names[cost.gateway]}, at {cost.level} at once, the median "
                    f"answer takes {cost.e2e_s[0] / cost.e2e_s[1]:.2f}x as long as straight from "
                    f"{self.names[cost.lane]}{covered}."
                )

    def _of_the_pair(self, ollama: str, vllm: str) -> Iterator[str]:
        a, b = self._by_key.get((ollama, self._level)), self._by_key.get((vllm, self._level))
        tokens = analysis.ratio(b, a, "tokens") if a and b else None
        if tokens:
            yield (
                f"{self.names[vllm]} puts out {tokens.value:.1f}x the tokens a second there, "
                f"all users together."
            )
        for other in self._engines:
            row = self._by_key.get((other.label, self._level))
            if other.engine == "ollama" and other.label != ollama and row and b:
                fast, slow = sorted((row, b), key=lambda one: one.value("e2e") or 0.0)
                yield f"{self._compared(fast, slow)}, at {self._level} at once."

    def claims(self) -> Iterator[Claim]:
        """What is claimed of Ollama and vLLM, where these were measured."""
        if not self._pair:
            return
        a, b = (self._by_key.get((label, CLAIMED_AT)) for label in self._pair)
        ollama, vllm = (self.names[label] for label in self._pair)
        at = f"at {CLAIMED_AT} at once"
        yield Claim(f"a request {at}, {ollama}", "about 17 s", _e2e(a))
        yield Claim(f"a request {at}, {vllm}", "about 9 s", _e2e(b))
        e2e = analysis.ratio(a, b, "e2e") if a and b else None
        tokens = analysis.ratio(b, a, "tokens") if a and b else None
        yield Claim(
            f"vLLM answers so many times as fast {at}", "about 1.9x (17 / 9)", spread(e2e, "x")
        )
        yield Claim(f"vLLM's tokens a second {at}, over Ollama's", "about 2x", spread(tokens, "x"))
        for label, above in zip(self._pair, (a, b), strict=True):
            below = self._by_key.get((label, DECLINES_AT))
            what = f"from {CLAIMED_AT} to {DECLINES_AT} at once, {self.names[label]}"
            yield Claim(what, f"it declines from {DECLINES_AT} on", _decline(above, below))

    def _ollama_and_vllm(self) -> tuple[str, str] | None:
        """Labels of Ollama, as installed if it is there, and of vLLM."""
        ollama = sorted(
            (one for one in self._engines if one.engine == "ollama"),
            key=lambda one: one.slots not in (None, 1),
        )
        vllm = [one for one in self._engines if one.engine == "vllm"]
        return (ollama[0].label, vllm[0].label) if ollama and vllm else None

    def _telling_level(self) -> int:
        """Where the claim is about, or else the highest that all compared have."""
        compared = self._pair or tuple(one.label for one in self._engines)
        levels = [{n for of, n in self._by_key if of == label} for label in compared]
        there = set.intersection(*[one for one in levels if one] or [set()])
        every = there or {n for _, n in self._by_key}
        return CLAIMED_AT if CLAIMED_AT in every else max(every)

    def _seen(self, level: int) -> list[Row]:
        engines = {one.label for one in self._engines}
        rows = [row for (label, n), row in self._by_key.items() if n == level and label in engines]
        return rows or [row for (_, n), row in self._by_key.items() if n == level]


def _e2e(row: Row | None) -> str:
    """Median E2E, as the claim is understood."""
    if row is None or row.e2e is None:
        return "not measured"
    return spread(Spread(row.e2e.median, row.e2e.low, row.e2e.high), " s")


def _decline(above: Row | None, below: Row | None) -> str:
    """What twice as many at once did to latency and tokens."""
    if not above or not below:
        return "not measured"
    e2e = analysis.ratio(below, above, "e2e")
    tokens = analysis.ratio(below, above, "tokens")
    return f"a request takes {spread(e2e, 'x')} as long, tokens a second are {spread(tokens, 'x')}"


def _crossing(a: str, b: str, cells: Cells, called: Mapping[str, str]) -> Crossing:
    found = analysis.crossover(analysis.seconds(cells, a), analysis.seconds(cells, b))
    return Crossing(a, b, found, found.told(called[a], called[b]))


# --- what was fair ------------------------------------------------------------------------


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
    enough = fewest >= analysis.REPETITIONS
    why = f"at least {fewest} of everything"
    if not enough:
        why += f"; fewer than {analysis.REPETITIONS} show no spread"
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
