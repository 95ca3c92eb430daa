"""One host's tokens of one layer, routed under a balancing rule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedsim.moe import rules
from fedsim.moe.selection import Selected, kept
from fedsim.moe.streams import to_scores

if TYPE_CHECKING:
    from fedsim.algorithms.router_replay import RouterReplay
    from fedsim.problems.router_scores import Batch, RouterScores

# What a host adds up over its tokens, in this order: scores selected, the same with biases, switching benefits, the
# host's part of sum eps (A - L)^2, scores kept, slots dropped, gates, regret, auxiliary loss.
SUMS = ("score", "biased", "benefit", "penalty", "kept", "dropped", "gate", "regret", "aux")


class Part:
    """One host's tokens of one layer, routed."""

    def __init__(
        self, rule: RouterReplay, s: RouterScores, batch: Batch, node: int, layer: int, bias: NDArray[np.float64]
    ) -> None:
        tokens = batch.hosts[node]
        self.rule, self.s, self.layer, self.bias = rule, s, layer, bias
        self.scores = batch.scores[layer][tokens]
        self.logits = None if batch.logits is None else batch.logits[layer][tokens]
        self._routed = len(self.scores)  # tokens that any expert sees
        first = int(s.records[:node].sum())
        self.selected = self._selected(first)

    def _selected(self, first: int) -> Selected:
        rule, s, scores = self.rule, self.s, self.scores
        if rule.bias_rule == "force_balanced":
            return self._of(rules.forced(len(scores), first, s.experts, s.top_k, s.n))
        if rule.bias_rule == "bip":
            return s.select(scores, rules.integer_programme_bias(scores, s.top_k, rule.rule_rounds))
        if rule.bias_rule == "sinkhorn":
            base = scores if self.logits is None else self.logits
            return self._of(s.select(base, rules.sinkhorn_bias(base, rule.rule_rounds)).experts)
        if rule.bias_rule == "expert_choice":
            taken = rules.expert_choice(scores, s.top_k)
            self._routed = int(taken.any(axis=1).sum())
            score = float(scores[taken].sum())
            return Selected(np.empty((len(scores), 0), np.int64), taken.sum(axis=0), score, score)
        if rule.bias_rule == "aux_loss":
            return self._of(s.select(self._shifted(), np.zeros(s.experts)).experts)
        return s.select(scores, self.bias, rule.bias_rule == "mult")

    def _of(self, experts: NDArray[np.int64]) -> Selected:
        chosen = np.take_along_axis(self.scores, experts, axis=1).sum()
        loads = np.bincount(experts.ravel(), minlength=self.s.experts)
        return Selected(experts, loads, float(chosen), float(chosen))

    def _shifted(self) -> NDArray[np.float64]:
        assert self.logits is not None
        return to_scores(self.logits + self.bias, self.s.p.score_func)

    def proposal(self) -> NDArray[np.float64]:
        """Return what the host would make the next bias (qb), or its gradient (aux_loss)."""
        if self.rule.bias_rule == "qb":
            return rules.quantile_bias(self.scores, self.bias, self.s.top_k, self.rule.rule_rounds)
        if self.rule.bias_rule == "aux_loss":
            return _aux_slope(self._shifted(), self.logits, self.bias, self.selected.loads, self.s)
        return np.zeros(self.s.experts)

    def sums(self, best: NDArray[np.float64] | None) -> dict[str, float]:
        """Return the host's share of every sum over tokens."""
        s, found = self.s, self.selected
        values = {"score": found.score, "biased": found.biased, "kept": found.score}
        chosen = np.take_along_axis(self.scores, found.experts, axis=1) if s.p.route_norm or self._drops else None
        values["gate"] = found.score * s.p.route_scale
        if s.p.route_norm and s.top_k > 1:
            values["gate"] = s.p.route_scale * self._routed
        if self._drops:
            assert chosen is not None
            capacity = math.ceil(self.rule.capacity_factor * s.top_k * len(self.scores) / s.experts)  # type: ignore[operator]
            fits = kept(found.experts, self.scores, capacity, self.rule.drop_policy)
            values["dropped"], values["kept"] = float((~fits).sum()), float((chosen * fits).sum())
        if self.rule.bias_rule == "aux_loss":
            values["aux"] = rules.aux_loss(self._shifted(), found.loads, s.top_k)[0] * len(self.scores)
        if best is not None:
            target = len(self.scores) * s.top_k / s.experts
            there = s.select(self.scores, best[self.layer])
            mine = found.biased - target * self.bias.sum()
            values["regret"] = mine - (there.biased - target * best[self.layer].sum())
        return values

    @property
    def _drops(self) -> bool:
        return self.rule.capacity_factor is not None


def _aux_slope(
    scores: NDArray, logits: NDArray | None, bias: NDArray, loads: NDArray[np.int64], s: RouterScores
) -> NDArray[np.float64]:
    """Return the gradient of `E sum f_k P_k` by the shift of the logits, f held fixed."""
    assert logits is not None
    share = s.experts * loads / (len(scores) * s.top_k)
    if s.p.score_func == "sigmoid":
        slope = scores * (1 - scores)
    elif s.p.score_func == "softmax":
        return ((scores * share) - scores * (scores @ share)[:, None]).mean(axis=0)
    else:
        slope = 0.5 * (1 + np.tanh((logits + bias) / 2)) / (2 * scores)
    total = scores.sum(axis=1, keepdims=True)
    weighted = (scores @ share)[:, None] / total
    return (slope / total * (share - weighted)).mean(axis=0)
