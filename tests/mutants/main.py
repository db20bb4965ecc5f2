"""`make mutants`: small deliberate mistakes in the method, each of which a fast test must notice.

make mutants                            all of them, some minutes on two cores
make mutants ARGS="losses 'an epoch'"   those whose file, tests or meaning have one of these texts
make mutants ARGS="--write FILE"        all of them, and the table of what caught each, in Markdown, if all were caught

A mutant is one row of `table.py`. Each is made in a temporary copy of the tree, never in the tree itself, and its tests
run there. Before that the tests run without any mistake: a test that fails anyway notices nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from importlib.util import cache_from_source
from pathlib import Path
from typing import NamedTuple, TypeVar

# Before torch is imported, and for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

from tests.mutants.table import TABLE, Mutant, mistake_in

ROOT = Path(__file__).parents[2]
NOT_COPIED = (".*", "__pycache__", "out", "*.egg-info")
LIMIT = 240
"""Seconds until a mutant's tests are stopped, which end with the first that fails."""
LIMIT_OF_ALL = 1200
"""Seconds until all tests of a file are stopped, on a machine that does something else too."""
SLOW_IMPORTS = (
    *("pytest", "hypothesis", "torch", "torchvision", "kornia.augmentation"),
    *("timm", "lightning_fabric", "zarr", "bcos"),
)
"""Others' packages, imported once: the process of each mutant is forked after them."""

HEAD = """# Mistakes that the tests notice

`make mutants` makes each of these deliberate mistakes in a copy of the tree, runs a few tests there, and expects one of
them to fail. This table is what it found: `make mutants ARGS="--write docs/mutants.md"`.

| mistake | file | caught by |
|---|---|---|
"""

Copies = queue.Queue[Path]
Item = TypeVar("Item")
Result = TypeVar("Result")


class Outcome(NamedTuple):
    """Of a run of tests: the first test that failed, or none; else why the run says nothing."""

    failed: str = ""
    trouble: str = ""


class Verdict(NamedTuple):
    """Whether a mutant was caught, in words, and in how many seconds."""

    mutant: Mutant
    caught: bool
    words: str
    seconds: float


def main(
    words: Sequence[str],
    table: Sequence[Mutant] = TABLE,
    root: Path = ROOT,
    imports: Sequence[str] = SLOW_IMPORTS,
    write: Path | None = None,
) -> int:
    """0 if every chosen mutant was caught, else 1. If it is 0, the table of what caught them is written to `write`."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(imports))
    chosen = [mutant for mutant in table if not words or any(word in _text(mutant) for word in words)]
    with copies_of(root, cores()) as copies:
        sound = _are_sound(copies, sorted({net for mutant in chosen for net in mutant.nets}))
        verdicts = []
        for verdict in _each(chosen, lambda mutant: judge(copies, mutant), copies.qsize()):
            verdicts.append(verdict)
            print(_line(len(verdicts), verdict), flush=True)
    missed = [verdict for verdict in verdicts if not verdict.caught]
    print(f"{len(verdicts)} mutants, {len(verdicts) - len(missed)} caught")
    for verdict in missed:
        print(f"not caught: {verdict.mutant.file}: {verdict.mutant.meaning}: {verdict.words}")
    if not verdicts or not sound or missed:
        return 1
    if write is not None:
        write.write_text(page(sorted(verdicts, key=lambda verdict: chosen.index(verdict.mutant))))
    return 0


def page(verdicts: Iterable[Verdict]) -> str:
    """Caught mutants in Markdown, a row each, with the function of the test that caught it."""
    rows = (
        (verdict.mutant.meaning, verdict.mutant.file, verdict.words.split("[")[0]) for verdict in verdicts
    )
    return HEAD + "".join(f"| {meaning} | `{file}` | `{test}` |\n" for meaning, file, test in rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make mutants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "words", nargs="*", help="texts of a mutant's file, tests or meaning; none: all mutants"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="the table of what caught each mutant")
    found = parser.parse_args()
    if found.write and found.words:
        parser.error("--write is for all mutants: leave the words out")
    return found


def _text(mutant: Mutant) -> str:
    return " ".join((mutant.file, mutant.meaning, *mutant.nets))


def _line(number: int, verdict: Verdict) -> str:
    state = "caught" if verdict.caught else "NOT CAUGHT"
    mutant = verdict.mutant
    return (
        f"{number:3} {state:10} {verdict.seconds:5.1f} s  {mutant.file}: {mutant.meaning} | {verdict.words}"
    )


def _are_sound(copies: Copies, nets: Sequence[str]) -> bool:
    """Whether all these tests pass in a copy as it is; says which do not."""
    files = sorted({net.split("::")[0] for net in nets})
    of_file = [[net for net in nets if net.split("::")[0] == file] for file in files]
    sound = True
    for tests, outcome in _each(of_file, lambda tests: (tests, _as_it_is(copies, tests)), copies.qsize()):
        if outcome != Outcome():
            sound = False
            print(f"without any mistake: {tests[0]}: {outcome.failed or outcome.trouble}", flush=True)
    return sound


def _each(items: Iterable[Item], work: Callable[[Item], Result], at_once: int) -> Iterator[Result]:
    """Results as they come."""
    with ThreadPoolExecutor(at_once) as pool:
        for done in as_completed([pool.submit(work, item) for item in items]):
            yield done.result()


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def copies_of(root: Path, count: int) -> Iterator[Copies]:
    """`count` copies of the tree, uncommitted changes included, for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies = Copies()
        for number in range(count):
            copy = shutil.copytree(
                root, Path(folder) / str(number), ignore=shutil.ignore_patterns(*NOT_COPIED)
            )
            copies.put(copy)
        yield copies


@contextmanager
def _borrowed(copies: Copies) -> Iterator[Path]:
    copy = copies.get()
    try:
        yield copy
    finally:
        copies.put(copy)


def judge(copies: Copies, mutant: Mutant) -> Verdict:
    """Make the mistake in a free copy, run the mutant's tests there, and take the mistake back."""
    with _borrowed(copies) as copy:
        started, file = time.monotonic(), copy / mutant.file
        whole = file.read_text()
        mistake = mistake_in(whole, mutant)
        if mistake is None:
            return Verdict(mutant, False, "the row's text is not there exactly once", 0.0)
        try:
            _write(file, mistake)
            outcome = run_tests(copy, mutant.nets)
        finally:
            _write(file, whole)
    words = outcome.trouble or outcome.failed or "all its tests pass"
    return Verdict(mutant, bool(outcome.failed), words, time.monotonic() - started)


def _write(file: Path, text: str) -> None:
    """Python takes byte code for that of a file of the same second and size, so the byte code goes."""
    file.write_text(text)
    Path(cache_from_source(str(file))).unlink(missing_ok=True)


def _as_it_is(copies: Copies, nets: Sequence[str]) -> Outcome:
    with _borrowed(copies) as copy:
        return run_tests(copy, nets, LIMIT_OF_ALL)


def run_tests(copy: Path, nets: Sequence[str], limit: int = LIMIT) -> Outcome:
    """Run some tests in a copy, in a process of their own, up to the first that fails."""
    log = copy / "mutant.log"
    process = multiprocessing.get_context("forkserver").Process(target=_tests, args=(copy, nets, log))
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        return Outcome(trouble=f"the tests were stopped after {limit} s")
    return _outcome(process.exitcode, log.read_text(errors="replace") if log.exists() else "")


def _outcome(code: int | None, log: str) -> Outcome:
    """A mistake that is no Python, or names something that is not there, is noticed by any test: that is no catch."""
    if code == 0:
        return Outcome()
    broken = re.search(r"(SyntaxError|IndentationError|NameError|ImportError|ModuleNotFoundError).*", log)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", log, re.MULTILINE)
    if code != 1 or broken or not failed:
        return Outcome(trouble=f"pytest ended with {code}: {broken.group() if broken else log[-300:]}")
    return Outcome(failed=failed.group(1))


def _tests(copy: Path, nets: Sequence[str], log: Path) -> None:
    """The whole life of a process: the copy's packages in place of the tree's."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(copy)
    sys.path[:] = [str(copy), *(entry for entry in sys.path if entry not in ("", str(ROOT)))]
    os.environ |= {"PYTHONPATH": str(copy), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]

    import pytest

    sys.exit(pytest.main(["-x", "-q", "--tb=line", *nets]))


if __name__ == "__main__":
    arguments = _arguments()
    sys.exit(main(arguments.words, write=arguments.write))
