"""Names and URLs that a file gives: no path leads out, no URL is opened unasked, nothing waits for ever."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.hostile.border import Command, changed, listing

CONFIG = """
data: {{source: {source}, root: {root}{more}}}
view: {{size: 16}}
teacher: {{model: toy/resnet, width: 4, classes: 2, train: {{epochs: 1, split: {split}}}}}
train: {{model: toy/resnet, width: 4, epochs: 1, split: {split}}}
students: {{kd: {{}}}}
evaluate: {{splits: [{split}], select: null}}
"""


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A private picture beside the data set `set/`."""
    (tmp_path / "private").mkdir()
    (tmp_path / "set").mkdir()
    picture(tmp_path / "private/x.jpg")
    return tmp_path


def picture(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20)).save(file)


def config(world: Path, source: str, split: str = "test", **data: Any) -> Path:
    more = "".join(f", {name}: {json.dumps(value)}" for name, value in data.items())
    file = world / "config.yaml"
    file.write_text(CONFIG.format(source=source, root=world / "set", more=more, split=split))
    return file


def refused(command: Command, world: Path, file: Path) -> str:
    """What pack says; nothing of the world changes but for out/."""
    before = listing(world)
    said = command.refused("pack", file, "--out", world / "out")
    assert [name for name in changed(before, listing(world)) if name.split("/")[0] != "out"] == []
    assert not list((world / "out").rglob("*.tar"))
    return said


def sun(world: Path) -> str:
    (world / "set/ClassName.txt").write_text("/../private\n")
    for name in ("Training_01.txt", "Testing_01.txt"):
        (world / f"set/{name}").write_text("/../private/x.jpg\n")
    return "sun397"


def tiny(world: Path) -> str:
    root = world / "set"
    (root / "train/n1/images").mkdir(parents=True)
    (root / "val/images").mkdir(parents=True)
    (root / "wnids.txt").write_text("n1\n")
    (root / "train/n1/n1_boxes.txt").write_text("../../../../private/x.jpg\t0\t0\t9\t9\n")
    (root / "val/val_annotations.txt").write_text("../../../private/x.jpg\tn1\t0\t0\t9\t9\n")
    return "tiny-imagenet"


def tiny_wnid(world: Path) -> str:
    tiny(world)
    (world / "set/wnids.txt").write_text("../../private\n")
    return "tiny-imagenet"


def voc(world: Path) -> str:
    base = world / "set/VOC2007"
    (base / "ImageSets/Main").mkdir(parents=True)
    (base / "ImageSets/Main/test.txt").write_text("../../../private/x\n")
    (base / "Annotations").mkdir()
    (base / "JPEGImages").mkdir()
    return "voc"


def hub(world: Path) -> str:
    line = {"file_name": "test/../../private/x.jpg", "label": 0}
    (world / "set/metadata.jsonl").write_text(json.dumps(line) + "\n")
    return "huggingface"


@pytest.mark.parametrize("make", [sun, tiny, tiny_wnid, voc, hub], ids=lambda make: make.__name__)
def test_a_list_names_no_file_outside_the_root(
    command: Command, world: Path, make: Callable[[Path], str]
) -> None:
    said = refused(command, world, config(world, make(world)))
    assert "which is not a file below" in said or "is no wnid" in said, said
    assert said.count("\n") == 0


@pytest.mark.parametrize(
    "pattern",
    [
        "../private/a.tar",
        "{..,..}/private/a.tar",
        "{PRIVATE/a.tar,PRIVATE/a.tar}",
        r"\.\./private/a.tar",
        "{.,a}{.,b}/private/a.tar",
        "../priv*/a.tar",
        "a\0.tar",
    ],
)
def test_a_pattern_of_tars_names_none_outside_the_root(command: Command, world: Path, pattern: str) -> None:
    pattern = pattern.replace("PRIVATE", str(world / "private"))
    said = refused(command, world, config(world, "webdataset", shards={"test": pattern}))
    assert "not below data.root" in said, said


@pytest.mark.parametrize(
    "pattern",
    [
        "{000000000..999999999}.tar",
        "{1..9}" * 8 + ".tar",
        "{" * 25 + "}" * 25,
        "{a..z}" * 6,
        "{a,b}" * 400,
        "x" * 9999,
    ],
    ids=lambda pattern: pattern[:20],
)
def test_a_pattern_of_too_many_names_is_not_expanded(command: Command, world: Path, pattern: str) -> None:
    said = refused(command, world, config(world, "webdataset", shards={"test": pattern}))
    assert "is too much" in said
    assert len(said) < 1000


@pytest.mark.parametrize("name", ["..", ".", ".hidden", "a/b", "a\nb", "a\0b", "", "/abs", "a" * 200])
@pytest.mark.parametrize("where", ["store", "split", "evaluated", "student", "trained"])
def test_names_that_become_folders_are_no_paths(command: Command, world: Path, name: str, where: str) -> None:
    if where in ("evaluated", "trained") and name == "a/b":
        name = "../a/b"
    file = config(world, "webdataset", shards={"test": "a.tar"})
    text = json.dumps(name)
    changes = {
        "store": f"store={{name: {text}}}",
        "split": f"data.shards={{{text}: a.tar, test: b.tar}}",
        "evaluated": f"evaluate.splits=[{text}]",
        "student": f"students={{{text}: {{}}}}",
        "trained": f"train.split={text}",
    }
    before = listing(world)
    said = command.refused("pack", file, "--out", world / "out", "--set", changes[where])
    assert "is no name" in said or (where == "student" and "string should " in said), said
    assert changed(before, listing(world)) == []


def fifo(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(file)


def bound_socket(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    here = os.getcwd()
    # a socket's path is short
    os.chdir(file.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(file.name)
    finally:
        os.chdir(here)


def device(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.symlink_to("/dev/zero")


def folder(file: Path) -> None:
    file.mkdir(parents=True)


@pytest.mark.parametrize("kind", [fifo, bound_socket, device, folder], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "name", ["train/a/x.jpg", "a.tar", "ClassName.txt", "metadata.jsonl", "test-0.parquet"]
)
def test_what_is_no_file_is_refused_at_once(
    command: Command, world: Path, kind: Callable[[Path], None], name: str
) -> None:
    kind(world / "set" / name)
    source = {"x.jpg": "folder", "a.tar": "webdataset", "ClassName.txt": "sun397"}.get(
        Path(name).name, "huggingface"
    )
    more = {"shards": {"test": "a.tar"}} if source == "webdataset" else {}
    split = "train" if source == "folder" else "test"
    command.refused("pack", config(world, source, split, **more), "--out", world / "out")


@pytest.mark.parametrize("kind", [fifo, bound_socket, device], ids=lambda kind: kind.__name__)
def test_an_image_that_is_no_file_is_left_out_at_once(
    command: Command, world: Path, kind: Callable[[Path], None]
) -> None:
    kind(world / "set/train/a/x.jpg")
    picture(world / "set/train/a/y.jpg")
    picture(world / "set/train/b/z.jpg")
    file = config(world, "folder", "train", on_bad_image="skip", val_fraction=0)
    ended = command("pack", file, "--out", world / "out")
    assert ended.code == 0, ended
    assert "1 of 3 images of train cannot be read" in ended.out


class Ears(BaseHTTPRequestHandler):
    heard: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.heard.append(self.path)
        self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        return


def test_the_report_of_a_folder_opens_no_url_of_its_config(command: Command, world: Path) -> None:
    run = world / "folder/runs/kd/seed-0"
    run.mkdir(parents=True)
    (run / "result.json").write_text(
        json.dumps(
            {"student": "kd", "seed": 0, "splits": {"test": {"accuracy": 0.5}}, "stores": {"test": "a" * 64}}
        )
    )
    (run / "done").write_text("")
    file = config(world, "toybirds").read_text().replace(f", root: {world}/set", "")
    server = HTTPServer(("127.0.0.1", 0), Ears)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://alice:SECRET@127.0.0.1:{server.server_port}/x"
        (world / "folder/config.yaml").write_text(f"artifacts: {url}\n{file}")
        before = listing(world)
        ended = command("report", world / "folder")
    finally:
        server.shutdown()
        server.server_close()
    assert ended.code == 0, ended
    assert Ears.heard == []
    assert "was not opened" in ended.out
    assert "SECRET" not in ended.out + ended.err
    assert all(name.startswith("folder/report") for name in changed(before, listing(world)))
    for name in ("report.md", "report.html"):
        text = (world / "folder/report" / name).read_text()
        assert "SECRET" not in text
        assert str(world) not in text
