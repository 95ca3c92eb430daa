"""Gossip rates of a topology: by a local rule, by the SDP, or from a file; with certificate and cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import InputError, did_you_mean
from fedsim.topology import cache
from fedsim.topology.schemes import SCHEMES
from fedsim.topology.sets import RateSet, SetKind, rate_set
from fedsim.topology.spectral import Chi, check_rates, chi
from fedsim.topology.topology import Topology

Vector = NDArray[np.float64]
Solver = Literal["auto", "cvxpy", "interior_point", "surrogate"]
CVXPY_NODES = 20  # nodes up to which cvxpy answers within a second
PAIRS = 4000  # edges up to which matrices over pairs of edges fit
NODES = 2000  # nodes up to which the SDP is attempted at all
KINDS = (*SCHEMES, "sdp", "file")
KEYS = ("kind", "set", "caps", "solver", "prune", "file", "chi1", "chi2", "scale")


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
        InputError: an unknown key or name, or rates that cannot be used.
    """
    for key in spec:
        if key not in KEYS:
            raise InputError(f"rates: unknown key {key!r}{did_you_mean(str(key), KEYS)}; known are {', '.join(KEYS)}")
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
        solver: for `sdp`; `auto` takes cvxpy for small graphs, then the interior point, then the surrogate.
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
        return Rates(kind, set, rates, chi_given or chi(topology, rates), affordable.costs)
    chosen = _choose(topology, solver)
    content = (topology.n, topology.edges, affordable.costs, affordable.caps, set, chosen, prune)
    saved = cache.load("rates", content)
    if saved is None:
        began = time.perf_counter()
        rates, bound = _optimise(topology, affordable, chosen, prune)
        saved = {"rates": rates, "bound": np.array(bound), "seconds": np.array(time.perf_counter() - began)}
        cache.save("rates", content, saved)
        cached = False
    else:
        cached = True
    rates = saved["rates"]
    return Rates(
        "sdp_pruned" if prune else "sdp",
        set,
        rates,
        chi(topology, rates),
        affordable.costs,
        bound=float(saved["bound"]),
        solver=chosen,
        seconds=float(saved["seconds"]),
        cached=cached,
    )


def read_rates(file: str, topology: Topology, base: Path | None = None) -> Vector:
    """Read rates `[m]` from a table `node,node,rate` (node names of the topology), or a YAML's `rates` list.

    Raises:
        InputError: a missing, repeated or unknown edge, a rate that is negative or not a number.
    """
    from fedsim.topology import files

    place = files.find(file, base or Path.cwd())
    if place is None:
        raise InputError(f"rates: no file {file!r}")
    if place.suffix in (".yaml", ".yml"):
        return _listed_rates(place, topology)
    number = {str(topology.label(i)): i for i in range(topology.n)}
    edge = {(int(u), int(v)): e for e, (u, v) in enumerate(topology.edges)}
    rates = np.full(topology.m, np.nan)
    for line, (first, second, text) in files.rows(place, 3, 3):
        if (first, second, text) == ("u", "v", "rate"):
            continue
        ends = sorted((number.get(first, -1), number.get(second, -1)))
        e = edge.get((ends[0], ends[1]))
        if e is None:
            raise InputError(f"{place.name}:{line}: {topology.name!r} has no edge ({first}, {second})")
        if not np.isnan(rates[e]):
            raise InputError(f"{place.name}:{line}: edge ({first}, {second}) is given twice")
        rates[e] = _number(place, line, text)
    missing = np.flatnonzero(np.isnan(rates))
    if len(missing):
        u, v = (topology.label(int(i)) for i in topology.edges[missing[0]])
        raise InputError(f"{place.name}: the rate of edge ({u}, {v}) is missing ({len(missing)} missing in all)")
    check_rates(topology, rates)
    return rates


def write_rates(place: Path, topology: Topology, rates: Vector) -> None:
    """Write a table `u,v,rate` that `rates: {file: ...}` reads back bit for bit."""
    ends = [(topology.label(int(u)), topology.label(int(v))) for u, v in topology.edges]
    lines = [f"{u},{v},{rate!r}" for (u, v), rate in zip(ends, rates.tolist(), strict=True)]
    place.write_text("\n".join(["u,v,rate", *lines]) + "\n")


def _optimise(topology: Topology, affordable: RateSet, solver: str, prune: bool) -> tuple[Vector, float]:
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1, user_api="blas"):  # the same digits whatever the number of cores
        rates, bound = _solve(topology, affordable, solver)
        if not prune:
            return rates, bound
        from fedsim.topology.prune import prune_and_resolve

        return prune_and_resolve(topology, affordable, partial(_solve, solver=solver), rates, bound)


def _solve(topology: Topology, affordable: RateSet, solver: str) -> tuple[Vector, float]:
    """The solver's rates, or a scheme's where that is at least as good (as on edge-transitive graphs)."""
    from fedsim.topology.interior_point import required

    rates, bound = SOLVERS[solver](topology, affordable)
    schemes = [affordable.normalise(rule(topology)) for rule in SCHEMES.values()]
    return min((*schemes, rates), key=lambda r: required(topology, affordable, r) * (1 - 1e-9 * (r is not rates))), bound


def _choose(topology: Topology, solver: str) -> str:
    names = get_args(Solver)
    if solver not in names:
        raise InputError(f"rates: unknown solver {solver!r}{did_you_mean(solver, names)}; known are {', '.join(names)}")
    if topology.n > NODES:
        raise InputError(
            f"rates of {topology.name!r}: the SDP needs dense {topology.n} x {topology.n} matrices; the limit is "
            f"{NODES} nodes. Use rates: {{kind: metropolis}}, or rates of your own with rates: {{file: ...}}"
        )
    if solver != "auto":
        return solver
    if topology.n <= CVXPY_NODES:
        return "cvxpy"
    return "interior_point" if topology.m <= PAIRS else "surrogate"


def _by_cvxpy(topology: Topology, affordable: RateSet) -> tuple[Vector, float]:
    from fedsim.topology.semidefinite import solve

    found = solve(topology, affordable)
    return found.rates, found.bound


def _by_interior_point(topology: Topology, affordable: RateSet) -> tuple[Vector, float]:
    from fedsim.topology.interior_point import solve

    found = solve(topology, affordable, _tolerance(topology))
    return found.rates, found.bound


def _tolerance(topology: Topology) -> float:
    """Certified gap at which to stop: the last digits cost most where a step takes a second."""
    if topology.m <= 600 and topology.n <= 300:
        return 2e-5
    return 1e-3 if topology.m <= 1500 else 4e-3


def _by_surrogate(topology: Topology, affordable: RateSet) -> tuple[Vector, float]:
    from fedsim.topology.surrogate import minimise

    found = minimise(topology, affordable)
    return affordable.normalise(affordable.merge @ found.arcs), found.bound


Solve = Callable[[Topology, RateSet], tuple[Vector, float]]
SOLVERS: dict[str, Solve] = {"cvxpy": _by_cvxpy, "interior_point": _by_interior_point, "surrogate": _by_surrogate}


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
    return Rates("file", "none", rates, known or chi(topology, rates), costs, solver=file)


def _listed_rates(place: Path, topology: Topology) -> Vector:
    from fedsim.topology import files

    content = files.load_yaml(place)
    if "rates" not in content or len(content["rates"]) != len(content.get("edges", ())):
        raise InputError(f"{place.name}: 'rates' must list one number per entry of 'edges'")
    labels = list(content["nodes"]) if "nodes" in content else list(range(content["n"]))
    number = {label: i for i, label in enumerate(labels)}
    ends = np.sort([[number[u], number[v]] for u, v in content["edges"]], axis=1)
    by_row = np.lexsort((ends[:, 1], ends[:, 0]))
    if not np.array_equal(ends[by_row], topology.edges):
        raise InputError(f"{place.name}: its edges are not those of {topology.name!r}")
    rates = np.array([_number(place, None, str(r)) for r in content["rates"]])[by_row]
    check_rates(topology, rates)
    return rates


def _number(place: Path, line: int | None, text: str) -> float:
    where = place.name if line is None else f"{place.name}:{line}"
    try:
        rate = float(text)
    except ValueError:
        rate = float("nan")
    if not (np.isfinite(rate) and rate >= 0):
        raise InputError(f"{where}: a rate must be a number >= 0, got {text!r}")
    return rate
