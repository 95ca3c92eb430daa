"""The compiled kernel: what an event may change, and what it must keep."""

from __future__ import annotations

import numpy as np
import pytest
from event_cases import events, random_squares, ring, three_variables

from fedsim.algorithms.dadao import DADAO
from fedsim.algorithms.dynamics import Dynamics
from fedsim.engine.kernel import TILE
from fedsim.setting import RunSetting
from fedsim.topology.topology import Topology


def random_table(k: int, seed: int, dense: bool) -> Dynamics:
    """A damped random table of k variables; half of its entries are zero unless dense."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape) * (rng.random(shape) < (1.0 if dense else 0.5))
    return Dynamics(
        variables=tuple(f"v{a}" for a in range(k)),
        flow=0.3 * draw(k, k) - np.eye(k),
        point=draw(k),
        residual=0.1 * draw(k),
        gradient_jump=0.05 * draw(k),
        message=draw(k),
        gossip_jump=0.1 * draw(k),
        start=draw(k, 3),
        output=draw(k),
        gradient_map=None if dense else np.eye(k) + 0.1 * draw(k, k),
    )


@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("dense", [True, False])
def test_any_number_of_variables(k, dense):
    """One kernel plays tables of any size and sparsity with the bits of the plain loop."""
    problem, table = random_squares(5, 3), random_table(k, k, dense)
    plain, kernel = (events(table, problem, ring(5), player=player) for player in ("plain", "kernel"))
    for run in (plain, kernel):
        run.advance(8)
    assert np.isfinite(kernel.state.v).all()
    assert np.array_equal(plain.state.v, kernel.state.v)


def test_rows_longer_than_a_tile():
    """Rows that do not fill their last tile give the bits of the plain loop."""
    problem = random_squares(3, TILE + 5, records=2)
    plain, kernel = (events(three_variables(), problem, ring(3), player=player) for player in ("plain", "kernel"))
    for run in (plain, kernel):
        run.advance(4)
    assert np.array_equal(plain.state.v, kernel.state.v)


def dadao(problem, topology: Topology, init: str = "theorem4") -> tuple[Dynamics, np.ndarray]:
    rates = np.full(topology.m, 4.0)
    setting = RunSetting(problem, topology, rates)
    return DADAO(init=init).resolve(setting).dynamics(setting), rates


def flowed(run) -> np.ndarray:
    """Every node's variables, flowed to now."""
    pairs = zip(run.state.v, run.state.last, strict=True)
    return np.array([run._flow.at(run.now - last) @ v for v, last in pairs])


def test_dadao_conserves_the_sum_of_its_tracker():
    """However it started, DADAO's sum of z + 2 zt over nodes does not move by more than rounding."""
    problem = random_squares(7, 3)
    table, rates = dadao(problem, ring(7))
    run = events(table, problem, ring(7), rates=rates, x0=np.ones((7, 3)))
    start = (run.state.v[:, 4] + 2 * run.state.v[:, 5]).sum(axis=0)
    run.advance(100)
    v = run.state.v
    assert np.abs((v[:, 4] + 2 * v[:, 5]).sum(axis=0) - start).max() < 1e-11
    v = flowed(run)
    assert np.abs(v[:, 4].sum(axis=0)).max() < 1e-10
    assert np.abs(v[:, 5].sum(axis=0)).max() < 1e-10


def test_an_exchange_changes_only_what_the_table_says():
    """DADAO's exchange without elapsed time leaves x, xt, y, yt alone, and makes y + z equal on both ends."""
    problem = random_squares(7, 3)
    table, rates = dadao(problem, ring(7))
    run = events(table, problem, ring(7), rates=rates, x0=np.ones((7, 3)))
    run.advance(3)
    now = run.now
    for node in range(7):  # bring every clock to now without an event
        run.state.v[node] = run._flow.at(now - run.state.last[node]) @ run.state.v[node]
    run.state.last[:] = now
    before, (i, j) = run.state.v.copy(), run._row[[2, 3]]
    run.play(np.array([1]), np.array([2]), np.array([3]), np.array([now]))
    after = run.state.v
    assert np.array_equal(before[:, :4], after[:, :4])
    assert np.array_equal(np.delete(before, [i, j], axis=0), np.delete(after, [i, j], axis=0))
    assert np.allclose(after[i, 2] + after[i, 4], after[j, 2] + after[j, 4], atol=1e-14)
    assert np.allclose(before[[i, j], 4:].sum(axis=0), after[[i, j], 4:].sum(axis=0), atol=1e-14)


def test_a_gradient_changes_only_its_node():
    """DADAO's gradient event without elapsed time changes x, xt and yt of its node, and nothing else."""
    problem = random_squares(7, 3)
    table, rates = dadao(problem, ring(7), init="local")
    run = events(table, problem, ring(7), rates=rates, x0=np.ones((7, 3)))
    before, row = run.state.v.copy(), run._row[4]
    run.play(np.array([0]), np.array([4]), np.array([0]), np.array([0.0]))
    changed = (run.state.v != before).any(axis=2)
    assert changed[row].tolist() == [True, True, False, True, False, False]
    assert changed.sum() == 3


def test_the_optimum_is_a_fixed_point():
    """Started at its saddle point, DADAO stays there through flow, gradients and exchanges."""
    problem = random_squares(7, 3)
    table, rates = dadao(problem, ring(7))
    run = events(table, problem, ring(7), rates=rates)
    x, nodes = problem.optimum(), run._layout.nodes
    g = problem.gradient(x.expand(7, 3).contiguous(), nodes).numpy()
    nu = problem.mu.min() / 2
    for a, value in enumerate([x, x, g - nu * x.numpy(), g - nu * x.numpy(), -g, -g]):
        run.state.v[:, a] = value
    run.advance(50)
    assert float((run.outputs() - x).abs().max()) < 1e-11


def test_dadao_converges_on_a_torus_as_its_theorem_says():
    """The distance falls below the theorem's bound, and to 1e-9."""
    problem, side = random_squares(16, 3), 4
    edges = [(side * i + j, side * i + (j + 1) % side) for i in range(side) for j in range(side)]
    edges += [(side * i + j, side * ((i + 1) % side) + j) for i in range(side) for j in range(side)]
    torus = Topology.from_edges("torus", 16, edges)
    table, rates = dadao(problem, torus)
    run = events(table, problem, torus, rates=rates, x0=np.zeros((16, 3)))
    run.advance(25 * np.sqrt(problem.L.max() / problem.mu.min()) * 12)
    assert float(((run.outputs() - problem.optimum()) ** 2).sum(dim=1).mean()) < 1e-9
