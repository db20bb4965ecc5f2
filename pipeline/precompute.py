"""Stage 1: the teacher's logits and explanation maps for every packed image, once."""

from __future__ import annotations

import json

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn

from artifacts import ImageSet, TeacherRows, TeacherStore, open_images, open_store
from artifacts.codecs import get_codec
from artifacts.durable import write_atomic
from artifacts.manifest import CodecInfo, ExplainerInfo, ManifestDraft, StoreShape, TeacherInfo
from artifacts.store import StoreWriter
from pipeline.config import Experiment
from pipeline.data.loader import PairedRows
from pipeline.evaluate import score, teacher_answers
from pipeline.gap import freezing_gap, tell, write_gap
from pipeline.layout import Layout
from pipeline.models import Classifier, weights_sha256
from pipeline.progress import Progress
from pipeline.teacher import build_explainer, class_count, load_teacher, map_size


def precompute(
    experiment: Experiment, layout: Layout, split: str, images: ImageSet, fabric: Fabric, progress: Progress
) -> TeacherStore:
    """Fill the store of one split; a finished one of this teacher, explainer and image set is kept.

    Every process computes whole shards of those that are not committed yet. Raises MismatchedStore where the
    folder holds something else, DataError where the teacher's numbers are not finite.
    """
    teacher = load_teacher(experiment, layout, images)
    writer = StoreWriter(layout.store(experiment.store_name, split), _draft(experiment, teacher, images))
    if fabric.is_global_zero:
        writer.create()
    fabric.barrier()
    todo = sorted(set(range(len(images.shards))) - writer.committed())
    fabric.barrier()
    if todo:
        explainer = build_explainer(experiment.explain, teacher).to(fabric.device)
        mine = todo[fabric.global_rank :: fabric.world_size]
        with progress.bar(
            f"precompute {split}", sum(len(images.shard_rows(k)) for k in mine), "image"
        ) as advance:
            for shard in mine:
                rows = images.shard_rows(shard)
                answers = []
                for start in range(rows.start, rows.stop, experiment.store.batch_size):
                    part = range(start, min(start + experiment.store.batch_size, rows.stop))
                    answers.append(_ask(explainer, images, part, fabric.device))
                    advance(len(part))
                writer.write_shard(
                    shard, _joined(answers), images.keys_sha256(shard), images.keys[rows.start : rows.stop]
                )
        fabric.barrier()
    if fabric.is_global_zero:
        writer.finish()
    fabric.barrier()
    store = open_store(layout.store(experiment.store_name, split))
    _write_teacher_scores(experiment, layout, split, images, store, fabric)
    return store


def measure_gap(experiment: Experiment, layout: Layout, fabric: Fabric, progress: Progress) -> None:
    """Measure, once, how far frozen maps are from live ones, under the students' geometry, and say it."""
    file = layout.freezing_gap(experiment.store_name)
    student = next(iter(experiment.students.values()))
    if file.exists() or not fabric.is_global_zero:
        return
    images = open_images(layout.images(student.split))
    teacher = load_teacher(experiment, layout, images)
    explainer = build_explainer(experiment.explain, teacher).to(fabric.device)
    store = open_store(layout.store(experiment.store_name, student.split))
    gap = freezing_gap(explainer, images, store, student.augment, fabric.device)
    write_gap(file, gap)
    progress.say(tell(gap))


def open_matching_store(experiment: Experiment, layout: Layout, split: str, images: ImageSet) -> TeacherStore:
    """The finished store of a split. Raises MismatchedStore unless it is of this config's teacher and images."""
    store = open_store(layout.store(experiment.store_name, split))
    store.check_same(_draft(experiment, load_teacher(experiment, layout, images), images))
    return store


def _draft(experiment: Experiment, teacher: Classifier, images: ImageSet) -> ManifestDraft:
    """Everything that decides the numbers in the store."""
    height, width = map_size(teacher, images.size)
    return ManifestDraft(
        teacher=TeacherInfo(
            architecture=experiment.teacher.model,
            weights_sha256=weights_sha256(teacher),
            preprocessing=teacher.preprocess,
            classes=class_count(experiment, images),
            class_names=images.classes,
        ),
        explainer=ExplainerInfo(
            name=experiment.explain.explainer, settings={"logit": experiment.explain.logit}
        ),
        view=images.view,
        images=images.fingerprint,
        shape=StoreShape(
            rows=len(images),
            rows_per_shard=images.rows_per_shard,
            classes=teacher.classes,
            channels=1,
            height=height,
            width=width,
        ),
        logits=_codec(experiment.store.logits),
        maps=_codec(experiment.store.maps),
    )


def _codec(name: str) -> CodecInfo:
    codec = get_codec(name)
    return CodecInfo(codec=codec.codec_id, error_bound=codec.error_bound)


def _ask(explainer: nn.Module, images: ImageSet, rows: range, device: torch.device) -> TeacherRows:
    """The teacher's answers for the canonical view of some rows."""
    pixels = torch.from_numpy(images.read_images(rows)).to(device)
    answer = explainer(pixels.float() / 255)
    return TeacherRows(
        logits=answer.logits[:, None].cpu().numpy(),
        explained_class=answer.classes[:, None, None].cpu().numpy(),
        maps=answer.maps[:, None, None].cpu().numpy(),
    )


def _joined(parts: list[TeacherRows]) -> TeacherRows:
    return TeacherRows(
        np.concatenate([part.logits for part in parts]),
        np.concatenate([part.explained_class for part in parts]),
        np.concatenate([part.maps for part in parts]),
    )


def _write_teacher_scores(
    experiment: Experiment, layout: Layout, split: str, images: ImageSet, store: TeacherStore, fabric: Fabric
) -> None:
    """The teacher's own accuracy and EPG, for the report; read off the store."""
    file = layout.teacher_scores(experiment.store_name, split)
    if file.exists():
        return
    fabric.barrier()
    rows = PairedRows(images, store, masks="any")
    scores = score(fabric, teacher_answers, rows, experiment.evaluate.batch_size)
    own = {name: value for name, value in scores.items() if name not in ("agreement", "map_cosine")}
    if fabric.is_global_zero:
        write_atomic(file, json.dumps(own, indent=2).encode())
