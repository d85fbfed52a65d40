"""Pages from the templates beside this file: self-contained, no script, no network; every value is escaped. And a short
document of headings, sentences, tables and pictures, written once and rendered as markdown and as such a page.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from fastssl.errors import counted
from fastssl.report.run_record import get, number

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_TEMPLATES.filters |= {
    "base64": lambda content: base64.b64encode(content).decode("ascii"),
    "counted": counted,
    "get": get,
    "number": number,
    "sentence": lambda text: f"{str(text).rstrip().rstrip('.')}.",
    "thousands": lambda value: f"{value:,}" if isinstance(value, int) else value,
}


def render_template(name: str, **values: Any) -> str:
    """``templates/NAME`` with ``values``; what is not ``markupsafe.Markup`` is text."""
    return _TEMPLATES.get_template(name).render(**values)


@dataclass(frozen=True)
class Heading:
    """Level 1 is the title, 2 begins a section, 3 a part of it."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """One paragraph of plain words; ``quiet``: remarks."""

    text: str
    quiet: bool = False


@dataclass(frozen=True)
class Bullets:
    """Each item is a name, which is set in bold, and the words behind it."""

    items: Sequence[tuple[str, str]]
    lead: bool = False


@dataclass(frozen=True)
class Code:
    """A cell of commands, one a line."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """``right``: for each column whether it holds figures. A cell is words or :class:`Code`."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | Code]]
    right: Sequence[bool]


@dataclass(frozen=True)
class Picture:
    """A PNG file that lies beside the markdown under ``name`` and inside the html page."""

    name: str
    words: str
    png: bytes


Block = Heading | Paragraph | Bullets | Table | Picture


def to_markdown(blocks: Sequence[Block]) -> str:
    """GitHub's markdown. Words in ``blocks`` stay words, whatever they hold."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {escape_markdown(text)}"
        case Paragraph(text):
            return escape_markdown(text)
        case Bullets(items):
            return "\n".join(f"- **{escape_markdown(name)}** {escape_markdown(text)}" for name, text in items)
        case Table():
            return table_markdown(block)
        case Picture(name, words):
            return f"![{escape_markdown(words)}]({name})"


def escape_markdown(text: str) -> str:
    """``text`` on one line, as words only: no table cell, tag, picture or link begins in it."""
    # The backslash goes first; as an entity, because before an escaped bar it would be ambiguous.
    for mark, safe in (("\\", "&#92;"), ("<", "&lt;"), ("|", "\\|"), ("[", "\\["), ("`", "\\`"), ("*", "\\*")):
        text = text.replace(mark, safe)
    return " ".join(text.split())


def table_markdown(table: Table) -> str:
    """A table without the line end."""
    rows = [map(escape_markdown, table.header), ("--:" if right else ":--" for right in table.right)]
    rows.extend(map(_markdown_cell, row) for row in table.rows)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _markdown_cell(cell: str | Code) -> str:
    if isinstance(cell, str):
        return escape_markdown(cell)

    def code(line: str) -> str:  # between backticks nothing is markup but a backtick and, in a table, the bar
        plain = " ".join(line.replace("|", "\\|").split())
        return f"<code>{escape_markdown(line)}</code>" if "`" in line else f"`{plain}`"

    return "<br>".join(map(code, cell.lines))


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """One page that needs nothing but itself: no script, no network."""
    return render_template("document.html.j2", title=title, blocks=[(type(block).__name__, block) for block in blocks])
