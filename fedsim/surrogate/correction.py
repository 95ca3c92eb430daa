"""How much of the correction a client takes: the paper's lengths gamma."""

from __future__ import annotations

import math

import torch

from fedsim.surrogate.history import History


def best_length(drift: torch.Tensor, correction: torch.Tensor) -> float:
    """Return `<a, c> / ||c||^2`, kept between 0 and 1 (Proposition 1; its appendix lost the square)."""
    size = float(correction @ correction)
    return 0.0 if size == 0.0 else min(1.0, max(0.0, float(drift @ correction) / size))


def theory_length(history: History, x: torch.Tensor, heterogeneity: float, clients: int, features: int) -> float:
    """Return Corollary 2's `G / (G + 2 (omega kappa - 4 omega iota k'(iota)^2 / (d + sigma^2 d / n) + N epsilon))`.

    With `omega = d + 2 (sqrt(d) + 1) ln(1/delta)`, delta = 0.1, iota the mean squared distance of x to the client's n
    queries, k' the kernel's derivative by the squared distance, N `clients`, and `epsilon = 1/M` for the `features`' M
    (the paper gives its order only), in the units of the values. (Proposition 2 prints iota^2; its proof has iota.)
    Call it after `history.gradient(x)`, whose window it takes noise and spread from.
    """
    dim, iota = len(x), history.mean_square_distance(x)
    omega = dim + 2.0 * (math.sqrt(dim) + 1.0) * math.log(10.0)
    slope = -0.5 * float(history.kernel.slope(torch.tensor(iota, dtype=torch.float64)))
    known = 4.0 * iota * slope**2 / (dim + history.noise * dim / max(1, history.count))
    error = omega * max(0.0, history.kernel.curvature - known) + clients / features
    return heterogeneity / (heterogeneity + 2.0 * history.spread**2 * error)
