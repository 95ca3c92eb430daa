"""What DIFF2 is compared with: private gradient descent, private SGD, private SGD with recursive momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from fedsim.algorithms.algorithm import Draws, Oracle, Provenance, Setting
from fedsim.algorithms.private import PrivateAlgorithm, ServerState, radius
from fedsim.algorithms.requests import Shared
from fedsim.privacy.clipping import Clip
from fedsim.privacy.plan import Planned
from fedsim.privacy.requests import Charge, Release, Spend, Subsample

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1)]
REFRESH = Charge("refresh")


@dataclass(frozen=True)
class DPGD(PrivateAlgorithm):
    """Private gradient descent: `x -= eta (sum_p w_p (1/n_p) sum_i clip(grad l(x, z_i), C) + noise + l2 x)`.

    The baseline of the DIFF2 paper, and DIFF2-GD with T = 1, line by line (its release is called refresh, too).

    Parameters: `eta`; `clip_grad` C; `clipping` flat or per layer.

    Reference: Bassily, Smith & Thakurta, FOCS 2014; as in Murata & Suzuki, ICML 2023.
    """

    kind: ClassVar[str] = "dp_gd"
    paper: ClassVar[str] = "Murata & Suzuki, ICML 2023 (baseline)"
    provenance: ClassVar[Provenance] = "paper"
    radii: ClassVar[tuple[str, ...]] = ("clip_grad",)

    eta: Positive
    clip_grad: Positive | None = None
    clipping: Literal["flat", "per_layer"] = "flat"

    def resolve(self, setting: Setting) -> Any:
        """Refuse what cannot be private."""
        return self.resolved(setting)

    def plan(self, setting: Setting) -> tuple[Planned, ...]:
        """Return one release of all records in every round."""
        return (Planned("refresh", setting.rounds),)

    async def start(self, x0: torch.Tensor, f: Oracle, rng: Draws) -> ServerState:
        """Start at the common point."""
        return ServerState(await self.begin(x0))

    async def round(self, s: ServerState, k: int, f: Oracle, rng: Draws) -> ServerState:
        """Take one step along the private gradient."""
        await Spend(k, (REFRESH,))
        c = radius(self.clip_grad)
        v = await Release(k, f.clipped(s.x, Clip(c, self.clipping == "per_layer")), REFRESH, c)
        return ServerState(s.x - self.eta * (v + f.regular_gradient(s.x)))


@dataclass(frozen=True)
class DPSGD(PrivateAlgorithm):
    """Private SGD: every record of every worker is drawn with rate q, sums are divided by the expected batch.

        x -= eta (sum_p w_p (1/(q n_p)) sum_{i in B_p} clip(grad l(x, z_i), C) + noise + l2 x)

    Accounted for by privacy loss distributions (Poisson sampling), so the relation must be zero_out or add_remove.

    Parameters: `eta`; `clip_grad` C; `batch_rate` q; `clipping` flat or per layer.

    Reference: Abadi et al., *Deep learning with differential privacy*, CCS 2016, with a server.
    """

    kind: ClassVar[str] = "dp_sgd"
    paper: ClassVar[str] = "Abadi et al., CCS 2016"
    provenance: ClassVar[Provenance] = "paper"
    radii: ClassVar[tuple[str, ...]] = ("clip_grad",)

    eta: Positive
    clip_grad: Positive | None = None
    batch_rate: Rate = 0.1
    clipping: Literal["flat", "per_layer"] = "flat"

    def resolve(self, setting: Setting) -> Any:
        """Refuse what cannot be private."""
        return self.resolved(setting)

    def plan(self, setting: Setting) -> tuple[Planned, ...]:
        """Return one sampled release in every round."""
        return (Planned("gradient", setting.rounds, rate=self.batch_rate),)

    async def start(self, x0: torch.Tensor, f: Oracle, rng: Draws) -> ServerState:
        """Start at the common point."""
        return ServerState(await self.begin(x0))

    async def round(self, s: ServerState, k: int, f: Oracle, rng: Draws) -> ServerState:
        """Take one step along the private minibatch gradient."""
        charge = Charge("gradient", rate=self.batch_rate)
        await Spend(k, (charge,))
        c = radius(self.clip_grad)
        g = f.clipped(s.x, Clip(c, self.clipping == "per_layer"), weights=await Subsample(k, charge))
        v = await Release(k, g, charge, c)
        return ServerState(s.x - self.eta * (v + f.regular_gradient(s.x)))


@dataclass
class MomentumState:
    """Two consecutive points and the estimate of the gradient."""

    x: Shared
    x_before: Shared
    v: Shared


@dataclass(frozen=True)
class DPSRM(PrivateAlgorithm):
    """Private SGD with recursive momentum: one minibatch corrects the estimate at the old and at the new point.

        v_r = (1 - a) v_{r-1} + sum_p w_p (1/(q n_p)) sum_{i in B_p} [ a clip(grad l(x_r, z_i), C1)
              + (1 - a) clip(grad l(x_r, z_i) - grad l(x_{r-1}, z_i), C2 |x_r - x_{r-1}|) ] + noise
        x_{r+1} = x_r - eta (v_r + l2 x_r)

    A record's term is at most `a C1 + (1 - a) C2 |x_r - x_{r-1}|` long (C1 in round 0), so that one release a round
    does. a = 1 is DP-SGD. Clipping of differences as in DIFF2; the original bounds them by assumption.

    Parameters: `eta`; `momentum` a; `clip_grad` C1; `clip_diff` C2; `batch_rate` q; `clipping` flat or per layer.

    Reference: Wang et al., *Efficient privacy-preserving stochastic nonconvex optimization*, arXiv 1910.13659 (DP-SRM),
    in the style of.
    """

    kind: ClassVar[str] = "dp_srm"
    paper: ClassVar[str] = "Wang et al., arXiv 1910.13659 (in the style of)"
    provenance: ClassVar[Provenance] = "reconstruction"
    radii: ClassVar[tuple[str, ...]] = ("clip_grad", "clip_diff")

    eta: Positive
    momentum: Rate = 0.1
    clip_grad: Positive | None = None
    clip_diff: Positive | None = None
    batch_rate: Rate = 0.1
    clipping: Literal["flat", "per_layer"] = "flat"

    def resolve(self, setting: Setting) -> Any:
        """Refuse what cannot be private."""
        return self.resolved(setting)

    def plan(self, setting: Setting) -> tuple[Planned, ...]:
        """Return one sampled release in every round."""
        return (Planned("gradient", setting.rounds, rate=self.batch_rate),)

    async def start(self, x0: torch.Tensor, f: Oracle, rng: Draws) -> MomentumState:
        """Start at the common point with nothing known."""
        x = await self.begin(x0)
        return MomentumState(x, x, torch.zeros_like(x))

    async def round(self, s: MomentumState, k: int, f: Oracle, rng: Draws) -> MomentumState:
        """Correct the estimate, then take one step along it."""
        charge, a = Charge("gradient", rate=self.batch_rate), 1.0 if k == 0 else self.momentum
        await Spend(k, (charge,))
        weights = await Subsample(k, charge)
        layered, at_most = self.clipping == "per_layer", a * radius(self.clip_grad)
        g = a * f.clipped(s.x, Clip(radius(self.clip_grad), layered), weights=weights)
        if a < 1:
            c2 = radius(self.clip_diff) * float(torch.linalg.vector_norm(s.x - s.x_before))
            at_most += (1 - a) * c2
            g = g + (1 - a) * f.clipped(s.x, Clip(c2, layered), before=s.x_before, weights=weights)
        v = (1 - a) * s.v + await Release(k, g, charge, at_most)
        return MomentumState(s.x - self.eta * (v + f.regular_gradient(s.x)), s.x, v)
