"""One process."""

from __future__ import annotations

import sys
from collections.abc import Callable

from fedsim.transport.transport import Bytes, Transport


class LocalTransport(Transport):
    """The only process: there is nobody to talk to."""

    kind, rank, size, moved, calls, waiting = "local", 0, 1, 0, 0, False
    asks: tuple[int, str] = (0, "")

    def start(self, sends: dict[int, Bytes], receives: dict[int, Bytes]) -> Callable[[], None]:
        """Do nothing; there are no peers."""
        return lambda: None

    def all_gather(self, mine: Bytes) -> list[Bytes]:
        """Return the one buffer."""
        return [mine]

    def all_to_all(self, sends: Bytes, lengths: list[int], expected: list[int]) -> Bytes:
        """Return the one buffer."""
        return sends

    def broadcast(self, buffer: Bytes | None, root: int = 0) -> Bytes:
        """Return the buffer."""
        assert buffer is not None
        return buffer

    def abort(self, message: str) -> None:
        """Print the message and exit."""
        sys.exit(message)

    def leaves_with_all(self, seconds: float) -> bool:
        """There is nobody to wait for."""
        return True

    def close(self) -> None:
        """Do nothing."""
