"""Random Fourier features: a client's surrogate as M numbers that a server can average.

FZooS, section 4.2: `phi(x)_j = sqrt(2/M) cos(v_j x / l + b_j)`, with the v_j from the kernel's spectral density. (The
paper's appendix prints the factor `2/sqrt(M)`; its proof, like this code, uses `sqrt(2/M)`.) What is shared is the
seed: the v_j are M * dim numbers that nobody sends.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

from fedsim.surrogate.kernels import Kernel, Name, lower_gram

PART = 3 << 18  # bytes of directions taken at a time, which caches keep; on every machine, since sums depend on it


class Features:
    """The features of one seed.

    Attributes:
        directions: float64 `[M, dim]`, at length scale 1. phases: `[M]` in [0, 2 pi).
    """

    def __init__(self, name: Name, count: int, dim: int, seed: int) -> None:
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, 0], dtype=np.uint64)))
        self.directions = torch.from_numpy(Kernel(name, 1.0).frequencies(count, dim, rng))
        self.phases = torch.from_numpy(rng.uniform(0.0, 2.0 * math.pi, count))
        self.amplitude = math.sqrt(2.0 / count)
        self._part = max(1, PART // (8 * dim))

    def __call__(self, points: torch.Tensor, scale: float) -> torch.Tensor:
        """Return `phi` of `points [n, dim]` at a length scale: `[n, M]`."""
        return self._cosines(points, scale).mul_(self.amplitude)

    def _cosines(self, points: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.addmm(self.phases, points / scale, self.directions.T).cos_()

    def gradients(self, x: torch.Tensor, scales: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return `grad (phi(x_i)' w_i)` `[k, dim]` at `x [k, dim]`, each with its scale `[k]` and weights `[k, M]`.

        The directions are read from memory once for all, part by part; no row's bits depend on the others.
        """
        found, near = torch.zeros_like(x), x / scales[:, None]
        for begin in range(0, len(self.phases), self._part):
            part = slice(begin, begin + self._part)
            v, phases = self.directions[part], self.phases[part]
            for total, at, w in zip(found, near, weights, strict=True):
                total.addmv_(v.T, torch.addmv(phases, v, at).sin_().mul_(w[part]))
        return found.mul_(-self.amplitude / scales[:, None])

    def weights(
        self, points: torch.Tensor, values: torch.Tensor, scale: float, noise: float
    ) -> tuple[torch.Tensor, int]:
        """Return `Phi (Phi' Phi + noise I)^-1 values` `[M]` of one client, and how often the noise grew tenfold.

        The dual form: n points, n < M. With noise 0 and points that coincide the least squares of smallest norm. Points
        that are not finite give weights that are not.
        """
        cosines = self._cosines(points, scale)
        gram, raised = lower_gram(cosines, self.amplitude**2), 0
        if not bool(gram.diagonal().isfinite().all()):
            return torch.full_like(self.phases, math.nan), raised
        while True:
            gram.diagonal().add_(noise)
            factor, info = torch.linalg.cholesky_ex(gram)
            if int(info) == 0:
                alpha = torch.cholesky_solve(values[:, None], factor)[:, 0]
                break
            if noise == 0.0:
                whole = gram.tril() + gram.tril(-1).T
                alpha = torch.linalg.lstsq(whole, values[:, None], driver="gelsd").solution[:, 0]
                break
            gram.diagonal().sub_(noise)
            noise, raised = 10.0 * noise, raised + 1
        return (alpha @ cosines).mul_(self.amplitude), raised


@lru_cache(maxsize=1)
def features(name: Name, count: int, dim: int, seed: int) -> Features:
    """Return the features of a seed; the last ones are kept, since they are the same on every client."""
    return Features(name, count, dim, seed)
