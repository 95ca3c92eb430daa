"""Binary logistic regression with a bounded penalty, which makes it nonconvex."""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from fedsim.errors import InputError
from fedsim.problems.compiled import GRADIENT, LOSS, RecordsProblem, dot, place
from fedsim.problems.data.table import Data
from fedsim.problems.logistic import judged_signs


@njit(GRADIENT, cache=True)
def _gradient(slot, x, indices, weights, reals, ints, scratch, out):  # pragma: no cover - compiled
    d, total, n, first, end, node = place(slot, ints)
    penalty, scale = reals[total * d + total + n], reals[total * d + total + node]
    out[:] = 0.0
    count = len(indices) if len(indices) else end - first
    for j in range(count):
        record = first + (indices[j] if len(indices) else j)
        weight = weights[j] if len(indices) else 1.0 / (end - first)
        if weight != 0.0:
            label = reals[total * d + record]
            margin = label * dot(reals, record * d, x, 0, d)
            factor = -label * weight * 0.5 * (1.0 - math.tanh(0.5 * margin))
            for c in range(d):
                out[c] += factor * reals[record * d + c]
    for c in range(d):
        bound = 1.0 + x[c] * x[c]
        out[c] = scale * (out[c] + 2.0 * penalty * x[c] / (bound * bound))


@njit(LOSS, cache=True)
def _loss(slot, x, reals, ints, scratch):  # pragma: no cover - compiled
    d, total, n, first, end, node = place(slot, ints)
    penalty, scale = reals[total * d + total + n], reals[total * d + total + node]
    value, bounded = 0.0, 0.0
    for record in range(first, end):
        margin = reals[total * d + record] * dot(reals, record * d, x, 0, d)
        value += max(-margin, 0.0) + math.log1p(math.exp(-abs(margin)))
    for c in range(d):
        bounded += x[c] * x[c] / (1.0 + x[c] * x[c])
    return scale * (value / (end - first) + penalty * bounded)


class NonconvexLogistic(RecordsProblem):
    """`f_i(x) = (1/m_i) sum_j log(1 + exp(-y_ij a_ij'x)) + penalty * sum_k x_k^2 / (1 + x_k^2)`, y = -1 or +1.

    `L_i = lambda_max(A_i'A_i)/(4 m_i) + 2 penalty` (the Hessian at 0, its largest). The penalty's curvature goes down
    to `-penalty/2`, so there is no mu, and no optimum is claimed.
    """

    kind = "nonconvex_logistic"
    _gradient, _loss = staticmethod(_gradient), staticmethod(_loss)

    def __init__(self, data: Data, parts: list[np.ndarray], penalty: float, weights: str = "uniform") -> None:
        if data.task != "binary":
            raise InputError(
                f"problem {self.kind}: data {data.name!r} is a {data.task} task; two classes are needed"
                " (multinomial takes several, least_squares numbers)"
            )
        super().__init__(data, data.signs, parts, penalty, weights)  # the tables hold it where others hold l2
        self.l2, self.penalty, self.dim = 0.0, float(penalty), self.features.shape[1]
        self.L = self.scale * (self.largest_eigenvalues() / 4 + 2 * self.penalty)

    def judge(self, x: NDArray[np.float64], data: Data) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return each record's loss, without the penalty, and whether the sign is right."""
        return judged_signs(x, data)
