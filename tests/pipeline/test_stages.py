"""Stage 1 and the order of the stages: nothing is done twice, nothing foreign is read, mistakes are sentences."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image

from artifacts import open_images, open_store, verify_store
from artifacts.errors import ConfigError, DataError, ImageSetError, MismatchedStore, ModelError
from pipeline.config import Experiment, load
from pipeline.data.batches import PairedRows
from pipeline.distill.run import distill
from pipeline.evaluate.scores import score, teacher_answers
from pipeline.explain import GradCAM
from pipeline.models import load_weights, save_weights
from pipeline.order.prepare import prepare_stores, prepare_teacher
from pipeline.order.runs import distill_all
from pipeline.precompute import answer as module
from pipeline.report import report
from pipeline.training.keep import kept_weights
from pipeline.training.run import Run
from pipeline.training.trained import build_explainer, load_teacher
from pipeline.workspace import Layout, Workspace

Tiny = Callable[..., Experiment]
STORE = "gradcam-centred"


def _store_files(layout: Layout) -> dict[str, bytes]:
    root = layout.store(STORE, "train").path
    return {
        str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()
    }


def test_the_store_is_true_and_holds_the_teachers_answers(
    prepared: Layout, experiment_of: Tiny, fabric: Fabric
) -> None:
    images, store = open_images(prepared.images("train")), open_store(prepared.store(STORE, "train"))
    assert verify_store(prepared.store(STORE, "train"), prepared.images("train")).ok
    assert len(store) == len(images) == 96
    explainer = build_explainer(
        experiment_of().explain, load_teacher(Workspace(experiment_of(), prepared), images)
    )
    rows = np.array([0, 95, 31, 32])
    live = explainer(torch.from_numpy(images.read_images(rows)).float() / 255)
    stored = store.read(rows)
    np.testing.assert_allclose(stored.logits[:, 0], live.logits.numpy(), rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(stored.maps[:, 0, 0], live.maps.numpy(), rtol=2e-3, atol=1e-4)
    assert (stored.explained_class[:, 0, 0] == live.logits.argmax(1).numpy()).all()
    scores = score(fabric, teacher_answers(GradCAM), PairedRows(images, store, masks="any"), 50).means
    assert scores["agreement"] == 1
    assert scores["map_cosine"] == pytest.approx(1 - scores["dead"], abs=1e-5)


def test_nothing_is_asked_twice(
    prepared: Layout, fabric: Fabric, experiment_of: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ask", lambda *args: pytest.fail("the teacher was asked again"))
    before = _store_files(prepared)
    prepare_stores(Workspace(experiment_of(), prepared, fabric))
    assert _store_files(prepared) == before


def test_only_uncommitted_shards_are_computed_again(
    prepared: Layout, fabric: Fabric, experiment_of: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _store_files(prepared)
    store = prepared.store(STORE, "train").path
    (store / "commits" / "000001.json").unlink()
    (store / "manifest.json").unlink()
    (store / "maps" / "c" / "1" / "0" / "0" / "0" / "0" / "0").write_bytes(b"half a shard")
    real, asked = module._ask, []
    monkeypatch.setattr(module, "_ask", lambda *args: asked.append(args[2]) or real(*args))
    prepare_stores(Workspace(experiment_of(), prepared, fabric))
    assert sorted(row for rows in asked for row in rows) == list(range(32, 64))
    assert _store_files(prepared) == before


def test_a_store_of_another_teacher_is_refused(prepared: Layout, fabric: Fabric, experiment_of: Tiny) -> None:
    images = open_images(prepared.images("train"))
    teacher = load_teacher(Workspace(experiment_of(), prepared), images)
    with torch.no_grad():
        next(teacher.parameters()).add_(1)
    save_weights(teacher, kept_weights(Run(prepared.teacher)))
    with pytest.raises(MismatchedStore, match=r"teacher\.weights_sha256: store '\w+', config '\w+'"):
        prepare_stores(Workspace(experiment_of(), prepared, fabric))


def test_other_images_in_the_same_folder_are_refused(
    prepared: Layout, fabric: Fabric, experiment_of: Tiny
) -> None:
    with pytest.raises(ImageSetError, match=r"holds other images.*\n.*\n.*--out DIR"):
        prepare_stores(Workspace(experiment_of(data__seed=5), prepared, fabric))


def test_another_explanation_gets_a_store_of_its_own(
    prepared: Layout, fabric: Fabric, experiment_of: Tiny
) -> None:
    raw = experiment_of(
        explain__logit="raw", teacher__train=None, teacher__weights=str(kept_weights(Run(prepared.teacher)))
    )
    prepare_stores(Workspace(raw, prepared, fabric))
    a, b = (open_store(prepared.store(name, "train")) for name in (STORE, "gradcam-raw"))
    assert a.manifest.explainer != b.manifest.explainer
    assert np.array_equal(a.read([3]).logits, b.read([3]).logits)


def test_the_freezing_gap_is_recorded(prepared: Layout) -> None:
    gap = json.loads(prepared.stores(STORE).read("freezing-gap.json"))
    assert gap.pop("store") == open_store(prepared.store(STORE, "train")).manifest.identity
    assert set(gap) == {"crop", "flip", "both"}
    assert all(-1 <= values["p1"] <= values["mean"] <= 1.0001 for values in gap.values())


def test_a_teacher_with_nan_weights_names_the_sample(
    prepared: Layout, fabric: Fabric, experiment_of: Tiny
) -> None:
    images = open_images(prepared.images("train"))
    teacher = load_teacher(Workspace(experiment_of(), prepared), images)
    with torch.no_grad():
        next(teacher.parameters()).fill_(torch.nan)
    save_weights(teacher, kept_weights(Run(prepared.teacher)))
    shutil.rmtree(prepared.stores(STORE))
    with pytest.raises(DataError, match=f"sample {images.keys[0]} are not finite"):
        prepare_stores(Workspace(experiment_of(), prepared, fabric))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Unlabelled JPEGs of several sizes."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(24):
        pixels = rng.integers(0, 255, (60 + index, 90, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"photo {index}.jpg")
    return folder


def test_an_unlabelled_folder_distils_from_a_pretrained_teacher(
    photos: Path, tmp_path: Path, prepared: Layout, fabric: Fabric, experiment_of: Tiny
) -> None:
    weights = tmp_path / "teacher.safetensors"
    shutil.copy(kept_weights(Run(prepared.teacher)), weights)
    experiment = experiment_of(
        data={"source": "folder", "root": str(photos), "val_fraction": 0.3},
        teacher={"model": "toy/resnet", "width": 4, "weights": str(weights), "classes": 2},
        evaluate={"select": "val", "splits": ["val"]},
        train__rows=None,
        train__batch_size=4,
    )
    layout = Layout(tmp_path / "photos-run")
    distill_all(Workspace(experiment, layout, fabric), ["e2kd", "e2kd-frozen"], [0])
    assert load(layout.config) == experiment  # the folder explains itself: `e2kd report FOLDER`
    scores = Run(layout.run("e2kd-frozen", 0)).result()["splits"]["val"]
    assert set(scores) == {"agreement", "dead", "map_cosine"}
    with pytest.raises(ConfigError, match=r"student ce needs labels"):
        distill(Workspace(experiment, layout, fabric), "ce", 0)


def test_guidance_without_masks_names_the_sample(
    photos: Path, tmp_path: Path, fabric: Fabric, experiment_of: Tiny
) -> None:
    for name in ("a", "b"):
        (photos / name).mkdir()
    for index, file in enumerate(sorted(photos.glob("*.jpg"))):
        file.rename(photos / "ab"[index % 2] / file.name)
    data = {"source": "folder", "root": str(photos), "val_fraction": 0.3}
    with pytest.raises(DataError, match=r"has no mask, which guidance"):
        prepare_teacher(
            Workspace(
                experiment_of(data=data, evaluate={"select": "val", "splits": ["val"]}),
                Layout(tmp_path / "x"),
                fabric,
            )
        )


def test_a_teacher_with_other_classes_than_the_data(
    tmp_path: Path, fabric: Fabric, experiment_of: Tiny
) -> None:
    with pytest.raises(ModelError, match=r"the teacher has 7 classes but .* has 2"):
        prepare_stores(Workspace(experiment_of(teacher__classes=7), Layout(tmp_path / "new"), fabric))


def test_the_report_has_every_student_its_difference_and_its_picture(
    prepared: Layout, fabric: Fabric, experiment_of: Tiny
) -> None:
    experiment = experiment_of(train__epochs=1, seeds=[0, 1])
    with pytest.raises(ConfigError, match="no finished run"):
        report(Workspace(experiment, prepared))
    for seed in experiment.seeds:
        for name in ("kd-frozen", "e2kd-frozen"):
            distill(Workspace(experiment, prepared, fabric), name, seed)
    text = report(Workspace(experiment, prepared))
    page = (prepared.report / "report.md").read_text()
    runs = [
        Run(prepared.run("kd-frozen", seed)).result()["splits"]["test-ood"]["accuracy"] for seed in (0, 1)
    ]
    assert f"{100 * sum(runs) / 2:.1f} +- " in text
    assert "teacher" in text
    assert "e2kd-frozen" in text
    assert "not finished: ce seed 0" in page
    picture = prepared.report / "maps-test-ood.png"
    with Image.open(picture) as opened:
        assert opened.size[0] > 300
    assert (prepared.report / "report.html").exists()
    stamp = picture.stat().st_mtime_ns
    assert report(Workspace(experiment, prepared)) == text
    assert picture.stat().st_mtime_ns == stamp


def test_loading_weights_that_do_not_fit_says_what_differs(prepared: Layout, experiment_of: Tiny) -> None:
    images = open_images(prepared.images("train"))
    wide = load_teacher(Workspace(experiment_of(), prepared), images)
    from pipeline.models import build

    other = build(experiment_of().teacher.model_copy(update={"width": 8}), 2)
    save_weights(wide, prepared.root / "w.safetensors")
    with pytest.raises(ModelError, match="other shape"):
        load_weights(other, prepared.root / "w.safetensors")
