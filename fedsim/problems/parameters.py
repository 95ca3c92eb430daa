"""The keys of each problem kind, beside `data` and `partition`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fedsim.problems.data.table import Data
    from fedsim.problems.problem import Problem

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
Weights = Literal["uniform", "samples"]


@dataclass(frozen=True)
class LeastSquaresParameters:
    """`f_i(x) = (1/m_i) sum_j (a_ij'x - b_ij)^2` (no factor 1/2, as in the DADAO experiments).

    Attributes:
        weights: uniform (every node counts the same) or samples (every record counts the same).
    """

    needs_data: ClassVar[bool] = True
    weights: Weights = "uniform"


@dataclass(frozen=True)
class RidgeParameters:
    """Least squares `+ (l2/2) ||x||^2` on every node."""

    needs_data: ClassVar[bool] = True
    l2: Positive
    weights: Weights = "uniform"


@dataclass(frozen=True)
class LogisticParameters:
    """`f_i(x) = (1/m_i) sum_j log(1 + exp(-y_ij a_ij'x)) + (l2/2) ||x||^2`, two classes as y = -1, +1."""

    needs_data: ClassVar[bool] = True
    l2: Weight = 0.0
    weights: Weights = "uniform"


@dataclass(frozen=True)
class NonconvexLogisticParameters:
    """Logistic regression with the penalty `penalty * sum_k x_k^2 / (1 + x_k^2)`, which is not convex."""

    needs_data: ClassVar[bool] = True
    penalty: Weight = 0.1
    weights: Weights = "uniform"

    def from_records(self, data: Data, parts: list[NDArray[np.int64]], seed: int) -> Problem:
        """Return the problem."""
        from fedsim.problems.nonconvex_logistic import NonconvexLogistic

        return NonconvexLogistic(data, parts, self.penalty, self.weights)


@dataclass(frozen=True)
class MultinomialParameters:
    """Softmax regression: x holds one row of coefficients per class, `dim = classes * features`."""

    needs_data: ClassVar[bool] = True
    l2: Weight = 0.0
    weights: Weights = "uniform"


@dataclass(frozen=True)
class QuadraticParameters:
    """`f_i(x) = (1/2) (x - b_i)' A_i (x - b_i)`.

    Attributes:
        dim: length of x.
        condition: eigenvalues of every `A_i` are spread from 1 to this, in a seeded random basis of each node; with
            dim 1 those of the nodes are.
        heterogeneity: standard deviation of the nodes' centres `b_i` around 0.
        shape: full, or diagonal (O(dim) data per node, for millions of nodes).
        curvatures, centres: given instead: `curvatures [n]`, `[n][dim]` diagonals or symmetric `[n][dim][dim]`,
            `centres [n][dim]`.
    """

    needs_data: ClassVar[bool] = False
    dim: Count = 10
    condition: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 10.0
    heterogeneity: Weight = 1.0
    shape: Literal["full", "diagonal"] = "full"
    curvatures: list[Finite] | list[list[Finite]] | list[list[list[Finite]]] | None = None
    centres: list[list[Finite]] | None = None
    seed: Seed | None = None


@dataclass(frozen=True)
class ConsensusParameters:
    """`f_i(x) = ||x - b_i||^2 / 2`: the optimum is the mean of the b_i; `start: {kind: problem}` starts from them.

    Attributes:
        dim: length of x; the b_i are then standard normal.
        values: `[n][dim]`, given instead.
    """

    needs_data: ClassVar[bool] = False
    dim: Count = 1
    values: list[list[Finite]] | None = None
    seed: Seed | None = None


@dataclass(frozen=True)
class ModuleParameters:
    """A `torch.nn.Module` with a loss; every node holds its own copy of the parameters.

    Attributes:
        model: softmax, mlp, lenet5, residual_cnn, transformer (text), or your own `package.module:Class` /
            `file.py:Class`, called with (features, outputs) and `arguments`.
        arguments: further ones, by name (residual_cnn: widths, depth; transformer: width, heads, layers).
        hidden: widths of the mlp's hidden layers. activation: between its layers.
        initial: its first weights: normal (variance 1/inputs, biases 0) or uniform (on +-1/sqrt(inputs), biases too).
            Other models start as they initialise themselves.
        loss: cross_entropy for classes, mean_square for numbers, next_character for text; follows from the data.
            Or your own function, as `file.py:function`: (output [m, ...], labels [m]) -> losses [m].
        l2: `(l2/2) ||x||^2` on every node.
        weights: of the nodes: uniform, or by samples.
        dtype: float64 or float32, of models, messages and gradients.
        seed: of the initial parameters, which `start: {kind: problem}` starts from.
    """

    needs_data: ClassVar[bool] = True
    model: str = "mlp"
    arguments: dict[str, Any] = field(default_factory=dict)
    hidden: list[Count] = field(default_factory=lambda: [16])
    activation: Literal["tanh", "softplus", "relu", "gelu"] = "tanh"
    initial: Literal["normal", "uniform"] = "normal"
    loss: str | None = None
    l2: Weight = 0.0
    weights: Weights = "uniform"
    dtype: Literal["float64", "float32"] = "float64"
    seed: Seed | None = None
