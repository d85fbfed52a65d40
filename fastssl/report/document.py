"""A short document of headings, sentences, tables and pictures, written once and rendered as markdown and as one html
page.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from fastssl.report.style import CSS

_MORE_CSS = """
main { max-width: 1240px; }
.wide { overflow-x: auto; margin-bottom: 14px; }
.wide table { margin-bottom: 0; }
.wide th, .wide td { font-size: 14px; padding: 7px 16px 7px 0; vertical-align: top; }
.wide .right { text-align: right; white-space: nowrap; }
.wide th { vertical-align: bottom; }
.wide th.right { white-space: normal; min-width: 90px; }
.wide code { font-size: 12.5px; overflow-wrap: anywhere; }
td code { display: inline-block; min-width: 260px; }
.wide td { min-width: 90px; }
ul { padding-left: 20px; margin: 0 0 14px; }
ul.lead { font-size: 17px; max-width: 60em; }
ul.lead li { margin-bottom: 6px; }
section h2 { font-size: 22px; }
section h3 { margin: 28px 0 10px; font-size: 17px; }
.picture { margin-bottom: 18px; }
"""


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
    return "<br>".join(map(_markdown_code, cell.lines))


def _markdown_code(line: str) -> str:
    """Between backticks nothing is markup but another backtick and, in a table, the bar."""
    if "`" in line:
        return f"<code>{escape_markdown(line)}</code>"
    words = " ".join(line.replace("|", "\\|").split())
    return f"`{words}`"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """One page that needs nothing but itself: no script, no network."""
    parts, open_section = [], False
    for block in blocks:
        if isinstance(block, Heading) and block.level == 2:
            parts.append(f"{'</section>' if open_section else ''}<section>")
            open_section = True
        parts.append(_html(block))
    parts.append("</section>" if open_section else "")
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        'initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}{_MORE_CSS}</style></head>\n"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Paragraph(text, quiet):
            return f"<p{' class=small' if quiet else ''}>{escape(text)}</p>"
        case Bullets(items, lead):
            listed = "".join(f"<li><b>{escape(name)}</b> {escape(text)}</li>" for name, text in items)
            return f"<ul{' class=lead' if lead else ''}>{listed}</ul>"
        case Table(header, rows, right):
            css = [' class="right"' if one else "" for one in right]
            head = "".join(f"<th{one}>{escape(text)}</th>" for one, text in zip(css, header))
            body = "".join(
                "<tr>" + "".join(f"<td{one}>{_html_cell(cell)}</td>" for one, cell in zip(css, row)) + "</tr>"
                for row in rows
            )
            return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        case Picture(_, words, png):
            data = base64.b64encode(png).decode("ascii")
            return f'<div class="picture"><img alt="{escape(words)}" src="data:image/png;base64,{data}"></div>'


def _html_cell(cell: str | Code) -> str:
    if isinstance(cell, str):
        return escape(cell)
    return "<br>".join(f"<code>{escape(line)}</code>" for line in cell.lines)
