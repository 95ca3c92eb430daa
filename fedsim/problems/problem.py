"""What is minimised: `(1/n) sum_i f_i(x) + r(x)`, with node `i` owning `f_i`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import InputError, Unsupported

if TYPE_CHECKING:
    import torch

    from fedsim.problems.per_record import RecordGradients

Nodes = NDArray[np.int64]


@dataclass(frozen=True)
class Minibatch:
    """Records drawn for each row: `sum_j weights[row, j] * grad loss(record indices[row, j])`.

    Attributes:
        indices: int64 `[rows, width]`, record numbers within each node (padding repeats record 0).
        weights: float64 `[rows, width]`, 0 where padded; they already hold the `1/b` of a mean.
    """

    indices: NDArray[np.int64]
    weights: NDArray[np.float64]

    @property
    def records(self) -> int:
        """Number of per-record gradients this costs."""
        return int(np.count_nonzero(self.weights))


@dataclass(frozen=True)
class CompiledObjective:
    """A gradient that the event kernel can call, with the data of the nodes it was made for.

    `gradient` is a numba function of the signature
    `(slot, x, indices, weights, reals, ints, scratch, out) -> None`:

    - `slot` int64: which of the nodes given to `Problem.compiled(nodes)`, by place in that array;
    - `x` float64 `[dim]`, `out` float64 `[dim]` (overwritten with the gradient of `f_i` at `x`);
    - `indices` int64 `[b]`, `weights` float64 `[b]`: a minibatch; `b = 0` means all records (exact gradient);
    - `reals` float64 flat, `ints` int64 flat: the data, laid out by the objective; `scratch` float64.

    Its result must depend on nothing else, and equal `Problem.gradient` to rounding.
    """

    gradient: Callable[..., None]
    reals: NDArray[np.float64]
    ints: NDArray[np.int64]
    scratch: int


def refuse_undeclared(problem: Problem) -> None:
    """Refuse a problem whose class does not say what every player needs to know of it."""
    name = type(problem).__name__
    for attribute in ("n", "dim", "records"):
        if not hasattr(problem, attribute):
            raise InputError(
                f"problem: {name} does not set {attribute!r}; a Problem sets n (nodes), dim (length of a model) and"
                " records (int64 [n], records per node to sample from; zeros where there are none)"
            )
    for attribute in ("records", "L", "mu"):
        shape = np.shape(getattr(problem, attribute))
        if getattr(problem, attribute) is not None and shape != (problem.n,):
            raise InputError(
                f"problem: {name}.{attribute} has shape {list(shape)}, [{problem.n}] needed (one per node)"
            )


def refuse_step(problem: Problem, step: float, where: str) -> None:
    """Refuse a step at which the prox of r is no minimiser, since r is not convex enough; `where` names the key."""
    if step * problem.weak_convexity >= 1.0:
        raise InputError(
            f"{where}: {step:g} given; problem.composite is weakly convex (rho = {problem.weak_convexity:g}), and its"
            f" prox needs a step below 1/rho = {1.0 / problem.weak_convexity:g}"
        )


class Problem(ABC):
    """`n` local objectives over `R^dim`.

    Arrays indexed by node use node numbers (the user's order). `nodes` arguments are int64 arrays of node
    numbers, one per row of `x`; a row's result must not depend on which other rows share the call.

    Attributes:
        n: number of nodes. dim: length of a model.
        records: int64 `[n]`, records per node (0 where the objective has none).
        L, mu: float64 `[n]`, smoothness and strong convexity of each `f_i`; None where unknown.
        weak_convexity: of r: the least rho >= 0 that makes `r + (rho/2) ||.||^2` convex; its prox needs `step < 1/rho`.
        kind: the registered name.
    """

    kind: str = "problem"
    n: int
    dim: int
    records: NDArray[np.int64]
    L: NDArray[np.float64] | None = None
    mu: NDArray[np.float64] | None = None
    weak_convexity: float = 0.0
    box: tuple[float, float] | None = None  # every coordinate's bounds; None: all of R^dim
    noise: float = 0.0  # standard deviation of what is added to every function value that is asked for
    has_gradient: bool = True
    common_start: bool = False  # whether `start` is the same on every node
    own_start: bool = False  # whether nodes start there unless the scenario says otherwise
    rows_alone: bool = False  # whether gradients of rows are computed one by one, however many share the call

    @property
    def dtype(self) -> torch.dtype:
        """Type of models and gradients; float64 unless the problem says otherwise."""
        import torch

        return torch.float64

    @property
    def tensor_sizes(self) -> list[int]:
        """Numbers of parameters of the model's tensors, in the order in which x holds them; one tensor here."""
        return [self.dim]

    @property
    def tensor_names(self) -> list[str]:
        """Names of the model's tensors, in the order of `tensor_sizes`."""
        return ["x"]

    @property
    def has_composite(self) -> bool:
        """Whether there is an r to which only a prox does justice."""
        return type(self).prox is not Problem.prox

    @abstractmethod
    def gradient(self, x: torch.Tensor, nodes: Nodes, batch: Minibatch | None = None) -> torch.Tensor:
        """Return `grad f_i(x_i)` as `[rows, dim]`: exact for `batch=None`, else the minibatch estimate."""

    @abstractmethod
    def loss(self, x: torch.Tensor, nodes: Nodes) -> torch.Tensor:
        """Return `f_i(x_i)` over all records of node i as `[rows]` (x may be `[1, dim]`, shared by all)."""

    def values(self, points: torch.Tensor, nodes: Nodes) -> torch.Tensor:
        """Return `f_i(points[i, j])`, without noise: `[rows, count]` at `points [rows, count, dim]`."""
        import torch

        twice, pair = (points, nodes) if len(nodes) > 1 else (points.expand(2, -1, -1), np.repeat(nodes, 2))
        columns = [self.loss(twice[:, j].contiguous(), pair) for j in range(points.shape[1])]
        return torch.stack(columns, dim=1)[: len(nodes)]

    def dual_gradient(self, s: torch.Tensor, nodes: Nodes) -> torch.Tensor:
        """Return `grad f_i^*(s_i)` as `[rows, dim]`: the point where `grad f_i` equals `s_i`."""
        raise Unsupported(
            f"problem {self.kind!r} has no dual gradient; least squares of full column rank, ridge and quadratics have"
        )

    def composite(self, x: torch.Tensor) -> torch.Tensor:
        """Return `r(x)` per row as `[rows]`; 0 here."""
        return x.new_zeros(x.shape[0])

    def prox(self, v: torch.Tensor, step: float) -> torch.Tensor:
        """Return `argmin_x r(x) + ||x - v||^2 / (2 step)` per row; the identity here."""
        return v

    def optimum(self) -> torch.Tensor | None:
        """Return the unique minimiser `[dim]` to 1e-12, or None where it is not unique or not known."""
        return None

    def start(self, nodes: Nodes) -> torch.Tensor | None:
        """Return where the problem itself would start each row, `[rows, dim]`, or None: it does not say."""
        return None

    def per_record(self) -> RecordGradients | None:
        """Return gradients of single records (for clipping), or None: this problem cannot tell them apart."""
        return None

    @property
    def shares(self) -> NDArray[np.float64]:
        """Weight of each node's mean loss in the objective, `[n]`: 1/n, or its share of the records."""
        scale: NDArray[np.float64] = getattr(self, "scale", np.ones(self.n))
        return scale / self.n

    def regular_gradient(self, x: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the objective's part that no record enters: `l2 x` where there is an l2."""
        return getattr(self, "l2", 0.0) * x

    def compiled(self, nodes: Nodes) -> CompiledObjective | None:
        """Return the compiled gradient over these nodes' data, or None: then events use `gradient` in batches."""
        return None

    def metrics(self) -> dict[str, Callable[[torch.Tensor], float]]:
        """Return further metrics of the mean model, by name (accuracy on a held-out set, say)."""
        return {}

    def local_metrics(self) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """Return metrics of each node's own model by name, `x [rows, dim] -> [rows]`.

        They are recorded when asked for: `NAME` is the mean over nodes, `NAME.3` that of node 3, `NAME.*` all.
        """
        return {}

    def use(self, device: str) -> None:
        """Compute losses and gradients on this device from now on.

        Raises:
            Unsupported: this problem computes on the CPU only.
        """
        if device != "cpu":
            raise Unsupported(f"engine.device: problem {self.kind!r} computes on the CPU; module can use {device}")

    def facts(self) -> dict[str, Any]:
        """Return what a reader of the result should know: sizes, partition table, notes."""
        return {}
