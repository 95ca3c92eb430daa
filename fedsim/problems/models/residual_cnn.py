"""A small residual network for images without batch norm, so that averages of parameters are models too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fedsim.errors import InputError
from fedsim.problems.models.images import shape


class Block(nn.Module):
    """`relu(skip(x) + scale conv(relu(conv(x) + b1)) + b2)` with scalar biases and scale.

    The second convolution starts at 0, so a block starts as its skip (Fixup, Zhang, Dauphin & Ma, ICLR 2019). Where
    width or size change, the skip is a strided mean, padded with channels of 0.
    """

    def __init__(self, inner: int, outer: int, stride: int, depth: int) -> None:
        super().__init__()
        self._stride, self._more = stride, outer - inner
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.bias1, self.bias2 = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.scale = nn.Parameter(torch.ones(1))
        nn.init.normal_(self.conv1.weight, std=(2 / (9 * outer)) ** 0.5 * depth**-0.5)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[m, outer, side / stride, side / stride]`."""
        skip = x
        if self._stride > 1:
            skip = nn.functional.avg_pool2d(x, self._stride, ceil_mode=True)
        if self._more:
            skip = nn.functional.pad(skip, (0, 0, 0, 0, 0, self._more))
        hidden = self.conv2(torch.relu(self.conv1(x) + self.bias1))
        return torch.relu(skip + self.scale * hidden + self.bias2)


class ResidualCNN(nn.Module):
    """A 3 x 3 convolution, `depth` residual blocks per width (each width at half the size), mean, linear.

    With widths 16, 32, 64, depth 3 and coloured images of 32 x 32 it is close to FixupResNet20 in size (0.27 million
    parameters); the default is a small one. Every part but the linear layer starts at a variance that keeps the size
    of signals; the linear layer starts at 0.

    Args:
        features: pixels of an image. outputs: classes. widths: channels by stage. depth: blocks per stage.

    Raises:
        InputError: the records are no square images of 8 x 8 pixels or more, or a width shrinks.
    """

    def __init__(self, features: int, outputs: int, widths: Sequence[int] = (8, 16), depth: int = 1) -> None:
        super().__init__()
        if not widths or list(widths) != sorted(widths) or min(widths) < 1 or depth < 1:
            raise InputError(
                f"problem.arguments: widths {list(widths)} and depth {depth} given; widths that do not shrink, and a"
                " depth of at least 1, are needed"
            )
        self._colours, self._side = shape(features, "residual_cnn", 8)
        self.conv = nn.Conv2d(self._colours, widths[0], 3, padding=1)
        nn.init.normal_(self.conv.weight, std=(2 / (9 * self._colours)) ** 0.5)
        nn.init.zeros_(self.conv.bias)  # pyright: ignore[reportArgumentType]
        blocks, inner = [], widths[0]
        for stage, outer in enumerate(widths):
            for place in range(depth):
                stride = 2 if stage and not place else 1
                blocks.append(Block(inner, outer, stride, depth * len(widths)))
                inner = outer
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(inner, outputs)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scores `[m, outputs]` of images `[m, pixels]`."""
        x = torch.relu(self.conv(x.reshape(len(x), self._colours, self._side, self._side)))
        return self.linear(self.blocks(x).mean(dim=(2, 3)))
