"""The report's contents in order: what was run, scores, sweeps, curves, maps, costs."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.report import about
from pipeline.report.document import Block, Cell, Document, Heading, Picture, Row, Table, Text
from pipeline.report.paper import PaperTable
from pipeline.report.paper import table as paper_table
from pipeline.report.results import Results
from pipeline.report.tables import candidate_table, group_tables, score_table

READING = (
    "Mean ± standard deviation over seeds. Below a score: the difference to the baseline, the method with the same "
    "settings but lambda = 0, with the 95 % interval of a paired bootstrap over rows and seeds (2,000 resamples; none "
    "if a run's scores per row are not there). Few seeds say little of the next seed. EPG counts a dead (all-zero) "
    "map as 0; a high share of dead maps makes EPG and map cosine meaningless. Map cosine is to the teacher's map of "
    "the same class, at the student's resolution."
)

SEVERAL_LABELS = (
    "Images have several labels: F1 is over all images and classes (a logit of 0 or more is a yes). EPG and IoU are of "
    "each label's map against the boxes of its class, mean over all labels of all images. Agreement is of the highest "
    "class alone, and dead maps are those of the teacher's highest class."
)


def compose(results: Results, gallery: Sequence[Block], curves: Sequence[Picture]) -> Document:
    """The whole report; `gallery` and `curves` are the pictures, drawn or to be drawn."""
    parts: list[tuple[str, list[Block]]] = [
        ("What was run", [about.facts(results), about.settings_table(results)]),
        ("Scores", scores(results)),
        ("Sweeps", _sweeps(results)),
        ("Training curves", [Row(list(curves))] if curves else []),
        ("Shift curve", _shift(results)),
        ("Explanation maps", list(gallery)),
        ("Costs", _costs(results)),
    ]
    blocks = [block for name, inside in parts if inside for block in (Heading(name), *inside)]
    return Document(results.layout.root.name or "report", blocks)


def scores(results: Results) -> list[Block]:
    """A table per split, and one more if there are groups."""
    paper = paper_table(results.experiment.paper) if results.experiment.paper else None
    beside = _split_of(paper, results)
    blocks: list[Block] = [Text(READING)]
    if any("f1" in results.scores(m.name, split) for m in results.methods for split in results.splits):
        blocks.append(Text(SEVERAL_LABELS))
    for split in results.splits:
        blocks.append(
            score_table(results, split, _caption(results, split), paper if split == beside else None)
        )
        if paper and split == beside:
            blocks.append(Text(_disclaimer(paper)))
        blocks += group_tables(results, split)
    return blocks


def _split_of(paper: PaperTable | None, results: Results) -> str | None:
    """Which of our splits the paper's numbers stand beside."""
    if paper is None:
        return None
    return paper.split if paper.split in results.splits else results.splits[0]


def _disclaimer(paper: PaperTable) -> str:
    return (
        f"Columns “paper”: {paper.title} (Parchami-Araghi et al., ECCV 2024). Our data, schedule, seeds and "
        "hyper-parameters may differ from the paper's; compare differences between methods rather than single numbers."
    )


def _caption(results: Results, split: str) -> str:
    if split != results.experiment.evaluate.select:
        return split
    candidates = results.experiment.candidates.values()
    selects = any(candidate.settings.keep == "best" for candidate in candidates)
    return f"{split} ({'selects the epoch' if selects else 'settings are chosen here'})"


def _sweeps(results: Results) -> list[Block]:
    found = candidate_table(results)
    return [found] if found else []


def _shift(results: Results) -> list[Block]:
    """The picture and its numbers: the cosine of the maps of an image and its diagonal shift (paper Fig. 5)."""
    measured = results.shift_curves()
    if measured is None:
        return []
    split, curves = measured
    text = (
        f"Cosine of the map of an image of {split} and the map of the same image shifted right and down, on the area "
        "that both show (paper Fig. 5)."
    )
    alt = f"Map cosine by shift for {', '.join(curves)}"
    picture = Picture("shift-curve.png", alt, "Mean over seeds and one std.")
    shifts = [shift for shift, _ in next(iter(curves.values()))]
    rows = [
        [Cell(name), *(Cell(f"{dict(points)[s].mean:.3f}" if s in dict(points) else "") for s in shifts)]
        for name, points in curves.items()
    ]
    table = Table("Map cosine by shift in px", ["method", *map(str, shifts)], rows)
    return [Text(text), Row([picture]), table]


def _costs(results: Results) -> list[Block]:
    told = about.passes(results)
    store = about.store_costs(results)
    return [about.run_costs(results), *([Text(told)] if told else []), *([store] if store else [])]
