"""States on an accelerator: the network's answers and counts, and whole runs on a device that is not there."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from far import SETUP
from far_runs import RUNS
from threads import in_ranks

from fedsim.algorithms.requests import Gather, Mean, Mix, Route, Sum
from fedsim.compression.compressors import TopK, compressed
from fedsim.engine.accelerator import DeviceNetwork
from fedsim.engine.counts import Counts
from fedsim.engine.layout import Layout
from fedsim.engine.network import LocalNetwork
from fedsim.problems.recorded import CALLS, GRAPHS, Recorded
from fedsim.topology.build import build
from fedsim.topology.mixing import mixing_matrix
from fedsim.topology.spectral import laplacian
from fedsim.transport.links import ThroughHost, own_device
from fedsim.transport.local import LocalTransport

needs_far = pytest.mark.skipif(SETUP is None, reason="this torch cannot pretend a device (2.9 and later can)")
MASK = np.arange(11) % 3 != 1


def weights(nodes):
    return torch.from_numpy(1.0 + nodes % 4)


def routed(nodes, x):
    """Every node sends item k to node `7 node + k`, some to itself."""
    to = np.concatenate([(7 * node + np.arange(node % 4)) % 11 for node in nodes]).astype(np.int64)
    source = np.repeat(np.arange(len(nodes)), nodes % 4)
    return Route(x[source] + torch.arange(len(to), device=x.device)[:, None], to, source)


REQUESTS = {
    "mix": lambda nodes, x: Mix(x),
    "laplacian": lambda nodes, x: Mix(x, "laplacian"),
    "packet": lambda nodes, x: Mix(compressed(TopK(k=2), x, None, "", [5])),
    "gather": lambda nodes, x: Gather(x),
    "sum": lambda nodes, x: Sum(x),
    "weighted": lambda nodes, x: Mean(x, weights(nodes).to(x.device)),
    "some": lambda nodes, x: Mean(x, weights(nodes).to(x.device), MASK),
    "whole numbers": lambda nodes, x: Sum((1000 * x).long()),
    "route": routed,
}


def answers(transport, make, links=None, device="cpu"):
    """Return a rank's answers to a request, as tensors, and its counts; with links those of the device network."""
    topology, counts = build("random_regular:n=11,degree=4,seed=0"), Counts()
    layout = Layout(topology, transport=transport)
    W, lap = mixing_matrix(topology), laplacian(topology)
    adjacency = (W - W.multiply(np.eye(11))).tocsr()
    parts = layout, [slice(0, layout.rows)], {"W": W, "laplacian": lap, "adjacency": adjacency}, counts
    x = torch.from_numpy(layout.nodes[:, None] + np.linspace(-9.1, 0.7, 5)).to(device)
    network = DeviceNetwork(*parts, x.device, links) if links else LocalNetwork(*parts)
    (answer,) = network.answer([make(layout.nodes, x)])
    found = [answer] if isinstance(answer, torch.Tensor) else [torch.as_tensor(v) for v in vars(answer).values()]
    return [value.cpu() for value in found], counts.as_dict()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", REQUESTS)
def test_the_device_network_answers_and_charges_as_the_cpu_s_does(name, size):
    """On CPU tensors: the same bits and the same counts for every request, on any number of ranks."""
    for ours, theirs in zip(
        in_ranks(size, lambda t: answers(t, REQUESTS[name], ThroughHost(t))),
        in_ranks(size, lambda t: answers(t, REQUESTS[name])),
        strict=True,
    ):
        assert all(torch.equal(a, b) for a, b in zip(ours[0], theirs[0], strict=True))
        assert ours[1] == theirs[1]


@pytest.fixture(scope="module")
def far_away(tmp_path_factory):
    """Every run on the CPU and on the device, which torch must know before its first gradient: in a new process."""
    script = Path(__file__).with_name("far_runs.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path_factory.mktemp("far")], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@needs_far
@pytest.mark.parametrize("name", RUNS)
def test_a_run_keeps_to_its_device(name, far_away):
    """No operation meets tensors of two devices, and metrics and counts are those of the CPU."""
    found = far_away["runs"][name]
    assert found["device"] == "far:0"
    assert found["there"].keys() == found["here"].keys()
    for column, values in found["here"].items():
        assert np.allclose(found["there"][column], values, rtol=1e-12, atol=1e-25), column


@needs_far
def test_a_resumed_run_goes_back_to_its_device(far_away):
    """What a checkpoint holds is put back where it was: the digest of an uninterrupted run."""
    assert far_away["resumed"] == far_away["whole"]


@needs_far
def test_the_pretended_device_refuses_what_cuda_would(far_away):
    """Otherwise the tests above prove nothing."""
    assert "far:0 and cpu" in far_away["refused"]


class Away(NamedTuple):
    """What is asked of an argument before its values are."""

    shape: tuple[int, ...]
    device: torch.device = torch.device("cuda")
    dtype: torch.dtype = torch.float32


@pytest.fixture
def recordings(monkeypatch):
    """Have functions recorded as a word; those whose name begins with `no` cannot be."""

    def record(self, arguments):
        if self._function().startswith("no"):
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda *_: "recorded"

    monkeypatch.setattr(Recorded, "_record", record)
    return lambda word: Recorded(lambda *_: word)


def test_a_function_is_recorded_when_its_shapes_have_come_often_enough(recordings):
    """Each number of rows by itself, and no more of them than there is room for; on the CPU never."""
    one = recordings("one")
    assert [one(Away((3, 2))) for _ in range(CALLS + 2)] == ["one"] * CALLS + ["recorded"] * 2
    assert one(Away((4, 2))) == "one"
    found = [one(Away((rows, 2))) for rows in range(5, 5 + GRAPHS) for _ in range(CALLS + 1)]
    assert found.count("recorded") == GRAPHS - 1
    assert {one(Away((3, 2), torch.device("cpu"))) for _ in range(CALLS + 2)} == {"one"}


def test_what_cannot_be_recorded_is_tried_once(recordings):
    """And called as ever."""
    never = recordings("no")
    assert {never(Away((3,))) for _ in range(3 * CALLS)} == {"no"}
    assert never._refused


def test_one_function_at_a_time_holds_memory(recordings):
    """A study plays one problem after another: what is recorded of the earlier one goes, and may come again."""
    first, second = recordings("first"), recordings("second")
    for function in (first, second, first):
        words = [function(Away((3,))) for _ in range(CALLS + 1)]
        assert words[0] != "recorded"
        assert words[-1] == "recorded"


def test_processes_of_a_host_take_its_devices_in_turn():
    """Three on two devices share one; two have one each."""
    assert in_ranks(3, lambda t: own_device(2, t, str)) == [(0, False), (1, False), (0, False)]
    assert in_ranks(2, lambda t: own_device(2, t, str)) == [(0, True), (1, True)]
    assert own_device(1, LocalTransport(), str) == (0, True)


def test_processes_that_see_one_device_each_may_have_different_ones():
    """Schedulers show every process its own device as number 0; names tell them apart."""
    assert in_ranks(2, lambda t: own_device(1, t, lambda i: f"GPU-{t.rank}")) == [(0, True), (0, True)]
    assert in_ranks(2, lambda t: own_device(1, t, lambda i: "GPU-0")) == [(0, False), (0, False)]
