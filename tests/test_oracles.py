"""The algorithms equal loops written straight from their papers (`paper_loops`), to 1e-12, on graphs of no paper."""

import math

import networkx as nx
import numpy as np
import paper_loops as paper
import pytest
import torch
from scipy.linalg import eigh, expm

from fedsim.algorithms.a2cid2 import A2CiD2, Decay, GossipSGD
from fedsim.algorithms.adom import ADOMPlus
from fedsim.algorithms.continuized import Continuized
from fedsim.algorithms.dadao import DADAO
from fedsim.algorithms.gossip import AcceleratedGossip, RandomisedGossip
from fedsim.algorithms.msda import MSDA
from fedsim.engine.events import Events
from fedsim.engine.layout import Layout
from fedsim.engine.rounds import Rounds
from fedsim.problems.quadratic import Quadratic
from fedsim.setting import RunSetting
from fedsim.topology.spectral import laplacian
from fedsim.topology.topology import Topology

GRAPHS = {
    "lollipop": nx.lollipop_graph(4, 3), "wheel": nx.wheel_graph(6), "K23": nx.complete_bipartite_graph(2, 3),
    "pair": nx.path_graph(2), "star9": nx.star_graph(8),
}  # fmt: skip
DIM, VARIABLES = 3, ("x", "xt", "y", "yt", "z", "zt")


class Case:
    """Quadratics of full curvature on a graph with unequal rates, `scale` times what DADAO needs; and an event list."""

    def __init__(self, graph="lollipop", scale=1.0, common=False, gradients=True, seed=0):
        rng = np.random.default_rng(seed)
        self.topology = Topology.from_networkx(GRAPHS[graph], graph)
        self.n, self.edges = self.topology.n, [tuple(map(int, edge)) for edge in self.topology.edges]
        factor = rng.standard_normal((self.n, 5, DIM))
        self.a, self.b = factor.transpose(0, 2, 1) @ factor, rng.standard_normal((self.n, DIM))
        values = np.linalg.eigvalsh(self.a)
        self.mu, self.L = values.min(), values.max()
        w = rng.uniform(0.2, 2, len(self.edges))
        chi1, chi2, _ = paper.chis(self.n, self.edges, w)
        self.w = w * math.sqrt(2 * chi1 * chi2) * scale
        self.chi1, self.chi2, _ = paper.chis(self.n, self.edges, self.w)
        self.x0 = np.tile(rng.standard_normal(DIM), (self.n, 1)) if common else rng.standard_normal((self.n, DIM))
        self.events = []
        for t in np.sort(rng.uniform(0, 12, 300)):
            i, j = self.edges[rng.integers(len(self.edges))][:: rng.choice([-1, 1])]
            self.events.append((t, int(rng.integers(self.n)), None) if gradients and rng.random() < 0.4 else (t, i, j))
        self.problem = Quadratic(self.a, self.b)
        self.setting = RunSetting(self.problem, self.topology, self.w, common_start=common)

    def grad(self, i, x):
        return self.a[i] @ (x - self.b[i])

    def dual(self, i, s):
        return self.b[i] + np.linalg.solve(self.a[i], s)

    def play(self, algorithm, player="auto", output="flowed") -> Events:
        """Play the event list."""
        layout = Layout(self.topology)
        x0 = torch.from_numpy(np.ascontiguousarray(self.x0[layout.nodes]))
        algorithm = algorithm.resolve(self.setting)
        run = Events(
            algorithm, self.setting, self.problem, layout, self.w, x0, 0, output=output, player=player
        )  # fmt: skip
        run.start()
        time, a, b = zip(*self.events, strict=True)
        kind = np.array([0 if j is None else 1 for j in b])
        run.play(kind, np.array(a), np.array([0 if j is None else j for j in b]), np.array(time))
        return run

    def rounds(self, algorithm, rounds):
        """Return every node's answer after so many rounds."""
        layout = Layout(self.topology)
        x0 = torch.from_numpy(np.ascontiguousarray(self.x0[layout.nodes]))
        run = Rounds(
            algorithm.resolve(self.setting), self.problem, layout, {"laplacian": laplacian(self.topology)}, x0, 0
        )
        run.start()
        run.advance(rounds)
        return self.by_node(run.outputs().numpy()), run.counts

    def by_node(self, rows):
        return rows[self.topology.position]


def close(found, expected) -> bool:
    return np.abs(found - expected).max() <= 1e-12 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize(
    ("scale", "init"), [(1.0, "theorem4"), (0.2, "theorem4"), (3.0, "local"), (1.0, "authors_code")]
)
def test_dadao_is_algorithm_2(graph, scale, init):
    """All six variables, from every start, with too little gossip (c = 5), enough and too much; lazy and flowed."""
    case = Case(graph, scale, common=init == "theorem4")
    loop = paper.Dadao(case.mu, case.L, case.chi1, case.chi2)
    expected, last = loop.play(loop.start(case.x0, case.grad, init), case.grad, case.events)
    now = case.events[-1][0]
    flowed = np.array([expm(loop.flow * (now - t)) @ v for v, t in zip(expected, last, strict=True)])
    for output, answer in (("lazy", expected), ("flowed", flowed)):
        run = case.play(DADAO(init=init), output=output)
        found = case.by_node(np.stack([run.final()[name] for name in VARIABLES], axis=1))
        assert close(found, expected)
        assert close(case.by_node(run.outputs().numpy()), answer[:, 0])


def test_dadao_integrated_lazily_is_dadao_integrated_at_every_event():
    """Flowing all nodes at every event changes nothing but rounding."""
    case = Case(common=True)
    loop = paper.Dadao(case.mu, case.L, case.chi1, case.chi2)
    v, _ = loop.play(loop.start(case.x0, case.grad, "theorem4"), case.grad, case.events, eager=True)
    assert close(case.by_node(case.play(DADAO()).outputs().numpy()), v[:, 0])


@pytest.mark.parametrize("graph", ["lollipop", "pair"])
@pytest.mark.parametrize("more", [{}, {"momentum": 0.7}, {"decay": (5.0, 0.7)}])
def test_gossip_sgd_and_a2cid2_are_their_loops(graph, more):
    """Plain, with momentum, and with steps that shrink."""
    case = Case(graph, 0.5)
    options = {name: Decay(*value) if name == "decay" else value for name, value in more.items()}
    x, xt = paper.a2cid2(case.x0, case.grad, case.events, case.chi1, case.chi2, 0.02, **more)
    found = case.play(A2CiD2(step=0.02, **options)).final()
    assert close(case.by_node(found["x"]), x)
    assert close(case.by_node(found["xt"]), xt)
    x, _ = paper.a2cid2(case.x0, case.grad, case.events, 1, 1, 0.02, **more, accelerated=False)
    assert close(case.by_node(case.play(GossipSGD(step=0.02, **options)).final()["x"]), x)


def test_averaging_is_its_loop_and_keeps_the_mean():
    """Randomised and accelerated gossip; the means of x, and of xt, stay where they are."""
    case = Case(gradients=False)
    x, xt = paper.a2cid2(case.x0, case.grad, case.events, case.chi1, case.chi2)
    found = case.play(AcceleratedGossip()).final()
    assert close(case.by_node(found["x"]), x)
    assert close(case.by_node(found["xt"]), xt)
    x, _ = paper.a2cid2(case.x0, case.grad, case.events, 1, 1, accelerated=False)
    assert close(case.by_node(case.play(RandomisedGossip()).final()["x"]), x)
    run = case.play(AcceleratedGossip())
    run.advance(3000)
    assert run.events > 10_000
    assert np.abs(run.outputs().numpy().mean(axis=0) - case.x0.mean(axis=0)).max() < 1e-14


@pytest.mark.parametrize("graph", ["lollipop", "K23"])
def test_continuized_is_its_loop(graph):
    """Both variables and the answer, at rates of any total and shape."""
    case = Case(graph, 0.7, gradients=False)
    y, z = paper.continuized(case.n, DIM, case.dual, case.events, case.edges, case.w, case.mu, case.L)
    run = case.play(Continuized(), output="lazy")
    assert close(case.by_node(run.final()["y"]), y)
    assert close(case.by_node(run.final()["z"]), z)
    assert close(case.by_node(run.outputs().numpy()), np.array([case.dual(i, row) for i, row in enumerate(z)]))
    assert run.counts.dual_gradients == 2 * len(case.events)
    run.advance(80)
    flow, state = Continuized().resolve(case.setting).dynamics(case.setting).flow, run.final()
    both = np.stack([state["y"], state["z"]], axis=1)
    both = [expm(flow * (80 - t)) @ v for v, t in zip(both, state["last event"], strict=True)]
    assert np.abs(np.sum(both, axis=0)).max() < 1e-13 * np.abs(both).max()


@pytest.mark.parametrize("graph", ["lollipop", "wheel", "K23", "star9"])
def test_msda_is_its_loop(graph):
    """Chebyshev gossip by eigenvalues instead of the recursion; K |E| activations and n dual gradients a round."""
    case = Case(graph)
    found, counts = case.rounds(MSDA(), 30)
    assert close(found, paper.msda(case.n, DIM, case.dual, case.edges, case.mu, case.L, 30))
    values = np.linalg.eigvalsh(paper.laplacian(case.n, case.edges, np.ones(len(case.edges))))
    K = math.floor(math.sqrt(values[-1] / values[1]) + 1e-6)
    assert (counts.communications, counts.dual_gradients) == (30 * K * len(case.edges), 31 * case.n)
    assert (counts.messages, counts.bytes) == (2 * counts.communications, 16 * DIM * counts.communications)


@pytest.mark.parametrize("graph", ["lollipop", "wheel", "K23", "pair"])
@pytest.mark.parametrize("multi", [False, True])
def test_adom_plus_is_its_loop(graph, multi):
    """With and without multi-consensus; a message holds 2 dim numbers."""
    case = Case(graph)
    found, counts = case.rounds(ADOMPlus(multi), 60)
    assert close(found, paper.adom_plus(case.x0, case.grad, case.edges, case.mu, case.L, 60, multi))
    values = np.linalg.eigvalsh(paper.laplacian(case.n, case.edges, np.ones(len(case.edges))))
    T = math.ceil(values[-1] / values[1] * math.log(2)) if multi else 1
    assert (counts.communications, counts.gradients) == (60 * T * len(case.edges), 60 * case.n)
    assert counts.bytes == 2 * counts.communications * 2 * DIM * 8


def test_dadaos_events_touch_what_they_should_and_conserve_the_sums_of_z():
    """A gradient moves x, xt, yt of its node; an exchange z, zt of its ends, whose messages become equal."""
    case = Case(common=True)
    every = case.events
    for count in (1, 40, 41, 42, 43):
        case.events = every[:count]
        t, i, j = every[count - 1]
        run = case.play(DADAO())
        after = case.by_node(np.stack([run.final()[name] for name in VARIABLES], axis=1))
        loop = paper.Dadao(case.mu, case.L, case.chi1, case.chi2)
        before, last = loop.play(loop.start(case.x0, case.grad, "theorem4"), case.grad, every[: count - 1])
        at_once = np.array([expm(loop.flow * (t - s)) @ v for v, s in zip(before, last, strict=True)])
        touched = [0, 1, 3] if j is None else [4, 5]
        still = [v for v in range(6) if v not in touched]
        ends = [node for node in (i, j) if node is not None]
        assert close(after[ends][:, still], at_once[ends][:, still])
        if j is not None:
            assert close(after[i, 2] + after[i, 4], after[j, 2] + after[j, 4])
    case.events = every
    run = case.play(DADAO())
    run.advance(1000)
    state = run.final()
    loop = paper.Dadao(case.mu, case.L, case.chi1, case.chi2)
    v = np.stack([state[name] for name in VARIABLES], axis=1)
    v = np.array([expm(loop.flow * (1000 - t)) @ row for row, t in zip(v, state["last event"], strict=True)])
    assert run.events > 5_000
    assert np.abs(v[:, 4:].sum(axis=0)).max() < 1e-12 * np.abs(v[:, 4:]).max()


@pytest.mark.parametrize("largest", [1.0001, 4.0, 100.0])
@pytest.mark.parametrize("graph", ["pair", "K23"])
def test_dadaos_lyapunov_function_falls_at_the_guaranteed_rate(graph, largest):
    """`E Phi` with the corrected weights falls at least at 1.15 times the guarantee's rate, from any state.

    For scalar quadratics Phi is a quadratic form Q, and what events and flow do to its expectation is another: the
    largest generalised eigenvalue of the two is the slowest fall.
    """
    case = Case(graph)
    n, mu, a = case.n, 1.0, np.linspace(1, largest, case.n)
    problem = Quadratic(a[:, None], np.zeros((n, 1)))
    where = RunSetting(problem, case.topology, case.w)
    algorithm = DADAO().resolve(where)
    table, own = algorithm.dynamics(where), np.eye(6 * n).reshape(n, 6, 6 * n)
    Q = np.zeros((6 * n, 6 * n))
    for i in range(n):
        x, xt, y, yt, z, _ = own[i]
        weights = {
            (a[i] - mu / 2) / 2: x,
            mu / 8: xt,
            1 / (16 * largest): y,
            1 / (8 * largest): yt,
            1 / (2 * mu): y + z,
        }
        Q += sum(weight * np.outer(v, v) for weight, v in weights.items())
    inverse = np.linalg.pinv(paper.laplacian(n, case.edges, case.w))
    Q += own[:, 5].T @ inverse @ own[:, 5] / (32 * case.chi1 * largest)
    drift = np.kron(np.eye(n), table.flow)
    falls = drift.T @ Q + Q @ drift
    jumps = [
        (1.0, own[i].T @ np.outer(table.gradient_jump, a[i] * own[i][0] + table.residual @ own[i])) for i in range(n)
    ]
    for (i, j), rate in zip(case.edges, case.w, strict=True):
        m = table.message @ (own[i] - own[j])
        jumps.append((rate, own[i].T @ np.outer(table.gossip_jump, m) - own[j].T @ np.outer(table.gossip_jump, m)))
    for rate, jump in jumps:
        falls += rate * (jump.T @ Q + Q @ jump + jump.T @ Q @ jump)
    sums = own[:, 4:].sum(axis=0)
    free = np.linalg.svd(sums)[2][2:].T
    slowest = eigh(free.T @ falls @ free, free.T @ Q @ free, eigvals_only=True)[-1]
    assert -slowest >= 1.15 * algorithm.guarantee(where).rate


def test_relabelled_nodes_give_relabelled_results():
    """The same events on a renamed graph: node i's answer is that of its new name."""
    case, twin = Case(common=True), Case(common=True)
    name = np.random.default_rng(1).permutation(case.n).tolist()
    old = np.argsort(name)
    twin.topology = Topology.from_edges("twin", case.n, [(name[i], name[j]) for i, j in case.edges])
    rate = {frozenset((name[i], name[j])): w for (i, j), w in zip(case.edges, case.w, strict=True)}
    twin.w = np.array([rate[frozenset(map(int, edge))] for edge in twin.topology.edges])
    twin.problem = Quadratic(case.a[old], case.b[old])
    twin.setting = RunSetting(twin.problem, twin.topology, twin.w)
    twin.events = [(t, name[i], None if j is None else name[j]) for t, i, j in case.events]
    found = twin.by_node(twin.play(DADAO()).outputs().numpy())[name]
    assert close(found, case.by_node(case.play(DADAO()).outputs().numpy()))
