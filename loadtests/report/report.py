r"""The report of an experiment, made of its folder and made again whenever somebody likes.

    python -m loadtests.report FOLDER

Writes `report.html` (one file, opens offline), `report.md`, `report.json` and pictures beside
`raw.jsonl`. Where the stopwatch did not pass its check, or the load generator was saturated,
there is none, and it is said why; the raw data stays.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from loadtests.analysis import rows
from loadtests.analysis.rows import Cells, Row
from loadtests.measure import experiment, samples
from loadtests.measure.experiment import RAW, SELFCHECK, ExperimentError
from loadtests.proof import agreement, selfcheck
from loadtests.proof.agreement import AGREEMENT
from loadtests.proof.selfcheck import SelfCheck
from loadtests.report import charts, page
from loadtests.report.findings import Findings, find
from loadtests.report.page import Chart, Key
from loadtests.report.sections import _lead, sections

HTML = "report.html"
MARKDOWN = "report.md"
JSON = "report.json"
#: For a README: seconds and tokens against requests at once.
PICTURE = "comparison"
NEEDS = "a report needs the extra: pip install 'twolane[load]'"


class ReportError(ExperimentError):
    """There is no report to be had; the text says why and what to do. The raw data stays."""


def write(folder: Path, *, unchecked: bool = False) -> Path:
    """Make the report of a folder; returns the page.

    Args:
        folder: Of an experiment.
        unchecked: Make it even if the stopwatch cannot be trusted, and say so in it.

    Raises:
        ReportError: It cannot be trusted, or not be written.
        ExperimentError: The folder holds no experiment.
        samples.SamplesError: Nor what was measured.
    """
    if any(importlib.util.find_spec(name) is None for name in ("plotly", "matplotlib", "numpy")):
        raise ReportError(NEEDS)
    known = experiment.load(folder)
    lines = [*samples.read(folder / RAW)]
    cells = rows.closed_cells(lines)
    if not cells:
        raise ReportError(f"nothing was measured in {folder} yet: go on with --resume")
    checked, doubts = _checked(folder, max(int(cell.level) for cell, _ in cells))
    agreed = agreement.load(folder) if (folder / AGREEMENT).exists() else None
    found = find(known, cells, doubts, checked, agreed, samples.powers(lines))
    if found.doubts and not unchecked:
        raise ReportError(
            f"no report of {folder}: {'; '.join(found.doubts)}. What was measured is kept; measure "
            "again on a quieter machine, or have a report that says so with --unchecked"
        )
    try:
        return _write(folder, found, cells)
    except OSError as exc:
        raise ReportError(f"{folder} cannot be written: {exc.strerror}") from exc


def _checked(folder: Path, level: int) -> tuple[SelfCheck | None, list[str]]:
    """What the stopwatch was held to, and what is wrong with that."""
    if not (folder / SELFCHECK).exists():
        return None, [f"nothing proves the stopwatch: there is no {SELFCHECK}"]
    checked = selfcheck.load(folder)
    doubts = []
    if not checked.passed:
        doubts.append(f"the stopwatch did not pass its check: {checked.why}")
    if checked.level < level:
        doubts.append(
            f"the stopwatch was checked at {checked.level} at once, and then {level} were measured"
        )
    return checked, doubts


def _write(folder: Path, found: Findings, cells: Cells) -> Path:
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped] # noqa: PLC0415

    looks = charts.looks(found.experiment.subjects)
    pictures = [folder / f"{PICTURE}{kind}" for kind in (".svg", ".png")]
    charts.draw_lines(found.rows, looks, pictures)
    points = _points(cells, found.rows)
    with tempfile.TemporaryDirectory() as scratch:
        scatter = Path(scratch, "scatter.png")
        charts.draw_scatter(points, found.rows, looks, scatter)
        shown = (
            Chart(
                "Latency, time to first token and tokens a second against requests at once",
                charts.line_plots(found.rows, looks),
                pictures[0],
                linked=True,
            ),
            Chart(
                "Every request by requests at once",
                [charts.scatter_plot(points, found.rows, looks)],
                scatter,
            ),
        )
        lead = [*_lead(found)]
        key = Key([(label, looks[label].colour, looks[label].dashes) for label in points])
        told = sections(found, key, *shown)
        html = page.as_html(found.headline, lead, told, get_plotlyjs())
    json = msgspec.json.format(msgspec.json.encode(found), indent=1)
    for name, content in (
        (JSON, json),
        (MARKDOWN, page.as_markdown(lead, told).encode()),
        (HTML, html.encode()),
    ):
        whole = folder / f"{name}.new"
        whole.write_bytes(content)
        whole.replace(folder / name)
    return folder / HTML


def _points(cells: Cells, table: Iterable[Row]) -> dict[str, list[samples.Request]]:
    """Measured requests, by target."""
    return {
        label: [
            one
            for cell, requests in cells
            for one in requests
            if cell.target == label and one.phase == "measured"
        ]
        for label in dict.fromkeys(row.target for row in table)
    }


# --- what is told -------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report of a folder; 1 where there is none to be had."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="of an experiment")
    parser.add_argument(
        "--unchecked",
        action="store_true",
        help="write it even if the stopwatch cannot be trusted; it will say so",
    )
    args = parser.parse_args(arguments)
    try:
        print(write(args.folder, unchecked=args.unchecked))
    except (ExperimentError, samples.SamplesError) as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0
