"""Plays of a mechanism on canaries, and what an observer of all its releases hears of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.privacy.canaries import Canaries
from fedsim.privacy.guard import Guard
from fedsim.privacy.noise import Noise
from fedsim.privacy.requests import Perturb, Release

if TYPE_CHECKING:
    from fedsim.prepare import Prepared
    from fedsim.privacy.section import Privacy

PER_WORKER, NOBODY = 40, 40  # records of a worker that are canaries; coordinates that no record enters
DIFFERENCES = ("difference", "local")  # releases of clipped differences of gradients


@dataclass
class Tally:
    """Sums over releases, per canary `[m]`: weight times what was heard in units of its noise, and weight squared.

    A weight is how far a canary moves a release, in the same units: the rate of sampling over the multiplier.
    """

    sum: NDArray[np.float64]
    square: NDArray[np.float64]

    @classmethod
    def joined(cls, parts: Iterable[Tally]) -> Tally:
        """Return the tallies of several plays as one."""
        every = list(parts)
        return cls(np.concatenate([p.sum for p in every]), np.concatenate([p.square for p in every]))

    def add(self, canaries: NDArray[np.bool_], weight: float, heard: NDArray[np.float64]) -> None:
        """Add one release that some of the canaries are in."""
        self.sum[canaries] += weight * heard[canaries]
        self.square[canaries] += weight**2


@dataclass
class Noises:
    """Sums over what releases hold in coordinates that no record enters, in units of the noise that they should have.

    Attributes:
        power: by kind of release, sum of squares and how many numbers.
        rounds: sum of squares of sums over all releases of a coordinate, and of the squares of their numbers of terms.
        coordinates: the same of sums over all coordinates of a release.
        workers: sum of products of two workers' noises in one release, and how many.
    """

    power: dict[str, tuple[float, int]] = field(default_factory=dict)
    rounds: tuple[float, int] = (0.0, 0)
    coordinates: tuple[float, int] = (0.0, 0)
    workers: tuple[float, int] = (0.0, 0)

    def add(self, kind: str, heard: NDArray[np.float64]) -> None:
        """Add one release, `heard [rows, coordinates]`: one row, or one of every worker."""
        self.power[kind] = _plus(self.power.get(kind, (0.0, 0)), (float(np.square(heard).sum()), heard.size))
        sums = heard.sum(axis=1)
        self.coordinates = _plus(self.coordinates, (float(sums @ sums), len(sums) * heard.shape[1] ** 2))
        if len(heard) > 1:
            products = heard[1:] * heard[:-1]
            self.workers = _plus(self.workers, (float(products.sum()), products.size))

    def __iadd__(self, other: Noises) -> Noises:
        for kind, own in other.power.items():
            self.power[kind] = _plus(self.power.get(kind, (0.0, 0)), own)
        for name in ("rounds", "coordinates", "workers"):
            setattr(self, name, _plus(getattr(self, name), getattr(other, name)))
        return self

    def deviations(self) -> dict[str, tuple[float, float]]:
        """Return the standard deviation by kind of release, 1 where it is right, with its standard error."""
        return {kind: (math.sqrt(square / n), 1 / math.sqrt(2 * n)) for kind, (square, n) in self.power.items()}

    def correlations(self) -> dict[str, tuple[float, float]]:
        """Return how noises go together, 0 where they are independent, with standard errors.

        Of rounds and coordinates: variance of a sum over sum of the variances, minus 1; of workers: correlation.
        """
        whole, numbers = (sum(part[place] for part in self.power.values()) for place in (0, 1))
        if not whole:
            return {}
        found = {
            name: (square / whole - 1, math.sqrt(2 * terms) / numbers)
            for name, (square, terms) in (("rounds", self.rounds), ("coordinates", self.coordinates))
        }
        product, pairs = self.workers
        return found | ({"workers": (product / pairs / (whole / numbers), pairs**-0.5)} if pairs else {})


def _plus(one: tuple[float, int], other: tuple[float, int]) -> tuple[float, int]:
    return one[0] + other[0], one[1] + other[1]


class Silent(Noise):
    """No noise at all, and the draws of a seed: what is heard is how far the canaries move the releases."""

    def common_normal(self, purpose: str, step: int, count: int) -> NDArray[np.float64]:
        """Return zeros `[1, count]`."""
        return np.zeros((1, count))

    def normal(self, purpose: str, step: int, count: int) -> NDArray[np.float64]:
        """Return zeros `[rows, count]`."""
        return np.zeros((self._layout.rows, count))


class Play:
    """One play of the mechanism, with canaries on random sides; an observer listens to every release.

    Args:
        group: of records, the `first` or the `last` of their workers are canaries; `all`: workers are.
        silent: no noise is added, and all canaries are in their first form.

    Attributes:
        upper: `[m]`, which canaries are in their first form. tallies: of releases without sampling, and with.
        reach: by kind of release, the most that a canary moved one, over what its noise is made for.
        noises: what releases hold in coordinates that no record enters.
        claimed: epsilon of all releases, by the ledger.
    """

    def __init__(
        self, p: Prepared, z: dict[str, float], group: str, seed: int, rounds: int, silent: bool = False
    ) -> None:
        from fedsim.engine.layout import Layout
        from fedsim.engine.rounds import Rounds

        privacy = p.setting.privacy
        assert privacy is not None
        self._owners, self._local, self._z = _owners(p, privacy), privacy.trust == "local", z
        self._m, self._factor = len(self._owners), privacy.factor
        self.upper = np.random.default_rng(seed).random(self._m) < (1.0 if silent else 0.5)
        side = np.where(self.upper, 1.0, -1.0 if privacy.relation == "replace_one" else 0.0)
        owners = np.concatenate([self._owners, np.full(NOBODY, -1)])
        self._problem = Canaries(
            p.problem.records, p.problem.shares, np.concatenate([side, np.zeros(NOBODY)]), owners, group == "last"
        )
        layout = Layout(p.topology)
        self._guard = Guard(privacy, z, self._problem, layout, seed)
        if silent:
            self._guard.noise = Silent(layout, seed)
        self._guard.taps.append(self._listen)
        self._rows = p.topology.position[self._owners]
        self.tallies = {kind: Tally(np.zeros(self._m), np.zeros(self._m)) for kind in ("plain", "sampled")}
        self.reach: dict[str, float] = {}
        self.noises, self._sums = Noises(), np.zeros((1 + p.topology.n, NOBODY))  # of the server, and of every worker
        self._terms = np.zeros(1 + p.topology.n, np.int64)
        x0 = torch.zeros(layout.rows, self._problem.dim, dtype=torch.float64)
        algorithm: Any = p.algorithm
        player = Rounds(algorithm, self._problem, layout, {}, x0, seed, guard=self._guard)
        player.start()
        player.advance(rounds)
        assert self._guard.ledger is not None
        self.claimed = self._guard.ledger.epsilon()
        self.noises.rounds = float(np.square(self._sums).sum()), NOBODY * int(self._terms @ self._terms)

    def _listen(self, request: Release | Perturb, seen: NDArray[np.float64]) -> None:
        """Add what one release says of every canary: its value along the canary's sign, over its noise."""
        charge, guard = request.charge, self._guard
        rows, canaries, heard_rows = self._rows, np.ones(self._m, bool), np.arange(len(seen))
        if isinstance(request, Perturb):
            noise, canaries = guard.row_deviations(charge, request.radius), self._owners == charge.worker
            heard_rows = np.flatnonzero(noise)
        elif self._local:
            noise = guard.message_deviations(charge, request.radius)
        else:
            noise, rows = np.array([guard.deviation(charge, request.radius)]), np.zeros_like(self._rows)
        unit = np.where(noise > 0, noise, 1.0)
        sign: Any = -1.0 if charge.name == "model" else 1.0  # models move against gradients
        if charge.name in DIFFERENCES:
            sign = self._problem.sign.numpy()[: self._m]
        heard = sign * seen[rows, np.arange(self._m)] / unit[rows]
        tally = self.tallies["sampled" if charge.rate < 1 else "plain"]
        tally.add(canaries, charge.rate / self._z[charge.name], heard)
        most = float(np.abs(heard[canaries]).max(initial=0.0)) * self._factor * self._z[charge.name]
        self.reach[charge.name] = max(self.reach.get(charge.name, 0.0), most if math.isfinite(most) else math.inf)
        if noise.any():
            quiet = seen[heard_rows, self._m :] / unit[heard_rows, None]
            self.noises.add(charge.name, quiet)
            whose = 1 + heard_rows if isinstance(request, Perturb) or self._local else heard_rows
            self._sums[whose] += quiet
            self._terms[whose] += 1


def _owners(p: Prepared, privacy: Privacy) -> NDArray[np.int64]:
    """Return the worker of each canary: some records of every worker whose records weigh most, or such workers."""
    by_user = privacy.unit == "user"
    weights = p.problem.shares / (1 if by_user else p.problem.records)
    if privacy.trust == "local" and not by_user:
        weights = np.ones(p.problem.n)
    worst = np.flatnonzero(weights >= weights.max() * (1 - 1e-9))
    each = 1 if by_user else np.minimum(np.maximum(p.problem.records[worst] // 2, 1), PER_WORKER)
    return np.repeat(worst, each)
