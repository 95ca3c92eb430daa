"""FZooS: federated optimisation of black boxes, with gradients from surrogates of everything asked so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field

from fedsim.algorithms.algorithm import Constant, Draws, Oracle, Provenance, Setting
from fedsim.algorithms.federated import ADAM, Federated, Mask
from fedsim.algorithms.optimisers import Optimiser
from fedsim.algorithms.requests import Mean, Rows, Shared, Sum
from fedsim.errors import InputError
from fedsim.surrogate.clients import Clients
from fedsim.surrogate.correction import best_length, theory_length
from fedsim.surrogate.features import Features, features
from fedsim.surrogate.history import History
from fedsim.surrogate.kernels import Kernel, Name
from fedsim.surrogate.length_scale import STEPS, best

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Scale = Annotated[float, Field(ge=1e-50, le=1e50)]  # its fourth power is a number, too
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Some = Annotated[int, Field(ge=0)]


@dataclass
class FZooSState:
    """What server and clients hold between rounds.

    Attributes:
        x: the server's point `[1, dim]`. seed: of the features. counts: int64 `[1, n]`, queries that each client keeps.
        here: `[1, n]`, who took part in the last round.
        points, values: `[rows, kept, dim]`, `[rows, kept]`, every client's queries, oldest first, padded with 0.
        delta: `[rows, M]`, the server's mean weights minus the client's own, when it last took part. own: its own,
            where `gamma: learned` needs them. scale, wide: `[rows]`, length scale of its surrogate, and of `delta`.
        raised: int64 `[rows]`, how often the noise of a surrogate had to grow tenfold to keep it positive definite.
    """

    x: Shared
    seed: Shared
    counts: Shared
    here: Shared
    points: Rows
    values: Rows
    delta: Rows
    own: Rows | None
    scale: Rows
    wide: Rows
    raised: Rows


@dataclass(frozen=True, kw_only=True)
class FZooS(Federated):
    """Local steps along the gradient of a Gaussian process over all that a client has asked, corrected by the mean of
    all clients' processes.

    In round r client i starts from the server's point and takes T local steps

        g = grad mu_i(x_i) + gamma (grad phi(x_i))' (w - w_i),    x_i <- step(x_i, g)

    where `mu_i` is the posterior mean over the `window` queries nearest to `x_i`; it asks `x_i` and, but in the last
    step, the `active` of `candidates` points around it where the gradient is least certain. The server averages the
    `x_i` to x; every client asks x and `server_active` points around it, writes its surrogate as M weights of random
    Fourier features `phi`, which all share by their seed, and the server averages these to w. No correction in round 1.

    Attributes:
        local_steps: T. optimiser: kind adam or sgd, with step; its memory starts anew in every round.
        gamma: 1/t, a constant, theory (Corollary 2; needs `heterogeneity`), or learned (Proposition 1's best length,
            with the server's surrogate in place of the true gradient; between 0 and 1).
        heterogeneity: the paper's G, a bound of `mean_i ||grad f_i - grad F||^2`, for theory.
        kernel: se or matern52. length_scale: fit (once per round, by the joint likelihood of the clients, who send that
            of 16 length scales along with their points), a number, or fit_each_call (every client on its own, always).
        noise: variance of the process's noise, relative to the squared range of the values in the window.
        noise_level: standard deviation of the queries' own noise, in their units, on top of it.
        window, feature_window: how many of the nearest queries make the surrogate, and the weights; null: all.
        memory: how many queries a client keeps, the newest; null: all.
        features: M. feature_kernel, feature_scale, feature_noise: null: those of the surrogate (with fit_each_call,
            which the clients do not share, a scale of 1).
        initial: points asked around the start, besides the start. candidates, active, radius: as above; the radius is
            of each coordinate. server_candidates, server_active: around the new point, within half the client's mean
            drift (within radius, if there is none: a client alone); with server_active 0 both uploads travel together.
            selection: trace (of the gradient's covariance), or random.
        participants, weights, clip, safeguard, repeat_query: as in fedzo.
        preset: reference_code sets what is not given to what the authors' code does: Matern-5/2 with a length scale
            fitted at each call, features of an SE kernel of length scale 1 without noise, random selection, no
            clipping, safeguard, x asked again when a round starts.

    Queries per client: `initial + 1` once, then `T + active (T - 1) + 1 + server_active` per round (6 T + 46). Numbers
    up and down per client and round: dim + M (and 16 with `length_scale: fit`), in two exchanges. A client that missed
    the last round is also sent x (dim down), and uses the correction of the last round that it knows.

    Reference: Shu, Lin, Dai & Low, *Federated zeroth-order optimization using trajectory-informed surrogate gradients*,
    arXiv 2308.04077, Algorithm 1, sections 4 and 5.

    Differences: the paper's 1/t stands, though at strong heterogeneity (C = 50) it makes no progress where 1 does. The
    paper selects by the spectral norm of the covariance, which is the same for all candidates while there are fewer
    queries than dimensions; here it is the trace. The authors' code scores by another formula that comes down to a
    random choice; fits length scales of surrogate and features apart; differentiates numerically, with a step that
    makes the gradient 0 in coordinates that are 0; asks x twice; does not count what its safeguard asks, nor restrict
    points to the box. Its preset here keeps those traits that can be matched, with exact gradients and true counts.
    """

    kind: ClassVar[str] = "fzoos"
    paper: ClassVar[str] = "Shu, Lin, Dai & Low, arXiv 2308.04077, Algorithm 1"
    provenance: ClassVar[Provenance] = "paper"
    reference: ClassVar[dict[str, Any]] = {
        "kernel": "matern52",
        "length_scale": "fit_each_call",
        "feature_kernel": "se",
        "feature_scale": 1.0,
        "feature_noise": 0.0,
        "selection": "random",
        "clip": False,
        "safeguard": True,
        "repeat_query": True,
    }

    optimiser: Optimiser = ADAM
    gamma: Weight | Literal["1/t", "theory", "learned"] = "1/t"
    heterogeneity: Positive | None = None
    kernel: Name = "se"
    length_scale: Scale | Literal["fit", "fit_each_call"] = "fit"
    noise: Positive = 1e-6
    noise_level: Weight = 0.0
    window: Count | None = 150
    feature_window: Count | None = 500
    memory: Count | None = None
    features: Count = 10_000
    feature_kernel: Name | None = None
    feature_scale: Scale | None = None
    feature_noise: Weight | None = None
    initial: Some = 10
    candidates: Count = 100
    active: Some = 5
    radius: Positive = 0.01
    server_candidates: Count = 200
    server_active: Some = 50
    selection: Literal["trace", "random"] = "trace"

    def resolve(self, setting: Setting) -> Self:
        """Apply the preset; refuse what does not fit together."""
        made = super().resolve(setting)
        for few, many in (("active", "candidates"), ("server_active", "server_candidates")):
            if getattr(made, few) > getattr(made, many):
                raise InputError(f"algorithm.{few}: {getattr(made, few)} of {getattr(made, many)} {many}; give fewer")
        if made.gamma == "theory" and made.heterogeneity is None:
            raise InputError(
                "algorithm.heterogeneity: missing; gamma: theory needs G, a bound of mean_i ||grad f_i - grad F||^2"
            )
        if made.memory is not None and made.memory < made.per_round:
            raise InputError(f"algorithm.memory: {made.memory} given, a round's {made.per_round} queries are the least")
        return made

    @property
    def per_round(self) -> int:
        """Queries of one client in one round, without the safeguard's."""
        at_server = 1 + self.server_active if self.server_active else 0
        return self.local_steps + self.active * (self.local_steps - 1) + at_server + self.repeat_query

    def constants(self, setting: Setting) -> tuple[Constant, ...]:
        """Return what a round costs a client."""
        sent = setting.dim + self.features + (STEPS if self.length_scale == "fit" else 0)
        queries = self.per_round + 2 * self.safeguard
        return (
            Constant("queries per client and round", queries, "T + active (T - 1) + 1 + server_active, and repeats"),
            Constant("numbers up per client and round", sent + 2 * self.safeguard, "dim + M, and 16 likelihoods"),
        )

    def measures(self, s: FZooSState, f: Oracle) -> dict[str, torch.Tensor]:
        """Return how often surrogates needed more noise to stay positive definite."""
        return {"noise_raised": s.raised.double()}

    async def start(self, x0: torch.Tensor, f: Oracle, rng: Draws) -> FZooSState:
        """Ask around the start; agree on a length scale."""
        x, rows, dim = await self.begin(x0, f), len(f.nodes), x0.shape[1]
        empty = x0.new_zeros((rows, 0, dim), dtype=torch.float64), x0.new_zeros((rows, 0), dtype=torch.float64)
        asks = self.initial + (not self.repeat_query)
        clients = Clients(f, None, *empty, np.zeros(f.n, np.int64), asks, None, self._history)
        centre = x.double().expand(rows, -1)
        design = self._around(centre, self.radius, rng.uniform("initial", self.initial * dim), f)
        clients.ask(design if self.repeat_query else torch.cat([centre[:, None], design], dim=1))
        scale = torch.ones(rows, dtype=torch.float64)
        if self.length_scale == "fit":
            joint = await Mean(self._likelihoods(clients, centre), self.weight(f))
            scale = torch.full_like(scale, best(joint[0], dim))
        elif not isinstance(self.length_scale, str):
            scale = torch.full_like(scale, self.length_scale)
        seed = torch.tensor([int(rng.shared("features").integers(2**62))])
        nothing = torch.zeros((rows, self.features), dtype=torch.float64)
        return FZooSState(
            x=x,
            seed=seed,
            counts=torch.from_numpy(clients.counts)[None],
            here=torch.ones((1, f.n), dtype=torch.bool),
            points=clients.points,
            values=clients.values,
            delta=nothing,
            own=nothing.clone() if self.gamma == "learned" else None,
            scale=scale,
            wide=torch.ones_like(scale) if self.feature_scale is None else torch.full_like(scale, self.feature_scale),
            raised=torch.zeros(rows, dtype=torch.int64),
        )

    async def round(self, s: FZooSState, k: int, f: Oracle, rng: Draws) -> FZooSState:
        """Local steps, the server's mean, queries around it, the mean of the weights."""
        mask = self.taking_part(f, rng)
        await self._catch_up(s, f, mask)
        counts = s.counts[0].numpy()
        clients = Clients(f, mask, s.points, s.values, counts, self.per_round, self.memory, self._history)
        for row, history in clients.histories.items():
            history.kernel = Kernel(self.kernel, float(s.scale[row]))
        x = self._local_steps(s, k, clients, f, rng)
        if self.server_active:
            new, scale = await self._average(x, s, clients, f, mask)
            self._ask_around(new, x, clients, f, rng)
            own, wide = self._weights(new.double().expand(len(x), -1), s, scale, clients)
            mean = await self.mean(own, f, mask)
        else:
            own, wide = self._weights(x, s, s.scale, clients)
            new, scale, mean = await self._average_all(x, own, s, clients, f, mask)
        return self._next(s, new, own, mean, scale, wide, mask, clients, f)

    async def _catch_up(self, s: FZooSState, f: Oracle, mask: Mask) -> None:
        """Charge what is sent down to those who take part but missed the last round: they do not know x."""
        late = None if mask is None else mask & ~s.here[0].numpy()
        if late is not None and late.any():
            nobody = torch.zeros(len(f.nodes), dtype=torch.float64)
            await Sum(s.x.expand(len(f.nodes), -1), nobody, late)

    def _local_steps(self, s: FZooSState, k: int, clients: Clients, f: Oracle, rng: Draws) -> torch.Tensor:
        """Return where the clients end, `[rows, dim]` float64."""
        x = s.x.double().expand(len(f.nodes), -1)
        moments = self.optimiser.start(x)
        if self.repeat_query:
            clients.ask(x[:, None])
        phi = self._features(s, x.shape[1]) if k > 0 and self.gamma != 0.0 else None
        for t in range(self.local_steps):
            x, moments = self.optimiser(x, self._directions(s, t, x, clients, phi), moments)
            x = f.inside(x) if self.clip else x
            clients.ask(x[:, None])
            if self.active and t + 1 < self.local_steps:
                clients.ask(self._chosen(x, self.radius, f"candidates {t}", clients, f, rng))
        return x

    def _directions(
        self, s: FZooSState, t: int, x: torch.Tensor, clients: Clients, phi: Features | None
    ) -> torch.Tensor:
        """Return the corrected gradients at `x [rows, dim]` of those who take part, 0 for the others."""

        def own(row: int, history: History) -> torch.Tensor:
            if self.length_scale == "fit_each_call":
                history.fit(self.kernel, x[row])
            return history.gradient(x[row])

        g = clients.per_row(own, x)
        if phi is None:
            return g
        rows = torch.from_numpy(clients.own)
        at, wide = x[rows], s.wide[rows]
        corrections = phi.gradients(at, wide, s.delta[rows])
        everybody = None
        if self.gamma == "learned":
            assert s.own is not None
            everybody = corrections + phi.gradients(at, wide, s.own[rows])
        for k, row in enumerate(clients.own):
            c, history = corrections[k], clients.histories[int(row)]
            drift = None if everybody is None else everybody[k] - g[row]
            g[row] += self._length(t, history, at[k], c, drift, s.counts.shape[1]) * c
        return g

    def _length(
        self, t: int, history: History, x: torch.Tensor, c: torch.Tensor, drift: torch.Tensor | None, clients: int
    ) -> float:
        """Return gamma of one client at local step t (from 0), whose correction is c; `drift` is for learned."""
        if self.gamma == "1/t":
            return 1.0 / (t + 1)
        if self.gamma == "theory":
            assert self.heterogeneity is not None
            return theory_length(history, x, self.heterogeneity, clients, self.features)
        if drift is not None:
            return best_length(drift, c)
        assert not isinstance(self.gamma, str)
        return float(self.gamma)

    async def _average(
        self, x: torch.Tensor, s: FZooSState, clients: Clients, f: Oracle, mask: Mask
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the server's next point, and every client's next length scale `[rows]`."""
        sent = torch.cat([x, self._likelihoods(clients, x)], dim=1).to(s.x.dtype)
        mean = await self.mean(sent, f, mask)
        dim = x.shape[1]
        return await self.guarded(mean[:, :dim].clone(), s.x, f, mask), self._scales(mean[0, dim:], s, dim)

    async def _average_all(
        self, x: torch.Tensor, own: torch.Tensor, s: FZooSState, clients: Clients, f: Oracle, mask: Mask
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return next point, length scales and mean weights from one exchange, where nothing is asked in between."""
        dim, M = x.shape[1], self.features
        sent = torch.cat([x, own, self._likelihoods(clients, x)], dim=1).to(s.x.dtype)
        mean = await self.mean(sent, f, mask)
        new = await self.guarded(mean[:, :dim].clone(), s.x, f, mask)
        return new, self._scales(mean[0, dim + M :], s, dim), mean[:, dim : dim + M]

    def _likelihoods(self, clients: Clients, x: torch.Tensor) -> torch.Tensor:
        """Return what the clients know of length scales `[rows, 16]`; `[rows, 0]` where none is fitted together."""
        sent = torch.zeros((len(x), STEPS if self.length_scale == "fit" else 0), dtype=torch.float64)
        if self.length_scale != "fit":
            return sent
        return clients.per_row(lambda row, history: history.likelihoods(self.kernel, x[row]), sent)

    def _scales(self, joint: torch.Tensor, s: FZooSState, dim: int) -> torch.Tensor:
        """Return the length scales `[rows]` of the clients that take part."""
        return torch.full_like(s.scale, best(joint.double(), dim)) if self.length_scale == "fit" else s.scale

    def _ask_around(self, new: torch.Tensor, x: torch.Tensor, clients: Clients, f: Oracle, rng: Draws) -> None:
        """Ask the server's point, and points around it within half of the client's mean drift."""
        centre = new.double().expand(len(x), -1)
        drift = 0.5 * (centre - x).abs().mean(dim=1)[:, None]
        drift = torch.where(drift > 0.0, drift, self.radius)  # one client alone is where the server is
        near = self._chosen(centre, drift, "server candidates", clients, f, rng)
        clients.ask(torch.cat([centre[:, None], near], dim=1))

    def _chosen(
        self, centre: torch.Tensor, radius: torch.Tensor | float, purpose: str, clients: Clients, f: Oracle, rng: Draws
    ) -> torch.Tensor:
        """Return the active queries around `centre [rows, dim]`: `[rows, count, dim]`."""
        at_server = purpose.startswith("server")
        many, keep = (self.server_candidates, self.server_active) if at_server else (self.candidates, self.active)
        many = many if self.selection == "trace" else keep
        drawn = self._around(centre, radius, rng.uniform(purpose, many * centre.shape[1]), f)
        return clients.most_uncertain(centre, drawn, keep) if self.selection == "trace" else drawn

    def _around(
        self, centre: torch.Tensor, radius: torch.Tensor | float, uniform: torch.Tensor, f: Oracle
    ) -> torch.Tensor:
        """Return points uniform in the cubes of half width `radius` around `centre [rows, dim]`."""
        offsets = (2.0 * uniform - 1.0) * radius
        points = centre[:, None] + offsets.view(len(centre), -1, centre.shape[1])
        return f.inside(points) if self.clip else points

    def _weights(
        self, centre: torch.Tensor, s: FZooSState, scale: torch.Tensor, clients: Clients
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights `[rows, M]` of the clients' queries around `centre`, and their features' length scale."""
        wide = scale if self.feature_scale is None else torch.full_like(scale, self.feature_scale)
        phi = self._features(s, centre.shape[1])

        def weights(row: int, history: History) -> torch.Tensor:
            points, values, spread, noise = history.normalised(centre[row], self.feature_window)
            noise = noise if self.feature_noise is None else self.feature_noise
            own, raised = phi.weights(points, values, float(wide[row]), noise)
            history.raised += raised
            return own * spread

        return clients.per_row(weights, s.delta).to(s.x.dtype), wide

    def _features(self, s: FZooSState, dim: int) -> Features:
        return features(self.feature_kernel or self.kernel, self.features, dim, int(s.seed))

    def _history(self, points: torch.Tensor, values: torch.Tensor, count: int) -> History:
        return History(points, values, count, self.window, self.noise, self.noise_level)

    def _next(
        self,
        s: FZooSState,
        new: torch.Tensor,
        own: torch.Tensor,
        mean: torch.Tensor,
        scale: torch.Tensor,
        wide: torch.Tensor,
        mask: Mask,
        clients: Clients,
        f: Oracle,
    ) -> FZooSState:
        """Return the next state: those who sat out keep what they knew."""
        took_part = torch.ones(f.n, dtype=torch.bool) if mask is None else torch.from_numpy(mask)
        mine = took_part[f.nodes]
        raised = clients.per_row(lambda _, h: torch.tensor(h.raised), torch.zeros_like(s.raised))
        return FZooSState(
            x=new,
            seed=s.seed,
            counts=torch.from_numpy(clients.counts)[None],
            here=took_part[None],
            points=clients.points,
            values=clients.values,
            delta=torch.where(mine[:, None], (mean - own).double(), s.delta),
            own=None if s.own is None else torch.where(mine[:, None], own.double(), s.own),
            scale=torch.where(mine, scale, s.scale),
            wide=torch.where(mine, wide, s.wide),
            raised=s.raised + raised,
        )
