"""The table of `fedsim rates`: what each scheme needs on a topology, and what the SDP saves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedsim.topology.rates import Rates, Solver, gossip_rates
from fedsim.topology.schemes import SCHEMES
from fedsim.topology.sets import SetKind
from fedsim.topology.topology import Topology


@dataclass(frozen=True)
class RatesTable:
    """The schemes of one topology and set, in order: `uniform`, `metropolis`, `degree`, `sdp` (`sdp_pruned`)."""

    topology: Topology
    set: SetKind
    schemes: dict[str, Rates]

    @property
    def measure(self) -> str:
        """What is compared: `communications`, `cost` where edges have costs, `slowdown` for per-node sets."""
        if self.set != "total":
            return "slowdown"
        return "communications" if self.topology.costs is None else "cost"

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
        """Return the share of `against`'s need that a scheme (default: the last) does without, 0 to 1."""
        chosen = self.schemes[scheme or list(self.schemes)[-1]]
        return 1 - self._need(chosen) / self._need(self.schemes[against])

    def _need(self, rates: Rates) -> float:
        """`sqrt(2 chi1 chi2)` of rates on the set's budget: communications, cost or (before max(1, .)) slowdown."""
        return rates.chi.communications

    def notes(self) -> list[str]:
        """Return what a reader must know beside the numbers: solver, certificate, bounds, fewer edges."""
        found = []
        for name, rates in self.schemes.items():
            if rates.bound is not None:
                how = f"{rates.solver} in {rates.seconds:.1f} s" + (" (from the cache)" if rates.cached else "")
                found.append(
                    f"{name}: value {rates.chi.communications:.6g}, certified lower bound {rates.bound:.6g}, "
                    f"gap {rates.gap:.1e}; {how}"
                )
            if rates.edges < self.topology.m:
                found.append(f"{name}: for {rates.edges} of the {self.topology.m} edges; the others never fire")
        if not all(rates.chi.exact for rates in self.schemes.values()):
            found.append("chi1 and chi2 are certified upper bounds, not exact: the graph has more than 2,000 nodes")
        return found


def rates_table(
    topology: Topology,
    set: SetKind = "total",
    prune: bool = False,
    caps: float | None = None,
    solver: Solver = "auto",
) -> RatesTable:
    """Compute every scheme's rates on a topology, normalised to the set's budget.

    Raises:
        InputError: an unknown set or solver, a server, or a graph too large for the SDP.
    """
    schemes = {name: gossip_rates(topology, name, set, caps) for name in SCHEMES}
    schemes["sdp"] = gossip_rates(topology, "sdp", set, caps, solver)
    if prune:
        schemes["sdp_pruned"] = gossip_rates(topology, "sdp", set, caps, solver, prune=True)
    return RatesTable(topology, set, schemes)
