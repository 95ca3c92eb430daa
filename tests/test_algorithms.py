"""The algorithms are their papers': published traces, exact mean-square rates, invariants, constants.

Exact rates: for scalar quadratics `f_i(x) = a_i x^2 / 2` the second moment of all variables obeys a linear equation,
whose spectral abscissa is computed here from the table of coefficients alone; no engine takes part.
"""

import math

import networkx as nx
import numpy as np
import pytest
import torch
from cases import quadratic
from scipy.linalg import expm

from fedsim.algorithms.a2cid2 import A2CiD2, GossipSGD
from fedsim.algorithms.adom import ADOMPlus
from fedsim.algorithms.algorithm import Sampling
from fedsim.algorithms.continuized import Continuized
from fedsim.algorithms.dadao import DADAO
from fedsim.algorithms.gossip import AcceleratedGossip, RandomisedGossip
from fedsim.algorithms.msda import MSDA, _coefficients
from fedsim.engine.flow import Flow
from fedsim.engine.layout import Layout
from fedsim.engine.rounds import Rounds
from fedsim.errors import InputError
from fedsim.problems.data.table import Data
from fedsim.problems.least_squares import LeastSquares
from fedsim.problems.quadratic import Quadratic
from fedsim.setting import RunSetting
from fedsim.topology.mixing import mixing_matrix
from fedsim.topology.rates import gossip_rates
from fedsim.topology.spectral import laplacian
from fedsim.topology.topology import Topology


def setting(graph, curvatures=None, scale=1.0, problem=None, common=True):
    """Return a setting with uniform rates of `scale` times what the theory asks for."""
    topology = Topology.from_networkx(graph, "test")
    a = np.linspace(1, 4, topology.n) if curvatures is None else np.asarray(curvatures, float)
    rates = gossip_rates(topology, "uniform").theory().scaled(scale)
    problem = problem or Quadratic(a[:, None], np.zeros((topology.n, 1)))
    return RunSetting(problem, topology, rates.rates, rates.chi, mixing_matrix(topology), common)


def events_of(table, where, curvatures):
    """Return (rate, J) of every event on the stacked variables `[n k]`: after it they are `(I + J) v`."""
    n, k = where.n, table.k
    found = []
    if table.node_clocks:
        for i, a in enumerate(curvatures):
            jump = np.zeros((n * k, n * k))
            own = slice(i * k, (i + 1) * k)
            jump[own, own] = np.outer(table.gradient_jump, a * table.point + table.residual)
            found.append((1.0, jump))
    for (i, j), rate in zip(where.edges, where.rates, strict=True):
        jump, inner = np.zeros((n * k, n * k)), np.outer(table.gossip_jump, table.message)
        for row, column, sign in ((i, i, 1), (i, j, -1), (j, j, 1), (j, i, -1)):
            jump[row * k : (row + 1) * k, column * k : (column + 1) * k] = sign * inner
        found.append((rate, jump))
    return found


def abscissa(table, where, curvatures, conserved):
    """Return the growth rate of the second moment on the subspace where the sums of `conserved` vanish."""
    n, k = where.n, table.k
    constraints = np.zeros((len(conserved), n * k))
    for row, weights in enumerate(conserved):
        constraints[row] = np.tile(weights, n)
    basis = np.linalg.svd(constraints)[2][len(conserved) :].T if len(conserved) else np.eye(n * k)
    drift = basis.T @ np.kron(np.eye(n), table.flow) @ basis
    one = np.eye(len(drift))
    generator = np.kron(drift, one) + np.kron(one, drift)
    for rate, jump in events_of(table, where, curvatures):
        inner = basis.T @ jump @ basis
        generator += rate * (np.kron(inner, one) + np.kron(one, inner) + np.kron(inner, inner))
    return float(np.linalg.eigvals(generator).real.max())


Z, ZT = np.eye(6)[4], np.eye(6)[5]
GRAPHS = {
    "path2": nx.path_graph(2), "path3": nx.path_graph(3), "complete3": nx.complete_graph(3),
    "star4": nx.star_graph(3), "cycle4": nx.cycle_graph(4), "complete4": nx.complete_graph(4),
}  # fmt: skip


@pytest.mark.parametrize(
    ("graph", "largest", "rate"),
    [
        ("path2", 4, -0.081980), ("path3", 4, -0.072738), ("complete3", 4, -0.070885), ("star4", 4, -0.068817),
        ("cycle4", 4, -0.069671), ("complete4", 4, -0.068830), ("path2", 100, -0.017623), ("path3", 100, -0.014662),
        ("complete3", 100, -0.014218), ("star4", 100, -0.013657), ("cycle4", 100, -0.013853),
    ],
)  # fmt: skip
def test_dadao_has_its_exact_mean_square_rate(graph, largest, rate):
    """The table's second moment falls at the exactly known rate, and at least as fast as the guarantee says."""
    where = setting(GRAPHS[graph], np.linspace(1, largest, len(GRAPHS[graph])))
    algorithm = DADAO().resolve(where)
    exact = abscissa(algorithm.dynamics(where), where, where.problem.L, (Z, ZT))
    assert exact == pytest.approx(rate, rel=2e-4)
    assert -exact >= algorithm.guarantee(where).rate


@pytest.mark.parametrize(("slower", "rate"), [(1, -0.0146616), (2, -0.0073308), (4, -0.0036654)])
def test_dadao_slows_down_by_c_when_the_network_is_slow(slower, rate):
    """With 1/2 and 1/4 of the rates, c = 2 and 4 keep DADAO stable, and the exact rate is divided by c."""
    where = setting(GRAPHS["path3"], np.linspace(1, 100, 3), 1 / slower)
    exact = abscissa(DADAO().resolve(where).dynamics(where), where, where.problem.L, (Z, ZT))
    assert exact == pytest.approx(rate, rel=2e-4)


@pytest.mark.parametrize(
    ("graph", "largest", "threshold"), [("path2", 4, 0.7717), ("path3", 100, 0.9032), ("star4", 4, 0.8054)]
)
def test_fixed_constants_diverge_below_the_known_gossip_rates(graph, largest, threshold):
    """With the constants of c = 1, too little gossip means divergence: the threshold is where it is known to be."""
    a = np.linspace(1, largest, len(GRAPHS[graph]))
    enough = setting(GRAPHS[graph], a)
    for factor, stable in ((threshold + 0.002, True), (threshold - 0.002, False), (0.7, False), (2.0, True)):
        where = setting(GRAPHS[graph], a, factor)
        fixed = DADAO().resolve(enough)
        beta_t = 2 * where.chi1 * math.sqrt(where.L / (where.mu / 2))
        table = DADAO(**{**fixed.__dict__, "beta_t": beta_t}).dynamics(where)
        assert (abscissa(table, where, a, (Z, ZT)) < 0) == stable


def test_the_printed_alpha_would_violate_the_bound():
    """Half of alpha, as the journal prints it, loses against the printed rate where ours keeps its own."""
    where = setting(GRAPHS["path2"], [100, 100])
    where.problem.mu = np.array([1.0, 1.0])
    printed = DADAO(alpha=DADAO().resolve(where).alpha / 2).resolve(where)
    assert -abscissa(printed.dynamics(where), where, [100, 100], (Z, ZT)) == pytest.approx(0.011807, rel=1e-3)
    assert -abscissa(DADAO().resolve(where).dynamics(where), where, [100, 100], (Z, ZT)) > 1 / (8 * math.sqrt(200))


@pytest.mark.parametrize(("largest", "error"), [(4, 0.027124), (16, 0.010728), (64, 0.005018)])
def test_gradient_noise_leaves_the_exactly_known_bias(largest, error):
    """With unit-variance noise the stationary error of path 2 is what the second-moment equation gives."""
    where = setting(GRAPHS["path2"], [1.0, 1.0])
    where.problem.L = np.array([float(largest)] * 2)
    table, n, k = DADAO().resolve(where).dynamics(where), 2, 6
    constraints = np.stack([np.tile(Z, n), np.tile(ZT, n)])
    basis = np.linalg.svd(constraints)[2][2:].T
    drift = basis.T @ np.kron(np.eye(n), table.flow) @ basis
    one = np.eye(len(drift))
    generator = np.kron(drift, one) + np.kron(one, drift)
    for rate, jump in events_of(table, where, [1.0, 1.0]):
        inner = basis.T @ jump @ basis
        generator += rate * (np.kron(inner, one) + np.kron(one, inner) + np.kron(inner, inner))
    noise = np.kron(np.eye(n), np.outer(table.gradient_jump, table.gradient_jump))
    moment = basis @ np.linalg.solve(generator, -(basis.T @ noise @ basis).ravel()).reshape(one.shape) @ basis.T
    assert np.mean([moment[i * k, i * k] for i in range(n)]) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_flow_is_the_matrix_exponential(scale):
    """exp(A t) of DADAO equals scipy's to 1e-12 for short and long times, and composes."""
    where = setting(GRAPHS["path3"], np.linspace(1, 100, 3), scale)
    a = DADAO().resolve(where).dynamics(where).flow
    flow = Flow.of(a)
    for t in (1e-6, 0.01, 1.0, 30.0):
        reference = expm(a * t)
        assert np.abs(flow.at(t) - reference).max() <= 1e-12 * np.abs(reference).max()
    assert np.allclose(flow.at(0.3) @ flow.at(0.5), flow.at(0.8), rtol=0, atol=1e-12 * np.abs(flow.at(0.8)).max())


def test_the_saddle_point_is_a_fixed_point():
    """x = x*, y = grad f_i(x*) - nu x*, z = -grad f_i(x*) is left alone by flow, gradients and gossip."""
    problem = quadratic(4, 3)
    where = setting(GRAPHS["cycle4"], problem=problem)
    algorithm = DADAO().resolve(where)
    table, best = algorithm.dynamics(where), problem.optimum()
    g = problem.gradient(best.expand(4, -1).contiguous(), np.arange(4)).numpy()
    x = np.tile(best.numpy(), (4, 1))
    v = np.stack([x, x, g - algorithm.nu * x, g - algorithm.nu * x, -g, -g], axis=1)
    assert np.abs(np.einsum("ab,ibd->iad", table.flow, v)).max() < 1e-12
    residual = g + np.einsum("a,iad->id", table.residual, v)
    assert np.abs(residual).max() < 1e-12
    message = np.einsum("a,iad->id", table.message, v)
    assert np.abs(message - message[0]).max() < 1e-12


def test_dadaos_constants_are_those_of_the_published_trace():
    """For the data of the published trace, all constants agree to ten digits."""
    where = golden_setting()
    p = DADAO().resolve(where)
    assert (where.mu, where.L) == (pytest.approx(0.26453590298894), pytest.approx(4.58741662721671))
    assert (where.chi1, float(where.rates.sum())) == (pytest.approx(1.30656296487638), pytest.approx(3.91968889462913))
    assert p.eta == p.eta_t == p.alpha_t == pytest.approx(0.02122527054121)
    assert p.alpha == p.delta == pytest.approx(0.04245054108242)
    assert (p.theta, p.beta_t) == (pytest.approx(2.94460322089416), pytest.approx(15.389238058704))
    assert (p.gamma, p.gamma_t) == (pytest.approx(0.05449690322801), pytest.approx(0.32094351354792))


def test_dadaos_constants_follow_from_a_given_nu():
    """With nu given, every constant that is left is what its printed formula says for that nu."""
    where = setting(GRAPHS["path3"], scale=0.5)
    nu, L, c, chi1 = 0.3, 4.0, 2.0, where.chi1
    values = {k.name: k for k in DADAO(nu=nu, gamma=0.02).resolve(where).constants(where)}
    root = math.sqrt(nu / L)
    expected = {"eta": root / (8 * c), "alpha": root / (4 * c), "theta": 1 / (2 * c * root), "delta": root / (4 * c)}
    expected |= {"gamma_t": 1 / (4 * c * math.sqrt(nu * L)), "beta_t": 2 * chi1 / root / c}
    for name, value in expected.items():
        assert values[name].value == pytest.approx(value, rel=1e-12)
        assert values[name].formula != "given"
    assert [name for name in ("nu", "gamma") if values[name].formula == "given"] == ["nu", "gamma"]
    assert DADAO(nu=nu).resolve(where).guarantee(where).broken == ("given instead of derived: nu",)


def test_dadaos_guarantee_says_which_hypothesis_is_broken():
    """Another start, stochastic gradients or a constant of one's own turn the bound into a slope, by name."""
    where = setting(GRAPHS["path3"])
    assert DADAO().resolve(where).guarantee(where).broken == ()
    assert "start" in DADAO(init="local").resolve(where).guarantee(where).broken[0]
    assert "stochastic" in DADAO(batch=Sampling(2)).resolve(where).guarantee(where).broken[0]
    assert "gamma" in DADAO(gamma=0.01).resolve(where).guarantee(where).broken[0]
    with pytest.raises(InputError, match="needs a common start"):
        DADAO(init="theorem4").resolve(setting(GRAPHS["path3"], common=False))


def test_a2cid2_has_the_published_constants():
    """Cycle of 8, one exchange per worker and unit of time: chi1, chi2, eta, alpha_t of the authors' code."""
    topology = Topology.from_networkx(nx.cycle_graph(8), "cycle8")
    rates = gossip_rates(topology, "uniform").scaled(4.0)
    where = RunSetting(quadratic(8, 1), topology, rates.rates, rates.chi)
    p = A2CiD2(step=0.1).resolve(where)
    assert (where.chi1, where.chi2) == (pytest.approx(3.414214, rel=1e-6), pytest.approx(0.875))
    assert (p.alpha, p.eta, p.alpha_t) == (0.5, pytest.approx(0.289281, rel=1e-5), pytest.approx(0.987669, rel=1e-5))


@pytest.mark.parametrize(
    ("graph", "accelerated", "plain"),
    [
        (nx.cycle_graph(8), 0.35986, 0.26806), (nx.path_graph(8), 0.21606, 0.08572),
        (nx.star_graph(7), 0.42206, 0.39329),
        (nx.complete_graph(8), 0.57143, 0.57143), (nx.path_graph(2), 1.0, 1.0),
    ],
)  # fmt: skip
def test_gossip_contracts_at_its_exact_rate(graph, accelerated, plain):
    """Consensus falls at the exactly known mean-square rates, accelerated and plain, never slower than guaranteed."""
    topology = Topology.from_networkx(graph, "test")
    rates = gossip_rates(topology, "uniform").scaled(topology.n / 2)
    where = RunSetting(quadratic(topology.n, 1), topology, rates.rates, rates.chi)
    fast, slow = AcceleratedGossip().resolve(where), RandomisedGossip()
    rate = -abscissa(fast.dynamics(where), where, [], (np.array([1.0, 0]), np.array([0, 1.0])))
    assert rate == pytest.approx(accelerated, rel=2e-4)
    assert rate >= (1 - 1e-9) / (2 * math.sqrt(where.chi1 * where.chi2))
    rate = -abscissa(slow.dynamics(where), where, [], (np.ones(1),))
    assert rate == pytest.approx(plain, rel=2e-4)
    assert rate >= (1 - 1e-9) * slow.guarantee(where).rate


def test_momentum_is_heavy_ball():
    """The buffer's table does `b = m b + g, x -= step b, xt -= step b`, as the loop written out does."""
    where = setting(GRAPHS["path2"])
    for algorithm in (A2CiD2(step=0.1, momentum=0.9), GossipSGD(step=0.1, momentum=0.9)):
        table = algorithm.resolve(where).dynamics(where)
        v, g = np.array([2.0, 3.0, 0.5])[-table.k :], 0.7
        after = table.gradient_map @ v + table.gradient_jump * g
        buffer = 0.9 * v[-1] + g
        assert np.allclose(after, [*(v[:-1] - 0.1 * buffer), buffer])
    with pytest.raises(InputError, match="does not combine with momentum"):
        A2CiD2(step=0.1, momentum=0.9, decay={"after": 1.0}).resolve(where)


def golden_setting():
    """Return the four nodes, three records each, of the published deterministic trace, on a path."""
    a = np.array([[[math.cos(1 + i + 2 * j + 3 * c) + (j == c) for c in range(2)] for j in range(3)] for i in range(4)])
    b = np.array([[math.sin(1 + i * j) + 0.5 * i for j in range(3)] for i in range(4)])
    data = Data(a.reshape(12, 2), b.ravel(), {}, "golden", "regression", (), ("a", "b"))
    problem = LeastSquares(data, [np.arange(3 * i, 3 * i + 3) for i in range(4)])
    return setting(nx.path_graph(4), problem=problem)


def golden_rounds(algorithm):
    """Return a player of the golden problem, from the published start."""
    where = golden_setting()
    x0 = torch.tensor([[0.1 * (i + 1) * (c + 1) for c in range(2)] for i in range(4)], dtype=torch.float64)
    layout = Layout(where.topology)
    made = Rounds(
        algorithm.resolve(where), where.problem, layout, {"laplacian": laplacian(where.topology)}, x0[layout.nodes], 0
    )
    made.start()
    return where, made


def error(where, made):
    return float(((made.outputs() - where.problem.optimum()) ** 2).sum(dim=1).mean())


def by_node(where, made):
    return made.outputs().numpy()[where.topology.position]


def test_msda_reproduces_the_published_trace():
    """The reference's four-node run: K, steps, the first output to ten digits, the errors after 1, 2, 10, 40 steps."""
    where, made = golden_rounds(MSDA())
    derived = MSDA().resolve(where)
    assert derived._chebyshev.K == 2
    assert (derived._eta, derived._m) == (pytest.approx(0.19840192724171), pytest.approx(0.70969080156047))
    found = []
    for steps in (1, 2, 10, 40):
        made.advance(steps)
        found.append(error(where, made))
        if steps == 1:
            first = [
                1.2530155058,
                1.1370270526,
                1.4434125245,
                1.2915815749,
                0.9755596772,
                1.4018884136,
                1.1248089682,
                1.5085364628,
            ]
            assert np.allclose(by_node(where, made).ravel(), first, rtol=0, atol=1e-9)
    assert np.allclose(found, [0.0649660266, 0.0796341568, 1.60418440e-4, 8.3454576e-10], rtol=1e-6)
    assert made.counts.communications == 40 * 2 * 3
    assert made.counts.dual_gradients == 41 * 4


@pytest.mark.parametrize(
    ("multi", "errors", "mixings"),
    [
        (False, {1: 2.7734853345, 2: 3.1155791819, 50: 0.9984142391, 500: 1.6466706621e-5}, 1),
        (True, {1: 2.3379648297, 2: 2.7919937974, 50: 0.1049598661, 500: 3.5290843419e-8}, 5),
    ],
)
def test_adom_plus_reproduces_the_published_trace(multi, errors, mixings):
    """The reference's errors after 1, 2, 50 and 500 rounds, with and without multi-consensus."""
    where, made = golden_rounds(ADOMPlus(multi))
    for rounds, expected in errors.items():
        made.advance(rounds)
        assert error(where, made) == pytest.approx(expected, rel=1e-8)
    assert made.counts.communications == 500 * mixings * 3
    assert made.counts.gradients == 500 * 4


@pytest.mark.parametrize("side", [2, 5, 12, 45])
def test_msdas_inner_steps_do_not_hang_on_rounding(side):
    """On a star of K^2 nodes, where `1/sqrt(g)` is K, MSDA takes K inner steps, on either side of the last digit."""
    for least in (1 - 1e-15, 1.0, 1 + 1e-8):
        for largest in (side**2 * (1 - 1e-15), side**2 * (1 + 1e-15)):
            steps = _coefficients(least, largest, side**2 - 1).K
            assert steps == side
    steps = _coefficients(1.0, side**2 - 0.01, side**2 - 1).K
    assert steps == side - 1


def test_adom_plus_conserves_the_sum_of_z():
    """`sum z = 0` at all times."""
    _, made = golden_rounds(ADOMPlus())
    made.advance(200)
    assert np.abs(made.final()["z"].sum(axis=0)).max() < 1e-12


def test_on_the_complete_graph_one_exchange_averages():
    """MSDA does not divide by zero there, and ADOM+ with multi-consensus is ADOM+."""
    problem = quadratic(5, 3)
    where = setting(nx.complete_graph(5), problem=problem)
    layout, x0 = Layout(where.topology), torch.zeros(5, 3).double()
    runs = []
    for algorithm in (MSDA(), ADOMPlus(), ADOMPlus(True)):
        made = Rounds(algorithm.resolve(where), problem, layout, {"laplacian": laplacian(where.topology)}, x0, 0)
        made.start()
        made.advance(300)
        runs.append(made.outputs())
    assert torch.allclose(runs[0], problem.optimum().expand(5, -1), atol=1e-10)
    assert torch.allclose(runs[1], runs[2], rtol=0, atol=1e-12)


def test_continuized_needs_dual_gradients_and_keeps_its_sums():
    """Its constants are the reference's; gossip moves the two ends by opposite amounts."""
    where = golden_setting()
    p = Continuized().resolve(where)
    values = {c.name: c.value for c in p.constants(where)}
    assert values["eta"] == pytest.approx(0.06126417942107)
    assert values["gamma"] == pytest.approx(0.04408931716482)
    assert values["gamma_z"] == pytest.approx(1.01775149654278)
    table = p.dynamics(where)
    assert table.dual
    assert not table.node_clocks
