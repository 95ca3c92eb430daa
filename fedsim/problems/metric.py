"""A model's weights optimised for a metric that has no gradient: precision, recall, F1 or Jaccard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from fedsim.errors import InputError
from fedsim.problems import network
from fedsim.problems.black_box import BlackBox, Noise
from fedsim.problems.data.draws import generator
from fedsim.problems.data.table import Data

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class MetricParameters:
    """`f_i = 1 - metric` of a trained model with changed weights, on the records of client i.

    Half of every client's records train the model that all start from; the other half is its own.

    Attributes:
        metric: precision, recall, f1 or jaccard, the mean over classes that occur among labels or predictions.
        change: largest change of a weight; x = 0.5 changes nothing.
        hidden: widths of the model's tanh layers. iterations: of its training by L-BFGS. seed: of it (default 0).
        noise: standard deviation of every query.
    """

    needs_data: ClassVar[bool] = True
    metric: Literal["precision", "recall", "f1", "jaccard"] = "f1"
    change: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.2
    hidden: list[Count] = field(default_factory=lambda: [10])
    iterations: Count = 300
    noise: Noise = 0.0
    seed: int = 0

    def from_records(self, data: Data, parts: list[np.ndarray], seed: int) -> MetricOptimisation:
        """Return the problem for the clients' parts of the data."""
        return MetricOptimisation(self, data, parts)


class MetricOptimisation(BlackBox):
    """`f_i(x) = 1 - metric_i(w + change (2 x - 1))`, piecewise constant in x.

    Reference: arXiv 2308.04077, section 6.3, on tables that are at hand in place of Covertype.
    """

    kind = "metric_optimisation"

    def __init__(self, p: MetricParameters, data: Data, parts: list[np.ndarray]) -> None:
        if data.task == "regression":
            raise InputError(f"problem metric_optimisation: data {data.name!r} has numbers for labels, not classes")
        widths = (data.features.shape[1], *p.hidden, len(data.classes))
        super().__init__(len(parts), network.count(widths), p.noise)
        short = [node for node, part in enumerate(parts) if len(part) < 2]
        if short:
            raise InputError(f"problem metric_optimisation: node {short[0]} has fewer than two records")
        self._p, self._widths = p, widths
        labels = np.asarray(data.labels, dtype=np.int64)
        pool = np.concatenate([part[::2] for part in parts])
        rng = generator(p.seed, "model")
        self._weights = network.trained(widths, data.features[pool], labels[pool], rng, 1e-5, p.iterations)
        self._own = [
            (torch.from_numpy(np.ascontiguousarray(data.features[part[1::2]])), labels[part[1::2]]) for part in parts
        ]

    def evaluate(self, points: torch.Tensor, node: int) -> torch.Tensor:
        """Return `1 - metric` `[count]` on one client's records."""
        inputs, labels = self._own[node]
        return torch.tensor([1.0 - self._score(x, inputs, labels) for x in points], dtype=torch.float64)

    def _score(self, x: torch.Tensor, inputs: torch.Tensor, labels: np.ndarray) -> float:
        weights = self._weights + self._p.change * (2.0 * x - 1.0)
        with torch.no_grad():
            predicted = network.logits(weights, self._widths, inputs).argmax(dim=1).numpy()
        return score(self._p.metric, labels, predicted, self._widths[-1])

    def metrics(self) -> dict[str, Callable[[torch.Tensor], float]]:
        """Return the metric over all clients' records together."""
        inputs = torch.cat([a for a, _ in self._own])
        labels = np.concatenate([b for _, b in self._own])
        return {self._p.metric: lambda x: self._score(x[0].clamp(0.0, 1.0), inputs, labels)}

    def facts(self) -> dict[str, Any]:
        """Return the sizes of model and records."""
        return {"metric": self._p.metric, "weights": self.dim, "records": [len(b) for _, b in self._own]}


def score(metric: str, labels: np.ndarray, predicted: np.ndarray, classes: int) -> float:
    """Return the mean over classes that occur of precision, recall, F1 or Jaccard; 0 where one is 0/0."""
    table = np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)
    hit, true, said = np.diag(table).astype(float), table.sum(axis=1), table.sum(axis=0)
    below = {"precision": said, "recall": true, "f1": (true + said) / 2.0, "jaccard": true + said - hit}[metric]
    occurs = (true + said) > 0
    return float((hit[occurs] / np.maximum(below[occurs], 1e-300) * (below[occurs] > 0)).mean())
