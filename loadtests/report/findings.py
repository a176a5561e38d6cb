"""What an experiment found, whole and in words: the content of `report.json`.

Nothing is read or written here. Where a figure is claimed by others it stands beside the
measured one and is never mixed with it; where something is not known, that is what is said.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import msgspec

from loadtests.analysis import energy, gateway_cost, rows, slo
from loadtests.analysis.energy import Energy
from loadtests.analysis.gateway_cost import Cost
from loadtests.analysis.rows import Cells, Row
from loadtests.analysis.slo import Kept
from loadtests.measure.experiment import Experiment, Subject
from loadtests.measure.samples import Power
from loadtests.proof.agreement import Agreement
from loadtests.proof.selfcheck import SelfCheck
from loadtests.report.fairness import Judgement, _unequal, fairness
from loadtests.report.headline import Claim, Crossing, Sight, _crossing

VERSION = 1


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
        cells: At least one, as `rows.closed_cells` has them.
        doubts: What is wrong with the stopwatch; what is wrong with a cell is added.
        selfcheck: What the stopwatch was held to.
        agreement: What other tools saw.
        powers: What the cards drew.
    """
    table = rows.make_rows(cells, tokens_out=experiment.plan.tokens_out, limits=experiment.limits)
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
        for cost in gateway_cost.gateway_costs(table, one.label, one.before)
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
        kept=tuple(slo.kept(table)),
        crossings=crossings,
        costs=costs,
        fairness=judgements,
        selfcheck=selfcheck,
        agreement=agreement,
        energy=tuple(energy.energy_by_row(table, powers, experiment.cost)),
    )


def _subjects(experiment: Experiment, table: Sequence[Row]) -> list[Subject]:
    """Those of the experiment, and those that only the raw file knows."""
    known = {one.label: one for one in experiment.subjects}
    strangers = {row.target for row in table} - known.keys()
    return [*known.values(), *(Subject(label, "", "") for label in sorted(strangers))]


# --- what was fair ------------------------------------------------------------------------
