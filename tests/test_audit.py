"""The audit: passes what is right, and catches halved noise, wrong constants and the published code's weights."""

import json
import math

import numpy as np
import pytest
from private_cases import prepared, scenario
from typer.testing import CliRunner

import fedsim
from fedsim.cli import app
from fedsim.engine import oracle
from fedsim.errors import InputError
from fedsim.privacy import guard, noise
from fedsim.privacy.audit import audit
from fedsim.privacy.bounds import certified_epsilon, separation
from fedsim.privacy.clipping import clipped_sum
from fedsim.privacy.ledger import FILE

ALGORITHM = {"kind": "diff2_gd", "eta": 1.0, "restart_period": 5, "clip_grad": 1.0, "clip_diff": 1.0}
DATA = {"kind": "shared_curvature", "records": 3302, "dim": 5}  # n_p = 1651: nine chunks of 200, the last of 51


def mechanism(epsilon, **privacy):
    return prepared(ALGORITHM, DATA, {"epsilon": epsilon, **privacy}, n=2, rounds=20)


@pytest.mark.parametrize("epsilon", [1.0, 3.0])
@pytest.mark.parametrize(
    ("trust", "relation"),
    [("central", "replace_one"), ("central", "zero_out"), ("secagg", "replace_one"), ("local", "replace_one")],
)
def test_a_right_mechanism_passes(epsilon, trust, relation):
    """mu is measured within 8 % (4 standard errors of 10,000 trials) and the certified epsilon is below the claim."""
    verdict = audit(mechanism(epsilon, trust=trust, relation=relation), 10_000)
    assert verdict.broken is None
    assert verdict.claimed == pytest.approx(epsilon)
    assert 0 < verdict.certified < epsilon
    assert abs(verdict.mu_measured - verdict.mu_claimed) < 4 * 2 / math.sqrt(verdict.trials / 2)


@pytest.mark.slow
@pytest.mark.parametrize(("epsilon", "certified", "trials"), [(1.0, 0.4, 200_000), (3.0, 1.5, 80_000)])
def test_many_trials_measure_mu_within_five_percent(epsilon, certified, trials):
    """With many trials mu is within 5 % of the claim, and much of the claim is certified."""
    verdict = audit(mechanism(epsilon), trials)
    assert verdict.mu_measured == pytest.approx(verdict.mu_claimed, rel=0.05)
    assert certified < verdict.certified <= epsilon


def halved(monkeypatch):
    kept = noise.Noise.common_normal
    monkeypatch.setattr(noise.Noise, "common_normal", lambda *a: kept(*a) / 2)


def averages_chunk_means(monkeypatch):
    """Do as the published code: means of chunks of 200 records, averaged with equal weight."""

    def published(gradients, node, records, weights, x, clip, before=None):
        parts = [records[begin : begin + 200] for begin in range(0, len(records), 200)]
        means = [clipped_sum(gradients, node, p, np.full(len(p), 1 / len(p)), x, clip, before) for p in parts]
        return sum(means) / len(means)

    monkeypatch.setattr(oracle, "clipped_sum", published)


def forgets_replacement(monkeypatch):
    """Take C/n for the sensitivity where a replaced record moves the mean by 2C/n."""
    kept = guard.Guard.deviation
    monkeypatch.setattr(guard.Guard, "deviation", lambda *a: kept(*a) / 2)


@pytest.mark.parametrize(
    ("defect", "times", "certified"),
    [(halved, 2.0, 2.2), (averages_chunk_means, 3.597, 3.5), (forgets_replacement, 1.0, None)],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_defects_are_caught(monkeypatch, defect, times, certified):
    """Noise of half the size, and chunk means of equal weight (3.6 times the record's weight), break the claim loudly.

    A sensitivity that is wrong by two is wrong in the observer's books, too; it is caught by its size.
    """
    defect(monkeypatch)
    verdict = audit(mechanism(3.0), 10_000)
    if defect is forgets_replacement:
        assert verdict.mu_measured / verdict.mu_claimed == pytest.approx(2.0, rel=0.1)
    else:
        assert verdict.mu_measured / verdict.mu_claimed == pytest.approx(times, rel=0.08)
        assert verdict.certified > certified
    assert verdict.broken is not None


def test_the_certified_bound_is_valid_for_known_gaussians():
    """For two Gaussians mu apart the bound stays below the exact epsilon, and the separation is mu."""
    from fedsim.privacy.gaussian import epsilon_of

    rng = np.random.default_rng(0)
    for mu in (0.5, 1.0, 2.0):
        upper = rng.random(40_000) < 0.5
        statistic = rng.normal(size=40_000) + mu * upper
        bound = certified_epsilon(statistic, upper, 1e-5, 0.05)
        assert 0.3 * epsilon_of(mu, 1e-5) < bound < epsilon_of(mu, 1e-5)
        assert separation(statistic, upper) == pytest.approx(mu, abs=4 * 2 / 200)
    assert certified_epsilon(rng.normal(size=1000), rng.random(1000) < 0.5, 1e-5, 0.05) < 0.2


def test_sampled_and_user_level_mechanisms_are_audited():
    """DP-SGD's batches and DP-FedAvg's clients: no contradiction, and something is certified at a large epsilon."""
    sampled = prepared(
        {"kind": "dp_sgd", "eta": 0.1, "clip_grad": 1.0, "batch_rate": 0.3}, DATA,
        {"multipliers": {"gradient": 1.0}, "relation": "add_remove"}, n=2, rounds=10,
    )  # fmt: skip
    verdict = audit(sampled, 4000)
    assert verdict.broken is None
    assert 0.5 < verdict.certified < verdict.claimed
    users = prepared(
        {"kind": "dp_fedavg", "eta": 1e-3, "clip_model": 1.0, "local_steps": 2},
        {**DATA, "records": 400}, {"epsilon": 3.0, "unit": "user"}, n=100, rounds=5,
    )  # fmt: skip
    verdict = audit(users, 4000)
    assert verdict.broken is None
    assert verdict.mu_measured == pytest.approx(verdict.mu_claimed, abs=4 * 2 / math.sqrt(4000))


def local_steps(**privacy):
    return prepared(
        {**ALGORITHM, "kind": "diff2_bvr_l_sgd", "eta": 0.3, "local_steps": 4, "batch_rate": 0.3, "clip_local": 1.0},
        DATA, {"multipliers": {"refresh": 4.0, "difference": 4.0, "local": 1.0}, "relation": "zero_out", **privacy},
        n=2, rounds=20,
    )  # fmt: skip


def test_local_releases_are_heard(monkeypatch):
    """BVR-L-SGD's local steps: their shift is the claimed one; half of their noise alone breaks the claim."""
    verdict = audit(local_steps(), 8000)
    assert verdict.broken is None
    assert verdict.mu_measured == pytest.approx(verdict.mu_claimed, abs=4 * 2 / math.sqrt(4000))
    assert verdict.shift_claimed == pytest.approx(0.3 * math.sqrt(10 * 3))  # q/z, ten turns of three releases
    assert verdict.shift_measured == pytest.approx(verdict.shift_claimed, rel=0.1)
    kept = noise.Noise.normal
    monkeypatch.setattr(noise.Noise, "normal", lambda *a: kept(*a) / 2)
    verdict = audit(local_steps(), 8000)
    assert verdict.mu_measured == pytest.approx(verdict.mu_claimed, abs=4 * 2 / math.sqrt(4000))
    assert verdict.shift_measured == pytest.approx(2 * verdict.shift_claimed, rel=0.15)
    assert "the shift of sampled releases is" in verdict.broken


def test_the_command_audits_a_run_and_its_books(tmp_path):
    """`fedsim audit RUN` ends with 0 and writes audit.json; a doctored ledger or report ends with 1; others with 2."""
    content = scenario(ALGORITHM, DATA, {"epsilon": 1.0}, n=2, rounds=10)
    folder = fedsim.run(content, folder=tmp_path / "run").folder
    ask = ["audit", str(folder), "--trials", "2000", "--json"]
    good = CliRunner().invoke(app, ask)
    assert good.exit_code == 0
    assert json.loads(good.output)["broken"] is None
    assert json.loads((folder / "audit.json").read_text())["claimed"] == pytest.approx(1.0)
    text = (folder / FILE).read_text()
    (folder / FILE).write_text("\n".join(text.split("\n")[:-2]) + "\n")
    short = CliRunner().invoke(app, ask)
    assert short.exit_code == 1
    assert "the run reports epsilon 1, its ledger adds up to" in short.output
    facts = json.loads((folder / "run.json").read_text())
    del facts["privacy"]
    (folder / "run.json").write_text(json.dumps(facts))
    with pytest.raises(InputError, match="no private run, it claims nothing"):
        CliRunner().invoke(app, ask, catch_exceptions=False)
