"""Weighted sums of rows on a CUDA device in one kernel; the only module that imports Triton."""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

NARROWEST, WIDEST = 64, 1024  # columns of one program


@triton.jit
def _sums(rows, offsets, columns, weights, values, out, dim, BLOCK: tl.constexpr):  # pragma: no cover - compiled
    """Write one row's sum over its neighbours, left to right and in float64, for BLOCK columns."""
    place = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for edge in range(tl.load(offsets + place), tl.load(offsets + place + 1)):
        value = tl.load(values + tl.load(columns + edge) * dim + c, mask=c < dim, other=0.0)
        total += tl.load(weights + edge) * value.to(tl.float64)
    tl.store(out + tl.load(rows + place) * dim + c, total.to(out.dtype.element_ty), mask=c < dim)


def write_sums(
    rows: torch.Tensor,
    offsets: torch.Tensor,
    columns: torch.Tensor,
    weights: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Write `out[rows[i]] = sum_e weights[e] values[columns[e]]`, e from `offsets[i]` to `offsets[i + 1]`.

    Args:
        rows, offsets, columns: int64. weights: float64. values: `[m, dim]`. out: `[n, dim]`; all contiguous.
    """
    dim = values.shape[1]
    block = min(WIDEST, max(NARROWEST, triton.next_power_of_2(dim)))
    grid = len(rows), triton.cdiv(dim, block)
    _sums[grid](rows, offsets, columns, weights, values, out, dim, BLOCK=block)  # pyright: ignore[reportIndexIssue]
