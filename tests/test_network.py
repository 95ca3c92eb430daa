"""What a request is answered and charged, and what a block's oracle refuses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cases import quadratic

from fedsim.algorithms.requests import Gather, Mean, Mix, Request, Sum
from fedsim.engine.counts import Counts
from fedsim.engine.layout import Layout
from fedsim.engine.network import LocalNetwork
from fedsim.engine.oracle import BlockOracle
from fedsim.engine.streams import Streams
from fedsim.errors import RunError, Unsupported
from fedsim.topology.build import build
from fedsim.topology.mixing import mixing_matrix

N, DIM = 7, 4


@dataclass
class Ternary:
    """A packet: signs of the rows, each row encoded in as many bytes as its node number plus one."""

    rows: torch.Tensor
    nodes: np.ndarray

    @property
    def dense(self) -> torch.Tensor:
        return self.rows.sign()

    def lengths(self) -> np.ndarray:
        return self.nodes + 1

    def encode(self, row: int) -> bytes:
        return bytes(int(self.nodes[row]) + 1)


class Case:
    """A network over a star of seven nodes, in blocks of three rows."""

    def __init__(self, matrices: bool = True, graph: str = f"star:n={N}") -> None:
        self.topology = build(graph)
        self.layout, self.counts = Layout(self.topology), Counts()
        self.blocks = [slice(0, 3), slice(3, 6), slice(6, N)]
        self.W = mixing_matrix(self.topology) if matrices else None
        adjacency = self.W - self.W.multiply(np.eye(N)) if matrices else None
        given = {"W": self.W, "adjacency": adjacency} if matrices else {}
        self.network = LocalNetwork(self.layout, self.blocks, given, self.counts)
        self.x = torch.from_numpy(np.random.default_rng(0).standard_normal((N, DIM)))

    def ask(self, make) -> list:
        """`make(rows of x, node numbers)` gives each block's request."""
        requests: list[Request] = [make(self.x[b], self.layout.nodes[b]) for b in self.blocks]
        return self.network.answer(requests)


def test_a_packet_is_mixed_decoded_and_charged_encoded():
    """Receivers compute with the decoded rows; each neighbour of a node is charged its encoded length."""
    case = Case()
    mixed = torch.cat(case.ask(lambda x, nodes: Mix(Ternary(x, nodes))))
    order = case.layout.nodes
    expected = case.W.toarray()[np.ix_(order, order)] @ case.x.sign().numpy()
    assert np.abs(mixed.numpy() - expected).max() < 1e-15
    degrees = case.topology.degrees
    assert case.counts.bytes == int((degrees * (np.arange(N) + 1)).sum())
    assert case.counts.messages == 2 * (N - 1)


def test_a_gather_costs_what_a_mixing_does():
    """Gathering sends the same rows over the same edges as mixing them."""
    gathered, mixed = Case(), Case()
    gathered.ask(lambda x, nodes: Gather(x))
    mixed.ask(lambda x, nodes: Mix(x))
    assert gathered.counts == mixed.counts
    assert mixed.counts.bytes == 2 * (N - 1) * DIM * 8


def test_gathered_neighbours_carry_their_numbers():
    """Each row gets its neighbours' values in ascending position, with the node numbers they belong to."""
    case = Case()
    position = case.topology.position
    for block, answer in zip(case.blocks, case.ask(lambda x, nodes: Gather(x)), strict=True):
        for row, node in enumerate(case.layout.nodes[block]):
            mine = slice(answer.offsets[row], answer.offsets[row + 1])
            neighbours = answer.nodes[mine]
            assert sorted(neighbours) == sorted(case.topology.graph.neighbors(node))
            assert (np.diff(position[neighbours]) > 0).all()
            assert torch.equal(answer.values[mine], case.x[position[neighbours]])


def test_values_in_a_sum_may_be_packets():
    """A packed sum is charged encoded on the way up and dense on the way down."""
    case = Case()
    total = case.ask(lambda x, nodes: Sum(Ternary(x, nodes)))[0]
    assert torch.equal(total[0], case.x.sign().sum(0))
    assert case.counts.bytes_up == N * (N + 1) // 2
    assert case.counts.bytes_down == N * DIM * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_sums_keep_their_type_and_its_width(dtype):
    """A float32 sum stays float32 and costs four bytes a number; integers stay integers."""
    case = Case()
    case.x = torch.arange(N * DIM).reshape(N, DIM).to(dtype)
    total = case.ask(lambda x, nodes: Sum(x))[0]
    assert total.dtype == dtype
    assert total[0].tolist() == case.x.sum(0).tolist()
    assert case.counts.bytes == 2 * N * DIM * total.element_size()


def test_a_weighted_mean_is_divided_by_its_weights():
    """A weighted mean over part of the nodes divides by the weights of those that take part."""
    case = Case()
    weight = torch.linspace(1, 2, N, dtype=torch.float64)
    mask = np.arange(N) % 2 == 0
    starts = iter(case.blocks)
    got = case.ask(lambda x, nodes: Mean(x, weight=weight[next(starts)], rows=mask))[0][0]
    kept = torch.from_numpy(mask[case.layout.nodes])
    expected = (case.x * weight[:, None])[kept].sum(0) / weight[kept].sum()
    assert torch.allclose(got, expected, atol=1e-15)


def test_nodes_without_edges_cannot_mix():
    """A server topology has no matrix: mixing and gathering say so instead of failing inside."""
    case = Case(matrices=False, graph=f"server:n={N}")
    for request in (Mix, Gather):
        with pytest.raises(Unsupported, match=r"no matrix '.*' for Mix or Gather .*nodes without edges meet in sums"):
            case.ask(lambda x, nodes, request=request: request(x))
    with pytest.raises(Unsupported, match=r"no matrix 'V' .* \(it has W, adjacency\)"):
        Case().ask(lambda x, nodes: Mix(x, "V"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x, nodes: Sum(x, rows=np.arange(N) < len(x)), r"Sum of \(4,\) float64 over 3 nodes \(mask"),
        (lambda x, nodes: Sum(x, weight=None if len(x) == 3 else x[:, 0]), "block 2 for Sum .* with weights"),
        (lambda x, nodes: Mix(x if len(x) == 3 else x.float()), r"block 2 for Mix\[W\] of \(4,\) float32"),
        (lambda x, nodes: Mix(x if len(x) == 3 else x[:, :2]), r"block 2 for Mix\[W\] of \(2,\)"),
        (lambda x, nodes: Mix(x) if len(x) == 3 else Gather(x), r"asks for Mix\[W\] .* for Gather"),
    ],
)
def test_whatever_blocks_disagree_on_is_named(make, words):
    """Kind, matrix, shape, type, weights and mask of a request must be the same in all blocks."""
    with pytest.raises(RunError, match=words):
        Case().ask(make)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x, nodes: Mix(x[:1]), r"Mix of shape \(1, 4\): \[rows, dim\] is needed, and this block has 3 rows"),
        (lambda x, nodes: Mix(x[:, :, None]), r"Mix of shape \(3, 4, 1\): \[rows, dim\] is needed"),
        (lambda x, nodes: Sum(x[:, 0]), r"Sum of shape \(3,\): \[rows, dim\] is needed"),
        (lambda x, nodes: Gather(x[:2]), r"Gather of shape \(2, 4\): .* this block has 3 rows"),
        (lambda x, nodes: Mix(x.long()), "Mix of torch.int64: float64 or float32 is needed"),
        (lambda x, nodes: Mix(x.numpy()), "Mix of ndarray: a torch tensor, or a packet, is needed"),
        (lambda x, nodes: Mean(x, weight=x[:, :1]), r"Mean with weights \(3, 1\): one per row, \(3,\), is needed"),
        (lambda x, nodes: Sum(x.long(), weight=x[:, 0]), "Sum of torch.int64 with weights that are not whole numbers"),
        (lambda x, nodes: Sum(x, rows=nodes < 3), r"Sum with rows bool \(3,\): a boolean mask by node number, \(7,\)"),
        (lambda x, nodes: Sum(x, rows=np.arange(N)), r"Sum with rows int64 \(7,\): a boolean mask"),
        (lambda x, nodes: Mean(x, rows=np.zeros(N, bool)), r"Mean of \(4,\) .*: no node takes part"),
        (lambda x, nodes: Mean(x, weight=0 * x[:, 0]), r"Mean of \(4,\) .*: no node takes part"),
    ],
)  # fmt: skip
def test_requests_that_do_not_fit_are_refused(make, words):
    """Rows, types, weights and masks that compiled code would misread are refused: what was given, what is needed."""
    with pytest.raises(RunError, match=words):
        Case().ask(make)


def test_means_of_integers_keep_their_digits():
    """A mean of integers is float64: 2^40 + 1 is not rounded to single precision."""
    case = Case()
    case.x = torch.full((N, DIM), 2**40 + 1)
    mean = case.ask(lambda x, nodes: Mean(x))[0]
    assert mean.dtype == torch.float64
    assert mean[0].tolist() == [2.0**40 + 1] * DIM


def _oracle(nodes) -> BlockOracle:
    return BlockOracle(quadratic(N, DIM), np.asarray(nodes), Streams(0), Counts())


def test_a_shared_point_serves_every_node():
    """A gradient at `[1, dim]` (a server's model, say) is that of each node at this point, and is charged so."""
    point, oracle = torch.ones(1, DIM).double(), _oracle([0, 3, 5])
    assert torch.equal(oracle.gradient(point), oracle.gradient(point.repeat(3, 1)))
    assert torch.equal(oracle.dual_gradient(point), oracle.dual_gradient(point.repeat(3, 1)))
    assert oracle._counts.gradients == 6


@pytest.mark.parametrize("shape", [(2, DIM), (3, DIM + 1), (4, DIM), (DIM,)])
def test_a_point_of_another_shape_is_refused(shape):
    """Points that do not fit the block are refused before compiled code reads past their end."""
    with pytest.raises(RunError, match=r"one row for each of the block's 3 nodes, \(3, 4\), or one for all, \(1, 4\)"):
        _oracle([0, 3, 5]).gradient(torch.zeros(shape).double())
