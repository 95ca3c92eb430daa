"""Any module as n objectives: the shipped models, what is played together and what alone, metrics of every node."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import functional_call

import fedsim
from fedsim.algorithms.algorithm import Sampling
from fedsim.check import check
from fedsim.engine.sampling import draw
from fedsim.errors import InputError
from fedsim.prepare import Live, prepare
from fedsim.problems.build import build
from fedsim.problems.data.table import Data
from fedsim.problems.models.lenet5 import LeNet5
from fedsim.problems.models.residual_cnn import ResidualCNN
from fedsim.problems.models.transformer import Transformer
from fedsim.problems.module import ModuleProblem
from fedsim.problems.problem import Minibatch
from fedsim.scenario import load_study

N = 5


def images(side, count=60, held_out=20):
    """Return grey images of three classes that differ by a stripe."""
    rng = np.random.default_rng(0)

    def table(many, rest):
        labels = np.arange(many) % 3
        pixels = 0.3 * rng.normal(size=(many, side, side))
        pixels[np.arange(many), labels] += 1.0
        return Data(pixels.reshape(many, -1), labels, {}, "stripes", "multiclass", ("a", "b", "c"), (), rest)

    return table(count, table(held_out, None))


def parts(count=60):
    return list(np.array_split(np.arange(count), N))


def image_problem(model, side):
    return ModuleProblem(model, images(side), parts(), "cross_entropy")


def text_problem():
    spec = {"kind": "module", "model": "transformer", "partition": {"kind": "iid"}, "arguments": {"width": 8},
            "data": {"kind": "python_docs", "sequence": 6, "held_out": 0.999}}  # fmt: skip
    return build(spec, N, 0, Path())


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


PROBLEMS = {
    "lenet5": lambda: image_problem(seeded(lambda: LeNet5(256, 3)), 16),
    "residual_cnn": lambda: image_problem(seeded(lambda: ResidualCNN(64, 3, (3, 4))), 8),
    "transformer": text_problem,
}


@pytest.fixture(scope="module", params=PROBLEMS)
def problem(request):
    return PROBLEMS[request.param]()


def points(problem):
    noise = torch.from_numpy(np.random.default_rng(1).normal(size=(N, problem.dim)))
    return problem.start(np.arange(N)) + 0.02 * noise


def by_autograd(problem, x, node):
    """Return the gradient of one node's loss, by ordinary autograd on the module itself."""
    leaves = {n: p.detach().clone() for n, p in problem._model.named_parameters()}
    for (name, old), new in zip(list(leaves.items()), x.split([p.numel() for p in leaves.values()]), strict=True):
        leaves[name] = new.reshape(old.shape).clone().requires_grad_()
    a, b = problem._tensors(problem.data)
    own = torch.from_numpy(np.sort(problem.parts[node]))
    output = functional_call(problem._model, leaves, (a[own],))
    torch.nn.functional.cross_entropy(output.flatten(0, -2), b[own].flatten()).backward()
    return torch.cat([leaf.grad.reshape(-1) for leaf in leaves.values()])


def test_gradients_are_those_of_ordinary_autograd(problem):
    """Rows together or alone, a node's gradient is what a loop over nodes with autograd gives."""
    x = points(problem)
    g = problem.gradient(x, np.arange(N))
    for node in range(N):
        assert torch.allclose(g[node], by_autograd(problem, x[node], node), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("block", [1, 2, 3])
def test_a_row_does_not_depend_on_the_rows_beside_it(problem, block):
    """Gradients on minibatches and losses have the same bits in blocks of any size (one: as two, where together)."""
    x, nodes = points(problem), np.arange(N)
    batch = draw(Sampling(3), np.uint64(0), nodes, 0, problem.records)
    whole, losses = problem.gradient(x, nodes, batch), problem.loss(x, nodes)
    for begin in range(0, N, block):
        own = nodes[begin : begin + block]
        own = own if problem.rows_alone or len(own) > 1 else np.repeat(own, 2)
        part = Minibatch(batch.indices[own], batch.weights[own])
        assert torch.equal(problem.gradient(x[own], own, part), whole[own])
        assert torch.equal(problem.loss(x[own], own), losses[own])


def test_lenet5_has_the_parameters_of_the_experiments():
    """28 x 28 grey images, ten classes: 44,426 in ten tensors; 16 x 16 coloured ones fit, smaller or oblong do not."""
    sizes = [p.numel() for p in LeNet5(784, 10).parameters()]
    assert (sum(sizes), len(sizes)) == (44_426, 10)
    assert LeNet5(3 * 16 * 16, 4)(torch.zeros(2, 768)).shape == (2, 4)
    with pytest.raises(InputError, match="16 x 16 pixels at least; these have 8 x 8"):
        LeNet5(64, 10)
    with pytest.raises(InputError, match="square images, and 30 features"):
        LeNet5(30, 2)


def test_the_residual_network_starts_at_chance_and_has_no_buffers():
    """Its last layer starts at 0, so every class has the same score; nothing in it is averaged over a batch."""
    model = ResidualCNN(64, 10)
    assert torch.equal(model(torch.ones(3, 64)), torch.zeros(3, 10))
    assert not list(model.buffers())
    with pytest.raises(InputError, match="widths that do not shrink"):
        ResidualCNN(64, 10, (16, 8))


def test_the_transformer_does_not_see_what_comes():
    """The scores at a place do not change with the characters after it; heads divide the width."""
    model = seeded(lambda: Transformer(6, 11, width=8))
    text = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 9, 9]])
    scores = model(text)
    assert torch.equal(scores[0, :3], scores[1, :3])
    assert not torch.equal(scores[0, 3:], scores[1, 3:])
    with pytest.raises(InputError, match="3 heads do not divide"):
        Transformer(6, 11, width=8, heads=3)


class Normed(torch.nn.Sequential):
    """A model of one's own with batch norm."""

    def __init__(self, features, outputs):
        super().__init__(torch.nn.Linear(features, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, outputs))


class Dropping(torch.nn.Sequential):
    """A model of one's own that draws random numbers."""

    def __init__(self, features, outputs):
        super().__init__(torch.nn.Linear(features, 4), torch.nn.Dropout(), torch.nn.Linear(4, outputs))


class ThisBatch(torch.nn.Sequential):
    """A model of one's own that normalises by the records of a call, without buffers."""

    def __init__(self, features, outputs):
        norm = torch.nn.BatchNorm1d(4, track_running_stats=False)
        super().__init__(torch.nn.Linear(features, 4), norm, torch.nn.Linear(4, outputs))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Normed, r"changes its buffers \(1.running_mean, .*use group or layer norm"),
        (Dropping, "draws random numbers"),
        (ThisBatch, "taken together have the losses .*a node's objective is a mean over records"),
    ],
)
def test_models_that_nodes_cannot_own_are_refused(model, message):
    """Batch norm's averages and dropout's draws follow no node, and losses of a batch are no sum over records."""
    with pytest.raises(InputError, match=message):
        image_problem(model(64, 3), 8)


class Shared(torch.nn.Module):
    """One layer under two names, one weight in two layers, and an activation that is played row by row."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(64, 5), torch.nn.Linear(5, 3)
        self.second = torch.nn.Linear(5, 5)
        self.again, self.tied = self.second, torch.nn.Linear(5, 5)
        self.tied.weight = self.second.weight

    def forward(self, x):
        """Return the scores."""
        return self.last(self.tied(self.again(torch.sigmoid(self.second(self.first(x))))))


class Constant(torch.nn.Module):
    """A mask in a buffer and a first layer that is not trained."""

    def __init__(self):
        super().__init__()
        self.fixed, self.last = torch.nn.Linear(64, 6), torch.nn.Linear(6, 3)
        self.fixed.weight.requires_grad_(False)
        self.register_buffer("mask", (torch.arange(64) % 2).float())

    def forward(self, x):
        """Return the scores."""
        return self.last(torch.tanh(self.fixed(x * self.mask)))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("model", [Shared, Constant])
def test_shared_and_untrained_parameters_have_the_gradients_of_autograd(model, dtype):
    """What is used twice has one gradient, the sum; what is not trained has none; rows do not see each other."""
    made = seeded(model)
    problem = ModuleProblem(made, images(8), parts(), "cross_entropy", dtype=dtype)
    trained = [p for p in made.parameters() if p.requires_grad]
    assert problem.tensor_sizes == [p.numel() for p in trained]
    nodes = np.arange(N)
    x = problem.start(nodes) + 0.1 * torch.from_numpy(np.random.default_rng(1).normal(size=(N, problem.dim)))
    x = x.to(problem.dtype)
    g = problem.gradient(x, nodes)
    for row in range(N):
        for p, part in zip(trained, x[row].split(problem.tensor_sizes), strict=True):
            p.data = part.reshape(p.shape).double()
        own, features = np.sort(problem.parts[row]), torch.from_numpy(problem.data.features)
        labels = torch.from_numpy(problem.data.labels[own])
        loss = torch.nn.functional.cross_entropy(made.double()(features[own]), labels)
        exact = torch.cat([slope.reshape(-1) for slope in torch.autograd.grad(loss, trained)])
        assert float((g[row] - exact).abs().max()) < (1e-12 if dtype == "float64" else 1e-6)
        pair = nodes[[row]] if problem.rows_alone else nodes[[row, row]]
        assert torch.equal(problem.gradient(x[pair], pair)[0], g[row])


@pytest.mark.parametrize("kind", ["lenet5", "transformer"])
def test_an_empty_batch_has_no_gradient(kind):
    """A node whose Poisson batch drew nobody gets 0, not what stood in memory, whether rows are played alone or not."""
    problem = PROBLEMS[kind]()
    indices, weights = np.zeros((N, 3), np.int64), np.full((N, 3), 1 / 3)
    weights[2] = 0.0
    x = problem.start(np.arange(N)) + 0.1
    torch.full_like(x, 7.0)  # memory that a gradient may be given next
    g = problem.gradient(x, np.arange(N), Minibatch(indices, weights))
    assert not g[2].any()
    assert all(g[i].any() for i in (0, 1, 3, 4))


def test_convolutions_are_played_alone_and_the_transformer_together():
    """Which way is a property of the module, and `facts` says it."""
    assert PROBLEMS["lenet5"]().rows_alone
    assert not text_problem().rows_alone


def final_models(scenario, problem):
    """Return the models `[n, dim]` at the end of a scenario, by node number."""
    live = Live(problem=problem)
    prepared = prepare(load_study(scenario, live=live).runs[0], live)
    player = prepared.player()
    player.start()
    player.advance(scenario["schedule"]["horizon"])
    x = np.empty((problem.n, problem.dim))
    x[prepared.layout.nodes] = player.outputs().numpy()
    return x


def test_accuracy_is_of_the_average_and_of_every_node(tmp_path):
    """`test_accuracy` is the mean model's, `node_test_accuracy` the nodes' mean and, with a number, one node's."""
    problem = image_problem(torch.nn.Linear(64, 3), 8)
    names = ["test_loss", "test_accuracy", "node_test_loss", "node_test_accuracy"]
    scenario = {
        "topology": {"kind": "ring", "n": N},
        "algorithm": {"kind": "dpsgd", "eta": 0.1, "batch": {"size": 2}},
        "schedule": {"horizon": 5},
        "record": {"every": 5, "metrics": [*names, *(f"node_test_accuracy.{node}" for node in range(N))]},
    }
    result = fedsim.run(scenario, problem=problem, folder=tmp_path / "out")
    last, x = result.metrics.iloc[-1], final_models(scenario, problem)
    held_out = problem.data.held_out
    assert held_out is not None

    def measured(row):
        z = held_out.features @ row[:192].reshape(3, 64).T + row[192:]
        loss = np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), held_out.labels]
        return loss.mean(), (z.argmax(axis=1) == held_out.labels).mean()

    each = np.array([measured(row) for row in x])
    assert [last["test_loss"], last["test_accuracy"]] == pytest.approx(measured(x.mean(axis=0)))
    assert [last["node_test_loss"], last["node_test_accuracy"]] == pytest.approx(each.mean(axis=0))
    assert [last[f"node_test_accuracy.{node}"] for node in range(N)] == pytest.approx(each[:, 1])


@pytest.mark.parametrize(
    ("algorithm", "per_node"),
    [
        ({"kind": "dproxsgt"}, 710_816),
        ({"kind": "cdproxsgt", "compress": {"kind": "top_k", "ratio": 0.3, "scope": "tensor"}}, 235_432),
        ({"kind": "choco_sgd", "compress": {"kind": "top_k", "ratio": 0.3, "scope": "tensor"}}, 117_716),
    ],
)
def test_the_bytes_of_lenet5_are_those_of_the_codec(tmp_path, algorithm, per_node):
    """A ring's node sends 2 neighbours 2 messages of 44,426 float32; the largest 30 % of each tensor, by bitmap."""
    rng = np.random.default_rng(0)
    data = Data(rng.normal(size=(10, 784)), np.arange(10), {}, "noise", "multiclass", tuple("0123456789"))
    made = seeded(lambda: LeNet5(784, 10))
    problem = ModuleProblem(made, data, list(np.arange(10).reshape(N, 2)), "cross_entropy", dtype="float32")
    scenario = {
        "topology": {"kind": "ring", "n": N},
        "algorithm": {**algorithm, "eta": 0.05, "batch": {"size": 1}},
        "start": {"kind": "problem"},
        "schedule": {"horizon": 2},
    }
    result = fedsim.run(scenario, problem=problem, folder=tmp_path / "out")
    assert result.metrics["bytes"].iloc[-1] == 2 * N * per_node


@pytest.mark.parametrize(
    ("start", "told"), [({"kind": "zeros"}, True), ({"kind": "problem"}, False), ({}, False), (None, False)]
)
@pytest.mark.parametrize("composite", [None, {"kind": "l1", "weight": 1e-4}])
def test_a_network_that_starts_at_zero_is_told_of(start, told, composite):
    """Zeros are a saddle of every network with hidden layers: `check` says so, and they are not the default start."""
    scenario = {
        "topology": {"kind": "ring", "n": N},
        "problem": {"kind": "module", "data": {"kind": "iris"}, **({"composite": composite} if composite else {})},
        **({} if start is None else {"start": start}),
        "algorithm": {"kind": "dproxsgt", "eta": 0.1},
        "schedule": {"horizon": 1},
    }
    (found,) = check(scenario)
    assert any("hidden layers do not leave" in note for note in found["warnings"]) == told


@pytest.mark.parametrize("live", [True, False])
def test_a_network_starts_from_its_own_first_weights_on_every_node(live):
    """Without a `start` section all nodes begin at the model's own parameters, given as an object or by kind."""
    given = {"kind": "module", "hidden": [4], "data": {"kind": "iris"}, "composite": {"kind": "l1", "weight": 0.1}}
    problem = build(given, N, 0, Path())
    scenario = {
        "topology": {"kind": "ring", "n": N},
        **({} if live else {"problem": given}),
        "algorithm": {"kind": "dproxsgt", "eta": 0.1},
        "schedule": {"horizon": 1},
    }
    objects = Live(problem=problem) if live else Live()
    prepared = prepare(load_study(scenario, live=objects).runs[0], objects)
    assert prepared.setting.common_start
    player = prepared.player()
    player.start()
    own = problem.start(np.arange(N))
    assert own is not None
    assert own.any()
    assert torch.equal(player.outputs(), own)
