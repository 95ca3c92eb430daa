"""The papers' algorithms as loops over nodes and events: plain NumPy, written from the papers, no fedsim code.

An event is `(time, i, j)`: a gradient of node i where j is None, else an exchange between i and j. `grad(i, x)` and
`dual(i, s)` are the gradients of `f_i` and of its conjugate; `edges` a list of pairs, `w` their rates.
"""

import math

import numpy as np
from scipy.linalg import expm


def laplacian(n, edges, w):
    lap = np.zeros((n, n))
    for (i, j), rate in zip(edges, w, strict=True):
        lap[[i, j], [i, j]] += rate
        lap[[i, j], [j, i]] -= rate
    return lap


def chis(n, edges, w):
    """chi1, chi2 and the resistance of every edge."""
    lap = laplacian(n, edges, w)
    inverse = np.linalg.pinv(lap)
    resistance = np.array([inverse[i, i] + inverse[j, j] - 2 * inverse[i, j] for i, j in edges])
    return 1 / np.linalg.eigvalsh(lap)[1], resistance.max() / 2, resistance


class Dadao:
    """Nabli & Oyallon, JMLR 2025: eq. (3), Algorithm 2, Lemma 12 as its proof needs it."""

    def __init__(self, mu, L, chi1, chi2):
        nu, c = mu / 2, max(1.0, math.sqrt(2 * chi1 * chi2))
        self.nu = nu
        self.eta = self.eta_t = self.alpha_t = math.sqrt(nu / L) / (8 * c)
        self.alpha = self.delta = math.sqrt(nu / L) / (4 * c)
        self.theta = math.sqrt(L / nu) / (2 * c)
        self.gamma, self.gamma_t = 1 / (4 * L), 1 / (4 * c * math.sqrt(nu * L))
        self.beta, self.beta_t, self.delta_t = 0.5, 2 * chi1 * math.sqrt(L / nu) / c, 1.0
        self.flow = np.zeros((6, 6))
        self.flow[0, :2] = -self.eta, self.eta
        self.flow[1, :2] = self.eta_t, -self.eta_t
        self.flow[2, 2:4] = -self.alpha, self.alpha
        self.flow[3, [1, 2, 4]] = -self.theta * nu, -self.theta, -self.theta
        self.flow[4, 4:] = -self.alpha, self.alpha
        self.flow[5, 4:] = self.alpha_t, -self.alpha_t

    def start(self, x0, grad, init):
        """`[n, 6, dim]`: x, xt, y, yt, z, zt."""
        v = np.zeros((len(x0), 6, x0.shape[1]))
        v[:, 0] = x0
        if init != "authors_code":
            v[:, 1] = x0
        if init == "theorem4":
            v[:, 2] = v[:, 3] = [grad(i, x) - self.nu * x for i, x in enumerate(x0)]
            v[:, 4] = v[:, 5] = v[:, 2].mean(axis=0) - v[:, 2]
        return v

    def play(self, v, grad, events, eager=False):
        """Return the variables and every node's time; `eager`: all nodes flow at every event."""
        v, last = v.copy(), np.zeros(len(v))
        for t, i, j in events:
            for node in range(len(v)) if eager else {i, j} - {None}:
                v[node] = expm(self.flow * (t - last[node])) @ v[node]
                last[node] = t
            if j is None:
                g = grad(i, v[i, 0]) - self.nu * v[i, 0] - v[i, 3]
                v[i, 0] -= self.gamma * g
                v[i, 1] -= self.gamma_t * g
                v[i, 3] += (self.delta + self.delta_t) * g
            else:
                m = (v[i, 2] + v[i, 4]) - (v[j, 2] + v[j, 4])
                v[i, 4:] -= np.outer([self.beta, self.beta_t], m)
                v[j, 4:] += np.outer([self.beta, self.beta_t], m)
        return v, last


def a2cid2(x0, grad, events, chi1, chi2, step=0.0, momentum=0.0, decay=None, accelerated=True):
    """Nabli, Belilovsky & Oyallon 2023, eq. (4), Prop. 3.6, or gossip SGD; returns x, xt at last events."""
    eta, alpha_t = (1 / (2 * math.sqrt(chi1 * chi2)), math.sqrt(chi1 / chi2) / 2) if accelerated else (0.0, 0.5)
    x, xt, buffer = x0.copy(), x0.copy(), np.zeros_like(x0)
    last, count = np.zeros(len(x0)), np.zeros(len(x0))
    for t, i, j in events:
        for node in {i, j} - {None}:
            mean, half = (x[node] + xt[node]) / 2, (x[node] - xt[node]) / 2 * math.exp(-2 * eta * (t - last[node]))
            x[node], xt[node], last[node] = mean + half, mean - half, t
        if j is None:
            buffer[i] = momentum * buffer[i] + grad(i, x[i])
            size = step * (1 + count[i] / decay[0]) ** -decay[1] if decay else step
            x[i], xt[i] = x[i] - size * buffer[i], xt[i] - size * buffer[i]
            count[i] += 1
        else:
            m = x[i] - x[j]
            x[i], x[j] = x[i] - m / 2, x[j] + m / 2
            xt[i], xt[j] = xt[i] - alpha_t * m, xt[j] + alpha_t * m
    return x, xt


def continuized(n, dim, dual, events, edges, w, mu, L):
    """Even et al. 2021, appendix H, at rates of any total; returns y, z at last events."""
    total = sum(w)
    chi1, chi2, resistance = chis(n, edges, np.asarray(w) / total)
    eta = total * math.sqrt(1 / (chi1 * 2 * chi2)) * math.sqrt(mu / L)
    gamma, gamma_z = mu / (4 * chi2), math.sqrt(L * mu * chi1 / (4 * chi2))
    y, z, last = np.zeros((n, dim)), np.zeros((n, dim)), np.zeros(n)
    of_edge = {frozenset(edge): r for edge, r in zip(edges, resistance, strict=True)}
    for t, i, j in events:
        for node in (i, j):
            mean, half = (y[node] + z[node]) / 2, (y[node] - z[node]) / 2 * math.exp(-2 * eta * (t - last[node]))
            y[node], z[node], last[node] = mean + half, mean - half, t
        G = dual(i, y[i]) - dual(j, y[j])
        step = gamma * of_edge[frozenset((i, j))] * G
        y[i], y[j], z[i], z[j] = y[i] - step, y[j] + step, z[i] - gamma_z * G, z[j] + gamma_z * G
    return y, z


def msda(n, dim, dual, edges, mu, L, rounds):
    """Scaman et al. 2017, Algorithms 2 and 3; returns theta."""
    W = laplacian(n, edges, np.ones(len(edges))) / len(edges)
    values = np.linalg.eigvalsh(W)
    g = values[1] / values[-1]
    c1, c3 = (1 - math.sqrt(g)) / (1 + math.sqrt(g)), 2 / ((1 + g) * values[-1])
    K = math.floor(1 / math.sqrt(g) + 1e-6)
    q, kappa = c1**K, L / mu
    eta = mu * (1 + q**2) / (1 + q) ** 2
    m = ((1 + q) * math.sqrt(kappa) - 1 + q) / ((1 + q) * math.sqrt(kappa) + 1 - q)
    # T_k(c2 (I - c3 W)) / T_k(c2), by eigenvalues instead of the recursion
    basis = np.linalg.eigh(W)[1]
    c2 = (1 + g) / (1 - g)
    chebyshev = np.polynomial.chebyshev.Chebyshev([0] * K + [1])
    gossip = np.eye(n) - basis @ np.diag(chebyshev(c2 * (1 - c3 * values)) / chebyshev(c2)) @ basis.T
    s = v = np.zeros((n, dim))
    for _ in range(rounds):
        ahead = s - eta * gossip @ np.array([dual(i, row) for i, row in enumerate(s)])
        s, v = (1 + m) * ahead - m * v, ahead
    return np.array([dual(i, row) for i, row in enumerate(s)])


def adom_plus(x, grad, edges, mu, L, rounds, multi_consensus):
    """Kovalev et al. 2021, Algorithm 1; the implicit pair is solved as a system of two equations. Returns x."""
    n = len(x)
    lap = laplacian(n, edges, np.ones(len(edges)))
    values = np.linalg.eigvalsh(lap)
    G, chi = lap / values[-1], values[-1] / values[1]
    T = math.ceil(chi * math.log(2))
    if multi_consensus and T > 1:
        G, chi = np.eye(n) - np.linalg.matrix_power(np.eye(n) - G, T), 2.0
    nu, alpha, tau2 = mu / 2, mu / 2, math.sqrt(mu / L)
    tau1, eta, beta, sigma2 = 1 / (1 / tau2 + 0.5), 1 / (L * tau2), 1 / (2 * L), tau2 / (16 * chi)
    sigma1, theta = 1 / (1 / sigma2 + 0.5), nu / (4 * sigma2)
    gamma, delta, zeta = nu / (14 * sigma2 * chi**2), 1 / (17 * L), 0.5
    pair = np.array([[1 + eta * alpha, -eta], [theta, 1 + theta * beta]])
    y, z, m = np.zeros((3, *x.shape))
    xf, yf, zf = x, y, z
    for _ in range(rounds):
        xg, yg, zg = (tau1 * x + (1 - tau1) * xf, *(sigma1 * a + (1 - sigma1) * b for a, b in ((y, yf), (z, zf))))
        d = np.array([grad(i, row) for i, row in enumerate(xg)]) - nu * xg
        right = x + eta * alpha * xg - eta * d, y + theta * beta * d - theta / nu * (yg + zg)
        new_x, new_y = np.linalg.solve(pair, np.stack(right).reshape(2, -1)).reshape(2, *x.shape)
        xf, yf = xg + tau2 * (new_x - x), yg + sigma2 * (new_y - y)
        p = gamma / nu * (yg + zg) + m
        z, m, zf = z + gamma * delta * (zg - z) - G @ p, p - G @ p, zg - zeta * G @ (yg + zg)
        x, y = new_x, new_y
    return x
