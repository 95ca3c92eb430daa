"""Hold an algorithm or a problem of your own to the laws: `fedsim.testing.check(MyAlgorithm(eta=0.1))`.

The laws are what makes one text give the same numbers on every engine: a row reads other rows through requests only,
control flow follows the round and shared values, draws come from the streams that the engine hands over, answers are
read-only. They are checked by play: in blocks of 1, 2, 3, 7 and all rows that start far apart and differ in size, with
different states of the global generators and none of one's own, in one go and interrupted. A breach that changes no
bit in such a play is not seen. Problems are also held to their own words: the gradient is that of the loss, L and mu
bound it, the optimum is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsim.algorithms.algorithm import Algorithm, DynamicsAlgorithm, EventAlgorithm, SyncAlgorithm
from fedsim.engine.machine import prepare
from fedsim.errors import InputError
from fedsim.problems.problem import Problem
from fedsim.testing.algorithms import check_algorithm
from fedsim.testing.problems import check_problem
from fedsim.testing.report import Report

if TYPE_CHECKING:
    from fedsim.topology.topology import Topology

__all__ = ["Report", "check", "default_problem"]


def check(
    candidate: Algorithm | Problem | type[Algorithm] | type[Problem],
    problem: Problem | None = None,
    topology: Topology | None = None,
    *,
    length: int = 4,
    seed: int = 0,
) -> Report:
    """Check an algorithm (on `problem` and `topology`) or a problem; return what held.

    Args:
        candidate: an instance, or a class that needs no arguments.
        problem: what an algorithm is played on; default: ridge regression, 11 nodes of 5 to 15 records, dim 7.
        topology: default: a wheel with as many nodes as the problem.
        length: rounds, or units of virtual time, to play.
        seed: of all draws.

    Raises:
        AssertionError: a law is broken; says which, where, and by how much.
        InputError: the candidate is neither, or cannot be played on this problem.
    """
    prepare()
    made = candidate() if isinstance(candidate, type) else candidate
    if isinstance(made, Problem):
        return check_problem(made, seed)
    if not isinstance(made, SyncAlgorithm | DynamicsAlgorithm | EventAlgorithm):
        raise InputError(f"testing.check: {type(made).__name__} given; a fedsim Algorithm or Problem is needed")
    return check_algorithm(made, problem or default_problem(), topology, length, seed)


def default_problem(n: int = 11) -> Problem:
    """Return a small problem that has everything: records, L, mu, an optimum, dual gradients."""
    from pathlib import Path

    from fedsim.problems.build import build

    data = {"kind": "synthetic_regression", "samples": 10, "dim": 7, "heterogeneity": 1.0}
    sizes = {"kind": "dirichlet_sizes", "alpha": 5.0, "min_size": 5}
    return build({"kind": "ridge", "l2": 0.1, "data": data, "partition": sizes}, n, 1, Path())
