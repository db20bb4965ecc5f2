"""Size and speed of teacher stores, as a table with the bars that they must reach. Give it an empty machine.

OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.store sizes reading --photos FOLDER   one core, about 5 minutes
python -m benchmarks.store writing --photos FOLDER                                        all cores, about 5 minutes

The GradCAM teacher is the pip-installed EfficientNet-Lite0 at 224 px. The B-cos teacher is a ResNet-18 of the package
`bcos`; without --bcos-weights its weights are random, and its maps denser, so larger, than a trained network's. Without
--photos the embedded toy pictures are used, enlarged. Times that are compared are taken in turns, in one run.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from artifacts import TeacherRows, open_images, open_store
from artifacts.codecs import get_codec
from artifacts.images import ImageSet
from artifacts.manifest import CodecInfo, ExplainerInfo, ManifestDraft, StoreShape, TeacherInfo
from artifacts.writer import ShardStream, StoreWriter
from pipeline import explain as explainers
from pipeline.config import AugmentConfig, ModelConfig, parse
from pipeline.data.pack import pack_split
from pipeline.models import build
from pipeline.precompute.answer import answer_shards
from pipeline.precompute.codec_cost import codec_cost
from pipeline.workspace import Layout, Workspace

SIZE, PER_SHARD, BATCH, ROUNDS = 224, 256, 16, 5


class Row(NamedTuple):
    what: str
    found: str
    bar: str


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", default=["sizes", "reading", "writing"], choices=[*PARTS, "peak"])
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--bcos-weights", type=Path)
    parser.add_argument("--folder", type=Path, help="internal: where the packed images are")
    options = parser.parse_args()
    if "peak" in options.what:
        print(_peak(options))
        return
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        images = _pack(options)
        rows = [row for part in options.what for row in PARTS[part](options, images)]
    where = f"{len(images)} {'photographs of ' + options.photos.name if options.photos else 'toy pictures'}"
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    print(
        f"\n{where}; {platform.machine()}, {len(os.sched_getaffinity(0))} cores, {threads} threads; {date.today()}\n"
    )
    print("| what | found | bar |\n|---|---|---|")
    for row in rows:
        print(f"| {row.what} | {row.found} | {row.bar} |")


# --- the tables


def sizes(options: argparse.Namespace, images: ImageSet) -> Iterator[Row]:
    """Bytes per image, and what the codec costs after the students' crop and flip."""
    gradcam = Remembered(gradcam_teacher())
    path = options.folder / "gradcam"
    fill(path, gradcam, images, "fp16")
    yield from _size(
        "GradCAM 7x7 + 1000 logits, fp16", path, gradcam, images, "<= 2.0 KB, top-1 100%, KL <= 1e-6", ""
    )
    fill(options.folder / "uint12", gradcam, images, "fp16", "uint12")
    yield from _size("the same, logits uint12", options.folder / "uint12", gradcam, images, "", "")
    bcos = Remembered(bcos_teacher(options))
    for codec in ("int6", "int5", "int8", "fp16", "lossless"):
        path = options.folder / f"bcos-{codec}"
        fill(path, bcos, images, codec)
        default = codec == "int6"
        bars = ("<= 125 KB", "mean >= .997, p1 >= .99") if default else ("", "")
        yield from _size(
            f"B-cos 6x224x224, {codec}{' (default)' if default else ''}", path, bcos, images, *bars
        )


def reading(options: argparse.Namespace, images: ImageSet) -> Iterator[Row]:
    """Maps, warm, against one torch.load-ed fp16 .pt an image."""
    for name, teacher, codec, bars in (
        ("GradCAM", gradcam_teacher(), "fp16", (">= 100x", "")),
        ("B-cos", bcos_teacher(options), "int6", (">= 1.0x", ">= 0.8x")),
    ):
        path, files = options.folder / f"read-{name}", options.folder / f"pt-{name}"
        fill(path, teacher, images, codec)
        store, n = open_store(path), len(images)
        files.mkdir()
        for row in range(n):
            torch.save(torch.from_numpy(store.read([row]).maps[0, 0, 0]).half(), files / f"{row}.pt")
        shuffled = np.random.default_rng(0).permutation(n).tolist()
        times = in_turns(
            {
                "pt": lambda files=files, n=n: [
                    torch.load(files / f"{row}.pt", weights_only=True) for row in range(n)
                ],
                "ordered": lambda store=store, n=n: [
                    store.read_maps(range(i, min(i + BATCH, n))) for i in range(0, n, BATCH)
                ],
                "random pt": lambda files=files, order=shuffled: [
                    torch.load(files / f"{r}.pt", weights_only=True) for r in order
                ],
                "random": lambda store=store, order=shuffled: [store.read_maps([row]) for row in order],
            }
        )
        ms = {key: 1e3 * value / n for key, value in times.items()}
        for title, ours, theirs, bar in (
            ("in shard order", "ordered", "pt", bars[0]),
            ("random single rows", "random", "random pt", bars[1]),
        ):
            found = f"{ms[theirs] / ms[ours]:.2f}x ({ms[ours]:.3f} ms, .pt {ms[theirs]:.3f} ms)"
            yield Row(f"{name} maps, {title}, against .pt", found, bar)


def writing(options: argparse.Namespace, images: ImageSet) -> Iterator[Row]:
    """Precompute against the same teacher over the same batches without writing; and its memory."""
    for name, teacher, codec in (
        ("GradCAM", gradcam_teacher(), "fp16"),
        ("B-cos", bcos_teacher(options), "int6"),
    ):
        path = options.folder / f"write-{name}"
        few = min(len(images), PER_SHARD if name == "B-cos" else 2 * PER_SHARD)
        shards = range(few // PER_SHARD)

        def stored(
            teacher: nn.Module = teacher, path: Path = path, codec: str = codec, shards: range = shards
        ) -> None:
            for old in path.glob("commits/*"):
                old.unlink()
            writer = StoreWriter(path, draft(teacher, images, codec))
            writer.create()
            answer_shards(teacher, images, shards, ShardStream(writer), BATCH, lambda _: None)

        def alone(teacher: nn.Module = teacher, shards: range = shards) -> None:
            answer_shards(teacher, images, shards, _Nowhere(), BATCH, lambda _: None)

        times = in_turns({"alone": alone, "stored": stored}, rounds=2)
        rate = len(shards) * PER_SHARD / times["stored"]
        found = f"{times['stored'] / times['alone']:.3f}x ({rate:.1f} images/s)"
        yield Row(f"{name} precompute, against the teacher alone", found, "<= 1.05x")
    peak = [sys.executable, "-m", "benchmarks.store", "peak"]
    peaks = [
        int(
            subprocess.run(
                [*peak, "--images", str(count), "--folder", str(options.folder)],
                capture_output=True,
                check=True,
                text=True,
            ).stdout.split()[-1]
        )
        for count in (2 * PER_SHARD, 4 * PER_SHARD, 16 * PER_SHARD)
    ]
    found = ", ".join(f"{mib} MiB" for mib in peaks)
    yield Row("peak memory, B-cos maps of 2, 4 and 16 shards", found, "does not grow with the images")


PARTS: dict[str, Callable[[argparse.Namespace, ImageSet], Iterator[Row]]] = {
    "sizes": sizes,
    "reading": reading,
    "writing": writing,
}


# --- teachers and stores


def gradcam_teacher() -> nn.Module:
    lite = build(ModelConfig(model="timm/tf_efficientnet_lite0", weights="lite0"), 1000)
    return explainers.build("gradcam", lite.eval().requires_grad_(False))


class BCosTeacher(nn.Module):
    """W(x) of the package's ResNet-18, by its own explanation mode."""

    def __init__(self, weights: Path | None) -> None:
        super().__init__()
        from bcos.models.resnet import resnet18

        torch.manual_seed(0)
        self.net = resnet18(pretrained=False).eval()
        if weights:
            self.net.load_state_dict(torch.load(weights, weights_only=True))

    def forward(self, images: Tensor, classes: Tensor | None = None) -> explainers.Explained:
        x = torch.cat([images, 1 - images], 1).requires_grad_()
        with torch.enable_grad(), self.net.explanation_mode():
            logits = self.net(x)
            classes = logits.argmax(1) if classes is None else classes
            (maps,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), x)
        return explainers.Explained(logits.detach(), maps, classes)


def bcos_teacher(options: argparse.Namespace) -> nn.Module:
    return BCosTeacher(options.bcos_weights)


class Remembered(nn.Module):
    """A teacher that answers for an image once: each codec then stores the same numbers."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher
        self.known: dict[bytes, tuple[Tensor, Tensor, Tensor]] = {}

    def forward(self, images: Tensor, classes: Tensor | None = None) -> explainers.Explained:
        names = [image.numpy().tobytes() for image in (images * 255).round().to(torch.uint8)]
        new = [i for i, name in enumerate(names) if name not in self.known]
        if new:
            for i, *answer in zip(new, *self.teacher(images[new]), strict=True):
                self.known[names[i]] = tuple(answer)
        return explainers.Explained(
            *map(torch.stack, zip(*(self.known[name] for name in names), strict=True))
        )


def draft(teacher: nn.Module, images: ImageSet, maps: str, logits: str = "fp16") -> ManifestDraft:
    answer = teacher(torch.from_numpy(images.read_images([0])).float() / 255)
    channels, height, width = answer.maps.shape[1:]

    def codec(name: str) -> CodecInfo:
        return CodecInfo(codec=get_codec(name).codec_id, error_bound=get_codec(name).error_bound)

    return ManifestDraft(
        teacher=TeacherInfo(
            architecture="benchmark", weights_sha256="", preprocessing={}, classes=1000, class_names=[]
        ),
        explainer=ExplainerInfo(name="benchmark", settings={}),
        view=images.view,
        images=images.fingerprint,
        shape=StoreShape(
            rows=len(images),
            rows_per_shard=PER_SHARD,
            classes=1000,
            channels=channels,
            height=height,
            width=width,
        ),
        logits=codec(logits),
        maps=codec(maps),
    )


def fill(path: Path, teacher: nn.Module, images: ImageSet, maps: str, logits: str = "fp16") -> None:
    writer = StoreWriter(path, draft(teacher, images, maps, logits))
    writer.create()
    shards = range(len(images.shards))
    answer_shards(teacher, images, shards, ShardStream(writer), BATCH, lambda _: None)
    writer.finish()


class _Nowhere(nullcontext[Any]):
    """A ShardStream that throws away."""

    def __enter__(self) -> _Nowhere:
        return self

    def begin(self, *_: Any) -> None: ...

    def append(self, rows: TeacherRows) -> None: ...

    def end(self) -> None: ...


# --- measuring


def _size(
    what: str, path: Path, teacher: nn.Module, images: ImageSet, bar: str, cosine_bar: str
) -> Iterator[Row]:
    store = open_store(path)
    cost = codec_cost(teacher, images, store, AugmentConfig(), torch.device("cpu"))
    objects = sum(item.bytes for record in store.manifest.shards for item in record.arrays.values())
    everything = sum(store.place.sizes().values())
    size = f"{everything / len(images) / 1000:.2f} KB/image"
    yield Row(f"{what}: size", f"{size}, top-1 {cost['top1']:.1%}, KL {cost['kl']:.1e}", bar)
    whole, crop = cost["whole"], cost["augmented"]
    found = f"whole {whole['mean']:.4f}, after the crop {crop['mean']:.4f}, p1 {crop['p1']:.4f}"
    yield Row(f"{what}: cosine to the exact map", found, cosine_bar)
    yield Row(f"{what}: beyond payload", f"{1 - objects / everything:.2%}", "<= 2%")


def in_turns(work: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Best seconds of each, after one round to warm up."""
    best = dict.fromkeys(work, float("inf"))
    for turn in range(rounds + 1):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            if turn:
                best[name] = min(best[name], time.perf_counter() - started)
    return best


def _peak(options: argparse.Namespace) -> int:
    """MiB of a process that writes that many images' B-cos maps (random numbers: the teacher has its own memory)."""
    shape = StoreShape(
        rows=options.images, rows_per_shard=PER_SHARD, classes=1000, channels=6, height=SIZE, width=SIZE
    )
    images = open_images(Layout(options.folder).images("all"))
    plan = draft(_Noise(), images, "int6").model_copy(update={"shape": shape})
    path = Path(tempfile.mkdtemp(dir=options.folder))
    writer = StoreWriter(path, plan)
    writer.create()
    generator = torch.Generator().manual_seed(0)
    with ShardStream(writer) as stream, ThreadPoolExecutor(1):
        for shard in range(shape.shards):
            stream.begin(shard, "", [str(row) for row in shape.shard_rows(shard)])
            for _ in range(PER_SHARD // BATCH):
                maps = torch.randn(BATCH, 1, 1, 6, SIZE, SIZE, generator=generator).numpy()
                zeros = np.zeros((BATCH, 1, 1), np.int64)
                stream.append(TeacherRows(np.zeros((BATCH, 1, 1000), np.float32), zeros, maps))
            stream.end()
    status = Path("/proc/self/status").read_text().split()  # ru_maxrss would be the parent's
    return int(status[status.index("VmHWM:") + 1]) // 1024


class _Noise(nn.Module):
    def forward(self, images: Tensor) -> explainers.Explained:
        n = len(images)
        return explainers.Explained(
            torch.zeros(n, 1000), torch.zeros(n, 6, SIZE, SIZE), torch.zeros(n, dtype=torch.int64)
        )


def _pack(options: argparse.Namespace) -> ImageSet:
    """The pictures at 224 px."""
    photos = {"source": "folder", "root": str(options.photos), "val_fraction": 0.0, "labels": False}
    toys = {"source": "toyshapes", "train_per_class": max(20, options.images // 10)}
    config = parse(
        {
            "data": {**(photos if options.photos else toys), "limit": options.images},
            "view": {"size": SIZE, "resize": 256 if options.photos else SIZE},
            "store": {"rows_per_shard": PER_SHARD},
            "teacher": {"model": "toy/resnet", "weights": "none", "classes": 1000},
            "students": {"kd": {"model": "toy/resnet"}},
        }
    )
    layout = Layout(options.folder)
    split = "train"
    images = pack_split(Workspace(config, layout), split)
    Path(options.folder, "images", "all").symlink_to(Path(options.folder, "images", split))
    return images


if __name__ == "__main__":
    main()
