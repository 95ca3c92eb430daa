"""`f_i + r`: any problem with a composite term beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.problems.problem import CompiledObjective, Minibatch, Nodes, Problem

if TYPE_CHECKING:
    import torch

    from fedsim.problems.composite import Term

TOLERANCE, MOST = 1e-15, 200_000


class Regularised(Problem):
    """`(1/n) sum_i f_i(x) + r(x)`; gradients are those of the `f_i`, the term comes in by `prox` and `composite`.

    Args:
        smooth: the `f_i`. term: r.
    """

    def __init__(self, smooth: Problem, term: Term) -> None:
        self.smooth, self.term = smooth, term
        self.kind, self.n, self.dim, self.records = smooth.kind, smooth.n, smooth.dim, smooth.records
        self.L, self.mu = smooth.L, smooth.mu
        self.common_start, self.own_start, self.rows_alone = smooth.common_start, smooth.own_start, smooth.rows_alone
        self.weak_convexity = term.weak_convexity

    @property
    def dtype(self) -> torch.dtype:
        """Type of models and gradients."""
        return self.smooth.dtype

    @property
    def tensor_sizes(self) -> list[int]:
        """Numbers of parameters of the model's tensors."""
        return self.smooth.tensor_sizes

    @property
    def tensor_names(self) -> list[str]:
        """Names of the model's tensors."""
        return self.smooth.tensor_names

    def gradient(self, x: torch.Tensor, nodes: Nodes, batch: Minibatch | None = None) -> torch.Tensor:
        """Return `grad f_i(x_i)` `[rows, dim]`."""
        return self.smooth.gradient(x, nodes, batch)

    def loss(self, x: torch.Tensor, nodes: Nodes) -> torch.Tensor:
        """Return `f_i(x_i)` `[rows]`, without r."""
        return self.smooth.loss(x, nodes)

    def composite(self, x: torch.Tensor) -> torch.Tensor:
        """Return `r(x)` per row, `[rows]`."""
        return self.term.value(x)

    def prox(self, v: torch.Tensor, step: float) -> torch.Tensor:
        """Return the prox of `step * r` per row."""
        return self.term.prox(v, step)

    def optimum(self) -> torch.Tensor | None:
        """Return the minimiser of f + r `[dim]` where every f_i is strongly convex and r convex, else None."""
        return self._optimum

    @cached_property
    def _optimum(self) -> torch.Tensor | None:
        if self.L is None or self.mu is None or not (self.mu > 0).all() or not self.term.convex:
            return None
        return self._accelerated(float(self.L.mean()), float(self.mu.mean()))

    def _accelerated(self, L: float, mu: float) -> torch.Tensor:
        """Play accelerated proximal gradient until an iteration moves nothing that double precision holds."""
        import torch

        momentum = (1 - math.sqrt(mu / L)) / (1 + math.sqrt(mu / L))
        x = before = torch.zeros(1, self.dim, dtype=torch.float64)
        nodes = np.arange(self.n)
        for _ in range(MOST):
            y = x + momentum * (x - before)
            g = self.smooth.gradient(y.expand(self.n, -1).contiguous(), nodes).mean(dim=0, keepdim=True)
            before, x = x, self.term.prox(y - g / L, 1.0 / L)
            if float((x - y).abs().max()) <= TOLERANCE * max(1.0, float(x.abs().max())):
                break
        return x[0]

    def start(self, nodes: Nodes) -> torch.Tensor | None:
        """Return where the smooth part would start."""
        return self.smooth.start(nodes)

    def compiled(self, nodes: Nodes) -> CompiledObjective | None:
        """Return the compiled gradient of the smooth part."""
        return self.smooth.compiled(nodes)

    def metrics(self) -> dict[str, Callable[[torch.Tensor], float]]:
        """Return those of the smooth part, and how many coordinates of the mean model are not 0."""
        return {**self.smooth.metrics(), "nonzeros": lambda mean: float((mean != 0).sum())}

    def local_metrics(self) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """Return those of the smooth part."""
        return self.smooth.local_metrics()

    def use(self, device: str) -> None:
        """Compute the smooth part on this device."""
        self.smooth.use(device)
        self.rows_alone = self.smooth.rows_alone

    def facts(self) -> dict[str, Any]:
        """Return those of the smooth part, and the term."""
        return {**self.smooth.facts(), "composite": repr(self.term), "weak_convexity": self.term.weak_convexity}
