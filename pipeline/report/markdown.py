"""A report's document as Markdown, aligned so that it also reads well in a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import quote

from artifacts.names import printable
from pipeline.report.document import Block, Cell, Document, Facts, Heading, Picture, Row, Table, Text


def markdown(document: Document) -> str:
    """The whole report; ends without a newline."""
    return "\n\n".join([f"# {_safe(document.title)}", *map(_block, document.blocks)])


def markdown_table(table: Table) -> str:
    """The table without its caption."""
    rows = [[_safe(name) for name in table.head], *([_cell(cell) for cell in row] for row in table.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _block(block: Block) -> str:
    match block:
        case Heading():
            return f"## {_safe(block.text)}"
        case Text():
            return _safe(block.text)
        case Facts():
            return "\n".join(f"- {_safe(name)}: {_safe(value)}" for name, value in block.items)
        case Table():
            return f"**{_safe(block.caption)}**\n\n{markdown_table(block)}"
        case Picture():
            return f"![{_safe(block.alt)}]({quote(block.file)})\n\n*{_safe(block.caption)}*"
        case Row():
            return _pictures(block.pictures)


def _pictures(pictures: Sequence[Picture]) -> str:
    return "\n\n".join(_block(picture) for picture in pictures)


def _cell(cell: Cell) -> str:
    return _safe(f"{cell.text} ({cell.note})" if cell.note else cell.text)


_SPECIAL = str.maketrans(
    {
        "\\": "\\\\",
        "&": "&amp;",
        "<": "&lt;",
        ">": "&gt;",
        **{letter: f"\\{letter}" for letter in "|*[]`~$"},
        **dict.fromkeys("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029", " "),
    }
)
"""Letter by letter, so that a backslash in a name escapes nothing that is escaped here."""

_EMPHASIS = re.compile(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
"""Underscores that are not inside a word."""
_NUMBERS = re.compile(r"(\[[-+−–.,:%\d ]*\d[-+−–.,:%\d ]*\](?![(\[:]))")
"""An interval, as [+1.0, +2.0]: its brackets stay."""
_LINK = re.compile(r"(?i)(?<=[a-z]):(?=//)|(?<=www)\.|(?<=[\w.+-])@(?=\w)")
"""What makes a link of a bare address in some readers' Markdown."""


def _safe(text: str) -> str:
    """Names of users' classes and folders are shown as they are, and format nothing. Brackets of numbers stay."""
    parts = _NUMBERS.split(text)
    return "".join(part if place % 2 else _escaped(part) for place, part in enumerate(parts))


def _escaped(text: str) -> str:
    escaped = _EMPHASIS.sub(r"\\_", printable(text.translate(_SPECIAL)))
    return _LINK.sub(lambda found: f"&#{ord(found[0])};", escaped)
