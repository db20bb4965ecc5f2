"""Small image sets and teacher stores made of random numbers, and ways to look at their files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from artifacts import E2kdError, ImageSet, Sample, TeacherRows, open_images
from artifacts.manifest import CodecInfo, ExplainerInfo, ManifestDraft, StoreShape, TeacherInfo
from artifacts.packing import Packing, write_images
from artifacts.writer import StoreWriter

SIZE, ROWS, PER_SHARD, CLASSES = 16, 11, 4, 5  # the last shard is short


def sample(row: int) -> Sample:
    """Every optional field is there for some rows and absent for others."""
    rng = np.random.default_rng(row)
    return Sample(
        key=f"img-{row:04d}",
        image=rng.integers(0, 256, (3, SIZE, SIZE), dtype=np.uint8),
        label=[row % CLASSES, (0, row % CLASSES), None][row % 3],
        group=row % 4 if row % 2 else None,
        boxes=rng.uniform(0, SIZE, (row % 3, 5)).astype(np.float32) if row % 4 else None,
        mask=rng.integers(0, 256, (SIZE, SIZE), dtype=np.uint8) if row % 2 else None,
        source=f"folder/{row}.jpeg" if row % 2 else None,
    )


def pack(path: Path, get: Callable[[int], Sample] = sample, **changes: Any) -> ImageSet:
    settings: dict[str, Any] = {
        "count": ROWS,
        "view": {"size": SIZE, "resize": "fit"},
        "classes": ["a", "b", "c", "d", "e"],
        "source": "random",
        "rows_per_shard": PER_SHARD,
    }
    calls = {name: changes.pop(name) for name in ("again", "progress") if name in changes}
    write_images(path, Packing(get=get, **settings | changes), **calls)
    return open_images(path)


def draft(**changes: Any) -> ManifestDraft:
    return ManifestDraft(
        **{
            "teacher": TeacherInfo(
                architecture="toy/resnet",
                weights_sha256="0" * 64,
                preprocessing={"mean": [0.5, 0.5, 0.5]},
                classes=CLASSES,
                class_names=["a", "b", "c", "d", "e"],
            ),
            "explainer": ExplainerInfo(name="gradcam", settings={"logit": "centred"}),
            "view": {"size": SIZE, "resize": "fit"},
            "images": "1" * 64,
            "shape": StoreShape(
                rows=ROWS, rows_per_shard=PER_SHARD, classes=CLASSES, channels=1, height=3, width=3
            ),
            "logits": CodecInfo(codec="e2kd.fp16", error_bound="x"),
            "maps": CodecInfo(codec="e2kd.fp16", error_bound="x"),
        }
        | changes
    )


def answers(plan: ManifestDraft, shard: int) -> TeacherRows:
    """What a teacher might say; exact in float16. Row 6 has a dead map."""
    s, span = plan.shape, plan.shape.shard_rows(shard)
    rng = np.random.default_rng(100 + shard)
    n = len(span)
    maps = rng.integers(1, 100, (n, s.views, s.explained, s.channels, s.height, s.width)) / np.float32(64)
    if 6 in span:
        maps[6 - span.start] = 0
    return TeacherRows(
        logits=rng.integers(-99, 100, (n, s.views, s.classes)) / np.float32(8),
        explained_class=rng.integers(0, s.classes, (n, s.views, s.explained)),
        maps=maps,
    )


def keys_sha256(shard: int) -> str:
    return f"{shard:064d}"


def write_shard(writer: StoreWriter, shard: int, rows: TeacherRows | None = None) -> None:
    keys = [f"img-{row:04d}" for row in writer.draft.shape.shard_rows(shard)]
    writer.write_shard(shard, rows or answers(writer.draft, shard), keys_sha256(shard), keys)


def fill(path: Path, plan: ManifestDraft | None = None) -> StoreWriter:
    """What precompute does: create, write what is not committed, finish."""
    writer = StoreWriter(path, plan or draft())
    writer.create()
    for shard in sorted(set(range(writer.draft.shape.shards)) - writer.committed()):
        write_shard(writer, shard)
    writer.finish()
    return writer


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and its bytes."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@contextmanager
def refused(kind: type[E2kdError], *says: str, **fields: Any) -> Iterator[None]:
    """The block raises exactly this class, with these fields; `says`: words that the message has besides."""
    with pytest.raises(kind) as caught:
        yield
    error = caught.value
    assert type(error) is kind
    known = {name: str(value) if name == "path" else value for name, value in fields.items()}
    assert {name: getattr(error, name) for name in known} == known, error
    assert [words for words in says if words not in str(error)] == [], error


class Tools:
    """The functions of this file, for tests (a conftest is not importable)."""

    sample = staticmethod(sample)
    pack = staticmethod(pack)
    draft = staticmethod(draft)
    answers = staticmethod(answers)
    write_shard = staticmethod(write_shard)
    fill = staticmethod(fill)
    snapshot = staticmethod(snapshot)
    refused = staticmethod(refused)
    rows, per_shard, classes, size = ROWS, PER_SHARD, CLASSES, SIZE


@pytest.fixture(scope="session")
def tools() -> type[Tools]:
    return Tools


@pytest.fixture(scope="session")
def packed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("packed") / "images").place.path


@pytest.fixture(scope="session")
def stored_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("stored") / "store").place.path


@pytest.fixture
def packed(packed_once: Path, tmp_path: Path) -> ImageSet:
    """A finished image set, a copy to change (made once: fsync is slow)."""
    return open_images(shutil.copytree(packed_once, tmp_path / "images"))


@pytest.fixture
def stored(stored_once: Path, tmp_path: Path) -> Path:
    """A finished store, a copy to change."""
    return Path(shutil.copytree(stored_once, tmp_path / "store"))
