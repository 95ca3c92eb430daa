"""Per-record gradients of stacks of linear layers, by what a record sends through them ("ghost" norms).

A record's gradient of a layer is `s a'`: its input a (with a 1 for the bias) and the gradient s of its output. The
difference of two such is written `u a' + s_ w'` with `u = s - s_`, `w = a - a_`, so that

    ||u a' + s_ w'||^2 = ||u||^2 ||a||^2 + ||s_||^2 ||w||^2 + 2 (u . s_)(a . w),

which loses nothing to cancellation when the two points are close: expanded as three norms of gradients it would come
out too small in float32, and a record could exceed its radius (Murata & Suzuki, ICML 2023, made stable). Where the two
parts cancel each other, no order of summation helps: norms of differences are taken longer by what rounding can hide.
Norms are summed in double precision, also those of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from fedsim.problems.per_record import Signals

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROUNDING, SUMMING = 4, 1e-14
"""What may hide a part of a difference that cancels the other: roundings of an entry of its sum (of u, of w, of a
product, of their sum), in units of the type's last bit; and those of summing squares in double precision, relative.
"""

Activation = Literal["tanh", "softplus", "none"]
OutputGradient = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """A linear layer: `outputs x inputs` weights, then `outputs` biases where it has any."""

    inputs: int
    outputs: int
    bias: bool = True

    @property
    def size(self) -> int:
        """Number of parameters."""
        return self.outputs * (self.inputs + self.bias)


@dataclass(frozen=True)
class LayerSignals:
    """One layer's inputs `a [m, inputs]` and output gradients `s [m, outputs]`."""

    a: torch.Tensor
    s: torch.Tensor


class DenseSignals(Signals):
    """Gradients `s a'` of every layer; groups are layers."""

    def __init__(self, layers: Sequence[Layer], parts: Sequence[LayerSignals]) -> None:
        self.layers, self.parts = layers, parts

    def squared_norms(self) -> torch.Tensor:
        """Return `[m, layers]`."""
        pairs = zip(self.layers, self.parts, strict=True)
        return torch.stack([_square(p.s) * (_square(p.a) + layer.bias) for layer, p in pairs], dim=1)

    def sum(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum `[dim]`: one matrix product per layer."""
        found = []
        for group, (layer, p) in enumerate(zip(self.layers, self.parts, strict=True)):
            s = p.s * weights[:, group, None].to(p.s.dtype)
            found.append((s.T @ p.a).reshape(-1))
            if layer.bias:
                found.append(s.sum(dim=0))
        return torch.cat(found)

    def scaled(self, factors: torch.Tensor) -> DenseSignals:
        """Return the gradients times `factors [m, layers]`."""
        scaled = [LayerSignals(p.a, p.s * factors[:, group, None].to(p.s.dtype)) for group, p in enumerate(self.parts)]
        return DenseSignals(self.layers, scaled)

    def minus(self, other: DenseSignals) -> DenseDifference:
        """Return the differences, in factored form."""
        return DenseDifference(self, other)


class DenseDifference(Signals):
    """Differences `u a' + s_ w'` of every layer; in the first, `w` is zero and left out."""

    def __init__(self, new: DenseSignals, old: DenseSignals) -> None:
        self.layers = new.layers
        self._parts = [
            (p.s - q.s, p.a, q.s, p.a - q.a if place else None)  # the first layer's input is the record itself
            for place, (p, q) in enumerate(zip(new.parts, old.parts, strict=True))
        ]

    def squared_norms(self) -> torch.Tensor:
        """Return `[m, layers]`: never less than what `sum` adds, rounded as it is."""
        found = []
        for layer, (u, a, s_, w) in zip(self.layers, self._parts, strict=True):
            first = _square(u) * (_square(a) + layer.bias)
            if w is None:
                found.append(first)
                continue
            second = _square(s_) * _square(w)
            square = first + second + 2 * _inner(u, s_) * _inner(a, w) + SUMMING * (first + second)
            hidden = ROUNDING * torch.finfo(u.dtype).eps * (first.sqrt() + second.sqrt())
            found.append((square.clamp(min=0).sqrt() + hidden).square())
        return torch.stack(found, dim=1)

    def sum(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum `[dim]`: at most two matrix products per layer."""
        found = []
        for group, (layer, (u, a, s_, w)) in enumerate(zip(self.layers, self._parts, strict=True)):
            c = weights[:, group, None].to(u.dtype)
            cu = c * u
            total = cu.T @ a
            if w is not None:
                total = total + (c * s_).T @ w
            found.append(total.reshape(-1))
            if layer.bias:
                found.append(cu.sum(dim=0))
        return torch.cat(found)

    def scaled(self, factors: torch.Tensor) -> Signals:
        """Differences are clipped as they are, never scaled."""
        raise NotImplementedError

    def minus(self, other: object) -> Signals:
        """Differences of differences are never asked for."""
        raise NotImplementedError


class DenseRecords:
    """Per-record gradients of `layers` with an activation between them.

    Args:
        records: `(node, record numbers) -> (features [m, inputs], labels [m])`.
        output_gradient: of the loss by the last layer's output, `[m, outputs]`.
    """

    chunk = 1 << 16

    def __init__(
        self,
        layers: Sequence[Layer],
        activation: Activation,
        output_gradient: OutputGradient,
        records: Callable[[int, NDArray[np.int64]], tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        self.layers = tuple(layers)
        self._value, self._slope = ACTIVATIONS[activation]
        self._output_gradient, self._records = output_gradient, records

    def at(self, node: int, records: NDArray[np.int64], x: torch.Tensor) -> DenseSignals:
        """Return inputs and output gradients of every layer: one pass forth, one back."""
        features, labels = self._records(node, records)
        weights = self._weights(x)
        inputs, outputs = [features.to(x.dtype)], []
        for place, (weight, bias) in enumerate(weights):
            z = inputs[-1] @ weight.T if bias is None else torch.addmm(bias, inputs[-1], weight.T)
            outputs.append(z)
            if place + 1 < len(weights):
                inputs.append(self._value(z))
        s = self._output_gradient(outputs[-1], labels)
        parts = [LayerSignals(inputs[-1], s)]
        for place in range(len(weights) - 2, -1, -1):
            s = (s @ weights[place + 1][0]) * self._slope(outputs[place], inputs[place + 1])
            parts.append(LayerSignals(inputs[place], s))
        return DenseSignals(self.layers, parts[::-1])

    def _weights(self, x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        found = []
        for layer, part in zip(self.layers, x.split([layer.size for layer in self.layers]), strict=True):
            weight, bias = part.split([layer.outputs * layer.inputs, layer.size - layer.outputs * layer.inputs])
            found.append((weight.reshape(layer.outputs, layer.inputs), bias if layer.bias else None))
        return found


def softplus(z: torch.Tensor) -> torch.Tensor:
    """Return `log(1 + exp(z))`, built from functions whose bits do not depend on the size of the call."""
    return z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))


def _softplus_slope(z: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.tanh(0.5 * z))


ACTIVATIONS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "tanh": (torch.tanh, lambda z, value: 1 - value * value),
    "softplus": (softplus, _softplus_slope),
    "none": (lambda z: z, lambda z, value: torch.ones_like(z)),
}


def cross_entropy_slope(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return `softmax(output) - onehot(label)`."""
    p = torch.softmax(output, dim=1)
    p[torch.arange(len(label)), label] -= 1
    return p


def square_slope(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return the slope of `(output - label)^2`."""
    return 2 * (output - label[:, None])


def logistic_slope(output: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    """Return the slope of `log(1 + exp(-sign output))`."""
    y = sign[:, None]
    return -0.5 * y * (1 - torch.tanh(0.5 * y * output))


SLOPES: dict[str, OutputGradient] = {"cross_entropy": cross_entropy_slope, "mean_square": square_slope}


def _square(v: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(v, dim=1, dtype=torch.float64).square()


def _inner(v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (v.double() * w.double()).sum(dim=1)
