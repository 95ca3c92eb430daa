"""Answers what blocks ask for, and counts what it would cost between hosts."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.algorithms.requests import Gather, Gathered, Mean, Mix, Packet, Request, Route, Sum
from fedsim.engine.counts import Counts, Packed
from fedsim.engine.ghosts import Ghosts, Underway
from fedsim.engine.layout import Layout
from fedsim.engine.mixing import by_position, mix_rows
from fedsim.engine.routes import Routes, rows_at
from fedsim.engine.sums import total as global_sum
from fedsim.errors import RunError, Unsupported

if TYPE_CHECKING:
    from fedsim.privacy.guard import Guard

NUMPY = {torch.float64: np.float64, torch.float32: np.float32}  # a lookup is faster than an empty tensor's own numpy()


class LocalNetwork:
    """Answers the blocks of one process; rows of other ranks are read where they were received.

    Args:
        layout: which nodes the rows are.
        blocks: the rows of each block, in order.
        matrices: sparse `[n, n]` over node numbers, by the name that `Mix` uses.
        counts: where this rank's share of the costs is added; the sum over ranks is the total.
    """

    def __init__(self, layout: Layout, blocks: Sequence[slice], matrices: dict[str, Any], counts: Counts) -> None:
        self._layout, self._blocks, self._counts = layout, blocks, counts
        self._ghosts = Ghosts(layout)
        self._csr = {name: self._ghosts.local(by_position(m, layout.topology)) for name, m in matrices.items()}
        self._inner = {name: self._ghosts.inner(csr) for name, csr in self._csr.items()}
        self._degrees = layout.topology.degrees[layout.nodes]
        self._own_ends = int(self._degrees.sum())
        self._places = np.arange(layout.rows, dtype=np.int64)
        self.packed = Packed()
        self._steps: dict[int, NDArray[np.int64]] = {}  # from row to row, for the width that was last asked for
        self._routes = Routes(layout, blocks, counts)
        self.guard: Guard | None = None

    @property
    def blocks(self) -> Sequence[slice]:
        """The rows of each block."""
        return self._blocks

    def answer(self, requests: list[Request]) -> list[Any]:
        """Return each block's answer to its request; all blocks ask for the same thing.

        Raises:
            RunError: they do not, or a request does not fit its block.
        """
        if isinstance(requests[0], Mix | Gather | Sum | Mean):
            for request, rows in zip(requests, self._blocks, strict=True):
                refuse_misfit(request, rows.stop - rows.start, self._layout.n)
        if len(requests) > 1:
            self._refuse_disagreement(requests)
        first = requests[0]
        if self._layout.size > 1:
            self._ghosts.agree(describe(first))
            self._layout.transport.asks = self._ghosts.question
        if isinstance(first, Mix):
            return self._mix(requests, first.matrix)
        if isinstance(first, Gather):
            return self._gather(requests)
        if isinstance(first, Sum | Mean):
            return self._sum(requests, mean=isinstance(first, Mean))
        if isinstance(first, Route):
            return self._routes.answer(requests, describe(first))
        if self.guard is not None:
            return self.guard.answer(requests, self)
        raise Unsupported(f"request {type(first).__name__} is not answered by this engine")

    def _mix(self, requests: list[Any], matrix: str) -> list[torch.Tensor]:
        offsets, columns, weights = self._matrix(matrix)
        values = [visible(r).contiguous() for r in requests]
        self._charge_edges(requests, values)
        base, addresses = self._addresses(values)
        mixed = np.empty((self._layout.rows, *values[0].shape[1:]), NUMPY[values[0].dtype])
        far = self._send(requests, values, base, addresses)
        if far is None:
            mix_rows(0, offsets, columns, weights, base, addresses, mixed)
        else:  # rows that need nothing from elsewhere are mixed while messages travel
            addresses, inner = np.concatenate([addresses, far.addresses - base]), self._inner[matrix]
            mix_rows(inner.start, offsets, columns, weights, base, addresses, mixed[inner])
            far.finish()
            mix_rows(0, offsets, columns, weights, base, addresses, mixed[: inner.start])
            mix_rows(inner.stop, offsets, columns, weights, base, addresses, mixed[inner.stop :])
        out = torch.from_numpy(mixed)
        return [out] if len(self._blocks) == 1 else [out[rows] for rows in self._blocks]

    def _send(
        self, requests: list[Any], values: list[torch.Tensor], base: int, addresses: NDArray[np.int64]
    ) -> Underway | None:
        """Send what other ranks need of the values, which lie at `base + addresses`."""
        if self._layout.size == 1:
            return None
        if isinstance(requests[0].v, torch.Tensor):
            return self._ghosts.send(base + addresses, values[0][0].detach().numpy())
        packets = [r.v for r in requests]
        if getattr(requests[0], "copies", None) is None:  # Gather has none
            return self._ghosts.send_packed(packets, self._blocks)
        like = values[0][0].detach().numpy()
        return self._ghosts.send_copies(requests[0].name, base + addresses, like, packets, self._blocks)

    def forget(self) -> None:
        """Drop the copies of other ranks' rows, after the state has changed under them; they then come whole."""
        self._ghosts.copies.clear()

    def _matrix(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        if name not in self._csr:
            have = ", ".join(self._csr) or "none, since nodes without edges meet in sums only"
            raise Unsupported(f"this scenario has no matrix {name!r} for Mix or Gather (it has {have})")
        return self._csr[name]

    def _addresses(self, values: list[torch.Tensor]) -> tuple[int, NDArray[np.int64]]:
        """Return where every row begins, as an address and steps from it; `values` are contiguous and kept alive."""
        stride = values[0].stride(0) * values[0].element_size()
        if stride not in self._steps:
            self._steps = {stride: self._places * stride}
        steps = self._steps[stride]
        if len(values) == 1:
            return values[0].data_ptr(), steps
        return 0, np.concatenate([v.data_ptr() + steps[: len(v)] for v in values])

    def _gather(self, requests: list[Any]) -> list[Gathered]:
        self._matrix("adjacency")
        values = [dense(r.v).detach().contiguous() for r in requests]
        self._charge_edges(requests, values)
        base, addresses = self._addresses(values)
        far = self._send(requests, values, base, addresses)
        if far is not None:
            far.finish()
            addresses = np.concatenate([addresses, far.addresses - base])
        return self._neighbours(lambda chosen: rows_at(base + addresses[chosen], values[0]))

    def _neighbours(self, rows_of: Callable[[NDArray[np.int64]], torch.Tensor]) -> list[Gathered]:
        """Return each block's neighbours, whose rows `rows_of` takes from own rows and, behind them, ghosts."""
        offsets, columns, _ = self._csr["adjacency"]
        nodes = np.concatenate([self._layout.nodes, self._ghosts.nodes])
        answers = []
        for rows in self._blocks:
            begin, end = offsets[rows.start], offsets[rows.stop]
            chosen = columns[begin:end]
            answers.append(Gathered(rows_of(chosen), offsets[rows.start : rows.stop + 1] - begin, nodes[chosen]))
        return answers

    def _sum(self, requests: list[Any], mean: bool) -> list[torch.Tensor]:
        values = torch.cat([dense(r.v) for r in requests])
        weight = None if requests[0].weight is None else torch.cat([r.weight for r in requests])
        mask = None if requests[0].rows is None else requests[0].rows[self._layout.nodes]
        terms = values if weight is None else values * weight[:, None].to(values)
        if mask is not None:
            terms = torch.where(torch.from_numpy(mask).to(terms.device)[:, None], terms, torch.zeros_like(terms))
        total = self._total(terms)[None]
        self._charge_sum(requests, values, weight, mask, total)
        if mean:
            mass = self._mass(weight, mask, requests[0].rows)
            if mass == 0.0:
                raise RunError(f"{describe(requests[0])}: no node takes part with a weight other than 0")
            total = (total if total.is_floating_point() else total.double()) / mass
        return [total] * len(requests)

    def _total(self, terms: torch.Tensor) -> torch.Tensor:
        return global_sum(terms, self._layout)

    def _mass(
        self, weight: torch.Tensor | None, mask: NDArray[np.bool_] | None, rows: NDArray[np.bool_] | None
    ) -> float:
        if weight is None:
            return float(self._layout.n if rows is None else np.count_nonzero(rows))
        weight = weight.cpu()
        kept = weight if mask is None else torch.where(torch.from_numpy(mask), weight, torch.zeros_like(weight))
        return float(global_sum(kept[:, None], self._layout)[0])

    def _charge_edges(self, requests: list[Any], values: list[torch.Tensor]) -> None:
        counts = self._counts
        if isinstance(requests[0].v, torch.Tensor):
            counts.bytes += self._own_ends * (values[0].nbytes // len(values[0]))
        else:
            sent = int((self._degrees * lengths(requests, values)).sum())
            counts.bytes += sent
            self.packed.add(sent, self._own_ends * (values[0].nbytes // len(values[0])))
        counts.messages += self._own_ends
        if self._layout.rank == 0:  # counts are added up over ranks
            counts.communications += self._layout.topology.m
            counts.exchanges += 1

    def _charge_sum(
        self,
        requests: list[Any],
        values: torch.Tensor,
        weight: torch.Tensor | None,
        mask: NDArray[np.bool_] | None,
        total: torch.Tensor,
    ) -> None:
        taking_part = np.ones(len(values), bool) if mask is None else mask
        sending = taking_part if weight is None else taking_part & (weight.cpu().numpy() != 0)
        up, down = int(sending.sum()), int(taking_part.sum())
        size_up = int(lengths(requests, [dense(r.v) for r in requests])[sending].sum())
        size_down = down * total.numel() * total.element_size()
        self._counts.charge_sum(up, down, size_up, size_down)
        if self._layout.rank == 0:  # counts are added up over ranks
            self._counts.exchanges += 2

    def _refuse_disagreement(self, requests: list[Request]) -> None:
        kinds = [describe(request) for request in requests]
        for block, kind in enumerate(kinds):
            if kind != kinds[0]:
                raise RunError(
                    f"blocks disagree on the next request: block 0 asks for {kinds[0]}, block {block} for {kind};"
                    " control flow may depend on the round and on shared values, never on rows"
                )


def dense(v: torch.Tensor | Packet) -> torch.Tensor:
    """Return what everybody computes with: the rows themselves, or a packet's decoded rows."""
    return v if isinstance(v, torch.Tensor) else v.dense


def refuse_misfit(request: Any, rows: int, n: int) -> None:
    """Refuse what compiled code would read past the end of, or silently make something else of.

    Raises:
        RunError: says what was given and what is needed.
    """
    v, weight, mask = request.v, getattr(request, "weight", None), getattr(request, "rows", None)
    given = v if isinstance(v, torch.Tensor) else getattr(v, "dense", None)
    what = type(request).__name__
    if given is None:
        raise RunError(f"{what} of {type(v).__name__}: a torch tensor, or a packet, is needed")
    if given.dim() != 2 or len(given) != rows:
        raise RunError(f"{what} of shape {tuple(given.shape)}: [rows, dim] is needed, and this block has {rows} rows")
    if what == "Mix" and given.dtype not in NUMPY:
        raise RunError(f"Mix of {given.dtype}: float64 or float32 is needed; Sum and Gather take other types")
    if weight is not None and tuple(weight.shape) != (rows,):
        raise RunError(f"{what} with weights {tuple(weight.shape)}: one per row, ({rows},), is needed")
    if weight is not None and not given.is_floating_point() and bool((weight != weight.to(given.dtype)).any()):
        raise RunError(f"{what} of {given.dtype} with weights that are not whole numbers: give it floats, v.double()")
    if mask is not None and (mask.dtype != np.bool_ or mask.shape != (n,)):
        raise RunError(f"{what} with rows {mask.dtype} {mask.shape}: a boolean mask by node number, ({n},), is needed")


def visible(request: Any) -> torch.Tensor:
    """Return the rows that neighbours see of a request: of a packet, the copies that it moves, where there are any."""
    copies = getattr(request, "copies", None)
    return dense(request.v) if copies is None else copies


def lengths(requests: list[Any], values: list[torch.Tensor]) -> NDArray[np.int64]:
    """Return the bytes of each row's body, int64 `[rows]`."""
    parts = [
        np.full(len(v), v[0].numel() * v.element_size()) if isinstance(r.v, torch.Tensor) else r.v.lengths()
        for r, v in zip(requests, values, strict=True)
    ]
    return np.concatenate(parts).astype(np.int64)


def describe(request: Request) -> str:
    """Return what a request asks for, without its rows: what all blocks and ranks must agree on."""
    v, matrix = getattr(request, "v", None), getattr(request, "matrix", "")
    parts = [f"{type(request).__name__}{f'[{matrix}]' if matrix else ''}"]
    if v is not None:
        packed = "" if isinstance(v, torch.Tensor) else " packed"
        parts.append(f"of {tuple(dense(v).shape[1:])} {str(dense(v).dtype).removeprefix('torch.')}{packed}")
    if getattr(request, "copies", None) is not None:
        parts.append(f"onto copies {getattr(request, 'name', '')!r}")
    if getattr(request, "weight", None) is not None:
        parts.append("with weights")
    mask = getattr(request, "rows", None)
    if mask is not None:
        parts.append(f"over {int(np.count_nonzero(mask))} nodes (mask {zlib.crc32(np.packbits(mask).tobytes()):08x})")
    return " ".join(parts)
