"""What several metrics ask about the same points."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Once:
    """Keeps the last answer to each kind of question, for as long as the points stay the same."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, what: str, x: torch.Tensor, answer: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the answer about points x, computed unless it was the last one of its kind."""
        before = self._seen.get(what)
        if before is None or not torch.equal(before[0], x):
            self._seen[what] = x.clone(), answer()
        return self._seen[what][1]
