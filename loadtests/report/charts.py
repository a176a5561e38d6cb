"""The charts of a report: for plotly, which draws in the reader's browser, and as pictures.

Colour marks the engine; dashes and markers mark its variants, so lines can be distinguished in
grey as well.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from loadtests.analysis.rows import Row
from loadtests.analysis.spread import Spread
from loadtests.measure.experiment import Subject
from loadtests.measure.samples import Request

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"ollama": "#2a7f62", "vllm": "#c8553d", "gateway": "#3f6fb5", "llamacpp": "#8a6fb0"}
#: Colours of other engines.
OTHER_COLOURS = ("#b08900", "#6b7a88", "#a8477f", "#3d97a6")
#: Dashes and markers of the first, second, ... variant: for SVG, plotly and matplotlib.
DASHES = ("", "7 4", "2 3")
PLOTLY_STYLES = (("solid", "circle"), ("dash", "diamond"), ("dot", "square"))
Dashes: TypeAlias = tuple[float, tuple[float, ...]]
MATPLOTLIB_STYLES: tuple[tuple[Dashes, str], ...] = (
    ((0, ()), "o"),
    ((0, (5, 3)), "D"),
    ((0, (1.5, 2)), "s"),
)
#: At most so many points are drawn of a target; of more, every n-th.
MAX_POINTS = 3000
#: Width of the band in which the points of a level lie, in octaves.
SCATTER_OCTAVES = 0.62
#: A level is labelled if it is at least this multiple of the last labelled one.
MIN_LABEL_RATIO = 1.25
DPI = 160


@dataclass(frozen=True)
class LineStyle:
    """The colour and the variant (dashes, marker) of a target."""

    colour: str
    variant: int

    @property
    def dashes(self) -> str:
        return DASHES[self.variant]


def line_styles(subjects: Iterable[Subject]) -> dict[str, LineStyle]:
    """The style of each target by label: a colour per engine, a variant per target of it."""
    styles: dict[str, LineStyle] = {}
    others = 0
    for subject in subjects:
        colour = COLOURS.get(subject.engine)
        if colour is None:
            colour = OTHER_COLOURS[others % len(OTHER_COLOURS)]
            others += 1
        before = sum(style.colour == colour for style in styles.values())
        styles[subject.label] = LineStyle(colour, before % len(DASHES))
    return styles


@dataclass(frozen=True)
class Panel:
    """A quantity by concurrent requests: a line per target, level by level with its spread."""

    title: str
    lines: Mapping[str, Sequence[tuple[int, Spread]]]
    ticks: Sequence[float] = ()

    @property
    def is_log(self) -> bool:
        """Whether the axis is logarithmic, as for seconds, which span a factor of 100."""
        return bool(self.ticks)


def panels(table: Sequence[Row]) -> list[Panel]:
    """E2E, TTFT and tokens/s: medians, with the lowest and the highest median of a repetition."""
    e2e: dict[str, list[tuple[int, Spread]]] = {}
    ttft: dict[str, list[tuple[int, Spread]]] = {}
    tokens: dict[str, list[tuple[int, Spread]]] = {}
    for row in table:
        for lines, summary in ((e2e, row.e2e), (ttft, row.ttft)):
            if summary is not None:
                spread = Spread(summary.median, summary.low, summary.high)
                lines.setdefault(row.target, []).append((row.level, spread))
        tokens.setdefault(row.target, []).append((row.level, row.tokens_per_s))
    return [
        Panel("E2E, seconds (log)", e2e, _ticks(e2e)),
        Panel("TTFT, seconds (log)", ttft, _ticks(ttft)),
        Panel("output tokens/s", tokens),
    ]


def _ticks(lines: Mapping[str, Sequence[tuple[int, Spread]]]) -> list[float]:
    """Ticks of 1, 2, 5, 10, ... that enclose all values."""
    spreads = [spread for line in lines.values() for _, spread in line]
    low = min((one.low for one in spreads if one.low > 0), default=1.0)
    high = max((one.high for one in spreads), default=1.0)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(max(high, low))) + 1)
    every = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    first = max(tick for tick in every if tick <= low)
    last = min(tick for tick in every if tick >= high)
    return [tick for tick in every if first <= tick <= last]


# --- in the browser -----------------------------------------------------------------------


def _layout(title: str, levels: Sequence[int], y: dict[str, Any]) -> dict[str, Any]:
    ends = math.log2(levels[0]) - 0.5, math.log2(levels[-1]) + 0.5
    axis = {
        "type": "log",
        "range": [end * math.log10(2) for end in ends],
        "tickvals": list(levels),
        "ticktext": _level_labels(levels),
        "title": {"text": "concurrent requests", "standoff": 8},
        "fixedrange": True,
    }
    return {
        "title": {"text": title, "font": {"size": 14}, "x": 0, "xref": "paper", "xanchor": "left"},
        "margin": {"l": 48, "r": 8, "t": 36, "b": 44},
        "showlegend": False,
        "hovermode": "closest",
        "xaxis": axis,
        "yaxis": {"rangemode": "tozero", "fixedrange": True, **y},
    }


def _log_axis(panel: Panel) -> dict[str, Any]:
    return {
        "type": "log",
        "range": [math.log10(panel.ticks[0] * 0.9), math.log10(panel.ticks[-1] * 1.1)],
        "tickvals": list(panel.ticks),
        "ticktext": [f"{tick:g}" for tick in panel.ticks],
    }


def _levels(table: Iterable[Row]) -> list[int]:
    return sorted({row.level for row in table})


def _level_labels(levels: Sequence[int]) -> list[str]:
    """The label of each level; empty where it would overlap the one before."""
    names, last = [], 0.0
    for level in levels:
        apart = level >= MIN_LABEL_RATIO * last
        names.append(str(level) if apart else "")
        last = level if apart else last
    return names


def line_plots(table: Sequence[Row], styles: Mapping[str, LineStyle]) -> list[dict[str, Any]]:
    """The panels for plotly, spreads as error bars."""
    plots = []
    for panel in panels(table):
        data = []
        for label, line in panel.lines.items():
            spreads = [spread for _, spread in line]
            dash, mark = PLOTLY_STYLES[styles[label].variant]
            data.append(
                {
                    "name": html.escape(label),
                    "x": [level for level, _ in line],
                    "y": [_rounded(one.value) for one in spreads],
                    "error_y": {
                        "type": "data",
                        "symmetric": False,
                        "array": [_rounded(one.high - one.value) for one in spreads],
                        "arrayminus": [_rounded(one.value - one.low) for one in spreads],
                        "thickness": 1.5,
                        "width": 4,
                    },
                    "mode": "lines+markers",
                    "line": {"color": styles[label].colour, "width": 2.5, "dash": dash},
                    "marker": {"symbol": mark, "size": 7},
                    "hovertemplate": "%{x} concurrent: %{y:.3~g}",
                }
            )
        layout = _layout(panel.title, _levels(table), _log_axis(panel) if panel.is_log else {})
        plots.append({"data": data, "layout": layout | {"hovermode": "x"}})
    return plots


def scatter_plot(
    points: Mapping[str, Sequence[Request]], table: Sequence[Row], styles: Mapping[str, LineStyle]
) -> dict[str, Any]:
    """Every measured request for plotly; a cross is a failed one."""
    data = []
    for place, (label, requests) in enumerate(points.items()):
        shown = thin_out(requests)
        _, mark = PLOTLY_STYLES[styles[label].variant]
        mark += "-open" if styles[label].variant else ""
        data.append(
            {
                "name": html.escape(label),
                "type": "scatter",
                "mode": "markers",
                "x": [_rounded(x) for x in _x_positions(shown, place, len(points))],
                "y": [_rounded(one.e2e_s) for one in shown],
                "text": [_hover_text(one) for one in shown],
                "hovertemplate": "%{text}",
                "marker": {
                    "color": styles[label].colour,
                    "symbol": ["x" if one.error else mark for one in shown],
                    "size": [7 if one.error else 4 for one in shown],
                    "opacity": 0.55,
                    "line": {"width": 0 if mark == "circle" else 1},
                },
            }
        )
    layout = _layout("E2E of every request, seconds", _levels(table), {})
    return {"data": data, "layout": layout}


def thin_out(requests: Sequence[Request]) -> Sequence[Request]:
    """Every n-th request, at most `MAX_POINTS`, so that a browser can scroll the page."""
    return requests[:: math.ceil(len(requests) / MAX_POINTS) or 1]


def _x_positions(requests: Sequence[Request], place: int, places: int) -> list[float]:
    """The x of each request: beside its level, a band for each target, scattered within it."""
    lane = SCATTER_OCTAVES / places
    first = -SCATTER_OCTAVES / 2 + place * lane
    return [
        one.level * 2 ** (first + lane * (0.1 + 0.8 * (index * 0.618034 % 1)))
        for index, one in enumerate(requests)
    ]


def _hover_text(one: Request) -> str:
    ttft = "" if one.ttft_s is None else f", TTFT {one.ttft_s:.3g} s"
    tokens = "" if one.tokens_out is None else f", {one.tokens_out} tokens"
    error = "" if one.error is None else f"<br>{html.escape(one.error[:80])}"
    where = f"{html.escape(one.target)}, {one.level:g} concurrent, repetition {one.repetition}"
    return f"{where}<br>{one.e2e_s:.3g} s{ttft}{tokens}{error}"


def _rounded(value: float) -> float:
    """A value with four significant digits, more than a chart can show."""
    return float(f"{value:.4g}")


# --- stills -------------------------------------------------------------------------------


def draw_lines(
    table: Sequence[Row], styles: Mapping[str, LineStyle], paths: Sequence[Path]
) -> None:
    """Save the panels side by side, readable at 800 pixels in a README; spreads are bands."""
    figure = _figure(10, 4.3)
    for axes, panel in zip(figure.subplots(1, 3), panels(table), strict=True):
        for label, line in panel.lines.items():
            levels = [level for level, _ in line]
            style, mark = MATPLOTLIB_STYLES[styles[label].variant]
            colour = styles[label].colour
            low, high = [one.low for _, one in line], [one.high for _, one in line]
            axes.fill_between(levels, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(
                levels, [one.value for _, one in line], color=colour, linestyle=style,
                marker=mark, markersize=4.5, linewidth=1.8,
            )  # fmt: skip
        _format_level_axis(axes, _levels(table))
        if panel.is_log:
            axes.set_yscale("log")
            axes.set_ylim(panel.ticks[0] * 0.9, panel.ticks[-1] * 1.1)
            axes.set_yticks(panel.ticks, [f"{tick:g}" for tick in panel.ticks])
            axes.minorticks_off()
        axes.set_title(panel.title, loc="left", fontsize=11)
    _draw_legend(figure, styles, [row.target for row in table])
    for path in paths:
        _save(figure, path)


def draw_scatter(
    points: Mapping[str, Sequence[Request]],
    table: Sequence[Row],
    styles: Mapping[str, LineStyle],
    path: Path,
) -> None:
    """Save the picture of every measured request."""
    figure = _figure(10, 4.6)
    axes = figure.subplots()
    for place, (label, requests) in enumerate(points.items()):
        shown = thin_out(requests)
        xs = _x_positions(shown, place, len(points))
        colour, variant = styles[label].colour, styles[label].variant
        for failed in (False, True):
            these = [index for index, one in enumerate(shown) if bool(one.error) == failed]
            axes.scatter(
                [xs[index] for index in these],
                [shown[index].e2e_s for index in these],
                s=22 if failed else 5,
                marker="x" if failed else MATPLOTLIB_STYLES[variant][1],
                facecolors="none" if variant and not failed else colour,
                edgecolors=None if failed else colour,
                linewidths=0.6 if failed or variant else 0,
                alpha=0.55,
            )
    _format_level_axis(axes, _levels(table))
    axes.set_title("E2E of every request, seconds", loc="left", fontsize=11)
    _draw_legend(figure, styles, list(points))
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # noqa: PLC0415 - of the extra `load`

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _format_level_axis(axes: Axes, levels: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(levels, _level_labels(levels))
    axes.minorticks_off()
    axes.set_xlim(levels[0] / 2**0.5, levels[-1] * 2**0.5)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("concurrent requests")
    axes.grid(axis="y", color="#e4e7ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_legend(figure: Figure, styles: Mapping[str, LineStyle], labels: Iterable[str]) -> None:
    """Add one legend for all axes of a figure."""
    from matplotlib.lines import Line2D  # noqa: PLC0415

    shown = list(dict.fromkeys(labels))
    lines = [
        Line2D([], [], color=styles[label].colour, linestyle=style, marker=mark, markersize=5)
        for label in shown
        for style, mark in (MATPLOTLIB_STYLES[styles[label].variant],)
    ]
    # A dollar sign would begin a formula, and a line whose name begins with _ has none.
    names = [f" {label}".replace("$", r"\$") for label in shown]
    figure.legend(
        lines,
        names,
        loc="outside lower center",
        ncols=min(5, len(shown)),
        frameon=False,
        handlelength=3,
    )


def _save(figure: Figure, path: Path) -> None:
    """Save a figure; the same values give the same bytes."""
    import matplotlib as mpl  # noqa: PLC0415

    unstamped = {"Date": None} if path.suffix == ".svg" else {}
    with mpl.rc_context({"svg.hashsalt": "twolane"}):
        figure.savefig(path, dpi=DPI, metadata=unstamped)
