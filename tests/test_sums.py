"""Sums over nodes by the fixed tree."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.engine.sums import finish, intervals, partial_sums, tree_sum


def _values(n: int, dtype=np.float64, dim: int = 3) -> np.ndarray:
    rng = np.random.default_rng(n)
    return (rng.standard_normal((n, dim)) * 10.0 ** rng.integers(-8, 8, (n, 1)) * 1e3).astype(dtype)


def _by_recursion(values: np.ndarray, begin: int, size: int) -> np.ndarray:
    """The tree as its definition reads: an aligned interval is its left half plus its right half, cut at n."""
    if size == 1:
        return values[begin]
    left, middle = _by_recursion(values, begin, size // 2), begin + size // 2
    return left if middle >= len(values) else left + _by_recursion(values, middle, size // 2)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 8, 9, 31, 32, 33, 100, 127, 1000])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
def test_sum_is_the_tree_of_its_definition(n, dtype):
    """The compiled sum has the bits of the recursion over aligned intervals, type kept."""
    values = _values(n, dtype)
    got = tree_sum(torch.from_numpy(values), 0, n).numpy()
    assert got.dtype == dtype
    assert np.array_equal(got, _by_recursion(values, 0, 1 << (n - 1).bit_length()))


@given(st.integers(1, 70), st.data())
@settings(max_examples=150, deadline=None)
def test_any_partition_gives_the_same_bits(n, data):
    """However contiguous ranges are divided among processes, tiles finish to the bits of one process."""
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, n - 1)), max_size=6)))
    edges = [0, *[c for c in cuts if c < n], n]
    values = _values(n)
    tiles, sums = [], []
    for lo, hi in pairwise(edges):
        own, part = partial_sums(values[lo:hi], lo, n)
        tiles += own
        sums.append(part)
    assert np.array_equal(finish(tiles, np.concatenate(sums), n), tree_sum(torch.from_numpy(values), 0, n).numpy())


@given(st.integers(1, 5000), st.data())
@settings(max_examples=200, deadline=None)
def test_tiles_cover_once_and_are_few(n, data):
    """A range is tiled left to right by at most 2 log2(rows) + 2 aligned intervals."""
    lo = data.draw(st.integers(0, n - 1))
    hi = data.draw(st.integers(lo + 1, n))
    at = lo
    tiles = intervals(lo, hi, n)
    for height, index in tiles:
        assert index << height == at
        at = min((index + 1) << height, n)
    assert at == hi
    assert len(tiles) <= 2 * np.log2(max(hi - lo, 2)) + 2


def test_error_is_that_of_pairwise_summation():
    """A million numbers of one sign are summed to log2(n) roundings, not n."""
    values = np.random.default_rng(0).random((2**20, 1))
    exact = float(sum(map(Fraction, values[:, 0])))
    got = float(tree_sum(torch.from_numpy(values), 0, len(values))[0])
    assert abs(got - exact) <= 20 * np.finfo(np.float64).eps * exact


def test_integers_are_exact_beyond_the_mantissa():
    """int64 sums keep every digit where float64 would round."""
    values = torch.tensor([[2**53], [1], [1], [1]], dtype=torch.int64)
    assert int(tree_sum(values, 0, 4)[0]) == 2**53 + 3


def test_input_is_not_modified():
    """The values handed in are read only."""
    values = torch.from_numpy(_values(13))
    before = values.clone()
    tree_sum(values, 0, 13)
    assert torch.equal(values, before)
