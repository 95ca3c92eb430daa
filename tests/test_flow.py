"""The flow between events is exp(A t), for any A that an algorithm may have."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm

from fedsim.engine.flow import Flow


def dadao(kappa: float, c: float = 1.0) -> np.ndarray:
    """DADAO's A for mu = 1, L = kappa: a double eigenvalue 0 and an under-damped pair."""
    nu = 0.5
    root = np.sqrt(nu / kappa)
    eta, alpha, theta = root / (8 * c), root / (4 * c), 1 / (2 * c * root)
    return np.array(
        [
            [-eta, eta, 0, 0, 0, 0],
            [eta, -eta, 0, 0, 0, 0],
            [0, 0, -alpha, alpha, 0, 0],
            [0, -theta * nu, -theta, 0, -theta, 0],
            [0, 0, 0, 0, -alpha, alpha],
            [0, 0, 0, 0, eta, -eta],
        ]
    )


@pytest.mark.parametrize("kappa", [1.0, 4.0, 100.0, 1e4, 1e8])
@pytest.mark.parametrize("c", [1.0, 3.0])
def test_dadao_flow_equals_the_exact_exponential(kappa, c):
    """DADAO's flow agrees with 60 digits of exp(A t), up to condition numbers where scaling and squaring fails."""
    generator = dadao(kappa, c)
    flow = Flow.of(generator)
    assert len(flow.table.powers) == 4  # modes were found, not squaring
    with mpmath.workdps(60):
        for t in (1e-6, 0.01, 1.0, 30.0):
            exact = np.array(mpmath.expm(mpmath.matrix(generator) * t, method="taylor").tolist(), dtype=float)
            assert np.abs(flow.at(t) - exact).max() <= 1e-14 * np.abs(exact).max()


def test_closed_form():
    """DADAO's flow is the closed form of its 2 x 2 blocks: the x and z pairs contract, (y, yt) rotates."""
    kappa, t = 10.0, 2.7
    generator = dadao(kappa)
    a, theta, nu = generator[2, 3], -generator[3, 4], 0.5
    x, xt, y, yt, z, zt = v = np.array([1.0, -2.0, 0.5, 0.3, -1.5, 0.7])
    e1, e2, g, w = np.exp(-a * t), np.exp(-1.5 * a * t), np.exp(-a * t / 2), np.sqrt(a * theta - a * a / 4)
    cos, sin = np.cos(w * t), np.sin(w * t) / w
    xb, dx, zi, dz = (x + xt) / 2, x - xt, (z + 2 * zt) / 3, z - zt
    c0, c1, c2 = nu * xb + zi, -nu * dx / 2, 2 / 3 * dz
    p2 = -theta * c2 / (theta + 0.75 * a)
    h, ht = y + c0 + c1 - p2, yt + c0 + p2 / 2
    expected = [
        xb + dx * e1 / 2,
        xb - dx * e1 / 2,
        g * ((cos - a * sin / 2) * h + a * sin * ht) - c0 - c1 * e1 + p2 * e2,
        g * (-theta * sin * h + (cos + a * sin / 2) * ht) - c0 - p2 * e2 / 2,
        zi + 2 / 3 * dz * e2,
        zi - dz * e2 / 3,
    ]
    assert np.allclose(Flow.of(generator).at(t) @ v, expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("seed", range(2))
def test_what_a_flow_conserves_does_not_drift(seed):
    """After 10,000 steps, DADAO's `z + 2 zt` and the mean of a pair are where they were, to rounding."""
    rng = np.random.default_rng(seed)
    eta = rng.uniform(0.01, 3)
    pair, all_six = Flow.of(np.array([[-eta, eta], [eta, -eta]])), Flow.of(dadao(10 ** rng.uniform(0, 4)))
    v, w = rng.standard_normal(2), rng.standard_normal(6)
    mean, kept = v.sum() / 2, w[4] + 2 * w[5]
    for elapsed in rng.exponential(size=10_000):
        v, w = pair.at(elapsed) @ v, all_six.at(elapsed) @ w
    assert abs(v.sum() / 2 - mean) < 1e-13 * abs(mean)
    assert abs(w[4] + 2 * w[5] - kept) < 1e-13 * abs(kept)


SPECIAL = {
    "nothing flows": np.zeros((3, 3)),
    "a Jordan block": np.array([[0.0, 1.0], [0.0, 0.0]]),
    "a damped Jordan block": np.array([[-1.0, 1, 0], [0, -1, 1], [0, 0, -1]]),
    "nearly defective": np.array([[-1.0, 1.0], [0.0, -1.0 - 1e-7]]),
    "a rotation": np.array([[0.0, 1.0], [-1.0, 0.0]]),
    "two equal rotations, coupled": np.kron(np.eye(2), [[0, 1], [-1, 0]]) + np.kron([[0, 1], [0, 0]], np.eye(2)),
    "very different scales": np.array([[-1e-6, 1e3], [0.0, -5.0]]),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_generators(name):
    """Defective, oscillating and badly scaled generators flow right, by modes or by squaring."""
    flow = Flow.of(SPECIAL[name])
    for t in (1e-6, 0.3, 1.0, 7.0):
        exact = expm(SPECIAL[name] * t)
        assert np.abs(flow.at(t) - exact).max() <= 1e-9 * max(1.0, np.abs(exact).max())


@settings(deadline=None, max_examples=40)
@given(k=st.integers(1, 7), seed=st.integers(0, 10**6), s=st.floats(0, 2), t=st.floats(0, 2), sparse=st.booleans())
def test_semigroup(k, seed, s, t, sparse):
    """Flowing for s and then for t is flowing for s + t; flowing for no time is nothing."""
    rng = np.random.default_rng(seed)
    generator = rng.standard_normal((k, k)) * (rng.random((k, k)) < 0.4 if sparse else 1) - np.eye(k)
    flow = Flow.of(generator)
    size = np.abs(flow.at(s)).max() * np.abs(flow.at(t)).max()
    assert np.allclose(flow.at(t) @ flow.at(s), flow.at(s + t), atol=1e-8 * max(1, size), rtol=0)
    assert np.allclose(flow.at(0.0), np.eye(k), atol=1e-9)


def test_what_does_not_depend_stays_exactly_apart():
    """Entries that no power of A reaches are exactly zero: x and z never feel y."""
    flow = Flow.of(dadao(50.0)).at(0.7)
    assert not flow[:2, 2:].any()
    assert not flow[4:, :4].any()
