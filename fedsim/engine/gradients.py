"""Gradients of single rows, each at its own number of draws: what events ask of a problem outside the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from fedsim.engine.oracle import BlockOracle
from fedsim.engine.sampling import KINDS, draw_batch, width
from fedsim.engine.streams import Streams
from fedsim.problems.problem import CompiledObjective, Minibatch

if TYPE_CHECKING:
    from fedsim.algorithms.algorithm import Sampling
    from fedsim.engine.counts import Counts
    from fedsim.problems.problem import Problem

Ints = NDArray[np.int64]


class RowGradients:
    """The gradients of some rows at a time, compiled where the problem has that, else batched in torch; all counted.

    Args:
        problem, nodes: the node number of each row.
        sampling: how a node draws its records; None: it takes all of them.
        compiled: the problem's compiled gradient over `nodes`, or None.
    """

    def __init__(
        self,
        problem: Problem,
        nodes: Ints,
        sampling: Sampling | None,
        seed: int,
        counts: Counts,
        compiled: CompiledObjective | None,
    ) -> None:
        self._problem, self._nodes, self._sampling = problem, nodes, sampling
        self._streams, self._counts, self._compiled = Streams(seed), counts, compiled
        if compiled is not None:
            self._scratch = np.zeros(max(compiled.scratch, 1))

    def primal(self, rows: Ints, x: torch.Tensor, draws: Ints) -> torch.Tensor:
        """Return `grad f_i(x_i)` `[rows, dim]`; `draws` counts the gradients that each row has taken before."""
        batch = self._batch(rows, draws)
        if self._compiled is None:
            return self._oracle(rows).gradient(x, batch)
        self._counts.gradients += len(rows)
        self._counts.samples += int(self._problem.records[self._nodes[rows]].sum()) if batch is None else batch.records
        out = torch.empty_like(x)
        for place, row in enumerate(rows):
            self._one(int(row), x[place].numpy(), batch, place, out[place].numpy())
        return out

    def exact(self, rows: Ints, x: torch.Tensor) -> torch.Tensor:
        """Return `grad f_i(x_i)` `[rows, dim]` over all records."""
        return self._oracle(rows).gradient(x)

    def dual(self, rows: Ints, s: torch.Tensor) -> torch.Tensor:
        """Return `grad f_i^*(s_i)` `[rows, dim]`."""
        return self._oracle(rows).dual_gradient(s)

    def most_samples(self, rows: Ints) -> Ints:
        """Return how many records a gradient of each row can use at most."""
        if self._sampling is None or self._sampling.kind == "poisson":
            return self._problem.records[self._nodes[rows]]
        return np.full(len(rows), self._sampling.size, np.int64)

    def samples(self, rows: Ints, draws: Ints) -> Ints:
        """Return how many records the gradients of rows use, each at its own number of draws before it."""
        batch = self._batch(rows, draws)
        if batch is None:
            return self._problem.records[self._nodes[rows]]
        return np.count_nonzero(batch.weights, axis=1).astype(np.int64)

    def _oracle(self, rows: Ints) -> BlockOracle:
        return BlockOracle(self._problem, self._nodes[rows], self._streams, self._counts)

    def _batch(self, rows: Ints, draws: Ints) -> Minibatch | None:
        if self._sampling is None:
            return None
        nodes, records = self._nodes[rows], self._problem.records
        shape = (len(rows), width(self._sampling, records))
        indices, weights = np.zeros(shape, np.int64), np.zeros(shape)
        kind = KINDS[self._sampling.kind]
        _draw_each(self._streams.seed, nodes, draws, records, kind, self._sampling.size, indices, weights)
        return Minibatch(indices, weights)

    def _one(self, row: int, x: NDArray, batch: Minibatch | None, place: int, out: NDArray) -> None:
        assert self._compiled is not None
        used = 0 if batch is None else max(int(np.count_nonzero(batch.weights[place])), 1)
        indices = np.empty(0, np.int64) if batch is None else batch.indices[place, :used]
        weights = np.empty(0) if batch is None else batch.weights[place, :used]
        reals, ints = self._compiled.reals, self._compiled.ints
        self._compiled.gradient(row, x, indices, weights, reals, ints, self._scratch, out)


@njit(cache=True)
def _draw_each(seed, nodes, draws, records, kind, size, indices, weights):  # pragma: no cover - compiled
    for row in range(len(nodes)):
        draw_batch(seed, nodes[row], draws[row], records[nodes[row]], kind, size, indices[row], weights[row])
