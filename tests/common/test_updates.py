from __future__ import annotations

import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from locum.common.tensor_files import map_tensors, write_tensors
from locum.common.updates import Arrays, l2_norm


def _in_one_piece(tensors: Arrays) -> float:
    return math.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in tensors.values()))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 400_000) | st.sampled_from([65535, 65536, 65537, 131071, 131072, 131080, 262145]),
    st.sampled_from(["float16", "float32", "float64", "int64", "uint8"]),
    st.integers(0, 99),
)
def test_the_norm_in_blocks_is_to_the_bit_that_in_one_piece(size: int, dtype: str, seed: int) -> None:
    array = (np.random.default_rng(seed).random(size, np.float32) * 100).astype(dtype)
    assert l2_norm({"a": array, "b": array[: size // 3]}) == _in_one_piece({"a": array, "b": array[: size // 3]})


def test_the_norm_is_to_the_bit_the_same_for_every_layout() -> None:
    array = np.random.default_rng(0).normal(size=(70, 80, 90)).astype(np.float32)
    for view in (array, array.T, array.transpose(1, 0, 2), array[::2], array[::-1], array[:, ::-1, ::3], array[:0]):
        assert l2_norm({"a": view}) == _in_one_piece({"a": view})


@pytest.mark.parametrize(("value", "norm"), [(np.inf, np.inf), (-np.inf, np.inf), (np.nan, np.nan), (1e300, np.inf)])
def test_what_is_not_finite_shows_in_the_norm(value: float, norm: float) -> None:
    array = np.ones(200_000)
    array[123_456] = value
    with np.errstate(over="ignore"):
        found = l2_norm({"a": array})
    assert found == norm or (math.isnan(found) and math.isnan(norm))


def test_the_norm_of_a_file_takes_the_memory_of_blocks(tmp_path: Path) -> None:
    array = np.random.default_rng(0).random(4 << 20, np.float32)
    blob = write_tensors(tmp_path / "file", {"w": array})
    found = map_tensors(tmp_path / "file", blob.sha256)
    before = _file_pages()
    tracemalloc.start()
    norm = l2_norm(found)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert norm == _in_one_piece({"w": array})
    assert peak < 4 << 20
    assert _file_pages() - before < 4 << 20


def _file_pages() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssFile"))
