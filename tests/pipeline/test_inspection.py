"""`e2kd inspect`, `export` and `import`: what they say, draw and refuse."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from artifacts import open_images, open_store
from cli.main import app, run_guarded
from pipeline.config import Experiment
from pipeline.workspace import Layout


def e2kd(*arguments: object) -> int:
    return run_guarded(lambda: app([str(a) for a in arguments]))


@pytest.fixture
def store(prepared: Layout, experiment_of: Callable[..., Experiment]) -> Path:
    return Path(str(prepared.store(experiment_of().store_name, "val")))


@pytest.fixture
def images(prepared: Layout) -> Path:
    return Path(str(prepared.images("val")))


def test_the_summary_of_a_store(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert e2kd("inspect", store) == 0
    text = capsys.readouterr().out
    manifest = open_store(store).manifest
    for part in (
        f"toy/resnet, 2 classes, weights {manifest.teacher.weights_sha256[:12]}",
        "gradcam {'logit': 'centred'}",
        f"96 rows in 3 shards, image set {manifest.images[:12]}",
        "1x12x12, e2kd.fp16 (relative 2^-11",
        f"{manifest.dead_maps} ({manifest.dead_maps / 96:.2%})",
        "per image",
        "x smaller than float32",
        "is not payload",
        '"whole": {"mean"',  # codec cost
        '"flip": {"mean"',  # freezing gap
    ):
        assert part in text, part
    assert text.splitlines()[0].split() == ["store", str(store)]
    for array, record in manifest.shards[0].arrays.items():
        total = sum(shard.arrays[array].bytes for shard in manifest.shards)
        line = next(line for line in text.splitlines() if line.startswith(f"  {array} "))
        size = f"{total} B" if total < 1024 else f"{total / 1024:.1f} KiB"
        assert f"  {size}, " in line, (line, record)


def test_the_summary_of_an_image_set(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert e2kd("inspect", images) == 0
    text = capsys.readouterr().out
    for part in (
        "96 in 3 shards of 32 rows",
        "size 48",
        "2, 96 images labelled",
        open_images(images).fingerprint,
    ):
        assert part in text, part
    assert len(text.splitlines()) == 6


def test_a_row_is_drawn_by_number_and_by_key(
    store: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = open_images(images).keys[40]
    drawn = []
    for which in (["--row", 40], ["--key", key]):
        png = tmp_path / f"{which[0]}.png"
        assert e2kd("inspect", store, *which, "--png", png) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1] == f"drawn: {png}"
        logits = [float(line.split()[0]) for line in lines[:-1]]
        expected = np.sort(open_store(store).read([40]).logits[0, 0])[::-1]
        np.testing.assert_allclose(logits, expected, atol=5e-4)
        names = set(open_store(store).manifest.teacher.class_names)
        assert {line.split(maxsplit=1)[1] for line in lines[:-1]} == names
        pixels = matplotlib.image.imread(png)
        assert pixels.shape[0] > 300
        assert pixels.shape[1] > 900
        assert pixels[..., :3].std() > 0.1
        assert not png.with_name(png.name + ".partial").exists()
        drawn.append(png.read_bytes())
    assert drawn[0] == drawn[1]
    assert 5_000 < len(drawn[0]) < 500_000


def test_without_a_file_the_picture_is_named_after_the_row(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert e2kd("inspect", store, "--row", 3) == 0
    assert (tmp_path / "row-3.png").exists()


def test_a_row_with_a_dead_map_and_no_label_is_drawn(tmp_path: Path, store: Path, images: Path) -> None:
    dead = [row for row in range(96) if not open_store(store).read([row]).maps.any()]
    for row in [0, 95, *dead[:1]]:
        assert e2kd("inspect", store, "--row", row, "--png", tmp_path / f"{row}.png") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--row", 96], "row 96 is not in {store}, which has rows 0 to 95"),
        (["--row", -1], "row -1 is not in {store}, which has rows 0 to 95"),
        (["--key", "nobody"], "{images} has no sample nobody; keys look like "),
        (["--row", 1, "--key", "x"], "--png draws one row: give --row or --key"),
        ([], "--png draws one row: give --row or --key"),
        (["--row", 1, "--images", "nowhere"], "the image set nowhere is not there"),
    ],
)
def test_a_picture_of_nothing_is_one_sentence(
    store: Path,
    images: Path,
    tmp_path: Path,
    arguments: list[object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert e2kd("inspect", store, *arguments, "--png", tmp_path / "x.png") == 2
    error = capsys.readouterr().err
    assert message.format(store=store, images=images) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


def test_a_store_without_images_beside_it_says_how_to_give_them(
    store: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = Path(shutil.copytree(store, tmp_path / "alone"))
    png = tmp_path / "x.png"
    assert e2kd("inspect", alone) == 0
    capsys.readouterr()
    assert e2kd("inspect", alone, "--row", 1, "--png", png) == 2
    assert f"no image set beside {alone}; say where it is with --images" in capsys.readouterr().err
    assert e2kd("inspect", alone, "--row", 1, "--png", png, "--images", images) == 0
    assert png.exists()


def test_nothing_and_damage_are_one_sentence(
    store: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (store / "maps/c/1/0/0/0/0/0").write_bytes(b"")
    (images / "shard-000002.tar").unlink()
    for place, message in [
        (tmp_path / "nowhere", "there is no teacher store at"),
        (store, "array maps, shard 1 (rows 32 to 63) has 0 bytes"),
        (images, "shard-000002.tar (rows 64 to 95) is missing"),
    ]:
        assert e2kd("inspect", place) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_row_is_not_drawn_over_other_images(prepared: Layout, store: Path, tmp_path: Path) -> None:
    other = prepared.images("train")
    assert e2kd("inspect", store, "--row", 1, "--png", tmp_path / "x.png", "--images", other) == 2


def test_a_picture_in_a_folder_that_is_not_there(store: Path, tmp_path: Path) -> None:
    assert e2kd("inspect", store, "--row", 1, "--png", tmp_path / "new" / "x.png") in (0, 2)


def test_a_damaged_measurement_does_not_hide_the_store(store: Path) -> None:
    (store.parent / "codec-cost.json").write_text("{")
    assert e2kd("inspect", store) in (0, 2)


# ---- export and import


def test_export_and_import_from_the_command_line(
    prepared: Layout, store: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, again = tmp_path / "export", tmp_path / "again"
    assert e2kd("export", store, out) == 0
    printed = capsys.readouterr().out
    assert "export: 96/96 images in" in printed
    assert printed.splitlines()[-1] == f"exported: {out}"
    name = store.parent.name
    target = [again / "images" / "val", again / "stores" / name / "val"]
    assert e2kd("import", out, *target) == 0
    assert f"imported: 96 rows to {target[0]} and {target[1]}" in capsys.readouterr().out
    for old, new in zip([images, store], target, strict=True):
        assert {f.relative_to(old): f.read_bytes() for f in old.rglob("*") if f.is_file()} == {
            f.relative_to(new): f.read_bytes() for f in new.rglob("*") if f.is_file()
        }
    assert e2kd("verify", target[1]) == 0
    assert f"rows against {target[0]}" in capsys.readouterr().out
    assert e2kd("inspect", target[1], "--row", 5, "--png", tmp_path / "x.png") == 0


def test_export_and_import_of_the_wrong_thing_exit_2(
    store: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in [
        (["export", tmp_path / "nowhere", tmp_path / "x"], "there is no teacher store at"),
        (["export", store, tmp_path / "x", "--images", tmp_path / "nowhere"], "is not there; run: e2kd pack"),
        (["import", images, tmp_path / "i", tmp_path / "s"], "has no e2kd.json: make an export with"),
        (["import", tmp_path / "nowhere", tmp_path / "i", tmp_path / "s"], "has no e2kd.json"),
    ]:
        assert e2kd(*arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
