"""Router scores as a problem: hosts hold tokens, and every token must choose K of E experts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from fedsim.errors import InputError, Unsupported
from fedsim.moe.selection import Selected, refuse_impossible, select
from fedsim.moe.streams import MOVING, ScoreFunc, Workload, offsets, recorded, to_scores
from fedsim.problems.parameters import Seed
from fedsim.problems.problem import Minibatch, Nodes, Problem

if TYPE_CHECKING:
    from fedsim.moe.theory import Curvature

Count = Annotated[int, Field(ge=1)]
SAMPLED = 2**23  # scores, at most, from which the best fixed bias is found
HELD_OUT = 2**15  # tokens that stand for the stream's law, in estimates


@dataclass(frozen=True)
class RouterScoresParameters:
    """Scores of tokens for experts, replayed under any balancing rule.

    Attributes:
        tokens: of one global batch (T); hosts hold equal parts of it. Default: 512, or what the file holds.
        moe_num_experts, moe_top_k: E (default: 8, or what the file holds) and K.
        layers: MoE layers, each with scores of its own. Default: 1, or what the file holds.
        workload: how the experts' mean logits differ (size: `skew`), over steps with `period`.
        fresh: a new batch in every step (i.i.d. but for the workload); else one batch, again and again.
        file: recorded scores instead (.npy, .npz, .parquet); steps are played in order, then again from the first. What
            workloads are made of (workload, skew, period, fresh, noise) has no say then.
        file_holds: scores, or logits that `score_func` is applied to.
        noise: of the logits: normal, or uniform on [-1, 1].
        shard: which tokens a host holds: in order; favourite (by their best expert, so that hosts differ); ragged (host
            h holds a share proportional to h + 1).
        num_expert_groups, num_limited_groups: group-limited routing.
        route_norm, route_scale: gates are divided by their sum over the K chosen (K > 1), then scaled.
        seed: of one batch that is played again and again (default: that of the file's data).
    """

    needs_data: ClassVar[bool] = False
    tokens: Count | None = None
    moe_num_experts: Count | None = None
    moe_top_k: Count = 2
    layers: Count | None = None
    workload: Workload = "skew"
    skew: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    period: Count = 100
    fresh: bool = False
    file: str | None = None
    file_holds: Literal["scores", "logits"] = "scores"
    score_func: ScoreFunc = "sigmoid"
    noise: Literal["normal", "uniform"] = "normal"
    shard: Literal["order", "favourite", "ragged"] = "order"
    num_expert_groups: Count = 1
    num_limited_groups: Annotated[int, Field(ge=1)] | None = None
    route_norm: bool = False
    route_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    seed: Seed | None = None

    def problem(self, n: int, seed: int, base: Path) -> RouterScores:
        """Return the problem for n hosts."""
        return RouterScores(self, n, seed if self.seed is None else self.seed, base)


class Batch:
    """One global batch: logits (None for recorded scores) and scores, `[layers, T, E]`, and each host's tokens."""

    def __init__(self, logits: NDArray | None, scores: NDArray, hosts: list[NDArray[np.int64] | slice]) -> None:
        self.logits, self.scores, self.hosts = logits, scores, hosts
        self.optimum: float | None = None


class RouterScores(Problem):
    """Tokens of n hosts with scores for E experts; "models" are biases, `dim = layers * E`."""

    kind = "router_scores"

    def __init__(self, p: RouterScoresParameters, n: int, seed: int, base: Path) -> None:
        self.p, self.n, self._seed, self._base = p, n, seed, base
        self._recorded = None if p.file is None else recorded(base / p.file)
        self.steps, self.layers, self.tokens, self.experts = self._sizes()
        self.top_k, self.groups = p.moe_top_k, p.num_expert_groups
        self.limited = self.groups if p.num_limited_groups is None else p.num_limited_groups
        refuse_impossible(self.experts, self.top_k, self.groups, self.limited)
        if self.tokens < n:
            raise InputError(f"problem.tokens: {self.tokens} given for {n} hosts; at least one for each is needed")
        self.dim = self.layers * self.experts
        self.records = np.array([len(part) for part in self._shares()], dtype=np.int64)
        if not self.records.all():
            raise InputError(
                f"problem.shard: {p.shard} leaves host {int(self.records.argmin())} of {n} none of {self.tokens} tokens"
            )
        self._last: tuple[Any, Batch] | None = None

    def _sizes(self) -> tuple[int, int, int, int]:
        """Return steps, layers, tokens and experts, the file's where there is one."""
        p = self.p
        given = {"layers": p.layers, "tokens": p.tokens, "moe_num_experts": p.moe_num_experts}
        if self._recorded is None:
            return 1, p.layers or 1, p.tokens or 512, p.moe_num_experts or 8
        for (name, value), found in zip(given.items(), self._recorded.shape[1:], strict=True):
            if value not in (None, found):
                raise InputError(
                    f"problem.{name}: {value} given, but {p.file} holds {found}: [steps, layers, tokens, experts] ="
                    f" {list(self._recorded.shape)}; leave {name} out to take the file's"
                )
        steps, layers, tokens, experts = self._recorded.shape
        return steps, layers, tokens, experts

    @property
    def stationary(self) -> bool:
        """Whether every step has the same batch."""
        return self.steps == 1 if self._recorded is not None else not (self.moving or self.p.fresh)

    @property
    def iid(self) -> bool:
        """Whether batches are drawn anew from one law."""
        return self._recorded is None and self.p.fresh and not self.moving

    @property
    def limited_groups(self) -> bool:
        """Whether group limits restrict the selection, so that biases' dual bound is none."""
        return self.groups > self.limited

    @property
    def moving(self) -> bool:
        """Whether the law of the scores changes from step to step."""
        return self._recorded is None and self.p.workload in MOVING

    def batch(self, step: int, fresh: np.random.Generator) -> Batch:
        """Return the global batch of a step; `fresh` draws what is new in it. The last one is kept."""
        drawn = self._recorded is None and self.p.fresh
        key = tuple(fresh.bit_generator.state["state"]["key"]) if drawn else 0 if self.stationary else step
        if self._last is None or self._last[0] != key:
            self._last = key, self._made(step, fresh if drawn else None)
        return self._last[1]

    def select(self, scores: NDArray, bias: NDArray, multiply: bool = False) -> Selected:
        """Return the selection of tokens `[T, E]` under a bias `[E]`, within the group limits."""
        return select(scores, bias, self.top_k, self.groups, self.limited, multiply)

    def optimum_of(self, batch: Batch) -> float:
        """Return the largest total score of a batch under balanced loads, summed over layers, with its proof done."""
        from fedsim.moe.oracle import exact_assignment

        if batch.optimum is None:
            batch.optimum = sum(exact_assignment(s, self.top_k).value for s in batch.scores)
        return batch.optimum

    def sample(self, tokens: int) -> NDArray:
        """Return scores `[layers, T, E]` of about so many tokens of the stream's law.

        Of a recording, and of one batch that is played again and again, they are tokens that are played; where batches
        are drawn anew they are others. Where the law changes they are spread over a period.
        """
        from fedsim.problems.data.draws import generator

        parts = -(-tokens // self.tokens)
        if self.steps > 1:
            places = np.unique(np.linspace(0, self.steps - 1, parts).round().astype(int))
            return np.concatenate([self._made(int(step), None).scores for step in places], axis=1)
        if self.stationary:
            return self.batch(0, generator(self._seed, "router scores")).scores
        if self.moving:
            parts = max(parts, min(self.p.period, 32)) if self.p.fresh else min(parts, self.p.period)
        drawn = []
        for k in range(parts):
            fresh = generator(self._seed, "router sample", k) if self.p.fresh else None
            logits = self._drawn(k * self.p.period // parts, fresh)[:, : -(-tokens // parts)]
            drawn.append(to_scores(logits, self.p.score_func))
        return np.concatenate(drawn, axis=1)

    @cached_property
    def held_out(self) -> NDArray:
        """Scores `[layers, T, E]` that stand for the stream's law."""
        return self.sample(min(HELD_OUT, max(1, SAMPLED // self.dim)))

    @cached_property
    def best_fixed(self) -> NDArray[np.float64]:
        """The bias `[layers, E]` that balances a large sample of the stream; of a recording, the whole of it."""
        from fedsim.moe.theory import best_fixed

        tokens = self.steps * self.tokens if self.steps > 1 else max(1, SAMPLED // self.dim)
        return np.stack([best_fixed(part, self.top_k) for part in self.sample(tokens)])

    @cached_property
    def bends(self) -> list[tuple[NDArray[np.float64], Curvature]]:
        """Optimal prices `[E]` and curvature of the dual there, of every layer of a recording, else of one layer.

        Empty where tokens are too few for densities, or all tie.
        """
        from fedsim.moe.oracle import exact_assignment
        from fedsim.moe.theory import curvature

        layers = self.held_out if self._recorded is not None else self.held_out[:1]
        if self.top_k == self.experts or layers.shape[1] < 40 * self.experts:
            return []
        prices = [exact_assignment(part, self.top_k).prices for part in layers]
        found = [(p, curvature(part, p, self.top_k)) for p, part in zip(prices, layers, strict=True)]
        return [] if any(bend.largest == 0 for _, bend in found) else found

    def gradient(self, x: torch.Tensor, nodes: Nodes, batch: Minibatch | None = None) -> torch.Tensor:
        """Refuse: biases follow loads, not gradients."""
        raise Unsupported("problem 'router_scores' has no gradients; algorithm router_replay plays it")

    def loss(self, x: torch.Tensor, nodes: Nodes) -> torch.Tensor:
        """Refuse: its metrics are those of router_replay."""
        raise Unsupported("problem 'router_scores' has no loss; algorithm router_replay records maxvio and gap")

    def facts(self) -> dict[str, Any]:
        """Return sizes, source (with the hash of a file) and the sampling floor."""
        from fedsim.moe.theory import sampling_floor

        floor = sampling_floor(self.tokens, self.experts, self.top_k)
        names = {"tokens": self.tokens, "experts": self.experts, "top_k": self.top_k, "layers": self.layers}
        source: dict[str, Any] = {"source": self.p.file or self.p.workload}
        if self.p.file is not None:
            source["sha256"] = hashlib.sha256((self._base / self.p.file).read_bytes()).hexdigest()
        return {**names, **source, "maxvio_floor": floor}

    def _made(self, step: int, fresh: np.random.Generator | None) -> Batch:
        if self._recorded is not None:
            raw = self._recorded[step % self.steps]
            logits = raw if self.p.file_holds == "logits" else None
            scores = raw if logits is None else to_scores(logits, self.p.score_func)
        else:
            logits = self._drawn(step, fresh)
            scores = to_scores(logits, self.p.score_func)
        return Batch(logits, scores, self._hosts(scores))

    def _drawn(self, step: int, rng: np.random.Generator | None) -> NDArray[np.float64]:
        rng = np.random.default_rng(self._seed) if rng is None else rng
        shape = (self.layers, self.tokens, self.experts)
        noise = rng.standard_normal(shape) if self.p.noise == "normal" else rng.uniform(-1, 1, shape)
        return noise + offsets(self.p.workload, self.p.skew, self.experts, self.n, step, self.p.period)

    def _shares(self) -> list[NDArray[np.int64]]:
        weights = np.arange(1, self.n + 1) if self.p.shard == "ragged" else np.ones(self.n)
        ends = np.round(np.cumsum(weights) / weights.sum() * self.tokens).astype(np.int64)
        return np.split(np.arange(self.tokens), ends[:-1])

    def _hosts(self, scores: NDArray) -> list[NDArray[np.int64] | slice]:
        """Return the tokens of each host; the first layer's favourites decide where `shard` is favourite."""
        shares = self._shares()
        if self.p.shard != "favourite":
            return [slice(int(part[0]), int(part[-1]) + 1) if len(part) else part for part in shares]
        order = np.argsort(scores[0].argmax(axis=1), kind="stable")
        return [np.sort(order[part]) for part in shares]
