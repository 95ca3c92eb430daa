"""Watches a job of several processes, so that none waits for ever for one that is gone, stopped or stuck.

Every rank holds one TCP connection to rank 0, open from the start of the job, on which one thread that blocks sends a
sign of life with the rank's progress. Rank 0 ends the job, by name, when a connection closes, stays silent, or shows a
rank that neither waits nor moves. Launchers do part of this, each another part.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from fedsim.transport.transport import as_bytes

if TYPE_CHECKING:
    from fedsim.transport.transport import Transport

HELLO = struct.Struct("<32sii64s")  # token, rank, process, host
SIGN = struct.Struct("<cq?i")  # kind, progress, whether it waits for others, length of the text that follows
ALIVE, FAILED, BYE = b"a", b"f", b"b"
MOST = 4096  # bytes of a failure's text
REACH = 10.0  # seconds in which a rank must have connected


class Watch:
    """One rank's end of the watch.

    Args:
        transport: of a job of at least two processes; all of them make their watch together.
        timeout: seconds without a sign after which a rank is given up.

    Attributes:
        on_failure: on rank 0, what to do (write the result, say) before the job is ended, given the message.
        playing: whether lack of progress counts; compiling or solving may take long.
    """

    def __init__(self, transport: Transport, timeout: float) -> None:
        self._transport, self._timeout, self._host = transport, timeout, socket.gethostname()
        self._every, self._parent = min(1.0, timeout / 4), os.getppid()
        self.on_failure: Callable[[str], None] = lambda message: None
        self.playing, self._done, self._lock = False, False, threading.Lock()
        self._calls, self._stirred = 0, time.monotonic()  # rank 0: its calls, and when any rank last was not waiting
        self._peers = self._listen() if transport.rank == 0 else self._join()
        self._thread = threading.Thread(target=self._watch, name="fedsim watch", daemon=True)
        self._thread.start()

    def begin(self, timeout: float, on_failure: Callable[[str], None]) -> None:
        """From here on, lack of progress counts, by this timeout."""
        now = time.monotonic()
        for peer in list(self._peers.values()):
            peer.moved = now
        self._timeout, self._every, self.on_failure, self.playing = timeout, min(1.0, timeout / 4), on_failure, True

    def fail(self, message: str) -> None:
        """Let rank 0 end the job with this message; returns where it cannot be told (soon, anyway)."""
        if self._transport.rank == 0:
            self._end_job(message, None)
        for peer in list(self._peers.values()):
            with contextlib.suppress(OSError):
                self._send(peer.connection, FAILED, message.encode()[:MOST])
                time.sleep(5.0)  # rank 0 ends us

    def close(self) -> None:
        """Say goodbye: from here on, nobody is missed. The thread ends here, not while Python takes itself apart."""
        self._done = True
        for peer in list(self._peers.values()):
            with contextlib.suppress(OSError):
                self._send(peer.connection, BYE)
                peer.connection.shutdown(socket.SHUT_RD)  # wakes the thread
        self._thread.join(5.0)

    def _listen(self) -> dict[int, _Peer]:
        token = secrets.token_bytes(32)
        with socket.create_server(("", 0), backlog=self._transport.size) as server:
            server.settimeout(REACH)
            port = server.getsockname()[1]
            note = b"\n".join([token.hex().encode(), str(port).encode(), self._host.encode(), *addresses(self._host)])
            self._transport.broadcast(np.frombuffer(note, np.uint8))
            peers: dict[int, _Peer] = {}
            end = time.monotonic() + REACH
            while len(peers) < self._transport.size - 1 and time.monotonic() < end:
                with contextlib.suppress(OSError, struct.error):
                    connection, _ = server.accept()
                    connection.settimeout(2.0)
                    given, rank, process, host = HELLO.unpack(exactly(connection, HELLO.size))
                    if not secrets.compare_digest(given, token) or not 0 < rank < self._transport.size:
                        connection.close()
                        continue
                    peers[rank] = _Peer(rank, connection, process, host.rstrip(b"\0").decode())
        self._agree(sorted(peers))
        return peers

    def _join(self) -> dict[int, _Peer]:
        note = self._transport.broadcast(None).tobytes().split(b"\n")
        token, port, host = bytes.fromhex(note[0].decode()), int(note[1]), note[2].decode()
        connection = next((c for place in places(host, note[3:]) if (c := connect(place, port))), None)
        if connection is not None:
            hello = HELLO.pack(token, self._transport.rank, os.getpid(), self._host.encode()[:64])
            connection.sendall(hello)
        self._agree([])
        return {} if connection is None else {0: _Peer(0, connection, -1, host)}

    def _agree(self, found: list[int]) -> None:
        """Wait until rank 0 has everybody it can have; say once whom it has not."""
        reached = self._transport.broadcast(as_bytes(np.array(found, np.int64)) if self._transport.rank == 0 else None)
        missing = sorted(set(range(1, self._transport.size)) - set(reached.view(np.int64).tolist()))
        if missing and self._transport.rank == 0:
            names = ", ".join(map(str, missing))
            print(f"fedsim: rank 0 cannot be reached by TCP from rank {names}: not watched", file=sys.stderr)

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        for peer in self._peers.values():
            peer.connection.setblocking(True)
            peer.connection.settimeout(2.0)
            selector.register(peer.connection, selectors.EVENT_READ, peer)
        next_sign = 0.0
        while self._peers and not self._done:
            if time.monotonic() >= next_sign:
                next_sign = time.monotonic() + self._every
                for peer in list(self._peers.values()):
                    with contextlib.suppress(OSError):
                        self._send(peer.connection, ALIVE, _words(self._transport.asks))
            for key, _ in selector.select(self._every / 2):
                peer = key.data
                if not self._read(peer) or peer.said_bye:
                    selector.unregister(peer.connection)
                    del self._peers[peer.rank]
            for peer in list(self._peers.values()):
                self._judge(peer)
            if self._transport.rank == 0:
                self._judge_all()
            if self._transport.kind == "torch" and os.getppid() != self._parent and not self._done:
                self.fail(f"the launcher of rank {self._transport.rank} is gone (killed)")  # torchrun takes none along

    def _read(self, peer: _Peer) -> bool:
        """Take one sign; return whether the connection lives on."""
        try:
            kind, progress, waits, length = SIGN.unpack(exactly(peer.connection, SIGN.size))
            text = exactly(peer.connection, length).decode(errors="replace") if 0 < length <= MOST else ""
        except (OSError, struct.error):
            if not self._done:
                time.sleep(self._every / 4)  # a launcher that ends the job itself is given the time
                self._end_job(f"rank {peer.rank} is gone (killed, or its host is)", peer)
            return False
        now = time.monotonic()
        if progress != peer.progress or waits or not self.playing:
            peer.moved = now
        if progress != peer.progress or not waits or not self.playing:
            self._stirred = now
        peer.asks = text if kind == ALIVE else peer.asks
        peer.progress, peer.seen, peer.said_bye = progress, now, kind == BYE
        if kind == FAILED:
            self._end_job(text, None)
        elif kind == ALIVE and waits and self._transport.rank == 0:
            self._compare(peer, text)
        return True

    def _compare(self, peer: _Peer, text: str) -> None:
        """End the job where a rank that waits asks for another thing than rank 0 by the same number."""
        number, asked = self._transport.asks
        theirs, _, what = text.partition(" ")
        if asked and theirs == str(number) and what != asked:
            self._end_job(
                f"ranks disagree on the next request: rank 0 asks for {asked}, rank {peer.rank} for {what} (request"
                f" {number})",
                None,
            )

    def _judge(self, peer: _Peer) -> None:
        now = time.monotonic()
        if now - peer.seen > self._timeout:
            self._end_job(f"rank {peer.rank} has not answered for {self._timeout:g} s (stopped, or its host is)", peer)
        elif self._transport.rank == 0 and self.playing and peer.seen - peer.moved > self._timeout:  # its signs show it
            self._end_job(
                f"rank {peer.rank} has neither moved nor waited for {self._timeout:g} s; if its work takes that long,"
                " raise engine.timeout",
                peer,
            )

    def _judge_all(self) -> None:
        """End a job in which all wait for each other; only ranks that left each other's rounds can come to that."""
        now, calls = time.monotonic(), self._transport.calls
        if calls != self._calls or not self._transport.waiting or not self.playing:
            self._calls, self._stirred = calls, now
        if now - self._stirred > self._timeout:
            asked = [f"rank {p.rank} in request {p.asks}" for p in self._peers.values()]
            own = _words(self._transport.asks).decode()
            self._end_job(f"all ranks wait for each other: rank 0 in request {own}, {', '.join(asked)}", None)

    def _end_job(self, message: str, culprit: _Peer | None) -> None:
        if self._done:
            return
        self._done = True
        full = f"fedsim: {message}"
        if self._transport.rank == 0:
            with contextlib.suppress(Exception):
                self.on_failure(message)
        if culprit is not None and culprit.host == self._host and culprit.near and culprit.process > 0:
            with contextlib.suppress(OSError):
                os.kill(culprit.process, signal.SIGKILL)  # a stopped process hears nothing else
        if self._transport.rank == 0:
            self._transport.abort(full)
        elif culprit is not None:
            print(full, file=sys.stderr, flush=True)
            os._exit(1)

    def _send(self, connection: socket.socket, kind: bytes, text: bytes = b"") -> None:
        with self._lock:
            transport = self._transport
            connection.sendall(SIGN.pack(kind, transport.calls, transport.waiting, len(text)) + text)


class _Peer:
    """The other end of a connection, and when it was last heard of."""

    def __init__(self, rank: int, connection: socket.socket, process: int, host: str) -> None:
        self.rank, self.connection, self.process, self.host = rank, connection, process, host
        self.near = near(connection)
        self.asks = ""
        self.progress, self.seen, self.moved, self.said_bye = -1, time.monotonic(), time.monotonic(), False
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _words(asks: tuple[int, str]) -> bytes:
    return f"{asks[0]} {asks[1]}".encode()[:MOST]


def addresses(host: str) -> list[bytes]:
    """Return this host's IPv4 addresses but loopback, as its name and its routes give them."""
    found: dict[str, None] = {}
    with contextlib.suppress(OSError):
        found |= dict.fromkeys(str(info[4][0]) for info in socket.getaddrinfo(host, None, socket.AF_INET))
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("203.0.113.1", 9))  # a documentation address: nothing is sent, the route is looked up
        found[probe.getsockname()[0]] = None
    return [place.encode() for place in found if not place.startswith("127.")]


def places(host: str, others: list[bytes]) -> list[str]:
    """Return where a rank of a host with these addresses may be reached from here, in the order to try."""
    return ["127.0.0.1" if host == socket.gethostname() else host, *(place.decode() for place in others)]


def near(connection: socket.socket) -> bool:
    """Whether both ends are on one host; its name alone does not show it, which containers may share."""
    return connection.getpeername()[0] == connection.getsockname()[0]


def connect(place: str, port: int) -> socket.socket | None:
    try:
        return socket.create_connection((place, port), timeout=3.0)
    except OSError:
        return None


def exactly(connection: socket.socket, size: int) -> bytes:
    """Return so many bytes; raises ConnectionError where the other end closes before."""
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(size - len(parts))
        if not part:
            raise ConnectionError("closed")
        parts += part
    return bytes(parts)
