"""Codecs: what comes back is within the bound that the manifest states; what does not fit is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from artifacts import ConfigError
from artifacts.codecs import CODECS, get_codec

LARGEST = 65504.0
VALUES = arrays(
    np.float32,
    array_shapes(min_dims=1, max_dims=4, max_side=4),
    elements=st.floats(-LARGEST, LARGEST, width=32),
)


@settings(max_examples=100, deadline=None)
@given(VALUES)
def test_fp16_keeps_its_bound(values: np.ndarray) -> None:
    codec = get_codec("fp16")
    stored = codec.encode(values)
    back = codec.decode(stored)
    assert stored.dtype == codec.stored_dtype
    assert back.dtype == np.float32
    assert back.shape == values.shape
    exact = values.astype(np.float64)
    bound = np.where(np.abs(exact) < 6.1e-5, 2.0**-25, np.abs(exact) * 2.0**-11)
    assert (np.abs(back - exact) <= bound).all()


@settings(max_examples=50, deadline=None)
@given(
    arrays(np.float32, array_shapes(), elements=st.floats(width=32, allow_nan=False, allow_infinity=False))
)
def test_fp32_is_exact(values: np.ndarray) -> None:
    codec = get_codec("fp32")
    assert np.array_equal(codec.decode(codec.encode(values)), values)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(sorted(CODECS)),
    st.integers(0, 4),
    st.integers(0, 5),
    st.sampled_from([np.nan, np.inf, -np.inf]),
)
def test_what_is_not_finite_is_refused_with_its_first_row(
    name: str, row: int, column: int, bad: float
) -> None:
    values = np.zeros((5, 2, 3), np.float32)
    values[row].flat[column] = bad
    values[4, 1, 2] = np.nan
    with pytest.raises(ValueError, match=f"^{row}$"):
        get_codec(name).encode(values)


@pytest.mark.parametrize("value", [65520.0, -7e4, 1e38])
def test_what_overflows_fp16_is_refused_and_fits_fp32(value: float) -> None:
    values = np.array([[0], [value]], np.float32)
    with pytest.raises(ValueError, match=r"^1$"):
        get_codec("fp16").encode(values)
    assert np.array_equal(get_codec("fp32").encode(values), values)


@pytest.mark.parametrize("name", sorted(CODECS))
def test_a_codec_is_found_by_its_config_and_never_stores_its_fill(name: str) -> None:
    codec = get_codec(name)
    assert type(get_codec(codec.get_config()["id"])) is type(codec)
    assert codec.codec_id == f"e2kd.{name}"
    assert codec.error_bound
    assert np.isnan(codec.fill_value)


def test_unknown_codecs_are_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown codec 'e2kd.int6'; one of fp16, fp32"):
        get_codec("e2kd.int6")
