"""Functions of tensors on a CUDA device whose kernels are recorded once and then played without being asked for again.

The gradient of a small network is hundreds of kernels of microseconds each, and to ask for them takes longer than to
play them. A CUDA graph plays the same kernels on the same memory, so that the numbers are those of the function.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import torch

CALLS = 3  # with arguments of the same shapes, before they are thought to come again
GRAPHS = 8  # at most; further shapes are played as they come

Function = Callable[..., torch.Tensor]


class Recorded:
    """A function, recorded for the shapes that come again and again; on other devices, and where its kernels cannot be
    recorded (it looks at values as it goes), it is called as it is.

    Args:
        function: of tensors on one device, to a tensor of its own; a function of their values alone.
    """

    _holder: ClassVar[weakref.ref[Recorded] | None] = None  # whose graphs hold memory

    def __init__(self, function: Function) -> None:
        self._function = function
        self._calls: Counter[Any] = Counter()
        self._graphs: dict[Any, Function] = {}
        self._pool: Any = None
        self._refused = False

    def __call__(self, *arguments: torch.Tensor) -> torch.Tensor:
        """Return the function's value."""
        if arguments[0].device.type != "cuda" or self._refused:
            return self._function(*arguments)
        shapes = tuple((tuple(argument.shape), argument.dtype) for argument in arguments)
        if shapes not in self._graphs:
            self._calls[shapes] += 1
            if self._calls[shapes] <= CALLS or len(self._graphs) == GRAPHS:
                return self._function(*arguments)
            self._alone()
            try:
                self._graphs[shapes] = self._record(arguments)
            except RuntimeError:
                self._refused = True
                return self._function(*arguments)
        return self._graphs[shapes](*arguments)

    def _alone(self) -> None:
        """Have another function drop its graphs: a study keeps its problems, and one after another is played."""
        holder = Recorded._holder and Recorded._holder()
        if holder is not None and holder is not self:
            holder._graphs, holder._calls, holder._pool = {}, Counter(), None
        Recorded._holder = weakref.ref(self)

    def _record(self, arguments: tuple[torch.Tensor, ...]) -> Function:
        """Return what plays the kernels on copies of its arguments, in memory that all graphs share."""
        own = [argument.clone() for argument in arguments]
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # others may use the device
            value = self._function(*own)

        def play(*arguments: torch.Tensor) -> torch.Tensor:
            for place, argument in zip(own, arguments, strict=True):
                place.copy_(argument)
            graph.replay()
            return value.clone()

        return play
