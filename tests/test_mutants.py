"""The table of `make mutants` fits the code, and the tool tells caught mistakes from those that nobody notices."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.mutants.main import ROOT, main
from tests.mutants.table import TABLE, Mutant, mistake_in

TREE = {
    "pyproject.toml": "[tool.pytest.ini_options]\naddopts = '-p no:cacheprovider'\n",
    "sums.py": "def add(a, b):\n    return a + b\n",
    "test_sums.py": "from sums import add\n\ndef test_add():\n    assert add(2, 3) == 5\n",
    "test_weak.py": "from sums import add\n\ndef test_add():\n    assert add(0, 0) == 0\n",
    "test_wrong.py": "def test_nothing():\n    assert False\n",
}


def mutant(old: str = "a + b", new: str = "a - b", net: str = "test_sums.py") -> Mutant:
    return Mutant("sums are differences", "sums.py", old, new, (net,))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in TREE.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def judged(table: list[Mutant], tree: Path, *words: str) -> int:
    return main(words, table, tree, imports=["pytest"])


def test_every_mistake_can_be_made() -> None:
    """A row whose text was changed or moved says so here, not only in `make mutants`."""
    for row in TABLE:
        mistake = mistake_in((ROOT / row.file).read_text(), row)
        assert mistake is not None, f"{row.file} does not have exactly once: {row.old}"
        ast.parse(mistake)


def test_every_mistake_is_another() -> None:
    assert len({(row.file, row.old, row.new) for row in TABLE}) == len(TABLE) >= 40
    assert len({row.meaning for row in TABLE}) == len(TABLE)


def test_every_test_that_should_notice_is_there() -> None:
    for net in {net for row in TABLE for net in row.nets}:
        file, *name = net.split("::")
        functions = [node.name for node in ast.parse((ROOT / file).read_text()).body if hasattr(node, "name")]
        assert not name or name[0] in functions, net


def test_the_page_has_every_mistake_with_a_test_that_is_there() -> None:
    """It is written by `make mutants ARGS="--write docs/mutants.md"`."""
    text = (ROOT / "docs/mutants.md").read_text()
    rows = re.findall(r"^\| (.+) \| `(.+)` \| `(.+)::(.+)` \|$", text, re.MULTILINE)
    assert [(meaning, file) for meaning, file, *_ in rows] == [(row.meaning, row.file) for row in TABLE]
    for _, _, test, name in rows:
        assert f"def {name}(" in (ROOT / test).read_text(), name


def test_a_mistake_that_a_test_notices_is_caught_and_the_tree_stays_as_it_was(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judged([mutant(), mutant(new="a * b")], tree) == 0
    said = capsys.readouterr().out
    assert "sums.py: sums are differences | test_sums.py::test_add" in said
    assert said.endswith("2 mutants, 2 caught\n")
    assert {name: (tree / name).read_text() for name in TREE} == TREE
    assert {file.name for file in tree.iterdir()} == set(TREE)


def test_what_caught_each_mutant_is_written_in_the_tables_order_if_all_were_caught(
    tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("docs") / "mutants.md"
    rows = [mutant()._replace(meaning=f"mistake {number}", new=f"a - b - {number}") for number in range(4)]
    weak = mutant(net="test_weak.py")
    assert main((), [*rows, weak], tree, ["pytest"], file) == 1
    assert not file.exists()
    assert main((), rows, tree, ["pytest"], file) == 0
    assert file.read_text().splitlines()[-4:] == [
        f"| mistake {number} | `sums.py` | `test_sums.py::test_add` |" for number in range(4)
    ]


def test_what_nothing_notices_or_cannot_be_judged_is_an_error(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {
        mutant(net="test_weak.py"): "all its tests pass",
        mutant(old="a % b"): "is not there exactly once",
        mutant(old="a"): "is not there exactly once",
        mutant(new="a - c"): "NameError",
        mutant(new="a -"): "SyntaxError",
        mutant(net="test_gone.py"): "pytest ended with 4",
        mutant(): "",
    }
    assert judged(list(rows), tree) == 1
    said = capsys.readouterr().out
    assert "7 mutants, 1 caught\n" in said
    missed = [line for line in said.splitlines() if line.startswith("not caught: ")]
    assert len(missed) == 6
    assert all(any(why in line for line in missed) for why in rows.values())


def test_a_test_that_fails_without_any_mistake_catches_nothing(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judged([mutant(net="test_wrong.py")], tree) == 1
    assert "without any mistake: test_wrong.py: test_wrong.py::test_nothing" in capsys.readouterr().out


def test_words_choose_and_no_mutant_at_all_is_an_error(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judged([mutant(), mutant(net="test_weak.py")], tree, "test_sums") == 0
    assert capsys.readouterr().out.endswith("1 mutants, 1 caught\n")
    assert judged([mutant()], tree, "no such row") == 1
