"""Any `torch.nn.Module` with a loss, as n local objectives over its flattened parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.func import functional_call, grad, vmap

from fedsim.errors import InputError
from fedsim.problems.data.table import Data
from fedsim.problems.dense import SLOPES, Activation, DenseRecords, Layer, softplus
from fedsim.problems.per_record import ModuleRecords, record_loss
from fedsim.problems.problem import Minibatch, Nodes, Problem


class ModuleProblem(Problem):
    """`f_i(x) = (1/m_i) sum_j loss(model_x(a_ij), b_ij) + (l2/2) ||x||^2`.

    Gradients of all rows are taken at once (`torch.func.vmap` over nodes). Records are padded to the longest node
    of all, never of the block, so that a row's bits do not depend on the rows beside it.

    Args:
        model: its parameters are read once, as the start; buffers are not supported.
        loss: `cross_entropy` or `mean_square`, per record.

    Raises:
        InputError: the model has buffers (batch norm, say), or its output does not fit the loss.
    """

    kind = "module"
    common_start = True

    def __init__(
        self, model: torch.nn.Module, data: Data, parts: list[np.ndarray], loss: str, l2: float, weights: str
    ) -> None:
        if any(True for _ in model.buffers()):
            raise InputError("problem module: the model has buffers (batch norm?); nodes own parameters only")
        self.n, self.l2, self.data, self.parts = len(parts), l2, data, parts
        self._model = model.double()
        self._names = [name for name, _ in model.named_parameters()]
        self._shapes = [p.shape for p in model.parameters()]
        self._sizes = [p.numel() for p in model.parameters()]
        self.initial = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        self.dim = len(self.initial)
        self.records = np.array([len(part) for part in parts], dtype=np.int64)
        total = int(self.records.sum())
        self.scale = self.records * (self.n / total) if weights == "samples" else np.ones(self.n)
        self._scale = torch.from_numpy(self.scale)
        self._features, self._labels = _padded(data, parts, loss)
        self._full = _full_weights(self.records)
        self._loss, self._per_record = loss, PER_RECORD[loss]
        self._gradient = vmap(grad(self._weighted), in_dims=(0, 0, 0, 0), randomness="error")
        self._losses = vmap(self._weighted, in_dims=(0, 0, 0, 0), randomness="error")

    @property
    def tensor_sizes(self) -> list[int]:
        """Numbers of parameters of the model's tensors."""
        return self._sizes

    def gradient(self, x: torch.Tensor, nodes: Nodes, batch: Minibatch | None = None) -> torch.Tensor:
        """Return `grad f_i(x_i)` `[rows, dim]`."""
        g = self._gradient(x, *self._inputs(nodes, batch))
        return self._scale[nodes][:, None] * (g + self.l2 * x)

    def loss(self, x: torch.Tensor, nodes: Nodes) -> torch.Tensor:
        """Return `f_i(x_i)` `[rows]`."""
        x = x.expand(len(nodes), -1)
        with torch.no_grad():
            value = self._losses(x, *self._inputs(nodes, None))
            return self._scale[nodes] * (value + 0.5 * self.l2 * (x * x).sum(dim=1))

    def start(self, nodes: Nodes) -> torch.Tensor:
        """Return the model's own initial parameters on every row."""
        return self.initial.expand(len(nodes), -1).clone()

    def metrics(self) -> dict[str, Callable[[torch.Tensor], float]]:
        """Return the accuracy of the mean model on all training records, for classes; both on the held-out ones."""
        data = {"": self.data} | ({} if self.data.held_out is None else {"test_": self.data.held_out})
        found = {"test_loss": self._test_loss} if self.data.held_out is not None else {}
        if self._per_record is _cross_entropy:
            found |= {f"{name}accuracy": partial(self._accuracy, part) for name, part in data.items()}
        return found

    def per_record(self) -> DenseRecords | ModuleRecords:
        """Return per-record gradients: in factors for stacks of linear layers, else by `vmap`."""
        stack = _stack(self._model)
        if stack is not None:
            return DenseRecords(*stack, SLOPES[self._loss], self._records_of)
        loss = record_loss(self._model, self._named, self._per_record)
        return ModuleRecords(self._features, self._labels, loss, self._sizes)

    def _records_of(self, node: int, chosen: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        if len(chosen) == self.records[node]:
            return self._features[node, : len(chosen)], self._labels[node, : len(chosen)]
        places = torch.from_numpy(chosen)
        return self._features[node, places], self._labels[node, places]

    def facts(self) -> dict[str, Any]:
        """Return data set, sizes and the partition's table."""
        from fedsim.problems.partition import report

        table = report(self.parts, self.data)
        return {
            "data": self.data.name,
            "records": int(self.records.sum()),
            "model": type(self._model).__name__,
            "partition": {"header": list(table.header), "counts": np.asarray(table.counts).tolist()},
        }

    def _output(self, x: torch.Tensor, data: Data) -> torch.Tensor:
        with torch.no_grad():
            return functional_call(self._model, self._named(x[0]), (torch.from_numpy(data.features),))

    def _accuracy(self, data: Data, x: torch.Tensor) -> float:
        return float((self._output(x, data).argmax(dim=1).numpy() == data.labels).mean())

    def _test_loss(self, x: torch.Tensor) -> float:
        assert self.data.held_out is not None
        labels = torch.from_numpy(self.data.held_out.labels)
        return float(self._per_record(self._output(x, self.data.held_out), labels).mean())

    def _inputs(self, nodes: Nodes, batch: Minibatch | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = torch.from_numpy(np.asarray(nodes))
        features, labels, weights = self._features[rows], self._labels[rows], self._full[rows]
        if batch is None:
            return features, labels, weights
        indices = torch.from_numpy(batch.indices)
        place = torch.arange(len(nodes))[:, None]
        return features[place, indices], labels[place, indices], torch.from_numpy(batch.weights)

    def _named(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = x.split(self._sizes)
        return {name: p.reshape(s) for name, p, s in zip(self._names, parts, self._shapes, strict=True)}

    def _weighted(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        output = functional_call(self._model, self._named(x), (a,))
        return (weights * self._per_record(output, b)).sum()


class Softplus(torch.nn.Module):
    """`log(1 + exp(z))`; torch's own may change its last bit with the number of rows."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Return the values, elementwise."""
        return softplus(z)


LAYERS: dict[str, type[torch.nn.Module]] = {"tanh": torch.nn.Tanh, "softplus": Softplus}


def mlp(
    features: int, outputs: int, hidden: list[int], seed: int, activation: str = "tanh", initial: str = "normal"
) -> torch.nn.Module:
    """Return linear layers with an activation between, initialised from `seed` alone (global state is not touched)."""
    widths = [features, *hidden, outputs]
    layers: list[torch.nn.Module] = []
    for inner, outer in pairwise(widths):
        layers += [torch.nn.Linear(inner, outer, device="meta", dtype=torch.float64), LAYERS[activation]()]
    model = torch.nn.Sequential(*layers[:-1]).to_empty(device="cpu")
    initialise(model, seed) if initial == "normal" else _initialise_uniform(model, seed)
    return model


def initialise(model: torch.nn.Module, seed: int) -> None:
    """Draw every weight matrix as N(0, 1/inputs) and set vectors to 0, from `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.0
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * scale)


def _initialise_uniform(model: torch.nn.Module, seed: int) -> None:
    """Draw the weights and biases of linear layers from the uniform law on `+- 1/sqrt(inputs)`, torch's default."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear):
                for p in (layer.weight, layer.bias):
                    draw = torch.rand(p.shape, generator=generator, dtype=p.dtype)
                    p.copy_((2 * draw - 1) * layer.in_features**-0.5)


def _stack(model: torch.nn.Module) -> tuple[list[Layer], Activation] | None:
    """Return layers and activation of a stack of linear layers with one and the same activation between, or None."""
    if not isinstance(model, torch.nn.Sequential):
        return None
    linear, between = list(model)[::2], list(model)[1::2]
    kinds = {type(layer) for layer in between}
    names: dict[type, Activation] = {torch.nn.Tanh: "tanh", Softplus: "softplus"}
    if len(kinds) > 1 or not kinds <= set(names) or len(linear) != len(between) + 1:
        return None
    if not all(type(layer) is torch.nn.Linear for layer in linear):
        return None
    layers = [Layer(m.in_features, m.out_features, m.bias is not None) for m in linear]  # type: ignore[union-attr]
    return layers, names[kinds.pop()] if kinds else "none"


def _cross_entropy(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return output.logsumexp(dim=1) - output.gather(1, label[:, None])[:, 0]


def _mean_square(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return (output[:, 0] - label) ** 2


PER_RECORD = {"cross_entropy": _cross_entropy, "mean_square": _mean_square}


def _padded(data: Data, parts: list[np.ndarray], loss: str) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(part) for part in parts)
    if loss == "cross_entropy" and data.task == "regression":
        raise InputError(
            f"problem module: cross_entropy needs classes, data {data.name!r} has numbers; use mean_square"
        )
    features = np.zeros((len(parts), longest, data.features.shape[1]))
    labels = np.zeros((len(parts), longest), np.int64 if loss == "cross_entropy" else np.float64)
    for node, part in enumerate(parts):
        features[node, : len(part)], labels[node, : len(part)] = data.features[part], data.labels[part]
    return torch.from_numpy(features), torch.from_numpy(labels)


def _full_weights(records: np.ndarray) -> torch.Tensor:
    place = np.arange(records.max())[None]
    return torch.from_numpy(np.where(place < records[:, None], 1.0 / records[:, None], 0.0))
