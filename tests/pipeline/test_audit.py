"""Asking the teacher again: what the sample proves, which stores pass, and what is said of those that do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor

from artifacts import TeacherRows, open_images, open_store, verify_store
from artifacts.codecs import get_codec
from artifacts.manifest import ManifestDraft
from artifacts.writer import StoreWriter
from cli.main import app, run_guarded
from pipeline.config import Experiment
from pipeline.explain.gradcam import Explained
from pipeline.precompute.answer import _ask
from pipeline.precompute.audit import Audit, audit, random_rows, upper_bound
from pipeline.precompute.run import precompute
from pipeline.training.keep import kept_weights
from pipeline.training.run import Run
from pipeline.training.trained import build_explainer, load_teacher
from pipeline.workspace import Layout, Workspace

CPU = torch.device("cpu")


def e2kd(*arguments: object) -> int:
    return run_guarded(lambda: app([str(a) for a in arguments]))


# ---- the bound


def exact_cdf(failures: int, trials: int, p: Fraction) -> Fraction:
    """P(X <= failures), X binomial, without rounding."""
    return sum(
        (comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(failures + 1)), start=Fraction(0)
    )


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("trials", [1, 2, 10, 50, 137])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9])
def test_the_bound_is_where_the_exact_probability_is_the_error(
    trials: int, share: float, confidence: float
) -> None:
    failures = int(share * trials)
    bound = upper_bound(failures, trials, confidence)
    assert failures / trials < bound < 1
    allowed = 1 - Fraction(confidence)
    below, above = (Fraction(bound) + Fraction(step, 10**9) for step in (-1, 1))
    assert exact_cdf(failures, trials, below) > allowed > exact_cdf(failures, trials, above)


@pytest.mark.parametrize(
    ("failures", "trials", "known"),
    [(0, 100, 0.029513), (0, 1, 0.95), (0, 10, 0.258866), (1, 50, 0.091398), (5, 10, 0.777559), (3, 3, 1.0)],
)
def test_known_clopper_pearson_bounds(failures: int, trials: int, known: float) -> None:
    assert upper_bound(failures, trials, 0.95) == pytest.approx(known, abs=1e-6)


def test_the_bound_holds_for_large_samples() -> None:
    """Where nothing deviates it is 1 - 0.05^(1/n), about 3/n."""
    for trials in (1_000, 100_000, 10_000_000):
        assert upper_bound(0, trials, 0.95) == pytest.approx(-np.expm1(np.log(0.05) / trials), rel=1e-6)
    assert 0.01 < upper_bound(10_000, 1_000_000, 0.95) < 0.01018


def test_the_bound_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    for truth in (0.01, 0.05, 0.3):
        failures = rng.binomial(60, truth, 4000)
        bounds = np.array([upper_bound(k, 60, 0.95) for k in range(61)])
        assert (bounds[failures] >= truth).mean() > 0.94


# ---- the sample


@pytest.mark.parametrize(
    ("count", "share", "rows"),
    [
        (1000, "1%", 10),
        (96, "1%", 1),
        (10, "0.001%", 1),
        (96, "100%", 96),
        (96, "96", 96),
        (500, "200", 200),
        (3, "50%", 2),
    ],
)
def test_random_rows_are_that_many_in_order_and_the_same_each_time(count: int, share: str, rows: int) -> None:
    found = random_rows(count, share)
    assert len(found) == rows == len(set(found.tolist()))
    assert found.tolist() == sorted(found.tolist())
    assert found[0] >= 0
    assert found[-1] < count
    assert np.array_equal(found, random_rows(count, share))


@pytest.mark.parametrize(
    "share", ["0%", "101%", "-1%", "-1", "0", "97", "abc", "", "%", "1.5", "nan%", "inf%", "1 %x"]
)
def test_shares_that_are_none_are_an_error(share: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        random_rows(96, share)


def test_every_row_can_be_drawn() -> None:
    found = random_rows(10_000, "10%")
    assert np.histogram(found, bins=10, range=(0, 10_000))[0].min() > 70


# ---- stores


def asked(layout: Layout, experiment: Experiment, share: str = "100%", split: str = "val") -> Audit:
    images = open_images(layout.images(split))
    store = open_store(layout.store(experiment.store_name, split))
    explainer = build_explainer(experiment.explain, load_teacher(Workspace(experiment, layout), images))
    rows = random_rows(len(store), share)
    seen: list[int] = []
    found = audit(explainer, images, store, rows, batch_size=20, advance=seen.append)
    assert sum(seen) == len(rows) == found.rows
    return found


@pytest.mark.parametrize("maps", ["fp16", "int8", "int6", "int5", "lossless"])
def test_a_sound_store_of_any_codec_passes(
    prepared: Layout, experiment_of: Callable[..., Experiment], fabric: Fabric, maps: str
) -> None:
    logits = {"int8": "uint12", "lossless": "fp32"}.get(maps, "fp16")
    experiment = experiment_of(store__maps=maps, store__logits=logits, store__name=maps)
    precompute(Workspace(experiment, prepared, fabric), "val")
    found = asked(prepared, experiment)
    assert (found.rows, found.of, found.deviating, found.agreement) == (96, 96, 0, 1.0)
    assert found.logit_error[0] <= found.logit_error[1] < 1e-3
    assert found.map_cosine[0] >= found.map_cosine[1] >= min(0.99, get_codec(maps).crop_p1)
    assert found.at_most == pytest.approx(1 - 0.05 ** (1 / 96), abs=1e-9)
    if maps == "lossless":
        assert found.logit_error[1] < 1e-6


def rewrite(
    layout: Layout,
    experiment: Experiment,
    shards: Sequence[int],
    change: Callable[[TeacherRows], TeacherRows],
    noise: float = 0.0,
) -> Path:
    """Shards of the store as another teacher (weights times 1 + noise) or `change` has them; sound to `verify`."""
    images = open_images(layout.images("val"))
    where = layout.store(experiment.store_name, "val")
    store = open_store(where)
    teacher = load_teacher(Workspace(experiment, layout), images)
    torch.manual_seed(0)
    for weight in teacher.parameters():
        weight.mul_(1 + noise * torch.randn_like(weight))
    explainer = build_explainer(experiment.explain, teacher)
    draft = {name: getattr(store.manifest, name) for name in ManifestDraft.model_fields}
    writer = StoreWriter(where, ManifestDraft(**draft))
    for shard in shards:
        rows = images.shard_rows(shard)
        answers = change(_ask(explainer, images.read_images(rows), rows, CPU))
        writer.uncommit(shard)
        writer.write_shard(shard, answers, images.keys_sha256(shard), images.shard_keys(shard))
    writer.finish()
    assert verify_store(where, images.place).ok
    return Path(str(where))


def unchanged(answers: TeacherRows) -> TeacherRows:
    return answers


CHANGES: dict[str, Callable[[TeacherRows], TeacherRows]] = {
    "logits": lambda a: TeacherRows(a.logits * np.float32(1.05), a.explained_class, a.maps),
    "maps": lambda a: TeacherRows(a.logits, a.explained_class, np.roll(a.maps, 1, axis=-1)),
    "rows in another order": lambda a: TeacherRows(a.logits[::-1].copy(), a.explained_class[::-1], a.maps[::-1].copy()),
    "classes": lambda a: TeacherRows(a.logits, 1 - a.explained_class, a.maps),
    "dead maps": lambda a: TeacherRows(a.logits, a.explained_class, a.maps * 0),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CHANGES))
def test_shards_with_other_numbers_are_found_where_every_checksum_is_right(
    prepared: Layout, experiment_of: Callable[..., Experiment], name: str
) -> None:
    experiment = experiment_of()
    rewrite(prepared, experiment, [1], CHANGES[name])
    found = asked(prepared, experiment)
    assert 16 <= found.deviating <= 32, str(
        found
    )  # of the shard's 32 rows; dead or symmetric maps stay right
    assert found.at_most > found.deviating / 96
    if name == "classes":
        assert found.agreement == pytest.approx(64 / 96)
    if name == "logits":
        assert found.logit_error[1] > 0.01
    if name == "maps":
        assert found.map_cosine[1] < 0.95


@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_shards_of_a_slightly_different_teacher_are_found(
    prepared: Layout,
    experiment_of: Callable[..., Experiment],
    noise: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    experiment = experiment_of()
    store = rewrite(prepared, experiment, [0, 2], unchanged, noise)
    found = asked(prepared, experiment)
    assert 16 <= found.deviating <= 64, str(found)
    assert e2kd("verify", store) == 0
    assert e2kd("verify", store, "--against-teacher", "50%") == 3
    assert "48 of 96 rows at random" in capsys.readouterr().out


def test_one_wrong_row_of_many_is_counted_once(
    prepared: Layout, experiment_of: Callable[..., Experiment]
) -> None:
    def one(a: TeacherRows) -> TeacherRows:
        logits = a.logits.copy()
        logits[7] += 3 * np.ptp(a.logits) * np.arange(logits.shape[-1], dtype=np.float32)
        return TeacherRows(logits, a.explained_class, a.maps)

    rewrite(prepared, experiment_of(), [1], one)
    found = asked(prepared, experiment_of())
    assert found.deviating == 1
    assert found.at_most == pytest.approx(upper_bound(1, 96, 0.95))
    assert "1 rows deviate: with 95% confidence at most 4.8" in str(found)


class Silent(torch.nn.Module):
    """A teacher with equal logits and dead maps."""

    def forward(self, images: torch.Tensor, classes: torch.Tensor | None = None) -> Explained:
        n = len(images)
        return Explained(torch.zeros(n, 2), torch.zeros(n, 1, 12, 12), torch.zeros(n, dtype=torch.int64))


def test_dead_maps_on_both_sides_agree_and_no_range_divides_by_nothing(
    prepared: Layout, experiment_of: Callable[..., Experiment]
) -> None:
    experiment = experiment_of()

    def silent(a: TeacherRows) -> TeacherRows:
        return TeacherRows(a.logits * 0, a.explained_class * 0, a.maps * 0)

    rewrite(prepared, experiment, range(3), silent)
    images = open_images(prepared.images("val"))
    store = open_store(prepared.store(experiment.store_name, "val"))
    assert store.manifest.dead_maps == 96
    quiet: Any = Silent()
    found = audit(quiet, images, store, np.arange(96), batch_size=50, advance=lambda _: None)
    assert (found.deviating, found.map_cosine, found.logit_error) == (0, (1.0, 1.0), (0.0, 0.0))


def test_nan_deviates(prepared: Layout, experiment_of: Callable[..., Experiment]) -> None:
    class Lost(torch.nn.Module):
        def forward(self, images: Tensor, classes: Tensor) -> Explained:
            return Explained(
                torch.zeros(len(images), 2), torch.full((len(images), 1, 12, 12), torch.nan), classes
            )

    images = open_images(prepared.images("val"))
    store = open_store(prepared.store(experiment_of().store_name, "val"))
    lost: Any = Lost()
    found = audit(lost, images, store, np.arange(96), batch_size=50, advance=lambda _: None)
    assert found.deviating == 96


# ---- the command line


def test_exit_codes_and_the_line(
    prepared: Layout, experiment_of: Callable[..., Experiment], capsys: pytest.CaptureFixture[str]
) -> None:
    store = prepared.store(experiment_of().store_name, "val")
    assert e2kd("verify", store, "--against-teacher", "25%") == 0
    printed = capsys.readouterr().out
    assert "ask the teacher: 24/24 images in" in printed
    line = next(line for line in printed.splitlines() if line.startswith("against the teacher: "))
    assert line.startswith("against the teacher: 24 of 96 rows at random, agreement 100.0%, logit error ")
    assert line.endswith("0 rows deviate: with 95% confidence at most 11.73% of the store's rows do")
    for share in ("0%", "101%", "abc", "-1"):
        assert e2kd("verify", store, f"--against-teacher={share}") == 2
        error = capsys.readouterr().err
        assert f"--against-teacher {share}: give a share like 1% or a number of rows like 200" in error
        assert error.count("\n") == 1


def test_a_damaged_store_is_not_asked_about(
    prepared: Layout, experiment_of: Callable[..., Experiment], capsys: pytest.CaptureFixture[str]
) -> None:
    store = Path(str(prepared.store(experiment_of().store_name, "val")))
    (store / "logits/c/1/0/0").write_bytes(b"")
    assert e2kd("verify", store, "--against-teacher", "1%") == 3
    assert "against the teacher" not in capsys.readouterr().out


def test_a_store_of_another_teacher_is_refused(
    prepared: Layout, experiment_of: Callable[..., Experiment], capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights on disk are not those of the manifest: there is nothing to compare with."""
    from safetensors.torch import load_file, save_file

    store = prepared.store(experiment_of().store_name, "val")
    weights = kept_weights(Run(prepared.teacher))
    state = load_file(weights)
    save_file(
        {name: value * 1.01 if value.is_floating_point() else value for name, value in state.items()}, weights
    )
    assert e2kd("verify", store, "--against-teacher", "1%") == 2
    assert "teacher.weights_sha256: store" in capsys.readouterr().err


def test_an_image_set_has_no_teacher(prepared: Layout) -> None:
    assert e2kd("verify", prepared.images("val"), "--against-teacher", "1%") == 2
