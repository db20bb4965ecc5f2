"""The command line: arguments in, tables and progress out, and the one place where errors become exit codes.

0 done, 1 a bug (traceback), 2 the user's input (one message), 3 verification failed, 130 interrupted (state kept).
Nothing here imports torch: `e2kd --help` must start at once, so the stages are imported by the commands that run them.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from cli.output import flush_output, name_output

if TYPE_CHECKING:
    from artifacts.places import Place
    from pipeline.config import Experiment
    from pipeline.progress import Progress
    from pipeline.workspace import Workspace

T = TypeVar("T")

app = typer.Typer(
    name="e2kd",
    help="Explanation-enhanced knowledge distillation: ask the teacher once, train any number of students.\n\n"
    "Start with:  e2kd distill configs/toybirds.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigArg = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="an experiment, e.g. configs/toybirds.yaml")
]
SetOpt = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.SUB=VALUE", help="override a setting; repeatable")
]
OutOpt = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="default: out/<config's name>")]
DryOpt = Annotated[bool, typer.Option("--dry-run", help="print the resolved config and stop")]
StoreArg = Annotated[
    str, typer.Argument(metavar="STORE", help="a teacher store or image set: a folder or URL")
]
ImagesOpt = Annotated[str | None, typer.Option(metavar="URL", help="default: the image set beside the store")]


@app.command(epilog="Example: e2kd pack configs/photos.yaml --set data.root=~/photos")
def pack(config: ConfigArg, set_: SetOpt = None, out: OutOpt = None, dry_run: DryOpt = False) -> None:
    """Write the source images as WebDataset shards of the canonical view."""
    workspace = _open(config, set_, out, dry_run)
    from pipeline.data.pack import pack as stage

    stage(workspace)
    places = (str(workspace.layout.images(split)) for split in workspace.experiment.packed_splits)
    workspace.progress.say(f"packed: {', '.join(places)}")


@app.command(epilog="Example: e2kd teach configs/toybirds.yaml")
def teach(config: ConfigArg, set_: SetOpt = None, out: OutOpt = None, dry_run: DryOpt = False) -> None:
    """Train the config's teacher, guided to look at the object if the config says so."""
    workspace = _open(config, set_, out, dry_run)
    from pipeline.order.prepare import prepare_teacher

    prepare_teacher(workspace)
    workspace.progress.say(f"taught: {workspace.layout.teacher}")


@app.command(epilog="Example: torchrun --nproc-per-node 4 --no-python e2kd precompute configs/photos.yaml")
def precompute(
    config: ConfigArg,
    set_: SetOpt = None,
    out: OutOpt = None,
    dry_run: DryOpt = False,
    rank: Annotated[
        int | None, typer.Option(help="this process's number among independent ones, from 0")
    ] = None,
    world: Annotated[int | None, typer.Option(help="how many independent processes share the work")] = None,
) -> None:
    """Stage 1: the teacher's logits and explanation maps for every packed image (packs and teaches first).

    Processes that are started apart, each with its --rank and --world or as a SLURM array, compute whole shards each,
    after `e2kd pack` and `e2kd teach`.
    """
    workspace = _open(config, set_, out, dry_run)
    from pipeline.order.prepare import prepare_stores
    from pipeline.sharing import Part

    if prepare_stores(workspace, Part.of(rank, world)):
        workspace.progress.say(f"stored: {workspace.beside_stores}")


@app.command(epilog="Example: e2kd distill configs/toybirds.yaml --student e2kd --seed 0")
def distill(
    config: ConfigArg,
    set_: SetOpt = None,
    out: OutOpt = None,
    dry_run: DryOpt = False,
    student: Annotated[list[str] | None, typer.Option(help="only these students; repeatable")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="only these seeds; repeatable")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="runs at a time on this machine")] = 1,
    rank: Annotated[
        int | None, typer.Option(help="this process's number among independent ones, from 0")
    ] = None,
    world: Annotated[int | None, typer.Option(help="how many independent processes share the runs")] = None,
    report_: Annotated[bool, typer.Option("--report/--no-report", help="the scorecard at the end")] = True,
) -> None:
    """Stage 2: train every student x seed that is not done, evaluate, and report (stage 1 first where missing).

    A sweep's candidates are trained with the first seed, the best of each with all. Safe to start several times at
    once: a run is one process's (or one torchrun's) at a time.
    """
    workspace = _open(config, set_, out, dry_run)
    from pipeline.order.runs import as_processes, distill_all
    from pipeline.sharing import Part

    students = _pick_students(workspace.experiment, student)
    seeds = _pick("seed", seed, list(workspace.experiment.seeds))
    runner = None
    if jobs > 1:
        arguments = ["distill", str(config), "--out", str(workspace.layout.root)]
        arguments += [word for override in set_ or () for word in ("--set", override)]
        runner = as_processes(arguments, jobs)
    distill_all(workspace, students, seeds, Part.of(rank, world), runner)
    if workspace.fabric.is_global_zero and report_ and _any_to_report(workspace):
        _report(workspace)


@app.command(epilog="Example: e2kd evaluate configs/toybirds.yaml")
def evaluate(config: ConfigArg, set_: SetOpt = None, out: OutOpt = None, dry_run: DryOpt = False) -> None:
    """Score every finished student again on the config's splits (after changing `evaluate`)."""
    workspace = _open(config, set_, out, dry_run)
    from pipeline.order.runs import evaluate_all

    evaluate_all(workspace)
    _report(workspace)


@app.command(epilog="Example: e2kd report configs/toybirds.yaml")
def report(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="an experiment, or its folder out/NAME")],
    set_: SetOpt = None,
    out: OutOpt = None,
    dry_run: DryOpt = False,
) -> None:
    """A Markdown table over students x splits, and a figure of maps and training curves.

    Of a folder, no URL is opened that its own config.yaml names: --set artifacts=URL says that it may be.
    """
    folder = os.path.isdir(config)
    if folder:
        config, out = config / "config.yaml", out or config
    workspace = _open(config, set_, out, dry_run)
    told = any(override.startswith("artifacts=") for override in set_ or ())
    _report(workspace if told or not folder else workspace.here())


@app.command(epilog="Example: e2kd inspect out/toybirds/stores/gradcam-centred/train --row 7 --png row.png")
def inspect(
    store: StoreArg,
    row: Annotated[int | None, typer.Option(help="draw this row; with --png")] = None,
    key: Annotated[str | None, typer.Option(help="draw this sample; with --png")] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="image, map and highest logits of a row")
    ] = None,
    images: ImagesOpt = None,
) -> None:
    """What a store or an image set holds: its origin, arrays, sizes and bytes per image; or one row as a picture."""
    from cli.inspection import describe, portray

    if png is None and row is None and key is None:
        describe(store)
    else:
        portray(store, row, key, images, png or Path(f"{key if row is None else f'row-{row}'}.png"))


@app.command(epilog="Example: e2kd verify out/toybirds/stores/gradcam-centred/train --against-teacher 1%")
def verify(
    store: StoreArg,
    quick: Annotated[bool, typer.Option("--quick", help="sizes only")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="compute (or pack) the damaged shards again")
    ] = False,
    against_teacher: Annotated[
        str | None, typer.Option(metavar="SHARE", help="ask the teacher again for 1% or for 200 random rows")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="its experiment; default: the folder's config.yaml")
    ] = None,
    set_: SetOpt = None,
    images: ImagesOpt = None,
) -> None:
    """Check every byte of a store: sizes, checksums, values, and that its rows are the image set's rows.

    Exit code 3 where something is wrong and was not repaired.
    """
    from cli.inspection import check

    def workspace_of(where: Place) -> Workspace:
        from pipeline.workspace import Workspace

        if config is None:
            return Workspace.around(where, set_ or (), _progress())
        out = config.parent if config.name == "config.yaml" else None
        return Workspace.open(config, set_ or (), out, _progress())

    code = check(
        store,
        quick=quick,
        images_url=images,
        against_teacher=against_teacher,
        repair=repair,
        workspace_of=workspace_of,
    )
    raise typer.Exit(code)


@app.command(epilog="Example: e2kd export out/toybirds/stores/gradcam-centred/train toybirds-train")
def export(
    store: StoreArg,
    destination: Annotated[str, typer.Argument(metavar="DEST", help="an empty folder or URL")],
    images: ImagesOpt = None,
) -> None:
    """Write a store with its images as plain WebDataset shards (.png, .json, .logits.npy, .map.npy, .class.json)."""
    from cli.inspection import export as run

    run(store, destination, images)


@app.command(
    "import", epilog="Example: e2kd import toybirds-train new/images/train new/stores/gradcam-centred/train"
)
def import_(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="what `e2kd export` wrote")],
    images: Annotated[str, typer.Argument(help="where the image set goes")],
    store: Annotated[str, typer.Argument(help="where the store goes")],
) -> None:
    """Make an image set and a teacher store of exported shards."""
    from cli.inspection import import_ as run

    run(source, images, store)


@app.command(epilog="Example: e2kd doctor")
def doctor() -> None:
    """Versions, devices, free disk, and whether the kernels that training needs run here."""
    from cli.doctor import examine

    raise typer.Exit(examine())


def _open(config: Path, overrides: Sequence[str] | None, out: Path | None, dry_run: bool) -> Workspace:
    """What every stage command starts from."""
    from cli.console import say
    from pipeline.config import dump
    from pipeline.workspace import Workspace

    workspace = Workspace.open(config, overrides or (), out, _progress())
    if dry_run:
        say(dump(workspace.experiment).rstrip("\n"))
        raise typer.Exit(0)
    return workspace


def _progress() -> Progress:
    """Of the first of the processes that were launched together; the others are quiet."""
    from cli.console import progress
    from pipeline.progress import Quiet
    from pipeline.sharing import Launch

    return progress() if Launch.here().rank == 0 else Quiet()


def _pick(what: str, wanted: Sequence[T] | None, known: Sequence[T]) -> list[T]:
    from artifacts.errors import ConfigError

    unknown = [value for value in wanted or () if value not in known]
    if unknown:
        raise ConfigError(f"no {what} {unknown[0]} in the config; it has {', '.join(map(str, known))}")
    return list(wanted or known)


def _pick_students(experiment: Experiment, wanted: Sequence[str] | None) -> list[str]:
    """Candidates by name; a swept student's name stands for all its candidates."""
    candidates = experiment.candidates
    of_method = {
        name: [one.name for one in candidates.values() if one.method == name] for name in experiment.students
    }
    known = {name: [name] for name in candidates} | of_method
    picked = _pick("student", wanted, list(of_method | known))
    return list(dict.fromkeys(student for name in picked for student in known[name]))


def _any_to_report(workspace: Workspace) -> bool:
    """Other processes may be at all of the runs, or a sweep not be decided."""
    from pipeline.report.results import methods

    return any(method.results() for method in methods(workspace))


def _report(workspace: Workspace) -> None:
    from pipeline.report import report as stage

    workspace.progress.say(stage(workspace))


def main() -> None:
    """The console script: run the command, turn what users can mend into one message."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that an ASCII terminal cannot show
    name_output()
    # no Python that this process starts (torch's compiler, multiprocessing) runs a file of the current folder
    os.environ["PYTHONSAFEPATH"] = "1"
    code = run_guarded(app)
    raise SystemExit(run_guarded(flush_output) or code)


def run_guarded(command: Callable[[], object]) -> int:
    """Run a command and return its exit code: 2 for every error of the tree, which is one message.

    Any other exception is a bug, an OSError too, and keeps its traceback.
    """
    try:
        command()
        return 0
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as stop:  # typer's own: usage errors, --help, and 130 for Ctrl-C
        code = stop.code if isinstance(stop.code, int) else 0
        return _interrupted() if code == 130 else code
    except Exception as error:
        # imported here and not at the start: `artifacts` imports zarr
        from artifacts.errors import E2kdError, JobsFailed

        if not isinstance(error, E2kdError):
            raise
        return _fail(str(error), error.exit_code if isinstance(error, JobsFailed) else 2)


def _interrupted() -> int:
    return _fail("interrupted; what is finished is kept: run the same command again to continue", 130)


def _fail(message: str, code: int) -> int:
    # imported here and not at the start: rich
    from cli.console import complain

    complain(f"e2kd: {message}")
    return code
