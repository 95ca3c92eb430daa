"""Gradients of single records: ghost norms against written-down gradients, radii, chunks, the order of clipping."""

import math

import numpy as np
import pytest
import torch
from private_cases import NETWORK, problem

from fedsim.errors import InputError, Unsupported
from fedsim.privacy.clipping import Clip, clipped_sum, factors
from fedsim.problems.dense import DenseRecords, DenseSignals, Layer, LayerSignals, cross_entropy_slope
from fedsim.problems.models.mlp import mlp
from fedsim.problems.module import ModuleProblem
from fedsim.problems.per_record import ModuleRecords
from fedsim.problems.shared_curvature import SharedCurvature

INFINITE = Clip(math.inf)


def explicit(p):
    """Return a module problem's per-record gradients by `vmap(grad)`."""
    return ModuleRecords(p._records_of, p._rows.record_loss, p.tensor_sizes)


def points(p, far):
    generator = torch.Generator().manual_seed(0)
    x = p.initial + 0.1 * torch.randn(p.dim, generator=generator, dtype=torch.float64)
    return x, x + far * torch.randn(p.dim, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("activation", ["softplus", "tanh"])
@pytest.mark.parametrize("far", [1e-1, 1e-6])
def test_ghost_norms_are_those_of_written_down_gradients(activation, far):
    """Norms of gradients and of differences agree to 1e-12 (1e-8 at distance 1e-6, where the written ones cancel)."""
    p = problem({**NETWORK, "activation": activation, "hidden": [9, 7]})
    (x, y), records = points(p, far), np.arange(40)
    ghost, written = p.per_record(), explicit(p)
    assert isinstance(ghost, DenseRecords)
    for a, b in (
        (ghost.at(1, records, x), written.at(1, records, x)),
        (
            ghost.at(1, records, x).minus(ghost.at(1, records, y)),
            written.at(1, records, x).minus(written.at(1, records, y)),
        ),
    ):
        own, other = a.squared_norms().sum(1).sqrt(), b.squared_norms().sum(1).sqrt()
        assert float((own / other - 1).abs().max()) < (1e-12 if far > 1e-3 else 1e-8)
        weights = torch.rand(40, 1, dtype=torch.float64).expand(-1, a.squared_norms().shape[1])
        wide = weights[:, :1].expand(-1, len(p.tensor_sizes))
        assert torch.allclose(a.sum(weights), b.sum(wide), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("far", [1e-1, 1e-6])
def test_no_clipped_term_is_longer_than_its_radius_in_float32(far):
    """Float32 norms of differences are right to 1e-5, and no term that is summed is longer than C (1 + 1e-6)."""
    layers = [Layer(20, 16), Layer(16, 5)]
    generator = torch.Generator().manual_seed(1)
    features, labels = torch.randn(60, 20, generator=generator), torch.randint(0, 5, (60,), generator=generator)
    records = DenseRecords(layers, "softplus", cross_entropy_slope, lambda node, chosen: (features, labels))
    x = 0.3 * torch.randn(sum(layer.size for layer in layers), generator=generator)
    new = records.at(0, np.arange(60), x)
    old = records.at(0, np.arange(60), x + far * torch.randn(len(x), generator=generator))
    d, wide = new.minus(old), in_double(new).minus(in_double(old))
    exact = wide.squared_norms().sum(1).sqrt()
    assert float((d.squared_norms().sum(1).sqrt().double() / exact - 1).abs().max()) < 1e-5
    radius = float(exact.median())
    kept = factors(d.squared_norms(), radius, False, torch.float32)
    terms = torch.stack([wide.sum(kept * (torch.arange(60) == j)[:, None]).norm() for j in range(60)])
    assert radius * (1 - 1e-4) < float(terms.max()) <= radius * (1 + 1e-6)


def test_float32_norms_of_wide_layers_are_not_too_small():
    """200,000 equal inputs: a norm summed in float32 would be 9e-5 too small, nine times the margin of the radii."""
    features = torch.full((2, 200_000), 1 / 3)
    records = DenseRecords(
        [Layer(200_000, 2)], "none", cross_entropy_slope, lambda *_: (features, torch.zeros(2, dtype=torch.int64))
    )
    signals = records.at(0, np.arange(2), torch.zeros(400_002))
    own, exact = signals.squared_norms().sum(1).sqrt(), in_double(signals).squared_norms().sum(1).sqrt()
    assert float((own / exact - 1).abs().max()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("near", [1e-2, 1e-4, 1e-6])
def test_norms_of_cancelling_differences_are_not_too_small(dtype, near):
    """s a' against (s/2)(2a)' with a small change: what is left of two large parts is never taken for shorter."""
    generator = torch.Generator().manual_seed(0)
    a, s = (torch.randn(300, width, generator=generator, dtype=dtype) for width in (8, 5))
    twice = 2 * a * (1 + near * torch.randn(300, 8, generator=generator, dtype=dtype))
    layers, nothing = [Layer(1, 1, False), Layer(8, 5, False)], LayerSignals(*torch.zeros(2, 300, 1, dtype=dtype))
    new, old = (DenseSignals(layers, [nothing, LayerSignals(*part)]) for part in ((twice, s / 2), (a, s)))
    exact = torch.einsum("mi,mj->mij", (s / 2).double(), twice.double()) - torch.einsum(
        "mi,mj->mij", s.double(), a.double()
    )
    length = exact.flatten(1).norm(dim=1)
    norms = new.minus(old).squared_norms().sum(1).sqrt()
    assert float((norms / length).min()) > 1 - 1e-6
    if near == 1e-2:
        assert float((norms / length).max()) < 1 + 1e-3


OVERFLOWING = {"dense": "softplus", "vmap": "relu"}


@pytest.mark.parametrize("activation", OVERFLOWING.values(), ids=OVERFLOWING)
@pytest.mark.parametrize("clip", [Clip(0.5), Clip(0.5, per_layer=True), Clip(0.5, inner=0.1)], ids=str)
def test_a_record_without_a_finite_gradient_counts_as_nothing(activation, clip):
    """Features of 1e25 in float32: the sum is that of the other records; all would see an infinite one."""
    features = np.random.default_rng(0).normal(size=(6, 3))
    features[4] = 1e25
    p = network(features, activation)
    x, y = p.initial + 0.1, p.initial
    others, everybody = np.delete(np.arange(6), 4), np.arange(6)
    for before in (None, y):
        for chunk in (1, 6):
            with_it, without = (
                clipped_sum(p.per_record(), 0, own, np.full(len(own), 0.25), x, clip, before, chunk)
                for own in (everybody, others)
            )
            assert torch.allclose(with_it, without, rtol=1e-6, atol=1e-9)
            assert float(without.norm()) > 1e-3


def network(features, activation):
    from fedsim.problems.data.table import Data

    data = Data(features, np.arange(len(features)) / 10, {}, "made", "regression", (), ("a", "b", "c"))
    return ModuleProblem(
        mlp(3, 1, [4], 0, activation), data, [np.arange(len(features))], "mean_square", dtype="float32"
    )


def test_layers_are_the_same_by_factors_and_written_down():
    """Per layer a weight matrix and its biases are one group, whichever way the gradients are computed."""
    p = problem({**NETWORK, "hidden": [9, 7]})
    (x, y), records, weights = points(p, 0.1), np.arange(20), np.full(20, 0.05)
    written = ModuleRecords(p._records_of, p._rows.record_loss, p._rows.layer_sizes)
    assert p._rows.layer_sizes == [layer.size for layer in p.per_record().layers]
    for before in (None, y):
        one, other = (
            clipped_sum(gradients, 0, records, weights, x, Clip(0.01, per_layer=True), before)
            for gradients in (p.per_record(), written)
        )
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-14)
    odd = problem({"kind": "module", "model": f"{__name__}:Odd", "data": {"kind": "iris"}})
    assert odd.per_record()._sizes == [4 * 4 + 4, 4 * 3 + 3]


def test_single_records_on_another_device_are_refused():
    """Per-record gradients are computed on the CPU; the message says so before anything is run."""
    p = problem(NETWORK)
    p._device = torch.device("cuda")
    with pytest.raises(Unsupported, match="gradients of single records are computed on the CPU"):
        p.per_record()


def in_double(signals):
    return DenseSignals(signals.layers, [LayerSignals(p.a.double(), p.s.double()) for p in signals.parts])


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("per_layer", [False, True])
def test_terms_stay_within_their_radius(before, per_layer):
    """Flat and per layer, gradients and differences: a record's clipped term is at most C long, and reaches C."""
    p = problem(NETWORK)
    x, y = points(p, 0.1)
    radius = 1e-3
    terms = [
        clipped_sum(p.per_record(), 0, np.array([j]), np.ones(1), x, Clip(radius, per_layer), y if before else None)
        for j in range(30)
    ]
    lengths = torch.stack([t.norm() for t in terms])
    assert float(lengths.max()) == pytest.approx(radius, rel=1e-9)


def test_chunks_change_rounding_only():
    """n_p = 1651 in chunks of 1, 7, 200 and all: the same sums to 1e-12, so that no record weighs more than 1/n_p."""
    p = SharedCurvature(1, 1651, 10, 3)
    x, y = (torch.randn(10, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
    weights = np.full(1651, 1 / 1651)
    for clip, before in ((Clip(0.7), None), (Clip(1e-2), y), (Clip(1e-2, inner=0.5), y)):
        sums = [
            clipped_sum(p.per_record(), 0, np.arange(1651), weights, x, clip, before, chunk)
            for chunk in (1, 7, 200, 1651)
        ]
        assert all(float((s - sums[-1]).norm()) <= 1e-12 * float(sums[-1].norm()) for s in sums)


def test_records_are_clipped_one_by_one():
    """Two opposite large gradients and a small one: the mean is the small one's, which clipping the sum would hide."""
    features = np.array([[1e3, 0.0], [-1e3, 0.0], [0.0, 0.1]])
    p = linear(features, np.array([-1.0, -1.0, -1.0]))
    x = torch.zeros(2, dtype=torch.float64)
    got = clipped_sum(p.per_record(), 0, np.arange(3), np.full(3, 1 / 3), x, Clip(1.0))
    assert torch.allclose(got, torch.tensor([0.0, 0.2 / 3], dtype=torch.float64))
    one_large = clipped_sum(p.per_record(), 0, np.array([0, 2]), np.full(2, 0.5), x, Clip(1.0))
    assert torch.allclose(one_large, torch.tensor([0.5, 0.1], dtype=torch.float64))
    moved = torch.tensor([0.0, 1.0], dtype=torch.float64)
    difference = clipped_sum(p.per_record(), 0, np.arange(3), np.full(3, 1 / 3), moved, Clip(1e-3), x)
    assert torch.allclose(difference, torch.tensor([0.0, 1e-3 / 3], dtype=torch.float64))


def linear(features, targets):
    from fedsim.problems.data.table import Data
    from fedsim.problems.least_squares import LeastSquares

    data = Data(features, targets, {}, "made", "regression", (), ("a", "b"))
    return LeastSquares(data, [np.arange(len(targets))])


def test_inner_clipping_never_lengthens_a_difference():
    """Clipping both gradients first keeps every difference within what it was (projection onto a ball)."""
    p = problem(NETWORK)
    x, y = points(p, 0.3)
    for j in range(20):
        one = np.array([j])
        plain = clipped_sum(p.per_record(), 0, one, np.ones(1), x, INFINITE, y).norm()
        inner = clipped_sum(p.per_record(), 0, one, np.ones(1), x, Clip(math.inf, inner=0.2), y).norm()
        assert float(inner) <= float(plain) * (1 + 1e-12)


def test_zero_gradients_stay_zero():
    """A record without a gradient, and two equal points, give 0 and no NaN."""
    p = problem(NETWORK)
    x, _ = points(p, 0.1)
    assert not clipped_sum(p.per_record(), 0, np.arange(9), np.ones(9), x, Clip(0.0), x).any()
    assert float(factors(torch.zeros(1, 1), 0.5, False, torch.float64)[0, 0]) == 1.0


class Odd(torch.nn.Module):
    """No stack of linear layers."""

    def __init__(self, features, outputs):
        super().__init__()
        self.one = torch.nn.Linear(features, 4)
        self.two = torch.nn.Linear(4, outputs)

    def forward(self, a):
        return self.two(torch.tanh(self.one(a)) ** 2)


def test_any_module_has_per_record_gradients_in_chunks_of_bounded_memory():
    """A model of one's own goes by vmap; its mean is the gradient, whatever the chunk."""
    p = problem({"kind": "module", "model": f"{__name__}:Odd", "data": {"kind": "iris"}, "l2": 0.1})
    assert isinstance(p, ModuleProblem)
    gradients = p.per_record()
    assert isinstance(gradients, ModuleRecords)
    x, m = p.initial + 0.1, int(p.records[2])
    means = [clipped_sum(gradients, 2, np.arange(m), np.full(m, 1 / m), x, INFINITE, chunk=c) for c in (4, m)]
    exact = p.gradient(x.expand(2, -1).contiguous(), np.array([2, 2]))[0] - p.regular_gradient(x)
    assert all(torch.allclose(mean, exact, rtol=1e-12, atol=1e-14) for mean in means)


@pytest.mark.parametrize(
    "section",
    [
        {"kind": "logistic", "l2": 0.1, "data": {"kind": "breast_cancer", "normalise": "columns"}},
        {"kind": "multinomial", "l2": 0.1, "data": {"kind": "wine", "normalise": "columns"}},
        {"kind": "ridge", "l2": 0.1, "data": {"kind": "diabetes", "normalise": "columns"}},
        {"kind": "shared_curvature", "records": 100, "dim": 6},
    ],
    ids=lambda s: s["kind"],
)
def test_the_mean_of_records_is_the_gradient(section):
    """Without clipping, the mean over records and the l2 term together are the node's gradient, to 1e-12."""
    p = problem(section, 3)
    x = torch.randn(3, p.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = p.gradient(x, np.arange(3))
    for node in range(3):
        m = int(p.records[node])
        got = clipped_sum(p.per_record(), node, np.arange(m), np.full(m, 1 / m), x[node], INFINITE)
        assert torch.allclose(got + p.regular_gradient(x[node]), exact[node], rtol=1e-11, atol=1e-12)


def test_problems_without_records_are_refused():
    """A quadratic has no records to clip; the message says which problems have."""
    import fedsim

    with pytest.raises(InputError, match="needs gradients of single records, which problem 'quadratic' does not have"):
        fedsim.run(
            topology={"kind": "server", "n": 3},
            problem={"kind": "quadratic"},
            algorithm={"kind": "dp_gd", "eta": 0.1},
            schedule={"horizon": 1},
            folder="nowhere",
        )
    assert issubclass(Unsupported, InputError)


def test_the_papers_network_has_the_papers_start():
    """8-10-1 has 101 parameters, weights and biases uniform on +-1/sqrt(inputs), from the seed alone."""
    model = mlp(8, 1, [10], 3, "softplus", "uniform")
    values = [p.detach() for p in model.parameters()]
    assert sum(v.numel() for v in values) == 101
    assert all(float(v.abs().max()) <= bound for v, bound in zip(values, [8**-0.5] * 2 + [10**-0.5] * 2, strict=True))
    again = [p.detach() for p in mlp(8, 1, [10], 3, "softplus", "uniform").parameters()]
    assert all(torch.equal(a, b) for a, b in zip(values, again, strict=True))
    assert float(values[0].abs().max()) > 0.8 * 8**-0.5
