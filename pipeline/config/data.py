"""The section `data`: where images come from, and which of them are train, val and test.

A data source is one class here, which says its names in the literal type of `source`: `config.sources` collects these
classes. Its reader is a row of the table in `pipeline/data/sources/__init__.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from pipeline.config.base import Fraction, PlainName, Positive, Seed, Settings


def _named(folder: Any) -> Any:
    if isinstance(folder, str) and not folder.strip():
        raise ValueError("is empty; name the data set's folder (. is the one you are in)")
    return folder


Root = Annotated[Path, BeforeValidator(_named), AfterValidator(Path.expanduser)]


class DataConfig(Settings):
    """What every data source has."""

    source: str
    limit: Positive | None = Field(None, description="use only the first `limit` images of each split")


class ToyBirds(DataConfig):
    """Waterbirds-100 in miniature (48 px, generated): background = class in training, reversed out of distribution."""

    source: Literal["toybirds"]
    seed: Seed = 0


class ToyShapes(DataConfig):
    """Ten silhouettes on unrelated backgrounds (48 px, generated), for the few-shot question."""

    source: Literal["toyshapes"]
    seed: Seed = 0
    train_per_class: Positive = 20


class Files(DataConfig):
    """A data set on disk.

    Its rows are in the order of a hash of (split_seed, path): the first n of a class are a random choice, the same
    on every machine. `val_per_class` and `train_per_class` cut `train` in this order: first val, then train.
    """

    root: Root
    val_per_class: Positive | None = Field(
        None, description="hold this many images of each class out of train, as split val (paper: 50)"
    )
    train_per_class: Positive | None = Field(
        None, description="few-shot: pack only this many of each class of train, val already held out"
    )
    split_seed: Seed = Field(42, description="decides the order of the rows, and which images are held out")
    split_rule: Literal["hash", "authors"] = Field(
        "hash",
        description="which images of a class val_per_class and train_per_class take: the first in the order of the "
        "rows, or those that the authors' code takes (split_seed 42)",
    )
    on_bad_image: Literal["stop", "skip"] = Field(
        "stop", description="skip: leave unreadable images out and say which; one more pass over the files"
    )

    @property
    def folders(self) -> list[Path]:
        """Where the data set lies, the longest path first."""
        return [self.root]


class Folder(Files):
    """A folder of photographs: `train/` and `val/`, or class sub-folders, or flat and unlabelled."""

    source: Literal["folder"]
    val_fraction: Fraction = 0.1
    labels: bool = Field(True, description="false: ignore the class sub-folders (images of another data set)")


class ImageNet(Files):
    """ILSVRC2012: `train/<wnid>/` and, as split `test`, `val/` (wnid folders, or flat with the devkit's labels)."""

    source: Literal["imagenet"]


class Sun397(Files):
    """SUN397: `a/abbey/*.jpg`, `ClassName.txt` and the lists `Training_01.txt`, `Testing_01.txt` (train, test)."""

    source: Literal["sun397"]
    partition: Annotated[int, Field(ge=1, le=10)] = 1


class Cifar(Files):
    """CIFAR-10 or -100 in the published binary version (train, test): nothing is unpickled."""

    source: Literal["cifar10", "cifar100"]


class TinyImageNet(Files):
    """Tiny-ImageNet-200 as published (64 px, with boxes): train, and its `val/` as split `test`."""

    source: Literal["tiny-imagenet"]
    classes: Positive | None = Field(None, description="only the first n classes, in the order of wnids.txt")


class Waterbirds(Files):
    """group_DRO's Waterbirds folder with `metadata.csv`: train, val, test, and test-id, test-ood, val-id, val-ood.

    group = 2 label + place; out of distribution are groups 1 and 2.
    """

    source: Literal["waterbirds"]
    cub: Root | None = Field(None, description="CUB_200_2011, for its boxes (bounding_boxes.txt)")

    @property
    def folders(self) -> list[Path]:
        # CUB's masks lie in its folder, or beside it
        others = [self.cub, self.cub.parent] if self.cub else []
        return sorted([self.root, *others], key=lambda folder: len(str(folder)), reverse=True)


class Voc(Files):
    """PASCAL VOC (`VOCdevkit/VOC2007`), multi-label, with boxes: train, val, trainval, test."""

    source: Literal["voc"]
    year: Literal["2007", "2012"] = "2007"
    difficult: Literal["keep", "drop"] = Field("keep", description="objects that are marked difficult")


class WebShards(Files):
    """WebDataset tars below `root`: one pattern for each split, as `train-{000000..000015}.tar`."""

    source: Literal["webdataset"]
    shards: dict[PlainName, str] = Field(
        min_length=1, description="split: a file, a glob, or a brace pattern"
    )
    classes: tuple[str, ...] = Field(
        (), description="class names by label; default: as many as the labels say"
    )


class HuggingFace(Files):
    """A data set folder as on the Hugging Face hub: parquet files, or images with `metadata.jsonl`."""

    source: Literal["huggingface"]
    image: str = Field("image", description="parquet: the image's column")
    label: str | None = Field("label", description="the label's column or key; null: unlabelled")
