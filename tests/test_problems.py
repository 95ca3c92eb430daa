"""Objectives: gradients, constants, optima, and laws that blocks of rows must keep."""

from pathlib import Path

import numpy as np
import pytest
import torch

import fedsim
from fedsim.algorithms.algorithm import Sampling
from fedsim.engine.sampling import draw
from fedsim.errors import InputError, RunError, Unsupported
from fedsim.problems.build import build
from fedsim.problems.data.table import Data
from fedsim.problems.least_squares import LeastSquares
from fedsim.problems.logistic import Logistic, Multinomial

N = 7
SPECS = {
    "least_squares": {"kind": "least_squares", "data": {"kind": "dadao_regression"}},
    "ridge": {"kind": "ridge", "l2": 0.1, "data": {"kind": "diabetes", "normalise": "columns"}, "weights": "samples",
              "partition": {"kind": "dirichlet_sizes", "alpha": 0.5}},
    "logistic": {"kind": "logistic", "l2": 0.01, "data": {"kind": "breast_cancer", "normalise": "columns"},
                 "partition": {"kind": "dirichlet", "alpha": 0.3}},
    "nonconvex": {"kind": "nonconvex_logistic", "penalty": 0.1, "partition": {"kind": "sorted"},
                  "data": {"kind": "breast_cancer", "normalise": "columns"}},
    "multinomial": {"kind": "multinomial", "l2": 0.01, "data": {"kind": "iris", "normalise": "columns"},
                    "partition": {"kind": "sorted"}},
    "quadratic": {"kind": "quadratic", "dim": 5, "condition": 30},
    "diagonal": {"kind": "quadratic", "dim": 5, "shape": "diagonal"},
    "consensus": {"kind": "consensus", "dim": 3},
    "module": {"kind": "module", "data": {"kind": "iris", "normalise": "columns"}, "l2": 1e-3, "hidden": [5],
               "partition": {"kind": "dirichlet_sizes", "alpha": 1.0}},
}  # fmt: skip
CONVEX = [name for name in SPECS if name not in ("module", "nonconvex")]


def made(name, **changes):
    return build({**SPECS[name], **changes}, N, 0, Path())


def points(problem, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(N, problem.dim)))


@pytest.mark.parametrize("name", SPECS)
def test_the_gradient_is_the_derivative_of_the_loss(name):
    """Central differences of f_i along a random direction agree with the gradient."""
    problem, nodes = made(name), np.arange(N)
    x, d, step = points(problem), points(problem, 2), 1e-6
    slope = (problem.loss(x + step * d, nodes) - problem.loss(x - step * d, nodes)) / (2 * step)
    exact = (problem.gradient(x, nodes) * d).sum(dim=1)
    assert torch.allclose(slope, exact, rtol=1e-6, atol=1e-6 * float(exact.abs().max()))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("block", [2, 3, 7])
def test_a_rows_gradient_does_not_depend_on_the_rows_beside_it(name, block):
    """Blocks of rows, in any order, give each row the bits it has among all others."""
    problem, x = made(name), points(made(name))
    whole = problem.gradient(x, np.arange(N))
    order = np.random.default_rng(block).permutation(N)
    for begin in range(0, N, block):
        rows = order[begin : begin + block]
        rows = np.repeat(rows, 2)[:2] if len(rows) == 1 else rows
        assert torch.equal(problem.gradient(x[rows].contiguous(), rows), whole[rows])


@pytest.mark.parametrize("name", [n for n in SPECS if n not in ("quadratic", "diagonal", "consensus")])
def test_a_minibatch_of_all_records_is_the_exact_gradient(name):
    """Every record once with weight 1/m gives the exact gradient to rounding; a minibatch is unbiased."""
    problem, node = made(name), np.array([3, 3])
    m = int(problem.records[3])
    from fedsim.problems.problem import Minibatch

    every = Minibatch(np.tile(np.arange(m), (2, 1)), np.full((2, m), 1 / m))
    x = points(problem)[[3, 3]]
    exact = problem.gradient(x, node)
    assert torch.allclose(problem.gradient(x, node, every), exact, rtol=1e-12, atol=1e-12 * float(exact.abs().max()))
    batches = [draw(Sampling(4), np.uint64(0), node, k, problem.records) for k in range(3000)]
    sampled = torch.stack([problem.gradient(x, node, b)[0] for b in batches])
    error = (sampled.mean(dim=0) - exact[0]).norm()
    assert error < 5 * (sampled.var(dim=0).sum() / len(batches)).sqrt()


@pytest.mark.parametrize("name", CONVEX)
def test_constants_bound_the_curvature_and_are_attained(name):
    """The Hessian at 0 lies between mu_i and L_i, and attains L_i where the largest curvature is there."""
    problem, nodes = made(name), np.arange(N)
    x, step = 0 * points(problem), 1e-5
    columns = [
        (problem.gradient(x + step * e, nodes) - problem.gradient(x - step * e, nodes)) / (2 * step)
        for e in torch.eye(problem.dim).double()
    ]
    hessian = torch.stack(columns, dim=1)
    values = torch.linalg.eigvalsh((hessian + hessian.transpose(1, 2)) / 2).numpy()
    assert (values[:, -1] <= problem.L * (1 + 1e-6)).all()
    assert (values[:, 0] >= problem.mu * (1 - 1e-6) - 1e-6).all()
    if name != "multinomial":
        assert np.allclose(values[:, -1], problem.L, rtol=1e-5)


def test_the_bounded_penalty_sets_the_largest_curvature_and_is_not_convex():
    """The Hessian at 0 attains L_i, that of the penalty alone is negative at 1."""
    problem, nodes, step = made("nonconvex"), np.arange(N), 1e-5
    rows = [problem.gradient((step * e).repeat(N, 1), nodes) / step for e in torch.eye(problem.dim).double()]
    at_zero = torch.stack(rows, dim=1) - problem.gradient(0 * points(problem), nodes)[:, None] / step
    largest = torch.linalg.eigvalsh((at_zero + at_zero.transpose(1, 2)) / 2)[:, -1]
    assert np.allclose(largest.numpy(), problem.L, rtol=1e-4)
    without = build({**SPECS["nonconvex"], "penalty": 0.0}, N, 1, Path())
    one = torch.ones(N, problem.dim).double()
    slopes = [problem.gradient(z, nodes) - without.gradient(z, nodes) for z in (one, one + step)]
    assert torch.allclose((slopes[1] - slopes[0]) / step, torch.full_like(one, -0.1 / 2), rtol=1e-4)
    assert problem.mu is None
    assert problem.optimum() is None


@pytest.mark.parametrize("name", CONVEX)
def test_the_optimum_is_a_stationary_point_that_nothing_near_improves(name):
    """The mean gradient at x* vanishes, and random perturbations only raise the objective."""
    problem, nodes = made(name), np.arange(N)
    best = problem.optimum()[None]
    scale = float(problem.gradient(0 * points(problem), nodes).mean(dim=0).norm())
    assert float(problem.gradient(best.repeat(N, 1), nodes).mean(dim=0).norm()) < 1e-12 * max(
        scale, float(problem.L.max())
    )
    value = float(problem.loss(best, nodes).mean())
    for seed in range(20):
        other = best + 1e-3 * points(problem, seed)[:1]
        assert float(problem.loss(other, nodes).mean()) > value


@pytest.mark.parametrize("name", ["least_squares", "ridge", "quadratic", "diagonal", "consensus"])
def test_the_dual_gradient_inverts_the_gradient(name):
    """grad f_i^*(grad f_i(x)) = x."""
    problem, nodes = made(name), np.arange(N)
    x = points(problem)
    assert torch.allclose(problem.dual_gradient(problem.gradient(x, nodes), nodes), x, atol=1e-9)


def test_dual_gradients_are_refused_by_name_where_there_are_none():
    """Logistic regression and rank-deficient least squares say which problems have dual gradients."""
    with pytest.raises(Unsupported, match="'logistic' has no dual gradient"):
        made("logistic").dual_gradient(torch.zeros(N, 30).double(), np.arange(N))
    poor = build({"kind": "least_squares", "data": {"kind": "diabetes"}}, 200, 0, Path())
    with pytest.raises(Unsupported, match="not of full column rank"):
        poor.dual_gradient(torch.zeros(200, 10).double(), np.arange(200))


@pytest.mark.parametrize("kind", ["msda", "continuized"])
@pytest.mark.parametrize("problem", ["module", "logistic", "multinomial"])
def test_methods_of_dual_gradients_say_that_they_miss_them_first(kind, problem):
    """A problem without dual gradients is refused for that, not for an L or mu that would not help."""
    with pytest.raises(InputError, match=f"{kind} needs dual gradients, which problem '{problem}' does not have"):
        fedsim.check(
            {
                "topology": {"kind": "ring", "n": N},
                "problem": SPECS[problem] | {"l2": 0.0},
                "algorithm": {"kind": kind},
                "schedule": {"horizon": 1},
            }
        )


def regression(features, labels, parts=2, **changes):
    data = Data(features, labels, {}, "made", "regression")
    return LeastSquares(data, np.array_split(np.arange(len(labels)), parts), **changes)


@pytest.mark.parametrize("smallest", [1e-3, 1e-6, 1e-10])
def test_mu_keeps_its_digits_where_the_hessian_is_ill_conditioned(smallest):
    """With orthonormal columns scaled by known lengths, L and mu are these squared, down to a condition of 1e20."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 4)))[0]
    lengths = np.array([1.0, smallest, 0.3, 0.1])
    problem = regression(np.tile(basis * lengths, (2, 1)), np.ones(80))
    np.testing.assert_allclose(problem.L, 2 / 40, rtol=1e-14)
    np.testing.assert_allclose(problem.mu, 2 / 40 * smallest**2, rtol=max(1e-13, 1e-15 / smallest))


@pytest.mark.parametrize("kind", ["a product", "a copy", "classes and an intercept"])
def test_records_of_less_than_full_rank_have_no_mu_and_no_optimum(kind):
    """Columns that depend on others, in whatever units, make mu exactly 0 and the minimiser not unique."""
    rng = np.random.default_rng(1)
    features = {
        "a product": rng.normal(size=(60, 3)) @ rng.normal(size=(3, 5)),
        "a copy": rng.normal(size=(60, 4))[:, [0, 1, 2, 3, 0]] * [1e-5, 1.0, 1e4, 1.0, 3e3],
        "classes and an intercept": np.c_[np.eye(4)[rng.integers(0, 4, 60)], np.ones(60)],
    }[kind]
    problem = regression(features, rng.normal(size=60))
    assert (problem.mu == 0).all()
    assert problem.optimum() is None
    with pytest.raises(Unsupported, match=r"not of full column rank \(mu/L = 0\)"):
        problem.dual_gradient(torch.zeros(2, 5).double(), np.arange(2))


def test_the_units_of_columns_do_not_hide_the_optimum():
    """Columns in units from 1e-8 to 1e6 have the minimiser of columns of one size, in their own units."""
    rng = np.random.default_rng(2)
    features, labels, units = rng.normal(size=(50, 4)), rng.normal(size=50), np.array([1e-8, 1.0, 1e6, 10.0])
    best = regression(features, labels).optimum()
    scaled = regression(features * units, labels).optimum()
    np.testing.assert_allclose(scaled.numpy() * units, best.numpy(), rtol=1e-12)


def test_a_logistic_optimum_is_right_where_the_objective_is_flat():
    """With one-hot columns and an intercept, x* lies in their span: the intercept is the sum of the others, to 1e-13.

    Rounding of an ordinary gradient moves it out of the span by 1e-16 / l2.
    """
    rng = np.random.default_rng(3)
    features = np.c_[rng.normal(size=(200, 2)), np.eye(3)[rng.integers(0, 3, 200)], np.ones(200)]
    data = Data(features, rng.integers(0, 2, 200), {}, "made", "binary", ("0", "1"))
    parts = np.array_split(np.arange(200), 3)
    best = Logistic(data, parts, 1e-6).optimum()
    assert float(best[2:5].sum() - best[5]) == pytest.approx(0, abs=1e-13 * float(best.norm()))
    several = Multinomial(data, parts, 1e-6).optimum().reshape(2, -1)
    assert float(several.sum(dim=0).abs().max()) == pytest.approx(0, abs=1e-13 * float(several.norm()))


def test_quadratics_in_one_dimension_differ_between_nodes():
    """With dim 1 the condition number is that of the nodes' curvatures: L/mu is what was asked for."""
    problem = build({"kind": "quadratic", "dim": 1, "condition": 50}, N, 0, Path())
    assert problem.mu.min() == pytest.approx(1)
    assert problem.L.max() == pytest.approx(50)


def test_given_quadratics_may_be_full():
    """`curvatures [n][dim][dim]` are the A_i themselves."""
    a, b = [[2.0, 1.0], [1.0, 2.0]], [[1.0, 0.0], [0.0, 3.0]]
    problem = build({"kind": "quadratic", "curvatures": [a, a], "centres": b}, 2, 0, Path())
    np.testing.assert_allclose(problem.L, 3)
    np.testing.assert_allclose(problem.mu, 1)
    np.testing.assert_allclose(problem.optimum(), [0.5, 1.5])


def test_weights_by_samples_pool_the_records():
    """With `weights: samples` the objective is the plain mean over all records, however they are split."""
    spec = {**SPECS["ridge"], "weights": "samples"}
    pooled = build(spec, N, 0, Path())
    whole = build({**spec, "partition": {"kind": "iid"}}, 1, 0, Path())
    x = points(pooled)[:1]
    assert np.isclose(float(pooled.loss(x, np.arange(N)).mean()), float(whole.loss(x, np.arange(1)).mean()), rtol=1e-12)
    assert torch.allclose(pooled.optimum(), whole.optimum(), rtol=1e-9)


@pytest.mark.parametrize("name", ["ridge", "logistic", "nonconvex", "multinomial"])
def test_held_out_records_are_judged_as_if_a_node_had_them(name):
    """Test loss is the loss, without penalties, of a node that owns the held-out records; accuracy that of argmax."""
    problem = made(name, data={**SPECS[name]["data"], "held_out": 0.3})
    other, x = problem.data.held_out, points(problem)
    owner = {"ridge": LeastSquares, "logistic": Logistic, "nonconvex": Logistic, "multinomial": Multinomial}[name]
    losses = torch.cat([owner(other, [np.arange(len(other))]).loss(row[None], np.zeros(1, int)) for row in x])
    own = {key: metric(x) for key, metric in problem.local_metrics().items()}
    assert torch.allclose(own["node_test_loss"], losses, rtol=1e-12)
    assert problem.metrics()["test_loss"](x[:1]) == pytest.approx(float(losses[0]), rel=1e-12)
    assert ("test_accuracy" in problem.metrics()) == ("node_test_accuracy" in own) == (name != "ridge")
    if name != "ridge":
        rows = x.numpy().reshape(N, -1, other.features.shape[1])
        logits = other.features @ (np.stack([0 * rows[:, 0], rows[:, 0]], 1) if rows.shape[1] == 1 else rows).mT
        right = (logits.argmax(axis=2) == other.labels).mean(axis=1)
        assert own["node_test_accuracy"].numpy() == pytest.approx(right)
        assert problem.metrics()["test_accuracy"](x[:1]) == pytest.approx(right[0])
    assert not made(name).local_metrics()


def test_without_l2_a_logistic_optimum_is_not_claimed():
    """mu = 0: no optimum, so no `distance` is reported."""
    problem = made("logistic", l2=0.0)
    assert problem.optimum() is None
    assert (problem.mu == 0).all()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "logistic", "data": {"kind": "diabetes"}}, "is a regression task; two classes are needed"),
        ({"kind": "ridge", "l2": 1, "data": {"kind": "iris"}}, "has classes; numbers are needed"),
        ({"kind": "multinomial", "data": {"kind": "diabetes"}}, "classes are needed"),
        ({"kind": "logistic"}, "problem.data: missing"),
        ({"kind": "quadratic", "data": {"kind": "iris"}}, "leave data out"),
        ({"kind": "consensus", "values": [[1.0]]}, r"shape \(1, 1\) given, \[7\]\[dim\] needed"),
        ({"kind": "quadratic", "centres": [[0.0]] * 7, "curvatures": [-1.0] * 7}, "eigenvalue -1; > 0 needed"),
        ({"kind": "quadratic", "centres": [[0.0]] * 6 + [[1.0, 2.0]]}, "centres: its lists differ in length"),
        ({"kind": "quadratic", "centres": [[]] * 7}, r"centres: shape \(7, 0\) given"),
        ({"kind": "quadratic", "centres": [[0.0]] * 6 + [[np.nan]]}, "finite number"),
        ({"kind": "consensus", "values": [[np.inf]] * 7}, "finite number"),
        ({"kind": "quadratic", "seed": -1}, "problem.seed: .*greater than or equal to 0"),
        (
            {"kind": "quadratic", "centres": [[0.0, 0.0]] * 7, "curvatures": [[[1.0, 0.0], [0.5, 1.0]]] * 7},
            "node 0's curvature is not symmetric",
        ),
    ],
)
def test_problems_that_mean_nothing_are_refused(spec, message):
    """Each refusal says what was given and what is needed."""
    with pytest.raises(InputError, match=message):
        build(spec, N, 0, Path())


@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_a_model_in_single_precision_is_refused_in_words(what):
    """Problems that compute in float64 say so, and what to do; the compiler is not asked."""
    problem = made("ridge")
    with pytest.raises(RunError, match=r"'ridge' computes in float64, and was given points of torch\.float32"):
        getattr(problem, what)(points(problem).float(), np.arange(N))


def test_building_a_module_leaves_global_randomness_alone():
    """Models are initialised from their own seed; torch's global generator is neither used nor moved."""
    before = torch.random.get_rng_state()
    first, again, other = made("module"), made("module"), made("module", seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.initial, again.initial)
    assert not torch.equal(first.initial, other.initial)
