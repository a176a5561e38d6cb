r"""Writes the report of an experiment from the files in its folder.

    python -m loadtests.report FOLDER

The report is `report.html` (one file that opens offline), `report.md`, `report.json` and
pictures, beside `raw.jsonl`. If the stopwatch did not pass its check, or the load generator
was saturated, no report is written and the reason is printed; the raw data stays.
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
from loadtests.report.sections import lead, sections

HTML = "report.html"
MARKDOWN = "report.md"
JSON = "report.json"
#: Stem of the pictures that a README can show: latency and tokens/s by concurrency.
PICTURE = "comparison"
NEEDS = (
    "a report needs the packages of the extra `load`: run `make load` in a checkout, "
    "pip install 'twolane[load]' elsewhere"
)


class ReportError(ExperimentError):
    """No report can be written; the message says why and what to do. The raw data stays."""


def write(folder: Path, *, unchecked: bool = False) -> Path:
    """Write the report of an experiment; returns the path of the HTML page.

    Args:
        folder: The experiment's folder.
        unchecked: Write it even if its figures cannot be trusted; the report says so.

    Raises:
        ReportError: The figures cannot be trusted, or the report cannot be written.
        ExperimentError: The folder has no experiment.
        samples.SamplesError: The raw file cannot be read.
    """
    if any(importlib.util.find_spec(name) is None for name in ("plotly", "matplotlib", "numpy")):
        raise ReportError(NEEDS)
    loaded = experiment.load(folder)
    lines = [*samples.read(folder / RAW)]
    cells = rows.closed_cells(lines)
    if not cells:
        raise ReportError(f"nothing was measured in {folder} yet: continue it with --resume")
    check, doubts = _self_check(folder, max(int(cell.level) for cell, _ in cells))
    tools = agreement.load(folder) if (folder / AGREEMENT).exists() else None
    findings = find(loaded, cells, doubts, check, tools, samples.powers(lines))
    if findings.doubts and not unchecked:
        raise ReportError(
            f"no report of {folder}: {'; '.join(findings.doubts)}. The raw data stays; measure "
            "again on a quieter machine, or add --unchecked for a report with this warning"
        )
    try:
        return _write(folder, findings, cells)
    except OSError as exc:
        raise ReportError(f"{folder} cannot be written: {exc.strerror}") from exc


def _self_check(folder: Path, level: int) -> tuple[SelfCheck | None, list[str]]:
    """The stopwatch's check, and reasons not to trust it at this level."""
    if not (folder / SELFCHECK).exists():
        return None, [f"the stopwatch was not checked: there is no {SELFCHECK}"]
    check = selfcheck.load(folder)
    doubts = []
    if not check.passed:
        doubts.append(f"the stopwatch did not pass its check: {check.why}")
    if check.level < level:
        doubts.append(
            f"the stopwatch was checked with {check.level} concurrent requests, but {level} were "
            "measured"
        )
    return check, doubts


def _write(folder: Path, findings: Findings, cells: Cells) -> Path:
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped] # noqa: PLC0415

    styles = charts.line_styles(findings.experiment.subjects)
    pictures = [folder / f"{PICTURE}{kind}" for kind in (".svg", ".png")]
    charts.draw_lines(findings.rows, styles, pictures)
    points = _points(cells, findings.rows)
    with tempfile.TemporaryDirectory() as scratch:
        scatter = Path(scratch, "scatter.png")
        charts.draw_scatter(points, findings.rows, styles, scatter)
        line_chart = Chart(
            "E2E latency, time to first token and tokens/s by concurrent requests",
            charts.line_plots(findings.rows, styles),
            pictures[0],
            linked=True,
        )
        scatter_chart = Chart(
            "E2E latency of every request, by concurrent requests",
            [charts.scatter_plot(points, findings.rows, styles)],
            scatter,
        )
        top = [*lead(findings)]
        key = Key([(label, styles[label].colour, styles[label].dashes) for label in points])
        body = sections(findings, key, line_chart, scatter_chart)
        html = page.as_html(findings.headline, top, body, get_plotlyjs())
    json = msgspec.json.format(msgspec.json.encode(findings), indent=1)
    for name, content in (
        (JSON, json),
        (MARKDOWN, page.as_markdown(top, body).encode()),
        (HTML, html.encode()),
    ):
        whole = folder / f"{name}.new"
        whole.write_bytes(content)
        whole.replace(folder / name)
    return folder / HTML


def _points(cells: Cells, table: Iterable[Row]) -> dict[str, list[samples.Request]]:
    """The measured requests of each target, by label."""
    return {
        label: [
            one
            for cell, requests in cells
            for one in requests
            if cell.target == label and one.phase == "measured"
        ]
        for label in dict.fromkeys(row.target for row in table)
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report of a folder; the exit status, 1 if none was written."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="folder of the experiment")
    parser.add_argument(
        "--unchecked",
        action="store_true",
        help="write it even if its figures cannot be trusted; the report says so",
    )
    args = parser.parse_args(arguments)
    try:
        print(write(args.folder, unchecked=args.unchecked))
    except (ExperimentError, samples.SamplesError) as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0
