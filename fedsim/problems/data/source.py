"""What every kind of data shares: scaling, intercept, and the order in which they happen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt

from fedsim.problems.data.table import Data, Normalise, normalised, split_off, with_bias, with_target


@dataclass(frozen=True)
class Surroundings:
    """What a source may need beside its own keys.

    Attributes:
        base: folder that relative file names start from.
        n: number of nodes (None where not known; synthetic sets need it).
        seed: of the scenario file; a source's own `seed` wins.
    """

    base: Path
    n: int | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """Where records come from.

    Attributes:
        normalise: none, columns (mean 0, deviation 1), rows (norm 1) or both (columns, then rows).
        bias: append a feature that is 1 in every record, after scaling.
        held_out: share of the records that no node gets, for tests; scaling follows the others.
        held_out_seed: which ones (scikit-learn's random_state).
        target: max divides regression targets by the largest magnitude.
    """

    normalise: Normalise = "none"
    bias: bool = False
    held_out: Annotated[float, Ge(0), Lt(1)] = 0.0
    held_out_seed: Annotated[int, Ge(0), Lt(2**32)] = 0
    target: Literal["given", "max"] = "given"

    @abstractmethod
    def read(self, around: Surroundings) -> Data:
        """Return the records as they come, checked but not scaled."""

    def load(self, around: Surroundings) -> Data:
        """Return the records as a problem uses them."""
        data = self.read(around)
        if self.held_out:
            data = split_off(data, self.held_out, self.held_out_seed)
        data = normalised(data, self.normalise)
        if self.target == "max":
            data = with_target(data)
        return with_bias(data) if self.bias else data

    def facts(self) -> dict[str, Any]:
        """Return the provenance: package, file and licence where they are known."""
        return {}
