"""Any `torch.nn.Module` with a loss, as n local objectives over its flattened parameters."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.errors import InputError, Unsupported, did_you_mean
from fedsim.problems.data.table import Data
from fedsim.problems.dense import SLOPES, DenseRecords
from fedsim.problems.losses import LOSSES, PerRecord, refuse_misfit
from fedsim.problems.models.mlp import stack
from fedsim.problems.once import Once
from fedsim.problems.per_record import ModuleRecords
from fedsim.problems.problem import Minibatch, Nodes, Problem
from fedsim.problems.row_gradients import RowGradients

DTYPES = {"float64": torch.float64, "float32": torch.float32}


class ModuleProblem(Problem):
    """`f_i(x) = (1/m_i) sum_j loss(model_x(a_ij), b_ij) + (l2/2) ||x||^2`.

    x holds the model's trainable parameters; the others stay as they are. Gradients of all rows are taken at once
    where the module allows it, else row by row (see `fedsim.problems.row_gradients`). What is held at a time stays
    below a fixed number of bytes: records are taken in parts whose size follows from the module alone.

    Args:
        model: copied; its parameters are the start. Buffers are constants: a model that changes them (batch norm) is
            refused.
        data: features `[N, d]` are the model's input, of text all characters but the last (int64). Other
            features come in `dtype`, whole numbers too: a model that looks them up says `x.long()`.
        parts: record numbers of each node.
        loss: `cross_entropy`, `mean_square`, `next_character`, or a function
            `(output [m, ...], labels [m]) -> losses [m]`.
        weights: `uniform`, or `samples`: a node counts by its number of records.
        dtype: of parameters and gradients, float64 or float32.

    Raises:
        InputError: the model changes its buffers, draws random numbers or lets records depend on each other, or
            model, loss and data do not fit.
    """

    kind = "module"
    common_start = True
    own_start = True

    def __init__(
        self,
        model: torch.nn.Module,
        data: Data,
        parts: list[NDArray[np.int64]],
        loss: str | PerRecord,
        l2: float = 0.0,
        weights: str = "uniform",
        dtype: str = "float64",
    ) -> None:
        if not any(p.requires_grad for p in model.parameters()):
            raise InputError("problem module: the model has no trainable parameters")
        self.n, self.l2, self.data, self.parts = len(parts), l2, data, parts
        self._loss, self._per_record = loss, _named_loss(loss, data)
        self._dtype, self._device, self._model = DTYPES[dtype], torch.device("cpu"), deepcopy(model).to(DTYPES[dtype])
        self.records = np.array([len(part) for part in parts], dtype=np.int64)
        total = int(self.records.sum())
        self.scale = self.records * (self.n / total) if weights == "samples" else np.ones(self.n)
        self._scale, self._scaled = torch.from_numpy(self.scale).to(self._dtype), weights == "samples"
        self._places, self._full = _padded(parts), _full_weights(self.records).to(self._dtype)
        self._prepare()

    def _prepare(self) -> None:
        self._a, self._b = self._tensors(self.data)
        self._rows = RowGradients(self._model, self._per_record, self._a, self._b)
        self.initial, self.dim = self._rows.initial.cpu(), len(self._rows.initial)
        self.rows_alone = self._rows.nature.alone is not None
        self._once = Once()

    def use(self, device: str) -> None:
        """Compute losses and gradients on this device from now on; models come from and go to the CPU."""
        if torch.device(device) == self._device:
            return
        self._device = torch.device(device)
        self._model = self._model.to(self._device)
        self._places, self._full = self._places.to(self._device), self._full.to(self._device)
        self._prepare()

    @property
    def dtype(self) -> torch.dtype:
        """Type of models and gradients."""
        return self._dtype

    @property
    def tensor_sizes(self) -> list[int]:
        """Numbers of parameters of the model's tensors."""
        return self._rows.sizes

    @property
    def tensor_names(self) -> list[str]:
        """Names of the model's trainable parameters, as torch has them."""
        return self._rows.names

    def gradient(self, x: torch.Tensor, nodes: Nodes, batch: Minibatch | None = None) -> torch.Tensor:
        """Return `grad f_i(x_i)` `[rows, dim]`."""
        g = self._rows.gradient(x.to(self._device), *self._inputs(nodes, batch)).to(x.device)
        if self.l2:
            g += self.l2 * x
        if self._scaled:
            g *= self._scale[nodes][:, None].to(x.device)
        return g

    def loss(self, x: torch.Tensor, nodes: Nodes) -> torch.Tensor:
        """Return `f_i(x_i)` `[rows]`."""
        x = x.expand(len(nodes), -1)
        value = self._rows.losses(x.to(self._device), *self._inputs(nodes, None)).cpu()
        return self._scale[nodes] * (value + 0.5 * self.l2 * (x * x).sum(dim=1))

    def start(self, nodes: Nodes) -> torch.Tensor:
        """Return the model's own initial parameters on every row."""
        return self.initial.expand(len(nodes), -1).clone()

    def metrics(self) -> dict[str, Callable[[torch.Tensor], float]]:
        """Return the mean model's accuracy on all training records, and accuracy and loss on the held-out ones.

        There is an accuracy where labels are classes (or characters, each counted).
        """
        found = {} if self.data.held_out is None else {"test_loss": partial(self._of_mean, "test", 0)}
        if self._has_accuracy:
            found["accuracy"] = partial(self._of_mean, "train", 1)
            if self.data.held_out is not None:
                found["test_accuracy"] = partial(self._of_mean, "test", 1)
        return found

    def local_metrics(self) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """Return accuracy and loss of each node's own model on the held-out records."""
        if self.data.held_out is None:
            return {}
        found = {"node_test_loss": partial(self._of_rows, 0)}
        return found | ({"node_test_accuracy": partial(self._of_rows, 1)} if self._has_accuracy else {})

    def per_record(self) -> DenseRecords | ModuleRecords:
        """Return per-record gradients: in factors for stacks of linear layers, else by `vmap`.

        Raises:
            Unsupported: the problem computes on another device than the CPU.
        """
        if self._device.type != "cpu":
            raise Unsupported(
                f"engine.device: {self._device.type} given, but gradients of single records are computed on the CPU;"
                " leave it out (dp_fedavg, which protects whole workers, can use it)"
            )
        layers = stack(self._model) if isinstance(self._loss, str) and self._loss in SLOPES else None
        if layers is not None and sum(layer.size for layer in layers[0]) == self.dim:  # all trained, none twice
            return DenseRecords(*layers, SLOPES[str(self._loss)], self._records_of)
        return ModuleRecords(self._records_of, self._rows.record_loss, self._rows.layer_sizes, self._dtype)

    def facts(self) -> dict[str, Any]:
        """Return data set, sizes, how rows are played and whether their bits are promised, the partition's table."""
        from fedsim.problems.partition import report

        table, alone = report(self.parts, self.data), self._rows.nature.alone
        return {
            "data": self.data.name,
            "records": int(self.records.sum()),
            "held_out": 0 if self.data.held_out is None else len(self.data.held_out),
            "model": type(self._model).__name__,
            "dtype": str(self._dtype).removeprefix("torch."),
            "rows": f"one after another: {alone}" if alone else "together, by torch.func.vmap",
            "device": str(self._device),
            "bits": "the same on any layout" if self._device.type == "cpu" else f"not promised on {self._device.type}",
            "partition": {"header": list(table.header), "counts": np.asarray(table.counts).tolist()},
        }

    @property
    def _has_accuracy(self) -> bool:
        return isinstance(self._loss, str) and self._loss in ("cross_entropy", "next_character")

    def _records_of(self, node: int, chosen: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        places = self._places[node, torch.from_numpy(chosen)]
        return self._a[places], self._b[places]

    def _inputs(self, nodes: Nodes, batch: Minibatch | None) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.from_numpy(np.asarray(nodes)).to(self._device)
        places = self._places[rows]
        if batch is None:
            return places, self._full[rows]
        chosen = torch.from_numpy(batch.indices).to(self._device)
        return places.gather(1, chosen), torch.from_numpy(batch.weights).to(self._device, self._dtype)

    def _of_mean(self, which: str, column: int, x: torch.Tensor) -> float:
        return float(self._once(which, x, lambda: self._judged(which, x))[0, column])

    def _of_rows(self, column: int, x: torch.Tensor) -> torch.Tensor:
        return self._once("rows", x, lambda: self._judged("rows", x))[:, column]

    def _judged(self, which: str, x: torch.Tensor) -> torch.Tensor:
        """Return loss and accuracy of the models `[rows, 2]`."""
        data = self.data if which == "train" else self.data.held_out
        assert data is not None
        a, b = (self._a, self._b) if which == "train" else self._tensors(data)
        return torch.stack([self._measured(row, a, b) for row in x.to(self._device)])

    def _measured(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return mean loss and share of right answers, float64 `[2]`."""
        loss, right, answers = 0.0, 0, b.numel()
        for part, output in self._rows.outputs(x, a):
            loss += float(self._per_record(output, b[part]).double().sum())
            if self._has_accuracy:
                right += int((output.argmax(dim=-1) == b[part]).sum())
        return torch.tensor([loss / len(a), right / answers], dtype=torch.float64)

    def _tensors(self, data: Data) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the model reads and what it is to tell."""
        features = torch.from_numpy(data.features)
        if data.vocabulary:
            characters = features.to(self._device, torch.int64)
            return characters[:, :-1].contiguous(), characters[:, 1:].contiguous()
        numbers = data.task == "regression" or self._loss == "mean_square"
        labels = torch.from_numpy(data.labels).to(self._device, self._dtype if numbers else torch.int64)
        return features.to(self._device, self._dtype), labels


def _named_loss(loss: str | PerRecord, data: Data) -> PerRecord:
    if not isinstance(loss, str):
        return loss
    if loss not in LOSSES:
        raise InputError(
            f"problem.loss: {loss!r} is not known{did_you_mean(loss, LOSSES)}; known: {', '.join(LOSSES)}; or your own,"
            " as package.module:function or file.py:function"
        )
    refuse_misfit(loss, data)
    return LOSSES[loss]


def _padded(parts: list[NDArray[np.int64]]) -> torch.Tensor:
    """Return the record numbers of each node `[n, longest]`, its first one where it has no more."""
    longest = max(len(part) for part in parts)
    return torch.from_numpy(np.stack([np.r_[part, np.full(longest - len(part), part[0])] for part in parts]))


def _full_weights(records: NDArray[np.int64]) -> torch.Tensor:
    place = np.arange(records.max())[None]
    return torch.from_numpy(np.where(place < records[:, None], 1.0 / records[:, None], 0.0))
