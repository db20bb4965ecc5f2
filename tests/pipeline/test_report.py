"""The report on experiments made by hand: what is in the tables, what is said to be missing, what is drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image
from safetensors.numpy import save_file

from artifacts.errors import ConfigError
from pipeline.config import Experiment
from pipeline.distill.run import distill
from pipeline.explain import BCos, GradCAM
from pipeline.report import report
from pipeline.report.about import settings_table
from pipeline.report.document import Table
from pipeline.report.gallery import Answer, Examples, draw_examples, is_right, predicted, rows_by_class
from pipeline.report.markdown import markdown_table
from pipeline.report.results import Candidate, Results
from pipeline.report.tables import candidate_table, group_tables, score_table
from pipeline.training.run import Run
from pipeline.workspace import Layout, Workspace

Tiny = Callable[..., Experiment]
SPLIT = "test-ood"


def finish(layout: Layout, student: str, seed: int, scores: dict[str, Any], **more: Any) -> Path:
    """A finished run with these scores on the split."""
    run = Run(layout.run(student, seed))
    run.path.mkdir(parents=True)
    seconds = {"train": 2.0 + seed, "evaluate": 1.0}
    run.finish({"student": student, "seed": seed, "splits": {SPLIT: scores}, "seconds": seconds, **more})
    return run.path


def cell(table: Table, row: str, column: str) -> tuple[str, str]:
    found = next(cells for cells in table.rows if cells[0].text == row)[table.head.index(column)]
    return found.text, found.note


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "made")


def test_a_cell_is_mean_deviation_and_difference_to_the_student_without_lambda(
    layout: Layout, experiment_of: Tiny
) -> None:
    experiment = experiment_of(seeds=[0, 1])
    for seed, (kd, e2kd) in enumerate([(0.5, 0.75), (0.5, 0.625)]):
        finish(layout, "kd", seed, {"accuracy": kd})
        finish(layout, "e2kd", seed, {"accuracy": e2kd, "dead": 0.0})
    table = score_table(Results(Workspace(experiment, layout)), SPLIT, "x")
    assert cell(table, "kd", "accuracy %") == ("50.0 ± 0.0", "")
    assert cell(table, "e2kd", "accuracy %") == ("68.8 ± 8.8", "+18.8")
    assert cell(table, "kd", "dead maps %") == ("", "")
    assert table.head == ["method", "accuracy %", "dead maps %"]


def test_an_interval_where_the_rows_are_known_and_one_seed_has_no_deviation(
    layout: Layout, experiment_of: Tiny
) -> None:
    for name, share in (("kd-frozen", 0.0), ("e2kd-frozen", 1.0)):
        path = finish(layout, name, 0, {"accuracy": share})
        save_file({"accuracy": np.full(20, share, np.float32)}, path / f"scores-{SPLIT}.safetensors")
    results = Results(Workspace(experiment_of(), layout))
    table = score_table(results, SPLIT, "x")
    assert cell(table, "e2kd-frozen", "accuracy %") == ("100.0", "+100.0 [+100.0, +100.0]")
    assert results.missing() == ["ce seed 0", "kd seed 0", "e2kd seed 0"]


def test_only_seeds_that_both_have_are_compared(layout: Layout, experiment_of: Tiny) -> None:
    experiment = experiment_of(seeds=[0, 1])
    finish(layout, "kd", 1, {"accuracy": 0.5})
    finish(layout, "e2kd", 0, {"accuracy": 1.0})
    finish(layout, "e2kd", 1, {"accuracy": 0.75})
    assert (
        cell(score_table(Results(Workspace(experiment, layout)), SPLIT, "x"), "e2kd", "accuracy %")[1]
        == "+25.0"
    )


def test_undefined_scores_and_groups(layout: Layout, experiment_of: Tiny) -> None:
    scores = {"accuracy": 0.5, "epg": None, "worst_group_accuracy": 0.25}
    finish(layout, "kd", 0, {**scores, "group_10_accuracy": 0.25, "group_2_accuracy": float("nan")})
    results = Results(Workspace(experiment_of(), layout))
    table = score_table(results, SPLIT, "x")
    assert table.head == ["method", "accuracy %", "worst-group accuracy %", "EPG %"]
    assert cell(table, "kd", "EPG %") == ("undefined", "")
    (groups,) = group_tables(results, SPLIT)
    assert groups.head == ["method", "group 2", "group 10"]
    assert [found.text for found in groups.rows[0]] == ["kd", "undefined", "25.0"]


def test_the_papers_numbers_stand_beside_ours(layout: Layout, experiment_of: Tiny) -> None:
    for name in ("kd", "e2kd", "kd-frozen"):
        finish(layout, name, 0, {"accuracy": 0.5, "agreement": 0.5})
    report(Workspace(experiment_of(paper="table4/mobilenet"), layout))
    page = (layout.report / "report.md").read_text()
    assert "Table 4, MobileNet" in page
    assert "schedule, seeds and hyper-parameters may differ" in page
    (row,) = [line for line in page.splitlines() if line.startswith("| e2kd ") and "36.0" in line]
    assert [part.strip() for part in row.split("|")[1:6]] == [
        "e2kd",
        "50.0 (+0.0)",
        "36.0",
        "50.0 (+0.0)",
        "68.2",
    ]
    with pytest.raises(ConfigError, match="did you mean table4/mobilenet"):
        report(Workspace(experiment_of(paper="table4/mobilnet"), layout))


def test_settings_that_differ_are_shown(layout: Layout, experiment_of: Tiny) -> None:
    for name in ("ce", "e2kd"):
        finish(layout, name, 0, {"accuracy": 0.5})
    table = settings_table(
        Results(Workspace(experiment_of(students__ce={"loss": "ce", "augment": {"hflip": 0}}), layout))
    )
    assert table.head == ["method", "loss", "mode", "T", "lambda", "epochs", "augment.hflip"]
    assert [found.text for found in table.rows[1]] == ["e2kd", "kd", "online", "1", "5", "3", "0.5"]


def test_a_report_without_stores_images_and_histories_is_a_report(
    layout: Layout, experiment_of: Tiny
) -> None:
    with pytest.raises(ConfigError, match="no finished run"):
        report(Workspace(experiment_of(), layout))
    shift = {"split": SPLIT, "shifts": [0, 4], "cosine": [1.0, 0.25]}
    finish(layout, "kd", 0, {"accuracy": 0.5}, shift=shift)
    text = report(Workspace(experiment_of(), layout))
    page = (layout.report / "report.md").read_text()
    assert f"No maps of {SPLIT} are shown" in page
    assert "not finished: ce seed 0, e2kd seed 0" in page
    assert "| kd     | 1.000 | 0.250 |" in page
    assert (layout.report / "shift-curve.png").exists()
    assert "| kd     | 50.0       |" in text
    html = (layout.report / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 1
    assert "Teacher store" not in html


@pytest.mark.parametrize("metric", ["f1", "accuracy"])
def test_what_scores_of_several_labels_mean_is_said(metric: str, layout: Layout, experiment_of: Tiny) -> None:
    run = Run(finish(layout, "kd", 0, {metric: 0.5, "iou": 0.25}))
    for epoch in range(2):
        run.log([{"epoch": epoch, "loss": 1.0, "val_iou": 0.1 * epoch}])
    report(Workspace(experiment_of(), layout))
    page = (layout.report / "report.md").read_text()
    assert ("Images have several labels" in page) == (metric == "f1")
    assert "![validation IoU by epoch for kd](curve-val-iou.png)" in page


def test_a_terminals_table_is_aligned_and_in_ascii(layout: Layout, experiment_of: Tiny) -> None:
    experiment = experiment_of(seeds=[0, 1])
    for seed in (0, 1):
        finish(layout, "kd", seed, {"accuracy": 0.1 * seed, "map_cosine": 0.5})
        finish(layout, "e2kd", seed, {"accuracy": 1.0, "map_cosine": 0.5})
    text = report(Workspace(experiment, layout))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert text.isascii()
    assert len({len(line) for line in lines}) == 1
    assert "cosine" not in text


def test_markdown_shows_names_as_they_are() -> None:
    from pipeline.report.document import Cell

    table = Table("t", ["a|b"], [[Cell("<i>x</i> *y* z_1"), *()]])
    assert markdown_table(table).splitlines()[2] == r"| &lt;i&gt;x&lt;/i&gt; \*y\* z_1 |"


def test_the_report_of_real_runs_has_pictures_costs_and_is_not_drawn_twice(
    prepared: Layout, fabric: Fabric, experiment_of: Tiny
) -> None:
    experiment = experiment_of(train__epochs=2)
    for name in ("kd-frozen", "e2kd-frozen"):
        distill(Workspace(experiment, prepared, fabric), name, 0)
    report(Workspace(experiment, prepared))
    page, html = (prepared.report / "report.md").read_text(), prepared.report / "report.html"
    for picture in ("curve-loss.png", f"maps-{SPLIT}.png"):
        assert f"]({picture})" in page
        with Image.open(prepared.report / picture) as opened:
            assert opened.size[0] > 300
    assert "Teacher store gradcam-centred" in page
    assert re.search(r"\| e2kd-frozen +\| \d+\.\d \([+-]\d+\.\d \[[+-]\d+\.\d, [+-]\d+\.\d\]\)", page)
    assert "asked it 256 times" in page  # 2 runs x 64 rows x 2 epochs
    stamp = html.stat().st_mtime_ns
    report(Workspace(experiment, prepared))
    assert html.stat().st_mtime_ns == stamp
    run = prepared.run("kd-frozen", 0) / "result.json"
    changed = json.loads(run.read_text())
    changed["splits"][SPLIT]["accuracy"] = 0.123
    run.write_text(json.dumps(changed))
    assert "12.3" in report(Workspace(experiment, prepared))
    assert "12.3" in html.read_text()


def test_answers_are_right_or_wrong_by_label_or_by_set() -> None:
    logits = torch.tensor([0.0, -1.0, 2.0])
    assert predicted(logits, 1) == 2
    assert predicted(logits, (0,)) == (0, 2)
    assert [is_right(logits, label) for label in (2, 1, None, (2, 0), (2,), ())] == [
        True, False, None, True, False, False,
    ]  # fmt: skip


def test_examples_are_the_first_of_the_classes_in_turn() -> None:
    assert rows_by_class([1, 1, 0, 10, 0, 2]).tolist() == [2, 0, 5, 3]
    assert rows_by_class([(3, 1), (3,), (0,)], 3).tolist() == [2, 0, 1]
    assert rows_by_class([None, None], 3).tolist() == [0, 1]


def test_maps_of_every_kind_are_drawn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 30, 30), dtype=torch.uint8)
    examples = Examples(images, [(0, 1), None, ()], torch.tensor([0, 1, 7]), ["$x_1$ <cat>", "a long " * 9])
    answers = {
        "teacher": Answer(torch.randn(3, 2), torch.randn(3, 6, 30, 30), BCos),  # B-cos: in colour
        "kd": Answer(torch.randn(3, 2), torch.rand(3, 1, 5, 5), GradCAM),
        "dead": Answer(torch.randn(3, 2), torch.zeros(3, 1, 5, 5), GradCAM),
    }
    draw_examples(examples, answers, tmp_path / "maps.png")
    draw_examples(
        replace(examples, labels=[None] * 3), answers, tmp_path / "maps.png"
    )  # without red and green
    with Image.open(tmp_path / "maps.png") as opened:
        pixels = np.asarray(opened.convert("RGB")).astype(int)
    width = pixels.shape[1]
    columns = [pixels[:, k * width // 4 : (k + 1) * width // 4] for k in range(4)]
    saturated = [(np.abs(c - c.mean(2, keepdims=True)).max(2) > 30).mean() for c in columns]
    assert saturated[1] > 0.02  # colour of the B-cos map
    assert saturated[3] < 0.02  # a dead map leaves the grey image


def test_a_swept_method_is_compared_with_its_own_best_baseline(layout: Layout, experiment_of: Tiny) -> None:
    students = {"kd": {}, "e2kd": {"explanation_weight": 5, "temperature": 2}}
    for name in students:
        finish(layout, name, 0, {"accuracy": 0.5})
    plain = Results(Workspace(experiment_of(students=students), layout))
    assert plain.baseline(plain.methods[1]) is None  # another temperature, and nobody swept it
    swept = Results(Workspace(experiment_of(students=students), layout))
    swept.methods = [replace(method, swept=frozenset({"temperature"})) for method in swept.methods]
    found = swept.baseline(swept.methods[1])
    assert found is not None
    assert found.name == "kd"


def test_the_candidates_of_a_sweep_and_the_chosen_one_are_listed(layout: Layout, experiment_of: Tiny) -> None:
    grid = {"e2kd": {"temperature": [1, 5]}}
    experiment = experiment_of(students={"e2kd": {"explanation_weight": 5}}, sweep=grid)
    results = Results(Workspace(experiment, layout))
    names = ("e2kd,temperature=1", "e2kd,temperature=5")
    (method,) = results.all_methods
    assert [candidate.student for candidate in method.candidates] == list(names)
    swept = replace(
        method, student=names[1], candidates=(Candidate(names[0], None), Candidate(names[1], 0.5))
    )
    results.all_methods = [swept]
    table = candidate_table(results)
    assert table is not None
    assert [[found.text for found in row] for row in table.rows] == [
        ["e2kd", "temperature=1", "not finished", ""],
        ["e2kd", "temperature=5", "50.0", "chosen"],
    ]
