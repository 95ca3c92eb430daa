"""Whole runs on a CUDA device, which most machines that run the tests do not have: `pytest tests/test_cuda.py`."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from far_runs import RUNS, scenario
from launching import command, launch, needs_mpi, with_horizon
from test_accelerator import REQUESTS, answers

import fedsim
from fedsim.engine.device_sums import Fused, Passes, can_fuse
from fedsim.problems.data.table import Data
from fedsim.problems.module import ModuleProblem
from fedsim.problems.problem import Minibatch
from fedsim.topology.build import build
from fedsim.topology.mixing import mixing_matrix
from fedsim.transport.links import ThroughHost
from fedsim.transport.local import LocalTransport

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

CLOSE = {"float64": 1e-10, "float32": 1e-4}
DIGITS = {"kind": "module", "data": {"kind": "digits"}, "partition": {"kind": "iid"}}
TEXT = {"kind": "python_docs", "sequence": 16, "held_out": 0.99}
OTHERS = {
    "convolutions": {"problem": {**DIGITS, "model": "residual_cnn"}, "algorithm": {"kind": "dpsgd", "eta": 0.1}},
    "samples": {
        "problem": {**DIGITS, "model": "mlp", "hidden": [16], "l2": 0.01, "weights": "samples"},
        "algorithm": {"kind": "dproxsgt", "eta": 0.05, "batch": {"size": 8}},
    },
    "transformer": {
        "problem": {"kind": "module", "model": "transformer", "data": TEXT, "partition": {"kind": "iid"}},
        "algorithm": {"kind": "dproxsgt", "eta": 0.05, "batch": {"size": 8}},
    },
    "events": {
        "problem": {**DIGITS, "model": "mlp", "hidden": [16]},
        "algorithm": {"kind": "gossip_sgd", "step": 0.05, "batch": {"size": 8}},
    },
    "private": {
        "problem": {**DIGITS, "model": "mlp", "hidden": [16]},
        "topology": {"kind": "server", "n": 5},
        "privacy": {"unit": "user", "epsilon": 8.0, "delta": 1.0e-3},
        "algorithm": {"kind": "dp_fedavg", "eta": 0.1, "clip_model": 1.0, "local_steps": 2},
    },
}


def on(device, dtype, name):
    """Return a scenario for a device."""
    found = scenario(name) if name in RUNS else {**scenario("dpsgd"), **OTHERS[name]}
    return {**found, "problem": {**found["problem"], "dtype": dtype}, "engine": {"device": device}}


def assert_close(ours, theirs, dtype):
    """Counts are equal, what is measured agrees to the rounding of the type."""
    assert list(ours) == list(theirs)
    for name in (c for c in theirs if c not in ("wall_seconds", "variant")):
        assert np.allclose(ours[name], theirs[name], rtol=CLOSE[dtype], atol=CLOSE[dtype] / 1000), name


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("name", [*RUNS, *OTHERS])
def test_a_run_agrees_with_the_cpu_s(name, dtype, tmp_path):
    """Every kind of synchronous algorithm, and of gradients: equal counts, metrics to the stated tolerance."""
    there = fedsim.run(on("cuda", dtype, name), folder=tmp_path / "cuda")
    here = fedsim.run(on("cpu", dtype, name), folder=tmp_path / "cpu")
    assert there.facts["problem"]["device"].startswith("cuda")
    assert_close(there.metrics, here.metrics, dtype)


@pytest.mark.parametrize("name", REQUESTS)
def test_the_device_answers_and_charges_as_the_cpu_does(name):
    """Every request: the same counts, and values to rounding."""
    ours, counts = answers(LocalTransport(), REQUESTS[name], ThroughHost(LocalTransport()), "cuda")
    theirs, same = answers(LocalTransport(), REQUESTS[name])
    assert counts == same
    assert all(torch.allclose(a, b, rtol=1e-14, atol=1e-14) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dim", [1, 7, 1500])
@pytest.mark.parametrize("graph", ["star:300", "random_geometric:n=200,radius=0.2,seed=0"])
def test_sums_over_neighbours_are_as_exact_as_the_cpu_s(graph, dim, dtype):
    """By the kernel, which adds float32 in float64, and by passes; only the rows that are named are written."""
    W = mixing_matrix(build(graph)).tocsr()
    csr = W.indptr.astype(np.int64), W.indices.astype(np.int64), W.data
    x = torch.randn(W.shape[0], dim, dtype=dtype, generator=torch.Generator().manual_seed(0))
    exact = torch.from_numpy(W @ x.double().numpy())
    assert can_fuse(torch.device("cuda:0"))
    for way, tolerance in ((Fused, 1.0), (Passes, 20.0)):
        out = torch.full_like(x, 7.0).cuda()
        way.of(csr, np.arange(1, len(x)), out.device).write(out, x.cuda())
        assert (out[0] == 7.0).all()
        assert (out[1:].cpu() - exact[1:]).abs().max() <= tolerance * torch.finfo(dtype).eps * x.abs().max()


class Careful(torch.nn.Linear):
    """A model that looks at a value as it goes, which no recording can follow."""

    def forward(self, x):
        """Return the scores."""
        return super().forward(x) + 0 * x.mean().cpu().to(x.device)


@pytest.mark.parametrize("model", [torch.nn.Linear, Careful])
def test_recorded_gradients_are_those_of_the_function(model):
    """Call after call with other models and records; what cannot be recorded is called as ever."""
    rng = np.random.default_rng(0)
    data = Data(rng.normal(size=(60, 6)), np.arange(60) % 3, {}, "drawn", "multiclass", ("a", "b", "c"))
    problem = ModuleProblem(model(6, 3), data, list(np.arange(60).reshape(5, 12)), "cross_entropy")
    nodes = np.arange(5)
    cases = [(torch.from_numpy(rng.normal(size=(5, problem.dim))), rng.integers(0, 12, (5, 4))) for _ in range(8)]
    batches = [(x, Minibatch(chosen, np.full((5, 4), 0.25))) for x, chosen in cases]
    here = [problem.gradient(x, nodes, batch) for x, batch in batches]
    problem.use("cuda")
    there = [problem.gradient(x.cuda(), nodes, batch) for x, batch in batches]
    assert all(torch.allclose(a, b.cpu(), rtol=1e-12, atol=1e-14) for a, b in zip(here, there, strict=True))
    assert bool(problem._rows._recorded._graphs) == (model is not Careful)


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path):
    """On the same device, from a checkpoint; and a repeated run has those of the first."""
    case = {**on("cuda", "float32", "top-k"), "schedule": {"horizon": 9}}
    whole, again = (fedsim.run(case, folder=tmp_path / name) for name in ("whole", "again"))
    fedsim.run({**case, "schedule": {"horizon": 4}}, folder=tmp_path / "cut")
    with_horizon(tmp_path / "cut", 4, 9)
    assert fedsim.resume(tmp_path / "cut").digest == whole.digest == again.digest


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A file with every run of `far_runs` on two types, and what one process finds on its device."""
    folder = tmp_path_factory.mktemp("study")
    cases = {f"{name} {dtype}": on("cuda", dtype, name) for name in RUNS for dtype in CLOSE}
    first = next(iter(cases.values()))
    (folder / "s.yaml").write_text(json.dumps({"name": "cuda", **first, "variants": cases}))
    return folder / "s.yaml", fedsim.run(folder / "s.yaml", folder=folder / "alone")


def assert_same_study(folder, alone):
    there = fedsim.load(folder)
    for ours, theirs in zip(there.runs, alone.runs, strict=True):
        assert_close(ours.metrics, theirs.metrics, "float32" if "float32" in theirs.variant else "float64")
        assert ours.facts["wire_bytes"] > 0


@pytest.mark.parametrize("kind", [pytest.param("mpi", marks=needs_mpi), "torch"])
def test_two_processes_agree_with_one(study, kind, tmp_path):
    """Under mpirun and torchrun as they are; where both share a device, rows go through host memory."""
    file, alone = study
    done = launch(kind, 2, "run", file, "--folder", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_study(tmp_path / "out", alone)


def _nccl(*arguments):
    line = command("torch", 2, Path(__file__).with_name("cuda_rank.py"), *arguments)
    done = subprocess.run(line, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_nccl_moves_what_host_memory_does():
    """The same answers, to the bit, and counts for every request."""
    assert sorted(re.findall(r"rank \d agrees", _nccl())) == ["rank 0 agrees", "rank 1 agrees"]


def test_two_processes_over_nccl_agree_with_one(study, tmp_path):
    """Whole runs whose rows travel by NCCL."""
    file, alone = study
    _nccl(file, tmp_path / "out")
    assert_same_study(tmp_path / "out", alone)


def test_doctor_names_the_device(tmp_path):
    """And NCCL's release."""
    done = launch("local", 1, "doctor", cwd=tmp_path)
    assert torch.cuda.get_device_name(0) in done.stdout
    assert re.search(r"NCCL \d+\.\d+", done.stdout)
