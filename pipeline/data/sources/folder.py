"""A folder of photographs.

    root/train/CLASS/*.jpg  root/val/CLASS/*.jpg  [root/test/CLASS/*.jpg]    splits as they are
    root/CLASS/*.jpg                                                         val picked by a hash of the path
    root/*.jpg                                                               the same, without labels

Class folders may have sub-folders of any depth. `val` is also picked from `train` when there is no `val` folder: the
first `val_fraction` in the order of the rows, so that new files move few of the old ones. `val_per_class` takes its
place where the config gives it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from artifacts.errors import DataError
from pipeline.config.data import Folder
from pipeline.data.reading.files import image_size
from pipeline.data.reading.keys import rank
from pipeline.data.reading.listing import Entry, Listing
from pipeline.data.reading.photo import SUFFIXES, read_photo

WANTED = "JPEG, PNG or WebP"


def split_names(data: Folder) -> list[str]:
    """The split folders that exist, else `train`. Raises DataError when the root is missing or not a folder."""
    root = _root(data)
    names = [name for name in ("train", "val", "test") if (root / name).is_dir()]
    return names if "train" in names or "val" in names else ["train"]


def open_listing(data: Folder, split: str) -> Listing:
    """Raises DataError when the split is missing, empty, or of mixed layout."""
    base = _base(data, split)
    classes = _classes(data, base) if data.labels else []
    entries = list(_entries(base, classes, data.on_bad_image))
    if not entries:
        raise DataError(f"{base} has no {WANTED} images; give a folder of images with data.root", path=base)

    def read(entry: Entry, shorter_side: int | None) -> Image.Image:
        return read_photo(base / entry.id, shorter_side)

    return Listing(classes, entries, read)


def _root(data: Folder) -> Path:
    root = data.root.expanduser()
    if root.is_dir():
        return root
    if root.exists():
        raise DataError(
            f"data.root {root} is a file, not a folder; give the folder that holds the images", path=root
        )
    raise DataError(
        f"data.root {root} does not exist; give a folder of images with --set data.root=FOLDER", path=root
    )


def _base(data: Folder, split: str) -> Path:
    """The folder that a split's images are in: its own, else `train`, else the root."""
    root = _root(data)
    return next((root / name for name in (split, "train") if (root / name).is_dir()), root)


def _classes(data: Folder, base: Path) -> list[str]:
    """Class folders in alphabetical order; those of `train` if the splits are folders."""
    root = _root(data)
    first = next((root / name for name in ("train", "val") if (root / name).is_dir()), base)
    names = sorted(
        entry.name for entry in first.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    for name in names:
        if next(_walk(first / name), None) is None:
            raise DataError(
                f"the class folder {first / name} has no {WANTED} images; add some, or remove the folder",
                path=first / name,
            )
    return names


def _entries(base: Path, classes: list[str], on_bad_image: str) -> Iterator[Entry]:
    """All images below a folder, each in the folder of a known class if there are classes."""
    labels = {name: label for label, name in enumerate(classes)}
    for path in _walk(base):
        relative = path.relative_to(base).as_posix()
        label = labels.get(relative.split("/", 1)[0])
        if classes and label is None:
            raise DataError(
                f"{path} is in none of the class folders ({', '.join(classes)}); move it into one, or set data.labels "
                "to false",
                path=path,
            )
        yield Entry(relative, image_size(path, on_bad_image), label)


def _walk(base: Path) -> Iterator[Path]:
    """Image files below a folder, hidden ones left out. Raises DataError for a link to a folder that it lies in."""
    for folder, folders, names in os.walk(base, onerror=_unreadable, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for link in (Path(folder, name) for name in folders):
            if link.is_symlink():
                _check_no_loop(link, base)
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(folder, name)


def _check_no_loop(link: Path, base: Path) -> None:
    """Compared with every folder that was entered on the way from `base`, which may itself be behind a link."""
    target, above = link.resolve(), link.relative_to(base).parents
    if any((base / folder).resolve().is_relative_to(target) for folder in above):
        raise DataError(
            f"{link} links to a folder that it lies in, so that its images would count twice; remove it",
            path=link,
        )


def _unreadable(error: OSError) -> None:
    raise DataError(
        f"cannot list the folder {error.filename} ({error.strerror}); make it readable, or remove it",
        path=error.filename,
    )


def pick(entries: list[Entry], data: Folder, split: str) -> list[Entry]:
    """Of images in order, val: those below the fraction, at least one unless it is 0; train: the rest."""
    limit, base = data.val_fraction * 2**64, _base(data, split)
    below = sum(rank(entry.id, data.split_seed) < limit for entry in entries)
    held_out = max(below, int(limit > 0))
    chosen = entries[:held_out] if split == "val" else entries[held_out:]
    if not chosen:
        mend = "raise" if split == "val" else "lower"
        raise DataError(
            f"no image of {base} is left for {split} with data.val_fraction {data.val_fraction:g}; {mend} it, or add "
            "images",
            path=base,
            key="data.val_fraction",
        )
    return chosen
