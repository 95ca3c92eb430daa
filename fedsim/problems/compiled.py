"""Objectives whose gradient is one compiled function: the same numbers for events, rounds and any block of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core.types import CompileResultWAP
from numba.extending import intrinsic
from numpy.typing import NDArray

from fedsim.errors import RunError
from fedsim.problems.once import Once
from fedsim.problems.problem import CompiledObjective, Minibatch, Nodes, Problem

if TYPE_CHECKING:
    from fedsim.problems.data.table import Data
    from fedsim.problems.dense import DenseRecords, OutputGradient

_reals, _ints = types.Array(types.float64, 1, "C"), types.Array(types.int64, 1, "C")
_rows, _drawn = types.Array(types.float64, 2, "C"), types.Array(types.int64, 2, "C")

GRADIENT = types.void(types.int64, _reals, _ints, _reals, _reals, _ints, _reals, _reals)
"""(slot, x, indices, weights, reals, ints, scratch, out): see `fedsim.problems.problem.CompiledObjective`."""
LOSS = types.float64(types.int64, _reals, _reals, _ints, _reals)
"""(slot, x, reals, ints, scratch) -> f_i(x) over all records."""


def _function_at(signature: Any) -> Any:
    """Return what makes a function of an address: an argument that is a function takes numba 2.5 us at every call."""
    kind = types.FunctionType(signature)

    @intrinsic
    def function_at(_context: Any, _address: Any = None) -> Any:
        def code(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            place = builder.inttoptr(args[0], context.get_value_type(types.voidptr))
            return builder.insert_value(ir.Constant(context.get_value_type(kind), None), place, 0)

        return kind(types.int64), code

    return function_at


_gradient_at, _loss_at = _function_at(GRADIENT), _function_at(LOSS)


@njit(types.void(types.int64, _ints, _rows, _drawn, _rows, _reals, _ints, _reals, _rows), cache=True)
def gradients(address, slots, x, indices, weights, reals, ints, scratch, out):  # pragma: no cover - compiled
    """Write the gradient of every row to `out`, one after another."""
    function = _gradient_at(address)
    for row in range(len(slots)):
        function(slots[row], x[row], indices[row], weights[row], reals, ints, scratch, out[row])


@njit(types.void(types.int64, _ints, _rows, _reals, _ints, _reals, _reals), cache=True)
def losses(address, slots, x, reals, ints, scratch, out):  # pragma: no cover - compiled
    """Write the loss of every row to `out`; a single row of x serves all."""
    function = _loss_at(address)
    for row in range(len(slots)):
        out[row] = function(slots[row], x[row if len(x) > 1 else 0], reals, ints, scratch)


def _address(function: Any, signature: Any) -> int:
    return CompileResultWAP(function.get_compile_result(signature)).__wrapper_address__()


@cache
def _everything(rows: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the empty minibatch of each row, which stands for all its records."""
    return np.empty((rows, 0), np.int64), np.empty((rows, 0))


class CompiledProblem(Problem):
    """Base of problems that give `_gradient`, `_loss` (compiled) and their tables `_reals`, `_ints`.

    The last `n` entries of `_ints` map a slot to a node number, so that any subset of nodes shares one table.
    """

    _gradient: Any
    _loss: Any
    _reals: NDArray[np.float64]
    _ints: NDArray[np.int64]
    _scratch: int = 1

    @cached_property
    def _gradient_address(self) -> int:
        return _address(self._gradient, GRADIENT)

    @cached_property
    def _loss_address(self) -> int:
        return _address(self._loss, LOSS)

    def gradient(self, x: torch.Tensor, nodes: Nodes, batch: Minibatch | None = None) -> torch.Tensor:
        """Return `grad f_i(x_i)` `[rows, dim]`."""
        rows = self._doubles(x)
        indices, weights = _everything(len(nodes)) if batch is None else (batch.indices, batch.weights)
        out, scratch = np.empty_like(rows), np.empty(self._scratch)
        slots = np.ascontiguousarray(nodes, dtype=np.int64)
        function = self._gradient_address
        gradients(function, slots, rows, indices, weights, self._reals, self._ints, scratch, out)
        return torch.from_numpy(out)

    def loss(self, x: torch.Tensor, nodes: Nodes) -> torch.Tensor:
        """Return `f_i(x_i)` `[rows]`."""
        out, scratch = np.empty(len(nodes)), np.empty(self._scratch)
        rows = self._doubles(x)
        losses(
            self._loss_address, np.ascontiguousarray(nodes, dtype=np.int64), rows, self._reals, self._ints, scratch, out
        )
        return torch.from_numpy(out)

    def _doubles(self, x: torch.Tensor) -> NDArray[np.float64]:
        if x.dtype != torch.float64:
            raise RunError(
                f"problem {self.kind!r} computes in float64, and was given points of {x.dtype}: keep the model in"
                " double precision, and shorten only what is sent (compression: low_precision)"
            )
        return np.ascontiguousarray(x.numpy(force=True))

    def compiled(self, nodes: Nodes) -> CompiledObjective:
        """Return the compiled gradient over these nodes."""
        ints = np.concatenate([self._ints[: len(self._ints) - self.n], np.asarray(nodes, np.int64)])
        return CompiledObjective(self._gradient, self._reals, ints, self._scratch)


class RecordsProblem(CompiledProblem):
    """Base of mean losses over records `(a, b)` plus `(l2/2) ||x||^2`.

    Tables: `reals` = features `[N, d]`, labels `[N]`, node scales `[n]`, l2; `ints` = d, N, n, classes, offsets
    `[n + 1]`, slots. Records lie node after node.
    """

    def __init__(
        self, data: Data, labels: NDArray[np.float64], parts: list[NDArray[np.int64]], l2: float, weights: str
    ) -> None:
        self.n, self.l2, self.data, self._once = len(parts), float(l2), data, Once()
        self.records = np.array([len(part) for part in parts], dtype=np.int64)
        order = np.concatenate(parts)
        self.offsets = np.concatenate([[0], np.cumsum(self.records)]).astype(np.int64)
        self.features = np.ascontiguousarray(data.features[order], dtype=np.float64)
        self.labels = np.ascontiguousarray(labels[order], dtype=np.float64)
        total = int(self.records.sum())
        self.scale = self.records * (self.n / total) if weights == "samples" else np.ones(self.n)
        d = self.features.shape[1]
        self._reals = np.concatenate([self.features.ravel(), self.labels, self.scale, [self.l2]])
        head = [d, total, self.n, max(1, len(data.classes or ()))]
        self._ints = np.concatenate([head, self.offsets, np.arange(self.n)]).astype(np.int64)
        self.parts = parts

    def of(self, node: int) -> slice:
        """Return where a node's records lie."""
        return slice(int(self.offsets[node]), int(self.offsets[node + 1]))

    def largest_eigenvalues(self) -> NDArray[np.float64]:
        """Return the largest eigenvalue of `A_i'A_i / m_i` as `[n]`."""
        found = np.zeros(self.n)
        for node in range(self.n):
            a = self.features[self.of(node)]
            m, d = a.shape
            gram = a.T @ a if d <= m else a @ a.T
            found[node] = max(np.linalg.eigvalsh(gram / m)[-1], 0.0)
        return found

    def slices(self) -> Iterator[slice]:
        """Yield parts of all records that are small enough to be copied to another type."""
        step = max(1, (1 << 22) // self.features.shape[1])
        return (slice(begin, begin + step) for begin in range(0, len(self.labels), step))

    def record_weights(self) -> NDArray[np.float64]:
        """Return each record's share in `(1/n) sum_i f_i`, `[N]`."""
        return np.repeat(self.scale / (self.n * self.records), self.records)

    def dense(self, outputs: int, output_gradient: OutputGradient, labels: NDArray[Any]) -> DenseRecords:
        """Return per-record gradients as those of one linear layer without bias."""
        from fedsim.problems.dense import DenseRecords, Layer

        features, targets = torch.from_numpy(self.features), torch.from_numpy(np.ascontiguousarray(labels))

        def records(node: int, chosen: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
            if len(chosen) == self.records[node]:
                return features[self.of(node)], targets[self.of(node)]
            places = torch.from_numpy(self.offsets[node] + chosen)
            return features[places], targets[places]

        return DenseRecords([Layer(features.shape[1], outputs, bias=False)], "none", output_gradient, records)

    def judge(self, x: NDArray[np.float64], data: Data) -> tuple[NDArray[np.float64], NDArray[np.bool_] | None]:
        """Return each record's loss at x `[dim]`, and whether x tells its class right; None where it has no class."""
        raise NotImplementedError

    def metrics(self) -> dict[str, Callable[[torch.Tensor], float]]:
        """Return the mean model's loss on the held-out records, and its accuracy where labels are classes."""
        return {f"test_{name}": partial(self._of_mean, column) for column, name in enumerate(self._held_out_names)}

    def local_metrics(self) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """Return loss and accuracy of each node's own model on the held-out records."""
        return {f"node_test_{name}": partial(self._of_rows, column) for column, name in enumerate(self._held_out_names)}

    @property
    def _held_out_names(self) -> tuple[str, ...]:
        if self.data.held_out is None:
            return ()
        return ("loss",) if self.data.task == "regression" else ("loss", "accuracy")

    def _of_mean(self, column: int, x: torch.Tensor) -> float:
        return float(self._once("mean", x, lambda: self._judged(x))[0, column])

    def _of_rows(self, column: int, x: torch.Tensor) -> torch.Tensor:
        return self._once("rows", x, lambda: self._judged(x))[:, column]

    def _judged(self, x: torch.Tensor) -> torch.Tensor:
        """Return loss and, where there are classes, accuracy of the models on the held-out records `[rows, .]`."""
        assert self.data.held_out is not None
        found = [self.judge(row, self.data.held_out) for row in x.double().numpy(force=True)]
        means = [[float(np.mean(part)) for part in parts if part is not None] for parts in found]
        return torch.tensor(means, dtype=torch.float64)

    def facts(self) -> dict[str, Any]:
        """Return data set, sizes and the partition's table."""
        from fedsim.problems.partition import report

        table = report(self.parts, self.data)
        return {
            "data": self.data.name,
            "records": int(self.records.sum()),
            "held_out": 0 if self.data.held_out is None else len(self.data.held_out),
            "partition": {"header": list(table.header), "counts": np.asarray(table.counts).tolist()},
        }


@njit(inline="always")
def place(slot, ints):  # pragma: no cover - compiled
    """Return (d, N, n, first record, end of records, node) of a slot in the tables of `RecordsProblem`."""
    d, total, n = ints[0], ints[1], ints[2]
    node = ints[4 + n + 1 + slot]
    return d, total, n, ints[4 + node], ints[4 + node + 1], node


@njit(inline="always")
def dot(reals, at, x, start, d):  # pragma: no cover - compiled
    """Return `reals[at:at + d] . x[start:start + d]`, left to right in four lanes."""
    s0, s1, s2, s3 = 0.0, 0.0, 0.0, 0.0
    c = 0
    while c + 4 <= d:
        s0 += reals[at + c] * x[start + c]
        s1 += reals[at + c + 1] * x[start + c + 1]
        s2 += reals[at + c + 2] * x[start + c + 2]
        s3 += reals[at + c + 3] * x[start + c + 3]
        c += 4
    while c < d:
        s0 += reals[at + c] * x[start + c]
        c += 1
    return (s0 + s1) + (s2 + s3)


@njit(inline="always")
def finish(x, reals, total, d, n, node, out):  # pragma: no cover - compiled
    """Scale by the node's weight and add `l2 x`: `f_i` is `scale * (mean loss + (l2/2) ||x||^2)`."""
    scale, l2 = reals[total * d + total + node], reals[total * d + total + n]
    for c in range(len(out)):
        out[c] = scale * (out[c] + l2 * x[c])
