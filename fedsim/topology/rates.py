"""Gossip rates of a topology: by a local rule, by the SDP, or from a file; with certificate and cache."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim import sections
from fedsim.errors import InputError, did_you_mean
from fedsim.topology import cache
from fedsim.topology.optimise import Solver, check_solver, optimise
from fedsim.topology.rate_files import read_rates, write_rates
from fedsim.topology.schemes import SCHEMES
from fedsim.topology.sets import RateSet, SetKind, rate_set
from fedsim.topology.spectral import Chi, chi
from fedsim.topology.topology import Topology

__all__ = ["Rates", "build_rates", "gossip_rates", "read_rates", "write_rates"]

Vector = NDArray[np.float64]
KINDS = (*SCHEMES, "sdp")


KEYS = tuple(f.name for f in fields(sections.Rates))


def clashes(spec: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the (key, reason) of what a `rates` section says in vain."""
    if "file" in spec:
        meant, why = ("kind", "set", "caps", "solver", "prune"), "does not go with file: its rates stay as they are"
    elif spec.get("kind", "uniform") == "sdp":
        meant, why = ("chi1", "chi2"), "does not go with kind: sdp, whose constants are computed"
    else:
        meant, why = ("solver", "prune"), "is for kind: sdp"
    yield from ((key, why) for key in meant if spec.get(key) not in (None, False, "auto"))
    if (spec.get("chi1") is None) != (spec.get("chi2") is None):
        yield "chi1", "chi1 and chi2 are given together or not at all"


@dataclass(frozen=True, eq=False)
class Rates:
    """Rates on edges, normalised to their set's budget, with what is known about them.

    Attributes:
        kind: `uniform`, `metropolis`, `degree`, `sdp`, `sdp_pruned`, `file`.
        set: the set they are normalised to (`none` for a file's own).
        rates: float64 `[m]`, exchanges per unit time on each edge; 0 where pruned.
        chi: `chi1`, `chi2` of their Laplacian over the edges that fire.
        costs: float64 `[m]`, the cost of one exchange.
        bound: certified lower bound of `sqrt(2 chi1 chi2)` over the set on the edges kept (None: none).
        solver: what computed them, in words.
        seconds: how long that took when it was computed.
        cached: True when read from the cache.
    """

    kind: str
    set: str
    rates: Vector
    chi: Chi
    costs: Vector
    bound: float | None = None
    solver: str = "formula"
    seconds: float = 0.0
    cached: bool = False

    @property
    def chi1(self) -> float:
        """`1 / lambda_2` of the rates' Laplacian."""
        return self.chi.chi1

    @property
    def chi2(self) -> float:
        """Half the largest resistance over firing edges."""
        return self.chi.chi2

    @property
    def edges(self) -> int:
        """Number of edges that fire."""
        return int(np.count_nonzero(self.rates))

    @property
    def communications(self) -> float:
        """Exchanges per unit time once scaled to `2 chi1 chi2 = 1`."""
        return self.chi.communications * float(self.rates.sum())

    @property
    def cost(self) -> float:
        """Cost per unit time once scaled to `2 chi1 chi2 = 1`."""
        return self.chi.communications * float(self.costs @ self.rates)

    @property
    def slowdown(self) -> float:
        """How much slower than one gradient per unit time the run must be to stay inside the set."""
        return max(1.0, self.chi.communications)

    @property
    def gap(self) -> float | None:
        """Certified relative distance of `sqrt(2 chi1 chi2)` from its least value (None without a bound)."""
        if self.bound is None:
            return None
        return max(0.0, 1 - self.bound / self.chi.communications)

    def as_plain(self) -> dict[str, Any]:
        """Return plain values and lists, from which `from_plain` makes the same bits."""
        plain = {**vars(self), "rates": self.rates.tolist(), "costs": self.costs.tolist()}
        return {**plain, "chi": [float(self.chi1), float(self.chi2), bool(self.chi.exact)]}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Rates:
        """Return the rates of `as_plain`."""
        arrays = {name: np.array(plain[name], dtype=np.float64) for name in ("rates", "costs")}
        return cls(**{**plain, **arrays, "chi": Chi(*plain["chi"])})

    def scaled(self, factor: float) -> Rates:
        """Return `factor` times the rates."""
        bound = None if self.bound is None else self.bound / factor
        return replace(self, rates=self.rates * factor, chi=self.chi.scaled(factor), bound=bound)

    def theory(self) -> Rates:
        """Return the multiple with `2 chi1 chi2 = 1`, which DADAO's analysis asks for."""
        return self.scaled(self.chi.communications)


def build_rates(spec: Mapping[str, Any], topology: Topology, base: Path | None = None) -> Rates:
    """Return the rates of a scenario's `rates` section: `{kind, set, caps, solver, prune}` or `{file}`.

    `chi1`, `chi2` may be given for graphs too large to compute them. `scale` is left to the caller.

    Raises:
        InputError: an unknown key or name, keys that do not go together, or rates that cannot be used.
    """
    for key in spec:
        if key not in KEYS:
            raise InputError(f"rates: unknown key {key!r}{did_you_mean(str(key), KEYS)}; known are {', '.join(KEYS)}")
    for key, why in clashes(spec):
        raise InputError(f"rates.{key}: {why}")
    given = {k: v for k, v in spec.items() if k not in ("scale", "chi1", "chi2", "file", "kind")}
    known = _given_chi(spec)
    if "file" in spec:
        return _from_file(str(spec["file"]), topology, base or Path.cwd(), known)
    return gossip_rates(topology, spec.get("kind", "uniform"), chi_given=known, **given)


def gossip_rates(
    topology: Topology,
    kind: str = "sdp",
    set: SetKind = "total",
    caps: float | Vector | None = None,
    solver: Solver = "auto",
    prune: bool = False,
    chi_given: Chi | None = None,
) -> Rates:
    """Return rates on a topology's edges, normalised to the set's budget.

    Args:
        topology: a connected graph; its `costs` weigh exchanges.
        kind: `uniform`, `metropolis` (`1/(1 + max degree)`), `degree` (`1/d_i + 1/d_j`), or `sdp`.
        set: `total` (C1), `node_rate` (C2), `node_bandwidth` (C3).
        caps: the total budget, or each node's cap (default 1).
        solver: for `sdp`; `auto` chooses by size (`optimise`) and the answer says which it was.
        prune: for `sdp`; drop small rates and solve again while that helps (the result is for fewer edges).
        chi_given: constants to trust in place of computing them (of the normalised rates).

    Raises:
        InputError: an unknown name, a server, or a graph too large for the SDP.
    """
    affordable = rate_set(topology, set, caps)
    if kind != "sdp":
        rule = SCHEMES.get(kind)
        if rule is None:
            raise InputError(f"rates: unknown kind {kind!r}{did_you_mean(kind, KINDS)}; known are {', '.join(KINDS)}")
        rates = affordable.normalise(rule(topology))
        return Rates(kind, set, rates, _constants(topology, rates, chi_given), affordable.costs)
    return _solved(topology, affordable, solver, prune)


def _solved(topology: Topology, affordable: RateSet, solver: Solver, prune: bool) -> Rates:
    """The SDP's rates, from the cache if the same question was solved before."""
    check_solver(topology, solver)
    content = (topology.n, topology.edges, affordable.costs, affordable.caps, affordable.kind, solver, prune)
    saved = cache.load("rates", content)
    cached = saved is not None
    if saved is None:
        began = time.perf_counter()
        answer = optimise(topology, affordable, solver, prune)
        seconds = time.perf_counter() - began
        saved = {"rates": answer.rates, "bound": np.array(answer.bound), "seconds": np.array(seconds)}
        saved["solver"] = np.array(answer.solver)
        cache.save("rates", content, saved)
    return Rates(
        "sdp_pruned" if prune else "sdp",
        affordable.kind,
        saved["rates"],
        chi(topology, saved["rates"]),
        affordable.costs,
        bound=float(saved["bound"]),
        solver=str(saved["solver"]),
        seconds=float(saved["seconds"]),
        cached=cached,
    )


def _given_chi(spec: Mapping[str, Any]) -> Chi | None:
    given = [spec.get("chi1"), spec.get("chi2")]
    if given == [None, None]:
        return None
    if any(not isinstance(x, (int, float)) or not x > 0 for x in given):
        raise InputError(f"rates: chi1 and chi2 must both be positive numbers, got {given[0]!r} and {given[1]!r}")
    return Chi(float(spec["chi1"]), float(spec["chi2"]), exact=False)


def _from_file(file: str, topology: Topology, base: Path, known: Chi | None) -> Rates:
    rates = read_rates(file, topology, base)
    costs = np.ones(topology.m) if topology.costs is None else topology.costs
    return Rates("file", "none", rates, _constants(topology, rates, known), costs, solver=file)


def _constants(topology: Topology, rates: Vector, given: Chi | None) -> Chi:
    """The constants given, which no graph can contradict here, or computed ones."""
    if given is None:
        return chi(topology, rates)
    least = (topology.n - 1) / (2 * float(rates.sum()))
    if min(given.chi1, given.chi2) < least * (1 - 1e-9):
        raise InputError(
            f"rates: chi1 and chi2 of these rates are at least (n - 1) / (2 sum of rates) = {least:.6g} on any graph, "
            f"got {given.chi1:.6g} and {given.chi2:.6g}"
        )
    return given
