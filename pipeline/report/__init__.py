"""`e2kd report`: the scorecard of an experiment as Markdown and as one self-contained page.

results    methods, finished runs, scores, differences      statistics  means, paired bootstrap
tables     methods x metrics with the paper's numbers       about       what was run, what it cost
pictures   curves, by matplotlib                            gallery     images with every method's maps
document   the blocks that these make                       markdown, page: the blocks written out
"""

from __future__ import annotations

import hashlib
import json

from artifacts.access import reading_from, writing_to
from artifacts.durable import write_atomic
from artifacts.errors import ConfigError
from pipeline.data.reading.regular import is_regular
from pipeline.report.about import wanting
from pipeline.report.markdown import markdown, markdown_table
from pipeline.report.page import page
from pipeline.report.results import Results
from pipeline.report.tables import short_table
from pipeline.workspace import Workspace

FORMAT = 5
"""Raised when the pictures or the page are drawn otherwise, so that old reports are drawn again."""


def report(workspace: Workspace) -> str:
    """Write `report/report.md`, `report/report.html` and the pictures; returns short tables and where the report is.

    Finished runs only: what is missing is said in the report. Raises ConfigError if no run is finished or if the
    config names a table that the paper does not have. Nothing is drawn again when the runs are the same as in the last
    report.
    """
    results, layout = Results(workspace), workspace.layout
    if not results.methods:
        raise ConfigError(f"no finished run in {layout.runs}; run: e2kd distill CONFIG", path=layout.runs)
    text, html = layout.report / "report.md", layout.report / "report.html"
    stamp = _stamp(results)
    with reading_from(layout.report):
        drawn = is_regular(text) and html.exists() and stamp.encode() in text.read_bytes()
    if not drawn:
        _write(results, stamp)
    tables = [
        f"**{split}**\n\n{markdown_table(short_table(results, split))}"
        for split in workspace.experiment.evaluate.splits
    ]
    notes = [f"note: {what}: {', '.join(runs)}" for what, runs in wanting(results) if runs]
    return "\n\n".join([*tables, *notes, f"report: {text}\npage: {html}"])


def _write(results: Results, stamp: str) -> None:
    from pipeline.report.gallery import draw_gallery
    from pipeline.report.pictures import draw_curves, draw_shift
    from pipeline.report.sections import compose

    folder = results.layout.report
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    draw_shift(results, folder)
    document = compose(results, draw_gallery(results, folder), draw_curves(results, folder))
    write_atomic(folder / "report.html", page(document, folder).encode())
    write_atomic(folder / "report.md", f"{markdown(document)}\n\n<!-- {stamp} -->\n".encode())


def _stamp(results: Results) -> str:
    """Of everything that the report shows."""
    digest = hashlib.sha256(f"{FORMAT} {results.experiment.model_dump_json()}".encode())
    for method in results.methods:
        for seed, result in results.results[method.name].items():
            run = results.runs_files(method, seed)
            digest.update(json.dumps([method.student, seed, result, run]).encode())
    digest.update(json.dumps([wanting(results), results.measured()]).encode())
    return digest.hexdigest()
