"""Router scores under a balancing rule: selection, loads, bias, and how far from the exact optimum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from fedsim.algorithms.algorithm import Constant, Draws, Oracle, Provenance, Setting, SyncAlgorithm
from fedsim.algorithms.requests import Mean, Rows, Shared, Sum
from fedsim.errors import InputError
from fedsim.moe import rules, theory
from fedsim.moe.part import SUMS, Part
from fedsim.moe.rules import Balancing
from fedsim.moe.view import View
from fedsim.problems.router_scores import Batch, RouterScores

EVERY_BATCH = 2**17  # scores of a batch up to which `oracle: auto` finds the optimum of every one: some 0.1 s


@dataclass
class ReplayState:
    """Every host's own copy of the biases and of the loads it knows; nothing here is equal by fiat.

    Attributes:
        bias: `[rows, layers, E]`, what the last batch was routed with. velocity: of tanh. proposal: of qb, aux_loss.
        own: int64 `[rows, layers, E]`, selections of the host's tokens.
        known: int64 `[rows, delay + 1, layers, E]`, the loads that its rule goes by, newest first.
        sums: float64 `[rows, 9 * layers]`, see `fedsim.moe.part.SUMS`.
        loads: int64 `[1, layers, E]`, of all tokens. optimum: `[1, 1]`, of this step's batch, 0 where not computed.
    """

    bias: Rows
    velocity: Rows
    proposal: Rows
    own: Rows
    known: Rows
    sums: Rows
    loads: Shared
    optimum: Shared


class Routed(NamedTuple):
    """What hosts do with their part of one batch."""

    own: torch.Tensor
    sums: torch.Tensor
    proposal: torch.Tensor


@dataclass(frozen=True)
class RouterReplay(Balancing, SyncAlgorithm):
    """Route one batch of recorded or drawn scores per round, then let the biases follow the loads.

        x_i  = top-K of gamma_ik + p_k                       loads A_k = sum_i x_ik, target L = K T / E
        p_k += eps_k (L - A_k)                                the next batch is routed with the new p

    Round 0 is the batch routed with the start's biases (`start: {kind: zeros}`), before any update: round r is step
    n = r + 1. `sign`: eps_k = u / |L - A_k|, sign(0) = 0; `prop`: u times the error in `error_unit`; `tanh`: tanh of
    kappa times the error, with momentum; `mult`: sign steps, selection by gamma (1 + p); `qb`: minus the quantile
    prices of each host's part, their mean over hosts, used for the next batch; `bip`, `sinkhorn`: prices of the batch
    itself, per host; `expert_choice`: each expert takes the K T_host / E tokens of a host that score it highest, 0 to
    E experts per token (it reads later tokens, so that no causal language model may train with it); `aux_loss`: p
    shifts the logits and descends the gradient of E sum f_k P_k at rate u, no gradient through f (our rendering of what
    training with that loss does to a router's bias); `force_balanced` ignores scores.

    Records `gap = D(p) - OPT` with the dual function D and the exact optimum OPT where selection is the best response
    to additive biases that are equal on all hosts; under group limits, `mult`, `aux_loss` and others `score_ratio` and
    `maxvio` stand apart. Where E does not divide K T, OPT is over loads floor(L) and ceil(L), and so is D's bound.
    `maxvio`: (max A - L)/L of the batch, with `maxvio_floor`, its mean under the best fixed bias for i.i.d. tokens;
    `maxvio_global`: of tokens that stand for the whole stream (of a recording, its own), the bias frozen. With
    `capacity_factor`, an expert takes ceil(cf K T_host / E) tokens of each host; the loads that the rule sees are those
    before dropping. `lagrangian` rises by `benefit` - `penalty`, sum_i b_i - sum_k eps_k (A_k - L)^2.
    `load.LAYER.EXPERT` and `bias.LAYER.EXPERT` are recorded when asked for (`record: {metrics: [..., "load.*"]}`).

    Attributes:
        capacity_factor, drop_policy: keep the highest scores (probs) or the first come (position).
        oracle: exact optimum of every batch (each), or none; auto leaves it out where every batch is another one and
            has more than 2^17 scores in all layers.
        regret: also route with the best fixed bias and record the regret, the sum of D(p; batch) - D(p*; batch).
        comparator: p* by layer and expert (default: what balances a large sample of the stream's law).

    Reference: Wang, Gao, Zhao, Sun & Dai, *Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts*, arXiv
    2408.15664, Algorithm 1; Han & Zhong, *A Theoretical Framework for Auxiliary-Loss-Free Load Balancing of Sparse
    Mixture-of-Experts in Large-Scale AI Models*, arXiv 2512.03915.

    Differences from the papers: they leave the unit of the error and the mean of the bias open; here `relative` and
    centred. Bounds and growth laws printed by `check` are derived in our notes, not quoted.
    """

    kind: ClassVar[str] = "router_replay"
    paper: ClassVar[str] = "Wang et al., arXiv 2408.15664, Algorithm 1; Han & Zhong, arXiv 2512.03915"
    provenance: ClassVar[Provenance] = "paper"

    capacity_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    drop_policy: Literal["probs", "position"] = "probs"
    oracle: Literal["auto", "each", "none"] = "auto"
    regret: bool = False
    comparator: list[list[Annotated[float, Field(allow_inf_nan=False)]]] | None = None
    _scores: Any = field(default=None, init=False, repr=False)
    _best: Any = field(default=None, init=False, repr=False)

    def resolve(self, setting: Setting) -> RouterReplay:
        """Refuse other problems and senseless keys; find the best fixed bias where the regret is asked for."""
        problem = getattr(setting, "problem", None)
        if not isinstance(problem, RouterScores):
            raise InputError(f"router_replay plays problem 'router_scores', not {getattr(problem, 'kind', '?')!r}")
        rules.refuse_senseless(self)
        if self.bias_rule == "aux_loss" and problem.p.file is not None and problem.p.file_holds == "scores":
            raise InputError(
                "algorithm.bias_rule: aux_loss shifts logits, but the recording holds scores; give logits and"
                " problem.file_holds: logits"
            )
        if self.bias_rule == "expert_choice" and (self.capacity_factor is not None or problem.limited_groups):
            raise InputError(
                "algorithm.bias_rule: expert_choice fills every expert to its capacity from all tokens; leave"
                " capacity_factor and group limits out"
            )
        ready = self.derived(_scores=problem)
        if self.regret and not ready._is_dual:
            raise InputError(
                "algorithm.regret: true given, but the regret needs selection by score plus biases that are equal on"
                " all hosts: bias_rule sign, prop, tanh, qb or none, bias_sync global, no group limits"
            )
        return ready.derived(_best=ready._comparator()) if self.regret else ready

    def constants(self, setting: Setting) -> tuple[Constant, ...]:
        """Return L, the floor, the curvature at the optimal biases, the stable rate, the regret's growth."""
        s = self._problem
        floor = theory.sampling_floor(s.tokens, s.experts, s.top_k)
        found = [
            Constant("L", s.tokens * s.top_k / s.experts, "K T / E, tokens per expert"),
            Constant("maxvio_floor", floor, "kappa_E sqrt((1 - K/E)/L E/(E - 1)), mean MaxVio of i.i.d. batches at p*"),
        ]
        if not self._is_dual or not s.bends:
            return tuple(found)
        smallest = min(bend.smallest for _, bend in s.bends)
        spread = max(float(np.ptp(prices)) for prices, _ in s.bends)
        unit = {"relative": "K/(E lambda_max)", "fraction": "1/lambda_max", "tokens": "1/(T lambda_max)"}
        formula = f"{self.error_unit} u below 2 sin(pi/(2(2d+1))) {unit[self.error_unit]} is stable"
        found += [
            Constant("lambda_2", smallest, "smallest positive eigenvalue of the tie-density Laplacian (estimate)"),
            Constant("lambda_max", self._largest, "its largest eigenvalue (estimate)"),
            Constant("prop_limit", self._limit, formula),
            Constant("spread", spread, "range of the optimal biases; sign needs u >= spread/steps"),
        ]
        growth = self._growth
        if growth is not None:
            value = growth.power if growth.rate is None else growth.rate * s.layers
            found.append(Constant("regret", float(value or 0.0), f"predicted growth per {growth.law}"))
        return tuple(found)

    def notes(self, setting: Setting) -> tuple[str, ...]:
        """Return what is known to go wrong with these keys."""
        s, u = self._problem, self.bias_update_rate
        found = [*rules.notes(self, s.p.score_func)]
        constant = self.bias_rule == "prop" and self.bias_schedule == "const" and self._is_dual
        if constant and s.bends and u > self._limit:
            found.append(f"bias_update_rate {u:g} is above prop_limit {self._limit:.3g}: loads will swing")
        if self.oracle == "auto" and not self._has_optimum:
            found.append(
                f"no gap: {s.layers} x {s.tokens} x {s.experts} scores are new in every step; oracle: each computes it"
            )
        return tuple(found)

    @property
    def _largest(self) -> float:
        return max(bend.largest for _, bend in self._problem.bends)

    @property
    def _limit(self) -> float:
        """The stable rate of `prop`, in the unit of its error."""
        s = self._problem
        target = s.tokens * s.top_k / s.experts
        unit = {"relative": 1.0, "fraction": s.experts / s.top_k, "tokens": 1 / target}[self.error_unit]
        return unit * rules.stable_rate(s.top_k, s.experts, self._largest, self.bias_delay)

    @property
    def _growth(self) -> theory.Growth | None:
        """How the regret of one layer should grow, where batches are i.i.d. and every step follows its own loads."""
        s = self._problem
        plain = not self.bias_delay and self.bias_update_interval == 1 and self.bias_freeze_step is None
        if not (s.iid and plain and self.bias_cap is None):
            return None
        rate = self.bias_update_rate, self.error_unit, s.tokens, s.top_k
        return theory.predicted_regret(self.bias_rule, self.bias_schedule, *rate, s.bends[0][1])

    async def start(self, x0: torch.Tensor, f: Oracle, rng: Draws) -> ReplayState:
        """Route the first batch with the biases of the start."""
        s = self._problem
        bias = x0.double().reshape(len(x0), s.layers, s.experts)
        batch = s.batch(0, rng.shared("router scores"))
        found = self._route(bias, bias, torch.zeros_like(bias).long(), batch, f.nodes)
        loads = await Sum(found.own.flatten(1))
        loads = loads.reshape(1, s.layers, s.experts)
        known = (found.own if self.bias_sync == "local" else loads.expand_as(found.own))[:, None]
        known = known.expand(-1, self.bias_delay + 1, -1, -1).contiguous()
        zero = torch.zeros_like(bias)
        sums = found.sums.reshape(len(bias), len(SUMS), -1).clone()
        sums[:, SUMS.index("benefit")] = 0.0  # no token has switched yet
        return ReplayState(bias, zero, found.proposal, found.own, known, sums.flatten(1), loads, self._optimum(batch))

    async def round(self, s: ReplayState, k: int, f: Oracle, rng: Draws) -> ReplayState:
        """Update the biases from the loads before, then route batch k + 1."""
        p = self._problem
        bias, velocity = await self._updated(s, k + 1)
        batch = p.batch(k + 1, rng.shared("router scores"))
        found = self._route(bias, s.bias, s.own, batch, f.nodes)
        loads = (await Sum(found.own.flatten(1))).reshape(1, p.layers, p.experts)
        newest = found.own if self.bias_sync == "local" else loads.expand_as(found.own)
        known = torch.cat([newest[:, None], s.known[:, :-1]], dim=1)
        sums = found.sums.reshape(len(bias), len(SUMS), -1).clone()
        before = s.sums.reshape(len(bias), len(SUMS), -1)
        sums[:, SUMS.index("benefit")] -= before[:, SUMS.index("score")]
        sums[:, SUMS.index("penalty")] = self._penalty(s, bias)
        sums[:, SUMS.index("regret")] += before[:, SUMS.index("regret")]
        return ReplayState(
            bias, velocity, found.proposal, found.own, known, sums.flatten(1), loads, self._optimum(batch)
        )

    def output(self, s: ReplayState, f: Oracle) -> torch.Tensor:
        """Return per host: its biases in its own place among all hosts', its loads, its sums, and the optimum."""
        mine = torch.zeros(len(s.bias), f.n, s.bias[0].numel(), dtype=torch.float64)
        mine[torch.arange(len(s.bias)), torch.from_numpy(f.nodes)] = s.bias.flatten(1)
        optimum = s.optimum.expand(len(s.bias), 1)
        return torch.cat([mine.flatten(1), s.own.flatten(1).double(), s.sums, optimum], dim=1)

    def metrics(self, setting: Setting) -> dict[str, Callable[[torch.Tensor], float]]:
        """Return what is recorded; see the class."""
        s = self._problem
        names = [*theory.load_metrics(np.ones((1, s.experts)), 1), "score_ratio", "gap", "lagrangian", "benefit"]
        names += ["penalty", "bias_spread", "bias_range", "maxvio_floor", "dropped", "gate", "aux", "regret"]
        names += ["maxvio_global"]
        left_out = set()
        by_bias = self.bias_rule in ("none", "qb", *rules.BY_LOADS) and self.bias_sync == "global"
        if s.stationary or s.moving or not by_bias:
            left_out |= {"maxvio_global"}
        if not self._is_dual:
            left_out |= {"gap", "lagrangian", "benefit", "penalty"}
        left_out |= {"maxvio_floor"} if s.stationary else {"benefit", "penalty"}
        left_out |= {"aux"} if self.bias_rule != "aux_loss" else set()
        if not self._has_optimum:
            left_out |= {"gap", "score_ratio"}
        left_out |= {"dropped"} if self.capacity_factor is None else set()
        left_out |= set() if self.regret else {"regret"}
        chosen = {name: partial(self._metric, name) for name in names if name not in left_out}
        for layer in range(s.layers):
            for e in range(s.experts):
                chosen[f"load.{layer}.{e}"] = partial(self._each, "loads", layer, e)
                chosen[f"bias.{layer}.{e}"] = partial(self._each, "first_bias", layer, e)
        return chosen

    def _metric(self, name: str, mean: torch.Tensor) -> float:
        return View(mean[0].numpy(), self._problem).metric(name, self.bias_rule == "mult")

    def _each(self, what: str, layer: int, expert: int, mean: torch.Tensor) -> float:
        return float(getattr(View(mean[0].numpy(), self._problem), what)[layer, expert])

    @property
    def _problem(self) -> RouterScores:
        assert self._scores is not None
        return self._scores

    @property
    def _is_dual(self) -> bool:
        """Whether selection is the best response to additive biases, equal on all hosts."""
        additive = self.bias_rule in ("none", "sign", "prop", "tanh", "qb")
        return additive and self.bias_sync == "global" and not self._problem.limited_groups

    @property
    def _has_optimum(self) -> bool:
        s = self._problem
        small = s.stationary or s.layers * s.tokens * s.experts <= EVERY_BATCH
        return self.oracle == "each" or (self.oracle == "auto" and small)

    def _comparator(self) -> NDArray[np.float64]:
        s = self._problem
        if self.comparator is not None:
            given = np.asarray(self.comparator, dtype=np.float64)
            if given.shape != (s.layers, s.experts):
                raise InputError(f"algorithm.comparator: {given.shape} given, {(s.layers, s.experts)} needed")
            return given
        return s.best_fixed

    def _optimum(self, batch: Batch) -> torch.Tensor:
        value = self._problem.optimum_of(batch) if self._has_optimum else 0.0
        return torch.tensor([[value]], dtype=torch.float64)

    async def _updated(self, s: ReplayState, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        rate = self.rate(n)
        if self.bias_rule == "qb":
            proposal = await Mean(s.proposal.flatten(1)) if self.bias_sync == "global" else s.proposal.flatten(1)
            kept_part = self.ema * s.bias + (1 - self.ema) * proposal.reshape(len(proposal), *s.bias.shape[1:])
            return (kept_part if rate > 0 else s.bias), s.velocity
        if self.bias_rule == "aux_loss":
            slope = await Mean(s.proposal.flatten(1)) if self.bias_sync == "global" else s.proposal.flatten(1)
            return s.bias - rate * slope.reshape(len(slope), *s.bias.shape[1:]), s.velocity
        return rules.updated(self, s.bias, s.velocity, s.known[:, -1], self._problem.top_k, n)

    def _penalty(self, s: ReplayState, bias: torch.Tensor) -> torch.Tensor:
        """Return each host's n-th part of `sum_k eps_k (A_k - L)^2 = -sum_k dp_k (A_k - L)` `[rows, layers]`."""
        load = s.loads.double()
        error = load - load.mean(dim=-1, keepdim=True)
        return -((bias - s.bias) * error).sum(dim=-1) / self._problem.n

    def _route(
        self, bias: torch.Tensor, before: torch.Tensor, old: torch.Tensor, batch: Batch, nodes: NDArray[np.int64]
    ) -> Routed:
        """Route the hosts' tokens; `before`, `old`: biases and selections of the step before, for the benefit."""
        s = self._problem
        own = np.zeros((len(nodes), s.layers, s.experts), np.int64)
        sums = np.zeros((len(nodes), len(SUMS), s.layers))
        proposal = np.zeros((len(nodes), s.layers, s.experts))
        for row, node in enumerate(nodes):
            for layer in range(s.layers):
                part = Part(self, s, batch, int(node), layer, bias[row, layer].numpy())
                own[row, layer], proposal[row, layer] = part.selected.loads, part.proposal()
                values = part.sums(self._best)
                values["benefit"] = values["biased"] - float((bias[row, layer] * old[row, layer]).sum())
                sums[row, :, layer] = [values.get(name, 0.0) for name in SUMS]
        return Routed(torch.from_numpy(own), torch.from_numpy(sums).flatten(1), torch.from_numpy(proposal))
