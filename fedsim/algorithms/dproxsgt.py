"""DProxSGT: gradient tracking with a prox, and the methods that are special cases of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from fedsim.algorithms.algorithm import Auto, Constant, Draws, Oracle, Provenance, Sampling, Setting, SyncAlgorithm
from fedsim.algorithms.requests import Mean, Mix, Rows
from fedsim.algorithms.steps import Decay, clipped

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass
class TrackedState:
    """`x`: models; `y`: trackers; `g`: last gradients; `half`: models before their mixing, where zeros are exact."""

    x: Rows
    y: Rows
    g: Rows
    half: Rows


@dataclass(frozen=True)
class DProxSGT(SyncAlgorithm):
    """Minimise `(1/n) sum_i f_i(x) + r(x)` with one stochastic gradient and two mixings a round.

        g_i = grad F_i(x_i; xi_i)                  one minibatch, at the current x_i
        h_i = y_i + g_i - g_i-                     y and g- start at 0
        y_i = sum_j w_ij h_j
        x_i = sum_j w_ij prox_{eta r}(x_j - eta y_j)

    `mean_i y_i = mean_i g_i` and `mean_i x_i` is that of the points before mixing, always. With exact gradients the
    fixed point is the minimiser itself, however different the nodes' data are. Sparsity lives in the points before
    mixing (`half`); averages of different supports fill zeros.

    Parameters: `eta`: the step, which must be given (theory, recollected: at most
    `min(1/(4L), (1-rho^2)^2/(96 rho L))`, far below what is practical). `decay`: `{offset, power}` for
    `eta (1 + k/offset)^-power`. `tracker`: `mixed` (the paper's) or `pre_mix`, which steps along `h` and lets both
    messages of a round travel together. `gossip`: mixings per exchange (K in ProxGT-SA). `clip`: largest norm of a
    gradient. `final`: `prox` answers with `prox_{eta r}` of a step from the mean of x along the mean of y, at every
    observation (not charged), exactly sparse; its step is `eta`, without decay.

    Reference: Yan, Chen, Chen, Cui, Lu & Xu, *Compressed decentralized proximal stochastic gradient method for
    nonconvex composite problems with heterogeneous data*, ICML 2023 (arXiv 2302.14252), Algorithm 1.

    Differences from the authors' code: its scripts with an l1 term step along `h` (`tracker: pre_mix` here), those with
    compression have no prox at all; all clip gradients at norm 10 (`clip` here, off by default) and start every node
    from a model of its own (`start: {kind: normal}` here; a common start is the default); its "ProxGT-SA" is this
    method with a large batch, its all-reduce baseline takes the prox before the average.
    """

    kind: ClassVar[str] = "dproxsgt"
    paper: ClassVar[str] = "Yan et al., ICML 2023, Algorithm 1"
    provenance: ClassVar[Provenance] = "paper"
    needs: ClassVar[tuple[str, ...]] = ("mixing",)
    proximal: ClassVar[bool] = True

    eta: Positive
    decay: Decay | None = None
    batch: Sampling | None = None
    tracker: Literal["mixed", "pre_mix"] = "mixed"
    gossip: Annotated[int, Field(ge=1)] | Auto = 1
    clip: Positive | None = None
    final: Literal["none", "prox"] = "none"

    def resolve(self, setting: Setting) -> DProxSGT:
        """Refuse what has no mixing matrix; `gossip: auto` is `ceil(1 / (1 - rho))`."""
        setting.require(self.kind, "edges", "mixing")
        rounds = math.ceil(1.0 / setting.mixing_gap) if self.gossip == "auto" else self.gossip
        return self.derived(gossip=rounds)

    def constants(self, setting: Setting) -> tuple[Constant, ...]:
        """Return the step, rho, and the theory's step beside it."""
        return step_constants(self.eta, setting)

    async def start(self, x0: torch.Tensor, f: Oracle, rng: Draws) -> TrackedState:
        """Start trackers and gradients at 0; nothing is computed or sent."""
        zero = torch.zeros_like(x0)
        return TrackedState(x0, zero, zero, x0)

    async def round(self, s: TrackedState, k: int, f: Oracle, rng: Draws) -> TrackedState:
        """Play one round: one gradient, two exchanges."""
        eta = self.eta if self.decay is None else self.decay.at(self.eta, k)
        g = clipped(f.gradient(s.x, self.batch, rng), self.clip)
        h = s.y + g - s.g
        if self.tracker == "pre_mix":
            half = f.prox(s.x - eta * h, eta)
            both = await self._mix(torch.cat([half, h], dim=1))  # neither waits for the other: one message
            x, y = (part.contiguous() for part in both.tensor_split(2, dim=1))
            return TrackedState(x, y, g, half)
        y = await self._mix(h)
        half = f.prox(s.x - eta * y, eta)
        return TrackedState(await self._mix(half), y, g, half)

    async def _mix(self, v: torch.Tensor) -> torch.Tensor:
        assert self.gossip != "auto"
        for _ in range(self.gossip):
            v = await Mix(v)
        return v

    def measures(self, s: TrackedState, f: Oracle) -> Mapping[str, torch.Tensor]:
        """Return how many coordinates are not 0 before and after mixing."""
        return nonzeros(s.half, s.x, f)

    async def answer(self, s: TrackedState, f: Oracle) -> torch.Tensor:
        """Return x, or a prox step from the means."""
        if self.final == "none":
            return s.x
        step = f.prox(await Mean(s.x) - self.eta * await Mean(s.y), self.eta)
        return step.expand_as(s.x)


@dataclass(frozen=True)
class GradientTracking(DProxSGT):
    """Distributed stochastic gradient tracking: DProxSGT without a prox.

        h = y + g - g-;  y = W h;  x = W (x - eta y)

    Parameters as for `dproxsgt`.

    Reference: Pu & Nedic, *Distributed stochastic gradient tracking methods*, Mathematical Programming 2021; Qu & Li
    2018 for exact gradients. Differences from the paper: it starts y at the first gradients, here y and g- start at 0
    and the first round makes them so.
    """

    kind: ClassVar[str] = "gradient_tracking"
    paper: ClassVar[str] = "Pu & Nedic, Mathematical Programming 2021"
    proximal: ClassVar[bool] = False


@dataclass(frozen=True)
class ProxGTSA(DProxSGT):
    """ProxGT-SA: DProxSGT's recursion with several mixings per exchange and large batches.

        h = y + g - g-;  y = W^K h;  x = W^K prox_{eta r}(x - eta y)

    Parameters as for `dproxsgt`; `gossip: auto` takes `K = ceil(1/(1 - rho))`. The batch should be large (of order
    `1/eps^2` for a gradient of norm eps). What the figures of the DProxSGT paper call ProxGT-SA is `gossip: 1`.

    Reference: Xin, Das, Khan & Kar, *A stochastic proximal gradient framework for decentralized non-convex composite
    optimization*, arXiv 2110.01594 (2021).
    """

    kind: ClassVar[str] = "prox_gt_sa"
    paper: ClassVar[str] = "Xin, Das, Khan & Kar, arXiv 2110.01594"
    provenance: ClassVar[Provenance] = "reconstruction"
    gossip: Annotated[int, Field(ge=1)] | Auto = "auto"


def nonzeros(half: torch.Tensor, x: torch.Tensor, f: Oracle) -> dict[str, torch.Tensor]:
    """Return, where there is a composite term, every row's number of coordinates that are not 0, `[rows]`."""
    if not f.has_composite:
        return {}
    return {"nonzeros_half": (half != 0).sum(dim=1), "nonzeros_x": (x != 0).sum(dim=1)}


def step_constants(eta: float, setting: Setting) -> tuple[Constant, ...]:
    """Return the step used, `rho = ||W - J||`, and the step that the analysis would ask for."""
    rho = 1.0 - setting.mixing_gap
    found = [Constant("eta", eta, "given"), Constant("rho", rho, "||W - J||_2")]
    if setting.L is not None:
        limits = [1.0 / (4 * setting.L)]
        if rho > 0:
            limits.append((1 - rho**2) ** 2 / (96 * rho * setting.L))
        found.append(Constant("eta of the theory", min(limits), "min(1/(4L), (1 - rho^2)^2/(96 rho L)), recollected"))
    return tuple(found)
