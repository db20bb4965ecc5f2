"""ImageNet (ILSVRC2012): train/<wnid>/*.JPEG, and its validation images as split `test`.

    val/<wnid>/*.JPEG                                        sorted into folders, or flat with the labels of one of
    val/ILSVRC2012_val_00000001.JPEG
    LOC_val_solution.csv                                     Kaggle's
    ILSVRC2012_devkit_t12/data/meta.mat, ILSVRC2012_validation_ground_truth.txt     the original's

Kaggle's archive has train/ and val/ in ILSVRC/Data/CLS-LOC: data.root may be the folder that it was unpacked in.
Classes are the wnids of train in alphabetical order, as everybody numbers them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image

from artifacts.errors import ConfigError, DataError
from pipeline.config.data import ImageNet
from pipeline.data.reading.files import folders_in, images_in, text_of
from pipeline.data.reading.listing import Entry, Listing
from pipeline.data.reading.photo import read_photo
from pipeline.data.reading.regular import regular_size

MEND = "set data.root to the folder that has ImageNet's train/ and val/"


def split_names(data: ImageNet) -> list[str]:
    if not data.root.is_dir():
        raise DataError(f"data.root {data.root} is not a folder; {MEND}", path=data.root)
    return ["train", "test"]


def open_listing(data: ImageNet, split: str) -> Listing:
    base = _base(data.root)
    wnids = folders_in(base / "train", MEND)
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    entries = _in_folders(data, "train", labels) if split == "train" else _val(data, labels)

    def read(entry: Entry, shorter_side: int | None) -> Image.Image:
        return read_photo(base / entry.id, shorter_side)

    return Listing(wnids, list(entries), read)


def _base(root: Path) -> Path:
    """Where train/ and val/ are."""
    kaggle = root / "ILSVRC" / "Data" / "CLS-LOC"
    return kaggle if kaggle.is_dir() else root


def _in_folders(data: ImageNet, split: str, labels: Mapping[str, int]) -> Iterator[Entry]:
    base = _base(data.root)
    for wnid in folders_in(base / split, MEND):
        if wnid not in labels:
            raise DataError(
                f"{base / split / wnid} is a class that {base / 'train'} does not have; remove one or add it",
                path=base / split / wnid,
            )
        images = list(images_in(base / split / wnid, data.on_bad_image))
        if not images:
            raise DataError(
                f"{base / split / wnid} has no images; unpack it again, or remove it",
                path=base / split / wnid,
            )
        for name, size in images:
            yield Entry(f"{split}/{wnid}/{name}", size, labels[wnid])


def _val(data: ImageNet, labels: Mapping[str, int]) -> Iterator[Entry]:
    base = _base(data.root)
    flat = list(images_in(base / "val", data.on_bad_image)) if (base / "val").is_dir() else []
    if not flat:
        yield from _in_folders(data, "val", labels)
        return
    sorted_into = next((wnid for wnid in labels if (base / "val" / wnid).is_dir()), None)
    if sorted_into is not None:
        raise DataError(
            f"{base / 'val' / min(flat)[0]} lies beside class folders such as {sorted_into}; remove it, or move it "
            "into its class",
            path=base / "val" / min(flat)[0],
        )
    source, known = _wnids_of_val(data.root, base)
    for name, size in flat:
        wnid = known.get(os.path.splitext(name)[0])
        if wnid is None:
            raise DataError(
                f"{base / 'val' / name} has no label in {source}; remove it, or {MEND}",
                path=base / "val" / name,
            )
        if wnid not in labels:
            raise DataError(
                f"{base / 'val' / name} has the label {wnid} in {source}, which is no class of {base / 'train'}; "
                f"{MEND}",
                path=base / "val" / name,
            )
        yield Entry(f"val/{name}", size, labels[wnid])


def _wnids_of_val(root: Path, base: Path) -> tuple[Path, dict[str, str]]:
    """The file with the labels, and wnid by the image's name without suffix."""
    kaggle, devkit = root / "LOC_val_solution.csv", root / "ILSVRC2012_devkit_t12" / "data"
    if kaggle.exists():
        rows = (line.split(",", 1) for line in text_of(kaggle, MEND).splitlines()[1:] if "," in line)
        return kaggle, {name: boxes.split(" ", 1)[0] for name, boxes in rows}
    if devkit.is_dir():
        truth = devkit / "ILSVRC2012_validation_ground_truth.txt"
        return truth, _wnids_by_name(truth, devkit / "meta.mat")
    raise DataError(
        f"{base / 'val'} has images without class folders and there are no labels for them: "
        f"add LOC_val_solution.csv or ILSVRC2012_devkit_t12/ to {root}",
        path=base / "val",
    )


def _wnids_by_name(truth: Path, meta: Path) -> dict[str, str]:
    """Line i of the ground truth is the ILSVRC2012_ID of validation image i, counted from 1."""
    wnids, found = _wnids_by_number(meta), {}
    for line, number in enumerate(text_of(truth, MEND).split(), 1):
        if number not in wnids:
            raise DataError(
                f"{truth}, line {line}: the label {number} is no class of {meta}; unpack the devkit again",
                path=truth,
                line=line,
            )
        found[f"ILSVRC2012_val_{line:08d}"] = wnids[number]
    return found


def _wnids_by_number(file: Path) -> dict[str, str]:
    """ILSVRC2012_ID -> wnid, from the devkit's meta.mat (a table of numbers and text: nothing is unpickled)."""
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError:
        raise ConfigError(f"reading {file} needs scipy: pip install 'e2kd[imagenet]'", path=file) from None
    try:
        regular_size(file)
        synsets = loadmat(file, squeeze_me=True)["synsets"]
        return {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in synsets}
    except (OSError, ValueError, KeyError, TypeError, IndexError, NotImplementedError, MatReadError) as error:
        raise DataError(f"cannot read {file} ({error}); unpack the devkit again", path=file) from None
