"""Codecs: what comes back is within the bound that the manifest states; what does not fit is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from artifacts import ConfigError
from artifacts.codecs import (
    CODECS,
    decode_logits,
    decode_maps,
    encode_logits,
    encode_maps,
    get_codec,
)
from artifacts.rows import DEAD

MAPS = ["fp16", "int8", "int6", "int5", "lossless"]
LOGITS = ["fp16", "uint12", "fp32"]
LEVELS = {"int8": 127, "int6": 31, "int5": 15}
BIG = 3e38


def some_maps(elements: st.SearchStrategy[float]) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float32, (2, 1, 1, 2, 3, 2), elements=elements)


def back(name: str, maps: np.ndarray) -> np.ndarray:
    codec = get_codec(name)
    stored, scale = encode_maps(codec, maps)
    assert stored.dtype == codec.stored_dtype
    assert (stored.shape, scale.shape, scale.dtype) == (maps.shape, maps.shape[:3], np.float32)
    assert not (stored == codec.fill_value).any()
    found = decode_maps(codec, stored, scale)
    assert found.dtype == np.float32
    assert np.array_equal(found, decode_maps(codec, stored, scale, out=np.empty_like(found)))
    return found


@settings(max_examples=150, deadline=None)
@given(some_maps(st.floats(-float(np.float32(BIG)), float(np.float32(BIG)), width=32)), st.sampled_from(MAPS))
def test_maps_of_any_magnitude_keep_their_bound(maps: np.ndarray, name: str) -> None:
    found = back(name, maps).astype(np.float64)
    exact = maps.astype(np.float64)
    largest = np.abs(exact).reshape(2, -1).max(1).reshape(2, 1, 1, 1, 1, 1)
    if name == "lossless":
        bound = np.zeros_like(exact)
    elif name == "fp16":
        bound = np.abs(exact) * 2.0**-11 + largest * 2.0**-25
    else:
        root = np.sqrt(np.abs(exact) / np.where(largest > 0, largest, 1))
        bound = largest * (root / LEVELS[name] + 1 / (4 * LEVELS[name] ** 2))
    assert (np.abs(found - exact) <= bound * (1 + 1e-5) + 2e-38).all()  # denormal scales are rounded up


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-7, 1.0, 1e12, 1e38])
def test_tiny_and_huge_maps_keep_their_direction(name: str, size: float) -> None:
    rng = np.random.default_rng(0)
    maps = (rng.normal(size=(1, 1, 1, 6, 16, 16)) * size / 8).astype(np.float32)
    found = back(name, maps).ravel().astype(np.float64) / size
    exact = maps.ravel().astype(np.float64) / size
    assert found @ exact / np.linalg.norm(found) / np.linalg.norm(exact) > 0.995


@pytest.mark.parametrize("name", MAPS)
def test_dead_and_constant_maps(name: str) -> None:
    maps = np.stack([np.full((1, 1, 1, 3, 3), value, np.float32) for value in (0.0, 2.5, -1e-12)])
    found = back(name, maps)
    assert not found[0].any()
    np.testing.assert_allclose(found[1:], maps[1:], rtol=5e-4)


@settings(max_examples=60, deadline=None)
@given(some_maps(st.floats(-1e6, 1e6, width=32)), st.sampled_from(MAPS))
def test_decoded_maps_encode_to_the_same_numbers(maps: np.ndarray, name: str) -> None:
    """Of dead maps nothing is promised: one of 1e-39 decodes to zeros."""
    maps = np.where(np.abs(maps) < DEAD, np.float32(0), maps)
    codec = get_codec(name)
    stored, scale = encode_maps(codec, maps)
    again, scale_again = encode_maps(codec, decode_maps(codec, stored, scale))
    assert np.array_equal(again, stored)
    np.testing.assert_allclose(scale_again, scale, rtol=0 if name in ("fp16", "lossless") else 2e-7)


NEARLY_EQUAL = np.array([0, 0, 0, 1, 2, 0, 3], np.float32) * np.float32(2**-149)


@settings(max_examples=150, deadline=None)
@given(arrays(np.float32, (2, 2, 7), elements=st.floats(-60000, 60000, width=32)), st.sampled_from(LOGITS))
@example(np.tile(NEARLY_EQUAL, (2, 2, 1)), "uint12")
def test_logits_keep_their_bound_and_their_top_class(logits: np.ndarray, name: str) -> None:
    codec = get_codec(name)
    stored, scale = encode_logits(codec, logits)
    assert (stored.dtype, stored.shape) == (codec.stored_dtype, logits.shape)
    assert not (stored == codec.fill_value).any()
    found = decode_logits(codec, stored, scale).astype(np.float64)
    exact = logits.astype(np.float64)
    span = (exact.max(2) - exact.min(2))[..., None]
    bound = {
        "fp32": 0 * exact,
        "fp16": np.abs(exact) * 2.0**-10 + 2.0**-23,
        "uint12": span / 4095 * 1.51 + np.abs(exact).max() * 1e-6,
    }[name]
    assert (np.abs(found - exact) <= bound).all()
    assert (found.argmax(2) == exact.argmax(2)).all()


def test_rounding_never_hands_the_top_to_another_class() -> None:
    """16.001 and 16.0 are one float16: without care, class 0 would be the decoded top-1."""
    logits = np.array([[[16.0, 16.001, -3.0]], [[16.001, 16.0, -3.0]]], np.float32)
    for name in LOGITS:
        found = decode_logits(get_codec(name), *encode_logits(get_codec(name), logits))
        assert found.argmax(2).ravel().tolist() == [1, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", range(4))
def test_what_is_not_finite_is_refused_with_its_first_row(row: int, bad: float) -> None:
    maps, logits = np.ones((5, 1, 1, 1, 2, 2), np.float32), np.ones((5, 1, 3), np.float32)
    for values in (maps, logits):
        values[row].flat[1] = bad
        values[4].flat[2] = np.nan
    for name in MAPS:
        with pytest.raises(ValueError, match=f"^{row}$"):
            encode_maps(get_codec(name), maps)
    for name in LOGITS:
        with pytest.raises(ValueError, match=f"^{row}$"):
            encode_logits(get_codec(name), logits)
    for name in ("fp16", "fp32", "int6"):
        with pytest.raises(ValueError, match=f"^{row}$"):
            get_codec(name).encode(maps)


@pytest.mark.parametrize("value", [65520.0, -7e4, 1e38])
def test_logits_that_overflow_fp16_are_refused_and_fit_fp32(value: float) -> None:
    logits = np.array([[[0, 1]], [[value, 0]]], np.float32)
    with pytest.raises(ValueError, match=r"^1$"):
        encode_logits(get_codec("fp16"), logits)
    assert np.array_equal(decode_logits(get_codec("fp32"), *encode_logits(get_codec("fp32"), logits)), logits)


@pytest.mark.parametrize("name", sorted(CODECS))
def test_a_codec_is_found_by_its_config(name: str) -> None:
    codec = get_codec(name)
    assert type(get_codec(codec.get_config()["id"])) is type(codec)
    assert codec.codec_id == f"e2kd.{name}"
    assert codec.error_bound


def test_lossless_is_fp32_and_unknown_codecs_are_named() -> None:
    assert get_codec("lossless").codec_id == "e2kd.fp32"
    with pytest.raises(ConfigError, match=r"unknown codec 'e2kd.int7'; one of fp16, fp32, int8"):
        get_codec("e2kd.int7")
