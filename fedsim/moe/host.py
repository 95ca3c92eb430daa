"""One expert host in one micro-batch: its tokens, its experts, and the cuts where tokens travel.

Autograd does not cross a request. Where tokens leave for other hosts, everything alive is cut: what is sent, the gates
and the residual become outputs of one piece, and new leaves of the next. Backward walks the pieces in reverse and gets
what was sent away back as gradients of what returned.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.moe import model
from fedsim.moe.losses import Losses
from fedsim.moe.model import Gating, Shape, Weights
from fedsim.moe.selection import kept


class Cut(NamedTuple):
    """One layer's cut on the tokens' host: outputs of the piece before, leaves of the piece after."""

    sent: torch.Tensor
    x: torch.Tensor
    gating: Gating
    x_leaf: torch.Tensor
    gates_leaf: torch.Tensor
    returned: torch.Tensor


class Away(NamedTuple):
    """One layer's piece on the experts' host: tokens received `[items, d]` and what the experts made of them."""

    received: torch.Tensor
    results: torch.Tensor


class Host:
    """Plays one host's part of forward and backward.

    `loads` and `sent`, int64 `[layers, E]`, count its selections and the slots that were not dropped of them.

    Args:
        weights, experts: leaves; gradients add up in them over micro-batches. experts: `[layers][E / n]`.
        bias: float64 `[layers, E]`. capacity: slots that an expert takes of this host's tokens; None: all.
    """

    def __init__(
        self,
        shape: Shape,
        weights: Weights,
        experts: list[list[Weights]],
        bias: NDArray[np.float64],
        rule: str,
        capacity: int | None,
        policy: str,
    ) -> None:
        self.shape, self.weights, self.experts, self.bias, self.rule = shape, weights, experts, bias, rule
        self._capacity, self._policy = capacity, policy
        self.loads = np.zeros((shape.layers, shape.experts), np.int64)
        self.sent = np.zeros_like(self.loads)

    def begin(self, text: torch.Tensor) -> None:
        """Take bytes `[B, S + 1]` through the dense block."""
        self._targets, self._cuts, self._away = text[:, 1:], [], []
        self.micro_loads = np.zeros_like(self.loads)
        self._x, _ = model.before_experts(self.shape, self.weights, 0, model.embed(self.weights, text[:, :-1]))

    def dispatch(self, layer: int) -> tuple[torch.Tensor, NDArray[np.int64]]:
        """Return the rows to send, ordered by expert, and how many each expert gets, int64 `[E]`."""
        x, h = model.before_experts(self.shape, self.weights, layer + 1, self._x)
        gating = model.gate(self.shape, self.weights, layer + 1, h, self.bias[layer], self.rule)
        self.micro_loads[layer] = gating.loads
        self.loads[layer] += gating.loads
        order, counts = self._order(gating)
        self.sent[layer] += counts
        self._pending = x, h[order // self.shape.top_k], gating, order
        return self._pending[1].detach(), counts

    def combine(self, returned: torch.Tensor) -> None:
        """Add what the experts sent back; the next piece begins here."""
        x, sent, gating, order = self._pending
        leaves = [t.detach().requires_grad_() for t in (x, gating.gates, returned)]
        self._cuts.append(Cut(sent, x, gating, *leaves))
        self._x = model.combined(leaves[0], leaves[1], order, leaves[2])

    def loss(self, share: float) -> float:
        """Go backward through the last piece; `share` is this micro-batch's weight. Returns the loss in nats."""
        value = model.cross_entropy(self.weights, self._x, self._targets)
        (value * share).backward()
        return float(value.detach())

    def returned_gradient(self, layer: int) -> torch.Tensor:
        """Return the gradient of what the experts sent back, to be sent to them."""
        return _gradient(self._cuts[layer].returned)

    def back(self, layer: int, sent: torch.Tensor, aux: torch.Tensor, losses: Losses, share: float) -> None:
        """Go backward through the piece that ends at a layer's cut.

        Args:
            sent: gradient of what was sent. aux: gradient of the mean scores `[E]`. losses: of this host's own tokens,
                with `share`, this micro-batch's weight.
        """
        cut = self._cuts[layer]
        outputs = [cut.sent, cut.x, cut.gating.gates]
        gradients = [sent, _gradient(cut.x_leaf), _gradient(cut.gates_leaf)]
        if bool(aux.any()):
            outputs, gradients = [*outputs, cut.gating.mean], [*gradients, aux.to(cut.gating.mean.dtype)]
        own = losses.of(self.shape, cut.gating, self.weights[f"{layer + 1}.router"], len(self._targets))
        if own is not None:
            outputs, gradients = [*outputs, own], [*gradients, torch.full_like(own, share)]
        torch.autograd.backward(outputs, gradients)

    def play_experts(self, layer: int, received: torch.Tensor, counts: NDArray[np.int64]) -> torch.Tensor:
        """Return what this host's experts make of the rows received, in their order.

        Args:
            received: `[items, d]`, by source, then expert. counts: `[n, E / n]`, rows of each source for each expert.
        """
        leaf = received.detach().clone().requires_grad_()
        own = np.tile(np.arange(counts.shape[1]), len(counts)).repeat(counts.ravel())
        order = torch.from_numpy(np.argsort(own, kind="stable"))
        parts = leaf[order].split(counts.sum(axis=0).tolist())
        made = [model.feed_forward(w, part) for w, part in zip(self.experts[layer], parts, strict=True)]
        results = torch.empty_like(leaf).index_copy(0, order, torch.cat(made))
        self._away.append(Away(leaf, results))
        return results.detach()

    def back_experts(self, layer: int, gradient: torch.Tensor) -> torch.Tensor:
        """Go backward through this host's experts; return the gradient of the rows received."""
        torch.autograd.backward([self._away[layer].results], [gradient])
        return _gradient(self._away[layer].received)

    def _order(self, gating: Gating) -> tuple[torch.Tensor, NDArray[np.int64]]:
        """Return the slots that travel, ordered by expert, and their number per expert."""
        flat = gating.experts.reshape(-1)
        order = torch.argsort(flat, stable=True)
        if self._capacity is None:
            return order, gating.loads
        fits = torch.from_numpy(
            kept(gating.experts.numpy(), _by_expert(gating, self.shape), self._capacity, self._policy)
        )
        order = order[fits.reshape(-1)[order]]
        return order, np.bincount(flat[order].numpy(), minlength=self.shape.experts)


def _by_expert(gating: Gating, shape: Shape) -> NDArray:
    """Return `[T, E]` with the gates of the experts chosen."""
    table = torch.zeros(len(gating.experts), shape.experts, dtype=gating.gates.dtype)
    return table.scatter(1, gating.experts, gating.gates.detach()).numpy()


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
