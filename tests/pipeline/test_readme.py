"""README's program runs as it is printed, on a store of the tiny experiment."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.workspace import Layout

ROOT = Path(__file__).parents[2]


def test_the_program_of_the_readme_runs(prepared: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    exec(program.replace("out/toybirds", str(prepared.root)), {})
    kd, explanation, agreement = map(float, capsys.readouterr().out.split())
    assert kd > 0
    assert 0 < explanation < 2
    assert 0 <= agreement <= 1
