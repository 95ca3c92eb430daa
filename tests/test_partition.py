"""Partitions: every record once, sizes as promised, any alpha ends."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.errors import InputError
from fedsim.problems.data.shares import apportion, log_dirichlet, raise_to
from fedsim.problems.data.sources import load
from fedsim.problems.data.table import Data
from fedsim.problems.partition import KINDS, partition, report

CANCER = load({"kind": "breast_cancer"}, Path("."))
DIGITS = load({"kind": "digits"}, Path("."))
DIABETES = load({"kind": "diabetes"}, Path("."))


def labelled(labels: list[int] | np.ndarray, **columns: Any) -> Data:
    """A set with these class numbers."""
    labels = np.asarray(labels, dtype=np.int64)
    classes = tuple(map(str, range(int(labels.max()) + 1)))
    table = {name: np.asarray(values) for name, values in columns.items()}
    return Data(np.zeros((len(labels), 1)), labels, table, "toy", "multiclass", classes)


def sizes(parts: list[np.ndarray]) -> list[int]:
    """Number of records per node."""
    return [len(part) for part in parts]


def refusal(data: Data, n: int, spec: dict[str, Any]) -> str:
    """Return the message with which the partition is refused."""
    with pytest.raises(InputError) as error:
        partition(data, n, spec)
    return str(error.value)


def assert_exact(parts: list[np.ndarray], data: Data, n: int) -> None:
    """Each record is in exactly one part, each part ascending and not empty."""
    assert len(parts) == n
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(data)))
    assert all(len(part) and np.all(np.diff(part) > 0) for part in parts)


@settings(max_examples=150, deadline=None)
@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=60),
    n=st.integers(1, 60),
    exponent=st.floats(-300, 300),
    kind=st.sampled_from(["dirichlet", "dirichlet_labels", "dirichlet_sizes"]),
    seed=st.integers(0, 2**64 - 1),
)
def test_dirichlet_is_exact_for_any_alpha(labels: list[int], n: int, exponent: float, kind: str, seed: int) -> None:
    """For every alpha from 1e-300 to 1e300, any classes and any n <= N, each record has exactly one owner."""
    data = labelled(labels)
    n = min(n, len(data))
    parts = partition(data, n, {"kind": kind, "alpha": 10.0**exponent}, seed)
    assert_exact(parts, data, n)
    if kind == "dirichlet_labels":
        assert sizes(parts) == sizes(np.array_split(np.arange(len(data)), n))


@pytest.mark.parametrize("alpha", [1e-3, 0.1, 1.0, 1e3])
@pytest.mark.parametrize("kind", ["dirichlet", "dirichlet_sizes"])
def test_min_size_is_kept(kind: str, alpha: float) -> None:
    """Every node has `min_size` records, even where that is every record there is."""
    for n, least in [(10, 20), (100, 5), (569, 1), (113, 5)]:
        parts = partition(CANCER, n, {"kind": kind, "alpha": alpha, "min_size": least})
        assert_exact(parts, CANCER, n)
        assert min(sizes(parts)) >= least


def test_dirichlet_skew_follows_alpha() -> None:
    """`dirichlet`: small alpha gives a class to few nodes, large alpha gives each node an equal share of it."""

    def largest_share(alpha: float) -> float:
        parts = partition(DIGITS, 20, {"kind": "dirichlet", "alpha": alpha}, seed=1)
        counts = report(parts, DIGITS).counts[:, 2:]
        return float((counts.max(axis=0) / counts.sum(axis=0)).mean())

    assert largest_share(1e-3) > 0.8
    assert largest_share(1e3) < 0.07
    assert largest_share(1e-3) > largest_share(0.1) > largest_share(1.0) > largest_share(1e3)


def test_dirichlet_labels_skew_follows_alpha() -> None:
    """`dirichlet_labels`: small alpha gives nodes about one class, large alpha the mix of the whole set."""

    def purity(alpha: float) -> float:
        parts = partition(DIGITS, 10, {"kind": "dirichlet_labels", "alpha": alpha}, seed=1)
        counts = report(parts, DIGITS).counts[:, 2:]
        return float((counts.max(axis=1) / counts.sum(axis=1)).mean())

    assert purity(1e-3) > 0.7
    assert purity(1e4) < 0.16
    assert purity(1e-3) > purity(1.0) > purity(1e4)


def test_dirichlet_moments() -> None:
    """Log-space draws have the mean and variance of Dirichlet variates, and sum to one."""
    alpha = np.array([0.05, 0.5, 2.0])
    draws = np.exp(log_dirichlet(np.random.Generator(np.random.Philox(3)), np.tile(alpha, (40_000, 1))))
    mean, total = alpha / alpha.sum(), alpha.sum()
    np.testing.assert_allclose(draws.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(draws.mean(axis=0), mean, atol=0.008)
    np.testing.assert_allclose(draws.var(axis=0), mean * (1 - mean) / (total + 1), atol=0.004)


def test_dirichlet_never_gives_nan() -> None:
    """The smallest and largest positive alphas give finite logarithms that sum to one."""
    rng = np.random.Generator(np.random.Philox(0))
    for alpha in (5e-324, 1e-300, 1e-3, 1e3, 1e300):
        draws = log_dirichlet(rng, np.full((20, 7), alpha))
        assert np.isfinite(draws).all()
        np.testing.assert_allclose(np.exp(draws).sum(axis=1), 1, atol=1e-12)


def test_iid_and_sorted_have_equal_sizes() -> None:
    """iid and sorted parts differ by one record at most; sorted ones hold neighbouring labels."""
    for data in (CANCER, DIABETES):
        for kind in ("iid", "sorted"):
            parts = partition(data, 20, {"kind": kind})
            assert_exact(parts, data, 20)
            assert max(sizes(parts)) - min(sizes(parts)) <= 1
    edges = [(DIABETES.labels[p].min(), DIABETES.labels[p].max()) for p in partition(DIABETES, 20, {"kind": "sorted"})]
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(edges))


def test_shards_limit_the_classes() -> None:
    """With two shards, each of one class or two, a node sees few of ten classes, and sizes are nearly equal."""
    parts = partition(DIGITS, 50, {"kind": "shards", "shards": 2})
    assert_exact(parts, DIGITS, 50)
    assert max(sizes(parts)) - min(sizes(parts)) <= 2
    assert (report(parts, DIGITS).counts[:, 2:] > 0).sum(axis=1).max() <= 4


def test_column_of_text() -> None:
    """As many values as nodes: one each, in sorted order; more: values stay together and sizes are balanced."""
    site = ["b", "a", "b", "c", "c", "c", "d"]
    data = labelled([0, 1, 0, 1, 0, 1, 0], site=np.array(site, dtype=object))
    parts = partition(data, 4, {"kind": "column", "column": "site"})
    assert [part.tolist() for part in parts] == [[1], [0, 2], [3, 4, 5], [6]]
    two = partition(data, 2, {"kind": "column", "column": "site"})
    assert_exact(two, data, 2)
    assert sorted(sizes(two)) == [3, 4]
    assert "4 different values for 5 nodes" in refusal(data, 5, {"kind": "column", "column": "site"})


def test_column_of_numbers() -> None:
    """A column of real numbers gives every node a range of it."""
    parts = partition(DIABETES, 6, {"kind": "column", "column": "bmi"})
    assert_exact(parts, DIABETES, 6)
    bmi = DIABETES.columns["bmi"]
    assert all(bmi[a].max() <= bmi[b].min() for a, b in itertools.pairwise(parts))


def test_node_follows_the_generator() -> None:
    """Synthetic records go to the node that drew them."""
    data = load({"kind": "synthetic_regression", "samples": 7}, Path("."), n=4)
    parts = partition(data, 4, {"kind": "node"})
    assert [part.tolist() for part in parts] == np.arange(28).reshape(4, 7).tolist()


def test_report_counts_per_node_and_class() -> None:
    """The report's rows sum to the sizes, its columns to the classes; regression has sizes only."""
    parts = partition(CANCER, 5, {"kind": "dirichlet", "alpha": 0.5})
    table = report(parts, CANCER)
    assert table.header == ("node", "records", "malignant", "benign")
    assert np.array_equal(table.counts[:, 1], sizes(parts))
    assert np.array_equal(table.counts[:, 2:].sum(axis=1), table.counts[:, 1])
    assert np.array_equal(table.counts[:, 2:].sum(axis=0), np.bincount(CANCER.labels))
    plain = report(partition(DIABETES, 5, {"kind": "iid"}), DIABETES)
    assert plain.header == ("node", "records")
    assert plain.counts.shape == (5, 2)


@pytest.mark.parametrize("kind", ["iid", "shards", "dirichlet", "dirichlet_labels", "dirichlet_sizes"])
def test_seeds(kind: str) -> None:
    """The same seed gives the same parts, another seed others; the partition's own seed wins over the scenario's."""
    spec = {"kind": kind} if kind in ("iid", "shards") else {"kind": kind, "alpha": 0.5}
    one, same, other = (partition(CANCER, 8, spec, seed) for seed in (1, 1, 2))
    own = partition(CANCER, 8, {**spec, "seed": 1}, seed=2)
    assert all(map(np.array_equal, one, same))
    assert all(map(np.array_equal, one, own))
    assert not all(map(np.array_equal, one, other))


def test_one_class_on_a_node_is_normal() -> None:
    """A node with records of one class only is not refused."""
    counts = report(partition(CANCER, 10, {"kind": "sorted"}), CANCER).counts[:, 2:]
    assert (counts == 0).any()


def test_refusals() -> None:
    """What cannot be split as asked is refused, with numbers and a way out."""
    assert "570 nodes" in refusal(CANCER, 570, {"kind": "iid"})
    assert "has 569" in refusal(CANCER, 100, {"kind": "dirichlet", "alpha": 1, "min_size": 6})
    assert "1200 records" in refusal(CANCER, 400, {"kind": "shards", "shards": 3})
    assert "dirichlet_sizes" in refusal(DIABETES, 5, {"kind": "dirichlet", "alpha": 1})
    assert "greater than 0" in refusal(CANCER, 5, {"kind": "dirichlet", "alpha": 0})
    assert "less than inf" in refusal(CANCER, 5, {"kind": "dirichlet", "alpha": float("inf")})
    assert "partition.alpha" in refusal(CANCER, 5, {"kind": "dirichlet_sizes", "alpha": float("nan")})
    assert "did you mean 'dirichlet_labels'" in refusal(CANCER, 5, {"kind": "dirichlet_label", "alpha": 1})
    assert "did you mean 'alpha'" in refusal(CANCER, 5, {"kind": "dirichlet", "alfa": 1})
    assert "no column 'node'" in refusal(CANCER, 5, {"kind": "node"})
    assert "did you mean 'mean radius'" in refusal(CANCER, 5, {"kind": "column", "column": "mean_radius"})


def test_empty_nodes_are_refused() -> None:
    """A node that gets no records is named."""
    data = labelled([0, 1, 0, 1], node=[0, 0, 2, 2])
    message = refusal(data, 3, {"kind": "node"})
    assert "node 1" in message
    assert "no records" in message


def test_rounding_keeps_sums() -> None:
    """Largest remainders give the exact total, within one of the exact share."""
    shares = np.array([0.1, 0.26, 0.64])
    counts = apportion(7, shares)
    assert counts.sum() == 7
    assert np.all(np.abs(counts - 7 * shares) < 1)


def test_raising_keeps_classes() -> None:
    """Moving records to small nodes changes no class total and takes from the largest."""
    counts = np.array([[9, 1], [0, 0], [4, 2]])
    raised = raise_to(counts, 3)
    assert np.array_equal(raised.sum(axis=0), counts.sum(axis=0))
    assert raised.sum(axis=1).tolist() == [7, 3, 6]


def test_every_kind_says_what_it_is() -> None:
    """Every kind has a docstring, which is what lists and documentation print."""
    assert all(cls.__doc__ and not cls.__doc__.startswith(cls.__name__ + "(") for cls in KINDS.values())
