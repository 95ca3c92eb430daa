"""What a check says, and the guards that keep every generator but the engine's streams out of it."""

from __future__ import annotations

import inspect
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


@contextmanager
def no_own_generators() -> Iterator[None]:
    """Refuse generators that a class makes itself while it is played: seeded, they do not follow the run's seed.

    A library that is imported meanwhile may make generators of its own, and may keep what it finds here for good.
    """
    makers = [(np.random, "default_rng"), (np.random, "RandomState"), (torch, "Generator"), (random, "Random")]
    before, playing = [getattr(module, name) for module, name in makers], [True]

    def guarded(made: Any, called: str) -> Any:
        def refuse() -> None:
            if playing[0] and not _importing():
                raise AssertionError(
                    f"{called} was called: a generator of one's own follows neither the run's seed nor the node;"
                    " draw from `rng` (or `Streams`)"
                )

        def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
            refuse()
            return made.__new__(cls, *args, **kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            refuse()
            return made(*args, **kwargs)

        return type(made.__name__, (made,), {"__new__": new}) if isinstance(made, type) else call

    try:
        for (module, name), made in zip(makers, before, strict=True):
            setattr(module, name, guarded(made, f"{module.__name__}.{name}"))
        yield
    finally:
        playing[0] = False
        for (module, name), made in zip(makers, before, strict=True):
            setattr(module, name, made)


def _importing() -> bool:
    """Return whether a module is being imported."""
    frame = inspect.currentframe()
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _marks() -> dict[str, Any]:
    numpy_state: Callable[[], Any] = np.random.get_state
    return {
        "Python": random.getstate(),
        "NumPy": tuple(v.tobytes() if isinstance(v, np.ndarray) else v for v in numpy_state()),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }
