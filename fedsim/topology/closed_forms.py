"""Spectral quantities of unweighted products of paths and rings, stars and complete graphs, at any size.

All are for unit rates; a graph is recognised by its `recipe`, or by its degrees where they tell. Chung, Spectral
Graph Theory (1997); values for `P = L / m` are those of Nabli & Oyallon, JMLR 2025, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.topology.topology import Topology

Vector = NDArray[np.float64]
SIDE = 4000  # longest side of a grid whose resistances are computed with dense sine tables


def extreme_eigenvalues(topology: Topology) -> tuple[float, float] | None:
    """Return (smallest positive, largest) Laplacian eigenvalue, or None where no closed form is known."""
    kind, p = _recipe(topology)
    n = float(topology.n)
    if kind == "complete":
        return n, n
    if kind == "star":
        return (1.0, n) if n > 2 else (2.0, 2.0)
    factors = _factors(kind, p)
    if factors is None:
        return None
    spectra = [_eigenvalues(shape, size) for shape, size in factors if size > 1]
    return float(min(s[1] for s in spectra)), float(sum(s[-1] for s in spectra))


def chi(topology: Topology) -> tuple[float, float] | None:
    """Return (chi1, chi2) for unit rates, or None."""
    extremes = extreme_eigenvalues(topology)
    if extremes is None:
        return None
    kind, p = _recipe(topology)
    if kind in ("star", "path"):
        return 1 / extremes[0], 0.5
    if kind in ("ring", "complete", "hypercube"):  # edge-transitive: m R = n - 1
        return 1 / extremes[0], (topology.n - 1) / (2 * topology.m)
    sides = _sides(p)
    classes = _torus_resistances(sides) if kind == "torus" else _grid_resistances(sides)
    if classes is None:
        return None
    return 1 / extremes[0], float(0.5 * max(r.max() for r in classes if r.size))


def resistances(topology: Topology) -> Vector | None:
    """Return every edge's resistance `[m]` for unit rates, or None."""
    kind, _ = _recipe(topology)
    if kind in ("star", "path"):
        return np.ones(topology.m)
    if kind in ("ring", "complete", "hypercube"):
        return np.full(topology.m, (topology.n - 1) / topology.m)
    return None


def _recipe(topology: Topology) -> tuple[str, dict[str, Any]]:
    """How the graph was made, or what its degrees say a connected graph is."""
    n, m, most = topology.n, topology.m, int(topology.degrees.max(initial=0))
    if topology.recipe:
        return topology.recipe
    if m == n * (n - 1) // 2:
        return "complete", {"n": n}
    if m == n - 1 and most == n - 1:
        return "star", {"n": n}
    if most == 2:
        return ("ring" if m == n else "path"), {"n": n}
    return "", {}


def _sides(p: dict[str, Any]) -> tuple[int, ...]:
    return p["sides"] if "sides" in p else (p["rows"], p["columns"])


def _factors(kind: str, p: dict[str, Any]) -> list[tuple[str, int]] | None:
    """The graph as a Cartesian product of rings and paths."""
    if kind in ("ring", "path"):
        return [(kind, p["n"])]
    if kind in ("grid", "torus"):
        shape = "path" if kind == "grid" else "ring"
        return [(shape, side) for side in _sides(p)]
    return [("path", 2)] * p["dim"] if kind == "hypercube" else None


def _eigenvalues(shape: str, size: int) -> Vector:
    """Ascending eigenvalues of a ring or path (a ring of two nodes is one edge)."""
    k = np.arange(size)
    if shape == "path" or size <= 2:
        return 4 * np.sin(np.pi * k / (2 * size)) ** 2
    return np.sort(4 * np.sin(np.pi * k / size) ** 2)


def _torus_resistances(sides: Sequence[int]) -> list[Vector]:
    """One resistance per direction: `R_d = (1/n) sum_k |1 - e^{i k_d}|^2 / lambda(k)`."""
    gains = [4 * np.sin(np.pi * np.arange(s) / s) ** 2 for s in sides]
    waves = [g / 2 if s == 2 else g for g, s in zip(gains, sides, strict=True)]
    total = reduce(np.add.outer, waves, np.zeros(()))
    total[(0,) * len(sides)] = np.inf
    return [np.array([(_along(axis, g, len(sides)) / total).mean()]) for axis, g in enumerate(gains) if sides[axis] > 1]


def _along(axis: int, values: Vector, dims: int) -> NDArray[np.float64]:
    return np.expand_dims(values, tuple(d for d in range(dims) if d != axis))


def _grid_resistances(sides: Sequence[int]) -> list[Vector] | None:
    """Every edge's resistance, from cosine eigenvectors: squared along one axis, differenced along the other."""
    if len(sides) != 2 or max(sides) > SIDE:
        return None
    total = np.add.outer(*[_eigenvalues("path", s) for s in sides])
    total[0, 0] = np.inf
    vectors = [_cosines(s) for s in sides]
    found = []
    for axis in (0, 1):
        tables = [np.diff(v, axis=0) ** 2 if a == axis else v**2 for a, v in enumerate(vectors)]
        found.append(reduce(np.matmul, [tables[0], 1 / total, tables[1].T]))
    return found


def _cosines(size: int) -> NDArray[np.float64]:
    """Orthonormal eigenvectors of a path, `[size, size]`, one per column."""
    j, k = np.arange(size)[:, None], np.arange(size)[None, :]
    norm = np.where(k == 0, 1 / size, 2 / size)
    return np.sqrt(norm) * np.cos(np.pi * k * (2 * j + 1) / (2 * size))
