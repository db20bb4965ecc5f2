"""Exports are WebDataset shards that anyone reads; importing one gives back the image set and the store."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from artifacts import (
    DataError,
    E2kdError,
    ImageSet,
    ImageSetError,
    MismatchedStore,
    Sample,
    StoreError,
    TeacherRows,
    TeacherStore,
    open_images,
    open_store,
    verify_images,
    verify_store,
)
from artifacts.codecs import get_codec
from artifacts.exchange import export_store, import_store
from artifacts.manifest import CodecInfo, StoreShape
from artifacts.places import place
from artifacts.sealed import seal
from artifacts.writer import StoreWriter

MAP_CODECS = ("fp16", "int8", "int6", "int5", "lossless")
MANY = {"views": 2, "explained": 3, "channels": 2}
webdataset_is_noisy = pytest.mark.filterwarnings("ignore::Warning:webdataset")


def store_of(
    path: Path,
    images: ImageSet,
    tools: Any,
    logits: str = "fp16",
    maps: str = "fp16",
    shape: dict[str, int] | None = None,
    noisy: bool = True,
) -> TeacherStore:
    """A store of `images` with numbers that no codec but fp32 holds exactly; row 6 has a dead map."""
    plan = tools.draft(
        images=images.fingerprint,
        shape=StoreShape(**(tools.draft().shape.model_dump() | (shape or {}))),
        logits=CodecInfo(codec=get_codec(logits).codec_id, error_bound="x"),
        maps=CodecInfo(codec=get_codec(maps).codec_id, error_bound="x"),
    )
    writer = StoreWriter(path, plan)
    writer.create()
    rng = np.random.default_rng(0)
    for shard in range(plan.shape.shards):
        rows = tools.answers(plan, shard)
        if noisy:
            wild = np.exp(rng.normal(size=rows.maps.shape) * 3) * np.sign(rng.normal(size=rows.maps.shape))
            rows = TeacherRows(
                (rows.logits * np.pi).astype(np.float32),
                rows.explained_class,
                (rows.maps * wild).astype(np.float32),
            )
        writer.write_shard(shard, rows, images.keys_sha256(shard), images.shard_keys(shard))
    writer.finish()
    return open_store(path)


@pytest.fixture
def store(packed: ImageSet, tmp_path: Path, tools: Any) -> TeacherStore:
    return store_of(tmp_path / "store", packed, tools)


@pytest.fixture(scope="module")
def exported_once(packed_once: Path, tmp_path_factory: pytest.TempPathFactory, tools: Any) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    images = open_images(packed_once)
    export_store(store_of(folder / "store", images, tools), images, folder / "export")
    return folder / "export"


@pytest.fixture
def exported(exported_once: Path, tmp_path: Path) -> Path:
    """An export, a copy to change."""
    return Path(shutil.copytree(exported_once, tmp_path / "export"))


def assert_same_rows(a: TeacherStore, b: TeacherStore) -> None:
    one, two = a.read(range(len(a))), b.read(range(len(b)))
    for field in dataclasses.fields(TeacherRows):
        assert np.array_equal(getattr(one, field.name), getattr(two, field.name)), field.name


# ---- reading by others


@webdataset_is_noisy
@pytest.mark.parametrize("shape", [{}, MANY], ids=["single", "many"])
def test_plain_webdataset_reads_an_export(
    packed: ImageSet, tmp_path: Path, tools: Any, shape: dict[str, int]
) -> None:
    import webdataset

    store = store_of(tmp_path / "store", packed, tools, shape=shape)
    export_store(store, packed, tmp_path / "export")
    shards = sorted(str(file) for file in (tmp_path / "export").glob("*.tar"))
    seen = list(webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"))
    answers = store.read(range(11))
    assert [item["__key__"] for item in seen] == packed.keys
    for row, item in enumerate(seen):
        sample = packed[row]
        assert np.array_equal(item["png"].transpose(2, 0, 1), sample.image)
        assert item["json"]["label"] == (
            list(sample.label) if isinstance(sample.label, tuple) else sample.label
        )
        assert ("mask.png" in item) == (sample.mask is not None)
        if sample.boxes is not None:
            np.testing.assert_array_equal(np.float32(item["json"]["boxes"]).reshape(-1, 5), sample.boxes)
        one = slice(None) if shape else 0
        assert np.array_equal(item["logits.npy"], answers.logits[row][one])
        classes = answers.explained_class[row] if shape else answers.explained_class[row, 0, 0]
        assert item["class.json"] == classes.tolist()
        assert np.array_equal(item["map.npy"], answers.maps[row] if shape else answers.maps[row, 0, 0])


def test_numbers_are_float16_where_that_is_exact(packed: ImageSet, tmp_path: Path, tools: Any) -> None:
    for name, logits, noisy, expected in [
        ("halves", "fp16", False, np.float16),
        ("fp32", "fp32", True, np.float32),
    ]:
        store = store_of(tmp_path / name / "store", packed, tools, logits=logits, maps=logits, noisy=noisy)
        export_store(store, packed, tmp_path / name / "export")
        with tarfile.open(tmp_path / name / "export" / "shard-000000.tar") as archive:
            for member in ("img-0000.logits.npy", "img-0000.map.npy"):
                file = archive.extractfile(member)
                assert file is not None
                assert np.load(io.BytesIO(file.read())).dtype == expected, (name, member)


def test_exporting_twice_gives_the_same_bytes(
    store: TeacherStore, packed: ImageSet, tmp_path: Path, tools: Any
) -> None:
    for name in ("a", "b"):
        seen: list[int] = []
        export_store(store, packed, tmp_path / name, progress=seen.append)
        assert seen == [4, 4, 3]
    assert tools.snapshot(tmp_path / "a") == tools.snapshot(tmp_path / "b")


# ---- and back


@pytest.mark.parametrize(
    ("logits", "maps", "shape"),
    [
        *((one, two, {}) for one in ("fp16", "uint12", "fp32") for two in MAP_CODECS),
        ("fp16", "fp16", MANY),
        ("uint12", "int6", MANY),
        ("fp32", "lossless", MANY),
    ],
)
def test_an_import_is_the_store_again(
    packed: ImageSet, tmp_path: Path, tools: Any, logits: str, maps: str, shape: dict[str, int]
) -> None:
    store = store_of(tmp_path / "store", packed, tools, logits, maps, shape)
    export_store(store, packed, tmp_path / "export")
    again = import_store(tmp_path / "export", tmp_path / "images-again", tmp_path / "store-again")
    assert tools.snapshot(tmp_path / "images-again") == tools.snapshot(packed.place.path)
    old, new = tools.snapshot(tmp_path / "store"), tools.snapshot(tmp_path / "store-again")
    differing = {name.split("/")[0] for name in old if old[name] != new.get(name)}
    if logits != "uint12":
        assert new == old
    else:  # a step of the row's range may be rounded the other way; the numbers are the same
        assert differing <= {"logit_scale", "commits", "manifest.json"}
        span = np.ptp(store.read(range(11)).logits, axis=2)
        moved = np.abs(store.read(range(11)).logits - again.read(range(11)).logits).max(2)
        assert (moved <= span * 2**-20).all()
    assert verify_store(again.place, tmp_path / "images-again").ok


def test_masks_boxes_groups_and_sources_survive(exported: Path, tmp_path: Path, tools: Any) -> None:
    import_store(exported, tmp_path / "again", tmp_path / "store-again")
    images = open_images(tmp_path / "again")
    for row in range(11):
        for field in dataclasses.fields(Sample):
            assert np.array_equal(getattr(images[row], field.name), getattr(tools.sample(row), field.name))
    assert verify_images(images.place).ok


@pytest.mark.parametrize("image_format", ["jpg", "webp"])
def test_other_image_formats_survive(tmp_path: Path, tools: Any, image_format: str) -> None:
    images = tools.pack(tmp_path / "images", image_format=image_format)
    export_store(store_of(tmp_path / "store", images, tools), images, tmp_path / "export")
    import_store(tmp_path / "export", tmp_path / "again", tmp_path / "store-again")
    assert tools.snapshot(tmp_path / "again") == tools.snapshot(images.place.path)


def test_an_interrupted_export_resumes_to_the_same_bytes(
    store: TeacherStore, packed: ImageSet, tmp_path: Path, tools: Any
) -> None:
    export_store(store, packed, tmp_path / "whole")

    def stop(rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_store(store, packed, tmp_path / "export", progress=stop)
    assert (tmp_path / "export/shard-000000.tar").exists()
    (tmp_path / "export/shard-000001.tar.partial").write_bytes(b"half")
    with tools.refused(StoreError, path=tmp_path / "export/shard-000001.tar"):
        import_store(tmp_path / "export", tmp_path / "again", tmp_path / "store-again")
    stamp = (tmp_path / "export/shard-000000.tar").stat().st_mtime_ns
    export_store(store, packed, tmp_path / "export")
    assert (tmp_path / "export/shard-000000.tar").stat().st_mtime_ns == stamp
    assert tools.snapshot(tmp_path / "export") == tools.snapshot(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["images", "store"])
def test_an_interrupted_import_resumes_to_the_same_bytes(
    exported: Path, tmp_path: Path, tools: Any, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_store(exported, tmp_path / "whole/images", tmp_path / "whole/store")
    target = (exported, tmp_path / "again/images", tmp_path / "again/store")
    count = 0

    def stop(*_: Any, **__: Any) -> None:
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt

    if moment == "images":
        with pytest.raises(KeyboardInterrupt):
            import_store(*target, progress=stop)
    else:
        write = StoreWriter.write_shard

        def write_two(writer: StoreWriter, shard: int, *rest: Any) -> None:
            if shard == 2:
                raise KeyboardInterrupt
            write(writer, shard, *rest)

        with monkeypatch.context() as patched:
            patched.setattr(StoreWriter, "write_shard", write_two)
            with pytest.raises(KeyboardInterrupt):
                import_store(*target)
        stamp = (tmp_path / "again/store/commits/000001.json").stat().st_mtime_ns
    import_store(*target)
    if moment == "store":
        assert (tmp_path / "again/store/commits/000001.json").stat().st_mtime_ns == stamp
    assert tools.snapshot(tmp_path / "again") == tools.snapshot(tmp_path / "whole")


def test_an_export_behind_a_url_and_back(
    store: TeacherStore, packed: ImageSet, tmp_path: Path, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("E2KD_CACHE_DIR", str(tmp_path / "cache"))
    base = f"memory://{tmp_path.name}"
    export_store(store, packed, f"{base}/export")
    assert sorted(place(f"{base}/export").sizes()) == [
        "e2kd.json",
        *(f"shard-00000{i}.{end}" for i in range(3) for end in ("json", "tar")),
    ]
    again = import_store(f"{base}/export", f"{base}/images", f"{base}/store")
    assert_same_rows(store, again)
    assert verify_store(f"{base}/store", f"{base}/images").ok
    remote = open_images(f"{base}/images")
    export_store(again, remote, tmp_path / "local")
    import_store(tmp_path / "local", tmp_path / "images-again", tmp_path / "store-again")
    assert tools.snapshot(tmp_path / "images-again") == tools.snapshot(packed.place.path)
    assert tools.snapshot(tmp_path / "store-again") == tools.snapshot(tmp_path / "store")


# ---- what is refused


def refused(exported: Path, tmp_path: Path) -> str:
    """The one sentence of an import that fails."""
    with pytest.raises(E2kdError) as caught:
        import_store(exported, tmp_path / "again", tmp_path / "store-again")
    message = str(caught.value)
    assert "\n" not in message
    assert str(exported) in message
    assert not (tmp_path / "store-again/manifest.json").exists()
    return message


def rewritten(tar: Path, change: Callable[[str, bytes], tuple[str, bytes] | None]) -> None:
    """The tar with members changed or left out."""
    buffer = io.BytesIO()
    with tarfile.open(tar) as old, tarfile.open(fileobj=buffer, mode="w") as new:
        for member in old:
            file = old.extractfile(member)
            assert file is not None
            found = change(member.name, file.read())
            if found is not None:
                info = tarfile.TarInfo(found[0])
                info.size = len(found[1])
                new.addfile(info, io.BytesIO(found[1]))
    data = buffer.getvalue()
    tar.write_bytes(data)
    tar.with_suffix(".json").write_bytes(
        seal({"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    )


def test_a_folder_that_is_no_export_is_refused(packed: ImageSet, tmp_path: Path) -> None:
    assert "has no e2kd.json: make an export with: e2kd export" in refused(packed.place.path, tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema_version": 1}', '{"schema_version": 2}'])
def test_a_damaged_or_newer_description_is_refused(exported: Path, tmp_path: Path, text: str) -> None:
    (exported / "e2kd.json").write_text(text)
    assert re.search(r"e2kd\.json (is damaged|has schema 2; update e2kd)", refused(exported, tmp_path))


@pytest.mark.parametrize(
    "left",
    [
        None,
        0,
        100,
        512,
        5120,
        -1024,
    ],
)
def test_a_missing_or_short_tar_is_refused(exported: Path, tmp_path: Path, left: int | None) -> None:
    tar = exported / "shard-000001.tar"
    data = tar.read_bytes()
    tar.unlink() if left is None else tar.write_bytes(
        data[: data.rindex(b"class.json") if left == -1024 else left]
    )
    assert "shard-000001.tar" in refused(exported, tmp_path)


def test_a_sample_without_answers_is_refused(exported: Path, tmp_path: Path) -> None:
    for name in ("logits.npy", "map.npy", "class.json"):
        copy = Path(shutil.copytree(exported, tmp_path / name))
        rewritten(
            copy / "shard-000001.tar",
            lambda member, data, name=name: None if member == f"img-0005.{name}" else (member, data),
        )
        assert "img-0005 lacks its answers" in refused(copy, tmp_path / f"of-{name}")


def test_a_sample_that_is_missing_is_refused(exported: Path, tmp_path: Path) -> None:
    rewritten(
        exported / "shard-000001.tar",
        lambda name, data: None if name.startswith("img-0005") else (name, data),
    )
    assert "3 samples" in refused(exported, tmp_path)


@pytest.mark.parametrize("what", ["png", "json"])
def test_changed_images_are_refused(exported: Path, tmp_path: Path, what: str) -> None:
    def change(name: str, data: bytes) -> tuple[str, bytes]:
        return name, data[:-1] + b" " if name == f"img-0005.{what}" else data

    rewritten(exported / "shard-000001.tar", change)
    if what == "json":
        with pytest.raises((E2kdError, ValueError)):
            import_store(exported, tmp_path / "again", tmp_path / "store-again")
    else:
        assert "images" in refused(exported, tmp_path)


def test_classes_out_of_range_are_refused(exported: Path, tmp_path: Path) -> None:
    rewritten(
        exported / "shard-000001.tar",
        lambda name, data: (name, b"99" if name == "img-0005.class.json" else data),
    )
    refused(exported, tmp_path)


def test_numbers_that_are_not_finite_name_the_sample(exported: Path, tmp_path: Path, tools: Any) -> None:
    nan = npy(np.full(5, np.nan, np.float32))
    rewritten(
        exported / "shard-000001.tar",
        lambda name, data: (name, nan if name == "img-0005.logits.npy" else data),
    )
    with tools.refused(DataError, array="logits", key="img-0005"):
        import_store(exported, tmp_path / "again", tmp_path / "store-again")


BAD_ANSWERS: dict[str, Any] = {
    "logits not an array": ("logits.npy", lambda data: b"nonsense"),
    "logits empty": ("logits.npy", lambda data: b""),
    "logits cut": ("logits.npy", lambda data: data[:-1]),
    "logits of other classes": ("logits.npy", lambda data: npy(np.zeros(7, np.float32))),
    "map of another size": ("map.npy", lambda data: npy(np.zeros((1, 4, 4), np.float32))),
    "class not JSON": ("class.json", lambda data: b"x"),
    "class is text": ("class.json", lambda data: b'"a"'),
}


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


@pytest.mark.parametrize("name", list(BAD_ANSWERS))
def test_answers_that_are_none_are_one_sentence(exported: Path, tmp_path: Path, name: str) -> None:
    member, wound = BAD_ANSWERS[name]
    rewritten(
        exported / "shard-000001.tar",
        lambda found, data: (found, wound(data) if found == f"img-0005.{member}" else data),
    )
    assert "img-0005" in refused(exported, tmp_path)


def test_a_foreign_tar_is_one_sentence(exported: Path, tmp_path: Path) -> None:
    rewritten(
        exported / "shard-000001.tar",
        lambda name, data: (name.replace(".", "/"), data) if "0005" in name else (name, data),
    )
    assert "shard-000001.tar" in refused(exported, tmp_path)


def test_changed_bytes_of_an_export_are_never_imported(
    exported: Path, tmp_path: Path, packed: ImageSet
) -> None:
    """A tar protects its headers only: a flipped bit of a logit must not become a teacher's answer."""
    right = open_store(
        import_store(exported, tmp_path / "right/images", tmp_path / "right/store").place
    ).read(range(11))
    tar = exported / "shard-000001.tar"
    whole = tar.read_bytes()
    with tarfile.open(tar) as archive:
        members = {member.name: member for member in archive}
    wrong = []
    for number, member in enumerate(["img-0005.logits.npy", "img-0005.map.npy", "img-0006.class.json"]):
        start, size = members[member].offset_data, members[member].size
        changed = bytearray(whole)
        changed[start + size - 1] ^= 1
        tar.write_bytes(changed)
        try:
            got = import_store(exported, tmp_path / f"{number}/i", tmp_path / f"{number}/s").read(range(11))
        except E2kdError:
            continue
        if not all(
            np.array_equal(getattr(got, f.name), getattr(right, f.name)) for f in dataclasses.fields(got)
        ):
            wrong.append(member)
    assert not wrong


def test_other_images_or_another_export_are_refused(
    store: TeacherStore, packed: ImageSet, tmp_path: Path, tools: Any
) -> None:
    def other(row: int) -> Sample:
        return dataclasses.replace(tools.sample(row), image=255 - tools.sample(row).image)

    images = tools.pack(tmp_path / "other", other)
    of_other = {"images": (store.manifest.images, images.fingerprint)}
    with tools.refused(MismatchedStore, path=store.place, fields=of_other):
        export_store(store, images, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    export_store(store, packed, tmp_path / "export")
    with tools.refused(MismatchedStore, path=tmp_path / "export"):
        export_store(store_of(tmp_path / "of-other", images, tools), images, tmp_path / "export")


def test_exporting_into_a_folder_with_other_tars_is_refused(
    store: TeacherStore, packed: ImageSet, tools: Any
) -> None:
    """The image set's own folder, for one: its tars are not an export."""
    before = tools.snapshot(packed.place.path)
    with tools.refused(StoreError, path=packed.place):
        export_store(store, packed, packed.place.path)
    assert tools.snapshot(packed.place.path) == before


@pytest.mark.parametrize("text", [None, "{"])
def test_exporting_images_with_a_damaged_packing_json_is_one_sentence(
    store: TeacherStore, packed: ImageSet, tmp_path: Path, tools: Any, text: str | None
) -> None:
    file = packed.place.path / "packing.json"
    file.unlink() if text is None else file.write_text(text)
    with tools.refused(ImageSetError, path=file):
        export_store(store, packed, tmp_path / "export")


def test_an_import_over_another_store_is_refused(
    exported: Path, tmp_path: Path, tools: Any, packed: ImageSet
) -> None:
    tools.fill(tmp_path / "store-again")
    with tools.refused(MismatchedStore, path=tmp_path / "store-again"):
        import_store(exported, tmp_path / "again", tmp_path / "store-again")
    assert json.loads((exported / "e2kd.json").read_text())["store"]["images"] == packed.fingerprint
