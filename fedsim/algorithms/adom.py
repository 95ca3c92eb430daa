"""ADOM+: accelerated primal method for graphs that may vary, with and without multi-consensus."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from fedsim.algorithms.algorithm import Constant, Draws, Oracle, Provenance, Setting, SyncAlgorithm
from fedsim.algorithms.requests import Mix, Rows


@dataclass
class ADOMState:
    """The four sequences of the paper, the three "fast" ones, and the error feedback `m`; `sum z = 0`."""

    x: Rows
    x_f: Rows
    y: Rows
    y_f: Rows
    z: Rows
    z_f: Rows
    m: Rows


@dataclass(frozen=True)
class ADOMPlus(SyncAlgorithm):
    """Minimise `sum_i f_i(x)`, `mu`-strongly convex and `L`-smooth, with primal gradients.

    With `G = Laplacian / lambda_max` and `chi = lambda_max / lambda_2`, a round is

        xg = tau1 x + (1-tau1) xf, yg = sigma1 y + (1-sigma1) yf, zg = sigma1 z + (1-sigma1) zf
        d  = grad f(xg) - nu xg
        x+ = x + eta alpha (xg - x+) - eta (d - y+)                          (an implicit pair,
        y+ = y + theta beta (d - y+) - theta ((yg + zg)/nu + x+)              solved in closed form)
        xf = xg + tau2 (x+ - x), yf = yg + sigma2 (y+ - y)
        p  = (gamma/nu)(yg + zg) + m, z+ = z + gamma delta (zg - z) - G p, m = p - G p
        zf = zg - zeta G (yg + zg)

    with `nu = alpha = mu/2`, `tau2 = sqrt(mu/L)`, `tau1 = 1/(1/tau2 + 1/2)`, `eta = 1/(L tau2)`, `beta = 1/(2L)`,
    `sigma2 = tau2/(16 chi)`, `sigma1 = 1/(1/sigma2 + 1/2)`, `theta = nu/(4 sigma2)`,
    `gamma = nu/(14 sigma2 chi^2)`, `delta = 1/(17 L)`, `zeta = 1/2`.

    Attributes:
        multi_consensus: replace G by `I - (I - G)^T` with `T = ceil(chi ln 2)` and chi by 2: T mixings instead of
            one wherever G stands.

    Reference: Kovalev, Gasanov, Richtarik & Gasnikov, *Lower Bounds and Optimal Algorithms for Smooth and Strongly
    Convex Decentralized Optimization Over Time-Varying Networks*, NeurIPS 2021, Algorithm 1 and section 4.

    Differences from the DADAO authors' code: it draws the starts of y and m at random; here they are 0. `G p` and
    `G (yg + zg)` travel together: one communication per edge and mixing, as that code counts, of 2 dim numbers.
    """

    kind: ClassVar[str] = "adom_plus"
    paper: ClassVar[str] = "Kovalev et al., NeurIPS 2021, Algorithm 1"
    provenance: ClassVar[Provenance] = "paper"
    needs: ClassVar[tuple[str, ...]] = ("L", "mu", "edges")

    multi_consensus: bool = False
    _L: float = field(default=0.0, init=False, repr=False)
    _mu: float = field(default=0.0, init=False, repr=False)
    _chi: float = field(default=0.0, init=False, repr=False)
    _largest: float = field(default=0.0, init=False, repr=False)
    _T: int = field(default=1, init=False, repr=False)

    def resolve(self, setting: Setting) -> ADOMPlus:
        """Compute chi, T and keep L, mu; refuse mu = 0 and graphs without edges."""
        setting.require("adom_plus", "L", "mu", "edges")
        assert setting.L is not None
        assert setting.mu is not None
        smallest, largest = setting.laplacian_eigenvalues
        chi = max(1.0, largest / smallest)
        T = math.ceil(chi * math.log(2) - 1e-12) if self.multi_consensus else 1
        chi = 2.0 if T > 1 else chi
        return self.derived(_L=setting.L, _mu=setting.mu, _chi=chi, _largest=largest, _T=T)

    def constants(self, setting: Setting) -> tuple[Constant, ...]:
        """Return chi, T and the step sizes."""
        tau2, sigma2 = math.sqrt(self._mu / self._L), math.sqrt(self._mu / self._L) / (16 * self._chi)
        return (
            Constant("chi", self._chi, "2 with multi-consensus, else lambda_max / lambda_2 of the Laplacian"),
            Constant("T", self._T, "ceil(chi ln 2) with multi-consensus, else 1"),
            Constant("tau2", tau2, "sqrt(mu/L)"),
            Constant("sigma2", sigma2, "tau2 / (16 chi)"),
            Constant("eta", 1 / (self._L * tau2), "1 / (L tau2)"),
        )

    async def start(self, x0: torch.Tensor, f: Oracle, rng: Draws) -> ADOMState:
        """Start from x0 with y = z = m = 0."""
        zero = torch.zeros_like(x0)
        return ADOMState(x0, x0, zero, zero, zero, zero, zero)

    async def round(self, s: ADOMState, k: int, f: Oracle, rng: Draws) -> ADOMState:
        """Play one iteration: one gradient per node, T mixings of a message of 2 dim numbers."""
        L, mu, chi = self._L, self._mu, self._chi
        nu = alpha = mu / 2
        tau2 = math.sqrt(mu / L)
        tau1, eta, beta = 1 / (1 / tau2 + 0.5), 1 / (L * tau2), 1 / (2 * L)
        sigma2 = tau2 / (16 * chi)
        sigma1, theta = 1 / (1 / sigma2 + 0.5), nu / (4 * sigma2)
        gamma, delta, zeta = nu / (14 * sigma2 * chi**2), 1 / (17 * L), 0.5

        xg = tau1 * s.x + (1 - tau1) * s.x_f
        yg = sigma1 * s.y + (1 - sigma1) * s.y_f
        zg = sigma1 * s.z + (1 - sigma1) * s.z_f
        d = f.gradient(xg) - nu * xg
        h = 1 + eta * alpha
        # y+ of the implicit pair, with x+ = (x + eta alpha xg - eta (d - y+)) / h put in
        y = s.y + theta * beta * d - theta * ((yg + zg) / nu + (s.x + eta * alpha * xg - eta * d) / h)
        y = y / (1 + theta * beta + theta * eta / h)
        x = (s.x + eta * alpha * xg - eta * (d - y)) / h
        p = gamma / nu * (yg + zg) + s.m
        gp, gyz = (await self._mixed(torch.cat([p, yg + zg], dim=1))).split(p.shape[1], dim=1)
        return ADOMState(
            x=x,
            x_f=xg + tau2 * (x - s.x),
            y=y,
            y_f=yg + sigma2 * (y - s.y),
            z=s.z + gamma * delta * (zg - s.z) - gp,
            z_f=zg - zeta * gyz,
            m=p - gp,
        )

    async def _mixed(self, v: torch.Tensor) -> torch.Tensor:
        """Return `G v`, or `v - (I - G)^T v` with multi-consensus."""
        rest = v
        for _ in range(self._T):
            rest = rest - (await Mix(rest, "laplacian")) / self._largest
        return v - rest
