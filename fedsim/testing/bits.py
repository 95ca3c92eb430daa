"""Own classes that break bit equality (gelu, float32 convolutions) still run; the result says so.

A short look, before a run of a class that is not fedsim's: the same rows in blocks of 1, 2, 3 and all together. It sees
what is likely to show; `fedsim.testing.check` looks longer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedsim.algorithms.algorithm import EventAlgorithm, SyncAlgorithm
from fedsim.testing.algorithms import check_functions, check_rounds
from fedsim.testing.problems import check_rows

if TYPE_CHECKING:
    from fedsim.algorithms.algorithm import Algorithm
    from fedsim.prepare import Prepared
    from fedsim.problems.problem import Problem

ROWS, POINTS, SEEDS, ROUNDS = 7, 4, 32, 4  # a last bit differs in one number of a hundred, or fewer
CALLS, SECONDS = 4, 2.0  # gradients of every row at a point, and how long looks at a problem may take
SMALL = 100_000  # numbers in the state of a problem that an algorithm is looked at on; else the default one


def broken_bits(p: Prepared) -> str | None:
    """Return what in this run may depend on how many rows share a call, or None where nothing is seen.

    Only the user's own problem and algorithm are looked at: fedsim's are tested.
    """
    for what, found in (("problem", _of_problem(p.problem)), ("algorithm", _of_algorithm(p.algorithm, p.problem))):
        if found is not None:
            return f"the bits of this result may depend on block and ranks: own {what}: {found}"
    return None


def _of_problem(problem: Problem) -> str | None:
    if _is_ours(problem) or not problem.has_gradient:
        return None
    rows = min(ROWS, problem.n)
    draws = np.random.default_rng(0).standard_normal((POINTS, rows, problem.dim))
    affordable = int(SECONDS / (CALLS * rows * _seconds(problem)))
    return _words(lambda: [check_rows(problem, torch.from_numpy(x).to(problem.dtype)) for x in draws[:affordable]])


def _seconds(problem: Problem) -> float:
    """Return how long the gradient of one row takes, the second time it is asked for; infinite where it fails."""
    x, took = torch.zeros(1, problem.dim, dtype=problem.dtype), 0.0
    for _ in range(2):
        begin = time.perf_counter()
        try:
            problem.gradient(x, np.zeros(1, np.int64))
        except Exception:
            return math.inf
        took = time.perf_counter() - begin
    return took


def _of_algorithm(algorithm: Algorithm, problem: Problem) -> str | None:
    if _is_ours(algorithm):
        return None
    from fedsim.testing import default_problem

    small = problem.has_gradient and problem.n * problem.dim <= SMALL  # values of a black box are dear
    own = [problem] if small and _seconds(problem) * problem.n * SEEDS < SECONDS else []
    if isinstance(algorithm, EventAlgorithm):
        on = (own or [default_problem(ROWS)])[0]
        return _words(lambda: [check_functions(algorithm, on, seed, min(ROWS, on.n)) for seed in range(SEEDS)])
    if isinstance(algorithm, SyncAlgorithm):
        found = (_words(partial(check_rounds, algorithm, on, ROUNDS)) for on in (*own, default_problem()))
        return next((words for words in found if words), None)
    return None


def _is_ours(component: object) -> bool:
    return type(component).__module__.partition(".")[0] == "fedsim"


def _words(look: Callable[[], object]) -> str | None:
    """Return what a look found; a class that cannot be looked at this way is taken at its word."""
    try:
        look()
    except AssertionError as error:
        return str(error).partition(";")[0]
    except Exception:
        return None
    return None
