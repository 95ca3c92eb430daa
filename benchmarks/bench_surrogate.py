"""Surrogates against the linear algebra they cannot do without, and against GPyTorch; memory at dim = 10,000.

Targets: one fit and gradient for all clients within 1.2 times its factorisations and products; a whole round at
dim = 300 at least ten times faster than fitting GPyTorch's processes; dim = 10,000 with a window of 500 in 4 GiB.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.engine.machine import prepare
from fedsim.prepare import Live
from fedsim.prepare import prepare as prepared
from fedsim.scenario import load_study
from fedsim.surrogate.history import History
from fedsim.surrogate.kernels import Kernel

prepare()
N, WINDOW, DIM, CLIENTS, STEPS = 20, 150, 300, 5, 10


def _clients() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return points `[150, 300]`, values `[150]` and a point for each of 20 clients."""
    rng = np.random.default_rng(0)
    points = torch.from_numpy(0.5 + 0.05 * (2 * rng.random((N, WINDOW, DIM)) - 1))
    return [(p, (p * p).sum(dim=1), p.mean(dim=0)) for p in points]


@pytest.mark.parametrize("how", ["needed", "fedsim", "gpytorch"])
def bench_fit_and_gradient(benchmark: Any, how: str) -> None:
    """All 20 clients once: the bare factorisations and products; the surrogate; a GPyTorch process and autograd."""
    benchmark.group = f"fit and gradient, {N} clients, window {WINDOW}, dim {DIM}"
    clients = _clients()
    ways = {"needed": _needed, "fedsim": _surrogate, "gpytorch": _gpytorch}
    benchmark(lambda: [ways[how](*client) for client in clients])


def _needed(points: torch.Tensor, values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Do what no surrogate can avoid: Gram matrix, factor, two solves, one product."""
    z = points - x
    gram = z @ z.T
    gram.diagonal().add_(1.0)
    factor, _ = torch.linalg.cholesky_ex(gram)
    return torch.cholesky_solve(values[:, None], factor)[:, 0] @ z


def _surrogate(points: torch.Tensor, values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    history = History(points, values, WINDOW, WINDOW, 1e-6)
    history.kernel = Kernel("se", 3.0)
    return history.gradient(x)


def _gpytorch(points: torch.Tensor, values: torch.Tensor, x: torch.Tensor, steps: int = 0) -> torch.Tensor:
    """Fit a GPyTorch process, its length scale by `steps` of Adam on the likelihood; differentiate its mean."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import gpytorch

        class Process(gpytorch.models.ExactGP):
            def __init__(self, likelihood: Any) -> None:
                super().__init__(points, (values - values.min()) / (values.max() - values.min()), likelihood)
                self.mean, self.kernel = gpytorch.means.ZeroMean(), gpytorch.kernels.RBFKernel()

            def forward(self, z: torch.Tensor) -> Any:
                return gpytorch.distributions.MultivariateNormal(self.mean(z), self.kernel(z))

        likelihood = gpytorch.likelihoods.GaussianLikelihood(
            noise_constraint=gpytorch.constraints.GreaterThan(1e-7)
        ).double()
        process = Process(likelihood).double()
        likelihood.noise, process.kernel.lengthscale = 1e-6, 3.0
        with gpytorch.settings.fast_computations(False, False, False):
            if steps:
                _fit(gpytorch, process, likelihood, steps)
            process.eval()
            at = x.clone().requires_grad_()
            return torch.autograd.grad(process(at[None]).mean.sum(), at)[0]


def _fit(gpytorch: Any, process: Any, likelihood: Any, steps: int) -> None:
    process.train()
    goal = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, process)
    optimiser = torch.optim.Adam([process.kernel.raw_lengthscale], lr=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        (-goal(process(*process.train_inputs), process.train_targets)).backward()
        optimiser.step()


def _player(dim: int, **algorithm: Any) -> Any:
    """Return a player of FZooS on the quadratic, started."""
    scenario = {
        "topology": {"kind": "server", "n": CLIENTS},
        "problem": {"kind": "synthetic_quadratic", "dim": dim},
        "start": {"kind": "problem"},
        "algorithm": {"kind": "fzoos", **algorithm},
        "schedule": {"horizon": 1000},
    }
    player = prepared(load_study(scenario).runs[0], Live()).player()
    player.start()
    return player


@pytest.mark.parametrize("how", ["fedsim, M = 10000", "fedsim, M = 1000", "gpytorch, fitted", "gpytorch, not fitted"])
def bench_round(benchmark: Any, how: str) -> None:
    """A whole round at dim 300 (5 clients, 10 steps, queries, features and all) against GPyTorch's fits alone.

    GPyTorch stands for the 50 gradients of a round only, each from a process whose length scale is fitted by 50 steps
    of Adam, or not fitted at all.
    """
    benchmark.group = f"a round, {CLIENTS} clients, {STEPS} steps, dim {DIM}"
    if how.startswith("fedsim"):
        player = _player(DIM, features=int(how.split()[-1]))
        player.advance(2)
        benchmark.pedantic(lambda: player.advance(player.now + 1), rounds=5)
        return
    steps = 0 if "not" in how else 50
    fits = [client for client in _clients()[:CLIENTS] for _ in range(STEPS)]
    benchmark.pedantic(lambda: [_gpytorch(*client, steps=steps) for client in fits], rounds=2)


def bench_wide(benchmark: Any) -> None:
    """Three rounds at dim 10,000, window and features' window 500, M = 10,000: the process's largest memory."""
    benchmark.group = "dim 10,000, window 500"
    command = [sys.executable, "-m", "benchmarks.bench_surrogate"]
    where = Path(__file__).parent.parent

    def play() -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=where).stdout

    told = benchmark.pedantic(play, rounds=1)
    benchmark.extra_info["GiB"] = float(told)
    print(f"largest memory: {float(told):.2f} GiB")


if __name__ == "__main__":
    wide = _player(10_000, window=500, feature_window=500)
    wide.advance(3)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
