"""What plays a schedule: rounds or events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

    from fedsim.engine.counts import Counts


class Player(Protocol):
    """Plays rounds or events up to a time; observing and saving leave the run's bits unchanged."""

    counts: Counts

    @property
    def row_names(self) -> frozenset[str]:
        """Which arrays of `save` and `final` hold one row per node of this rank."""
        ...

    def start(self) -> None:
        """Set the initial state (and compile what must be compiled)."""
        ...

    @property
    def now(self) -> float:
        """Rounds played, or virtual time reached."""
        ...

    def advance(self, until: float) -> None:
        """Play every round numbered below, or event not later than, `until`."""
        ...

    def outputs(self) -> torch.Tensor:
        """Return every node's answer `[rows, dim]` in position order, at `now`; not charged."""
        ...

    def measures(self) -> dict[str, float]:
        """Return what the algorithm measures of its own state, as means over nodes; recorded beside the metrics."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return what `run.json` says of how it was played."""
        ...

    def save(self) -> dict[str, np.ndarray]:
        """Return everything that a resume needs."""
        ...

    def load(self, saved: dict[str, np.ndarray]) -> None:
        """Go back to what `save` returned, on the same scenario."""
        ...

    def final(self) -> dict[str, np.ndarray]:
        """Return the state for the digest: `[rows, ...]` in position order, shared values `[1, ...]`."""
        ...
