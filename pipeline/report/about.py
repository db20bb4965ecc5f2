"""What was run and what it cost: the facts around the scores."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from artifacts import ImageSet, TeacherStore
from artifacts.errors import E2kdError
from artifacts.names import file_name, flat
from pipeline.config import Experiment, StudentConfig
from pipeline.data.batches import batches_per_epoch
from pipeline.data.protocol import select_rows
from pipeline.report.document import Cell, Facts, Table
from pipeline.report.results import Method, Results
from pipeline.report.statistics import summarise
from pipeline.workspace import CODEC_COST, FREEZING_GAP

MIB = 2**20


def facts(results: Results) -> Facts:
    """Teacher, explainer, data, seeds, dates, versions, and what is missing."""
    experiment = results.experiment
    found = [
        ("teacher", _teacher(experiment)),
        ("explanation", f"{experiment.explainer} of the {experiment.explain.logit} logit"),
        ("data", _data(experiment)),
        ("seeds", ", ".join(map(str, experiment.seeds))),
        ("runs", _dates(results)),
        *_versions(results),
        *_measured(results),
    ]
    found += [(what, ", ".join(runs)) for what, runs in wanting(results) if runs]
    return Facts(found)


def wanting(results: Results) -> list[tuple[str, list[str]]]:
    """What this report lacks or cannot vouch for: what it is, and the runs."""
    return [
        ("not finished", results.missing()),
        ("not scored, run `e2kd evaluate`", results.unscored()),
        ("made with other settings than this config's", results.stale()),
        ("scored on other images or maps than there are now, run `e2kd evaluate`", results.rescored()),
        ("this config is not the one that stage 1 was made by", results.foreign()),
    ]


def settings_table(results: Results) -> Table:
    """The settings in which the methods differ; what all share is in config.yaml."""
    flat = [_in_use(results.settings(method)) for method in results.methods]
    every = dict.fromkeys(key for settings in flat for key in settings)
    # prior: null beside prior.method
    flat = [{key: value for key, value in settings.items() if value is not None} for settings in flat]
    differing = [key for key in every if len({str(settings.get(key)) for settings in flat}) > 1]
    shown = list(dict.fromkeys(("loss", "mode", "temperature", "explanation_weight", "epochs", *differing)))
    names = {"explanation_weight": "lambda", "temperature": "T"}
    rows = [
        [Cell(method.name), *(Cell(_value(settings.get(key))) for key in shown)]
        for method, settings in zip(results.methods, flat, strict=True)
    ]
    return Table("Settings", ["method", *(names.get(key, key) for key in shown)], rows)


def _in_use(settings: StudentConfig) -> dict[str, Any]:
    """A student's settings by dotted key, without those that its losses do not look at."""
    idle = {"mode"} if not settings.needs_teacher else set()
    idle |= {"temperature"} if settings.loss != "kd" else set()
    said = flat(settings.model_dump(mode="json")) | {"weights": file_name(settings.weights)}
    return {key: value for key, value in said.items() if key not in idle}


def run_costs(results: Results) -> Table:
    """Seconds of training and evaluation per run, and the teacher's forward passes that each method took."""
    rows = [_run_cost(results, method) for method in results.methods]
    head = ["method", "runs", "training s per run", "evaluation s per run", "teacher passes in training"]
    return Table("Time per run, and how often the teacher was asked", head, rows)


def store_costs(results: Results) -> Table | None:
    """What the teacher's answers take on disk, from the manifests; None if no split has a finished store."""
    rows = [
        [
            Cell(split),
            Cell(f"{len(store):,}"),
            *(Cell(f"{size / len(store):,.0f}") for size in _bytes(store)),
            Cell(f"{sum(_bytes(store)) / MIB:,.1f}"),
        ]
        for split, store in _stores(results)
    ]
    head = ["split", "images", "map bytes per image", "other bytes per image", "MiB in all"]
    return Table(f"Teacher store {results.experiment.store_name}", head, rows) if rows else None


def passes(results: Results) -> str:
    """How many forward passes of the teacher the store saved, in one sentence; nothing without a frozen student."""
    stored = sum(len(store) for _, store in _stores(results))
    frozen = [
        _presented(results, method) * len(results.results[method.name])
        for method in results.methods
        if _is_frozen(results.settings(method))
    ]
    asked = sum(count for count in frozen if count)
    if not asked:
        return ""
    return (
        f"The teacher was asked {stored:,} times for the store (once per image). With an online teacher, the frozen "
        f"runs above would have asked it {asked:,} times in training."
    )


def _teacher(experiment: Experiment) -> str:
    teacher = experiment.teacher
    guide = teacher.train.guide if teacher.train else None
    begun = f" from {file_name(teacher.train.init)}" if teacher.train and teacher.train.init else ""
    origin = f"weights {file_name(teacher.weights)}" if teacher.weights else f"trained here{begun}"
    guided = f", guided by {guide.by} ({guide.loss}, weight {guide.weight:g})" if guide else ""
    return f"{teacher.model}, {origin}{guided}"


def _data(experiment: Experiment) -> str:
    data = experiment.data.model_dump(mode="json", exclude_defaults=True)
    settings = ", ".join(
        f"{key} {_value(value)}" for key, value in data.items() if key not in ("source", "root", "cub")
    )
    view = f"{experiment.view.size} x {experiment.view.size} px"
    return f"{experiment.data.source}{f' ({settings})' if settings else ''}, canonical view {view}"


def _dates(results: Results) -> str:
    """Number of finished runs and the UTC days on which they finished."""
    files = [m.runs[seed].path / "done" for m in results.methods for seed in results.results[m.name]]
    days = sorted({_day(file) for file in files})
    return f"{len(files)} finished, {days[0]}" + (f" to {days[-1]} (UTC)" if len(days) > 1 else " (UTC)")


def _day(file: Path) -> str:
    return datetime.fromtimestamp(file.stat().st_mtime, UTC).strftime("%Y-%m-%d")


def _versions(results: Results) -> list[tuple[str, str]]:
    """Of the code and libraries that made the first store."""
    for _, store in _stores(results):
        versions = store.manifest.versions
        return [("versions (stage 1)", ", ".join(f"{name} {version}" for name, version in versions.items()))]
    return []


def _measured(results: Results) -> Iterator[tuple[str, str]]:
    """What freezing and storing cost, as precompute measured it."""
    from pipeline.precompute.codec_cost import tell as tell_cost
    from pipeline.precompute.freezing_gap import tell as tell_gap

    measured = results.measured()
    for name, tell in ((FREEZING_GAP, tell_gap), (CODEC_COST, tell_cost)):
        if measured[name]:
            what, _, told = tell(measured[name]).partition(": ")
            yield what, told


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return " to ".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _run_cost(results: Results, method: Method) -> list[Cell]:
    found = results.results[method.name]
    seconds = [result.get("seconds", {}) for result in found.values()]
    return [
        Cell(method.name),
        Cell(str(len(found))),
        *(Cell(_mean([s[part] for s in seconds if part in s])) for part in ("train", "evaluate")),
        Cell(_asked(results, method)),
    ]


def _mean(seconds: list[float]) -> str:
    return f"{summarise(seconds).mean:.1f}" if seconds else ""


def _asked(results: Results, method: Method) -> str:
    """Teacher's forward passes per run: none from a store, one per presented image online."""
    settings = results.settings(method)
    presented = _presented(results, method)
    if not settings.needs_teacher:
        return "none (no teacher)"
    return "none (store)" if settings.mode == "frozen" else f"{presented:,}" if presented else "1 per image"


def _presented(results: Results, method: Method) -> int:
    """Images shown in one run: full batches x epochs; 0 if the image set is not there."""
    settings = results.settings(method)
    try:
        images: ImageSet = results.workspace.open_images(settings.split)
    except E2kdError:
        return 0
    rows = len(select_rows(images.labels, settings.rows, settings.shots))
    size = min(settings.batch_size, rows)
    return batches_per_epoch(rows, size, 1) * size * settings.epochs if rows else 0


def _is_frozen(settings: StudentConfig) -> bool:
    return settings.needs_teacher and settings.mode == "frozen"


def _stores(results: Results) -> Iterator[tuple[str, TeacherStore]]:
    """The finished stores of the experiment's splits."""
    for split in results.experiment.answered_splits:
        try:
            yield split, results.workspace.open_store(split)
        except E2kdError:
            continue


def _bytes(store: TeacherStore) -> tuple[int, int]:
    """Of the maps with their scales, and of everything else."""
    sizes = {"maps": 0, "other": 0}
    for shard in store.manifest.shards:
        for name, record in shard.arrays.items():
            sizes["maps" if name.startswith("map") else "other"] += record.bytes
    return sizes["maps"], sizes["other"]
