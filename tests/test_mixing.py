"""The mixing kernel: dense products to rounding, the same bits in any block."""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
from numba import njit

from fedsim.engine import mixing
from fedsim.engine.addresses import addresses_of
from fedsim.engine.mixing import by_position, mix_rows
from fedsim.topology.mixing import mixing_matrix
from fedsim.topology.topology import Topology

GRAPHS = {
    "wheel": nx.wheel_graph(13),
    "path": nx.path_graph(5),
    "tree": nx.balanced_tree(3, 2),
    "complete": nx.complete_graph(10),
    "two nodes": nx.path_graph(2),
}


def _case(name: str) -> tuple[Topology, np.ndarray, tuple]:
    topology = Topology.from_networkx(GRAPHS[name])
    matrix = mixing_matrix(topology, "metropolis")
    return topology, matrix.toarray(), by_position(matrix, topology)


def _mix(csr, values: np.ndarray, first: int = 0, count: int | None = None) -> np.ndarray:
    out = np.empty((len(values) - first if count is None else count, values.shape[1]), values.dtype)
    mix_rows(first, *csr, 0, addresses_of(values), out)
    return out


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("dim", [1, 2, 7, 1023, 1025, 2500])
def test_equals_the_dense_product(name, dim):
    """`sum_j w_ij v_j` of every row equals the dense product to rounding, beyond one tile of columns too."""
    topology, dense, csr = _case(name)
    by_node = np.random.default_rng(dim).standard_normal((topology.n, dim))
    got = _mix(csr, np.ascontiguousarray(by_node[topology.order]))
    assert np.abs(got - (dense @ by_node)[topology.order]).max() < 1e-14


@pytest.mark.parametrize("name", GRAPHS)
def test_is_the_sum_from_left_to_right(name):
    """The bits are those of a plain loop over neighbours in ascending position."""
    topology, _, (offsets, columns, weights) = _case(name)
    values = np.random.default_rng(1).standard_normal((topology.n, 9))
    expected = np.zeros_like(values)
    for row in range(topology.n):
        assert (np.diff(columns[offsets[row] : offsets[row + 1]]) > 0).all()
        for place in range(offsets[row], offsets[row + 1]):
            expected[row] = expected[row] + weights[place] * values[columns[place]]
    assert np.array_equal(_mix((offsets, columns, weights), values), expected)


@pytest.mark.parametrize("block", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_blocks_do_not_change_a_bit(block, dtype):
    """Rows that lie in blocks of their own, and are answered block by block, mix to the same bits."""
    topology, _, csr = _case("wheel")
    values = np.random.default_rng(2).standard_normal((topology.n, 37)).astype(dtype)
    whole = _mix(csr, values)
    parts = [np.array(values[begin : begin + block]) for begin in range(0, topology.n, block)]
    addresses = np.concatenate([addresses_of(part) for part in parts])
    for begin in range(0, topology.n, block):
        out = np.empty((min(block, topology.n - begin), 37), dtype)
        mix_rows(begin, *csr, 0, addresses, out)
        assert np.array_equal(out, whole[begin : begin + block])


def test_columns_do_not_change_a_bit():
    """A coordinate's result does not depend on how many coordinates share the call."""
    topology, _, csr = _case("wheel")
    values = np.random.default_rng(3).standard_normal((topology.n, 1500))
    whole = _mix(csr, values)
    for begin, end in [(0, 1), (1, 4), (4, 1200), (1200, 1500)]:
        assert np.array_equal(_mix(csr, np.ascontiguousarray(values[:, begin:end])), whole[:, begin:end])


@pytest.mark.parametrize(("columns", "dtype"), [(0, np.float64), (0, np.float32), (96, np.float64)])
def test_no_cache_changes_a_bit(monkeypatch, columns, dtype):
    """Taken by so many columns of all rows as a cache would hold, or by pieces of rows, the sums have the same bits."""
    topology, _, csr = _case("wheel")
    values = np.random.default_rng(4).standard_normal((topology.n, 1235)).astype(dtype)  # rows end within lines
    expected = _mix(csr, values)
    monkeypatch.setattr(mixing, "LARGE", 1000)
    monkeypatch.setattr(mixing, "CACHE", 8 * topology.n * columns)
    out = np.empty_like(values)
    njit(error_model="numpy")(mix_rows.py_func)(0, *csr, 0, addresses_of(values), out)
    assert np.array_equal(out, expected)
