"""Newton's method, to a gradient that rounding alone limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import RunError

Vector = NDArray[Any]


def minimise(gradient: Callable[[Vector], Vector], hessian: Callable[[Vector], Any], dim: int) -> Vector:
    """Return the minimiser of a smooth, strongly convex function, from 0.

    The last step is taken on a gradient in extended precision (where the machine has it): along directions in which
    f is flat, the rounding of an ordinary gradient would move the minimiser by as much as `1e-16 / mu`.

    Args:
        gradient: `x -> grad f(x)`, in the type of x.
        hessian: `x -> matrix [dim, dim]`, or `x -> (v -> H v)`.

    Raises:
        RunError: the gradient does not fall below 1e-11 of its first norm.
    """
    x = np.zeros(dim)
    g = gradient(x)
    first = best = float(np.linalg.norm(g))
    for _ in range(100):
        if best == 0:
            break
        step = _solve(hessian(x), g, best)
        size, trial = 1.0, x - step
        g_trial = gradient(trial)
        while float(np.linalg.norm(g_trial)) >= best and size > 1e-3:
            size /= 2
            trial = x - size * step
            g_trial = gradient(trial)
        norm = float(np.linalg.norm(g_trial))
        if norm >= best:
            break
        x, g, best = trial, g_trial, norm
        if best <= 1e-15 * first:
            break
    if best > 1e-11 * first:
        raise RunError(
            f"the optimum was found to {best / first:.1e} of the first gradient only; is it ill-conditioned?"
        )
    g = gradient(x.astype(np.longdouble)).astype(np.float64)
    norm = float(np.linalg.norm(g))
    return x - _solve(hessian(x), g, norm) if norm > 0 else x


def _solve(hessian: Any, g: Vector, norm: float) -> Vector:
    if not isinstance(hessian, np.ndarray):
        return _conjugate_gradients(hessian, g, 1e-10 * norm)
    return np.asarray(np.linalg.solve(hessian, g), dtype=np.float64)


def _conjugate_gradients(product: Callable[[Vector], Vector], g: Vector, tolerance: float) -> Vector:
    x, r = np.zeros_like(g), g.copy()
    p, rr = r.copy(), float(r @ r)
    for _ in range(20 * len(g)):
        hp = product(p)
        step = rr / float(p @ hp)
        x += step * p
        r -= step * hp
        new = float(r @ r)
        if new**0.5 <= tolerance:
            break
        p, rr = r + (new / rr) * p, new
    return x
