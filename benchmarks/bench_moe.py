"""Mixtures of experts: selection beside torch.topk, all-to-all beside the bare collective, the exact assignment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.algorithms.router_replay import RouterReplay
from fedsim.engine.layout import Layout
from fedsim.engine.machine import prepare
from fedsim.engine.rounds import Rounds
from fedsim.moe.oracle import exact_assignment
from fedsim.moe.selection import select
from fedsim.problems.build import build
from fedsim.setting import RunSetting
from fedsim.topology.topology import Topology

prepare()


def _scores(tokens: int, experts: int) -> np.ndarray:
    logits = np.random.default_rng(0).standard_normal((tokens, experts)) + np.linspace(-1, 1, experts)
    return 1 / (1 + np.exp(-logits))


def _rounds():
    """Return what plays one more round of a replay of `_scores(65_536, 256)` on four hosts, without the optimum."""
    topology = Topology.server(4)
    sizes = {"tokens": 65_536, "moe_num_experts": 256, "moe_top_k": 8, "seed": 0}
    problem = build({"kind": "router_scores", **sizes}, 4, 0, Path())
    algorithm = RouterReplay(oracle="none").resolve(RunSetting(problem, topology))
    start = torch.zeros(4, problem.dim, dtype=torch.float64)
    player = Rounds(algorithm, problem, Layout(topology), {}, start, seed=0, block="auto")
    player.start()
    return lambda: player.advance(round(player.now) + 1)


@pytest.mark.parametrize("how", ["selection", "a whole round", "torch.topk and histogram"])
def bench_replay_step(benchmark, how):
    """T = 65,536, E = 256, K = 8: selection with loads and sums, and a round of a replay, beside topk and histogram."""
    benchmark.group = "routing T=65536 E=256 K=8"
    scores = _scores(65_536, 256)
    bias, tensor = np.linspace(0.2, -0.2, 256), torch.from_numpy(scores)
    shifted = torch.from_numpy(bias)

    def plain():
        _, chosen = torch.topk(tensor + shifted, 8, dim=1)
        return torch.bincount(chosen.reshape(-1), minlength=256)

    ours = select(scores, bias, 8).loads
    assert (torch.from_numpy(ours) == plain()).all()
    played = plain if how == "torch.topk and histogram" else lambda: select(scores, bias, 8)
    benchmark.pedantic(_rounds() if how == "a whole round" else played, rounds=5, warmup_rounds=1)


def bench_exact_assignment(benchmark):
    """T = 4,096, E = 64, K = 6 with proof of optimality (the bound is compared inside)."""
    benchmark.group = "exact assignment T=4096 E=64 K=6"
    scores = _scores(4_096, 64)
    exact_assignment(scores[:64], 6)
    found = benchmark.pedantic(lambda: exact_assignment(scores, 6), rounds=3)
    assert abs(found.bound - found.value) < 1e-8


RANK = """
import json, sys, time
import numpy as np, torch
from fedsim.algorithms.requests import Route
from fedsim.engine.counts import Counts
from fedsim.engine.layout import Layout
from fedsim.engine.network import LocalNetwork
from fedsim.engine.machine import prepare
from fedsim.job import connected
from fedsim.topology.topology import Topology
from fedsim.transport.transport import as_bytes
prepare()
transport = connected()
hosts, tokens, top_k, width = int(sys.argv[1]), 16384 // int(sys.argv[1]), 2, 256
layout = Layout(Topology.server(hosts), transport=transport)
network = LocalNetwork(layout, [slice(0, layout.rows)], {}, Counts())
rng = np.random.default_rng(transport.rank)
to = np.sort(rng.integers(0, hosts, (layout.rows, tokens * top_k)), axis=1)
rows = torch.from_numpy(rng.standard_normal((layout.rows * tokens * top_k, width)).astype(np.float32))
source = np.arange(layout.rows).repeat(tokens * top_k)
def there_and_back():
    (a,) = network.answer([Route(rows, to.ravel(), source)])
    (b,) = network.answer([Route(a.values, a.source, np.arange(layout.rows).repeat(np.diff(a.offsets)))])
    return a, b
a, b = there_and_back()
assert torch.equal(b.values, rows)
owner = layout.owner(to.ravel())
send = [int((owner == r).sum()) * width * 4 for r in range(transport.size)]
back = [int((layout.owner(a.source) == r).sum()) * width * 4 for r in range(transport.size)]
one, two = as_bytes(rows.numpy()), as_bytes(a.values.numpy())
def bare():
    transport.all_to_all(one, send, back)
    transport.all_to_all(two, back, send)
def least(play):
    best = 9e9
    for _ in range(15):
        transport.all_gather(np.zeros(1, np.uint8))
        clock = time.perf_counter()
        play()
        best = min(best, time.perf_counter() - clock)
    return best
found = {"route": least(there_and_back), "bare": least(bare)}
if transport.rank == 0:
    print(json.dumps(found), flush=True)
transport.close()
"""


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("kind", ["mpi", "torch"])
def bench_dispatch_and_combine(benchmark, kind, hosts, tmp_path):
    """Two ranks, 16 MB a rank there and back: Route with its ordering, against the bare all-to-all."""
    benchmark.group = f"dispatch and combine, {hosts} hosts"
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    mpirun = Path(sys.executable).parent / "mpirun"
    start = [mpirun, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable]
    if kind == "torch":
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    here = {**os.environ, "OMP_NUM_THREADS": "1"}

    def play():
        done = subprocess.run(
            [str(s) for s in (*start, script, hosts)], capture_output=True, text=True, env=here, check=True
        )
        return json.loads(done.stdout.strip().splitlines()[-1])

    found = benchmark.pedantic(play, rounds=1)
    benchmark.extra_info.update(found)
    ratio = found["route"] / found["bare"]
    times = f"Route {1e3 * found['route']:.1f} ms, bare {1e3 * found['bare']:.1f} ms"
    print(f"{kind}, {hosts} hosts: {times}, ratio {ratio:.2f}")
