"""Linear layers with an activation between; none hidden: softmax or linear regression."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from fedsim.problems.dense import Activation, Layer
from fedsim.problems.models.layers import ACTIVATIONS, Softplus


def mlp(
    features: int,
    outputs: int,
    hidden: Sequence[int],
    seed: int,
    activation: str = "tanh",
    initial: str = "normal",
) -> torch.nn.Sequential:
    """Return linear layers with an activation between, initialised from `seed` alone (global state is not touched)."""
    layers: list[torch.nn.Module] = []
    for inner, outer in pairwise([features, *hidden, outputs]):
        layers += [torch.nn.Linear(inner, outer, device="meta", dtype=torch.float64), ACTIVATIONS[activation]()]
    model = torch.nn.Sequential(*layers[:-1]).to_empty(device="cpu")
    (_initialise if initial == "normal" else _initialise_uniform)(model, torch.Generator().manual_seed(seed))
    return model


def stack(model: torch.nn.Module) -> tuple[list[Layer], Activation] | None:
    """Return layers and activation of linear layers with one known activation between, or None: it is something else.

    What is known of such a stack beside its output is in `fedsim.problems.dense`.
    """
    if not isinstance(model, torch.nn.Sequential):
        return None
    linear, between = list(model)[::2], list(model)[1::2]
    kinds = {type(layer) for layer in between}
    names: dict[type, Activation] = {torch.nn.Tanh: "tanh", Softplus: "softplus"}
    if len(kinds) > 1 or not kinds <= set(names) or len(linear) != len(between) + 1:
        return None
    layers = [Layer(m.in_features, m.out_features, m.bias is not None) for m in linear if type(m) is torch.nn.Linear]
    if len(layers) != len(linear):
        return None
    return layers, names[kinds.pop()] if kinds else "none"


def _initialise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Draw weights with variance 1/inputs; biases are 0."""
    with torch.no_grad():
        for p in model.parameters():
            scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.0
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * scale)


def _initialise_uniform(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Draw the weights and biases of linear layers from the uniform law on `+- 1/sqrt(inputs)`, torch's default."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear):
                for p in (layer.weight, layer.bias):
                    draw = torch.rand(p.shape, generator=generator, dtype=p.dtype)
                    p.copy_((2 * draw - 1) * layer.in_features**-0.5)
