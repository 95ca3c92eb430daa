"""Compressors: pure functions from rows to packets, with their contraction or variance constants.

A contraction has `E ||v - Q(v)||^2 <= (1 - delta) ||v||^2`; an unbiased one `E Q(v) = v` and
`E ||Q(v) - v||^2 <= omega ||v||^2`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from pydantic import Field

from fedsim.compression.packets import (
    NO_NUMBER,
    Body,
    DensePacket,
    LevelsPacket,
    MovedPacket,
    PowersPacket,
    SeededPacket,
    SignPacket,
    SparsePacket,
    drawn_places,
    of_levels,
    of_powers,
)
from fedsim.errors import InputError
from fedsim.problems.rows import squared_norms, sums

if TYPE_CHECKING:
    from fedsim.algorithms.algorithm import Draws

ValueType = Literal["state", "float32", "float16", "bfloat16"]
Scope = Literal["flat", "tensor"]
LEAST_EXPONENT = -126
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # unit roundoff, within a type's range


class Quality(NamedTuple):
    """`delta` of a contraction (None: it is none), `omega` of an unbiased compressor (None: it is biased)."""

    delta: float | None
    omega: float | None


class Compressor(ABC):
    """Base of all compressors: frozen dataclasses whose fields are the scenario's keys."""

    kind: ClassVar[str]

    @abstractmethod
    def quality(self, sizes: Sequence[int]) -> Quality:
        """Return the constants for a model of tensors of these sizes."""

    @abstractmethod
    def compress(self, v: torch.Tensor, rng: Draws, purpose: str, sizes: Sequence[int]) -> Body:
        """Return the packet of `v [rows, dim]`; `purpose` names the draws, `sizes` the tensors of a row."""


@dataclass(frozen=True)
class Identity(Compressor):
    """Everything, in the state's own width: delta = 1, omega = 0."""

    kind: ClassVar[str] = "identity"

    def quality(self, sizes: Sequence[int]) -> Quality:
        """Return (1, 0)."""
        return Quality(1.0, 0.0)

    def compress(self, v: torch.Tensor, rng: Draws, purpose: str, sizes: Sequence[int]) -> Body:
        """Return v as it is."""
        return DensePacket(v, v)


@dataclass(frozen=True)
class LowPrecision(Compressor):
    """Round every number to a shorter type: `delta = 1 - u^2` with the unit roundoff u, within the type's range."""

    kind: ClassVar[str] = "low_precision"
    to: Literal["float32", "float16", "bfloat16"] = "bfloat16"

    def quality(self, sizes: Sequence[int]) -> Quality:
        """Return the worst relative rounding's contraction."""
        return Quality(1.0 - ROUNDOFF[self.to] ** 2, None)

    def compress(self, v: torch.Tensor, rng: Draws, purpose: str, sizes: Sequence[int]) -> Body:
        """Round to nearest."""
        values = v.to(getattr(torch, self.to))
        return DensePacket(values.to(v.dtype), values)


@dataclass(frozen=True)
class _Sparse(Compressor):
    """What top-k and random-k have in common.

    Attributes:
        ratio: `k = max(1, floor(ratio * size))`, of the whole row or of every tensor. k: given instead.
        scope: `flat`, or `tensor`: every parameter tensor on its own, as the authors' code does.
        values: the type in which values travel; one that rounds by u keeps `delta (1 - u^2)` within its range.
    """

    ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    k: Annotated[int, Field(ge=1)] | None = None
    scope: Scope = "flat"
    values: ValueType = "state"

    def __post_init__(self) -> None:
        """Refuse both or none of ratio and k."""
        if (self.ratio is None) == (self.k is None):
            raise InputError("give one of ratio (a share of the entries) and k (a number of them)")
        if self.k is not None and self.scope == "tensor":
            raise InputError("scope: tensor needs a ratio; one k does not fit tensors of many sizes")

    def kept(self, sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Return (size, entries kept) of every tensor, or of the whole row."""
        whole = [sum(sizes)] if self.scope == "flat" else sizes
        if self.k is not None:
            return ((whole[0], min(self.k, whole[0])),)
        assert self.ratio is not None
        return tuple((d, max(1, math.floor(self.ratio * d))) for d in whole)

    def worst(self, sizes: Sequence[int]) -> float:
        """Return the smallest share that is kept of any tensor."""
        return min(k / d for d, k in self.kept(sizes))

    def delta(self, sizes: Sequence[int]) -> float:
        """Return the contraction: what is kept, less what rounding takes of it."""
        return self.worst(sizes) * (1.0 - ROUNDOFF.get(self.values, 0.0) ** 2)

    def narrow(self, values: torch.Tensor) -> torch.Tensor:
        """Return values in the type in which they travel."""
        return values if self.values == "state" else values.to(getattr(torch, self.values))


@dataclass(frozen=True)
class TopK(_Sparse):
    """Keep the k entries of largest magnitude, ties to the lowest place: delta = k/d."""

    kind: ClassVar[str] = "top_k"

    def quality(self, sizes: Sequence[int]) -> Quality:
        """Return k/d of the worst tensor."""
        return Quality(self.delta(sizes), None)

    def compress(self, v: torch.Tensor, rng: Draws, purpose: str, sizes: Sequence[int]) -> Body:
        """Find the k-th magnitude, then take what is above, and as many equal to it as fit."""
        begin, parts = 0, []
        for size, k in self.kept(sizes):
            parts.append(begin + _top(v[:, begin : begin + size].contiguous(), k))
            begin += size
        places = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        index = torch.from_numpy(places)
        values = self.narrow(v.gather(1, index))
        dense = torch.zeros_like(v).scatter_(1, index, values.to(v.dtype))
        return SparsePacket(dense, values, places)


STRIDE, FEW = 64, 32  # every so many-th number is sampled; where one of so many is kept, a sample pays


def _top(v: torch.Tensor, k: int) -> NDArray[np.int64]:
    """Return the places `[rows, k]` of the largest magnitudes, ascending.

    Where k is small, a sample says above which magnitude to look, and only what lies there is sorted.
    """
    rows, dim = v.shape
    if dim >= max(FEW * k, FEW * STRIDE):
        guess = v[:, ::STRIDE].abs().topk(2 * k // STRIDE + 8, dim=1, sorted=False).values.amin(dim=1)
        room = rows, 4 * k + 1024
        near, magnitude = np.zeros(room, np.int64), np.full(room, -1.0)
        if _above(v.numpy(), guess.numpy(), k, near, magnitude):
            return np.take_along_axis(near, _top_of(torch.from_numpy(magnitude), k), axis=1)
    return _top_of(v.abs(), k)


def _top_of(magnitude: torch.Tensor, k: int) -> NDArray[np.int64]:
    least = magnitude.topk(k, dim=1, sorted=False).values.amin(dim=1)
    if bool(least.isnan().any()):  # what is no number must travel: it counts as larger than any
        return _top_of(magnitude.nan_to_num(nan=math.inf, posinf=math.inf), k)
    return _places(magnitude.numpy(), least.numpy(), k)


@njit(cache=True, error_model="numpy")
def _above(v, guess, k, near, magnitude):  # pragma: no cover - compiled
    """Write places and magnitudes of what is not below the guess; return whether that is enough, and fits."""
    for row in range(len(v)):
        used, least = 0, guess[row]
        for begin in range(0, v.shape[1], 64):
            end, hits = min(begin + 64, v.shape[1]), 0
            for c in range(begin, end):
                hits += not abs(v[row, c]) < least  # NaN is a hit, too
            if hits == 0:
                continue
            if used + hits > near.shape[1]:
                return False
            for c in range(begin, end):
                if not abs(v[row, c]) < least:
                    near[row, used], magnitude[row, used] = c, abs(v[row, c])
                    used += 1
        if used < k:
            return False
    return True


def _places(magnitude: NDArray, least: NDArray, k: int) -> NDArray[np.int64]:
    """Return the places `[rows, k]` of the k largest of each row, whose least is known, ascending."""
    rows, dim = magnitude.shape
    found = np.flatnonzero(magnitude >= least[:, None])
    if len(found) == rows * k:
        places = found.reshape(rows, k) - dim * np.arange(rows)[:, None]
        if (places[:, 0] >= 0).all() and (places[:, -1] < dim).all():
            return places
    return _largest(magnitude, least, k)  # there are ties


@njit(cache=True)
def _largest(magnitude, least, k):  # pragma: no cover - compiled
    """Return the places of the k largest of each row, ascending; of those equal to the least, the first ones."""
    rows, dim = magnitude.shape
    places = np.zeros((rows, k), np.int64)
    for row in range(rows):
        above = 0
        for c in range(dim):
            above += magnitude[row, c] > least[row]
        equal, used = k - above, 0
        for c in range(dim):
            if used < k and (magnitude[row, c] > least[row] or (magnitude[row, c] == least[row] and equal > 0)):
                equal -= magnitude[row, c] == least[row]
                places[row, used] = c
                used += 1
    return places


@dataclass(frozen=True)
class RandomK(_Sparse):
    """Keep k entries drawn by a seed that travels in their places' stead: delta = k/d on average.

    Attributes:
        unbiased: multiply by d/k; then omega = d/k - 1, and it contracts nothing.
    """

    kind: ClassVar[str] = "random_k"
    unbiased: bool = False

    def __post_init__(self) -> None:
        """Refuse what has no one factor."""
        super().__post_init__()
        if self.unbiased and self.scope == "tensor":
            raise InputError("unbiased: needs scope flat, since d/k differs between tensors")
        if self.unbiased and self.values != "state":
            raise InputError("unbiased: needs values: state, since rounding to a shorter type is biased")

    def quality(self, sizes: Sequence[int]) -> Quality:
        """Return k/d, or omega = d/k - 1."""
        return Quality(None, 1.0 / self.worst(sizes) - 1.0) if self.unbiased else Quality(self.delta(sizes), None)

    def compress(self, v: torch.Tensor, rng: Draws, purpose: str, sizes: Sequence[int]) -> Body:
        """Draw one seed a row, and take the places that it gives."""
        kept = self.kept(sizes)
        seeds = rng.integers(purpose, 1, 2**53).cpu().numpy()[:, 0]
        index = torch.from_numpy(np.stack([drawn_places(int(seed), kept) for seed in seeds]))
        values = self.narrow(v.gather(1, index))
        factor = kept[0][0] / kept[0][1] if self.unbiased else 1.0
        dense = torch.zeros_like(v).scatter_(1, index, factor * values.to(v.dtype))
        return SeededPacket(dense, values, np.ascontiguousarray(seeds), factor, kept)


@dataclass(frozen=True)
class _Levels(Compressor):
    """What QSGD and uniform quantisation have in common.

    Attributes:
        levels: s; a number becomes one of -s..s. block: numbers that share a norm (default: all of a scope).
        scope: `flat`, or `tensor`: every parameter tensor has norms of its own, as in the DProxSGT authors' code.
        scaled: divide by `1 + omega`: biased, but a contraction with `delta = 1/(1 + omega)`.
    """

    levels: Annotated[int, Field(ge=1, le=2**20)] = 64
    block: Annotated[int, Field(ge=1)] | None = None
    scaled: bool = False
    scope: Scope = "flat"
    largest: ClassVar[bool]

    def omega(self, dim: int) -> float:
        """Return the variance bound for a block of this size."""
        raise NotImplementedError

    def blocks(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Return how many numbers share each norm, in order."""
        whole = [sum(sizes)] if self.scope == "flat" else sizes
        return tuple(
            min(self.block or size, size - begin) for size in whole for begin in range(0, size, self.block or size)
        )

    def quality(self, sizes: Sequence[int]) -> Quality:
        """Return omega of the largest block, or delta where it is scaled."""
        omega = self.omega(max(self.blocks(sizes)))
        return Quality(1.0 / (1.0 + omega), None) if self.scaled else Quality(None, omega)

    def compress(self, v: torch.Tensor, rng: Draws, purpose: str, sizes: Sequence[int]) -> Body:
        """Round `s |v| / norm` up or down at random, so that the mean is kept; a block of zeros stays 0.

        A block whose norm is no number of float32 is none in the packet, either.
        """
        rows, dim = v.shape
        blocks = self.blocks(sizes)
        wide, drawn = v.numpy().astype(np.float64), rng.uniform(purpose, dim).cpu().numpy()
        factor = 1.0 / (1.0 + self.omega(max(blocks))) if self.scaled else 1.0
        levels, norms, dense, begin = np.zeros((rows, dim), np.int64), [], np.zeros((rows, dim)), 0
        for size in blocks:
            part = slice(begin, begin + size)
            norm = _rounded_up(self._norms(wide[:, part]))
            known = np.isfinite(norm)[:, None]
            scale = np.where(known & (norm[:, None] > 0), norm[:, None], 1.0).astype(np.float64)
            exact = np.abs(np.where(known, wide[:, part], 0.0)) * (self.levels / scale)
            up = np.minimum(np.floor(exact + drawn[:, part]), self.levels)
            levels[:, part] = np.where(wide[:, part] < 0, -up, up)
            dense[:, part] = of_levels(levels[:, part], norm[:, None], self.levels, factor)
            norms.append(norm)
            begin += size
        packed = torch.from_numpy(dense).to(v.dtype)
        return LevelsPacket(packed, levels, np.stack(norms, axis=1), self.levels, blocks, factor)

    def _norms(self, part: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(over="ignore"):
            return np.abs(part).max(axis=1) if self.largest else np.sqrt(squared_norms(part))


@dataclass(frozen=True)
class QSGD(_Levels):
    """Levels of the Euclidean norm (Alistarh et al. 2017): unbiased, `omega = min(d/s^2, sqrt(d)/s)`."""

    kind: ClassVar[str] = "qsgd"
    largest: ClassVar[bool] = False

    def omega(self, dim: int) -> float:
        """Return `min(d/s^2, sqrt(d)/s)`."""
        return min(dim / self.levels**2, math.sqrt(dim) / self.levels)


@dataclass(frozen=True)
class Uniform(_Levels):
    """Levels of the largest magnitude: unbiased, `omega = d/(4 s^2)` per block."""

    kind: ClassVar[str] = "uniform"
    largest: ClassVar[bool] = True

    def omega(self, dim: int) -> float:
        """Return `d / (4 s^2)`: the variance of a coordinate is at most `(norm/s)^2 / 4`, and `norm <= ||v||`."""
        return dim / (4 * self.levels**2)


@dataclass(frozen=True)
class Natural(Compressor):
    """Powers of two, rounded at random (Horvath et al. 2022): unbiased, omega = 1/8, 9 bits a number.

    Below 2^-126 a number becomes 0 or 2^-126; above 2^127 it is cut; what is not finite becomes no number.
    """

    kind: ClassVar[str] = "natural"

    def quality(self, sizes: Sequence[int]) -> Quality:
        """Return omega = 1/8."""
        return Quality(None, 0.125)

    def compress(self, v: torch.Tensor, rng: Draws, purpose: str, sizes: Sequence[int]) -> Body:
        """Round `2^e (1 + m)` up with probability m."""
        wide, drawn = v.numpy().astype(np.float64), rng.uniform(purpose, v.shape[1]).cpu().numpy()
        mantissa, exponent = np.frexp(np.abs(wide))
        exponent = exponent - 1 + (drawn < 2.0 * mantissa - 1.0)
        tiny = np.abs(wide) < 2.0**LEAST_EXPONENT
        small = drawn * 2.0**LEAST_EXPONENT < np.abs(wide)
        codes = np.where(tiny, small.astype(np.int64), np.minimum(exponent, 127) + 127)
        codes = np.where(np.isfinite(wide), codes, NO_NUMBER).astype(np.uint8)
        negative = wide < 0
        return PowersPacket(torch.from_numpy(of_powers(codes, negative)).to(v.dtype), codes, negative)


@dataclass(frozen=True)
class Sign(Compressor):
    """Signs times the mean magnitude: `delta = ||v||_1^2 / (d ||v||_2^2)`, at least 1/d."""

    kind: ClassVar[str] = "sign"
    scope: Scope = "flat"

    def quality(self, sizes: Sequence[int]) -> Quality:
        """Return 1/d of the largest tensor."""
        return Quality(1.0 / (sum(sizes) if self.scope == "flat" else max(sizes)), None)

    def compress(self, v: torch.Tensor, rng: Draws, purpose: str, sizes: Sequence[int]) -> Body:
        """Take the signs, and the mean magnitude of the row or of each tensor."""
        wide, begin, scales = v.numpy().astype(np.float64), 0, []
        used = (sum(sizes),) if self.scope == "flat" else tuple(sizes)
        for size in used:
            part = np.ascontiguousarray(np.abs(wide[:, begin : begin + size]))
            with np.errstate(over="ignore"):  # beyond float32: infinite, which is seen
                scales.append((sums(part) / size).astype(np.float32))
            begin += size
        negative, scale = wide < 0, np.stack(scales, axis=1)
        repeated = np.repeat(scale, used, axis=1).astype(np.float64)
        return SignPacket(torch.from_numpy(np.where(negative, -repeated, repeated)).to(v.dtype), negative, scale, used)


def _rounded_up(norm: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return float32 numbers that are not smaller, so that no level passes s."""
    with np.errstate(over="ignore"):
        short = norm.astype(np.float32)
    return np.where(short < norm, np.nextafter(short, np.float32(np.inf)), short)


def compressed(who: Compressor, v: torch.Tensor, rng: Draws, purpose: str, sizes: Sequence[int]) -> Body:
    """Return the packet of `v [rows, dim]`, wherever v lies; codecs are the CPU's."""
    packet = who.compress(v.cpu(), rng, purpose, sizes)
    return packet if v.device.type == "cpu" else MovedPacket(packet.dense.to(v.device), packet)


def build(section: Mapping[str, Any] | str, where: str, base: Path | None = None) -> Compressor:
    """Return the compressor of a scenario's `{kind, ...}` (or a kind alone).

    Raises:
        InputError: an unknown kind or key, or a value out of range; `where` names the key.
    """
    from pydantic import TypeAdapter, ValidationError

    from fedsim import registry
    from fedsim.errors import did_you_mean

    values = {"kind": section} if isinstance(section, str) else dict(section)
    cls = registry.find("compressor", str(values.pop("kind", None)), base or Path())
    known = [f.name for f in fields(cls)]
    for name in values:
        if name not in known:
            hint = did_you_mean(name, known)
            raise InputError(f"{where}.{name}: unknown key{hint}; known: {', '.join(known) or 'none'}")
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{where}.{'.'.join(map(str, first['loc'][:1]))}: {first['msg']}") from None
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
