"""Poisson clocks: right in law, and each its own stream."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2, kstest

from fedsim.engine.clocks import Batch, Clocks
from fedsim.topology.topology import Topology

TORUS = Topology.from_edges(
    "torus",
    25,
    [(5 * i + j, 5 * i + (j + 1) % 5) for i in range(5) for j in range(5)]
    + [(5 * i + j, 5 * ((i + 1) % 5) + j) for i in range(5) for j in range(5)],
)
RATES = np.linspace(0.2, 3.0, TORUS.m)


def clocks(nodes=None, edges=None, rates=RATES, seed=4, node_clocks=True) -> Clocks:
    nodes = np.arange(TORUS.n) if nodes is None else nodes
    edges = np.arange(TORUS.m) if edges is None else edges
    return Clocks(seed, nodes, edges, TORUS.edges, rates, np.arange(TORUS.n), node_clocks)


def columns(batch: Batch) -> np.ndarray:
    return np.stack([batch.time, batch.a, batch.b, batch.edge], axis=1)


def test_events_come_in_order_and_name_their_rows():
    """Times ascend; a gradient names its row, an exchange both ends and its edge."""
    batch = clocks().until(50.0)
    assert (np.diff(batch.time) > 0).all()
    assert batch.time[-1] <= 50.0
    gossip = batch.b >= 0
    assert np.array_equal(TORUS.edges[batch.edge[gossip]], np.stack([batch.a, batch.b], axis=1)[gossip])
    assert (batch.edge[~gossip] == -1).all()


@pytest.mark.parametrize("cuts", [[50.0], [0.001, 0.002, 7.0, 7.0, 50.0], np.linspace(0, 50, 777)])
def test_windows_do_not_matter(cuts):
    """However time is cut into windows, the events are the same, to the bit."""
    source = clocks()
    parts = np.concatenate([columns(source.until(float(cut))) for cut in cuts])
    assert np.array_equal(parts, columns(clocks().until(50.0)))


def test_a_subset_of_clocks_ticks_as_among_all():
    """The clocks that touch some nodes give exactly the whole schedule's events at these nodes."""
    mine = np.arange(7, 13)
    touching = np.flatnonzero(np.isin(TORUS.edges, mine).any(axis=1))
    whole = columns(clocks().until(30.0))
    wanted = np.where(whole[:, 2] < 0, np.isin(whole[:, 1], mine), np.isin(whole[:, 3], touching))
    assert np.array_equal(columns(clocks(mine, touching).until(30.0)), whole[wanted])


def test_gossip_rates_do_not_move_a_gradient():
    """Doubling the rates leaves every gradient where it was and halves the time of every exchange."""
    slow, fast = columns(clocks().until(20.0)), columns(clocks(rates=2 * RATES).until(10.0))
    gradients = lambda events: events[events[:, 2] < 0]
    assert np.array_equal(gradients(slow)[gradients(slow)[:, 0] <= 10.0], gradients(fast))
    assert np.array_equal(slow[slow[:, 2] >= 0][:, 3], fast[fast[:, 2] >= 0][:, 3])
    assert not len(gradients(columns(clocks(node_clocks=False).until(20.0))))


def test_counts_and_gaps_follow_the_rates():
    """Edges tick in proportion to their rates (chi-square), and the gaps of one clock are exponential."""
    horizon = 400.0
    batch = clocks(seed=11).until(horizon)
    found = np.bincount(batch.edge[batch.b >= 0], minlength=TORUS.m)
    expected = RATES * horizon
    assert ((found - expected) ** 2 / expected).sum() < chi2.ppf(1 - 1e-4, TORUS.m)
    assert abs((batch.b < 0).sum() - TORUS.n * horizon) < 4 * np.sqrt(TORUS.n * horizon)
    gaps = np.diff(batch.time[batch.edge == 40], prepend=0.0)
    assert kstest(gaps * RATES[40], "expon").pvalue > 1e-4


def test_rate_zero_never_ticks():
    """An edge of rate 0 is allowed, and silent."""
    rates = RATES.copy()
    rates[3] = 0.0
    assert 3 not in clocks(rates=rates).until(100.0).edge


def test_clocks_go_on_from_what_was_saved():
    """Time and number of the next ticks are all that a clock is."""
    first, second = clocks(), clocks()
    first.until(13.0)
    second.load(first.save())
    assert np.array_equal(columns(first.until(40.0)), columns(second.until(40.0)))


def test_crowded_windows_are_drawn_again_with_more_room(monkeypatch):
    """A window with more events than expected loses none of them."""
    import fedsim.engine.clocks as module

    whole = columns(clocks().until(50.0))
    monkeypatch.setattr(module.math, "sqrt", lambda x: -x / 10)  # room for two fifths of what will come
    assert np.array_equal(columns(clocks().until(50.0)), whole)
