"""What a stranger's file says is shown as text: it commands no terminal, links to nothing, and is no formula."""

from __future__ import annotations

import os
import pty
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from PIL import Image

from artifacts.errors import ConfigError, PlaceError
from artifacts.names import masked, printable, secrets_in
from artifacts.places import place
from cli import console
from cli.main import run_guarded
from pipeline.config import dump, parse
from pipeline.explain import by_name
from pipeline.report.document import Cell, Document, Facts, Heading, Picture, Table, Text
from pipeline.report.gallery import Answer, Examples, draw_examples
from pipeline.report.markdown import markdown
from pipeline.report.page import page
from pipeline.report.pictures import _draw
from pipeline.report.statistics import Summary
from tests.hostile.border import TINY, Command, finish

CONTROLS = [chr(code) for code in (*range(10), *range(11, 32), *range(127, 160))]
ESCAPES = ["\x1b]52;c;aGk=\x07", "\x1b[2J", "\x9b31m", "\r\x1b[Aok", "‮gpj.exe", "\x08" * 9, "\ud800"]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def is_plain(text: str) -> bool:
    return not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f‪-‮⁦-⁩\ud800-\udfff]", text)


@pytest.mark.parametrize("evil", [*CONTROLS, *ESCAPES], ids=ascii)
def test_one_place_escapes_what_commands_a_terminal(evil: str, capsys: pytest.CaptureFixture[str]) -> None:
    console.say(f"a{evil}b\nc")
    console.complain(f"a{evil}b")
    console.table([("name", f"{evil}\nfaked line")])
    console.SparseProgress().say(evil)
    with console.SparseProgress().bar(f"pack {evil}\n", 1, "image") as advance:
        advance(1)
    said = capsys.readouterr()
    assert is_plain(said.out + said.err)
    assert said.out.count("\n") == 5


def test_on_a_terminal_bars_and_lines_are_text_too(monkeypatch: pytest.MonkeyPatch) -> None:
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(console.out, "_file", terminal)
        told = console.TerminalProgress()
        told.say("\x1b]52;c;aGk=\x07 [bold red]EVIL[/] :smile:")
        with told.bar("[bold red]BAR[/]\x1b]0;title\x07", 1, "image") as advance:
            advance(1)
        terminal.flush()
        shown = os.read(leader, 65536).decode()
    os.close(leader)
    assert "\x1b]" not in shown
    assert "\x07" not in shown
    assert "[bold red]EVIL[/] :smile:" in shown
    assert "[bold red]BAR[/]" in shown


@pytest.mark.parametrize("name", ["a\x1b]52;c;aGk=\x07", "a\r", "b\x9b2J"], ids=ascii)
def test_names_of_files_in_messages(command: Command, tmp_path: Path, name: str) -> None:
    (tmp_path / "set" / name).mkdir(parents=True)
    (tmp_path / "set" / name / f"{name}.jpg").write_bytes(b"no image")
    config = tmp_path / "config.yaml"
    config.write_text(
        TINY.replace("{source: toybirds, limit: 16}", f"{{source: folder, root: {tmp_path}/set}}").replace(
            "test-ood", "val"
        )
    )
    for more in ([], ["--set", "data.on_bad_image=skip"]):
        ended = command("pack", config, "--out", tmp_path / "out", *more)
        assert ended.code == 2
        assert ended.err
        assert is_plain(ended.out + ended.err)


def test_what_a_config_says_in_its_message(command: Command, tmp_path: Path) -> None:
    config = tmp_path / "a\x1b[2J.yaml"
    config.write_text('"k\\e]52;c;aGk=\\a": 1\n' + TINY)
    said = command.refused("pack", config)
    assert is_plain(said)


def test_a_stranger_reports_with_markup_in_his_names(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "[x](http:evil) <img src=x onerror=alert(1)>\x1b[2J"
    finish(folder)
    (folder / "config.yaml").write_text(TINY)
    ended = command("report", folder)
    assert ended.code == 0, ended
    assert is_plain(ended.out + ended.err)
    assert formats((folder / "report/report.md").read_text()) == set()
    assert tags((folder / "report/report.html").read_text()) == set()


EVIL = [
    "<img src=x onerror=alert(1)>",
    r"\<img src=x>",
    "[click](http://evil)",
    r"\[click\](http://evil)",
    r"[click\](http://evil)",
    "![x](http://evil)",
    "[a]: http://evil",
    "[1](http://evil)",
    "[0.1][2]",
    r"\`code\`",
    "`code`",
    "*a*",
    r"\*a\*",
    "_a_",
    "~~a~~",
    "a\n# heading",
    "a\r# heading",
    "a\r\r- item",
    "a # heading",
    "a # heading",
    "a\x85- item",
    "a|b",
    r"a\|b",
    "http://evil.example",
    "www.evil.example",
    "mail@evil.example",
    "&#60;img&#62;",
    "<!-- -->",
    "a\x1b[2J",
]


def formats(text: str) -> set[str]:
    """What a reader of Markdown would make of it that is no plain text, heading, table or list of ours."""
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(text)
    kinds = {token.type for token in tokens}
    kinds |= {child.type for token in tokens for child in token.children or ()}
    return kinds & {"link_open", "html_inline", "code_inline", "s_open", "em_open", "code_block", "fence"}


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {name for name, _ in attrs}
        if tag == "script" or any(name.startswith("on") for name in names):
            self.seen.add(tag)
        self.seen |= {
            f"{name}={value}" for name, value in attrs if name in ("src", "href") and not _own(value)
        }


def _own(value: str | None) -> bool:
    return str(value).startswith(("#part", "data:"))


def tags(text: str) -> set[str]:
    parser = Tags()
    parser.feed(text)
    return parser.seen


@pytest.mark.parametrize("evil", EVIL, ids=ascii)
def test_the_report_shows_names_as_they_are(evil: str, tmp_path: Path) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "x.png")
    document = Document(
        evil,
        [
            Heading(evil),
            Text(evil),
            Facts([("name", evil), (evil, evil)]),
            Table(evil, [evil, "b"], [[Cell(evil), Cell("1", evil)]]),
        ],
    )
    text = markdown(document)
    assert formats(text) == set(), text
    assert len([line for line in text.splitlines() if line.startswith("#")]) == 2
    assert text.isprintable() or is_plain(text)
    assert not re.search(r"https?://|www\.|\w@\w", text)
    assert tags(page(document, tmp_path)) == set()


def test_an_interval_keeps_its_brackets() -> None:
    assert "[+1.0, -2.5]" in markdown(Document("a", [Text("x [+1.0, -2.5] y")]))


def test_a_pictures_file_is_a_file() -> None:
    name = 'maps-te"><img src=x onerror=document.write(7777)>) [a](b.png'
    text = markdown(Document("a", [Picture(name, "alt", "caption")]))
    assert "<" not in text
    tokens = [child for token in MarkdownIt().parse(text) for child in token.children or ()]
    assert [token.type for token in tokens if token.type == "html_inline"] == []
    assert len([token for token in tokens if token.type == "image"]) == 1


@pytest.mark.parametrize(
    "name", [r"$\frac{$", "$$", r"a$\undefined$", "a\nb\x00\x1b", "\ud800", "x" * 10**6, "‮"]
)
def test_a_name_is_no_formula(name: str, tmp_path: Path) -> None:
    explained = torch.zeros(1, dtype=torch.int64)
    examples = Examples(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), [0], explained, [name])
    answer = Answer(torch.zeros(1, 2), torch.ones(1, 1, 4, 4), by_name("gradcam"))
    draw_examples(examples, {name: answer}, tmp_path / "maps.png")
    points = [(1, Summary(0.5, None)), (2, Summary(0.6, 0.1))]
    _draw(tmp_path / "curve.png", {name: points}, {name: ("black", "o")}, name, "epoch")
    for file in ("maps.png", "curve.png"):
        assert np.asarray(Image.open(tmp_path / file)).shape[0] < 2000


SECRETS = [
    "memory://alice:SECRET@host/x",
    "memory://host/x?X-Amz-Signature=SECRET&y=SECRET",
    "nothing://alice:SECRET@host/x",
    "github://alice:SECRET@host/x",
    "reference://alice:SECRET@host/x",
    "zip://alice:SECRET@host/x",
    "simplecache::memory://alice:SECRET@host/x",
]


@pytest.mark.parametrize("url", SECRETS)
def test_a_password_is_told_to_nobody(command: Command, tmp_path: Path, url: str) -> None:
    assert "SECRET" not in masked(url) + masked(f"cannot open '{url}': {url}/x")
    config = tmp_path / "config.yaml"
    config.write_text(f"artifacts: {url}\n{TINY}")
    finish(tmp_path / "out")
    (tmp_path / "out/config.yaml").write_text(config.read_text())
    for words in (
        ["report", config, "--out", tmp_path / "out"],
        ["report", tmp_path / "out"],
        ["distill", config, "--dry-run"],
        ["inspect", f"{url}/images/train"],
        ["verify", f"{url}/stores/a/train"],
        ["verify", f"{url}/stores/a/train", "--images", url],
        ["pack", config, "--set", f"data.root={url}"],
        ["export", f"{url}/stores/a/train", tmp_path / "there"],
    ):
        ended = command(*words)
        assert "SECRET" not in ended.out + ended.err, words
    for file in (tmp_path / "out/report").glob("*"):
        assert b"SECRET" not in file.read_bytes(), file


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:SECRET/SECRET+SECRET@bucket/x",
        "s3://alice:a@SECRET@host/x",
        "s3://SECRET@host/x",
        "https://a:SECRET@h:8/x?sig=SECRET#a",
    ],
)
def test_what_a_library_says_of_a_url_has_none(url: str) -> None:
    assert "SECRET" not in masked(f"cannot open '{url}', {url}/x")
    said = f"Invalid bucket name 'AKIA:SECRET', sig=SECRET, {url}"
    for secret in secrets_in(url):
        said = said.replace(secret, "***")
    assert "SECRET" not in said


def test_errors_and_written_configs_have_none() -> None:
    import yaml

    url = "memory://alice:SECRET@host/x"
    assert "SECRET" not in dump(parse({**yaml.safe_load(TINY), "artifacts": url}))
    assert "SECRET" not in str(place(url)) + repr(str(place(url) / "y"))
    assert place(url).url == url
    error = PlaceError(f"cannot open {url}", path=url)
    assert "SECRET" not in f"{error} {error.path} {error!r}"


def test_no_folder_or_user_is_named_in_what_is_exchanged(command: Command, tmp_path: Path) -> None:
    weights = tmp_path / "home-of-alice/w.safetensors"
    folder = tmp_path / "out"
    finish(folder)
    config = TINY.replace("train: {epochs: 1, seed: 0}", f"weights: {weights}").replace(
        "kd: {}", f"kd: {{weights: {weights}}}"
    )
    made = config.replace("home-of-alice", "home-of-bob")
    (folder / "config.yaml").write_text(made)
    run = folder / "runs/kd/seed-0"
    (run / "config.yaml").write_text(f"settings: {{weights: {tmp_path}/home-of-bob/v.safetensors}}\n")
    (tmp_path / "config.yaml").write_text(config)
    ended = command("report", tmp_path / "config.yaml", "--out", folder)
    assert ended.code == 0, ended
    for name in ("report.md", "report.html"):
        text = (folder / "report" / name).read_text()
        assert "home-of" not in text
        assert str(tmp_path) not in text
        assert "w.safetensors" in text


def test_unreadable_images_are_named_below_their_folder(command: Command, tmp_path: Path) -> None:
    root = tmp_path / "home-of-alice/set"
    for name in ("a", "b"):
        (root / "train" / name).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(root / f"train/{name}/x.png")
        (root / f"train/{name}/y.png").write_bytes(b"none")
    config = tmp_path / "config.yaml"
    said = "{source: folder, root: ROOT, on_bad_image: skip, val_fraction: 0}".replace("ROOT", str(root))
    config.write_text(TINY.replace("{source: toybirds, limit: 16}", said).replace("test-ood", "train"))
    ended = command("pack", config, "--out", tmp_path / "out")
    assert ended.code == 0, ended
    for file in (tmp_path / "out").rglob("*"):
        assert not file.is_file() or b"home-of-alice" not in file.read_bytes(), file


def test_a_bug_aside_every_error_goes_through_the_filter(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise ConfigError("a\x1b]52;c;aGk=\x07 s3://u:SECRET@b")

    assert run_guarded(fail) == 2
    said = capsys.readouterr().err
    assert is_plain(said)
    assert "SECRET" not in said
    assert printable("ä\t中\n", keep="\n") == "ä\\x09中\n"
