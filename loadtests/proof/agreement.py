"""The figures of three load generators for the same servers, and whether they agree.

The other two are guidellm and vLLM's own `bench serve`. On a server of known times all are
compared with the truth as well. On a real server no run is like the one before, so tools are
compared within a repetition, and they disagree if ours deviates in the same direction in
every repetition. A tool that deviates too far from the truth itself is reported as an
outlier, and ours is not compared with it. The compared quantities:

| here         | ours                          | guidellm                   | bench serve         |
|--------------|-------------------------------|----------------------------|---------------------|
| TTFT         | to the first that has content | `time_to_first_token`      | `ttft`              |
| TPOT         | (last - first) / (tokens - 1) | `inter_token_latency`      | `tpot`              |
| E2E          | to the last byte              | `request_latency`          | `e2el`              |
| output tok/s | tokens in window / window     | `output_tokens_per_second` | `output_throughput` |

guidellm's own TPOT includes the wait for the first token. `bench serve` starts TTFT at the
first event with `choices`, even one that has only the role, and ends TPOT and E2E at the
last such event. Both include ramp-up and ramp-down in tokens/s.
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

AGREEMENT_VERSION = 1
AGREEMENT = "agreement.json"

OURS = "twolane"
KNOWN = "known"
#: How far our figures may deviate from the truth, and from the other tools'.
TRUTH_TOLERANCE = 0.02
TOOL_TOLERANCE = 0.03


class Reading(msgspec.Struct, frozen=True, omit_defaults=True):
    """The figures of one tool for one run.

    Attributes:
        tool: The tool that measured.
        server: The measured server; `known` is the server of known times.
        level: Concurrent requests.
        repetition: Counted from 1.
        medians: By quantity, seconds, or tokens per second.
        requests: Measured requests.
        failed: Failed requests.
        tokens_in: Tokens of a prompt by the server's `usage`, mean.
        tokens_out: Tokens of an answer by the server's `usage`, mean.
        late_s: Lag of the server of known times itself, median.
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


class AgreementRow(msgspec.Struct, frozen=True):
    """One quantity of one server at one level, by every tool.

    Attributes:
        truth: The true value; None for a real server.
        by_tool: The figures of every tool, ours included.
        shares: Our figure as a share of each other tool's, within each repetition.
    """

    server: str
    level: int
    quantity: str
    truth: float | None
    by_tool: dict[str, Spread]
    shares: dict[str, Spread]

    def share_of_truth(self, tool: str) -> float | None:
        """A tool's figure as a share of the truth; None if that is not known."""
        return None if self.truth is None else self.by_tool[tool].value / self.truth

    def is_outlier(self, tool: str) -> bool:
        """Whether a tool deviates too far from the truth to be a reference."""
        of_truth = self.share_of_truth(tool)
        return of_truth is not None and abs(of_truth - 1) > TRUTH_TOLERANCE

    def disagreements(self) -> Iterator[str]:
        """Where our figure deviates by more than it may, in words."""
        if self.is_outlier(OURS):
            yield self._deviation(OURS)
        for tool, share in self.shares.items():
            near = abs(share.value - 1) <= TOOL_TOLERANCE
            by_chance = self.truth is None and share.low <= 1 <= share.high
            if not near and not by_chance and not self.is_outlier(tool):
                yield f"{self._where}: {share.value:.3f} of {tool}'s figure"

    def outliers(self) -> Iterator[str]:
        """The other tools that deviate too far from the truth, in words."""
        for tool in self.by_tool:
            if tool != OURS and self.is_outlier(tool):
                yield self._deviation(tool)

    def _deviation(self, tool: str) -> str:
        return f"{self._where}: {tool} measured {self.share_of_truth(tool):.3f} of the truth"

    @property
    def _where(self) -> str:
        return f"{self.quantity} at concurrency {self.level} on {self.server}"


class Agreement(msgspec.Struct, frozen=True, omit_defaults=True):
    """All readings of a comparison of tools, and its conditions.

    Attributes:
        at: Unix time.
        machine: The machine it ran on.
        times: The true times of the server of known times.
        rounds: Measured requests per user.
        tokens_in: Tokens of a prompt, about.
        tokens_out: Tokens of an answer.
        tools: The tools by name, with version.
        readings: In the order of the runs.
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

    def rows(self) -> list[AgreementRow]:
        """The rows by server, level and quantity; a run without requests is left out."""
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
                rows += [
                    _agreement_row(server, level, name, truths.get(name), runs)
                    for name in QUANTITIES
                ]
        return rows

    def disagreements(self) -> list[str]:
        """Where our figures deviate by more than they may, in words."""
        return [text for row in self.rows() for text in row.disagreements()]

    def outliers(self) -> list[str]:
        """Where another tool deviates too far from the truth to be a reference, in words."""
        return [text for row in self.rows() for text in row.outliers()]

    def save(self, folder: Path) -> None:
        """Write the agreement into the folder of an experiment.

        Raises:
            ExperimentError: The file cannot be written.
        """
        experiment.write(folder / AGREEMENT, self)


def _agreement_row(
    server: str,
    level: int,
    quantity: str,
    truth: float | None,
    runs: Mapping[str, Mapping[int, Reading]],
) -> AgreementRow:
    """The row of one quantity; `runs` are by tool and repetition."""
    medians = {
        tool: {repetition: run.medians[quantity] for repetition, run in of.items()}
        for tool, of in runs.items()
    }
    ours = medians[OURS]
    pairs = {
        tool: [ours[n] / theirs[n] for n in theirs.keys() & ours.keys()]
        for tool, theirs in medians.items()
        if tool != OURS
    }
    return AgreementRow(
        server,
        level,
        quantity,
        truth,
        {tool: Spread.of([*of.values()]) for tool, of in medians.items()},
        {tool: Spread.of(shares) for tool, shares in pairs.items() if shares},
    )


def load(folder: Path) -> Agreement:
    """The agreement in the folder of an experiment.

    Raises:
        ExperimentError: There is none, or it is of another version.
    """
    return experiment.read(
        folder / AGREEMENT, Agreement, AGREEMENT_VERSION, else_do="run `make agreement` again"
    )
