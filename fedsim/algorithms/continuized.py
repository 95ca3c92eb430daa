"""The continuized framework: dual acceleration in which one clock of edges drives everything."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedsim.algorithms.algorithm import Constant, DynamicsAlgorithm, Provenance, Setting
from fedsim.algorithms.dynamics import Dynamics


@dataclass(frozen=True)
class Continuized(DynamicsAlgorithm):
    """Minimise `sum_i f_i(x)` in the dual: an event on edge {i, j} costs one communication and two dual gradients.

        between events:  dy = eta (z - y) dt,  dz = eta (y - z) dt
        event on {i, j}: G = D_i(y_i) - D_j(y_j), D_i = grad f_i^*;
                         y_i -= gamma R_e G,  z_i -= gamma' G   (on j with the sign swapped)

    and the answer is `D_i(z_i)`. With the rates normalised to one event per unit of time (`P`),
    `mu_g = 1/chi1[P]`, `Rmax = 2 chi2[P]`, `R_e` the effective resistance of e in P:
    `eta = sqrt(mu_g/Rmax) sqrt(mu/L)`, `gamma = mu/(2 Rmax)`, `gamma' = sqrt(L mu/(2 mu_g Rmax))`. Rates of total
    `s` run the same process `s` times as fast: only `eta` is multiplied by `s`.

    Reference: Even, Berthier, Bach, Flammarion, Gaillard, Hendrikx, Massoulie & Taylor, *A Continuized View on
    Nesterov Acceleration*, NeurIPS 2021, appendix H.

    Differences: the constants are those of the DADAO authors' code, which moves a factor 2 of that paper's eq. (63)
    to the numerator; there edges are uniform, here any rates.
    """

    kind: ClassVar[str] = "continuized"
    paper: ClassVar[str] = "Even et al., NeurIPS 2021, appendix H"
    provenance: ClassVar[Provenance] = "authors' code"
    needs: ClassVar[tuple[str, ...]] = ("dual", "L", "mu", "rates")

    def resolve(self, setting: Setting) -> Continuized:
        """Refuse what has no dual gradients, no L, or no mu > 0."""
        setting.require("continuized", "dual", "L", "mu", "rates")
        return self

    def dynamics(self, setting: Setting) -> Dynamics:
        """Return the table over y, z; the gradient event does not exist."""
        eta, gamma, gamma_z, total = _constants(setting)
        eta *= total
        return Dynamics(
            variables=("y", "z"),
            flow=np.array([[-eta, eta], [eta, -eta]]),
            point=np.array([1.0, 0]),
            residual=np.zeros(2),
            gradient_jump=np.zeros(2),
            message=np.zeros(2),
            gossip_jump=np.array([0.0, -gamma_z]),
            edge_jump=np.array([-gamma, 0.0]),
            edge_scale=setting.resistances * total,
            start=np.zeros((2, 3)),
            output=np.array([0.0, 1.0]),
            dual=True,
            node_clocks=False,
        )

    def constants(self, setting: Setting) -> tuple[Constant, ...]:
        """Return chi1, chi2 of the normalised rates and the three constants."""
        eta, gamma, gamma_z, total = _constants(setting)
        return (
            Constant("chi1", setting.chi1 * total, "chi1 of rates normalised to one event per unit of time"),
            Constant("chi2", setting.chi2 * total, "chi2 of rates normalised to one event per unit of time"),
            Constant("eta", eta, "sqrt(mu_g/Rmax) sqrt(mu/L), mu_g = 1/chi1, Rmax = 2 chi2"),
            Constant("gamma", gamma, "mu / (2 Rmax)"),
            Constant("gamma_z", gamma_z, "sqrt(L mu / (2 mu_g Rmax))"),
        )


def _constants(setting: Setting) -> tuple[float, float, float, float]:
    """Return eta, gamma, gamma' for the normalised rates, and the rates' total."""
    assert setting.L is not None
    assert setting.mu is not None
    total = float(setting.rates.sum())
    mu_g, r_max = 1 / (setting.chi1 * total), 2 * setting.chi2 * total
    eta = math.sqrt(mu_g / r_max * setting.mu / setting.L)
    return eta, setting.mu / (2 * r_max), math.sqrt(setting.L * setting.mu / (2 * mu_g * r_max)), total
