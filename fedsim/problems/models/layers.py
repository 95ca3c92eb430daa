"""Activations built from functions whose bits do not depend on how many numbers share the call.

torch's own softplus and gelu treat the last few numbers of an array otherwise than the rest; with these, all nodes'
models are played at once.
"""

from __future__ import annotations

import math

import torch

from fedsim.problems.dense import softplus


class Softplus(torch.nn.Module):
    """`log(1 + exp(z))`."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Return the values, elementwise."""
        return softplus(z)


class Gelu(torch.nn.Module):
    """`z Phi(z)` with the normal distribution function Phi."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Return the values, elementwise."""
        return 0.5 * z * (1 + torch.erf(z * math.sqrt(0.5)))


ACTIVATIONS: dict[str, type[torch.nn.Module]] = {
    "tanh": torch.nn.Tanh,
    "softplus": Softplus,
    "relu": torch.nn.ReLU,
    "gelu": Gelu,
}
