"""Waves: batches of gradients give the bits of one event at a time."""

from __future__ import annotations

import numpy as np
import pytest
from event_cases import SinglePrecision, events, random_squares, ring, three_variables

from fedsim.algorithms.algorithm import Sampling
from fedsim.topology.topology import Topology

DUAL = {"dual": True, "message": np.zeros(3)}
OPTIONS = {
    "plain columns": {},
    "gradient map": {"gradient_map": np.array([[0.9, 0.1, 0], [0, 1, 0], [0.2, 0, 0.8]])},
    "dual": {**DUAL, "edge_jump": np.array([0, -0.1, 0.05]), "edge_scale": np.linspace(0.5, 2, 9)},
    "dual, edges only": {**DUAL, "node_clocks": False},
}


def state(run) -> dict[str, np.ndarray]:
    run.advance(9)
    return run.save()


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("star", [False, True])
def test_waves_equal_the_plain_loop_to_the_bit(option, star):
    """Gradients in batches change no bit and no count, on a ring and on a star, where all wait for the hub."""
    topology = Topology.from_edges("star", 9, [(0, i) for i in range(1, 9)]) if star else ring(9)
    problem = random_squares(9, 5, records=6, compiles=False)
    columns = dict(OPTIONS[option])
    if "edge_scale" in columns:
        columns["edge_scale"] = columns["edge_scale"][: topology.m]
    plain, waves = (
        events(three_variables(**columns), problem, topology, player=player) for player in ("plain", "waves")
    )
    plain, waves = state(plain), state(waves)
    assert all(np.array_equal(plain[name], waves[name]) for name in plain)


@pytest.mark.parametrize("kind", ["with_replacement", "epoch", "poisson"])
def test_minibatches_do_not_depend_on_the_wave(kind):
    """A node's minibatch depends on its own count of gradients, not on who shares the batch."""
    problem = random_squares(7, 5, compiles=False)
    plain, waves = (
        state(events(three_variables(), problem, ring(7), player=player, sampling=Sampling(3, kind)))
        for player in ("plain", "waves")
    )
    assert all(np.array_equal(plain[name], waves[name]) for name in plain)


def test_waves_are_chosen_where_nothing_is_compiled():
    """A problem without compiled gradients is played in waves, and agrees with its compiled twin to rounding."""
    batched = events(three_variables(), random_squares(7, 5, compiles=False), ring(7))
    compiled = events(three_variables(), random_squares(7, 5), ring(7))
    assert (batched.player, compiled.player) == ("waves", "kernel")
    assert np.allclose(state(batched)["v"], state(compiled)["v"], rtol=1e-11, atol=1e-12)


def test_single_precision_keeps_its_width():
    """A float32 problem is played in float32 rows, with the bits of the plain loop, and half the bytes."""
    double = random_squares(7, 5)
    problem = SinglePrecision(double.a, double.b)
    runs = [events(three_variables(), problem, ring(7), player=player) for player in ("plain", "waves", "auto")]
    plain, waves, auto = map(state, runs)
    assert runs[2].player == "waves"
    assert waves["v"].dtype == np.float32
    assert runs[2].outputs().dtype == problem.dtype
    assert all(np.array_equal(plain[name], waves[name]) for name in plain)
    assert all(np.array_equal(auto[name], waves[name]) for name in plain)
    assert runs[0].counts.bytes == runs[0].counts.messages * 5 * 4
