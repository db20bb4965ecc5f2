"""Several runs at once on one machine: one process each of the same command line, a line's prefix says whose it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType

from artifacts.errors import E2kdError, JobsFailed
from pipeline.progress import Progress

Job = tuple[str, int]
"""Student, seed."""


def run_jobs(
    jobs: Sequence[Job], command: Sequence[str], count: int, progress: Progress
) -> list[tuple[Job, int]]:
    """Run `command --student S --seed K --no-report` for every job, `count` at a time. Returns those that failed, with
    their exit codes (-9: killed by signal 9).

    The machine's cores are divided among them, and its GPUs (CUDA_VISIBLE_DEVICES) taken in turn. If this process is
    interrupted (Ctrl-C) or told to end (SIGTERM, SIGHUP) all are stopped, and KeyboardInterrupt goes on.
    """
    processes = _Processes(command, count, progress)
    with _interrupting(), ThreadPoolExecutor(count) as pool:
        try:
            futures = [pool.submit(processes.run, job) for job in jobs]
            codes = [future.result() for future in futures]
        except BaseException:
            processes.stop()
            raise
    return [(job, code) for job, code in zip(jobs, codes, strict=True) if code != 0]


def check(failed: Sequence[tuple[Job, int]]) -> None:
    """Raises JobsFailed if any job failed: what `run_jobs` returned, of one call or several.

    The command line ends with the error's exit code, so that a bug in a job is a bug in the whole.
    """
    if failed:
        names = ", ".join(f"{name} seed {seed} (exit code {code})" for (name, seed), code in failed)
        raise JobsFailed(
            f"failed: {names}; what they said is above, the other runs are kept", codes=dict(failed)
        )


@contextmanager
def _interrupting() -> Iterator[None]:
    """`kill`, `timeout`, a container's stop and a closed terminal interrupt as Ctrl-C does: they reach this process
    alone, and by their default would leave the jobs running without it. A signal that is ignored (nohup) stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    taken = {number: old for number, old in before.items() if old == signal.SIG_DFL}
    try:
        for number in taken:
            signal.signal(number, _interrupt)
        yield
    finally:
        for number, old in taken.items():
            signal.signal(number, old)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def this_command(arguments: Sequence[str]) -> list[str]:
    """The command line of another e2kd process, which runs no Python file of the current folder (`-P`)."""
    return [sys.executable, "-P", "-m", "cli", *arguments]


class _Processes:
    """The running ones. Its methods are called from several threads."""

    def __init__(self, command: Sequence[str], count: int, progress: Progress) -> None:
        self.command, self.count, self.progress = command, count, progress
        self.free = devices(count)
        self.lock = threading.Lock()
        self.running: set[subprocess.Popen[str]] = set()
        self.stopped = False

    def run(self, job: Job) -> int:
        """Run one to its end. Returns its exit code."""
        with self.lock:
            if self.stopped:
                raise E2kdError("stopped before it began")
            device = self.free.pop(0)
            process = self._begin(job, device)
            self.running.add(process)
        # the block closes its output and waits
        with process:
            for line in process.stdout or ():
                self._say(job, line.rstrip())
        with self.lock:
            self.running.discard(process)
            self.free.append(device)
        return process.returncode

    def stop(self) -> None:
        """End all that run and begin no more; what they have finished is kept."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.terminate()

    def _begin(self, job: Job, device: str | None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command, "--student", job[0], "--seed", str(job[1]), "--no-report"],
            env=environment(os.environ, self.count, device),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )

    def _say(self, job: Job, line: str) -> None:
        with self.lock:
            self.progress.say(f"[{job[0]} seed {job[1]}] {line}")


def devices(count: int) -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES is for each of `count` jobs: the GPUs in turn; None if there is no GPU."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return [names[i % len(names)] if names else None for i in range(count)]


def environment(own: Mapping[str, str], count: int, device: str | None) -> dict[str, str]:
    """A job's: its share of the cores that this process may use, its GPU, and lines as they are written.

    A smaller OMP_NUM_THREADS of the user's own stays: the cores may be shared with other work.
    """
    threads = max(_cores() // count, 1)
    asked = own.get("OMP_NUM_THREADS", "")
    threads = min(threads, int(asked)) if asked.isdecimal() and int(asked) else threads
    jobs_own = {**own, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    return jobs_own if device is None else jobs_own | {"CUDA_VISIBLE_DEVICES": device}


def _cores() -> int:
    """Of this process: a cluster gives a job fewer than the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    # not on macOS
    except AttributeError:
        return os.cpu_count() or 1
