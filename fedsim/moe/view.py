"""Metrics of a replay, from the mean of all hosts' answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedsim.moe import theory
from fedsim.moe.oracle import dual_value
from fedsim.moe.part import SUMS

if TYPE_CHECKING:
    from fedsim.problems.router_scores import RouterScores


class View:
    """The mean of all hosts' answers, taken apart."""

    def __init__(self, mean: NDArray[np.float64], s: RouterScores) -> None:
        self.s, n, size = s, s.n, s.layers * s.experts
        whole = mean * n
        parts = np.split(whole, np.cumsum([n * size, size, len(SUMS) * s.layers]))
        self.bias = parts[0].reshape(n, s.layers, s.experts)
        self.first_bias = self.bias[0]
        self.loads = np.round(parts[1]).reshape(s.layers, s.experts)
        self.sums = dict(zip(SUMS, parts[2].reshape(len(SUMS), s.layers), strict=True))
        self.optimum = float(mean[-1])

    def metric(self, name: str, multiply: bool = False) -> float:
        """Return one metric by its name; `multiply`: scores times 1 + bias select."""
        s = self.s
        if name in self.sums and name not in ("dropped", "gate", "aux"):
            return float(self.sums[name].sum())
        if name in ("gate", "aux"):
            return float(self.sums[name].mean() / s.tokens)
        if name == "dropped":
            return float(self.sums[name].sum() / (s.tokens * s.top_k * s.layers))
        if name == "score_ratio":
            return float(self.sums["kept"].sum() / self.optimum)
        if name == "lagrangian":
            target = s.tokens * s.top_k / s.experts
            return float(self.sums["biased"].sum() - target * self.first_bias.sum())
        if name == "gap":
            pairs = zip(self.sums["biased"], self.first_bias, strict=True)
            return sum(dual_value(biased, p, s.tokens, s.top_k) for biased, p in pairs) - self.optimum
        if name == "maxvio_global":
            pairs = zip(s.held_out, self.first_bias, strict=True)
            loads = np.stack([s.select(scores, p, multiply).loads for scores, p in pairs])
            return theory.load_metrics(loads.astype(float), s.n)["maxvio"]
        if name == "bias_spread":
            return float(np.ptp(self.bias, axis=0).max())
        if name == "bias_range":
            return float(np.ptp(self.bias, axis=2).max())
        if name == "maxvio_floor":
            return theory.sampling_floor(s.tokens, s.experts, s.top_k)
        return theory.load_metrics(self.loads, s.n)[name]
