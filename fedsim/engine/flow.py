"""What happens between two events: `v(t + s) = exp(A s) v(t)`, with `exp(A s)` as a sum of modes found once.

A run takes millions of such steps, and nothing pulls back what they do to a sum that the flow conserves (DADAO's
`sum z = 0`, the mean of gossip). So an error must not always be the same: modes are found to more digits than a double
has, and what is summed is `exp(A s) - 1`, which leaves alone what does not move.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, permutations
from typing import Any, NamedTuple, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Space = tuple[Any, Any, Any]  # of numpy's complex longdouble: it brings no types

SQUARING_ACCURACY = 1e-9
"""Modes that differ by more from the squared exponential are not used."""
_CHECKED_TIMES = (1e-6, 1e-2, 0.3, 1.0, 3.0, 10.0, 30.0)
_CLUSTER_TOLERANCES = (1e-12, 1e-10, 1e-8, 1e-6, 1e-4)
_TERMS = 14
_u = np.uint64


class FlowTable(NamedTuple):
    """The arrays that `flow_matrix` evaluates.

    Attributes:
        exponents: float64 `[groups, 2]`, real and imaginary part of an eigenvalue (imaginary part >= 0).
        powers: int64 `[groups]`, how many powers of t multiply its exponential.
        modes: float64 `[modes * k * k]`, per group and power one matrix, or two (cosine, sine) where the
            imaginary part is positive; empty: `exp(A t)` is found by squaring.
        balanced: float64 `[k, k]`, `D^-1 A D`; zero where nothing flows.
        scale: float64 `[k]`, the diagonal of D (powers of two).
        work: float64 `[3, k, k]`, room for squaring.
    """

    exponents: Matrix
    powers: NDArray[np.int64]
    modes: NDArray[np.float64]
    balanced: Matrix
    scale: NDArray[np.float64]
    work: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Flow:
    """`exp(A t)` of one generator A `[k, k]`.

    Attributes:
        generator: A. still: True where A = 0, so that nothing flows. table: what compiled code evaluates.
        pattern: bool `[k, k]`, where `exp(A t)` can differ from 0: which variable depends on which.
        error: largest difference between modes and squaring over the checked times, relative to max(1, |exp(A t)|).
    """

    generator: Matrix
    still: bool
    pattern: NDArray[np.bool_]
    table: FlowTable
    error: float

    @classmethod
    def of(cls, generator: Matrix) -> Flow:
        """Find the modes of `exp(A t)`: balance, cluster the eigenvalues, take spectral projectors.

        Raw eigenvectors would not do: DADAO's A has a double eigenvalue 0. Where modes miss the accuracy of
        squaring (nearly defective A), squaring is kept.
        """
        from scipy.linalg import matrix_balance

        generator = np.ascontiguousarray(generator, dtype=np.float64)
        balanced, (scale, _) = matrix_balance(generator, permute=False, separate=True)
        pattern = _pattern(generator)
        squaring = _squaring(np.ascontiguousarray(balanced), np.ascontiguousarray(scale))
        if not generator.any():
            return cls(generator, True, pattern, squaring, 0.0)
        tried = [_modes(squaring, pattern, tolerance) for tolerance in _CLUSTER_TOLERANCES]
        errors = [math.inf if table is None else _difference(table, squaring) for table in tried]
        best = int(np.argmin(errors))
        found = tried[best]
        if found is None or errors[best] > SQUARING_ACCURACY:
            return cls(generator, False, pattern, squaring, 0.0)
        return cls(generator, False, pattern, found, errors[best])

    def at(self, t: float) -> Matrix:
        """Return `exp(A t)`, `[k, k]`, the very numbers that the players use."""
        return _evaluate(self.table, t)


def _evaluate(table: FlowTable, t: float) -> Matrix:
    out = np.empty(table.balanced.size)
    _write(table, t, out)
    return out.reshape(table.balanced.shape)


def _difference(table: FlowTable, reference: FlowTable) -> float:
    """Return max |E - E_ref| / max(1, |E_ref|) in balanced coordinates over the checked times."""
    worst = 0.0
    weight = reference.scale[None, :] / reference.scale[:, None]
    for t in _CHECKED_TIMES:
        exact = _evaluate(reference, t) * weight
        found = _evaluate(table, t) * weight
        error = float(np.abs(found - exact).max() / max(1.0, np.abs(exact).max()))
        worst = max(worst, error) if math.isfinite(error) else math.inf
    return worst


def _squaring(balanced: Matrix, scale: NDArray[np.float64]) -> FlowTable:
    return FlowTable(
        np.zeros((0, 2)), np.zeros(0, np.int64), np.zeros(0), balanced, scale, np.zeros((3, *balanced.shape))
    )


def _pattern(generator: Matrix) -> NDArray[np.bool_]:
    """Return which powers of A are not zero at each entry: what is reached by going along A's entries."""
    reached = np.eye(len(generator), dtype=bool) | (generator != 0.0)
    for _ in range(len(generator)):
        reached = reached | ((reached.astype(int) @ reached.astype(int)) > 0)
    return reached


def _modes(squaring: FlowTable, pattern: NDArray[np.bool_], tolerance: float) -> FlowTable | None:
    """Return the modes for eigenvalues clustered at a relative tolerance, with exact zeros outside the pattern.

    None: the clusters cannot be told apart.
    """
    exponents, powers, modes = [], [], []
    eigenvalues = np.linalg.eigvals(squaring.balanced).astype(np.complex128)
    weight = np.where(pattern, squaring.scale[:, None] / squaring.scale[None, :], 0.0)
    clusters = _clusters(eigenvalues, tolerance)
    try:
        spaces = _invariant_spaces(squaring.balanced, eigenvalues, [members for _, members in clusters])
    except np.linalg.LinAlgError:
        return None
    for (centre, members), (left, right, block) in zip(clusters, spaces, strict=True):
        if centre.imag < 0.0:
            continue
        mean = complex(np.trace(block) / len(members))
        centre = 0j if centre == 0j else complex(mean.real, mean.imag if centre.imag else 0.0)
        terms = _terms(left, right, block, centre, float(np.abs(eigenvalues).max()))
        exponents.append((centre.real, centre.imag))
        powers.append(len(terms))
        for term in terms:
            if centre.imag == 0.0:
                modes.append(term.real * weight)
            else:
                modes += [2 * term.real * weight, -2 * term.imag * weight]
    return FlowTable(
        np.array(exponents, dtype=np.float64).reshape(-1, 2),
        np.array(powers, dtype=np.int64),
        np.array(modes, dtype=np.float64).ravel(),
        *squaring[3:],
    )


def _clusters(eigenvalues: NDArray[np.complex128], tolerance: float) -> list[tuple[complex, list[int]]]:
    """Return (centre, members) of eigenvalues closer than the tolerance; on the real axis with a real centre."""
    reach = tolerance * float(np.abs(eigenvalues).max())
    left, clusters = set(range(len(eigenvalues))), []
    while left:
        members = [left.pop()]
        for member in members:
            near = [j for j in left if abs(eigenvalues[j] - eigenvalues[member]) <= reach]
            members += near
            left -= set(near)
        centre = complex(np.mean(eigenvalues[members]))
        if abs(centre.imag) <= reach / 2 or abs(centre.imag) <= 1e-14 * abs(centre):
            centre = complex(centre.real, 0.0)
        if abs(centre) <= 16 * np.finfo(float).eps * float(np.abs(eigenvalues).max()):
            centre = 0j
        clusters.append((centre, members))
    return clusters


def _invariant_spaces(balanced: Matrix, eigenvalues: NDArray[np.complex128], clusters: list[list[int]]) -> list[Space]:
    """Return `(left, right, block)` of every cluster, with `A left = left block` and `right left = 1`.

    Schur vectors, one Sylvester equation each, then a Newton step for all of them in extended precision.
    """
    from scipy.linalg import schur, solve_sylvester

    lefts, rights = [], []
    for members in clusters:
        others, inside = np.delete(eigenvalues, members), eigenvalues[members]

        def belongs(x: complex, others=others, inside=inside) -> bool:
            return len(others) == 0 or np.abs(inside - x).min() < np.abs(others - x).min()

        upper, basis, size = schur(balanced.astype(complex), output="complex", sort=belongs)  # pyright: ignore
        block, rest, coupling = upper[:size, :size], upper[size:, size:], upper[:size, size:]
        if size != len(members):
            raise np.linalg.LinAlgError("clusters overlap")
        if 0 < size < len(upper):
            coupling = solve_sylvester(block, -rest, coupling)
        lefts.append(basis[:, :size])
        rights.append(np.hstack([np.eye(size), coupling]) @ basis.conj().T)
    ends = np.cumsum([0, *(left.shape[1] for left in lefts)])
    places = [slice(a, b) for a, b in pairwise(ends)]
    with np.errstate(all="ignore"):
        left, right, whole = _refined(balanced, np.hstack(lefts), np.vstack(rights), places)
    return [(left[:, own], right[own], whole[own, own]) for own in places]


def _refined(balanced: Matrix, left: Any, right: Any, places: list[slice]) -> Space:
    """Return bases with `right left = 1` and `right A left` free of what couples two clusters, to extended digits."""
    from scipy.linalg import solve_sylvester

    matrix, one = balanced.astype(np.clongdouble), np.eye(len(balanced))
    left, right = left.astype(np.clongdouble), right.astype(np.clongdouble)
    for _ in range(2):
        for _ in range(2):
            right = right @ (2 * one - left @ right)
        whole = right @ matrix @ left
        turn = np.zeros(whole.shape, np.clongdouble)
        for a, b in permutations(places, 2):
            blocks = [np.asarray(part, np.complex128) for part in (whole[a, a], -whole[b, b], -whole[a, b])]
            if not all(np.isfinite(part).all() for part in blocks):
                return left, right, whole
            turn[a, b] = solve_sylvester(*blocks)
        left, right = left @ (one + turn), (one - turn) @ right
    return left, right, right @ matrix @ left


def _terms(left: Any, right: Any, block: Any, centre: complex, largest: float) -> list[Any]:
    """Return `(A - centre)^j P / j!` for j = 0, 1, ... with P the spectral projector of one cluster."""
    one = np.eye(len(block))
    terms, power = [left @ right], one
    unit = max(largest, np.finfo(float).tiny)
    for j in range(1, len(block)):
        power = power @ (block - centre * one) / j
        if np.abs(power).max() <= 1e-13 * unit**j:  # semisimple: what is left of the nilpotent part is rounding
            break
        terms.append(left @ power @ right)
    return terms


# Functions that allocate nothing are compiled without numba's reference counting, which would cost more than the sums
# they do; places in arrays are unsigned, so that the compiler sees that none is negative, and vectorises.
lean: Any = partial(cast(Any, njit), _nrt=False, error_model="numpy")


@lean
def flow_matrix(table, t, out, at):  # pragma: no cover - compiled
    """Write `exp(A t)` row by row into `out[at : at + k * k]`; `table` is a `FlowTable`."""
    exponents, powers, modes = table.exponents, table.powers, table.modes
    k = len(table.scale)
    size = k * k
    if len(powers) == 0:
        squared(table.balanced, table.scale, table.work, t, out, at)
        return
    for i in range(size):
        out[_u(at) + _u(i)] = 0.0
    m = 0
    for group in range(len(powers)):
        less = math.expm1(exponents[group, 0] * t) if exponents[group, 0] != 0.0 else 0.0  # exp(real part * t) - 1
        whole, half = 1.0 + less, exponents[group, 1] * t / 2.0
        sine, cosine = (math.sin(half), math.cos(half)) if half != 0.0 else (0.0, 1.0)
        first, second = less - 2.0 * sine * sine * whole, 2.0 * sine * cosine * whole  # exp(.) cos - 1, exp(.) sin
        for _ in range(powers[group]):
            if exponents[group, 1] == 0.0:
                _add(out, at, less, modes, m, size)
                m += size
            else:
                _add(out, at, first, modes, m, size)
                _add(out, at, second, modes, m + size, size)
                m += 2 * size
            whole *= t
            less, first, second = whole, whole * (cosine * cosine - sine * sine), second * t
    for i in range(k):
        out[_u(at) + _u(i * k + i)] += 1.0  # the projectors' sum, which every first power left out


@lean
def _add(out, at, factor, values, start, size):  # pragma: no cover - compiled
    for i in range(size):
        out[_u(at) + _u(i)] += factor * values[_u(start) + _u(i)]


@lean
def squared(balanced, scale, work, t, out, at):  # pragma: no cover - compiled
    """The same by squaring `F = exp - 1`, `F <- 2 F + F^2`, which keeps the digits that `E^2` would lose."""
    k, step, f, product = len(scale), work[0], work[1], work[2]
    norm = 0.0
    for i in range(k):
        row = 0.0
        for j in range(k):
            row += abs(balanced[i, j] * t)
        norm = max(norm, row)
    doublings = max(0, math.ceil(math.log2(2.0 * norm))) if norm > 0.0 else 0
    _combine(step, t / 2.0**doublings, balanced, 0.0, balanced)
    _combine(f, 1.0 / _TERMS, step, 0.0, step)
    for term in range(_TERMS - 1, 0, -1):  # Horner: X/1 (1 + X/2 (1 + X/3 (...)))
        _times(step, f, product)
        _combine(f, 1.0 / term, product, 1.0 / term, step)
    for _ in range(doublings):
        _times(f, f, product)
        _combine(f, 2.0, f, 1.0, product)
    for i in range(k):
        for j in range(k):
            out[at + i * k + j] = (1.0 if i == j else 0.0) + f[i, j] * (scale[i] / scale[j])


@lean
def _combine(out, p, a, q, b):  # pragma: no cover - compiled
    for i in range(len(out)):
        for j in range(len(out)):
            out[i, j] = p * a[i, j] + q * b[i, j]


@lean
def _times(a, b, out):  # pragma: no cover - compiled
    for i in range(len(out)):
        for j in range(len(out)):
            total = 0.0
            for l in range(len(out)):
                total += a[i, l] * b[l, j]
            out[i, j] = total


@njit(cache=True)
def _write(table, t, out):  # pragma: no cover - compiled
    flow_matrix(table, t, out, 0)
