"""`e2kd inspect` and `e2kd verify`: what a store or an image set holds, and whether it is true."""

from __future__ import annotations

from pathlib import Path

from artifacts import (
    ImageSet,
    ImageSetError,
    StoreError,
    TeacherStore,
    open_images,
    open_store,
    verify_images,
    verify_store,
)
from cli.console import progress


def describe(path: Path) -> None:
    """Print a summary of a teacher store or an image set."""
    lines = _about_images(open_images(path)) if _is_images(path) else _about_store(open_store(path))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")


def check(path: Path, quick: bool) -> int:
    """Verify and print every problem; 0 when there is none, 3 otherwise."""
    if not path.exists():
        raise StoreError(
            f"there is nothing at {path}; give a store (out/NAME/stores/STORE/SPLIT) or an image set"
        )
    is_images = _is_images(path)
    beside = None if is_images else _images_beside(path)
    total = _shards(path, is_images)
    with progress().bar(f"verify {path.name}", total, "shard") as advance:
        if is_images:
            report = verify_images(path, quick=quick, progress=advance)
        else:
            report = verify_store(path, beside, quick=quick, progress=advance)
    for problem in report.problems:
        print(f"  {problem}")
    checked = [f"{report.shards} shards", "sizes only" if quick else "every byte"]
    if not is_images:
        checked.append(f"rows against {beside}" if beside else "no image set beside it to compare rows with")
    print(f"{path}: {'ok' if report.ok else f'{len(report.problems)} problems'} ({', '.join(checked)})")
    return 0 if report.ok else 3


def _is_images(path: Path) -> bool:
    return (path / "packing.json").exists() or (path / "index.json").exists()


def _images_beside(path: Path) -> Path | None:
    """The image set of a store in an experiment's folder: out/X/stores/NAME/SPLIT -> out/X/images/SPLIT."""
    images = path.resolve().parents[2] / "images" / path.name if len(path.resolve().parents) > 2 else None
    return images if images is not None and images.exists() else None


def _shards(path: Path, is_images: bool) -> int:
    try:
        return len(open_images(path).shards) if is_images else open_store(path).manifest.shape.shards
    except (ImageSetError, StoreError):
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
    total = sum(sizes.values())
    return [*lines, ("size", f"{_bytes(total)}, {_bytes(total / rows)} per image")]


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
