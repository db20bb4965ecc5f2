"""What is huge, deep or of another type is refused with a sentence, before time and memory are spent on it."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from artifacts.errors import CheckpointError, ConfigError, DataError, E2kdError, ModelError
from pipeline.config import load, parse
from pipeline.config.data import HuggingFace
from pipeline.config.text import json_of, yaml_of
from pipeline.data.reading.annotations import At, label_of
from pipeline.data.reading.photo import decode_photo, read_mask, read_photo
from pipeline.evaluate.scores import read_samples
from pipeline.models import build, load_weights
from pipeline.models.weights import read_weights
from pipeline.training.run import Run
from pipeline.workspace import read_measured
from tests.hostile.border import TINY, Command, finish

MIB = 2**20


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@contextmanager
def little(seconds: float = 5, mib: int = 300) -> Iterator[None]:
    """The block takes little time and no more memory than that above what there is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + mib * MIB, hard))
    started = time.monotonic()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.monotonic() - started < seconds


# ---- YAML


def laughs(levels: int = 10) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


def merges(levels: int = 10) -> str:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


BOMBS = {
    "aliases": laughs(),
    "merge keys": merges(),
    "itself": "a: &a [*a]",
    "itself in a mapping": "a: &a {b: *a}",
    "deep lists": "a: " + "[" * 5000 + "]" * 5000,
    "deep mappings": "a: " + "{b: " * 5000 + "}" * 5000,
    "deep blocks": "\n".join(" " * n + "a:" for n in range(1000)),
    "a long number": "a: " + "9" * 5000,
    "a long hexadecimal": "a: 0x" + "f" * 5000,
    "many values": "a: [" + "1, " * 50_000 + "]",
    "a long text": "a: " + "x" * 2 * MIB,
    "a long text many times": f"a: &a {'x' * (MIB * 3 // 4)}\nb: [{', '.join(['*a'] * 1000)}]",
    "no date": "a: 2001-99-99",
    "twice": "a: 1\na: 2",
    "a tag": "a: !!python/object/apply:os.system [true]",
    "a list as key": "? [a]\n: 1",
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("where", ["seeds", "sweep", ""])
def test_a_config_of_bombs(command: Command, tmp_path: Path, name: str, where: str) -> None:
    bomb = BOMBS[name]
    lines = bomb.replace("\n", "\n  ")
    text = bomb if not where else f"{where}:\n  {lines}"
    config = tmp_path / "config.yaml"
    config.write_text(f"{text}\n{TINY}" if not where else text)
    with little():
        said = command.refused("pack", config, "--out", tmp_path / "out")
    assert str(config) in said
    assert len(said) < 3000
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name in BOMBS if name != "a tag"])
def test_a_setting_of_bombs(command: Command, tmp_path: Path, name: str) -> None:
    (tmp_path / "config.yaml").write_text(TINY)
    text = (
        BOMBS[name].partition(": ")[2] if name in ("deep lists", "a long number", "itself") else BOMBS[name]
    )
    with little():
        said = command.refused("pack", tmp_path / "config.yaml", "--set", f"seeds={text}")
    assert len(said) < 3000


@pytest.mark.parametrize("name", ["aliases", "merge keys", "itself", "deep lists", "a long number"])
@pytest.mark.parametrize("file", ["config.yaml", "runs/kd/seed-0/config.yaml"])
def test_a_folder_with_a_config_of_bombs_is_reported_or_refused(
    command: Command, tmp_path: Path, name: str, file: str
) -> None:
    finish(tmp_path / "folder")
    (tmp_path / "config.yaml").write_text(TINY)
    (tmp_path / "folder" / file).write_text(BOMBS[name])
    with little():
        said = command.refused("report", tmp_path / "config.yaml", "--out", tmp_path / "folder")
    assert "is damaged" in said
    assert len(said) < 3000


@pytest.mark.parametrize("text", ["", "[]", "1", "a", "null", "a: [", "\0"])
def test_a_runs_config_is_a_mapping(tmp_path: Path, text: str) -> None:
    run = Run(finish(tmp_path))
    (run.path / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match="is damaged"):
        run.differing({"a": 1})


def test_numbers_and_aliases_that_are_meant(tmp_path: Path) -> None:
    assert yaml_of("a: &a {b: 1}\nc: *a\nd: {<<: *a, e: 2}")["d"] == {"b": 1, "e": 2}
    assert yaml_of("a: " + "9" * 300) == {"a": int("9" * 300)}
    with pytest.raises(ValueError, match="deep"):
        json_of("[" * 100_000)


def test_a_sweep_is_counted_before_it_is_made(tmp_path: Path) -> None:
    values = list(range(1, 101))
    grid = {key: values for key in ("epochs", "batch_size", "rows", "validate_every", "explain_every")}
    for sweep in ({"kd": grid}, {"kd": {"epochs": list(range(1, 5000))}}):
        with little(), pytest.raises(ConfigError, match="1000 at most are trained"):
            parse({**yaml_of(TINY), "evaluate": {"select": "val"}, "sweep": sweep})


@pytest.mark.parametrize("value", ["\0", "a\nb", "\x1b[2J", "a/b", "../x", "", "\ud800"])
def test_a_swept_value_is_a_part_of_a_folders_name(value: str) -> None:
    sweep = {"kd": {"weights": [value, "none"]}}
    with pytest.raises(ConfigError, match="cannot be swept"):
        parse({**yaml_of(TINY), "evaluate": {"select": "val"}, "sweep": sweep})


# ---- images


def png(width: int, height: int, mode: int = 2) -> bytes:
    """A PNG that says this size, with no more pixels than a few."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, mode, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 9))
        + chunk(b"IEND", b"")
    )


def jpeg(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG", progressive=True)
    data = bytearray(buffer.getvalue())
    at = data.index(b"\xff\xc2") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def webp(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "WEBP", lossless=True)
    data = bytearray(buffer.getvalue())
    at = data.index(b"VP8L") + 9
    bits = int.from_bytes(data[at : at + 4], "little") & ~((1 << 28) - 1)
    data[at : at + 4] = (bits | (width - 1) | (height - 1) << 14).to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        png(13000, 13000),
        png(13000, 13000, 6),
        png(2**31 - 1, 1),
        png(65535, 1100),
        jpeg(65500, 65500),
        webp(16000, 16000),
    ],
    ids=["png", "rgba", "wide", "flat", "jpeg", "webp"],
)
def test_an_image_bomb_is_refused_before_it_is_decoded(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(data)
    with little(), pytest.raises(DataError, match="cannot read the image"):
        read_photo(tmp_path / "x.png", 64)
    with little(), pytest.raises(DataError, match="cannot read the image"):
        decode_photo(data, "tar, x.png")


def test_a_mask_bomb() -> None:
    with little(), pytest.raises(DataError, match=r"has 13000 x 13000 px, its image 8 x 8"):
        read_mask(io.BytesIO(png(13000, 13000, 0)), "x", (8, 8))


# ---- parquet


def parquet(folder: Path, table: Any, **options: Any) -> HuggingFace:
    import pyarrow.parquet

    pyarrow.parquet.write_table(table, folder / "test-0.parquet", **options)
    return HuggingFace(source="huggingface", root=folder)


def test_a_table_of_nothing(tmp_path: Path) -> None:
    import pyarrow as pa

    from pipeline.data import open_source

    nothing = pa.nulls(3_000_000, pa.binary())
    data = parquet(tmp_path, pa.table({"image": nothing, "label": pa.nulls(len(nothing), pa.int64())}))
    assert (tmp_path / "test-0.parquet").stat().st_size < 200_000
    with little(), pytest.raises(DataError, match="which no images are"):
        open_source(data, "test")


@pytest.mark.parametrize("dictionary", [True, False], ids=["by dictionary", "compressed"])
@pytest.mark.parametrize("column", ["image", "label"])
def test_a_table_that_grows(tmp_path: Path, dictionary: bool, column: str) -> None:
    """A value of a mebibyte, 200 times, in a few kilobytes."""
    import pyarrow as pa

    from pipeline.data import open_source

    big = [b"\0" * MIB] * 200
    table = pa.table(
        {
            "image": big if column == "image" else [b"x" * 60] * 200,
            "label": big if column == "label" else [0] * 200,
        }
    )
    options = {"compression": "zstd", "use_dictionary": dictionary}
    data = parquet(tmp_path, table, **options)
    del table, big
    with little(mib=600), pytest.raises(E2kdError, match=r"far more than its file|which no images are"):
        open_source(data, "test").raw(0)


# ---- weights


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def deflated(value: Any, grown: int = 0) -> bytes:
    """A file of torch.save whose entries are compressed; one of them grows."""
    source, buffer = zipfile.ZipFile(io.BytesIO(saved(value))), io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in source.namelist():
            data = source.read(name)
            archive.writestr(name, bytes(grown) if grown and name.endswith("data/0") else data)
    return buffer.getvalue()


@cache
def weights() -> dict[str, Any]:
    ones = torch.ones(2)
    return {
        "text": b"root:x:0:0:root:/root:/bin/bash\n",
        "empty": b"",
        "a list": saved([ones]),
        "a text": saved("text"),
        "a number": saved(1),
        "int keys": saved({1: ones}),
        "no tensor": saved({"a": 1}),
        "meta": saved({"a": torch.ones(2, device="meta")}),
        "sparse": saved({"a": ones.to_sparse()}),
        "a class": pickle.dumps(ConfigError("x"), 2),
        "cut": saved({"a": ones})[:200],
        "a pickle cut": pickle.dumps({"a": 1}, 2)[:4],
        "a pickle's head": b"\x80\x02" + bytes(range(256)),
        "a zip's head": b"PK\x03\x04" + bytes(500),
        "an empty zip": b"PK\x05\x06" + bytes(18),
        "deflated": deflated({"a": ones}),
        "a zip bomb": deflated({"a": ones}, 64 * MIB),
    }


@pytest.mark.parametrize("name", list(weights()))
def test_weights_that_are_none(tmp_path: Path, name: str) -> None:
    data, net = weights()[name], torch.nn.Linear(2, 2)
    (tmp_path / "w.pt").write_bytes(data)
    (tmp_path / "state.pt").write_bytes(data)
    with little(), pytest.raises(ModelError, match=r"w\.pt"):
        load_weights(net, tmp_path / "w.pt")
    with little(), pytest.raises(CheckpointError, match="is damaged"):
        Run(tmp_path).load_state()


@pytest.mark.parametrize("seed", range(20))
def test_noise_behind_a_pickles_head(tmp_path: Path, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, 400, np.uint8).tobytes()
    whole = bytearray(saved({"a": torch.ones(9)}) if seed % 2 else b"\x80\x02" + noise)
    for at in np.random.default_rng(seed).integers(4, len(whole), 5).tolist():
        whole[at] ^= 1 << seed % 8
    (tmp_path / "w.pt").write_bytes(whole)
    with suppress(ModelError):
        assert isinstance(read_weights(tmp_path / "w.pt"), dict)


@pytest.mark.parametrize("file", ["/etc/passwd", "/dev/zero", "/dev/null", "/"])
def test_a_teacher_whose_weights_are_some_file(command: Command, tmp_path: Path, file: str) -> None:
    (tmp_path / "config.yaml").write_text(TINY.replace("train: {epochs: 1, seed: 0}", f"weights: {file}"))
    with little(20, 2000):
        said = command.refused("precompute", tmp_path / "config.yaml", "--out", tmp_path / "out")
    assert file in said


@pytest.mark.parametrize(
    "state",
    [
        {"module": {}, "optimizer": {}, "epochs_done": True, "best": "x"},
        {"module": [], "optimizer": {}, "epochs_done": 1, "best": 0.0},
        {"module": {}, "epochs_done": 1, "best": 0.0},
    ],
    ids=["types", "a list", "less"],
)
def test_a_state_of_other_types(tmp_path: Path, state: Any) -> None:
    (tmp_path / "state.pt").write_bytes(saved(state))
    with pytest.raises(CheckpointError, match="is damaged"):
        Run(tmp_path).load_state()


# ---- what runs and stage 1 wrote

WRONG: list[Any] = [[], 1, "x", None, True, {"a": []}, [[]], 10**400, "9" * 9000, {"..": {"accuracy": 0.5}}]
DEEP = "[" * 50_000 + "]" * 50_000


def texts(key: str) -> list[str]:
    return [json.dumps({key: value}) for value in WRONG] + [
        f'{{"{key}": {DEEP}}}',
        f'{{"{key}": 1e400}}',
        DEEP,
        "1",
        "[]",
        "{",
    ]


@pytest.mark.parametrize("key", ["splits", "stores", "seconds", "shift"])
def test_a_result_of_other_types(command: Command, tmp_path: Path, key: str) -> None:
    run = finish(tmp_path / "folder")
    (tmp_path / "folder/config.yaml").write_text(TINY)
    (tmp_path / "config.yaml").write_text(TINY)
    whole = json.loads((run / "result.json").read_text())
    for text in (text for text in texts(key) if text != '{"shift": null}'):
        other = {**whole, **json.loads(text)} if text.startswith('{"') and DEEP not in text else None
        (run / "result.json").write_text(text if other is None else json.dumps(other))
        with little():
            assert "is damaged" in command.refused("report", tmp_path / "folder"), text[:100]


@pytest.mark.parametrize(
    "scores",
    [{"accuracy": value} for value in ([], "x", True, {}, 1e300, [1])] + [{"a b\n": 1.0}, [], "x"],
    ids=str,
)
def test_scores_of_other_types(command: Command, tmp_path: Path, scores: Any) -> None:
    finish(tmp_path / "folder", splits={"test-ood": scores})
    (tmp_path / "folder/config.yaml").write_text(TINY)
    assert "is damaged" in command.refused("report", tmp_path / "folder")


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        '{"epoch": "x"}',
        '{"epoch": -1}',
        '{"epoch": 1e9, "loss": []}',
        '{"epoch": 0, "loss": "x"}',
        '{"epoch": 0, "loss": true}',
        '{"epoch": 0, "loss": 1e300}',
        '{"a": ' + DEEP + "}",
        '{"epoch": ' + "9" * 5000 + "}",
    ],
    ids=lambda line: line[:30],
)
def test_a_log_of_other_types(command: Command, tmp_path: Path, line: str) -> None:
    run = finish(tmp_path / "folder")
    (run / "metrics.jsonl").write_text(line + "\n")
    (tmp_path / "folder/config.yaml").write_text(TINY)
    with little():
        said = command.refused("report", tmp_path / "folder")
    assert "metrics.jsonl is damaged" in said


@pytest.mark.parametrize(
    "name", ["codec-cost.json", "freezing-gap.json", "shift-curve.json", "teacher-test-ood.json"]
)
def test_what_was_measured_of_other_types(command: Command, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    finish(folder)
    (folder / "config.yaml").write_text(TINY)
    beside = folder / "stores/gradcam-raw"
    beside.mkdir(parents=True)
    sound = ('{"accuracy": 1}', '{"accuracy": null}')
    for text in (text for text in texts("accuracy") if not name.startswith("teacher") or text not in sound):
        (beside / name).write_text(text)
        with little(), pytest.raises(DataError, match="is damaged"):
            read_measured(load_place(beside), name)
    assert f"{name} is damaged" in command.refused("report", folder)


def load_place(folder: Path) -> Any:
    from artifacts.places import place

    return place(folder)


@pytest.mark.parametrize(
    "scores",
    [
        {"accuracy": torch.ones(2, 2)},
        {"accuracy": torch.ones(2, dtype=torch.int64)},
        {"accuracy": torch.ones(2, dtype=torch.bfloat16)},
        {"accuracy": torch.ones(2), "epg": torch.ones(3)},
        {"confidence": torch.ones(2)},
        {"group": torch.tensor([float("nan")]), "accuracy": torch.ones(1)},
        {"group": torch.arange(5000.0), "accuracy": torch.ones(5000)},
    ],
    ids=lambda scores: ", ".join(scores),
)
def test_scores_per_row_of_other_types(tmp_path: Path, scores: Any) -> None:
    safetensors.torch.save_file(scores, tmp_path / "scores.safetensors")
    with pytest.raises(DataError, match="is damaged"):
        read_samples(tmp_path / "scores.safetensors")


@pytest.mark.parametrize(
    "name",
    ["result.json", "metrics.jsonl", "config.yaml", "scores-test-ood.safetensors", "../../../config.yaml"],
)
def test_a_fifo_in_a_folder_does_not_hang_its_report(command: Command, tmp_path: Path, name: str) -> None:
    run = finish(tmp_path / "folder")
    (tmp_path / "config.yaml").write_text(TINY)
    file = run / name
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    with little():
        ended = command("report", tmp_path / "config.yaml", "--out", tmp_path / "folder")
    assert ended.code in (0, 2)
    assert ended.code == 0 or "not a regular file" in ended.err


def test_a_state_that_is_a_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="not a regular file"):
        Run(tmp_path).load_state()


@pytest.mark.parametrize("label", [10**400, -1, 2**24, True, 1.5, "x" * 10**6])
def test_a_label_of_a_table_is_shown_short(label: Any) -> None:
    with pytest.raises(DataError, match="is not a class index") as caught:
        label_of(label, At(Path("metadata.jsonl"), line=1))
    assert len(str(caught.value)) < 400


def test_the_config_of_a_model_is_loaded_still(tmp_path: Path) -> None:
    """What is sound passes every bound."""
    from pipeline.models.weights import save_weights

    (tmp_path / "config.yaml").write_text(TINY)
    settings = load(tmp_path / "config.yaml").teacher
    net = build(settings, 3)
    save_weights(net, tmp_path / "w.safetensors")
    torch.save(net.net.state_dict(), tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        load_weights(build(settings, 3), tmp_path / name)
