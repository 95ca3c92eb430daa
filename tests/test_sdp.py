"""Optimal gossip rates: published values, certificates, and three solvers that agree."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.topology.build import build
from fedsim.topology.interior_point import required
from fedsim.topology.optimise import optimise
from fedsim.topology.rates import gossip_rates
from fedsim.topology.sets import rate_set
from fedsim.topology.spectral import chi
from fedsim.topology.topology import Topology

SETS = ("total", "node_rate", "node_bandwidth")
SOLVERS = ("cvxpy", "interior_point", "surrogate")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))


PUBLISHED = {  # communications per unit time with SDP rates, budget 1 (Nabli & Oyallon, JMLR 2025)
    "path:4": 3.91969,
    "path:20": 121.082,
    "star:20": 19,
    "ring:20": 62.3059,
    "complete:20": 13.43503,
    "hypercube:4": 15.4919,
    "grid:3,3": 9.8337,
    "grid:4,4": 24.8897,
    "grid:4,5": 37.2066,
    "balanced_tree:2,3": 42.1255,
    "barbell:3": 8.22101,
    "barbell:4": 13.20544,
    "barbell:5": 18.21509,
    "barbell:10": 42.64563,
    "barbell:20": 91.04837,
    "barbell:50": 235.96610,
    "wheel_graph:8": 7.6431,
    "complete_multipartite_edges": 5.44755,
    "gnp_random_graph:10,0.8,1": 7.16420,
}


def graph(text: str) -> Topology:
    if text == "complete_multipartite_edges":  # K_{1,3,4}
        part = np.repeat([0, 1, 2], [1, 3, 4])
        pairs = [(u, v) for u in range(8) for v in range(u + 1, 8) if part[u] != part[v]]
        return Topology.from_edges("K134", 8, pairs)
    if text == "double_star":
        return Topology.from_edges(
            "double star", 10, [(0, 5), *((0, i) for i in range(1, 5)), *((5, i) for i in range(6, 10))]
        )
    if text == "K6 minus an edge":
        return Topology.from_edges(text, 6, build("complete:6").edges[1:])
    return build(text)


@pytest.mark.parametrize("text", PUBLISHED)
def test_values_of_known_graphs(text: str):
    """On every graph with a known optimum the rates reach it to 1e-4, certified to 1e-3."""
    rates = gossip_rates(graph(text))
    assert rates.communications == pytest.approx(PUBLISHED[text], rel=1e-4)
    assert rates.gap is not None
    assert rates.gap < 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
def test_dense_graphs_need_the_corrected_bound_on_u(solver):
    """K6 minus an edge has the optimum 11 sqrt(2)/4 with chi1 = chi2 = 2.75, which the printed `u >= 1` misses."""
    rates = gossip_rates(graph("K6 minus an edge"), solver=solver)
    assert rates.communications == pytest.approx(11 * np.sqrt(2) / 4, rel=2e-4)
    assert (rates.chi1, rates.chi2) == pytest.approx((2.75, 2.75), rel=5e-3)


def lemma_8(n: int) -> tuple[float, float, float]:
    """Rates inside a clique, at the bridge's ends, and on the bridge of K_n - K_n (JMLR 2025, Lemma 8, n >= 4)."""
    c = (4 - n + np.sqrt(2 * n * (n - 1))) / (2 * (8 + n))
    b = c / (n - 2) * (np.sqrt(2 * (n - 1) / n) - 2 / n)
    return (1 - c - 2 * b * (n - 1)) / ((n - 1) * (n - 2)), b, c


@pytest.mark.parametrize("n", [4, 5, 10])
def test_barbell_rates_are_those_of_lemma_8(n: int):
    """On two cliques joined by an edge the three kinds of edges get the rates of the closed form."""
    topology = build(f"barbell:{n}")
    rates = gossip_rates(topology, solver="interior_point").rates
    ends = np.isin(topology.edges, (n - 1, n)).sum(axis=1)
    for touching, wanted in enumerate(lemma_8(n)):
        assert rates[ends == touching] == pytest.approx(np.full((ends == touching).sum(), wanted), rel=2e-2)


NODE_SETS = [
    ("wheel_graph:8", "node_rate", 0.95539),
    ("grid:3,3", "node_rate", 1.09264),
    ("wheel_graph:8", "node_bandwidth", 2.08028),
    ("grid:3,3", "node_bandwidth", 2.49189),
]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("text", "set", "value"), NODE_SETS)
def test_per_node_sets(text, set, value, solver):
    """sqrt(2 chi1 chi2) under per-node rates and bandwidths on figure 7's graphs, to 5 digits (the surrogate to 3)."""
    rates = gossip_rates(build(text), set=set, solver=solver)
    assert rates.chi.communications == pytest.approx(value, rel=1e-3 if solver == "surrogate" else 2e-5)
    assert rate_set(build(text), set).gauge(rates.rates) <= 1 + 1e-9


@st.composite
def questions(draw):
    n = draw(st.integers(3, 8))
    tree = {(draw(st.integers(0, v - 1)), v) for v in range(1, n)}
    more = draw(st.sets(st.sampled_from([(u, v) for u in range(n) for v in range(u + 1, n)])))
    rng = np.random.default_rng(draw(st.integers(0, 100)))
    edges = sorted(tree | more)
    topology = Topology.from_edges("any", n, edges, costs=rng.uniform(0.5, 2, len(edges)))
    kind = draw(st.sampled_from(SETS))
    return topology, rate_set(topology, kind, None if kind == "total" else rng.uniform(0.5, 2, n)), rng


@settings(max_examples=15, deadline=None)
@given(questions())
def test_solvers_agree_and_certificates_hold(question):
    """With random graphs, costs and caps: three solvers agree, every bound lies below every value."""
    topology, affordable, rng = question
    answers = [optimise(topology, affordable, solver) for solver in SOLVERS]
    values = [required(topology, affordable, answer.rates) for answer in answers]
    bound = max(answer.bound for answer in answers)
    assert bound <= min(values) * (1 + 1e-9)
    assert values == pytest.approx([bound] * 3, rel=2e-3)
    for _ in range(20):
        other = affordable.normalise(rng.exponential(size=topology.m) + 1e-3)
        assert required(topology, affordable, other) >= bound * (1 - 1e-9)


def test_rates_are_inside_the_set_and_constants_are_their_own():
    """The returned rates fill the budget, and chi1, chi2 are recomputed from them."""
    topology = build("grid:4,5")
    rates = gossip_rates(topology)
    assert rates.rates.sum() == pytest.approx(1)
    assert (rates.rates > 0).all()
    assert rates.chi == chi(topology, rates.rates)


PRUNED = {
    "barbell:5": (14.449, 9),
    "barbell:10": (32.051, 19),
    "grid:4,5": (36.213, 28),
    "gnp_random_graph:10,0.8,1": (7.057, None),
    "ring:12": (None, 12),
    "complete:6": (None, 15),
    "K6 minus an edge": (None, 14),
}


@pytest.mark.parametrize("text", PRUNED)
def test_prune_and_resolve(text):
    """Pruning reaches the known values on fewer edges, and leaves symmetric graphs as they are."""
    topology, (value, edges) = graph(text), PRUNED[text]
    whole, pruned = gossip_rates(topology), gossip_rates(topology, prune=True)
    assert pruned.communications == pytest.approx(value or whole.communications, rel=1e-4)
    assert edges is None or pruned.edges == edges
    assert pruned.communications <= whole.communications * (1 + 1e-9)


@pytest.mark.parametrize(("seed", "set"), [(4, "node_rate"), (4, "node_bandwidth"), (5, "node_rate")])
def test_costs_and_caps_of_six_decades_still_get_an_answer(seed, set):
    """Where cvxpy certifies little or fails, or rounding ends the interior point early, `auto` answers all the same."""
    rng = np.random.default_rng(seed)
    base = build("random_geometric:12,0.45,2")
    topology = Topology.from_edges("steep", base.n, base.edges, costs=10.0 ** rng.uniform(-3, 3, base.m))
    rates = gossip_rates(topology, set=set, caps=10.0 ** rng.uniform(-3, 3, base.n))
    assert rates.gap is not None
    assert rates.gap < 0.02
    assert rates.bound <= rates.chi.communications * (1 + 1e-9)


def test_quickstart_graph_saves_more_than_half():
    """On the quickstart's geometric graph of 50 nodes SDP rates need 55 to 70 % fewer communications."""
    topology = build("geometric-50")
    uniform, sdp = gossip_rates(topology, "uniform"), gossip_rates(topology)
    assert 0.55 < 1 - sdp.communications / uniform.communications < 0.70
    assert sdp.solver == "interior_point"


def test_large_dense_graphs_get_a_value_and_an_honest_gap():
    """With more edges than the interior point's matrices can hold the answer still carries a certificate."""
    topology = build("random_geometric:130,0.6,1")
    assert topology.m > 4000
    rates = gossip_rates(topology)
    assert rates.solver == "surrogate"
    assert rates.gap is not None
    assert rates.gap < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["random_geometric:100,0.5,3", "random_geometric:400,0.105,3", "random_regular:1000,4,1"]
)
def test_targets_of_size(text):
    """100 nodes and 2,400 edges, 400 and 2,600, 1,000 and 2,000: certified below 1 %."""
    rates = gossip_rates(build(text))
    assert rates.gap is not None
    assert rates.gap < 0.01
