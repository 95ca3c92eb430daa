"""The laws for algorithm and problem code: what is shipped keeps them, and whoever breaks one is told which."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
from cases import Tracking, TrackingState, bits, quadratic
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import registry, testing
from fedsim.algorithms.algorithm import EventAlgorithm, Sampling, SyncAlgorithm
from fedsim.algorithms.optimisers import SGD
from fedsim.algorithms.requests import Gather, Mean, Mix, Rows, Sum
from fedsim.engine.layout import Layout
from fedsim.engine.rounds import Rounds
from fedsim.errors import InputError
from fedsim.problems.build import build
from fedsim.problems.problem import Problem
from fedsim.problems.quadratic import Quadratic
from fedsim.topology.mixing import mixing_matrix
from fedsim.topology.topology import Topology

CLASSES = {"kind": "synthetic_classification", "samples": 10, "dim": 5}
NUMBERS = {"kind": "synthetic_regression", "samples": 10, "dim": 5}
SIZES = {"kind": "dirichlet_sizes", "alpha": 5.0, "min_size": 3}
PROBLEMS = {
    "least_squares": {"kind": "least_squares", "data": {**NUMBERS, "samples": 20}, "partition": SIZES},
    "ridge": {"kind": "ridge", "l2": 0.1, "data": NUMBERS, "partition": SIZES},
    "ridge by samples": {"kind": "ridge", "l2": 0.1, "weights": "samples", "data": NUMBERS, "partition": SIZES},
    "logistic": {"kind": "logistic", "l2": 0.1, "data": CLASSES, "partition": SIZES},
    "nonconvex logistic": {"kind": "nonconvex_logistic", "penalty": 0.1, "data": CLASSES, "partition": SIZES},
    "multinomial": {"kind": "multinomial", "l2": 0.1, "data": {**CLASSES, "classes": 4}, "partition": SIZES},
    "quadratic": {"kind": "quadratic", "dim": 7},
    "diagonal quadratic": {"kind": "quadratic", "dim": 7, "shape": "diagonal"},
    "consensus": {"kind": "consensus", "dim": 3},
    "shared curvature": {"kind": "shared_curvature", "records": 97, "dim": 5},
    "softplus network": {
        "kind": "module",
        "hidden": [6],
        "activation": "softplus",
        "data": NUMBERS,
        "partition": SIZES,
    },
    "synthetic_quadratic": {"kind": "synthetic_quadratic", "dim": 4},
    **{f: {"kind": "test_function", "function": f, "dim": 5} for f in ("rosenbrock", "levy", "rastrigin")},
    "network of classes": {"kind": "module", "model": "mlp", "hidden": [6], "data": CLASSES, "partition": SIZES},
    "network of numbers": {"kind": "module", "model": "mlp", "hidden": [5, 3], "data": NUMBERS, "partition": SIZES},
}
# What an algorithm cannot do without: step sizes where the theory has none.
STEPS = ("dproxsgt", "cdproxsgt", "gradient_tracking", "prox_gt_sa", "deepstorm", "dpsgd", "allreduce_sgd")
CLIPPED = {"eta": 0.2, "clip_grad": 0.5}
PARAMETERS: dict[str, dict] = {
    "gossip_sgd": {"step": 0.01},
    "a2cid2": {"step": 0.01},
    "fd_sgd": {"step": 0.01},
    "fzoos": {"features": 40, "local_steps": 3, "candidates": 9, "server_candidates": 9, "server_active": 5},
    **{kind: {"optimiser": SGD("sgd", 0.05), "local_steps": 3} for kind in ("fedavg", "fedprox", "scaffold")},
    "diff2_gd": {**CLIPPED, "restart_period": 3, "clip_diff": 0.4},
    "diff2_bvr_l_sgd": {
        **CLIPPED,
        "restart_period": 3,
        "clip_diff": 0.4,
        "clip_local": 0.4,
        "local_steps": 3,
        "batch_rate": 0.6,
    },
    "dp_gd": {**CLIPPED, "clipping": "per_layer"},
    "dp_sgd": {**CLIPPED, "batch_rate": 0.5},
    "dp_srm": {**CLIPPED, "clip_diff": 0.4, "batch_rate": 0.5},
    "dp_fedavg": {"eta": 0.05, "local_steps": 3, "clip_model": 0.5, "client_rate": 0.5},
    **{kind: {"eta": 0.01} for kind in (*STEPS, "choco_sgd", "beer")},
}
# What an algorithm is played on where it is not made for every problem.
PLAYED_ON: dict[str, dict] = {
    "router_replay": {"kind": "router_scores", "tokens": 47, "fresh": True, "layers": 2},
    "moe_training": {"kind": "byte_language", "sequence": 9, "validation": 2, "moe_num_experts": 10, "d_model": 12},
}


def _made(kind: str):
    return registry.find("algorithm", kind, Path())(**PARAMETERS.get(kind, {}))


@pytest.mark.parametrize("kind", registry.KINDS["algorithm"])
def test_every_algorithm_keeps_the_laws(kind):
    """Blocks, players, observation, interruption and global generators change no bit of any shipped algorithm."""
    testing.check(_made(kind), build(PLAYED_ON[kind], 5, 1, Path()) if kind in PLAYED_ON else None)


@pytest.mark.parametrize("kind", [k for k in registry.KINDS["algorithm"] if hasattr(_made(k), "batch")])
def test_every_algorithm_keeps_the_laws_with_minibatches(kind):
    """The same with records drawn for every gradient, by each way of drawing."""
    for sampling in (Sampling(3), Sampling(3, "epoch"), Sampling(3, "poisson")):
        testing.check(_made(kind).derived(batch=sampling))


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_keeps_the_laws_and_its_word(name):
    """No row's gradient, loss or prox depends on its block; L, mu, optimum and dual are what they say."""
    report = testing.check(build(PROBLEMS[name], 11, 1, Path()))
    assert "holds: the gradient is that of the loss" in str(report)


@given(st.integers(2, 24), st.integers(1, 25), st.integers(1, 9), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_no_block_size_on_any_graph_changes_a_bit(n, block, dim, seed):
    """On random trees with extra edges, any block size gives the bits of one block of all rows."""
    rng = random.Random(seed)
    graph = nx.random_labeled_tree(n, seed=seed)
    graph.add_edges_from(tuple(rng.sample(range(n), 2)) for _ in range(n // 2))
    topology = Topology.from_networkx(graph)
    problem, matrices = quadratic(n, dim, seed), {"W": mixing_matrix(topology)}

    def play(size):
        x0 = torch.from_numpy(np.random.default_rng(seed).standard_normal((n, dim)))
        made = Rounds(Tracking(), problem, Layout(topology), matrices, x0, seed, block=size)
        made.start()
        made.advance(5)
        return bits(made.outputs()), made.counts

    assert play(min(block, n)) == play(n)


@dataclass(frozen=True)
class ReadsOtherRows(Tracking):
    async def round(self, s, k, f, rng):
        g = f.gradient(s.x)
        return TrackingState(await Mix(s.x - 0.1 * g.mean(dim=0)), s.y, g, s.mean)


@dataclass(frozen=True)
class UsesTorchRand(Tracking):
    async def round(self, s, k, f, rng):
        return TrackingState(await Mix(s.x + torch.rand(1).double()), s.y, s.g, s.mean)


@dataclass(frozen=True)
class UsesNumpyRandom(Tracking):
    async def round(self, s, k, f, rng):
        return TrackingState(await Mix(s.x + np.random.random()), s.y, s.g, s.mean)  # noqa: NPY002 - the mistake


@dataclass(frozen=True)
class WritesToAnswers(Tracking):
    async def round(self, s, k, f, rng):
        mean = await Mean(s.x)
        mean += 1.0
        return TrackingState(await Mix(s.x), s.y, s.g, mean)


@dataclass(frozen=True)
class RemembersElsewhere(Tracking):
    async def start(self, x0, f, rng):
        self.__dict__["rounds"] = 0
        return await super().start(x0, f, rng)

    async def round(self, s, k, f, rng):
        self.__dict__["rounds"] += 1
        return TrackingState((await Mix(s.x)) / self.__dict__["rounds"], s.y, s.g, s.mean)


@dataclass(frozen=True)
class WritesBehindTorch(Tracking):
    async def round(self, s, k, f, rng):
        x = await Mix(s.x)
        x.numpy()[:] *= 0.5
        return TrackingState(x, s.y, s.g, s.mean)


@dataclass(frozen=True)
class WritesToTheStart(Tracking):
    async def start(self, x0, f, rng):
        x0.mul_(2.0)
        return await super().start(x0, f, rng)


@dataclass(frozen=True)
class MixesWhereLarge(Tracking):
    async def round(self, s, k, f, rng):
        x = await Mix(s.x) if float(s.x.norm()) > 1.0 else s.x
        return TrackingState(x, s.y, s.g, s.mean)


@dataclass(frozen=True)
class RollsRows(Tracking):
    async def round(self, s, k, f, rng):
        return TrackingState(await Mix(s.x.roll(1, 0)), s.y, s.g, s.mean)


@dataclass(frozen=True)
class SeedsItsOwn(Tracking):
    async def round(self, s, k, f, rng):
        own = [np.random.default_rng([k, node]).standard_normal(s.x.shape[1]) for node in f.nodes]
        return TrackingState(await Mix(s.x + torch.from_numpy(np.stack(own))), s.y, s.g, s.mean)


BREAKERS = [
    (ReadsOtherRows, r"of node \d+ is different .* after round 1 in blocks of 1 rows .* through requests only"),
    (UsesTorchRand, r"global generator of torch was used; draw from `rng`"),
    (UsesNumpyRandom, r"global generator of NumPy was used"),
    (WritesToAnswers, r"the answer to Mean was modified in place; answers are read-only"),
    (RemembersElsewhere, r"different .* in blocks of 1 rows"),
    (WritesBehindTorch, r"the answer to Mix was modified in place"),
    (WritesToTheStart, r"start modified the points x0"),
    (MixesWhereLarge, r"blocks disagree .*; control flow may depend on the round and on shared values, never on rows"),
    (RollsRows, r"after round 1 in blocks of 1 rows"),
    (SeedsItsOwn, r"numpy\.random\.default_rng was called: a generator of one's own"),
]


@pytest.mark.parametrize(("breaker", "words"), BREAKERS, ids=lambda b: getattr(b, "__name__", ""))
def test_an_algorithm_that_breaks_a_law_is_told_which(breaker, words):
    """Rows read past a request, randomness, answers written to, hidden state, branches on rows are each named."""
    with pytest.raises(AssertionError, match=words):
        testing.check(breaker)


@dataclass
class One:
    x: Rows


@dataclass(frozen=True)
class AsksEverything(SyncAlgorithm):
    """Uses every request and every draw once."""

    kind = "asks everything"

    async def start(self, x0, f, rng):
        return One(x0 + rng.normal("start", x0.shape[1]))

    async def round(self, s, k, f, rng):
        near = await Gather(s.x)
        tops = torch.stack([near.values[a:b].amax(0) for a, b in zip(near.offsets, near.offsets[1:], strict=False)])
        total = await Sum(tops, weight=rng.uniform("weight", 1)[:, 0])
        mask = rng.shared("clients").random(f.n) < 0.6
        some = await Mean(s.x, rows=mask)
        one = await Sum(s.x, weight=torch.from_numpy((f.nodes == k).astype(float)))
        shift = rng.integers("shift", 1, 3).double()
        return One((await Mix(s.x - 0.1 * f.gradient(some))) + 0.01 * (total + one + shift))


def test_every_request_and_draw_keeps_the_laws():
    """Gather, weighted and masked sums, broadcast, per-node and shared draws: the same bits in any block."""
    testing.check(AsksEverything)


class SignFlow(EventAlgorithm):
    """Gossip of signs with decaying gradient steps: not linear, so played by functions of rows."""

    kind, paper, provenance, variables = "sign_flow", "none", "reconstruction", ("x", "u")

    def start(self, x0, gradient, mean_gradient):
        return {"x": x0, "u": gradient}

    def flow(self, v, elapsed):
        return {"x": v["x"], "u": v["u"] * torch.exp(-elapsed)}

    def gradient(self, v, g, count):
        return {"x": v["x"] - 0.1 / (1 + count) * g, "u": g}

    def message(self, v):
        return v["x"].clamp(-1, 1)

    def gossip(self, v, own, other):
        return {"x": v["x"] - 0.25 * (own - other), "u": v["u"]}


class CentredFlow(SignFlow):
    """Reads the other rows that happen to share the call."""

    def message(self, v):
        return v["x"] - v["x"].mean(dim=0)


class CentredStart(SignFlow):
    """Starts from what the block's mean leaves."""

    def start(self, x0, gradient, mean_gradient):
        return {"x": x0 - x0.mean(dim=0), "u": gradient}


class ForgetfulFlow(SignFlow):
    """Overwrites what the other node sent."""

    def gossip(self, v, own, other):
        other.zero_()
        return {"x": v["x"] - 0.25 * (own - other), "u": v["u"]}


@pytest.mark.parametrize(
    ("breaker", "words"),
    [
        (CentredFlow, "message: message of node 0 is different in blocks of 1"),
        (CentredStart, "start: x of node 0 is different in blocks of 1"),
        (ForgetfulFlow, "gossip modified what it was given"),
    ],
)
def test_algorithms_of_functions_are_held_to_their_rows(breaker, words):
    """An event algorithm passes; one whose functions look at other rows, or write to what they get, is named."""
    assert "any block of rows" in str(testing.check(SignFlow))
    with pytest.raises(AssertionError, match=words):
        testing.check(breaker)


class Wrong(Problem):
    """A quadratic with one thing wrong: a subclass of `quadratic`'s instance, wrapped."""

    kind = "wrong"

    def __init__(self, **changes):
        self._good = Quadratic(np.linspace(1, 4, 44).reshape(11, 4), np.ones((11, 4)))
        self.n, self.dim, self.records, self.L, self.mu = 11, 4, self._good.records, self._good.L, self._good.mu
        self.__dict__.update(changes)

    def gradient(self, x, nodes, batch=None):
        return self._good.gradient(x, nodes, batch)

    def loss(self, x, nodes):
        return self._good.loss(x, nodes)


def _centred(x, nodes, batch=None):
    return Wrong()._good.gradient(x, nodes) - x.mean(dim=0)


def _noisy(x, nodes, batch=None):
    return Wrong()._good.gradient(x, nodes) + torch.randn(1)


def _in_place(x, nodes, batch=None):
    return Wrong()._good.gradient(x.mul_(1.5), nodes)


def _halves_weights(x, nodes, batch=None):
    if batch is not None:
        batch.weights[:] *= 0.5
    return Wrong()._good.gradient(x, nodes)


def _seeded(x, nodes, batch=None):
    return Wrong()._good.gradient(x, nodes) + 0 * torch.rand(1, generator=torch.Generator().manual_seed(0))


MISTAKES = [
    ({"gradient": _centred}, r"gradient of node \d+ is different .* in the block of nodes .* on that row only"),
    ({"gradient": _noisy}, "global generator of torch was used"),
    ({"gradient": _in_place}, "gradient modified the point it was given"),
    ({"gradient": lambda x, nodes, batch=None: 2 * Wrong()._good.gradient(x, nodes)}, "gradient is not that of the lo"),
    ({"L": np.full(11, 0.5)}, r"L of node \d+ is too small"),
    ({"mu": np.full(11, 3.99)}, r"mu of node \d+ is too large"),
    ({"optimum": lambda: torch.zeros(4).double()}, "optimum is not one"),
    ({"dual_gradient": lambda s, nodes: s}, "dual_gradient is not the inverse of gradient"),
    ({"prox": lambda v, step: v - v.mean(dim=0)}, r"prox of node \d+ is different"),
    ({"L": 0.99 * Quadratic(np.linspace(1, 4, 44).reshape(11, 4), np.ones((11, 4))).L}, r"L of node \d+ is too small"),
    ({"gradient": lambda x, nodes, batch=None: Wrong()._good.gradient(x, nodes).float()}, "type torch.float32"),
    ({"loss": lambda x, nodes: Wrong()._good.loss(x, nodes[: len(x)])}, r"all nodes share, .* has shape \(1,\)"),
    ({"records": np.full(11, 4)}, "one record is the exact one on every node: `batch` seems to be ignored"),
    ({"records": np.full(11, 4), "gradient": _halves_weights}, "modified the minibatch it was given"),
    ({"gradient": _seeded}, "torch.Generator was called: a generator of one's own"),
]


@pytest.mark.parametrize(("changes", "words"), MISTAKES, ids=lambda c: next(iter(c)) if isinstance(c, dict) else "")
def test_a_problem_that_breaks_a_law_or_its_word_is_told_which(changes, words):
    """Rows that depend on rows, global randomness, a wrong gradient, L, mu, optimum, dual, prox are each named."""
    testing.check(Wrong())
    with pytest.raises(AssertionError, match=words):
        testing.check(Wrong(**changes))


def test_the_global_generators_are_given_back():
    """A check leaves the user's generators of Python, NumPy and torch where they were."""
    torch.manual_seed(7)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    testing.check(Tracking)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])  # noqa: NPY002


def test_what_is_neither_algorithm_nor_problem_is_refused():
    """Checking something else says what is needed."""
    with pytest.raises(InputError, match="int given; a fedsim Algorithm or Problem is needed"):
        testing.check(3)  # pyright: ignore[reportArgumentType]
