"""A block's view of the problem: every call is counted as it happens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.algorithms.algorithm import Draws, Sampling
from fedsim.engine.counts import Counts
from fedsim.engine.sampling import draw
from fedsim.errors import RunError
from fedsim.problems.problem import Minibatch, Problem

if TYPE_CHECKING:
    from fedsim.engine.streams import Streams


class BlockOracle:
    """Gradients, dual gradients and prox of the nodes of one block.

    Attributes:
        nodes: int64 `[rows]`, node numbers of the block's rows.
        n: number of nodes of the whole problem.
        records: int64 `[rows]`, records of each node of the block.
        draws: how many minibatches every node has drawn; the next one is a function of (seed, node, draws).
    """

    def __init__(self, problem: Problem, nodes: NDArray[np.int64], streams: Streams, counts: Counts) -> None:
        self.problem, self.nodes, self.n = problem, nodes, problem.n
        self.records: NDArray[np.int64] = problem.records[nodes]
        self._all_records = int(self.records.sum())
        self._streams, self._counts = streams, counts
        self.draws = 0

    def sample(self, sampling: Sampling | None, rng: Draws | None = None) -> Minibatch | None:
        """Return the nodes' next minibatch, to be used at several points; None means exact gradients."""
        if sampling is None:
            return None
        batch = draw(sampling, self._streams.seed, self.nodes, self.draws, self.problem.records)
        self.draws += 1
        return batch

    def gradient(
        self, x: torch.Tensor, batch: Sampling | Minibatch | None = None, rng: Draws | None = None
    ) -> torch.Tensor:
        """Return `grad f_i(x_i)` `[rows, dim]`: exact, on a minibatch, or on one drawn now.

        A shared `x [1, dim]` serves all nodes.

        Raises:
            RunError: x has another shape; compiled gradients would read past its end.
        """
        if isinstance(batch, Sampling):
            batch = self.sample(batch, rng)
        x = self._one_row_each(x, "gradient")
        self._counts.gradients += len(self.nodes)
        self._counts.samples += self._all_records if batch is None else batch.records
        if len(self.nodes) > 1:
            return self.problem.gradient(x, self.nodes, batch)
        twice = None if batch is None else Minibatch(np.repeat(batch.indices, 2, 0), np.repeat(batch.weights, 2, 0))
        return self.problem.gradient(x.expand(2, -1).contiguous(), np.repeat(self.nodes, 2), twice)[:1]

    def charge(self, gradients: int = 0, samples: int = 0) -> None:
        """Count gradients that an algorithm computes itself, with requests on the way."""
        self._counts.gradients += gradients
        self._counts.samples += samples

    def dual_gradient(self, s: torch.Tensor) -> torch.Tensor:
        """Return `grad f_i^*(s_i)` `[rows, dim]`; a shared `s [1, dim]` serves all nodes."""
        s = self._one_row_each(s, "dual_gradient")
        self._counts.dual_gradients += len(self.nodes)
        if len(self.nodes) > 1:
            return self.problem.dual_gradient(s, self.nodes)
        return self.problem.dual_gradient(s.expand(2, -1).contiguous(), np.repeat(self.nodes, 2))[:1]

    def prox(self, v: torch.Tensor, step: float) -> torch.Tensor:
        """Return the prox of the composite term, per row."""
        return self.problem.prox(v, step)

    def _one_row_each(self, x: torch.Tensor, what: str) -> torch.Tensor:
        wanted = len(self.nodes), self.problem.dim
        if tuple(x.shape) == wanted:
            return x
        if tuple(x.shape) == (1, self.problem.dim):
            return x.expand(wanted).contiguous()
        raise RunError(
            f"{what} at a point of shape {tuple(x.shape)}: one row for each of the block's {wanted[0]} nodes,"
            f" {wanted}, or one for all, (1, {wanted[1]}), is needed"
        )
