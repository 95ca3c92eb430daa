"""The table of `fedsim rates`: what each scheme needs on a topology, and what the SDP saves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedsim.topology.optimise import CVXPY_NODES, NODES, Solver
from fedsim.topology.rates import Rates, gossip_rates
from fedsim.topology.schemes import SCHEMES
from fedsim.topology.sets import SetKind
from fedsim.topology.topology import Topology


@dataclass(frozen=True)
class RatesTable:
    """The schemes of one topology and set, in order: `uniform`, `metropolis`, `degree`, `sdp` (`sdp_pruned`).

    Beyond the nodes that any solver can do (`optimise.NODES`) there is no `sdp`. `solver` is the one asked for.
    """

    topology: Topology
    set: SetKind
    schemes: dict[str, Rates]
    solver: Solver = "auto"

    @property
    def columns(self) -> tuple[str, ...]:
        """Keys of a row that the printed table shows."""
        costs = () if self.topology.costs is None else ("cost",)
        slowdown = () if self.set == "total" else ("slowdown",)
        return ("chi1", "chi2", "communications", *costs, *slowdown)

    @property
    def measure(self) -> str:
        """What is compared and saved, all `sqrt(2 chi1 chi2)` of rates on the set's budget, in words.

        Communications, or their cost where edges have costs; for per-node sets the load, the share of the caps
        that the theory's rates need (above 1 it is the slowdown).
        """
        if self.set != "total":
            return "load sqrt(2 chi1 chi2)"
        return "communications" if self.topology.costs is None else "cost"

    @property
    def best(self) -> str:
        """The scheme to use: the last that the SDP gave, or the best local rule where there is no SDP."""
        last = list(self.schemes)[-1]
        return self.best_other() if last in SCHEMES else last

    def as_dict(self) -> dict[str, Any]:
        """Return the object that `fedsim rates --json` prints."""
        return {
            "topology": self.topology.name,
            "n": self.topology.n,
            "edges": self.topology.m,
            "set": self.set,
            "schemes": {name: self._row(rates) for name, rates in self.schemes.items()},
            "saved": {"against_uniform": self.saved("uniform"), "against_best_other": self.saved(self.best_other())},
            "best_other": self.best_other(),
        }

    def _row(self, rates: Rates) -> dict[str, Any]:
        row: dict[str, Any] = {
            "chi1": rates.chi1,
            "chi2": rates.chi2,
            "communications": rates.communications,
            "gap": rates.gap,
            "bound": rates.bound,
            "exact": rates.chi.exact,
            "edges": rates.edges,
            "solver": rates.solver,
            "seconds": rates.seconds,
        }
        if self.topology.costs is not None:
            row["cost"] = rates.cost
        if self.set != "total":
            row["slowdown"] = rates.slowdown
        return row

    def best_other(self) -> str:
        """Return the scheme that is not the SDP and needs least."""
        return min(SCHEMES, key=lambda name: self._need(self.schemes[name]))

    def saved(self, against: str, scheme: str | None = None) -> float:
        """Return the share of `against`'s need that a scheme (default: the best) does without, 0 to 1."""
        return 1 - self._need(self.schemes[scheme or self.best]) / self._need(self.schemes[against])

    def _need(self, rates: Rates) -> float:
        return rates.chi.communications

    def summary(self) -> str:
        """Return what the best scheme saves, in a sentence."""
        best, other = self.best, self.best_other()
        if best == "uniform":
            return f"uniform needs the least {self.measure} of these"
        said = f"{best} saves {percent(self.saved('uniform'))} of the {self.measure} against uniform"
        if best == other:
            return said
        if other == "uniform":
            return f"{said}, which is the best scheme that is not the SDP"
        return f"{said} and {percent(self.saved(other))} against {other}, the best scheme that is not the SDP"

    def notes(self) -> list[str]:
        """Return what a reader must know beside the numbers: solver, certificate, bounds, fewer edges."""
        found = [self._solved(name, rates) for name, rates in self.schemes.items() if rates.bound is not None]
        if "sdp" not in self.schemes:
            found.append(f"no SDP: it needs dense {self.topology.n} x {self.topology.n} matrices; the limit is {NODES}")
        for name, rates in self.schemes.items():
            if rates.edges < self.topology.m:
                found.append(f"{name}: for {rates.edges} of the {self.topology.m} edges; the others never fire")
        if not all(rates.chi.exact for rates in self.schemes.values()):
            found.append("chi1 and chi2 are certified upper bounds, not exact: the graph has more than 2,000 nodes")
        return found

    def _solved(self, name: str, rates: Rates) -> str:
        how = f"{rates.solver} in {rates.seconds:.1f} s" + (" (from the cache)" if rates.cached else "")
        if self.solver == "auto" and self.topology.n > CVXPY_NODES:
            how += f", chosen as cvxpy is for up to {CVXPY_NODES} nodes"
        return (
            f"{name}: value {rates.chi.communications:.6g}, certified lower bound {rates.bound:.6g}, "
            f"gap {rates.gap:.1e}; {how}"
        )


def percent(share: float) -> str:
    """Return a share as text; what rounds to nothing has no sign."""
    return f"{round(100 * share, 1) + 0.0:.1f} %"


def rates_table(
    topology: Topology,
    set: SetKind = "total",
    prune: bool = False,
    caps: float | None = None,
    solver: Solver = "auto",
) -> RatesTable:
    """Compute every scheme's rates on a topology, normalised to the set's budget.

    Raises:
        InputError: an unknown set or solver, a server, or a graph too large for the solver or the pruning asked for.
    """
    schemes = {name: gossip_rates(topology, name, set, caps) for name in SCHEMES}
    if topology.n <= NODES or prune or solver != "auto":
        schemes["sdp"] = gossip_rates(topology, "sdp", set, caps, solver)
    if prune:
        schemes["sdp_pruned"] = gossip_rates(topology, "sdp", set, caps, solver, prune=True)
    return RatesTable(topology, set, schemes, solver)
