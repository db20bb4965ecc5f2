"""Started by test_distributed.py, plainly or by torchrun: precompute and distil, and write the step losses down."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

from conftest import tiny  # noqa: E402

from pipeline.devices import start  # noqa: E402
from pipeline.distill import run as module  # noqa: E402
from pipeline.order.prepare import prepare_stores  # noqa: E402
from pipeline.training.loop import StepLoss  # noqa: E402
from pipeline.workspace import Layout, Workspace  # noqa: E402


def main(root: Path, student: str) -> None:
    torch.set_num_threads(1)
    slow = {
        "train__lr": 5e-4
    }  # at larger rates a kink (relu, a map that dies) makes 1e-4 of rounding noise, by chance
    experiment = tiny(train__epochs=5, train__validate_every=5, **slow)
    layout, fabric = Layout(root), start()
    prepare_stores(Workspace(experiment, layout, fabric))

    losses: list[float] = []
    real = module.StudentStep.__call__

    def recorded(self: module.StudentStep, *args: object) -> StepLoss:
        values = real(self, *args)  # type: ignore[arg-type]
        losses.append(float(fabric.all_reduce(values.total.detach(), reduce_op="mean")))
        return values

    module.StudentStep.__call__ = recorded  # type: ignore[method-assign]
    module.distill(Workspace(experiment, layout, fabric), student, 0)
    if fabric.is_global_zero:
        (root / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
