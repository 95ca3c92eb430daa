"""Rows of other ranks that this rank's rows meet: who sends what to whom, worked out once."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.errors import RunError
from fedsim.transport.transport import as_bytes

if TYPE_CHECKING:
    from fedsim.algorithms.requests import Packet
    from fedsim.engine.layout import Layout

Ints = NDArray[np.int64]
Csr = tuple[Ints, Ints, NDArray[np.float64]]
HEADER = 3  # int64 words in front of every message: number of the request, what it asks for, bytes that follow


class Ghosts:
    """The neighbours' rows that lie on other ranks, in ascending position.

    Every rank sends each of its rows once to each rank that holds a neighbour of it.

    Attributes:
        positions: int64 `[ghosts]`, where they stand. nodes: their node numbers.
        copies: public copies of theirs `[ghosts, dim]`, by name, which their packets move.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout, self._number = layout, 0
        ends = layout.topology.position[layout.topology.edges]
        inside = (ends >= layout.lo) & (ends < layout.hi)
        cut = ends[inside[:, 0] != inside[:, 1]]
        own_first = (cut[:, 0] >= layout.lo) & (cut[:, 0] < layout.hi)
        own = np.where(own_first, cut[:, 0], cut[:, 1])
        far = np.where(own_first, cut[:, 1], cut[:, 0])
        self.positions: Ints = np.unique(far)
        self.nodes: Ints = layout.topology.order[self.positions]
        owners = layout.owner(self.positions)
        self._from = {int(r): self.positions[owners == r] for r in np.unique(owners)}
        far_owner = layout.owner(far)
        self._to = {r: np.unique(own[far_owner == r]) - layout.lo for r in self._from}
        self.copies: dict[str, NDArray] = {}

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

    @property
    def question(self) -> tuple[int, str]:
        """Number and words of the request that is being answered."""
        return self._number, self._question

    def agree(self, question: str) -> None:
        """Remember what is asked for, so that the next messages carry it."""
        self._number += 1
        self._question = question

    def bring(self, values: Sequence[torch.Tensor]) -> NDArray | None:
        """Send the rows that others need and return the ghosts' rows `[ghosts, dim]`; None with one rank.

        Raises:
            RunError: another rank is at another request; names it, and what it asks for by its number.
        """
        if not self._from:
            return None if self._layout.size == 1 else np.empty((0, values[0].shape[1]), values[0].numpy().dtype)
        rows = values[0] if len(values) == 1 else torch.cat(list(values))
        array = rows.detach().numpy()
        width = array[0].nbytes
        head = np.array([self._number, zlib.crc32(self._question.encode()), width], np.int64)
        sends, receives = {}, {}
        for peer, place in self._to.items():
            sends[peer] = np.concatenate([head.view(np.uint8), as_bytes(array[place])])
            receives[peer] = np.empty(HEADER * 8 + len(self._from[peer]) * width, np.uint8)
        self._layout.transport.exchange(sends, receives)
        far = np.empty((len(self.positions), *array.shape[1:]), array.dtype)
        for peer, message in receives.items():
            self._check(peer, message[: HEADER * 8].view(np.int64), head)
            place = np.searchsorted(self.positions, self._from[peer])
            far[place] = message[HEADER * 8 :].view(array.dtype).reshape(len(place), *array.shape[1:])
        return far

    def bring_packed(self, packets: Sequence[Packet], blocks: Sequence[slice]) -> NDArray | None:
        """Send the bodies of the rows that others need and return the ghosts' decoded rows; None with one rank.

        Raises:
            RunError: as `bring`.
        """
        if not self._from:
            return self.bring([packets[0].dense])
        bodies = {r: [_body(packets, blocks, int(row)) for row in place] for r, place in self._to.items()}
        head = np.array([self._number, zlib.crc32(self._question.encode()), -1], np.int64)
        sizes = {r: np.array([*head, *map(len, parts)], np.int64) for r, parts in bodies.items()}
        theirs = {r: np.empty(8 * (HEADER + len(rows)), np.uint8) for r, rows in self._from.items()}
        self._layout.transport.exchange({r: as_bytes(size) for r, size in sizes.items()}, theirs)
        lengths = {r: message.view(np.int64)[HEADER:] for r, message in theirs.items()}
        for peer, message in theirs.items():
            self._check(peer, message.view(np.int64)[:HEADER], head)
        sends = {r: np.frombuffer(b"".join(parts), np.uint8) for r, parts in bodies.items()}
        receives = {r: np.empty(int(length.sum()), np.uint8) for r, length in lengths.items()}
        self._layout.transport.exchange(sends, receives)
        dense = packets[0].dense.numpy()
        far = np.empty((len(self.positions), *dense.shape[1:]), dense.dtype)
        for peer, body in receives.items():
            ends = np.cumsum(lengths[peer])
            for position, end, length in zip(self._from[peer], ends, lengths[peer], strict=True):
                far[np.searchsorted(self.positions, position)] = packets[0].decode(body[end - length : end].tobytes())
        return far

    def bring_copies(
        self, name: str, copies: Sequence[torch.Tensor], packets: Sequence[Packet], blocks: Sequence[slice]
    ) -> NDArray | None:
        """Return the ghosts' public copies `[ghosts, dim]`, moved by what their packets say; None with one rank.

        Those that this rank does not hold (at first, and after a checkpoint) come whole: all know what they start from.

        Raises:
            RunError: as `bring`.
        """
        before = self.copies.get(name)
        far = self.bring(copies) if before is None else self.bring_packed(packets, blocks)
        if far is None:
            return None
        self.copies[name] = far if before is None else before + far
        return self.copies[name]

    def _check(self, peer: int, theirs: Ints, mine: Ints) -> None:
        if not np.array_equal(theirs, mine):
            raise RunError(
                f"ranks disagree on the next request: rank {self._layout.rank} asks for {self._question} (request"
                f" {mine[0]}, {mine[2]} bytes a row), rank {peer} for something else (request {theirs[0]},"
                f" {theirs[2]} bytes a row)"
            )


def _body(packets: Sequence[Packet], blocks: Sequence[slice], row: int) -> bytes:
    block = next(b for b, rows in enumerate(blocks) if row < rows.stop)
    return packets[block].encode(row - blocks[block].start)
