"""What three load generators saw of the same servers, and whether they agree.

The other two are not ours: guidellm, and vLLM's own `bench serve`. On a server of known
times all are held to the truth as well; on a real one a run is never like the one before,
so there each is compared with who asked just before or after it, and they disagree if ours
is off in the same direction in every repetition. One that is itself too far from the truth
is told, and ours is not held against it. Who is compared by what:

| here         | ours                          | guidellm                   | bench serve         |
|--------------|-------------------------------|----------------------------|---------------------|
| TTFT         | to the first that has content | `time_to_first_token`      | `ttft`              |
| TPOT         | (last - first) / (tokens - 1) | `inter_token_latency`      | `tpot`              |
| E2E          | to the last byte              | `request_latency`          | `e2el`              |
| output tok/s | tokens in window / window     | `output_tokens_per_second` | `output_throughput` |

guidellm's own TPOT includes the wait for the first token. `bench serve` starts TTFT at the
first event with `choices`, even one that only tells the role, and ends TPOT and E2E at the
last such event. Both count ramp-up and ramp-down into tokens a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path

import msgspec

from loadtests.analysis.spread import Spread
from loadtests.measure import experiment
from loadtests.measure.experiment import Machine
from loadtests.proof.known import QUANTITIES, Times

VERSION = 1
AGREEMENT = "agreement.json"

OURS = "twolane"
KNOWN = "known"
#: How far ours may be from the truth, and from the others.
OF_TRUTH = 0.02
OF_OTHERS = 0.03


class Reading(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one tool said of one run.

    Attributes:
        tool: Who measured.
        server: What; `known` is the engine of known times.
        level: Requests at once.
        repetition: From 1.
        medians: By quantity, seconds, or tokens a second.
        requests: How many were measured.
        failed: How many went wrong.
        tokens_in: Of a prompt, mean, by the server's `usage`.
        tokens_out: Of an answer, mean, by the server's `usage`.
        late_s: How late the engine of known times was itself, median.
    """

    tool: str
    server: str
    level: int
    repetition: int
    medians: dict[str, float]
    requests: int
    failed: int = 0
    tokens_in: float = 0.0
    tokens_out: float = 0.0
    late_s: float = 0.0


class Row(msgspec.Struct, frozen=True):
    """One quantity of one server at one level, as all saw it.

    Attributes:
        truth: None where nobody knows.
        by_tool: Ours is among them.
        shares: Ours as a share of each other's, repetition by repetition.
    """

    server: str
    level: int
    quantity: str
    truth: float | None
    by_tool: dict[str, Spread]
    shares: dict[str, Spread]

    def to_truth(self, tool: str) -> float | None:
        """What the tool saw as a share of the truth."""
        return None if self.truth is None else self.by_tool[tool].value / self.truth

    def is_stray(self, tool: str) -> bool:
        """Whether the tool is too far from the truth itself to hold another against."""
        of_truth = self.to_truth(tool)
        return of_truth is not None and abs(of_truth - 1) > OF_TRUTH

    def disagreements(self) -> Iterator[str]:
        """Where ours is off by more than it may be, in words."""
        if self.is_stray(OURS):
            yield self._told(OURS)
        for tool, share in self.shares.items():
            near = abs(share.value - 1) <= OF_OTHERS
            by_chance = self.truth is None and share.low <= 1 <= share.high
            if not near and not by_chance and not self.is_stray(tool):
                yield f"{self._where}: {share.value:.3f} of what {tool} saw"

    def strays(self) -> Iterator[str]:
        """Who of the others is too far from the truth, in words."""
        for tool in self.by_tool:
            if tool != OURS and self.is_stray(tool):
                yield self._told(tool)

    def _told(self, tool: str) -> str:
        return f"{self._where}: {tool} saw {self.to_truth(tool):.3f} of the truth"

    @property
    def _where(self) -> str:
        return f"{self.quantity} at {self.level} on {self.server}"


class Agreement(msgspec.Struct, frozen=True, omit_defaults=True):
    """All readings, and how they came about.

    Attributes:
        at: Unix time.
        machine: Where.
        times: What the engine of known times kept to.
        rounds: Measured requests of each of those at once.
        tokens_in: Of a prompt, about.
        tokens_out: Of an answer.
        tools: Who measured, with version.
        readings: In the order in which they were made.
    """

    version: int
    at: float
    machine: Machine
    times: Times
    rounds: int
    tokens_in: int
    tokens_out: int
    tools: dict[str, str]
    readings: tuple[Reading, ...] = ()

    def rows(self) -> list[Row]:
        """Quantity by quantity, by server and level; a run without requests counts for nothing."""
        rows = []
        good = sorted(
            (one for one in self.readings if one.requests),
            key=lambda one: (one.server, one.level),
        )
        for (server, level), group in groupby(good, key=lambda one: (one.server, one.level)):
            runs: dict[str, dict[int, Reading]] = {}
            for one in group:
                runs.setdefault(one.tool, {})[one.repetition] = one
            truths = self.times.truth(level) if server == KNOWN else {}
            if OURS in runs:
                rows += [_row(server, level, name, truths.get(name), runs) for name in QUANTITIES]
        return rows

    def disagreements(self) -> list[str]:
        """Where ours is off by more than it may be, in words; nothing if nowhere."""
        return [said for row in self.rows() for said in row.disagreements()]

    def strays(self) -> list[str]:
        """Where another is too far from the truth itself to hold ours against, in words."""
        return [said for row in self.rows() for said in row.strays()]

    def save(self, folder: Path) -> None:
        """Write it into a folder.

        Raises:
            ExperimentError: It cannot be written.
        """
        experiment.write(folder / AGREEMENT, self)


def _row(
    server: str,
    level: int,
    quantity: str,
    truth: float | None,
    runs: Mapping[str, Mapping[int, Reading]],
) -> Row:
    """One quantity, of runs by tool and repetition."""
    seen = {
        tool: {repetition: run.medians[quantity] for repetition, run in of.items()}
        for tool, of in runs.items()
    }
    ours = seen[OURS]
    pairs = {
        tool: [ours[n] / theirs[n] for n in theirs.keys() & ours.keys()]
        for tool, theirs in seen.items()
        if tool != OURS
    }
    return Row(
        server,
        level,
        quantity,
        truth,
        {tool: Spread.of([*of.values()]) for tool, of in seen.items()},
        {tool: Spread.of(shares) for tool, shares in pairs.items() if shares},
    )


def load(folder: Path) -> Agreement:
    """The agreement of a folder.

    Raises:
        ExperimentError: There is none, or not one of this version.
    """
    return experiment.read(
        folder / AGREEMENT, Agreement, VERSION, else_do="run `make agreement` again"
    )
