"""LeNet5 for grey or coloured images."""

from __future__ import annotations

import torch
from torch import nn

from fedsim.problems.models.images import shape


class LeNet5(nn.Module):
    """conv 6 (5 x 5), relu, maxpool 2, conv 16 (5 x 5), relu, maxpool 2, 120, 84, classes, relu between.

    For images of 28 x 28 with one colour and ten classes: 44,426 parameters, as in the experiments of DProxSGT
    (arXiv 2302.14252). Initialised as torch does by default.

    Args:
        features: pixels of an image. outputs: classes.

    Raises:
        InputError: the records are no square images of 16 x 16 pixels or more.
    """

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self._colours, self._side = shape(features, "lenet5", 16)
        left = ((self._side - 4) // 2 - 4) // 2
        self.conv1, self.conv2 = nn.Conv2d(self._colours, 6, 5), nn.Conv2d(6, 16, 5)
        self.linear1, self.linear2 = nn.Linear(16 * left * left, 120), nn.Linear(120, 84)
        self.linear3 = nn.Linear(84, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scores `[m, outputs]` of images `[m, pixels]`."""
        x = x.reshape(len(x), self._colours, self._side, self._side)
        x = nn.functional.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = nn.functional.max_pool2d(torch.relu(self.conv2(x)), 2)
        x = torch.relu(self.linear1(x.flatten(1)))
        return self.linear3(torch.relu(self.linear2(x)))
