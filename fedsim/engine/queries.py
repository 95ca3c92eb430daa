"""Function values that nodes asked for: who asked how often, what came back, and a budget that is kept exactly."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

POINTS_UP_TO = 100  # dimensions up to which the log keeps the points beside the values


class Spent(Exception):
    """The run's budget of queries is spent; every block raises it at the same call."""


class Queries:
    """The queries of one block of nodes.

    Who takes part in a call, and with how many points, follows from shared values only, so every block knows what
    all n nodes have asked so far, and all of them stop at the same query.

    Args:
        nodes: int64 `[rows]`, node numbers of the block. n: number of all nodes.
        dim: length of a point. budget: queries of all nodes together; None: no bound.

    Attributes:
        asked: int64 `[n]`, queries of every node of the run.
        round: the round that the next queries belong to (-1 before round 0).
    """

    def __init__(self, nodes: NDArray[np.int64], n: int, dim: int, budget: int | None = None) -> None:
        self.nodes, self.budget, self.round = nodes, budget, -1
        self._n, self._dim = n, dim
        self._asked: NDArray[np.int64] | None = None
        self._log: list[list[tuple[int, NDArray[np.float64], NDArray[np.float64] | None]]] = [[] for _ in nodes]

    @property
    def asked(self) -> NDArray[np.int64]:
        """int64 `[n]`, queries of every node so far; made at the first query, since most runs have none."""
        if self._asked is None:
            self._asked = np.zeros(self._n, dtype=np.int64)
        return self._asked

    def allowed(self, mask: NDArray[np.bool_] | None, count: int) -> NDArray[np.int64]:
        """Return how many of `count` points each node may still ask, int64 `[n]` (0 outside the mask).

        Where the budget ends within a call, points are dealt out one per node in the order of node numbers.
        """
        taking_part = np.ones(self._n, dtype=bool) if mask is None else mask
        wanted = np.where(taking_part, count, 0)
        left = np.inf if self.budget is None else self.budget - int(self.asked.sum())
        if wanted.sum() <= left:
            return wanted
        each, rest = divmod(int(left), int(taking_part.sum()))
        first = np.flatnonzero(taking_part)[:rest]
        dealt = np.where(taking_part, each, 0)
        dealt[first] += 1
        return dealt

    def note(self, row: int, points: NDArray[np.float64], values: NDArray[np.float64]) -> None:
        """Log the answers `[count]` that one row got at `points [count, dim]`."""
        kept = points.copy() if self._dim <= POINTS_UP_TO else None
        self._log[row].append((self.round, values.copy(), kept))

    def columns(self) -> dict[str, NDArray]:
        """Return the log of this block: node, number (from 0, per node), round, value, and x `[queries, dim]`."""
        parts: list[dict[str, NDArray]] = []
        for node, log in zip(self.nodes, self._log, strict=True):
            values = np.concatenate([v for _, v, _ in log]) if log else np.empty(0)
            rounds = np.repeat([r for r, _, _ in log], [len(v) for _, v, _ in log]).astype(np.int64)
            part = {"node": np.full(len(values), node), "number": np.arange(len(values)), "round": rounds}
            part["value"] = values
            if self._dim <= POINTS_UP_TO:
                points = [p for _, _, p in log if p is not None]
                part["x"] = np.concatenate(points) if points else np.empty((0, self._dim))
            parts.append(part)
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

    def save(self) -> dict[str, NDArray]:
        """Return the log as arrays with one row per node, padded to the node that asked most."""
        log, longest = self.columns(), int(self.asked.max())
        saved: dict[str, NDArray] = {}
        for name, array in log.items():
            if name in ("round", "value", "x"):
                padded = np.zeros((len(self.nodes), longest, *array.shape[1:]), array.dtype)
                for row, node in enumerate(self.nodes):
                    own = array[log["node"] == node]
                    padded[row, : len(own)] = own
                saved[f"query.{name}"] = padded
        return saved

    def load(self, saved: dict[str, NDArray], asked: NDArray[np.int64]) -> None:
        """Go back to what `save` returned; `asked [n]` counts the queries of every node."""
        self._asked = asked.copy()
        for row, count in enumerate(asked[self.nodes]):
            rounds, values = saved["query.round"][row, :count], saved["query.value"][row, :count]
            cuts = np.flatnonzero(np.diff(rounds)) + 1
            points = np.split(saved["query.x"][row, :count], cuts) if "query.x" in saved else [None] * (len(cuts) + 1)
            pieces = zip(np.split(rounds, cuts), np.split(values, cuts), points, strict=True)
            self._log[row] = [(int(r[0]), v, p) for r, v, p in pieces if len(r)]
