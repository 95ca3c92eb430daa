"""A block's view of the problem: every call is counted as it happens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.algorithms.algorithm import Draws, Sampling
from fedsim.engine.counts import Counts
from fedsim.engine.queries import Queries, Spent
from fedsim.engine.sampling import draw
from fedsim.errors import RunError, Unsupported
from fedsim.privacy.clipping import Clip, clipped_sum
from fedsim.problems.problem import Minibatch, Problem

if TYPE_CHECKING:
    from fedsim.engine.pace import Pace
    from fedsim.engine.streams import Streams
    from fedsim.problems.per_record import RecordGradients


class BlockOracle:
    """Gradients, dual gradients and prox of the nodes of one block.

    Attributes:
        nodes: int64 `[rows]`, node numbers of the block's rows.
        n: number of nodes of the whole problem.
        records: int64 `[rows]`, records of each node of the block.
        scale: `[rows, 1]` in the problem's type, what multiplies each node's mean loss in its `f_i`.
        draws: how many minibatches every node has drawn; the next one is a function of (seed, node, draws).
        queries: what the nodes have asked of black boxes.

    `rows` of its methods is a mask `[n]` by node number, from a shared draw: nodes outside it compute nothing, are not
    charged, and get zeros.
    """

    pace: Pace | None = None

    def __init__(
        self,
        problem: Problem,
        nodes: NDArray[np.int64],
        streams: Streams,
        counts: Counts,
        budget: int | None = None,
    ) -> None:
        self.problem, self.nodes, self.n = problem, nodes, problem.n
        self.records: NDArray[np.int64] = problem.records[nodes]
        self._all_records = int(self.records.sum())
        scale = getattr(problem, "scale", np.ones(problem.n))[nodes]
        self.scale = torch.from_numpy(scale)[:, None].to(problem.dtype)
        self._streams, self._counts = streams, counts
        self.draws = 0
        self._per_record: RecordGradients | None = None
        self.queries = Queries(nodes, problem.n, problem.dim, budget)

    def sample(self, sampling: Sampling | None, rng: Draws | None = None) -> Minibatch | None:
        """Return the nodes' next minibatch, to be used at several points; None means exact gradients."""
        if sampling is None:
            return None
        batch = draw(sampling, self._streams.seed, self.nodes, self.draws, self.problem.records)
        self.draws += 1
        return batch

    def gradient(
        self,
        x: torch.Tensor,
        batch: Sampling | Minibatch | None = None,
        rng: Draws | None = None,
        rows: NDArray[np.bool_] | None = None,
    ) -> torch.Tensor:
        """Return `grad f_i(x_i)` `[rows, dim]`: exact, on a minibatch, or on one drawn now.

        A shared `x [1, dim]` serves all nodes.

        Raises:
            RunError: x has another shape; compiled gradients would read past its end.
        """
        if isinstance(batch, Sampling):
            batch = self.sample(batch, rng)
        x = self._one_row_each(x, "gradient")
        if rows is not None:
            return self._gradient_of_some(x, batch, np.flatnonzero(rows[self.nodes]))
        self._counts.gradients += len(self.nodes)
        self._counts.samples += self._all_records if batch is None else batch.records
        if self.pace is None:
            return self._gradient_of(x, self.nodes, batch)
        with self.pace.stretched(len(self.nodes)):
            return self._gradient_of(x, self.nodes, batch)

    def _gradient_of(self, x: torch.Tensor, nodes: NDArray[np.int64], batch: Minibatch | None) -> torch.Tensor:
        if len(nodes) > 1 or self.problem.rows_alone:
            return self.problem.gradient(x, nodes, batch)
        twice = None if batch is None else Minibatch(np.repeat(batch.indices, 2, 0), np.repeat(batch.weights, 2, 0))
        return self.problem.gradient(x.expand(2, -1).contiguous(), np.repeat(nodes, 2), twice)[:1]

    def _gradient_of_some(self, x: torch.Tensor, batch: Minibatch | None, own: NDArray[np.int64]) -> torch.Tensor:
        g = torch.zeros_like(x)
        if len(own):
            some = None if batch is None else Minibatch(batch.indices[own], batch.weights[own])
            self._counts.gradients += len(own)
            self._counts.samples += int(self.records[own].sum()) if some is None else some.records
            g[own] = self._gradient_of(x[own], self.nodes[own], some)
        return g

    def clipped(
        self,
        x: torch.Tensor,
        clip: Clip,
        before: torch.Tensor | None = None,
        weights: NDArray[np.float64] | None = None,
        rows: NDArray[np.bool_] | None = None,
    ) -> torch.Tensor:
        """Return every node's mean of clipped gradients of single records at x, `[rows, dim]`.

        Terms of the objective that no record enters (l2) are left out.

        Args:
            x, before: `[rows, dim]`, or `[1, dim]` for all; with `before` differences of gradients are clipped.
            clip: radii; `clip.radius` may hold one per row, `[rows, 1]`.
            weights: of the records, `[rows, longest]` (0: not evaluated); None: a mean over all of them.

        Raises:
            Unsupported: the problem cannot tell its records apart.
        """
        gradients = self._record_gradients()
        x = self._one_row_each(x, "clipped gradient")
        before = None if before is None else self._one_row_each(before, "clipped gradient")
        found = torch.zeros_like(x)
        for row, node in enumerate(self.nodes.tolist()):
            if rows is not None and not rows[node]:
                continue
            weight = np.full(self.records[row], 1.0 / self.records[row]) if weights is None else weights[row]
            records = np.flatnonzero(weight)
            old = None if before is None else before[row]
            found[row] = clipped_sum(gradients, node, records, weight[records], x[row], clip.of_row(row), old)
            evaluations = 1 if before is None else 2
            self.charge(evaluations, evaluations * len(records))
        return found

    def _record_gradients(self) -> RecordGradients:
        if self._per_record is None:
            self._per_record = self.problem.per_record()
        if self._per_record is None:
            raise Unsupported(
                f"problem {self.problem.kind!r} has no gradients of single records, which clipping needs; logistic,"
                " multinomial, least_squares, ridge, module and shared_curvature have"
            )
        return self._per_record

    def regular_gradient(self, x: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the objective's part that no record enters; not counted."""
        return self.problem.regular_gradient(x)

    def query(self, points: torch.Tensor, rows: NDArray[np.bool_] | None = None) -> torch.Tensor:
        """Return what the nodes' black boxes answer, noise included: `[rows, count]` at `points [rows, count, dim]`.

        Raises:
            Spent: the run's budget ended within this call; what it still allowed was asked, counted and logged.
        """
        count, asked = points.shape[1], self.queries.asked
        allowed = self.queries.allowed(rows, count)
        values = torch.zeros(points.shape[:2], dtype=torch.float64)
        for each in np.unique(allowed[self.nodes]):
            own = np.flatnonzero(allowed[self.nodes] == each)
            if each and len(own):
                values[own, :each] = self._values(points[own, :each], own)
        asked += allowed
        wanted = count * (len(asked) if rows is None else int(np.count_nonzero(rows)))
        if int(allowed.sum()) < wanted:
            raise Spent
        return values

    def _values(self, points: torch.Tensor, own: NDArray[np.int64]) -> torch.Tensor:
        nodes, count = self.nodes[own], points.shape[1]
        values = self.problem.values(points, nodes).double()
        for place, row in enumerate(own):
            if self.problem.noise:
                before = int(self.queries.asked[nodes[place]])
                drawn = self._streams.normal("query noise", nodes[place : place + 1], before, count)[0]
                values[place] += self.problem.noise * torch.from_numpy(drawn)
            self.queries.note(int(row), points[place].numpy(), values[place].numpy())
        self._counts.queries += values.numel()
        return values

    def inside(self, x: torch.Tensor) -> torch.Tensor:
        """Return points `[..., dim]` moved to the nearest ones of the problem's box, where it has one."""
        return x if self.problem.box is None else x.clamp(*self.problem.box)

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

    @property
    def has_composite(self) -> bool:
        """Whether the problem has a composite term."""
        return self.problem.has_composite

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
