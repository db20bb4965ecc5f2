"""The order of the stages: pack -> teach -> precompute -> distill. Each does what is missing and nothing twice."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from lightning_fabric import Fabric

from artifacts import open_images
from artifacts.durable import write_atomic
from artifacts.errors import ConfigError, E2kdError
from pipeline.config import Experiment, dump
from pipeline.data.pack import pack
from pipeline.devices import Part, start
from pipeline.distill.run import distill
from pipeline.evaluate.students import evaluate_student, scored_elsewhere
from pipeline.order.jobs import Job, run_jobs, this_command
from pipeline.precompute.answer import WHOLE, measure, precompute
from pipeline.progress import Progress
from pipeline.teach.run import teach
from pipeline.training.choice import DEFAULT_SCORES, Choice, Method, chosen, is_swept, methods
from pipeline.training.loop import Diverged
from pipeline.training.run import Run, locked, run_settings
from pipeline.workspace import Layout


def prepare_teacher(experiment: Experiment, layout: Layout, fabric: Fabric, progress: Progress) -> None:
    """Pack what is not packed (rank 0) and train the teacher where the config asks for one."""
    with _alone(layout, fabric, progress):
        _prepare_teacher(experiment, layout, fabric, progress)


def _prepare_teacher(experiment: Experiment, layout: Layout, fabric: Fabric, progress: Progress) -> None:
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
    where it was not. The whole of it is one process's at a time: a second one waits, and finds it done.
    """
    with _alone(layout, fabric, progress) if part == WHOLE else nullcontext():
        if part == WHOLE:
            _prepare_teacher(experiment, layout, fabric, progress)
        stores = [
            precompute(experiment, layout, split, open_images(layout.images(split)), fabric, progress, part)
            for split in experiment.answered_splits
        ]
        if fabric.is_global_zero:
            write_atomic(layout.config, dump(experiment).encode())
        complete = None not in stores
        if complete:
            measure(experiment, layout, fabric, progress)
        return complete


@contextmanager
def _alone(layout: Layout, fabric: Fabric, progress: Progress) -> Iterator[None]:
    """Waits while another process is at stage 1 of the same experiment."""
    waited = False
    while True:
        with locked(layout.root / "stage-1.lock", fabric) as mine:
            if mine:
                yield
                return
        if not waited:
            progress.say(f"another process packs, teaches or precomputes in {layout.root}; waiting for it")
            waited = True
        time.sleep(_POLL_SECONDS)


_POLL_SECONDS = 0.5


def distill_all(
    experiment: Experiment,
    layout: Layout,
    fabric: Fabric,
    progress: Progress,
    students: Sequence[str],
    seeds: Sequence[int],
    part: Part = WHOLE,
) -> None:
    """Stage 2 for students x seeds, of a sweep's other seeds the chosen candidates only. Finished runs are left alone.

    Of several independent processes each takes every `part.world`-th run; a run that another one is working on is left
    to it. Raises ConfigError where a sweep cannot be decided, and, before anything is written, where a run was begun
    with other settings; Diverged, after all others, where runs diverged that are not a sweep's candidates.
    """
    _check_begun(experiment, layout, students, seeds)
    prepare_stores(experiment, layout, fabric, progress)
    _score_again(experiment, layout, fabric, progress, students, seeds)
    first = _compared_runs(experiment, students, seeds)[part.rank :: part.world]
    busy, lost = _run_each(experiment, layout, progress, first)
    chosen_runs, waiting = _chosen_runs(experiment, layout, students, seeds)
    later = chosen_runs[part.rank :: part.world]
    more_busy, more_lost = _run_each(experiment, layout, progress, later)
    busy, lost = busy + more_busy, lost + more_lost
    if lost:
        names = ", ".join(f"{name} seed {seed}" for name, seed in lost)
        raise Diverged(f"diverged: {names}; why is above, the other runs are kept")
    _tell(experiment, layout, progress, [*first, *later], busy, waiting)


def distill_at_once(
    experiment: Experiment,
    layout: Layout,
    fabric: Fabric,
    progress: Progress,
    students: Sequence[str],
    seeds: Sequence[int],
    jobs: int,
    arguments: Sequence[str],
    part: Part = WHOLE,
) -> None:
    """As distill_all, `jobs` runs at a time, each a process of its own: `e2kd ARGUMENTS --student S --seed K`.

    Raises E2kdError that names the runs that failed, after all others are done.
    """
    if fabric.world_size > 1:
        raise ConfigError("--jobs starts processes of its own: use it without torchrun, or torchrun alone")
    _check_begun(experiment, layout, students, seeds)
    prepare_stores(experiment, layout, fabric, progress)
    _score_again(experiment, layout, fabric, progress, students, seeds)
    torch.cuda.empty_cache()  # the teacher's memory is the jobs' now
    command = this_command([*arguments, "--rank", "0", "--world", "1"])  # whatever SLURM's variables say
    first = _compared_runs(experiment, students, seeds)[part.rank :: part.world]
    failed = run_jobs(_unfinished(layout, first), command, jobs, progress)
    chosen_runs, waiting = _chosen_runs(experiment, layout, students, seeds)
    later = chosen_runs[part.rank :: part.world]
    failed += run_jobs(_unfinished(layout, later), command, jobs, progress)
    if failed:
        names = ", ".join(f"{name} seed {seed} (exit code {code})" for (name, seed), code in failed)
        raise E2kdError(f"failed: {names}; what they said is above, the other runs are kept")
    _tell(experiment, layout, progress, [*first, *later], _unfinished(layout, [*first, *later]), waiting)


def _check_begun(
    experiment: Experiment, layout: Layout, students: Sequence[str], seeds: Sequence[int]
) -> None:
    for seed in seeds:
        for name in students:
            Run(layout.run(name, seed)).check(run_settings(experiment, name))


def _score_again(
    experiment: Experiment,
    layout: Layout,
    fabric: Fabric,
    progress: Progress,
    students: Sequence[str],
    seeds: Sequence[int],
) -> None:
    """Finished runs whose splits have other images or another store now than when they were scored."""
    for name in students:
        for seed in seeds:
            run = Run(layout.run(name, seed))
            splits = scored_elsewhere(experiment, layout, run) if run.done else []
            if splits:
                progress.say(f"{name} seed {seed} is scored again: {', '.join(splits)} changed")
                _evaluate_again(experiment, layout, fabric, name, seed)


def _evaluate_again(experiment: Experiment, layout: Layout, fabric: Fabric, name: str, seed: int) -> None:
    run = Run(layout.run(name, seed))
    result = evaluate_student(experiment, layout, fabric, name, seed)
    result["seconds"] = run.result()["seconds"]
    if fabric.is_global_zero:
        run.finish(result)


def _unfinished(layout: Layout, runs: Sequence[Job]) -> list[Job]:
    return [(name, seed) for name, seed in runs if not Run(layout.run(name, seed)).done]


def _compared_runs(experiment: Experiment, students: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Every run that needs no choice before it, the first seed's first."""
    return [(name, seed) for seed in seeds for name in students if _compared(experiment, name, seed)]


def _chosen_runs(
    experiment: Experiment, layout: Layout, students: Sequence[str], seeds: Sequence[int]
) -> tuple[list[Job], list[str]]:
    """The chosen candidates' other seeds, and the sweeps that are not decided yet."""
    choices, runs, waiting = chosen(experiment, layout), [], []
    for method in methods(experiment):
        asked = [name for name in method.candidates if name in students]
        others = [seed for seed in seeds if asked and not _compared(experiment, asked[0], seed)]
        if others and method.name not in choices:
            waiting.append(method.name)
        elif others and _decided(experiment, method, choices[method.name]) in asked:
            runs += [(choices[method.name].student, seed) for seed in others]
    return sorted(runs, key=lambda run: seeds.index(run[1])), waiting


def _decided(experiment: Experiment, method: Method, choice: Choice) -> str:
    """The chosen student. Raises ConfigError where no candidate has the score that chooses."""
    if choice.score is None and len(method.candidates) > 1:
        wanted, split = experiment.evaluate.select_by, experiment.evaluate.select
        raise ConfigError(
            f"sweep.{method.name}: no run has {wanted or ' or '.join(DEFAULT_SCORES)} on {split}; set "
            "evaluate.select_by to a score that they have, then `e2kd evaluate` scores them again"
        )
    return choice.student


def _compared(experiment: Experiment, student: str, seed: int) -> bool:
    """A swept student's first seed decides; students without a sweep run with every seed."""
    return seed == experiment.seeds[0] or not is_swept(experiment, student)


def _run_each(
    experiment: Experiment, layout: Layout, progress: Progress, runs: Sequence[Job]
) -> tuple[list[Job], list[Job]]:
    """Returns the runs that other processes are working on, and those that diverged and are no sweep's candidates."""
    busy, lost = [], []
    for name, seed in runs:
        fabric = start(experiment.students[name].precision)
        with Run(layout.run(name, seed)).lock(fabric) as mine:
            if not mine:
                busy.append((name, seed))
                progress.say(f"{name} seed {seed} is being trained by another process; left to it")
                continue
            try:
                distill(experiment, layout, fabric, name, seed, progress)
            except Diverged as error:
                progress.say(f"{name} seed {seed}: {error}")
                if not (is_swept(experiment, name) and seed == experiment.seeds[0]):
                    lost.append((name, seed))
    return busy, lost


def _tell(
    experiment: Experiment,
    layout: Layout,
    progress: Progress,
    runs: Sequence[Job],
    busy: Sequence[Job],
    waiting: Sequence[str],
) -> None:
    busy = _unfinished(layout, busy)  # they may be done by now
    if busy:
        progress.say(f"others are working on: {', '.join(f'{name} seed {seed}' for name, seed in busy)}")
    if waiting:
        progress.say(
            f"the sweep of {', '.join(waiting)} is not decided yet: run the same command again when all its runs with "
            f"seed {experiment.seeds[0]} are done"
        )
    if not busy and not waiting:
        diverged = sum(Run(layout.run(*run)).diverged is not None for run in runs)
        progress.say(f"{len(runs) - diverged} runs are done in {layout.runs}")


def evaluate_all(experiment: Experiment, layout: Layout, fabric: Fabric, progress: Progress) -> None:
    """Write result.json of every finished run again. Raises ConfigError where one was made with other settings than
    the config's, apart from the selection split."""
    for name in experiment.students:
        for seed in experiment.seeds:
            settings = run_settings(experiment, name)
            del settings["select"]
            Run(layout.run(name, seed)).check(settings)
    for seed in experiment.seeds:
        for name in experiment.students:
            if Run(layout.run(name, seed)).done:
                _evaluate_again(experiment, layout, fabric, name, seed)
                progress.say(f"evaluated {name} seed {seed}")
