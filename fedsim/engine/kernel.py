"""The event kernel: plays any table of coefficients (`Dynamics`) over `v [rows, k, dim]`, in place.

One compiled function per number of variables k; objectives enter through one function signature, so that a user's
own needs no new kernel. The order of every sum is the one that `fedsim.engine.plain`, its oracle, writes out.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numba import njit, typeof, types
from numpy.typing import NDArray

from fedsim.engine.clocks import Batch
from fedsim.engine.flow import FlowTable, flow_matrix
from fedsim.engine.sampling import KINDS, draw_batch, width

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedsim.algorithms.algorithm import Sampling
    from fedsim.algorithms.dynamics import Dynamics
    from fedsim.engine.flow import Flow
    from fedsim.problems.problem import CompiledObjective

Reals = NDArray[np.float64]
Ints = NDArray[np.int64]

TILE = 128
"""Coordinates handled at a time: the tiles of two nodes stay in the first-level cache."""
_LANES = 8
_u = np.uint64

_reals, _ints = types.Array(types.float64, 1, "C"), types.Array(types.int64, 1, "C")
GRADIENT = types.FunctionType(types.void(types.int64, _reals, _ints, _reals, _reals, _ints, _reals, _reals))
"""Signature of a compiled gradient; see `fedsim.problems.problem.CompiledObjective`."""


class Table(NamedTuple):
    """The fields of `Dynamics` that happen at events, as arrays.

    `gradient_map` (row by row, `[k * k]`) and `edge_scale` are empty where there is none; `decay` is (0, 0) for
    constant steps.
    """

    still: bool
    flow: FlowTable
    point: Reals
    residual: Reals
    gradient_jump: Reals
    gradient_map: Reals
    decay: Reals
    message: Reals
    gossip_jump: Reals
    edge_jump: Reals
    edge_scale: Reals


class Data(NamedTuple):
    """An objective's data and scratch, and how a node draws records (`kind` -1: it takes all of them)."""

    reals: Reals
    ints: Ints
    scratch: Reals
    records: Ints
    nodes: Ints
    seed: np.uint64
    kind: int
    size: int
    indices: Ints
    weights: Reals


class State(NamedTuple):
    """Where a run is.

    Attributes:
        v: `[rows, k, dim]`, at each row's last event. last: `[rows]`, the time of that event.
        gradients: `[rows]`, gradients so far. depth: `[rows]`, exchanges that had to happen one after another so far.
    """

    v: Reals
    last: Reals
    gradients: Ints
    depth: Ints


class Scratch(NamedTuple):
    """Room for one event: two flow matrices, tiles before and after, messages, jump, point and gradient."""

    flow: Reals
    old: Reals
    own: Reals
    other: Reals
    m: Reals
    m_other: Reals
    jump: Reals
    x: Reals
    g: Reals


def scratch(k: int, dim: int) -> Scratch:
    """Return the room that events of k variables of length `dim` need."""
    old, own, other = np.zeros((3, k * TILE))
    m, m_other = np.zeros((2, TILE))
    return Scratch(np.zeros(2 * k * k), old, own, other, m, m_other, np.zeros(k), np.zeros(dim), np.zeros(dim))


def table(dynamics: Dynamics, flow: Flow) -> Table:
    """Return the arrays of a table of coefficients."""
    nothing, k = np.zeros(0), dynamics.k
    return Table(
        flow.still,
        flow.table,
        dynamics.point,
        dynamics.residual,
        dynamics.gradient_jump,
        nothing if dynamics.gradient_map is None else dynamics.gradient_map.ravel(),
        np.array(dynamics.decay or (0.0, 0.0), dtype=np.float64),
        dynamics.message,
        dynamics.gossip_jump,
        np.zeros(k) if dynamics.edge_jump is None else dynamics.edge_jump,
        nothing if dynamics.edge_scale is None else np.ascontiguousarray(dynamics.edge_scale, dtype=np.float64),
    )


def data(objective: CompiledObjective, records: Ints, nodes: Ints, sampling: Sampling | None, seed: int) -> Data:
    """Return an objective's data, the nodes of the rows it was made for, and how they draw records."""
    places = 0 if sampling is None else width(sampling, records)
    return Data(
        np.require(objective.reals, np.float64, ["C", "W"]),
        np.require(objective.ints, np.int64, ["C", "W"]),
        np.zeros(max(objective.scratch, 1)),
        np.require(records, np.int64, ["C", "W"]),
        np.require(nodes, np.int64, ["C", "W"]),
        np.uint64(seed),
        -1 if sampling is None else KINDS[sampling.kind],
        0 if sampling is None else sampling.size,
        np.zeros(places, np.int64),
        np.zeros(places),
    )


def play(gradient: Any, state: State, table: Table, data: Data, room: Scratch, batch: Batch) -> tuple[int, int]:
    """Play a batch of events in order.

    Returns:
        The place of the first event at which something was not finite (-1: none), and the records whose
        gradients were taken.
    """
    flat = state._replace(v=state.v.reshape(-1))
    arguments = (gradient, flat, table, data, room, batch, (0,) * state.v.shape[1])
    return _compiled(state.v.shape[1], tuple(typeof(argument) for argument in arguments[1:]))(*arguments)


@cache
def _compiled(k: int, rest: tuple[types.Type, ...]) -> Callable[..., tuple[int, int]]:
    """Return the kernel for k variables; compiled once per k and machine, then read from numba's cache."""
    function = njit(cache=True, error_model="numpy", nogil=True)(_play)
    function.compile((GRADIENT, *rest))
    function.disable_compile()
    return function


# Leaves take whole arrays and places in them: slices would be counted, and signed places keep loops from vectorising.


@njit
def _add(out, to, factor, values, start, size):  # pragma: no cover - compiled
    for c in range(size):
        out[_u(to) + _u(c)] += factor * values[_u(start) + _u(c)]


@njit
def _copy(out, to, values, start, size):  # pragma: no cover - compiled
    for c in range(size):
        out[_u(to) + _u(c)] = values[_u(start) + _u(c)]


@njit
def _zero(out, to, size):  # pragma: no cover - compiled
    for c in range(size):
        out[_u(to) + _u(c)] = 0.0


@njit
def _finite(values, size):  # pragma: no cover - compiled
    good = True
    for c in range(size):
        good &= abs(values[_u(c)]) < math.inf
    return good


@njit
def _combine(out, to, s, matrix, start, key, size):  # pragma: no cover - compiled
    """`out[to + c] = sum_b matrix[start + b] s[b TILE + c]`, b ascending; `len(key)` is k, known to the compiler."""
    part, row = out[to : to + size], matrix[start : start + len(key)]
    for c in range(size):
        total = row[0] * s[_u(c)]
        for b in range(1, len(key)):
            total += row[b] * s[_u(b * TILE) + _u(c)]
        part[c] = total


@njit
def _weighted(out, weights, s, key, size):  # pragma: no cover - compiled
    """`out[c] = sum of weights[b] s[b TILE + c]` over the b with a weight."""
    _zero(out, 0, size)
    for b in range(len(key)):
        if weights[b] != 0.0:
            _add(out, 0, weights[b], s, b * TILE, size)


@njit
def _times(tile, old, v, at, dim, matrix, start, moves, size, padded, key):  # pragma: no cover - compiled
    """Load `size` coordinates of a node, from place `at` of v on, and multiply them by a matrix if it moves."""
    k = len(key)
    for b in range(k):
        _copy(old if moves else tile, b * TILE, v, at + b * dim, size)
    if moves:
        for a in range(k):
            _combine(tile, a * TILE, old, matrix, start + a * k, key, padded)


@njit
def _store(v, at, dim, tile, size, key):  # pragma: no cover - compiled
    for b in range(len(key)):
        _copy(v, at + b * dim, tile, b * TILE, size)


@njit
def _multiply(v, at, dim, matrix, tile, old, key):  # pragma: no cover - compiled
    """`v <- matrix v` for one node, in place."""
    for lo in range(0, dim, TILE):
        size = min(TILE, dim - lo)
        _times(tile, old, v, at + lo, dim, matrix, 0, True, size, (size + _LANES - 1) & -_LANES, key)
        _store(v, at + lo, dim, tile, size, key)


@njit
def decayed(count, decay):  # pragma: no cover - compiled
    """Return the factor of a node's step after `count` gradients: `(1 + count / decay[0]) ** -decay[1]`."""
    return (1.0 + count / decay[0]) ** -decay[1] if decay[0] > 0.0 else 1.0


@njit
def _elapse(state, table, i, t, flow, at):  # pragma: no cover - compiled
    """Move row i's clock to t; write its flow matrix at `at`, and return whether it moves at all."""
    elapsed = t - state.last[i]
    state.last[i] = t
    if table.still or elapsed == 0.0:
        return False
    exponents, powers, modes, balanced, scale = table.flow
    flow_matrix(exponents, powers, modes, balanced, scale, elapsed, flow, at)
    return True


@njit
def _write_jump(table, jump, e):  # pragma: no cover - compiled
    """Write what an exchange over edge e adds to each variable, per unit of difference."""
    for a in range(len(jump)):
        jump[a] = table.gossip_jump[a]
        if len(table.edge_scale) > 0:
            jump[a] += table.edge_scale[e] * table.edge_jump[a]


@njit
def _meet(depth, i, j):  # pragma: no cover - compiled
    """An exchange comes after all that either end has seen."""
    steps = max(depth[i], depth[j]) + 1
    depth[i], depth[j] = steps, steps


@njit
def gossip(state, table, room, i, j, e, t, key):  # pragma: no cover - compiled
    """Exchange messages between rows i and j over edge e; return whether their difference is finite."""
    k, dim, v, good = len(key), len(room.x), state.v, True
    own, other, old, m, m_other, jump, flow = room.own, room.other, room.old, room.m, room.m_other, room.jump, room.flow
    moves_i = _elapse(state, table, i, t, flow, 0)
    moves_j = _elapse(state, table, j, t, flow, k * k)
    _write_jump(table, jump, e)
    for lo in range(0, dim, TILE):
        size = min(TILE, dim - lo)
        padded = (size + _LANES - 1) & -_LANES
        _times(own, old, v, i * k * dim + lo, dim, flow, 0, moves_i, size, padded, key)
        _times(other, old, v, j * k * dim + lo, dim, flow, k * k, moves_j, size, padded, key)
        _weighted(m, table.message, own, key, padded)
        _weighted(m_other, table.message, other, key, padded)
        _add(m, 0, -1.0, m_other, 0, padded)
        good &= _finite(m, size)
        for a in range(k):
            if jump[a] != 0.0:
                _add(own, a * TILE, jump[a], m, 0, padded)
                _add(other, a * TILE, -jump[a], m, 0, padded)
        _store(v, i * k * dim + lo, dim, own, size, key)
        _store(v, j * k * dim + lo, dim, other, size, key)
    _meet(state.depth, i, j)
    return good


@njit
def move(state, table, room, i, j, e, key):  # pragma: no cover - compiled
    """End an exchange of dual gradients, i's in `room.g`, j's in `room.x`; return whether finite."""
    dim, v, jump = len(room.x), state.v, room.jump
    _add(room.g, 0, -1.0, room.x, 0, dim)
    _write_jump(table, jump, e)
    for a in range(len(key)):
        if jump[a] != 0.0:
            _add(v, (i * len(key) + a) * dim, jump[a], room.g, 0, dim)
            _add(v, (j * len(key) + a) * dim, -jump[a], room.g, 0, dim)
    _meet(state.depth, i, j)
    return _finite(room.g, dim)


@njit
def read(state, table, room, i, t, key):  # pragma: no cover - compiled
    """Begin a gradient event: flow row i to t, and write the point at which its gradient is taken to `room.x`."""
    dim = len(room.x)
    at = i * len(key) * dim
    if _elapse(state, table, i, t, room.flow, 0):
        _multiply(state.v, at, dim, room.flow, room.own, room.old, key)
    _zero(room.x, 0, dim)
    for a in range(len(key)):
        if table.point[a] != 0.0:
            _add(room.x, 0, table.point[a], state.v, at + a * dim, dim)


@njit
def apply(state, table, room, i, key):  # pragma: no cover - compiled
    """End a gradient event with the gradient in `room.g`; return whether the residual is finite."""
    dim = len(room.x)
    at = i * len(key) * dim
    for a in range(len(key)):
        if table.residual[a] != 0.0:
            _add(room.g, 0, table.residual[a], state.v, at + a * dim, dim)
    if len(table.gradient_map) > 0:
        _multiply(state.v, at, dim, table.gradient_map, room.own, room.old, key)
    factor = decayed(state.gradients[i], table.decay)
    for a in range(len(key)):
        if table.gradient_jump[a] != 0.0:
            _add(state.v, at + a * dim, factor * table.gradient_jump[a], room.g, 0, dim)
    state.gradients[i] += 1
    return _finite(room.g, dim)


@njit
def _records(data, node, count):  # pragma: no cover - compiled
    """Draw a node's minibatch; return (places in use, records it costs)."""
    if data.kind < 0:
        return 0, data.records[node]
    used = draw_batch(data.seed, node, count, data.records[node], data.kind, data.size, data.indices, data.weights)
    return max(used, 1), used  # no record at all: one of weight 0


def _play(gradient, state, table, data, room, batch, key):  # pragma: no cover - compiled
    samples = 0
    for event in range(len(batch.time)):
        i, j, t = batch.a[event], batch.b[event], batch.time[event]
        if j < 0:
            read(state, table, room, i, t, key)
            used, cost = _records(data, data.nodes[i], state.gradients[i])
            gradient(i, room.x, data.indices[:used], data.weights[:used], data.reals, data.ints, data.scratch, room.g)
            good = apply(state, table, room, i, key)
            samples += cost
        else:
            good = gossip(state, table, room, i, j, batch.edge[event], t, key)
        if not good:
            return event, samples
    return -1, samples


@njit(cache=True, error_model="numpy")
def _outputs(v, last, now, exponents, powers, modes, balanced, scale, weights, out):  # pragma: no cover - compiled
    k = len(scale)
    flow, row = np.empty(k * k), np.empty(k)
    for i in range(v.shape[0]):
        row[:] = weights
        if now != last[i]:
            flow_matrix(exponents, powers, modes, balanced, scale, now - last[i], flow, 0)
            for b in range(k):
                row[b] = 0.0
                for a in range(k):
                    row[b] += weights[a] * flow[a * k + b]
        out[i] = 0.0
        for b in range(k):
            if row[b] != 0.0:
                for c in range(v.shape[2]):
                    out[i, c] += row[b] * v[i, b, c]


def outputs(state: State, flow: Flow, weights: Reals, now: float) -> Reals:
    """Return `weights . exp(A (now - last_i)) v_i` of every row, `[rows, dim]`."""
    out = np.empty((state.v.shape[0], state.v.shape[2]))
    _outputs(state.v, state.last, now, *flow.table, weights, out)
    return out
