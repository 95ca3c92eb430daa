"""The network of states that lie on an accelerator: the same requests, counts and order of sums, in torch.

Bits are not promised there, and results agree with those of the CPU to the rounding of the state's type: products and
sums may be fused, and global sums of float32 are not taken in float64. On CPU tensors this network has the bits of the
CPU's own in float64, which is how it is tested where there is no accelerator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedsim.algorithms.requests import Gathered
from fedsim.engine.device_sums import Fused, Passes, can_fuse
from fedsim.engine.ghosts import Csr, Ints
from fedsim.engine.network import LocalNetwork, visible
from fedsim.engine.routes import Routes, merged, rows_at
from fedsim.engine.sums import finish, intervals

if TYPE_CHECKING:
    from fedsim.engine.counts import Counts
    from fedsim.engine.layout import Layout
    from fedsim.transport.links import Links


class DeviceNetwork(LocalNetwork):
    """Answers requests of rows on one device.

    Args:
        device: of this process's rows. links: how rows get to other processes' devices.
    """

    def __init__(
        self,
        layout: Layout,
        blocks: Sequence[slice],
        matrices: dict[str, Any],
        counts: Counts,
        device: torch.device,
        links: Links,
    ) -> None:
        super().__init__(layout, blocks, matrices, counts)
        self._device, self._links = device, links
        self._routes = DeviceRoutes(layout, blocks, counts, links)
        self._passes = {name: self._both(csr, self._inner[name]) for name, csr in self._csr.items()}
        self._sent = {peer: torch.from_numpy(rows).to(device) for peer, rows in self._ghosts.sent.items()}

    def _both(self, csr: Csr, inner: slice) -> tuple[Passes | Fused, Passes | Fused]:
        """Return what adds up the rows that need nothing from elsewhere, and what the others."""
        rows = np.arange(self._layout.rows)
        outer = np.concatenate([rows[: inner.start], rows[inner.stop :]])
        way = Fused if can_fuse(self._device) else Passes
        return way.of(csr, rows[inner], self._device), way.of(csr, outer, self._device)

    def _mix(self, requests: list[Any], matrix: str) -> list[torch.Tensor]:
        self._matrix(matrix)
        inner, outer = self._passes[matrix]
        everything, wait = self._bring(requests)
        out = torch.empty_like(everything[: self._layout.rows])
        inner.write(out, everything)
        wait()
        outer.write(out, everything)
        return [out] if len(self._blocks) == 1 else [out[rows] for rows in self._blocks]

    def _gather(self, requests: list[Any]) -> list[Gathered]:
        self._matrix("adjacency")
        everything, wait = self._bring(requests)
        wait()
        return self._neighbours(lambda chosen: everything[torch.from_numpy(chosen).to(self._device)])

    def _bring(self, requests: list[Any]) -> tuple[torch.Tensor, Callable[[], None]]:
        """Return own rows, then the ghosts', which are there after a wait."""
        values = [visible(r).detach() for r in requests]
        self._charge_edges(requests, values)
        own, ghosts = torch.cat(values) if len(values) > 1 else values[0].contiguous(), self._ghosts
        if self._layout.size == 1:
            return own, lambda: None
        if not isinstance(requests[0].v, torch.Tensor):  # codecs are the CPU's
            on_cpu = [value.cpu() for value in values]
            base, addresses = self._addresses(on_cpu)
            far = self._send(requests, on_cpu, base, addresses)
            assert far is not None
            far.finish()
            return torch.cat([own, rows_at(far.addresses, on_cpu[0]).to(self._device)]), lambda: None
        ghosts.compare(own[:1].nbytes)
        everything = own.new_empty(len(own) + len(ghosts.positions), own.shape[1])
        everything[: len(own)] = own
        came = everything[len(own) :]
        sends = {peer: own[rows] for peer, rows in self._sent.items()}
        return everything, self._links.start(sends, {peer: came[place] for peer, place in ghosts.came.items()})

    def _total(self, terms: torch.Tensor) -> torch.Tensor:
        layout = self._layout
        tiles = [intervals(int(a), int(b), layout.n) for a, b in pairwise(layout.ranges)]
        sums = torch.stack([_tree(terms[_rows(tile, layout)]) for tile in tiles[layout.rank]])
        if layout.size > 1:
            sums = torch.cat(self._links.all_gather(sums, [len(part) for part in tiles]))
        return finish([tile for part in tiles for tile in part], sums, layout.n).clone()


def _rows(tile: tuple[int, int], layout: Layout) -> slice:
    height, index = tile
    return slice((index << height) - layout.lo, min((index + 1) << height, layout.n) - layout.lo)


def _tree(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of one interval's rows by its tree."""
    while len(values) > 1:
        pairs = len(values) // 2 * 2
        values = torch.cat([values[0:pairs:2] + values[1:pairs:2], values[pairs:]])
    return values[0]


class DeviceRoutes(Routes):
    """Routes items that lie on a device; who gets how many is worked out on the CPU."""

    def __init__(self, layout: Layout, blocks: Sequence[slice], counts: Counts, links: Links) -> None:
        super().__init__(layout, blocks, counts)
        self._links = links

    def _taken(self, values: torch.Tensor, order: Ints) -> torch.Tensor:
        return values[torch.from_numpy(order).to(values.device)]

    def _across(
        self, values: torch.Tensor, order: Ints | None, table: Ints, question: str
    ) -> tuple[torch.Tensor, Ints, Ints]:
        layout, nodes = self._layout, np.concatenate(self._sources)
        tables = self._tables(table, values.new_empty(1, *values.shape[1:]).nbytes, question)
        begin, whole = merged(tables, np.argsort(nodes))
        lengths = [int(table[a:b].sum()) for a, b in pairwise(layout.ranges)]
        packed = values if order is None else self._taken(values, order)
        arrived = self._links.all_to_all(packed, lengths, [int(t.sum()) for t in tables])
        return (arrived if begin is None else self._taken(arrived, begin)), whole, np.sort(nodes)
