"""Started by test_kill_points.py: a process per kill point, forked from one that has imported everything.

    kill_points_worker.py store|mend|images FOLDER

Each process makes the artifact and is killed before its n-th change of the disk; the first one carries on to the end.
Prints, for each n, as JSON: what it was killed at, what it had finished, what was made again, and what is not right.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
of = runpy.run_path(str(Path(__file__).with_name("conftest.py")))

from artifacts.writer import ShardStream, StoreWriter  # noqa: E402


def make_store(folder: Path, made: Callable[[str], None]) -> None:
    """What precompute does, with one stream for all shards."""
    writer = StoreWriter(folder, of["draft"]())
    writer.create()
    with ShardStream(writer) as stream:
        for shard in sorted(set(range(writer.draft.shape.shards)) - writer.committed()):
            made(f"{shard}")
            keys = [f"img-{row:04d}" for row in writer.draft.shape.shard_rows(shard)]
            stream.begin(shard, f"{shard:064d}", keys)
            stream.append(of["answers"](writer.draft, shard))
            stream.end()
    writer.finish()


def make_images(folder: Path, made: Callable[[str], None]) -> None:
    def get(row: int) -> Any:
        made(f"{row // of['PER_SHARD']}")
        return of["sample"](row)

    of["pack"](folder, get)


MAKE = {"store": make_store, "mend": make_store, "images": make_images}


def begin(kind: str, whole: Path, folder: Path) -> None:
    """What is there at first: nothing, or a finished store with a short object and what a killed process left."""
    if kind == "mend":
        shutil.copytree(whole, folder)
        (folder / "maps/c/1/0/0/0/0/0").write_bytes(b"half")
        (folder / "logits/c/2/0/0.partial").write_bytes(b"half")


def finished(kind: str, folder: Path) -> list[str]:
    """The shards that must not be made again."""
    if kind != "images":
        if not (folder / "draft.json").exists():
            return []
        return [str(shard) for shard in sorted(StoreWriter(folder, of["draft"]()).committed())]
    return [
        str(int(file.name.split(".")[0].removeprefix("shard-")))
        for file in sorted(folder.glob("*.rows.json"))
    ]


class Deadly:
    """Counts the changes of the disk (fsync, rename, unlink, mkdir) and kills this process before number `at`.

    A file that was about to be synced is torn first: half of what was written never got there.
    """

    def __init__(self, at: int, told: Callable[[str], None]) -> None:
        self.at, self.told, self.count = at, told, 0
        os.fsync = self._fsync
        for name in ("replace", "rename", "unlink", "mkdir"):  # pathlib calls these
            setattr(os, name, self._counted(name))

    def _counted(self, name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(path: Any, *args: Any, **named: Any) -> Any:
            self._next(f"{name} {path}")
            return real(path, *args, **named)

        return call

    def _fsync(self, handle: int) -> None:
        """Only counted: a killed process loses nothing of what it wrote, synced or not."""
        name = os.readlink(f"/proc/self/fd/{handle}")
        self._next(f"fsync {name}", handle if Path(name).is_file() else -1)

    def _next(self, what: str, torn: int = -1) -> None:
        self.count += 1
        if self.count == self.at:
            if torn >= 0:
                os.ftruncate(torn, os.fstat(torn).st_size // 2)
            self.told(what)
            os.kill(os.getpid(), signal.SIGKILL)


def killed(kind: str, folder: Path, at: int) -> tuple[int, str]:
    """Make the artifact in a process of its own. Returns its exit code, and what it was killed at (or its count)."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            deadly = Deadly(at, lambda what: os.write(write, what.encode()) and None)
            MAKE[kind](folder, lambda shard: None)
            os.write(write, str(deadly.count).encode())
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    os.close(write)
    with open(read) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def main(kind: str, folder: Path) -> None:
    if kind == "images":
        import webdataset  # noqa: F401  (here, and not in every process)
    os.fsync = lambda handle: None
    whole, path = folder / "whole", folder / "path"
    MAKE[kind](whole, lambda shard: None)
    good, results = of["snapshot"](whole), []
    begin(kind, whole, path)
    code, count = killed(kind, path, at=0)
    assert code == 0
    assert of["snapshot"](path) == good
    shutil.rmtree(path)
    gc.freeze()  # the processes share these pages
    for at in range(1, int(count) + 1):
        begin(kind, whole, path)
        code, what = killed(kind, path, at)
        done, seen = finished(kind, path), of["snapshot"](path) if path.exists() else {}
        made: list[str] = []
        MAKE[kind](path, made.append)
        end = of["snapshot"](path)
        results.append(
            {
                "what": what.replace(str(path), "."),
                "code": code,
                "finished": done,
                "made_again": sorted(set(made)),
                "seen": sorted(seen),
                "wrong_when_killed": sorted(
                    name for name, data in seen.items() if name in good and data != good[name]
                ),
                "wrong_in_the_end": sorted(n for n in good.keys() | end.keys() if good.get(n) != end.get(n)),
            }
        )
        shutil.rmtree(path)
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
