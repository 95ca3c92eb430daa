"""An asynchronous algorithm as a table of coefficients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import InputError

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Dynamics:
    """What a node's state `v [k, dim]` does between events and at events.

    Attributes:
        variables: the names of the k variables.
        flow: `[k, k]`, `dv/dt = flow v`; the unit of time is one gradient per node.
        point: `[k]`, the gradient is taken at `point . v`.
        residual: `[k]`, `e = grad f_i(point . v) + residual . v`.
        gradient_jump: `[k]`, at a gradient event `v += gradient_jump (x) e`.
        message: `[k]`, `m = message . v`, all that is sent.
        gossip_jump: `[k]`, at a gossip event `v_i += gossip_jump (x) (m_i - m_j)`, and j with the roles swapped.
        start: `[k, 3]`, `v = start . (x0, grad f_i(x0), (1/n) sum_j grad f_j(x0))`.
        output: `[k]`, the node's answer is `output . v`.
        gradient_map: `[k, k]` or None: `v <- gradient_map v` before the gradient jump is added (momentum).
        decay: a gradient event's jump is multiplied by `(1 + count / decay[0]) ** -decay[1]`, with `count` the
            node's gradients so far; None: constant.
        dual: True: the gradient inside message and output is the dual oracle `grad f_i^*(point . v)` (Continuized):
            then `message` is 0, `m = grad f_i^*(point . v)`, and the answer is `grad f_i^*(output . v)`.
        edge_jump: `[k]` or None. edge_scale: `[m]` per edge, or None, as that is;
            `edge_scale[e] * edge_jump (x) (m_i - m_j)` is added to the jump.
        node_clocks: False: nodes have no gradient clocks of their own (Continuized).

    Raises:
        InputError: an array of another shape, or columns that do not go together.
    """

    variables: tuple[str, ...]
    flow: Matrix
    point: Vector
    residual: Vector
    gradient_jump: Vector
    message: Vector
    gossip_jump: Vector
    start: Matrix
    output: Vector
    gradient_map: Matrix | None = None
    decay: tuple[float, float] | None = None
    dual: bool = False
    edge_jump: Vector | None = None
    edge_scale: Vector | None = None
    node_clocks: bool = True

    def __post_init__(self) -> None:
        k = self.k
        for name, shape in {
            "flow": (k, k), "point": (k,), "residual": (k,), "gradient_jump": (k,), "message": (k,),
            "gossip_jump": (k,), "start": (k, 3), "output": (k,), "gradient_map": (k, k), "edge_jump": (k,),
            "edge_scale": (0 if self.edge_scale is None else np.size(self.edge_scale),),
        }.items():  # fmt: skip
            given = getattr(self, name)
            if given is None:
                continue
            array = np.ascontiguousarray(given, dtype=np.float64)
            if array.shape != shape:
                raise InputError(f"Dynamics.{name}: shape {array.shape} given, {shape} needed for {k} variables")
            if not np.isfinite(array).all():
                raise InputError(f"Dynamics.{name}: not finite: {array}")
            object.__setattr__(self, name, array)
        self._refuse_misfits()

    def _refuse_misfits(self) -> None:
        if (self.edge_jump is None) != (self.edge_scale is None):
            raise InputError("Dynamics: edge_jump and edge_scale go together; give both, or neither")
        if self.dual and self.message.any():
            raise InputError("Dynamics.message: with dual the message is the dual gradient; give zeros")
        if self.decay is not None and not (self.decay[0] > 0 and np.isfinite(self.decay).all()):
            raise InputError(f"Dynamics.decay: {self.decay} given; (after, power) with after > 0 needed")

    @property
    def k(self) -> int:
        """Number of variables per node."""
        return len(self.variables)
