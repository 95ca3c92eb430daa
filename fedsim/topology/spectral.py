"""Laplacians and what the theory asks of them: `chi1`, `chi2`, resistances, extreme eigenvalues.

`Lam = sum_e w_e (e_i - e_j)(e_i - e_j)^T` is the expected Laplacian of the gossip clocks (Nabli & Oyallon,
JMLR 2025, section 3.1), `chi1 = 1 / lambda_2(Lam)` and `chi2` half the largest effective resistance over
the edges that fire.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import InputError
from fedsim.topology import closed_forms
from fedsim.topology.topology import Topology

Vector = NDArray[np.float64]
Sparse = Any  # a scipy.sparse.csr_array; scipy brings no types
DENSE = 2000  # nodes up to which eigenvalues and resistances are computed from dense matrices
LOST = 1e-13  # lambda_2 over the largest eigenvalue where rounding is a per cent or so of lambda_2
FACTORED = 10_000  # nodes up to which a sparse factorisation is tried for a certified bound


@dataclass(frozen=True)
class Chi:
    """The two constants of a Laplacian; `exact` is False where they are certified upper bounds."""

    chi1: float
    chi2: float
    exact: bool

    @property
    def communications(self) -> float:
        """`sqrt(2 chi1 chi2)`: what the rates must be multiplied by for `2 chi1 chi2 = 1`."""
        return float(np.sqrt(2 * self.chi1 * self.chi2))

    def scaled(self, factor: float) -> Chi:
        """Return the constants of `factor * Lam`."""
        return Chi(self.chi1 / factor, self.chi2 / factor, self.exact)


def laplacian(topology: Topology, rates: Vector | None = None) -> Sparse:
    """Return `Lam` `[n, n]` over node numbers, sparse float64 (unit rates when none are given)."""
    from scipy.sparse import coo_array

    u, v = topology.edges.T
    w = np.ones(topology.m) if rates is None else np.asarray(rates, dtype=float)
    values = np.concatenate([w, w, -w, -w])
    where = (np.concatenate([u, v, u, v]), np.concatenate([u, v, v, u]))
    return coo_array((values, where), shape=(topology.n, topology.n)).tocsr()


def chi(topology: Topology, rates: Vector) -> Chi:
    """Return `chi1`, `chi2` of the rates `[m]` (exchanges per unit time); an edge of rate 0 never fires.

    Exact to `n = 2000`, and at any size for equal rates on a ring, path, star, complete graph, hypercube,
    grid or torus; beyond, certified upper bounds.

    Raises:
        InputError: the edges that fire do not connect the nodes, a rate is negative or not finite, or rates differ so
            much that nothing is left of `lambda_2`.
    """
    check_rates(topology, rates)
    equal = bool((rates == rates[0]).all())
    known = closed_forms.chi(topology) if equal else None
    if known is not None:
        return Chi(known[0], known[1], True).scaled(float(rates[0]))
    if topology.n <= DENSE:
        return _dense_chi(topology, rates)
    chi1 = 1 / algebraic_connectivity_bound(topology, rates)
    return Chi(chi1, float(min(chi1, 0.5 * resistance_bounds(topology, rates).max())), False)


def _dense_chi(topology: Topology, rates: Vector) -> Chi:
    spectrum = Spectrum(topology, rates)
    eigenvalues = spectrum.eigenvalues
    if eigenvalues[1] <= LOST * eigenvalues[-1]:
        fires = rates[rates > 0]
        raise InputError(
            f"rates of {topology.name!r}: from {fires.min():.3g} to {fires.max():.3g} they differ so much that "
            "lambda_2 is lost in rounding; raise the smallest, or set them to 0 so that their edges never fire"
        )
    return Chi(float(1 / eigenvalues[1]), spectrum.chi2, True)


def check_rates(topology: Topology, rates: Vector) -> None:
    """Refuse rates of the wrong length, negative, not finite, or zero on edges whose loss disconnects."""
    where = f"rates of {topology.name!r}"
    if topology.is_server:
        raise InputError(f"{where}: a server has no edges, so no gossip rates")
    if np.shape(rates) != (topology.m,):
        raise InputError(f"{where}: {topology.m} edges need as many rates, got shape {np.shape(rates)}")
    bad = np.flatnonzero(~(np.isfinite(rates) & (rates >= 0)))
    if len(bad):
        u, v = topology.edges[bad[0]]
        raise InputError(f"{where}: the rate of edge ({u}, {v}) is {rates[bad[0]]}; it must be a number >= 0")
    if not rates.all():
        from scipy.sparse.csgraph import connected_components

        firing = laplacian(topology, rates)
        firing.eliminate_zeros()
        parts, _ = connected_components(firing, directed=False)
        if parts > 1:
            raise InputError(f"{where}: the edges with a positive rate leave {parts} parts that never meet")


class Spectrum:
    """Dense quantities of `Lam`: the reference that everything else is checked against (n up to some 2,000)."""

    def __init__(self, topology: Topology, rates: Vector) -> None:
        self.u, self.v = topology.edges.T
        self.rates = rates
        self.matrix: NDArray[np.float64] = laplacian(topology, rates).toarray()

    @property
    def eigenvalues(self) -> Vector:
        """float64 `[n]`, ascending; the first is 0 to rounding."""
        return np.asarray(np.linalg.eigvalsh(self.matrix), dtype=float)

    @property
    def chi1(self) -> float:
        """`1 / lambda_2`."""
        return float(1 / self.eigenvalues[1])

    @property
    def resistances(self) -> Vector:
        """float64 `[m]`: `(e_i - e_j)^T Lam^+ (e_i - e_j)` of every edge, firing or not."""
        inverse = pseudo_inverse(self.matrix)
        diagonal = inverse.diagonal()
        return diagonal[self.u] + diagonal[self.v] - 2 * inverse[self.u, self.v]

    @property
    def chi2(self) -> float:
        """Half the largest resistance over the edges that fire."""
        return float(0.5 * self.resistances[self.rates > 0].max())


def pseudo_inverse(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return `Lam^+` of a connected Laplacian `[n, n]` by one Cholesky factorisation."""
    from scipy.linalg import get_lapack_funcs

    factorise, invert = get_lapack_funcs(("potrf", "potri"), (matrix,))
    n = len(matrix)
    shift = matrix.diagonal().mean() / n
    lower, info = factorise(matrix + shift, lower=1, overwrite_a=1)
    if info:
        raise np.linalg.LinAlgError("the Laplacian is not positive definite on the zero-sum subspace")
    inverse, _ = invert(lower, lower=1, overwrite_c=1)
    inverse = np.tril(inverse) + np.tril(inverse, -1).T
    return inverse - 1 / (shift * n * n)


def resistances(topology: Topology, rates: Vector) -> Vector:
    """Return every edge's effective resistance `[m]` (n up to 2,000, or equal rates in a closed form).

    Raises:
        InputError: too many nodes for a dense matrix and no closed form.
    """
    known = closed_forms.resistances(topology) if (rates == rates[0]).all() else None
    if known is not None:
        return known / rates[0]
    if topology.n > DENSE:
        raise InputError(
            f"topology {topology.name!r}: resistances of {topology.n} nodes need a dense matrix; the limit is "
            f"{DENSE}, or equal rates on a ring, path, star, complete graph, hypercube, grid or torus"
        )
    return Spectrum(topology, rates).resistances


def laplacian_eigenvalues(topology: Topology) -> tuple[float, float]:
    """Return (smallest positive, largest) eigenvalue of the unweighted Laplacian.

    Dense to `n = 2000`, closed forms at any size, sparse Lanczos (1e-8 relative) elsewhere.
    """
    known = closed_forms.extreme_eigenvalues(topology)
    if known is not None:
        return known
    if topology.n <= DENSE:
        eigenvalues = Spectrum(topology, np.ones(topology.m)).eigenvalues
        return float(eigenvalues[1]), float(eigenvalues[-1])
    matrix = laplacian(topology)
    return _second_smallest(matrix), _largest(matrix)


def mixing_gap(matrix: Sparse, topology: Topology | None = None) -> float:
    """Return the spectral gap `1 - max(|lambda_2|, |lambda_n|)` of a symmetric stochastic matrix `[n, n]`.

    Dense to `n = 2000`; beyond, a closed form where all weights are equal on a `topology` that has one, else
    Lanczos (1e-8 relative in the eigenvalue).
    """
    n = matrix.shape[0]
    if n <= DENSE:
        eigenvalues = np.linalg.eigvalsh(matrix.toarray() - 1 / n)
        return float(1 - np.abs(eigenvalues).max())
    known = None if topology is None else closed_forms.extreme_eigenvalues(topology)
    weights = matrix.data[matrix.indices != np.repeat(np.arange(n), np.diff(matrix.indptr))]
    if known is not None and (weights == weights[0]).all():
        return float(1 - max(abs(1 - weights[0] * extreme) for extreme in known))

    def deflated(x: Vector) -> Vector:
        return matrix @ x.ravel() - x.mean()

    return float(1 - abs(_extreme(deflated, n, "LM", 1e-8)))


def algebraic_connectivity_bound(topology: Topology, rates: Vector) -> float:
    """Return a certified lower bound of `lambda_2(Lam)`.

    Where a sparse factorisation is affordable, `(1 - 1e-6)` times the Lanczos value, certified by counting
    the negative pivots of `Lam - s I` (Sylvester). Elsewhere by routing every pair along a breadth-first
    tree: `lambda_2 >= n / (depth-weighted congestion)` (Diaconis & Stroock, 1991).
    """
    if topology.n <= FACTORED:
        matrix = laplacian(topology, rates)
        shift = (1 - 1e-6) * _second_smallest(matrix)
        if _negative_pivots(matrix, shift) == 1:
            return shift
    return _tree_bound(topology, rates)


def resistance_bounds(topology: Topology, rates: Vector) -> Vector:
    """Return upper bounds `[m]` of the resistances of firing edges (0 for others), by Rayleigh monotonicity.

    Keeping only the edge itself and the two-edge detours around it can but raise the resistance:
    `R_ij <= 1 / (w_ij + sum_k w_ik w_kj / (w_ik + w_kj))`. Beyond 200,000 edges, `1 / w_ij`.
    """
    fires = np.flatnonzero(rates > 0)
    if len(fires) > 200_000:
        return np.divide(1.0, rates, out=np.zeros(topology.m), where=rates > 0)
    adjacency = -laplacian(topology, rates)
    adjacency.setdiag(0)
    adjacency.eliminate_zeros()
    bounds = np.zeros(topology.m)
    for e in fires:
        u, v = topology.edges[e]
        bounds[e] = 1 / (rates[e] + _detours(adjacency, u, v))
    return bounds


def _detours(adjacency: Sparse, u: int, v: int) -> float:
    start, stop = adjacency.indptr, adjacency.indices
    a, b = slice(start[u], start[u + 1]), slice(start[v], start[v + 1])
    _, i, j = np.intersect1d(stop[a], stop[b], assume_unique=True, return_indices=True)
    first, second = adjacency.data[a][i], adjacency.data[b][j]
    return float((first * second / (first + second)).sum())


def _start(n: int) -> Vector:
    """A fixed start for Lanczos, so that the same graph gives the same digits."""
    start = np.random.default_rng(0).standard_normal(n)
    return start - start.mean()


def _extreme(apply: Callable[[Vector], Vector], n: int, which: str, tolerance: float) -> float:
    """The largest eigenvalue (`LA`, or `LM` in magnitude) of a symmetric operator, by Lanczos."""
    from scipy.sparse import linalg

    lanczos: Any = linalg.eigsh
    operator: Any = linalg.LinearOperator
    found = lanczos(
        operator((n, n), matvec=apply, dtype=float),
        k=1,
        which=which,
        v0=_start(n),
        return_eigenvectors=False,
        tol=tolerance,
    )
    return float(found[0])


def _largest(matrix: Sparse) -> float:
    return _extreme(lambda x: matrix @ x.ravel(), matrix.shape[0], "LA", 1e-8)


def _second_smallest(matrix: Sparse) -> float:
    """`lambda_2` by Lanczos on the inverse of the Laplacian grounded at node 0 (projected on zero-sum)."""
    from scipy.sparse.linalg import splu

    solver = splu(matrix[1:, 1:].tocsc(), permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True})

    def apply(x: Vector) -> Vector:
        x = x.ravel() - x.mean()
        y = np.concatenate([[0.0], solver.solve(x[1:])])
        return y - y.mean()

    return 1 / _extreme(apply, matrix.shape[0], "LA", 1e-10)


def _negative_pivots(matrix: Sparse, shift: float) -> int:
    """Number of eigenvalues below `shift`, or -1 where the factorisation had to leave the diagonal."""
    from scipy.sparse import eye_array
    from scipy.sparse.linalg import splu

    shifted = (matrix - shift * eye_array(matrix.shape[0])).tocsc()
    factors = splu(shifted, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    if not np.array_equal(factors.perm_r, factors.perm_c):
        return -1
    return int((factors.U.diagonal() < 0).sum())


def _tree_bound(topology: Topology, rates: Vector) -> float:
    """Poincare bound with the paths of one breadth-first tree: `n (x_i - x_j)^2` summed along each path."""
    from scipy.sparse.csgraph import breadth_first_order

    n = topology.n
    adjacency = -laplacian(topology, rates)
    adjacency.setdiag(0)
    adjacency.eliminate_zeros()
    order, parent = breadth_first_order(adjacency, int(topology.order[n // 2]), directed=False)
    depth, size = np.zeros(n), np.ones(n)
    for node in order[1:]:
        depth[node] = depth[parent[node]] + 1
    for node in order[:0:-1]:
        size[parent[node]] += size[node]
    child = order[1:]
    conductance = np.asarray(adjacency[child, parent[child]]).ravel()
    pairs = size[child] * (n - size[child])
    longest = 2 * depth.max()
    return float(n / (longest * (pairs / conductance).max()))
