"""The engine's kernels against what a user would reach for: copies, scipy, NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedsim.algorithms.algorithm import Sampling
from fedsim.engine.addresses import addresses_of
from fedsim.engine.machine import prepare
from fedsim.engine.mixing import by_position, mix_rows
from fedsim.engine.sampling import draw
from fedsim.engine.streams import Streams
from fedsim.engine.sums import tree_sum
from fedsim.topology.build import build
from fedsim.topology.mixing import mixing_matrix

prepare()
SHAPES = [(10_000, 100), (1_000, 10_000)]


@pytest.fixture(params=SHAPES, ids=["[10000, 100]", "[1000, 10000]"])
def rows(request):
    """Values of nodes, `[n, dim]` float64."""
    return np.random.default_rng(0).standard_normal(request.param)


def _regular(n: int):
    return build(f"random_regular:n={n},degree=4,seed=0")


@pytest.mark.parametrize("how", ["fedsim", "scipy", "copy"])
def bench_mixing(benchmark, rows, how):
    """One mixing on a random 4-regular graph; a copy of the rows moves as many bytes, read once and written once."""
    benchmark.group = f"mixing {list(rows.shape)}"
    topology = _regular(len(rows))
    matrix, out = mixing_matrix(topology), np.empty_like(rows)
    csr, addresses = by_position(matrix, topology), addresses_of(rows)
    ways = {
        "fedsim": lambda: mix_rows(0, *csr, 0, addresses, out),
        "scipy": lambda: matrix @ rows,
        "copy": lambda: np.copyto(out, rows),
    }
    benchmark(ways[how])
    benchmark.extra_info["GB/s"] = 2 * rows.nbytes / benchmark.stats.stats.min / 1e9


@pytest.mark.parametrize("how", ["fedsim", "torch"])
def bench_sum(benchmark, rows, how):
    """The sum over nodes by the fixed tree, against torch's sum, which no partition reproduces."""
    benchmark.group = f"sum over nodes {list(rows.shape)}"
    values = torch.from_numpy(rows)
    benchmark((lambda: tree_sum(values, 0, len(rows))) if how == "fedsim" else (lambda: values.sum(dim=0)))


@pytest.mark.parametrize("law", ["uniform", "normal"])
@pytest.mark.parametrize("how", ["fedsim", "numpy"])
def bench_draws(benchmark, law, how):
    """A million numbers keyed by node, against one sequential NumPy generator."""
    benchmark.group = f"a million draws, {law}"
    nodes, streams, rng = np.arange(10_000), Streams(0), np.random.default_rng(0)
    keyed, plain = getattr(streams, law), getattr(rng, law)
    benchmark((lambda: keyed("benchmark", nodes, 0, 100)) if how == "fedsim" else (lambda: plain(size=(10_000, 100))))


@pytest.mark.parametrize("kind", ["with_replacement", "epoch", "poisson"])
def bench_minibatches(benchmark, kind):
    """Batches of 16 of 200 records for ten thousand nodes."""
    benchmark.group = "minibatches"
    nodes, records = np.arange(10_000), np.full(10_000, 200)
    benchmark(lambda: draw(Sampling(16, kind), np.uint64(0), nodes, 3, records))
