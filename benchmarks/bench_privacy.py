"""What privacy costs in time: clipping per record against plain gradients, calibration, accounting."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.func import grad, vmap

from fedsim.engine.machine import prepare
from fedsim.privacy.clipping import Clip, clipped_sum
from fedsim.privacy.gaussian import mu_of
from fedsim.privacy.plan import Planned, _calibrated, multipliers
from fedsim.privacy.section import Privacy
from fedsim.problems.dense import SLOPES, DenseRecords, Layer, softplus

RECORDS, WIDTHS = 256, (784, 256, 10)
OWN_SCRIPT = """
import time
import torch
torch.set_num_threads(1)
from benchmarks.bench_privacy import Network
network, took = Network(), []
for _ in range(8):
    begin = time.perf_counter()
    network.vmapped()
    took.append(time.perf_counter() - begin)
print(min(took))
"""


@pytest.fixture(autouse=True)
def settings():
    """Have the settings of a run; a script of one's own has not."""
    prepare()


class Network:
    """784-256-10 with softplus on 256 random records, at two close points, float32."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.features = torch.rand(RECORDS, WIDTHS[0], generator=generator)
        self.labels = torch.randint(0, WIDTHS[2], (RECORDS,), generator=generator)
        self.layers = [Layer(inner, outer) for inner, outer in pairwise(WIDTHS)]
        shapes = [s for layer in self.layers for s in ((layer.outputs, layer.inputs), (layer.outputs,))]
        self.x = torch.cat([torch.randn(s, generator=generator).reshape(-1) * s[-1] ** -0.5 for s in shapes])
        self.y = self.x + 1e-3 * torch.randn(len(self.x), generator=generator)
        self.shapes = shapes
        self.records = DenseRecords(
            self.layers, "softplus", SLOPES["cross_entropy"], lambda *_: (self.features, self.labels)
        )

    def loss(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of records `a [m, 784]` with labels b at flat parameters."""
        parts = x.split([torch.Size(s).numel() for s in self.shapes])
        w, v, u, t = (p.reshape(s) for p, s in zip(parts, self.shapes, strict=True))
        output = softplus(a @ w.T + v) @ u.T + t
        return (output.logsumexp(dim=1) - output.gather(1, b[:, None])[:, 0]).mean()

    def ghost(self) -> torch.Tensor:
        """Return the clipped sum of differences, by factors."""
        weights = np.full(RECORDS, 1 / RECORDS)
        return clipped_sum(self.records, 0, np.arange(RECORDS), weights, self.x, Clip(1e-2), self.y)

    def vmapped(self) -> torch.Tensor:
        """Return the same by two `vmap(grad)` calls, which write every gradient down."""
        each = vmap(grad(lambda x, a, b: self.loss(x, a[None], b[None])), in_dims=(None, 0, 0))
        d = each(self.x, self.features, self.labels) - each(self.y, self.features, self.labels)
        return (d * (1e-2 / d.norm(dim=1)).clamp(max=1)[:, None]).sum(dim=0) / RECORDS

    def pair(self) -> torch.Tensor:
        """Return the difference of two ordinary batch gradients, without any clipping."""
        slope = grad(self.loss)
        return slope(self.x, self.features, self.labels) - slope(self.y, self.features, self.labels)


@pytest.mark.parametrize("how", ["ghost", "pair", "vmapped"])
def bench_difference_clipping(benchmark, how):
    """Clipped differences of 256 records on 784-256-10, against two vmap(grad) calls and a plain pair of gradients."""
    benchmark.group = "differences of 256 records, 784-256-10"
    network = Network()
    expected = network.vmapped()
    assert torch.allclose(network.ghost(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    benchmark(getattr(network, how))


def bench_difference_clipping_in_a_script_of_ones_own(benchmark):
    """The same against vmap(grad) without fedsim's memory settings, which speed up 400 MB of writes."""
    benchmark.group = "differences of 256 records, 784-256-10"
    done = subprocess.run([sys.executable, "-c", OWN_SCRIPT], capture_output=True, text=True, check=True)
    benchmark(Network().ghost)
    ratio = float(done.stdout) / benchmark.stats.stats.min
    print(f"\nclipped differences: {ratio:.0f} times as fast as two vmap(grad) calls in a script of one's own")


def bench_calibration(benchmark):
    """Noise multipliers of a 2,000-round schedule (target: 50 ms)."""
    benchmark.group = "calibration"
    plan = (Planned("refresh", 100, 0.8), Planned("difference", 1900, 0.2))

    def calibrate():
        mu_of.cache_clear()
        _calibrated.cache_clear()
        return multipliers(Privacy(1e-5, 3.0), plan)

    benchmark(calibrate)


@pytest.mark.parametrize("algorithm", ["diff2_gd", "diff2_bvr_l_sgd"])
def bench_accounting(benchmark, tmp_path, algorithm):
    """Share of a run's time that ledger, budget and epsilon column take (target: 1 %), network on 16,000 records."""
    import fedsim

    benchmark.group = "accounting inside a run"
    parameters = {"kind": algorithm, "eta": 0.1, "restart_period": 20, "clip_grad": 3.0, "clip_diff": 5.0}
    if algorithm != "diff2_gd":
        parameters |= {"clip_local": 5.0, "local_steps": 3, "batch_rate": 0.1}
    content = {
        "topology": {"kind": "server", "n": 10},
        "problem": {
            "kind": "module", "hidden": [10], "activation": "softplus",
            "data": {"kind": "teacher_network", "records": 16_000, "normalise": "columns"},
        },
        "start": {"kind": "problem"},
        "algorithm": parameters,
        "privacy": {"epsilon": 3.0, "delta": 1e-5, "relation": "zero_out"},
        "schedule": {"horizon": 300},
        "record": {"every": 100, "metrics": ["loss"]},
    }  # fmt: skip
    count = 0

    def run():
        nonlocal count
        count += 1
        begin = time.perf_counter()
        facts = fedsim.run(content, folder=tmp_path / str(count)).facts
        return facts["privacy"]["accounting_seconds"] / (time.perf_counter() - begin)

    benchmark.pedantic(run, rounds=1, warmup_rounds=1)
    benchmark.extra_info["share of the run"] = run()
    print(f"\naccounting takes {100 * benchmark.extra_info['share of the run']:.2f} % of a run of {algorithm}")
