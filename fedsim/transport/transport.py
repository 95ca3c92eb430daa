"""What moves bytes between processes: no arithmetic, no nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fedsim.transport.links import Links

Bytes = NDArray[np.uint8]


class Transport(Protocol):
    """Processes numbered 0..size-1 that exchange byte buffers.

    Attributes:
        kind: `local`, `mpi` or `torch`. rank, size: which of how many processes.
        moved: bytes that this process has sent so far.
        calls: how often it has exchanged anything. waiting: whether it waits for others at this moment.
        asks: the number and the words of the request that it is at.
    """

    kind: str
    rank: int
    size: int
    moved: int
    calls: int
    waiting: bool
    asks: tuple[int, str]

    def start(self, sends: dict[int, Bytes], receives: dict[int, Bytes]) -> Callable[[], None]:
        """Begin to send a buffer to each peer in `sends` and to fill those in `receives`; receives are posted first.

        Both ends know the length: a buffer of another length than the peer's is a mistake of the caller.

        Returns:
            What waits for all of them. Until it was called, sent buffers are not changed and received ones not read.
        """
        ...

    def exchange(self, sends: dict[int, Bytes], receives: dict[int, Bytes]) -> None:
        """Send and receive as `start` does, to the end."""
        self.start(sends, receives)()

    def all_gather(self, mine: Bytes) -> list[Bytes]:
        """Return every process's buffer, in rank order; lengths may differ."""
        ...

    def all_to_all(self, sends: Bytes, lengths: list[int], expected: list[int]) -> Bytes:
        """Send every rank its part of `sends` (parts of `lengths` bytes, by rank); return what arrived, by rank.

        Both ends know the lengths: `expected[r]` bytes come from rank r.
        """
        ...

    def broadcast(self, buffer: Bytes | None, root: int = 0) -> Bytes:
        """Return root's buffer on every process."""
        ...

    def links(self, device: str, alone: bool) -> Links:
        """Return what moves rows on accelerators, which all processes ask for together.

        Args:
            device: this process's. alone: whether every process has one of its own.
        """
        from fedsim.transport.links import ThroughHost

        return ThroughHost(self)

    def abort(self, message: str) -> None:
        """End the whole job with a message; does not return where there are other processes."""
        ...

    def leaves_with_all(self, seconds: float) -> bool:
        """Return whether all processes call this within so many seconds; true where the launcher ends the others."""
        ...

    def close(self) -> None:
        """Wait for all processes, then let go of the connections."""
        ...


def as_bytes(array: NDArray) -> Bytes:
    """Return a contiguous array's memory as bytes, without a copy."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
