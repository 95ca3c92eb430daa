"""MSDA: accelerated dual ascent whose gossip is a Chebyshev polynomial of the Laplacian."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch

from fedsim.algorithms.algorithm import Constant, Draws, Oracle, Provenance, Setting, SyncAlgorithm
from fedsim.algorithms.requests import Mix, Rows


@dataclass
class MSDAState:
    """`theta`: the answer `grad f_i^*(s)`; `s`, `v`: the dual point and Nesterov's second sequence."""

    theta: Rows
    s: Rows
    v: Rows


class Chebyshev(NamedTuple):
    """`W = Laplacian / scale`; K inner steps with the coefficients c2, c3."""

    scale: float
    K: int
    c2: float
    c3: float
    q: float


@dataclass(frozen=True)
class MSDA(SyncAlgorithm):
    """Minimise `sum_i f_i(x)` with K gossip steps and one dual gradient per node and round.

        v+ = s - eta AG(theta);  s = (1 + m) v+ - m v;  v = v+;  theta_i = grad f_i^*(s_i)

    `AG(x) = x - P_K(x)` with the Chebyshev recursion `a_0 = 1, a_1 = c2, x_1 = c2 (I - c3 W) x`,
    `a_{k+1} = 2 c2 a_k - a_{k-1}`, `x_{k+1} = 2 c2 (I - c3 W) x_k - x_{k-1}`, `P_K(x) = x_K / a_K`, `W = L/|E|`,
    `g = lambda_2(W)/lambda_max(W)`, `K = floor(1/sqrt g)`, `c1 = (1 - sqrt g)/(1 + sqrt g)`,
    `c2 = (1 + g)/(1 - g)`, `c3 = 2/((1 + g) lambda_max(W))`, `q = c1^K`. Step
    `eta = mu (1 + q^2)/(1 + q)^2`, momentum `m = ((1+q) sqrt(kappa) - 1 + q)/((1+q) sqrt(kappa) + 1 - q)`.
    Where all positive eigenvalues are equal (`g = 1`, complete graph) one step averages exactly.

    Reference: Scaman, Bach, Bubeck, Lee & Massoulie, *Optimal algorithms for smooth and strongly convex distributed
    optimization in networks*, ICML 2017, Algorithms 2 and 3.

    Differences from the DADAO authors' code, which has the same constants: there the complete graph survives by
    rounding only; here it is a case of its own.
    """

    kind: ClassVar[str] = "msda"
    paper: ClassVar[str] = "Scaman et al., ICML 2017, Algorithm 2"
    provenance: ClassVar[Provenance] = "paper"
    needs: ClassVar[tuple[str, ...]] = ("dual", "L", "mu", "edges")

    _chebyshev: Chebyshev | None = field(default=None, init=False, repr=False)
    _eta: float = field(default=0.0, init=False, repr=False)
    _m: float = field(default=0.0, init=False, repr=False)

    def resolve(self, setting: Setting) -> MSDA:
        """Compute eta, m, K and the Chebyshev coefficients; refuse what has no dual gradients."""
        setting.require("msda", "dual", "L", "mu", "edges")
        assert setting.L is not None
        assert setting.mu is not None
        chebyshev = _coefficients(*setting.laplacian_eigenvalues, len(setting.edges))
        q, root = chebyshev.q, math.sqrt(setting.L / setting.mu)
        eta = setting.mu * (1 + q**2) / (1 + q) ** 2
        m = ((1 + q) * root - 1 + q) / ((1 + q) * root + 1 - q)
        return self.derived(_chebyshev=chebyshev, _eta=eta, _m=m)

    def constants(self, setting: Setting) -> tuple[Constant, ...]:
        """Return K, eta, momentum, c2, c3."""
        c = self._chebyshev
        assert c is not None
        return (
            Constant("K", c.K, "floor(1/sqrt(g)), g = lambda_2 / lambda_max of the Laplacian"),
            Constant("eta", self._eta, "mu (1 + q^2) / (1 + q)^2, q = c1^K, c1 = (1 - sqrt g)/(1 + sqrt g)"),
            Constant("momentum", self._m, "((1+q) sqrt(kappa) - 1 + q) / ((1+q) sqrt(kappa) + 1 - q)"),
            Constant("c2", c.c2, "(1 + g)/(1 - g)"),
            Constant("c3", c.c3, "2 / ((1 + g) lambda_max(W)), W = Laplacian / |E|"),
        )

    async def start(self, x0: torch.Tensor, f: Oracle, rng: Draws) -> MSDAState:
        """Start the dual variables at 0; the start of the models is not used."""
        s = torch.zeros_like(x0)
        return MSDAState(f.dual_gradient(s), s, s)

    async def round(self, s: MSDAState, k: int, f: Oracle, rng: Draws) -> MSDAState:
        """Play one outer iteration: K mixings and one dual gradient per node."""
        v = s.s - self._eta * (await self._accelerated_gossip(s.theta))
        dual = (1 + self._m) * v - self._m * s.v
        return MSDAState(f.dual_gradient(dual), dual, v)

    def output(self, s: MSDAState, f: Oracle) -> torch.Tensor:
        """Return `theta`."""
        return s.theta

    async def _accelerated_gossip(self, x: torch.Tensor) -> torch.Tensor:
        c = self._chebyshev
        assert c is not None
        if math.isinf(c.c2):  # all positive eigenvalues are equal: I - c3 W is the average itself
            return c.c3 / c.scale * (await Mix(x, "laplacian"))
        a_before, a = 1.0, c.c2
        before, now = x, c.c2 * (x - c.c3 / c.scale * (await Mix(x, "laplacian")))
        for _ in range(c.K - 1):
            a_before, a = a, 2 * c.c2 * a - a_before
            mixed = now - c.c3 / c.scale * (await Mix(now, "laplacian"))
            before, now = now, 2 * c.c2 * mixed - before
        return x - now / a


def _coefficients(smallest: float, largest: float, edges: int) -> Chebyshev:
    g = smallest / largest
    if g > 1 - 1e-12:
        return Chebyshev(edges, 1, math.inf, edges / largest, 0.0)
    root = math.sqrt(g)
    K = math.floor((1 + 1e-7) / root)  # of stars of n = K^2 nodes g is 1/K^2, known to some 1e-8
    return Chebyshev(edges, K, (1 + g) / (1 - g), 2 * edges / ((1 + g) * largest), ((1 - root) / (1 + root)) ** K)
