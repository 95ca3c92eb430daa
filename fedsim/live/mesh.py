"""TCP connections between the ranks that share edges: made once, opened by a token, fixed frames, no pickles.

Within a host long messages lie in memory that both ends see; the connection then carries their heads.
"""

from __future__ import annotations

import contextlib
import secrets
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import RunError
from fedsim.live.shared import Slots, share
from fedsim.transport.transport import Transport
from fedsim.watch import addresses, connect, exactly, near, places

HELLO = struct.Struct("<32si")
FRAME = struct.Struct("<c3xiqq")  # kind, edge, number of the offer, depth; the numbers behind it lie aligned
OFFER, ANSWER, QUIET = b"o", b"a", b"q"
REACH = 20.0  # seconds in which all connections must stand
BUFFER = 1 << 19  # bytes of a connection within a host: what a cache keeps; Linux would let it grow far beyond


class Frame(NamedTuple):
    """One message between nodes: `m [dim]`, nothing where a rank says that it is quiet."""

    kind: bytes
    edge: int
    number: int
    depth: int
    m: NDArray


class Mesh:
    """This rank's connections.

    Args:
        peers: the ranks that share an edge with this one. dim, dtype: of a message.
    """

    def __init__(self, transport: Transport, peers: list[int], dim: int, dtype: np.dtype) -> None:
        self._rank, self._dim, self._dtype = transport.rank, dim, dtype
        self._size = FRAME.size + dim * dtype.itemsize
        self.slots: Slots = {}
        self._connections = self._connect(transport, peers)
        few = all(connection.fileno() < 1024 for connection in self._connections.values())  # what select can name
        # epoll waits whole milliseconds: an exchange that is due before would come late
        self._selector = selectors.SelectSelector() if few else selectors.DefaultSelector()
        self._inbox = {rank: (np.empty(self._size, np.uint8), 0) for rank in self._connections}
        self._ready: deque[tuple[int, Frame]] = deque()
        for rank, connection in self._connections.items():
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if near(connection):
                for which in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                    connection.setsockopt(socket.SOL_SOCKET, which, BUFFER)
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ, rank)

    @property
    def peers(self) -> list[int]:
        """The ranks at the other ends."""
        return list(self._connections)

    def share(self, transport: Transport, edges: dict[int, list[int]]) -> None:
        """Let messages lie in memory that both ends see, where that can be had; all ranks call this.

        Args:
            edges: by peer, the edges to it, ascending.
        """
        here = {rank: edges[rank] for rank, connection in self._connections.items() if near(connection)}
        self.slots = share(transport, here, self._dim, self._dtype)

    def send(self, rank: int, frame: Frame) -> None:
        """Send a frame. While the peer takes no more, take what comes: it may be sending to us.

        Raises:
            RunError: the peer is gone; or as `arrived`.
        """
        head = FRAME.pack(frame.kind, frame.edge, frame.number, frame.depth)
        left = [memoryview(head)] if self._bare(frame.kind, frame.edge) else [memoryview(head), frame.m.data.cast("B")]
        connection, size = self._connections[rank], sum(map(len, left))
        while size:
            try:
                begun = connection.sendmsg(left)
            except BlockingIOError:
                self._wait_for(rank)
                continue
            except OSError as error:
                raise RunError(f"rank {rank} cannot be reached any more: {error}") from error
            size -= begun
            while left and begun >= len(left[0]):
                begun -= len(left.pop(0))
            if left:
                left[0] = left[0][begun:]

    def _wait_for(self, rank: int) -> None:
        """Block until a peer takes more, receiving meanwhile; one that never does, the job's watch finds."""
        connection, both = self._connections[rank], selectors.EVENT_READ | selectors.EVENT_WRITE
        self._selector.modify(connection, both, rank)
        ready: list[tuple[selectors.SelectorKey, int]] = []
        try:
            while not any(events & selectors.EVENT_WRITE for _, events in ready):
                ready = self._selector.select()
                for key, events in ready:
                    if events & selectors.EVENT_READ:
                        self._receive(key.data)
        finally:
            self._selector.modify(connection, selectors.EVENT_READ, rank)

    def arrived(self, wait: float) -> Iterator[tuple[int, Frame]]:
        """Block for at most `wait` seconds, then yield (rank, frame) of what has come.

        Raises:
            RunError: a connection is closed, or what came is no frame.
        """
        for key, _ in self._selector.select(0.0 if self._ready else max(wait, 0.0)):
            self._receive(key.data)
        while self._ready:
            yield self._ready.popleft()

    def _receive(self, rank: int) -> None:
        """Take what a rank has sent, as far as it has come."""
        buffer, filled = self._inbox[rank]
        try:
            more = self._connections[rank].recv_into(buffer[filled:].data)
        except OSError as error:
            raise RunError(f"rank {rank} cannot be reached any more: {error}") from error
        if not more:
            raise RunError(f"rank {rank} is gone in the middle of a live run")
        self._inbox[rank] = buffer, filled + more
        self._ready.extend((rank, frame) for frame in self._frames(rank))

    def _frames(self, rank: int) -> Iterator[Frame]:
        """Take whole frames out of what a rank has sent: its numbers stay where they were received."""
        buffer, filled = self._inbox[rank]
        while filled >= FRAME.size:
            kind, edge, number, depth = FRAME.unpack_from(buffer.data)
            if kind not in (OFFER, ANSWER, QUIET):
                raise RunError(f"rank {rank} sent something that is no message of a live run")
            size = FRAME.size if self._bare(kind, edge) else self._size
            if filled < size:
                return
            rest = np.empty(self._size, np.uint8)
            rest[: filled - size] = buffer[size:filled]
            self._inbox[rank] = rest, filled - size
            m = self.slots[edge][1] if edge in self.slots else buffer[FRAME.size : size].view(self._dtype)
            yield Frame(kind, edge, number, depth, m)
            buffer, filled = self._inbox[rank]

    def _bare(self, kind: bytes, edge: int) -> bool:
        """Whether only the head of a message goes over the connection."""
        return kind == QUIET or edge in self.slots

    def close(self) -> None:
        """Close all connections."""
        for connection in self._connections.values():
            connection.close()
        self._selector.close()

    def _connect(self, transport: Transport, peers: list[int]) -> dict[int, socket.socket]:
        """Every rank listens; of each pair the higher one calls. Addresses and token travel through the launcher."""
        token = transport.broadcast(np.frombuffer(secrets.token_bytes(32), np.uint8) if self._rank == 0 else None)
        host = socket.gethostname()
        with socket.create_server(("", 0), backlog=max(1, transport.size)) as server:
            port = server.getsockname()[1]
            note = b"\n".join([str(port).encode(), host.encode(), *addresses(host)])
            notes = [part.tobytes() for part in transport.all_gather(np.frombuffer(note, np.uint8))]
            found = {rank: self._call(rank, notes[rank], token.tobytes()) for rank in peers if rank < self._rank}
            found |= self._answer(server, {rank for rank in peers if rank > self._rank}, token.tobytes())
        return found

    def _call(self, rank: int, note: bytes, token: bytes) -> socket.socket:
        port, host, *others = note.split(b"\n")
        tries = places(host.decode(), others)
        for place in tries:
            connection = connect(place, int(port))
            if connection is not None:
                connection.sendall(HELLO.pack(token, self._rank))
                return connection
        raise RunError(f"rank {self._rank} cannot reach rank {rank} by TCP at {', '.join(tries)}, port {int(port)}")

    def _answer(self, server: socket.socket, missing: set[int], token: bytes) -> dict[int, socket.socket]:
        found, end = {}, time.monotonic() + REACH
        while missing:
            server.settimeout(max(0.01, end - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                raise RunError(f"rank {self._rank} was not called by rank {min(missing)} in {REACH:g} s") from None
            with contextlib.suppress(OSError):
                connection.settimeout(2.0)
                given, rank = HELLO.unpack(exactly(connection, HELLO.size))
                if secrets.compare_digest(given, token) and rank in missing:
                    found[rank] = connection
                    missing.discard(rank)
                    continue
            connection.close()  # a stranger: no token, or no rank of this job
        return found
