"""How the biases follow the loads: step rules, schedules, units, and rules that look into the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from fedsim.errors import InputError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rule = Literal[
    "none", "sign", "prop", "tanh", "mult", "aux_loss", "qb", "bip", "sinkhorn", "expert_choice", "force_balanced"
]
BY_LOADS = ("sign", "prop", "tanh", "mult")  # rules that see nothing but loads


@dataclass(frozen=True)
class Balancing:
    """The keys of a balancing rule, named as the training systems name them.

    Attributes:
        bias_rule: none; sign, prop, tanh, mult (from loads); aux_loss; qb (quantiles of the batch before); bip,
            sinkhorn, expert_choice (inside the batch, per host); force_balanced (ignores the scores).
        bias_update_rate: u of the step.
        bias_schedule: u (const), u / sqrt(n) (inv_sqrt), u / n (inv_n) at step n = 1, 2, ...
        error_unit: of the load error L - A: relative (to L), fraction (of the tokens), tokens.
        center_bias: take the mean out of every step; routing is the same. Not of mult, where it would not be.
        bias_cap: largest absolute bias.
        bias_update_interval: steps between updates, each from the loads of its own step.
        bias_freeze_step: no updates from this step on.
        bias_sync: global loads (a sum over hosts), or each host its own: local, an experiment in what goes wrong.
        bias_delay: loads are this many steps old.
        kappa, momentum: of tanh.
        rule_rounds: sweeps of qb and bip, at most as many of sinkhorn.
        ema: of qb: how much of the old bias stays.
    """

    bias_rule: Rule = "sign"
    bias_update_rate: Positive = 1e-3
    bias_schedule: Literal["const", "inv_sqrt", "inv_n"] = "const"
    error_unit: Literal["relative", "fraction", "tokens"] = "relative"
    center_bias: bool = True
    bias_cap: Positive | None = None
    bias_update_interval: Count = 1
    bias_freeze_step: Count | None = None
    bias_sync: Literal["global", "local"] = "global"
    bias_delay: Annotated[int, Field(ge=0)] = 0
    kappa: Positive = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rule_rounds: Count = 8
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def rate(self, n: int) -> float:
        """Return u at step n = 1, 2, ...; 0 where the bias is frozen or not due."""
        if (self.bias_freeze_step is not None and n >= self.bias_freeze_step) or n % self.bias_update_interval:
            return 0.0
        return self.bias_update_rate / {"const": 1.0, "inv_sqrt": math.sqrt(n), "inv_n": float(n)}[self.bias_schedule]


def refuse_senseless(rule: Balancing) -> None:
    """Refuse keys that cannot go together.

    Raises:
        InputError: says which, and what to use.
    """
    if rule.momentum and rule.bias_rule != "tanh":
        raise InputError(f"algorithm.momentum: {rule.momentum} given, but only bias_rule tanh has momentum")
    if rule.ema and rule.bias_rule != "qb":
        raise InputError(f"algorithm.ema: {rule.ema} given, but only bias_rule qb averages its biases")
    if rule.bias_delay and rule.bias_rule not in BY_LOADS:
        raise InputError(f"algorithm.bias_delay: {rule.bias_delay} given, but {rule.bias_rule} does not follow loads")


def notes(rule: Balancing, score_func: str) -> tuple[str, ...]:
    """Return what is known to go wrong with these keys."""
    if rule.bias_rule == "sign" and score_func == "softmax":
        return (
            "bias_rule sign with softmax scores: they are coupled, and of another size for every token, so that one"
            " step u fits none; use sigmoid, or prop (Wang et al. use prop with softmax, Megatron-LM refuses a bias)",
        )
    return ()


def updated(
    rule: Balancing, bias: torch.Tensor, velocity: torch.Tensor, loads: torch.Tensor, top_k: int, n: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bias and velocity after step n (dual step of Han & Zhong; Wang et al., Algorithm 1).

    Args:
        bias, velocity: float64 `[rows, layers, E]`. loads: int64, broadcastable to them, each summing to K T over E.
    """
    rate = rule.rate(n)
    if rule.bias_rule not in BY_LOADS or rate == 0.0:
        return bias, velocity
    load = loads.double()
    target = load.sum(dim=-1, keepdim=True) / load.shape[-1]
    unit = {"relative": target, "fraction": target * (load.shape[-1] / top_k), "tokens": torch.ones_like(target)}
    error = (target - load) / unit[rule.error_unit]
    if rule.bias_rule in ("sign", "mult"):
        step = torch.sign(error)
    elif rule.bias_rule == "tanh":
        velocity = rule.momentum * velocity + torch.tanh(rule.kappa * error)
        step = velocity
    else:
        step = error
    step = (rate * step).expand_as(bias)
    if rule.center_bias and rule.bias_rule != "mult":  # gamma (1 + p) is not the same choice after a shift of p
        step = step - step.mean(dim=-1, keepdim=True)
    new = bias + step
    return (new if rule.bias_cap is None else new.clamp(-rule.bias_cap, rule.bias_cap)), velocity


def stable_rate(top_k: int, experts: int, largest: float, delay: int = 0) -> float:
    """Return the u above which `prop` with relative errors oscillates: `u (E/K) lambda_max < 2 sin(pi/(2(2d+1)))`."""
    return 2 * math.sin(math.pi / (2 * (2 * delay + 1))) * top_k / (experts * largest)


def quantile_bias(scores: NDArray, bias: NDArray, top_k: int, rounds: int) -> NDArray[np.float64]:
    """Return the biases of quantile balancing from one batch `[T, E]`, zero mean, starting at `bias [E]`.

    `a_i` is the (K+1)-th largest of `s_ik - beta_k` over experts, `beta_k` the (L+1)-th largest of `s_ik - a_i` over
    tokens; the bias is `-beta` (Megatron-LM, `quantile_balancing`). Where K = E there is nothing to choose.
    """
    if top_k == scores.shape[1]:
        return bias - bias.mean()
    beta = -bias
    for _ in range(rounds):
        a = _descending(scores - beta, top_k, axis=1)
        beta = _descending(scores - a[:, None], _places(scores, top_k), axis=0)
    return beta.mean() - beta


def integer_programme_bias(scores: NDArray, top_k: int, rounds: int) -> NDArray[np.float64]:
    """Return `-q` of BIP balancing (arXiv 2502.15451): the same quantiles, prices clipped at 0, from q = 0."""
    q = np.zeros(scores.shape[1])
    for _ in range(rounds):
        p = np.maximum(0.0, _descending(scores - q, top_k, axis=1))
        q = np.maximum(0.0, _descending(scores - p[:, None], _places(scores, top_k), axis=0))
    return -q


def sinkhorn_bias(scores: NDArray, rounds: int, tolerance: float = 1e-4) -> NDArray[np.float64]:
    """Return `ln d1`, so that top-K of `ln C + ln d1` is top-K of Sinkhorn's `d1 C d0`, `C = exp(scores)`.

    `d0 = (1/T) / (C d1)`, `d1 = (1/E) / (C' d0)` until the mean change of d1 is below `tolerance` (S-BASE,
    Megatron-LM).
    """
    C = np.exp(scores)
    d1 = np.ones(C.shape[1])
    for _ in range(rounds):
        before, d0 = d1, (1 / len(C)) / (C @ d1)
        d1 = (1 / C.shape[1]) / (d0 @ C)
        if np.abs(d1 - before).mean() < tolerance:
            break
    return np.log(d1)


def expert_choice(scores: NDArray, top_k: int) -> NDArray[np.bool_]:
    """Return `[T, E]`, each expert's K T/E highest-scored tokens: perfect balance, 0 to E experts per token.

    It reads the whole batch, later tokens included, so a causal language model must not train with it.
    """
    taken = np.zeros(scores.shape, bool)
    order = np.argsort(-scores, axis=0, kind="stable")[: _places(scores, top_k)]
    np.put_along_axis(taken, order, True, axis=0)
    return taken


def forced(tokens: int, first: int, experts: int, top_k: int, hosts: int = 1) -> NDArray[np.int64]:
    """Return experts `[tokens, K]` that are equal in number whatever the scores, per expert and per host.

    Slots go around the experts, one host after the other, so that a batch that does not divide leaves differences of
    at most 1 in both. `first` is the number of the first token in the global batch: hosts go on where others end.
    """
    around = np.arange(experts)
    if experts % hosts == 0:
        around = around.reshape(hosts, -1).T.ravel()
    slots = (np.arange(tokens, dtype=np.int64) + first)[:, None] * top_k + np.arange(top_k)
    return around[slots % experts]


def aux_loss(scores: NDArray, loads: NDArray[np.int64], top_k: int) -> tuple[float, NDArray[np.float64]]:
    """Return `E sum_k f_k P_k` and P: f the share of slots, P the mean of the scores normalised over experts.

    1 at exact uniformity. No gradient goes through f (Switch, GShard; sigmoid scores are normalised first).
    """
    mean = (scores / scores.sum(axis=1, keepdims=True)).mean(axis=0)
    share = loads / (len(scores) * top_k)
    return float(scores.shape[1] * (share * mean).sum()), mean


def _places(scores: NDArray, top_k: int) -> int:
    return len(scores) * top_k // scores.shape[1]


def _descending(values: NDArray, place: int, axis: int) -> NDArray[np.float64]:
    """Return the (place + 1)-th largest along an axis; where there are no more than `place`, -inf."""
    size = values.shape[axis]
    if place >= size:
        return np.full(values.shape[1 - axis], -np.inf)
    return np.take(np.partition(values, size - 1 - place, axis=axis), size - 1 - place, axis=axis)
