"""Training a small network on label-split digits agrees with the runs of the published code."""

import numpy as np
import pytest
import torch

from fedsim.algorithms.algorithm import Sampling
from fedsim.algorithms.cdproxsgt import CDProxSGT, ChocoSGD
from fedsim.algorithms.dproxsgt import DProxSGT
from fedsim.algorithms.sgd import DPSGD, AllReduceSGD, Deepstorm
from fedsim.engine.layout import Layout
from fedsim.engine.rounds import Rounds
from fedsim.problems.composite import L1
from fedsim.problems.data.table import Data
from fedsim.problems.logistic import Multinomial
from fedsim.problems.module import ModuleProblem
from fedsim.problems.regularised import Regularised
from fedsim.setting import RunSetting
from fedsim.topology.build import build
from fedsim.topology.mixing import mixing_matrix

EPOCH, EPOCHS, SEEDS = 30, 20, range(5)
HOW = {"eta": 0.05, "batch": Sampling(8, "epoch"), "clip": 10.0}
TOP = {"kind": "top_k", "ratio": 0.3, "scope": "tensor"}
# Name: method, whether with l1 1e-4, and of the published code's one run after 20 epochs: mean test accuracy of the
# nodes' models in per cent, sum_i ||x_i - xbar||^2, training loss at xbar.
RUNS = {
    "all-reduce, l1": (AllReduceSGD(order="prox_first", **HOW), True, 95.82, 0.0, 0.1072),
    "DProxSGT (B), l1": (DProxSGT(tracker="pre_mix", **HOW), True, 95.60, 6.53e-3, 0.1078),
    "DEEPSTORM, l1": (Deepstorm(beta=0.8, first=25, **HOW), True, 95.54, 2.89e-3, 0.1104),
    "all-reduce": (AllReduceSGD(**HOW), False, 95.82, 0.0, 0.1041),
    "DProxSGT (A)": (DProxSGT(**HOW), False, 96.04, 1.00918e-3, 0.1036),
    "CDProxSGT, identity": (CDProxSGT(compress="identity", gamma_x=1, gamma_y=1, **HOW), False, 96.04, 1.0e-3, 0.1036),
    "CDProxSGT, top 30 %": (CDProxSGT(compress=TOP, **HOW), False, 95.71, 9.92e-3, 0.1043),
    "CDProxSGT, QSGD 256": (CDProxSGT(compress={"kind": "qsgd", "levels": 256}, **HOW), False, 95.37, 2.38e-3, 0.1086),
    "CHOCO, top 30 %": (ChocoSGD(compress=TOP, **HOW), False, 91.14, 4.88e-2, 0.1934),
    "D-PSGD": (DPSGD(**HOW), False, 95.21, 1.15e-2, 0.1200),
}


class Digits:
    """1200 digits for training, 359 held out; node i has classes i and 9 - i; models as torch draws them."""

    def __init__(self):
        from sklearn.datasets import load_digits

        raw = load_digits()
        self.features, self.labels = (raw.data / 16 - 0.1307) / 0.3081, raw.target
        self.held_out = np.arange(len(raw.target)) % 5 == 4
        by_class = [np.flatnonzero((self.labels == c) & ~self.held_out)[:120] for c in range(10)]
        self.train = np.concatenate(by_class)
        parts = [np.sort(np.concatenate([by_class[i], by_class[9 - i]])) for i in range(5)]
        names = tuple(map(str, range(10)))
        data = Data(self.features, self.labels.astype(np.int64), {}, "digits", "multiclass", names)
        self.smooth = ModuleProblem(network(), data, parts, "cross_entropy", 0.0, "uniform")
        self.problem = {True: Regularised(self.smooth, L1(1e-4)), False: self.smooth}

    def starts(self, seed):
        """Return an independent start of each node, `[5, 2410]`, as the published code has them."""
        drawn = []
        with torch.random.fork_rng():
            for node in range(5):
                torch.manual_seed(100 * seed + node)
                drawn.append(torch.cat([p.detach().reshape(-1) for p in network().parameters()]).double())
        return torch.stack(drawn)

    def logits(self, x, which):
        """Return the outputs of a model, in plain NumPy."""
        w1, b1, w2, b2 = np.split(x, [2048, 2080, 2400])
        hidden = np.maximum(self.features[which] @ w1.reshape(32, 64).T + b1, 0)
        return hidden @ w2.reshape(10, 32).T + b2

    def measures(self, x):
        """Return mean test accuracy in per cent, raw consensus, training loss at the mean of models `[5, dim]`."""
        right = [(self.logits(one, self.held_out).argmax(1) == self.labels[self.held_out]).mean() for one in x]
        z = self.logits(x.mean(axis=0), self.train)
        loss = np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), self.labels[self.train]]
        return 100 * np.mean(right), ((x - x.mean(axis=0)) ** 2).sum(), loss.mean()


def network():
    return torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))


@pytest.fixture(scope="module")
def digits():
    return Digits()


def trained(digits, algorithm, sparse, seed):
    """Return the models after 20 epochs, `[5, dim]`."""
    problem, graph = digits.problem[sparse], build("ring:5")
    W, layout = mixing_matrix(graph), Layout(graph)
    algorithm = algorithm.resolve(RunSetting(problem, graph, None, None, W))
    player = Rounds(algorithm, problem, layout, {"W": W}, digits.starts(seed)[layout.nodes], seed)
    player.start()
    player.advance(EPOCH * EPOCHS)
    return player.outputs().numpy()


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_training_agrees_with_the_published_code(digits, name):
    """Five seeds of our own lie around its one run: accuracy, distance between nodes, loss of the average.

    Its losses are 7 to 19 per cent above the medians of ours, all-reduce's, where nothing but data, start and batches
    can differ, 13 and 15 per cent; ours are 7 to 16 per cent below, and are held to 20.
    """
    algorithm, sparse, accuracy, consensus, loss = RUNS[name]
    found = np.array([digits.measures(trained(digits, algorithm, sparse, seed)) for seed in SEEDS])
    spread = np.ptp(found[:, 0])
    assert abs(np.median(found[:, 0]) - accuracy) <= max(0.75, spread)
    if consensus:
        assert found[:, 1].min() / 1.5 <= consensus <= 1.5 * found[:, 1].max()
    else:
        assert found[:, 1].max() < 1e-20
    assert 0.8 * loss <= np.median(found[:, 2]) <= loss


@pytest.fixture(scope="module")
def softmax():
    """Softmax regression with l1: node i has 170 digits of class i and 170 of class 9 - i; dim 650."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    first = [np.flatnonzero(raw.target == c)[:170] for c in range(10)]
    features = np.concatenate([raw.data / 16, np.ones((len(raw.target), 1))], axis=1)
    data = Data(features, raw.target.astype(np.int64), {}, "digits", "multiclass", tuple(map(str, range(10))))
    smooth = Multinomial(data, [np.concatenate([first[i], first[9 - i]]) for i in range(5)])
    return Regularised(smooth, L1(1e-3))


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "agree"), [(DProxSGT(eta=0.5), True), (DPSGD(eta=0.5), False)])
def test_tracking_agrees_where_averaging_does_not(softmax, algorithm, agree):
    """After 2000 rounds on label-split softmax regression, tracked nodes agree to 1e-9, averaging ones do not."""
    graph = build("ring:5")
    W, layout = mixing_matrix(graph), Layout(graph)
    algorithm = algorithm.resolve(RunSetting(softmax, graph, None, None, W))
    player = Rounds(algorithm, softmax, layout, {"W": W}, torch.zeros(5, 650, dtype=torch.float64), 0)
    player.start()
    player.advance(2000)
    x = player.outputs().numpy()
    consensus = ((x - x.mean(axis=0)) ** 2).sum()
    assert consensus < 1e-9 if agree else consensus > 1e-2
