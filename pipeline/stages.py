"""The order of the stages: pack -> teach -> precompute -> distill. Each does what is missing and nothing twice."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_fabric import Fabric

from artifacts import open_images
from artifacts.durable import write_atomic
from pipeline.config import Experiment, dump
from pipeline.distill import distill, evaluate_student
from pipeline.launch import Part, start
from pipeline.layout import Layout
from pipeline.pack import pack
from pipeline.precompute import WHOLE, measure, precompute
from pipeline.progress import Progress
from pipeline.run import Run
from pipeline.teach import teach


def prepare_teacher(experiment: Experiment, layout: Layout, fabric: Fabric, progress: Progress) -> None:
    """Pack what is not packed (rank 0) and train the teacher where the config asks for one."""
    if fabric.is_global_zero:
        pack(experiment, layout, progress)
    fabric.barrier()
    if experiment.teacher.train:
        teach(experiment, layout, fabric, progress)


def prepare_stores(
    experiment: Experiment, layout: Layout, fabric: Fabric, progress: Progress, part: Part = WHOLE
) -> bool:
    """Stage 1 for every split that students train on or are scored on. False while other parts are not done.

    Independent parts do not pack or teach: that is done once, before them. Raises ImageSetError or ModelError
    where it was not.
    """
    if part == WHOLE:
        prepare_teacher(experiment, layout, fabric, progress)
    if fabric.is_global_zero:
        write_atomic(layout.config, dump(experiment).encode())
    stores = [
        precompute(experiment, layout, split, open_images(layout.images(split)), fabric, progress, part)
        for split in experiment.answered_splits
    ]
    complete = None not in stores
    if complete:
        measure(experiment, layout, fabric, progress)
    return complete


def distill_all(
    experiment: Experiment,
    layout: Layout,
    fabric: Fabric,
    progress: Progress,
    students: Sequence[str],
    seeds: Sequence[int],
) -> None:
    """Stage 2 for students x seeds. Finished runs are left alone."""
    prepare_stores(experiment, layout, fabric, progress)
    runs = [(name, seed) for seed in seeds for name in students]
    for name, seed in runs:
        distill(experiment, layout, start(experiment.students[name].precision), name, seed, progress)
    progress.say(f"{len(runs)} runs are done in {layout.runs}")


def evaluate_all(experiment: Experiment, layout: Layout, fabric: Fabric, progress: Progress) -> None:
    """Write result.json of every finished run again."""
    for seed in experiment.seeds:
        for name in experiment.students:
            run = Run(layout.run(name, seed))
            if run.done:
                result = evaluate_student(experiment, layout, fabric, name, seed)
                result["seconds"] = run.result()["seconds"]
                if fabric.is_global_zero:
                    run.finish(result)
                progress.say(f"evaluated {name} seed {seed}")
