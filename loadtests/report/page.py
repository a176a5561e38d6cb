"""A document of a few kinds of blocks, as one HTML file that opens offline, and as Markdown.

Blocks contain plain text, which is escaped here for both formats, and nowhere else.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, TypeAlias

import msgspec

PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Text:
    """A paragraph; `look` is `loud` (the title), `sub` (a heading), `small` or `banner`."""

    text: str
    look: str = ""


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    """Preformatted lines."""

    text: str


@dataclass(frozen=True)
class Grid:
    """A table; the first column names its rows, and an empty row is a rule between groups.

    Attributes:
        numbers: Cells are numbers, aligned right; on a narrow screen the table scrolls and
            the first column stays in view.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: bool = True


@dataclass(frozen=True)
class Key:
    """The legend of the charts: name, colour and dashes of each line."""

    entries: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Chart:
    """An interactive chart; print, Markdown and browsers without scripts show its picture.

    Attributes:
        title: Also the text alternative for screen readers.
        plots: `data` and `layout` of each plot for plotly, side by side where there is room.
        still: The picture file.
        linked: Whether Markdown shows the picture, by its file name.
    """

    title: str
    plots: Sequence[dict[str, Any]]
    still: Path
    linked: bool = False


Block: TypeAlias = Text | Bullets | Code | Grid | Key | Chart


@dataclass(frozen=True)
class Section:
    """A heading and the blocks below it."""

    title: str
    blocks: Sequence[Block]


def format_number(value: float | None) -> str:
    """A number with at least three significant digits: 0.342, 7.51, 15.0, 1,204."""
    if value is None:
        return "-"
    if not value:
        return "0"
    places = 2 - int(f"{value:.2e}".partition("e")[2])
    return f"{value:,.{max(0, places)}f}"


# --- HTML ---------------------------------------------------------------------------------


def as_html(title: str, lead: Sequence[Block], sections: Sequence[Section], plotly: str) -> str:
    """The HTML page; `plotly` is the script of the charts."""
    parts = [_html(block) for block in lead]
    for section in sections:
        inner = "\n".join(_html(block) for block in section.blocks)
        parts.append(f"<section>\n<h2>{html.escape(section.title)}</h2>\n{inner}\n</section>")
    page = Template(PAGE.read_text(encoding="utf-8"))
    return page.substitute(title=html.escape(title), body="\n".join(parts), plotly=plotly)


def _html(block: Block) -> str:  # noqa: PLR0911 - one of each kind
    match block:
        case Text(text, "loud"):
            return f"<h1>{html.escape(text)}</h1>"
        case Text(text, look):
            return f'<p class="{html.escape(look)}">{html.escape(text)}</p>'
        case Bullets(items):
            return f"<ul>{''.join(f'<li>{html.escape(item)}</li>' for item in items)}</ul>"
        case Code(text):
            return f'<pre tabindex="0">{html.escape(text)}</pre>'
        case Grid():
            return _html_table(block)
        case Key(entries):
            return f'<ul class="key">{"".join(_html_key(*entry) for entry in entries)}</ul>'
        case Chart():
            return _html_chart(block)


def _html_table(grid: Grid) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in grid.head)
    kind = "numbers" if grid.numbers else "words"
    body = "\n".join(map(_html_row, grid.rows))
    return (
        f'<div class="wide" tabindex="0"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _html_row(row: Sequence[str]) -> str:
    if not row:
        return "</tbody><tbody>"
    first, *others = map(html.escape, row)
    return f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in others)}</tr>'


def _html_key(name: str, colour: str, dashes: str) -> str:
    line = f'<path d="M0 5h28" stroke="{colour}" stroke-width="3" stroke-dasharray="{dashes}"/>'
    drawn = f'<svg width="28" height="10" aria-hidden="true">{line}</svg>'
    return f"<li>{drawn} {html.escape(name)}</li>"


def _html_chart(chart: Chart) -> str:
    kind = {".svg": "image/svg+xml", ".png": "image/png"}[chart.still.suffix]
    still = base64.b64encode(chart.still.read_bytes()).decode()
    title = html.escape(chart.title)
    plots = "".join(map(_html_plot, chart.plots))
    return (
        f'<figure><div class="plots" role="img" aria-label="{title}">{plots}</div>'
        f'<img class="still" alt="{title}" src="data:{kind};base64,{still}"></figure>'
    )


def _html_plot(plot: dict[str, Any]) -> str:
    """A plot for plotly, as JSON that cannot close its script element."""
    text = msgspec.json.encode(plot).decode().replace("<", "\\u003c")
    return f'<div class="plot"><script type="application/json">{text}</script></div>'


# --- Markdown -----------------------------------------------------------------------------


def as_markdown(lead: Sequence[Block], sections: Sequence[Section]) -> str:
    """The Markdown document; charts are links to their pictures."""
    parts = [_markdown(block) for block in lead]
    for section in sections:
        parts.append(f"## {_plain(section.title)}")
        parts += [_markdown(block) for block in section.blocks]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown(block: Block) -> str:  # noqa: PLR0911 - one of each kind
    match block:
        case Text(text, "loud"):
            return f"# {_plain(text)}"
        case Text(text, "banner"):
            return f"> **{_plain(text)}**"
        case Text(text):
            return _plain(text)
        case Bullets(items):
            return "\n".join(f"- {_plain(item)}" for item in items)
        case Code(text):
            ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            return f"{ticks}\n{text}\n{ticks}"
        case Grid(head, rows, numbers):
            line = ["---", *(["---:" if numbers else "---"] * (len(head) - 1))]
            texts = [[_plain(cell) for cell in row] for row in (head, *rows) if row]
            return "\n".join(_bars(row) for row in (texts[0], line, *texts[1:]))
        case Chart(title, _, still, linked):
            return f"![{_plain(title)}]({still.name})" if linked else ""
        case Key():
            return ""


def _plain(text: str) -> str:
    """Text in one line, with Markdown's special characters escaped."""
    return re.sub(r"([\\`*_\[\]<>|~])", r"\\\1", " ".join(text.split()))


def _bars(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
