"""What was measured of DIFF2, measured again: where theory says it wins, by how much, and where it does not."""

import numpy as np
import pytest
import torch
from private_cases import played, prepared, scenario

import fedsim
from fedsim.privacy.advisor import advise
from fedsim.privacy.section import Privacy

CURVED = {"kind": "shared_curvature"}
DIFF2 = {"kind": "diff2_gd", "eta": 1.0, "clip_grad": 1.5, "clip_diff": 1.0}
DPGD = {"kind": "dp_gd", "eta": 1.0, "clip_grad": 1.5}


def second_half(algorithm, privacy, rounds, seed, folder):
    """Return the mean squared gradient norm over the second half of a run."""
    content = scenario(algorithm, CURVED, privacy, n=10, rounds=rounds, seed=seed)
    content["record"] = {"every": 5, "metrics": ["stationarity"]}
    metrics = fedsim.run(content, folder=folder).metrics
    return float(metrics["stationarity"][metrics["round"] > rounds / 2].mean())


def estimator_error(period, seed):
    """Return the mean of ||v - grad f||^2 over all rounds at epsilon 1, and what the formula says."""
    p = prepared({**DIFF2, "restart_period": period}, CURVED, {"epsilon": 1.0}, n=10, rounds=1000)
    made = played(p, 0, seed=seed)
    nodes, dim = np.arange(10), p.problem.dim
    z = made.guard.multipliers
    s1, s2 = (z[name] * 2 * clip / 20_000 for name, clip in (("refresh", 1.5), ("difference", 1.0)))
    errors, expected, inside = [], [], 0.0
    for k in range(1000):
        x, before = (torch.from_numpy(made.final()[name]) for name in ("x", "x_before"))
        inside = 0.0 if k % period == 0 else inside + float((x - before).norm()) ** 2
        made.advance(k + 1)
        v = torch.from_numpy(made.final()["v"])
        exact = p.problem.gradient(x.expand(10, -1).contiguous(), nodes).mean(dim=0)
        errors.append(float((v - exact).square().sum()))
        expected.append(dim * (s1**2 + s2**2 * inside))
    return np.mean(errors), np.mean(expected)


@pytest.mark.slow
def test_the_estimators_error_is_the_formulas():
    """At epsilon 1 it is d (s1^2 + s2^2 sum of squared steps) within 10 % (4 seeds), least at T = 20, as published."""
    found = {
        period: np.mean([estimator_error(period, seed) for seed in range(4)], axis=0) for period in (5, 20, 50, 100)
    }
    for period, (measured, predicted) in found.items():
        assert measured == pytest.approx(predicted, rel=0.1), period
    published = {5: 4.21e-3, 20: 1.95e-3, 50: 3.29e-3}
    for period, value in published.items():
        assert found[period][0] == pytest.approx(value, rel=0.25), period
    assert min(found, key=lambda period: found[period][0]) == 20


@pytest.mark.slow
@pytest.mark.parametrize(("epsilon", "ratio"), [(1.0, 2.0), (3.0, 4.0), (10.0, 3.0)])
def test_diff2_beats_private_gradient_descent_where_theory_says(tmp_path, epsilon, ratio):
    """Shared curvature, T = 50, eta = 1: the squared gradient is so many times smaller (published 4.8, 6.8, 4.6)."""
    runs = {
        name: np.mean(
            [second_half(algorithm, {"epsilon": epsilon}, 1000, seed, tmp_path / f"{name}{seed}") for seed in range(3)]
        )
        for name, algorithm in (("diff2", {**DIFF2, "restart_period": 50}), ("dpgd", DPGD))
    }
    assert runs["dpgd"] / runs["diff2"] >= ratio


@pytest.mark.slow
def test_local_steps_pay_where_hessians_agree(tmp_path):
    """300 rounds at epsilon 3, zero-out: K = 4 ends 20 times below DP-GD and DIFF2-GD (published: 58 and 57 times)."""
    promise = {"epsilon": 3.0, "relation": "zero_out"}
    local = {
        **DIFF2, "kind": "diff2_bvr_l_sgd", "restart_period": 20, "clip_local": 1.0, "local_steps": 4,
        "batch_rate": 0.1, "refresh_share": 0.75,
    }  # fmt: skip
    one, gd, plain = (
        second_half(a, promise, 300, 0, tmp_path / name)
        for name, a in (("bvr", local), ("diff2", {**DIFF2, "restart_period": 20}), ("dpgd", DPGD))
    )
    assert one < 2 * 1.64e-5
    assert min(gd, plain) > 20 * one


@pytest.mark.slow
def test_on_digits_it_is_not_claimed(tmp_path):
    """The advisor says that it cannot help, and it does not: test accuracy 0.894 (DP-GD), 0.884 (DIFF2), +- 0.03."""
    assert not advise(Privacy(1e-5, 3.0), 200, 760, 1 / 1437, 1.0, 1.0, 1.0).helps
    section = {
        "kind": "module", "hidden": [10], "activation": "softplus", "initial": "uniform",
        "data": {"kind": "digits", "normalise": "columns", "held_out": 0.2}, "partition": {"kind": "round_robin"},
    }  # fmt: skip
    for algorithm, expected in (
        ({**DPGD, "clip_grad": 1.0}, 0.894),
        ({**DIFF2, "restart_period": 2, "clip_grad": 1.0, "clip_diff": 0.3}, 0.884),
    ):
        content = scenario(algorithm, section, {"epsilon": 3.0}, n=10, rounds=100, start={"kind": "problem"})
        content |= {"seed": 10, "seeds": 5, "data_seed": 0, "record": {"every": 100, "metrics": ["test_accuracy"]}}
        found = fedsim.run(content, folder=tmp_path / algorithm["kind"]).metrics
        assert found["test_accuracy"][found["round"] == 100].mean() == pytest.approx(expected, abs=0.03)
