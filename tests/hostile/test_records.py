"""Every value of every sealed record, replaced by what it is not: refused with a sentence, never with a traceback."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from artifacts import E2kdError, open_images, open_store, verify_images, verify_store
from artifacts.exchange import import_store
from artifacts.images import load_images
from artifacts.sealed import seal
from artifacts.store import load_store
from artifacts.writer import StoreWriter

RECORDS = {
    "index": "images/train/index.json",
    "rows": "images/train/shard-000000.rows.json",
    "packing": "images/train/packing.json",
    "manifest": "stores/s/train/manifest.json",
    "draft": "stores/s/train/draft.json",
    "commit": "stores/s/train/commits/000001.json",
    "export": "export/e2kd.json",
    "tar": "export/shard-000000.json",
}
VALUES: list[Any] = [0, -1, 2**70, 10**4000, 1e30, 1.5, True, None, "x", "1", [], [[]], {}, {"a": 1}]
VALUES += [float("inf"), float("nan"), -(2**63), "../../home/thesis.txt", "\ud800", "a" * 100_000]

Path_ = tuple[str | int, ...]


def leaves(content: Any, path: Path_ = ()) -> Iterator[Path_]:
    """The places of all values but the settings, which may be anything; of a list, only those of its first item."""
    yield path
    inner = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content[:1] if isinstance(content, list) else [])
    )
    for key, value in inner:
        if key not in ("preprocessing", "settings", "versions", "class_names") or path == ():
            yield from leaves(value, (*path, key))


def put(content: Any, path: Path_, value: Any) -> Any:
    """A copy with another value there."""
    if not path:
        return value
    changed = copy.copy(content)
    changed[path[0]] = put(content[path[0]], path[1:], value)
    return changed


def sealed(content: Any) -> bytes:
    """As anyone can make it, also of what is no record."""
    return seal(content) if isinstance(content, dict) else json.dumps(content).encode()


class Reader:
    """Reads what a record is about, as the commands do."""

    def __init__(self, world: Any) -> None:
        self.world, self.longest = world, 0
        self.found = {name: (world.strange / file).read_bytes() for name, file in RECORDS.items()}

    def content(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.found[name])
        content.pop("seal")
        return content

    def read(self, name: str, data: bytes) -> bool:
        """Whether what is there is believed. Nothing but an error of the tree may come out of it."""
        file: Path = self.world.strange / RECORDS[name]
        file.write_bytes(data)
        try:
            self._open(name)
            return True
        except E2kdError as error:
            self.longest = max(self.longest, len(str(error)))
            return False
        finally:
            file.write_bytes(self.found[name])

    def _open(self, name: str) -> None:
        world = self.world
        if name in ("index", "rows"):
            images = open_images(world.images)
            _ = images.keys, images.label_column, images.group_column, images[len(images) - 1], images[0]
        elif name == "packing":
            assert verify_images(world.images, quick=True).shards > 0
        elif name == "manifest":
            open_store(world.store).read([0, 9])
        elif name in ("draft", "commit"):
            StoreWriter(world.store, load_store(world.store).manifest).create()
            assert StoreWriter(world.store, load_store(world.store).manifest).committed() >= {0, 2}
        else:
            import_store(world.export, world.root / "cache/i", world.root / "cache/s")

    def verified(self, name: str, data: bytes) -> bool:
        """Whether `verify` says ok."""
        file: Path = self.world.strange / RECORDS[name]
        file.write_bytes(data)
        verify, url = (
            (verify_images, self.world.images)
            if RECORDS[name].startswith("images")
            else (verify_store, self.world.store)
        )
        try:
            return verify(url).ok
        finally:
            file.write_bytes(self.found[name])


@pytest.fixture
def reader(world: Any) -> Reader:
    return Reader(world)


def replace_all(reader: Reader, name: str, times: int) -> None:
    """So many of the values in each place of a record, other ones in the next place."""
    content = reader.content(name)
    with reader.world.untouched("cache"), reader.world.frugal():
        for number, path in enumerate(leaves(content)):
            for value in (VALUES * 2)[number % len(VALUES) :][:times]:
                reader.read(name, sealed(put(content, path, value)))
    assert reader.longest < 3000


@pytest.mark.parametrize("name", RECORDS)
def test_values_replaced_by_what_they_are_not(reader: Reader, name: str) -> None:
    replace_all(reader, name, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDS)
def test_every_value_replaced_by_all_that_it_is_not(reader: Reader, name: str) -> None:
    replace_all(reader, name, len(VALUES))


SHAPE = ("rows", "rows_per_shard", "views", "explained", "classes", "channels", "height", "width")


@pytest.mark.parametrize("field", SHAPE)
def test_a_shape_is_of_small_positive_numbers(world: Any, reader: Reader, field: str) -> None:
    """F15: about sixty of these were tracebacks."""
    for name in ("manifest", "draft"):
        content = reader.content(name)
        for value in [*VALUES, 2**20, 2**26, 10**9, 10**12]:
            assert not reader.read(name, sealed(put(content, ("shape", field), value))), value


def test_the_commands_say_one_sentence(world: Any, reader: Reader) -> None:
    content = reader.content("manifest")
    for field in ("rows", "rows_per_shard", "classes"):
        for value in (0, 10**30, True, "3", None):
            (world.store / "manifest.json").write_bytes(sealed(put(content, ("shape", field), value)))
            assert f"shape.{field}" in world.refused("inspect", world.store)
            world.refused("verify", world.store, code=3)
            world.refused("export", world.store, world.root / "cache/dest")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changes(draw: st.DrawFn, content: Any) -> Any:
    """The content with a value replaced, removed, repeated or added."""
    path = draw(st.sampled_from(sorted(leaves(content), key=str)))
    how = draw(st.sampled_from(["replace", "remove", "repeat", "add", "number"]))
    value = content
    for key in path:
        value = value[key]
    if how == "remove" and isinstance(value, dict) and value:
        gone = draw(st.sampled_from(sorted(value)))
        return put(content, path, {key: inner for key, inner in value.items() if key != gone})
    if how == "repeat" and isinstance(value, list):
        return put(content, path, value * draw(st.integers(0, 3)))
    if how == "add" and isinstance(value, dict):
        return put(content, path, {**value, draw(st.text(max_size=6)): draw(JSON)})
    if how == "number" and isinstance(value, int):
        return put(content, path, value + draw(st.integers(-5, 5)))
    return put(content, path, draw(JSON))


def fuzz(reader: Reader, data: st.DataObject) -> None:
    """One change of one record: an error of the tree, or still believed; `verify` never less strict than reading."""
    name = data.draw(st.sampled_from([*RECORDS][:6]))
    changed = sealed(data.draw(changes(reader.content(name))))
    believed = reader.read(name, changed)
    if reader.verified(name, changed):
        assert believed or name in ("draft", "commit")


FIXED: dict[str, Any] = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.generate],
}


@settings(max_examples=60, **FIXED)
@given(data=st.data())
def test_sixty_changes(reader: Reader, data: st.DataObject) -> None:
    fuzz(reader, data)


@pytest.mark.slow
@settings(max_examples=10_000, **FIXED)
@given(data=st.data())
def test_ten_thousand_changes(reader: Reader, data: st.DataObject) -> None:
    fuzz(reader, data)


@settings(max_examples=60, **FIXED)
@given(data=st.data())
def test_sixty_files_of_other_bytes(reader: Reader, data: st.DataObject) -> None:
    """Bits flipped, parts lost, parts twice: none is believed."""
    name = data.draw(st.sampled_from([*RECORDS][:6]))
    found = reader.found[name]
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(found))] * 2)))
    middle = data.draw(st.sampled_from([b"", found[start:stop] * 2, data.draw(st.binary(max_size=20))]))
    changed = found[:start] + middle + found[stop:]
    if changed != found:
        assert not reader.verified(name, changed)
        reader.read(name, changed)


def test_what_is_sound_is_believed(reader: Reader) -> None:
    for name, data in reader.found.items():
        assert reader.read(name, data)
        assert sealed(reader.content(name)) == data
    assert load_images(reader.world.images).size == 16
