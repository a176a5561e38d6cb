"""What three load generators saw of the same servers, and whether they agree.

The other two are not ours: guidellm, and vLLM's own `bench serve`. On a server of known
times all are held to the truth as well; on a real one a run is never like the one before,
so there they agree if what they saw overlaps from run to run. One that is itself too far from
the truth is told, and ours is not held against it. Who is compared by what:

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

import statistics
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import msgspec

from loadtests.experiment import ExperimentError, Machine
from loadtests.known import Times

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


class Seen(msgspec.Struct, frozen=True):
    """A tool's median over the repetitions, and the lowest and highest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Seen:
        return cls(statistics.median(values), min(values), max(values))

    def overlaps(self, other: Seen) -> bool:
        """Whether there are runs of both that cannot be told apart."""
        return self.low <= other.high and other.low <= self.high


class Row(msgspec.Struct, frozen=True):
    """One quantity of one server at one level, as all saw it.

    Attributes:
        truth: None where nobody knows.
        by_tool: Ours is among them.
    """

    server: str
    level: int
    quantity: str
    truth: float | None
    by_tool: dict[str, Seen]

    def against(self, tool: str) -> float:
        """Ours, as a share of what this tool saw."""
        return self.by_tool[OURS].median / self.by_tool[tool].median

    def to_truth(self, tool: str) -> float | None:
        """What the tool saw as a share of the truth."""
        return None if self.truth is None else self.by_tool[tool].median / self.truth

    def is_stray(self, tool: str) -> bool:
        """Whether the tool is too far from the truth itself to hold another against."""
        of_truth = self.to_truth(tool)
        return of_truth is not None and abs(of_truth - 1) > OF_TRUTH

    def disagreements(self) -> Iterator[str]:
        """Where ours is off by more than it may be, in words."""
        ours = self.by_tool[OURS]
        if self.is_stray(OURS):
            yield self._told(OURS)
        for tool, seen in self.by_tool.items():
            near = abs(self.against(tool) - 1) <= OF_OTHERS
            apart = not ours.overlaps(seen) if self.truth is None else not self.is_stray(tool)
            if not near and apart:
                yield f"{self._where}: {self.against(tool):.3f} of what {tool} saw"

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
            runs = list(group)
            if not any(run.tool == OURS for run in runs):
                continue
            for quantity in runs[0].medians:
                by_tool = {
                    tool: Seen.of([run.medians[quantity] for run in runs if run.tool == tool])
                    for tool in self.tools
                    if any(run.tool == tool for run in runs)
                }
                truth = self.times.truth(level)[quantity] if server == KNOWN else None
                rows.append(Row(server, level, quantity, truth, by_tool))
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
        path = folder / AGREEMENT
        try:
            folder.mkdir(parents=True, exist_ok=True)
            whole = path.with_suffix(".new")
            whole.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))
            whole.replace(path)
        except OSError as exc:
            raise ExperimentError(f"{path} cannot be written: {exc.strerror}") from exc


class _Versioned(msgspec.Struct):
    version: int


def load(folder: Path) -> Agreement:
    """The agreement of a folder.

    Raises:
        ExperimentError: There is none, or not one of this version.
    """
    path = folder / AGREEMENT
    try:
        said = path.read_bytes()
        if msgspec.json.decode(said, type=_Versioned).version != VERSION:
            raise ExperimentError(f"{path} is of another version: run `make agreement` again")
        return msgspec.json.decode(said, type=Agreement)
    except OSError as exc:
        raise ExperimentError(f"{path} cannot be read: {exc.strerror}") from exc
    except msgspec.DecodeError as exc:
        raise ExperimentError(f"{path} is no agreement: {exc}") from exc
