"""A small decoder-only transformer over bytes whose later feed-forward layers are mixtures of experts.

Everything is a function of named tensors; sizes follow from `Shape`. Block 0 is dense. Logistic functions are built
from tanh. One host's tokens are one call, so that no result depends on which hosts share a process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.moe.selection import select

VOCABULARY = 256
Weights = dict[str, torch.Tensor]
Sizes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Shape:
    """Sizes of the model: d width, layers of experts after one dense block, E experts of width `expert`, K chosen."""

    sequence: int
    d: int
    heads: int
    layers: int
    dense: int
    expert: int
    experts: int
    top_k: int
    shared: int = 0
    groups: int = 1
    limited: int = 1
    score_func: str = "sigmoid"
    route_norm: bool = True
    route_scale: float = 1.0

    def common(self) -> Sizes:
        """Return the weights that every host has: embeddings, attention, dense and shared experts, routers."""
        d = self.d
        sizes: Sizes = {"embedding": (VOCABULARY, d), "position": (self.sequence, d), "norm": (d,)}
        for block in range(self.layers + 1):
            sizes |= {
                f"{block}.norm1": (d,),
                f"{block}.norm2": (d,),
                f"{block}.qkv": (d, 3 * d),
                f"{block}.out": (d, d),
            }
            width = self.dense if block == 0 else self.shared * self.expert
            if width:
                sizes |= {f"{block}.up": (d, 2 * width), f"{block}.down": (width, d)}
            if block:
                sizes[f"{block}.router"] = (d, self.experts)
        return sizes | {"head": (d, VOCABULARY)}

    def one_expert(self) -> Sizes:
        """Return the weights of one expert of one layer."""
        return {"up": (self.d, 2 * self.expert), "down": (self.expert, self.d)}


class Gating(NamedTuple):
    """Where T tokens go.

    Attributes:
        experts: int64 `[T, K]`. gates: `[T, K]`, differentiable. loads: int64 `[E]`, selections before any dropping.
        mean: `[E]`, mean of the scores normalised over experts; z: mean squared log-sum-exp of the logits.
        scores: `[T, E]`, unbiased.
    """

    experts: torch.Tensor
    gates: torch.Tensor
    loads: NDArray[np.int64]
    mean: torch.Tensor
    z: torch.Tensor
    scores: torch.Tensor


def count(sizes: Sizes) -> int:
    """Return how many numbers the weights are."""
    return sum(math.prod(size) for size in sizes.values())


def named(vector: torch.Tensor, sizes: Sizes) -> Weights:
    """Return views of a flat vector by name."""
    ends = np.cumsum([0, *(math.prod(size) for size in sizes.values())])
    return {n: vector[a:b].view(s) for (n, s), (a, b) in zip(sizes.items(), pairwise(ends), strict=True)}


def initial(sizes: Sizes, generator: np.random.Generator) -> NDArray[np.float64]:
    """Return a flat start: matrices N(0, 1/inputs), embeddings N(0, 0.02^2), norms 1."""
    parts = []
    for name, size in sizes.items():
        scale = 0.02 if name in ("embedding", "position") else size[0] ** -0.5
        parts.append(generator.standard_normal(math.prod(size)) * scale if len(size) > 1 else np.ones(size))
    return np.concatenate(parts)


def decayed(sizes: Sizes) -> torch.Tensor:
    """Return 1 where weight decay acts (matrices), 0 where not (norms, embeddings)."""
    keep = {n: float(len(s) > 1 and n not in ("embedding", "position")) for n, s in sizes.items()}
    return torch.cat([torch.full((math.prod(s),), keep[n]) for n, s in sizes.items()])


def embed(w: Weights, tokens: torch.Tensor) -> torch.Tensor:
    """Return `[B, S, d]` for bytes `[B, S]`."""
    return w["embedding"][tokens] + w["position"][: tokens.shape[1]]


def attend(shape: Shape, w: Weights, block: int, x: torch.Tensor) -> torch.Tensor:
    """Return x plus causal attention on its norm."""
    batch, length, d = x.shape
    h = normalised(x, w[f"{block}.norm1"]) @ w[f"{block}.qkv"]
    q, k, v = h.view(batch, length, 3, shape.heads, d // shape.heads).permute(2, 0, 3, 1, 4)
    weights = q @ k.transpose(-1, -2) / math.sqrt(d // shape.heads)
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)
    mixed = weights.masked_fill(mask, -torch.inf).softmax(dim=-1) @ v
    return x + mixed.transpose(1, 2).reshape(batch, length, d) @ w[f"{block}.out"]


def feed_forward(w: Weights, h: torch.Tensor, prefix: str = "") -> torch.Tensor:
    """Return a gated linear unit, `silu(h U1) * (h U2)` times D; rows are tokens, none is fine."""
    gate, up = (h @ w[f"{prefix}up"]).chunk(2, dim=-1)
    return (gate * logistic(gate) * up) @ w[f"{prefix}down"]


def before_experts(shape: Shape, w: Weights, block: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the residual (dense or shared experts added) `[B, S, d]` and the tokens `[B S, d]` that experts see."""
    x = attend(shape, w, block, x)
    h = normalised(x, w[f"{block}.norm2"])
    if f"{block}.up" in w:
        x = x + feed_forward(w, h, f"{block}.")
    return x, h.reshape(-1, shape.d)


def gate(shape: Shape, w: Weights, block: int, h: torch.Tensor, bias: NDArray[np.float64], rule: str) -> Gating:
    """Return the selection by biased scores and the gates by unbiased ones, `[T, d]` in."""
    logits = h @ w[f"{block}.router"]
    scores = scores_of(logits, shape.score_func)
    chosen = select(scores.detach().numpy(), bias, shape.top_k, shape.groups, shape.limited, rule == "mult")
    experts = torch.from_numpy(chosen.experts)
    gates = scores.gather(1, experts)
    if shape.route_norm and shape.top_k > 1:
        gates = gates / gates.sum(dim=1, keepdim=True)
    mean = (scores / scores.sum(dim=1, keepdim=True)).mean(dim=0)
    z = logits.logsumexp(dim=1).square().mean()
    return Gating(experts, gates * shape.route_scale, chosen.loads, mean, z, scores)


def scores_of(logits: torch.Tensor, score_func: str) -> torch.Tensor:
    """Return sigmoid, softmax or sqrt(softplus) of `[T, E]`."""
    if score_func == "softmax":
        return logits.softmax(dim=1)
    if score_func == "sigmoid":
        return logistic(logits)
    return (logits.clamp(min=0) + torch.log1p(torch.exp(-logits.abs()))).sqrt()


def cross_entropy(w: Weights, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean over bytes in nats."""
    logits = normalised(x, w["norm"]) @ w["head"]
    return (logits.logsumexp(dim=-1) - logits.gather(-1, targets[..., None])[..., 0]).mean()


def combined(x: torch.Tensor, gates: torch.Tensor, order: torch.Tensor, returned: torch.Tensor) -> torch.Tensor:
    """Return x plus, for every token, its gates times what experts returned; slots that were dropped add nothing.

    Args:
        x: `[B, S, d]`. gates: `[T, K]`. order: int64, the slot (token K + place) of each returned row `[items, d]`.
    """
    slots = returned.new_zeros(gates.numel(), x.shape[-1]).index_copy(0, order, returned)
    return x + (slots.view(*gates.shape, -1) * gates[..., None]).sum(dim=1).view(x.shape)


def dense_loss(
    shape: Shape,
    w: Weights,
    experts: list[list[Weights]],
    bias: NDArray[np.float64],
    text: torch.Tensor,
    rule: str = "",
) -> tuple[torch.Tensor, NDArray[np.int64]]:
    """Return the loss of all experts in one place, and the loads `[layers, E]`; text `[B, S + 1]`."""
    x, loads = embed(w, text[:, :-1]), []
    x, _ = before_experts(shape, w, 0, x)
    for layer in range(shape.layers):
        x, h = before_experts(shape, w, layer + 1, x)
        g = gate(shape, w, layer + 1, h, bias[layer], rule)
        order = torch.argsort(g.experts.reshape(-1), stable=True)
        parts = h[order // shape.top_k].split(g.loads.tolist())
        back = torch.cat([feed_forward(own, part) for own, part in zip(experts[layer], parts, strict=True)])
        x = combined(x, g.gates, order, back)
        loads.append(g.loads)
    return cross_entropy(w, x, text[:, 1:]), np.stack(loads)


def normalised(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x over its root mean square, times the weight."""
    return x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt() * weight


def logistic(x: torch.Tensor) -> torch.Tensor:
    """Return the sigmoid, from tanh."""
    return 0.5 * (1 + torch.tanh(0.5 * x))
