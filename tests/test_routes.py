"""Route: rows addressed to nodes, against a list of items per node; any block, any number of ranks."""

import numpy as np
import pytest
import torch
from threads import in_ranks

from fedsim.algorithms.requests import Route
from fedsim.engine.counts import Counts
from fedsim.engine.layout import Layout
from fedsim.engine.network import LocalNetwork
from fedsim.engine.routes import taken
from fedsim.errors import RunError
from fedsim.topology.topology import Topology

N, DIM = 7, 3


def items(seed, dtype=torch.float64, most=6):
    """Return for every node number what it sends: values and destinations."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, most + 1, N)
    return [(torch.from_numpy(rng.normal(size=(c, DIM))).to(dtype), rng.integers(0, N, c)) for c in counts]


def expected(sent):
    """Return for every node number the values and senders that it gets: the text of `Route` as loops."""
    found = [([], []) for _ in range(N)]
    for node, (values, to) in enumerate(sent):
        for value, target in zip(values, to, strict=True):
            found[target][0].append(value)
            found[target][1].append(node)
    return found


def played(sent, topology, size=1, block=N):
    """Return what every node number gets, and the counts added up over ranks."""

    def rank_plays(transport):
        layout = Layout(topology, transport=transport)
        blocks = [slice(b, min(b + block, layout.rows)) for b in range(0, layout.rows, block)]
        counts, got = Counts(), {}
        network = LocalNetwork(layout, blocks, {}, counts)
        requests = []
        for rows in blocks:
            own = [sent[node] for node in layout.nodes[rows]]
            source = np.repeat(np.arange(len(own)), [len(to) for _, to in own])
            requests.append(Route(torch.cat([v for v, _ in own]), np.concatenate([t for _, t in own]), source))
        for rows, answer in zip(blocks, network.answer(requests), strict=True):
            for row, node in enumerate(layout.nodes[rows]):
                a, b = answer.offsets[row], answer.offsets[row + 1]
                got[int(node)] = answer.values[a:b].clone(), answer.source[a:b].copy()
        return got, counts.as_dict()

    parts = in_ranks(size, rank_plays)
    totals = [counts for _, counts in parts]
    return {k: v for got, _ in parts for k, v in got.items()}, {k: sum(t[k] for t in totals) for k in totals[0]}


def orders():
    import networkx as nx

    shuffled = nx.relabel_nodes(nx.path_graph(N), dict(enumerate([3, 0, 6, 2, 5, 1, 4])))
    return [Topology.server(N), Topology.from_networkx(shuffled)]


@pytest.mark.parametrize("topology", orders(), ids=["server", "shuffled path"])
@pytest.mark.parametrize(("size", "block"), [(1, 7), (1, 1), (1, 3), (2, 7), (3, 2), (7, 1)])
def test_items_arrive_ordered_on_every_layout(topology, size, block):
    """Destination, then source node, then place; the same bits and charges for every block and number of ranks."""
    for seed in range(4):
        sent = items(seed, torch.float32 if seed == 3 else torch.float64)
        got, counts = played(sent, topology, size, block)
        pairs = {(n, int(t)) for n, (_, to) in enumerate(sent) for t in to if t != n}
        moved = sum(int((to != n).sum()) for n, (_, to) in enumerate(sent))
        for node, (values, source) in enumerate(expected(sent)):
            assert got[node][1].tolist() == source
            assert torch.equal(got[node][0], torch.stack(values) if values else torch.empty(0, DIM).to(got[node][0]))
        assert counts["messages"] == counts["communications"] == len(pairs)
        assert counts["bytes"] == moved * DIM * sent[0][0].element_size()
        assert counts["exchanges"] == 1


@pytest.mark.parametrize("size", [1, 2])
def test_nothing_to_send_and_all_to_one_node(size):
    """Empty exchanges, empty nodes and one node that gets everything are no special cases."""
    empty = [(torch.empty(0, DIM).double(), np.empty(0, np.int64))] * N
    got, counts = played(empty, Topology.server(N), size)
    assert all(len(v) == 0 for v, _ in got.values())
    assert counts["messages"] == counts["bytes"] == 0
    heap = [(torch.full((2, DIM), float(n)).double(), np.array([5, 5])) for n in range(N)]
    got, _ = played(heap, Topology.server(N), size)
    assert got[5][0][:, 0].tolist() == [n for n in range(N) for _ in range(2)]


def test_a_destination_that_does_not_exist_is_refused():
    """The message names the number and how many nodes there are."""
    sent = items(0)
    sent[2] = (torch.ones(1, DIM).double(), np.array([N]))
    with pytest.raises(RunError, match=r"Route: to 7 given, but there are 7 nodes, numbered from 0"):
        played(sent, Topology.server(N))


def test_long_runs_are_copied_whole_to_the_same_rows():
    """Copying run by run is indexing."""
    values = torch.arange(600.0).view(200, 3)
    for order in (np.r_[100:200, 0:100], np.r_[150:200, 0:20, 20:150], np.random.default_rng(0).permutation(200)):
        assert torch.equal(taken(values, order), values[torch.from_numpy(order)])
