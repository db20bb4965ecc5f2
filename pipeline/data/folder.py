"""A folder of photographs as a source.

    root/train/CLASS/*.jpg  root/val/CLASS/*.jpg  [root/test/CLASS/*.jpg]    splits as they are
    root/CLASS/*.jpg                                                         val picked by a hash of the path
    root/*.jpg                                                               the same, without labels

Class folders may have sub-folders of any depth. `val` is also picked from `train` when there is no `val` folder.
Rows are in the order of a hash of the path, so the first n are a fair sample and new files move few of the old ones.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from artifacts.errors import DataError
from pipeline.config import Folder
from pipeline.data.photo import SUFFIXES, read_photo
from pipeline.data.source import RawSample


@dataclass(frozen=True)
class Photo:
    """One image file: its path below the split's folder (with /), its size in bytes and its rank among others."""

    path: str
    size: int
    digest: str

    @property
    def share(self) -> float:
        """0..1, uniform over paths."""
        return int(self.digest[:13], 16) / 16**13


def split_names(data: Folder) -> list[str]:
    """train and val, or the split folders that exist. Raises DataError when the root is missing or not a folder."""
    root = _root(data)
    folders = [name for name in ("train", "val", "test") if (root / name).is_dir()]
    if "train" not in folders and "val" not in folders:
        return ["train", "val"]
    return list(dict.fromkeys([*folders, "val"]))


class FolderSource:
    """One split of a folder. Raises DataError when it is missing, empty, or of mixed layout."""

    def __init__(self, data: Folder, split: str, shorter_side: int | None = None) -> None:
        self.name = "folder"
        self._split, self._shorter_side = split, shorter_side
        self._base, fraction = _place(data, split)
        self.classes = _classes(data, self._base) if data.labels else []
        photos = _listed(self._base)
        self._check_classes(photos)
        self._photos = _of_split(photos, split, fraction, self._base)
        self._keys = safe_keys([photo.path for photo in self._photos])

    def __len__(self) -> int:
        return len(self._photos)

    def key(self, row: int) -> str:
        return self._keys[row]

    def raw(self, row: int) -> RawSample:
        path = self._photos[row].path
        image = read_photo(self._base / path, self._shorter_side)
        return RawSample(self.key(row), image, self._label(path), source=_printable(path))

    def describe(self) -> str:
        listing = "\n".join(f"{photo.digest} {photo.size}" for photo in self._photos)
        digest = hashlib.sha256(listing.encode()).hexdigest()[:16]
        return f"folder {self._split}, {len(self)} files, names and sizes {digest}"

    def _label(self, path: str) -> int | None:
        return self.classes.index(path.split("/", 1)[0]) if self.classes else None

    def _check_classes(self, photos: list[Photo]) -> None:
        """Every image lies in the folder of a known class."""
        for photo in photos if self.classes else []:
            if photo.path.split("/", 1)[0] not in self.classes:
                raise DataError(
                    f"{self._base / photo.path} is in none of the class folders ({', '.join(self.classes)}); "
                    "move it into one, or set data.labels to false"
                )


def _root(data: Folder) -> Path:
    root = data.root.expanduser()
    if root.is_dir():
        return root
    if root.exists():
        raise DataError(f"data.root {root} is a file, not a folder; give the folder that holds the images")
    raise DataError(f"data.root {root} does not exist; give a folder of images with --set data.root=FOLDER")


def _place(data: Folder, split: str) -> tuple[Path, float | None]:
    """The folder a split lives in, and the share of it that is `val` if train and val are picked from it."""
    root = _root(data)
    if (root / split).is_dir() and (split != "train" or (root / "val").is_dir()):
        return root / split, None
    base = root / "train" if (root / "train").is_dir() else root
    return base, data.val_fraction if split in ("train", "val") else None


def _classes(data: Folder, base: Path) -> list[str]:
    """Class folders in alphabetical order; those of `train` where the splits are folders."""
    root = _root(data)
    first = next((root / name for name in ("train", "val") if (root / name).is_dir()), base)
    names = sorted(
        entry.name for entry in first.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    for name in names:
        if next(_walk(first / name), None) is None:
            raise DataError(
                f"the class folder {first / name} has no {_wanted()} images; add some, or remove the folder"
            )
    return names


def _listed(base: Path) -> list[Photo]:
    """All images below a folder, in the order of their paths' hashes."""
    photos = [_photo(base, path) for path in _walk(base)]
    if not photos:
        raise DataError(f"{base} has no {_wanted()} images; give a folder of images with data.root")
    return sorted(photos, key=lambda photo: photo.digest)


def _walk(base: Path) -> Iterator[Path]:
    """Image files below a folder, hidden ones left out."""
    for folder, folders, names in os.walk(base, onerror=_unreadable, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(folder, name)


def _unreadable(error: OSError) -> None:
    raise DataError(
        f"cannot list the folder {error.filename} ({error.strerror}); make it readable, or remove it"
    )


def _wanted() -> str:
    return "JPEG, PNG or WebP"


def _photo(base: Path, path: Path) -> Photo:
    """Raises DataError for a link to nowhere."""
    relative = path.relative_to(base).as_posix()
    try:
        return Photo(relative, os.stat(path).st_size, _digest(relative))
    except OSError as error:
        raise DataError(f"cannot read the image {path} ({error.strerror}); remove or replace it") from error


def _digest(path: str) -> str:
    """sha256 of a path, the same for composed and decomposed accents."""
    return hashlib.sha256(unicodedata.normalize("NFC", path).encode("utf-8", "surrogateescape")).hexdigest()


def _of_split(photos: list[Photo], split: str, fraction: float | None, base: Path) -> list[Photo]:
    """Photos are sorted by share: val are those below the fraction, at least one unless it is 0; train the rest."""
    if fraction is None:
        return photos
    held_out = max(sum(photo.share < fraction for photo in photos), int(fraction > 0))
    chosen = photos[:held_out] if split == "val" else photos[held_out:]
    if not chosen:
        mend = "raise" if split == "val" else "lower"
        raise DataError(
            f"no image of {base} is left for {split} with data.val_fraction {fraction:g}; {mend} it, or add images"
        )
    return chosen


def safe_keys(paths: list[str]) -> list[str]:
    """Keys of [A-Za-z0-9_-] from paths: a/b.jpg -> a--b; a short hash follows where that would not be unique."""
    plain = [
        re.sub(r"[^A-Za-z0-9_-]+", "_", str(PurePosixPath(path).with_suffix("")).replace("/", "--"))
        for path in paths
    ]
    times = Counter(key.lower() for key in plain)
    return [
        key if times[key.lower()] == 1 and _is_plain(path) else f"{key}-{_digest(path)[:10]}"
        for key, path in zip(plain, paths, strict=True)
    ]


def _is_plain(path: str) -> bool:
    """Nothing of the path but its suffix is lost in its key."""
    return re.fullmatch(r"[A-Za-z0-9_/-]+", str(PurePosixPath(path).with_suffix(""))) is not None


def _printable(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "replace")
