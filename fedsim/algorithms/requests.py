"""What a node may ask of the others. An algorithm awaits a request; the engine answers it."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


if TYPE_CHECKING:
    Rows = torch.Tensor
    Shared = torch.Tensor
else:

    class Rows:
        """Annotation of a state field that holds one row per node: `[rows, ...]`."""

    class Shared:
        """Annotation of a state field that is equal on every node: `[1, ...]` (or a number)."""


class Packet(Protocol):
    """A compressed value: `dense` is what sender and receivers compute with, `body` what travels."""

    @property
    def dense(self) -> torch.Tensor: ...

    def lengths(self) -> NDArray[np.int64]:
        """Return the encoded length of each row in bytes, int64 `[rows]`."""
        ...

    def encode(self, row: int) -> bytes:
        """Return the encoded body of one row; its length is what is charged."""
        ...

    def decode(self, body: bytes) -> NDArray[Any]:
        """Return the row `[dim]` behind a body of the same compressor: the very bits of the sender's `dense`."""
        ...


@dataclass(frozen=True, eq=False)
class Request:
    """Base of all requests: awaiting one hands it to the engine and returns the answer."""

    def __await__(self) -> Generator[Request, Any, Any]:
        return (yield self)


@dataclass(frozen=True, eq=False)
class Mix(Request):
    """`sum_j w_ij v_j` over neighbours and i itself: `[rows, dim]`, read-only.

    `v`: rows `[rows, dim]`, or a `Packet`. `matrix`: `"W"` (the scenario's mixing matrix) or `"laplacian"`
    (degree times own value minus the neighbours', unweighted).
    `copies`: with a packet, public copies `[rows, dim]`, which the sender has moved by `packet.dense` and every
    receiver moves by it, too. They are mixed in its stead, while the packet alone travels; `name` tells those of one
    algorithm apart. What copies start from must be known to all.
    """

    v: torch.Tensor | Packet
    matrix: str = "W"
    copies: torch.Tensor | None = None
    name: str = ""


@dataclass(frozen=True, eq=False)
class Gather(Request):
    """All neighbours' values, ragged, neighbours in ascending position: `Gathered(values, offsets)`."""

    v: torch.Tensor | Packet


@dataclass(frozen=True)
class Gathered:
    """Answer to `Gather`: row r's neighbours are `values[offsets[r]:offsets[r + 1]]`, node numbers in `nodes`."""

    values: torch.Tensor
    offsets: NDArray[np.int64]
    nodes: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Sum(Request):
    """`sum_i weight_i v_i` over nodes in the fixed tree: `[1, dim]`, dtype kept, the same on every node.

    `weight`: None, or one number per row `[rows]` (whole numbers where v holds integers); a one-hot weight is a
    broadcast.
    `rows`: None, or a boolean mask `[n]` by node number, from a shared draw (partial participation): nodes
    outside it send nothing and are not charged.
    """

    v: torch.Tensor | Packet
    weight: torch.Tensor | None = None
    rows: NDArray[np.bool_] | None = None


@dataclass(frozen=True, eq=False)
class Mean(Request):
    """`Sum` divided by the number of (participating) nodes, or by the sum of the weights where given.

    The mean of integers is float64.
    """

    v: torch.Tensor | Packet
    weight: torch.Tensor | None = None
    rows: NDArray[np.bool_] | None = None


@dataclass(frozen=True, eq=False)
class Route(Request):
    """All-to-all: `v [items, dim]` sent to node numbers `to [items]` from source rows `source [items]`.

    Items arrive ordered by (destination, source, position in the source's list): `Routed`.
    """

    v: torch.Tensor
    to: NDArray[np.int64]
    source: NDArray[np.int64]


@dataclass(frozen=True)
class Routed:
    """Answer to `Route`: `values [items, dim]` ordered by destination row, source node, position;
    row r holds `values[offsets[r]:offsets[r + 1]]`, sent by node numbers `source`."""

    values: torch.Tensor
    offsets: NDArray[np.int64]
    source: NDArray[np.int64]
