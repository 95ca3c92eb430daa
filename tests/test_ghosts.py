"""Rows of other ranks: who needs whose, and what is mixed while they travel."""

import numpy as np
import pytest
import torch
from threads import in_ranks

from fedsim.algorithms.requests import Gather, Mix
from fedsim.compression.compressors import build as build_compressor
from fedsim.engine.accelerator import DeviceNetwork
from fedsim.engine.counts import Counts
from fedsim.engine.ghosts import Ghosts
from fedsim.engine.layout import Layout
from fedsim.engine.mixing import by_position
from fedsim.engine.network import LocalNetwork
from fedsim.engine.streams import RoundDraws, Streams
from fedsim.errors import RunError
from fedsim.topology.build import build
from fedsim.topology.mixing import mixing_matrix
from fedsim.transport.links import ThroughHost

GRAPHS = ["path:n=12", "torus:4,5", "star:n=9", "random_regular:n=16,degree=4,seed=1", "complete:n=7"]


def asked(topology, transport, make, block=3):
    """Return the answers of one rank's blocks to `make(rows)`, rows being their node numbers plus fractions."""
    layout = Layout(topology, transport=transport)
    W = mixing_matrix(topology)
    adjacency = (W - W.multiply(np.eye(topology.n))).tocsr()
    blocks = [slice(a, min(a + block, layout.rows)) for a in range(0, layout.rows, block)]
    network = LocalNetwork(layout, blocks, {"W": W, "adjacency": adjacency}, Counts())
    x = layout.nodes[:, None] + np.linspace(0.1, 0.7, 5)
    return network.answer([make(torch.from_numpy(x[rows])) for rows in blocks])


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("size", [2, 3])
def test_rows_mixed_over_ranks_have_the_bits_of_one_process(graph, size):
    """Inner rows are mixed first, those with neighbours elsewhere when these have come; no sum changes."""
    topology = build(graph)
    alone = torch.cat(asked(topology, None, Mix))
    parts = in_ranks(size, lambda transport: torch.cat(asked(topology, transport, Mix)))
    assert torch.equal(torch.cat(parts), alone)


def test_gathered_rows_over_ranks_are_those_of_one_process():
    """Values, offsets and node numbers of all neighbours, whoever holds them."""
    topology = build("torus:4,5")
    alone = asked(topology, None, Gather)
    parts = in_ranks(2, lambda transport: asked(topology, transport, Gather))
    there = [part for answers in parts for part in answers]
    for name in ("values", "nodes"):
        ours = [torch.as_tensor(getattr(answer, name)) for answer in alone]
        assert torch.equal(torch.cat([torch.as_tensor(getattr(a, name)) for a in there]), torch.cat(ours))


@pytest.mark.parametrize("graph", GRAPHS)
def test_inner_rows_need_nobody_elsewhere(graph):
    """They are the longest run of rows all of whose neighbours lie on their own rank."""
    topology = build(graph)
    for rank in range(3):
        layout = Layout(topology, rank, 3)
        ghosts = Ghosts(layout)
        csr = ghosts.local(by_position(mixing_matrix(topology), topology))
        inner = ghosts.inner(csr)
        alone = [bool((csr[1][a:b] < layout.rows).all()) for a, b in zip(csr[0][:-1], csr[0][1:], strict=True)]
        assert all(alone[inner])
        text = "".join("x" if row else " " for row in alone)
        assert inner.stop - inner.start == max(map(len, text.split()), default=0)


def test_ranks_that_ask_for_different_things_are_told_apart():
    """Whoever is at another request is named, with both requests' numbers."""
    topology = build("path:n=6")
    other = lambda x: Mix(x, "adjacency")
    with pytest.raises(RunError, match=r"rank \d asks for Mix.* rank \d for something else"):
        in_ranks(2, lambda transport: asked(topology, transport, other if transport.rank else Mix))


def copied(topology, transport, device=False):
    """Return what four mixings of moved copies give, forgotten after two, and the bytes that each one took."""
    layout = Layout(topology, transport=transport)
    blocks = [slice(0, layout.rows)]
    parts = layout, blocks, {"W": mixing_matrix(topology)}, Counts()
    network = DeviceNetwork(*parts, torch.device("cpu"), ThroughHost(transport)) if device else LocalNetwork(*parts)
    compressor, streams = build_compressor({"kind": "top_k", "k": 2}, "c"), Streams(0)
    x = torch.from_numpy(layout.nodes[:, None] + np.linspace(0.1, 0.7, 64))
    found, took = [], []
    for k in range(4):
        if k == 2:
            network.forget()
        packet = compressor.compress(0.3 * x, RoundDraws(streams, layout.nodes, k), "x", (64,))
        x, before = x + packet.dense, transport.moved if transport else 0
        found.append(network.answer([Mix(packet, copies=x, name="x")])[0])
        took.append(transport.moved - before if transport else 0)
    return torch.stack(found, dim=1), took


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_copies_over_ranks_are_those_of_one_process_and_packets_alone_travel(size, device):
    """Every rank moves its neighbours' copies itself; whole ones come at first, and after they were forgotten."""
    topology = build("torus:4,5")
    alone, _ = copied(topology, None)
    parts = in_ranks(size, lambda transport: copied(topology, transport, device))
    assert torch.equal(torch.cat([rows for rows, _ in parts]), alone)
    for _, took in parts:
        assert took[0] == took[2] > 3 * took[1]
        assert took[1] == took[3]
