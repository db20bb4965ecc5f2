"""`e2kd verify` and its `--repair`: exactly what is damaged is made again, and ends byte for byte as it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import pipeline.precompute.answer
from artifacts import TeacherRows, verify_images, verify_store
from artifacts.places import LocalPlace
from artifacts.sealed import seal, unseal
from cli.main import app, run_guarded
from pipeline.config import Experiment, dump
from pipeline.data.view import CanonicalView
from pipeline.workspace import Layout

OBJECTS = {
    "logits": "logits/c/{}/0/0",
    "explained_class": "explained_class/c/{}/0/0",
    "maps": "maps/c/{}/0/0/0/0/0",
    "map_scale": "map_scale/c/{}/0/0",
}


def e2kd(*arguments: object) -> int:
    return run_guarded(lambda: app([str(a) for a in arguments]))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def written(folder: Path) -> dict[str, int]:
    """A file that was written again is another inode or has another time."""
    return {
        str(f.relative_to(folder)): hash((f.stat().st_mtime_ns, f.stat().st_ino))
        for f in folder.rglob("*")
        if f.is_file()
    }


def flip(file: Path, position: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 4
    file.write_bytes(data)


class Spy:
    """The rows that the teacher was asked for, and that were packed from the source."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[int] = []
        self.packed = 0
        ask, apply = pipeline.precompute.answer._ask, CanonicalView.apply

        def asking(explainer: object, pixels: np.ndarray, rows: range, *more: object) -> TeacherRows:
            self.asked += rows
            return ask(explainer, pixels, rows, *more)  # type: ignore[arg-type]

        def applying(view: CanonicalView, raw: object) -> object:
            self.packed += 1
            return apply(view, raw)  # type: ignore[arg-type]

        monkeypatch.setattr(pipeline.precompute.answer, "_ask", asking)
        monkeypatch.setattr(CanonicalView, "apply", applying)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


@pytest.fixture
def store(prepared: Layout, experiment_of: Callable[..., Experiment]) -> Path:
    return Path(str(prepared.store(experiment_of().store_name, "val")))


@pytest.fixture
def images(prepared: Layout) -> Path:
    return Path(str(prepared.images("val")))


# ---- stores


def lost(name: str, shard: int) -> Callable[[Path], None]:
    return lambda store: (store / OBJECTS[name].format(shard)).unlink()


def flipped(name: str, shard: int) -> Callable[[Path], None]:
    return lambda store: flip(store / OBJECTS[name].format(shard), 9)


def emptied(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(b"")

    return change


def shortened(name: str, shard: int) -> Callable[[Path], None]:
    def change(store: Path) -> None:
        file = store / OBJECTS[name].format(shard)
        file.write_bytes(file.read_bytes()[:-1])

    return change


def swapped(store: Path) -> None:
    one, two = (store / OBJECTS["maps"].format(shard) for shard in (0, 1))
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)


def flipped_file(name: str, position: int = 40) -> Callable[[Path], None]:
    return lambda store: flip(store / name, position)


def lost_file(name: str) -> Callable[[Path], None]:
    return lambda store: (store / name).unlink()


def several(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(store: Path) -> None:
        for one in changes:
            one(store)

    return change


WOUNDS: list[tuple[str, Callable[[Path], None], Sequence[int]]] = [
    *((f"{name} lost", lost(name, 1), [1]) for name in ("maps", "map_scale")),
    *((f"{name} flipped", flipped(name, 2), [2]) for name in OBJECTS),
    ("maps emptied", emptied(OBJECTS["maps"].format(0)), [0]),
    ("logits short", shortened("logits", 0), [0]),
    ("swapped", swapped, [0, 1]),
    ("two arrays of two shards", several(lost("maps", 0), flipped("logits", 2)), [0, 2]),
    ("two arrays of one shard", several(lost("maps", 1), flipped("logits", 1)), [1]),
    ("commit lost", lost_file("commits/000001.json"), [1]),
    ("commit flipped", flipped_file("commits/000002.json"), [2]),
    ("zarr.json flipped", flipped_file("maps/zarr.json"), []),
    ("zarr.json lost", lost_file("logits/zarr.json"), []),
    ("draft flipped", flipped_file("draft.json"), []),
    ("draft lost", lost_file("draft.json"), []),
    ("manifest flipped", flipped_file("manifest.json"), []),
    ("manifest lost", lost_file("manifest.json"), []),
    ("manifest and draft flipped", several(flipped_file("manifest.json"), flipped_file("draft.json")), []),
    ("manifest lost and commit lost", several(lost_file("manifest.json"), lost_file("commits/000000.json")), [0]),
    ("manifest lost and maps lost", several(lost_file("manifest.json"), lost("maps", 1)), [1]),
]  # fmt: skip


@pytest.mark.parametrize(("wound", "shards"), [w[1:] for w in WOUNDS], ids=[w[0] for w in WOUNDS])
def test_repair_computes_exactly_the_damaged_shards(
    prepared: Layout, store: Path, spy: Spy, wound: Callable[[Path], None], shards: Sequence[int]
) -> None:
    whole, everything = snapshot(store), written(prepared.root)
    wound(store)
    assert e2kd("verify", store) == 3
    assert e2kd("verify", store, "--repair") == 0
    assert snapshot(store) == whole
    assert sorted(spy.asked) == [row for shard in shards for row in range(32 * shard, 32 * shard + 32)]
    again = {name for name, stamp in written(prepared.root).items() if everything[name] != stamp}
    rewritten = {name.removeprefix(f"{store.relative_to(prepared.root)}/") for name in again}
    objects = {name for name in rewritten if "/c/" in name}
    assert objects == {path.format(shard) for path in OBJECTS.values() for shard in shards}
    assert {name for name in rewritten if name.startswith("commits")} == {
        f"commits/{shard:06d}.json" for shard in shards
    }
    assert not any(name.startswith(("images", "teacher/", "stores")) for name in rewritten)  # of others
    assert spy.packed == 0


def test_repairing_what_is_sound_writes_nothing(
    prepared: Layout, store: Path, images: Path, spy: Spy, capsys: pytest.CaptureFixture[str]
) -> None:
    before = written(prepared.root)
    for place in (store, images):
        assert e2kd("verify", place, "--repair") == 0
        assert f"{place}: ok (3 shards, every byte" in capsys.readouterr().out
    assert written(prepared.root) == before
    assert (spy.asked, spy.packed) == ([], 0)


def test_what_verify_prints(store: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (store / OBJECTS["maps"].format(1)).unlink()
    flip(store / OBJECTS["logits"].format(2), 9)
    assert e2kd("verify", store) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("verify val: 3/3 shards in ")
    assert lines[1:] == [
        "  shard 1, maps, rows 32-63: is missing",
        "  shard 2, logits, rows 64-95: sha256 differs: bytes were changed",
        "  shard 2, logits, rows 64-95: cannot be decoded",
        f"{store}: 3 problems (3 shards, every byte, rows against {images})",
        f"run: e2kd verify --repair {store}",
    ]
    assert e2kd("verify", store, "--quick") == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        "  shard 1, maps, rows 32-63: is missing",
        f"{store}: 1 problem (3 shards, sizes only, rows against {images})",
        f"run: e2kd verify --repair {store}",
    ]


def test_quick_repair_mends_sizes_and_leaves_what_it_did_not_look_at(store: Path, spy: Spy) -> None:
    (store / OBJECTS["maps"].format(1)).unlink()
    flip(store / OBJECTS["logits"].format(2), 9)
    assert e2kd("verify", store, "--quick", "--repair") == 0
    assert sorted(set(spy.asked)) == list(range(32, 64))
    assert e2kd("verify", store) == 3
    assert e2kd("verify", store, "--repair") == 0


def test_repair_and_then_ask_the_teacher(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(store / OBJECTS["maps"].format(1), 9)
    assert e2kd("verify", store, "--repair", "--against-teacher", "10%") == 0
    assert "10 of 96 rows at random, agreement 100.0%" in capsys.readouterr().out


def test_a_damaged_manifest_and_a_flipped_object_are_mended_at_once(store: Path) -> None:
    whole = snapshot(store)
    flip(store / "manifest.json", 40)
    flip(store / OBJECTS["maps"].format(1), 9)
    assert e2kd("verify", store, "--repair") == 0
    assert snapshot(store) == whole


def test_a_damaged_manifest_and_a_flipped_object_are_mended_by_repairing_twice(store: Path, spy: Spy) -> None:
    whole = snapshot(store)
    flip(store / "manifest.json", 40)
    flip(store / OBJECTS["maps"].format(1), 9)
    e2kd("verify", store, "--repair")
    assert e2kd("verify", store, "--repair") == 0
    assert snapshot(store) == whole
    assert sorted(set(spy.asked)) == list(range(32, 64))


def test_the_groups_zarr_json_is_mended(store: Path) -> None:
    whole = snapshot(store)
    (store / "zarr.json").unlink()
    assert e2kd("verify", store) == 3
    assert e2kd("verify", store, "--repair") == 0
    assert snapshot(store) == whole


# ---- image sets


IMAGE_WOUNDS: list[tuple[str, Callable[[Path], None], Sequence[int]]] = [
    ("tar lost", lost_file("shard-000001.tar"), [1]),
    ("tar flipped", flipped_file("shard-000002.tar", 5000), [2]),
    ("tar emptied", emptied("shard-000000.tar"), [0]),
    ("row list lost", lost_file("shard-000001.rows.json"), [1]),
    ("row list flipped", flipped_file("shard-000001.rows.json", 300), [1]),
    ("two", several(lost_file("shard-000000.tar"), flipped_file("shard-000002.rows.json", 90)), [0, 2]),
    ("index flipped", flipped_file("index.json"), []),
    ("index lost", lost_file("index.json"), []),
]


@pytest.mark.parametrize(("wound", "shards"), [w[1:] for w in IMAGE_WOUNDS], ids=[w[0] for w in IMAGE_WOUNDS])
def test_repair_packs_exactly_the_damaged_tars(
    prepared: Layout,
    images: Path,
    store: Path,
    spy: Spy,
    wound: Callable[[Path], None],
    shards: Sequence[int],
) -> None:
    whole, everything = snapshot(images), written(prepared.root)
    wound(images)
    assert e2kd("verify", images) == 3
    assert e2kd("verify", images, "--repair") == 0
    assert snapshot(images) == whole
    assert spy.packed == 32 * len(shards)
    again = {name for name, stamp in written(prepared.root).items() if everything[name] != stamp}
    assert {name for name in again if "shard-" in name} == {
        f"images/val/shard-{shard:06d}.{kind}" for shard in shards for kind in ("tar", "rows.json")
    }
    assert again <= {"images/val/index.json", *(name for name in again if "shard-" in name)}
    assert spy.asked == []
    assert e2kd("verify", store) == 0  # it is still the store's image set


def test_what_verify_prints_of_images(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "shard-000001.tar").unlink()
    assert e2kd("verify", images) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        "  shard 1, shard-000001.tar, rows 32-63: is missing",
        f"{images}: 1 problem (3 shards, every byte)",
        f"run: e2kd verify --repair {images}",
    ]


def test_a_store_beside_damaged_images_is_not_touched(
    images: Path, store: Path, spy: Spy, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing tar: the images are to be mended first."""
    before = written(store)
    (images / "shard-000001.tar").unlink()
    assert e2kd("verify", store, "--repair") == 2
    assert f"run: e2kd verify --repair {images}" in capsys.readouterr().err
    assert (written(store), spy.asked) == (before, [])


def test_a_store_beside_a_changed_row_list_is_not_touched(images: Path, store: Path) -> None:
    before = written(store)
    flip(images / "shard-000001.rows.json", 300)
    assert e2kd("verify", store, "--repair") in (2, 3)
    assert written(store) == before


def test_a_changed_packing_json_is_found_and_mended(images: Path) -> None:
    whole = snapshot(images)
    file = images / "packing.json"
    file.write_bytes(file.read_bytes().replace(b'"count": 96', b'"count": 97'))
    assert e2kd("verify", images) == 3
    assert e2kd("verify", images, "--repair") == 0
    assert snapshot(images) == whole


def test_a_changed_packing_json_does_not_cost_the_sound_tars(images: Path, spy: Spy) -> None:
    file = images / "packing.json"
    file.write_bytes(file.read_bytes().replace(b'"count": 96', b'"count": 97'))
    (images / "shard-000001.tar").unlink()
    e2kd("verify", images, "--repair")
    assert spy.packed <= 32


# ---- what is refused


def test_images_of_another_view_are_refused_and_kept(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "shard-000001.tar").unlink()
    before = snapshot(images)
    assert e2kd("verify", images, "--repair", "--set", "view.size=40") == 2
    assert "view" in capsys.readouterr().err
    assert snapshot(images) == before


@pytest.mark.parametrize("what", ["store", "images"])
def test_what_a_newer_e2kd_wrote_is_not_repaired(
    store: Path, images: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place, file = (store, store / "manifest.json") if what == "store" else (images, images / "index.json")
    file.write_bytes(seal(unseal(file.read_bytes(), 1) | {"schema_version": 2}))
    before = snapshot(place)
    assert e2kd("verify", place, "--repair") in (2, 3)
    assert "schema 2" in "".join(capsys.readouterr())
    assert snapshot(place) == before


def test_a_store_of_another_teacher_is_refused_and_kept(
    prepared: Layout,
    store: Path,
    capsys: pytest.CaptureFixture[str],
    experiment_of: Callable[..., Experiment],
) -> None:
    flip(store / OBJECTS["maps"].format(1), 9)
    before = snapshot(store)
    name = experiment_of().store_name
    changes = ["--set", "explain.logit=raw", "--set", f"store.name={name}"]
    assert e2kd("verify", store, "--repair", *changes) == 2
    assert "explainer.settings.logit: store 'centred', config 'raw'" in capsys.readouterr().err
    assert snapshot(store) == before


def test_a_store_of_other_weights_is_refused_and_kept(
    prepared: Layout, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    flip(store / OBJECTS["maps"].format(1), 9)
    before = snapshot(store)
    for weights in prepared.teacher.glob("*.safetensors"):
        state = {name: v * 1.01 if v.is_floating_point() else v for name, v in load_file(weights).items()}
        save_file(state, weights)
    assert e2kd("verify", store, "--repair") == 2
    error = capsys.readouterr().err
    assert "teacher.weights_sha256: store" in error
    assert "Traceback" not in error
    assert snapshot(store) == before


def test_a_place_that_is_not_the_experiments_is_refused(
    prepared: Layout, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = Path(shutil.copytree(store, tmp_path / "elsewhere" / "val"))
    flip(elsewhere / OBJECTS["maps"].format(1), 9)
    assert e2kd("verify", elsewhere, "--repair") == 2
    assert "config.yaml is not there; give --config CONFIG" in capsys.readouterr().err
    assert e2kd("verify", elsewhere, "--repair", "--config", prepared.config) == 2
    assert f"{elsewhere} is none of the experiment's image sets or stores" in capsys.readouterr().err
    other = Path(shutil.copytree(store, store.parent.parent / "other-name" / "val"))
    flip(other / OBJECTS["maps"].format(1), 9)
    assert e2kd("verify", other, "--repair") == 2
    assert "give its own config with --config" in capsys.readouterr().err


def test_nothing_at_a_place_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for repair in ([], ["--repair"], ["--quick"], ["--against-teacher", "1%"]):
        assert e2kd("verify", tmp_path / "nowhere", *repair) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"e2kd: there is nothing at {tmp_path / 'nowhere'}; give a store")
        assert error.count("\n") == 1


def spelled(path: Path, how: str) -> str:
    relative = os.path.relpath(path)
    return {"slash": f"{path}/", "relative": relative, "dot": f"./{relative}", "url": f"file://{path}"}[how]


@pytest.mark.parametrize(
    "how",
    [
        "slash",
        "relative",
        "dot",
        "url",
    ],
)
@pytest.mark.parametrize("what", ["store", "images"])
def test_a_place_may_be_spelled_in_any_way(
    prepared: Layout, store: Path, images: Path, how: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(prepared.root.parent)
    place, wounded = (
        (store, store / OBJECTS["maps"].format(1))
        if what == "store"
        else (images, images / "shard-000001.tar")
    )
    wounded.unlink()
    assert e2kd("verify", spelled(place, how), "--repair") == 0
    assert wounded.exists()


def test_a_shared_store_is_repaired_behind_its_url(
    prepared: Layout,
    store: Path,
    experiment_of: Callable[..., Experiment],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spy: Spy,
) -> None:
    from artifacts.places import place

    monkeypatch.setenv("E2KD_CACHE_DIR", str(tmp_path / "cache"))
    url = f"memory://{tmp_path.name}"
    shared, local = place(url), LocalPlace(str(prepared.root))
    for name in local.sizes():
        if name.startswith(("images/", "stores/")):
            shared.write(name, local.read(name))
    prepared.config.write_text(dump(experiment_of(artifacts=url)))
    name = experiment_of().store_name
    where = f"{url}/stores/{name}/val"
    shared.remove(f"stores/{name}/val/{OBJECTS['maps'].format(1)}")
    assert e2kd("verify", where) == 3
    assert e2kd("verify", where, "--repair", "--config", prepared.config) == 0
    assert sorted(set(spy.asked)) == list(range(32, 64))
    assert {n: place(where).read(n) for n in place(where).sizes()} == snapshot(store)
    shared.remove("images/val/shard-000002.tar")
    assert e2kd("verify", f"{url}/images/val", "--repair", "--config", prepared.config) == 0
    assert verify_images(f"{url}/images/val").ok
    assert verify_store(where, f"{url}/images/val").ok


def test_the_records_on_disk_are_sealed_json(store: Path, images: Path) -> None:
    for file in [*store.glob("*.json"), *store.glob("commits/*.json"), images / "index.json"]:
        if file.name != "zarr.json":
            assert len(json.loads(file.read_text())["seal"]) == 64, file
