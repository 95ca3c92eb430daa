"""Synthetic records that belong to nodes: every node draws its own, from a stream of its own.

They carry the column `node`; the partition `{kind: node}` follows it. A node's records depend on seed and node
number only, not on how many nodes there are.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge, Gt, Lt
from numpy.typing import NDArray

from fedsim.errors import InputError
from fedsim.problems.data.draws import generator
from fedsim.problems.data.source import Source, Surroundings
from fedsim.problems.data.table import Data, Task, checked

Records = tuple[NDArray[np.float64], NDArray[np.float64] | NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True)
class Synthetic(Source):
    """Base of the generators.

    Attributes:
        samples: records per node. dim: features per record.
        seed: of the data; by default the scenario's.
    """

    kind: ClassVar[str]

    samples: Annotated[int, Ge(1)] = 100
    dim: Annotated[int, Ge(1)] = 10
    seed: Annotated[int, Ge(0), Lt(2**64)] | None = None

    @abstractmethod
    def draw(self, rng: np.random.Generator, shared: np.random.Generator) -> Records:
        """Return one node's features `[samples, dim]` and labels `[samples]`.

        `rng` is the node's own stream; `shared` starts afresh, and equal, for every node.
        """

    @property
    def class_count(self) -> int:
        """Number of classes; 0 for regression."""
        return 0

    def read(self, around: Surroundings) -> Data:
        """Return `n * samples` records, node after node.

        Raises:
            InputError: the number of nodes is not known.
        """
        name = self.kind
        if around.n is None:
            raise InputError(f"data.kind: {name!r} draws records for every node and needs the number of nodes")
        seed = around.seed if self.seed is None else self.seed
        drawn = [self.draw(generator(seed, name, node), generator(seed, f"{name} shared")) for node in range(around.n)]
        node = np.repeat(np.arange(around.n, dtype=np.int64), self.samples)
        classes = tuple(map(str, range(self.class_count)))
        task: Task = ("regression", "binary", "multiclass")[min(max(len(classes) - 1, 0), 2)]
        data = Data(
            features=np.concatenate([features for features, _ in drawn]),
            labels=np.concatenate([labels for _, labels in drawn]),
            columns={"node": node},
            name=name,
            task=task,
            classes=classes,
            feature_names=tuple(f"a{j}" for j in range(self.dim)),
        )
        return checked(data, constant="keep")


@dataclass(frozen=True, kw_only=True)
class SyntheticRegression(Synthetic):
    """Linear targets, `c = <a, w + heterogeneity u_i> + noise e`, features `a ~ N(shift v_i, I)`.

    `w` is common to all nodes; `u_i`, `v_i` belong to node i; `w, u_i, v_i, e` are standard normal.
    `heterogeneity` sets how far the local minimisers lie apart, `shift` how far the features do
    (the two knobs of Synthetic(alpha, beta) in Li et al. 2020, FedProx, section 5.1, in plain form).
    """

    kind: ClassVar[str] = "synthetic_regression"

    noise: Annotated[float, Ge(0)] = 0.1
    heterogeneity: Annotated[float, Ge(0)] = 0.0
    shift: Annotated[float, Ge(0)] = 0.0

    def draw(self, rng: np.random.Generator, shared: np.random.Generator) -> Records:
        """Return one node's records; see the class."""
        w = shared.standard_normal(self.dim) + self.heterogeneity * rng.standard_normal(self.dim)
        mean = self.shift * rng.standard_normal(self.dim)
        a = mean + rng.standard_normal((self.samples, self.dim))
        return a, a @ w + self.noise * rng.standard_normal(self.samples)


@dataclass(frozen=True, kw_only=True)
class SyntheticClassification(Synthetic):
    """Classes drawn from a softmax model, `P(label = c | a) ~ exp(<a, W_c + heterogeneity U_ic>)`.

    Features `a ~ N(shift v_i, I)`; `W` is common to all nodes, `U_i`, `v_i` belong to node i, all standard normal.
    Larger `heterogeneity` makes nodes disagree on the labels, larger `shift` on the features.
    """

    kind: ClassVar[str] = "synthetic_classification"

    classes: Annotated[int, Ge(2)] = 2
    heterogeneity: Annotated[float, Ge(0)] = 0.0
    shift: Annotated[float, Ge(0)] = 0.0

    @property
    def class_count(self) -> int:
        """Number of classes."""
        return self.classes

    def draw(self, rng: np.random.Generator, shared: np.random.Generator) -> Records:
        """Return one node's records; see the class."""
        shape = (self.classes, self.dim)
        w = shared.standard_normal(shape) + self.heterogeneity * rng.standard_normal(shape)
        mean = self.shift * rng.standard_normal(self.dim)
        a = mean + rng.standard_normal((self.samples, self.dim))
        # the largest of logit + Gumbel noise is a draw from the softmax
        return a, np.argmax(a @ w.T + rng.gumbel(size=(self.samples, self.classes)), axis=1)


@dataclass(frozen=True, kw_only=True)
class TeacherNetwork(Source):
    """Regression on a random network: `y = tanh(X W') a + 0.1 noise`, scaled to [0, 1]; X standard normal.

    `W ~ N(0, 1/dim)` `[10, dim]`, a standard normal. One table of `records`, for any partition.
    """

    records: Annotated[int, Ge(2)] = 25_000
    dim: Annotated[int, Ge(1)] = 8
    seed: Annotated[int, Ge(0)] = 12345

    def read(self, around: Surroundings) -> Data:
        """Return the records."""
        rng = np.random.default_rng(self.seed)
        x = rng.normal(size=(self.records, self.dim))
        w = rng.normal(size=(10, self.dim)) / np.sqrt(self.dim)
        a = rng.normal(size=10)
        y = np.tanh(x @ w.T) @ a + 0.1 * rng.normal(size=self.records)
        y = (y - y.min()) / (y.max() - y.min())
        names = tuple(f"x{j}" for j in range(self.dim))
        return checked(Data(x, y, {}, "teacher_network", "regression", (), names))


@dataclass(frozen=True, kw_only=True)
class DadaoRegression(Synthetic):
    """The linear task of the DADAO figures (Nabli & Oyallon, JMLR 26(207), 2025, section 5 and reference code).

    Every node has an unrelated linear model: features `N(0, 1)`, all informative, coefficients
    `Uniform(0, 100)`, targets with noise `N(0, noise^2)`, then all targets of the node multiplied by one
    `Uniform(0.01, 5)` factor. Same distributions as the authors' calls of scikit-learn, not the same numbers.
    """

    kind: ClassVar[str] = "dadao_regression"

    noise: Annotated[float, Ge(0)] = 10.0

    def draw(self, rng: np.random.Generator, shared: np.random.Generator) -> Records:
        """Return one node's records; see the class."""
        a = rng.standard_normal((self.samples, self.dim))
        targets = a @ rng.uniform(0.0, 100.0, self.dim) + self.noise * rng.standard_normal(self.samples)
        return a, targets * rng.uniform(0.01, 5.0)


@dataclass(frozen=True, kw_only=True)
class DadaoClassification(Synthetic):
    """The logistic task of the DADAO reference code: per node an unrelated two-class mixture of Gaussians.

    Two informative features hold four clusters at the corners of a square of side `2 separation`, two per class,
    each with its own random linear map; the other features are `N(0, 1)`; a share `flip` of the labels is
    redrawn; the features are shuffled. Same recipe as the default two-class set of scikit-learn's
    `make_classification` (Guyon 2003) without redundant features, not the same numbers.
    """

    kind: ClassVar[str] = "dadao_classification"

    dim: Annotated[int, Ge(2)] = 10
    separation: Annotated[float, Gt(0)] = 1.0
    flip: Annotated[float, Ge(0), Lt(1)] = 0.01

    @property
    def class_count(self) -> int:
        """Number of classes: two."""
        return 2

    def draw(self, rng: np.random.Generator, shared: np.random.Generator) -> Records:
        """Return one node's records; see the class."""
        corners = self.separation * rng.permutation([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
        maps = rng.uniform(-1.0, 1.0, (4, 2, 2))
        cluster = rng.permutation(np.arange(self.samples) % 4)
        a = rng.standard_normal((self.samples, self.dim))
        a[:, :2] = np.einsum("ni,nij->nj", a[:, :2], maps[cluster]) + corners[cluster]
        redrawn = rng.random(self.samples) < self.flip
        labels = np.where(redrawn, rng.integers(0, 2, self.samples), cluster % 2)
        return a[:, rng.permutation(self.dim)], labels


@dataclass(frozen=True, kw_only=True)
class SyntheticLasso(Source):
    """A regression without random numbers, on which any implementation must give the same digits.

    Node i has eight records of six features, `a_r[c] = sin(1 + 7 i + 3 r + 2 c (r + 1)) / sqrt(2)`, and targets
    `<a_r, t_i> + 0.1 cos(r + i) / sqrt(2)` of a sparse model that differs between nodes: `t_i` is 1.5 at c = 0 and 3,
    and `0.5 i` at c = 1. The `1/sqrt(2)` makes least squares `||A_i x - b_i||^2 / 16`. With five nodes and
    `composite: {kind: l1, weight: 0.05}` it is golden problem G1 of the DProxSGT specification.
    """

    kind: ClassVar[str] = "synthetic_lasso"

    def read(self, around: Surroundings) -> Data:
        """Return `8 n` records, node after node.

        Raises:
            InputError: the number of nodes is not known.
        """
        if around.n is None:
            raise InputError("data.kind: 'synthetic_lasso' makes records for every node and needs the number of nodes")
        i, r, c = np.ogrid[: around.n, :8, :6]
        a = np.sin(1.0 + 7 * i + 3 * r + 2 * c * (r + 1))
        target = np.where(c == 1, 0.5 * i, np.where(c % 3 == 0, 1.5, 0.0))
        b = (a * target).sum(axis=2) + 0.1 * np.cos(r + i)[:, :, 0]
        data = Data(
            features=a.reshape(-1, 6) / np.sqrt(2.0),
            labels=b.ravel() / np.sqrt(2.0),
            columns={"node": np.repeat(np.arange(around.n, dtype=np.int64), 8)},
            name=self.kind,
            task="regression",
            feature_names=tuple(f"a{j}" for j in range(6)),
        )
        return checked(data, constant="keep")
