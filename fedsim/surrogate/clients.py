"""The clients of one block during one round: their histories, what they ask, what their surrogates say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.algorithms.algorithm import Oracle
from fedsim.surrogate.history import History

Mask = NDArray[np.bool_] | None


class Clients:
    """Histories of the rows of a block that take part in a round.

    Args:
        points, values: `[rows, kept, dim]`, `[rows, kept]`, of earlier rounds. counts: int64 `[n]`, how many each node
            has. asks: queries of this round. memory: how many a client keeps, the newest; None: all.
        make: makes a `History` from a client's buffers and count.

    Attributes:
        points, values, counts: the same with room for this round's queries; they are what the next round starts from.
        own: int64, the rows that take part.
    """

    def __init__(
        self,
        f: Oracle,
        mask: Mask,
        points: torch.Tensor,
        values: torch.Tensor,
        counts: NDArray[np.int64],
        asks: int,
        memory: int | None,
        make: Callable[[torch.Tensor, torch.Tensor, int], History],
    ) -> None:
        self._f, self._mask = f, mask
        taking_part = np.ones(f.n, dtype=bool) if mask is None else mask
        self.own = np.flatnonzero(taking_part[f.nodes])
        kept = np.minimum(counts, np.inf if memory is None else max(0, memory - asks)).astype(np.int64)
        kept = np.where(taking_part, kept, counts)
        self.counts: NDArray[np.int64] = kept + asks * taking_part
        room = int(self.counts.max())
        self.points = points.new_zeros((len(f.nodes), room, points.shape[2]))
        self.values = values.new_zeros((len(f.nodes), room))
        for row, node in enumerate(f.nodes):
            end, size = int(counts[node]), int(kept[node])
            self.points[row, :size], self.values[row, :size] = (
                points[row, end - size : end],
                values[row, end - size : end],
            )
        self.histories = {int(r): make(self.points[r], self.values[r], int(kept[f.nodes[r]])) for r in self.own}

    def ask(self, points: torch.Tensor) -> None:
        """Ask the black boxes at `points [rows, count, dim]` and remember the answers."""
        values = self._f.query(points, self._mask)
        for row, history in self.histories.items():
            history.add(points[row], values[row])

    def per_row(self, of: Callable[[int, History], torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Return `of(row, history)` for every row that takes part, 0 for the others; shaped `like [rows, ...]`."""
        found = torch.zeros_like(like)
        for row, history in self.histories.items():
            found[row] = of(row, history)
        return found

    def most_uncertain(self, x: torch.Tensor, candidates: torch.Tensor, keep: int) -> torch.Tensor:
        """Return of `candidates [rows, m, dim]` the `keep` where the gradient is least certain, seen from `x`."""

        def best(row: int, history: History) -> torch.Tensor:
            order = history.trace(x[row], candidates[row]).sort(descending=True, stable=True).indices
            return candidates[row, order[:keep].sort().values]

        return self.per_row(best, candidates[:, :keep])
