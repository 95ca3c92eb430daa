"""Mixing matrices: symmetric, doubly stochastic, zero off the edges; checked whatever they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import InputError, did_you_mean
from fedsim.topology.spectral import laplacian, mixing_gap
from fedsim.topology.topology import Topology

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Vector = NDArray[np.float64]
TOLERANCE = 1e-12


def metropolis(topology: Topology) -> Vector:
    """Metropolis-Hastings weights `1 / (1 + max(d_i, d_j))` (Xiao, Boyd & Kim, 2007)."""
    return 1 / (1 + topology.degrees[topology.edges].max(axis=1))


def max_degree(topology: Topology) -> Vector:
    """The same weight `1 / (1 + largest degree)` on every edge."""
    return np.full(topology.m, 1 / (1 + topology.degrees.max()))


def fdla(topology: Topology) -> Vector:
    """Fastest linear averaging, weights of any sign (Xiao & Boyd, 2004); by cvxpy, small graphs only."""
    from fedsim.topology import semidefinite

    return semidefinite.fdla(topology)


def fastest_mixing(topology: Topology) -> Vector:
    """Fastest mixing Markov chain, weights >= 0 (Boyd, Diaconis & Xiao, 2004); by cvxpy, small graphs only."""
    from fedsim.topology import semidefinite

    return semidefinite.fastest_mixing(topology)


KINDS: dict[str, Callable[[Topology], Vector]] = {f.__name__: f for f in (metropolis, max_degree, fdla, fastest_mixing)}
SLOW = ("fdla", "fastest_mixing")


def build_mixing(spec: Mapping[str, Any], topology: Topology, base: Path | None = None) -> csr_array:
    """Return the mixing matrix of a scenario's `mixing` section, `{kind, lazy}` or `{file}`.

    Raises:
        InputError: an unknown key or kind, or a matrix that does not fit.
    """
    allowed = ("kind", "lazy", "file")
    for key in spec:
        if key not in allowed:
            raise InputError(
                f"mixing: unknown key {key!r}{did_you_mean(str(key), allowed)}; known are {', '.join(allowed)}"
            )
    if "file" in spec and "kind" in spec:
        raise InputError("mixing: give kind or file, not both")
    if "file" in spec:
        return _from_file(str(spec["file"]), topology, base or Path.cwd(), bool(spec.get("lazy", False)))
    return mixing_matrix(topology, spec.get("kind", "metropolis"), lazy=bool(spec.get("lazy", False)))


def mixing_matrix(topology: Topology, kind: str = "metropolis", lazy: bool = False) -> csr_array:
    """Return `W = I - Lap(weights)` `[n, n]` over node numbers, sparse float64; `lazy` returns `(I + W) / 2`.

    Args:
        topology: a connected graph.
        kind: `metropolis`, `max_degree`, `fdla` or `fastest_mixing`.
        lazy: half a step, which makes `W` positive semidefinite where its eigenvalues are at least -1.

    Raises:
        InputError: an unknown kind, a server, or a graph too large for cvxpy.
    """
    if topology.is_server:
        raise InputError(f"mixing on {topology.name!r}: a server has no edges, so no mixing matrix")
    rule = KINDS.get(kind)
    if rule is None:
        raise InputError(f"mixing: unknown kind {kind!r}{did_you_mean(kind, KINDS)}; known are {', '.join(KINDS)}")
    weights = _kept(kind, rule, topology) if kind in SLOW else rule(topology)
    return checked(_from_weights(topology, weights, lazy), topology)


def _kept(kind: str, rule: Callable[[Topology], Vector], topology: Topology) -> Vector:
    """An answer of cvxpy, from the cache if it was solved before."""
    from fedsim.topology import cache

    content = (topology.n, topology.edges, kind)
    saved = cache.load("mixing", content)
    if saved is None:
        saved = {"weights": rule(topology)}
        cache.save("mixing", content, saved)
    return saved["weights"]


def _from_weights(topology: Topology, weights: Vector, lazy: bool) -> csr_array:
    from scipy.sparse import eye_array

    step = laplacian(topology, weights * (0.5 if lazy else 1.0))
    return (eye_array(topology.n, format="csr") - step).tocsr()


def checked(matrix: csr_array, topology: Topology) -> csr_array:
    """Return the matrix with sorted columns, after checking it against the topology.

    Raises:
        InputError: not symmetric, rows that do not sum to 1, or an entry where there is no edge.
    """
    from scipy.sparse import csr_array

    where = f"mixing on {topology.name!r}"
    n = topology.n
    if matrix.shape != (n, n):
        raise InputError(f"{where}: the matrix must be {n} x {n}, got shape {matrix.shape}")
    if not np.isfinite(matrix.data).all():
        raise InputError(f"{where}: the matrix has entries that are not finite")
    if abs(matrix - matrix.T).max() > TOLERANCE:
        raise InputError(f"{where}: the matrix is not symmetric")
    sums = np.asarray(matrix.sum(axis=1)).ravel()
    worst = int(np.abs(sums - 1).argmax())
    if abs(sums[worst] - 1) > 100 * TOLERANCE:
        raise InputError(f"{where}: the matrix is not doubly stochastic: row {worst} sums to {sums[worst]:.9g}")
    _refuse_stray_entries(where, matrix, topology)
    clean = csr_array(matrix, dtype=np.float64)
    clean.sort_indices()
    return clean


def _refuse_stray_entries(where: str, matrix: csr_array, topology: Topology) -> None:
    n = topology.n
    upper = matrix.tocoo()
    inside = upper.row < upper.col
    rows, columns = upper.row[inside], upper.col[inside]
    filled = upper.data[inside] != 0
    found = rows[filled].astype(np.int64) * n + columns[filled]
    stray = np.setdiff1d(found, topology.edges[:, 0] * n + topology.edges[:, 1])
    if len(stray):
        raise InputError(f"{where}: the matrix mixes nodes {divmod(int(stray[0]), n)}, which share no edge")


def _from_file(file: str, topology: Topology, base: Path, lazy: bool) -> csr_array:
    """A `.npy` array `[n, n]` or a scipy sparse `.npz`, over node numbers."""
    from scipy.sparse import csr_array, eye_array, load_npz

    place = base / file
    if not place.is_file():
        raise InputError(f"mixing: no file {file!r} in {base}")
    if place.suffix not in (".npy", ".npz"):
        raise InputError(f"mixing: {file!r} must be a .npy array or a scipy sparse .npz")
    try:
        matrix = csr_array(np.load(place, allow_pickle=False) if place.suffix == ".npy" else load_npz(place))
    except (ValueError, OSError, KeyError) as error:
        raise InputError(f"mixing: cannot read {file!r}: {error}") from None
    checked(matrix, topology)
    mixing = checked(csr_array((matrix + eye_array(topology.n)) * 0.5) if lazy else matrix, topology)
    if mixing.data.min() < 0 and mixing_gap(mixing, topology) < -TOLERANCE:
        raise InputError(
            f"mixing on {topology.name!r}: {file!r} has negative entries and an eigenvalue of magnitude "
            f"{1 - mixing_gap(mixing, topology):.6g} beside the 1 of the mean: mixing with it diverges"
        )
    return mixing
