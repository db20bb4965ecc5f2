"""What an explanation adds to a student's training step: ratios to a KD step of the same student. Give it an empty
machine.

OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.step                  about 4 minutes, without torch.compile
OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.step --compile        and 1 to 3 minutes more for each row
python -m benchmarks.step --models bcos/resnet18 --px 224 --batch 8       one row
python -m benchmarks.step --convolutions                                  the part that no compiler can remove (CPU)

A step is forward, losses, backward and Adam, on random images with a random teacher's answers already in memory. The
kinds of a row take turns, `rounds` times, and each is represented by its best. "Every 16th" is the mean of 15 steps
without and one with an explanation. Takes the accelerator where there is one, else the CPU.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from lightning_fabric import Fabric

from pipeline import explain as explainers
from pipeline.config import ModelConfig, StudentConfig
from pipeline.config.models import explained_by
from pipeline.data.batches import Targets
from pipeline.devices import start
from pipeline.distill.compile import CompiledLosses
from pipeline.distill.losses import LossTerms, Terms
from pipeline.distill.step import loss_terms
from pipeline.models import build

CLASSES, EVERY = 10, 16
BARS = {"gradcam": ("1.05", ""), "bcos": ("2.2", "1.3")}


class Case(NamedTuple):
    model: str
    px: int
    batch: int


DEFAULT = (
    Case("toy/resnet", 48, 64),
    Case("torchvision/resnet18", 64, 32),
    Case("torchvision/resnet18", 224, 8),
    Case("bcos/small", 48, 64),
    Case("bcos/resnet18", 64, 32),
    Case("bcos/resnet18", 224, 4),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", help="of the default rows, or with --px any that e2kd knows")
    parser.add_argument("--px", type=int, nargs="*", help="image sizes")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: the process's own time, for a busy machine (one thread, no accelerator)",
    )
    parser.add_argument("--convolutions", action="store_true", help="instead, their share of the steps")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    options = parser.parse_args()
    fabric = start(options.precision)
    device = fabric.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    print(
        f"\n{name}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, {options.precision}, "
        f"best of {options.rounds} rounds, {options.clock} clock; {date.today()}\n"
    )
    if options.convolutions:
        print(
            "| student | px | batch | convolutions of a KD step | of a step with explanation, in KD steps |"
        )
        print("|---|---|---|---|---|", flush=True)
        for case in _cases(options):
            print(_convolutions(case, options, fabric), flush=True)
        return
    print(
        "| student | px | batch | KD, ms | + explanation | bar | compiled | bar | compiled KD | every 16th |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for case in _cases(options):
        print(_row(case, options, fabric), flush=True)


def _cases(options: argparse.Namespace) -> list[Case]:
    if options.models and options.px:
        return [Case(m, px, options.batch or 16) for m in options.models for px in options.px]
    return [
        case._replace(batch=options.batch or case.batch)
        for case in DEFAULT
        if case.model in (options.models or [case.model]) and case.px in (options.px or [case.px])
    ]


def _row(case: Case, options: argparse.Namespace, fabric: Fabric) -> str:
    kinds = _steps(case, options, fabric)
    for step in kinds.values():
        step()  # warm, and compiled
    best = in_turns(kinds, options.rounds, _clock(options.clock, fabric))
    kd = best["kd"]
    ratio = {kind: f"{seconds / kd:.2f}x" for kind, seconds in best.items()}
    explainer = explained_by(case.model)
    every = ((EVERY - 1) * kd + best["eager"]) / EVERY / kd
    cells = [
        case.model,
        case.px,
        case.batch,
        f"{1e3 * kd:.1f}",
        ratio["eager"],
        f"<= {BARS[explainer][0]}x",
        ratio.get("compiled", "-"),
        f"<= {BARS[explainer][1]}x" if BARS[explainer][1] else "",
        ratio.get("compiled kd", "-"),
        f"{every:.3f}x",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _convolutions(case: Case, options: argparse.Namespace, fabric: Fabric) -> str:
    """CPU time of the convolutions, forward and backward, as shares of a whole KD step."""
    kinds = _steps(case, options, fabric)
    spent = {}
    for kind in ("kd", "eager"):
        kinds[kind]()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(options.rounds):
                kinds[kind]()
        events = profile.key_averages()
        convolutions = sum(event.self_cpu_time_total for event in events if "conv" in event.key)
        spent[kind] = convolutions, sum(event.self_cpu_time_total for event in events)
    whole = spent["kd"][1]
    shares = [f"{spent[kind][0] / whole:.2f}" for kind in ("kd", "eager")]
    return f"| {' | '.join(map(str, [*case, *shares]))} |"


def _steps(case: Case, options: argparse.Namespace, fabric: Fabric) -> dict[str, Callable[[], None]]:
    """Each kind of step with the same student, whose weights move on together."""
    torch.manual_seed(0)
    explainer = explainers.build("auto", build(ModelConfig(model=case.model), CLASSES)).train()
    height, width = explainer.map_size(case.px)
    wrapped, optimizer = fabric.setup(explainer, torch.optim.Adam(explainer.parameters(), lr=1e-5))
    device = fabric.device
    images = torch.rand(case.batch, 3, case.px, case.px, device=device)
    logits = torch.randn(case.batch, CLASSES, device=device)
    maps = torch.rand(case.batch, explainer.channels, height, width, device=device)
    teacher, labels = Targets(logits, logits.argmax(1), maps), logits.argmax(1)
    settings = StudentConfig(model=case.model, temperature=5, explanation_weight=5)
    eager = partial(loss_terms, settings)

    def step(losses: LossTerms, explain: bool) -> None:
        terms: Terms = losses(wrapped, images, labels, teacher, explain)
        loss = terms.logits
        if terms.explained is not None:
            loss = loss + settings.explanation_weight * terms.explained.loss
        optimizer.zero_grad(set_to_none=True)
        fabric.backward(loss)
        optimizer.step()

    kinds = {"kd": lambda: step(eager, False), "eager": lambda: step(eager, True)}
    if options.compile:
        compiled = CompiledLosses(eager, explainer, fabric, lambda line: print(line, file=sys.stderr))
        kinds |= {"compiled": lambda: step(compiled, True), "compiled kd": lambda: step(compiled, False)}
    return kinds


def in_turns(
    kinds: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Each kind's shortest time of `rounds`, in seconds; every round runs each kind once."""
    best = dict.fromkeys(kinds, float("inf"))
    for _ in range(rounds):
        for kind, step in kinds.items():
            started = clock()
            step()
            best[kind] = min(best[kind], clock() - started)
    return best


def _clock(which: str, fabric: Fabric) -> Callable[[], float]:
    def now() -> float:
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if which == "cpu" else time.perf_counter()

    return now


def _processor() -> str:
    """The CPU's own name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


if __name__ == "__main__":
    main()
