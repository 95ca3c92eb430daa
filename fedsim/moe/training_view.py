"""Metrics of expert-parallel training, from the mean of all hosts' answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.moe import theory

if TYPE_CHECKING:
    from fedsim.algorithms.moe_training import MoETraining
    from fedsim.problems.byte_language import ByteLanguage


class TrainingView:
    """The whole model, all hosts' biases and loads, and sums over hosts, taken out of the mean `[numbers]`."""

    def __init__(self, mean: NDArray[np.float64], problem: ByteLanguage, rule: MoETraining) -> None:
        self.problem, self.rule = problem, rule
        n, shape = problem.n, problem.shape
        size = n * shape.layers * shape.experts
        model, bias, own, sent, loss = np.split(mean, np.cumsum([problem.dim, size, size, size]))
        self.model, self.train_loss = model, float(loss[0])
        self.bias = bias.reshape(n, shape.layers, shape.experts)
        self.first_bias = self.bias.mean(axis=0)
        self.loads = np.round(own.reshape(n, shape.layers, shape.experts)).sum(axis=0)
        self.sent = np.round(sent.reshape(n, shape.layers, shape.experts))

    def metric(self, name: str) -> float | None:
        """Return one metric by its name; None: it is of the last step, and there is none yet."""
        problem, rule = self.problem, self.rule
        if name in ("val_loss", "maxvio_global"):
            found = problem.evaluate(torch.from_numpy(self.model), self.first_bias, rule.bias_rule)
            if name == "val_loss":
                return found["loss"]
            return theory.load_metrics(found["loads"].astype(float), problem.n)["maxvio"]
        if name == "maxvio_floor":
            return theory.sampling_floor(rule.tokens, problem.shape.experts, problem.shape.top_k)
        if name == "bias_range":
            return float(np.ptp(self.bias, axis=2).max())
        if name == "bias_spread":
            return float(np.ptp(self.bias, axis=0).max())
        return self._of_the_last_step(name) if self.loads.any() else None

    def _of_the_last_step(self, name: str) -> float:
        problem, rule = self.problem, self.rule
        if name == "train_loss":
            return self.train_loss
        if name == "dropped":
            return float(1 - self.sent.sum() / self.loads.sum())
        if name == "bytes_per_route":
            return float(self._crossing().sum() * self._width / problem.shape.layers / rule.accumulation)
        if name == "modelled_seconds":
            return self._seconds()
        return theory.load_metrics(self.loads, problem.n)[name]

    @property
    def _width(self) -> int:
        return self.problem.shape.d * (4 if self.problem.p.dtype == "float32" else 8)

    def _between(self) -> NDArray[np.float64]:
        """Return rows from host to host `[layers, n, n]` of the last step, without what was dropped."""
        n, shape = self.problem.n, self.problem.shape
        return self.sent.reshape(n, shape.layers, n, -1).sum(axis=3).transpose(1, 0, 2)

    def _crossing(self) -> NDArray[np.float64]:
        rows = self._between()
        return rows * (1 - np.eye(self.problem.n))

    def _seconds(self) -> float:
        """Return `latency * messages + bytes of the busiest host * seconds_per_byte + flops * seconds_per_flop`.

        Every layer sends rows there and back, forward and backward; the host with most tokens sets the pace. Its
        micro-batches are taken as alike: which host is the busiest is asked of the whole step.
        """
        problem, rule, crossing = self.problem, self.rule, self._crossing()
        shape = problem.shape
        busiest = np.maximum(crossing.sum(axis=2).max(axis=1), crossing.sum(axis=1).max(axis=1)).sum()
        tokens = self._between().sum(axis=1).max(axis=1).sum()
        flops = 3 * 2 * 3 * shape.d * shape.expert * tokens
        messages = 5 * shape.layers * rule.accumulation * (problem.n - 1)
        return float(
            rule.latency * messages + 4 * busiest * self._width * rule.seconds_per_byte + flops * rule.seconds_per_flop
        )
