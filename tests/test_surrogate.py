"""Surrogates: closed forms against automatic differentiation, brute force and GPyTorch; kernels and features."""

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch

from fedsim.engine.machine import prepare
from fedsim.surrogate.features import Features, features
from fedsim.surrogate.history import History
from fedsim.surrogate.kernels import Kernel, squared_distances
from fedsim.surrogate.length_scale import STEPS, best, grid, likelihoods
from fedsim.surrogate.posterior import Posterior

prepare()
KERNELS = ["se", "matern52"]


def cloud(n, d, width=1.0, seed=0):
    """Return points `[n, d]` uniform within `width` of 0.5, and a point."""
    rng = np.random.default_rng(seed)
    points = 0.5 + width * (2 * rng.random((n, d)) - 1)
    return torch.from_numpy(points), torch.from_numpy(0.5 + 0.3 * width * (2 * rng.random(d) - 1))


def history(points, values, window=None, noise=1e-6, level=0.0, kernel=None):
    """Return a client's history with a fixed kernel."""
    made = History(points.clone(), values.clone(), len(values), window, noise, level)
    made.kernel = kernel or Kernel("se", 1.0)
    return made


def mean_at(x, points, values, kernel, noise):
    """Return the posterior mean at x, plainly, for automatic differentiation."""
    squared = ((points[:, None] - points[None]) ** 2).sum(2)
    alpha = torch.linalg.solve(
        kernel.value(squared.clone()) + noise * torch.eye(len(points), dtype=torch.float64), values
    )
    r2 = ((x - points) ** 2).sum(1)
    if kernel.name == "se":
        return torch.exp(-r2 / (2 * kernel.scale**2)) @ alpha
    u = math.sqrt(5) * r2.sqrt() / kernel.scale
    return ((1 + u + u**2 / 3) * torch.exp(-u)) @ alpha


@pytest.mark.parametrize("name", KERNELS)
def test_the_gradient_is_that_of_the_posterior_mean(name):
    """The closed form equals automatic differentiation and central differences of the mean, output scaling included."""
    points, x = cloud(30, 4)
    values = 7.0 * torch.sin(3 * points).sum(1) - 20.0
    kernel = Kernel(name, 0.8)
    got = history(points, values, kernel=kernel, noise=1e-4).gradient(x)
    low, spread = values.min(), values.max() - values.min()
    at = x.clone().requires_grad_()
    mean = lambda z: spread * mean_at(z, points, (values - low) / spread, kernel, 1e-4)
    expected = torch.autograd.grad(mean(at), at)[0]
    assert (got - expected).norm() < 1e-10 * expected.norm()
    h = 1e-5
    central = [(mean(x + h * e) - mean(x - h * e)) / (2 * h) for e in torch.eye(4, dtype=torch.float64)]
    assert (got - torch.stack(central)).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("name", KERNELS)
def test_gpytorch_has_the_same_gradient(name):
    """GPyTorch's exact posterior, differentiated by autograd, agrees."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import gpytorch

        points, x = cloud(25, 6, seed=3)
        values = torch.cos(2 * points).sum(1)
        base = gpytorch.kernels.RBFKernel() if name == "se" else gpytorch.kernels.MaternKernel(nu=2.5)

        class Model(gpytorch.models.ExactGP):
            def forward(self, z):
                return gpytorch.distributions.MultivariateNormal(self.mean(z), base(z))

        likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
        likelihood.noise = torch.tensor(1e-3, dtype=torch.float64)
        low, spread = values.min(), values.max() - values.min()
        model = Model(points, (values - low) / spread, likelihood)
        model.mean = gpytorch.means.ZeroMean()
        model.double().eval()
        base.double()
        base.lengthscale = torch.tensor(1.3, dtype=torch.float64)
        at = x.clone().requires_grad_()
        with gpytorch.settings.fast_computations(False, False, False):
            expected = torch.autograd.grad(model(at[None]).mean.sum() * spread, at)[0]
    got = history(points, values, noise=1e-3, kernel=Kernel(name, 1.3)).gradient(x)
    assert (got - expected).norm() < 1e-8 * expected.norm()


@pytest.mark.parametrize("name", KERNELS)
def test_the_trace_is_that_of_the_covariance(name):
    """The O(m n d) formula equals the d x d covariance's trace; its eigenvalues lie in [0, kappa], kappa if n < d."""
    points, x = cloud(9, 12)
    kernel = Kernel(name, 0.9)
    posterior = Posterior(kernel, 1e-4)
    posterior.condition(points, x)
    candidates = x + 0.1 * torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).double()
    got = posterior.trace(candidates - x)
    a = kernel.value(squared_distances(points - x, points - x)) + 1e-4 * torch.eye(9, dtype=torch.float64)
    for place, c in enumerate(candidates):
        j = -kernel.slope(((c - points) ** 2).sum(1))[:, None] * (c - points)
        covariance = kernel.curvature * torch.eye(12, dtype=torch.float64) - j.T @ torch.linalg.solve(a, j)
        assert abs(got[place] - covariance.trace()) < 1e-10 * kernel.curvature * 12
        values = torch.linalg.eigvalsh(covariance)
        assert values.min() > -1e-10
        assert abs(values.max() - kernel.curvature) < 1e-12 * kernel.curvature * 12


def test_a_further_point_never_raises_the_uncertainty_and_none_leaves_all():
    """Traces fall as points come in; without any the trace is kappa dim."""
    points, x = cloud(20, 3)
    kernel = Kernel("se", 0.7)
    traces = [kernel.curvature * 3]
    for n in range(1, 21):
        posterior = Posterior(kernel, 1e-3)
        posterior.condition(points[:n], x)
        traces.append(float(posterior.trace(torch.zeros(1, 3).double())[0]))
    assert all(b <= a + 1e-10 for a, b in pairwise(traces))
    empty = Posterior(kernel, 1e-3)
    empty.condition(points[:0], x)
    assert float(empty.trace(torch.zeros(1, 3).double())[0]) == kernel.curvature * 3


def test_fewer_points_than_dimensions_see_their_span_only():
    """The gradient lies in the span of the points seen from x."""
    points, x = cloud(8, 30, seed=1)
    g = history(points, (points**2).sum(1)).gradient(x)
    z = points - x
    rest = g - z.T @ torch.linalg.lstsq(z.T, g[:, None]).solution[:, 0]
    assert rest.norm() < 1e-10 * g.norm()


@pytest.mark.slow
def test_the_cosine_law():
    """For linear functions in dimension 300 the cosine with the true gradient is sqrt((n - 1)/d)."""
    found = {150: [], 600: []}
    for seed in range(5):
        for n in found:
            points, _ = cloud(n, 300, 0.01, seed)
            slope = torch.from_numpy(np.random.default_rng(100 + seed).standard_normal(300))
            g = history(points, points @ slope, noise=1e-8).gradient(torch.full((300,), 0.5).double())
            found[n].append(float(g @ slope / g.norm() / slope.norm()))
    assert abs(np.mean(found[150]) - 0.70) < 0.06
    assert np.mean(found[600]) > 0.999


@pytest.mark.parametrize(("d", "n", "bound"), [(5, 42, 1e-3), (10, 132, 2e-3)])
def test_quadratics_are_interpolated(d, n, bound):
    """With twice as many points as coefficients of a quadratic the gradient is nearly exact."""
    points, _ = cloud(n, d, 0.05, 2)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((d, d)), torch.from_numpy(rng.standard_normal(d))
    a = torch.from_numpy(a + a.T)
    x = torch.full((d,), 0.5).double()
    values = 0.5 * torch.einsum("ni,ij,nj->n", points, a, points) + points @ b
    exact = a @ x + b
    for scale, noise, limit in ((3.0, 1e-12, bound), (1.0, 1e-6, 2e-2)):
        g = history(points, values, noise=noise, kernel=Kernel("se", scale)).gradient(x)
        assert (g - exact).norm() < limit * exact.norm()


def test_units_and_translations_do_not_matter():
    """y -> a y + b multiplies the gradient by a; moving points and x together changes nothing."""
    points, x = cloud(20, 5)
    values = torch.sin(points * 3).sum(1)
    g = history(points, values).gradient(x)
    assert torch.allclose(history(points, 40.0 * values + 1000.0).gradient(x), 40.0 * g, rtol=1e-6)
    assert torch.allclose(history(points + 0.25, values).gradient(x + 0.25), g, rtol=1e-7)


def test_windows_without_news_give_no_gradient_and_no_nan():
    """Equal values give 0; one point gives 0 there; coinciding points are harmless."""
    points, x = cloud(12, 3)
    assert (history(points, torch.full((12,), 3.0).double()).gradient(x) == 0).all()
    assert (history(points[:1], torch.ones(1).double()).gradient(points[0]) == 0).all()
    double = torch.cat([points, points, points])
    values = (double**2).sum(1)
    made = history(double, values)
    assert torch.allclose(made.gradient(x), history(points, values[:12]).gradient(x), rtol=1e-3)
    assert made.trace(x, x[None]).isfinite().all()


def test_a_kernel_matrix_that_is_not_positive_definite_gets_more_noise_and_says_so():
    """Coinciding points with next to no noise: the noise grows tenfold until it holds, counted, never NaN."""
    points, x = cloud(60, 2, 0.001)
    made = history(torch.cat([points] * 3), torch.cat([points.sum(1)] * 3), noise=1e-300, kernel=Kernel("se", 5.0))
    assert made.gradient(x).isfinite().all()
    assert made.raised > 0


@pytest.mark.parametrize("name", KERNELS)
def test_an_extended_factor_is_that_of_all_points(name):
    """A window that only grows is extended: the same gradients as factored anew, to rounding, without a new factor."""
    points, x = cloud(60, 8)
    values = (points**3).sum(1)
    kernel = Kernel(name, 1.1)
    grown = history(points, values, window=60, noise=1e-4, kernel=kernel)
    grown.count = 40
    grown.gradient(x)
    first = grown._posterior
    for end in (41, 47, 60):
        grown.count = end
        step = x + 0.01 * end
        fresh = history(points[:end], values[:end], noise=1e-4, kernel=kernel).gradient(step)
        assert torch.allclose(grown.gradient(step), fresh, rtol=1e-8, atol=1e-10)
        assert grown._posterior is first


def test_without_queries_the_surrogate_knows_nothing():
    """No points: gradient 0, no likelihood for any length scale, all of the prior's uncertainty."""
    none = history(torch.zeros(0, 3).double(), torch.zeros(0).double())
    x = torch.zeros(3).double()
    assert (none.gradient(x) == 0).all()
    assert (none.likelihoods("se", x) == 0).all()
    assert float(none.trace(x, x[None])[0]) == none.kernel.curvature * 3


def test_the_nearest_are_kept_and_ties_go_to_the_older():
    """A window holds the nearest queries in the order in which they were made."""
    points = torch.tensor([[0.0], [1.0], [1.0], [0.5], [-1.0]], dtype=torch.float64)
    made = history(points, torch.arange(5).double())
    assert made.nearest(torch.zeros(1).double(), 3).tolist() == [0, 1, 3]
    assert made.nearest(torch.zeros(1).double(), None).tolist() == [0, 1, 2, 3, 4]


def gradient(phi: Features, x: torch.Tensor, scale: float, weights: torch.Tensor) -> torch.Tensor:
    """Return the gradient of one client's features at a point."""
    return phi.gradients(x[None], torch.tensor([scale], dtype=torch.float64), weights[None])[0]


@pytest.mark.parametrize("name", KERNELS)
def test_features_approximate_the_kernel_as_one_over_root_m(name):
    """RMS errors of phi'phi times sqrt(M) stay around 1; phi'phi is 1 on the diagonal in the mean."""
    points, _ = cloud(40, 10)
    exact = Kernel(name, 1.0).value(squared_distances(points, points).fill_diagonal_(0.0))
    for M in (100, 1600, 25600):
        phi = Features(name, M, 10, 5)(points, 1.0)
        gram = phi @ phi.T
        rms = float(((gram - exact) ** 2).mean().sqrt()) * math.sqrt(M)
        assert 0.5 < rms < 1.2
        assert abs(float(gram.diagonal().mean()) - 1.0) < 5.0 / math.sqrt(M)


def test_the_gradient_of_features_converges_and_is_exact():
    """Errors halve for four times the features, in the mean; the closed form equals automatic differentiation."""
    points, x = cloud(40, 10, 0.3)
    values = torch.sin(3 * points).sum(1)
    values = (values - values.min()) / (values.max() - values.min())
    posterior = Posterior(Kernel("se", 1.0), 1e-2)
    posterior.condition(points, x)
    exact = posterior.gradient(posterior.weights(values))
    errors = []
    for M in (400, 1600, 6400):
        of_m = []
        for seed in range(12):
            phi = Features("se", M, 10, seed)
            of_m.append(float((gradient(phi, x, 1.0, phi.weights(points, values, 1.0, 1e-2)[0]) - exact).norm()))
        errors.append(np.sqrt(np.mean(np.square(of_m))))
    assert 1.7 < (errors[0] / errors[2]) ** 0.5 < 2.3
    phi, w = Features("se", 300, 10, 0), torch.randn(300, generator=torch.Generator().manual_seed(1)).double()
    at = x.clone().requires_grad_()
    angles = phi.directions @ at / 0.7 + phi.phases
    automatic = torch.autograd.grad(math.sqrt(2 / 300) * torch.cos(angles) @ w, at)[0]
    assert torch.allclose(gradient(phi, x, 0.7, w), automatic, rtol=1e-10)


def test_primal_and_dual_weights_agree_and_without_noise_they_interpolate():
    """Phi (Phi'Phi + s I)^-1 y = (Phi Phi' + s I)^-1 Phi y; noise 0 and coinciding points give least squares."""
    points, _ = cloud(30, 4)
    values = (points**2).sum(1)
    phi = Features("se", 80, 4, 0)
    matrix = phi(points, 1.0).T
    primal = torch.linalg.solve(matrix @ matrix.T + 1e-2 * torch.eye(80, dtype=torch.float64), matrix @ values)
    dual, _ = phi.weights(points, values, 1.0, 1e-2)
    assert (primal - dual).abs().max() < 1e-10 * primal.abs().max()
    double = torch.cat([points, points])
    found, _ = phi.weights(double, torch.cat([values, values]), 1.0, 0.0)
    assert found.isfinite().all()
    assert (phi(points, 1.0) @ found - values).abs().max() < 1e-3


def test_features_that_cannot_be_factored_take_more_noise_and_say_so():
    """Coinciding points with next to no noise: counted, finite; points that are no numbers give no numbers, at once."""
    points, _ = cloud(30, 2, 0.01)
    phi = Features("se", 200, 2, 0)
    weights, raised = phi.weights(torch.cat([points] * 3), torch.cat([points.sum(1)] * 3), 5.0, 1e-300)
    assert weights.isfinite().all()
    assert raised > 0
    assert phi.weights(points, points.sum(1), 5.0, 1e-3)[1] == 0
    lost, _ = phi.weights(points * math.nan, points.sum(1), 5.0, 1e-3)
    assert lost.shape == weights.shape
    assert lost.isnan().all()


def test_surrogates_are_linear_in_their_weights():
    """The gradient of the mean weights is the mean of the clients' gradients, with different output scales."""
    phi, weights, gradients = Features("se", 200, 3, 0), [], []
    x = torch.full((3,), 0.4).double()
    for client, size in enumerate((1.0, 30.0, 1000.0)):
        points, _ = cloud(20, 3, seed=client)
        part, values, spread, noise = history(points, size * (points**2).sum(1)).normalised(x, None)
        weights.append(phi.weights(part, values, 1.0, noise)[0] * spread)
        gradients.append(gradient(phi, x, 1.0, weights[-1]))
    mean = gradient(phi, x, 1.0, torch.stack(weights).mean(0))
    assert torch.allclose(mean, torch.stack(gradients).mean(0), rtol=1e-9)


def test_the_length_scale_of_a_known_process_is_found():
    """Values drawn from a process of scale 1.5 give about 1.5, from one client's likelihood or the sum of three."""
    total = torch.zeros(STEPS, dtype=torch.float64)
    for seed in range(3):
        points, _ = cloud(60, 2, 2.0, seed)
        k = Kernel("se", 1.5).value(squared_distances(points, points).fill_diagonal_(0.0)) + 1e-6 * torch.eye(
            60, dtype=torch.float64
        )
        drawn = torch.from_numpy(np.random.default_rng(seed).standard_normal(60))
        total += likelihoods("se", points, torch.linalg.cholesky(k) @ drawn, 1e-6)
    assert 1.2 < best(total, 2) < 1.9
    assert best(torch.zeros(STEPS), 2) == grid(2)[STEPS // 2]
    assert best(torch.arange(STEPS).double(), 2) == grid(2)[-1]


def test_no_gradient_of_features_depends_on_the_others_of_a_call():
    """Gradients at three points, with scales and weights of their own, have the bits that each has alone."""
    phi = Features("matern52", 700, 300, 0)  # in several parts
    rng = torch.Generator().manual_seed(0)
    x, w = torch.rand(3, 300, generator=rng).double(), torch.randn(3, 700, generator=rng).double()
    scales = torch.tensor([0.5, 3.0, 40.0], dtype=torch.float64)
    together = phi.gradients(x, scales, w)
    for k in range(3):
        assert torch.equal(gradient(phi, x[k].clone(), float(scales[k]), w[k].clone()), together[k])


def test_features_follow_from_their_seed():
    """Equal seeds give equal features, other seeds others; they are made once."""
    assert torch.equal(Features("se", 10, 2, 7).directions, Features("se", 10, 2, 7).directions)
    assert not torch.equal(Features("se", 10, 2, 7).directions, Features("se", 10, 2, 8).directions)
    assert features("se", 10, 2, 7) is features("se", 10, 2, 7)
