"""What an algorithm is: a frozen dataclass of parameters that resolves itself against a setting."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from fedsim.algorithms.dynamics import Dynamics

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from fedsim.privacy.clipping import Clip
    from fedsim.privacy.section import Privacy
    from fedsim.problems.problem import Minibatch

Auto = Literal["auto"]
Provenance = Literal["paper", "authors' code", "reconstruction"]


@dataclass(frozen=True)
class Sampling:
    """How a node draws the records of a stochastic gradient.

    `with_replacement`: `size` records, uniform; `epoch`: `size` records of a permutation drawn anew when it
    is used up (the last batch of an epoch may be smaller); `poisson`: each record with probability
    `size / records`, weighted by `1 / size`.
    """

    size: int
    kind: Literal["with_replacement", "epoch", "poisson"] = "with_replacement"


@dataclass(frozen=True)
class Constant:
    """A derived number as `check` prints it: name, value and the formula it came from."""

    name: str
    value: float
    formula: str


@dataclass(frozen=True)
class Guarantee:
    """`metric(t) <= prefactor * metric(0) * exp(-rate * t)`, `t` in units of time or rounds.

    `broken` lists the hypotheses that this run does not meet (then the line is a slope only).
    """

    metric: str
    rate: float
    prefactor: float
    source: str
    broken: tuple[str, ...] = ()


class Setting(Protocol):
    """What an algorithm may know before it starts: sizes and constants of problem and topology.

    `L`, `mu` are `max_i L_i`, `min_i mu_i` (None where unknown). `edges` int64 `[m, 2]` node numbers,
    `rates` float64 `[m]` exchanges per unit of time (scaled as the scenario says). `chi1`, `chi2` are those
    of the rates' Laplacian. `laplacian_eigenvalues` is (smallest positive, largest) of the unweighted one.
    """

    @property
    def n(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def L(self) -> float | None: ...
    @property
    def mu(self) -> float | None: ...
    @property
    def edges(self) -> NDArray[np.int64]: ...
    @property
    def rates(self) -> NDArray[np.float64]: ...
    @property
    def chi1(self) -> float: ...
    @property
    def chi2(self) -> float: ...
    @property
    def laplacian_eigenvalues(self) -> tuple[float, float]: ...
    @property
    def mixing_gap(self) -> float: ...
    @property
    def resistances(self) -> NDArray[np.float64]:
        """float64 `[m]`: `(e_i - e_j)^T Lam^+ (e_i - e_j)` of the rates' Laplacian."""
        ...

    @property
    def common_start(self) -> bool: ...
    @property
    def has_dual(self) -> bool: ...
    @property
    def tensor_sizes(self) -> list[int]:
        """Numbers of parameters of the model's tensors."""
        ...

    @property
    def rounds(self) -> int:
        """Rounds of the schedule (0 for events)."""
        ...

    @property
    def privacy(self) -> Privacy | None:
        """What the scenario promises, if anything."""
        ...

    @property
    def unit_weight(self) -> float:
        """Largest weight of one record (or, with `unit: user`, one worker) in the objective."""
        ...

    @property
    def base(self) -> Path:
        """Folder that a user's own files are looked up from."""
        ...

    def require(self, who: str, *names: str) -> None:
        """Refuse (InputError) by name what is missing: "L", "mu" (positive), "dual", "rates", "edges"."""
        ...


class Oracle(Protocol):
    """A block's view of the problem: every call is counted."""

    nodes: NDArray[np.int64]
    n: int

    def gradient(
        self,
        x: torch.Tensor,
        batch: Sampling | Minibatch | None = None,
        rng: Draws | None = None,
        rows: NDArray[np.bool_] | None = None,
    ) -> torch.Tensor:
        """Return gradients `[rows, dim]`; `rows` is a mask by node number (partial participation), 0 outside it."""
        ...

    def query(self, points: torch.Tensor, rows: NDArray[np.bool_] | None = None) -> torch.Tensor:
        """Return noisy function values `[rows, count]` at `points [rows, count, dim]`; 0 outside the mask."""
        ...

    def inside(self, x: torch.Tensor) -> torch.Tensor:
        """Return the nearest points of the problem's box."""
        ...

    def clipped(
        self,
        x: torch.Tensor,
        clip: Clip,
        before: torch.Tensor | None = None,
        weights: NDArray[np.float64] | None = None,
        rows: NDArray[np.bool_] | None = None,
    ) -> torch.Tensor:
        """Return means of clipped per-record gradients (or differences of them) `[rows, dim]`."""
        ...

    def regular_gradient(self, x: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the objective's part that no record enters (l2)."""
        ...

    def sample(self, sampling: Sampling | None, rng: Draws) -> Minibatch | None: ...
    def dual_gradient(self, s: torch.Tensor) -> torch.Tensor: ...
    def charge(self, gradients: int = 0, samples: int = 0) -> None:
        """Count gradients that the algorithm computes itself, with requests on the way."""
        ...

    def prox(self, v: torch.Tensor, step: float) -> torch.Tensor: ...
    @property
    def records(self) -> NDArray[np.int64]: ...
    @property
    def scale(self) -> torch.Tensor:
        """`[rows, 1]`, what multiplies each node's mean loss in its `f_i`: 1, or by samples."""
        ...

    @property
    def has_composite(self) -> bool:
        """Whether there is an r, which only a prox does justice to."""
        ...


class Draws(Protocol):
    """Random numbers of a block in one round: keyed by (seed, purpose, node, round), whoever holds the node."""

    def uniform(self, purpose: str, count: int) -> torch.Tensor:
        """`[rows, count]` in [0, 1)."""
        ...

    def normal(self, purpose: str, count: int) -> torch.Tensor:
        """`[rows, count]`, standard normal."""
        ...

    def integers(self, purpose: str, count: int, high: NDArray[np.int64] | int) -> torch.Tensor:
        """int64 `[rows, count]` in [0, high)."""
        ...

    def shared(self, purpose: str) -> np.random.Generator:
        """A generator equal on every node (and rank) in this round."""
        ...


class Algorithm(ABC):
    """Base of all algorithms; concrete ones are frozen dataclasses whose fields are the scenario's keys."""

    kind: ClassVar[str]
    paper: ClassVar[str]
    provenance: ClassVar[Provenance]
    needs: ClassVar[tuple[str, ...]] = ()
    proximal: ClassVar[bool] = False  # whether it minimises f + r by prox; others are refused where there is an r

    def resolve(self, setting: Setting) -> Self:
        """Return a copy whose `auto` fields are numbers; refuse by name what the theory lacks."""
        return self

    def derived(self, **values: Any) -> Self:
        """Return a copy with values that follow from the setting, for `resolve` (fields with `init=False`)."""
        twin = copy.copy(self)
        for name, value in values.items():
            object.__setattr__(twin, name, value)
        return twin

    def constants(self, setting: Setting) -> tuple[Constant, ...]:
        """Return the derived constants that `check` prints, with formulas (call on a resolved instance)."""
        return ()

    def notes(self, setting: Setting) -> tuple[str, ...]:
        """Return what a user should know of this run before it starts (call on a resolved instance)."""
        return ()

    def guarantee(self, setting: Setting) -> Guarantee | None:
        """Return the paper's bound for this run, or None."""
        return None


class SyncAlgorithm(Algorithm):
    """Rounds. State is a dataclass whose fields are annotated `Rows` or `Shared`.

    Attributes:
        on_device: whether its state may lie on an accelerator; else only gradients are computed there.
    """

    on_device: ClassVar[bool] = True

    @abstractmethod
    async def start(self, x0: torch.Tensor, f: Oracle, rng: Draws) -> Any:
        """Return the state before round 0 from the rows' start `x0 [rows, dim]`."""

    @abstractmethod
    async def round(self, s: Any, k: int, f: Oracle, rng: Draws) -> Any:
        """Return the state after round `k`."""

    def output(self, s: Any, f: Oracle) -> torch.Tensor:
        """Return every node's answer `[rows, dim]`; not charged (an observation)."""
        return s.x

    async def answer(self, s: Any, f: Oracle) -> torch.Tensor:
        """Return what `output` gives, or what takes a request to know; an observation, never charged."""
        return self.output(s, f)

    def measures(self, s: Any, f: Oracle) -> Mapping[str, torch.Tensor]:
        """Return numbers of every row `[rows]` by name; their means over nodes are recorded beside the metrics."""
        return {}

    def metrics(self, setting: Setting) -> Mapping[str, Callable[[torch.Tensor], float | None]] | None:
        """Return what is recorded of the mean of all answers `[1, dim]`, by name; None: the problem's metrics.

        A metric that has no value yet is None.
        """
        return None


class DynamicsAlgorithm(Algorithm):
    """Events, linear between and at events: a table of coefficients."""

    @abstractmethod
    def dynamics(self, setting: Setting) -> Dynamics:
        """Return the table (call on a resolved instance)."""


class EventAlgorithm(Algorithm):
    """Events, not linear: functions of rows. `v` maps each variable's name to `[rows, dim]`."""

    variables: ClassVar[tuple[str, ...]]

    @abstractmethod
    def start(self, x0: torch.Tensor, gradient: torch.Tensor, mean_gradient: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the first values from `x0`, `grad f_i(x0)` `[rows, dim]` and its mean over nodes `[1, dim]`.

        A `start(self, x0)` takes no gradients, and a `start(self, x0, gradient)` no mean: what is not a parameter is
        neither computed nor charged.
        """

    def flow(self, v: dict[str, torch.Tensor], elapsed: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the state `elapsed [rows, 1]` units of time later."""
        return v

    def point(self, v: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return where the gradient is taken."""
        return v["x"]

    @abstractmethod
    def gradient(self, v: dict[str, torch.Tensor], g: torch.Tensor, count: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the state after a gradient event; `count [rows, 1]` is the node's gradients before it."""

    @abstractmethod
    def message(self, v: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return what is sent, `[rows, dim]`: dim numbers, as they are charged."""

    @abstractmethod
    def gossip(self, v: dict[str, torch.Tensor], own: torch.Tensor, other: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the state after an exchange of `own` for `other`."""

    def output(self, v: dict[str, torch.Tensor]) -> torch.Tensor:
        return v["x"]
