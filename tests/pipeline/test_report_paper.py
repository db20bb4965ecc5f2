"""The paper's numbers against what the paper itself says of them elsewhere: printed differences and prose."""

from __future__ import annotations

import pytest

from artifacts.errors import ConfigError
from pipeline.report.paper import METHODS, TABLES, table


def _gain(name: str, better: str, base: str) -> tuple[float, float]:
    rows = table(name).rows
    gains = [round(100 * (rows[better][m] - rows[base][m]), 1) for m in ("accuracy", "agreement")]
    return gains[0], gains[1]


@pytest.mark.parametrize(
    ("number", "better", "base", "printed"),
    [
        (1, "e2kd", "kd", [(5.1, 6.2), (1.0, 1.3), (0.0, 0.4)]),
        (1, "crd-e2kd", "crd", [(4.7, 5.3), (3.1, 3.8), (1.1, 1.9)]),
        (2, "e2kd", "kd", [(8.6, 10.0), (2.3, 3.1), (0.3, 0.4)]),
        (3, "e2kd", "kd", [(8.1, 8.8), (4.4, 5.1), (0.7, 1.0)]),
        (3, "e2kd-frozen", "kd-frozen", [(5.3, 6.0), (3.2, 3.8), (0.8, 1.2)]),
    ],
)
def test_the_printed_differences_are_those_of_the_rows(
    number: int, better: str, base: str, printed: list[tuple[float, float]]
) -> None:
    sizes = ("50-shots", "200-shots", "full")
    assert [_gain(f"table{number}/{size}", better, base) for size in sizes] == printed


def test_what_the_prose_says() -> None:
    shots = table("table3/50-shots").rows
    assert [shots[name]["accuracy"] for name in ("kd", "kd-frozen", "e2kd-frozen")] == [
        0.373,
        0.334,
        0.387,
    ]  # 4.4
    epg, iou = table("table5/voc-epg").rows, table("table5/voc-iou").rows
    assert (epg["e2kd"]["epg"], iou["e2kd"]["epg"]) == (0.711, 0.603)  # 4.3
    assert (iou["e2kd"]["iou"], epg["e2kd"]["iou"]) == (0.457, 0.248)
    assert (epg["kd"]["epg"], iou["kd"]["epg"], iou["kd"]["iou"], epg["kd"]["iou"]) == (
        0.601,
        0.589,
        0.357,
        0.316,
    )
    assert (epg["kd"]["f1"], epg["e2kd"]["f1"]) == (0.601, 0.676)
    assert _gain("table5/sun-imn", "e2kd", "kd") == (4.9, 5.4)  # 4.1
    assert table("figure5").rows == {
        "kd": {"accuracy": 0.648, "agreement": 0.701},
        "e2kd": {"accuracy": 0.663, "agreement": 0.718},
    }
    assert [table(f"table{n}/full").rows["teacher"] for n in (1, 2, 3)] == [
        {"accuracy": 0.733},
        {"accuracy": 0.723},
        {"accuracy": 0.752},
    ]


def test_e2kd_wins_in_every_waterbirds_column_and_the_rows_are_known() -> None:
    for name in ("convnext", "efficientnet", "mobilenet", "shufflenet"):
        assert min(_gain(f"table4/{name}", "e2kd", "kd")) > 8
        assert table(f"table4/{name}").split == "test-ood"
    assert len(TABLES) == 18
    for found in TABLES.values():
        assert set(found.rows) <= set(METHODS)
        assert all(0 < value < 1 for row in found.rows.values() for value in row.values())


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("table1/50shots", "did you mean table1/50-shots"),
        ("table5/voc", "did you mean table5/voc"),
        ("?", "use one of"),
    ],
)
def test_an_unknown_table_is_named_with_the_nearest(wrong: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        table(wrong)
