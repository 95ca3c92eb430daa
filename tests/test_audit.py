"""The audit: passes what is right, and catches halved noise, wrong constants and the published code's weights."""

import json
import math
import re

import numpy as np
import pytest
import torch
from private_cases import prepared, scenario
from typer.testing import CliRunner

import fedsim
from fedsim.cli import app
from fedsim.engine import oracle
from fedsim.errors import InputError
from fedsim.privacy import clipping, guard, noise
from fedsim.privacy.audit import audit
from fedsim.privacy.bounds import certified_epsilon, separation
from fedsim.privacy.clipping import clipped_sum
from fedsim.privacy.ledger import FILE

ALGORITHM = {"kind": "diff2_gd", "eta": 1.0, "restart_period": 5, "clip_grad": 1.0, "clip_diff": 1.0}
DATA = {"kind": "shared_curvature", "records": 3302, "dim": 5}  # n_p = 1651: nine chunks of 200, the last of 51


FEW = {**DATA, "records": 400}


def mechanism(epsilon, data=DATA, **privacy):
    return prepared(ALGORITHM, data, {"epsilon": epsilon, **privacy}, n=2, rounds=20)


@pytest.mark.parametrize("epsilon", [1.0, 3.0])
@pytest.mark.parametrize(
    ("trust", "relation"),
    [("central", "replace_one"), ("central", "zero_out"), ("secagg", "replace_one"), ("local", "replace_one")],
)
def test_a_right_mechanism_passes(epsilon, trust, relation):
    """One record moves releases as far as their noise is made for, which has its size; less is certified than claimed.

    mu is measured within 4 standard errors of 2,000 trials.
    """
    verdict = audit(mechanism(epsilon, FEW, trust=trust, relation=relation), 2000)
    assert verdict.broken is None
    assert verdict.claimed == pytest.approx(epsilon)
    assert 0 <= verdict.certified < epsilon
    assert verdict.reach == {"refresh": pytest.approx(1), "difference": pytest.approx(1)}
    assert verdict.noise == {"refresh": pytest.approx(1, abs=0.03), "difference": pytest.approx(1, abs=0.03)}
    assert set(verdict.correlation) == {"rounds", "coordinates", *(["workers"] if trust == "local" else [])}
    assert all(abs(value) < 0.2 for value in verdict.correlation.values())
    assert abs(verdict.mu_measured - verdict.mu_claimed) < 4 * 2 / math.sqrt(verdict.trials / 2)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("epsilon", "certified", "trials"), [(1.0, 0.4, 200_000), (3.0, 1.5, 80_000)])
def test_many_trials_measure_mu_within_five_percent(epsilon, certified, trials):
    """With many trials mu is within 5 % of the claim, and much of the claim is certified."""
    verdict = audit(mechanism(epsilon, FEW), trials)
    assert verdict.mu_measured == pytest.approx(verdict.mu_claimed, rel=0.05)
    assert certified < verdict.certified <= epsilon


def noise_times(factor, kinds=("refresh", "difference")):
    """Multiply the noise of some kinds of releases."""

    def defect(monkeypatch):
        for name in ("common_normal", "normal"):
            kept = getattr(noise.Noise, name)

            def wrong(self, purpose, step, count, kept=kept):
                return kept(self, purpose, step, count) * (factor if purpose in kinds else 1.0)

            monkeypatch.setattr(noise.Noise, name, wrong)

    return defect


def averages_chunk_means(monkeypatch):
    """Do as the published code: means of chunks of 200 records, averaged with equal weight."""

    def published(gradients, node, records, weights, x, clip, before=None):
        parts = [records[begin : begin + 200] for begin in range(0, len(records), 200)]
        means = [clipped_sum(gradients, node, p, np.full(len(p), 1 / len(p)), x, clip, before) for p in parts]
        return sum(means) / len(means)

    monkeypatch.setattr(oracle, "clipped_sum", published)


def forgets_replacement(monkeypatch):
    """Take C/n for the sensitivity where a replaced record moves the mean by 2C/n."""
    for name in ("deviation", "message_deviations"):
        kept = getattr(guard.Guard, name)
        monkeypatch.setattr(guard.Guard, name, lambda *a, kept=kept: kept(*a) / 2)


def clips_nothing(monkeypatch):
    """Leave out the clipping."""
    monkeypatch.setattr(clipping, "factors", lambda squared, *_: torch.ones_like(squared))


def repeats_noise(monkeypatch):
    """Draw the same noise in every round, as a generator seeded anew does."""
    for name in ("common_normal", "normal"):
        kept = getattr(noise.Noise, name)
        monkeypatch.setattr(noise.Noise, name, lambda self, what, step, count, kept=kept: kept(self, what, 0, count))


def one_noise_for_all_workers(monkeypatch):
    """Let workers that should each add noise of their own add the same."""
    kept = noise.Noise.common_normal
    monkeypatch.setattr(noise.Noise, "normal", lambda *a: np.repeat(kept(*a), 2, axis=0))


def one_noise_for_all_coordinates(monkeypatch):
    """Draw one number where a vector is needed."""
    for name in ("common_normal", "normal"):
        kept = getattr(noise.Noise, name)
        monkeypatch.setattr(
            noise.Noise, name, lambda s, what, step, n, kept=kept: np.repeat(kept(s, what, step, 1), n, axis=1)
        )


DEFECTS = {
    "half the noise": (noise_times(0.5), r"noise of a refresh is 0\.\d+ times what is claimed"),
    "nine tenths of the noise": (noise_times(0.9), r"noise of a refresh is 0\.\d+ times what is claimed"),
    "half the noise of differences": (noise_times(0.5, ["difference"]), r"noise of a difference is 0\.[45]"),
    "no noise of differences": (noise_times(0.0, ["difference"]), "noise of a difference is 0 times"),
    "chunk means": (averages_chunk_means, "one record moves a refresh 3.597 times as far as its noise is made for"),
    "C/n for 2C/n": (forgets_replacement, "one record moves a refresh 2 times as far as its noise is made for"),
    "no clipping": (clips_nothing, "one record moves a refresh .* times as far"),
    "the same noise every round": (repeats_noise, "noises of different rounds go together"),
    "one noise for all coordinates": (one_noise_for_all_coordinates, "noises of different coordinates go together"),
    "one noise for all workers": (one_noise_for_all_workers, "noises of different workers go together"),
}


@pytest.mark.parametrize("name", DEFECTS)
@pytest.mark.parametrize("trust", ["central", "local"])
def test_defects_are_caught_at_any_epsilon(monkeypatch, name, trust):
    """Each defect is named, also at epsilon 0.1 and with few trials, where statistics of the attack see nothing."""
    defect, words = DEFECTS[name]
    if name == "one noise for all workers" and trust == "central":
        return
    defect(monkeypatch)
    verdict = audit(mechanism(0.1, DATA if name == "chunk means" else FEW, trust=trust), 1000)
    assert verdict.broken is not None
    assert re.search(words, verdict.broken)


@pytest.mark.parametrize(
    ("defect", "times", "certified"),
    [(noise_times(0.5), 2.0, 2.2), pytest.param(averages_chunk_means, 3.597, 3.5, marks=pytest.mark.slow)],
    ids=["half the noise", "chunk means"],
)
def test_the_attack_itself_certifies_the_worst_defects(monkeypatch, defect, times, certified):
    """Half the noise, and chunk means of equal weight (3.6 times the record's weight): mu is so many times the claim.

    More is certified than the correct mechanism's attack could (epsilon 3, 10,000 trials).
    """
    defect(monkeypatch)
    verdict = audit(mechanism(3.0, FEW if times == 2.0 else DATA), 10_000)
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
        FEW, {"multipliers": {"refresh": 4.0, "difference": 4.0, "local": 1.0}, "relation": "zero_out", **privacy},
        n=2, rounds=20,
    )  # fmt: skip


def test_local_releases_are_heard(monkeypatch):
    """BVR-L-SGD's local steps: their shift is the claimed one; half of their noise alone breaks the claim."""
    verdict = audit(local_steps(), 3000)
    assert verdict.broken is None
    assert verdict.mu_measured == pytest.approx(verdict.mu_claimed, abs=4 * 2 / math.sqrt(1500))
    assert verdict.shift_claimed == pytest.approx(0.3 * math.sqrt(10 * 3))  # q/z, ten turns of three releases
    assert verdict.shift_measured == pytest.approx(verdict.shift_claimed, rel=0.15)
    assert verdict.reach == {kind: pytest.approx(1) for kind in ("refresh", "difference", "local")}
    kept = noise.Noise.normal
    monkeypatch.setattr(noise.Noise, "normal", lambda *a: kept(*a) / 2)
    verdict = audit(local_steps(), 3000)
    assert verdict.mu_measured == pytest.approx(verdict.mu_claimed, abs=4 * 2 / math.sqrt(1500))
    assert verdict.shift_measured == pytest.approx(2 * verdict.shift_claimed, rel=0.15)
    assert re.search(r"the noise of a local is 0\.[45]", verdict.broken)


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
