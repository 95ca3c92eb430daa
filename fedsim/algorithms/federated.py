"""Federated averaging with any gradient estimator: FedZO and its kin on values, FedAvg and its kin on gradients.

All follow one template (FZooS, arXiv 2308.04077, section 3): a client takes T local steps along
`g_local + correction`, the server averages where they ended.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from fedsim.algorithms.algorithm import Constant, Draws, Oracle, Provenance, Sampling, Setting, SyncAlgorithm
from fedsim.algorithms.estimators import Estimator, Exact, FiniteDifferences
from fedsim.algorithms.optimisers import SGD, Adam, Optimiser
from fedsim.algorithms.requests import Mean, Rows, Shared
from fedsim.errors import InputError

Mask = NDArray[np.bool_] | None
Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Preset = Literal["default", "reference_code"]
GAUSSIAN, EXACT, ADAM = FiniteDifferences("gaussian"), Exact("exact"), Adam("adam")


@dataclass
class ServerState:
    """The server's point."""

    x: Shared


@dataclass
class ControlState:
    """The server's point; each client's control variate and their mean (SCAFFOLD)."""

    x: Shared
    own: Rows
    mean: Shared


@dataclass(frozen=True, kw_only=True)
class Federated(SyncAlgorithm):
    """What all federated methods share: who takes part, how the server averages, which presets there are."""

    reference: ClassVar[dict[str, Any]] = {}  # what `preset: reference_code` sets

    local_steps: Count = 10
    participants: Count | None = None
    weights: list[Weight] | None = None
    clip: bool = True
    safeguard: bool = False
    repeat_query: bool = False
    preset: Preset = "default"
    _common: bool = field(default=True, init=False, repr=False)

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, section: Any) -> Any:
        """Put the preset's values where a scenario gives none; `resolve` could not tell a given default from none."""
        if isinstance(section, dict) and section.get("preset") == "reference_code":
            return {**cls.reference, **section, "preset": "default"}
        return section

    def resolve(self, setting: Setting) -> Self:
        """Apply the preset to what equals its default; refuse participants and weights that do not fit."""
        if self.participants is not None and self.participants > setting.n:
            raise InputError(f"algorithm.participants: {self.participants} of {setting.n} clients; give at most all")
        if self.weights is not None and (len(self.weights) != setting.n or not sum(self.weights) > 0):
            raise InputError(
                f"algorithm.weights: {len(self.weights)} numbers given; one for each of the {setting.n} clients, not"
                " all 0, is needed"
            )
        weightless = (self.weights or []).count(0.0)
        if self.participants is not None and weightless >= self.participants:
            raise InputError(
                f"algorithm.participants: {self.participants} given, but {weightless} clients weigh 0, and these alone"
                f" have no mean; at least {weightless + 1} must take part"
            )
        untouched = {f.name for f in fields(self) if f.init and getattr(self, f.name) == f.default}
        chosen = self.reference if self.preset == "reference_code" else {}
        kept = {name: value for name, value in chosen.items() if name in untouched}
        return self.derived(_common=setting.common_start, **kept)

    def output(self, s: Any, f: Oracle) -> torch.Tensor:
        """Return the server's point for every client."""
        return s.x.expand(len(f.nodes), -1)

    async def begin(self, x0: torch.Tensor, f: Oracle) -> torch.Tensor:
        """Return the server's first point `[1, dim]`: the common start, or the mean of the clients' own."""
        return x0[:1].clone() if self._common else await Mean(x0, self.weight(f))

    def taking_part(self, f: Oracle, rng: Draws) -> Mask:
        """Return who takes part in this round, a mask by node number from a shared draw; None: everybody."""
        if self.participants is None or self.participants == f.n:
            return None
        mask = np.zeros(f.n, dtype=bool)
        mask[rng.shared("participants").permutation(f.n)[: self.participants]] = True
        return mask

    def weight(self, f: Oracle) -> torch.Tensor | None:
        """Return the clients' weights `[rows]`, or None: equal."""
        return None if self.weights is None else torch.tensor(self.weights, dtype=torch.float64)[f.nodes]

    def share(self, mask: Mask) -> float:
        """Return the weight of those who take part, of the weight of all."""
        if mask is None:
            return 1.0
        weights = np.ones(len(mask)) if self.weights is None else np.asarray(self.weights)
        return float(weights[mask].sum() / weights.sum())

    async def mean(self, v: torch.Tensor, f: Oracle, mask: Mask) -> torch.Tensor:
        """Return the server's mean `[1, ...]` over those who take part."""
        return await Mean(v, self.weight(f), mask)

    async def guarded(self, new: torch.Tensor, old: torch.Tensor, f: Oracle, mask: Mask) -> torch.Tensor:
        """Return the new point, or with the safeguard the old one where the clients' values say that it was better.

        Every client asks both points and sends both values: two queries and two numbers each, counted.
        """
        if not self.safeguard:
            return new
        both = torch.stack([new[0], old[0]])[None].expand(len(f.nodes), -1, -1)
        values = await self.mean(f.query(both, mask), f, mask)
        return new if float(values[0, 0]) < float(values[0, 1]) else old


@dataclass(frozen=True, kw_only=True)
class Averaging(Federated):
    """Local steps along an estimate and a correction, then a mean: the template of every method in this file."""

    reference: ClassVar[dict[str, Any]] = {
        "estimator": FiniteDifferences("orthonormal"),
        "clip": False,
        "safeguard": True,
        "repeat_query": True,
    }

    estimator: Estimator
    optimiser: Optimiser

    def resolve(self, setting: Setting) -> Self:
        """Apply the preset; refuse more directions than dimensions."""
        made = super().resolve(setting)
        made.estimator.check(setting.dim)
        return made

    @property
    def estimates(self) -> int:
        """Gradient estimates of one client in one round."""
        return self.local_steps

    @property
    def vectors(self) -> int:
        """How many times dim numbers a client sends in one round."""
        return 1

    def constants(self, setting: Setting) -> tuple[Constant, ...]:
        """Return what a round costs a client."""
        each, checks = self.estimator.queries, 2 * self.safeguard
        queries = each * self.estimates + self.repeat_query + checks
        costs = (
            Constant("gradients per client and round", 0 if each else self.estimates, "T, and 1 with option 1"),
            Constant("queries per client and round", queries, "(Q + 1) T, and Q + 1 with option 1, repeats, safeguard"),
            Constant("numbers up per client and round", self.vectors * setting.dim + checks, "vectors, safeguard"),
        )
        return tuple(cost for cost in costs if cost.value)

    def estimate(self, f: Oracle, x: torch.Tensor, rng: Draws, purpose: str, mask: Mask) -> torch.Tensor:
        """Return the local gradient estimates `[rows, dim]`."""
        return self.estimator(f, x, rng, purpose, mask)

    def pull(self, x: torch.Tensor, server: torch.Tensor, k: int) -> torch.Tensor | None:
        """Return what is added to the estimate in round k because of where x is; None: nothing."""
        return None

    def local(
        self, server: torch.Tensor, correction: torch.Tensor | None, k: int, f: Oracle, rng: Draws, mask: Mask
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where the clients end and the mean of their uncorrected estimates, `[rows, dim]` each."""
        x = server.expand(len(f.nodes), -1)
        moments, total = self.optimiser.start(x), torch.zeros_like(x)
        if self.repeat_query:
            f.query(x[:, None].double(), mask)
        for t in range(self.local_steps):
            g = self.estimate(f, x, rng, f"directions {t}", mask)
            total = total + g
            for extra in (correction, self.pull(x, server, k)):
                g = g if extra is None else g + extra
            x, moments = self.optimiser(x, g, moments)
            x = f.inside(x) if self.clip else x
        return x, total / self.local_steps

    async def start(self, x0: torch.Tensor, f: Oracle, rng: Draws) -> Any:
        """Start from the server's point."""
        return ServerState(await self.begin(x0, f))

    async def round(self, s: Any, k: int, f: Oracle, rng: Draws) -> Any:
        """Local steps, then the server's mean."""
        mask = self.taking_part(f, rng)
        x, _ = self.local(s.x, None, k, f, rng, mask)
        return ServerState(await self.guarded(await self.mean(x, f, mask), s.x, f, mask))


@dataclass(frozen=True, kw_only=True)
class FedZO(Averaging):
    """Federated averaging on function values: T local steps along finite differences, then the server's mean.

        x_i <- step(x_i, Delta_i(x_i)),  t = 1..T;   x = mean_i x_i

    Attributes:
        local_steps: T. estimator: kind gaussian, sphere, coordinate, orthonormal or exact; directions, smoothing.
        optimiser: kind adam or sgd, with step; its memory starts anew in every round.
        participants: how many clients, drawn anew, take part in a round; null: all. weights: of the server's mean.
        clip: keep iterates inside the problem's box. safeguard: keep the old point where clients' values are not lower
            at the new one, at two counted queries and two numbers per client.
        repeat_query: ask for the round's starting point once more and use the answer for nothing, as the code does.
        preset: reference_code sets what is not given to what the FZooS authors' code does: orthonormal directions, no
            clipping, safeguard, repeated query.

    Queries per client and round: `T (Q + 1)`. Numbers up and down: dim each, one exchange.

    Reference: Fang et al., *Communication-efficient stochastic zeroth-order optimization for federated learning*, 2022;
    as the baseline of Shu, Lin, Dai & Low, arXiv 2308.04077.

    Differences from the FZooS authors' code: directions are Gaussian and the estimate unbiased; there they are
    orthonormal and its mean is the gradient divided by dim, which Adam hides except beside a term of another scale.
    There the safeguard looks at exact values that are not counted.
    """

    kind: ClassVar[str] = "fedzo"
    paper: ClassVar[str] = "Fang et al., 2022; as in arXiv 2308.04077"
    provenance: ClassVar[Provenance] = "paper"

    estimator: Estimator = GAUSSIAN
    optimiser: Optimiser = ADAM


@dataclass(frozen=True, kw_only=True)
class FedProxZO(FedZO):
    """FedZO with a proximal pull to the server's point: `Delta_i(x_i) + gamma (x_i - x)`, but in round 1.

    Attributes:
        gamma: strength of the pull. The others: as in fedzo.

    Reference: FedProx (Li et al., MLSys 2020) on function values, as in Shu, Lin, Dai & Low, arXiv 2308.04077.

    With the authors' orthonormal directions the estimate is the gradient divided by dim, so that gamma = 1 is some
    forty times the signal at dim = 300: that is why FedProx looks poor there (`preset: reference_code`).
    """

    kind: ClassVar[str] = "fedprox_zo"
    paper: ClassVar[str] = "Li et al., MLSys 2020; as in arXiv 2308.04077"
    gamma: Weight = 1.0

    def pull(self, x: torch.Tensor, server: torch.Tensor, k: int) -> torch.Tensor | None:
        """Return `gamma (x_i - x)`, but in round 1."""
        return self.gamma * (x - server) if k > 0 else None


@dataclass(frozen=True, kw_only=True)
class Controlled(Averaging):
    """SCAFFOLD's template: the correction is `gamma (mean_j c_j - c_i)`, frozen during a round; none in round 1."""

    option: Literal[1, 2] = 2
    gamma: Weight = 1.0

    @property
    def estimates(self) -> int:
        """Gradient estimates of one client in one round, from the second on."""
        return self.local_steps + (self.option == 1)

    @property
    def vectors(self) -> int:
        """A point and a control variate."""
        return 2

    async def start(self, x0: torch.Tensor, f: Oracle, rng: Draws) -> ControlState:
        """Start with control variates of 0."""
        return ControlState(await self.begin(x0, f), torch.zeros_like(x0), torch.zeros_like(x0[:1]))

    async def round(self, s: ControlState, k: int, f: Oracle, rng: Draws) -> ControlState:
        """Corrected local steps, then the server's means."""
        mask = self.taking_part(f, rng)
        if self.option == 1:
            return await self._fresh(s, k, f, rng, mask)
        x, own = self.local(s.x, self.gamma * (s.mean - s.own), k, f, rng, mask)
        dim = x.shape[1]
        if mask is None:
            new, mean = (await self.mean(torch.cat([x, own], dim=1), f, mask)).split(dim, dim=1)
        else:
            own = torch.where(torch.from_numpy(mask[f.nodes]).to(own.device)[:, None], own, s.own)
            new, change = (await self.mean(torch.cat([x, own - s.own], dim=1), f, mask)).split(dim, dim=1)
            mean = s.mean + self.share(mask) * change
        return ControlState(await self.guarded(new, s.x, f, mask), own, mean.clone())

    async def _fresh(self, s: ControlState, k: int, f: Oracle, rng: Draws, mask: Mask) -> ControlState:
        """Return the next state with control variates taken anew at the server's point."""
        correction = None
        own, mean = s.own, s.mean
        if k > 0:
            own = self.estimate(f, s.x.expand(len(f.nodes), -1), rng, "control", mask)
            mean = await self.mean(own, f, mask)
            correction = self.gamma * (mean - own)
        x, _ = self.local(s.x, correction, k, f, rng, mask)
        return ControlState(await self.guarded(await self.mean(x, f, mask), s.x, f, mask), own, mean)


@dataclass(frozen=True, kw_only=True)
class ScaffoldZO(Controlled):
    """SCAFFOLD on function values: `Delta_i(x_i) + gamma (mean_j c_j - c_i)`.

    Attributes:
        option: 1: c_i is an estimate at the server's point, taken and exchanged at the start of every round (Q + 1
            queries and a second exchange); 2: c_i is the mean of the client's own estimates of its last round, sent
            along with its point. gamma: 1. The others: as in fedzo.

    Numbers up and down per client and round: 2 dim. In round 1 there is no correction. A client that sits out keeps its
    c_i, and the server's mean keeps its share of it, as in SCAFFOLD.

    Reference: Karimireddy et al., *SCAFFOLD*, ICML 2020, on function values as in Shu, Lin, Dai & Low,
    arXiv 2308.04077, types I and II.

    Differences: the authors' code does not count the queries of option 1's exchange. SCAFFOLD's own option II takes
    (x - y_i) / (T eta), which is the mean estimate for plain SGD only.
    """

    kind: ClassVar[str] = "scaffold_zo"
    paper: ClassVar[str] = "Karimireddy et al., ICML 2020; as in arXiv 2308.04077"
    provenance: ClassVar[Provenance] = "paper"

    estimator: Estimator = GAUSSIAN
    optimiser: Optimiser = ADAM


@dataclass(frozen=True, kw_only=True)
class FiniteDifferenceSGD(FedZO):
    """One finite-difference gradient per client and round, one step of the server along their mean.

    Attributes:
        step: of the server. The others: as in fedzo.
    """

    kind: ClassVar[str] = "fd_sgd"
    paper: ClassVar[str] = "plain SGD on two-point estimates (Nesterov & Spokoiny, 2017)"
    step: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    local_steps: Count = field(default=1, init=False)
    optimiser: Optimiser = field(default=ADAM, init=False)

    def resolve(self, setting: Setting) -> Self:
        """Put the step in."""
        return super().resolve(setting).derived(optimiser=SGD("sgd", self.step))


@dataclass(frozen=True, kw_only=True)
class OnGradients(Averaging):
    """Base of the methods on the problem's own gradients."""

    reference: ClassVar[dict[str, Any]] = {}

    estimator: Estimator = field(default=EXACT, init=False)
    batch: Sampling | None = None
    repeat_query: bool = field(default=False, init=False)
    preset: Preset = field(default="default", init=False)

    def estimate(self, f: Oracle, x: torch.Tensor, rng: Draws, purpose: str, mask: Mask) -> torch.Tensor:
        """Return the problem's gradients, exact or on a batch."""
        return f.gradient(x, self.batch, rng, mask)

    def resolve(self, setting: Setting) -> Self:
        """Refuse black boxes."""
        setting.require(self.kind, "gradient")
        return super().resolve(setting)


@dataclass(frozen=True, kw_only=True)
class FedAvg(OnGradients):
    """Federated averaging: T local steps on the client's own gradients, then the server's mean.

    Attributes:
        local_steps: T. optimiser: kind sgd or adam, with step. batch: records of a stochastic gradient; null: all.
        participants, weights, clip, safeguard: as in fedzo.

    Reference: McMahan et al., *Communication-efficient learning of deep networks from decentralized data*,
    AISTATS 2017, Algorithm 1, with equal weights unless `weights` says otherwise.
    """

    kind: ClassVar[str] = "fedavg"
    paper: ClassVar[str] = "McMahan et al., AISTATS 2017, Algorithm 1"
    provenance: ClassVar[Provenance] = "paper"


@dataclass(frozen=True, kw_only=True)
class FedProx(OnGradients):
    """FedAvg with a proximal pull to the server's point: gradients of `f_i(x_i) + (gamma/2) ||x_i - x||^2`.

    Attributes:
        gamma: strength of the pull (the paper's mu). The others: as in fedavg.

    Reference: Li et al., *Federated optimization in heterogeneous networks*, MLSys 2020, Algorithm 2.
    """

    kind: ClassVar[str] = "fedprox"
    paper: ClassVar[str] = "Li et al., MLSys 2020, Algorithm 2"
    provenance: ClassVar[Provenance] = "paper"
    gamma: Weight = 1.0

    def pull(self, x: torch.Tensor, server: torch.Tensor, k: int) -> torch.Tensor:
        """Return `gamma (x_i - x)`."""
        return self.gamma * (x - server)


@dataclass(frozen=True, kw_only=True)
class Scaffold(OnGradients, Controlled):
    """FedAvg with control variates: `grad f_i(x_i) + gamma (mean_j c_j - c_i)`.

    Attributes:
        option: 1: c_i is the gradient at the server's point; 2: the mean of the gradients of the client's last round.
        gamma: 1. The others: as in fedavg.

    Reference: Karimireddy et al., *SCAFFOLD: Stochastic controlled averaging for federated learning*, ICML 2020,
    Algorithm 1 with server step 1. Option 1 takes c_i at this round's point and exchanges it before the local steps
    (2 exchanges), where the paper uses the last one's; option 2 equals the paper's (x - y_i) / (T eta) for SGD.
    """

    kind: ClassVar[str] = "scaffold"
    paper: ClassVar[str] = "Karimireddy et al., ICML 2020, Algorithm 1"
    provenance: ClassVar[Provenance] = "paper"
