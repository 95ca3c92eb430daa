"""A small character-level transformer, decoder only."""

from __future__ import annotations

import torch
from torch import nn

from fedsim.errors import InputError
from fedsim.problems.models.layers import Gelu


class Block(nn.Module):
    """Causal attention and two linear layers, each behind a layer norm and beside a skip."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixed, self.joined = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow, self.gelu = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), Gelu()

    def forward(self, x: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
        """Return `[m, places, width]`; `later [places, places]` is what a place must not see."""
        x = x + self.joined(self._attention(self.norm1(x), later))
        return x + self.narrow(self.gelu(self.wide(self.norm2(x))))

    def _attention(self, x: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
        m, places, width = x.shape
        query, key, value = self.mixed(x).view(m, places, 3, self._heads, -1).permute(2, 0, 3, 1, 4).unbind()
        scores = query @ key.transpose(2, 3) * (width // self._heads) ** -0.5
        weights = scores.masked_fill(later, -torch.inf).softmax(dim=3)
        return (weights @ value).transpose(1, 2).reshape(m, places, width)


class Transformer(nn.Module):
    """Learned embeddings of characters and places, blocks of attention, layer norm, linear to the characters.

    With 64 characters of 78 and the default sizes: 32,062 parameters. Initialised as torch does by default, but
    embeddings at standard deviation 0.1. No part of it needs more than exp, erf and matrix products, so all nodes'
    models are played at once.

    Args:
        features: characters read. outputs: characters known. width: of the embeddings. heads, layers: of attention.

    Raises:
        InputError: heads do not divide the width.
    """

    def __init__(self, features: int, outputs: int, width: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        if min(width, heads, layers) < 1 or width % heads:
            raise InputError(f"problem.arguments: {heads} heads do not divide a width of {width} ({layers} layers)")
        self.character, self.place = nn.Embedding(outputs, width), nn.Embedding(features, width)
        for table in (self.character, self.place):
            nn.init.normal_(table.weight, std=0.1)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores `[m, places, outputs]` of the character after each of `x [m, places]` (int64)."""
        place = torch.arange(x.shape[1], device=x.device)
        hidden = self.character(x) + self.place(place)
        for block in self.blocks:
            hidden = block(hidden, place[None, :] > place[:, None])
        return self.linear(self.norm(hidden))
