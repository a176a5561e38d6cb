"""The sentences of a report that a reader should remember.

Where others published a figure for another machine, it stands beside the measured one and
is never mixed with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from loadtests.analysis.crossover import Crossover, find_crossover, seconds_by_level
from loadtests.analysis.gateway_cost import GatewayCost
from loadtests.analysis.rows import Cells, Row, ratio
from loadtests.analysis.spread import Spread
from loadtests.measure.experiment import Subject
from loadtests.report.page import format_number
from loadtests.report.wording import as_sentence, display_names, format_spread

#: Concurrent requests that the published claim is about, and from which it sees a decline.
CLAIM_LEVEL = 16
DECLINE_LEVEL = 32


class Claim(msgspec.Struct, frozen=True):
    """A figure that others published for another machine, beside the measured one."""

    what: str
    claimed: str
    measured: str


class Crossing(msgspec.Struct, frozen=True):
    """The crossover of two targets, by label, with the sentence that says it."""

    a: str
    b: str
    crossover: Crossover = msgspec.field(name="found")
    sentence: str = msgspec.field(name="told")


class Headlines:
    """The sentences that a table of rows supports.

    Args:
        subjects: The targets.
        table: Every target at every level.
    """

    def __init__(self, subjects: Sequence[Subject], table: Sequence[Row]) -> None:
        self.names = display_names(subjects)
        self._by_key = {(row.target, row.level): row for row in table}
        self._engines = [one for one in subjects if not one.before]
        self._pair = self._ollama_and_vllm()
        self._level = self._headline_level()

    def headline(self) -> str:
        """The main sentence: which engine is faster, and by how much."""
        rows = [row for row in self._rows_at(self._level) if row.e2e]
        if self._pair:
            rows = [row for row in rows if row.target in self._pair]
        ordered = sorted(rows, key=lambda row: row.value("e2e") or 0.0)
        if not ordered:
            return "No request was answered"
        fast, slow = ordered[0], ordered[-1]
        if fast is slow:
            seconds = format_number(fast.value("e2e"))
            return f"With {self._concurrent} {self.names[fast.target]} answers in {seconds} s"
        return f"With {self._concurrent} {self._comparison(fast, slow)}, on this machine"

    @property
    def _concurrent(self) -> str:
        return f"{self._level} concurrent request{'s' if self._level > 1 else ''}"

    def _comparison(self, fast: Row, slow: Row) -> str:
        times = ratio(slow, fast, "e2e")
        a, b = self.names[fast.target], self.names[slow.target]
        if times is None or times.low <= 1:
            return f"the difference between {a} and {b} is not significant"
        return f"{a} answers {times.value:.{1 if times.value >= 1.1 else 2}f}x as fast as {b}"

    def other_sentences(
        self, crossings: Iterable[Crossing], costs: Iterable[GatewayCost]
    ) -> Iterator[str]:
        """The other main results, a sentence each."""
        if self._pair:
            yield from self._pair_sentences(*self._pair)
        for crossing in crossings:
            if crossing.crossover.verdict != "unknown":
                yield as_sentence(crossing.sentence)
        for cost in costs:
            if cost.level == self._level:
                noise = "; the difference is not significant" if cost.is_noise else ""
                yield (
                    f"Through {self.names[cost.gateway]}, with {self._concurrent}, the median "
                    f"answer takes {cost.e2e_s[0] / cost.e2e_s[1]:.2f}x as long as directly from "
                    f"{self.names[cost.lane]}{noise}."
                )

    def _pair_sentences(self, ollama: str, vllm: str) -> Iterator[str]:
        a, b = self._by_key.get((ollama, self._level)), self._by_key.get((vllm, self._level))
        tokens = ratio(b, a, "tokens") if a and b else None
        if tokens:
            yield (
                f"{self.names[vllm]} generates {tokens.value:.1f}x the tokens per second there, "
                f"all users together."
            )
        for other in self._engines:
            row = self._by_key.get((other.label, self._level))
            if other.engine == "ollama" and other.label != ollama and row and b:
                fast, slow = sorted((row, b), key=lambda row: row.value("e2e") or 0.0)
                yield as_sentence(f"{self._comparison(fast, slow)}, with {self._concurrent}")

    def claims(self) -> Iterator[Claim]:
        """The published claims on Ollama and vLLM, if both were measured."""
        if not self._pair:
            return
        a, b = (self._by_key.get((label, CLAIM_LEVEL)) for label in self._pair)
        ollama, vllm = (self.names[label] for label in self._pair)
        concurrent = f"{CLAIM_LEVEL} concurrent"
        yield Claim(f"E2E of a request, {concurrent}, {ollama}", "about 17 s", _e2e(a))
        yield Claim(f"E2E of a request, {concurrent}, {vllm}", "about 9 s", _e2e(b))
        e2e = ratio(a, b, "e2e") if a and b else None
        tokens = ratio(b, a, "tokens") if a and b else None
        yield Claim(
            f"Ollama's E2E over vLLM's, {concurrent}",
            "about 1.9x (17 / 9)",
            format_spread(e2e, "x"),
        )
        yield Claim(
            f"vLLM's output tokens/s over Ollama's, {concurrent}",
            "about 2x",
            format_spread(tokens, "x"),
        )
        for label, above in zip(self._pair, (a, b), strict=True):
            below = self._by_key.get((label, DECLINE_LEVEL))
            what = f"from {CLAIM_LEVEL} to {DECLINE_LEVEL} concurrent, {self.names[label]}"
            yield Claim(
                what, f"performance declines from {DECLINE_LEVEL} on", _decline(above, below)
            )

    def _ollama_and_vllm(self) -> tuple[str, str] | None:
        """Labels of Ollama, with its default slots if measured, and of vLLM."""
        ollama = sorted(
            (one for one in self._engines if one.engine == "ollama"),
            key=lambda one: one.slots not in (None, 1),
        )
        vllm = [one for one in self._engines if one.engine == "vllm"]
        return (ollama[0].label, vllm[0].label) if ollama and vllm else None

    def _headline_level(self) -> int:
        """The level of the claim, or else the highest that all compared targets have."""
        compared = self._pair or tuple(one.label for one in self._engines)
        levels = [{n for of, n in self._by_key if of == label} for label in compared]
        common = set.intersection(*[one for one in levels if one] or [set()])
        every = common or {n for _, n in self._by_key}
        return CLAIM_LEVEL if CLAIM_LEVEL in every else max(every)

    def _rows_at(self, level: int) -> list[Row]:
        engines = {one.label for one in self._engines}
        rows = [row for (label, n), row in self._by_key.items() if n == level and label in engines]
        return rows or [row for (_, n), row in self._by_key.items() if n == level]


def _e2e(row: Row | None) -> str:
    """Median E2E with its spread, in words."""
    if row is None or row.e2e is None:
        return "not measured"
    return format_spread(Spread(row.e2e.median, row.e2e.low, row.e2e.high), " s")


def _decline(above: Row | None, below: Row | None) -> str:
    """How latency and tokens per second change with twice as many concurrent requests."""
    if not above or not below:
        return "not measured"
    e2e, tokens = ratio(below, above, "e2e"), ratio(below, above, "tokens")
    return f"E2E {format_spread(e2e, 'x')}, tokens/s {format_spread(tokens, 'x')}"


def describe_crossover(a: str, b: str, cells: Cells, names: Mapping[str, str]) -> Crossing:
    """The crossover of the targets labelled `a` and `b`, with its sentence."""
    crossover = find_crossover(seconds_by_level(cells, a), seconds_by_level(cells, b))
    return Crossing(a, b, crossover, crossover.sentence(names[a], names[b]))
