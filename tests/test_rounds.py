"""Synchronous rounds: any block size gives the same bits, and every message is charged."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cases import Tracking, quadratic

from fedsim.algorithms.algorithm import SyncAlgorithm
from fedsim.algorithms.requests import Gather, Mean, Mix, Rows, Sum
from fedsim.engine.addresses import addresses_of
from fedsim.engine.layout import Layout
from fedsim.engine.mixing import by_position, mix_rows
from fedsim.engine.rounds import Rounds
from fedsim.errors import Diverged, InputError, RunError
from fedsim.topology.build import build
from fedsim.topology.mixing import mixing_matrix
from fedsim.topology.spectral import laplacian


def player(algorithm, topology="torus:3,4", dim=5, block="auto", seed=0, matrices=True):
    graph = build(topology)
    lap = laplacian(graph)
    adjacency = (-lap).tolil()
    adjacency.setdiag(0)
    given = {"W": mixing_matrix(graph), "laplacian": lap, "adjacency": adjacency.tocsr()} if matrices else {}
    x0 = torch.zeros((graph.n, dim), dtype=torch.float64)
    made = Rounds(algorithm, quadratic(graph.n, dim), Layout(graph), given, x0, seed, block=block)
    made.start()
    return made


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_the_block_size_never_changes_a_bit(block):
    """Blocks of 1, 2, 3 and 7 rows give the trajectory of one block of all rows, and the same counts."""
    whole, cut = player(Tracking()), player(Tracking(), block=block)
    whole.advance(40)
    cut.advance(40)
    assert {k: v.tobytes() for k, v in whole.final().items()} == {k: v.tobytes() for k, v in cut.final().items()}
    assert whole.counts == cut.counts


def test_gradient_tracking_finds_the_optimum():
    """The driver plays the method that the coroutine spells out: it converges to the known optimum."""
    made = player(Tracking())
    made.advance(600)
    assert torch.allclose(made.outputs(), quadratic(12, 5).optimum().expand(12, -1), atol=1e-10)


def test_every_message_is_charged():
    """One round of two mixings and a mean costs 2|E| activations, 4|E| messages and their bytes, plus the mean's."""
    made = player(Tracking())
    before = made.counts.as_dict()
    made.advance(1)
    cost = {k: v - before[k] for k, v in made.counts.as_dict().items()}
    edges, n, row = 24, 12, 5 * 8
    assert cost["gradients"] == n
    assert cost["communications"] == 2 * edges + 2 * n
    assert cost["messages"] == 4 * edges + 2 * n
    assert cost["bytes"] == (4 * edges + 2 * n) * row
    assert (cost["bytes_up"], cost["bytes_down"]) == (n * row, n * row)
    assert cost["exchanges"] == 2 + 2


def test_a_resumed_run_equals_an_uninterrupted_one():
    """Saving after 7 rounds and going on elsewhere gives the bits and counts of 20 rounds in one go."""
    straight, first, second = player(Tracking()), player(Tracking(), block=3), player(Tracking(), block=5)
    straight.advance(20)
    first.advance(7)
    second.load(first.save())
    second.advance(20)
    assert {k: v.tobytes() for k, v in straight.final().items()} == {k: v.tobytes() for k, v in second.final().items()}
    assert straight.counts == second.counts


@pytest.mark.parametrize("dim", [1, 3, 100, 1500])
def test_mixing_equals_the_matrix_product(dim):
    """The kernel computes W v to rounding, for rows that lie anywhere and any number of columns."""
    graph = build("star:n=13")
    offsets, columns, weights = by_position(mixing_matrix(graph), graph)
    v = np.random.default_rng(0).normal(size=(13, dim))
    out = np.empty_like(v)
    mix_rows(0, offsets, columns, weights, 0, addresses_of(v), out)
    dense = mixing_matrix(graph).toarray()[np.ix_(graph.order, graph.order)]
    assert np.allclose(out, dense @ v, rtol=0, atol=1e-14)


@dataclass
class One:
    x: Rows


@dataclass(frozen=True)
class Ask(SyncAlgorithm):
    """Asks one thing per round and keeps the answer."""

    kind = "ask"
    question: object = None

    async def start(self, x0, f, rng):
        return One(rng.normal("start", x0.shape[1]))

    async def round(self, s, k, f, rng):
        return One(await self.question(s.x, f))


async def _neighbours(x, f):
    found = await Gather(x)
    return torch.stack([found.values[a:b].sum(0) for a, b in zip(found.offsets[:-1], found.offsets[1:], strict=True)])


async def _adjacency_times(x, f):
    return -(await Mix(x, "laplacian")) + 4 * x


def test_gather_brings_exactly_the_neighbours():
    """On a torus, the sum over gathered values is the adjacency matrix times the rows."""
    gathered, mixed = player(Ask(_neighbours), block=5), player(Ask(_adjacency_times))
    gathered.advance(1)
    mixed.advance(1)
    assert torch.allclose(gathered.outputs(), mixed.outputs(), atol=1e-13)


async def _masked_mean(x, f):
    mask = np.arange(12) % 3 == 0
    return (await Mean(x, rows=mask)).expand_as(x)


async def _broadcast(x, f):
    return (await Sum(x, weight=torch.from_numpy((f.nodes == 5).astype(float)))).expand_as(x)


def test_partial_participation_charges_participants_only():
    """A mean over 4 of 12 nodes costs 4 up and 4 down, and is their mean."""
    made = player(Ask(_masked_mean), block=5)
    start = made.outputs().numpy()
    made.advance(1)
    nodes = build("torus:3,4").order
    assert np.allclose(made.outputs().numpy()[0], start[nodes % 3 == 0].mean(axis=0))
    assert (made.counts.communications, made.counts.bytes) == (8, 8 * 5 * 8)


def test_a_one_hot_weight_is_a_broadcast():
    """A sum with weight on one node sends once up and to everyone down."""
    made = player(Ask(_broadcast))
    start = made.outputs()
    made.advance(1)
    place = int(np.flatnonzero(build("torus:3,4").order == 5)[0])
    assert torch.equal(made.outputs(), start[[place]].expand(12, -1))
    assert made.counts.messages == 1 + 12


async def _by_row(x, f):
    return await Mix(x) if 3 in f.nodes else await Mix(x, "laplacian")


async def _ends_early(x, f):
    return x if 3 in f.nodes else await Mix(x)


def test_blocks_that_disagree_end_the_run_by_name():
    """Control flow that depends on rows is an error that says what each block asked for, not a wrong number."""
    with pytest.raises(RunError, match=r"block 0 asks for Mix\[.*\] of \(5,\) float64, block .* for Mix"):
        player(Ask(_by_row), block=4).advance(1)
    with pytest.raises(RunError, match="ended, others ask on"):
        player(Ask(_ends_early), block=4).advance(1)


def test_a_diverging_run_names_the_node():
    """A state that is no longer finite stops the run and says which variable, node and round."""
    with pytest.raises(Diverged, match=r"of node \d+ is no longer finite after round"):
        player(Tracking(eta=1e6)).advance(400)


@dataclass
class Unmarked:
    x: float


@dataclass(frozen=True)
class BadState(Ask):
    async def start(self, x0, f, rng):
        return Unmarked(x0)


def test_a_state_must_say_what_its_fields_are():
    """A field that is neither Rows nor Shared is refused by name: the shape never decides."""
    made = Rounds(BadState(), quadratic(), Layout(build("torus:3,4")), {}, torch.zeros(12, 5).double(), 0, block=5)
    with pytest.raises(InputError, match=r"Unmarked\.x: annotated .*; Rows or Shared is needed"):
        made.start()


def test_more_processes_than_nodes_are_refused():
    """Every process must hold a node; the message says how many may be started."""
    with pytest.raises(InputError, match=r"13 processes for 12 nodes.*start at most 12"):
        Layout(build("torus:3,4"), rank=0, size=13)
