"""What a report is made of: blocks that say the same in Markdown (markdown.py) and as a page (page.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """A value, and a smaller note under it."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Heading:
    """A section's title; the sections of a report are not nested."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Names and what is known of them, in order."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows; `marked` columns stand apart (the paper's numbers)."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    marked: frozenset[int] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Picture:
    """A file beside the report. `width` in px is what it needs to be read; a narrow screen scrolls it."""

    file: str
    alt: str
    caption: str
    width: int = 0


Single = Heading | Text | Facts | Table | Picture


@dataclass(frozen=True)
class Row:
    """Pictures beside each other if there is room."""

    pictures: Sequence[Picture]


Block = Single | Row


@dataclass(frozen=True)
class Document:
    """A titled report."""

    title: str
    blocks: Sequence[Block]
