"""Mixtures of experts in one process, under mpirun and under torchrun: one digest, weights and biases included."""

import json

import pytest
from launching import launch, needs_mpi

import fedsim

TINY = {
    "kind": "byte_language",
    "sequence": 16,
    "validation": 3,
    "d_model": 12,
    "heads": 2,
    "d_dense": 10,
    "d_expert": 7,
    "moe_num_experts": 8,
}
SCENARIO = {
    "name": "experts",
    "topology": {"kind": "server", "n": 4},
    "problem": TINY,
    "algorithm": {"kind": "moe_training", "bias_rule": "sign", "bias_update_rate": 0.01, "sequences": 3},
    "schedule": {"horizon": 4},
    "record": {"every": 2},
    "variants": {
        "dropless": {},
        "capacity, auxiliary loss, micro-batches": {
            "algorithm.capacity_factor": 1.0,
            "algorithm.accumulation": 2,
            "algorithm.aux_loss_coeff": 0.1,
            "algorithm.aux_loss_scope": "global_batch",
        },
        "one expert of eight for a token, hosts that differ": {
            "problem": {**TINY, "moe_top_k": 1, "shard": "contiguous", "dtype": "float64"}
        },
        "empty hosts": {"problem": {**TINY, "num_expert_groups": 4, "num_limited_groups": 1}},
        "replay": {
            "problem": {"kind": "router_scores", "tokens": 203, "fresh": True, "layers": 2, "workload": "hot_host"},
            "algorithm": {"kind": "router_replay", "bias_rule": "prop", "bias_update_rate": 0.05, "oracle": "each"},
        },
        "replay, own counts": {
            "problem": {"kind": "router_scores", "tokens": 203, "shard": "favourite"},
            "algorithm": {"kind": "router_replay", "bias_sync": "local", "bias_delay": 2, "capacity_factor": 1.25},
        },
        "replay, quantiles": {
            "problem": {"kind": "router_scores", "tokens": 203, "shard": "ragged"},
            "algorithm": {"kind": "router_replay", "bias_rule": "qb"},
        },
    },
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The study in one process, and its file."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "s.yaml").write_text(json.dumps(SCENARIO))
    return fedsim.run(folder / "s.yaml", folder=folder / "out"), folder / "s.yaml"


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        pytest.param("mpi", 2, marks=needs_mpi),
        pytest.param("mpi", 4, marks=[needs_mpi, pytest.mark.slow]),
        pytest.param("torch", 2, marks=pytest.mark.slow),
    ],
)
def test_every_launcher_gives_the_digests_of_one_process(alone, tmp_path, kind, size):
    """Training and replay have one digest and the same metrics, whoever holds the experts."""
    here, file = alone
    done = launch(kind, size, "run", file, "--json", "--folder", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    there = fedsim.load(tmp_path / "out")
    assert [r.digest for r in there.runs] == [r.digest for r in here.runs]
    columns = [c for c in here.metrics if c != "wall_seconds"]
    assert there.metrics[columns].equals(here.metrics[columns])
    assert there.runs[0].facts["wire_bytes"] > 0
