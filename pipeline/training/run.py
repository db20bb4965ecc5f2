"""One training run's folder: `config.yaml`, `metrics.jsonl`, checkpoints, `result.json`, and `done` last.

A run that is interrupted continues; one that is done is left alone; one that was started with other settings is
never mixed with new ones.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning_fabric import Fabric

from artifacts.access import reading_from, writing_to
from artifacts.durable import write_atomic
from artifacts.errors import CheckpointError, ConfigError
from artifacts.names import flat, shown
from pipeline.config import Experiment, ExplainConfig, StudentConfig, TeachConfig, TeacherConfig
from pipeline.config.text import json_of, yaml_of
from pipeline.config.written import Line, Result, check
from pipeline.data.reading.regular import regular_size
from pipeline.models.weights import NotSaved, saved_by_torch
from pipeline.sharing import locked

MOST_TEXT = 2**26
"""Bytes of a run's file that is read as text."""


class Run:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def done(self) -> bool:
        """Finished and scored; if `result.json` is gone, the run is scored again, from its checkpoint."""
        return (self.path / "done").exists() and (self.path / "result.json").exists()

    @property
    def diverged(self) -> str | None:
        """Why the run ended without a result, for the settings that it was begun with; None if it did not."""
        file = self.path / "diverged"
        return self._text("diverged") if file.exists() else None

    @property
    def _begun(self) -> bool:
        return any((self.path / name).exists() for name in ("done", "state.pt"))

    def open(self, settings: dict[str, Any], defaults: dict[str, Any] | None = None) -> None:
        """Begin or continue the run. Raises ConfigError if it was begun with other settings.

        `defaults`: of settings that the run's own file does not name, since they are newer than the run.
        """
        text = yaml.safe_dump(settings, sort_keys=False, width=100)
        known = self.path / "config.yaml"
        if not self._begun or not known.exists():
            with writing_to(self.path / "diverged"):
                self.path.mkdir(parents=True, exist_ok=True)
                if not known.exists() or self._text("config.yaml") != text:
                    (self.path / "diverged").unlink(missing_ok=True)
            write_atomic(known, text.encode())
            return
        old = flat(defaults or {}) | flat(self._settings())
        new = flat(yaml.safe_load(text))
        self._refuse({key: (old.get(key), new.get(key)) for key in {**old, **new}})

    def differing(self, settings: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Dotted key -> (run's value, value in `settings`) if they differ; keys that only one of them has are left
        out. Nothing if the run was not begun."""
        known = self.path / "config.yaml"
        if not self._begun or not known.exists():
            return {}
        old, new = flat(self._settings()), flat(yaml.safe_load(yaml.safe_dump(settings)))
        return {key: (old[key], new[key]) for key in old if key in new and old[key] != new[key]}

    def _settings(self) -> Any:
        """What the run was begun with. Raises CheckpointError if the file is damaged."""
        file = self.path / "config.yaml"
        try:
            settings = yaml_of(self._text("config.yaml"))
            if not isinstance(settings, dict):
                raise yaml.YAMLError
            return settings
        except (yaml.YAMLError, UnicodeDecodeError):
            raise CheckpointError(
                f"{file} is damaged; delete the run and train it again: rm -r {self.path}", path=file
            ) from None

    def _text(self, name: str) -> str:
        """Raises CheckpointError if the file may not be read."""
        with reading_from(self.path / name, CheckpointError):
            size = regular_size(self.path / name)
            if size > MOST_TEXT:
                raise CheckpointError(
                    f"{self.path / name} has {size:,} bytes, {MOST_TEXT:,} at most are read; delete the run and "
                    "train it again",
                    path=self.path / name,
                )
            return (self.path / name).read_text()

    def check(self, settings: dict[str, Any]) -> None:
        """Raises ConfigError if the run was begun with other values of these settings."""
        self._refuse(self.differing(settings))

    def _refuse(self, pairs: dict[str, tuple[Any, Any]]) -> None:
        differing = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
        if differing:
            lines = "\n".join(
                f"  {key}: run {shown(old)}, config {shown(new)}" for key, (old, new) in differing.items()
            )
            raise ConfigError(
                f"{self.path} was made with other settings:\n{lines}\n"
                f"keep it and use another folder (--out DIR), or delete it: rm -r {self.path}",
                path=self.path,
                fields=differing,
            )

    @contextmanager
    def lock(self, fabric: Fabric) -> Iterator[bool]:
        """Whether the run is this process's (with the others of its `fabric`) alone: see `locked`."""
        with locked(self.path / "lock", fabric) as mine:
            yield mine

    def write(self, name: str, data: bytes) -> None:
        write_atomic(self.path / name, data)

    def log(self, lines: Sequence[dict[str, Any]]) -> None:
        """Append lines to metrics.jsonl."""
        file = self.path / "metrics.jsonl"
        with writing_to(file), file.open("a") as opened:
            opened.write("".join(json.dumps(values) + "\n" for values in lines))

    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, one per epoch."""
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return []
        try:
            lines = self._text("metrics.jsonl").splitlines()
            return [check(json_of(line), Line) for line in lines if line.endswith("}")]
        except ValueError:
            raise CheckpointError(
                f"{file} is damaged; delete the run and train it again: rm -r {self.path}", path=file
            ) from None

    def forget_after(self, epochs: int) -> None:
        """Drop log lines of epochs that were not checkpointed (they are trained again)."""
        kept = [line for line in self.history() if line["epoch"] < epochs]
        self.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept).encode())

    def save_state(self, state: dict[str, Any]) -> None:
        """The checkpoint, in one file, so that it is old or new and never half of each."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.write("state.pt", buffer.getvalue())

    def load_state(self) -> dict[str, Any] | None:
        file = self.path / "state.pt"
        if not file.exists():
            return None
        try:
            with reading_from(file, CheckpointError):
                regular_size(file)
                state = saved_by_torch(file)
            _check_state(state)
        except NotSaved:
            raise CheckpointError(
                f"{file} is damaged; delete the run and train it again: rm -r {self.path}", path=file
            ) from None
        return state

    def finish(self, result: dict[str, Any]) -> None:
        self.write("result.json", (json.dumps(result, indent=2) + "\n").encode())
        self.write("done", b"")

    def result(self) -> dict[str, Any]:
        """Raises CheckpointError if the file is damaged."""
        file = self.path / "result.json"
        try:
            loaded = check(json_of(self._text("result.json")), Result)
            if not loaded:
                raise ValueError(file)
            loaded.setdefault("splits", {})
        except ValueError:
            raise CheckpointError(
                f"{file} is damaged; delete it, then `e2kd distill CONFIG` scores the run again: rm {file}",
                path=file,
            ) from None
        return loaded


def _check_state(state: Any) -> None:
    """Raises NotSaved if it is none of `save_state`'s: the values' types, not yet their shapes."""
    types = {"module": dict, "optimizer": dict, "epochs_done": int, "best": float}
    if not isinstance(state, dict) or not all(
        isinstance(state.get(name), kind) for name, kind in types.items()
    ):
        raise NotSaved("no checkpoint of e2kd")


def run_settings(experiment: Experiment, student: str) -> dict[str, Any]:
    """What the config says of a student's weights; a run keeps it in its config.yaml."""
    return {
        "settings": experiment.candidates[student].settings.model_dump(mode="json"),
        "explain": experiment.explain.model_dump(mode="json"),
        "select": experiment.evaluate.select,
    }


def student_defaults(settings: StudentConfig) -> dict[str, Any]:
    """What `run_settings` were for runs begun before a setting existed: its default."""
    plain = StudentConfig(model=settings.model).model_dump(mode="json")
    return {"settings": plain, "explain": ExplainConfig().model_dump(mode="json")}


def teacher_defaults() -> dict[str, Any]:
    """The same for a taught teacher's run."""
    train = TeachConfig().model_dump(mode="json")
    return {"teacher": {**TeacherConfig(model="", weights="").model_dump(mode="json"), "train": train}}
