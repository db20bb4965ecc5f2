"""A report's document as one HTML file: style and pictures inside, no script, nothing fetched."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from pipeline.report.document import Block, Cell, Document, Facts, Heading, Picture, Row, Table, Text

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #1c2024; --soft: #5b6470; --line: #d9dee4; --band: #f5f7f9; --accent: #0b62c4;
}
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171a; --ink: #e6e9ec; --soft: #9da7b2; --line: #30363d; --band: #1c2126; --accent: #6cb0ff; }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.25rem 1rem 4rem; max-width: 78rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  overflow-wrap: break-word;
}
h1 { margin: .2em 0 .1em; font-size: 1.9rem; line-height: 1.2; }
h2 { margin: 2.4rem 0 .7rem; padding-bottom: .25rem; font-size: 1.3rem; border-bottom: 2px solid var(--line); }
p { max-width: 46rem; margin: .7rem 0; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: .6rem 0 0; padding: 0; list-style: none; }
a { color: var(--accent); }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .3rem 1.2rem; margin: .8rem 0; }
dt { color: var(--soft); }
dd { margin: 0; min-width: 0; }
.scroll { overflow-x: auto; margin: 1rem 0 1.6rem; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
caption { padding: 0 0 .5rem; font-weight: 600; text-align: left; white-space: nowrap; }
th, td { padding: .38rem .8rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; }
thead th { vertical-align: bottom; white-space: nowrap; border-bottom: 2px solid var(--line); }
thead th { color: var(--soft); font-size: .85rem; }
th:first-child { position: sticky; left: 0; text-align: left; white-space: nowrap; background: var(--paper); }
tbody tr:hover > * { background: var(--band); }
td { white-space: nowrap; }
.words { text-align: left; }
th small { display: block; max-width: 12rem; white-space: normal; color: var(--soft); font-weight: 400; }
td small { display: block; color: var(--soft); font-size: .8rem; line-height: 1.35; }
.marked { color: var(--soft); font-style: italic; background: var(--band); }
figure { margin: 1rem 0 1.6rem; min-width: 0; }
.row figure { max-width: 36rem; }
figure .scroll { margin: 0; }
figcaption { margin-top: .4rem; max-width: 46rem; color: var(--soft); font-size: .88rem; }
img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 0 1.2rem; }
@media (max-width: 34rem) {
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
  th, td { padding: .34rem .55rem; }
}
@media print {
  :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; --band: #f3f3f3; }
  body { max-width: none; padding: 0; font-size: 9.5pt; }
  nav { display: none; }
  .scroll { overflow: visible; }
  .scroll img { min-width: 0 !important; }
  th:first-child { position: static; }
  table { font-size: 7.5pt; }
  th, td { padding: 2pt 4pt; }
  thead th, td small, th small { font-size: inherit; }
  caption { white-space: normal; }
  tr, figure { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""


def page(document: Document, folder: Path) -> str:
    """The page, with the pictures of `folder` in it. A picture's file must be there."""
    anchors = {id(block): f"part-{place}" for place, block in enumerate(document.blocks)}
    links = "".join(
        f'<li><a href="#{anchors[id(block)]}">{escape(block.text)}</a></li>'
        for block in document.blocks
        if isinstance(block, Heading)
    )
    body = "\n".join(
        f'<h2 id="{anchors[id(block)]}">{escape(block.text)}</h2>'
        if isinstance(block, Heading)
        else _block(block, folder)
        for block in document.blocks
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(document.title)}: e2kd report</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<header>\n<h1>{escape(document.title)}</h1>\n"
        f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n</header>\n<main>\n{body}\n</main>\n</body>\n</html>\n'
    )


def _block(block: Block, folder: Path) -> str:
    match block:
        case Heading():
            return f"<h2>{escape(block.text)}</h2>"
        case Text():
            return f"<p>{escape(block.text)}</p>"
        case Facts():
            items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in block.items)
            return f"<dl>{items}</dl>"
        case Table():
            return _table(block)
        case Picture():
            return _picture(block, folder)
        case Row():
            inner = "\n".join(_picture(picture, folder) for picture in block.pictures)
            return f'<div class="row">\n{inner}\n</div>'


def _table(table: Table) -> str:
    head = "".join(
        f'<th scope="col"{_class(table, place)}>{escape(name)}</th>' for place, name in enumerate(table.head)
    )
    rows = "\n".join(
        f'<tr><th scope="row">{_inside(row[0])}</th>'
        + "".join(_cell(table, place, cell) for place, cell in enumerate(row[1:], 1))
        + "</tr>"
        for row in table.rows
    )
    return _scroll(
        table.caption,
        f"<table>\n<caption>{escape(table.caption)}</caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{rows}\n</tbody>\n</table>",
    )


def _cell(table: Table, place: int, cell: Cell) -> str:
    return f"<td{_class(table, place)}>{_inside(cell)}</td>"


def _class(table: Table, place: int) -> str:
    """The class of a column's cells: the paper's numbers, or words, which begin at the left."""
    if place in table.marked:
        return ' class="marked"'
    words = [row[place].text for row in table.rows if not row[place].text[:1].isdigit()]
    return ' class="words"' if place and any(text[:1].isalpha() for text in words) else ""


def _inside(cell: Cell) -> str:
    return escape(cell.text) + (f"<small>{escape(cell.note)}</small>" if cell.note else "")


def _scroll(label: str, inner: str) -> str:
    """A part that scrolls by itself on a narrow screen, by keyboard too."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{inner}</div>'


def _picture(picture: Picture, folder: Path) -> str:
    data = base64.b64encode((folder / picture.file).read_bytes()).decode()
    wide = f' style="min-width:{picture.width}px"' if picture.width else ""
    image = f'<img alt="{escape(picture.alt)}" src="data:image/png;base64,{data}"{wide}>'
    shown = _scroll(picture.alt, image) if picture.width else image
    return f"<figure>\n{shown}\n<figcaption>{escape(picture.caption)}</figcaption>\n</figure>"
