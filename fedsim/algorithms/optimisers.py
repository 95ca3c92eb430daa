"""Local optimisers as pure functions over `[rows, dim]`, and the scenario's way to choose one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class Moments:
    """What Adam remembers: means of gradients and of their squares `[rows, dim]`, and the number of steps."""

    first: torch.Tensor
    second: torch.Tensor
    steps: int = 0


def sgd(x: torch.Tensor, g: torch.Tensor, step: float) -> torch.Tensor:
    """Return `x - step g`."""
    return x - step * g


def adam(
    x: torch.Tensor, g: torch.Tensor, m: Moments, step: float, beta1: float, beta2: float, epsilon: float
) -> tuple[torch.Tensor, Moments]:
    """Return the point after one step of Adam (Kingma & Ba, 2015, Algorithm 1) and its new moments."""
    t = m.steps + 1
    first = beta1 * m.first + (1.0 - beta1) * g
    second = beta2 * m.second + (1.0 - beta2) * g * g
    size = (second / (1.0 - beta2**t)).sqrt() + epsilon
    return x - step * (first / (1.0 - beta1**t)) / size, Moments(first, second, t)


@dataclass(frozen=True)
class SGD:
    """`x <- x - step g`."""

    kind: Literal["sgd"]
    step: Positive

    def start(self, x: torch.Tensor) -> Moments:
        """Return nothing to remember."""
        return Moments(x.new_zeros(0), x.new_zeros(0))

    def __call__(self, x: torch.Tensor, g: torch.Tensor, m: Moments) -> tuple[torch.Tensor, Moments]:
        """Return the next point."""
        return sgd(x, g, self.step), m


@dataclass(frozen=True)
class Adam:
    """Adam with bias correction."""

    kind: Literal["adam"]
    step: Positive = 0.01
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    epsilon: Positive = 1e-8

    def start(self, x: torch.Tensor) -> Moments:
        """Return moments of 0."""
        return Moments(torch.zeros_like(x), torch.zeros_like(x))

    def __call__(self, x: torch.Tensor, g: torch.Tensor, m: Moments) -> tuple[torch.Tensor, Moments]:
        """Return the next point and its moments."""
        return adam(x, g, m, self.step, self.beta1, self.beta2, self.epsilon)


Optimiser = Annotated[SGD | Adam, Field(discriminator="kind")]
