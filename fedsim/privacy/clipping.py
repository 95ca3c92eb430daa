"""Means of clipped per-record gradients, or of clipped per-record differences of gradients.

The one place where a record's weight is decided: whatever the chunks, it enters with `weight * min(1, C/norm)`, and
with 0 where its gradient is too large for arithmetic.
(The published code of DIFF2 averages chunk means with equal weight: records of a short last chunk weigh too much.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fedsim.problems.per_record import RecordGradients, Signals

FLOAT32_MARGIN = 1 - 1e-5
"""Radii are that much smaller in float32, whose norms may be too small by rounding."""


@dataclass(frozen=True)
class Clip:
    """How one record's gradient is bounded.

    Attributes:
        radius: largest norm of what is summed; infinity clips nothing; a tensor `[rows, 1]`: one per worker.
        per_layer: bound each of the L layers by `radius / sqrt(L)` instead of all together.
        inner: bound both gradients by this before their difference is taken; None: not at all.
    """

    radius: float | torch.Tensor
    per_layer: bool = False
    inner: float | None = None

    def of_row(self, row: int) -> Clip:
        """Return what holds for one worker."""
        return Clip(float(self.radius[row, 0]), self.per_layer, self.inner) if torch.is_tensor(self.radius) else self


def factors(squared: torch.Tensor, radius: float, per_layer: bool, dtype: torch.dtype) -> torch.Tensor:
    """Return `min(1, radius / norm)` as `[m, groups]` for `squared [m, groups]` norms; a zero gradient stays."""
    if dtype == torch.float32:
        radius *= FLOAT32_MARGIN
    groups = squared.shape[1]
    if per_layer:
        norm, radius = squared.double().sqrt(), radius / groups**0.5
    else:
        norm = squared.double().sum(dim=1, keepdim=True).sqrt().expand(-1, groups)
    tiny = torch.finfo(torch.float64).tiny
    return (radius / norm.clamp(min=tiny)).clamp(max=1.0)


def clipped_sum(
    gradients: RecordGradients,
    node: int,
    records: NDArray[np.int64],
    weights: NDArray[np.float64],
    x: torch.Tensor,
    clip: Clip,
    before: torch.Tensor | None = None,
    chunk: int | None = None,
) -> torch.Tensor:
    """Return `sum_j weights[j] clip(g_j)` as `[dim]`, `g_j` the gradient of record j of a node at `x [dim]`.

    Args:
        before: another point `[dim]`; `g_j` is then the difference of the gradients at x and there.
        chunk: records at a time, which changes rounding only (default: what the problem asks for).
    """
    total = torch.zeros_like(x)
    size = chunk or gradients.chunk
    for begin in range(0, len(records), size):
        part, weight = records[begin : begin + size], torch.from_numpy(weights[begin : begin + size])[:, None]
        signals = _signals(gradients, node, part, x, clip, before)
        squared = signals.squared_norms()
        usable = _usable(squared, x.dtype)
        if not usable.all() and not math.isinf(float(clip.radius)):
            if not usable.any():
                continue
            signals = _signals(gradients, node, part[usable.numpy()], x, clip, before)
            squared, weight = squared[usable], weight[usable]
        total += signals.sum(weight * _bounded(squared, clip, x.dtype))
    return total


def _usable(squared: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return which records `[m]` have a squared norm that the type can hold; the others count as 0.

    One infinite gradient, or one that is no number, would be seen in every release, whatever its noise.
    """
    return squared.double().sum(dim=1) < torch.finfo(dtype).max


def _signals(
    gradients: RecordGradients,
    node: int,
    records: NDArray[np.int64],
    x: torch.Tensor,
    clip: Clip,
    before: torch.Tensor | None,
) -> Signals:
    new = gradients.at(node, records, x)
    if before is None:
        return new
    old = gradients.at(node, records, before)
    if clip.inner is not None:
        inner = Clip(clip.inner, clip.per_layer)
        new, old = (signals.scaled(_bounded(signals.squared_norms(), inner, x.dtype)) for signals in (new, old))
    return new.minus(old)


def _bounded(squared: torch.Tensor, clip: Clip, dtype: torch.dtype) -> torch.Tensor:
    radius = float(clip.radius)
    if math.isinf(radius):
        return torch.ones(squared.shape, dtype=torch.float64)
    return factors(squared, radius, clip.per_layer, dtype)
