"""Which node owns which records.

Two different things are called "Dirichlet partition" in the literature; both are here under their own names,
with `N` records, `N_c` of them of class c, `n` nodes, `C` classes:

- `dirichlet`, over nodes for each label: `p_c ~ Dir_n(alpha, ..., alpha)` and node i gets `N_c p_ci` records
  of class c. Sizes of nodes vary as well (Yurochkin et al. 2019; NIID-Bench, Li et al. 2022).
- `dirichlet_labels`, over labels for each node: `q_i ~ Dir_C(alpha r)` with `r_c = N_c / N`, and node i draws
  its records class by class from `q_i`. All nodes have the same size (Hsu, Qi and Brown 2019).

Every kind gives each record to exactly one node. Nothing is drawn again until it fits: numbers of records come
from rounding and from moving single records, so any `alpha > 0` ends, and at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, Lt
from numpy.typing import NDArray

from fedsim.errors import InputError, did_you_mean
from fedsim.problems.data.choice import choose
from fedsim.problems.data.draws import generator
from fedsim.problems.data.shares import apportion, balanced, draw_classes, log_dirichlet, raise_to
from fedsim.problems.data.table import Data

Parts = list[NDArray[np.int64]]
Alpha = Annotated[float, Gt(0), Lt(float("inf"))]


@dataclass(frozen=True, kw_only=True)
class Partition(ABC):
    """Base of the kinds; `seed` is by default the scenario's."""

    seed: Annotated[int, Ge(0), Lt(2**64)] | None = None

    @abstractmethod
    def split(self, data: Data, n: int, rng: np.random.Generator) -> Sequence[NDArray[np.int64]]:
        """Return the record numbers of each of the `n` nodes."""


@dataclass(frozen=True, kw_only=True)
class Iid(Partition):
    """Records dealt at random, in equal numbers (to one)."""

    def split(self, data: Data, n: int, rng: np.random.Generator) -> Sequence[NDArray[np.int64]]:
        """Return equal parts of a random order."""
        return np.array_split(rng.permutation(len(data)), n)


@dataclass(frozen=True, kw_only=True)
class Sorted(Partition):
    """Records sorted by label (by value for regression) and cut into equal parts (to one)."""

    def split(self, data: Data, n: int, rng: np.random.Generator) -> Sequence[NDArray[np.int64]]:
        """Return equal parts of the sorted order."""
        return np.array_split(np.argsort(data.labels, kind="stable"), n)


@dataclass(frozen=True, kw_only=True)
class Shards(Partition):
    """Records sorted by label, cut into `n * shards` equal shards, `shards` dealt to each node at random.

    McMahan et al. 2017 (FedAvg), section 3, with two shards per node.

    Attributes:
        shards: shards per node.
    """

    shards: Annotated[int, Ge(1)] = 2

    def split(self, data: Data, n: int, rng: np.random.Generator) -> Sequence[NDArray[np.int64]]:
        """Return each node's shards together.

        Raises:
            InputError: there are fewer records than shards.
        """
        count = n * self.shards
        if count > len(data):
            raise InputError(f"partition.shards: {n} nodes with {self.shards} shards each need {count} records; "
                             f"data {data.name!r} has {len(data)}")  # fmt: skip
        pieces = np.array_split(np.argsort(data.labels, kind="stable"), count)
        return [np.concatenate([pieces[k] for k in own]) for own in rng.permutation(count).reshape(n, -1)]


@dataclass(frozen=True, kw_only=True)
class Dirichlet(Partition):
    """Over nodes for each label: `p_c ~ Dir_n(alpha)`, node i gets `N_c p_ci` records of class c.

    Numbers are rounded by largest remainders. Where the literature draws again until every node has `min_size`
    records (and may never end), single records move here: from the largest node, of its most frequent class.

    Attributes:
        alpha: concentration; small means few nodes per class, large means equal shares.
        min_size: least number of records of a node.
    """

    alpha: Alpha
    min_size: Annotated[int, Ge(1)] = 1

    def split(self, data: Data, n: int, rng: np.random.Generator) -> Sequence[NDArray[np.int64]]:
        """Return the drawn parts.

        Raises:
            InputError: the data have no classes, or too few records for `min_size`.
        """
        _need_classes(data, "dirichlet")
        _need_records(data, n, self.min_size)
        totals = np.bincount(data.labels, minlength=len(data.classes))
        shares = np.exp(log_dirichlet(rng, np.full((len(totals), n), self.alpha)))
        counts = np.stack([apportion(total, share) for total, share in zip(totals, shares, strict=True)], axis=1)
        return _deal(data, raise_to(counts, self.min_size), rng)


@dataclass(frozen=True, kw_only=True)
class DirichletLabels(Partition):
    """Over labels for each node: `q_i ~ Dir_C(alpha r)`, `r_c = N_c / N`; equal sizes (to one).

    Nodes are filled in random order, without replacement: the records of a node follow a multinomial of `q_i`
    over the classes that are left, in proportion to what is left where `q_i` gives them nothing. So the last
    nodes are nearer to what remains than to their `q_i`, and every record is used.

    Attributes:
        alpha: concentration; small means one class per node, large means the mix of the whole set.
    """

    alpha: Alpha

    def split(self, data: Data, n: int, rng: np.random.Generator) -> Sequence[NDArray[np.int64]]:
        """Return the drawn parts.

        Raises:
            InputError: the data have no classes.
        """
        _need_classes(data, "dirichlet_labels")
        left = np.bincount(data.labels, minlength=len(data.classes))
        present = np.flatnonzero(left)
        log_q = np.full((n, len(left)), -np.inf)
        log_q[:, present] = log_dirichlet(rng, np.tile(self.alpha * left[present] / len(data), (n, 1)))
        sizes = [len(part) for part in np.array_split(np.arange(len(data)), n)]
        counts = np.zeros((n, len(left)), dtype=np.int64)
        for node in rng.permutation(n):
            counts[node] = draw_classes(rng, sizes[node], log_q[node], left)
            left -= counts[node]
        return _deal(data, counts, rng)


@dataclass(frozen=True, kw_only=True)
class DirichletSizes(Partition):
    """Sizes `~ N Dir_n(alpha)`, records dealt at random: nodes differ in size, not in kind.

    Attributes:
        alpha: concentration; small means a few large nodes. min_size: least number of records of a node.
    """

    alpha: Alpha
    min_size: Annotated[int, Ge(1)] = 1

    def split(self, data: Data, n: int, rng: np.random.Generator) -> Sequence[NDArray[np.int64]]:
        """Return the drawn parts.

        Raises:
            InputError: too few records for `min_size`.
        """
        _need_records(data, n, self.min_size)
        share = np.exp(log_dirichlet(rng, np.full((1, n), self.alpha)))[0]
        sizes = raise_to(apportion(len(data), share)[:, None], self.min_size)[:, 0]
        return np.split(rng.permutation(len(data)), np.cumsum(sizes)[:-1])


@dataclass(frozen=True, kw_only=True)
class RoundRobin(Partition):
    """Record i to node i mod n, in the order of the table: no draw (published code of DIFF2, ICML 2023)."""

    def split(self, data: Data, n: int, rng: np.random.Generator) -> Sequence[NDArray[np.int64]]:
        """Return every n-th record."""
        return [np.arange(node, len(data), n) for node in range(n)]


@dataclass(frozen=True, kw_only=True)
class Column(Partition):
    """By a column of the data, such as a hospital, a country or a latitude.

    Text and whole numbers: records of one value stay together. With as many values as nodes, node k holds the
    k-th value in sorted order; with more, values go to nodes in order of size, each to the smallest node so far.
    Other numbers: records sorted by the column and cut into equal parts (to one).

    Attributes:
        column: its name; it may be one that `drop` leaves out of the features.
    """

    column: str

    def split(self, data: Data, n: int, rng: np.random.Generator) -> Sequence[NDArray[np.int64]]:
        """Return the parts.

        Raises:
            InputError: no such column, missing values in it, or fewer values than nodes.
        """
        values = _column(data, self.column)
        if values.dtype.kind == "f":
            return np.array_split(np.argsort(values, kind="stable"), n)
        levels, group = np.unique(values.astype(str) if values.dtype.kind == "O" else values, return_inverse=True)
        if len(levels) < n:
            raise InputError(f"partition.column: {self.column!r} has {len(levels)} different values for {n} nodes; "
                             "needed is at least one value per node")  # fmt: skip
        owner = np.arange(n) if len(levels) == n else balanced(np.bincount(group), n)
        return [np.flatnonzero(owner[group] == node) for node in range(n)]


@dataclass(frozen=True, kw_only=True)
class Node(Partition):
    """As the synthetic generators drew them: the column `node` holds the owner of each record."""

    def split(self, data: Data, n: int, rng: np.random.Generator) -> Sequence[NDArray[np.int64]]:
        """Return the parts.

        Raises:
            InputError: there is no column `node`, or it names nodes that do not exist.
        """
        owner = _column(data, "node")
        if owner.dtype.kind not in "iu" or owner.min() < 0 or owner.max() >= n:
            raise InputError(f"partition node: column 'node' of data {data.name!r} must hold node numbers 0 to {n - 1}")
        order = np.argsort(owner, kind="stable")
        return np.split(order, np.cumsum(np.bincount(owner, minlength=n))[:-1])


KINDS: dict[str, type[Partition]] = {
    "iid": Iid,
    "sorted": Sorted,
    "shards": Shards,
    "dirichlet": Dirichlet,
    "dirichlet_labels": DirichletLabels,
    "dirichlet_sizes": DirichletSizes,
    "round_robin": RoundRobin,
    "column": Column,
    "node": Node,
}


def partition(data: Data, n: int, spec: Mapping[str, Any], seed: int = 0) -> Parts:
    """Return the record numbers of each node, ascending, in node-number order: `n` int64 arrays.

    Args:
        spec: `{kind: ..., seed: ..., and the kind's own keys}`. seed: the scenario's, where `spec` has none.

    Raises:
        InputError: unknown kind or key, a kind that these data cannot serve, or a node without records.
    """
    chosen = choose(spec, KINDS, "partition")
    _need_records(data, n, 1)
    rng = generator(seed if chosen.seed is None else chosen.seed, f"partition {spec['kind']}")
    parts = [np.sort(part).astype(np.int64) for part in chosen.split(data, n, rng)]
    empty = [node for node, part in enumerate(parts) if not len(part)]
    if empty:
        raise InputError(f"partition {spec['kind']}: {len(empty)} of {n} nodes have no records (the first: node "
                         f"{empty[0]}); every node needs one at least")  # fmt: skip
    return parts


@dataclass(frozen=True)
class Report:
    """Who has how much.

    Attributes:
        header: "node", "records", then the classes (none for regression).
        counts: int64 `[n, len(header)]`, one row per node.
    """

    header: tuple[str, ...]
    counts: NDArray[np.int64]


def report(parts: Sequence[NDArray[np.int64]], data: Data) -> Report:
    """Return the number of records per node, and per node and class where there are classes."""
    width = len(data.classes)
    sizes = [[node, len(part)] for node, part in enumerate(parts)]
    classes = [np.bincount(data.labels[part], minlength=width) if width else [] for part in parts]
    counts = np.array([[*size, *count] for size, count in zip(sizes, classes, strict=True)], dtype=np.int64)
    return Report(("node", "records", *data.classes), counts)


def _deal(data: Data, counts: NDArray[np.int64], rng: np.random.Generator) -> Parts:
    """Return parts with `counts[node, label]` records, those of a label being dealt at random."""
    owner = np.empty(len(data), dtype=np.int64)
    for label in range(counts.shape[1]):
        records = rng.permutation(np.flatnonzero(data.labels == label))
        owner[records] = np.repeat(np.arange(len(counts)), counts[:, label])
    order = np.argsort(owner, kind="stable")
    return np.split(order, np.cumsum(counts.sum(axis=1))[:-1])


def _column(data: Data, name: str) -> NDArray[Any]:
    if name not in data.columns:
        listed = ", ".join(map(repr, list(data.columns)[:10])) or "none"
        raise InputError(f"partition: data {data.name!r} has no column {name!r}{did_you_mean(name, data.columns)}; "
                         f"it has {listed}")  # fmt: skip
    values = data.columns[name]
    empty = {"f": np.isnan, "M": np.isnat}.get(values.dtype.kind, lambda v: np.array([value is None for value in v]))
    missing = empty(values)
    if missing.any():
        raise InputError(f"partition: column {name!r} of data {data.name!r} has {int(missing.sum())} missing value(s)")
    return values


def _need_classes(data: Data, kind: str) -> None:
    if data.task == "regression":
        raise InputError(f"partition.kind: {kind!r} follows classes, and data {data.name!r} is a regression set; "
                         "use dirichlet_sizes, sorted, shards or column")  # fmt: skip


def _need_records(data: Data, n: int, least: int) -> None:
    if len(data) < n * least:
        raise InputError(f"partition: {n} nodes with at least {least} record(s) each need {n * least}; "
                         f"data {data.name!r} has {len(data)}")  # fmt: skip
