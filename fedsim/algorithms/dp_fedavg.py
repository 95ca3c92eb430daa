"""Private federated averaging: one whole worker is what is protected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from fedsim.algorithms.algorithm import Draws, Oracle, Provenance, Sampling, Setting
from fedsim.algorithms.private import PrivateAlgorithm, ServerState, radius
from fedsim.errors import InputError
from fedsim.privacy.clipping import factors
from fedsim.privacy.plan import Planned
from fedsim.privacy.requests import Charge, Release, Spend, Subsample

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class DPFedAvg(PrivateAlgorithm):
    """User-level private federated averaging: clients' model changes are clipped, summed, and get noise.

        client p, drawn with rate q: y = x; K times y -= eta grad F_p(y); d_p = clip(y - x, S)
        x += server_eta ((1/q) sum_p w_p d_p + noise)

    F_p is the mean over the client's own records, w_p its weight in the objective (`problem.weights`: 1/P, or its share
    of the records). Denominators are those of the expected round, `q` times all weights. Sampling of clients (q < 1) is
    Poisson, and only a central server can keep it secret. Without radius and noise and with q = 1 this is FedAvg. A
    change that is not finite counts as 0.

    Parameters: `eta`, `local_steps` K, `batch` of the local steps; `clip_model` S; `client_rate` q; `server_eta`.

    Reference: McMahan, Ramage, Talwar & Zhang, *Learning differentially private recurrent language models*, ICLR 2018.
    """

    kind: ClassVar[str] = "dp_fedavg"
    paper: ClassVar[str] = "McMahan et al., ICLR 2018"
    provenance: ClassVar[Provenance] = "paper"
    unit: ClassVar = "user"
    radii: ClassVar[tuple[str, ...]] = ("clip_model",)

    eta: Positive
    local_steps: Annotated[int, Field(ge=1)] = 1
    clip_model: Positive | None = None
    client_rate: Rate = 1.0
    server_eta: Positive = 1.0
    batch: Sampling | None = None

    def resolve(self, setting: Setting) -> Any:
        """Refuse what cannot be private.

        Raises:
            InputError: sampled clients under a trust model that does not hide them.
        """
        privacy = setting.privacy
        if privacy is not None and privacy.trust != "central" and self.client_rate < 1:
            raise InputError(
                f"algorithm.client_rate: {self.client_rate:g} given with trust {privacy.trust!r}; who takes part is"
                " secret from a central server's observers only, and a share of the noise must come from everybody:"
                " use client_rate: 1, or trust: central"
            )
        return self.resolved(setting)

    def plan(self, setting: Setting) -> tuple[Planned, ...]:
        """Return one release of model changes in every round."""
        return (Planned("model", setting.rounds, rate=self.client_rate),)

    async def start(self, x0: torch.Tensor, f: Oracle, rng: Draws) -> ServerState:
        """Start at the common point."""
        return ServerState(await self.begin(x0))

    async def round(self, s: ServerState, k: int, f: Oracle, rng: Draws) -> ServerState:
        """Let the drawn clients take their steps, then move by the private mean of their changes."""
        charge = Charge("model", rate=self.client_rate)
        await Spend(k, (charge,))
        drawn = (await Subsample(k, charge, "workers")) if self.client_rate < 1 else None
        y = s.x.expand(len(f.nodes), -1)
        for _ in range(self.local_steps):
            y = y - self.eta * f.gradient(y, self.batch, rng, rows=drawn) / f.scale
        change, most = y - s.x, radius(self.clip_model)
        if self.clip_model is not None:
            change = _clipped(change, most)
        return ServerState(s.x + self.server_eta * await Release(k, change / self.client_rate, charge, most, drawn))


def _clipped(change: torch.Tensor, most: float) -> torch.Tensor:
    """Return the changes `[rows, dim]`, none longer than `most`; those whose square the type cannot hold become 0."""
    squares = torch.linalg.vector_norm(change, dim=1, keepdim=True, dtype=torch.float64).square()
    usable = squares < torch.finfo(change.dtype).max
    short = factors(torch.where(usable, squares, 0.0), most, False, change.dtype).to(change.dtype)
    return torch.where(usable, change, 0.0) * short
