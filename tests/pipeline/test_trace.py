"""The way of one sample, hop by hop, as docs/design.md has it: the call stacks of a real command, captured."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from artifacts.writer import StoreWriter
from cli.main import main
from pipeline.config import Experiment
from pipeline.distill import losses, step
from pipeline.precompute import answer
from pipeline.workspace import Layout

Tiny = Callable[..., Experiment]
ROOT = Path(__file__).parents[2]
OURS = ("artifacts/", "pipeline/", "cli/")


def hops() -> list[str]:
    """`file:function` of every frame of ours on the stack, from the outside in."""
    frames = []
    for frame in traceback.extract_stack()[:-2]:
        name = Path(frame.filename)
        if name.is_relative_to(ROOT) and str(name.relative_to(ROOT)).startswith(OURS):
            frames.append(f"{name.relative_to(ROOT)}:{frame.name}")
    return frames


class Recorder:
    """Puts itself before a function and keeps the stack of its first call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        self.stacks: dict[str, list[str]] = {}

    def watch(self, owner: Any, name: str, label: str) -> None:
        real = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.stacks.setdefault(label, [*hops(), f"{_file(real)}:{name}"])
            return real(*args, **kwargs)

        self.patch.setattr(owner, name, watched)


def _file(function: Any) -> str:
    return str(Path(function.__code__.co_filename).relative_to(ROOT))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def documented(title: str) -> list[str]:
    """The numbered hops under a heading of docs/design.md."""
    text = (ROOT / "docs" / "design.md").read_text()
    section = re.search(rf"### {title}\n(.*?)(?=\n#)", text, re.S)
    assert section is not None, title
    return re.findall(r"^\d+\. `([^`]+)`", section[1], re.M)


def e2kd(
    monkeypatch: pytest.MonkeyPatch, prepared: Layout, experiment: Experiment, verb: str, *more: str
) -> None:
    config = prepared.root.parent / "tiny.yaml"
    config.write_text(yaml.safe_dump(experiment.model_dump(mode="json")))
    arguments = [verb, str(config), "--out", str(prepared.root), *more]
    monkeypatch.setattr("sys.argv", ["e2kd", *arguments])
    # it takes pytest's own file from under it
    monkeypatch.setattr("cli.main.name_output", lambda: None)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0


def test_the_way_to_the_loss(prepared: Layout, experiment_of: Tiny, recorder: Recorder) -> None:
    recorder.watch(losses, "kd_loss", "logits")
    recorder.watch(step, "explanation_loss", "maps")
    students = {"e2kd": {"explanation_weight": 5}}
    experiment = experiment_of(students=students, train__epochs=1, train__rows=32)
    e2kd(recorder.patch, prepared, experiment, "distill", "--no-report")
    for label in ("logits", "maps"):
        stack = recorder.stacks[label]
        assert len(stack) <= 10, stack
        loop = next(place for place, hop in enumerate(stack) if hop.endswith(":fit"))
        between = {hop.partition(":")[0] for hop in stack[loop:]}
        assert len(between) <= 6, between
    assert documented("Stage 2: to the loss") == recorder.stacks["logits"]


def test_the_way_into_the_store(prepared: Layout, experiment_of: Tiny, recorder: Recorder) -> None:
    recorder.watch(answer, "_ask", "asked")
    recorder.watch(StoreWriter, "finish", "finished")
    e2kd(recorder.patch, prepared, experiment_of(store__name="traced"), "precompute")
    assert len(recorder.stacks["asked"]) <= 10
    assert documented("Stage 1: to the teacher") == recorder.stacks["asked"]
