"""What travels: rows in compressed form, with an exact codec. `decode(encode(row))` gives `dense[row]` to the bit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Ints = NDArray[np.int64]
NO_NUMBER = 255  # the code of a power of two that is none


class Body(ABC):
    """Base of all packets; see `fedsim.algorithms.requests.Packet`.

    Attributes:
        dense: `[rows, dim]`, what sender and receivers compute with.
    """

    dense: torch.Tensor

    @abstractmethod
    def lengths(self) -> Ints:
        """Return the encoded length of each row in bytes, int64 `[rows]`."""

    @abstractmethod
    def encode(self, row: int) -> bytes:
        """Return the encoded body of one row."""

    @abstractmethod
    def decode(self, body: bytes) -> NDArray:
        """Return the row `[dim]` behind a body that a packet of the same compressor encoded."""


@dataclass(frozen=True, eq=False)
class DensePacket(Body):
    """Every number, in the width of `values [rows, dim]`."""

    dense: torch.Tensor
    values: torch.Tensor

    def lengths(self) -> Ints:
        """Return `dim` times the width."""
        return np.full(len(self.values), self.values.shape[1] * self.values.element_size())

    def encode(self, row: int) -> bytes:
        """Return the row's numbers."""
        return raw(self.values[row])

    def decode(self, body: bytes) -> NDArray:
        """Return the numbers in the state's type."""
        return numbers(body, self.values.dtype).to(self.dense.dtype).numpy()


@dataclass(frozen=True, eq=False)
class SparsePacket(Body):
    """Some entries: `values [rows, k]` at `places [rows, k]`, ascending.

    Places travel as a bitmap, or as gaps in base 128 where that is shorter; the length tells which.
    """

    dense: torch.Tensor
    values: torch.Tensor
    places: Ints

    def lengths(self) -> Ints:
        """Return values and the shorter of both forms of the places."""
        return self._values_size() + np.minimum(_gap_lengths(_gaps(self.places)).sum(axis=1), self._bitmap())

    def encode(self, row: int) -> bytes:
        """Return the places, then the values."""
        gaps = _gaps(self.places[row : row + 1])[0]
        if _gap_lengths(gaps).sum() < self._bitmap():
            support = _base_128(gaps)
        else:
            mask = np.zeros(self.dense.shape[1], np.uint8)
            mask[self.places[row]] = 1
            support = np.packbits(mask).tobytes()
        return support + raw(self.values[row])

    def decode(self, body: bytes) -> NDArray:
        """Return the row, 0 outside the places."""
        support, values = body[: -self._values_size()], body[-self._values_size() :]
        if len(support) == self._bitmap():
            places = np.flatnonzero(np.unpackbits(np.frombuffer(support, np.uint8), count=self.dense.shape[1]))
        else:
            places = np.cumsum(_from_base_128(support) + 1) - 1
        out = np.zeros(self.dense.shape[1], self.dense.numpy().dtype)
        out[places] = numbers(values, self.values.dtype).to(self.dense.dtype).numpy()
        return out

    def _values_size(self) -> int:
        return self.values.shape[1] * self.values.element_size()

    def _bitmap(self) -> int:
        return -(-self.dense.shape[1] // 8)


@dataclass(frozen=True, eq=False)
class SeededPacket(Body):
    """Entries at places that follow from a seed: `values [rows, k]`, `seeds [rows]`; 8 bytes instead of the places."""

    dense: torch.Tensor
    values: torch.Tensor
    seeds: Ints
    factor: float
    sizes: tuple[tuple[int, int], ...]

    def lengths(self) -> Ints:
        """Return values and the seed."""
        return np.full(len(self.values), 8 + self.values.shape[1] * self.values.element_size())

    def encode(self, row: int) -> bytes:
        """Return the seed, then the values."""
        return self.seeds[row : row + 1].tobytes() + raw(self.values[row])

    def decode(self, body: bytes) -> NDArray:
        """Return the row, 0 outside the places that the seed gives."""
        places = drawn_places(int(np.frombuffer(body[:8], np.int64)[0]), self.sizes)
        out = np.zeros(self.dense.shape[1], self.dense.numpy().dtype)
        out[places] = self.factor * numbers(body[8:], self.values.dtype).to(self.dense.dtype).numpy()
        return out


@dataclass(frozen=True, eq=False)
class LevelsPacket(Body):
    """Integer levels in -s..s `[rows, dim]` of one float32 norm per block `[rows, blocks]`, of these sizes."""

    dense: torch.Tensor
    levels: Ints
    norms: NDArray[np.float32]
    s: int
    sizes: tuple[int, ...]
    factor: float

    def lengths(self) -> Ints:
        """Return 4 bytes and the packed levels of every block."""
        return np.full(len(self.levels), sum(4 + packed_size(size, 2 * self.s + 1) for size in self.sizes))

    def encode(self, row: int) -> bytes:
        """Return norm and levels, block by block."""
        parts, begin = [], 0
        for place, size in enumerate(self.sizes):
            parts.append(self.norms[row, place].tobytes())
            parts.append(pack(self.levels[row, begin : begin + size] + self.s, 2 * self.s + 1))
            begin += size
        return b"".join(parts)

    def decode(self, body: bytes) -> NDArray:
        """Return `factor * norm * level / s`."""
        parts, at = [], 0
        for size in self.sizes:
            norm, width = np.frombuffer(body[at : at + 4], np.float32), packed_size(size, 2 * self.s + 1)
            levels = unpack(body[at + 4 : at + 4 + width], size, 2 * self.s + 1) - self.s
            parts.append(of_levels(levels, norm, self.s, self.factor))
            at += 4 + width
        return np.concatenate(parts).astype(self.dense.numpy().dtype)


@dataclass(frozen=True, eq=False)
class PowersPacket(Body):
    """Signs and exponents: `codes [rows, dim]` is 0 for 0, else exponent + 127 (255: no number); `negative`."""

    dense: torch.Tensor
    codes: NDArray[np.uint8]
    negative: NDArray[np.bool_]

    def lengths(self) -> Ints:
        """Return a byte and a bit for each number."""
        dim = self.codes.shape[1]
        return np.full(len(self.codes), dim + -(-dim // 8))

    def encode(self, row: int) -> bytes:
        """Return the exponents, then the signs."""
        return self.codes[row].tobytes() + np.packbits(self.negative[row]).tobytes()

    def decode(self, body: bytes) -> NDArray:
        """Return the signed powers of two."""
        dim = self.codes.shape[1]
        codes = np.frombuffer(body[:dim], np.uint8)
        negative = np.unpackbits(np.frombuffer(body[dim:], np.uint8), count=dim).astype(bool)
        return of_powers(codes, negative).astype(self.dense.numpy().dtype)


@dataclass(frozen=True, eq=False)
class SignPacket(Body):
    """One float32 scale per tensor `[rows, tensors]`, one bit a number `[rows, dim]`."""

    dense: torch.Tensor
    negative: NDArray[np.bool_]
    scales: NDArray[np.float32]
    sizes: tuple[int, ...]

    def lengths(self) -> Ints:
        """Return 4 bytes a tensor and a bit a number."""
        return np.full(len(self.negative), 4 * len(self.sizes) + -(-self.negative.shape[1] // 8))

    def encode(self, row: int) -> bytes:
        """Return the scales, then the signs."""
        return self.scales[row].tobytes() + np.packbits(self.negative[row]).tobytes()

    def decode(self, body: bytes) -> NDArray:
        """Return the scales with their signs."""
        head = 4 * len(self.sizes)
        negative = np.unpackbits(np.frombuffer(body[head:], np.uint8), count=sum(self.sizes)).astype(bool)
        scale = np.repeat(np.frombuffer(body[:head], np.float32), self.sizes)
        return np.where(negative, -scale, scale).astype(self.dense.numpy().dtype)


@dataclass(frozen=True, eq=False)
class MovedPacket(Body):
    """A packet whose `dense` values lie on another device than its codec's."""

    dense: torch.Tensor
    packet: Body

    def lengths(self) -> Ints:
        """Return those of the packet."""
        return self.packet.lengths()

    def encode(self, row: int) -> bytes:
        """Return the packet's body of one row."""
        return self.packet.encode(row)

    def decode(self, body: bytes) -> NDArray:
        """Return the row behind a body, in host memory."""
        return self.packet.decode(body)


def raw(values: torch.Tensor) -> bytes:
    """Return a row's memory."""
    return values.contiguous().view(torch.uint8).numpy().tobytes()


def numbers(body: bytes, dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers of a type that lie in a body."""
    return torch.frombuffer(bytearray(body), dtype=dtype) if body else torch.empty(0, dtype=dtype)


def packed_size(count: int, values: int) -> int:
    """Return the bytes of `count` numbers in 0..values-1, `ceil(log2(values))` bits each."""
    return -(-count * (values - 1).bit_length() // 8)


def pack(levels: Ints, values: int) -> bytes:
    """Return numbers in 0..values-1 as bits, most significant first."""
    width = (values - 1).bit_length()
    shifts = np.arange(width - 1, -1, -1)
    return np.packbits(((levels[:, None] >> shifts) & 1).astype(np.uint8).reshape(-1)).tobytes()


def unpack(body: bytes, count: int, values: int) -> Ints:
    """Return the numbers that `pack` made."""
    width = (values - 1).bit_length()
    bits = np.unpackbits(np.frombuffer(body, np.uint8), count=count * width).reshape(count, width).astype(np.int64)
    return (bits << np.arange(width - 1, -1, -1)).sum(axis=1)


def of_levels(levels: Ints, norm: NDArray[np.float32], s: int, factor: float) -> NDArray[np.float64]:
    """Return `factor * norm * level / s`; none where the norm is no number."""
    with np.errstate(invalid="ignore"):
        return levels * (factor * norm.astype(np.float64) / s)


def of_powers(codes: NDArray[np.uint8], negative: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return `+-2^(code - 127)`, 0 for code 0, no number for the last one."""
    size = np.where(codes == 0, 0.0, np.ldexp(1.0, codes.astype(np.int64) - 127))
    size = np.where(codes == NO_NUMBER, np.nan, size)
    return np.where(negative & (codes > 0), -size, size)


def drawn_places(seed: int, sizes: tuple[tuple[int, int], ...]) -> Ints:
    """Return k places out of each tensor's `(size, k)`, ascending, by a generator that this seed starts."""
    generator, parts, begin = np.random.Generator(np.random.Philox(key=seed)), [], 0
    for size, k in sizes:
        drawn = generator.random(size)
        parts.append(begin + np.sort(np.argpartition(drawn, k - 1)[:k]))
        begin += size
    return np.concatenate(parts)


def _gaps(places: Ints) -> Ints:
    return np.diff(places, axis=1, prepend=-1) - 1


def _gap_lengths(gaps: Ints) -> Ints:
    return sum(((gaps >> shift) > 0).astype(np.int64) for shift in (7, 14, 21, 28, 35)) + np.ones_like(gaps)


def _base_128(gaps: Ints) -> bytes:
    """Return the gaps seven bits a byte, least significant first; the high bit says that more follows."""
    lengths = _gap_lengths(gaps)
    first = np.cumsum(lengths) - lengths
    out = np.zeros(int(lengths.sum()), np.uint8)
    for place in range(int(lengths.max(initial=1))):
        has = lengths > place
        more = np.where(lengths[has] > place + 1, 128, 0)
        out[first[has] + place] = ((gaps[has] >> (7 * place)) & 127) | more
    return out.tobytes()


def _from_base_128(body: bytes) -> Ints:
    bytes_ = np.frombuffer(body, np.uint8).astype(np.int64)
    last = np.flatnonzero(bytes_ < 128)
    first = np.concatenate([[0], last[:-1] + 1])
    place = np.arange(len(bytes_)) - np.repeat(first, last - first + 1)
    return np.add.reduceat((bytes_ & 127) << (7 * place), first)
