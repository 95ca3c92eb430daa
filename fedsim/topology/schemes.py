"""Gossip rates by a local rule, up to a factor that the set of affordable rates fixes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedsim.topology.topology import Topology

Vector = NDArray[np.float64]


def uniform(topology: Topology) -> Vector:
    """The same rate on every edge."""
    return np.ones(topology.m)


def metropolis(topology: Topology) -> Vector:
    """`1 / (1 + max(d_i, d_j))`."""
    return 1 / (1 + topology.degrees[topology.edges].max(axis=1))


def degree(topology: Topology) -> Vector:
    """`1 / d_i + 1 / d_j`: every node starts exchanges at the same rate, with a neighbour at random."""
    return (1 / topology.degrees[topology.edges]).sum(axis=1)


SCHEMES: dict[str, Callable[[Topology], Vector]] = {
    "uniform": uniform,
    "metropolis": metropolis,
    "degree": degree,
}
