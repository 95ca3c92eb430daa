"""Problems are held to the laws, and to what they say of themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.engine.counts import Counts
from fedsim.engine.oracle import BlockOracle
from fedsim.engine.sampling import draw
from fedsim.engine.streams import Streams
from fedsim.errors import Unsupported
from fedsim.problems.problem import Minibatch, Problem, refuse_undeclared
from fedsim.testing.report import Report, generators, no_own_generators

BLOCKS = (1, 2, 3, 7)
TIGHT = 1e-9  # relative: two ways to compute the same numbers
POWER_STEPS = 30
Rows = Callable[[NDArray[np.int64]], torch.Tensor]


def check_problem(problem: Problem, seed: int) -> Report:
    """Check a problem; see `fedsim.testing.check`."""
    refuse_undeclared(problem)
    with no_own_generators():
        return _checked(problem, seed)


def _checked(problem: Problem, seed: int) -> Report:
    subject = _Subject(problem, seed)
    report = Report(f"problem {problem.kind}: {problem.n} nodes, dim {problem.dim}")
    _refuse_writes(subject)
    report.held.append("points, nodes and batches that are handed in are left unmodified")
    _refuse_own_points_only(subject)
    with generators(1):
        before = {name: rows(subject.all).clone() for name, rows in subject.quantities().items()}
    with generators(2):
        for name, rows in subject.quantities().items():
            _same(name, rows(subject.all), before[name], subject.all, "when global generators are in another state")
    report.held.append("the global random generators are neither used nor moved")
    for nodes in subject.blocks():
        for name, rows in subject.quantities().items():
            _same(name, rows(nodes), before[name][torch.from_numpy(nodes)], nodes, f"in the block of nodes {nodes}")
    report.held.append(f"{', '.join(before)} have the same bits in any block and order of rows")
    for claim in CLAIMS if problem.has_gradient else ():
        held = claim(subject)
        if held:
            report.held.append(held)
    return report


def check_rows(problem: Problem, x: torch.Tensor) -> None:
    """Hold the gradients of the first nodes at `x [rows, dim]` to their rows, in blocks of 1, 2, 3 and all of them."""
    streams, nodes = Streams(0), np.arange(len(x))

    def gradient(chosen: NDArray[np.int64]) -> torch.Tensor:
        return BlockOracle(problem, chosen, streams, Counts()).gradient(x[torch.from_numpy(chosen)])

    whole = gradient(nodes)
    for size in BLOCKS[:3]:
        for begin in range(0, len(nodes), size):
            part = nodes[begin : begin + size]
            _same("gradient", gradient(part), whole[torch.from_numpy(part)], part, f"in the block of nodes {part}")


class _Subject:
    """A problem with points, directions and minibatches to try it on."""

    def __init__(self, problem: Problem, seed: int) -> None:
        self.problem, self._streams = problem, Streams(seed)
        self.all = np.arange(problem.n, dtype=np.int64)
        self.x, self.y = self._normal("x"), self._normal("y")
        self._rng = self._streams.shared("blocks", 0)
        self.gradients = self.gradient(self.all) if problem.has_gradient else torch.zeros_like(self.x)
        if self.gradients.shape != self.x.shape or self.gradients.dtype != problem.dtype:
            raise AssertionError(
                f"the gradient has shape {tuple(self.gradients.shape)} and type {self.gradients.dtype};"
                f" {tuple(self.x.shape)} and {problem.dtype} are needed (n, dim and dtype of the problem)"
            )
        self.sampled = self._batch() if problem.records.min() > 0 else None
        self.has_dual = self._dual_exists()

    def _normal(self, what: str) -> torch.Tensor:
        return torch.from_numpy(self._streams.normal(what, self.all, 0, self.problem.dim)).to(self.problem.dtype)

    def _batch(self) -> Minibatch:
        from fedsim.algorithms.algorithm import Sampling

        return draw(Sampling(3), self._streams.seed, self.all, 0, self.problem.records)

    def _oracle(self, nodes: NDArray[np.int64]) -> BlockOracle:
        return BlockOracle(self.problem, nodes.copy(), self._streams, Counts())

    def gradient(self, nodes: NDArray[np.int64], x: torch.Tensor | None = None) -> torch.Tensor:
        return self._oracle(nodes).gradient((self.x if x is None else x)[torch.from_numpy(nodes)])

    def minibatch_gradient(self, nodes: NDArray[np.int64]) -> torch.Tensor:
        assert self.sampled is not None
        batch = Minibatch(self.sampled.indices[nodes], self.sampled.weights[nodes])
        return self._oracle(nodes).gradient(self.x[torch.from_numpy(nodes)], batch)

    def dual_gradient(self, nodes: NDArray[np.int64]) -> torch.Tensor:
        return self._oracle(nodes).dual_gradient(self.gradients[torch.from_numpy(nodes)])

    def loss(self, nodes: NDArray[np.int64]) -> torch.Tensor:
        twice = np.repeat(nodes, 2) if len(nodes) == 1 else nodes  # as oracles compute a single row
        return self.problem.loss(self.x[torch.from_numpy(twice)], twice)[: len(nodes)]

    def values(self, nodes: NDArray[np.int64]) -> torch.Tensor:
        points = torch.stack([self.x, self.y, self.x], dim=1)
        return self._oracle(nodes).query(points[torch.from_numpy(nodes)])

    def prox(self, nodes: NDArray[np.int64]) -> torch.Tensor:
        return self.problem.prox(self.x[torch.from_numpy(nodes)], 0.3)

    def quantities(self) -> dict[str, Rows]:
        found: dict[str, Rows] = {"loss": self.loss, "prox": self.prox, "values": self.values}
        if self.problem.has_gradient:
            found["gradient"] = self.gradient
        if self.sampled is not None:
            found["minibatch gradient"] = self.minibatch_gradient
        if self.has_dual:
            found["dual gradient"] = self.dual_gradient
        return found

    def blocks(self) -> Iterator[NDArray[np.int64]]:
        """Yield blocks of 1, 2, 3, 7 rows in order, and blocks of random sizes in a random order."""
        for size in BLOCKS:
            yield from (self.all[begin : begin + size] for begin in range(0, len(self.all), size))
        for _ in range(3):
            order = self._rng.permutation(self.all)
            cuts = np.sort(self._rng.integers(1, len(order), 3)) if len(order) > 1 else []
            yield from (part for part in np.split(order, cuts) if len(part))

    def _dual_exists(self) -> bool:
        if not self.problem.has_gradient:
            return False
        try:
            self.dual_gradient(self.all)
        except Unsupported:
            return False
        return True


def _refuse_writes(s: _Subject) -> None:
    """Refuse that a call writes to the points, nodes or minibatch that it is given; others may still need them."""
    calls: dict[str, Callable[[torch.Tensor, NDArray[np.int64], Minibatch | None], object]] = {
        "values": lambda x, nodes, _: s.problem.values(x[:, None], nodes),
        "loss": lambda x, nodes, _: s.problem.loss(x, nodes),
        "prox": lambda x, _, __: s.problem.prox(x, 0.3),
        "composite": lambda x, _, __: s.problem.composite(x),
    }
    if s.problem.has_gradient:
        calls["gradient"] = lambda x, nodes, _: s.problem.gradient(x, nodes)
        if s.sampled is not None:
            calls["gradient of a minibatch"] = s.problem.gradient
    if s.has_dual:
        calls["dual_gradient"] = lambda x, nodes, _: s.problem.dual_gradient(x, nodes)
    for name, call in calls.items():
        x, nodes, batch = s.x.clone(), s.all.copy(), deepcopy(s.sampled)
        call(x, nodes, batch)
        arrays = {"the point": (x.numpy(), s.x.numpy()), "the node numbers": (nodes, s.all)}
        if batch is not None and s.sampled is not None:
            arrays["the minibatch"] = (batch.weights, s.sampled.weights)
            arrays["the minibatch's records"] = (batch.indices, s.sampled.indices)
        for what, (after, before) in arrays.items():
            if not np.array_equal(after, before):
                raise AssertionError(f"{name} modified {what} it was given; others may still need it")


def _refuse_own_points_only(s: _Subject) -> None:
    """Refuse a loss that a point shared by all nodes, `[1, dim]`, does not serve."""
    x, what = s.x[:1].contiguous(), "the loss at a point that all nodes share, x [1, dim]"
    own = s.problem.loss(x.expand(len(s.all), -1).contiguous(), s.all)
    try:
        shared = s.problem.loss(x, s.all)
    except (IndexError, RuntimeError, ValueError) as error:
        raise AssertionError(f"{what}: {error}") from error
    if shared.shape != own.shape:
        raise AssertionError(f"{what} has shape {tuple(shared.shape)}, {tuple(own.shape)} needed")
    _close(f"{what} is another than at copies of it", shared, own, TIGHT, _sizes(own))


def _same(name: str, got: torch.Tensor, expected: torch.Tensor, nodes: NDArray[np.int64], how: str) -> None:
    if tuple(got.shape) != tuple(expected.shape):
        raise AssertionError(f"{name} has shape {tuple(got.shape)}, {tuple(expected.shape)} needed, {how}")
    for row, node in enumerate(nodes):
        if got[row].numpy().tobytes() != expected[row].numpy().tobytes():
            size = float((got[row] - expected[row]).abs().max())
            raise AssertionError(
                f"{name} of node {node} is different (by {size:.2g}) {how};"
                " a row's result may depend on that row only, not on which or how many share the call"
            )


def _close(what: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float, scale: torch.Tensor | float) -> None:
    """Refuse rows that differ by more than `tolerance * scale`."""
    error = (got - expected).abs().reshape(len(got), -1).amax(dim=1) / (scale + 1e-300)
    node = int(error.argmax())
    if not float(error[node]) <= tolerance:
        raise AssertionError(f"{what}: node {node} is off by {float(error[node]):.2g} relative to its size")


def _sizes(rows: torch.Tensor) -> torch.Tensor:
    """Return the largest entry of each row, at least a little of the largest of all."""
    sizes = rows.abs().reshape(len(rows), -1).amax(dim=1)
    return sizes + 1e-3 * float(sizes.max())


def _derivative(s: _Subject) -> str | None:
    if s.problem.dtype != torch.float64:
        return None
    d = s.y / s.y.norm(dim=1, keepdim=True)
    h = 1e-5 * (1 + s.x.norm(dim=1, keepdim=True))
    ahead, behind = s.problem.loss(s.x + h * d, s.all), s.problem.loss(s.x - h * d, s.all)
    expected = (s.gradients * d).sum(dim=1)
    scale = s.gradients.norm(dim=1) + (ahead - behind).abs()
    _close("the gradient is not that of the loss", (ahead - behind) / (2 * h[:, 0]), expected, 1e-5, scale)
    return "the gradient is that of the loss (central differences)"


def _all_records(s: _Subject) -> str | None:
    if s.sampled is None:
        return None
    place = np.arange(s.problem.records.max())[None]
    used = place < s.problem.records[:, None]
    batch = Minibatch(np.where(used, place, 0), np.where(used, 1.0 / s.problem.records[:, None], 0.0))
    got = s.problem.gradient(s.x, s.all, batch)
    _close("a batch of all records is not the exact gradient", got, s.gradients, TIGHT, _sizes(s.gradients))
    one = Minibatch(np.zeros((len(s.all), 1), np.int64), np.ones((len(s.all), 1)))
    if s.problem.records.max() > 1 and torch.equal(s.problem.gradient(s.x, s.all, one), s.gradients):
        raise AssertionError("the gradient on one record is the exact one on every node: `batch` seems to be ignored")
    return "a batch of all records gives the exact gradient, one record another"


def _compiled(s: _Subject) -> str | None:
    nodes = np.ascontiguousarray(s.all[::-1][: max(1, len(s.all) - 1)])  # another order, one node fewer
    objective = s.problem.compiled(nodes)
    if objective is None:
        return None
    scratch, got = np.empty(max(1, objective.scratch)), np.empty((len(nodes), s.problem.dim))
    none, nothing = np.empty(0, np.int64), np.empty(0)
    for slot, node in enumerate(nodes):
        x = s.x[int(node)].numpy()
        objective.gradient(slot, x, none, nothing, objective.reals, objective.ints, scratch, got[slot])
    expected = s.gradients[torch.from_numpy(nodes)]
    _close("the compiled gradient is another one", torch.from_numpy(got), expected, TIGHT, _sizes(expected))
    return "the compiled gradient equals the gradient"


def _constants(s: _Subject) -> str | None:
    """Look for the largest and the least curvature by power iteration on differences of gradients, around x."""
    if s.problem.L is None:
        return None
    L = torch.from_numpy(np.asarray(s.problem.L, dtype=np.float64))
    mu = None if s.problem.mu is None else torch.from_numpy(np.asarray(s.problem.mu, dtype=np.float64))
    size = (s.x - s.y).norm(dim=1, keepdim=True)
    for towards_least in (False, True) if mu is not None else (False,):
        step = s.x - s.y
        for _ in range(POWER_STEPS):
            change = s.gradients - s.gradient(s.all, s.x - step)
            _refuse_change(step, change, L, mu)
            ahead = L[:, None] * step - change if towards_least else change
            norm = ahead.norm(dim=1, keepdim=True)
            step = torch.where(norm > 0, ahead * (size / norm), step)
    return "L and mu bound the change of the gradient, along the steepest and flattest directions found"


def _refuse_change(step: torch.Tensor, change: torch.Tensor, L: torch.Tensor, mu: torch.Tensor | None) -> None:
    size = step.norm(dim=1)
    over = change.norm(dim=1) / size / L
    if float(over.max()) > 1 + TIGHT:
        raise AssertionError(f"L of node {int(over.argmax())} is too small: its gradient changes {over.max():.6g} L")
    if mu is not None:
        curvature = (change * step).sum(dim=1) / size**2 - mu
        if float((curvature / L).min()) < -TIGHT:
            raise AssertionError(f"mu of node {int(curvature.argmin())} is too large, by {-curvature.min():.3g}")


def _optimum(s: _Subject) -> str | None:
    best = s.problem.optimum()
    if best is None:
        return None
    x = best.expand(s.problem.n, -1).contiguous()
    own = s.problem.gradient(x, s.all)
    step = 1.0 if s.problem.L is None else 1.0 / float(np.mean(s.problem.L))
    moved = s.problem.prox(best[None] - step * own.mean(dim=0, keepdim=True), step)
    scale = step * float(_sizes(own).max()) + float(best.abs().max())
    _close("the optimum is not one: a proximal gradient step moves it", moved, best[None], 1e-8, scale)
    return "the optimum is a fixed point of the proximal gradient step"


def _dual(s: _Subject) -> str | None:
    if not s.has_dual:
        return None
    _close("dual_gradient is not the inverse of gradient", s.dual_gradient(s.all), s.x, 1e-7, _sizes(s.x))
    return "the dual gradient is the inverse of the gradient"


CLAIMS = (_derivative, _all_records, _compiled, _constants, _optimum, _dual)
