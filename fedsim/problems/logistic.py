"""Binary logistic regression and its form for several classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from fedsim.errors import InputError
from fedsim.problems.compiled import GRADIENT, LOSS, RecordsProblem, dot, finish, place
from fedsim.problems.data.table import Data
from fedsim.problems.newton import minimise

if TYPE_CHECKING:
    from fedsim.problems.dense import DenseRecords


@njit(GRADIENT, cache=True)
def _gradient(slot, x, indices, weights, reals, ints, scratch, out):  # pragma: no cover - compiled
    d, total, n, first, end, node = place(slot, ints)
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
    finish(x, reals, total, d, n, node, out)


@njit(LOSS, cache=True)
def _loss(slot, x, reals, ints, scratch):  # pragma: no cover - compiled
    d, total, n, first, end, node = place(slot, ints)
    value = 0.0
    for record in range(first, end):
        margin = reals[total * d + record] * dot(reals, record * d, x, 0, d)
        value += max(-margin, 0.0) + math.log1p(math.exp(-abs(margin)))
    l2, scale = reals[total * d + total + n], reals[total * d + total + node]
    return scale * (value / (end - first) + 0.5 * l2 * dot(x, 0, x, 0, d))


class Logistic(RecordsProblem):
    """`f_i(x) = (1/m_i) sum_j log(1 + exp(-y_ij a_ij'x)) + (l2/2) ||x||^2`, y = -1 or +1.

    `L_i = lambda_max(A_i'A_i)/(4 m_i) + l2` (the Hessian at 0, its largest), `mu_i = l2`.
    """

    kind = "logistic"
    _gradient, _loss = staticmethod(_gradient), staticmethod(_loss)

    def __init__(self, data: Data, parts: list[np.ndarray], l2: float = 0.0, weights: str = "uniform") -> None:
        if data.task != "binary":
            raise InputError(
                f"problem logistic: data {data.name!r} is a {data.task} task; two classes are needed"
                " (multinomial takes several, least_squares numbers)"
            )
        super().__init__(data, data.signs, parts, l2, weights)
        self.dim = self.features.shape[1]
        self.L = self.scale * (self.largest_eigenvalues() / 4 + l2)
        self.mu = (self.scale * l2).astype(np.float64)
        self._found: torch.Tensor | None = None

    def per_record(self) -> DenseRecords:
        """Return per-record gradients: one output."""
        from fedsim.problems.dense import logistic_slope

        return self.dense(1, logistic_slope, self.labels)

    def judge(self, x: NDArray[np.float64], data: Data) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return each record's loss, and whether the sign is right."""
        return judged_signs(x, data)

    def optimum(self) -> torch.Tensor | None:
        """Return the minimiser by Newton's method, or None without l2 (it may not exist)."""
        if self.l2 == 0:
            return None
        if self._found is None:
            self._found = torch.from_numpy(minimise(self._pooled_gradient, self._pooled_hessian, self.dim))
        return self._found

    def _pooled_gradient(self, x: np.ndarray) -> np.ndarray:
        g, weight = self.l2 * float(np.mean(self.scale)) * x, self.record_weights()
        for part in self.slices():
            a, y = self.features[part], self.labels[part]
            g += a.T @ (-0.5 * weight[part] * y * (1 - np.tanh(0.5 * y * (a @ x))))
        return g

    def _pooled_hessian(self, x: np.ndarray) -> np.ndarray:
        p = 0.5 * (1 + np.tanh(0.5 * self.labels * (self.features @ x)))
        curvature = self.record_weights() * p * (1 - p)
        return (self.features.T * curvature) @ self.features + self.l2 * float(np.mean(self.scale)) * np.eye(self.dim)


def judged_signs(x: NDArray[np.float64], data: Data) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the logistic loss of each record of two classes at x `[dim]`, and whether `a'x` has its sign."""
    scores, signs = data.features @ x, data.signs
    return np.logaddexp(0.0, -signs * scores), (scores > 0.0) == (signs > 0.0)


@njit(inline="always")
def _softmax(record, x, reals, d, classes, scratch):  # pragma: no cover - compiled
    """Write the classes' probabilities to `scratch`; return the log of the normaliser (largest logit added back)."""
    largest = -np.inf
    for k in range(classes):
        scratch[k] = dot(reals, record * d, x, k * d, d)
        largest = max(largest, scratch[k])
    total = 0.0
    for k in range(classes):
        scratch[k] = math.exp(scratch[k] - largest)
        total += scratch[k]
    for k in range(classes):
        scratch[k] /= total
    return largest + math.log(total)


@njit(GRADIENT, cache=True)
def _softmax_gradient(slot, x, indices, weights, reals, ints, scratch, out):  # pragma: no cover - compiled
    d, total, n, first, end, node = place(slot, ints)
    classes = ints[3]
    out[:] = 0.0
    count = len(indices) if len(indices) else end - first
    for j in range(count):
        record = first + (indices[j] if len(indices) else j)
        weight = weights[j] if len(indices) else 1.0 / (end - first)
        if weight != 0.0:
            _softmax(record, x, reals, d, classes, scratch)
            scratch[int(reals[total * d + record])] -= 1.0
            for k in range(classes):
                factor = weight * scratch[k]
                for c in range(d):
                    out[k * d + c] += factor * reals[record * d + c]
    finish(x, reals, total, d, n, node, out)


@njit(LOSS, cache=True)
def _softmax_loss(slot, x, reals, ints, scratch):  # pragma: no cover - compiled
    d, total, n, first, end, node = place(slot, ints)
    classes = ints[3]
    value = 0.0
    for record in range(first, end):
        normaliser = _softmax(record, x, reals, d, classes, scratch)
        value += normaliser - dot(reals, record * d, x, int(reals[total * d + record]) * d, d)
    l2, scale = reals[total * d + total + n], reals[total * d + total + node]
    return scale * (value / (end - first) + 0.5 * l2 * dot(x, 0, x, 0, len(x)))


class Multinomial(RecordsProblem):
    """Softmax regression: `f_i(X) = (1/m_i) sum_j [log sum_k exp(X_k'a_ij) - X_{y_ij}'a_ij] + (l2/2) ||X||^2`.

    `x` is X row by row, `dim = classes * features`. `L_i = lambda_max(A_i'A_i)/(2 m_i) + l2`: 1/2 is the largest
    eigenvalue that `diag(p) - pp'` can have. `mu_i = l2`.
    """

    kind = "multinomial"
    _gradient, _loss = staticmethod(_softmax_gradient), staticmethod(_softmax_loss)

    def __init__(self, data: Data, parts: list[np.ndarray], l2: float = 0.0, weights: str = "uniform") -> None:
        if data.task == "regression":
            raise InputError(f"problem multinomial: data {data.name!r} has numbers for labels; classes are needed")
        super().__init__(data, np.asarray(data.labels, dtype=np.float64), parts, l2, weights)
        self.classes = int(self._ints[3])
        self.dim, self._scratch = self.classes * self.features.shape[1], self.classes
        self.L = self.scale * (self.largest_eigenvalues() / 2 + l2)
        self.mu = (self.scale * l2).astype(np.float64)
        self._found: torch.Tensor | None = None

    def per_record(self) -> DenseRecords:
        """Return per-record gradients: one output per class."""
        from fedsim.problems.dense import cross_entropy_slope

        return self.dense(self.classes, cross_entropy_slope, self.labels.astype(np.int64))

    def judge(self, x: NDArray[np.float64], data: Data) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return each record's loss, and whether its class has the largest logit."""
        logits = data.features @ x.reshape(self.classes, -1).T
        own = logits[np.arange(len(data)), data.labels]
        return np.logaddexp.reduce(logits, axis=1) - own, logits.argmax(axis=1) == data.labels

    def optimum(self) -> torch.Tensor | None:
        """Return the minimiser by Newton's method with conjugate gradients, or None without l2."""
        if self.l2 == 0:
            return None
        if self._found is None:
            self._found = torch.from_numpy(minimise(self._pooled_gradient, self._pooled_product, self.dim))
        return self._found

    def _pooled_gradient(self, x: np.ndarray) -> np.ndarray:
        g, weight = self.l2 * float(np.mean(self.scale)) * x, self.record_weights()[:, None]
        for part in self.slices():
            p = _probabilities(self.features[part], x, self.classes)
            p[np.arange(len(p)), self.labels[part].astype(int)] -= 1
            g += ((weight[part] * p).T @ self.features[part]).ravel()
        return g

    def _pooled_product(self, x: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        p, weight = _probabilities(self.features, x, self.classes), self.record_weights()[:, None]
        damping = self.l2 * float(np.mean(self.scale))

        def product(v: np.ndarray) -> np.ndarray:
            u = self.features @ v.reshape(self.classes, -1).T
            u = p * (u - (p * u).sum(axis=1, keepdims=True))
            return ((weight * u).T @ self.features).ravel() + damping * v

        return product


def _probabilities(features: np.ndarray, x: np.ndarray, classes: int) -> np.ndarray:
    logits = features @ x.reshape(classes, -1).T
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)
