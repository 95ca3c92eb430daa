"""Least squares and ridge regression."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from fedsim.errors import InputError, Unsupported
from fedsim.problems.compiled import GRADIENT, LOSS, RecordsProblem, dot, finish, place
from fedsim.problems.data.table import Data
from fedsim.problems.problem import Nodes

if TYPE_CHECKING:
    from fedsim.problems.dense import DenseRecords


RANK = float(np.finfo(np.float64).eps)  # times the size of a matrix: what rounding makes of a singular value 0
SINGULAR = 1e-13  # relative to the largest eigenvalue: below it a Hessian is not inverted


@njit(GRADIENT, cache=True)
def _gradient(slot, x, indices, weights, reals, ints, scratch, out):  # pragma: no cover - compiled
    d, total, n, first, end, node = place(slot, ints)
    out[:] = 0.0
    count = len(indices) if len(indices) else end - first
    for j in range(count):
        record = first + (indices[j] if len(indices) else j)
        weight = weights[j] if len(indices) else 1.0 / (end - first)
        if weight != 0.0:
            factor = 2.0 * weight * (dot(reals, record * d, x, 0, d) - reals[total * d + record])
            for c in range(d):
                out[c] += factor * reals[record * d + c]
    finish(x, reals, total, d, n, node, out)


@njit(LOSS, cache=True)
def _loss(slot, x, reals, ints, scratch):  # pragma: no cover - compiled
    d, total, n, first, end, node = place(slot, ints)
    value = 0.0
    for record in range(first, end):
        residual = dot(reals, record * d, x, 0, d) - reals[total * d + record]
        value += residual * residual
    l2, scale = reals[total * d + total + n], reals[total * d + total + node]
    return scale * (value / (end - first) + 0.5 * l2 * dot(x, 0, x, 0, d))


class LeastSquares(RecordsProblem):
    """`f_i(x) = (1/m_i) sum_j (a_ij'x - b_ij)^2 + (l2/2) ||x||^2`; l2 = 0 is plain least squares.

    `L_i = (2/m_i) lambda_max(A_i'A_i) + l2`, `mu_i` with lambda_min, as squares of singular values of `A_i`: `A_i'A_i`
    itself would lose a `mu_i` below 1e-16 `L_i`, and half the digits of one above.
    """

    _gradient, _loss = staticmethod(_gradient), staticmethod(_loss)

    def __init__(
        self,
        data: Data,
        parts: list[np.ndarray],
        l2: float = 0.0,
        weights: str = "uniform",
        kind: str = "least_squares",
    ) -> None:
        if data.task != "regression":
            raise InputError(f"problem {kind}: data {data.name!r} has classes; numbers are needed (task: regression)")
        super().__init__(data, data.labels, parts, l2, weights)
        self.kind, self.dim = kind, self.features.shape[1]
        found = np.array([_extreme_eigenvalues(self.features[self.of(node)]) for node in range(self.n)])
        self.mu, self.L = self.scale * (2 * found.T + l2)
        self._inverse: dict[int, np.ndarray] = {}

    def per_record(self) -> DenseRecords:
        """Return per-record gradients: one output."""
        from fedsim.problems.dense import square_slope

        return self.dense(1, square_slope, self.labels)

    def judge(self, x: NDArray[np.float64], data: Data) -> tuple[NDArray[np.float64], None]:
        """Return each record's squared residual."""
        return (data.features @ x - data.labels) ** 2, None

    def optimum(self) -> torch.Tensor | None:
        """Return the minimiser by QR of the weighted records, or None where it is not unique.

        Columns are brought to one length first: their units say nothing about rank.
        """
        root = np.sqrt(2 * self.record_weights())
        ridge = np.sqrt(self.l2 * float(np.mean(self.scale))) * np.eye(self.dim)
        a = np.vstack([self.features * root[:, None], ridge])
        b = np.concatenate([self.labels * root, np.zeros(self.dim)])
        lengths = np.linalg.norm(a, axis=0)
        if not lengths.all():
            return None
        a /= lengths
        q, r = np.linalg.qr(a)
        if len(r) < self.dim or np.abs(np.diag(r)).min() <= RANK * max(a.shape):
            return None
        x = np.linalg.solve(r, q.T @ b)
        x += np.linalg.solve(r, q.T @ (b - a @ x))  # one step of refinement
        return torch.from_numpy(x / lengths)

    def dual_gradient(self, s: torch.Tensor, nodes: Nodes) -> torch.Tensor:
        """Return `grad f_i^*(s_i)`: the solution of `grad f_i(x) = s_i`.

        Raises:
            Unsupported: a node's Hessian is singular, or so nearly that its inverse would hold no digits.
        """
        assert self.mu is not None
        assert self.L is not None
        if not (self.mu > SINGULAR * self.L).all():
            node = int(np.argmin(self.mu / self.L))
            raise Unsupported(
                f"problem {self.kind!r}: node {node}'s records are not of full column rank"
                f" (mu/L = {self.mu[node] / self.L[node]:.1g}), so it has no dual gradient; use ridge, more records per"
                " node, or a primal algorithm"
            )
        out = np.empty(tuple(s.shape))
        for row, node in enumerate(np.asarray(nodes)):
            a, b = self.features[self.of(node)], self.labels[self.of(node)]
            right = s[row].numpy() / self.scale[node] + 2 * (a.T @ b) / len(a)
            out[row] = (self._inverted(int(node)) * right).sum(axis=1)
        return torch.from_numpy(out)

    def _inverted(self, node: int) -> np.ndarray:
        if node not in self._inverse:
            a = self.features[self.of(node)]
            self._inverse[node] = np.linalg.inv(2 * (a.T @ a) / len(a) + self.l2 * np.eye(self.dim))
        return self._inverse[node]


def _extreme_eigenvalues(a: np.ndarray) -> tuple[float, float]:
    """Return the least and the largest eigenvalue of `a'a / m`, `a [m, d]`; the least is 0 where rounding hides it."""
    m, d = a.shape
    values = np.linalg.svd(a, compute_uv=False)
    least = values[-1] if d <= m and values[-1] > RANK * m * values[0] else 0.0
    return least**2 / m, values[0] ** 2 / m
