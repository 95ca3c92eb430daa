"""Random streams: published vectors, distributions, and independence of who draws."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from fedsim.engine.streams import RoundDraws, Streams, philox, purpose, uniform

# Salmon et al., SC 2011: the known-answer vectors that their reference implementation ships (philox4x32, 10 rounds).
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
NODES = np.array([5, 0, 3, 17, 2, 11, 4], dtype=np.int64)


@njit
def _philox(c, k):
    return philox(c[0], c[1], c[2], c[3], k[0], k[1])


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
def test_published_vectors(counter, key, expected):
    """Philox4x32-10 gives the answers that its authors published."""
    got = _philox(np.array(counter, np.uint32), np.array(key, np.uint32))
    assert tuple(int(v) for v in got) == expected


@given(st.lists(st.integers(1, 3), min_size=1, max_size=7), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_draws_do_not_depend_on_who_holds_the_node(cuts, seed, step):
    """However the nodes are divided into blocks and ordered, every node draws the same bits."""
    streams = Streams(seed)
    for draw in (streams.uniform, streams.normal):
        whole = draw("batch", NODES, step, 5)
        edges = [0, *np.minimum(np.cumsum(cuts), len(NODES)), len(NODES)]
        parts = [draw("batch", NODES[a:b], step, 5) for a, b in pairwise(edges) if b > a]
        assert np.array_equal(np.concatenate(parts), whole)
        assert np.array_equal(draw("batch", NODES[::-1].copy(), step, 5)[::-1], whole)


def test_a_longer_draw_begins_with_the_shorter_one():
    """Asking for more numbers does not change the first ones, odd counts included."""
    streams = Streams(3)
    for draw in (streams.uniform, streams.normal):
        assert np.array_equal(draw("x", NODES, 9, 8)[:, :5], draw("x", NODES, 9, 5))


def test_every_part_of_the_key_matters():
    """Seed (both halves), purpose, node and step each change the whole stream."""
    base = Streams(1).uniform("a", NODES, 2, 64)
    others = [
        Streams(2).uniform("a", NODES, 2, 64),
        Streams(1 + 2**32).uniform("a", NODES, 2, 64),
        Streams(1).uniform("b", NODES, 2, 64),
        Streams(1).uniform("a", NODES, 3, 64),
        Streams(1).uniform("a", NODES + 100, 2, 64),
    ]
    assert all(not np.isin(other, base).any() for other in others)


def test_a_single_draw_equals_the_table():
    """The compiled scalar used inside event kernels gives the same number as the array form."""
    table = Streams(7).uniform("batch", NODES, 4, 6)
    single = [[uniform(np.uint64(7), purpose("batch"), node, 4, j) for j in range(6)] for node in NODES]
    assert np.array_equal(table, np.array(single))


def test_distributions():
    """Uniforms and normals pass Kolmogorov-Smirnov, are uncorrelated along nodes, steps and draws."""
    from scipy.stats import kstest

    streams, nodes = Streams(0), np.arange(400, dtype=np.int64)
    u, z = streams.uniform("u", nodes, 0, 500), streams.normal("z", nodes, 0, 500)
    assert kstest(u.ravel(), "uniform").pvalue > 1e-3
    assert kstest(z.ravel(), "norm").pvalue > 1e-3
    assert (u >= 0).all()
    assert (u < 1).all()
    bound = 4.5 / np.sqrt(u.size)
    centred = u - 0.5
    pairs = [
        (centred[:, :-1], centred[:, 1:]),
        (centred[:-1], centred[1:]),
        (centred, streams.uniform("u", nodes, 1, 500) - 0.5),
        (z[:, ::2], z[:, 1::2]),
    ]
    for a, b in pairs:
        assert abs(np.mean(a * b)) / (a.std() * b.std()) < 2 * bound


def test_integers_stay_in_range_and_are_even():
    """Integers lie in [0, high) for a high of each row's own, and every value is as likely."""
    high = np.array([1, 2, 3, 5, 7, 11, 1000])
    drawn = Streams(5).integers("i", NODES, 0, 20_000, high)
    assert (drawn >= 0).all()
    assert (drawn < high[:, None]).all()
    for row in range(1, 6):
        counts = np.bincount(drawn[row], minlength=high[row])
        expected = 20_000 / high[row]
        assert ((counts - expected) ** 2 / expected).sum() < 5 * high[row] + 20


def test_shared_draws_are_equal_everywhere_and_differ_by_round_and_purpose():
    """A shared generator depends on seed, purpose and round only."""
    here, there = RoundDraws(Streams(4), NODES[:2], 6), RoundDraws(Streams(4), NODES[2:], 6)
    first = here.shared("clients").random(8)
    assert np.array_equal(first, there.shared("clients").random(8))
    assert not np.isin(RoundDraws(Streams(4), NODES, 7).shared("clients").random(8), first).any()
    assert not np.isin(here.shared("dropout").random(8), first).any()


def test_round_draws_are_rows_of_the_block():
    """An algorithm gets `[rows, count]` tensors: float64, integers as int64."""
    draws = RoundDraws(Streams(0), NODES, 1)
    assert draws.uniform("a", 3).shape == (7, 3)
    assert draws.normal("a", 3).dtype == torch.float64
    assert draws.integers("a", 2, 10).dtype == torch.int64


def test_global_generators_are_left_alone():
    """Drawing neither uses nor moves the global state of NumPy and torch."""
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002 - the global state is the subject
    Streams(0).normal("a", NODES, 0, 100)
    Streams(0).shared("a", 0).random(10)
    assert np.array_equal(before[0], np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(before[1], torch.get_rng_state())
