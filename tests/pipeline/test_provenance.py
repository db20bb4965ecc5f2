"""Whose a store is, from records: students train without the teacher; nothing is taught twice for a shared store."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file

from artifacts.errors import IncompleteStore, MismatchedStore, ModelError
from pipeline.config import Experiment, ModelConfig
from pipeline.distill.run import distill
from pipeline.models import build, save_weights
from pipeline.order import prepare
from pipeline.order.prepare import prepare_stores
from pipeline.order.runs import distill_all
from pipeline.progress import Quiet
from pipeline.provenance import (
    FILE,
    WEIGHTS,
    TeacherRecord,
    described,
    expected,
    matching_store,
    read_teacher,
    write_teacher,
)
from pipeline.training import trained
from pipeline.training.run import Run
from pipeline.workspace import CODEC_COST, Layout, Workspace

Tiny = Callable[..., Experiment]
SHORT: dict[str, Any] = {"train__epochs": 1, "train__rows": 32}


def forbid_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building, loading and hashing a teacher are errors from here on; so is teaching one."""

    def forbidden(*_: object) -> None:
        raise AssertionError("stage 2 asked for the teacher's network")

    for name in ("load_teacher", "weights_sha256"):
        monkeypatch.setattr(trained, name, forbidden)
    monkeypatch.setattr("pipeline.distill.run.load_teacher", forbidden)
    monkeypatch.setattr(prepare, "teach", forbidden)


@pytest.mark.parametrize("kind", ["taught", "pretrained"])
def test_frozen_students_train_without_the_teacher(
    kind: str,
    prepared: Layout,
    fabric: Fabric,
    experiment_of: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    students = {"kd": {}, "e2kd": {"explanation_weight": 5}, "ce": {"loss": "ce"}}
    changes = {**SHORT, "students": students}
    if kind == "pretrained":
        file = tmp_path / "teacher.safetensors"
        torch.manual_seed(0)
        save_weights(build(ModelConfig(model="toy/resnet", width=4), 2), file)
        changes |= {
            "teacher": {"model": "toy/resnet", "width": 4, "weights": str(file)},
            "store__name": "file",
        }
    workspace = Workspace(experiment_of(**changes), prepared, fabric)
    prepare_stores(workspace)
    if kind == "pretrained":
        file.unlink()
    else:
        shutil.rmtree(prepared.teacher)
    forbid_teachers(monkeypatch)
    distill_all(workspace, list(students), [0])
    assert all(Run(prepared.run(name, 0)).done for name in students)


def test_a_shared_store_is_not_taught_for_again(
    fabric: Fabric, experiment_of: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another folder, as on another machine: frozen students need nothing, online ones take the weights from beside."""
    experiment = experiment_of(**SHORT, artifacts=str(tmp_path / "shared"))
    first, second = (
        Workspace(experiment, Layout(tmp_path / name, experiment.artifacts), fabric) for name in ("a", "b")
    )
    prepare_stores(first)
    with monkeypatch.context() as patched:
        forbid_teachers(patched)
        distill_all(second, ["e2kd-frozen"], [0])
    assert not second.layout.teacher.exists()
    monkeypatch.setattr(prepare, "teach", lambda *_: pytest.fail("taught again"))
    for workspace in (first, second):
        distill_all(workspace, ["e2kd"], [0])
    own, other = (load_file(w.layout.run("e2kd", 0) / "last.safetensors") for w in (first, second))
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_damaged_shared_weights_are_refused(fabric: Fabric, experiment_of: Tiny, tmp_path: Path) -> None:
    experiment = experiment_of(**SHORT, artifacts=str(tmp_path / "shared"))
    first = Workspace(experiment, Layout(tmp_path / "a", experiment.artifacts), fabric)
    prepare_stores(first)
    with torch.no_grad():
        other = build(experiment.teacher.model_copy(update={"weights": None, "train": None}), 2)
    save_weights(other, Path(str(first.beside_stores)) / WEIGHTS)
    second = Workspace(experiment, Layout(tmp_path / "b", experiment.artifacts), fabric)
    with pytest.raises(ModelError, match=rf"{WEIGHTS} is damaged"):
        distill_all(second, ["e2kd"], [0])


def test_an_online_student_never_trains_beside_another_network(
    prepared: Layout, fabric: Fabric, experiment_of: Tiny
) -> None:
    """Whatever the records say of a file that was replaced."""
    workspace = Workspace(experiment_of(**SHORT), prepared, fabric)
    prepare_stores(workspace)
    replace_teacher(workspace)
    with pytest.raises(MismatchedStore, match=r"teacher\.weights_sha256"):
        distill(workspace, "e2kd", 0)
    assert not Run(prepared.run("e2kd", 0)).done


def replace_teacher(workspace: Workspace) -> None:
    """Other weights in its file, of the same size and time."""
    file = trained.teacher_weights(workspace)
    state = file.stat()
    plain = workspace.experiment.teacher.model_copy(update={"train": None})
    torch.manual_seed(99)
    save_weights(build(plain, 2), file)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert file.stat().st_size == state.st_size


def test_a_file_that_was_replaced_is_looked_at_whatever_its_time(
    prepared: Layout, fabric: Fabric, experiment_of: Tiny
) -> None:
    workspace = Workspace(experiment_of(**SHORT), prepared, fabric)
    prepare_stores(workspace)
    replace_teacher(workspace)
    with pytest.raises(MismatchedStore, match=r"teacher\.weights_sha256"):
        prepare_stores(workspace)


def test_configs_that_name_the_same_network_otherwise_share_its_stores(
    fabric: Fabric, experiment_of: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one's record does not shut the first one out, even without its file."""
    workspaces = []
    for name in ("t", "u"):
        torch.manual_seed(0)
        file = tmp_path / f"{name}.safetensors"
        save_weights(build(ModelConfig(model="toy/resnet", width=4), 2), file)
        teacher = {"model": "toy/resnet", "width": 4, "weights": str(file)}
        experiment = experiment_of(**SHORT, teacher=teacher, artifacts=str(tmp_path / "shared"))
        workspaces.append(Workspace(experiment, Layout(tmp_path / name, experiment.artifacts), fabric))
        prepare_stores(workspaces[-1])
        file.unlink()
    forbid_teachers(monkeypatch)
    for workspace in workspaces:
        distill_all(workspace, ["e2kd-frozen"], [0])


def test_students_that_do_not_ask_it_need_no_teacher_taught(
    prepared: Layout, fabric: Fabric, experiment_of: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the config has an online student; what only the teacher can say is said to be missing."""
    said: list[str] = []
    lines = Quiet()
    monkeypatch.setattr(lines, "say", said.append)
    workspace = Workspace(experiment_of(**SHORT, evaluate__shifts=[1]), prepared, fabric, lines)
    shutil.rmtree(prepared.teacher)
    workspace.beside_stores.remove(CODEC_COST)
    forbid_teachers(monkeypatch)
    distill_all(workspace, ["e2kd-frozen"], [0])
    assert [line for line in said if "not here" in line] == [
        "not measured: the teacher's shift curve; the teacher's weights are not here",
        "not measured: what storing and freezing cost; the teacher's weights are not here",
    ]


def test_nothing_is_taught_before_a_store_of_something_else_is_named(
    fabric: Fabric, experiment_of: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = str(tmp_path / "shared")
    first = experiment_of(**SHORT, artifacts=shared)
    prepare_stores(Workspace(first, Layout(tmp_path / "a", shared), fabric))
    monkeypatch.setattr(prepare, "teach", lambda *_: pytest.fail("taught"))
    other = experiment_of(**SHORT, artifacts=shared, teacher__train__epochs=3)
    with pytest.raises(MismatchedStore, match=r"teacher\.train\.epochs: store 2, config 3"):
        prepare_stores(Workspace(other, Layout(tmp_path / "b", shared), fabric))


def test_lost_shared_weights_are_shared_again(fabric: Fabric, experiment_of: Tiny, tmp_path: Path) -> None:
    experiment = experiment_of(**SHORT, artifacts=str(tmp_path / "shared"))
    workspace = Workspace(experiment, Layout(tmp_path / "a", experiment.artifacts), fabric)
    prepare_stores(workspace)
    whole = workspace.beside_stores.read(WEIGHTS)
    workspace.beside_stores.remove(WEIGHTS)
    prepare_stores(workspace)
    assert workspace.beside_stores.read(WEIGHTS) == whole


def test_a_config_of_another_teacher_is_refused_with_what_differs(
    prepared: Layout, fabric: Fabric, experiment_of: Tiny
) -> None:
    other = Workspace(experiment_of(teacher__train__epochs=9), prepared, fabric)
    with pytest.raises(MismatchedStore, match=r"teacher\.train\.epochs: store 2, config 9"):
        matching_store(other, "train", other.open_images("train"))


def test_one_folder_has_the_stores_of_one_teacher(
    prepared: Layout, fabric: Fabric, experiment_of: Tiny
) -> None:
    """Another one's record is refused while any split's store is there, though nobody looks at that store."""
    workspace = Workspace(experiment_of(), prepared, fabric)
    record = read_teacher(workspace)
    assert record is not None
    other = record.model_copy(update={"weights_sha256": "0" * 64})
    first, *rest = workspace.experiment.answered_splits
    for split in rest:
        workspace.store_place(split).remove("draft.json")
    with pytest.raises(MismatchedStore, match=r"teacher\.weights_sha256"):
        write_teacher(workspace, other)
    assert read_teacher(workspace) == record
    workspace.store_place(first).remove("draft.json")
    write_teacher(workspace, other)
    assert read_teacher(workspace) == other


@pytest.mark.parametrize(
    ("model", "explainer", "channels", "codec"),
    [("toy/resnet", "gradcam", 1, "e2kd.fp16"), ("bcos/small", "bcos", 6, "e2kd.int6")],
)
def test_the_record_the_explainer_and_the_images_say_what_a_store_must_be(
    model: str, explainer: str, channels: int, codec: str, prepared: Layout, experiment_of: Tiny
) -> None:
    experiment = experiment_of(teacher__model=model, train__model=model)
    record = TeacherRecord(
        configs=[described(experiment)],
        weights_sha256="a" * 64,
        preprocessing={"mean": [0.5]},
        classes=2,
        image_size=48,
        map_size=(6, 7),
    )
    images = Workspace(experiment, prepared).open_images("train")
    draft = expected(experiment, record, images)
    assert (draft.teacher.architecture, draft.teacher.weights_sha256) == (model, "a" * 64)
    assert (draft.teacher.preprocessing, draft.teacher.class_names) == ({"mean": [0.5]}, images.classes)
    assert (draft.explainer.name, draft.explainer.settings) == (explainer, {"logit": "centred"})
    assert (draft.images, draft.view) == (images.fingerprint, images.view)
    assert (draft.shape.channels, draft.shape.height, draft.shape.width) == (channels, 6, 7)
    assert (draft.shape.rows, draft.shape.explained, draft.shape.classes) == (len(images), 1, 2)
    assert (draft.logits.codec, draft.maps.codec) == ("e2kd.fp16", codec)


def test_stores_without_a_record_are_recorded_by_stage_1(
    prepared: Layout, fabric: Fabric, experiment_of: Tiny
) -> None:
    workspace = Workspace(experiment_of(), prepared, fabric)
    record = read_teacher(workspace)
    assert record is not None
    workspace.beside_stores.remove(FILE)
    with pytest.raises(IncompleteStore, match="does not say whose its stores are"):
        matching_store(workspace, "train", workspace.open_images("train"))
    before = {f: f.stat().st_mtime_ns for f in Path(str(workspace.beside_stores)).rglob("*") if f.is_file()}
    prepare_stores(workspace)
    assert read_teacher(workspace) == record
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())


def test_a_record_names_no_folder_and_fits_the_same_file_elsewhere(
    fabric: Fabric, experiment_of: Tiny, tmp_path: Path
) -> None:
    """Two machines with the weights in folders of their own share the stores."""
    experiments = []
    for name in ("here", "there"):
        file = tmp_path / name / "weights.safetensors"
        file.parent.mkdir()
        torch.manual_seed(0)
        save_weights(build(ModelConfig(model="toy/resnet", width=4), 2), file)
        teacher = {"model": "toy/resnet", "width": 4, "weights": str(file)}
        experiments.append(experiment_of(teacher=teacher, artifacts=str(tmp_path / "shared")))
    for name, experiment in zip(("a", "b"), experiments, strict=True):
        workspace = Workspace(experiment, Layout(tmp_path / name, experiment.artifacts), fabric)
        prepare_stores(workspace)
        assert str(tmp_path) not in workspace.beside_stores.read(FILE).decode()


def test_a_file_that_was_written_again_is_looked_at_again(
    prepared: Layout, fabric: Fabric, experiment_of: Tiny
) -> None:
    """Copied or touched it is the same teacher; with other weights it is not."""
    workspace = Workspace(experiment_of(), prepared, fabric)
    weights = trained.teacher_weights(workspace)
    weights.touch()
    prepare_stores(workspace)
    tensors = build(experiment_of().teacher.model_copy(update={"train": None}), 2)
    save_weights(tensors, weights)
    with pytest.raises(MismatchedStore, match=r"teacher\.weights_sha256"):
        prepare_stores(workspace)
