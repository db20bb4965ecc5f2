"""Several runs at once on one machine: one process each of the same command line, a line's prefix says whose it is."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.progress import Progress

Job = tuple[str, int]
"""Student, seed."""


def run_jobs(
    jobs: Sequence[Job], command: Sequence[str], count: int, progress: Progress
) -> list[tuple[Job, int]]:
    """Run `command --student S --seed K --no-report` for every job, `count` at a time. Returns those that failed, with
    their exit codes.

    The machine's cores are divided among them, and its GPUs (CUDA_VISIBLE_DEVICES) taken in turn. Where this process is
    interrupted (Ctrl-C) all are stopped, and KeyboardInterrupt goes on.
    """
    running: set[subprocess.Popen[str]] = set()
    free = _devices(count)
    lock = threading.Lock()

    def run(job: Job) -> int:
        with lock:
            device = free.pop(0)
        line = [*command, "--student", job[0], "--seed", str(job[1]), "--no-report"]
        process = subprocess.Popen(
            line, env=_environment(count, device), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        running.add(process)
        assert process.stdout is not None
        for text in process.stdout:
            progress.say(f"[{job[0]} seed {job[1]}] {text.rstrip()}")
        code = process.wait()
        running.discard(process)
        with lock:
            free.append(device)
        return code

    with ThreadPoolExecutor(count) as pool:
        futures = {job: pool.submit(run, job) for job in jobs}
        try:
            return [(job, future.result()) for job, future in futures.items() if future.result() != 0]
        except BaseException:
            for future in futures.values():
                future.cancel()
            for process in list(running):
                process.terminate()
            raise


def this_command(arguments: Sequence[str]) -> list[str]:
    """The command line of another e2kd process."""
    return [sys.executable, "-m", "cli", *arguments]


def _devices(count: int) -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES is for each of `count` jobs; None where there is no GPU."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return [device for _, device in zip(range(count), _in_turns(names), strict=False)]


def _in_turns(names: Sequence[str]) -> Iterator[str | None]:
    nothing: list[str | None] = [None]
    while True:
        yield from names or nothing


def _environment(count: int, device: str | None) -> dict[str, str]:
    threads = max((os.cpu_count() or 1) // count, 1)
    found = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    return found if device is None else found | {"CUDA_VISIBLE_DEVICES": device}
