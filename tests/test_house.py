"""The house keeps its shape: rooms, map, signatures, and who may know what."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIPELINE = ROOT / "pipeline"
MOST_PARAMETERS = 6


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def rooms(folder: Path) -> set[str]:
    """Files and folders of Python, without the folder's own `__init__.py`."""
    inside = {path.name for path in folder.glob("*.py")} - {"__init__.py", "__main__.py"}
    return inside | {f"{path.name}/" for path in folder.iterdir() if (path / "__init__.py").exists()}


def readme_map() -> dict[str, set[str]]:
    """Folder -> the rooms that README's map names below it."""
    block = re.search(r"## What is where\n+```\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert block is not None
    named: dict[str, set[str]] = {}
    folder = ""
    for line in block[1].splitlines():
        top = re.match(r"([a-z]+/)\s", line)
        if top:
            folder = top[1]
            named[folder] = set()
        elif folder:
            named[folder] |= set(re.findall(r"(?<![\w/.-])([a-z_0-9]+(?:\.py|/))(?=\s)", line))
    return named


@pytest.mark.parametrize("folder", ["artifacts/", "pipeline/", "cli/"])
def test_the_map_names_every_room_and_none_that_is_not_there(folder: str) -> None:
    assert readme_map()[folder] == rooms(ROOT / folder)


def test_at_most_five_modules_stand_outside_the_rooms() -> None:
    flat = {name for name in rooms(PIPELINE) if name.endswith(".py")}
    assert len(flat) <= 5, flat


def test_the_step_is_one_page() -> None:
    lines = (PIPELINE / "distill" / "step.py").read_text().splitlines()
    assert len(lines) <= 120


def test_no_function_takes_more_than_six_parameters() -> None:
    """Seven are a type. The commands of the command line declare their options as parameters."""
    many = []
    for file in sources("artifacts", "pipeline", "cli"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and not is_command(node):
                names = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = len([name for name in names if name.arg not in ("self", "cls")])
                if count > MOST_PARAMETERS and not is_error(node):
                    many.append(f"{file.relative_to(ROOT)}:{node.name} {count}")
    assert many == []


def is_command(node: ast.FunctionDef) -> bool:
    calls = (decorator for decorator in node.decorator_list if isinstance(decorator, ast.Call))
    return any(ast.unparse(call.func) == "app.command" for call in calls)


def is_error(node: ast.FunctionDef) -> bool:
    """E2kdError's constructor: its fields are keywords, each optional."""
    return node.name == "__init__" and any(name.arg == "message" for name in node.args.args)


def test_only_models_and_explainers_know_what_kind_of_map_it_is() -> None:
    telling = re.compile(
        r"channels == \d|len\(maps\) == \d|startswith\(\"bcos/|isinstance\([^)]*\b(GradCAM|BCos)\b"
    )
    found = [
        f"{file.relative_to(ROOT)}: {line.strip()}"
        for file in sources("artifacts", "pipeline", "cli")
        if not {"models", "explain"} & set(file.relative_to(ROOT).parts)
        for line in file.read_text().splitlines()
        if telling.search(line)
    ]
    assert found == []


def test_stage_2_imports_nothing_of_stage_1() -> None:
    for file in sources("pipeline/distill"):
        imported = [
            node.module or ""
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.ImportFrom)
        ]
        assert not [
            name for name in imported if name.startswith(("pipeline.precompute", "pipeline.teach"))
        ], file


def test_no_rooms_import_each_other_in_a_circle() -> None:
    """The tiers let rooms of one tier see each other; this keeps them in one order, too."""
    imports: dict[str, set[str]] = {}
    for file in sources("pipeline"):
        room = file.relative_to(PIPELINE).parts[0].removesuffix(".py")
        names = {name.split(".")[1] for name in imported(file) if name.startswith("pipeline.")}
        imports.setdefault(room, set()).update(names - {room})
    while imports:
        ground = {room for room, names in imports.items() if not names & imports.keys()}
        assert ground, f"a circle among {sorted(imports)}"
        for room in ground:
            del imports[room]


def imported(file: Path) -> Iterator[str]:
    """Modules that a file imports when it runs: what only the type checker reads does not count."""
    tree = ast.parse(file.read_text())
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in guarded:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "pipeline")


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *sorted(p.name for p in (ROOT / "docs").glob("*.md"))]
)
def test_every_link_of_the_documentation_leads_somewhere(page: str) -> None:
    file = ROOT / page if (ROOT / page).exists() else ROOT / "docs" / page
    links = re.findall(r"\]\(([^)#\s]+)", file.read_text())
    lost = [link for link in links if "://" not in link and not (file.parent / link).exists()]
    assert lost == []


def test_the_tiers_are_at_most_five() -> None:
    import tomllib

    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (tiers,) = [one["layers"] for one in contracts if "pipeline.order" in str(one.get("layers"))]
    assert len(tiers) <= 5
    named = {name.strip().removeprefix("pipeline.") for tier in tiers for name in re.split("[|:]", tier)}
    assert named == {name.removesuffix("/").removesuffix(".py") for name in rooms(PIPELINE)}
