"""Stage 1: the teacher's logits and explanation maps for every packed image, once."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn

from artifacts import ImageSet, TeacherRows, TeacherStore, open_images, open_store
from artifacts.codecs import get_codec
from artifacts.manifest import CodecInfo, ExplainerInfo, ManifestDraft, StoreShape, TeacherInfo
from artifacts.places import Place
from artifacts.writer import ShardStream, StoreWriter
from pipeline.config import Experiment, ExplainConfig
from pipeline.data.batches import PairedRows
from pipeline.devices import Part
from pipeline.evaluate.scores import Answer, score, teacher_answers, teacher_answers_beyond
from pipeline.evaluate.shift import shift_curve
from pipeline.explain.classes import positive_classes
from pipeline.models import Explainable, weights_sha256
from pipeline.precompute.codec_cost import codec_cost
from pipeline.precompute.codec_cost import tell as tell_cost
from pipeline.precompute.freezing_gap import freezing_gap
from pipeline.precompute.freezing_gap import tell as tell_gap
from pipeline.progress import Advance, Progress
from pipeline.training.trained import build_explainer, class_count, load_teacher
from pipeline.workspace import CODEC_COST, FREEZING_GAP, SHIFT_CURVE, Layout, read_measured, teacher_scores

WHOLE = Part()


def precompute(
    experiment: Experiment,
    layout: Layout,
    split: str,
    images: ImageSet,
    fabric: Fabric,
    progress: Progress,
    part: Part = WHOLE,
) -> TeacherStore | None:
    """Fill the store of one split; a finished one of this teacher, explainer and image set is kept.

    Every process computes whole shards of those that are not committed yet; `part` narrows them to those of one of
    several independent processes. None while shards of other parts are missing. Raises MismatchedStore where the
    folder holds something else, DataError where the teacher's numbers are not finite.
    """
    teacher = load_teacher(experiment, layout, images)
    where = layout.store(experiment.store_name, split)
    writer = StoreWriter(where, draft_of(experiment, teacher, images))
    todo: list[int] = []
    if fabric.is_global_zero:
        writer.create()
        missing = set(range(len(images.shards))) - writer.committed()
        todo = sorted(shard for shard in missing if part.owns(shard))
    todo = fabric.broadcast(todo)
    if todo:
        _compare_views(teacher, images, progress)
        explainer = build_explainer(experiment.explain, teacher).to(fabric.device)
        mine = todo[fabric.global_rank :: fabric.world_size]
        total = sum(len(images.shard_rows(shard)) for shard in mine)
        with progress.bar(f"precompute {split}", total, "image") as advance:
            stream, batch_size = ShardStream(writer), experiment.store.batch_size
            answer_shards(explainer, images, mine, stream, batch_size, fabric.device, advance)
        fabric.barrier()
    complete = False
    if fabric.is_global_zero:
        done = len(writer.committed())
        complete = done == len(images.shards)
        if complete:
            writer.finish()
        elif part.world > 1:
            progress.say(
                f"part {part.rank} of {part.world} of {split} is done; {done} of {len(images.shards)} shards are "
                "committed. The last part finishes the store, or any run without --rank"
            )
    if not fabric.broadcast(complete):
        return None
    store = open_store(where)
    _write_teacher_scores(experiment, layout, split, images, store, teacher, fabric)
    return store


def _compare_views(teacher: Explainable, images: ImageSet, progress: Progress) -> None:
    """Say it where the weights were made for another view than the images were packed in."""
    made_for = teacher.preprocess.get("view", {})
    differing = [
        f"{key} {images.view[key]} (made for {made_for[key]})"
        for key in made_for
        if images.view.get(key) != made_for[key]
    ]
    if differing:
        progress.say(
            f"note: the teacher's weights were made for another view: {', '.join(differing)}; set `view` to it, or "
            "expect lower accuracy"
        )


def answer_shards(
    explainer: nn.Module,
    images: ImageSet,
    shards: Sequence[int],
    stream: ShardStream,
    batch_size: int,
    device: torch.device,
    advance: Advance,
) -> None:
    """Compute and commit some shards. Reading ahead, encoding and writing overlap with the teacher."""
    batches = [
        (shard, range(start, min(start + batch_size, rows.stop)))
        for shard in shards
        for rows in [images.shard_rows(shard)]
        for start in range(rows.start, rows.stop, batch_size)
    ]
    with stream, ThreadPoolExecutor(os.cpu_count(), "read") as readers:
        for (shard, rows), pixels in zip(batches, _read_ahead(images, batches, readers), strict=True):
            if rows.start == images.shard_rows(shard).start:
                stream.begin(shard, images.keys_sha256(shard), images.shard_keys(shard))
            stream.append(_ask(explainer, pixels, rows, device, stream.explained))
            if rows.stop == images.shard_rows(shard).stop:
                stream.end()
            advance(len(rows))


def _read_ahead(
    images: ImageSet, batches: Sequence[tuple[int, range]], readers: Executor
) -> Iterator[np.ndarray]:
    """The pixels u8 [B,3,S,S] of each batch, decoded by threads while the batch before it is with the teacher."""
    ahead: deque[list[Future[np.ndarray]]] = deque()
    for _, rows in batches:
        ahead.append([readers.submit(images.read_images, rows[i : i + 8]) for i in range(0, len(rows), 8)])
        if len(ahead) > 1:
            yield np.concatenate([piece.result() for piece in ahead.popleft()])
    while ahead:
        yield np.concatenate([piece.result() for piece in ahead.popleft()])


def measure(experiment: Experiment, layout: Layout, fabric: Fabric, progress: Progress) -> None:
    """Measure, once a store, what storing and freezing cost, under the students' geometry, and say it."""
    beside = layout.stores(experiment.store_name)
    if not fabric.is_global_zero:
        return
    _measure_shift(experiment, layout, fabric)
    student = next(iter(experiment.students.values()))
    store = open_store(layout.store(experiment.store_name, student.split))
    of = {"store": store.manifest.identity}
    if all(_measured(beside, name, of) for name in (FREEZING_GAP, CODEC_COST)):
        return
    images = open_images(layout.images(student.split))
    teacher = load_teacher(experiment, layout, images)
    explainer = build_explainer(experiment.explain, teacher).to(fabric.device)
    cost = codec_cost(explainer, images, store, student.augment, fabric.device)
    beside.write(CODEC_COST, _json(of | cost))
    progress.say(tell_cost(cost))
    gap = freezing_gap(explainer, images, store, student.augment, fabric.device)
    beside.write(FREEZING_GAP, _json(of | gap))
    progress.say(tell_gap(gap))


def _measured(beside: Place, name: str, of: dict[str, Any]) -> bool:
    """Is what was measured there, and with these particulars: of this store, of this split ...?"""
    return read_measured(beside, name).items() >= of.items()


def _measure_shift(experiment: Experiment, layout: Layout, fabric: Fabric) -> None:
    """The teacher's own shift curve, where `evaluate.shifts` asks for one and it is not there."""
    settings, beside = experiment.evaluate, layout.stores(experiment.store_name)
    if not settings.shifts:
        return
    store = open_store(layout.store(experiment.store_name, settings.splits[0]))
    of = {"store": store.manifest.identity, "split": settings.splits[0]}
    if _measured(beside, SHIFT_CURVE, {**of, "shifts": list(settings.shifts)}):
        return
    images = open_images(layout.images(settings.splits[0]))
    explainer = build_explainer(experiment.explain, load_teacher(experiment, layout, images)).to(
        fabric.device
    )
    beside.write(SHIFT_CURVE, _json(of | shift_curve(explainer, images, settings, fabric.device)))


def open_matching_store(experiment: Experiment, layout: Layout, split: str, images: ImageSet) -> TeacherStore:
    """The finished store of a split. Raises MismatchedStore unless it is of this config's teacher and images."""
    store = open_store(layout.store(experiment.store_name, split))
    store.check_same(draft_of(experiment, load_teacher(experiment, layout, images), images))
    return store


def draft_of(experiment: Experiment, teacher: Explainable, images: ImageSet) -> ManifestDraft:
    """Everything that decides the numbers in the store."""
    height, width = teacher.map_size(images.size)
    return ManifestDraft(
        teacher=TeacherInfo(
            architecture=experiment.teacher.model,
            weights_sha256=weights_sha256(teacher),
            preprocessing=teacher.preprocess,
            classes=class_count(experiment, images),
            class_names=images.classes,
        ),
        explainer=ExplainerInfo(name=experiment.explainer, settings=_explained(experiment.explain)),
        view=images.view,
        images=images.fingerprint,
        shape=StoreShape(
            rows=len(images),
            rows_per_shard=images.rows_per_shard,
            classes=teacher.classes,
            explained=experiment.explain.stored,
            channels=6 if experiment.explainer == "bcos" else 1,
            height=height,
            width=width,
        ),
        logits=_codec(experiment.store.logits),
        maps=_codec(_map_codec(experiment)),
    )


def _explained(explain: ExplainConfig) -> dict[str, Any]:
    """What decides the maps: which logit, and of which classes where it is not the top-1 alone."""
    if explain.classes == "top1":
        return {"logit": explain.logit}
    return {"logit": explain.logit, "classes": explain.classes, "most": explain.most}


def _map_codec(experiment: Experiment) -> str:
    """`auto`: exact enough and cheap at the size of the features; quantised at the size of the images."""
    codec = experiment.store.maps
    return codec if codec != "auto" else "int6" if experiment.explainer == "bcos" else "fp16"


def _codec(name: str) -> CodecInfo:
    codec = get_codec(name)
    return CodecInfo(codec=codec.codec_id, error_bound=codec.error_bound)


def _ask(
    explainer: nn.Module, pixels: np.ndarray, rows: range, device: torch.device, most: int = 1
) -> TeacherRows:
    """The teacher's answers for the canonical view `pixels` u8 [B,3,S,S] of some rows.

    With `most` > 1 the maps of every class with a logit above 0, at most so many, and at least of the top-1.
    """
    images = torch.from_numpy(pixels).to(device).float() / 255
    answer = explainer(images)
    classes, maps = answer.classes[:, None], answer.maps[:, None]
    if most > 1:
        classes = positive_classes(answer.logits, most)
        maps = _explain_more(explainer, images, classes, answer.maps)
    return TeacherRows(
        logits=answer.logits[:, None].cpu().numpy(),
        explained_class=classes[:, None].cpu().numpy(),
        maps=maps[:, None].cpu().numpy(),
    )


def _explain_more(
    explainer: nn.Module, images: torch.Tensor, classes: torch.Tensor, first: torch.Tensor
) -> torch.Tensor:
    """The maps [B,K,c,h,w] of all explained classes [B,K], given those of the first; zero where a class is -1."""
    maps = first.new_zeros(len(first), classes.shape[1], *first.shape[1:])
    maps[:, 0] = first
    for place in range(1, classes.shape[1]):
        has = classes[:, place] >= 0
        if has.any():
            maps[has, place] = explainer(images[has], classes[has, place]).maps
    return maps


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _write_teacher_scores(
    experiment: Experiment,
    layout: Layout,
    split: str,
    images: ImageSet,
    store: TeacherStore,
    teacher: Explainable,
    fabric: Fabric,
) -> None:
    """The teacher's own accuracy and EPG, for the report; read off the store. Where images have several labels, the
    teacher is asked for the maps of those that the store does not hold, so that its EPG is over the students' labels.
    """
    beside, name = layout.stores(experiment.store_name), teacher_scores(split)
    of = {"store": store.manifest.identity}
    if fabric.broadcast(_measured(beside, name, of)):
        return
    rows = PairedRows(images, store, masks="any")
    answer: Answer = teacher_answers
    if rows.multilabel:
        answer = teacher_answers_beyond(build_explainer(experiment.explain, teacher).to(fabric.device))
    scores = score(fabric, answer, rows, experiment.evaluate.batch_size)
    own = {name: value for name, value in scores.items() if "agreement" not in name and name != "map_cosine"}
    if fabric.is_global_zero:
        beside.write(name, _json(of | own))
