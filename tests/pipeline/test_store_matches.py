"""Which answers belong to which image, which store to which config, which run to which store: never anything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric

from artifacts import ImageSet, TeacherStore, open_images
from artifacts.errors import ConfigError, MismatchedStore
from artifacts.records import write_record
from pipeline.config import Experiment
from pipeline.distill.run import distill
from pipeline.evaluate.students import scored_elsewhere
from pipeline.explain import Explained
from pipeline.models import save_weights
from pipeline.precompute.run import precompute
from pipeline.provenance import FILE, matching_store, read_teacher
from pipeline.training.keep import kept_weights
from pipeline.training.run import Run
from pipeline.training.trained import build_explainer, load_teacher
from pipeline.workspace import Layout, Workspace, teacher_scores

Tiny = Callable[..., Experiment]
SPLIT = "val"


def answered(experiment: Experiment, layout: Layout, fabric: Fabric) -> TeacherStore:
    """The finished store of SPLIT, computed if it is not there."""
    store = precompute(Workspace(experiment, layout, fabric), SPLIT)
    assert store is not None
    return store


def images_of(layout: Layout) -> ImageSet:
    return open_images(layout.images(SPLIT))


def live(
    experiment: Experiment, layout: Layout, rows: list[int], classes: torch.Tensor | None = None
) -> Explained:
    """What the teacher says now of the canonical view of some rows."""
    images = images_of(layout)
    explainer = build_explainer(experiment.explain, load_teacher(Workspace(experiment, layout), images))
    found: Explained = explainer(torch.from_numpy(images.read_images(np.array(rows))).float() / 255, classes)
    return found


def change_the_teacher(layout: Layout, experiment: Experiment) -> None:
    """Other weights in the place of the taught ones."""
    teacher = load_teacher(Workspace(experiment, layout), images_of(layout))
    with torch.no_grad():
        next(teacher.parameters()).add_(0.1)
    save_weights(teacher.net, kept_weights(Run(layout.teacher)))


def test_a_row_of_the_store_is_the_teachers_answer_for_that_image(
    prepared: Layout, experiment_of: Tiny, fabric: Fabric
) -> None:
    experiment = experiment_of(store__name="exact", store__maps="lossless", store__logits="fp32")
    store, rows = answered(experiment, prepared, fabric), list(range(len(images_of(prepared))))
    stored, now = store.read(rows), live(experiment, prepared, rows)
    np.testing.assert_allclose(stored.logits[:, 0], now.logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stored.maps[:, 0, 0], now.maps, rtol=1e-4, atol=1e-5)
    assert stored.explained_class[:, 0, 0].tolist() == now.logits.argmax(1).tolist()
    assert len({tuple(logits) for logits in stored.logits[:, 0].round(4).tolist()}) > len(rows) / 2


def test_every_positive_class_has_its_own_map(prepared: Layout, experiment_of: Tiny, fabric: Fabric) -> None:
    experiment = experiment_of(
        explain__classes="positive",
        explain__most=3,
        store__name="several",
        store__maps="lossless",
        store__logits="fp32",
    )
    stored = answered(experiment, prepared, fabric).read(range(len(images_of(prepared))))
    places = 0
    for place in range(3):
        rows = np.flatnonzero(stored.explained_class[:, 0, place] >= 0).tolist()
        places += bool(rows)
        if rows:
            classes = torch.from_numpy(stored.explained_class[rows, 0, place])
            maps = live(experiment, prepared, rows, classes).maps
            np.testing.assert_allclose(stored.maps[rows, 0, place], maps, rtol=1e-4, atol=1e-5)
    assert places > 1


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"explain__logit": "raw"}, "explainer.settings.logit"),
        ({"explain__classes": "positive", "explain__most": 2}, "explainer.settings.classes"),
        ({"store__maps": "int8"}, "maps.codec"),
        ({"store__logits": "fp32"}, "logits.codec"),
    ],
)
def test_a_store_made_by_another_config_is_refused(
    changes: dict[str, Any], field: str, prepared: Layout, experiment_of: Tiny
) -> None:
    other = experiment_of(store__name=experiment_of().store_name, **changes)
    with pytest.raises(MismatchedStore, match=field):
        matching_store(Workspace(other, prepared), SPLIT, images_of(prepared))


def test_as_many_classes_as_the_config_says_are_stored(
    prepared: Layout, experiment_of: Tiny, fabric: Fabric
) -> None:
    two, three = (
        experiment_of(explain__classes="positive", explain__most=most, store__name="several")
        for most in (2, 3)
    )
    answered(two, prepared, fabric)
    with pytest.raises(MismatchedStore, match=r"explainer\.settings\.most"):
        matching_store(Workspace(three, prepared), SPLIT, images_of(prepared))


def test_a_store_of_another_teacher_is_refused(prepared: Layout, experiment_of: Tiny) -> None:
    workspace = Workspace(experiment_of(), prepared)
    record = read_teacher(workspace)
    assert record is not None
    write_record(workspace.beside_stores, FILE, record.model_copy(update={"weights_sha256": "0" * 64}))
    with pytest.raises(MismatchedStore, match=r"teacher\.weights_sha256"):
        matching_store(Workspace(experiment_of(), prepared), SPLIT, images_of(prepared))


def test_a_store_of_other_images_is_refused(prepared: Layout, experiment_of: Tiny) -> None:
    others = open_images(prepared.images("test-ood"))
    assert len(others) == len(images_of(prepared))
    with pytest.raises(MismatchedStore, match="images: store"):
        matching_store(Workspace(experiment_of(), prepared), SPLIT, others)


def test_what_was_measured_of_another_store_is_measured_again(
    prepared: Layout, experiment_of: Tiny, fabric: Fabric
) -> None:
    beside = prepared.stores(experiment_of().store_name)
    truth = beside.read(teacher_scores(SPLIT))
    beside.write(teacher_scores(SPLIT), json.dumps({**json.loads(truth), "store": "of before"}).encode())
    answered(experiment_of(), prepared, fabric)
    assert beside.read(teacher_scores(SPLIT)) == truth


def once(experiment_of: Tiny, **changes: Any) -> Experiment:
    """One student that trains for one epoch on 16 images."""
    return experiment_of(**{"train__epochs": 1, "train__rows": 16, "students": {"kd": {}}} | changes)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"train__lr": 0.25}, r"settings\.lr"),
        ({"explain__compare_at": "input"}, r"explain\.compare_at"),
        ({"evaluate__select": None}, "select"),
    ],
)
def test_a_run_is_not_continued_with_other_settings(
    changes: dict[str, Any], field: str, prepared: Layout, experiment_of: Tiny, fabric: Fabric
) -> None:
    result = distill(Workspace(once(experiment_of), prepared, fabric), "kd", 0)
    assert distill(Workspace(once(experiment_of), prepared, fabric), "kd", 0) == result
    with pytest.raises(ConfigError, match=f"{field}: run"):
        distill(Workspace(once(experiment_of, **changes), prepared, fabric), "kd", 0)


def test_a_run_is_not_continued_with_another_teacher(
    prepared: Layout, experiment_of: Tiny, fabric: Fabric
) -> None:
    distill(Workspace(once(experiment_of), prepared, fabric), "kd", 0)
    change_the_teacher(prepared, experiment_of())
    other = once(experiment_of, store__name="other")
    for split in other.answered_splits:
        precompute(Workspace(other, prepared, fabric), split)
    with pytest.raises(ConfigError, match="teacher: run"):
        distill(Workspace(other, prepared, fabric), "kd", 0)


def test_a_run_is_not_continued_on_other_images(
    prepared: Layout, experiment_of: Tiny, fabric: Fabric
) -> None:
    distill(Workspace(once(experiment_of), prepared, fabric), "kd", 0)
    other = once(experiment_of, train__split="test-ood")
    settings = Run(prepared.run("kd", 0)).path / "config.yaml"
    settings.write_text(settings.read_text().replace("split: train", "split: test-ood"))
    with pytest.raises(ConfigError, match="images: run"):
        distill(Workspace(other, prepared, fabric), "kd", 0)


def test_a_run_that_was_scored_beside_another_store_is_known(
    prepared: Layout, experiment_of: Tiny, fabric: Fabric
) -> None:
    distill(Workspace(once(experiment_of), prepared, fabric), "kd", 0)
    run = Run(prepared.run("kd", 0))
    assert scored_elsewhere(Workspace(once(experiment_of), prepared), run) == []
    result = run.result()
    result["stores"][SPLIT] = "of before"
    run.finish(result)
    assert scored_elsewhere(Workspace(once(experiment_of), prepared), run) == [SPLIT]
