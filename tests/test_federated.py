"""Federated averaging by parts: optimisers, estimators, reductions, counts, partial participation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import quadratic

import fedsim
from fedsim.algorithms.estimators import FiniteDifferences
from fedsim.algorithms.optimisers import SGD, Adam, adam, sgd
from fedsim.engine.counts import Counts
from fedsim.engine.layout import Layout
from fedsim.engine.oracle import BlockOracle
from fedsim.engine.rounds import Rounds
from fedsim.engine.streams import RoundDraws, Streams
from fedsim.errors import Diverged, InputError
from fedsim.problems.black_box import BlackBox
from fedsim.problems.build import build
from fedsim.registry import find
from fedsim.setting import RunSetting
from fedsim.topology.build import build as topology

QUADRATIC = {"kind": "synthetic_quadratic", "dim": 8, "heterogeneity": 5}


def problem(n=5, **changes):
    return build({**QUADRATIC, **changes}, n, 3, Path())


def play(kind, p, rounds=3, x0=None, seed=0, block="auto", **parameters):
    """Return a player after some rounds of an algorithm on a problem."""
    made = find("algorithm", kind, Path())(**parameters)
    server = topology({"kind": "server", "n": p.n}, Path())
    made = made.resolve(RunSetting(p, server))
    x0 = p.start(np.arange(p.n)) if x0 is None else x0
    player = Rounds(made, p, Layout(server), {}, x0, seed, block=block)
    player.start()
    player.advance(rounds)
    return player


def point(*arguments, **parameters):
    return play(*arguments, **parameters).outputs()[0]


class Recorded(BlackBox):
    """A problem that remembers every point it was asked for."""

    def __init__(self, inner):
        super().__init__(inner.n, inner.dim)
        self._inner, self.points, self.start = inner, [], inner.start

    def values(self, points, nodes):
        self.points.append(points.clone())
        return self._inner.values(points, nodes)

    def evaluate(self, points, node):
        return self._inner.evaluate(points, node)


def test_optimisers_are_torchs():
    """SGD and Adam follow torch's own to 1e-12 over a hundred steps."""
    rng = np.random.default_rng(0)
    gradients = torch.from_numpy(rng.standard_normal((100, 3, 4)))
    for own, theirs in (
        (SGD("sgd", 0.1), lambda p: torch.optim.SGD([p], lr=0.1)),
        (Adam("adam", 0.03, 0.8, 0.95, 1e-6), lambda p: torch.optim.Adam([p], 0.03, (0.8, 0.95), 1e-6)),
    ):
        x = torch.ones(3, 4, dtype=torch.float64)
        parameter = torch.nn.Parameter(x.clone())
        optimiser, moments = theirs(parameter), own.start(x)
        for g in gradients:
            x, moments = own(x, g, moments)
            parameter.grad = g.clone()
            optimiser.step()
        assert (x - parameter.detach()).abs().max() < 1e-12


def test_optimisers_are_pure():
    """Neither point nor moments are modified."""
    x, g = torch.ones(2, 3), torch.ones(2, 3)
    m = Adam("adam").start(x)
    adam(x, g, m, 0.1, 0.9, 0.99, 1e-8)
    sgd(x, g, 0.1)
    assert torch.equal(x, torch.ones(2, 3))
    assert (m.first == 0).all()
    assert m.steps == 0


class Linear(BlackBox):
    """f_i(x) = a'x on all clients."""

    def __init__(self, n, dim):
        super().__init__(n, dim)
        self.slope = torch.from_numpy(np.random.default_rng(0).standard_normal(dim))

    def evaluate(self, points, node):
        return points @ self.slope


@pytest.mark.parametrize(
    ("kind", "dim", "expected"),
    [("gaussian", 30, 1.0), ("sphere", 30, 1.0), ("coordinate", 30, 1.0), ("orthonormal", 300, 1 / 300)],
)
def test_estimators_of_a_linear_function_have_the_slope_they_claim(kind, dim, expected):
    """In the mean over draws: the gradient, or with orthonormal directions the gradient divided by dim."""
    n = 2000 if kind != "orthonormal" else 300
    p = Linear(n, dim)
    f = asking(p)
    x = torch.full((n, dim), 0.5).double()
    g = FiniteDifferences(kind, 20, 0.001)(f, x, RoundDraws(Streams(0), np.arange(n), 0), "u")
    slope = float((g.mean(0) @ p.slope) / (p.slope @ p.slope))
    assert slope == pytest.approx(expected, rel=0.03)


def asking(p):
    return BlockOracle(p, np.arange(p.n), Streams(0), Counts())


def test_all_coordinates_give_the_gradient():
    """Coordinate differences with Q = dim are exact for linear functions; directions do not repeat."""
    p = Linear(3, 6)
    x = torch.full((3, 6), 0.5).double()
    g = FiniteDifferences("coordinate", 6, 0.01)(asking(p), x, RoundDraws(Streams(0), np.arange(3), 0), "u")
    assert torch.allclose(g, p.slope.expand(3, -1), rtol=1e-9)


def test_orthonormal_directions_are_those_of_gram_and_schmidt():
    """Signs included: at the minimum of a symmetric function no coordinate of the mean estimate is preferred."""
    draws = RoundDraws(Streams(0), np.arange(3000), 0)
    u = FiniteDifferences("orthonormal", 3).along(draws, "u", 5)
    first, second = (draws.normal("u", 15).view(-1, 3, 5)[:, q] for q in (0, 1))
    assert torch.allclose(u[:, 0], first / first.norm(dim=1, keepdim=True), rtol=1e-10)
    rest = second - (second * u[:, 0]).sum(1, keepdim=True) * u[:, 0]
    assert torch.allclose(u[:, 1], rest / rest.norm(dim=1, keepdim=True), rtol=1e-8, atol=1e-12)
    assert (u.sum(1).mean(0) / (u.sum(1).std(0) / 3000**0.5)).abs().max() < 4


@pytest.mark.parametrize("kind", ["coordinate", "orthonormal"])
def test_more_directions_than_dimensions_are_refused(kind):
    """Where directions must differ there are at most dim."""
    with pytest.raises(InputError, match=r"directions: 20 given, but \w+ directions in dimension 8 are at most 8"):
        play("fedzo", problem(), estimator=FiniteDifferences(kind))


def test_reductions():
    """FedProx with 0 = FedZO = SCAFFOLD with gamma 0, bit for bit; all coincide in round 1; N = 1 corrects nothing."""
    p = problem()
    plain = point("fedzo", p, local_steps=4)
    assert torch.equal(plain, point("fedprox_zo", p, local_steps=4, gamma=0.0))
    for option in (1, 2):
        none = point("scaffold_zo", p, local_steps=4, option=option, gamma=0.0)
        assert torch.equal(plain, none)
        assert not torch.equal(plain, point("scaffold_zo", p, local_steps=4, option=option))
    first = [point(k, p, 1, local_steps=4) for k in ("fedzo", "fedprox_zo", "scaffold_zo")]
    first.append(point("scaffold_zo", p, 1, local_steps=4, option=1))
    assert all(torch.equal(first[0], x) for x in first)
    alone = problem(1)
    assert torch.equal(point("fedzo", alone, local_steps=4), point("scaffold_zo", alone, local_steps=4))


def test_counts_are_those_of_the_paper():
    """FedZO asks T (Q + 1) per client, 1055 r with the repeated query; SCAFFOLD-I's exchange costs 105 more."""
    p = problem(dim=30)
    for parameters, queries, up, exchanges in (
        ({"kind": "fedzo"}, 1050, 30, 2),
        ({"kind": "fedzo", "preset": "reference_code", "safeguard": True}, 1055 + 10, 32, 4),
        ({"kind": "fedprox_zo", "repeat_query": True}, 1055, 30, 2),
        ({"kind": "scaffold_zo"}, 1050, 60, 2),
    ):
        kind = parameters.pop("kind")
        counts = play(kind, p, 3, **parameters).counts
        assert counts.queries == 3 * queries
        assert counts.bytes_up == counts.bytes_down == 3 * 5 * 8 * up
        assert counts.exchanges == 3 * exchanges
    counts = play("scaffold_zo", p, 3, option=1, repeat_query=True).counts
    assert counts.queries == 3 * 1055 + 2 * 105
    assert counts.bytes_up == 5 * 8 * 30 * (3 + 2)


def test_those_who_sit_out_compute_nothing_send_nothing_and_keep_their_state():
    """Queries, messages and control variates are those of the participants only."""
    p = problem(7)
    player = play("scaffold_zo", p, 1, participants=3, local_steps=2)
    assert player.counts.queries == 3 * 2 * 21
    assert player.counts.bytes_up == player.counts.bytes_down == 3 * 2 * 8 * 8
    own = player.final()["own"]
    assert (np.abs(own).sum(1) > 0).sum() == 3
    before = own.copy()
    player.advance(2)
    asked = player._oracles[0].queries.asked
    changed = np.abs(player.final()["own"] - before).sum(1) > 0
    assert changed.sum() == 3
    assert (asked > 0).sum() == ((np.abs(before).sum(1) > 0) | changed).sum()


def test_scaffold_with_absent_clients_keeps_the_mean_of_all_control_variates():
    """The server's mean is that of every client's own, whoever took part."""
    player = play("scaffold_zo", problem(7), 5, participants=3, local_steps=2)
    final = player.final()
    assert np.allclose(final["mean"][0], final["own"].mean(0), rtol=1e-10)


def test_weights_are_those_of_the_mean():
    """A client of weight 0 moves nothing; equal weights equal none."""
    p = problem()
    assert torch.allclose(point("fedzo", p, weights=[2.0] * 5), point("fedzo", p), rtol=1e-12)
    one = point("fedzo", p, 1, weights=[0.0, 0.0, 1.0, 0.0, 0.0])
    x = play("fedzo", p, 1, block=1)
    assert not torch.equal(one, x.outputs()[0])
    with pytest.raises(InputError, match="weights: 2 numbers given; one for each of the 5 clients"):
        play("fedzo", p, weights=[1.0, 2.0])
    with pytest.raises(InputError, match="participants: 9 of 5 clients"):
        play("fedzo", p, participants=9)
    with pytest.raises(InputError, match=r"participants: 2 given, but 3 clients weigh 0, .* at least 4 must"):
        play("fedzo", p, participants=2, weights=[0, 1, 0.0, 2, 0])


@pytest.mark.parametrize("kind", ["fedzo", "scaffold_zo", "fzoos"])
def test_no_point_outside_the_box_is_ever_asked(kind):
    """Iterates, candidates and points of differences stay in [0, 1]^dim, from a corner too."""
    p = Recorded(problem(dim=6))
    corner = torch.zeros(5, 6).double()
    more = {"features": 20, "local_steps": 4} if kind == "fzoos" else {"local_steps": 4}
    play(kind, p, 3, corner, **more)
    points = torch.cat([q.reshape(-1, 6) for q in p.points])
    assert points.min() >= 0
    assert points.max() <= 1


def test_the_safeguard_never_lets_the_values_rise_and_is_counted():
    """With it, without noise, the loss falls or stays; two queries and two numbers per client and round."""
    p = problem(heterogeneity=50.0)
    losses = []
    for rounds in range(6):
        x = point("fedzo", p, rounds, safeguard=True, local_steps=3)
        losses.append(float(p.loss(x[None], np.arange(5)).mean()))
    assert losses == sorted(losses, reverse=True)
    plain, guarded = (play("fedzo", p, 2, safeguard=s).counts for s in (False, True))
    assert guarded.queries - plain.queries == 2 * 5 * 2
    assert guarded.bytes_up - plain.bytes_up == 2 * 5 * 2 * 8


def averaged(p, rounds, T, step, how, x0, gamma=0.7):
    """FedAvg, FedProx and SCAFFOLD I, II as the papers write them: one client after the other, plain NumPy."""
    a, b = p._curvature, p._centre
    x, n = x0.copy(), p.n
    c_own, c = np.zeros((n, len(x0))), np.zeros(len(x0))
    for k in range(rounds):
        if how == "scaffold 1" and k > 0:
            c_own = np.stack([a[i] * (x - b[i]) for i in range(n)])
            c = c_own.mean(0)
        ends, means = [], []
        for i in range(n):
            y, total = x.copy(), 0.0
            for _ in range(T):
                g = a[i] * (y - b[i])
                total = total + g
                if how.startswith("scaffold"):
                    g = g + gamma * (c - c_own[i])
                if how == "fedprox":
                    g = g + gamma * (y - x)
                y = y - step * g
            ends.append(y)
            means.append(total / T)
        x = np.mean(ends, axis=0)
        if how == "scaffold 2":
            c_own = np.stack(means)
            c = c_own.mean(0)
    return x


def on_values(p, rounds, how, taking_part, weights, T=3, Q=2, h=0.01, step=0.002):
    """FedZO, FedProx and SCAFFOLD I, II on sphere differences: one client after the other, plain NumPy, from a draw."""
    ask = lambda i, x: float(p.values(torch.from_numpy(x)[None, None], np.array([i]))[0, 0])
    x, dim = p.start(np.arange(p.n))[0].numpy(), p.dim
    c_own, c, total = np.zeros((p.n, dim)), np.zeros(dim), sum(weights)

    def estimate(i, x, k, purpose):
        u = Streams(0).normal(purpose, np.array([i]), k, Q * dim).reshape(Q, dim)
        u /= np.linalg.norm(u, axis=1, keepdims=True)
        return sum(dim * (ask(i, np.clip(x + h * v, 0, 1)) - ask(i, x)) / h * v for v in u) / Q

    for k in range(rounds):
        who = taking_part(k)
        mean = lambda of, who=who: sum(weights[i] * of[i] for i in who) / sum(weights[i] for i in who)
        if how == "scaffold 1" and k > 0:
            c_own[who] = [estimate(i, x, k, "control") for i in who]
            c = mean(c_own)
        ends, means = {}, {}
        for i in who:
            y, found = x.copy(), []
            for t in range(T):
                found.append(estimate(i, y, k, f"directions {t}"))
                pull = 0.7 * (y - x) if how == "fedprox" and k > 0 else 0.0
                y = np.clip(y - step * (found[-1] + pull + 0.7 * (c - c_own[i])), 0, 1)
            ends[i], means[i] = y, np.mean(found, axis=0)
        if how == "scaffold 2":
            c = c + sum(weights[i] * (means[i] - c_own[i]) for i in who) / total
            c_own[who] = [means[i] for i in who]
        x = mean(ends)
    return x


@pytest.mark.parametrize("how", ["fedzo", "fedprox", "scaffold 1", "scaffold 2"])
def test_methods_on_values_are_those_of_the_paper(how):
    """Four rounds of three of five clients with weights, against walls of the box, equal a loop over clients."""
    p, weights = problem(dim=4), [1.0, 2.0, 0.5, 0.0, 3.0]

    def taking_part(k):
        return np.sort(RoundDraws(Streams(0), np.arange(5), k).shared("participants").permutation(5)[:3])

    kind, _, option = how.partition(" ")
    more = {} if kind == "fedzo" else {"gamma": 0.7}
    more |= {"option": int(option)} if option else {}
    got = point(
        kind if kind == "fedzo" else f"{kind}_zo",
        p,
        4,
        local_steps=3,
        participants=3,
        weights=weights,
        estimator=FiniteDifferences("sphere", 2, 0.01),
        optimiser=SGD("sgd", 0.002),
        **more,
    )
    assert np.allclose(got.numpy(), on_values(p, 4, how, taking_part, weights), rtol=1e-11)


@pytest.mark.parametrize("how", ["fedavg", "fedprox", "scaffold 1", "scaffold 2"])
def test_methods_on_gradients_are_those_of_their_papers(how):
    """Ten rounds on quadratics equal a loop over clients in NumPy."""
    p = quadratic(6, 4)
    x0 = np.full(4, 2.0)
    kind, _, option = how.partition(" ")
    more = {} if kind == "fedavg" else {"gamma": 0.7}
    more |= {"option": int(option)} if option else {}
    start = torch.from_numpy(np.repeat(x0[None], 6, 0))
    got = point(kind, p, 10, start, optimiser=SGD("sgd", 0.05), local_steps=4, **more)
    assert np.allclose(got.numpy(), averaged(p, 10, 4, 0.05, how, x0), rtol=1e-12)


def test_scaffold_reaches_the_optimum_that_fedavg_misses():
    """With constant steps on different quadratics SCAFFOLD converges to x*, FedAvg to a neighbourhood."""
    p = quadratic(6, 4)
    start = torch.zeros(6, 4).double()
    distance = {}
    for kind, more in (("fedavg", {}), ("scaffold", {}), ("scaffold", {"option": 1})):
        x = point(kind, p, 300, start, optimiser=SGD("sgd", 0.05), local_steps=5, **more)
        distance[(kind, *more)] = float((x - p.optimum()).norm())
    assert distance[("fedavg",)] > 1e-2
    assert max(d for k, d in distance.items() if k[0] == "scaffold") < 1e-9


def test_partial_participation_computes_the_gradients_of_participants_only():
    """Counts of gradients and bytes are those of m clients; the mean is over them."""
    p = quadratic(6, 4)
    player = play("fedavg", p, 5, torch.zeros(6, 4).double(), optimiser=SGD("sgd", 0.05), local_steps=3, participants=2)
    assert player.counts.gradients == 5 * 2 * 3
    assert player.counts.bytes_up == player.counts.bytes_down == 5 * 2 * 4 * 8


def test_exact_turns_the_methods_on_values_into_those_on_gradients():
    """fedzo with the exact estimator is fedavg; black boxes refuse gradients by name."""
    from fedsim.algorithms.estimators import Exact

    p = problem()
    zo = point("fedzo", p, estimator=Exact("exact"), optimiser=SGD("sgd", 0.01))
    assert torch.equal(zo, point("fedavg", p, optimiser=SGD("sgd", 0.01)))
    with pytest.raises(InputError, match="fedavg needs gradients, and problem 'black_box' is a black box"):
        play("fedavg", Recorded(p), optimiser=SGD("sgd", 0.01))


def test_parts_are_chosen_in_the_scenario(tmp_path):
    """Estimator and optimiser are sections with a kind; mistakes in them are named."""
    scenario = {
        "topology": {"kind": "server", "n": 3},
        "problem": QUADRATIC,
        "start": {"kind": "problem"},
        "algorithm": {
            "kind": "fedzo",
            "local_steps": 2,
            "estimator": {"kind": "sphere", "directions": 4},
            "optimiser": {"kind": "sgd", "step": 0.01},
        },
        "schedule": {"horizon": 2},
    }
    assert fedsim.run(scenario, folder=tmp_path / "a").metrics.queries.iloc[-1] == 2 * 3 * 2 * 5
    wrong = {**scenario, "algorithm": {"kind": "fedzo", "optimiser": {"kind": "adamw"}}}
    with pytest.raises(InputError, match=r"algorithm\.optimiser"):
        fedsim.run(wrong, folder=tmp_path / "b")
    with pytest.raises(InputError, match=r"algorithm\.optimiser: this key is missing"):
        fedsim.run({**scenario, "algorithm": {"kind": "fedavg"}}, folder=tmp_path / "c")


def test_what_a_scenario_gives_stands_against_the_preset():
    """Keys that are given, with their default's value too, stay; the others are the authors'."""
    from fedsim.algorithms.federated import FedZO
    from fedsim.checks import build as checked

    setting = RunSetting(problem(dim=30), topology({"kind": "server", "n": 5}, Path()))
    made = checked(FedZO, {"preset": "reference_code", "clip": True}).resolve(setting)
    assert (made.clip, made.safeguard, made.repeat_query, made.estimator.kind) == (True, True, True, "orthonormal")
    assert checked(FedZO, {"clip": True}).resolve(setting).estimator.kind == "gaussian"


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("fedzo", {"preset": "reference_code"}),
        ("fedprox_zo", {"estimator": FiniteDifferences("sphere", 3)}),
        ("scaffold_zo", {"option": 1}),
        ("scaffold_zo", {"safeguard": True}),
        ("fd_sgd", {"step": 0.1}),
        ("fedavg", {"optimiser": SGD("sgd", 0.1)}),
        ("scaffold", {"optimiser": SGD("sgd", 0.1), "option": 1}),
    ],
)
def test_the_costs_that_check_prints_are_those_of_the_run(kind, more):
    """Gradients or queries, and numbers up, per client and round, from the second on."""
    p, server = problem(dim=30), topology({"kind": "server", "n": 5}, Path())
    made = find("algorithm", kind, Path())(**more).resolve(RunSetting(p, server))
    said = {c.name.partition(" ")[0]: c.value for c in made.constants(RunSetting(p, server))}
    player = play(kind, p, 1, **more)
    before = player.counts.as_dict()
    player.advance(2)
    spent = {name: value - before[name] for name, value in player.counts.as_dict().items()}
    assert said.get("queries", 0) * 5 == spent["queries"]
    assert said.get("gradients", 0) * 5 == spent["gradients"]
    assert said["numbers"] * 5 * 8 == spent["bytes_up"] == spent["bytes_down"]


def test_a_server_that_diverges_is_noticed_whatever_is_recorded():
    """The server's point is no row of any node; it ends the run when it is no longer finite."""
    with pytest.raises(Diverged, match="x is no longer finite after round 9"):
        play("fedavg", quadratic(6, 4), 9, torch.ones(6, 4).double(), optimiser=SGD("sgd", 1e30), local_steps=4)


def test_fd_sgd_steps_along_the_mean_difference():
    """One round moves the server by step times the mean of the clients' estimates."""
    p = problem()
    x = p.start(np.arange(5))
    estimate = FiniteDifferences("gaussian")(asking(p), x, RoundDraws(Streams(0), np.arange(5), 0), "directions 0")
    got = point("fd_sgd", p, 1, step=0.001)
    assert torch.allclose(got, x[0] - 0.001 * estimate.mean(0), rtol=1e-12)
