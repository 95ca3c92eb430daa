"""Random numbers, sums and minibatches that do not depend on who computes them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from fedsim.algorithms.algorithm import Sampling
from fedsim.engine.sampling import check, draw
from fedsim.engine.streams import Streams, philox
from fedsim.engine.sums import finish, intervals, partial_sums, tree_sum
from fedsim.errors import InputError


@njit
def _philox(a, b, c, d, k0, k1):
    return philox(a, b, c, d, k0, k1)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([0] * 6, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 6, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_vectors(words, expected):
    """The generator is Philox4x32-10: it reproduces the known answers of its authors."""
    assert list(_philox(*words)) == expected


def test_a_nodes_draws_do_not_depend_on_the_other_rows():
    """A node draws the same numbers alone, among others, and in another order."""
    streams, nodes = Streams(7), np.arange(20)
    together = streams.normal("noise", nodes, 3, 5)
    assert np.array_equal(together[[4]], streams.normal("noise", nodes[[4]], 3, 5))
    assert np.array_equal(together[::-1], streams.normal("noise", nodes[::-1].copy(), 3, 5))


def test_seed_purpose_and_step_each_change_the_draws():
    """Streams of another seed, purpose or step are other streams; the same key repeats them."""
    nodes = np.arange(3)
    first = Streams(1).uniform("a", nodes, 0, 4)
    assert np.array_equal(first, Streams(1).uniform("a", nodes, 0, 4))
    for other in (
        Streams(2).uniform("a", nodes, 0, 4),
        Streams(1).uniform("b", nodes, 0, 4),
        Streams(1).uniform("a", nodes, 1, 4),
    ):
        assert not np.any(other == first)


def test_uniforms_and_normals_have_the_right_moments():
    """Mean, variance and range of a large sample are those of the distribution (5 standard errors)."""
    n = 200_000
    u, z = (f("m", np.arange(200), 0, n // 200).ravel() for f in (Streams(3).uniform, Streams(3).normal))
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5


@given(st.integers(1, 200), st.data())
@settings(max_examples=60, deadline=None)
def test_global_sums_have_the_same_bits_for_every_partition(n, data):
    """Any contiguous split of the nodes over processes gives the same sum, bit for bit."""
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, n - 1)), max_size=6))) if n > 1 else []
    values = np.random.default_rng(n).normal(size=(n, 3))
    whole = tree_sum(torch.from_numpy(values), 0, n).numpy()
    bounds = [0, *cuts, n]
    tiles, sums = [], []
    for lo, hi in zip(bounds[:-1], bounds[1:], strict=True):
        own, part = partial_sums(values[lo:hi], lo, n)
        tiles += own
        sums.append(part)
        assert len(own) <= 2 * max(1, (hi - lo).bit_length())
    assert np.array_equal(finish(tiles, np.concatenate(sums), n), whole)
    assert np.allclose(whole, values.sum(axis=0), rtol=1e-12, atol=1e-12)


def test_integer_sums_are_exact():
    """int64 sums stay int64 and exact far beyond what a float64 holds."""
    values = torch.full((5, 1), 2**60 + 1, dtype=torch.int64)
    assert int(tree_sum(values, 0, 5)[0]) == 5 * (2**60 + 1)


def test_tiles_cover_a_range_once():
    """The tree intervals of a range tile it from left to right without overlap."""
    for n in (1, 5, 8, 13):
        for lo in range(n):
            for hi in range(lo + 1, n + 1):
                place = lo
                for height, index in intervals(lo, hi, n):
                    assert index << height == place
                    place = min((index + 1) << height, n)
                assert place == hi


def test_an_epoch_visits_every_record_once():
    """Epoch sampling draws a permutation of the node's records before it repeats one."""
    records = np.array([7, 9])
    seen = [draw(Sampling(3, "epoch"), np.uint64(1), np.arange(2), k, records) for k in range(3)]
    first = [int(i) for b in seen for i, w in zip(b.indices[0], b.weights[0], strict=True) if w]
    assert sorted(first) == list(range(7))
    assert seen[2].weights[0].tolist() == [1.0, 0.0, 0.0]


def test_poisson_sampling_is_unbiased():
    """A record is in a Poisson batch with probability size / records, weighted by 1 / size."""
    records, counts = np.array([10]), np.zeros(10)
    for k in range(4000):
        b = draw(Sampling(2, "poisson"), np.uint64(5), np.arange(1), k, records)
        counts[b.indices[0][b.weights[0] > 0]] += 1
    assert np.all(np.abs(counts / 4000 - 0.2) < 5 * (0.16 / 4000) ** 0.5)


def test_a_batch_larger_than_a_node_is_refused():
    """A batch that a node cannot fill names the node and what would work."""
    with pytest.raises(InputError, match=r"node 1 has 3; use at most 3"):
        check(Sampling(4, "epoch"), np.array([5, 3]), "logistic")
    with pytest.raises(InputError, match="no records to draw from"):
        check(Sampling(4), np.array([0, 0]), "quadratic")
