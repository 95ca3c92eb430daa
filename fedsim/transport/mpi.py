"""Processes started by mpirun, mpiexec or srun: buffers over MPI, never pickles."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from fedsim.errors import InputError
from fedsim.transport.transport import Bytes, Transport

NAP = 20e-6  # seconds between looks while waiting: a spinning wait would take the core that the peer needs
EAGER = 200  # looks without a nap before the first one
PIECE = 1 << 30  # bytes that one call of MPI is given at most: it counts, and finds places, in 32 bits
PR_SET_TIMERSLACK, SLACK = 29, 1000  # of Linux's prctl; nanoseconds


def _wake_promptly() -> None:
    """Have naps end when they should: by default Linux adds up to 50 microseconds to each."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, SLACK, 0, 0, 0)


def _pieces(buffer: Bytes) -> list[Bytes]:
    """Return a buffer in pieces that MPI can count; one of nothing where there is nothing."""
    return [buffer[begin : begin + PIECE] for begin in range(0, max(1, len(buffer)), PIECE)]


def _parts(buffer: Bytes, lengths: list[int]) -> list[Bytes]:
    """Return the parts of a buffer, by rank."""
    return [buffer[a:b] for a, b in pairwise([0, *accumulate(lengths)])]


class MpiTransport(Transport):
    """A duplicate of COMM_WORLD, so that no message of the user's own MPI code meets ours."""

    kind = "mpi"

    def __init__(self) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise InputError(
                f"this process was started by an MPI launcher, and mpi4py cannot be loaded ({error}): pip install"
                " 'fedsim[mpi]'; `fedsim doctor` says what is there"
            ) from error
        self._mpi: Any = MPI
        self._comm = MPI.COMM_WORLD.Dup()
        self.rank, self.size, self.moved = self._comm.Get_rank(), self._comm.Get_size(), 0
        self.calls, self.waiting, self.asks = 0, False, (0, "")
        _wake_promptly()
        self._leaving = self._comm.Dup()  # nothing else travels on it, so that a mistake finds it clear

    def start(self, sends: dict[int, Bytes], receives: dict[int, Bytes]) -> Callable[[], None]:
        """Post all receives, then all sends."""
        requests = [self._comm.Irecv(piece, source=peer) for peer, b in receives.items() for piece in _pieces(b)]
        for peer, buffer in sends.items():
            requests += [self._comm.Isend(piece, dest=peer) for piece in _pieces(buffer)]
            self.moved += buffer.nbytes
        return lambda: self._wait(requests)

    def all_gather(self, mine: Bytes) -> list[Bytes]:
        """Exchange lengths, then everybody's buffer."""
        lengths = np.zeros(self.size, np.int64)
        self._wait([self._comm.Iallgather(np.array([mine.nbytes], np.int64), lengths)])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        everything = np.empty(int(offsets[-1]), np.uint8)
        found = [everything[a:b] for a, b in pairwise(offsets.tolist())]
        if len(everything) > PIECE:
            others = [rank for rank in range(self.size) if rank != self.rank]
            self.exchange(dict.fromkeys(others, mine), {rank: found[rank] for rank in others})
            found[self.rank][:] = mine
            return found
        parts = [everything, lengths.tolist(), offsets[:-1].tolist(), self._mpi.BYTE]
        self._wait([self._comm.Iallgatherv([mine, self._mpi.BYTE], parts)])
        self.moved += mine.nbytes * (self.size - 1)
        return found

    def all_to_all(self, sends: Bytes, lengths: list[int], expected: list[int]) -> Bytes:
        """Send all parts and receive all parts in one collective; large parts, as both ends see them, travel alone."""
        if max(*lengths, *expected) > PIECE // self.size:
            return self._with_large_parts(sends, lengths, expected)
        arrived, byte = np.empty(sum(expected), np.uint8), self._mpi.BYTE
        mine = [sends, lengths, np.cumsum([0, *lengths[:-1]]).tolist(), byte]
        theirs = [arrived, expected, np.cumsum([0, *expected[:-1]]).tolist(), byte]
        self._wait([self._comm.Ialltoallv(mine, theirs)])
        self.moved += sum(lengths) - lengths[self.rank]
        return arrived

    def _with_large_parts(self, sends: Bytes, lengths: list[int], expected: list[int]) -> Bytes:
        arrived = np.empty(sum(expected), np.uint8)
        away, here = _parts(sends, lengths), _parts(arrived, expected)
        here[self.rank][:] = away[self.rank]
        (large, out), (filled, into) = self._apart(away), self._apart(here)
        self.exchange(large, filled)
        small = [len(part) for part in into]
        together = self.all_to_all(np.concatenate(out), [len(part) for part in out], small)
        for part, came in zip(into, _parts(together, small), strict=True):
            part[:] = came
        return arrived

    def _apart(self, parts: list[Bytes]) -> tuple[dict[int, Bytes], list[Bytes]]:
        """Return the parts that travel alone, and the others, with nothing in place of those and of one's own."""
        alone = {r: part for r, part in enumerate(parts) if len(part) > PIECE // self.size and r != self.rank}
        return alone, [part[:0] if r in alone or r == self.rank else part for r, part in enumerate(parts)]

    def broadcast(self, buffer: Bytes | None, root: int = 0) -> Bytes:
        """Send the length, then the buffer."""
        length = np.array([0 if buffer is None else buffer.nbytes], np.int64)
        self._wait([self._comm.Ibcast(length, root=root)])
        data = buffer if self.rank == root and buffer is not None else np.empty(int(length[0]), np.uint8)
        for piece in _pieces(data):
            self._wait([self._comm.Ibcast([piece, self._mpi.BYTE], root=root)])
        return data

    def abort(self, message: str) -> None:
        """Print the message once here and end all processes of the job."""
        print(message, file=sys.stderr, flush=True)
        self._comm.Abort(1)

    def leaves_with_all(self, seconds: float) -> bool:
        """Wait for the others, but not for ever: they may not have met the same mistake."""
        request, end = self._leaving.Ibarrier(), time.monotonic() + seconds
        while not request.Test():
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    def close(self) -> None:
        """Wait for all processes and free the communicator."""
        self._wait([self._comm.Ibarrier()])
        self._comm.Free()

    def _wait(self, requests: list[Any]) -> None:
        """Wait without holding the core: some looks in a row, then naps."""
        looks, self.waiting = 0, True
        while not self._mpi.Request.Testall(requests):
            looks += 1
            if looks > EAGER:
                time.sleep(NAP)
        self.calls, self.waiting = self.calls + 1, False
