"""CDProxSGT, CHOCO-SGD and BEER: differences to public copies travel, compressed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field

from fedsim.algorithms.algorithm import Constant, Draws, Oracle, Provenance, Sampling, Setting, SyncAlgorithm
from fedsim.algorithms.dproxsgt import nonzeros, step_constants
from fedsim.algorithms.requests import Mix, Rows
from fedsim.algorithms.steps import Decay, clipped
from fedsim.errors import InputError

if TYPE_CHECKING:
    from fedsim.compression.compressors import Compressor, Quality

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Spec = str | dict[str, Any]
TOP = {"kind": "top_k", "ratio": 0.3}
BOLD, COARSE = 0.5, 0.2  # gammas above with deltas below are known to overflow


@dataclass(frozen=True)
class Compressed(SyncAlgorithm):
    """What the three have in common: compressors built from the scenario, and a gossip step on public copies."""

    needs: ClassVar[tuple[str, ...]] = ("mixing",)

    eta: Positive
    batch: Sampling | None = None
    decay: Decay | None = None
    clip: Positive | None = None
    compress: Spec = field(default_factory=lambda: dict(TOP))

    _x: Any = field(default=None, init=False, repr=False)  # Compressor
    _y: Any = field(default=None, init=False, repr=False)
    _sizes: tuple[int, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse a compressor that cannot be built before anything runs; one's own file needs its folder first."""
        from fedsim.compression.compressors import build

        for where in ("compress", "compress_y"):
            spec = getattr(self, where, None)
            if spec is not None and ".py:" not in str(spec.get("kind") if isinstance(spec, Mapping) else spec):
                build(spec, where)

    def _compressors(self, base: Path) -> dict[str, Any]:
        from fedsim.compression.compressors import build

        x = build(self.compress, "compress", base)
        other = getattr(self, "compress_y", None)
        return {"_x": x, "_y": x if other is None else build(other, "compress_y", base)}

    def resolve(self, setting: Setting) -> Any:
        """Build the compressors for the model's tensors; refuse what has no mixing matrix, warn of bold gossip."""
        setting.require(self.kind, "edges", "mixing")
        made, sizes = self._compressors(setting.base), tuple(setting.tensor_sizes)
        gamma = max(getattr(self, name, 0.0) for name in ("gamma", "gamma_x", "gamma_y"))
        delta = min(_kept(made[name].quality(sizes)) for name in ("_x", "_y"))
        if gamma > BOLD and delta < COARSE:
            warnings.warn(
                f"{self.kind}: gamma = {gamma:g} with a compressor that keeps delta = {delta:.3g} may diverge;"
                f" {BOLD:g} or less is safer",
                stacklevel=2,
            )
        return self.derived(**made, _sizes=sizes)

    def constants(self, setting: Setting) -> tuple[Constant, ...]:
        """Return step, rho, and what the compressors keep (of x, and of y where that has its own)."""
        found = list(step_constants(self.eta, setting))
        for who, of in ((self._x, ""),) if self._y == self._x else ((self._x, " of x"), (self._y, " of y")):
            quality = who.quality(self._sizes)
            if quality.delta is not None:
                found.append(Constant(f"delta{of}", quality.delta, "E ||v - Q(v)||^2 <= (1 - delta) ||v||^2"))
            if quality.omega is not None:
                found.append(Constant(f"omega{of}", quality.omega, "E Q(v) = v, E ||Q(v) - v||^2 <= omega ||v||^2"))
        return tuple(found)

    def _step(self, k: int) -> float:
        return self.eta if self.decay is None else self.decay.at(self.eta, k)

    async def _tell(
        self, who: Compressor, v: torch.Tensor, copy: torch.Tensor, rng: Draws, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Send `Q(v - copy)`; return the public copy moved by it, and the weighted sum of the neighbours' copies.

        The copies themselves are mixed: a sum of what came would drift from their sum by rounding, and with it the
        mean of the trackers from that of the gradients.
        """
        from fedsim.compression.compressors import compressed

        packet = compressed(who, v - copy, rng, name, self._sizes)
        moved = copy + packet.dense
        return moved, await Mix(packet, copies=moved, name=name)


def _kept(quality: Quality) -> float:
    """Return the contraction that a compressor promises; of an unbiased one that is `1 - omega`, if positive."""
    if quality.delta is not None:
        return quality.delta
    return 1.0 if quality.omega is None else max(0.0, 1.0 - quality.omega)


@dataclass
class CDProxSGTState:
    """Models, trackers, last gradients; public copies `x_hat`, `y_hat`; `half`: models before gossip."""

    x: Rows
    y: Rows
    g: Rows
    x_hat: Rows
    y_hat: Rows
    half: Rows


@dataclass(frozen=True)
class CDProxSGT(Compressed):
    """DProxSGT whose two messages are compressed differences to public copies.

        h = y + g - g-
        y_hat += Q_y(h - y_hat);   y = h + gamma_y (W y_hat - y_hat)
        u = prox_{eta r}(x - eta y)
        x_hat += Q_x(u - x_hat);   x = u + gamma_x (W x_hat - x_hat)

    Everything but x starts at 0. There is no error feedback: what was not sent stays in the difference. With the
    identity and gamma = 1 it is DProxSGT; for any compressor `mean y = mean g` and `mean x = mean u`.

    Parameters: `eta`, `decay`, `batch`, `clip` as for `dproxsgt`; `compress`: `{kind, ...}` of x (default the largest
    30 %), `compress_y`: of y (default the same); `gamma_x`, `gamma_y` in (0, 1]; `copies`: `zero` (paper and code) or
    `x0`, where the common start is known to all.

    Reference: Yan et al., ICML 2023 (arXiv 2302.14252), Algorithm 2.

    Differences from the authors' code: it has no prox, keeps y in float64 and x in float32, and sends 8-byte indices,
    so that its "30 %" cost more than dense messages; its QSGD divides by a zero norm.
    """

    kind: ClassVar[str] = "cdproxsgt"
    paper: ClassVar[str] = "Yan et al., ICML 2023, Algorithm 2"
    provenance: ClassVar[Provenance] = "paper"
    proximal: ClassVar[bool] = True

    compress_y: Spec | None = None
    gamma_x: Share = 0.5
    gamma_y: Share = 0.5
    copies: Annotated[str, Field(pattern="^(zero|x0)$")] = "zero"

    def resolve(self, setting: Setting) -> Any:
        """Refuse copies of starts that others do not know; else as the others."""
        if self.copies == "x0" and not setting.common_start:
            raise InputError("algorithm.copies: x0 needs a common start (start: zeros, say); use copies: zero")
        return super().resolve(setting)

    async def start(self, x0: torch.Tensor, f: Oracle, rng: Draws) -> CDProxSGTState:
        """Start at x0; what is not known to all starts at 0."""
        zero = torch.zeros_like(x0)
        known = x0 if self.copies == "x0" else zero
        return CDProxSGTState(x0, zero, zero, known, zero, x0)

    async def round(self, s: CDProxSGTState, k: int, f: Oracle, rng: Draws) -> CDProxSGTState:
        """Play one round: one gradient, two compressed exchanges."""
        eta = self._step(k)
        g = clipped(f.gradient(s.x, self.batch, rng), self.clip)
        h = s.y + g - s.g
        y_hat, y_sum = await self._tell(self._y, h, s.y_hat, rng, "compress y")
        y = h + self.gamma_y * (y_sum - y_hat)
        half = f.prox(s.x - eta * y, eta)
        x_hat, x_sum = await self._tell(self._x, half, s.x_hat, rng, "compress x")
        x = half + self.gamma_x * (x_sum - x_hat)
        return CDProxSGTState(x, y, g, x_hat, y_hat, half)

    def measures(self, s: CDProxSGTState, f: Oracle) -> Mapping[str, torch.Tensor]:
        """Return how many coordinates are not 0 before and after gossip."""
        return nonzeros(s.half, s.x, f)


@dataclass
class ChocoState:
    """Models and their public copies; `half`: models before gossip."""

    x: Rows
    x_hat: Rows
    half: Rows


@dataclass(frozen=True)
class ChocoSGD(Compressed):
    """CHOCO-SGD, with a prox where there is a composite term: no tracker, one compressed message.

        u = prox_{eta r}(x - eta g);   x_hat += Q(u - x_hat);   x = u + gamma (W x_hat - x_hat)

    Without tracking it stops at a distance of order eta where nodes' data differ. Parameters: as for `cdproxsgt`, with
    one `gamma`.

    Reference: Koloskova, Stich & Jaggi, *Decentralized stochastic optimization and gossip algorithms with compressed
    communication*, ICML 2019, Algorithm 2 (compress first, then gossip).

    Differences from the authors' code: their deep-learning code gossips with the old copies first, then compresses; the
    convex one starts the copies at x0.
    """

    kind: ClassVar[str] = "choco_sgd"
    paper: ClassVar[str] = "Koloskova, Stich & Jaggi, ICML 2019, Algorithm 2"
    provenance: ClassVar[Provenance] = "paper"
    proximal: ClassVar[bool] = True

    gamma: Share = 0.5

    async def start(self, x0: torch.Tensor, f: Oracle, rng: Draws) -> ChocoState:
        """Start the copies at 0."""
        return ChocoState(x0, torch.zeros_like(x0), x0)

    async def round(self, s: ChocoState, k: int, f: Oracle, rng: Draws) -> ChocoState:
        """Play one round: one gradient, one compressed exchange."""
        eta = self._step(k)
        half = f.prox(s.x - eta * clipped(f.gradient(s.x, self.batch, rng), self.clip), eta)
        x_hat, x_sum = await self._tell(self._x, half, s.x_hat, rng, "compress x")
        return ChocoState(half + self.gamma * (x_sum - x_hat), x_hat, half)

    def measures(self, s: ChocoState, f: Oracle) -> Mapping[str, torch.Tensor]:
        """Return how many coordinates are not 0 before and after gossip."""
        return nonzeros(s.half, s.x, f)


@dataclass
class BEERState:
    """Models, trackers `v`, last gradients; public copies `x_hat`, `v_hat` and the weighted sums of the neighbours'."""

    x: Rows
    v: Rows
    g: Rows
    x_hat: Rows
    v_hat: Rows
    x_sum: Rows
    v_sum: Rows


@dataclass(frozen=True)
class BEER(Compressed):
    """BEER: gossip on the old copies, then tell.

        x = x + gamma (W - I) x_hat - eta v;   x_hat += Q(x - x_hat)
        v = v + gamma (W - I) v_hat + g - g-;  v_hat += Q(v - v_hat)

    v starts at the gradient of x0, the copies at 0. Shifted by half a round it is CDProxSGT without a prox, but for
    where the gradient is taken and which tracker is stepped along. Parameters: as for `choco_sgd`.

    Reference: Zhao, Li, Li, Richtarik & Chi, *BEER: Fast O(1/T) rate for decentralized nonconvex optimization with
    communication compression*, NeurIPS 2022, Algorithm 1.

    Differences from the authors' code: the torch version takes both gradients of a difference on the new batch; as in
    the NumPy version, the old one is kept here. What the figures of the DProxSGT paper call BEER is CDProxSGT with
    large batches.
    """

    kind: ClassVar[str] = "beer"
    paper: ClassVar[str] = "Zhao et al., NeurIPS 2022, Algorithm 1"
    provenance: ClassVar[Provenance] = "paper"

    gamma: Share = 0.5

    async def start(self, x0: torch.Tensor, f: Oracle, rng: Draws) -> BEERState:
        """Take the first gradients."""
        g = clipped(f.gradient(x0, self.batch, rng), self.clip)
        zero = torch.zeros_like(x0)
        return BEERState(x0, g, g, zero, zero, zero, zero)

    async def round(self, s: BEERState, k: int, f: Oracle, rng: Draws) -> BEERState:
        """Play one round: one gradient, two compressed exchanges."""
        x = s.x + self.gamma * (s.x_sum - s.x_hat) - self._step(k) * s.v
        x_hat, x_sum = await self._tell(self._x, x, s.x_hat, rng, "compress x")
        g = clipped(f.gradient(x, self.batch, rng), self.clip)
        v = s.v + self.gamma * (s.v_sum - s.v_hat) + g - s.g
        v_hat, v_sum = await self._tell(self._y, v, s.v_hat, rng, "compress v")
        return BEERState(x, v, g, x_hat, v_hat, x_sum, v_sum)
