"""Losses that push a router towards balance, beside the loss of the text: each of one host's micro-batch and layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fedsim.moe.model import Gating, Shape
from fedsim.moe.selection import select


@dataclass(frozen=True)
class Losses:
    """What each of them counts in the whole loss; 0: not at all.

    Attributes:
        z: mean squared log-sum-exp of the logits. sequence, importance, similarity: the functions below.
    """

    z: float = 0.0
    sequence: float = 0.0
    importance: float = 0.0
    similarity: float = 0.0

    def of(self, shape: Shape, gating: Gating, router: torch.Tensor, sequences: int) -> torch.Tensor | None:
        """Return their weighted sum, or None where there is none."""
        parts = [self.z * gating.z] if self.z else []
        if self.sequence:
            parts.append(self.sequence * sequence_loss(shape, gating.scores, sequences))
        if self.importance:
            parts.append(self.importance * importance_loss(gating.scores))
        if self.similarity:
            parts.append(self.similarity * similarity_loss(router))
        return torch.stack(parts).sum() if parts else None


def sequence_loss(shape: Shape, scores: torch.Tensor, sequences: int) -> torch.Tensor:
    """Return the mean over sequences of `sum_k f_k P_k` (DeepSeek-V3's complementary loss), 1 at uniformity.

    `f_k = E/(K S)` times the tokens of the sequence whose unbiased top-K holds k, not differentiated; P_k the mean of
    the scores normalised over experts. Scores `[sequences S, E]`.
    """
    plain = np.zeros(shape.experts)
    chosen = select(scores.detach().numpy(), plain, shape.top_k, shape.groups, shape.limited).experts
    counts = torch.zeros(scores.shape, dtype=scores.dtype).scatter(1, torch.from_numpy(chosen), 1.0)
    share = counts.view(sequences, -1, shape.experts).mean(dim=1) * (shape.experts / shape.top_k)
    mean = (scores / scores.sum(dim=1, keepdim=True)).view(sequences, -1, shape.experts).mean(dim=1)
    return (share * mean).sum(dim=1).mean()


def importance_loss(scores: torch.Tensor) -> torch.Tensor:
    """Return `CV^2` of the experts' sums of scores `[T, E]`: variance over squared mean (Shazeer et al., 2017).

    The load loss of the same paper needs noisy gates, which this router does not have.
    """
    importance = scores.sum(dim=0)
    return len(importance) * (importance * importance).sum() / importance.sum() ** 2 - 1


def similarity_loss(router: torch.Tensor) -> torch.Tensor:
    """Return the sum of the absolute entries of `R'R - I`, R the router's weights `[d, E]` (SimBal, arXiv 2506.14038).

    It sees no load: tokens that are alike keep going to the same experts.
    """
    return (router.T @ router - torch.eye(router.shape[1], dtype=router.dtype)).abs().sum()
