"""What a CUDA device buys: `python -m benchmarks.gpu` prints two tables; without a device it says so and ends.

Mixing: the device's network against a copy of the same rows on the device. Rounds of D-PSGD on networks: fedsim on the
device against fedsim on one core, and against a script of one's own in plain torch on the same device (vmap of the
gradient, a sparse matrix times the rows, batches drawn there).
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch.func import functional_call, grad, vmap

from benchmarks.modules import networks
from fedsim.algorithms.algorithm import Sampling
from fedsim.algorithms.requests import Mix
from fedsim.algorithms.sgd import DPSGD
from fedsim.engine.accelerator import DeviceNetwork
from fedsim.engine.counts import Counts
from fedsim.engine.layout import Layout
from fedsim.engine.machine import prepare, usable
from fedsim.engine.rounds import Rounds
from fedsim.problems.models.lenet5 import LeNet5
from fedsim.problems.models.mlp import mlp
from fedsim.problems.models.transformer import Transformer
from fedsim.problems.module import ModuleProblem
from fedsim.topology.build import build
from fedsim.topology.mixing import mixing_matrix
from fedsim.topology.topology import Topology
from fedsim.transport.local import LocalTransport

ETA = 1e-3
SHAPES = ((1000, 10_000), (2000, 1000), (10_000, 1000), (10_000, 100))
CASES: dict[str, tuple[int, int, Callable[[], torch.nn.Module]]] = {  # n, batch, model
    "mlp, n=100, batch 8": (100, 8, lambda: mlp(64, 10, [100, 23], 0)),
    "mlp, n=2,500, batch 8": (2500, 8, lambda: mlp(64, 10, [100, 23], 0)),
    "lenet5, n=100, batch 32": (100, 32, lambda: LeNet5(784, 10)),
    "transformer, n=100, batch 8": (100, 8, lambda: Transformer(64, 78)),
    "transformer, n=1,024, batch 8": (1024, 8, lambda: Transformer(64, 78)),
}


def torus(n: int) -> Topology:
    """Return the torus that is nearest to a square."""
    a = max(a for a in range(3, int(n**0.5) + 1) if n % a == 0)
    return build(f"torus:{a},{n // a}")


GRAPHS: dict[str, Callable[[int], Topology]] = {
    "torus": torus,
    "random 8-regular": lambda n: build(f"random_regular:n={n},degree=8,seed=0"),
}


def median(call: Callable[[], object], seconds: float = 1.0) -> float:
    """Return seconds per call on the device; the calls before are not counted."""
    times: list[float] = []
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        begin = time.perf_counter()
        for _ in range(5):
            call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / 5)
    return float(np.median(times))


def rounds(topology: Topology, problem: ModuleProblem, x0: torch.Tensor, size: int) -> Rounds:
    """Return a player of D-PSGD whose rows lie where x0 does."""
    layout, device = Layout(topology), str(x0.device)
    problem.use(device)
    links = None if device == "cpu" else LocalTransport().links(device, True)
    block = "auto" if links is None else topology.n
    algorithm = DPSGD(eta=ETA, batch=Sampling(size))
    player = Rounds(algorithm, problem, layout, {"W": mixing_matrix(topology)}, x0, 0, block, links=links)
    player.start()
    return player


def mixings(device: str) -> None:
    """Print the table of mixings."""
    print("| mixing on the device | dtype | ms | a copy of the rows, ms | times a copy |\n|---|---|---|---|---|")
    for n, dim in SHAPES:
        for name, made in GRAPHS.items():
            topology = made(n)
            parts = Layout(topology), [slice(0, n)], {"W": mixing_matrix(topology)}, Counts()
            network = DeviceNetwork(*parts, torch.device(device), LocalTransport().links(device, True))
            for dtype in (torch.float32, torch.float64):
                x = torch.randn(n, dim, dtype=dtype, device=device)
                out = torch.empty_like(x)
                ours = median(lambda: network.answer([Mix(x)]), 0.2)  # noqa: B023
                copy = median(lambda: out.copy_(x), 0.2)  # noqa: B023
                line = f"| {name}, [{n:,}, {dim:,}] | {str(dtype)[6:]} | {1e3 * ours:.3f} | {1e3 * copy:.3f} |"
                print(line, f"{ours / copy:.2f} |", flush=True)


def script(problem: ModuleProblem, topology: Topology, x: torch.Tensor, size: int) -> Callable[[], None]:
    """Return one round of D-PSGD as one would write it for the device, by torch alone."""
    model, device = problem._model, x.device
    names = {name: p.shape for name, p in model.named_parameters()}
    sizes = [shape.numel() for shape in names.values()]
    a, b = problem._tensors(problem.data)
    own = torch.from_numpy(np.stack(problem.parts)).to(device)
    W = torch.from_numpy(mixing_matrix(topology).toarray()).to(device, x.dtype).to_sparse_csr()

    def loss(row: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        parts = {n: p.view(s) for (n, s), p in zip(names.items(), row.split(sizes), strict=True)}
        output = functional_call(model, parts, (a,))
        if output.ndim == 3:
            output, b = output.flatten(0, 1), b.flatten()
        return torch.nn.functional.cross_entropy(output, b)

    gradients, state = vmap(grad(loss)), [x]

    def play() -> None:
        chosen = own.gather(1, torch.randint(0, own.shape[1], (len(own), size), device=device))
        state[0] = W @ (state[0] - ETA * gradients(state[0], a[chosen], b[chosen]))

    return play


def played(device: str) -> None:
    """Print the table of rounds."""
    print("| a round of D-PSGD on a torus, float32 | device, ms | own script on it | ratio | one core, ms | ratio |")
    print("|---|---|---|---|---|---|")
    for name, (n, size, made) in CASES.items():
        problem = networks(n, name, made(), "float32")
        topology = torus(n)
        x0 = problem.start(np.arange(n))
        player = rounds(topology, problem, x0.to(device), size)
        ours = median(lambda: player.advance(player.now + 1), 2.0)  # noqa: B023
        theirs = median(script(problem, topology, x0.to(device), size), 2.0)
        slow = rounds(topology, problem, x0, size)
        begin = time.perf_counter()
        slow.advance(1)
        if time.perf_counter() - begin < 5.0:
            begin = time.perf_counter()
            slow.advance(2)
        core = time.perf_counter() - begin
        line = f"| {name} | {1e3 * ours:.2f} | {1e3 * theirs:.2f} | {theirs / ours:.2f} | {1e3 * core:.0f} |"
        print(line, f"{core / ours:.0f} |", flush=True)


def main() -> None:
    """Print the tables."""
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here: nothing is measured")
    prepare()
    warnings.filterwarnings("ignore", "Sparse")  # torch's, about the state of its sparse matrices
    device = usable("cuda", LocalTransport()).name
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    mixings(device)
    played(device)


if __name__ == "__main__":
    main()
