"""Errors are one tree, say one sentence to people, and the same in fields to programs."""

from __future__ import annotations

import importlib
import inspect
import pickle
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import artifacts
import cli
import pipeline
from artifacts import E2kdError, ImageSet, errors, open_images, open_store
from artifacts.cache import bound
from artifacts.codecs import get_codec
from artifacts.durable import write_atomic
from artifacts.errors import (
    ConfigError,
    DamagedStore,
    DataError,
    ImageSetError,
    IncompleteStore,
    JobsFailed,
    MismatchedStore,
    PlaceError,
    StoreError,
    WriteError,
)
from artifacts.exchange import export_store, import_store
from artifacts.places import place
from artifacts.writer import StoreWriter

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, E2kdError)]
FIELDS = ("path", "shard", "array", "rows", "key", "line", "fields")


# ---- the tree


def test_the_drawn_tree_is_the_tree() -> None:
    drawn = re.findall(r"^(?P<indent>[│ ]*)[├└]── (?P<name>\w+)", errors.__doc__ or "", re.MULTILINE)
    parents = {name: "StoreError" if indent else "E2kdError" for indent, name in drawn}
    assert parents == {kind.__name__: kind.__mro__[1].__name__ for kind in CLASSES if kind is not E2kdError}


def test_no_error_of_users_is_defined_elsewhere() -> None:
    """Every class that is raised for users is drawn: no other module has one."""
    for package in (artifacts, cli, pipeline):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            # it runs the command line
            if module.name != "cli.__main__":
                importlib.import_module(module.name)
    everywhere, left = set[type]([E2kdError]), [E2kdError]
    while left:
        below = left.pop().__subclasses__()
        everywhere |= set(below)
        left += below
    ours = {kind for kind in everywhere if kind.__module__.split(".")[0] in ("artifacts", "pipeline", "cli")}
    assert ours == set(CLASSES)


@pytest.mark.parametrize("kind", CLASSES)
def test_what_is_not_known_is_none(kind: type[E2kdError]) -> None:
    error = kind("a sentence")
    assert str(error) == "a sentence"
    assert error.args == ("a sentence",)
    assert {name: getattr(error, name) for name in FIELDS} == dict.fromkeys(FIELDS)


def test_fields_are_given_by_name_and_survive_another_process() -> None:
    error = DamagedStore(
        "maps are damaged",
        path=Path("out/store"),
        shard=3,
        array="maps",
        rows=range(96, 128),
        key="img-0096",
        line=2,
        fields={"images": ("1", "2")},
    )
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is DamagedStore
    assert str(again) == "maps are damaged"
    for one in (error, again):
        assert (one.path, one.shard, one.array, one.rows) == ("out/store", 3, "maps", range(96, 128))
        assert (one.key, one.line, one.fields) == ("img-0096", 2, {"images": ("1", "2")})


@pytest.mark.parametrize(
    ("error", "own"),
    [
        (WriteError("cannot write x", path="x", errno=28), {"path": "x", "errno": 28}),
        (IncompleteStore("1 of 3", path="x", done=1, shards=3), {"path": "x", "done": 1, "shards": 3}),
        (JobsFailed("failed", codes={("kd", 0): 1}), {"codes": {("kd", 0): 1}, "exit_code": 1}),
    ],
)
def test_fields_of_one_class_survive_another_process(error: E2kdError, own: Mapping[str, Any]) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert {name: getattr(again, name) for name in own} == own
    assert str(again) == str(error)


# ---- one sentence of each kind, and its fields


@dataclass(frozen=True)
class Made:
    """A store of random numbers and an image set, both finished, in a folder of their own."""

    folder: Path
    store: Path
    images: ImageSet
    tools: Any

    def change(self, name: str, data: bytes | None) -> None:
        file = self.folder / name
        file.unlink() if data is None else file.write_bytes(data)


@pytest.fixture
def made(tmp_path: Path, stored: Path, packed: ImageSet, tools: Any) -> Made:
    return Made(tmp_path, stored, packed, tools)


def no_store(made: Made) -> None:
    open_store(made.folder / "none")


def unfinished(made: Made) -> None:
    made.change("store/manifest.json", None)
    made.change("store/commits/000001.json", None)
    open_store(made.store)


def newer_store(made: Made) -> None:
    text = (made.store / "manifest.json").read_text()
    made.change("store/manifest.json", text.replace('"schema_version": 1', '"schema_version": 7').encode())
    open_store(made.store)


def damaged_manifest(made: Made) -> None:
    made.change("store/manifest.json", b"{")
    open_store(made.store)


def missing_object(made: Made) -> None:
    made.change("store/maps/c/2/0/0/0/0/0", None)
    open_store(made.store)


def changed_bytes(made: Made) -> None:
    file = made.store / "maps/c/1/0/0/0/0/0"
    data = bytearray(file.read_bytes())
    data[12] ^= 4
    made.change("store/maps/c/1/0/0/0/0/0", bytes(data))
    open_store(made.store).read([5])


def changed_metadata(made: Made) -> None:
    made.change("store/logits/zarr.json", b"{}")
    open_store(made.store).read([5])


def another_teacher(made: Made) -> None:
    teacher = made.tools.draft().teacher.model_copy(update={"weights_sha256": "f" * 64})
    open_store(made.store).check_same(made.tools.draft(teacher=teacher, images="2" * 64))


def no_draft(made: Made) -> None:
    made.change("store/draft.json", None)
    StoreWriter(made.store, made.tools.draft()).create()


def not_finite(made: Made) -> None:
    writer = StoreWriter(made.folder / "new", made.tools.draft())
    rows = made.tools.answers(writer.draft, 1)
    rows.maps[2] = np.nan
    made.tools.write_shard(writer, 1, rows)


def no_images(made: Made) -> None:
    open_images(made.folder / "none")


def short_tar(made: Made) -> None:
    made.change("images/shard-000001.tar", b"short")
    open_images(made.images.place)


def changed_image(made: Made) -> None:
    file = made.folder / "images/shard-000001.tar"
    data = bytearray(file.read_bytes())
    start = data.index(made.images.members(5)["png"])
    data[start + 50] ^= 1
    made.change("images/shard-000001.tar", bytes(data))
    open_images(made.images.place)[5]


def damaged_row_list(made: Made) -> None:
    made.change("images/shard-000000.rows.json", b"{}")
    _ = open_images(made.images.place).keys


def other_images(made: Made) -> None:
    made.tools.pack(made.folder / "images", rows_per_shard=8, source="photos")


def unfit_key(made: Made) -> None:
    made.tools.pack(made.folder / "new", lambda row: ("a.b", {"png": b""}))


def not_its_images(made: Made) -> None:
    export_store(open_store(made.store), made.images, made.folder / "export")


def no_export(made: Made) -> None:
    import_store(made.store, made.folder / "a", made.folder / "b")


def a_folder_instead_of_a_file(made: Made) -> None:
    (made.folder / "folder").mkdir()
    place(made.folder).read("folder")


def no_protocol(made: Made) -> None:
    place("://x")


def unwritable(made: Made) -> None:
    (made.folder / "x.json.partial").mkdir()
    write_atomic(made.folder / "x.json", b"1" * 10_000)


def unknown_codec(made: Made) -> None:
    get_codec("int7")


MEND = "run: e2kd precompute CONFIG"
# The fault, the class, the sentence with {at} for the folder and * for any words, the fields with paths below it.
CASES: list[tuple[Callable[[Made], object], type[E2kdError], str, dict[str, Any]]] = [
    (no_store, IncompleteStore, "there is no teacher store at {at}/none; " + MEND, {"path": "none"}),
    (
        unfinished,
        IncompleteStore,
        "{at}/store is not finished: 2 of 3 shards are committed; " + MEND,
        {"path": "store", "done": 2, "shards": 3},
    ),
    (
        newer_store,
        StoreError,
        "{at}/store/manifest.json has schema 7, this e2kd reads 1; update e2kd",
        {"path": "store/manifest.json", "fields": {"schema_version": (7, 1)}},
    ),
    (
        damaged_manifest,
        DamagedStore,
        "{at}/store/manifest.json is damaged (*); delete it and " + MEND,
        {"path": "store/manifest.json"},
    ),
    (
        missing_object,
        DamagedStore,
        "{at}/store: array maps, shard 2 (rows 8 to 10) is missing; run: e2kd verify --repair {at}/store",
        {"path": "store", "array": "maps", "shard": 2, "rows": range(8, 11)},
    ),
    (
        changed_bytes,
        DamagedStore,
        "{at}/store: array maps, shard 1 (rows 4 to 7) cannot be read (it cannot be decompressed: Zstd decompression "
        "error: *); run: e2kd verify --repair {at}/store",
        {"path": "store", "array": "maps", "shard": 1, "rows": range(4, 8)},
    ),
    (
        changed_metadata,
        DamagedStore,
        "{at}/store: zarr.json of array logits was changed; run: e2kd verify --repair {at}/store",
        {"path": "store", "array": "logits"},
    ),
    (
        another_teacher,
        MismatchedStore,
        "{at}/store was made for something else:\n"
        f"  teacher.weights_sha256: store '{'0' * 64}', config '{'f' * 64}'\n"
        f"  images: store '{'1' * 64}', config '{'2' * 64}'\n"
        "give this one another name (store.name), or delete the folder and " + MEND,
        {
            "path": "store",
            "fields": {
                "teacher.weights_sha256": ("0" * 64, "f" * 64),
                "images": ("1" * 64, "2" * 64),
            },
        },
    ),
    (
        no_draft,
        StoreError,
        "{at}/store has shards but no draft.json: delete the folder and precompute again",
        {"path": "store"},
    ),
    (
        not_finite,
        DataError,
        "the teacher's maps for sample img-0006 are not finite or too large for e2kd.fp16; check the teacher's weights "
        "and precision, or set store.maps: lossless",
        {"array": "maps", "key": "img-0006"},
    ),
    (
        no_images,
        ImageSetError,
        "the image set {at}/none is not there; run: e2kd pack CONFIG",
        {"path": "none"},
    ),
    (
        short_tar,
        ImageSetError,
        "{at}/images/shard-000001.tar (rows 4 to 7) has 5 bytes, not *; run: e2kd verify --repair {at}/images",
        {"path": "images/shard-000001.tar", "shard": 1, "rows": range(4, 8)},
    ),
    (
        changed_image,
        ImageSetError,
        "{at}/images/shard-000001.tar: row 5 cannot be decoded (the checksum of its png differs); the file is damaged, "
        "run: e2kd verify --repair {at}/images",
        {"path": "images/shard-000001.tar", "shard": 1, "rows": range(5, 6), "key": "img-0005"},
    ),
    (
        damaged_row_list,
        ImageSetError,
        "{at}/images/shard-000000.rows.json is damaged (sha256 differs); run: e2kd verify --repair {at}/images",
        {"path": "images/shard-000000.rows.json"},
    ),
    (
        other_images,
        ImageSetError,
        "{at}/images holds other images than the config asks for:\n"
        "  source: packed 'random', config 'photos'\n"
        "  rows_per_shard: packed 4, config 8\n"
        "use another folder (--out DIR), or delete it: rm -r {at}/images",
        {"path": "images", "fields": {"source": ("random", "photos"), "rows_per_shard": (4, 8)}},
    ),
    (
        unfit_key,
        ImageSetError,
        "key 'a.b' of row 0: use only letters, digits, _ and -",
        {"path": "new", "rows": range(1), "key": "a.b"},
    ),
    (
        not_its_images,
        MismatchedStore,
        "{at}/store was not made from the images in {at}/images",
        {"path": "store"},
    ),
    (
        no_export,
        StoreError,
        "{at}/store has no e2kd.json: make an export with: e2kd export STORE DEST",
        {"path": "store/e2kd.json"},
    ),
    (
        a_folder_instead_of_a_file,
        PlaceError,
        "cannot read {at}/folder: Is a directory; make it readable",
        {"path": "folder"},
    ),
    (no_protocol, PlaceError, "://x is no URL: it has no protocol", {}),
    (
        unwritable,
        WriteError,
        "cannot write {at}/x.json: Is a directory; mend that and run the same command again",
        {"path": "x.json", "errno": 21},
    ),
    (
        unknown_codec,
        ConfigError,
        "unknown codec 'int7'; one of fp16, fp32, int8, int6, int5, uint12",
        {},
    ),
]


@pytest.mark.parametrize(
    ("fault", "kind", "sentence", "fields"), CASES, ids=lambda case: getattr(case, "__name__", "")
)
def test_one_sentence_for_people_and_fields_for_programs(
    made: Made,
    fault: Callable[[Made], object],
    kind: type[E2kdError],
    sentence: str,
    fields: dict[str, Any],
) -> None:
    with pytest.raises(kind) as caught:
        fault(made)
    error = caught.value
    assert type(error) is kind
    wanted = re.escape(sentence.replace("{at}", str(made.folder))).replace(r"\*", ".*")
    assert re.fullmatch(wanted, str(error)), str(error)
    for name, value in fields.items():
        expected = str(made.folder / value) if name == "path" else value
        assert getattr(error, name) == expected


def test_a_setting_of_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E2KD_CACHE_GIB", "lots")
    with pytest.raises(
        PlaceError, match=r"^E2KD_CACHE_GIB is 'lots'; set it to a number of GiB, or to 0 for"
    ) as caught:
        bound()
    assert caught.value.key == "E2KD_CACHE_GIB"
