"""`make bench`: the wall-clock figures that the README states. Prints a table; give it an empty machine.

make bench                                  everything, about 10 minutes on two cores
.venv/bin/python -m benchmarks.main --seeds 1
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

E2KD = [sys.executable, "-P", "-m", "cli"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/toybirds.yaml")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], help="as e2kd's; repeatable")
    options = parser.parse_args()
    rows: list[tuple[str, float, str]] = [
        ("e2kd --help (best of 5)", min(_time(["--help"]) for _ in range(5)), "0.4")
    ]
    with tempfile.TemporaryDirectory() as folder:
        common = [options.config, "--out", folder, "--set", f"seeds={list(range(options.seeds))}"]
        common += [part for override in options.set for part in ("--set", override)]
        rows.append(("pack", _time(["pack", *common]), ""))
        rows.append(("teach", _time(["teach", *common]), "150"))
        rows.append(("precompute (with the freezing gap)", _time(["precompute", *common]), "15"))
        rows.append(("distill, evaluate, report", _time(["distill", *common]), ""))
        slowest = max(_seconds(file) for file in Path(folder).glob("runs/*/*/result.json"))
        rows.append(("slowest student, training", slowest, "60"))
        rows.append(("distill again (all is done)", _time(["distill", *common]), "15"))
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    print(
        f"\n{options.config}, {options.seeds} seeds; {platform.machine()}, {threads} threads; {date.today()}\n"
    )
    print("| what | seconds | at most |\n|---|---|---|")
    for what, seconds, limit in rows:
        print(f"| {what} | {seconds:.2f} | {limit} |")


def _time(arguments: list[str]) -> float:
    started = time.monotonic()
    subprocess.run([*E2KD, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def _seconds(result: Path) -> float:
    seconds: float = json.loads(result.read_text())["seconds"]["train"]
    return seconds


if __name__ == "__main__":
    main()
