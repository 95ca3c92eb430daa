"""Events per second: the kernel beside the paper's formulas in NumPy, long rows beside a copy, waves beside autograd.

    python -m benchmarks.events            the ratios (a minute)
    python -m benchmarks.events --table    events per second by n and dim, beside the bandwidth of a copy
    python -m benchmarks.events --million  a torus of a million nodes: time and memory

One thread; every ratio is taken in the same run, since the machine may be shared.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from fedsim.algorithms.dadao import DADAO
from fedsim.engine.events import Events
from fedsim.engine.layout import Layout
from fedsim.engine.machine import prepare
from fedsim.problems.data.table import Data
from fedsim.problems.least_squares import LeastSquares
from fedsim.problems.module import ModuleProblem
from fedsim.problems.problem import Problem
from fedsim.problems.quadratic import Quadratic
from fedsim.setting import RunSetting
from fedsim.topology.spectral import Chi
from fedsim.topology.topology import Topology

GRADIENTS = 1 / 3
"""Share of the events that are gradients."""


def circulant(n: int, degree: int = 4) -> Topology:
    """A ring with chords."""
    edges = {tuple(sorted((i, (i + step) % n))) for step in range(1, degree // 2 + 1) for i in range(n)}
    return Topology.from_edges(f"circulant {n}", n, sorted(edges), order="given")


def torus(side: int) -> Topology:
    """A square grid that closes on itself, with edges made by array operations."""
    node = np.arange(side * side).reshape(side, side)
    pairs = [np.stack([node, np.roll(node, 1, axis)], axis=-1).reshape(-1, 2) for axis in (0, 1)]
    return Topology.from_edges(f"torus {side}x{side}", side * side, np.concatenate(pairs), order="given")


def least_squares(n: int, dim: int, records: int = 20) -> LeastSquares:
    """Random records, as many on every node."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(n * records, dim)) / math.sqrt(dim) + np.tile(np.eye(records, dim), (n, 1))
    labels = rng.normal(size=n * records)
    data = Data(features, labels, {}, "random", "regression", (), tuple(f"x{c}" for c in range(dim)))
    return LeastSquares(data, list(np.arange(n * records).reshape(n, records)))


def diagonal(n: int, dim: int) -> Quadratic:
    """Quadratics whose data is O(dim) per node."""
    rng = np.random.default_rng(0)
    return Quadratic(rng.uniform(1.0, 4.0, (n, dim)), rng.normal(size=(n, dim)))


def dadao(problem: Problem, topology: Topology, gradients: float = GRADIENTS, player: str = "auto") -> Events:
    """DADAO with the given share of gradients, started."""
    rates = np.full(topology.m, (1 / gradients - 1) * topology.n / topology.m)
    setting = RunSetting(problem, topology, rates, Chi(1.0, 0.5, True))
    layout = Layout(topology)
    algorithm = _without_theory() if problem.mu is None else DADAO(init="local")
    x0 = torch.zeros((topology.n, problem.dim), dtype=problem.dtype)
    run = Events(algorithm.resolve(setting), setting, problem, layout, rates, x0, 0, player=player)  # type: ignore
    run.start()
    return run


def _without_theory() -> DADAO:
    """DADAO with the constants of L = 4, mu = 1, for objectives whose constants are unknown."""
    root = math.sqrt(0.5 / 4)
    return DADAO(
        init="local", nu=0.5, eta=root / 8, eta_t=root / 8, alpha=root / 4, alpha_t=root / 8, theta=0.5 / root,
        gamma=1 / 16, gamma_t=0.25 / math.sqrt(2), delta=root / 4, delta_t=1.0, beta=0.5, beta_t=2 / root,
    )  # fmt: skip


def rate(run: Events, events: int, again: int = 3) -> float:
    """Events per second: the best of some runs of about this many events."""
    run.advance(run.now + 1e-3 * events / _per_time(run))
    best = 0.0
    for _ in range(again):
        before, clock = run.events, time.perf_counter()
        run.advance(run.now + events / _per_time(run))
        best = max(best, (run.events - before) / (time.perf_counter() - clock))
    return best


def _per_time(run: Events) -> float:
    return run._clocks._total


def numpy_rate(gradient: Callable[[int, np.ndarray], np.ndarray], topology: Topology, dim: int, events: int) -> float:
    """Events per second of the paper's closed-form flow and update rules, one at a time, written plainly in NumPy."""
    rng, n = np.random.default_rng(1), topology.n
    v, last, now = np.zeros((n, 6, dim)), np.zeros(n), 0.0
    clock = time.perf_counter()
    for _ in range(events):
        now += rng.exponential(GRADIENTS / n)
        if rng.random() < GRADIENTS:
            i = rng.integers(n)
            v[i] = closed_form(v[i], now - last[i])
            x, xt, _, yt, _, _ = v[i]
            g = gradient(i, x) - 0.5 * x - yt
            x -= g / 16
            xt -= 0.18 * g
            yt += 1.08 * g
            last[i] = now
        else:
            i, j = topology.edges[rng.integers(topology.m)]
            for node in (i, j):
                v[node] = closed_form(v[node], now - last[node])
                last[node] = now
            m = v[i, 2] + v[i, 4] - v[j, 2] - v[j, 4]
            v[i, 4] -= 0.5 * m
            v[j, 4] += 0.5 * m
            v[i, 5] -= 5.6 * m
            v[j, 5] += 5.6 * m
    return events / (time.perf_counter() - clock)


def closed_form(v: np.ndarray, t: float, kappa: float = 4.0, nu: float = 0.5) -> np.ndarray:
    """DADAO's flow of one node as eq. (90) of JMLR 26(207) solves to, for tied constants."""
    root = math.sqrt(nu / kappa)
    a, th = root / 4, 0.5 / root
    x, xt, y, yt, z, zt = v
    e1, e2, g = math.exp(-a * t), math.exp(-1.5 * a * t), math.exp(-a * t / 2)
    w = math.sqrt(a * th - a * a / 4)
    cos, sin = math.cos(w * t), math.sin(w * t) / w
    xb, dx, zi, dz = (x + xt) / 2, x - xt, (z + 2 * zt) / 3, z - zt
    c0, c1, c2 = nu * xb + zi, -nu * dx / 2, 2 / 3 * dz
    p2 = -th * c2 / (th + 0.75 * a)
    h, ht = y + c0 + c1 - p2, yt + c0 + p2 / 2
    return np.stack(
        [
            xb + dx * e1 / 2,
            xb - dx * e1 / 2,
            g * ((cos - a * sin / 2) * h + a * sin * ht) - c0 - c1 * e1 + p2 * e2,
            g * (-th * sin * h + (cos + a * sin / 2) * ht) - c0 - p2 * e2 / 2,
            zi + 2 / 3 * dz * e2,
            zi - dz * e2 / 3,
        ]
    )


def copy_seconds(v: np.ndarray, events: int) -> float:
    """Seconds of a plain copy of two nodes' rows, as an exchange touches them."""
    target, pairs = np.zeros_like(v), np.random.default_rng(2).integers(0, len(v), (events, 2))
    best = math.inf
    for _ in range(3):
        clock = time.perf_counter()
        for i, j in pairs:
            np.copyto(target[i], v[i])
            np.copyto(target[j], v[j])
        best = min(best, (time.perf_counter() - clock) / events)
    return best


def report_kernel() -> None:
    """Print the kernel's events per second at n = 1,000, dim = 10, 20 records, beside NumPy."""
    problem, topology = least_squares(1000, 10), circulant(1000)
    a, b = problem.features.reshape(1000, 20, 10), problem.labels.reshape(1000, 20)
    plain = numpy_rate(lambda i, x: 0.1 * a[i].T @ (a[i] @ x - b[i]), topology, 10, 5000)
    ours = rate(dadao(problem, topology), 300_000)
    print(f"kernel, n=1000, dim=10, 20 records, 1/3 gradients: {ours / 1e6:.2f} M events/s; NumPy {plain / 1e6:.4f}")
    print(f"  ratio {ours / plain:.0f}")


def report_long_rows() -> None:
    """Print the time of an exchange at dim = 10,000, beyond cache, over that of a copy of the same rows."""
    run = dadao(diagonal(1000, 10_000), circulant(1000), gradients=0.001)
    copies, ours = [], []
    for _ in range(3):
        copies.append(copy_seconds(run.state.v, 300))
        ours.append(1 / rate(run, 1500, again=1))
    print(f"exchange at dim=10,000: {min(ours) * 1e6:.0f} us; a copy of its rows {min(copies) * 1e6:.0f} us;")
    print(f"  ratio {min(ours) / min(copies):.2f}")


def report_waves() -> None:
    """Print events per second of an MLP in waves, beside one ordinary autograd gradient at a time."""
    n, dim = 100, 30
    rng = np.random.default_rng(0)
    data = Data(
        rng.normal(size=(n * 20, dim)), rng.normal(size=n * 20), {}, "random", "regression", (),
        tuple(f"x{c}" for c in range(dim)),
    )  # fmt: skip
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(dim, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).double()
    problem = ModuleProblem(model, data, list(np.arange(n * 20).reshape(n, 20)), "mean_square", 1e-2, "uniform")
    waves = rate(dadao(problem, circulant(n)), 20_000, again=2)
    plain = rate(dadao(problem, circulant(n), player="plain"), 1000, again=2)
    autograd = numpy_rate(autograd_gradient(model, data), circulant(n), problem.dim, 3000)
    print(f"MLP of {problem.dim} parameters, n=100: waves {waves:.0f} events/s, one by one {plain:.0f},")
    print(f"  NumPy with ordinary autograd, one by one, {autograd:.0f}; ratio {waves / autograd:.1f}")


def autograd_gradient(model: torch.nn.Module, data: Data) -> Callable[[int, np.ndarray], np.ndarray]:
    """Return one node's gradient by `backward`, as a training script takes it."""
    a, b = torch.from_numpy(data.features).reshape(100, 20, -1), torch.from_numpy(data.labels).reshape(100, 20)
    parameters = list(model.parameters())

    def gradient(i: int, x: np.ndarray) -> np.ndarray:
        torch.nn.utils.vector_to_parameters(torch.from_numpy(x.copy()), parameters)
        model.zero_grad()
        (((model(a[i])[:, 0] - b[i]) ** 2).mean() + 0.005 * sum((p**2).sum() for p in parameters)).backward()
        return torch.nn.utils.parameters_to_vector(p.grad for p in parameters if p.grad is not None).numpy()

    return gradient


def report_table() -> None:
    """Print events per second (M) by n and dim, state up to 2 GB, beside the bandwidth of a copy."""
    dims = (10, 100, 1000, 10_000)
    print("copy of 100 MB: " + f"{_bandwidth():.1f} GB/s")
    print("n \\ dim    " + "".join(f"{dim:>10}" for dim in dims))
    for n in (100, 1000, 10_000, 100_000, 1_000_000):
        fits = [dim for dim in dims if n * dim * 48 <= 2e9]
        cells = [rate(dadao(diagonal(n, dim), circulant(n)), max(2 * n, 3_000_000 // dim), 2) for dim in fits]
        print(f"{n:<10} " + "".join(f"{cell / 1e6:>10.3f}" for cell in cells), flush=True)


def _bandwidth() -> float:
    source = np.ones(12_500_000)
    target = np.zeros_like(source)
    clock = time.perf_counter()
    for _ in range(5):
        np.copyto(target, source)
    return 5 * source.nbytes / (time.perf_counter() - clock) / 1e9


def report_million() -> None:
    """Play a torus of a million nodes for a while, and print speed and the largest memory."""
    clock = time.perf_counter()
    run = dadao(diagonal(1_000_000, 10), torus(1000))
    ready = time.perf_counter() - clock
    found = rate(run, 2_000_000, again=1)
    run.outputs()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"torus of 1,000,000 nodes, dim=10: ready after {ready:.0f} s, {found / 1e6:.2f} M events/s, {peak:.2f} GiB")


def main() -> None:
    """Print what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--million", action="store_true")
    chosen = parser.parse_args()
    prepare()
    reports: list[Callable[[], None]] = [report_kernel, report_long_rows, report_waves]
    if chosen.table or chosen.million:
        reports = [report_table] * chosen.table + [report_million] * chosen.million
    for report in reports:
        report()


if __name__ == "__main__":
    main()
