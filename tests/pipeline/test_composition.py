"""The distillation step as a whole: loader, augmentation, targets and loss, on images and maps of coordinates.

The image set and the store show where they are. Channels 0 and 1 of an image are each pixel's x and y, channel 2 is its
row; a stored map has the same three channels and one more, the class that the map is about. Interpolation of ramps is
exact, so whatever crop reaches the student, image and map must say the same place, row and class. Student and online
teacher are hand-written: they write down what they are asked. The teacher's maps are read off the loss's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from artifacts import ImageSet, Sample, TeacherRows, TeacherStore, open_images, open_store
from artifacts.manifest import CodecInfo, ExplainerInfo, ManifestDraft, StoreShape, TeacherInfo
from artifacts.packing import Packing, write_images
from artifacts.writer import StoreWriter
from pipeline.augment.paired import PairedAugment
from pipeline.config import AugmentConfig, ExplainConfig, StudentConfig
from pipeline.data.batches import Batch, PairedRows, TrainBatches
from pipeline.distill.online import OnlineTeacher
from pipeline.distill.step import StudentStep
from pipeline.explain import Classes, Explained

ROWS, CLASSES, KEPT = 18, 5, 3
SIZE, STORED, SEEN = 48, 12, 6
"""Sides of the images, of the stored maps and of the student's maps."""
FULL = 4 * SIZE
"""uint8 value of coordinate 1: pixel i is at (i + 1/2) / SIZE and has value 4 i + 2, exactly."""
TRAINED = np.array([row for row in range(ROWS) if row not in (0, 5)])
"""The rows that the student trains on: positions among them are not row numbers."""
BATCH, EPOCHS, SEED = 4, 3, 11

CROPS = AugmentConfig(crop_scale=(0.3, 1.0), hflip=0.5, vflip=0.3)
MOVES = AugmentConfig(crop_scale=(0.3, 1.0), hflip=0.5, rotate=20.0, translate=0.1, shear=5.0, fill=0.0)
COLOURS = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "grayscale": 0.3}
STILL = AugmentConfig(enabled=False)

LOGITS = np.random.default_rng(0).permuted(np.tile(0.8 * np.arange(-2.0, 3.0), (ROWS, 1)), axis=1)
LOGITS = (LOGITS + np.arange(ROWS)[:, None] % CLASSES - 1.7).astype(np.float32)
"""None to all of a row's logits are above 0, none is near."""
STORED_CLASSES = [np.argsort(-LOGITS[row])[: row % KEPT + 1].tolist() for row in range(ROWS)]
"""One, two or three explained classes a row."""


# The product's API: how data are written and read, and how a step is made and called.


def pack(folder: Path) -> ImageSet:
    """Coordinate images of rows 0..ROWS-1."""

    def sample(row: int) -> Sample:
        image = (coordinates(row, SIZE) * FULL).round().astype(np.uint8)
        return Sample(key=f"img-{row:02d}", image=image, label=row % CLASSES)

    view, classes = {"size": SIZE, "resize": "fit"}, list("abcde")
    write_images(
        folder,
        Packing(count=ROWS, get=sample, view=view, classes=classes, source="coordinates", rows_per_shard=7),
    )
    return open_images(folder)


def draft(images: ImageSet) -> ManifestDraft:
    """A store of exact numbers about all rows of an image set."""
    shape = StoreShape(
        rows=ROWS, rows_per_shard=7, explained=KEPT, classes=CLASSES, channels=4, height=STORED, width=STORED
    )
    exact = CodecInfo(codec="e2kd.fp32", error_bound="exact")
    return ManifestDraft(
        teacher=TeacherInfo(
            architecture="none",
            weights_sha256="0" * 64,
            preprocessing={},
            classes=CLASSES,
            class_names=images.classes,
        ),
        explainer=ExplainerInfo(name="gradcam", settings={}),
        view=images.view,
        images=images.fingerprint,
        shape=shape,
        logits=exact,
        maps=exact,
    )


def store(folder: Path, images: ImageSet, dead: Sequence[int] = ()) -> TeacherStore:
    """Coordinate maps of the same rows; all-zero for the rows in `dead`."""
    writer = StoreWriter(folder, draft(images))
    writer.create()
    for shard in range(writer.draft.shape.shards):
        rows = images.shard_rows(shard)
        writer.write_shard(shard, answers(rows, dead), images.keys_sha256(shard), images.shard_keys(shard))
    writer.finish()
    return open_store(folder)


def batches(
    images: ImageSet, stored: TeacherStore | None, batch_size: int = BATCH, cache_mib: int = 64
) -> TrainBatches:
    data = PairedRows(images, stored, rows=TRAINED, cache_mib=cache_mib)
    return TrainBatches(data, batch_size, SEED)


def step_of(
    images: ImageSet,
    fabric: Any,
    teacher: nn.Module | None,
    augment: AugmentConfig = CROPS,
    explain: ExplainConfig | None = None,
    map_size: int = SEEN,
    **settings: Any,
) -> StudentStep:
    mode = "frozen" if teacher is None else "online"
    student = StudentConfig(model="toy/resnet", mode=mode, **{"explanation_weight": 2.0, **settings})
    paired = PairedAugment(augment, seed=SEED, keys=images.keys, map_size=map_size)
    online = None if teacher is None else OnlineTeacher(teacher, explain or ExplainConfig(), map_size)
    return StudentStep(student, CLASSES, paired, fabric, online)


def loss_of(step: StudentStep, student: nn.Module, batch: Batch, epoch: int, number: int) -> Tensor:
    """The scalar that is minimised."""
    return step(student, batch, epoch, number).total


# Data and networks whose right answers are visible.


def coordinates(row: int, side: int) -> np.ndarray:
    """x, y and the row's mark at the centres of side x side cells: float64 [3,side,side], 0..1."""
    centres = (np.arange(side) + 0.5) / side
    x, y = np.meshgrid(centres, centres, indexing="xy")
    return np.stack([x, y, np.full_like(x, row_marks(row))])


def row_marks(rows: Any) -> Any:
    return (rows + 1) / 24


def class_marks(classes: Any) -> Any:
    return (classes + 1) / CLASSES


def stored_map(row: int, label: int) -> np.ndarray:
    """The map of one row about one class: float64 [4,STORED,STORED]."""
    return np.concatenate([coordinates(row, STORED), np.full((1, STORED, STORED), class_marks(label))])


def answers(rows: range, dead: Sequence[int]) -> TeacherRows:
    """What the store holds of some rows; the places after a row's last explained class are -1 and all-zero."""
    classes = np.full((len(rows), 1, KEPT), -1)
    maps = np.zeros((len(rows), 1, KEPT, 4, STORED, STORED), np.float32)
    for place, row in enumerate(rows):
        for k, label in enumerate(STORED_CLASSES[row]):
            classes[place, 0, k] = label
            maps[place, 0, k] = 0 if row in dead else stored_map(row, label)
    return TeacherRows(LOGITS[rows.start : rows.stop, None], classes, maps)


@dataclass(frozen=True)
class Asked:
    """The arguments of one call of an explainer, and whether gradients were enabled."""

    images: Tensor
    classes: Classes
    differentiable: bool
    explain: bool
    gradients: bool


class Student(nn.Module):
    """Writes down what it is asked. Its logits and maps are parameters, the same numbers in every run."""

    def __init__(self, batch_size: int = BATCH, map_size: int = SEEN) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.logits = nn.Parameter(torch.randn(batch_size, CLASSES, generator=random))
        self.maps = nn.Parameter(torch.rand(batch_size, 4, map_size, map_size, generator=random))
        self.asked: list[Asked] = []

    def forward(
        self, images: Tensor, classes: Classes = None, differentiable: bool = False, explain: bool = True
    ) -> Explained:
        self.asked.append(Asked(images, classes, differentiable, explain, torch.is_grad_enabled()))
        shown = classes if isinstance(classes, Tensor) else self.logits.argmax(1)
        return Explained(self.logits, self.maps if explain else self.maps[:, :, :0, :0], shown)


class Teacher(nn.Module):
    """An online teacher that looks at its images: maps of the coordinates that they show, logits by their row."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Asked] = []
        self.answered: list[Explained] = []

    def forward(
        self, images: Tensor, classes: Classes = None, differentiable: bool = False, explain: bool = True
    ) -> Explained:
        self.asked.append(Asked(images, classes, differentiable, explain, torch.is_grad_enabled()))
        found = shown_coordinates(images, STORED)
        logits = torch.from_numpy(LOGITS)[rows_seen(images)] + 0.01 * found[:, 0].mean((1, 2))[:, None]
        about = classes(logits) if callable(classes) else logits.argmax(1) if classes is None else classes
        marks = class_marks(about)[:, None, None, None].expand(-1, 1, STORED, STORED)
        maps = torch.cat([found, marks], 1) if explain else found[:, :, :0, :0]
        self.answered.append(Explained(logits, maps, about))
        return self.answered[-1]


def shown_coordinates(images: Tensor, side: int) -> Tensor:
    """What images float [B,3,SIZE,SIZE] show in side x side cells: [B,3,side,side], 0..1."""
    return F.avg_pool2d(images * (255 / FULL), SIZE // side)


def rows_seen(images: Tensor) -> Tensor:
    """The row that each image shows; of mixed or recoloured images any number of a row."""
    marks = images[:, 2].amax((1, 2)) * (255 / FULL)
    return (marks * 24 - 1).round().long().clamp(0, ROWS - 1)


def cells_known(images: Tensor, rows: Tensor) -> Tensor:
    """Which of SEEN x SEEN cells show the canvas alone, half a stored cell from its frame: bool [B,1,SEEN,SEEN].

    Nearer to the frame there is nothing to interpolate with, and each resolution repeats its own border.
    """
    shown = images * (255 / FULL)
    blocks = shown.unfold(2, SIZE // SEEN, SIZE // SEEN).unfold(3, SIZE // SEEN, SIZE // SEEN).flatten(4)
    low, high, margin = blocks.amin(-1), blocks.amax(-1), 0.5 / STORED + 1e-4
    inner = (low[:, :2] > margin).all(1) & (high[:, :2] < 1 - margin).all(1)
    marks = row_marks(rows)[:, None, None]
    return (inner & ((low[:, 2] - marks).abs() < 1e-4) & ((high[:, 2] - marks).abs() < 1e-4))[:, None]


# A short training without updates, and what came of it.


@dataclass(frozen=True)
class Shown:
    """One step as student, teacher and loss saw it. `maps`: the teacher's maps in the loss, see `teachers_maps`."""

    epoch: int
    rows: Tensor
    student: Asked
    teacher: Asked | None
    answer: Explained | None
    loss: float
    maps: Tensor | None

    @property
    def classes(self) -> Tensor:
        assert isinstance(self.student.classes, Tensor), "the student was not told what to explain"
        return self.student.classes


def train(step: StudentStep, data: TrainBatches, epochs: int = EPOCHS) -> list[Shown]:
    """Every step of some epochs with a fresh student, numbered as the training loop numbers them."""
    size = step.augment.map_size
    assert isinstance(size, int)
    student = Student(data.sampler.batch_size, size)
    found = []
    for epoch in range(epochs):
        for batch in data.epoch(epoch):
            loss = loss_of(step, student, batch, epoch, len(found))
            found.append(_shown(step, student, batch, epoch, loss))
    return found


def _shown(step: StudentStep, student: Student, batch: Batch, epoch: int, loss: Tensor) -> Shown:
    maps = None
    if student.asked[-1].explain:
        maps = teachers_maps(student.maps, loss, step.settings.explanation_weight)
    asked, answer = None, None
    teacher = step.teacher and step.teacher.explainer
    if isinstance(teacher, Teacher):
        asked, answer = teacher.asked[-1], teacher.answered[-1]
        assert len(teacher.asked) == len(student.asked)
    return Shown(epoch, batch.rows, student.asked[-1], asked, answer, float(loss.detach()), maps)


def teachers_maps(maps: Tensor, loss: Tensor, weight: float) -> Tensor:
    """The maps that the loss compares the student's with, each of norm 1: float64 like `maps`.

    With s and t of norm 1, the gradient of weight * mean(1 - cos) is -weight / (B |s_i|) (t_i - (s_i t_i) s_i). What is
    along s_i is the rest of norm 1, and positive because all maps are.
    """
    (gradient,) = torch.autograd.grad(loss, maps)
    flat = maps.detach().double().flatten(1)
    norm = flat.norm(dim=1, keepdim=True)
    across = -gradient.double().flatten(1) * norm * len(maps) / weight
    along = (1 - across.square().sum(1, keepdim=True)).clamp(min=0).sqrt()
    return (across + along * flat / norm).reshape(maps.shape)


def assert_maps_show_the_images(shown: Shown, known: Tensor) -> None:
    """Place, row and explained class of the image and of the teacher's map, in the cells that are known."""
    assert shown.maps is not None
    classes = shown.classes
    weights = classes if classes.is_floating_point() else F.one_hot(classes, CLASSES).float()
    marks = (weights @ class_marks(torch.arange(CLASSES)))[:, None, None, None].expand(-1, 1, SEEN, SEEN)
    image = torch.cat([shown_coordinates(shown.student.images, SEEN), marks], 1).double() * known
    maps = shown.maps * known
    assert (known.sum((1, 2, 3)) >= 4).all(), "too few cells to tell"
    # A cosine has no scale, so each map is brought to its image's.
    maps = maps * ((maps * image).sum((1, 2, 3)) / maps.square().sum((1, 2, 3)))[:, None, None, None]
    torch.testing.assert_close(maps, image, atol=1e-3, rtol=0)


def plain_kd(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """Eq. 1, term by term."""
    p, q = ((logits.double() / temperature).softmax(1) for logits in (teacher, student))
    return float(temperature**2 * (p * (p.log() - q.log())).sum(1).mean())


def plain_l2d(student: Tensor, teacher: Tensor) -> float:
    p, q = teacher.double().sigmoid(), student.double().sigmoid()
    return float((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1).mean())


def plain_ce(student: Tensor, targets: Tensor) -> float:
    return float(-(targets * student.double().log_softmax(1)).sum(1).mean())


def plain_bce(student: Tensor, labels: Tensor) -> float:
    q = student.double().sigmoid()
    targets = torch.where(F.one_hot(labels, CLASSES) > 0, 1.0, 1 / CLASSES)
    return float(-(targets * q.log() + (1 - targets) * (1 - q).log()).mean())


def plain_distances(maps: Tensor, rows: Tensor, classes: Tensor) -> Tensor:
    """1 - cos between the student's maps [B,4,STORED,STORED] and the stored ones: float64 [B]."""
    pairs = zip(rows.tolist(), classes.tolist(), strict=True)
    stored = torch.from_numpy(np.stack([stored_map(row, label) for row, label in pairs]))
    return 1 - F.cosine_similarity(maps.detach().double().flatten(1), stored.flatten(1), dim=1)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return pack(tmp_path_factory.mktemp("composition") / "images")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, images: ImageSet) -> TeacherStore:
    return store(tmp_path_factory.mktemp("composition") / "store", images)


@pytest.mark.parametrize("cache_mib", [0, 64])
@pytest.mark.parametrize("augment", [CROPS, MOVES], ids=["crops", "moves"])
def test_image_and_stored_map_show_the_same_place_row_and_class(
    augment: AugmentConfig, cache_mib: int, images: ImageSet, stored: TeacherStore, fabric: Fabric
) -> None:
    step = step_of(images, fabric, None, augment)
    steps = train(step, batches(images, stored, cache_mib=cache_mib))
    assert len(steps) == EPOCHS * len(TRAINED) // BATCH
    for shown in steps:
        assert rows_seen(shown.student.images).tolist() == shown.rows.tolist()
        for row, label in zip(shown.rows.tolist(), shown.classes.tolist(), strict=True):
            assert label in STORED_CLASSES[row]
        assert_maps_show_the_images(shown, cells_known(shown.student.images, shown.rows))
    for epoch in range(EPOCHS):
        rows = torch.cat([shown.rows for shown in steps if shown.epoch == epoch])
        assert sorted(rows.tolist()) == TRAINED.tolist()


def test_the_students_explanation_can_be_trained_and_the_teachers_cannot(
    images: ImageSet, fabric: Fabric
) -> None:
    for shown in train(step_of(images, fabric, Teacher()), batches(images, None), epochs=1):
        assert shown.teacher is not None
        assert shown.student.differentiable
        assert shown.student.gradients
        assert not shown.teacher.gradients


@pytest.mark.parametrize("settings", [{}, {"mixup": 1.0}, {"rand_augment": 9}], ids=str)
def test_an_online_teacher_sees_the_very_tensor_that_the_student_sees(
    settings: dict[str, Any], images: ImageSet, fabric: Fabric
) -> None:
    step = step_of(images, fabric, Teacher(), augment=AugmentConfig(**COLOURS), **settings)
    for shown in train(step, batches(images, None)):
        assert shown.teacher is not None
        assert torch.equal(shown.student.images, shown.teacher.images)


def test_an_online_teachers_answer_is_what_the_student_is_asked_for(images: ImageSet, fabric: Fabric) -> None:
    step = step_of(images, fabric, Teacher(), temperature=2.0)
    student = Student()
    for shown in train(step, batches(images, None)):
        assert shown.answer is not None
        assert shown.maps is not None
        assert torch.equal(shown.classes, shown.answer.classes)
        assert torch.equal(shown.classes, shown.answer.logits.argmax(1))
        known = cells_known(shown.student.images, shown.rows)
        # In the outermost cells the teacher's coarser map has no neighbour to interpolate with.
        known[..., [0, -1], :] = known[..., :, [0, -1]] = False
        assert_maps_show_the_images(shown, known)
        distance = 1 - F.cosine_similarity(student.maps.detach().flatten(1), shown.maps.flatten(1))
        expected = plain_kd(student.logits.detach(), shown.answer.logits, 2.0) + 2 * float(distance.mean())
        assert shown.loss == pytest.approx(expected, rel=1e-4)


def mixup_share(mixed: Tensor, rows: Tensor) -> float:
    """lambda, read off the rows' marks in the mixed images."""
    marks = row_marks(rows.double())
    other = marks.roll(1)
    found = mixed[:, 2].double().mean((1, 2)) * (255 / FULL)
    return float(((found - other) * (marks - other)).sum() / (marks - other).square().sum())


def test_mixup_mixes_images_logits_maps_classes_and_labels_alike(
    images: ImageSet, stored: TeacherStore, fabric: Fabric
) -> None:
    data, weights = batches(images, stored), {"label_weight": 0.5, "temperature": 2.0}
    plain = train(step_of(images, fabric, None, **weights), data)
    mixed = train(step_of(images, fabric, None, **weights, mixup=1.0), data)
    student, shares = Student(), []
    for alone, shown in zip(plain, mixed, strict=True):
        share = mixup_share(shown.student.images, shown.rows)

        def mix(values: Tensor, share: float = share) -> Tensor:
            return share * values + (1 - share) * values.roll(1, 0)

        torch.testing.assert_close(shown.student.images, mix(alone.student.images), atol=1e-4, rtol=0)
        classes = mix(F.one_hot(alone.classes, CLASSES).float())
        torch.testing.assert_close(shown.classes, classes, atol=1e-4, rtol=0)
        known = cells_known(alone.student.images, alone.rows)
        assert_maps_show_the_images(shown, known & known.roll(1, 0))
        assert shown.maps is not None
        distance = 1 - F.cosine_similarity(student.maps.detach().flatten(1), shown.maps.flatten(1))
        logits = mix(torch.from_numpy(LOGITS)[shown.rows])
        labels = mix(F.one_hot(shown.rows % CLASSES, CLASSES).double())
        expected = plain_kd(student.logits.detach(), logits, 2.0) + 0.5 * plain_ce(
            student.logits.detach(), labels
        )
        assert shown.loss == pytest.approx(expected + 2 * float(distance.mean()), rel=1e-4)
        shares.append(share)
    assert all(0 < share < 1 for share in shares)
    assert len({round(share, 3) for share in shares}) == len(shares), "every step has its own lambda"


def images_by_row(steps: Sequence[Shown]) -> dict[int, list[Tensor]]:
    """Each row's images, one an epoch."""
    found: dict[int, list[Tensor]] = {}
    for shown in steps:
        for row, image in zip(shown.rows.tolist(), shown.student.images, strict=True):
            found.setdefault(row, []).append(image)
    return found


@pytest.mark.parametrize(
    ("augment", "settings"),
    [(CROPS, {}), (AugmentConfig(crop_scale=None, hflip=0.0, **COLOURS), {}), (STILL, {"rand_augment": 9})],
    ids=["geometry", "colour", "rand_augment"],
)
def test_a_row_looks_different_in_every_epoch(
    augment: AugmentConfig, settings: dict[str, Any], images: ImageSet, fabric: Fabric
) -> None:
    steps = train(step_of(images, fabric, Teacher(), augment, **settings), batches(images, None))
    looks = images_by_row(steps)
    assert sorted(looks) == TRAINED.tolist()
    same = sum(torch.equal(*pair) for views in looks.values() for pair in pairwise(views))
    # RandAugment draws an operation that does nothing, now and then.
    assert same <= (4 if settings else 0)
    at_once = torch.stack([views[0] for views in looks.values()])
    assert len(at_once.flatten(1)[:, : SIZE * SIZE].unique(dim=0)) > len(at_once) // 2, "rows differ as well"


def test_what_a_row_shows_and_explains_is_the_same_in_any_batch(
    images: ImageSet, stored: TeacherStore, fabric: Fabric
) -> None:
    step = step_of(images, fabric, None, augment=AugmentConfig(**COLOURS))
    found: list[dict[tuple[int, int], tuple[Tensor, int]]] = []
    for size in (2, BATCH):
        steps = train(step, batches(images, stored, batch_size=size))
        found.append(
            {
                (shown.epoch, row): (image, label)
                for shown in steps
                for row, image, label in zip(
                    shown.rows.tolist(), shown.student.images, shown.classes.tolist(), strict=True
                )
            }
        )
    assert found[0].keys() == found[1].keys()
    for key, (image, label) in found[0].items():
        assert torch.equal(image, found[1][key][0])
        assert label == found[1][key][1]


def test_colour_reaches_the_image_only(images: ImageSet, stored: TeacherStore, fabric: Fabric) -> None:
    data = batches(images, stored)
    coloured = CROPS.model_copy(update=COLOURS)
    for plain, shown in zip(
        train(step_of(images, fabric, None), data),
        train(step_of(images, fabric, None, coloured), data),
        strict=True,
    ):
        assert plain.maps is not None
        assert shown.maps is not None
        torch.testing.assert_close(shown.maps, plain.maps, atol=1e-9, rtol=0)
        assert torch.equal(shown.classes, plain.classes)
        change = (shown.student.images - plain.student.images).abs().amax((1, 2, 3))
        assert change.min() > 0.01


def test_rand_augment_changes_what_crop_and_flip_leave(images: ImageSet, fabric: Fabric) -> None:
    data = batches(images, None)
    plain = images_by_row(train(step_of(images, fabric, Teacher()), data))
    changed = images_by_row(train(step_of(images, fabric, Teacher(), rand_augment=9), data))
    pairs = [pair for row in plain for pair in zip(plain[row], changed[row], strict=True)]
    differing = [float((a - b).abs().max()) > 1 / 255 for a, b in pairs]
    assert 0.7 < np.mean(differing) <= 1


WEIGHTS: list[dict[str, Any]] = [
    {"explanation_weight": 0.0},
    {"explanation_weight": 0.0, "temperature": 3.0},
    {"explanation_weight": 0.0, "kd_weight": 0.5, "label_weight": 0.25},
    {"explanation_weight": 3.0},
    {"explanation_weight": 3.0, "kd_weight": 0.0},
    {"explanation_weight": 3.0, "kd_weight": 0.5, "label_weight": 0.25, "temperature": 2.0},
    {"explanation_weight": 3.0, "kd_weight": 0.5, "label_weight": 0.25, "loss": "l2d"},
    {"explanation_weight": 3.0, "loss": "ce"},
    {"explanation_weight": 3.0, "loss": "bce"},
]


def plain_terms(settings: dict[str, Any], logits: Tensor, rows: Tensor) -> float:
    """kd_weight * L_KD + label_weight * L_labels of the stored logits and the rows' labels."""
    labels, stored = rows % CLASSES, torch.from_numpy(LOGITS)[rows]
    loss = settings.get("loss", "kd")
    multilabel = loss in ("l2d", "bce")
    of_labels = plain_bce(logits, labels) if multilabel else plain_ce(logits, F.one_hot(labels, CLASSES))
    if loss in ("ce", "bce"):
        return of_labels
    of_teacher = plain_l2d(logits, stored)
    if loss == "kd":
        of_teacher = plain_kd(logits, stored, settings.get("temperature", 1.0))
    return settings.get("kd_weight", 1.0) * of_teacher + settings.get("label_weight", 0.0) * of_labels


@pytest.mark.parametrize("settings", WEIGHTS, ids=str)
def test_the_loss_is_the_weighted_sum_of_its_terms(
    settings: dict[str, Any], images: ImageSet, stored: TeacherStore, fabric: Fabric
) -> None:
    """L = kd_weight L_KD + label_weight L_labels + lambda L_exp (Eq. 2), on images that are not augmented."""
    step = step_of(images, fabric, None, STILL, map_size=STORED, **settings)
    student, weight = Student(map_size=STORED), settings["explanation_weight"]
    for shown in train(step, batches(images, stored), epochs=2):
        expected = plain_terms(settings, student.logits.detach(), shown.rows)
        assert shown.student.explain == (weight > 0)
        if weight:
            expected += weight * float(plain_distances(student.maps, shown.rows, shown.classes).mean())
        assert shown.loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("online", [False, True], ids=["frozen", "online"])
def test_every_third_step_explains(
    online: bool, images: ImageSet, stored: TeacherStore, fabric: Fabric
) -> None:
    """Lambda is not scaled up; in between nobody is asked for maps."""
    teacher = Teacher() if online else None
    step = step_of(images, fabric, teacher, STILL, map_size=STORED, explain_every=3)
    student = Student(map_size=STORED)
    steps = train(step, batches(images, None if online else stored), epochs=2)
    assert [shown.student.explain for shown in steps] == [True, False, False] * 2 + [True, False]
    for shown in steps:
        answer = shown.answer.logits if shown.answer else torch.from_numpy(LOGITS)[shown.rows]
        expected = plain_kd(student.logits.detach(), answer, 1.0)
        if shown.student.explain:
            expected += 2.0 * float(plain_distances(student.maps, shown.rows, shown.classes).mean())
        assert shown.loss == pytest.approx(expected, rel=1e-5)
        assert shown.teacher is None or shown.teacher.explain == shown.student.explain


def classes_by_row(steps: Sequence[Shown]) -> dict[int, list[int]]:
    """What each row's steps were about, one an epoch."""
    found: dict[int, list[int]] = {}
    for shown in steps:
        for row, label in zip(shown.rows.tolist(), shown.classes.tolist(), strict=True):
            found.setdefault(row, []).append(label)
    return found


def test_every_stored_class_has_its_turn(images: ImageSet, stored: TeacherStore, fabric: Fabric) -> None:
    steps = train(step_of(images, fabric, None), batches(images, stored), epochs=40)
    for row, about in classes_by_row(steps).items():
        counts = np.array([about.count(label) for label in STORED_CLASSES[row]])
        assert counts.sum() == len(about) == 40
        assert counts.min() >= 40 / len(counts) / 3, "each in about as many epochs"


@pytest.mark.parametrize("most", [1, 2, 4])
def test_an_online_teacher_explains_one_of_its_positive_classes(
    most: int, images: ImageSet, fabric: Fabric
) -> None:
    step = step_of(images, fabric, Teacher(), STILL, ExplainConfig(classes="positive", most=most))
    steps = train(step, batches(images, None), epochs=40)
    for shown in steps:
        assert shown.answer is not None
        assert torch.equal(shown.classes, shown.answer.classes)
    seen = classes_by_row(steps)
    for row, about in seen.items():
        count = max(1, min(most, int((LOGITS[row] > 0).sum())))
        assert set(about) == set(np.argsort(-LOGITS[row])[:count].tolist())
    assert max(len(set(about)) for about in seen.values()) == most


def test_a_top1_teacher_explains_its_first_class(images: ImageSet, fabric: Fabric) -> None:
    steps = train(step_of(images, fabric, Teacher(), STILL), batches(images, None))
    for row, about in classes_by_row(steps).items():
        assert set(about) == {int(LOGITS[row].argmax())}


class TwoProcesses:
    """A Fabric whose other process has a valid explanation of every sample."""

    world_size = 2

    def all_reduce(self, values: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "mean"
        return (values + 1) / 2


@pytest.mark.parametrize("processes", [1, 2])
def test_dead_maps_are_left_out_of_the_mean(
    processes: int, images: ImageSet, tmp_path: Path, fabric: Fabric
) -> None:
    """Of one process over its valid samples; of two over all valid ones, of which each has its share."""
    dead = (3, 4, 9, 12, 17)
    stored = store(tmp_path / "store", images, dead)
    step = step_of(images, fabric if processes == 1 else TwoProcesses(), None, STILL, map_size=STORED)
    student, alive_in_step = Student(map_size=STORED), []
    for shown in train(step, batches(images, stored)):
        distances = plain_distances(student.maps, shown.rows, shown.classes)
        alive = torch.tensor([row not in dead for row in shown.rows.tolist()])
        valid = max(1, int(alive.sum())) if processes == 1 else (int(alive.sum()) + BATCH) / 2
        expected = plain_kd(student.logits.detach(), torch.from_numpy(LOGITS)[shown.rows], 1.0)
        expected += 2.0 * float(distances[alive].sum()) / valid
        assert shown.loss == pytest.approx(expected, rel=1e-5)
        alive_in_step.append(int(alive.sum()))
    assert 0 < min(alive_in_step) < BATCH
