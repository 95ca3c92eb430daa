"""DADAO: decentralized, asynchronous, accelerated optimization with decoupled gradients and gossip."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from fedsim.algorithms.algorithm import (
    Constant,
    DynamicsAlgorithm,
    Guarantee,
    Provenance,
    Sampling,
    Setting,
)
from fedsim.algorithms.dynamics import Dynamics
from fedsim.errors import InputError

Positive = Annotated[float, Field(gt=0)] | Literal["auto"]


@dataclass(frozen=True)
class DADAO(DynamicsAlgorithm):
    """Minimise `sum_i f_i(x)`, every `f_i` `mu`-strongly convex and `L`-smooth, by events on nodes and edges.

    Node i keeps six vectors. Between events they follow the linear flow

        dx  = eta   (xt - x) dt          dy  = alpha   (yt - y) dt
        dxt = eta_t (x - xt) dt          dyt = -theta  (y + z + nu xt) dt
        dz  = alpha (zt - z) dt          dzt = alpha_t (z - zt) dt

    A gradient event (rate 1 on every node) takes `g = grad f_i(x) - nu x - yt` and does
    `x -= gamma g`, `xt -= gamma_t g`, `yt += (delta + delta_t) g`. A communication on edge {i, j} exchanges
    `m = y + z` and does `z_i -= beta (m_i - m_j)`, `zt_i -= beta_t (m_i - m_j)`, and the same on j with the
    roles swapped. `x` is never sent.

    With `nu = mu/2`, `chi1, chi2` of the actual rates, and `c = max(1, sqrt(2 chi1 chi2))`:

        eta = eta_t = alpha_t = sqrt(nu/L)/(8c)      gamma   = 1/(4L)           beta   = 1/2
        alpha = delta         = sqrt(nu/L)/(4c)      gamma_t = 1/(4c sqrt(nu L)) beta_t = 2 chi1 sqrt(L/nu)/c
        theta                 = sqrt(L/nu)/(2c)      delta_t = 1

    Every one of them can be given as a number instead of `auto`; those that are left follow from the nu that is given.

    Attributes:
        init: `theorem4`: `xt = x`, `y = yt = grad f_i(x0) - nu x0`, `z = zt = -(y - mean y)`, which needs a
            common start and one global mean; `local`: `xt = x`, the rest 0; `authors_code`: all but x is 0,
            `xt` too; `auto`: `theorem4` from a common start, else `local`.
        batch: records of a stochastic gradient; None: exact gradients.

    Reference: Nabli & Oyallon, *Decentralized Asynchronous Optimization with DADAO allows Decoupling and
    Acceleration*, JMLR 26(207), 2025: eq. (3), Algorithm 2, Lemma 12, Theorem 4; ICML 2023.

    Differences from the paper: Lemma 12 prints `eta_t` without the `1/sqrt(2 chi1 chi2)` and `alpha` as half of
    `delta`; the proof (and Lemma 14) needs the values above. Theorem 4's rate is printed a factor `sqrt 2` too
    large; `guarantee` states `sqrt(mu/L)/(8 sqrt(2) c)`. The `max(1, .)` in `c` is ours: communicating more than
    needed does not allow larger gradient steps.

    Differences from the authors' code: it knows uniform edge probabilities and `2 chi1 chi2 = 1` only, builds
    the flow's matrix in single precision, and starts from `authors_code` with x drawn per node.
    """

    kind: ClassVar[str] = "dadao"
    paper: ClassVar[str] = "Nabli & Oyallon, JMLR 26(207), 2025"
    provenance: ClassVar[Provenance] = "paper"
    needs: ClassVar[tuple[str, ...]] = ("L", "mu", "rates")

    init: Literal["auto", "theorem4", "local", "authors_code"] = "auto"
    batch: Sampling | None = None
    nu: Positive = "auto"
    eta: Positive = "auto"
    eta_t: Positive = "auto"
    alpha: Positive = "auto"
    alpha_t: Positive = "auto"
    theta: Positive = "auto"
    gamma: Positive = "auto"
    gamma_t: Positive = "auto"
    delta: Positive = "auto"
    delta_t: Positive = "auto"
    beta: Positive = "auto"
    beta_t: Positive = "auto"

    def resolve(self, setting: Setting) -> DADAO:
        """Fill in the theory's constants; see the class.

        Raises:
            InputError: L or mu > 0 is missing while constants are `auto`, or `theorem4` without a common start.
        """
        init = self.init
        if init == "auto":
            init = "theorem4" if setting.common_start else "local"
        if init == "theorem4" and not setting.common_start:
            raise InputError("algorithm.init: theorem4 needs a common start (start: zeros, say); use init: local")
        missing = [f.name for f in fields(self) if f.name != "init" and getattr(self, f.name) == "auto"]
        if not missing:
            return replace(self, init=init)
        setting.require("dadao", "L", "mu", "rates")
        values = theory(setting, self.nu)
        return replace(self, init=init, **{name: values[name] for name in missing})

    def dynamics(self, setting: Setting) -> Dynamics:
        """Return eq. (3) as a table; rows and columns are x, xt, y, yt, z, zt."""
        p = {f.name: float(getattr(self, f.name)) for f in fields(self) if f.name not in ("init", "batch")}
        flow = np.array(
            [
                [-p["eta"], p["eta"], 0, 0, 0, 0],
                [p["eta_t"], -p["eta_t"], 0, 0, 0, 0],
                [0, 0, -p["alpha"], p["alpha"], 0, 0],
                [0, -p["theta"] * p["nu"], -p["theta"], 0, -p["theta"], 0],
                [0, 0, 0, 0, -p["alpha"], p["alpha"]],
                [0, 0, 0, 0, p["alpha_t"], -p["alpha_t"]],
            ]
        )
        return Dynamics(
            variables=("x", "xt", "y", "yt", "z", "zt"),
            flow=flow,
            point=_row(0),
            residual=np.array([-p["nu"], 0, 0, -1.0, 0, 0]),
            gradient_jump=np.array([-p["gamma"], -p["gamma_t"], 0, p["delta"] + p["delta_t"], 0, 0]),
            message=_row(2) + _row(4),
            gossip_jump=np.array([0, 0, 0, 0, -p["beta"], -p["beta_t"]]),
            start=_start(self.init, p["nu"]),
            output=_row(0),
        )

    def constants(self, setting: Setting) -> tuple[Constant, ...]:
        """Return chi1, chi2, c and every hyper-parameter with the formula it came from."""
        c = slowdown(setting)
        head = (
            Constant("chi1", setting.chi1, "1 / lambda_2(Lam), Lam the Laplacian of the rates"),
            Constant("chi2", setting.chi2, "half the largest effective resistance over edges"),
            Constant("c", c, "max(1, sqrt(2 chi1 chi2))"),
        )
        names = [f.name for f in fields(self) if f.name not in ("init", "batch")]
        return head + tuple(Constant(n, float(getattr(self, n)), self._formula(n, setting)) for n in names)

    def _formula(self, name: str, setting: Setting) -> str:
        nu = "auto" if name == "nu" else self.nu
        given = setting.L is None or not setting.mu or getattr(self, name) != theory(setting, nu)[name]
        return "given" if given else FORMULAS[name]

    def guarantee(self, setting: Setting) -> Guarantee | None:
        """Return Theorem 4 with the corrected rate: `E sum_i ||x_i - x*||^2` falls by `exp(-rate t)`."""
        if setting.L is None or not setting.mu:
            return None
        kappa = setting.L / setting.mu
        rate = 1.0 / (8 * math.sqrt(2 * kappa) * slowdown(setting))
        changed = [f for f in FORMULAS if self._formula(f, setting) == "given"]
        broken = [
            *(["the start is not Theorem 4's (init: theorem4)"] if self.init != "theorem4" else []),
            *(["gradients are stochastic"] if self.batch is not None else []),
            *([f"given instead of derived: {', '.join(changed)}"] if changed else []),
        ]
        source = "JMLR 26(207), Theorem 4, with the rate its proof gives"
        return Guarantee("distance", rate, 4 * (1 + kappa + kappa**2), source, tuple(broken))


FORMULAS = {
    "nu": "mu / 2",
    "eta": "sqrt(nu/L) / (8c)",
    "eta_t": "sqrt(nu/L) / (8c)",
    "alpha": "sqrt(nu/L) / (4c)",
    "alpha_t": "sqrt(nu/L) / (8c)",
    "theta": "sqrt(L/nu) / (2c)",
    "gamma": "1 / (4L)",
    "gamma_t": "1 / (4c sqrt(nu L))",
    "delta": "sqrt(nu/L) / (4c)",
    "delta_t": "1",
    "beta": "1 / 2",
    "beta_t": "2 chi1 sqrt(L/nu) / c",
}


def slowdown(setting: Setting) -> float:
    """Return `c = max(1, sqrt(2 chi1 chi2))`: how much the rates slow the method down."""
    return max(1.0, math.sqrt(2 * setting.chi1 * setting.chi2))


def theory(setting: Setting, nu: float | Literal["auto"] = "auto") -> dict[str, float]:
    """Return the constants of `FORMULAS` for this setting (L and mu > 0 known), for a given nu if it is a number."""
    assert setting.L is not None
    assert setting.mu
    L, nu, c = setting.L, setting.mu / 2 if nu == "auto" else float(nu), slowdown(setting)
    root = math.sqrt(nu / L)
    return {
        "nu": nu,
        "eta": root / (8 * c),
        "eta_t": root / (8 * c),
        "alpha": root / (4 * c),
        "alpha_t": root / (8 * c),
        "theta": 1 / (2 * c * root),
        "gamma": 1 / (4 * L),
        "gamma_t": 1 / (4 * c * math.sqrt(nu * L)),
        "delta": root / (4 * c),
        "delta_t": 1.0,
        "beta": 0.5,
        "beta_t": 2 * setting.chi1 / (root * c),
    }


def _row(index: int) -> np.ndarray:
    return np.eye(6)[index]


def _start(init: str, nu: float) -> np.ndarray:
    """Return `start [6, 3]` over (x0, grad f_i(x0), mean gradient)."""
    x, zero = [1.0, 0, 0], [0.0, 0, 0]
    if init == "authors_code":
        return np.array([x, zero, zero, zero, zero, zero])
    if init == "local":
        return np.array([x, x, zero, zero, zero, zero])
    y = [-nu, 1.0, 0]
    z = [0.0, -1.0, 1.0]  # -(y_i - mean y); nu x0 cancels, since the start is common
    return np.array([x, x, y, y, z, z])
