"""Averaging by gossip: randomised, and accelerated with a second variable."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from fedsim.algorithms.algorithm import Constant, DynamicsAlgorithm, Guarantee, Provenance, Setting
from fedsim.algorithms.dynamics import Dynamics


@dataclass(frozen=True)
class RandomisedGossip(DynamicsAlgorithm):
    """Average the nodes' starts: a communication on edge {i, j} sets `x_i = x_j = (x_i + x_j) / 2`.

    Gradients are never taken; the mean of x is conserved.

    Reference: Boyd, Ghosh, Prabhakar & Shah, *Randomized gossip algorithms*, IEEE Trans. Inf. Theory 52(6), 2006.
    """

    kind: ClassVar[str] = "randomised_gossip"
    paper: ClassVar[str] = "Boyd et al., IEEE Trans. Inf. Theory 52(6), 2006"
    provenance: ClassVar[Provenance] = "paper"
    needs: ClassVar[tuple[str, ...]] = ("rates",)

    def dynamics(self, setting: Setting) -> Dynamics:
        """Return the table of one variable that nothing moves between communications."""
        return Dynamics(
            variables=("x",),
            flow=np.zeros((1, 1)),
            point=np.ones(1),
            residual=np.zeros(1),
            gradient_jump=np.zeros(1),
            message=np.ones(1),
            gossip_jump=np.array([-0.5]),
            start=np.array([[1.0, 0, 0]]),
            output=np.ones(1),
            node_clocks=False,
        )

    def constants(self, setting: Setting) -> tuple[Constant, ...]:
        """Return chi1, which alone decides the rate."""
        return (Constant("chi1", setting.chi1, "1 / lambda_2(Lam)"),)

    def guarantee(self, setting: Setting) -> Guarantee:
        """Return `E consensus(t) <= consensus(0) exp(-t / (2 chi1))`.

        An event takes `(x_i - x_j)^2 / 2` off the squared distance to the mean, so its expectation falls at the
        rate `x' Lam x / 2 >= lambda_2 / 2` times itself.
        """
        return Guarantee("consensus", 1 / (2 * setting.chi1), 1.0, "Boyd et al., 2006, sec. III, in continuous time")


@dataclass(frozen=True)
class AcceleratedGossip(DynamicsAlgorithm):
    """Average the nodes' starts with a second variable `xt` that drifts towards `x` and back.

        dx = eta (xt - x) dt, dxt = eta (x - xt) dt; on edge {i, j}, with m = x_i - x_j:
        x_i -= alpha m, xt_i -= alpha_t m (and on j with the sign swapped).

    `alpha = 1/2`, `eta = 1/(2 sqrt(chi1 chi2))`, `alpha_t = sqrt(chi1/chi2)/2`. It is A2CiD2 with its gradients off.

    Reference: Nabli, Belilovsky & Oyallon, *A2CiD2*, NeurIPS 2023, Prop. 3.6; Even et al., NeurIPS 2021.
    """

    kind: ClassVar[str] = "accelerated_gossip"
    paper: ClassVar[str] = "Nabli, Belilovsky & Oyallon, NeurIPS 2023"
    provenance: ClassVar[Provenance] = "paper"
    needs: ClassVar[tuple[str, ...]] = ("rates",)

    eta: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    alpha: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    alpha_t: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"

    def resolve(self, setting: Setting) -> AcceleratedGossip:
        """Fill in the theory's constants for the actual rates."""
        auto = momentum(setting)
        return replace(self, **{name: value for name, value in auto.items() if getattr(self, name) == "auto"})

    def dynamics(self, setting: Setting) -> Dynamics:
        """Return the table over x, xt."""
        eta = float(self.eta)
        return Dynamics(
            variables=("x", "xt"),
            flow=np.array([[-eta, eta], [eta, -eta]]),
            point=np.array([1.0, 0]),
            residual=np.zeros(2),
            gradient_jump=np.zeros(2),
            message=np.array([1.0, 0]),
            gossip_jump=np.array([-float(self.alpha), -float(self.alpha_t)]),
            start=np.array([[1.0, 0, 0], [1.0, 0, 0]]),
            output=np.array([1.0, 0]),
            node_clocks=False,
        )

    def constants(self, setting: Setting) -> tuple[Constant, ...]:
        """Return chi1, chi2 and the three hyper-parameters."""
        return momentum_constants(self, setting)


def momentum(setting: Setting) -> dict[str, float]:
    """Return `eta, alpha, alpha_t` of A2CiD2, Prop. 3.6, for the Laplacian of the actual rates."""
    chi1, chi2 = setting.chi1, setting.chi2
    return {"eta": 1 / (2 * math.sqrt(chi1 * chi2)), "alpha": 0.5, "alpha_t": math.sqrt(chi1 / chi2) / 2}


def momentum_constants(algorithm: DynamicsAlgorithm, setting: Setting) -> tuple[Constant, ...]:
    """Return what `check` prints of chi1, chi2, eta, alpha, alpha_t."""
    formulas = {"eta": "1 / (2 sqrt(chi1 chi2))", "alpha": "1 / 2", "alpha_t": "sqrt(chi1/chi2) / 2"}
    auto = momentum(setting)
    head = (
        Constant("chi1", setting.chi1, "1 / lambda_2(Lam)"),
        Constant("chi2", setting.chi2, "half the largest effective resistance over edges"),
    )
    values = {name: float(getattr(algorithm, name)) for name in formulas}
    return head + tuple(Constant(n, v, formulas[n] if v == auto[n] else "given") for n, v in values.items())
