"""Long messages between ranks that see the same memory: they lie in it, and connections carry only their heads.

Every edge between two such ranks has two places, one for what each of its ends tells. An end tells the next thing over
an edge only after the other has taken the last one: an offer is answered first, and an answer comes before the next
offer. So no place needs a lock.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsim.transport.transport import Transport

Slots = dict[int, tuple[NDArray, NDArray]]
FOLDER = Path("/dev/shm")  # of Linux: files that are memory
SHORT = 1 << 14  # bytes of a message up to which a connection is as good
ROOM = 1 << 28  # bytes that two ranks share at most
LINE = 64  # bytes of a line of memory: no two places share one
MARK = 32  # random bytes by which a file is known again: ranks in containers may not have the same folder


def share(transport: Transport, edges: dict[int, list[int]], dim: int, dtype: np.dtype) -> Slots:
    """Return, by edge, where this rank's messages `[dim]` are written and where the other's are read; all call this.

    Edges are left out, and their messages go over connections, where messages are short, too many, or memory that both
    ends see cannot be had.

    Args:
        edges: by rank on this host, the edges to it, ascending.
    """
    width = -(-dim * dtype.itemsize // LINE) * LINE
    sizes = {rank: LINE + 2 * width * len(own) for rank, own in edges.items()}
    wanted = {rank for rank in edges if dim * dtype.itemsize > SHORT and sizes[rank] <= ROOM}
    made, files = {}, {}
    try:
        for rank in sorted(wanted):
            if rank > transport.rank:
                with contextlib.suppress(OSError):
                    files[rank], made[rank] = _make(sizes[rank])
        note = [f"{rank} {files[rank]} {made[rank][:MARK].hex()}" for rank in made]
        notes = [part.tobytes().decode() for part in transport.all_gather(_text(note))]
        for rank in sorted(wanted):
            for line in notes[rank].splitlines() if rank < transport.rank else []:
                peer, file, mark = line.split(" ")
                with contextlib.suppress(OSError, ValueError):
                    if int(peer) == transport.rank:
                        made[rank] = _take(file, sizes[rank], mark)
        found = transport.all_gather(_text([str(rank) for rank in made]))
    finally:
        for file in files.values():
            file.unlink()  # who has it keeps it
    agreed = [rank for rank in made if str(transport.rank) in found[rank].tobytes().decode().split()]
    slots: Slots = {}
    for rank in agreed:
        places = [np.frombuffer(made[rank], dtype, dim, LINE + width * place) for place in range(2 * len(edges[rank]))]
        mine = int(rank < transport.rank)
        slots |= {e: (places[2 * k + mine], places[2 * k + 1 - mine]) for k, e in enumerate(edges[rank])}
    return slots


def _text(lines: list[str]) -> NDArray[np.uint8]:
    return np.frombuffer("\n".join([*lines, ""]).encode(), np.uint8)


def _make(size: int) -> tuple[Path, mmap.mmap]:
    """Make a file of so many bytes that are there, not only promised: a full folder is found out now."""
    number, name = tempfile.mkstemp(prefix="fedsim-", dir=FOLDER)
    try:
        os.posix_fallocate(number, 0, size)
        shared = mmap.mmap(number, size)
    except BaseException:
        os.unlink(name)
        raise
    finally:
        os.close(number)
    shared[:MARK] = secrets.token_bytes(MARK)
    return Path(name), shared


def _take(file: str, size: int, mark: str) -> mmap.mmap:
    """Open another rank's file; raises OSError or ValueError where it is not that one."""
    number = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
    try:
        shared = mmap.mmap(number, size)
    finally:
        os.close(number)
    if shared[:MARK].hex() != mark:
        raise ValueError(f"{file} is not the file of the other rank")
    return shared
