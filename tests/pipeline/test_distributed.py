"""Two gloo processes make the single-process store byte for byte, and the single-process student's losses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "ddp_worker.py"


def _run(root: Path, student: str, processes: int) -> list[float]:
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*launch, str(WORKER), str(root), student],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses: list[float] = json.loads((root / "losses.json").read_text())
    return losses


def _files(root: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()
    }


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[float], list[float]]:
    """The same experiment, its teacher shared, precomputed and distilled by one and by two processes."""
    one, two = tmp_path_factory.mktemp("one") / "tiny", tmp_path_factory.mktemp("two") / "tiny"
    alone = _run(one, "e2kd-frozen", 1)
    for part in ("images", "teacher"):
        shutil.copytree(one / part, two / part)
    return one, two, alone, _run(two, "e2kd-frozen", 2)


def test_the_store_is_the_same_byte_for_byte(both: tuple[Path, Path, list[float], list[float]]) -> None:
    alone, together = (_files(root / "stores" / "gradcam-centred" / "train") for root in both[:2])
    assert len(alone) > 12
    assert alone.keys() == together.keys()
    assert [name for name in alone if alone[name] != together[name]] == []


def test_the_first_20_losses_are_the_same(both: tuple[Path, Path, list[float], list[float]]) -> None:
    assert len(both[2]) == len(both[3]) == 20
    assert both[3] == pytest.approx(both[2], rel=1e-5)
