"""Every number of the paper's Tables 1-5 and of Fig. 5's text, to stand beside ours.

Parchami-Araghi et al., "Good Teachers Explain: Explanation-Enhanced Knowledge Distillation", ECCV 2024. Copied by hand;
the differences that Tables 1-3 print under their e2KD rows and the numbers that the prose repeats were recomputed
from these rows (tests/pipeline/test_report_paper.py). Fig. 2 has no numbers in the text, so it is not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from artifacts.errors import ConfigError
from pipeline.config.problems import did_you_mean

Row = Mapping[str, float]
"""Metric -> value in 0..1."""

METHODS = (
    "teacher",
    "ce",
    "at",
    "reviewkd",
    "catkd",
    "kd",
    "e2kd",
    "crd",
    "crd-e2kd",
    "kd-frozen",
    "e2kd-frozen",
)
"""The rows' names: `ce` is the paper's Baseline, `-frozen` its frozen rows."""


@dataclass(frozen=True)
class PaperTable:
    """One column group of a table: `title` says which; `split` is ours that it is about (None: the first held-out one);
    `rows` by method."""

    title: str
    rows: Mapping[str, Row]
    split: str | None = None


def table(name: str) -> PaperTable:
    """The table called `name`, e.g. `table1/50-shots`. Raises ConfigError with a "did you mean" for another name."""
    if name in TABLES:
        return TABLES[name]
    hint = did_you_mean(name, TABLES, f"use one of {', '.join(TABLES)}", cutoff=0.4)
    raise ConfigError(f"paper: there is no {name!r} among the paper's tables; {hint}", key="paper")


def _percent(metrics: Sequence[str], **rows: Sequence[float | None]) -> dict[str, Row]:
    """Rows of percentages, as printed, to shares; None if the paper has none. `_` in a row's name stands for `-`."""
    return {
        name.replace("_", "-"): {
            metric: round(value / 100, 5)
            for metric, value in zip(metrics, row, strict=True)
            if value is not None
        }
        for name, row in rows.items()
    }


def _by_size(
    number: int, title: str, teacher: float, **rows: tuple[float, float, float, float, float, float]
) -> dict[str, PaperTable]:
    """Tables 1-3: accuracy and agreement for three sizes of the distillation set."""
    sizes = {"50-shots": "50 shots", "200-shots": "200 shots", "full": "full data"}
    return {
        f"table{number}/{key}": PaperTable(
            f"Table {number}, {title}, {words}",
            _percent(
                ("accuracy", "agreement"),
                teacher=(teacher, None),
                **{name: row[2 * place : 2 * place + 2] for name, row in rows.items()},
            ),
        )
        for place, (key, words) in enumerate(sizes.items())
    }


def _waterbirds(student: str, kd: tuple[float, float], e2kd: tuple[float, float]) -> PaperTable:
    rows = _percent(("accuracy", "agreement"), kd=kd, e2kd=e2kd)
    return PaperTable(f"Table 4, {student}, Waterbirds-100 out of distribution", rows, split="test-ood")


def _voc(score: str, **rows: tuple[float, float, float]) -> PaperTable:
    return PaperTable(f"Table 5 (left), {score} teacher", _percent(("epg", "iou", "f1"), **rows))


def _unrelated(title: str, teacher: float, **rows: tuple[float, float]) -> PaperTable:
    found = _percent(("accuracy", "agreement"), teacher=(teacher, None), **rows)
    return PaperTable(f"Table 5 (right), {title}", found)


TABLES: dict[str, PaperTable] = {
    **_by_size(
        1,
        "ResNet-34 to ResNet-18",
        73.3,
        ce=(23.3, 24.8, 47.0, 50.2, 69.8, 76.8),
        at=(38.3, 41.1, 54.7, 59.0, 69.7, 74.9),
        reviewkd=(51.2, 55.6, 63.0, 69.0, 71.4, 80.0),
        catkd=(32.2, 34.5, 55.7, 60.7, 70.9, 78.7),
        kd=(49.8, 55.5, 63.1, 71.9, 71.8, 81.2),
        e2kd=(54.9, 61.7, 64.1, 73.2, 71.8, 81.6),
        crd=(30.0, 31.8, 51.0, 54.9, 69.4, 74.6),
        crd_e2kd=(34.7, 37.1, 54.1, 58.7, 70.5, 76.5),
    ),
    **_by_size(
        2,
        "B-cos ResNet-34 to B-cos ResNet-18",
        72.3,
        ce=(32.6, 35.1, 53.9, 59.4, 68.7, 76.9),
        at=(41.9, 45.6, 57.2, 63.7, 69.0, 77.2),
        reviewkd=(47.5, 53.2, 54.1, 60.8, 57.0, 64.6),
        catkd=(53.1, 59.8, 58.6, 66.4, 63.9, 73.7),
        kd=(35.3, 38.4, 56.5, 62.9, 70.3, 79.9),
        e2kd=(43.9, 48.4, 58.8, 66.0, 70.6, 80.3),
    ),
    **_by_size(
        3,
        "B-cos DenseNet-169 to B-cos ResNet-18",
        75.2,
        ce=(32.6, 34.5, 53.9, 58.4, 68.7, 75.5),
        kd=(37.3, 40.2, 51.3, 55.6, 71.2, 78.8),
        e2kd=(45.4, 49.0, 55.7, 60.7, 71.9, 79.8),
        kd_frozen=(33.4, 35.7, 50.4, 54.5, 68.7, 75.2),
        e2kd_frozen=(38.7, 41.7, 53.6, 58.3, 69.5, 76.4),
    ),
    "table4/convnext": _waterbirds("ConvNeXt", (20.5, 55.5), (32.2, 64.4)),
    "table4/efficientnet": _waterbirds("EfficientNet", (27.5, 59.0), (37.8, 68.7)),
    "table4/mobilenet": _waterbirds("MobileNet", (22.3, 57.0), (36.0, 68.2)),
    "table4/shufflenet": _waterbirds("ShuffleNet", (23.1, 57.1), (37.0, 68.6)),
    "table5/voc-epg": _voc(
        "EPG",
        teacher=(75.7, 21.3, 72.5),
        ce=(50.0, 29.0, 58.0),
        kd=(60.1, 31.6, 60.1),
        e2kd=(71.1, 24.8, 67.6),
    ),
    "table5/voc-iou": _voc(
        "IoU",
        teacher=(65.0, 49.7, 72.8),
        ce=(50.0, 29.0, 58.0),
        kd=(58.9, 35.7, 62.7),
        e2kd=(60.3, 45.7, 64.8),
    ),
    "table5/imn-sun": _unrelated(
        "SUN397, distilled with ImageNet images", 60.5, ce=(57.7, 67.9), kd=(53.5, 65.0), e2kd=(54.9, 67.7)
    ),
    "table5/sun-imn": _unrelated(
        "ImageNet, distilled with SUN397 images", 75.2, ce=(68.7, 75.5), kd=(14.9, 16.7), e2kd=(19.8, 22.1)
    ),
    "figure5": PaperTable(
        "Figure 5, B-cos DenseNet-169 to B-cos ViT-Tiny",
        _percent(("accuracy", "agreement"), kd=(64.8, 70.1), e2kd=(66.3, 71.8)),
    ),
}
