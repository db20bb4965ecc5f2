"""Who of several processes does what: how they were launched, parts of independent ones, and locks between them."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from artifacts.access import write_error, writing_to
from artifacts.errors import ConfigError

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Launch:
    """The processes that were launched together as one job: by torchrun, or by srun with --ntasks-per-node."""

    rank: int = 0
    local: int = 1
    world: int = 1

    @classmethod
    def here(cls) -> Launch:
        """As the environment of this process says. `local` is how many there are on this node."""
        environment = os.environ
        if "TORCHELASTIC_RUN_ID" in environment:
            names = ("RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
            return cls(
                *(int(environment.get(name, default)) for name, default in zip(names, "011", strict=True))
            )
        if "SLURM_PROCID" in environment and "SLURM_NTASKS_PER_NODE" in environment:
            local = int(environment["SLURM_NTASKS_PER_NODE"])
            nodes = int(environment.get("SLURM_NNODES", "1"))
            return cls(int(environment["SLURM_PROCID"]), local, local * nodes)
        return cls()


@dataclass(frozen=True)
class Part:
    """One of `world` independent processes that share work without knowing each other: shards, or runs."""

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ConfigError(f"--rank {self.rank} --world {self.world}: rank must be 0 to world - 1")

    @classmethod
    def of(cls, rank: int | None, world: int | None) -> Part:
        """From the flags, else from SLURM (an array's tasks, or srun without --ntasks-per-node), else all of it.

        Raises ConfigError if only one flag is given or the rank is out of range.
        """
        if (rank is None) != (world is None):
            raise ConfigError("--rank and --world belong together: give both or neither")
        if rank is not None and world is not None:
            return cls(rank, world)
        slurm = {name: os.environ.get(f"SLURM_{name}", "") for name in _SLURM}
        try:
            if slurm["ARRAY_TASK_COUNT"]:
                first, step = int(slurm["ARRAY_TASK_MIN"] or 0), int(slurm["ARRAY_TASK_STEP"] or 1)
                return cls((int(slurm["ARRAY_TASK_ID"]) - first) // step, int(slurm["ARRAY_TASK_COUNT"]))
            # sbatch's own script has no step
            by_srun = slurm["STEP_ID"] and not slurm["NTASKS_PER_NODE"]
            if by_srun and slurm["PROCID"] and slurm["NTASKS"]:
                return cls(int(slurm["PROCID"]), int(slurm["NTASKS"]))
        except ValueError:
            raise ConfigError("SLURM's variables name no part: give --rank and --world") from None
        return cls()

    def owns(self, number: int) -> bool:
        return number % self.world == self.rank


WHOLE = Part()
_SLURM = (
    "ARRAY_TASK_STEP",
    "ARRAY_TASK_COUNT",
    "ARRAY_TASK_MIN",
    "ARRAY_TASK_ID",
    "STEP_ID",
    "PROCID",
    "NTASKS",
    "NTASKS_PER_NODE",
)


def _opened(file: Path) -> IO[str]:
    """A lock file, made if need be. Raises OSError for a link, or for what is no file: a FIFO would be waited for."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    handle = os.open(file, flags, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not a regular file", str(file))
    return os.fdopen(handle, "a")


@contextmanager
def locked(file: Path, fabric: Fabric) -> Iterator[bool]:
    """Whether this process has the lock, which rank 0 takes for all of its `fabric`; it ends with its process.

    If the folder's file system knows no locks, everybody has it.
    """
    mine, handle = True, None
    if fabric.is_global_zero:
        with writing_to(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            handle = _opened(file)
        _held.add(handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mine = False
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
                raise write_error(error, file) from error
    try:
        yield bool(fabric.broadcast(mine))
    finally:
        if handle is not None:
            _held.discard(handle)
            handle.close()


_held: set[IO[str]] = set()
"""Files of this process's locks."""


def _close_in_child() -> None:
    """A lock lasts while any process has its file open, and data-loader workers outlive a killed parent for seconds."""
    while _held:
        _held.pop().close()


os.register_at_fork(after_in_child=_close_in_child)
