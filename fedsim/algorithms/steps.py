"""What many synchronous methods share: decaying steps, clipping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from fedsim.problems.rows import row_sums

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Decay:
    """`eta_k = eta (1 + k / offset)^-power`."""

    offset: Positive = 1.0
    power: Positive = 0.5

    def at(self, eta: float, k: int) -> float:
        """Return the step of round k."""
        return eta * (1.0 + k / self.offset) ** -self.power


def clipped(g: torch.Tensor, limit: float | None) -> torch.Tensor:
    """Return rows `[rows, dim]` scaled down to norm `limit` where they are longer; None: as they are."""
    if limit is None:
        return g
    wide = g.double()
    norm = row_sums(wide * wide).sqrt()
    factor = torch.where(norm > limit, limit / norm, torch.ones_like(norm))
    return g * factor[:, None].to(g.dtype)
