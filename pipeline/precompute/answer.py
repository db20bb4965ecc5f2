"""The answer loop: the teacher's logits and explanation maps of packed images, shard by shard into the store."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import nn

from artifacts import ImageSet, TeacherRows
from artifacts.writer import ShardStream
from pipeline.devices import device_of
from pipeline.explain.classes import positive_classes
from pipeline.progress import Advance


def answer_shards(
    explainer: nn.Module,
    images: ImageSet,
    shards: Sequence[int],
    stream: ShardStream,
    batch_size: int,
    advance: Advance,
) -> None:
    """Compute and commit some shards. Reading ahead, encoding and writing overlap with the teacher."""
    device = device_of(explainer)
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
    """The maps [B,K,c,h,w] of all explained classes [B,K], given those of the first; zero if a class is -1."""
    maps = first.new_zeros(len(first), classes.shape[1], *first.shape[1:])
    maps[:, 0] = first
    for place in range(1, classes.shape[1]):
        has = classes[:, place] >= 0
        if has.any():
            maps[has, place] = explainer(images[has], classes[has, place]).maps
    return maps
