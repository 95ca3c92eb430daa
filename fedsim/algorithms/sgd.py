"""Synchronous SGD that DProxSGT is compared with: all-reduce, D-PSGD, DEEPSTORM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from fedsim.algorithms.algorithm import Constant, Draws, Oracle, Provenance, Sampling, Setting, SyncAlgorithm
from fedsim.algorithms.dproxsgt import nonzeros, step_constants
from fedsim.algorithms.requests import Mean, Mix, Rows
from fedsim.algorithms.steps import Decay, clipped

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass
class ModelState:
    """`x`: models."""

    x: Rows


@dataclass(frozen=True)
class AllReduceSGD(SyncAlgorithm):
    """Centralised proximal SGD on the mean gradient of all nodes.

        x = prox_{eta r}(x - eta mean_i g_i)

    Parameters: `eta`, `decay`, `batch`, `clip` as for `dproxsgt`; `order: prox_first` takes every node's prox before
    the average, `x = mean_i prox(x - eta g_i)`, as the DProxSGT authors' code does: another method, which stops beside
    the minimiser and loses the exact zeros.

    Reference: the textbook's; no paper. Nodes that start apart are averaged first.
    """

    kind: ClassVar[str] = "allreduce_sgd"
    paper: ClassVar[str] = "proximal SGD on the mean gradient"
    provenance: ClassVar[Provenance] = "paper"
    proximal: ClassVar[bool] = True

    eta: Positive
    decay: Decay | None = None
    batch: Sampling | None = None
    clip: Positive | None = None
    order: Literal["mean_first", "prox_first"] = "mean_first"

    async def start(self, x0: torch.Tensor, f: Oracle, rng: Draws) -> ModelState:
        """Start everybody at the mean of the starts."""
        return ModelState((await Mean(x0)).expand_as(x0).clone())

    async def round(self, s: ModelState, k: int, f: Oracle, rng: Draws) -> ModelState:
        """Play one round: one gradient, one all-reduce."""
        eta = self.eta if self.decay is None else self.decay.at(self.eta, k)
        g = clipped(f.gradient(s.x, self.batch, rng), self.clip)
        if self.order == "prox_first":
            return ModelState((await Mean(f.prox(s.x - eta * g, eta))).expand_as(s.x).clone())
        return ModelState(f.prox(s.x - eta * await Mean(g), eta))


@dataclass
class HalfState:
    """`x`: models; `half`: models before their mixing."""

    x: Rows
    half: Rows


@dataclass(frozen=True)
class DPSGD(SyncAlgorithm):
    """D-PSGD, with a prox where there is a composite term: step, then average with the neighbours.

        x_i = sum_j w_ij prox_{eta r}(x_j - eta g_j)

    It stops at a distance of order eta from the minimiser where nodes' data differ. Parameters as for `dproxsgt`;
    `order: mix_first` is `x = W x - eta g`, the original's, without a prox.

    Reference: Lian et al., *Can decentralized algorithms outperform centralized algorithms?*, NeurIPS 2017, Algorithm
    1.
    """

    kind: ClassVar[str] = "dpsgd"
    paper: ClassVar[str] = "Lian et al., NeurIPS 2017, Algorithm 1"
    provenance: ClassVar[Provenance] = "paper"
    needs: ClassVar[tuple[str, ...]] = ("mixing",)
    proximal: ClassVar[bool] = True

    eta: Positive
    decay: Decay | None = None
    batch: Sampling | None = None
    clip: Positive | None = None
    order: Literal["step_first", "mix_first"] = "step_first"

    def resolve(self, setting: Setting) -> DPSGD:
        """Refuse what has no mixing matrix."""
        setting.require(self.kind, "edges", "mixing")
        return self

    def constants(self, setting: Setting) -> tuple[Constant, ...]:
        """Return the step and rho."""
        return step_constants(self.eta, setting)[:2]

    async def start(self, x0: torch.Tensor, f: Oracle, rng: Draws) -> HalfState:
        """Start at x0."""
        return HalfState(x0, x0)

    async def round(self, s: HalfState, k: int, f: Oracle, rng: Draws) -> HalfState:
        """Play one round: one gradient, one mixing."""
        eta = self.eta if self.decay is None else self.decay.at(self.eta, k)
        g = clipped(f.gradient(s.x, self.batch, rng), self.clip)
        if self.order == "mix_first":
            x = f.prox(await Mix(s.x) - eta * g, eta)
            return HalfState(x, x)
        half = f.prox(s.x - eta * g, eta)
        return HalfState(await Mix(half), half)

    def measures(self, s: HalfState, f: Oracle) -> Mapping[str, torch.Tensor]:
        """Return how many coordinates are not 0 before and after mixing."""
        return nonzeros(s.half, s.x, f)


@dataclass
class DeepstormState:
    """`x`: models; `y`: trackers; `d`: gradient estimators."""

    x: Rows
    y: Rows
    d: Rows


@dataclass(frozen=True)
class Deepstorm(SyncAlgorithm):
    """DEEPSTORM v2: momentum-corrected gradients, two per record and round, tracked.

        x+ = prox_{eta r}(W x - eta y)
        d+ = (1 - beta)(d - g(x; xi)) + g(x+; xi)         the same batch at both points
        y  = W (y + d+ - d)

    d starts at a minibatch gradient, y at `W d`. The prox comes after the mixing, so that every node's model is exactly
    sparse. `beta = 1` is gradient tracking that mixes first.

    Parameters: `eta`, `decay`, `batch`, `clip` as for `dproxsgt`; `beta` in (0, 1]; `first`: minibatches averaged for
    the first d.

    Reference: Mancino-Ball, Miao, Xu & Chen, *Proximal stochastic recursive momentum methods for nonconvex composite
    decentralized optimization*, AAAI 2023, Algorithm 1 (v2).

    Differences from the authors' code: its losses are divided by the number of agents, so that its steps are n times
    larger; its schedules are `decay` here with a constant beta.
    """

    kind: ClassVar[str] = "deepstorm"
    paper: ClassVar[str] = "Mancino-Ball et al., AAAI 2023, Algorithm 1 (v2)"
    provenance: ClassVar[Provenance] = "authors' code"
    needs: ClassVar[tuple[str, ...]] = ("mixing",)
    proximal: ClassVar[bool] = True

    eta: Positive
    beta: Annotated[float, Field(gt=0, le=1)] = 0.8
    decay: Decay | None = None
    batch: Sampling | None = None
    clip: Positive | None = None
    first: Annotated[int, Field(ge=1)] = 1

    def resolve(self, setting: Setting) -> Deepstorm:
        """Refuse what has no mixing matrix."""
        setting.require(self.kind, "edges", "mixing")
        return self

    def constants(self, setting: Setting) -> tuple[Constant, ...]:
        """Return the step and rho."""
        return step_constants(self.eta, setting)[:2]

    async def start(self, x0: torch.Tensor, f: Oracle, rng: Draws) -> DeepstormState:
        """Average the first minibatch gradients, and mix them."""
        d = torch.zeros_like(x0)
        for _ in range(self.first):
            d = d + clipped(f.gradient(x0, self.batch, rng), self.clip) / self.first
        return DeepstormState(x0, await Mix(d), d)

    async def round(self, s: DeepstormState, k: int, f: Oracle, rng: Draws) -> DeepstormState:
        """Play one round: two gradients on one batch, two mixings."""
        eta = self.eta if self.decay is None else self.decay.at(self.eta, k)
        x = f.prox(await Mix(s.x) - eta * s.y, eta)
        batch = f.sample(self.batch, rng)
        old, new = clipped(f.gradient(s.x, batch), self.clip), clipped(f.gradient(x, batch), self.clip)
        d = (1.0 - self.beta) * (s.d - old) + new
        return DeepstormState(x, await Mix(s.y + d - s.d), d)

    def measures(self, s: DeepstormState, f: Oracle) -> Mapping[str, torch.Tensor]:
        """Return how many coordinates of the models are not 0."""
        return nonzeros(s.x, s.x, f)
