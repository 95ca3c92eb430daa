"""Rows of other ranks that this rank's rows meet: who sends what to whom, worked out once."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.engine.addresses import addresses_of, copy_rows
from fedsim.errors import RunError
from fedsim.transport.transport import Bytes, as_bytes

if TYPE_CHECKING:
    from fedsim.algorithms.requests import Packet
    from fedsim.engine.layout import Layout

Ints = NDArray[np.int64]
Csr = tuple[Ints, Ints, NDArray[np.float64]]
HEADER = 3  # int64 words in front of every message: number of the request, what it asks for, bytes that follow


@dataclass(frozen=True)
class Underway:
    """Ghosts' rows on their way.

    Attributes:
        addresses: int64 `[ghosts]`, where each will lie, for as long as this object is there.
        finish: waits until they do. Raises RunError where another rank is at another request; it names the rank, and
            what it asks for by its number.
    """

    addresses: Ints
    finish: Callable[[], None]


@dataclass(frozen=True)
class Messages:
    """The buffers of rows of one width, kept from request to request: what goes out, what comes in.

    Attributes:
        addresses: int64 `[ghosts]`, where each ghost's row lies in what comes in.
    """

    sends: dict[int, Bytes]
    receives: dict[int, Bytes]
    addresses: Ints


class Ghosts:
    """The neighbours' rows that lie on other ranks, in ascending position.

    Every rank sends each of its rows once to each rank that holds a neighbour of it.

    Attributes:
        positions: int64 `[ghosts]`, where they stand. nodes: their node numbers.
        copies: public copies of theirs `[ghosts, dim]`, by name, which their packets move.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout, self._number = layout, 0
        self._question, self._question_code = "", 0
        ends = layout.topology.position[layout.topology.edges]
        inside = (ends >= layout.lo) & (ends < layout.hi)
        cut = ends[inside[:, 0] != inside[:, 1]]
        own_first = (cut[:, 0] >= layout.lo) & (cut[:, 0] < layout.hi)
        own = np.where(own_first, cut[:, 0], cut[:, 1])
        far = np.where(own_first, cut[:, 1], cut[:, 0])
        self.positions: Ints = np.unique(far)
        self.nodes: Ints = layout.topology.order[self.positions]
        owners = layout.owner(self.positions)
        self._places = {int(r): np.flatnonzero(owners == r) for r in np.unique(owners)}  # among the ghosts
        far_owner = layout.owner(far)
        self._to = {r: np.unique(own[far_owner == r]) - layout.lo for r in self._places}
        self.copies: dict[str, NDArray] = {}
        self._messages: dict[int, Messages] = {}  # of the width that was last asked for

    def local(self, csr: Csr) -> Csr:
        """Return this rank's rows of a matrix over positions; columns are own rows, then ghosts, order kept."""
        layout = self._layout
        if layout.size == 1:
            return csr
        offsets, columns, weights = csr
        begin, end = offsets[layout.lo], offsets[layout.hi]
        chosen = columns[begin:end]
        here = (chosen >= layout.lo) & (chosen < layout.hi)
        place = np.where(here, chosen - layout.lo, layout.rows + np.searchsorted(self.positions, chosen))
        return offsets[layout.lo : layout.hi + 1] - begin, place, weights[begin:end]

    def inner(self, csr: Csr) -> slice:
        """Return the longest run of rows that need no ghost, of a matrix that `local` returned."""
        offsets, columns, _ = csr
        rows = len(offsets) - 1
        meets = np.ones(rows + 2, bool)
        meets[1:-1] = np.bincount(np.repeat(np.arange(rows), np.diff(offsets))[columns >= rows], minlength=rows) > 0
        ends = np.flatnonzero(meets)
        longest = int(np.argmax(np.diff(ends)))
        return slice(int(ends[longest]), int(ends[longest + 1]) - 1)

    @property
    def question(self) -> tuple[int, str]:
        """Number and words of the request that is being answered."""
        return self._number, self._question

    def agree(self, question: str) -> None:
        """Remember what is asked for, so that the next messages carry it."""
        self._number += 1
        if question != self._question:
            self._question, self._question_code = question, zlib.crc32(question.encode())

    @property
    def sent(self) -> dict[int, Ints]:
        """Which own rows every peer needs."""
        return self._to

    @property
    def came(self) -> dict[int, slice]:
        """Where among the ghosts those of every peer stand."""
        return {peer: slice(int(place[0]), int(place[-1]) + 1) for peer, place in self._places.items()}

    def compare(self, width: int) -> None:
        """Have ranks agree on a request whose rows of `width` bytes travel by other means.

        Raises:
            RunError: as `Underway.finish`.
        """
        head = self._head(width)
        theirs = {peer: np.empty(HEADER * 8, np.uint8) for peer in self._places}
        self._layout.transport.exchange(dict.fromkeys(self._to, head), theirs)
        for peer, message in theirs.items():
            self._check(peer, message, head)

    def send(self, places: Ints, like: NDArray) -> Underway | None:
        """Send the rows that others need, and say where the ghosts' rows will lie; None with one rank.

        Args:
            places: `[rows]`, the address of each own row; rows are not changed until the answer is in.
            like: one row, for its type and shape.
        """
        if self._layout.size == 1:
            return None
        head = self._head(like.nbytes)
        messages = self._messages.get(like.nbytes)
        if messages is None:
            messages = self._buffers(like.nbytes)
            self._messages = {like.nbytes: messages}
        for peer, message in messages.sends.items():
            message[: HEADER * 8] = head
            copy_rows(places[self._to[peer]], like.nbytes, message.ctypes.data + HEADER * 8)
        wait = self._layout.transport.start(messages.sends, messages.receives)

        def finish() -> None:
            wait()
            for peer, message in messages.receives.items():
                self._check(peer, message[: HEADER * 8], head)

        return Underway(messages.addresses, finish)

    def _buffers(self, width: int) -> Messages:
        sends = {peer: np.empty(HEADER * 8 + len(rows) * width, np.uint8) for peer, rows in self._to.items()}
        receives, addresses = {}, np.empty(len(self.positions), np.int64)
        for peer, place in self._places.items():
            message = receives[peer] = np.empty(HEADER * 8 + len(place) * width, np.uint8)
            addresses[place] = message.ctypes.data + HEADER * 8 + np.arange(len(place)) * width
        return Messages(sends, receives, addresses)

    def _head(self, width: int) -> Bytes:
        """Return what every message of this request begins with, as bytes `[8 * HEADER]`."""
        return as_bytes(np.array([self._number, self._question_code, width], np.int64))

    def send_packed(
        self, packets: Sequence[Packet], blocks: Sequence[slice], onto: NDArray | None = None, name: str = ""
    ) -> Underway | None:
        """Send the bodies of the rows that others need; the ghosts' rows are decoded where they will lie.

        Args:
            onto: rows `[ghosts, dim]` that they are added to; the sums are then the ghosts' copies of this name.

        Raises:
            RunError: as `Underway.finish`.
        """
        if self._layout.size == 1:
            return None
        bodies = {r: [_body(packets, blocks, int(row)) for row in rows] for r, rows in self._to.items()}
        head = self._head(-1)
        sizes = {r: np.array([*head.view(np.int64), *map(len, parts)], np.int64) for r, parts in bodies.items()}
        theirs = {r: np.empty(8 * (HEADER + len(place)), np.uint8) for r, place in self._places.items()}
        self._layout.transport.exchange({r: as_bytes(size) for r, size in sizes.items()}, theirs)
        lengths = {r: message.view(np.int64)[HEADER:] for r, message in theirs.items()}
        for peer, message in theirs.items():
            self._check(peer, message[: HEADER * 8], head)
        sends = {r: np.frombuffer(b"".join(parts), np.uint8) for r, parts in bodies.items()}
        receives = {r: np.empty(int(length.sum()), np.uint8) for r, length in lengths.items()}
        wait = self._layout.transport.start(sends, receives)
        dense = packets[0].dense
        far = torch.empty(len(self.positions), *dense.shape[1:], dtype=dense.dtype).numpy()

        def finish() -> None:
            wait()
            for peer, body in receives.items():
                ends = np.cumsum(lengths[peer])
                for place, end, length in zip(self._places[peer], ends, lengths[peer], strict=True):
                    far[place] = packets[0].decode(body[end - length : end].tobytes())
            if onto is not None:
                np.add(onto, far, out=far)
                self.copies[name] = far

        return Underway(addresses_of(far), finish)

    def send_copies(
        self, name: str, places: Ints, like: NDArray, packets: Sequence[Packet], blocks: Sequence[slice]
    ) -> Underway | None:
        """Send packets, and say where the ghosts' public copies, moved by theirs, will lie; None with one rank.

        Copies that this rank does not hold (at first, and after a checkpoint) come whole: all know where they start.

        Args:
            places, like: of the own copies, as in `send`.

        Raises:
            RunError: as `Underway.finish`.
        """
        before = self.copies.get(name)
        if before is not None:
            return self.send_packed(packets, blocks, before, name)
        came = self.send(places, like)
        if came is None:
            return None
        whole = np.empty((len(self.positions), *like.shape), like.dtype)

        def finish() -> None:
            came.finish()
            copy_rows(came.addresses, like.nbytes, whole.ctypes.data)
            self.copies[name] = whole

        return Underway(addresses_of(whole), finish)

    def _check(self, peer: int, theirs: Bytes, mine: Bytes) -> None:
        if theirs.tobytes() == mine.tobytes():
            return
        (number, _, width), (other, _, far_width) = mine.view(np.int64), theirs.view(np.int64)
        raise RunError(
            f"ranks disagree on the next request: rank {self._layout.rank} asks for {self._question} (request"
            f" {number}, {width} bytes a row), rank {peer} for something else (request {other},"
            f" {far_width} bytes a row)"
        )


def _body(packets: Sequence[Packet], blocks: Sequence[slice], row: int) -> bytes:
    block = next(b for b, rows in enumerate(blocks) if row < rows.stop)
    return packets[block].encode(row - blocks[block].start)
