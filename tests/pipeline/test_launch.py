"""Who computes which shards: flags, SLURM arrays and srun; mistakes are sentences."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning_fabric import Fabric

from artifacts.errors import ConfigError, ImageSetError
from pipeline.config import Experiment
from pipeline.data.pack import pack
from pipeline.devices import start
from pipeline.order.prepare import prepare_stores
from pipeline.precompute import answer as module
from pipeline.sharing import WHOLE, Part
from pipeline.workspace import Layout, Workspace

Tiny = Callable[..., Experiment]
SLURM = ("ARRAY_TASK_COUNT", "ARRAY_TASK_MIN", "ARRAY_TASK_MAX", "ARRAY_TASK_STEP", "ARRAY_TASK_ID")
SLURM += ("PROCID", "NTASKS", "NTASKS_PER_NODE", "NNODES", "JOB_ID", "STEP_ID", "LOCALID")


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets SLURM_* variables; none of this machine are there."""
    for name in SLURM:
        monkeypatch.delenv(f"SLURM_{name}", raising=False)

    def announce(**values: int) -> None:
        for name, value in values.items():
            monkeypatch.setenv(f"SLURM_{name}", str(value))

    return announce


def test_alone_everything_is_ours(slurm: Callable[..., None]) -> None:
    slurm()
    assert Part.of(None, None) == Part() == WHOLE
    assert all(map(Part().owns, range(100)))


def test_flags_go_before_slurm(slurm: Callable[..., None]) -> None:
    slurm(ARRAY_TASK_COUNT=9, ARRAY_TASK_MIN=0, ARRAY_TASK_ID=7, PROCID=1, NTASKS=2)
    assert Part.of(2, 5) == Part(2, 5)
    assert Part.of(0, 1) == WHOLE


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({"ARRAY_TASK_COUNT": 4, "ARRAY_TASK_MIN": 0, "ARRAY_TASK_ID": 3}, Part(3, 4)),
        ({"ARRAY_TASK_COUNT": 4, "ARRAY_TASK_MIN": 1, "ARRAY_TASK_ID": 1}, Part(0, 4)),
        ({"ARRAY_TASK_COUNT": 4, "ARRAY_TASK_MIN": 1, "ARRAY_TASK_ID": 4}, Part(3, 4)),
        ({"ARRAY_TASK_COUNT": 1, "ARRAY_TASK_MIN": 7, "ARRAY_TASK_ID": 7}, Part()),  # one that was lost
        ({"STEP_ID": 0, "PROCID": 2, "NTASKS": 3}, Part(2, 3)),
        ({"PROCID": 0, "NTASKS": 3}, Part()),  # the script of sbatch -n 3, not of srun
        ({"PROCID": 0, "NTASKS": 1}, Part()),
        ({"PROCID": 2, "NTASKS": 4, "NTASKS_PER_NODE": 2}, Part()),  # srun's processes join each other
        ({"JOB_ID": 5, "NNODES": 1}, Part()),
    ],
)
def test_slurm_says_which_part_is_ours(
    slurm: Callable[..., None], variables: dict[str, int], part: Part
) -> None:
    slurm(**variables)
    assert Part.of(None, None) == part


@pytest.mark.parametrize(
    "variables",
    [
        {"STEP_ID": 0, "PROCID": 1, "NTASKS": 2},  # srun -n 2: tasks by themselves
        {"PROCID": 0, "NTASKS": 3},  # the script of sbatch -n 3
        {"PROCID": 0, "NTASKS": 1, "NTASKS_PER_NODE": 1, "NNODES": 1},
    ],
)
def test_one_process_starts_inside_an_allocation(
    slurm: Callable[..., None], monkeypatch: pytest.MonkeyPatch, variables: dict[str, int]
) -> None:
    """Fabric's own rules for SLURM refuse --ntasks, and are for processes that join each other."""
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    slurm(**variables)
    fabric = start()
    assert (fabric.world_size, fabric.global_rank) == (1, 0)


def test_an_array_with_steps(slurm: Callable[..., None]) -> None:
    """--array=0-6:2"""
    found = []
    for task in (0, 2, 4, 6):
        slurm(
            ARRAY_TASK_COUNT=4,
            ARRAY_TASK_MIN=0,
            ARRAY_TASK_MAX=6,
            ARRAY_TASK_STEP=2,
            ARRAY_TASK_ID=task,
        )
        found.append(Part.of(None, None))
    assert found == [Part(rank, 4) for rank in range(4)]


@pytest.mark.parametrize(
    "variables",
    [
        {"ARRAY_TASK_COUNT": 2, "ARRAY_TASK_MIN": 2, "ARRAY_TASK_ID": 5},  # --array=2,5
        {"ARRAY_TASK_COUNT": 2, "ARRAY_TASK_MIN": 0},
        {"STEP_ID": 0, "PROCID": 3, "NTASKS": 3},
        {"STEP_ID": 0, "PROCID": -1, "NTASKS": 3},
        {"STEP_ID": 0, "PROCID": "x", "NTASKS": 3},
    ],
)
def test_slurm_variables_that_make_no_part_are_a_sentence(
    slurm: Callable[..., None], variables: dict[str, Any]
) -> None:
    slurm(**variables)
    with pytest.raises(ConfigError, match="rank"):
        Part.of(None, None)


@pytest.mark.parametrize(("rank", "world"), [(0, None), (None, 2)])
def test_one_flag_without_the_other(slurm: Callable[..., None], rank: int | None, world: int | None) -> None:
    slurm()
    with pytest.raises(ConfigError, match="--rank and --world belong together"):
        Part.of(rank, world)


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0), (0, -1), (5, 1)])
def test_ranks_out_of_range(rank: int, world: int) -> None:
    with pytest.raises(ConfigError, match=f"--rank {rank} --world {world}: rank must be 0 to world - 1"):
        Part.of(rank, world)


@pytest.mark.parametrize("world", [1, 2, 3, 7, 50])
def test_every_shard_has_one_owner(world: int) -> None:
    parts = [Part(rank, world) for rank in range(world)]
    assert all(sum(part.owns(shard) for part in parts) == 1 for shard in range(40))


# ---- in their places


def test_a_part_needs_packed_images(tmp_path: Path, experiment_of: Tiny, fabric: Fabric) -> None:
    with pytest.raises(ImageSetError, match="e2kd pack"):
        prepare_stores(Workspace(experiment_of(), Layout(tmp_path / "new"), fabric), Part(0, 2))
    assert not (tmp_path / "new" / "images").exists()


def test_a_part_needs_a_teacher(tmp_path: Path, experiment_of: Tiny, fabric: Fabric) -> None:
    layout = Layout(tmp_path / "new")
    pack(Workspace(experiment_of(), layout))
    with pytest.raises(Exception, match="e2kd teach") as caught:
        prepare_stores(Workspace(experiment_of(), layout, fabric), Part(1, 2))
    assert type(caught.value).__module__ == "artifacts.errors"
    assert not layout.teacher.exists()
    assert not (tmp_path / "new" / "stores").exists()


def test_more_parts_than_shards(prepared: Layout, experiment_of: Tiny, fabric: Fabric) -> None:
    """Those without a shard do nothing; nobody waits for them."""
    shutil.rmtree(prepared.stores("gradcam-centred"))
    for rank in (6, 0, 1, 2):
        complete = prepare_stores(Workspace(experiment_of(), prepared, fabric), Part(rank, 7))
        assert complete == (rank == 2)
    assert prepare_stores(Workspace(experiment_of(), prepared, fabric), Part(5, 7))


def test_pixels_are_read_two_batches_ahead(
    prepared: Layout, experiment_of: Tiny, fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading ahead is bounded, however slow the teacher is."""
    shutil.rmtree(prepared.stores("gradcam-centred"))
    read, asked, ahead = [0], [0], []
    real_read, real_ask = module.ImageSet.read_images, module._ask

    def read_images(images: Any, rows: Any) -> Any:
        read[0] += len(rows)
        return real_read(images, rows)

    def ask(*args: Any) -> Any:
        ahead.append(read[0] - asked[0])
        asked[0] += len(args[2])
        return real_ask(*args)

    monkeypatch.setattr(module.ImageSet, "read_images", read_images)
    monkeypatch.setattr(module, "_ask", ask)
    monkeypatch.setattr("pipeline.precompute.run.score_teacher", lambda *args: None)
    monkeypatch.setattr("pipeline.order.prepare.measure", lambda *args: None)
    experiment = experiment_of(store__batch_size=8, evaluate={"select": None, "splits": ["train"]})
    prepare_stores(Workspace(experiment, prepared, fabric))
    assert asked[0] == 96
    assert max(ahead) <= 2 * 8
