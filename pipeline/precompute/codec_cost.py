"""What storing costs: how far decoded maps and logits are from the teacher's own, also after the students' geometry.

A codec is judged after the crop: there, quantisers that look fine on the whole map collapse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from artifacts import ImageSet, TeacherStore
from artifacts.codecs import BETTER, get_codec
from pipeline.augment.paired import PairedAugment
from pipeline.config import AugmentConfig
from pipeline.explain import Explainer
from pipeline.explain.maps import cosine, dead
from pipeline.precompute.freezing_gap import sample_rows, summary


def codec_cost(
    explainer: Explainer, images: ImageSet, store: TeacherStore, augment: AugmentConfig, device: torch.device
) -> dict[str, Any]:
    """Compare stored answers with the teacher's, for up to gap.SAMPLE images of the canonical view.

    Returns {"maps": codec, "logits": codec, "whole" and "augmented": {"mean", "p1": 1st percentile, "images"} of the
    cosine of decoded and exact map, "kl": mean KL(exact || decoded) of the softmax in nats, "top1": share of images
    that keep their top-1 class}.
    """
    paired = PairedAugment(augment, keys=images.keys)
    whole, augmented, kl, kept = [], [], [], []
    rows = sample_rows(images)
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        stored = store.read(part)
        pixels = torch.from_numpy(images.read_images(part)).to(device)
        classes = torch.from_numpy(stored.explained_class[:, 0, 0]).to(device)
        live = explainer(pixels.float() / 255, classes)
        decoded = torch.from_numpy(stored.maps[:, 0, 0]).to(device)
        whole.append(_cosines(decoded, live.maps))
        (_, a, _), (_, b, _) = (paired(pixels, m, torch.from_numpy(part), 0) for m in (decoded, live.maps))
        assert a is not None
        assert b is not None
        augmented.append(_cosines(a, b))
        logits = torch.from_numpy(stored.logits[:, 0]).to(device)
        kl.append(_divergence(live.logits, logits))
        kept.append((live.logits.argmax(1) == logits.argmax(1)).double())
    return {
        "maps": store.manifest.maps.codec,
        "logits": store.manifest.logits.codec,
        "whole": summary(torch.cat(whole).cpu()),
        "augmented": summary(torch.cat(augmented).cpu()),
        "kl": float(torch.cat(kl).mean()),
        "top1": float(torch.cat(kept).mean()),
    }


def tell(cost: dict[str, Any]) -> str:
    """One line, and a second one if the codec distorts the maps more than it promises."""
    line = (
        f"codec cost: maps {cost['maps']}, cosine {cost['whole']['mean']:.4f} whole, "
        f"{cost['augmented']['mean']:.4f} augmented (1% below {cost['augmented']['p1']:.4f}); "
        f"logits {cost['logits']}, KL {cost['kl']:.1e}, top-1 kept {cost['top1']:.1%}"
    )
    bound, short = get_codec(cost["maps"]).crop_p1, cost["maps"].removeprefix("e2kd.")
    if not cost["augmented"]["images"] or cost["augmented"]["p1"] >= bound or short not in BETTER:
        return line
    return (
        f"{line}\nwarning: 1% of the augmented maps are below the {bound} that {cost['maps']} promises; "
        f"a better codec: store.maps: {BETTER[short]} (with another store.name)"
    )


def _cosines(decoded: Tensor, exact: Tensor) -> Tensor:
    """Cosines of the images whose exact map is alive: at most [B]. A map that the codec lost counts 0."""
    return cosine(decoded, exact).value[~dead(exact)]


def _divergence(exact: Tensor, decoded: Tensor) -> Tensor:
    """KL [B], >= 0 up to rounding, in float64."""
    p, q = exact.double().log_softmax(1), decoded.double().log_softmax(1)
    return (p.exp() * (p - q)).sum(1)
