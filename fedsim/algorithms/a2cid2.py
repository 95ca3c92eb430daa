"""Asynchronous SGD with gossip: A2CiD2, and plain gossip SGD as its special case."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from fedsim.algorithms.algorithm import Constant, DynamicsAlgorithm, Provenance, Sampling, Setting
from fedsim.algorithms.dynamics import Dynamics
from fedsim.algorithms.gossip import momentum, momentum_constants
from fedsim.errors import InputError


@dataclass(frozen=True)
class Decay:
    """Step of a node's gradient number t = 0, 1, ...: `step * (1 + t / after) ** -power`."""

    after: Annotated[float, Field(gt=0)]
    power: Annotated[float, Field(ge=0)] = 1.0


@dataclass(frozen=True)
class A2CiD2(DynamicsAlgorithm):
    """Minimise `(1/n) sum_i f_i(x)` by local SGD steps and pairwise averaging, accelerated by a second variable.

        dx = eta (xt - x) dt, dxt = eta (x - xt) dt
        gradient event on i:   b = momentum b + grad f_i(x);  x -= step b;  xt -= step b
        communication {i, j}:  m = x_i - x_j;  x_i -= alpha m;  xt_i -= alpha_t m   (on j with the sign swapped)

    `alpha = 1/2`, `eta = 1/(2 sqrt(chi1 chi2))`, `alpha_t = sqrt(chi1/chi2)/2`, chi of the actual rates.

    Attributes:
        step: the learning rate; the paper has none that holds for every problem, so it must be given.
        momentum: heavy-ball factor in [0, 1); 0 needs no buffer.
        decay: shrinks the step by the node's own gradient count (without momentum).
        batch: records of a stochastic gradient; None: exact gradients.

    Reference: Nabli, Belilovsky & Oyallon, *A2CiD2: Accelerating Asynchronous Communication in Decentralized
    Deep Learning*, NeurIPS 2023, eq. (4) and Prop. 3.6.

    Differences from the authors' code: there, the vector is sent before the flow is applied, so that the mean of x
    is not exactly conserved; here both ends use the flowed value. The paper's asynchronous runs pair workers by a
    central queue; here edges fire as independent Poisson clocks.
    """

    kind: ClassVar[str] = "a2cid2"
    paper: ClassVar[str] = "Nabli, Belilovsky & Oyallon, NeurIPS 2023"
    provenance: ClassVar[Provenance] = "paper"
    needs: ClassVar[tuple[str, ...]] = ("rates",)

    step: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    decay: Decay | None = None
    batch: Sampling | None = None
    eta: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    alpha: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    alpha_t: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"

    def resolve(self, setting: Setting) -> A2CiD2:
        """Fill in the theory's gossip constants for the actual rates."""
        if self.decay and self.momentum:
            raise InputError("algorithm.decay: does not combine with momentum > 0; give one of the two")
        auto = momentum(setting)
        return replace(self, **{name: value for name, value in auto.items() if getattr(self, name) == "auto"})

    def dynamics(self, setting: Setting) -> Dynamics:
        """Return the table over x, xt and, with momentum, the buffer b."""
        eta, alpha, alpha_t = float(self.eta), float(self.alpha), float(self.alpha_t)
        table = Dynamics(
            variables=("x", "xt"),
            flow=np.array([[-eta, eta], [eta, -eta]]),
            point=np.array([1.0, 0]),
            residual=np.zeros(2),
            gradient_jump=np.array([-self.step, -self.step]),
            message=np.array([1.0, 0]),
            gossip_jump=np.array([-alpha, -alpha_t]),
            start=np.array([[1.0, 0, 0], [1.0, 0, 0]]),
            output=np.array([1.0, 0]),
            decay=None if self.decay is None else (self.decay.after, self.decay.power),
        )
        return with_momentum(table, self.step, self.momentum)

    def constants(self, setting: Setting) -> tuple[Constant, ...]:
        """Return chi1, chi2, the gossip constants and the step beside `1/L`."""
        return momentum_constants(self, setting) + steps(self.step, setting)


@dataclass(frozen=True)
class GossipSGD(DynamicsAlgorithm):
    """Minimise `(1/n) sum_i f_i(x)`: a node's clock takes an SGD step, an edge's clock averages its two ends.

        gradient event on i:   b = momentum b + grad f_i(x_i);  x_i -= step b
        communication {i, j}:  x_i = x_j = (x_i + x_j) / 2

    It is A2CiD2 without its second variable (`eta = 0`). With a constant step it stalls at a bias.

    Attributes: as in `A2CiD2`.

    Reference: Lian, Zhang, Zhang & Liu, *Asynchronous Decentralized Parallel SGD*, ICML 2018, in the continuous-time
    form of Nabli, Belilovsky & Oyallon, NeurIPS 2023 (their baseline).
    """

    kind: ClassVar[str] = "gossip_sgd"
    paper: ClassVar[str] = "Lian et al., ICML 2018; Nabli, Belilovsky & Oyallon, NeurIPS 2023"
    provenance: ClassVar[Provenance] = "paper"
    needs: ClassVar[tuple[str, ...]] = ("rates",)

    step: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    decay: Decay | None = None
    batch: Sampling | None = None

    def resolve(self, setting: Setting) -> GossipSGD:
        """Refuse a decaying step with momentum."""
        setting.require("gossip_sgd", "rates")
        if self.decay and self.momentum:
            raise InputError("algorithm.decay: does not combine with momentum > 0; give one of the two")
        return self

    def dynamics(self, setting: Setting) -> Dynamics:
        """Return the table over x and, with momentum, the buffer b."""
        table = Dynamics(
            variables=("x",),
            flow=np.zeros((1, 1)),
            point=np.ones(1),
            residual=np.zeros(1),
            gradient_jump=np.array([-self.step]),
            message=np.ones(1),
            gossip_jump=np.array([-0.5]),
            start=np.array([[1.0, 0, 0]]),
            output=np.ones(1),
            decay=None if self.decay is None else (self.decay.after, self.decay.power),
        )
        return with_momentum(table, self.step, self.momentum)

    def constants(self, setting: Setting) -> tuple[Constant, ...]:
        """Return chi1 and the step beside `1/L`."""
        return (Constant("chi1", setting.chi1, "1 / lambda_2(Lam)"), *steps(self.step, setting))


def steps(step: float, setting: Setting) -> tuple[Constant, ...]:
    """Return the given step and, where L is known, the largest that plain gradient descent allows."""
    given = (Constant("step", step, "given"),)
    return given if setting.L is None else (*given, Constant("1/L", 1 / setting.L, "for comparison"))


def with_momentum(table: Dynamics, step: float, momentum: float) -> Dynamics:
    """Return the table with a heavy-ball buffer `b = momentum b + grad`, whose `-step b` moves the variables."""
    if momentum == 0:
        return table
    k = table.k
    gradient_map = np.eye(k + 1)
    gradient_map[:, k] = [-step * momentum] * k + [momentum]

    def padded(row: np.ndarray) -> np.ndarray:
        return np.append(row, 0.0)

    return Dynamics(
        variables=(*table.variables, "b"),
        flow=np.pad(table.flow, ((0, 1), (0, 1))),
        point=padded(table.point),
        residual=padded(table.residual),
        gradient_jump=np.append(table.gradient_jump, 1.0),
        message=padded(table.message),
        gossip_jump=padded(table.gossip_jump),
        start=np.vstack([table.start, np.zeros(3)]),
        output=padded(table.output),
        gradient_map=gradient_map,
    )
