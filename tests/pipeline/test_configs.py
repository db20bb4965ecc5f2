"""Every config of configs/ loads, and runs two steps of each of its stages on generated data in its data's layout.

Images are 32 px and the networks are the smallest of their family, so that some configs are the same experiment: that
runs once. `slow` runs every config, with its own networks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning_fabric import Fabric
from PIL import Image

from pipeline.config import Experiment, load
from pipeline.config.models import explained_by
from pipeline.data.sources.voc import CLASSES as VOC
from pipeline.models import build, save_weights
from pipeline.order.runs import distill_all
from pipeline.report import paper
from pipeline.workspace import Layout, Workspace

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))


def picture(path: Path, seed: int, size: int = 40) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    Image.fromarray(pixels).resize((size, size)).save(path)


def imagenet(root: Path) -> None:
    for wnid in ("n01440764", "n01443537"):
        for number in range(9):
            picture(root / f"train/{wnid}/{wnid}_{number}.JPEG", number)
        for number in range(4):
            picture(root / f"val/{wnid}/ILSVRC2012_val_{wnid}_{number}.JPEG", 50 + number)


def sun397(root: Path) -> None:
    classes = ["/a/abbey", "/b/bar"]
    train = [f"{name}/sun_{number}.jpg" for name in classes for number in range(9)]
    test = [f"{name}/sun_{number}.jpg" for name in classes for number in range(9, 12)]
    for seed, name in enumerate([*train, *test]):
        picture(root / name[1:], seed)
    (root / "ClassName.txt").write_text("\n".join(classes) + "\n")
    (root / "Training_01.txt").write_text("\n".join(train) + "\n")
    (root / "Testing_01.txt").write_text("\n".join(test) + "\n")


def tiny_imagenet(root: Path) -> None:
    wnids = ["n01443537", "n01629819"]
    (root / "val").mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (root / "words.txt").write_text("".join(f"{wnid}\tthing {wnid}\n" for wnid in wnids))
    for wnid in wnids:
        names = [f"{wnid}_{number}.JPEG" for number in range(9)]
        for seed, name in enumerate(names):
            picture(root / f"train/{wnid}/images/{name}", seed, 64)
        lines = "".join(f"{name}\t0\t10\t63\t58\n" for name in names)
        (root / f"train/{wnid}/{wnid}_boxes.txt").write_text(lines)
    rows = [(f"val_{number}.JPEG", wnids[number % 2]) for number in range(8)]
    for seed, (name, _) in enumerate(rows):
        picture(root / f"val/images/{name}", seed, 64)
    lines = "".join(f"{name}\t{wnid}\t3\t5\t58\t60\n" for name, wnid in rows)
    (root / "val/val_annotations.txt").write_text(lines)


def waterbirds(root: Path, cub: Path) -> None:
    lines, images, boxes = ["img_id,img_filename,y,split,place,place_filename"], [], []
    for number in range(36):
        y, split = number % 2, min(number // 12, 2)
        place = y if split == 0 else (number // 2) % 2
        name = f"001.Bird_{y}/Bird_{number:04d}.jpg"
        picture(root / name, number)
        lines.append(f"{number + 1},{name},{y},{split},{place},/o/ocean/{number}.jpg")
        images.append(f"{number + 1} {name}")
        boxes.append(f"{number + 1} 8.0 6.0 20.0 24.0")
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")
    cub.mkdir(parents=True)
    (cub / "images.txt").write_text("\n".join(images) + "\n")
    (cub / "bounding_boxes.txt").write_text("\n".join(boxes) + "\n")


def voc(root: Path) -> None:
    base = root / "VOC2007"
    for folder in ("Annotations", "ImageSets/Main"):
        (base / folder).mkdir(parents=True)
    for split, numbers in {"train": range(8), "val": range(8, 14), "test": range(14, 20)}.items():
        (base / f"ImageSets/Main/{split}.txt").write_text("".join(f"{number:06d}\n" for number in numbers))
        for number in numbers:
            picture(base / f"JPEGImages/{number:06d}.jpg", number)
            objects = "".join(
                f"<object><name>{VOC[k]}</name><difficult>0</difficult><bndbox><xmin>{4 + 9 * (k % 3)}</xmin>"
                f"<ymin>5</ymin><xmax>{20 + 9 * (k % 3)}</xmax><ymax>30</ymax></bndbox></object>"
                for k in {number % 3, 3 + number % 2}
            )
            text = (
                f"<annotation><filename>{number:06d}.jpg</filename><size><width>40</width><height>40</height>"
                f"<depth>3</depth></size>{objects}</annotation>"
            )
            (base / f"Annotations/{number:06d}.xml").write_text(text)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("datasets")
    imagenet(root / "imagenet")
    sun397(root / "sun397")
    tiny_imagenet(root / "tiny-imagenet")
    waterbirds(root / "waterbirds", root / "cub")
    voc(root / "voc")
    for number in range(12):
        picture(root / f"folder/{number}.jpg", number)
    return root


@cache
def loaded(config: str) -> Experiment:
    return load(ROOT / config)


TWO_STEPS = ("epochs=1", "batch_size=4", "workers=0", "validate_every=1", "warmup=0.1")


def settings(config: str, datasets: Path) -> list[str]:
    """The overrides that leave of an experiment what its two steps need."""
    source = loaded(config).data.source
    found = ["sweep={}", "seeds=[0]", "store.batch_size=4", "evaluate.batch_size=4"]
    for section in ("train", "teacher.train") if loaded(config).teacher.train else ("train",):
        found += [f"{section}.{key}" for key in TWO_STEPS]
    raw = yaml.safe_load((ROOT / config).read_text())
    found += ["train.shots=1"] if "shots" in raw["train"] else []
    for name, own in raw["students"].items():
        found += [
            f"students.{name}.{key}=1" for key in ("epochs", "validate_every", "shots") if key in (own or {})
        ]
    if source.startswith("toy"):
        return [
            *found,
            *(["data.limit=8"] if source == "toybirds" else ["data.limit=10", "data.train_per_class=1"]),
        ]
    found += ["view={size: 32}", f"data.root={datasets / source}", "data.limit=8"]
    if source in ("imagenet", "tiny-imagenet", "sun397"):
        found += ["data.val_per_class=2", "data.train_per_class=3"]
    if source == "waterbirds":
        found.append(f"data.cub={datasets / 'cub'}")
    if source == "tiny-imagenet":
        found.append("data.classes=2")
    if loaded(config).also:
        found.append("teacher.classes=2")
    for name, other in loaded(config).also.items():
        found += [f"also.{name}.root={datasets / other.source}", f"also.{name}.limit=8"]
    return found


def random_weights(experiment: Experiment, root: Path) -> Path:
    """A file in the place of the published weights, so that every stage has the same teacher."""
    torch.manual_seed(0)
    classes = experiment.teacher.classes or 2
    save_weights(build(experiment.teacher, classes), root / "teacher.safetensors")
    return root / "teacher.safetensors"


def small(config: str) -> list[str]:
    """The smallest networks of the families, at random weights, in the place of the config's own."""
    experiment = loaded(config)
    smallest = {"bcos": "bcos/small", "gradcam": "toy/resnet"}
    kind = smallest[explained_by(experiment.teacher.model)]
    student = smallest[explained_by(next(iter(experiment.students.values())).model)]
    return [f"teacher.model={kind}", "teacher.width=4", f"train.model={student}", "train.width=4"]


def overrides_of(config: str, datasets: Path, networks: Callable[[str], list[str]]) -> list[str]:
    """Of what two steps need, with `networks` whose weights are still to be named."""
    teacher, found = loaded(config).teacher, [*settings(config, datasets), *networks(config)]
    if teacher.train is None:
        return [*found, "teacher.weights=none"]
    return [*found, "teacher.train.init=null"] if teacher.train.init else found


def different() -> list[str]:
    """The first of all configs that are the same experiment with small networks, one epoch and one shot."""
    first: dict[str, str] = {}
    for config in CONFIGS:
        experiment = load(ROOT / config, overrides_of(config, Path("data"), small))
        first.setdefault(experiment.model_dump_json(exclude={"paper"}), config)
    return list(first.values())


@pytest.mark.parametrize("config", CONFIGS)
def test_it_loads_and_its_header_says_how_to_run_it(config: str) -> None:
    experiment = load(ROOT / config)
    header = [line for line in (ROOT / config).read_text().splitlines() if line.startswith("#")]
    assert any(config in line or "make distill" in line for line in header)
    if experiment.paper:
        assert paper.table(experiment.paper).rows


def test_configs_that_run_once_for_several_differ_in_numbers_and_networks_only() -> None:
    """Their tables, figures and data sets all run."""
    runs = {config.rsplit("-", 1)[0] for config in different()}
    assert {config.rsplit("-", 1)[0] for config in CONFIGS} == runs
    assert len(different()) > len(CONFIGS) / 2


@pytest.mark.parametrize("config", different())
def test_two_steps_of_each_stage(config: str, datasets: Path, tmp_path: Path, fabric: Fabric) -> None:
    run(config, datasets, tmp_path, fabric, small)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_two_steps_with_its_own_networks(config: str, datasets: Path, tmp_path: Path, fabric: Fabric) -> None:
    run(config, datasets, tmp_path, fabric, lambda config: ["view={size: 64}"])


def run(
    config: str, datasets: Path, root: Path, fabric: Fabric, networks: Callable[[str], list[str]]
) -> None:
    overrides = overrides_of(config, datasets, networks)
    experiment = load(ROOT / config, overrides)
    if experiment.teacher.train is None:
        weights = random_weights(experiment, root)
        experiment = load(ROOT / config, [*overrides, f"teacher.weights={weights}"])
    layout = Layout(root / "out")
    distill_all(Workspace(experiment, layout, fabric), list(experiment.candidates), [0])
    for name in experiment.candidates:
        result = json.loads((layout.run(name, 0) / "result.json").read_text())
        assert set(result["splits"]) >= set(experiment.evaluate.splits)
