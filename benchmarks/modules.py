"""Gradients of all nodes' networks: fedsim beside a loop with ordinary autograd.

`python -m benchmarks.modules` prints, for each case, milliseconds of one minibatch gradient of all nodes and the
ratio to a loop that loads a node's parameters into the module and calls `backward`, as a training script does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from fedsim.algorithms.algorithm import Sampling
from fedsim.engine.machine import prepare
from fedsim.engine.sampling import draw
from fedsim.engine.streams import Streams
from fedsim.problems.data.table import Data
from fedsim.problems.losses import default
from fedsim.problems.models.lenet5 import LeNet5
from fedsim.problems.models.mlp import mlp
from fedsim.problems.models.residual_cnn import ResidualCNN
from fedsim.problems.models.transformer import Transformer
from fedsim.problems.module import ModuleProblem
from fedsim.problems.problem import Minibatch

RECORDS = 32  # per node
CASES: dict[str, tuple[int, int, Callable[[], torch.nn.Module]]] = {  # n, batch, model
    "mlp, n=100, 10,000 parameters, batch 8": (100, 8, lambda: mlp(64, 10, [100, 23], 0)),
    "mlp, n=10, 10,000 parameters, batch 8": (10, 8, lambda: mlp(64, 10, [100, 23], 0)),
    "lenet5, n=10, batch 8": (10, 8, lambda: LeNet5(784, 10)),
    "lenet5, n=10, batch 64": (10, 64, lambda: LeNet5(784, 10)),
    "residual_cnn, n=10, batch 8": (10, 8, lambda: ResidualCNN(784, 10)),
    "transformer, n=10, batch 8": (10, 8, lambda: Transformer(64, 78)),
    "transformer, n=100, batch 2": (100, 2, lambda: Transformer(64, 78)),
}


def table(n: int, name: str) -> Data:
    """Return random records for n nodes."""
    rng, count = np.random.default_rng(0), n * RECORDS
    if name.startswith("transformer"):
        codes, letters = rng.integers(0, 78, (count, 65)).astype(float), tuple(map(chr, range(78)))
        return Data(codes, np.zeros(count, np.int64), {}, "random", "multiclass", ("one",), (), None, letters)
    features = rng.normal(size=(count, 64 if name.startswith("mlp") else 784))
    return Data(features, rng.integers(0, 10, count), {}, "random", "multiclass", tuple("0123456789"))


def networks(n: int, name: str, model: torch.nn.Module, dtype: str) -> ModuleProblem:
    """Return n nodes' objectives on random records, as many for each."""
    data = table(n, name)
    parts = list(np.arange(n * RECORDS).reshape(n, RECORDS))
    return ModuleProblem(model, data, parts, default(data), 0.0, "uniform", dtype)


def ordinary(
    model: torch.nn.Module, problem: ModuleProblem, batch: Minibatch
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return all nodes' gradients by a loop: parameters in, `backward`, gradients out."""
    parameters = list(model.parameters())

    def gradients(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        for node in range(problem.n):
            a, b = problem._records_of(node, batch.indices[node])
            with torch.no_grad():
                torch.nn.utils.vector_to_parameters(x[node], parameters)
            model.zero_grad()
            output = model(a)
            if output.ndim == 3:
                output, b = output.flatten(0, 1), b.flatten()
            torch.nn.functional.cross_entropy(output, b).backward()
            torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None], out=out[node])
        return out

    return gradients


def fastest(calls: list[Callable[[], object]], seconds: float = 4.0) -> list[float]:
    """Return the seconds of the fastest of several calls of each, taken in turn."""
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or time.perf_counter() < end:
        for call, own in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call()
            own.append(time.perf_counter() - begin)
    return [min(own[1:]) for own in times]


def main() -> None:
    """Print the table."""
    prepare()
    for dtype in ("float32", "float64"):
        for name, (n, size, made) in CASES.items():
            model = made()
            problem = networks(n, name, model, dtype)
            nodes = np.arange(n)
            batch = draw(Sampling(size), Streams(0).seed, nodes, 0, problem.records)
            loop = ordinary(model.to(problem.dtype), problem, batch)
            x = problem.start(nodes) + 0.01 * torch.randn(n, problem.dim, dtype=problem.dtype)
            difference = (problem.gradient(x, nodes, batch) - loop(x)).abs().max()
            ours, theirs = fastest([partial(problem.gradient, x, nodes, batch), partial(loop, x)])
            how = "alone" if problem.rows_alone else "together"
            print(
                f"{dtype} {name:<40} {how:<9} {1e3 * ours:8.2f} ms, loop {1e3 * theirs:8.2f} ms, ratio"
                f" {theirs / ours:5.2f}, difference {difference:.0e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
