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

from fedsim.surrogate.kernels import Kernel, Name


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

    def __call__(self, points: torch.Tensor, scale: float) -> torch.Tensor:
        """Return `phi` of `points [n, dim]` at a length scale: `[n, M]`."""
        return (points @ self.directions.T).div_(scale).add_(self.phases).cos_().mul_(self.amplitude)

    def gradient(self, x: torch.Tensor, scale: float, weights: torch.Tensor) -> torch.Tensor:
        """Return `grad (phi(x)' weights)` `[dim]` at `x [dim]` for `weights [M]`."""
        angles = (self.directions @ x).div_(scale).add_(self.phases)
        return (angles.sin_().mul_(weights) @ self.directions).mul_(-self.amplitude / scale)

    def weights(
        self, points: torch.Tensor, values: torch.Tensor, scale: float, noise: float
    ) -> tuple[torch.Tensor, int]:
        """Return `Phi (Phi' Phi + noise I)^-1 values` `[M]` of one client, and how often the noise grew tenfold.

        The dual form: n points, n < M. With noise 0 and points that coincide the least squares of smallest norm. Points
        that are not finite give weights that are not.
        """
        phi = self(points, scale)
        gram, raised = _lower_gram(phi), 0
        if not bool(gram.diagonal().isfinite().all()):
            return torch.full_like(self.phases, math.nan), raised
        while True:
            gram.diagonal().add_(noise)
            factor, info = torch.linalg.cholesky_ex(gram)
            if int(info) == 0:
                return torch.cholesky_solve(values[:, None], factor)[:, 0] @ phi, raised
            if noise == 0.0:
                whole = gram.tril() + gram.tril(-1).T
                return torch.linalg.lstsq(whole, values[:, None], driver="gelsd").solution[:, 0] @ phi, raised
            gram.diagonal().sub_(noise)
            noise, raised = 10.0 * noise, raised + 1


def _lower_gram(phi: torch.Tensor) -> torch.Tensor:
    """Return `phi phi'` on and below the diagonal, at 5/8 of the cost; what is above is unfinished."""
    gram, end = phi.new_zeros((len(phi), len(phi))), 0
    for rows in phi.chunk(4):
        begin, end = end, end + len(rows)
        torch.mm(rows, phi[:end].T, out=gram[begin:end, :end])
    return gram


@lru_cache(maxsize=1)
def features(name: Name, count: int, dim: int, seed: int) -> Features:
    """Return the features of a seed; the last ones are kept, since they are the same on every client."""
    return Features(name, count, dim, seed)
