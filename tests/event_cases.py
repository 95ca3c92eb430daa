"""Small problems, tables and players that the tests of the event engine share."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit

from fedsim.algorithms.algorithm import DynamicsAlgorithm, Setting
from fedsim.algorithms.dynamics import Dynamics
from fedsim.engine.events import Events
from fedsim.engine.layout import Layout
from fedsim.problems.problem import CompiledObjective, Minibatch, Nodes, Problem
from fedsim.setting import RunSetting
from fedsim.topology.topology import Topology


@njit
def _gradient(slot, x, indices, weights, reals, ints, scratch, out):
    records, dim = ints[0], len(x)
    out[:] = 0.0
    for place in range(records if len(indices) == 0 else len(indices)):
        record = place if len(indices) == 0 else indices[place]
        weight = 1.0 / records if len(indices) == 0 else weights[place]
        at = (slot * records + record) * (dim + 1)
        error = -reals[at + dim]
        for c in range(dim):
            error += reals[at + c] * x[c]
        for c in range(dim):
            out[c] += 2.0 * weight * error * reals[at + c]


class Squares(Problem):
    """`f_i = (1/m) sum_j (a_j . x - b_j)^2` with as many records on every node, compiled or not."""

    kind = "squares"

    def __init__(self, a: np.ndarray, b: np.ndarray, compiles: bool = True) -> None:
        self.n, m, self.dim = a.shape
        self.a, self.b, self._compiles = a, b, compiles
        self.records = np.full(self.n, m)
        eigenvalues = np.linalg.eigvalsh(2.0 * np.einsum("imp,imq->ipq", a, a) / m)
        self.mu, self.L = eigenvalues[:, 0], eigenvalues[:, -1]

    def gradient(self, x: torch.Tensor, nodes: Nodes, batch: Minibatch | None = None) -> torch.Tensor:
        if batch is None:
            a, b = torch.from_numpy(self.a[nodes]), torch.from_numpy(self.b[nodes])
            weights = torch.full(b.shape, 1.0 / b.shape[1], dtype=torch.float64)
        else:
            chosen = nodes[:, None], batch.indices
            a, b, weights = map(torch.from_numpy, (self.a[chosen], self.b[chosen], batch.weights))
        errors = 2.0 * weights * ((a * x[:, None]).sum(dim=2) - b)
        return (errors[:, :, None] * a).sum(dim=1)

    def loss(self, x: torch.Tensor, nodes: Nodes) -> torch.Tensor:
        a, b = torch.from_numpy(self.a[nodes]), torch.from_numpy(self.b[nodes])
        return (((a * x[:, None]).sum(dim=2) - b) ** 2).mean(dim=1)

    def dual_gradient(self, s: torch.Tensor, nodes: Nodes) -> torch.Tensor:
        """Return the x with `(2/m) A^T (A x - b) = s`."""
        m, rows = self.a.shape[1], []
        for place, node in enumerate(nodes):
            a, b = self.a[node], self.b[node]
            rows.append(np.linalg.solve(a.T @ a, m * s[place].numpy() / 2 + a.T @ b))
        return torch.from_numpy(np.array(rows))

    def compiled(self, nodes: Nodes) -> CompiledObjective | None:
        if not self._compiles:
            return None
        reals = np.concatenate([self.a[nodes], self.b[nodes][:, :, None]], axis=2).ravel()
        return CompiledObjective(_gradient, reals, np.array([self.a.shape[1]]), 0)

    def optimum(self) -> torch.Tensor:
        a, b = self.a.reshape(-1, self.dim), self.b.ravel()
        return torch.from_numpy(np.linalg.lstsq(a, b, rcond=None)[0])


class SinglePrecision(Squares):
    """The same in float32: models and gradients."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def gradient(self, x: torch.Tensor, nodes: Nodes, batch: Minibatch | None = None) -> torch.Tensor:
        assert x.dtype == torch.float32
        return super().gradient(x.double(), nodes, batch).float()


def random_squares(n: int, dim: int, records: int = 4, seed: int = 0, compiles: bool = True) -> Squares:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((n, records, dim)) / np.sqrt(dim) + np.eye(records, dim)
    return Squares(a, rng.standard_normal((n, records)), compiles)


class Table(DynamicsAlgorithm):
    """An algorithm that is a given table."""

    kind, paper, provenance = "table", "none", "reconstruction"

    def __init__(self, dynamics: Dynamics) -> None:
        self._dynamics = dynamics

    def dynamics(self, setting: Setting) -> Dynamics:
        return self._dynamics


def three_variables(**columns) -> Dynamics:
    """A table that uses every row of the kernel: three coupled, damped variables, all of which jump and are sent."""
    given = {
        "variables": ("x", "u", "w"),
        "flow": np.array([[-0.5, 0.5, 0.0], [0.25, -0.5, 0.1], [0.0, 0.2, -0.3]]),
        "point": np.array([1.0, 0.0, 0.1]),
        "residual": np.array([-0.1, 0.3, 0.0]),
        "gradient_jump": np.array([-0.05, -0.1, 0.02]),
        "message": np.array([1.0, 0.5, 0.0]),
        "gossip_jump": np.array([-0.3, 0.0, -0.2]),
        "start": np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, -1.0]]),
        "output": np.array([1.0, 0.0, 0.0]),
    }
    return Dynamics(**{**given, **columns})


def ring(n: int) -> Topology:
    return Topology.from_edges("ring", n, [(i, (i + 1) % n) for i in range(n)])


def events(dynamics: Dynamics, problem: Problem, topology: Topology, seed: int = 1, x0=None, **given) -> Events:
    """A started player of a table."""
    rates = given.pop("rates", np.full(topology.m, 1.5))
    setting = RunSetting(problem, topology, rates)
    start = np.random.default_rng(5).standard_normal((problem.n, problem.dim)) if x0 is None else x0
    layout = Layout(topology)
    x0 = torch.from_numpy(np.ascontiguousarray(start[layout.nodes])).to(problem.dtype)
    player = Events(Table(dynamics), setting, problem, layout, rates, x0, seed, **given)
    player.start()
    return player
