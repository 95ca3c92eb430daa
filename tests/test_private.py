"""Private algorithms and their guard: limits without noise, noise sizes, sensitivity, trust, budget, books."""

import json
import math

import numpy as np
import pytest
import torch
from private_cases import LOGISTIC, NETWORK, answer, played, prepared, problem, scenario

import fedsim
from fedsim.engine.layout import Layout
from fedsim.errors import InputError, RunError
from fedsim.privacy.canaries import Canaries
from fedsim.privacy.guard import Guard
from fedsim.privacy.ledger import FILE, read
from fedsim.privacy.noise import system_normal
from fedsim.privacy.requests import Charge, Release, Spend
from fedsim.problems.dense import DenseRecords, Layer, cross_entropy_slope
from fedsim.problems.problem import Problem
from fedsim.problems.shared_curvature import SharedCurvature
from fedsim.results.folder import from_json, to_json

GD = {"kind": "diff2_gd", "eta": 0.25, "restart_period": 5}
CLIPPED = {**GD, "clip_grad": 0.5, "clip_diff": 0.3}
BVR = {**CLIPPED, "kind": "diff2_bvr_l_sgd", "clip_local": 0.3, "local_steps": 3, "batch_rate": 0.5}


def gd(p, rounds, eta, steps=1):
    """Return plain gradient descent on the whole objective, written out."""
    x = p.start(np.arange(1))[0] if p.start(np.arange(1)) is not None else torch.zeros(p.dim, dtype=torch.float64)
    nodes = np.arange(p.n)
    for _ in range(rounds * steps):
        g = p.gradient(x.expand(p.n, -1).contiguous(), nodes)
        x = x - eta * g.mean(dim=0)
    return x


@pytest.mark.parametrize("section", [{**NETWORK, "l2": 1e-3}, LOGISTIC, {**LOGISTIC, "weights": "samples"}], ids=str)
def test_without_noise_diff2_is_gradient_descent(section):
    """z = 0, C infinite, one stage of 200 rounds: v is the gradient and x is GD's to 1e-11, relative."""
    start = {"start": {"kind": "problem"}} if section["kind"] == "module" else {}
    p = prepared({**GD, "restart_period": 200}, section, rounds=200, **start)
    made = played(p, 200)
    plain = gd(p.problem, 200, 0.25)
    assert float((answer(made) - plain).norm() / plain.norm()) < 1e-11
    before = torch.from_numpy(made.final()["x_before"])
    exact = p.problem.gradient(before.expand(5, -1).contiguous(), np.arange(5)).mean(dim=0)
    v = torch.from_numpy(made.final()["v"])[0] + p.problem.regular_gradient(before[0])
    assert float((v - exact).norm() / exact.norm()) < 1e-11


def test_one_stage_per_round_is_private_gradient_descent_bit_for_bit():
    """DIFF2-GD with T = 1 and DP-GD give the same bits from the same noise."""
    promise = {"epsilon": 2.0}
    one = played(prepared({**CLIPPED, "restart_period": 1}, privacy=promise), 12, seed=3)
    other = played(prepared({"kind": "dp_gd", "eta": 0.25, "clip_grad": 0.5}, privacy=promise), 12, seed=3)
    assert torch.equal(answer(one), answer(other))


def test_one_local_step_is_diff2_gd():
    """BVR-L-SGD with K = 1 gives DIFF2-GD's bits, noise included."""
    promise = {"epsilon": 2.0, "relation": "zero_out"}
    one = played(prepared({**BVR, "local_steps": 1}, privacy=promise), 12, seed=3)
    other = played(prepared(CLIPPED, privacy=promise), 12, seed=3)
    assert torch.equal(answer(one), answer(other))


def test_local_steps_of_one_worker_are_gradient_steps():
    """z = 0, q = 1, one worker, K = 5: a round is five steps of GD, to 1e-11."""
    p = prepared({**GD, "kind": "diff2_bvr_l_sgd", "local_steps": 5, "batch_rate": 1.0}, n=1, rounds=8)
    plain = gd(p.problem, 8, 0.25, steps=5)
    assert float((answer(played(p, 8)) - plain).norm() / plain.norm()) < 1e-11


UNEQUAL = {**LOGISTIC, "partition": {"kind": "dirichlet_sizes", "alpha": 1.0, "min_size": 20}}


@pytest.mark.parametrize("weights", ["uniform", "samples"])
def test_without_noise_federated_averaging_is_federated_averaging(weights):
    """q = 1, no radius: local steps on each client's own mean loss, a mean by the objective's weights; to 1e-11.

    One step is gradient descent on the objective; by samples, clients count by their numbers of records once.
    """
    p, plain = (problem({**UNEQUAL, "weights": w}) for w in (weights, "uniform"))
    shares = p.records / p.records.sum() if weights == "samples" else np.full(5, 0.2)
    x = torch.zeros(p.dim, dtype=torch.float64)
    for _ in range(6):
        y = x.expand(5, -1).contiguous()
        for _ in range(3):
            y = y - 0.25 * plain.gradient(y, np.arange(5))
        x = torch.from_numpy(shares) @ y
    found = {
        steps: answer(played(prepared({"kind": "dp_fedavg", "eta": 0.25, "local_steps": steps}, live=p, rounds=6), 6))
        for steps in (1, 3)
    }
    assert float((found[3] - x).norm() / x.norm()) < 1e-11
    descended = gd(p, 6, 0.25)
    assert float((found[1] - descended).norm() / descended.norm()) < 1e-11


@pytest.mark.parametrize("kind", ["dp_sgd", "dp_srm"])
def test_without_noise_and_with_all_records_private_sgd_is_gradient_descent(kind):
    """q = 1 and no radii: GD to 1e-11, with recursive momentum, too."""
    p = prepared({"kind": kind, "eta": 0.25, "batch_rate": 1.0}, rounds=10)
    plain = gd(p.problem, 10, 0.25)
    assert float((answer(played(p, 10)) - plain).norm() / plain.norm()) < 1e-11


class Silent(SharedCurvature):
    """Records without gradient data: `slope` is a constant drift, so that only noise and rho are seen."""

    def __init__(self, n, records, dim):
        super().__init__(n, records, dim, 0)
        for part in self.parts:
            part.zero_()
        self._means.zero_()

    def slope(self, w):
        return torch.zeros_like(w)


@pytest.mark.parametrize("trust", ["central", "secagg", "local"])
def test_noise_has_the_size_that_was_promised(trust):
    """Zero gradients: refreshes have std z1 2 C1/(P n_min), differences z2 2 C2 rho/(P n_min); local sqrt(P) times.

    Of 20 rounds and dim 4,000, within 4 standard errors; rounds are uncorrelated.
    """
    n, dim, records = 10, 4000, 100
    p = prepared(
        {**GD, "restart_period": 4, "clip_grad": 2.0, "clip_diff": 3.0},
        n=n,
        rounds=20,
        live=Silent(n, records, dim),
        privacy={"multipliers": {"refresh": 2.0, "difference": 3.0}, "trust": trust},
    )
    heard = []
    played(p, 20, taps=[lambda release, seen: heard.append((release, seen))])
    scale = 2 / (n * (records // n)) * (math.sqrt(n) if trust == "local" else 1)
    rows = []
    for release, seen in heard:
        z = {"refresh": 2.0, "difference": 3.0}[release.charge.name]
        rows.append((seen.mean(axis=0) if trust == "local" else seen[0]) / (z * scale * release.radius))
    assert len(rows) == 20
    for row in rows:
        assert abs(row.std() - 1) < 4 / math.sqrt(2 * dim)
        assert abs(row.mean()) < 4 / math.sqrt(dim)
    correlation = np.corrcoef(rows) - np.eye(20)
    assert np.abs(correlation).max() < 4.5 / math.sqrt(dim)
    radii = [release.radius for release, _ in heard if release.charge.name == "difference"]
    assert max(radii) > 2 * min(radii)


def test_workers_noises_are_independent():
    """With local trust every message has noise of its own: uncorrelated over workers and coordinates."""
    p = prepared(
        {"kind": "dp_gd", "eta": 0.1, "clip_grad": 1.0}, n=4, rounds=1, live=Silent(4, 40, 5000),
        privacy={"multipliers": {"refresh": 1.0}, "trust": "local"},
    )  # fmt: skip
    heard = []
    played(p, 1, taps=[lambda release, seen: heard.append(seen)])
    assert np.abs(np.corrcoef(heard[0]) - np.eye(4)).max() < 4 / math.sqrt(5000)
    assert abs(np.corrcoef(heard[0][:, :-1].ravel(), heard[0][:, 1:].ravel())[0, 1]) < 4 / math.sqrt(20_000)


@pytest.mark.parametrize("weights", ["uniform", "samples"])
@pytest.mark.parametrize("relation", ["replace_one", "zero_out"])
def test_sensitivity_by_brute_force(weights, relation):
    """Noise off, data sets that differ in one record, unequal sizes: no release moves more than k C max(w/n).

    Opposite saturated records of the worst worker reach it to 1e-3.
    """
    rng = np.random.default_rng(1)
    sizes, worst = np.array([7, 19, 4]), 2
    shares = sizes / sizes.sum() if weights == "samples" else np.full(3, 1 / 3)
    bound = (2 if relation == "replace_one" else 1) * float((shares / sizes).max())
    largest = 0.0
    for trial in range(40):
        worker = worst if trial < 5 else int(rng.integers(3))
        base = Canaries(sizes, shares, np.ones(3), np.array([0, 1, 2]))
        other = np.ones(3)
        other[worker] = -1.0 if relation == "replace_one" else 0.0
        moved = Canaries(sizes, shares, other, np.array([0, 1, 2]))
        x, y = (torch.from_numpy(0.1 * rng.normal(size=(1, 3))) for _ in range(2))
        for radius, before in ((0.8, None), (0.05, y)):
            a, b = (released(p, x, radius, before) for p in (base, moved))
            ratio = float((a - b).norm()) / (bound * radius)
            assert ratio <= 1 + 1e-6
            largest = max(largest, ratio) if worker == worst or weights == "samples" else largest
    assert largest > 1 - 1e-3


@pytest.mark.parametrize("kind", ["diff2_gd", "dp_fedavg"])
def test_no_record_makes_a_release_infinite(kind):
    """A record of 1e200 in a network: releases stay finite, and within their radii of those without it."""
    features = np.random.default_rng(0).normal(size=(12, 3))
    plain, odd = features.copy(), features.copy()
    odd[5] = 1e200
    plain[5] = 0.0
    user = {"kind": "dp_fedavg", "eta": 0.1, "clip_model": 0.5}
    algorithm, radius = (user, 0.5) if kind == "dp_fedavg" else ({**CLIPPED, "restart_period": 3}, 0.5)
    heard = []
    for table in (plain, odd):
        p = prepared(algorithm, live=regression(table), n=2, rounds=4)
        played(p, 4, taps=[lambda release, seen: heard.append(seen[0])])
    assert np.isfinite(heard).all()
    bound = 2 * radius * (1 / 2 if kind == "dp_fedavg" else 1 / 12)
    assert np.linalg.norm(heard[0] - heard[4]) <= bound * (1 + 1e-9)


def regression(features):
    from fedsim.problems.data.table import Data
    from fedsim.problems.models.mlp import mlp
    from fedsim.problems.module import ModuleProblem

    data = Data(features, np.arange(12) / 10, {}, "made", "regression", (), ("a", "b", "c"))
    return ModuleProblem(mlp(3, 1, [4], 0, "relu"), data, [np.arange(6), np.arange(6, 12)], "mean_square")


def released(p, x, radius, before):
    """Return the exact mean that a release would add noise to."""
    from fedsim.engine.counts import Counts
    from fedsim.engine.oracle import BlockOracle
    from fedsim.engine.streams import Streams
    from fedsim.privacy.clipping import Clip

    f = BlockOracle(p, np.arange(p.n), Streams(0), Counts())
    return (torch.from_numpy(p.shares)[:, None] * f.clipped(x, Clip(radius), before)).sum(dim=0)


class Network(Problem):
    """Two workers with records of their own, for the gradients of a small network."""

    def __init__(self, features, labels):
        self.features, self.labels = features, labels
        self.layers = [Layer(4, 6), Layer(6, 3)]
        self.n, self.dim = len(features), sum(layer.size for layer in self.layers)
        self.records = np.array([len(part) for part in features])

    def gradient(self, x, nodes, batch=None):
        raise NotImplementedError

    def loss(self, x, nodes):
        raise NotImplementedError

    def per_record(self):
        def of(node, chosen):
            return self.features[node][chosen], self.labels[node][chosen]

        return DenseRecords(self.layers, "softplus", cross_entropy_slope, of)


def test_random_neighbours_never_move_a_release_further():
    """A network's records, one replaced by a random other: within 2 C/(P n_min) for gradients and differences."""
    rng = np.random.default_rng(0)
    sizes = (9, 30)
    features = [torch.from_numpy(rng.normal(size=(size, 4))) for size in sizes]
    labels = [torch.from_numpy(rng.integers(0, 3, size)) for size in sizes]
    p = Network(features, labels)
    bound = 2 * float((p.shares / p.records).max())
    for trial in range(60):
        node, record = trial % 2, int(rng.integers(9))
        changed, others = [part.clone() for part in features], [part.clone() for part in labels]
        changed[node][record] = torch.from_numpy(rng.normal(size=4) * 10 ** rng.uniform(-2, 3))
        others[node][record] = int(rng.integers(3))
        x, y = (torch.from_numpy(rng.normal(size=(1, p.dim))) for _ in range(2))
        for radius, before in ((0.3, None), (1e-2, y)):
            moved = released(p, x, radius, before) - released(Network(changed, others), x, radius, before)
            assert float(moved.norm()) <= bound * radius * (1 + 1e-6)


def test_refreshes_come_by_round_index():
    """R = 23, T = 5: refreshes at 0, 5, 10, 15, 20; every difference is taken to the point just before."""
    p = prepared(CLIPPED, privacy={"epsilon": 5.0}, rounds=23)
    heard = []
    made = played(p, 23, taps=[lambda release, seen: heard.append((release.round, release.charge.name))])
    assert [k for k, name in heard if name == "refresh"] == [0, 5, 10, 15, 20]
    assert len(heard) == 23
    assert [entry.release for entry in made.guard.ledger.entries] == [name for _, name in heard]
    assert made.guard.ledger.epsilon() == pytest.approx(5.0, rel=1e-8)


def test_a_point_that_did_not_move_releases_nothing():
    """Rho = 0: the difference is 0, costs nothing, and is no NaN."""

    class Still(Silent):
        """No gradient: without noise the point stays."""

    p = prepared({**GD, "clip_grad": 1.0, "clip_diff": 1.0}, n=3, rounds=9, live=Still(3, 9, 4))
    made = played(p, 9)
    assert not answer(made).any()
    promised = prepared({**CLIPPED}, n=1, rounds=4, live=Still(1, 1, 4), privacy={"epsilon": 1.0})
    assert answer(played(promised, 4)).isfinite().all()


def test_a_period_beyond_the_horizon_has_one_refresh():
    """T > R: one refresh, R - 1 differences, all of the budget."""
    p = prepared({**CLIPPED, "restart_period": 50}, privacy={"epsilon": 1.0}, rounds=7)
    assert [(kind.name, kind.count) for kind in p.algorithm.plan(p.setting)] == [("refresh", 1), ("difference", 6)]
    assert played(p, 7).guard.ledger.epsilon() == pytest.approx(1.0, rel=1e-8)


REFUSED = [
    ({**CLIPPED, "clip_diff": None}, {"epsilon": 1.0}, "clip_diff: missing; without a radius no noise"),
    (CLIPPED, {}, "exactly one of epsilon and multipliers is needed, neither is given"),
    (CLIPPED, {"epsilon": 1.0, "multipliers": {"refresh": 1.0}}, "needed, both are given"),
    (CLIPPED, {"epsilon": 1.0, "unit": "user"}, "diff2_gd protects one record of the data; say unit: record"),
    ({"kind": "dp_fedavg", "eta": 1.0, "clip_model": 1.0}, {"epsilon": 1.0}, "protects one user .* say unit: user"),
    (CLIPPED, {"epsilon": 1.0, "trust": "secagg", "honest": 9}, "9 given with trust 'secagg' and 5 workers"),
    (CLIPPED, {"epsilon": 1.0, "honest": 2}, "honest: 2 given with trust 'central'"),
    (BVR, {"epsilon": 1.0}, "replace_one has no accountant for Poisson sampling"),
    ({**BVR, "clip_local": None}, {"epsilon": 1.0, "relation": "zero_out"}, "clip_local: missing"),
    (
        {"kind": "dp_fedavg", "eta": 1.0, "clip_model": 1.0, "client_rate": 0.5},
        {"epsilon": 1.0, "unit": "user", "trust": "secagg", "relation": "add_remove"},
        "client_rate: 0.5 given with trust 'secagg'",
    ),
    ({"kind": "gradient_tracking", "eta": 0.1}, {"epsilon": 1.0}, "is not protected; these keep the promise: diff2"),
    ({**CLIPPED, "restart_period": "auto"}, {"multipliers": {"refresh": 1.0, "difference": 1.0}}, "auto follows from"),
]  # fmt: skip


@pytest.mark.parametrize(("algorithm", "privacy", "words"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_promises_that_cannot_be_kept_are_refused(algorithm, privacy, words, tmp_path):
    """Each contradiction is named before anything is released."""
    content = scenario(algorithm)
    content["privacy"] = {"delta": 1e-5, **privacy}
    with pytest.raises(InputError, match=words):
        fedsim.run(content, folder=tmp_path / "out")
    assert not (tmp_path / "out" / FILE).exists()


def test_secure_aggregation_adds_shares_that_make_the_central_noise():
    """The sum's variance is the central one to 2 %; with h honest workers the shares are sqrt(P/h) larger."""
    n, dim = 8, 40_000
    for honest, factor in ((None, 1.0), (4, math.sqrt(2))):
        p = prepared(
            {"kind": "dp_gd", "eta": 1.0, "clip_grad": 1.0}, n=n, rounds=1, live=Silent(n, 80, dim),
            privacy={"multipliers": {"refresh": 1.0}, "trust": "secagg", **({"honest": honest} if honest else {})},
        )  # fmt: skip
        heard = []
        played(p, 1, taps=[lambda release, seen, heard=heard: heard.append(seen)])
        assert heard[0].shape == (1, dim)  # the sum is all that is seen
        assert heard[0].std() == pytest.approx(factor * 2 / 80, rel=0.02)


def test_missing_workers_are_refused_unless_provided_for():
    """Under secagg a release without all shares raises; with `honest` at most so many, it does not."""
    rows = np.array([True, True, True, False])
    for honest, refused in ((None, True), (3, False)):
        p = prepared(
            {"kind": "dp_gd", "eta": 1.0, "clip_grad": 1.0}, n=4, rounds=1, live=Silent(4, 8, 3),
            privacy={"multipliers": {"refresh": 1.0}, "trust": "secagg", **({"honest": honest} if honest else {})},
        )  # fmt: skip
        made = played(p, 0)
        made._network.answer([Spend(0, (Charge("refresh"),))])
        release = Release(0, torch.zeros(4, 3, dtype=torch.float64), Charge("refresh"), 1.0, rows)
        if refused:
            with pytest.raises(RunError, match="3 of 4 workers take part"):
                made._network.answer([release])
        else:
            assert made._network.answer([release])[0].shape == (1, 3)


def test_nothing_is_released_that_was_not_spent_for():
    """A release without leave is a mistake of the algorithm, and named; so is a second one for the same charge.

    Two releases with one noise would give the noise away.
    """
    p = prepared({"kind": "dp_gd", "eta": 1.0, "clip_grad": 1.0}, privacy={"epsilon": 1.0})
    made = played(p, 0)
    release = Release(0, torch.zeros(5, 30, dtype=torch.float64), Charge("refresh"), 1.0)
    with pytest.raises(RunError, match="release 'refresh' of round 0 was not spent for"):
        made._network.answer([release])
    made._network.answer([Spend(0, (Charge("refresh"),))])
    made._network.answer([release])
    with pytest.raises(RunError, match="release 'refresh' of round 0 was not spent for"):
        made._network.answer([release])


@pytest.mark.parametrize(("number", "step"), [(1 << 24, 0), (0, 1 << 8)])
def test_places_without_noise_of_their_own_are_refused(number, step):
    """Rounds and steps beyond what has a stream of its own would share noise; they raise."""
    p = prepared({"kind": "dp_gd", "eta": 1.0, "clip_grad": 1.0}, privacy={"epsilon": 1.0})
    made, charge = played(p, 0), Charge("refresh", step)
    made._network.answer([Spend(number, (charge,))])
    with pytest.raises(RunError, match="have noise of their own"):
        made._network.answer([Release(number, torch.zeros(5, 30, dtype=torch.float64), charge, 1.0)])


@pytest.mark.parametrize("trust", ["central", "secagg", "local"])
def test_blocks_change_no_bit_of_a_private_run(trust):
    """Blocks of 1, 2, 3 rows and all give the same bits under every trust model, sampling included."""
    for algorithm, relation in ((CLIPPED, "replace_one"), (BVR, "zero_out")):
        p = prepared(algorithm, privacy={"epsilon": 2.0, "trust": trust, "relation": relation}, rounds=6)
        first, *others = [answer(played(p, 6, block)) for block in ("auto", 1, 2, 3)]
        assert all(torch.equal(first, other) for other in others)


def run(tmp_path, name, algorithm=CLIPPED, privacy=None, **more):
    content = scenario(algorithm, privacy={"epsilon": 2.0, **(privacy or {})}, **more)
    return fedsim.run(content, folder=tmp_path / name)


def test_the_result_says_what_was_spent_and_against_whom(tmp_path):
    """Columns epsilon and epsilon_server, run.json per worker and observer, non-private columns, the ledger's sum."""
    for trust in ("central", "secagg", "local"):
        result = run(tmp_path, trust, privacy={"trust": trust})
        facts, last = result.facts["privacy"], result.metrics.iloc[-1]
        assert last["epsilon"] == pytest.approx(2.0, rel=1e-6)
        assert math.isinf(last["epsilon_server"]) == (trust == "central")
        assert (facts["relation"], facts["unit"], facts["trust"]) == ("replace_one", "record", trust)
        assert max(facts["epsilon_by_worker"]["broadcasts"]) == facts["epsilon"]
        assert "for research" in facts["noise"]
        assert result.facts["non_private"]["columns"] == ["distance", "consensus", "loss"]
        _, entries = read((result.folder / FILE).read_text())
        assert len(entries) == facts["releases"] == 12


def test_a_budget_ends_the_run_with_what_it_has(tmp_path):
    """`stop: {epsilon}` refuses the release that would pass it: nothing of that round is computed, the run finishes."""
    result = run(tmp_path, "out", stop={"epsilon": 1.0}, rounds=40, record={"every": 1})
    assert result.status == "finished"
    assert result.facts["stopped_by"].startswith("epsilon: round ")
    rounds = int(result.metrics["round"].iloc[-1])
    assert result.metrics["epsilon"].iloc[-1] <= 1.0
    assert len(read((result.folder / FILE).read_text())[1]) == rounds < 40
    differences = rounds - math.ceil(rounds / 5)
    assert result.metrics["gradients"].iloc[-1] == 5 * (rounds + differences)  # none of the refused round


def test_resuming_spends_nothing_twice_and_forgets_nothing(tmp_path, monkeypatch):
    """Killed after a checkpoint and resumed: the same digest, and the ledger charges replayed rounds once.

    With secure noise replayed rounds are other releases: they are charged again, and the budget ends the run.
    """
    from fedsim.privacy import ledger

    whole = run(tmp_path, "whole", rounds=12, checkpoint={"every": 4}, record={"every": 1})
    kept = ledger.Ledger.write

    for secure in (False, True):
        name, count = f"killed-{secure}", 0

        def write(self, entries):
            nonlocal count
            kept(self, entries)
            count += 1
            if count == 11:
                raise KeyboardInterrupt

        monkeypatch.setattr(ledger.Ledger, "write", write)
        with pytest.raises(KeyboardInterrupt):
            run(
                tmp_path,
                name,
                privacy={"secure_noise": secure},
                rounds=12,
                checkpoint={"every": 4},
                record={"every": 1},
            )
        monkeypatch.setattr(ledger.Ledger, "write", kept)
        again = fedsim.resume(tmp_path / name)
        _, entries = read((again.folder / FILE).read_text())
        if secure:
            assert again.facts["stopped_by"].startswith("epsilon: round 9")
            assert max(entry.attempt for entry in entries) == 1
            assert again.facts["privacy"]["epsilon"] <= 2.0
        else:
            assert again.digest == whole.digest
            assert len(entries) == 12
            assert again.facts["privacy"]["epsilon"] == whole.facts["privacy"]["epsilon"]


def test_a_ledger_that_is_gone_or_of_another_promise_stops_a_resume(tmp_path, monkeypatch):
    """Deleting the ledger, changing it, the weights or the promise does not give the budget back."""
    from fedsim.privacy import ledger

    kept, count = ledger.Ledger.write, 0

    def write(self, entries):
        nonlocal count
        kept(self, entries)
        count += 1
        if count == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(ledger.Ledger, "write", write)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "out", checkpoint={"every": 4}, record={"every": 1})
    monkeypatch.setattr(ledger.Ledger, "write", kept)
    file = tmp_path / "out" / FILE
    text = file.read_text()
    file.write_text(text.replace('"delta": 1e-05', '"delta": 1e-06', 1))
    with pytest.raises(RunError, match=r"begun under .* the scenario now says"):
        fedsim.resume(tmp_path / "out")
    header, _ = read(text)
    file.write_text(text.replace(json.dumps(header["exposure"]), json.dumps([0.5, *header["exposure"][1:]]), 1))
    with pytest.raises(RunError, match="begun with other numbers or weights of records"):
        fedsim.resume(tmp_path / "out")
    file.write_text(text.replace('"release": "refresh", "z": ', '"release": "refresh", "z": 1', 1))
    with pytest.raises(RunError, match="releases are not those that the checkpoint has counted"):
        fedsim.resume(tmp_path / "out")
    file.unlink()
    with pytest.raises(RunError, match="0 releases are there, the checkpoint has counted"):
        fedsim.resume(tmp_path / "out")


def test_a_release_is_on_disk_before_its_noise_is_drawn(tmp_path, monkeypatch):
    """Every line has left the process; with secure noise, one call per round forces it to disk."""
    from fedsim.privacy import ledger
    from fedsim.privacy.noise import Noise

    forced, drawn = [], []
    monkeypatch.setattr(ledger.os, "fsync", lambda descriptor: forced.append(descriptor))
    kept = Noise.common_normal

    def noise(self, name, step, dim):
        _, entries = read((tmp_path / where / FILE).read_text())
        drawn.append((len(entries), len(forced)))
        return kept(self, name, step, dim)

    monkeypatch.setattr(Noise, "common_normal", noise)
    for where, secure in (("plain", False), ("secure", True)):
        forced.clear()
        drawn.clear()
        run(tmp_path, where, privacy={"secure_noise": secure}, rounds=6)
        releases = list(range(1, 7))
        assert [entries for entries, _ in drawn] == releases
        assert len(drawn) == 6
        assert [calls - drawn[0][1] for _, calls in drawn] == ([0, 1, 2, 3, 4, 5] if secure else [0] * 6)


def test_infinite_epsilons_are_json_that_any_program_reads(tmp_path):
    """`run.json` and what `--json` prints hold the word inf, not a bare Infinity, and are read back as numbers."""

    def strict(name):
        raise AssertionError(f"{name} is no JSON")

    result = run(tmp_path, "out", rounds=2)
    plain = json.loads((result.folder / "run.json").read_text(), parse_constant=strict)
    assert plain["privacy"]["epsilon_server"] == "inf"
    assert result.facts["privacy"]["epsilon_server"] == math.inf
    assert result.facts["privacy"]["epsilon_by_worker"]["server"] == [math.inf] * 5
    summary = result.summary()
    printed = json.loads(to_json(summary), parse_constant=strict)
    assert (printed["last"]["epsilon_server"], summary["last"]["epsilon_server"]) == ("inf", math.inf)
    odd = {"name": "inf", "x": [math.nan, -math.inf, 1.5, 2, None, True], "y": {"z": np.float64(math.inf)}}
    back = from_json(to_json(odd))
    assert repr(back) == repr({**odd, "y": {"z": math.inf}})


def test_starts_that_differ_are_averaged_by_the_server(tmp_path):
    """`start: given` with a row of its own for every worker is no common start: the server begins at their mean."""
    rows = np.arange(150.0).reshape(5, 30) / 100
    for value, expected in ((rows, rows.mean(axis=0)), (np.tile(rows[2], (5, 1)), rows[2])):
        np.save(tmp_path / "x.npy", value)
        start = {"kind": "given", "value": str(tmp_path / "x.npy")}
        p = prepared(CLIPPED, privacy={"epsilon": 1.0}, start=start)
        assert p.setting.common_start == (value is not rows)
        first = p.player()
        first.start()
        assert first.outputs().numpy() == pytest.approx(np.tile(expected, (5, 1)))


def test_secure_noise_is_not_reproducible_and_says_so(tmp_path):
    """Two runs from the operating system's entropy differ; the result says where its noise is from."""
    one, other = (run(tmp_path, name, privacy={"secure_noise": True}) for name in ("one", "other"))
    assert one.digest != other.digest
    assert "operating system" in one.facts["privacy"]["noise"]
    draws = system_normal(200_001)
    assert abs(draws.mean()) < 4 / math.sqrt(200_000)
    assert abs(draws.var() - 1) < 4 * math.sqrt(2 / 200_000)


def test_runs_never_share_noise(tmp_path):
    """Two scenarios with one seed draw different noise: the difference of their first releases is not noise-free."""
    one = run(tmp_path, "one", privacy={"epsilon": 1.0}, rounds=1)
    other = run(tmp_path, "other", {**CLIPPED, "eta": 0.5}, {"epsilon": 1.0}, rounds=1)
    keys = [read((r.folder / FILE).read_text())[1][0].key for r in (one, other)]
    assert keys[0] != keys[1]


def test_a_study_is_composed_and_must_promise_one_thing(tmp_path):
    """Four seeds spend four budgets; variants that mix relations or units are refused; unprotected runs are named."""
    from fedsim.privacy.gaussian import epsilon_of, mu_of

    content = scenario(CLIPPED, privacy={"epsilon": 1.0}, seeds=4)
    study = fedsim.run(content, folder=tmp_path / "seeds")
    together = study.facts["privacy"]
    assert together["epsilon"] == pytest.approx(epsilon_of(2 * mu_of(1.0, 1e-5), 1e-5), rel=1e-6)
    mixed = {**content, "seeds": 1, "variants": {"a": {}, "b": {"privacy.relation": "zero_out"}}}
    with pytest.raises(InputError, match="relation: 'replace_one' in a, 'zero_out' in b; runs of one study"):
        fedsim.run(mixed, folder=tmp_path / "mixed")
    plain = {**content, "seeds": 1, "variants": {"a": {}, "b": {"privacy": None}}}
    study = fedsim.run(plain, folder=tmp_path / "plain")
    together = study.facts["privacy"]
    assert (together["unprotected_runs"], math.isinf(together["epsilon"])) == (1, True)
    assert together["epsilon_of_private_runs"] == pytest.approx(1.0, rel=1e-6)


def test_unequal_workers_pay_by_their_weight(tmp_path):
    """The record of the smallest worker counts; with weights by samples all records pay the same."""
    sizes = {**LOGISTIC, "partition": {"kind": "dirichlet_sizes", "alpha": 1.0, "min_size": 20}}
    by_worker = run(tmp_path, "a", section=sizes).facts["privacy"]["epsilon_by_worker"]["broadcasts"]
    assert max(by_worker) == pytest.approx(2.0, rel=1e-6)
    assert min(by_worker) < 1.5
    equal = run(tmp_path, "b", section={**sizes, "weights": "samples"}).facts["privacy"]["epsilon_by_worker"]
    assert equal["broadcasts"] == pytest.approx([2.0] * 5, rel=1e-6)


def test_auto_says_why(tmp_path):
    """`auto` fills in step, period and split from the promise; the result and `check` say why."""
    from fedsim.check import check

    content = scenario(
        {**CLIPPED, "eta": "auto", "restart_period": "auto", "refresh_share": "auto"},
        {"kind": "shared_curvature"}, {"epsilon": 3.0}, n=10, rounds=400,
    )  # fmt: skip
    (facts,) = check(content)
    assert any(note.startswith("T = 40: half the stable period") for note in facts["warnings"])
    assert {c["name"] for c in facts["constants"]} >= {"T", "eta", "kappa T", "stable period", "z refresh"}
    asked = {**CLIPPED, "eta": 1.0, "clip_diff": 1.0, "restart_period": "auto"}
    (small,) = check(scenario(asked, NETWORK, {"epsilon": 3.0}, rounds=200))
    assert any("DIFF2 cannot help here" in note for note in small["warnings"])


def test_the_random_answer_is_one_of_the_points(tmp_path):
    """`returned: random` answers with the candidate of a uniformly drawn round, the same on every block."""
    p = prepared({**GD, "returned": "random"}, rounds=12)
    path = [answer(played(prepared(GD, rounds=12), k)) for k in range(1, 13)]
    made = played(p, 12)
    assert any(torch.equal(answer(made), x) for x in path)
    assert any(torch.equal(answer(played(p, 12, 2)), x) for x in path)


def test_the_paper_calibration_reports_its_true_epsilon(tmp_path):
    """The closed form asks for more noise than its epsilon: the reported one is what it really spends."""
    result = run(tmp_path, "out", privacy={"epsilon": 3.0, "calibration": "paper"}, rounds=100)
    assert 2.2 < result.facts["privacy"]["epsilon"] < 2.45
    assert result.facts["privacy"]["calibration"] == "paper"
    assert result.facts["privacy"]["budget"] == 3.0


def test_guard_without_privacy_is_a_plain_sum():
    """Without a section releases are sums with the objective's weights, and nothing is written."""
    p = problem(LOGISTIC)
    from fedsim.topology.build import build

    guard = Guard(None, {}, p, Layout(build("server:n=5")), 0)
    assert guard.ledger is None
    assert guard.columns() == guard.facts() == {}
