"""Synchronous rounds: gradient tracking in fedsim against the same method as a bare NumPy loop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fedsim.algorithms.algorithm import Draws, Oracle, SyncAlgorithm
from fedsim.algorithms.requests import Mix, Rows
from fedsim.engine.layout import Layout
from fedsim.engine.machine import prepare
from fedsim.engine.rounds import Rounds
from fedsim.problems.quadratic import Quadratic
from fedsim.topology.build import build
from fedsim.topology.mixing import mixing_matrix

prepare()
ETA = 0.05
# graph, dim, rounds per measurement
SIZES = [("ring:20", 10, 500), ("random_regular:n=1000,degree=4,seed=0", 1000, 3)]


@dataclass
class State:
    """Model, tracker, gradient."""

    x: Rows
    y: Rows
    g: Rows


@dataclass(frozen=True)
class Tracking(SyncAlgorithm):
    """Gradient tracking: two mixings and one gradient a round."""

    kind = "tracking"

    async def start(self, x0: torch.Tensor, f: Oracle, rng: Draws) -> State:
        g = f.gradient(x0)
        return State(x0, g, g)

    async def round(self, s: State, k: int, f: Oracle, rng: Draws) -> State:
        x = await Mix(s.x - ETA * s.y)
        g = f.gradient(x)
        return State(x, await Mix(s.y + g - s.g), g)


def _problem(n: int, dim: int) -> Quadratic:
    rng = np.random.default_rng(0)
    return Quadratic(1 + 3 * rng.random((n, dim)), rng.normal(size=(n, dim)))


@pytest.mark.parametrize("block", ["auto", "all", 2])
@pytest.mark.parametrize(("graph", "dim", "rounds"), SIZES, ids=["n=20,dim=10", "n=1000,dim=1000"])
def bench_fedsim(benchmark, graph, dim, rounds, block):
    """The driver, by block size."""
    topology = build(graph)
    benchmark.group = f"{rounds} rounds of gradient tracking, n={topology.n}, dim={dim}"
    size = topology.n if block == "all" else block
    x0 = torch.zeros(topology.n, dim, dtype=torch.float64)
    matrices = {"W": mixing_matrix(topology)}
    player = Rounds(Tracking(), _problem(topology.n, dim), Layout(topology), matrices, x0, 0, block=size)
    player.start()
    benchmark(lambda: player.advance(player.now + rounds))


@pytest.mark.parametrize(("graph", "dim", "rounds"), SIZES, ids=["n=20,dim=10", "n=1000,dim=1000"])
def bench_numpy(benchmark, graph, dim, rounds):
    """The same arithmetic with a dense matrix where it is small, scipy's CSR where it is not; nothing is counted."""
    topology = build(graph)
    benchmark.group = f"{rounds} rounds of gradient tracking, n={topology.n}, dim={dim}"
    problem = _problem(topology.n, dim)
    W = mixing_matrix(topology).toarray() if topology.n < 100 else mixing_matrix(topology)
    a, b = problem._curvature, problem._centre

    def play() -> None:
        x = np.zeros((topology.n, dim))
        y = g = a * (x - b)
        for _ in range(rounds):
            x = W @ (x - ETA * y)
            h = a * (x - b)
            y, g = W @ (y + h - g), h

    benchmark(play)
