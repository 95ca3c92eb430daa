"""Minibatches: what is drawn, with which weights, and the same from either side."""

from __future__ import annotations

import numpy as np
import pytest

from fedsim.algorithms.algorithm import Sampling
from fedsim.engine.sampling import KINDS, check, draw, draw_batch, width
from fedsim.errors import InputError

SEED = np.uint64(11)
RECORDS = np.array([7, 12, 5, 30, 9], dtype=np.int64)
NODES = np.array([3, 0, 4, 1], dtype=np.int64)
ALL = [Sampling(4), Sampling(4, "epoch"), Sampling(4, "poisson")]


@pytest.mark.parametrize("sampling", ALL, ids=lambda s: s.kind)
def test_a_node_draws_alone_what_it_draws_among_others(sampling):
    """A node's batch is the same in any block, and in the compiled form for one node."""
    together = draw(sampling, SEED, NODES, 6, RECORDS)
    for row, node in enumerate(NODES):
        alone = draw(sampling, SEED, NODES[row : row + 1], 6, RECORDS)
        indices, weights = np.zeros(width(sampling, RECORDS), np.int64), np.zeros(width(sampling, RECORDS))
        used = draw_batch(SEED, node, 6, RECORDS[node], KINDS[sampling.kind], sampling.size, indices, weights)
        assert np.array_equal(alone.indices[0], together.indices[row])
        assert np.array_equal(alone.weights[0], together.weights[row])
        assert np.array_equal(indices, together.indices[row])
        assert np.array_equal(weights, together.weights[row])
        assert used == np.count_nonzero(weights)


@pytest.mark.parametrize("sampling", ALL, ids=lambda s: s.kind)
def test_indices_are_records_of_the_node(sampling):
    """No batch names a record that its node does not have, padding included."""
    for step in range(200):
        batch = draw(sampling, SEED, NODES, step, RECORDS)
        assert (batch.indices >= 0).all()
        assert (batch.indices < RECORDS[NODES][:, None]).all()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_an_epoch_sees_every_record_once(size):
    """The batches of an epoch are a permutation of the node's records; the next epoch has another."""
    sampling, per_epoch = Sampling(size, "epoch"), [-(-int(r) // size) for r in RECORDS]
    for node in range(len(RECORDS)):
        epochs = []
        for epoch in range(2):
            seen = []
            for part in range(per_epoch[node]):
                batch = draw(sampling, SEED, np.array([node]), epoch * per_epoch[node] + part, RECORDS)
                kept = batch.weights[0] > 0
                assert batch.weights[0][kept].sum() == pytest.approx(1.0, abs=1e-15)
                seen += batch.indices[0][kept].tolist()
            assert sorted(seen) == list(range(RECORDS[node]))
            epochs.append(seen)
        assert epochs[0] != epochs[1]


@pytest.mark.parametrize("sampling", [Sampling(4), Sampling(4, "poisson")], ids=lambda s: s.kind)
def test_estimates_are_unbiased(sampling):
    """Over many steps every record gets the weight 1/records on average."""
    steps, total = 6000, np.zeros(RECORDS[1])
    for step in range(steps):
        batch = draw(sampling, SEED, np.array([1]), step, RECORDS)
        np.add.at(total, batch.indices[0], batch.weights[0])
    spread = 5 * np.sqrt(1 / (4 * RECORDS[1] * steps))
    assert np.abs(total / steps - 1 / RECORDS[1]).max() < spread


def test_poisson_sizes_have_the_binomial_variance():
    """Poisson sampling takes each record independently: the batch size varies as a binomial's."""
    sizes = np.array([draw(Sampling(4, "poisson"), SEED, np.array([1]), k, RECORDS).records for k in range(4000)])
    assert abs(sizes.mean() - 4) < 5 * np.sqrt(4 * (1 - 4 / 12) / 4000)
    assert sizes.var() == pytest.approx(4 * (1 - 4 / 12), rel=0.1)


def test_samples_are_the_records_with_weight():
    """A batch costs as many per-record gradients as it has records in use."""
    assert draw(Sampling(3), SEED, NODES, 0, RECORDS).records == 3 * len(NODES)
    last = draw(Sampling(4, "epoch"), SEED, np.array([2]), 1, RECORDS)  # 5 records: 4 and then 1
    assert last.records == 1


@pytest.mark.parametrize(
    ("sampling", "records", "words"),
    [
        (Sampling(4), np.array([3, 0]), ["problem 'quadratic' has no records"]),
        (Sampling(0), RECORDS, ["algorithm.batch.size: 0 given"]),
        (Sampling(6, "epoch"), RECORDS, ["6 records asked for, node 2 has 5", "with_replacement"]),
        (Sampling(6, "poisson"), RECORDS, ["6 records asked for, node 2 has 5"]),
    ],
)
def test_impossible_batches_are_refused(sampling, records, words):
    """A batch that a node cannot give is refused by node, number and remedy."""
    with pytest.raises(InputError) as error:
        check(sampling, records, "quadratic")
    assert all(word in str(error.value) for word in words)


def test_possible_batches_pass():
    """Exact gradients need no records; drawing with replacement may ask for more than a node has."""
    check(None, np.zeros(3, np.int64), "quadratic")
    check(Sampling(100), RECORDS, "logistic")
