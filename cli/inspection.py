"""`e2kd inspect`, `verify`, `export` and `import`: what a store or an image set holds, and whether it is true."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from artifacts import (
    ConfigError,
    DataError,
    E2kdError,
    ImageSet,
    MismatchedStore,
    StoreError,
    TeacherStore,
    VerifyReport,
    open_images,
    open_store,
    verify_images,
    verify_store,
)
from artifacts.access import writing_to
from artifacts.images import load_images
from artifacts.places import Place, place
from artifacts.store import load_store
from cli.console import one_line, progress, say, table
from pipeline.workspace import CODEC_COST, FREEZING_GAP, images_beside, read_measured, stores_around

if TYPE_CHECKING:
    from pipeline.workspace import Workspace

WorkspaceOf = Callable[[Place], "Workspace"]


def describe(url: str) -> None:
    """Print a summary of a teacher store or an image set."""
    where = place(url)
    lines = _about_images(open_images(where)) if _is_images(where) else _about_store(open_store(where))
    table(lines)


def portray(url: str, row: int | None, key: str | None, images_url: str | None, png: Path) -> None:
    """Draw one row of a store."""
    from pipeline.report.row import draw_row

    store, images = open_store(url), _images_of(place(url), images_url)
    if store.manifest.images != images.fingerprint:
        raise MismatchedStore(
            f"{store.place} was not made from the images in {images.place}; give its own with --images"
        )
    if (row is None) == (key is None):
        raise ConfigError("--png draws one row: give --row or --key")
    if key is not None:
        keys = images.keys
        if key not in keys:
            raise ConfigError(f"{images.place} has no sample {key}; keys look like {keys[0]}")
        row = keys.index(key)
    assert row is not None
    if not 0 <= row < len(store):
        raise ConfigError(f"row {row} is not in {store.place}, which has rows 0 to {len(store) - 1}")
    with writing_to(png):
        png.parent.mkdir(parents=True, exist_ok=True)
    for name, logit in draw_row(store, images, row, png):
        say(f"{logit:9.3f}  {one_line(name)}")
    say(f"drawn: {png}")


def check(
    url: str,
    *,
    quick: bool,
    images_url: str | None,
    against_teacher: str | None,
    repair: bool,
    workspace_of: WorkspaceOf,
) -> int:
    """Verify, print every problem, mend and ask the teacher if wanted; 0 if all is well in the end, else 3.

    `workspace_of` gives the experiment that a place belongs to; it is asked only to mend and to ask.
    """
    where = place(url)
    is_images = _is_images(where)
    if not is_images and not where.exists("draft.json") and not where.exists("manifest.json"):
        raise StoreError(
            f"there is nothing at {where}; give a store (out/NAME/stores/STORE/SPLIT) or an image set"
        )
    if is_images and against_teacher is not None:
        raise ConfigError(f"{where} is an image set; --against-teacher is for teacher stores")
    report = _verified(where, is_images, quick, images_url)
    # once more if a damaged manifest hid what it names
    for _ in range(2 if repair else 0):
        if not report.ok:
            _repair(where, report, workspace_of(where))
            report = _verified(where, is_images, quick, images_url)
    if against_teacher is None or is_images or not report.ok:
        return 0 if report.ok else 3
    return _ask_again(where, against_teacher, workspace_of(where))


def export(url: str, destination: str, images_url: str | None) -> None:
    """Write a store and its images as plain WebDataset shards."""
    from artifacts.exchange import export_store

    store, images = open_store(url), _images_of(place(url), images_url)
    with progress().bar("export", len(images), "image") as advance:
        export_store(store, images, destination, progress=advance)
    say(f"exported: {destination}")


def import_(source: str, images_url: str, store_url: str) -> None:
    """Make an image set and a store of exported shards."""
    from artifacts.exchange import import_store

    store = import_store(source, images_url, store_url)
    say(f"imported: {len(store)} rows to {images_url} and {store_url}")


def _verified(where: Place, is_images: bool, quick: bool, images_url: str | None) -> VerifyReport:
    where = place(where.url)  # afresh: what was open before a repair is not what is there now
    beside = None if is_images else images_url or images_beside(where)
    with progress().bar(
        f"verify {str(where).rsplit('/', 1)[-1]}", _shards(where, is_images), "shard"
    ) as advance:
        if is_images:
            report = verify_images(where, quick=quick, progress=advance)
        else:
            report = verify_store(where, beside, quick=quick, progress=advance)
    for problem in report.problems:
        say(f"  {one_line(str(dataclasses.replace(problem, mend='')))}")
    checked = [f"{report.shards} shards", "sizes only" if quick else "every byte"]
    if not is_images:
        checked.append(f"rows against {beside}" if beside else "no image set beside it to compare rows with")
    say(f"{where}: {_count(report)} ({', '.join(checked)})")
    for mend in dict.fromkeys(problem.mend for problem in report.problems if problem.mend):
        say(one_line(mend))
    return report


def _count(report: VerifyReport) -> str:
    count = len(report.problems)
    return "ok" if report.ok else f"{count} problem{'s' if count > 1 else ''}"


def _repair(where: Place, report: VerifyReport, workspace: Workspace) -> None:
    from pipeline.precompute.repair import repair_images, repair_store

    split, is_images = workspace.split_at(where)
    (repair_images if is_images else repair_store)(workspace, split, report.problems)


def _ask_again(where: Place, share: str, workspace: Workspace) -> int:
    from pipeline.precompute.audit import audit_store

    split, _ = workspace.split_at(where)
    found = audit_store(workspace, split, share)
    say(str(found))
    return 3 if found.deviating else 0


def _is_images(where: Place) -> bool:
    return where.exists("packing.json") or where.exists("index.json")


def _images_of(where: Place, images_url: str | None) -> ImageSet:
    found = images_url or images_beside(where)
    if not found:
        raise StoreError(f"no image set beside {where}; say where it is with --images")
    return open_images(found)


def _shards(where: Place, is_images: bool) -> int:
    try:
        return len(load_images(where).shards) if is_images else load_store(where).manifest.shape.shards
    except E2kdError:
        return 0  # verify says why


def _about_images(images: ImageSet) -> list[tuple[str, str]]:
    size = sum(shard.bytes for shard in images.shards)
    labelled = sum(label is not None for label in images.labels)
    return [
        ("image set", str(images.place)),
        ("images", f"{len(images)} in {len(images.shards)} shards of {images.rows_per_shard} rows"),
        ("view", ", ".join(f"{name} {value}" for name, value in images.view.items())),
        ("classes", f"{len(images.classes)}, {labelled} images labelled"),
        ("size", f"{_bytes(size)}, {_bytes(size / max(len(images), 1))} per image"),
        ("fingerprint", images.fingerprint),
    ]


def _about_store(store: TeacherStore) -> list[tuple[str, str]]:
    manifest, rows = store.manifest, len(store)
    shape, teacher = manifest.shape, manifest.teacher
    sizes = {
        name: sum(record.arrays[name].bytes for record in manifest.shards)
        for name in manifest.shards[0].arrays
    }
    raw = {
        "logits": 4 * rows * shape.views * shape.classes,
        "maps": 4 * rows * shape.views * shape.explained * shape.channels * shape.height * shape.width,
    }
    lines = [
        ("store", str(store.place)),
        (
            "teacher",
            f"{teacher.architecture}, {teacher.classes} classes, weights {teacher.weights_sha256[:12]}",
        ),
        ("preprocessing", str(teacher.preprocessing)),
        ("explainer", f"{manifest.explainer.name} {manifest.explainer.settings}"),
        ("images", f"{rows} rows in {shape.shards} shards, image set {manifest.images[:12]}"),
        (
            "maps",
            f"{shape.channels}x{shape.height}x{shape.width}, {manifest.maps.codec} ({manifest.maps.error_bound})",
        ),
        ("logits", f"{manifest.logits.codec} ({manifest.logits.error_bound})"),
        ("dead maps", f"{manifest.dead_maps} ({manifest.dead_maps / rows:.2%})"),
    ]
    for name, size in sizes.items():
        ratio = f", {raw[name] / size:.1f}x smaller than float32" if name in raw else ""
        lines.append((f"  {name}", f"{_bytes(size)}, {_bytes(size / rows)} per image{ratio}"))
    total, everything = sum(sizes.values()), sum(store.place.sizes().values())
    lines += [
        ("size", f"{_bytes(everything)}, {_bytes(everything / rows)} per image"),
        (
            "overhead",
            f"{(everything - total) / everything:.2%} of it is not payload (records, manifest, metadata)",
        ),
    ]
    return [*lines, *_measured(store)]


def _measured(store: TeacherStore) -> list[tuple[str, str]]:
    """What precompute measured, which lies beside the stores of the splits."""
    lines = []
    for name, label in ((CODEC_COST, "codec cost"), (FREEZING_GAP, "freezing gap")):
        try:
            content = read_measured(stores_around(store.place), name)
        except DataError as error:
            lines.append((label, str(error)))
        else:
            lines += [(label, json.dumps(content))] if content else []
    return lines


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
