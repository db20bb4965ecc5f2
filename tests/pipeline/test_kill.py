"""Stage 1 is killed, interrupted, starved of disk and shared out; it always ends as the run that was left in peace.

The processes are real: fork_worker.py forks them, so that each starts in milliseconds.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from artifacts import verify_store
from artifacts.manifest import ShardRecord
from artifacts.places import place
from artifacts.records import read_record, wrong_sizes
from pipeline.config import Experiment, dump
from pipeline.provenance import SEEN

WORKER = Path(__file__).with_name("fork_worker.py")
ROWS, PER_SHARD = 96, 6
SHARDS = frozenset(range(ROWS // PER_SHARD))
CHANGES: dict[str, Any] = {
    "store__rows_per_shard": PER_SHARD,
    "store__batch_size": 3,
    "evaluate": {"select": None, "splits": ["train"]},
}
INTERRUPTED = "e2kd: interrupted; what is finished is kept: run the same command again to continue\n"


@dataclass(frozen=True)
class Ended:
    """A process: exit code (negative: by that signal), what it printed, which rows it asked the teacher for."""

    code: int
    seconds: float
    asked: list[tuple[int, int]]
    said: str

    @property
    def shards(self) -> set[int]:
        return {row // PER_SHARD for start, stop in self.asked for row in range(start, stop)}


class Processes:
    """Starts `e2kd precompute` processes, by way of fork_worker.py."""

    def __init__(self) -> None:
        self._worker = subprocess.Popen(
            [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self,
        root: Path,
        parts: Sequence[tuple[int, int]] = ((0, 1),),
        sends: signal.Signals | None = None,
        after: float = 0,
        once: Path | None = None,
        file_bytes: int | None = None,
        limit_from: int = 0,
        full: str | None = None,
    ) -> list[Ended]:
        """One process per part, at once.

        The first is sent the signal, so many seconds after its start or after the file `once` appeared. From the time
        when row `limit_from` is asked for, files may not grow over `file_bytes`. The disk is full
        for the object `full`.
        """
        order = {"root": str(root), "changes": CHANGES, "parts": list(parts)}
        order |= {"signal": sends, "after": after, "once": once and str(once)}
        order |= {"file_bytes": file_bytes, "limit_from": limit_from, "full": full}
        stdin, stdout = self._worker.stdin, self._worker.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(order) + "\n")
        stdin.flush()
        return [
            Ended(each["code"], each["seconds"], [(a, b) for a, b in each["asked"]], each["said"])
            for each in json.loads(stdout.readline())
        ]

    def close(self) -> None:
        self._worker.communicate("", timeout=60)


@dataclass(frozen=True)
class Whole:
    """An experiment that nobody disturbed, how it lay before stage 1, and how long its process took."""

    root: Path
    before: Path
    seconds: float
    shard_seconds: float

    def fresh(self, root: Path) -> Path:
        """Packed and taught, without stores."""
        shutil.copytree(self.before, root)
        return root

    def differing(self, root: Path) -> list[str]:
        """Files of an experiment that differ, or are there in one of both only."""
        mine, theirs = files(self.root), files(root)
        return sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))


def files(root: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(root)): file.read_bytes()
        for file in sorted(root.rglob("*"))
        # that one is about a file of this folder
        if file.is_file() and file.name != SEEN
    }


def store_of(root: Path) -> Path:
    return root / "stores" / "gradcam-centred" / "train"


def committed(root: Path) -> set[int]:
    where = place(store_of(root))
    sizes = where.sizes()
    records = [
        read_record(where, name, ShardRecord)
        for name in sizes
        if name.startswith("commits/") and name.endswith(".json")
    ]
    assert not any(wrong_sizes(record, sizes) for record in records)
    return {record.shard for record in records}


def check_visible(root: Path, whole: Whole) -> None:
    """What has its final name is there in full, whatever happened; so a committed shard is valid."""
    store, good = files(store_of(root)), files(store_of(whole.root))
    assert [name for name, data in store.items() if good.get(name) != data and ".partial" not in name] == []


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    started = Processes()
    yield started
    started.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, processes: Processes) -> Whole:
    root, before = (tmp_path_factory.mktemp(name) / "tiny" for name in ("whole", "before"))
    [made] = processes.run(root)
    assert made.code == 0, made.said
    shutil.copytree(root, before, ignore=shutil.ignore_patterns("stores"))
    (before / "config.yaml").unlink()
    again = Whole(root, before, 0, 0).fresh(before.with_name("again"))
    [second] = processes.run(again)
    assert second.code == 0, second.said
    assert second.shards == SHARDS
    assert Whole(root, before, 0, 0).differing(again) == []
    assert verify_store(store_of(root), root / "images" / "train").ok
    stamps = [file.stat().st_mtime for file in (store_of(again) / "commits").iterdir()]
    return Whole(root, before, second.seconds, (max(stamps) - min(stamps)) / (len(stamps) - 1))


def moment(rng: random.Random, whole: Whole, root: Path) -> dict[str, Any]:
    """When to strike: mostly around the commit of one of the next shards, now and then at any time."""
    missing = sorted(SHARDS - committed(root))
    if not missing and rng.random() < 0.7:  # enough processes die with the store complete
        return {"sends": None}
    if not missing or rng.random() < 0.2:
        return {"after": rng.uniform(0, whole.seconds)}
    name = f"{rng.choice(missing[:7]):06d}.json"
    return {"after": rng.uniform(0, 2 * whole.shard_seconds), "once": store_of(root) / "commits" / name}


def disturb(
    processes: Processes, whole: Whole, folder: Path, sends: signal.Signals, times: int, seed: int
) -> Counter[int]:
    """Send signals at random moments, the same command again and again, until `times` of them hit a running process.

    Returns how many processes ended at how many committed shards.
    """
    rng, ended, count = random.Random(seed), Counter[int](), 0
    while ended.total() < times:
        root, count = whole.fresh(folder / str(count)), count + 1
        code: int | None = None
        while code != 0:
            before, more = committed(root), ended.total() < times
            when = {"sends": sends, **moment(rng, whole, root)} if more else {}
            [process] = processes.run(root, **when)
            after, code = committed(root), process.code
            assert before <= after, "a committed shard was lost"
            assert not process.shards & before, "the teacher was asked again for what is committed"
            assert len(process.shards - after) <= 2, "more was lost than the open shards"
            check_visible(root, whole)
            if code == 0:
                break
            assert code == (130 if sends == signal.SIGINT else -sends), process.said
            if sends == signal.SIGINT:
                assert process.said.endswith(INTERRUPTED)
                assert not {"Traceback", "Exception"} & set(process.said.split()), process.said
            ended[len(after)] += 1
        assert whole.differing(root) == []
        assert not list(root.rglob("*.partial"))
        shutil.rmtree(root)
    print(f"{sends.name}: {ended.total()} processes, {count} stores; committed shards at their end:")
    print("  " + ", ".join(f"{shards}: {ended[shards]}" for shards in sorted(ended)))
    return ended


def test_killed_at_25_random_moments(processes: Processes, whole: Whole, tmp_path: Path) -> None:
    ended = disturb(processes, whole, tmp_path, signal.SIGKILL, 25, seed=0)
    assert len(ended) >= 4, "the moments were not spread"


@pytest.mark.slow
def test_killed_at_200_random_moments(processes: Processes, whole: Whole, tmp_path: Path) -> None:
    ended = disturb(processes, whole, tmp_path, signal.SIGKILL, 200, seed=1)
    assert len(ended) >= 10


def test_interrupted_at_random_moments(processes: Processes, whole: Whole, tmp_path: Path) -> None:
    disturb(processes, whole, tmp_path, signal.SIGINT, 4, seed=2)


@pytest.mark.slow
def test_interrupted_at_100_random_moments(processes: Processes, whole: Whole, tmp_path: Path) -> None:
    disturb(processes, whole, tmp_path, signal.SIGINT, 100, seed=3)


def test_ctrl_c_on_the_command_line(
    processes: Processes, whole: Whole, tmp_path: Path, experiment_of: Callable[..., Experiment]
) -> None:
    root, config = whole.fresh(tmp_path / "tiny"), tmp_path / "tiny.yaml"
    config.write_text(dump(experiment_of(**CHANGES)))
    command = [sys.executable, "-P", "-m", "cli", "precompute", str(config), "--out", str(root)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    first = store_of(root) / "commits" / "000000.json"
    while not first.exists() and running.poll() is None:
        time.sleep(0.002)
    running.send_signal(signal.SIGINT)
    _, message = running.communicate(timeout=60)
    assert running.returncode == 130, message
    assert message == INTERRUPTED
    assert 0 < len(committed(root)) < len(SHARDS)
    check_visible(root, whole)
    [resumed] = processes.run(root)
    assert resumed.code == 0, resumed.said
    assert whole.differing(root) == []


# ---- disks that are full


def test_a_file_that_may_not_grow_is_one_sentence(processes: Processes, whole: Whole, tmp_path: Path) -> None:
    """A real write error (EFBIG), met in the background thread that writes the shards."""
    root = whole.fresh(tmp_path / "tiny")
    [failed] = processes.run(root, file_bytes=100, limit_from=ROWS // 2)
    assert failed.code == 2, failed.said
    assert failed.said.startswith(f"e2kd: cannot write {store_of(root)}/")
    assert "File too large" in failed.said
    assert failed.said.count("\n") == 1
    assert 0 < len(committed(root)) < len(SHARDS)
    check_visible(root, whole)
    [resumed] = processes.run(root)
    assert resumed.code == 0, resumed.said
    assert whole.differing(root) == []


@pytest.mark.parametrize("array", ["logits", "explained_class", "maps", "map_scale"])
def test_a_full_disk_keeps_what_is_committed(
    processes: Processes, whole: Whole, tmp_path: Path, array: str
) -> None:
    """A real ENOSPC: the object of the sixth shard is written to /dev/full."""
    root = whole.fresh(tmp_path / "tiny")
    [found] = [name for name in files(store_of(whole.root)) if name.startswith(f"{array}/c/5/")]
    [failed] = processes.run(root, full=found)
    assert failed.code == 2, failed.said
    sentence = f"e2kd: cannot write {store_of(root) / found}: No space left on device; mend that and run"
    assert failed.said.startswith(sentence)
    assert failed.said.count("\n") == 1
    assert committed(root) == set(range(5))
    check_visible(root, whole)
    [resumed] = processes.run(root)
    assert resumed.code == 0, resumed.said
    assert resumed.shards == SHARDS - set(range(5))
    assert whole.differing(root) == []


# ---- parts


def test_parts_one_after_another_make_the_store_of_one_process(
    processes: Processes, whole: Whole, tmp_path: Path
) -> None:
    root = whole.fresh(tmp_path / "tiny")
    for rank in (2, 0, 1):
        [ended] = processes.run(root, [(rank, 3)])
        assert ended.code == 0, ended.said
        assert ended.shards == {shard for shard in SHARDS if shard % 3 == rank}
        if rank != 1:
            assert f"part {rank} of 3 of train is done" in ended.said
            assert not (store_of(root) / "manifest.json").exists()
    assert whole.differing(root) == []


def test_parts_at_once_make_the_store_of_one_process(
    processes: Processes, whole: Whole, tmp_path: Path
) -> None:
    root = whole.fresh(tmp_path / "tiny")
    ended = processes.run(root, [(0, 2), (1, 2)])
    assert [each.code for each in ended] == [0, 0], [each.said for each in ended]
    assert [each.shards for each in ended] == [{s for s in SHARDS if s % 2 == rank} for rank in (0, 1)]
    assert whole.differing(root) == []


def test_a_lost_part_is_picked_up_by_a_run_without_flags(
    processes: Processes, whole: Whole, tmp_path: Path
) -> None:
    root = whole.fresh(tmp_path / "tiny")
    third = store_of(root) / "commits" / "000004.json"
    lost, other = processes.run(root, [(0, 2), (1, 2)], signal.SIGKILL, once=third)
    assert lost.code == -signal.SIGKILL
    assert other.code == 0, other.said
    done = committed(root)
    assert {shard for shard in SHARDS if shard % 2} <= done < SHARDS
    check_visible(root, whole)
    [rest] = processes.run(root)
    assert rest.code == 0, rest.said
    assert rest.shards == SHARDS - done
    assert whole.differing(root) == []


@pytest.mark.parametrize("part", [(0, 1), (1, 2)])
def test_the_same_part_twice_at_once(
    processes: Processes, whole: Whole, tmp_path: Path, part: tuple[int, int]
) -> None:
    """By mistake: it costs time, not the store."""
    for attempt in range(2):
        root = whole.fresh(tmp_path / str(attempt))
        ended = processes.run(root, [part, part])
        assert [each.code for each in ended] == [0, 0], [each.said for each in ended]
        check_visible(root, whole)
        [rest] = processes.run(root)
        assert rest.code == 0, rest.said
        assert rest.shards == {s for s in SHARDS if s % part[1] != part[0]}
        assert whole.differing(root) == []


@pytest.mark.slow
def test_a_rank_of_torchrun_that_is_killed(processes: Processes, whole: Whole, tmp_path: Path) -> None:
    root = whole.fresh(tmp_path / "tiny")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-addr", "127.0.0.1", "--master-port", "29579"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with (tmp_path / "said").open("w") as said:
        command = [*launch, str(WORKER), str(root), json.dumps(CHANGES)]
        running = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
    log = tmp_path / "tiny.asked-1"
    while running.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 3):
        time.sleep(0.005)
    assert running.poll() is None, (tmp_path / "said").read_text()
    os.kill(int(log.read_text().splitlines()[0].split()[1]), signal.SIGKILL)
    assert running.wait(120) != 0
    done = committed(root)
    assert done < SHARDS
    check_visible(root, whole)
    [rest] = processes.run(root)
    assert rest.code == 0, rest.said
    assert rest.shards == SHARDS - done
    assert whole.differing(root) == []
