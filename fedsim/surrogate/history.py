"""What one client has asked so far, and the surrogate of the part of it that is nearest to a point."""

from __future__ import annotations

import torch

from fedsim.surrogate.kernels import Kernel, Name
from fedsim.surrogate.length_scale import STEPS, best, likelihoods
from fedsim.surrogate.posterior import Posterior


class History:
    """A client's queries during one round, in the order in which they were made.

    Args:
        points, values: `[capacity, dim]`, `[capacity]`, written to by `add`; the first `count` are filled.
        window: how many of the nearest queries make the surrogate; None: all.
        noise: variance of the normalised values' noise. noise_level: standard deviation of the values' own noise.

    Attributes:
        kernel: of the surrogate; set it before the first gradient. raised: how often the noise had to grow tenfold.
        spread: range of the values in the window of the last gradient. noise: variance of their noise once normalised.
    """

    def __init__(
        self,
        points: torch.Tensor,
        values: torch.Tensor,
        count: int,
        window: int | None,
        noise: float,
        noise_level: float = 0.0,
    ) -> None:
        self.points, self.values, self.count = points, values, count
        self.kernel = Kernel("se", 1.0)
        self.raised = 0
        self._window, self._noise, self._level = window, noise, noise_level
        self._posterior: Posterior | None = None
        self._chosen, self.spread = torch.empty(0, dtype=torch.int64), 0.0

    @property
    def noise(self) -> float:
        """Variance of the noise of normalised values."""
        return self._noise_of(self.spread)

    def _noise_of(self, spread: float) -> float:
        return self._noise + (self._level / (spread or 1.0)) ** 2

    def add(self, points: torch.Tensor, values: torch.Tensor) -> None:
        """Append queries `[k, dim]` and their answers `[k]`."""
        end = self.count + len(values)
        self.points[self.count : end], self.values[self.count : end] = points, values
        self.count = end

    def nearest(self, x: torch.Tensor, count: int | None) -> torch.Tensor:
        """Return the places of the `count` queries nearest to `x [dim]`, ascending; ties go to the older one."""
        if count is None or self.count <= count:
            return torch.arange(self.count)
        difference = self.points[: self.count] - x
        squared = torch.linalg.vecdot(difference, difference)
        return squared.sort(stable=True).indices[:count].sort().values

    def gradient(self, x: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the posterior mean at `x [dim]`, in the values' units; 0 where these are equal."""
        chosen = self.nearest(x, self._window)
        values, low, spread = self._normalised(chosen)
        if spread == 0.0:
            return torch.zeros_like(x)
        posterior = self._conditioned(chosen, x, spread)
        return posterior.gradient(posterior.weights((values - low) / spread)) * spread

    def trace(self, x: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Return the uncertainty of the gradient at `candidates [m, dim]` `[m]`, from the window around x.

        In the units of normalised values: what is compared is one window's.
        """
        chosen = self.nearest(x, self._window)
        _, _, spread = self._normalised(chosen)
        return self._conditioned(chosen, x, spread or 1.0).trace(candidates - x)

    def mean_square_distance(self, x: torch.Tensor) -> float:
        """Return the mean squared distance of x to all queries."""
        difference = self.points[: self.count] - x
        return float((difference * difference).sum() / max(1, self.count))

    def likelihoods(self, name: Name, x: torch.Tensor) -> torch.Tensor:
        """Return the likelihood of every length scale of the grid for the window around x; 0 where it tells nothing."""
        chosen = self.nearest(x, self._window)
        values, low, spread = self._normalised(chosen)
        if spread == 0.0:
            return torch.zeros(STEPS, dtype=torch.float64)
        return likelihoods(name, self.points[chosen], (values - low) / spread, self._noise_of(spread))

    def fit(self, name: Name, x: torch.Tensor) -> None:
        """Set this client's own length scale by the window around x."""
        self.kernel = Kernel(name, best(self.likelihoods(name, x), len(x)))

    def normalised(self, x: torch.Tensor, count: int | None) -> tuple[torch.Tensor, torch.Tensor, float, float]:
        """Return points, values in [0, 1], their spread and their noise for the `count` queries nearest to x."""
        chosen = self.nearest(x, count)
        values, low, spread = self._normalised(chosen)
        return self.points[chosen], (values - low) / (spread or 1.0), spread, self._noise_of(spread)

    def _normalised(self, chosen: torch.Tensor) -> tuple[torch.Tensor, float, float]:
        values = self.values[: self.count] if len(chosen) == self.count else self.values[chosen]
        if not len(values):
            return values, 0.0, 0.0
        low, high = (float(v) for v in values.aminmax())
        return values, low, high - low

    def _conditioned(self, chosen: torch.Tensor, x: torch.Tensor, spread: float) -> Posterior:
        """Return the surrogate of a window: the last factor, extended where the window only grew."""
        old, level, known = self._chosen, self._level, 0
        if self._posterior is not None and self._posterior.kernel == self.kernel:
            grew = len(chosen) >= len(old) and torch.equal(chosen[: len(old)], old)
            known = len(old) if grew and (level == 0.0 or spread == self.spread) else 0
        if self._posterior is None or not known:
            self._posterior = Posterior(self.kernel, self._noise_of(spread))
        before = self._posterior.raised
        points = self.points[: self.count] if len(chosen) == self.count else self.points[chosen]
        self._posterior.condition(points, x, known)
        self.raised += self._posterior.raised - before
        self._chosen, self.spread = chosen, spread
        return self._posterior
