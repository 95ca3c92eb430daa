"""The event kernel: plays any table of coefficients (`Dynamics`) over `v [rows, k, dim]`, in place.

It is compiled once: objectives enter through one function signature, so that a user's own needs no new kernel.
The order of every sum is the one that `fedsim.engine.plain`, its oracle, writes out.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numba import njit, typeof, types
from numpy.typing import NDArray

from fedsim.engine.clocks import Batch
from fedsim.engine.flow import FlowTable, flow_matrix, lean
from fedsim.engine.machine import one_at_a_time
from fedsim.engine.sampling import KINDS, draw_batch, width

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedsim.algorithms.algorithm import Sampling
    from fedsim.algorithms.dynamics import Dynamics
    from fedsim.engine.flow import Flow
    from fedsim.problems.problem import CompiledObjective

Reals = NDArray[np.float64]
Ints = NDArray[np.int64]

TILE = 2048
"""Coordinates handled at a time: the tiles of two nodes stay in the second-level cache, and calls cost little."""
_u = np.uint64

_reals, _ints = types.Array(types.float64, 1, "C"), types.Array(types.int64, 1, "C")
GRADIENT = types.FunctionType(types.void(types.int64, _reals, _ints, _reals, _reals, _ints, _reals, _reals))
"""Signature of a compiled gradient; see `fedsim.problems.problem.CompiledObjective`."""


class Pattern(NamedTuple):
    """The entries of `[k, k]` matrices that are used: `counts [k]` per row, their `columns [k * k]`, ascending."""

    columns: Ints
    counts: Ints


class Table(NamedTuple):
    """The fields of `Dynamics` that happen at events, as arrays.

    `gradient_map` (row by row, `[k * k]`) and `edge_scale` are empty where there is none; `decay` is (0, 0) for
    constant steps.
    """

    still: bool
    flow: FlowTable
    pattern: Pattern
    full: Pattern
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
    """Room for one event: two flow matrices, a sum, tiles, messages, jump, point and gradient."""

    flow: Reals
    total: Reals
    own: Reals
    other: Reals
    m: Reals
    m_other: Reals
    jump: Reals
    x: Reals
    g: Reals


def scratch(v: NDArray) -> Scratch:
    """Return the room that events on `v [rows, k, dim]` need, in its type."""
    _, k, dim = v.shape
    own, other = np.zeros((2, k * TILE), v.dtype)
    m, m_other = np.zeros((2, TILE), v.dtype)
    x, g = np.zeros((2, dim), v.dtype)
    return Scratch(np.zeros(2 * k * k), np.zeros(TILE), own, other, m, m_other, np.zeros(k), x, g)


def table(dynamics: Dynamics, flow: Flow) -> Table:
    """Return the arrays of a table of coefficients."""
    nothing, k = np.zeros(0), dynamics.k
    return Table(
        flow.still,
        flow.table,
        _pattern(flow.pattern),
        _pattern(np.ones((k, k), dtype=bool)),
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


def _pattern(used: NDArray[np.bool_]) -> Pattern:
    first = np.argsort(~used, axis=1, kind="stable")
    return Pattern(first.ravel().astype(np.int64), used.sum(axis=1).astype(np.int64))


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
    return with_gradient(_play, gradient, flat, table, data, room, batch)


def with_gradient(function: Callable[..., Any], gradient: Any, *arguments: Any) -> Any:
    """Call a function of a compiled gradient and arrays; it is compiled for any gradient at once."""
    return _compiled(function, tuple(typeof(argument) for argument in arguments))(gradient, *arguments)


@cache
def _compiled(function: Callable[..., Any], rest: tuple[types.Type, ...]) -> Callable[..., Any]:
    """Return a function compiled once per machine, then read from numba's cache."""
    compiled = njit(cache=True, error_model="numpy", nogil=True)(function)
    with one_at_a_time("compile"):  # the ranks of a host need the same one: the first makes it, the others read it
        compiled.compile((GRADIENT, *rest))
    compiled.disable_compile()
    return compiled


# Leaves take whole arrays and places in them: slices would be counted, and signed places keep loops from vectorising.


@lean
def _add(out, to, factor, values, start, size):  # pragma: no cover - compiled
    for c in range(size):
        out[_u(to) + _u(c)] += factor * values[_u(start) + _u(c)]


@lean
def _copy(out, to, values, start, size):  # pragma: no cover - compiled
    for c in range(size):
        out[_u(to) + _u(c)] = values[_u(start) + _u(c)]


@lean
def _zero(out, to, size):  # pragma: no cover - compiled
    for c in range(size):
        out[_u(to) + _u(c)] = 0.0


@lean
def _finite(values, start, size):  # pragma: no cover - compiled
    good = True
    for c in range(size):
        good &= abs(values[_u(start) + _u(c)]) < math.inf
    return good


@lean
def _one(out, to, s, p, a, size):  # pragma: no cover - compiled
    for c in range(size):
        out[_u(to) + _u(c)] = a * s[_u(p) + _u(c)]


@lean
def _two(out, to, s, p, a, q, b, size):  # pragma: no cover - compiled
    for c in range(size):
        out[_u(to) + _u(c)] = a * s[_u(p) + _u(c)] + b * s[_u(q) + _u(c)]


@lean
def _three(out, to, s, p, a, q, b, r, d, size):  # pragma: no cover - compiled
    for c in range(size):
        out[_u(to) + _u(c)] = a * s[_u(p) + _u(c)] + b * s[_u(q) + _u(c)] + d * s[_u(r) + _u(c)]


@lean
def _six(out, to, s, p, step, m, row, size):  # pragma: no cover - compiled
    a, b, d, e, f, g = m[row], m[row + 1], m[row + 2], m[row + 3], m[row + 4], m[row + 5]
    p, q, r, u, w, x = _u(p), _u(p + step), _u(p + 2 * step), _u(p + 3 * step), _u(p + 4 * step), _u(p + 5 * step)
    for i in range(size):
        c = _u(i)
        out[_u(to) + c] = a * s[p + c] + b * s[q + c] + d * s[r + c] + e * s[u + c] + f * s[w + c] + g * s[x + c]


@lean
def _combine(out, to, total, v, at, dim, m, row, pattern, a, size):  # pragma: no cover - compiled
    """`out[to + c] = sum_b m[row + b] v[at + b dim + c]` over the columns b of row a of the pattern, ascending."""
    k, count = len(pattern.counts), pattern.counts[a]
    first = a * k
    b = pattern.columns[first]
    if k == 6 and count == 6:
        _six(out, to, v, at, dim, m, row, size)
        return
    if count == 1:
        _one(out, to, v, at + b * dim, m[row + b], size)
        return
    d = pattern.columns[first + 1]
    if count == 2:
        _two(out, to, v, at + b * dim, m[row + b], at + d * dim, m[row + d], size)
        return
    e = pattern.columns[first + 2]
    if count == 3:
        _three(out, to, v, at + b * dim, m[row + b], at + d * dim, m[row + d], at + e * dim, m[row + e], size)
        return
    _three(total, 0, v, at + b * dim, m[row + b], at + d * dim, m[row + d], at + e * dim, m[row + e], size)
    for place in range(first + 3, first + count):
        b = pattern.columns[place]
        _add(total, 0, m[row + b], v, at + b * dim, size)
    _copy(out, to, total, 0, size)


@lean
def _weighted(out, to, weights, v, at, step, size):  # pragma: no cover - compiled
    """`out[to + c] = sum of weights[b] v[at + b step + c]` over the b with a weight."""
    empty = True
    for b in range(len(weights)):
        if weights[b] != 0.0 and empty:
            _one(out, to, v, at + b * step, weights[b], size)
            empty = False
        elif weights[b] != 0.0:
            _add(out, to, weights[b], v, at + b * step, size)
    if empty:
        _zero(out, to, size)


@lean
def _times(tile, total, v, at, dim, matrix, start, pattern, moves, size):  # pragma: no cover - compiled
    """Write `size` coordinates of a node, from place `at` of v on, to a tile, times a matrix if it moves."""
    for a in range(len(pattern.counts)):
        if moves:
            _combine(tile, a * TILE, total, v, at, dim, matrix, start + a * len(pattern.counts), pattern, a, size)
        else:
            _copy(tile, a * TILE, v, at + a * dim, size)


@lean
def _multiply_part(v, at, dim, matrix, pattern, tile, total, size):  # pragma: no cover - compiled
    """`v <- matrix v` for `size` coordinates of one node, from place `at` of v on, in place."""
    _times(tile, total, v, at, dim, matrix, 0, pattern, True, size)
    for a in range(len(pattern.counts)):
        _copy(v, at + a * dim, tile, a * TILE, size)


@lean
def _multiply(v, at, dim, matrix, pattern, tile, total):  # pragma: no cover - compiled
    """`v <- matrix v` for one node, in place."""
    for lo in range(0, dim, TILE):
        _multiply_part(v, at + lo, dim, matrix, pattern, tile, total, min(TILE, dim - lo))


@lean
def _store(v, at, dim, tile, jump, factor, m, size):  # pragma: no cover - compiled
    """Write a tile back, plus `factor * jump` times the difference of messages where there is a jump."""
    for a in range(len(jump)):
        if jump[a] != 0.0:
            _copy_plus(v, at + a * dim, tile, a * TILE, factor * jump[a], m, size)
        else:
            _copy(v, at + a * dim, tile, a * TILE, size)


@lean
def _copy_plus(out, to, values, start, factor, m, size):  # pragma: no cover - compiled
    for c in range(size):
        out[_u(to) + _u(c)] = values[_u(start) + _u(c)] + factor * m[_u(c)]


@lean
def decayed(count, decay):  # pragma: no cover - compiled
    """Return the factor of a node's step after `count` gradients: `(1 + count / decay[0]) ** -decay[1]`."""
    return (1.0 + count / decay[0]) ** -decay[1] if decay[0] > 0.0 else 1.0


@lean
def _elapse(state, table, i, t, flow, at):  # pragma: no cover - compiled
    """Move row i's clock to t; write its flow matrix at `at`, and return whether it moves at all."""
    elapsed = t - state.last[i]
    state.last[i] = t
    if table.still or elapsed == 0.0:
        return False
    flow_matrix(table.flow, elapsed, flow, at)
    return True


@lean
def _write_jump(table, jump, e):  # pragma: no cover - compiled
    """Write what an exchange over edge e adds to each variable, per unit of difference."""
    for a in range(len(jump)):
        jump[a] = table.gossip_jump[a]
        if len(table.edge_scale) > 0:
            jump[a] += table.edge_scale[e] * table.edge_jump[a]


@lean
def _meet(depth, i, j):  # pragma: no cover - compiled
    """An exchange comes after all that either end has seen."""
    steps = max(depth[i], depth[j]) + 1
    depth[i], depth[j] = steps, steps


@lean
def gossip(state, table, room, i, j, e, t):  # pragma: no cover - compiled
    """Exchange messages between rows i and j over edge e; return whether their difference is finite."""
    k, dim, v, good = len(table.point), len(room.x), state.v, True
    own, other, m, m_other, jump, flow = room.own, room.other, room.m, room.m_other, room.jump, room.flow
    moves_i = _elapse(state, table, i, t, flow, 0)
    moves_j = _elapse(state, table, j, t, flow, k * k)
    _write_jump(table, jump, e)
    for lo in range(0, dim, TILE):
        size, at_i, at_j = min(TILE, dim - lo), i * k * dim + lo, j * k * dim + lo
        _times(own, room.total, v, at_i, dim, flow, 0, table.pattern, moves_i, size)
        _times(other, room.total, v, at_j, dim, flow, k * k, table.pattern, moves_j, size)
        _weighted(m, 0, table.message, own, 0, TILE, size)
        _weighted(m_other, 0, table.message, other, 0, TILE, size)
        _add(m, 0, -1.0, m_other, 0, size)
        good &= _finite(m, 0, size)
        _store(v, at_i, dim, own, jump, 1.0, m, size)
        _store(v, at_j, dim, other, jump, -1.0, m, size)
    _meet(state.depth, i, j)
    return good


@lean
def move(state, table, room, i, j, e):  # pragma: no cover - compiled
    """End an exchange of dual gradients, i's in `room.g`, j's in `room.x`; return whether finite."""
    dim, v, jump = len(room.x), state.v, room.jump
    _add(room.g, 0, -1.0, room.x, 0, dim)
    _write_jump(table, jump, e)
    for a in range(len(table.point)):
        if jump[a] != 0.0:
            _add(v, (i * len(table.point) + a) * dim, jump[a], room.g, 0, dim)
            _add(v, (j * len(table.point) + a) * dim, -jump[a], room.g, 0, dim)
    _meet(state.depth, i, j)
    return _finite(room.g, 0, dim)


@lean
def _combined(state, table, room, i, t, weights, out, to):  # pragma: no cover - compiled
    """Flow row i to t, and write a weighted sum of its variables to `out`, from place `to` on."""
    k, dim, v = len(table.point), len(room.x), state.v
    moves = _elapse(state, table, i, t, room.flow, 0)
    for lo in range(0, dim, TILE):
        size, at = min(TILE, dim - lo), i * k * dim + lo
        if moves:
            _multiply_part(v, at, dim, room.flow, table.pattern, room.own, room.total, size)
        _weighted(out, to + lo, weights, v, at, dim, size)


@lean
def read(state, table, room, i, t):  # pragma: no cover - compiled
    """Begin a gradient event: flow row i to t, and write the point at which its gradient is taken to `room.x`."""
    _combined(state, table, room, i, t, table.point, room.x, 0)


@lean
def to_time(state, table, room, i, t):  # pragma: no cover - compiled
    """Let row i flow to t."""
    dim = len(room.x)
    if _elapse(state, table, i, t, room.flow, 0):
        _multiply(state.v, i * len(table.point) * dim, dim, room.flow, table.pattern, room.own, room.total)


@lean
def begin(state, table, room, i, t, messages, place):  # pragma: no cover - compiled
    """Begin an exchange with another rank: flow row i to t, and write what it sends to a place in `messages`."""
    _combined(state, table, room, i, t, table.message, messages, place)


@lean
def end(state, table, room, i, e, sign, messages, place, theirs, at, depth):  # pragma: no cover - compiled
    """End it: row i takes the first end's message minus the second's.

    Args:
        sign: 1 where i is the first end, else -1. messages, place: its own message, from place `place` on.
        theirs, at: the other end's.
    """
    k, dim, jump, m, good = len(table.point), len(room.x), room.jump, room.m, True
    _write_jump(table, jump, e)
    for lo in range(0, dim, TILE):
        size = min(TILE, dim - lo)
        if sign > 0.0:
            _copy(m, 0, messages, place + lo, size)
            _add(m, 0, -1.0, theirs, at + lo, size)
        else:
            _copy(m, 0, theirs, at + lo, size)
            _add(m, 0, -1.0, messages, place + lo, size)
        good &= _finite(m, 0, size)
        for a in range(k):
            if jump[a] != 0.0:
                _add(state.v, (i * k + a) * dim + lo, sign * jump[a], m, 0, size)
    state.depth[i] = max(state.depth[i], depth) + 1
    return good


@lean
def apply(state, table, room, i):  # pragma: no cover - compiled
    """End a gradient event with the gradient in `room.g`; return whether the residual is finite."""
    k, dim, v, g, good = len(table.point), len(room.x), state.v, room.g, True
    factor = decayed(state.gradients[i], table.decay)
    for lo in range(0, dim, TILE):
        size, at = min(TILE, dim - lo), i * k * dim + lo
        for a in range(k):
            if table.residual[a] != 0.0:
                _add(g, lo, table.residual[a], v, at + a * dim, size)
        if len(table.gradient_map) > 0:
            _multiply_part(v, at, dim, table.gradient_map, table.full, room.own, room.total, size)
        for a in range(k):
            if table.gradient_jump[a] != 0.0:
                _add(v, at + a * dim, factor * table.gradient_jump[a], g, lo, size)
        good &= _finite(g, lo, size)
    state.gradients[i] += 1
    return good


@njit
def take(gradient, state, table, data, room, i, t):  # pragma: no cover - compiled
    """Play a gradient event of row i; return (whether finite, records that it cost)."""
    read(state, table, room, i, t)
    used, cost = _records(data, data.nodes[i], state.gradients[i])
    gradient(i, room.x, data.indices[:used], data.weights[:used], data.reals, data.ints, data.scratch, room.g)
    return apply(state, table, room, i), cost


@njit
def _records(data, node, count):  # pragma: no cover - compiled
    """Draw a node's minibatch; return (places in use, records it costs)."""
    if data.kind < 0:
        return 0, data.records[node]
    used = draw_batch(data.seed, node, count, data.records[node], data.kind, data.size, data.indices, data.weights)
    return max(used, 1), used  # no record at all: one of weight 0


def _play(gradient, state, table, data, room, batch):  # pragma: no cover - compiled
    samples = 0
    for event in range(len(batch.time)):
        i, j, t = batch.a[event], batch.b[event], batch.time[event]
        if j < 0:
            good, cost = take(gradient, state, table, data, room, i, t)
            samples += cost
        else:
            good = gossip(state, table, room, i, j, batch.edge[event], t)
        if not good:
            return event, samples
    return -1, samples


@njit(cache=True, error_model="numpy")
def _outputs(v, last, now, table, weights, out):  # pragma: no cover - compiled
    k = len(weights)
    flow, row = np.empty(k * k), np.empty(k)
    for i in range(v.shape[0]):
        row[:] = weights
        if now != last[i]:
            flow_matrix(table, now - last[i], flow, 0)
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
    _outputs(state.v, state.last, now, flow.table, weights, out)
    return out
