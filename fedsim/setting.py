"""What an algorithm may know before it starts: sizes and constants of this problem on this topology."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import InputError

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from fedsim.privacy.section import Privacy
    from fedsim.problems.problem import Problem
    from fedsim.topology.spectral import Chi
    from fedsim.topology.topology import Topology


@dataclass(frozen=True, eq=False)
class RunSetting:
    """Implements `fedsim.algorithms.algorithm.Setting` for a problem, a topology, its rates and its mixing matrix.

    Attributes:
        given_rates: float64 `[m]` exchanges per unit of time, already scaled; None where nothing gossips.
        given_chi: chi1, chi2 of these rates; None: computed when asked for.
        mixing: the mixing matrix over node numbers; None where nothing mixes.
        common_start: True when all nodes start from the same point.
        rounds: of the schedule; 0 for events. privacy: what the scenario promises.
        base: folder that a user's own files are looked up from.
    """

    problem: Problem
    topology: Topology
    given_rates: NDArray[np.float64] | None = None
    given_chi: Chi | None = None
    mixing: csr_array | None = None
    common_start: bool = True
    rounds: int = 0
    privacy: Privacy | None = None
    base: Path = Path()

    @property
    def unit_weight(self) -> float:
        """Largest weight of one record (or, with `unit: user`, one worker) in the objective."""
        by_user = self.privacy is not None and self.privacy.unit == "user"
        return float((self.problem.shares / (1 if by_user else np.maximum(self.problem.records, 1))).max())

    @property
    def n(self) -> int:
        """Number of nodes."""
        return self.topology.n

    @property
    def dim(self) -> int:
        """Length of a model."""
        return self.problem.dim

    @property
    def L(self) -> float | None:
        """`max_i L_i`, or None where unknown."""
        return None if self.problem.L is None else float(np.max(self.problem.L))

    @property
    def mu(self) -> float | None:
        """`min_i mu_i`, or None where unknown."""
        return None if self.problem.mu is None else float(np.min(self.problem.mu))

    @property
    def edges(self) -> NDArray[np.int64]:
        """int64 `[m, 2]`, node numbers."""
        return self.topology.edges

    @property
    def rates(self) -> NDArray[np.float64]:
        """float64 `[m]`, exchanges per unit of time."""
        self.require("this algorithm", "rates")
        assert self.given_rates is not None
        return self.given_rates

    @cached_property
    def chi(self) -> Chi:
        """chi1 and chi2 of the rates' Laplacian."""
        from fedsim.topology.spectral import chi

        return self.given_chi if self.given_chi is not None else chi(self.topology, self.rates)

    @property
    def chi1(self) -> float:
        """`1 / lambda_2` of the rates' Laplacian."""
        return self.chi.chi1

    @property
    def chi2(self) -> float:
        """Half the largest effective resistance over edges of the rates' Laplacian."""
        return self.chi.chi2

    @property
    def laplacian_eigenvalues(self) -> tuple[float, float]:
        """Smallest positive and largest eigenvalue of the unweighted Laplacian."""
        return self._laplacian_eigenvalues

    @cached_property
    def _laplacian_eigenvalues(self) -> tuple[float, float]:
        from fedsim.topology.spectral import laplacian_eigenvalues

        self.require("this algorithm", "edges")
        return laplacian_eigenvalues(self.topology)

    @property
    def mixing_gap(self) -> float:
        """`1 - max(|lambda_2|, |lambda_n|)` of the mixing matrix."""
        if self.mixing is None:
            self.require("this algorithm", "mixing")
        return self._gap

    @cached_property
    def _gap(self) -> float:
        from fedsim.topology.spectral import mixing_gap

        return mixing_gap(self.mixing, self.topology)

    def _never_agrees(self) -> bool:
        """Return whether rho = 1; where the gap is only estimated, its sign says nothing."""
        from fedsim.topology.spectral import DENSE

        return self.n <= DENSE and self._gap < 1e-12

    @property
    def resistances(self) -> NDArray[np.float64]:
        """float64 `[m]`, effective resistance of each edge under the rates' Laplacian."""
        return self._resistances

    @cached_property
    def _resistances(self) -> NDArray[np.float64]:
        from fedsim.topology.spectral import resistances

        return resistances(self.topology, self.rates)

    @property
    def tensor_sizes(self) -> list[int]:
        """Numbers of parameters of the model's tensors."""
        return self.problem.tensor_sizes

    @property
    def has_dual(self) -> bool:
        """True when the problem has dual gradients."""
        from fedsim.problems.problem import Problem

        return type(self.problem).dual_gradient is not Problem.dual_gradient

    def require(self, who: str, *names: str) -> None:
        """Refuse by name what is missing: "L", "mu" (positive), "dual", "rates", "mixing", "edges", "records".

        Raises:
            InputError: says who needs what, and how to get it.
        """
        for name in names:
            lack = self._lack(name)
            if lack:
                raise InputError(f"{who} needs {lack}")

    def _lack(self, name: str) -> str | None:
        kind = self.problem.kind
        if name == "L" and self.L is None:
            return f"the smoothness L, which is unknown for problem {kind!r}; give the step sizes yourself"
        if name == "mu" and not self.mu:
            return (
                f"strong convexity: mu = {self.mu} for problem {kind!r} makes its theory void; add l2 (least squares:"
                " kind: ridge), or give the constants yourself where it takes them"
            )
        if name == "gradient" and not self.problem.has_gradient:
            return f"gradients, and problem {kind!r} is a black box; use fzoos, fedzo, fedprox_zo or scaffold_zo"
        if name == "dual" and not self.has_dual:
            return (
                f"dual gradients, which problem {kind!r} does not have; least squares of full column rank, ridge and"
                " quadratics do"
            )
        if name == "records" and self.problem.per_record() is None:
            return (
                f"gradients of single records, which problem {kind!r} does not have; logistic, multinomial,"
                " least_squares, ridge, module and shared_curvature do"
            )
        if name == "rates" and self.given_rates is None:
            return "gossip rates: give the scenario a `rates` section"
        if name == "mixing" and self.mixing is None:
            return "a mixing matrix: give the scenario a `mixing` section"
        if name == "mixing" and self._never_agrees():
            return (
                f"a mixing matrix with rho = ||W - J|| < 1, and this one has rho = {1 - self._gap:.6g}: nodes that only"
                " mix never agree (groups without a weight between them, or two sides that swap, which `mixing.lazy:"
                " true` cures)"
            )
        if name == "edges" and self.topology.is_server:
            return "edges, which a server topology does not have"
        return None
