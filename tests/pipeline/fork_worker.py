"""Started by test_kill.py. Imports torch once; each line of JSON it is sent is carried out by processes forked from it.

It never runs an operator itself, so that the forked processes begin as fresh ones do.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from conftest import tiny  # noqa: E402
from lightning_fabric import Fabric  # noqa: E402

from cli.main import run_guarded  # noqa: E402
from pipeline.config import Experiment  # noqa: E402
from pipeline.devices import start  # noqa: E402
from pipeline.order.prepare import prepare_stores  # noqa: E402
from pipeline.precompute import answer as module  # noqa: E402
from pipeline.progress import Quiet  # noqa: E402
from pipeline.sharing import Part  # noqa: E402
from pipeline.workspace import Layout, Workspace  # noqa: E402

Asked = Callable[[range], None]
LONGEST = 120  # seconds; then SIGALRM ends a process that hangs


class Lines(Quiet):
    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def precompute(root: Path, fabric: Fabric, changes: dict[str, Any], part: Part, asked: Asked) -> None:
    """`e2kd precompute`, which tells the row ranges that the teacher is asked for."""
    real = module._ask

    def told(explainer: Any, pixels: Any, rows: range, *more: Any) -> Any:
        asked(rows)
        return real(explainer, pixels, rows, *more)

    module._ask = told
    experiment: Experiment = tiny(**changes)
    prepare_stores(Workspace(experiment, Layout(root), fabric, Lines()), part)


def write_to_a_full_disk(name: str) -> None:
    """What is written to the partial file of the object `name` goes to /dev/full from now on."""
    real = Path.open

    def opened(path: Path, mode: str = "r", *more: Any, **named: Any) -> Any:
        full = mode != "rb" and path.as_posix().endswith(f"/{name}.partial")
        return real(Path("/dev/full") if full else path, mode, *more, **named)

    Path.open = opened  # type: ignore[method-assign,assignment]


def child(order: dict[str, Any], number: int, fabric: Fabric, said: int, log: int) -> None:
    """Run the command as the console script does, and end."""
    signal.alarm(LONGEST)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(said, 1)
    os.dup2(said, 2)

    def asked(rows: range) -> None:
        os.write(log, f"{rows.start} {rows.stop}\n".encode())
        if order["file_bytes"] and rows.start >= order["limit_from"]:  # a longer file is an EFBIG
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"], resource.RLIM_INFINITY))

    def command() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        precompute(Path(order["root"]), fabric, order["changes"], Part(*order["parts"][number]), asked)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])

    if order["full"]:
        write_to_a_full_disk(order["full"])
    code = 1
    try:
        code = run_guarded(command)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def carry_out(order: dict[str, Any], fabric: Fabric) -> list[dict[str, Any]]:
    """Start one process per part at once; send the first one a signal at its moment; wait for all."""
    began, running, ended = time.monotonic(), {}, {}
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # until the command runs
    for number in range(len(order["parts"])):
        pipes = os.pipe(), os.pipe()  # what is written there survives, and fills no disk
        process = os.fork()
        if not process:
            child(order, number, fabric, *(write for _, write in pipes))
        for _, write in pipes:
            os.close(write)
        running[process] = number, [read for read, _ in pipes]
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    if order["signal"]:
        first = min(running)
        while order["once"] and not Path(order["once"]).exists():
            if os.waitid(os.P_PID, first, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.001)
        time.sleep(order["after"])
        os.kill(first, order["signal"])
    while running:
        process, status = os.wait()
        number, ends = running.pop(process)
        texts = []
        for end in ends:
            with open(end) as pipe:
                texts.append(pipe.read())
        ended[number] = {
            "code": os.waitstatus_to_exitcode(status),
            "seconds": time.monotonic() - began,
            "said": texts[0],
            "asked": [[int(n) for n in line.split()] for line in texts[1].splitlines()],
        }
    return [ended[number] for number in sorted(ended)]


def main() -> None:
    torch.set_num_threads(1)
    fabric = start()
    if len(sys.argv) > 1:  # under torchrun: one joint run
        root, changes = sys.argv[1:]
        with open(f"{root}.asked-{fabric.global_rank}", "w", buffering=1) as file:
            print("pid", os.getpid(), file=file)
            precompute(Path(root), fabric, json.loads(changes), Part(), lambda rows: print(*rows, file=file))
        return
    for line in sys.stdin:
        print(json.dumps(carry_out(json.loads(line), fabric)), flush=True)


if __name__ == "__main__":
    main()
