"""Compressors and their codecs at a million numbers, against `torch.topk` and a copy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedsim.compression.compressors import QSGD, Compressor, LowPrecision, Natural, RandomK, Sign, TopK, Uniform
from fedsim.engine.machine import prepare
from fedsim.engine.streams import RoundDraws, Streams

prepare()
DIM = 1_000_000
KEPT = [1_000, 10_000, 100_000, 300_000]
OTHERS: list[Compressor] = [RandomK(k=10_000), QSGD(), Uniform(), Natural(), Sign(), LowPrecision()]


@pytest.fixture(scope="module")
def row():
    """One row of standard normals, `[1, DIM]` float64."""
    return torch.from_numpy(np.random.default_rng(0).standard_normal((1, DIM)))


def _there_and_back(compressor: Compressor, row: torch.Tensor) -> None:
    """Compress, say how long the body is, encode it and decode it: all that a message ever costs."""
    packet = compressor.compress(row, RoundDraws(Streams(0), np.zeros(1, np.int64), 0), "benchmark", [DIM])
    packet.lengths()
    packet.decode(packet.encode(0))


@pytest.mark.parametrize("how", ["fedsim, with codec", "torch.topk"])
@pytest.mark.parametrize("k", KEPT)
def bench_top_k(benchmark, row, k, how):
    """The k largest of a row as a message there and back; torch finds them and no more."""
    benchmark.group = f"top {k} of a million"
    size = row.abs()
    benchmark((lambda: _there_and_back(TopK(k=k), row)) if how.startswith("fedsim") else (lambda: size.topk(k, dim=1)))


@pytest.mark.parametrize("compressor", OTHERS, ids=lambda c: c.kind)
def bench_codecs(benchmark, row, compressor):
    """The other compressors, there and back."""
    benchmark.group = "a million numbers, compressed, encoded, decoded"
    benchmark(lambda: _there_and_back(compressor, row))
