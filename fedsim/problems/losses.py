"""Losses of single records: `(output [m, ...], labels [m, ...]) -> [m]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from fedsim.errors import InputError
from fedsim.problems.data.table import Data

PerRecord = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Target = Literal["classes", "numbers", "characters"]


def cross_entropy(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return `-log softmax(output)[label]`; output `[m, classes]`."""
    return output.logsumexp(dim=1) - output.gather(1, label[:, None])[:, 0]


def mean_square(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return `(output - label)^2`; output `[m, 1]`."""
    return (output[:, 0] - label) ** 2


def next_character(output: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return the mean over places of `-log softmax(output)[label]`; output `[m, places, characters]`."""
    return (output.logsumexp(dim=2) - output.gather(2, label[:, :, None])[:, :, 0]).mean(dim=1)


LOSSES: dict[str, PerRecord] = {
    "cross_entropy": cross_entropy,
    "mean_square": mean_square,
    "next_character": next_character,
}


def default(data: Data) -> str:
    """Return the loss that follows from the data."""
    if data.vocabulary:
        return "next_character"
    return "mean_square" if data.task == "regression" else "cross_entropy"


def target(data: Data) -> Target:
    """Return what a model of these data is to tell."""
    if data.vocabulary:
        return "characters"
    return "numbers" if data.task == "regression" else "classes"


def refuse_misfit(loss: str, data: Data) -> None:
    """Refuse a named loss of something else than the data hold.

    Raises:
        InputError: it needs classes, numbers or text, and the data have other labels.
    """
    needs: dict[str, tuple[Target, str]] = {
        "cross_entropy": ("classes", "needs classes"),
        "mean_square": ("numbers", "needs numbers"),
        "next_character": ("characters", "needs text"),
    }
    if loss in needs and needs[loss][0] != target(data) and (loss, target(data)) != ("mean_square", "classes"):
        raise InputError(
            f"problem module: {loss} {needs[loss][1]}, data {data.name!r} has {target(data)}; use {default(data)}"
        )
