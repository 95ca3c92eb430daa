"""What a check says, and the guard that keeps global generators out of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass
class Report:
    """What was checked and held; `print` it."""

    subject: str
    held: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([self.subject, *(f"  holds: {sentence}" for sentence in self.held)])


@contextmanager
def generators(seed: int) -> Iterator[None]:
    """Set the global generators of Python, NumPy and torch; they must stay as set; give the user's back."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - the subject here
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    as_set = _marks()
    try:
        yield
        for name, mark in _marks().items():
            if mark != as_set[name]:
                raise AssertionError(
                    f"the global generator of {name} was used; draw from `rng` (or `Streams`), which is keyed by node"
                )
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def _marks() -> dict[str, Any]:
    numpy_state: Callable[[], Any] = np.random.get_state
    return {
        "Python": random.getstate(),
        "NumPy": tuple(v.tobytes() if isinstance(v, np.ndarray) else v for v in numpy_state()),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }
