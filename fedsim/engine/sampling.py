"""Minibatches: which records a node draws at a step, the same in compiled and in array code."""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from fedsim.algorithms.algorithm import Sampling
from fedsim.engine.streams import purpose, uniform
from fedsim.errors import InputError
from fedsim.problems.problem import Minibatch

BATCH = purpose("batch")
EPOCH = purpose("epoch")
KINDS = {"with_replacement": 0, "epoch": 1, "poisson": 2}


@njit(cache=True)
def draw_batch(seed, node, step, records, kind, size, indices, weights):  # pragma: no cover - compiled
    """Fill `indices [width]`, `weights [width]` for one node at one step; return how many records are in use.

    `kind` as in `KINDS`; `step` counts the node's draws (rounds, or gradient events). Unused places get weight 0.
    """
    if kind == 0:
        for j in range(size):
            indices[j] = min(int(uniform(seed, BATCH, node, step, j) * records), records - 1)
            weights[j] = 1.0 / size
        return size
    if kind == 1:
        return _epoch_batch(seed, node, step, records, size, indices, weights)
    used = 0
    for record in range(records):
        if uniform(seed, BATCH, node, step, record) * records < size:
            indices[used] = record
            weights[used] = 1.0 / size
            used += 1
    for j in range(used, len(indices)):
        indices[j], weights[j] = 0, 0.0
    return used


@njit(cache=True)
def _epoch_batch(seed, node, step, records, size, indices, weights):  # pragma: no cover - compiled
    """Take the step's slice of the epoch's permutation, which is drawn anew from the epoch's number."""
    per_epoch = (records + size - 1) // size
    epoch, part = step // per_epoch, step % per_epoch
    order = np.arange(records)
    first, end = part * size, min((part + 1) * size, records)
    for j in range(end):  # Fisher and Yates, as far as this slice needs
        other = j + min(int(uniform(seed, EPOCH, node, epoch, j) * (records - j)), records - j - 1)
        order[j], order[other] = order[other], order[j]
    used = end - first
    for j in range(len(indices)):
        indices[j] = order[first + j] if j < used else 0
        weights[j] = 1.0 / used if j < used else 0.0
    return used


@njit(cache=True)
def _draw_rows(seed, nodes, step, records, kind, size, indices, weights):  # pragma: no cover - compiled
    for row in range(len(nodes)):
        draw_batch(seed, nodes[row], step, records[nodes[row]], kind, size, indices[row], weights[row])


def width(sampling: Sampling, records: NDArray[np.int64]) -> int:
    """Return how many places a minibatch needs: `size`, or every record with Poisson sampling."""
    return int(records.max()) if sampling.kind == "poisson" else sampling.size


def draw(
    sampling: Sampling, seed: np.uint64, nodes: NDArray[np.int64], step: int, records: NDArray[np.int64]
) -> Minibatch:
    """Return the minibatch of every node in `nodes` at `step`; `records [n]` by node number."""
    shape = (len(nodes), width(sampling, records))
    indices, weights = np.zeros(shape, np.int64), np.zeros(shape)
    _draw_rows(seed, nodes, step, records, KINDS[sampling.kind], sampling.size, indices, weights)
    return Minibatch(indices, weights)


def check(sampling: Sampling | None, records: NDArray[np.int64], kind: str) -> None:
    """Refuse a batch that the nodes' records cannot give.

    Raises:
        InputError: the problem has no records, or a node has fewer than the batch asks for.
    """
    if sampling is None:
        return
    least = int(records.min())
    if least == 0:
        raise InputError(f"algorithm.batch: problem {kind!r} has no records to draw from; leave batch out")
    if sampling.size < 1 or not math.isfinite(sampling.size):
        raise InputError(f"algorithm.batch.size: {sampling.size} given, at least 1 needed")
    if sampling.kind != "with_replacement" and sampling.size > least:
        node = int(records.argmin())
        raise InputError(
            f"algorithm.batch.size: {sampling.size} records asked for, node {node} has {least};"
            f" use at most {least}, or kind: with_replacement"
        )
