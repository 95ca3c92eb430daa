"""Private runs on several ranks: one digest, one ledger, noise of the system's entropy equal on all ranks."""

import json

import pytest
from launching import launch, needs_mpi
from private_cases import LOGISTIC, NETWORK, scenario

import fedsim
from fedsim.privacy.ledger import FILE

CLIPPED = {"kind": "diff2_gd", "eta": 0.25, "restart_period": 3, "clip_grad": 0.5, "clip_diff": 0.3}
SAMPLED = {"eta": 0.25, "clip_grad": 0.5, "batch_rate": 0.4}
STUDY = {
    **scenario(CLIPPED, LOGISTIC, {"epsilon": 2.0, "relation": "zero_out"}, n=7, rounds=6),
    "checkpoint": {"every": 3},
    "variants": {
        "central": {},
        "secagg": {"privacy.trust": "secagg"},
        "local": {"privacy.trust": "local", "engine.block": 2},
        "network": {
            "problem": NETWORK,
            "start": {"kind": "problem"},
            "algorithm": {"kind": "dp_gd", "eta": 0.5, "clip_grad": 1.0},
        },
        "local steps": {
            "algorithm": {**CLIPPED, "kind": "diff2_bvr_l_sgd", "clip_local": 0.3, "local_steps": 3, "batch_rate": 0.5},
        },
        "sgd": {"algorithm": {**SAMPLED, "kind": "dp_sgd"}},
        "momentum": {"algorithm": {**SAMPLED, "kind": "dp_srm", "clip_diff": 0.3}},
        "unprotected": {"privacy": None},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The study in one process, and its file."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "s.yaml").write_text(json.dumps(STUDY))
    return fedsim.run(folder / "s.yaml", folder=folder / "out"), folder / "s.yaml"


@pytest.mark.parametrize(("kind", "size"), [pytest.param("mpi", 3, marks=[needs_mpi, pytest.mark.slow]), ("torch", 2)])
def test_every_layout_gives_the_same_bits_and_books(alone, tmp_path, kind, size):
    """mpirun on 3 ranks and torchrun on 2: the digests, ledgers and epsilons of one process."""
    study, file = alone
    launched = launch(kind, size, "run", file, "--folder", tmp_path / "out", "--no-plot", cwd=tmp_path)
    assert launched.returncode == 0, launched.stderr
    other = fedsim.load(tmp_path / "out")
    for one, two in zip(study.runs, other.runs, strict=True):
        assert one.digest == two.digest, one.variant
        if one.variant != "unprotected":
            assert (one.folder / FILE).read_text() == (two.folder / FILE).read_text()
            assert one.facts["privacy"]["epsilon_by_worker"] == two.facts["privacy"]["epsilon_by_worker"]


@needs_mpi
@pytest.mark.slow
def test_secrets_of_the_system_are_the_same_on_all_ranks(tmp_path):
    """With secure noise on 2 ranks rank 0 draws: the run ends with one shared state and a whole ledger."""
    local = {**CLIPPED, "kind": "diff2_bvr_l_sgd", "clip_local": 0.3, "local_steps": 2, "batch_rate": 0.5}
    content = scenario(local, LOGISTIC, {"epsilon": 2.0, "relation": "zero_out", "secure_noise": True}, rounds=4)
    (tmp_path / "s.yaml").write_text(json.dumps(content))
    launched = launch("mpi", 2, "run", tmp_path / "s.yaml", "--folder", tmp_path / "out", "--no-plot", cwd=tmp_path)
    assert launched.returncode == 0, launched.stderr
    result = fedsim.load(tmp_path / "out")
    assert result.status == "finished"
    assert result.metrics["consensus"].iloc[-1] < 1e-25
    assert len((result.folder / FILE).read_text().splitlines()) == 1 + 4 + 4
