"""All-to-all of rows: items addressed to nodes arrive ordered by destination, source and place in the source's list."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from fedsim.algorithms.requests import Routed
from fedsim.engine.addresses import addresses_of, copy_rows
from fedsim.errors import RunError
from fedsim.transport.transport import as_bytes

if TYPE_CHECKING:
    from fedsim.engine.counts import Counts
    from fedsim.engine.layout import Layout

Ints = NDArray[np.int64]
HEADER = 3  # int64 words in front of the counts: number of the exchange, what is asked for, bytes of a row


class Routes:
    """Sorts items by destination, sends every rank what its nodes are addressed, and sorts what has arrived.

    Two messages go to every rank: how many items each of its nodes gets from each of mine, then the items.
    """

    def __init__(self, layout: Layout, blocks: Sequence[slice], counts: Counts) -> None:
        self._layout, self._blocks, self._counts, self._number = layout, blocks, counts, 0
        self._rank_of_row = np.argsort(np.argsort(layout.nodes))  # own rows by ascending node number
        self._sources = [np.sort(layout.topology.order[a:b]) for a, b in pairwise(layout.ranges)]

    def answer(self, requests: list[Any], question: str) -> list[Routed]:
        """Return each block's items.

        Raises:
            RunError: a destination or a source that does not exist, or ranks that ask for different things.
        """
        values = requests[0].v if len(requests) == 1 else torch.cat([r.v for r in requests])
        values = values.detach().contiguous()
        to, source = self._addresses(requests, len(values))
        order, table = sorted_items(to, source, self._layout.n, self._layout.rows)
        self._charge(table, values)
        if self._layout.size > 1:
            return self._blockwise(*self._across(values, order, table, question))
        ordered = values if order is None else self._taken(values, order)
        return self._blockwise(ordered, table, np.sort(self._layout.nodes))

    def _taken(self, values: torch.Tensor, order: Ints) -> torch.Tensor:
        return taken(values, order)

    def _addresses(self, requests: list[Any], items: int) -> tuple[Ints, Ints]:
        """Return positions of destinations, and sources as places among this rank's node numbers."""
        to = np.concatenate([r.to for r in requests]).astype(np.int64)
        source = np.concatenate([r.source + rows.start for r, rows in zip(requests, self._blocks, strict=True)])
        for r, rows in zip(requests, self._blocks, strict=True):
            _refuse_outside("source", np.asarray(r.source), rows.stop - rows.start, "rows in its block")
        _refuse_outside("to", to, self._layout.n, "nodes")
        if not len(to) == len(source) == items:
            raise RunError(
                f"Route: {items} items, {len(to)} destinations, {len(source)} sources; one of each is needed"
            )
        return self._layout.topology.position[to], self._rank_of_row[source]

    def _across(
        self, values: torch.Tensor, order: Ints | None, table: Ints, question: str
    ) -> tuple[torch.Tensor, Ints, Ints]:
        """Return the items of this rank's nodes, ordered, with their counts `[rows, n]` and all node numbers.

        Items that had to be sorted and stay on this rank are copied once, from where they lie to where they belong;
        the others are packed, travel and are put in place.
        """
        layout, width, nodes = self._layout, _width(values), np.concatenate(self._sources)
        tables = self._tables(table, width, question)
        away, bounds = np.ones(layout.size, bool), [int(table[:r].sum()) for r in layout.ranges]
        away[layout.rank] = order is None
        ranks = [*np.flatnonzero(away), *np.flatnonzero(~away)]  # in this order items lie here, when all have arrived
        begin, whole = merged([tables[r] for r in ranks], np.argsort(np.concatenate([self._sources[r] for r in ranks])))
        send = [(b - a) * width * int(w) for (a, b), w in zip(pairwise(bounds), away, strict=True)]
        receive = [int(t.sum()) * width * int(w) for t, w in zip(tables, away, strict=True)]
        stay = slice(bounds[layout.rank], bounds[layout.rank + 1])
        packed = values if order is None else taken(values, np.delete(order, stay))
        raw = layout.transport.all_to_all(as_bytes(packed.numpy()), send, receive)
        arrived = torch.from_numpy(raw.view(values.numpy().dtype).reshape(-1, *values.shape[1:]))
        if order is None:
            return (arrived if begin is None else taken(arrived, begin)), whole, np.sort(nodes)
        places = np.concatenate([addresses_of(arrived.numpy()), addresses_of(values.numpy())[order[stay]]])
        return rows_at(places if begin is None else places[begin], values), whole, np.sort(nodes)

    def _tables(self, table: Ints, width: int, question: str) -> list[Ints]:
        """Exchange counts: return for every rank how many items `[own rows, its rows]` it sends."""
        layout = self._layout
        self._number += 1
        head = np.array([self._number, zlib.crc32(question.encode()), width], np.int64)
        parts = [np.concatenate([head, table[a:b].ravel()]) for a, b in pairwise(layout.ranges)]
        lengths = [(HEADER + layout.rows * len(s)) * 8 for s in self._sources]
        raw = layout.transport.all_to_all(as_bytes(np.concatenate(parts)), [p.nbytes for p in parts], lengths)
        tables = []
        for rank, part in enumerate(np.split(raw, np.cumsum(lengths)[:-1])):
            words = part.view(np.int64)
            self._check(rank, words[:HEADER], head, question)
            tables.append(words[HEADER:].reshape(layout.rows, -1))
        return tables

    def _check(self, peer: int, theirs: Ints, mine: Ints, question: str) -> None:
        if not np.array_equal(theirs, mine):
            raise RunError(
                f"ranks disagree on the next request: rank {self._layout.rank} asks for {question} (exchange {mine[0]},"
                f" {mine[2]} bytes a row), rank {peer} for something else (exchange {theirs[0]}, {theirs[2]} bytes)"
            )

    def _blockwise(self, values: torch.Tensor, table: Ints, nodes: Ints) -> list[Routed]:
        """Cut the ordered items into blocks; `table [rows, sources]`, `nodes [sources]`."""
        per_row = table.sum(axis=1)
        offsets = np.concatenate([[0], np.cumsum(per_row)])
        source = np.repeat(np.tile(nodes, len(table)), table.ravel())
        answers = []
        for rows in self._blocks:
            begin, end = offsets[rows.start], offsets[rows.stop]
            answers.append(Routed(values[begin:end], offsets[rows.start : rows.stop + 1] - begin, source[begin:end]))
        return answers

    def _charge(self, table: Ints, values: torch.Tensor) -> None:
        own = self._layout.nodes[np.argsort(self._layout.nodes)]
        others = table.copy()
        others[self._layout.topology.position[own], np.arange(len(own))] = 0
        pairs = int(np.count_nonzero(others))
        self._counts.messages += pairs
        self._counts.communications += pairs
        self._counts.bytes += int(others.sum()) * _width(values)
        if self._layout.rank == 0:  # counts are added up over ranks
            self._counts.exchanges += 1


def taken(values: torch.Tensor, order: Ints) -> torch.Tensor:
    """Return `values[order]`."""
    return rows_at(addresses_of(values.numpy())[order], values)


def rows_at(places: Ints, like: torch.Tensor) -> torch.Tensor:
    """Return the rows that begin at these addresses, shaped like those of `like`."""
    made = np.empty((len(places), *like.shape[1:]), like.numpy().dtype)  # NumPy asks for huge pages, torch does not
    copy_rows(places, _width(like), made.ctypes.data)
    return torch.from_numpy(made)


def sorted_items(to: Ints, source: Ints, destinations: int, sources: int) -> tuple[Ints | None, Ints]:
    """Return the order by (destination, source, place), None where items lie so already, and the counts.

    The counts are `[destinations, sources]`.
    """
    table = np.zeros((destinations, sources), np.int64)
    order = np.empty(len(to), np.int64)
    moved = _counting_sort(to, source, table, order)
    return (order if moved else None), table


@njit(cache=True)
def _counting_sort(to, source, table, order):  # pragma: no cover - compiled
    for i in range(len(to)):
        table[to[i], source[i]] += 1
    slot, total = np.empty_like(table), 0
    for d in range(table.shape[0]):
        for s in range(table.shape[1]):
            slot[d, s] = total
            total += table[d, s]
    moved = False
    for i in range(len(to)):
        place = slot[to[i], source[i]]
        order[place] = i
        slot[to[i], source[i]] += 1
        moved |= place != i
    return moved


def merged(tables: list[Ints], by_node: Ints) -> tuple[Ints | None, Ints]:
    """Return the order that sorts arrivals (by rank, then destination, then source) by destination and source.

    Args:
        tables: of each rank, `[rows, its sources]`.
        by_node: the places of all sources (ranks one after the other) in ascending node number.

    Returns:
        The order, None where they lie so already, and the counts `[rows, sources]` by ascending node number.
    """
    starts, before = [], 0
    for table in tables:
        runs = np.cumsum(np.concatenate([[0], table.ravel()]))
        starts.append(before + runs[:-1].reshape(table.shape))
        before += int(runs[-1])
    begin, length = np.concatenate(starts, axis=1)[:, by_node], np.concatenate(tables, axis=1)[:, by_node]
    begin, runs = begin.ravel(), length.ravel()
    used = runs > 0
    if (np.diff(begin[used]) > 0).all():
        return None, length
    place = np.cumsum(runs) - runs
    return np.arange(before) + np.repeat(begin - place, runs), length


def _width(values: torch.Tensor) -> int:
    width = values.element_size()
    for size in values.shape[1:]:
        width *= size
    return width


def _refuse_outside(name: str, numbers: Ints, count: int, what: str) -> None:
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < count):
        bad = numbers[(numbers < 0) | (numbers >= count)][0]
        raise RunError(f"Route: {name} {bad} given, but there are {count} {what}, numbered from 0")
