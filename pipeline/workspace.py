"""An experiment on disk: its config, its folders there and back, its devices, and how it tells what it does.

Everything is in one git-ignored folder `out/<experiment>/`; with `artifacts: URL` in the config its image sets and
stores lie there, for other experiments and machines to use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from artifacts import ImageSet, TeacherStore, open_images, open_store
from artifacts.durable import check_links
from artifacts.errors import ConfigError, DataError, StoreError
from artifacts.names import in_file_name, masked
from artifacts.places import LocalPlace, Place, Url, place
from pipeline.config import Experiment, load
from pipeline.config.text import json_of
from pipeline.config.written import CodecCost, Curve, FreezingGap, TeacherScores, check
from pipeline.progress import Progress, Quiet

if TYPE_CHECKING:
    from lightning_fabric import Fabric

FREEZING_GAP = "freezing-gap.json"
SHIFT_CURVE = "shift-curve.json"
CODEC_COST = "codec-cost.json"
MEASURED: dict[str, type[BaseModel]] = {
    FREEZING_GAP: FreezingGap,
    SHIFT_CURVE: Curve,
    CODEC_COST: CodecCost,
}
"""What each of them says; a teacher's scores are the others."""


def teacher_scores(split: str) -> str:
    """The file beside the stores with the teacher's own scores on a split."""
    return f"teacher-{in_file_name(split)}.json"


@dataclass(frozen=True)
class Layout:
    """The folders of one experiment: `root`, here, and `shared`, a folder or fsspec URL for images and stores."""

    root: Path
    shared: str | None = None

    @property
    def config(self) -> Path:
        """The resolved config of the last precompute or distill, so that the folder explains itself."""
        return self.root / "config.yaml"

    def images(self, split: str) -> Place:
        return self.artifacts / f"images/{split}"

    @property
    def teacher(self) -> Path:
        return self.root / "teacher"

    def stores(self, name: str) -> Place:
        """The stores of all splits, and beside them what was measured about them."""
        return self.artifacts / f"stores/{name}"

    def store(self, name: str, split: str) -> Place:
        return self.stores(name) / split

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    def run(self, student: str, seed: int) -> Path:
        return self.runs / student / f"seed-{seed}"

    @property
    def report(self) -> Path:
        return self.root / "report"

    @property
    def artifacts(self) -> Place:
        return place(self.shared or self.root)


WRITTEN = (
    "config.yaml",
    "images",
    "report",
    "runs",
    "stage-1.lock",
    "stores",
    "teacher",
    "teacher-weights.json",
)
"""What e2kd writes in an experiment's folder; whatever else lies there is the user's."""


class Workspace:
    """What every stage takes: the config, the folders, the devices and the progress of one experiment.

    The devices are taken when they are first asked for: packing and reporting need none.
    """

    def __init__(
        self,
        experiment: Experiment,
        layout: Layout,
        fabric: Fabric | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.experiment, self.layout = experiment, layout
        self.progress: Progress = progress or Quiet()
        if fabric is not None:
            self.fabric = fabric

    @classmethod
    def open(
        cls,
        config: Path,
        overrides: Sequence[str] = (),
        out: Path | None = None,
        progress: Progress | None = None,
    ) -> Workspace:
        """Of a config file, in `out` (default: out/<the file's name>).

        Raises ConfigError for a wrong config, WriteError if a link in that folder leads out of it.
        """
        experiment = load(config, overrides)
        root = out or Path("out") / config.stem
        check_links(root, WRITTEN)
        return cls(experiment, Layout(root, experiment.artifacts), None, progress)

    @classmethod
    def around(
        cls, where: Place, overrides: Sequence[str] = (), progress: Progress | None = None
    ) -> Workspace:
        """Of the experiment in whose folder a store or an image set lies, by that folder's `config.yaml`.

        Raises ConfigError if there is none.
        """
        root = _root(where)
        if root is None or not Layout(root).config.exists():
            raise ConfigError(
                f"the teacher of {where} is not known: its experiment's config.yaml is not there; give --config CONFIG"
            )
        return cls.open(Layout(root).config, overrides, root, progress)

    def here(self) -> Workspace:
        """The same experiment without a URL of its config: image sets and stores are looked for in its folder."""
        url = self.layout.shared
        if url is None or "://" not in url:
            return self
        self.progress.say(
            f"note: {masked(url)} is named by the folder and was not opened; if you trust it: --set artifacts=URL"
        )
        return Workspace(self.experiment, Layout(self.layout.root), None, self.progress)

    @cached_property
    def fabric(self) -> Fabric:
        """This process's devices, in fp32."""
        from pipeline.devices import start

        return start()

    def in_precision(self, precision: str) -> Workspace:
        """The same experiment with devices of `precision`."""
        from pipeline.devices import start

        return Workspace(self.experiment, self.layout, start(precision), self.progress)

    def open_images(self, split: str) -> ImageSet:
        return open_images(self.layout.images(split))

    def store_place(self, split: str) -> Place:
        return self.layout.store(self.experiment.store_name, split)

    def open_store(self, split: str) -> TeacherStore:
        """Whatever finished store is there; `provenance.matching_store` checks whose it is."""
        return open_store(self.store_place(split))

    @property
    def beside_stores(self) -> Place:
        """The folder of the experiment's stores, and of what is known about all of them."""
        return self.layout.stores(self.experiment.store_name)

    def measured(self, name: str) -> dict[str, Any]:
        """What stage 1 wrote about its stores, or nothing. Raises DataError for a damaged file."""
        return read_measured(self.beside_stores, name)

    def has_measured(self, name: str, particulars: Mapping[str, Any]) -> bool:
        """Whether that file is there and says `particulars`: of this store, of this split."""
        return self.measured(name).items() >= particulars.items()

    def write_measured(self, name: str, content: Mapping[str, Any]) -> None:
        self.beside_stores.write(name, (json.dumps(content, indent=2) + "\n").encode())

    def split_at(self, where: Place) -> tuple[str, bool]:
        """(split, whether it is an image set) of a place of this experiment. Raises StoreError for any other place."""
        for split in self.experiment.packed_splits:
            if _same(where, self.layout.images(split)):
                return split, True
            if _same(where, self.store_place(split)):
                return split, False
        raise StoreError(
            f"{where} is none of the experiment's image sets or stores (its store is {self.beside_stores}); give its "
            "own config with --config",
            path=where,
        )


def read_measured(beside: Place, name: str) -> dict[str, Any]:
    """What stage 1 wrote beside the stores, or nothing. Raises DataError for a damaged file."""
    if not beside.exists(name):
        return {}
    try:
        return check(json_of(beside.read(name)), MEASURED.get(name, TeacherScores))
    except ValueError:
        raise DataError(
            f"{beside / name} is damaged; delete it and run e2kd precompute CONFIG again", path=beside / name
        ) from None


def stores_around(store: Url) -> Place:
    """The folder that holds a store: X/stores/NAME of X/stores/NAME/SPLIT, with what was measured about it."""
    url = place(store).url.rstrip("/")
    before, stores, after = url.rpartition("/stores/")
    name = after.partition("/")[0]
    return place(f"{before}/stores/{name}") if stores else place(url.rsplit("/", 1)[0])


def images_beside(store: Url) -> Place | None:
    """The image set of a store: X/images/SPLIT of X/stores/NAME/SPLIT, if it is there. SPLIT may be NAME/train."""
    before, stores, after = place(store).url.rstrip("/").rpartition("/stores/")
    split = after.partition("/")[2]
    if not stores or not split:
        return None
    images = place(f"{before}/images/{split}")
    return images if images.exists("index.json") else None


def _root(where: Place) -> Path | None:
    """out/X of out/X/stores/NAME/SPLIT and out/X/images/SPLIT."""
    if not isinstance(where, LocalPlace):
        return None
    above = [parent for parent in where.path.parents if parent.name in ("stores", "images")]
    return above[0].parent if above else None


def _same(a: Place, b: Place) -> bool:
    if isinstance(a, LocalPlace) and isinstance(b, LocalPlace):
        return a.path.resolve() == b.path.resolve()
    return a.url.rstrip("/") == b.url.rstrip("/")
