"""DIFF2 with bias-variance reduced local steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field

from fedsim.algorithms.algorithm import Constant, Draws, Oracle, Provenance, Setting
from fedsim.algorithms.diff2 import DIFF2GD, Positive, Share
from fedsim.algorithms.private import radius
from fedsim.algorithms.requests import Sum
from fedsim.errors import InputError
from fedsim.privacy.plan import Planned
from fedsim.privacy.requests import Charge, Perturb, Subsample


@dataclass(frozen=True)
class DIFF2BVRLSGD(DIFF2GD):
    """DIFF2 whose server step is K local steps of one worker, corrected by its private minibatch differences.

        y_0 = x, u_1 = v, y_1 = y_0 - eta u_1; for k = 2 .. K, at worker p = r mod P, each record drawn with rate q:
        u_k = u_{k-1} + (1/(q n_p)) sum_B clip(grad l(y_{k-1}) - grad l(y_{k-2}), C3 |y_{k-1} - y_{k-2}|) + noise
        y_k = y_{k-1} - eta u_k;   the worker's y_K becomes x

    (l2 y is added to u in every step.) Workers take turns, so a record pays for the rounds of its own worker only.
    Sums are divided by the expected batch q n_p, never by the batch's size, which is secret. Sampling is Poisson and
    needs the relation zero_out (or add_remove) and dp-accounting. K = 1 is DIFF2-GD.

    The paper's own minibatch constants were not available: sampling, C3 and its noise are a reconstruction.

    Parameters: those of diff2_gd, and `local_steps` K; `batch_rate` q; `clip_local` C3; `local_share` of the budget.

    Reference: Murata & Suzuki, ICML 2023, arXiv 2302.03884; routine: Murata & Suzuki, *Bias-variance reduced local
    SGD for less heterogeneous federated learning*, ICML 2021, arXiv 2102.03198.
    """

    kind: ClassVar[str] = "diff2_bvr_l_sgd"
    paper: ClassVar[str] = "Murata & Suzuki, ICML 2023"
    provenance: ClassVar[Provenance] = "reconstruction"
    radii: ClassVar[tuple[str, ...]] = ("clip_grad", "clip_diff")

    local_steps: Annotated[int, Field(ge=1, le=200)] = 4
    batch_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    clip_local: Positive | None = None
    local_share: Share = 0.2

    def resolve(self, setting: Setting) -> Any:
        """Fill in what is auto; refuse local steps without a radius."""
        if setting.privacy is not None and self.local_steps > 1 and self.clip_local is None:
            raise InputError("algorithm.clip_local: missing; without a radius no noise is large enough")
        return super().resolve(setting)

    def plan(self, setting: Setting) -> tuple[Planned, ...]:
        """Return refreshes, differences, and the local releases of the worker with the most turns."""
        kinds, part = super().plan(setting), self.local_part
        if self.local_steps == 1:
            return kinds
        rest = tuple(Planned(p.name, p.count, p.share * (1 - part), p.rate) for p in kinds)
        turns = -(-setting.rounds // setting.n)
        return (*rest, Planned("local", turns * (self.local_steps - 1), part, self.batch_rate))

    @property
    def local_part(self) -> float:
        """Share of the budget for local steps."""
        return self.local_share if self.local_steps > 1 else 0.0

    def local_charges(self, k: int, f: Oracle) -> tuple[Charge, ...]:
        """Return one charge to this round's worker for every local step but the first."""
        return tuple(Charge("local", step, self.batch_rate, k % f.n) for step in range(1, self.local_steps))

    async def routine(
        self, x: torch.Tensor, v: torch.Tensor, k: int, f: Oracle, rng: Draws
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this round's worker's last iterate, and a uniformly drawn one of its iterates."""
        eta, shape = float(self.eta), (len(f.nodes), x.shape[1])
        turn = np.arange(f.n) == k % f.n
        mine = torch.from_numpy(turn[f.nodes]).double()
        before, u = x.expand(shape), v.expand(shape)
        y = before - eta * (u + f.regular_gradient(before))
        drawn = 1 + int(rng.shared("local candidate").integers(self.local_steps))
        candidate = y
        for step, charge in enumerate(self.local_charges(k, f), start=2):
            weights = await Subsample(k, charge)
            moved = torch.linalg.vector_norm(y - before, dim=1, keepdim=True)
            c3 = radius(self.clip_local) * moved
            e = f.clipped(y, self._clip(c3), before=before, weights=weights, rows=turn)
            u = u + await Perturb(k, e, charge, c3)
            before, y = y, y - eta * (u + f.regular_gradient(y))
            candidate = y if step == drawn else candidate
        last = await Sum(y, weight=mine)
        if self.returned == "last" or drawn == self.local_steps:
            return last, last
        return last, await Sum(candidate, weight=mine)

    def constants(self, setting: Setting) -> tuple[Constant, ...]:
        """Return those of DIFF2-GD, and how often one worker is in local releases."""
        turns = -(-setting.rounds // setting.n)
        return (*super().constants(setting), Constant("turns", float(turns), "rounds of one worker, ceil(R / P)"))
