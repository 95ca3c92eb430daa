"""Expert-parallel training: experts spread over hosts, tokens sent to them and back, biases following the loads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from fedsim.algorithms.algorithm import Constant, Draws, Oracle, Provenance, Setting, SyncAlgorithm
from fedsim.algorithms.requests import Mean, Route, Rows, Shared, Sum
from fedsim.errors import InputError
from fedsim.moe import model, rules, theory
from fedsim.moe.host import Host
from fedsim.moe.losses import Losses
from fedsim.moe.rules import Balancing
from fedsim.moe.training_view import TrainingView
from fedsim.problems.byte_language import ByteLanguage

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Moment = Annotated[float, Field(ge=0, lt=1)]


@dataclass
class TrainingState:
    """Weights with their moments, and every host's own copy of the biases.

    Attributes:
        weights, m, v: `[1, common]`, equal on all hosts. experts, m_experts, v_experts: `[rows, per_host]`.
        bias, velocity: float64 `[rows, layers, E]`.
        own, sent: int64 `[rows, layers, E]`, selections of the step before, and those that were not dropped.
        known: int64 `[rows, delay + 1, layers, E]`, the loads that the rule goes by, newest first.
        loss: float64 `[rows, 1]`, of the text that the host trained on in the step before.
    """

    weights: Shared
    m: Shared
    v: Shared
    experts: Rows
    m_experts: Rows
    v_experts: Rows
    bias: Rows
    velocity: Rows
    own: Rows
    sent: Rows
    known: Rows
    loss: Rows


@dataclass(frozen=True)
class MoETraining(Balancing, SyncAlgorithm):
    """Train a mixture of experts with one AdamW step per round; every host holds E/n experts of each layer.

    Per micro-batch and layer, hosts select experts for their tokens by biased scores, tell each other how many rows
    come, send rows to the experts' hosts, and get the results back (three `Route`s); backward sends gradients along the
    same ways (two). Gates are unbiased scores. Gradients of common weights are a `Mean` over hosts, the clipping norm
    and the loads (int64, one message for all layers) are a `Sum`. Once per step, after its last micro-batch, the biases
    follow the loads of that step, counted before any dropping; the next step is routed with them.

    Records `val_loss` (nats per byte of text held out, biases frozen) and `maxvio_global` (on that text); of the last
    step, and therefore not before the first: `train_loss`, `maxvio` and others of its loads, `bytes_per_route` (rows of
    one all-to-all, without those that stay or were dropped), and `modelled_seconds`: latency per message, bytes of the
    busiest host, arithmetic of the host with most tokens.

    Attributes:
        sequences: per host and micro-batch. accumulation: micro-batches per step.
        learning_rate, warmup, beta1, beta2, epsilon, weight_decay: of AdamW; the rate rises for `warmup` steps.
        learning_rate_end: the rate falls to it by a cosine until the schedule's last step; default: it stays.
        clip: largest norm of the whole gradient.
        aux_loss_coeff, aux_loss_scope: alpha E sum f_k P_k with f of the host's micro-batch, or of all hosts' in the
            step's micro-batches so far (global_batch); selections are those made, bias included. Of every sequence by
            itself (sequence), f counts unbiased selections, as DeepSeek-V3 has it beside the bias.
        z_loss_coeff: mean squared logsumexp. importance_loss_coeff: squared coefficient of variation of the experts'
            sums of scores in a micro-batch. simbal_coeff: sum of |R'R - I| over the router's weights R.
        capacity_factor, drop_policy: an expert takes ceil(cf K T / E) slots of each host's T tokens of a micro-batch,
            those with the largest gates (probs) or the first come (position); None: all.
        latency, seconds_per_byte, seconds_per_flop: of the step-time model.

    Reference: Wang, Gao, Zhao, Sun & Dai, *Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts*, arXiv
    2408.15664, Algorithm 1; auxiliary loss: Fedus, Zoph & Shazeer, *Switch Transformers*, JMLR 2022.

    Differences from the papers: sizes (a model that trains in minutes); error unit and centring are options.
    """

    kind: ClassVar[str] = "moe_training"
    paper: ClassVar[str] = "Wang et al., arXiv 2408.15664, Algorithm 1"
    provenance: ClassVar[Provenance] = "paper"

    sequences: Count = 8
    accumulation: Count = 1
    learning_rate: Positive = 2e-3
    learning_rate_end: Weight | None = None
    warmup: Annotated[int, Field(ge=0)] = 20
    beta1: Moment = 0.9
    beta2: Moment = 0.95
    epsilon: Positive = 1e-8
    weight_decay: Weight = 0.1
    clip: Positive | None = 1.0
    aux_loss_coeff: Weight = 0.0
    aux_loss_scope: Literal["micro_batch", "sequence", "global_batch"] = "micro_batch"
    z_loss_coeff: Weight = 0.0
    importance_loss_coeff: Weight = 0.0
    simbal_coeff: Weight = 0.0
    capacity_factor: Positive | None = None
    drop_policy: Literal["probs", "position"] = "probs"
    latency: Weight = 1e-5
    seconds_per_byte: Weight = 1e-9
    seconds_per_flop: Weight = 1e-10
    _problem: Any = field(default=None, init=False, repr=False)
    _steps: int = field(default=0, init=False, repr=False)

    def resolve(self, setting: Setting) -> MoETraining:
        """Refuse other problems, and rules that need the whole batch in one place."""
        problem = getattr(setting, "problem", None)
        if not isinstance(problem, ByteLanguage):
            raise InputError(f"moe_training plays problem 'byte_language', not {getattr(problem, 'kind', '?')!r}")
        if self.bias_rule not in ("none", *rules.BY_LOADS):
            raise InputError(
                f"algorithm.bias_rule: {self.bias_rule} given, but training knows none, {', '.join(rules.BY_LOADS)};"
                " an auxiliary loss is aux_loss_coeff with bias_rule none; router_replay plays the others"
            )
        rules.refuse_senseless(self)
        end = self.learning_rate_end
        if end is not None and (end > self.learning_rate or setting.rounds <= self.warmup):
            raise InputError(
                f"algorithm.learning_rate_end: {end:g} given; it must not be above learning_rate"
                f" ({self.learning_rate:g}), and the schedule ({setting.rounds} steps) must outlast warmup"
                f" ({self.warmup})"
            )
        return self.derived(_problem=problem, _steps=setting.rounds)

    def notes(self, setting: Setting) -> tuple[str, ...]:
        """Return what is known to go wrong with these keys."""
        return rules.notes(self, self._problem.p.score_func)

    def constants(self, setting: Setting) -> tuple[Constant, ...]:
        """Return the target load, the sampling floor, and what an all-to-all carries when balanced."""
        p = self._problem
        s, tokens = p.shape, self.tokens
        width = s.d * (4 if p.p.dtype == "float32" else 8)
        crossing = tokens / self.accumulation * s.top_k * width * (1 - 1 / p.n)
        return (
            Constant("parameters", p.dim, "common weights and all experts"),
            Constant("L", tokens * s.top_k / s.experts, "K T / E, tokens per expert and step"),
            Constant("maxvio_floor", theory.sampling_floor(tokens, s.experts, s.top_k), "of a batch, i.i.d. tokens"),
            Constant("bytes_per_route", crossing, "T K d width (1 - 1/n), one all-to-all of balanced rows"),
        )

    @property
    def tokens(self) -> int:
        """Bytes that all hosts train on in one step."""
        return self._problem.n * self.sequences * self.accumulation * self._problem.p.sequence

    async def start(self, x0: torch.Tensor, f: Oracle, rng: Draws) -> TrainingState:
        """Start from the problem's initial weights, biases at 0; the scenario's start is not used."""
        p: ByteLanguage = self._problem
        rows, s = len(f.nodes), p.shape
        weights, experts = p.initial[None, : p.common].clone(), p.initial[p.common :].view(p.n, -1)[f.nodes].clone()
        bias = torch.zeros(rows, s.layers, s.experts, dtype=torch.float64)
        counts = torch.zeros(rows, self.bias_delay + 1, s.layers, s.experts, dtype=torch.int64)
        zero, none = torch.zeros_like(weights), torch.zeros_like(experts)
        loss, own = torch.zeros(rows, 1, dtype=torch.float64), counts[:, 0]
        return TrainingState(weights, zero, zero, experts, none, none, bias, bias, own, own, counts, loss)

    async def round(self, s: TrainingState, k: int, f: Oracle, rng: Draws) -> TrainingState:
        """Train one step."""
        p: ByteLanguage = self._problem
        places = rng.integers("sequences", self.sequences * self.accumulation, p.records[f.nodes])
        hosts = [self._host(s, row) for row in range(len(f.nodes))]
        losses = np.zeros(len(hosts))
        for micro in range(self.accumulation):
            part = slice(micro * self.sequences, (micro + 1) * self.sequences)
            for host, node, own in zip(hosts, f.nodes, places, strict=True):
                host.begin(p.sequences(int(node), own[part]))
            losses += await self._micro_batch(hosts, f)
        f.charge(gradients=len(hosts) * self.accumulation, samples=places.numel())
        common = await Mean(torch.stack([_flat([list(host.weights.values())]) for host in hosts]))
        experts = torch.stack([_flat([list(e.values()) for layer in host.experts for e in layer]) for host in hosts])
        experts = experts / p.n
        scale = await self._clipping(common, experts)
        weights = self._adamw(s.weights, s.m, s.v, common * scale, k, p.shape.common(), 1)
        own_experts = self._adamw(s.experts, s.m_experts, s.v_experts, experts * scale, k, p.shape.one_expert(), None)
        own = torch.from_numpy(np.stack([host.loads for host in hosts]))
        loads = (await Sum(own.flatten(1))).reshape(1, *own.shape[1:])
        newest = own if self.bias_sync == "local" else loads.expand_as(own)
        known = torch.cat([newest[:, None], s.known[:, :-1]], dim=1)
        due = known[:, -1] if k >= self.bias_delay else torch.ones_like(own)  # nothing is known yet: no error
        bias, velocity = rules.updated(self, s.bias, s.velocity, due, p.shape.top_k, k + 1)
        sent = torch.from_numpy(np.stack([host.sent for host in hosts]))
        loss = torch.from_numpy(losses)[:, None]
        return TrainingState(*weights, *own_experts, bias, velocity, own, sent, known, loss)

    def output(self, s: TrainingState, f: Oracle) -> torch.Tensor:
        """Return per host the common weights, and its experts, biases, loads in its own place among all hosts'."""
        rows, n = len(s.experts), f.n
        parts = [s.weights.expand(rows, -1).double()]
        for value in (s.experts.double(), s.bias.flatten(1), s.own.flatten(1).double(), s.sent.flatten(1).double()):
            placed = torch.zeros(rows, n, value.shape[1], dtype=torch.float64)
            placed[torch.arange(rows), torch.from_numpy(f.nodes)] = value * n
            parts.append(placed.flatten(1))
        return torch.cat([*parts, s.loss], dim=1)

    def metrics(self, setting: Setting) -> Mapping[str, Callable[[torch.Tensor], float | None]]:
        """Return what is recorded; see the class."""
        shape = self._problem.shape
        names = ["val_loss", "train_loss", "maxvio_global", *theory.load_metrics(np.ones((1, shape.experts)), 1)]
        names += ["maxvio_floor", "bias_range", "bias_spread", "bytes_per_route", "modelled_seconds"]
        names += ["dropped"] if self.capacity_factor is not None else []
        chosen: dict[str, Callable[[torch.Tensor], float | None]]
        chosen = {name: partial(self._metric, name) for name in names}
        for layer in range(shape.layers):
            for e in range(shape.experts):
                chosen[f"load.{layer}.{e}"] = partial(self._each, "loads", layer, e)
                chosen[f"bias.{layer}.{e}"] = partial(self._each, "first_bias", layer, e)
        return chosen

    def _metric(self, name: str, mean: torch.Tensor) -> float | None:
        return TrainingView(mean[0].numpy(), self._problem, self).metric(name)

    def _each(self, what: str, layer: int, expert: int, mean: torch.Tensor) -> float | None:
        view = TrainingView(mean[0].numpy(), self._problem, self)
        return float(getattr(view, what)[layer, expert]) if what != "loads" or view.loads.any() else None

    def _host(self, s: TrainingState, row: int) -> Host:
        p: ByteLanguage = self._problem
        common = {n: w.clone().requires_grad_() for n, w in model.named(s.weights[0], p.shape.common()).items()}
        flat = p.host_experts(s.experts[row])
        one = p.shape.one_expert()
        experts = [
            [{n: w.clone().requires_grad_() for n, w in model.named(e, one).items()} for e in layer] for layer in flat
        ]
        capacity = None
        if self.capacity_factor is not None:
            tokens = self.sequences * p.p.sequence
            capacity = math.ceil(self.capacity_factor * p.shape.top_k * tokens / p.shape.experts)
        return Host(p.shape, common, experts, s.bias[row].numpy(), self.bias_rule, capacity, self.drop_policy)

    async def _micro_batch(self, hosts: list[Host], f: Oracle) -> NDArray[np.float64]:
        """Go forward and backward; gradients add up in the hosts' leaves. Returns each host's loss, weighted."""
        share, ways = 1.0 / self.accumulation, []
        for layer in range(self._problem.shape.layers):
            ways.append(await self._forward(hosts, layer, f))
        losses = np.array([host.loss(share) * share for host in hosts])
        pull = await self._aux_gradients(hosts)
        for layer in reversed(range(self._problem.shape.layers)):
            there, back = ways[layer]
            gradients = [host.returned_gradient(layer) for host in hosts]
            arrived = await Route(torch.cat(gradients), *there)
            made = [host.back_experts(layer, part) for host, part in zip(hosts, _parts(arrived), strict=True)]
            home = await Route(torch.cat(made), *back)
            for row, (host, part) in enumerate(zip(hosts, _parts(home), strict=True)):
                host.back(layer, part, pull[row, layer], self._losses, share)
        return losses

    async def _forward(self, hosts: list[Host], layer: int, f: Oracle) -> tuple[Any, Any]:
        """Send tokens to their experts and back; return the addresses of both ways (destinations, sources)."""
        n, each = f.n, self._problem.shape.experts // f.n
        sends = [host.dispatch(layer) for host in hosts]
        row = np.arange(len(hosts))
        table = torch.from_numpy(np.concatenate([counts.reshape(n, each) for _, counts in sends]))
        told = await Route(table, np.tile(np.arange(n), len(hosts)), row.repeat(n))
        per_host = np.stack([counts.reshape(n, each).sum(axis=1) for _, counts in sends])
        there = np.tile(np.arange(n), len(hosts)).repeat(per_host.ravel()), row.repeat(per_host.sum(axis=1))
        arrived = await Route(torch.cat([rows for rows, _ in sends]), *there)
        made = [
            host.play_experts(layer, rows, counts.numpy())
            for host, rows, counts in zip(hosts, _parts(arrived), _parts(told), strict=True)
        ]
        back = arrived.source, row.repeat(np.diff(arrived.offsets))
        returned = await Route(torch.cat(made), *back)
        for host, part in zip(hosts, _parts(returned), strict=True):
            host.combine(part)
        return there, back

    async def _aux_gradients(self, hosts: list[Host]) -> torch.Tensor:
        """Return the gradient `alpha E f_k` of the auxiliary loss by the mean scores `[rows, layers, E]`."""
        loads = torch.from_numpy(np.stack([host.micro_loads for host in hosts])).double()
        if not self.aux_loss_coeff or self.aux_loss_scope == "sequence":
            return torch.zeros_like(loads)
        if self.aux_loss_scope == "global_batch":
            own = torch.from_numpy(np.stack([host.loads for host in hosts]))
            loads = (await Sum(own.flatten(1))).reshape(1, *own.shape[1:]).double().expand_as(loads)
        share = loads / loads.sum(dim=-1, keepdim=True)
        return self.aux_loss_coeff / self.accumulation * loads.shape[-1] * share

    @property
    def _losses(self) -> Losses:
        sequence = self.aux_loss_coeff if self.aux_loss_scope == "sequence" else 0.0
        return Losses(self.z_loss_coeff, sequence, self.importance_loss_coeff, self.simbal_coeff)

    def rate_of_learning(self, k: int) -> float:
        """Return AdamW's step at step k = 0, 1, ...: it rises for `warmup` steps, then stays or falls by a cosine."""
        if self.learning_rate_end is None or k < self.warmup:
            return self.learning_rate * min(1.0, (k + 1) / max(1, self.warmup))
        done = min(1.0, (k + 1 - self.warmup) / (self._steps - self.warmup))
        return (
            self.learning_rate_end + (self.learning_rate - self.learning_rate_end) * (1 + math.cos(math.pi * done)) / 2
        )

    async def _clipping(self, common: torch.Tensor, experts: torch.Tensor) -> float:
        """Return what the gradient is multiplied by, so that its norm is at most `clip`."""
        squares = await Sum((experts * experts).sum(dim=1, keepdim=True))
        norm = math.sqrt(float((common * common).sum()) + float(squares[0, 0]))
        return 1.0 if self.clip is None or norm <= self.clip else self.clip / norm

    def _adamw(
        self,
        x: torch.Tensor,
        m: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        k: int,
        sizes: model.Sizes,
        times: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return weights and moments after step k (Loshchilov & Hutter, 2019); decay acts on matrices."""
        rate = self.rate_of_learning(k)
        keep = model.decayed(sizes).to(x.dtype)
        keep = keep.repeat(x.shape[1] // len(keep) if times is None else times)
        m = self.beta1 * m + (1 - self.beta1) * g
        v = self.beta2 * v + (1 - self.beta2) * g * g
        step = (m / (1 - self.beta1 ** (k + 1))) / ((v / (1 - self.beta2 ** (k + 1))).sqrt() + self.epsilon)
        return x - rate * (step + self.weight_decay * keep * x), m, v


def _flat(groups: list[list[torch.Tensor]]) -> torch.Tensor:
    """Return the gradients of leaves, one after the other, 0 where none arrived."""
    leaves = [leaf for group in groups for leaf in group]
    return torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).reshape(-1) for w in leaves])


def _parts(routed: Any) -> list[torch.Tensor]:
    """Return each row's items."""
    return list(routed.values.split(np.diff(routed.offsets).tolist()))
