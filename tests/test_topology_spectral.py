"""chi1, chi2, resistances and mixing matrices against closed forms and dense algebra."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.errors import InputError
from fedsim.topology import spectral
from fedsim.topology.build import build
from fedsim.topology.mixing import build_mixing, mixing_matrix
from fedsim.topology.spectral import Spectrum, chi, laplacian_eigenvalues, mixing_gap, resistances
from fedsim.topology.topology import Topology

PRODUCTS = ["ring:3", "ring:9", "path:2", "path:9", "star:2", "star:9", "complete:6", "hypercube:1", "hypercube:4"]
PRODUCTS += ["grid:4,5", "grid:1,5", "grid:1,2", "torus:6,7", "torus:2,5", "torus:3,2", "torus:2,2", "torus:1,5"]

UNIFORM = {  # Nabli & Oyallon (JMLR 2025): P = L / |E|, uniform rates
    "path:4": (5.12132, 1.5),
    "path:20": (771.626, 9.5),
    "star:20": (19, 9.5),
    "ring:20": (204.317, 9.5),
    "complete:20": (9.5, 9.5),
    "hypercube:4": (16, 7.5),
    "grid:3,3": (12, 4.25),
    "grid:4,4": (40.9706, 8.41071),
    "grid:4,5": (81.1591, 10.8507),
    "balanced_tree:2,3": (144.646, 7),
    "barbell:3": (15.9654, 3.5),
    "barbell:5": (70.3664, 10.5),
    "barbell:10": (538.308, 45.5),
}


def normalised(topology: Topology) -> np.ndarray:
    return np.full(topology.m, 1 / topology.m)


@pytest.mark.parametrize("text", UNIFORM)
def test_uniform_rates_have_the_published_constants(text: str):
    """chi1 and chi2 of the normalised Laplacian are those of the paper's graphs."""
    topology = build(text)
    found = chi(topology, normalised(topology))
    assert (found.chi1, found.chi2) == pytest.approx(UNIFORM[text], rel=1e-5)


@pytest.mark.parametrize("text", PRODUCTS)
def test_closed_forms_equal_dense_algebra(text: str):
    """Closed forms of chi1, chi2, resistances and eigenvalues agree with dense matrices to 1e-11."""
    topology = build(text)
    ones = np.ones(topology.m)
    dense = Spectrum(topology, ones)
    found = chi(topology, ones)
    assert (found.chi1, found.chi2) == pytest.approx((dense.chi1, dense.chi2), rel=1e-11)
    assert laplacian_eigenvalues(topology) == pytest.approx((dense.eigenvalues[1], dense.eigenvalues[-1]), rel=1e-11)
    assert resistances(topology, ones) == pytest.approx(dense.resistances, rel=1e-11)


LATTICES = [  # as networkx makes them: known by their degrees or parameters
    *("cycle_graph:9", "star_graph:9", "complete_graph:6", "path_graph:7", "hypercube_graph:4", "grid_2d_graph:5,4"),
    *("grid_2d_graph:5,4,periodic=true", "grid_graph:[3,4,5],periodic=true", "grid_graph:[2,4,2],periodic=true"),
    *("grid_graph:[5],periodic=true", "grid_graph:[5]"),
]


@pytest.mark.parametrize("text", LATTICES)
def test_closed_forms_know_the_lattices_of_networkx(text: str, monkeypatch):
    """Rings, stars, complete graphs and tori of any dimension are exact beyond the dense limit, whoever names them."""
    topology = build(text)
    rates = np.full(topology.m, 0.37)
    dense = Spectrum(topology, rates)
    monkeypatch.setattr(spectral, "DENSE", 2)
    found = chi(topology, rates)
    assert found.exact
    assert (found.chi1, found.chi2) == pytest.approx((dense.chi1, dense.chi2), rel=1e-11)


def test_a_ring_from_a_file_is_a_ring(tmp_path):
    """A graph without a name is recognised by its degrees, at any size."""
    (tmp_path / "loop.edges").write_text("\n".join(f"{i} {(i + 1) % 2100}" for i in range(2100)))
    topology = build({"file": "loop.edges"}, tmp_path)
    assert chi(topology, np.ones(2100)) == chi(build("ring:2100"), np.ones(2100))


@st.composite
def weighted_graphs(draw):
    n = draw(st.integers(2, 9))
    tree = {(draw(st.integers(0, v - 1)), v) for v in range(1, n)}
    pairs = [(u, v) for u in range(n) for v in range(u + 1, n)]
    more = draw(st.sets(st.sampled_from(pairs)))
    topology = Topology.from_edges("any", n, sorted(tree | more))
    rates = draw(st.lists(st.floats(0.1, 10), min_size=topology.m, max_size=topology.m))
    return topology, np.array(rates)


@settings(max_examples=60, deadline=None)
@given(weighted_graphs(), st.floats(0.1, 10))
def test_laws_of_chi(graph, scale):
    """Foster: sum of w R is n - 1; R <= 1/w; (n-1)/Tr <= chi2 <= chi1; scaling divides both; lambda >= (n-1)/sqrt 2."""
    topology, rates = graph
    found, resistance = chi(topology, rates), Spectrum(topology, rates).resistances
    assert rates @ resistance == pytest.approx(topology.n - 1)
    assert (resistance <= (1 + 1e-9) / rates).all()
    assert (topology.n - 1) / (2 * rates.sum()) <= found.chi2 * (1 + 1e-9)
    assert found.chi2 <= found.chi1 * (1 + 1e-9)
    scaled = chi(topology, scale * rates)
    assert (scaled.chi1 * scale, scaled.chi2 * scale) == pytest.approx((found.chi1, found.chi2))
    assert found.communications * rates.sum() >= (topology.n - 1) / np.sqrt(2) * (1 - 1e-9)


@settings(max_examples=30, deadline=None)
@given(weighted_graphs())
def test_bounds_bound(graph):
    """The bounds used beyond 2,000 nodes are bounds: of the smallest eigenvalue, and of every resistance."""
    topology, rates = graph
    dense = Spectrum(topology, rates)
    assert spectral._tree_bound(topology, rates) <= dense.eigenvalues[1] * (1 + 1e-9)
    assert (spectral.resistance_bounds(topology, rates) >= dense.resistances * (1 - 1e-9)).all()


def test_bridges_carry_resistance_one_over_rate():
    """On a tree every edge is a bridge, R = 1/w."""
    tree = build("balanced_tree:2,3")
    rates = np.linspace(1, 3, tree.m)
    assert Spectrum(tree, rates).resistances == pytest.approx(1 / rates)


def test_an_edge_of_rate_zero_does_not_count():
    """chi2 is taken over the edges that fire."""
    ring, path = build("ring:6"), build("path:6")
    rates = np.ones(6)
    rates[[tuple(e) == (0, 5) for e in ring.edges.tolist()]] = 0
    assert chi(ring, rates).chi2 == pytest.approx(0.5)
    assert chi(ring, rates).chi1 == pytest.approx(chi(path, np.ones(5)).chi1)


def test_large_graphs_get_certified_upper_bounds(monkeypatch):
    """Beyond the dense limit chi is an upper bound, is called so, and is close where a factorisation is affordable."""
    topology = build("random_regular:300,4,1")
    exact = chi(topology, np.ones(topology.m))
    monkeypatch.setattr(spectral, "DENSE", 100)
    bound = chi(topology, np.ones(topology.m))
    assert not bound.exact
    assert exact.chi1 <= bound.chi1 <= exact.chi1 * (1 + 1e-5)
    assert exact.chi2 <= bound.chi2
    low, high = laplacian_eigenvalues(topology)
    eigenvalues = Spectrum(topology, np.ones(topology.m)).eigenvalues
    assert (low, high) == pytest.approx((eigenvalues[1], eigenvalues[-1]), rel=1e-6)


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ([1.0, -1, 1, 1], "rate of edge"),
        ([1, np.nan, 1, 1], "rate of edge"),
        ([1, 1, 1], "4 edges"),
        ([0, 0, 1, 1], "never meet"),
        ([1e-16, 1, 1e-16, 1], "lost in rounding"),
    ],
)
def test_rates_that_cannot_be_used_are_refused(rates: list, words: str):
    """Negative, undefined, too few or disconnecting rates are refused by name."""
    with pytest.raises(InputError, match=words):
        chi(build("ring:4"), np.array(rates, dtype=float))


@pytest.mark.parametrize("kind", ["metropolis", "max_degree", "fdla", "fastest_mixing"])
@pytest.mark.parametrize("lazy", [False, True])
def test_mixing_matrices_are_symmetric_and_doubly_stochastic(kind: str, lazy: bool, tmp_path, monkeypatch):
    """Every kind gives a symmetric, doubly stochastic contraction on the edges; lazy halves the step."""
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    topology = build("random_geometric:12,0.5,2")
    matrix = mixing_matrix(topology, kind, lazy=lazy)
    dense = matrix.toarray()
    assert np.abs(dense - dense.T).max() == 0
    assert dense.sum(axis=0) == pytest.approx(np.ones(12), abs=1e-13)
    assert 0 < mixing_gap(matrix) <= 1
    assert np.count_nonzero(np.triu(dense, 1)) <= topology.m
    assert (dense + np.eye(12)) / 2 == pytest.approx(mixing_matrix(topology, kind, lazy=True).toarray()) or lazy


def test_optimal_matrices_mix_faster_than_local_rules(tmp_path, monkeypatch):
    """FDLA mixes at least as fast as the fastest Markov chain, and that as fast as Metropolis."""
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    topology = build("barbell:4")
    gaps = [mixing_gap(mixing_matrix(topology, k)) for k in ("metropolis", "fastest_mixing", "fdla")]
    assert gaps[0] < gaps[1] <= gaps[2] * (1 + 1e-6)


def test_large_graphs_are_pointed_from_cvxpy_to_metropolis():
    """FDLA beyond what cvxpy can do is refused with the alternative."""
    with pytest.raises(InputError, match="metropolis"):
        mixing_matrix(build("ring:200"), "fdla")


def test_mixing_gap_by_lanczos_equals_the_dense_one(monkeypatch):
    """The sparse spectral gap agrees with the dense one."""
    matrix = mixing_matrix(build("random_regular:200,4,1"))
    dense = mixing_gap(matrix)
    monkeypatch.setattr(spectral, "DENSE", 100)
    assert mixing_gap(matrix) == pytest.approx(dense, rel=1e-6)


def test_mixing_gap_of_a_large_torus_is_a_closed_form(monkeypatch):
    """Where all weights are equal on a torus the gap follows from the Laplacian's closed form."""
    torus = build("torus:11,13")
    for lazy in (False, True):
        monkeypatch.undo()
        matrix = mixing_matrix(torus, lazy=lazy)
        dense = mixing_gap(matrix)
        monkeypatch.setattr(spectral, "DENSE", 100)
        assert mixing_gap(matrix, torus) == pytest.approx(dense, rel=1e-10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w * 0.9, "doubly stochastic"),
        (lambda w: w + np.triu(np.full((4, 4), 1e-3), 1), "not symmetric"),
        (lambda w: w[:3], "shape"),
        (lambda w: w * np.nan, "finite"),
        (lambda w: np.full((4, 4), 0.25), "share no edge"),
        (lambda w: np.eye(4) - 1.8 * (np.eye(4) - w), "magnitude 1.4 .* diverges"),
    ],
)
def test_a_mixing_matrix_from_a_file_is_checked(tmp_path, change, words: str):
    """A user's matrix must be symmetric, doubly stochastic, finite and zero off the edges."""
    topology = build("ring:4")
    good = mixing_matrix(topology).toarray()
    np.save(tmp_path / "good.npy", good)
    np.save(tmp_path / "bad.npy", change(good))
    assert (build_mixing({"file": "good.npy"}, topology, tmp_path).toarray() == good).all()
    with pytest.raises(InputError, match=words):
        build_mixing({"file": "bad.npy"}, topology, tmp_path)
