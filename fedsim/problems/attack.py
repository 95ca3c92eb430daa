"""A federated black-box attack: one small change of an image that misleads the mean of many clients' classifiers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field

from fedsim.errors import InputError
from fedsim.problems import network
from fedsim.problems.black_box import BlackBox, Noise
from fedsim.problems.data.draws import generator
from fedsim.problems.data.table import Data

Count = Annotated[int, Field(ge=1)]
Some = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class AttackParameters:
    """Black-box attack on an image: `f_i` is the margin of client i's classifier, least where it errs.

    The clients' classifiers are trained, when the problem is built, on the records that `partition` gives each.

    Attributes:
        epsilon: largest change of a pixel, as a part of the range of pixels.
        image: which of the images that the mean of the clients classifies rightly, from 0; null: as the seed says, so
            that `data_seed: each` attacks another one with every seed.
        hidden: widths of the classifiers' tanh layers. seed: of their training (default 0).
        noise: standard deviation of every query.
    """

    needs_data: ClassVar[bool] = True
    epsilon: Annotated[float, Field(gt=0, le=1)] = 0.3
    image: Some | None = None
    hidden: list[Count] = field(default_factory=lambda: [32])
    noise: Noise = 0.0
    seed: int = 0

    def from_records(self, data: Data, parts: list[np.ndarray], seed: int) -> Attack:
        """Return the problem for the clients' parts of the data."""
        return Attack(self, data, parts, seed if self.image is None else self.image)


class Attack(BlackBox):
    """`f_i(x) = z_true - max_{c != true} z_c` of client i's classifier at `clip(image + epsilon (2 x - 1))`.

    x = 0.5 is the image itself. The attack succeeds where the mean of the margins is below 0.

    Reference: arXiv 2308.04077, section 6.2. Differences: small networks on the images of a package; the paper's start
    is the lower end of the box (its 0), here the clean image; success is by mean margin, as in the authors' code.
    """

    kind = "attack"

    def __init__(self, p: AttackParameters, data: Data, parts: list[np.ndarray], image: int) -> None:
        super().__init__(len(parts), data.features.shape[1], p.noise)
        if data.task == "regression":
            raise InputError(f"problem attack: data {data.name!r} has numbers for labels; images of classes are needed")
        self._p, self._widths = p, (self.dim, *p.hidden, len(data.classes))
        self._low, self._high = float(data.features.min()), float(data.features.max())
        pixels = (data.features - self._low) / (self._high - self._low)
        labels = np.asarray(data.labels, dtype=np.int64)
        self._models = [self._classifier(node, pixels[part], labels[part]) for node, part in enumerate(parts)]
        self._classes = [sorted({data.classes[c] for c in labels[part]}) for part in parts]
        self._image, self._true = self._choose(pixels, labels, image)

    def _classifier(self, node: int, pixels: np.ndarray, labels: np.ndarray) -> torch.Tensor:
        rng = generator(self._p.seed, "classifier", node)
        return network.trained(self._widths, pixels, labels, rng, 1e-4, 60)

    def _choose(self, pixels: np.ndarray, labels: np.ndarray, image: int) -> tuple[torch.Tensor, int]:
        inputs, true = torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(labels)
        margins = torch.stack([_margins(network.logits(m, self._widths, inputs), true) for m in self._models])
        right = np.flatnonzero(margins.mean(dim=0).numpy() > 0)
        if not len(right):
            raise InputError(
                "problem attack: the clients' mean classifies no image rightly; give them more classes each"
            )
        self._record = int(generator(0, "attacked images").permutation(right)[image % len(right)])
        return inputs[self._record], int(labels[self._record])

    def evaluate(self, points: torch.Tensor, node: int) -> torch.Tensor:
        """Return the margins `[count]` of one classifier."""
        changed = (self._image + self._p.epsilon * (2.0 * points - 1.0)).clamp(0.0, 1.0)
        outputs = network.logits(self._models[node], self._widths, changed)
        return _margins(outputs, torch.full((len(points),), self._true))

    def metrics(self) -> dict[str, Callable[[torch.Tensor], float]]:
        """Return `success`: 1 where the mean margin is below 0."""
        return {"success": self._success}

    def _success(self, x: torch.Tensor) -> float:
        nodes = np.arange(self.n)
        return float(float(self.loss(x, nodes).mean()) < 0.0)

    def facts(self) -> dict[str, Any]:
        """Return which image is attacked, and which classes each client knows."""
        return {"record": self._record, "true_class": self._true, "classes": self._classes}


def _margins(outputs: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    own = outputs.gather(1, true[:, None])[:, 0]
    others = outputs.scatter(1, true[:, None], float("-inf"))
    return own - others.amax(dim=1)
