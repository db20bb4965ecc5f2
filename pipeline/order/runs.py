"""Stage 2 in order: which runs there are, which of them are missing, and who trains them: this process, or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from artifacts.errors import ConfigError, Diverged
from pipeline.distill.run import distill
from pipeline.evaluate.students import evaluate_student, scored_elsewhere
from pipeline.order.jobs import Job, check, run_jobs, this_command
from pipeline.order.prepare import prepare_stores
from pipeline.sharing import WHOLE, Launch, Part
from pipeline.training.choice import by_method, choices
from pipeline.training.run import Run, run_settings
from pipeline.workspace import Workspace


@dataclass
class Outcome:
    """What became of some runs: `busy` are being trained by other processes, `failed` ended without a result, with
    the exit code of their process; None if they diverged in this one."""

    busy: list[Job] = field(default_factory=list)
    failed: list[tuple[Job, int | None]] = field(default_factory=list)

    def __iadd__(self, other: Outcome) -> Outcome:
        self.busy += other.busy
        self.failed += other.failed
        return self


Runner = Callable[[Workspace, Sequence[Job]], Outcome]


def distill_all(
    workspace: Workspace,
    students: Sequence[str],
    seeds: Sequence[int],
    part: Part = WHOLE,
    runner: Runner | None = None,
) -> None:
    """Stage 2 for students x seeds, of a sweep's other seeds the chosen candidates only. Finished runs are left alone.

    `students` are names of candidates. Of several independent processes each takes every `part.world`-th run; a run
    that another one is working on is left to it. `runner` trains the runs (default: `here`, in this process). Raises
    ConfigError if a sweep cannot be decided, and, before anything is written, if a run was begun with other settings;
    Diverged or JobsFailed, after all others, if runs failed that are not a sweep's candidates.
    """
    _check_begun(workspace, students, seeds)
    prepare_stores(workspace, students=students)
    _score_again(workspace, students, seeds)
    train = runner or here
    first = _compared_runs(workspace, students, seeds)[part.rank :: part.world]
    outcome = train(workspace, first)
    chosen, waiting = _chosen_runs(workspace, students, seeds)
    later = chosen[part.rank :: part.world]
    outcome += train(workspace, later)
    _raise_failed(outcome)
    _tell(workspace, [*first, *later], outcome.busy, waiting)


def here(workspace: Workspace, runs: Sequence[Job]) -> Outcome:
    """Train runs in this process, one after the other. A sweep's candidate that diverges has lost: no failure."""
    outcome = Outcome()
    for name, seed in runs:
        candidate = workspace.experiment.candidates[name]
        own = workspace.in_precision(candidate.settings.precision)
        with Run(workspace.layout.run(name, seed)).lock(own.fabric) as mine:
            if not mine:
                outcome.busy.append((name, seed))
                workspace.progress.say(f"{name} seed {seed} is being trained by another process; left to it")
                continue
            try:
                distill(own, name, seed)
            except Diverged as error:
                workspace.progress.say(f"{name} seed {seed}: {error}")
                if not (candidate.swept and seed == workspace.experiment.seeds[0]):
                    outcome.failed.append(((name, seed), None))
    return outcome


def as_processes(arguments: Sequence[str], count: int) -> Runner:
    """Trains runs `count` at a time, each by `e2kd ARGUMENTS --student S --seed K` in a process of its own.

    Raises ConfigError if this process is one of several.
    """
    if Launch.here().world > 1:
        raise ConfigError("--jobs starts processes of its own: use it without torchrun, or torchrun alone")
    # whatever SLURM's variables say
    command = this_command([*arguments, "--rank", "0", "--world", "1"])

    def train(workspace: Workspace, runs: Sequence[Job]) -> Outcome:
        # the teacher's memory is the jobs' now
        torch.cuda.empty_cache()
        missing = _unfinished(workspace, runs)
        failed = run_jobs(missing, command, count, workspace.progress) if missing else []
        lost = {job for job, _ in failed}
        return Outcome([job for job in _unfinished(workspace, missing) if job not in lost], [*failed])

    return train


def evaluate_all(workspace: Workspace) -> None:
    """Write result.json of every finished run again. Raises ConfigError if one was made with other settings than the
    config's, apart from the selection split."""
    experiment = workspace.experiment
    for name in experiment.candidates:
        for seed in experiment.seeds:
            settings = run_settings(experiment, name)
            del settings["select"]
            Run(workspace.layout.run(name, seed)).check(settings)
    for seed in experiment.seeds:
        for name in experiment.candidates:
            if Run(workspace.layout.run(name, seed)).done:
                _evaluate_again(workspace, name, seed)
                workspace.progress.say(f"evaluated {name} seed {seed}")


def _check_begun(workspace: Workspace, students: Sequence[str], seeds: Sequence[int]) -> None:
    for seed in seeds:
        for name in students:
            Run(workspace.layout.run(name, seed)).check(run_settings(workspace.experiment, name))


def _score_again(workspace: Workspace, students: Sequence[str], seeds: Sequence[int]) -> None:
    """Finished runs whose splits have other images or another store now than when they were scored."""
    for name in students:
        for seed in seeds:
            run = Run(workspace.layout.run(name, seed))
            splits = scored_elsewhere(workspace, run) if run.done else []
            if splits:
                workspace.progress.say(f"{name} seed {seed} is scored again: {', '.join(splits)} changed")
                _evaluate_again(workspace, name, seed)


def _evaluate_again(workspace: Workspace, name: str, seed: int) -> None:
    run = Run(workspace.layout.run(name, seed))
    result = evaluate_student(workspace, name, seed)
    result["seconds"] = run.result().get("seconds", {})
    if workspace.fabric.is_global_zero:
        run.finish(result)


def _unfinished(workspace: Workspace, runs: Sequence[Job]) -> list[Job]:
    """Those that are neither finished nor diverged."""
    folders = {job: Run(workspace.layout.run(*job)) for job in runs}
    return [job for job, run in folders.items() if not run.done and run.diverged is None]


def _compared_runs(workspace: Workspace, students: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """Every run that needs no choice before it, the first seed's first."""
    return [(name, seed) for seed in seeds for name in students if _compared(workspace, name, seed)]


def _compared(workspace: Workspace, name: str, seed: int) -> bool:
    """A candidate's first seed decides its sweep; students without a sweep run with every seed."""
    return seed == workspace.experiment.seeds[0] or not workspace.experiment.candidates[name].swept


def _chosen_runs(
    workspace: Workspace, students: Sequence[str], seeds: Sequence[int]
) -> tuple[list[Job], list[str]]:
    """The chosen candidates' other seeds, and the sweeps that are not decided yet."""
    of_method, runs, waiting = choices(workspace), [], []
    for method, candidates in by_method(workspace.experiment).items():
        asked = [one.name for one in candidates if one.name in students]
        others = [seed for seed in seeds if asked and not _compared(workspace, asked[0], seed)]
        if others and of_method[method].chosen is None:
            waiting.append(method)
        elif others:
            chosen = of_method[method].decided(workspace.experiment)
            runs += [(chosen, seed) for seed in others if chosen in asked]
    return sorted(runs, key=lambda run: seeds.index(run[1])), waiting


def _raise_failed(outcome: Outcome) -> None:
    check([(job, code) for job, code in outcome.failed if code is not None])
    if outcome.failed:
        names = ", ".join(f"{name} seed {seed}" for (name, seed), _ in outcome.failed)
        raise Diverged(f"diverged: {names}; why is above, the other runs are kept")


def _tell(workspace: Workspace, runs: Sequence[Job], busy: Sequence[Job], waiting: Sequence[str]) -> None:
    # they may be done by now
    busy = _unfinished(workspace, busy)
    say, seed = workspace.progress.say, workspace.experiment.seeds[0]
    if busy:
        say(f"others are working on: {', '.join(f'{name} seed {seed}' for name, seed in busy)}")
    if waiting:
        say(
            f"the sweep of {', '.join(waiting)} is not decided yet: run the same command again when all its runs with "
            f"seed {seed} are done"
        )
    if not busy and not waiting:
        diverged = sum(Run(workspace.layout.run(*run)).diverged is not None for run in runs)
        say(f"{len(runs) - diverged} runs are done in {workspace.layout.runs}")
