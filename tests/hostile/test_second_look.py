"""What a second look at the hostile inputs found, each by the command that met it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from artifacts.names import masked
from artifacts.places import place
from pipeline.sharing import locked
from tests.hostile.border import Command

TINY = "data: {source: toybirds}\n"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def test_a_matplotlibrc_of_the_current_folder_is_not_obeyed(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 77\n")
    code = "from pipeline.report.plotting import plt; print(plt.rcParams['text.usetex'], plt.rcParams['font.size'])"
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "PYTHONSAFEPATH": "1"}
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.split() == ["False", "10.0"]


def test_an_fsspec_place_on_this_disk_does_not_write_through_links(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("two years")
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "object").symlink_to(thesis)
    place(f"local://{tmp_path}/place").write("object", b"theirs")
    assert thesis.read_text() == "two years"
    assert (tmp_path / "place" / "object").read_bytes() == b"theirs"


@pytest.mark.parametrize("size", [(300_000, 1), (1, 300_000), (6_000_000, 1)])
def test_an_image_that_the_view_would_blow_up_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    from artifacts.errors import DataError
    from pipeline.config import ViewConfig
    from pipeline.data.source import RawSample
    from pipeline.data.view import CanonicalView

    image = Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8))
    raw = RawSample(key="long", image=image, label=None)
    with pytest.raises(DataError, match="the image long is too long"):
        CanonicalView.of(ViewConfig(size=224)).apply(raw)


@pytest.mark.parametrize("kind", ["fifo", "zero"])
def test_a_config_that_is_no_file(command: Command, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "config.yaml"
    os.mkfifo(file) if kind == "fifo" else file.symlink_to("/dev/zero")
    for what in (file, tmp_path):
        assert "it is not a regular file" in command.refused("report", what)


def test_a_lock_that_is_a_fifo_or_a_link(tmp_path: Path) -> None:
    from artifacts.errors import WriteError
    from pipeline.devices import start

    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "made")
    for name in ("fifo", "link"):
        with pytest.raises(WriteError, match=f"cannot write .*{name}"), locked(tmp_path / name, start()):
            pass
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("text", ["a: !!bool x", "a: !!timestamp x", TINY + "sweep: [1]"])
def test_yaml_that_is_of_no_type(command: Command, tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert command.refused("pack", tmp_path / "config.yaml", "--out", tmp_path / "out")


def test_a_log_without_an_end(tmp_path: Path) -> None:
    from artifacts.errors import CheckpointError
    from pipeline.training.run import Run

    with (tmp_path / "metrics.jsonl").open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(CheckpointError, match="at most are read"):
        Run(tmp_path).history()


@pytest.mark.parametrize(
    "text", ["s3:/me:PW@host/x", "no config file https:/me:PW@host/c.yaml", "https://host/x#token=PW"]
)
def test_a_password_of_a_url_that_became_a_path(text: str) -> None:
    assert "PW" not in masked(text)


def test_what_is_no_url_is_kept() -> None:
    for text in ("C:/a@b", "out/x: /me@home", "a:/b/c@d"):
        assert masked(text) == text


def test_a_users_own_link_beside_what_is_written_is_kept(tmp_path: Path) -> None:
    from artifacts.errors import WriteError
    from pipeline.workspace import Workspace

    config, out = Path(__file__).parents[2] / "configs/toybirds.yaml", tmp_path / "out"
    (tmp_path / "elsewhere").mkdir()
    out.mkdir()
    for name in ("notes.md", "figures"):
        (out / name).symlink_to(tmp_path / "elsewhere")
    Workspace.open(config, out=out)
    (out / "stores").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WriteError, match="stores is a link that leads out"):
        Workspace.open(config, out=out)
