"""The sentences of a report that a reader should remember."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from loadtests.analysis import crossover, rows
from loadtests.analysis.crossover import Crossover
from loadtests.analysis.gateway_cost import Cost
from loadtests.analysis.rows import Cells, Row
from loadtests.analysis.spread import Spread
from loadtests.measure.experiment import Subject
from loadtests.report.page import number
from loadtests.report.wording import names, spread

#: The level that the claim is about, and the one from which it says that things get worse.
CLAIMED_AT = 16
DECLINES_AT = 32


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
        times = rows.ratio(slow, fast, "e2e")
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
        tokens = rows.ratio(b, a, "tokens") if a and b else None
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
        e2e = rows.ratio(a, b, "e2e") if a and b else None
        tokens = rows.ratio(b, a, "tokens") if a and b else None
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
    e2e = rows.ratio(below, above, "e2e")
    tokens = rows.ratio(below, above, "tokens")
    return f"a request takes {spread(e2e, 'x')} as long, tokens a second are {spread(tokens, 'x')}"


def _crossing(a: str, b: str, cells: Cells, called: Mapping[str, str]) -> Crossing:
    found = crossover.find_crossover(
        crossover.seconds_by_level(cells, a), crossover.seconds_by_level(cells, b)
    )
    return Crossing(a, b, found, found.told(called[a], called[b]))
