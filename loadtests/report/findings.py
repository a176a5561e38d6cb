"""All results of an experiment, in figures and in words: the content of `report.json`.

Nothing is read or written here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import msgspec

from loadtests.analysis import energy, gateway_cost, rows, slo
from loadtests.analysis.energy import Energy
from loadtests.analysis.gateway_cost import GatewayCost
from loadtests.analysis.rows import Cells, Row
from loadtests.analysis.slo import SloBracket
from loadtests.measure.experiment import Experiment, Subject
from loadtests.measure.samples import Power
from loadtests.proof.agreement import Agreement
from loadtests.proof.selfcheck import SelfCheck
from loadtests.report.fairness import Judgement, fairness, unequal_sentences
from loadtests.report.headline import Claim, Crossing, Headlines, describe_crossover

REPORT_VERSION = 1


class Findings(msgspec.Struct, frozen=True, omit_defaults=True):
    """All results; figures are computed by the formulas of the report.

    Attributes:
        doubts: Reasons not to trust the figures; empty as a rule.
        headline: The main sentence.
        short: The other main results, a sentence each.
        slo_brackets: Up to which level each target meets the SLO.
        energy: Power and cost of each row of which either is known.
    """

    version: int
    doubts: tuple[str, ...]
    headline: str
    short: tuple[str, ...]
    experiment: Experiment
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    slo_brackets: tuple[SloBracket, ...] = msgspec.field(name="kept")
    crossings: tuple[Crossing, ...]
    costs: tuple[GatewayCost, ...]
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
    """All results of the cells.

    Args:
        experiment: What was measured, and how.
        cells: At least one, from `rows.closed_cells`.
        doubts: Reasons not to trust the stopwatch; those of saturated cells are added.
        selfcheck: The check of the stopwatch against a server of known times.
        agreement: The figures of other tools.
        powers: The power samples of the cards.
    """
    table = rows.make_rows(cells, tokens_out=experiment.plan.tokens_out, limits=experiment.limits)
    subjects = _subjects(experiment, table)
    headlines = Headlines(subjects, table)
    engines = [one for one in subjects if not one.before]
    crossings = tuple(
        describe_crossover(a.label, b.label, cells, headlines.names)
        for a, b in itertools.combinations(engines, 2)
        if a.engine != b.engine or not a.engine
    )
    costs = tuple(
        cost
        for subject in subjects
        if subject.before
        for cost in gateway_cost.gateway_costs(table, subject.label, subject.before)
    )
    judgements = tuple(fairness(subjects, table))
    return Findings(
        version=REPORT_VERSION,
        doubts=(*doubts, *filter(None, (row.saturation() for row in table))),
        headline=headlines.headline(),
        short=(*headlines.other_sentences(crossings, costs), *unequal_sentences(judgements)),
        experiment=msgspec.structs.replace(experiment, subjects=tuple(subjects)),
        rows=tuple(table),
        claims=tuple(headlines.claims()),
        slo_brackets=tuple(slo.slo_brackets(table)),
        crossings=crossings,
        costs=costs,
        fairness=judgements,
        selfcheck=selfcheck,
        agreement=agreement,
        energy=tuple(energy.energy_by_row(table, powers, experiment.cost)),
    )


def _subjects(experiment: Experiment, table: Sequence[Row]) -> list[Subject]:
    """The subjects of the experiment, and targets that only the raw file has."""
    known = {one.label: one for one in experiment.subjects}
    unknown = {row.target for row in table} - known.keys()
    return [*known.values(), *(Subject(label, "", "") for label in sorted(unknown))]
