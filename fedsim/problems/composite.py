"""Composite terms `r(x)`: value, prox in closed form, weak-convexity constant.

`prox(v, step) = argmin_x r(x) + ||x - v||^2 / (2 step)` per row of `v [rows, dim]`; zeros are exact (and +0.0).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from fedsim.errors import InputError

if TYPE_CHECKING:
    import torch

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Term(ABC):
    """Base of all terms; a user's own is a frozen dataclass with these methods.

    Attributes:
        weak_convexity: rho >= 0 such that `r + (rho/2) ||.||^2` is convex; a prox needs `step < 1 / rho`.
        convex: whether `rho = 0`.
    """

    weak_convexity: float = 0.0

    @property
    def convex(self) -> bool:
        """Whether the term is convex."""
        return self.weak_convexity == 0.0

    @abstractmethod
    def value(self, x: torch.Tensor) -> torch.Tensor:
        """Return `r(x_i)` of every row, `[rows]`."""

    @abstractmethod
    def prox(self, v: torch.Tensor, step: float) -> torch.Tensor:
        """Return the prox of every row, `[rows, dim]`."""


def soft(v: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return `sign(v) max(|v| - threshold, 0)`; zeros are +0.0, what is no number stays none."""
    import torch

    shrunk = torch.sign(v) * (v.abs() - threshold)
    return torch.where(v.abs() <= threshold, torch.zeros_like(v), shrunk)


@dataclass(frozen=True)
class Nothing(Term):
    """`r = 0`."""

    kind: ClassVar[str] = "none"

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """Return zeros."""
        return x.new_zeros(len(x))

    def prox(self, v: torch.Tensor, step: float) -> torch.Tensor:
        """Return v."""
        return v


@dataclass(frozen=True)
class L1(Term):
    """`weight ||x||_1`."""

    kind: ClassVar[str] = "l1"
    weight: Weight

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """Return the weighted norm."""
        return self.weight * row_sums(x.abs())

    def prox(self, v: torch.Tensor, step: float) -> torch.Tensor:
        """Soft threshold at `step * weight`."""
        return soft(v, step * self.weight)


@dataclass(frozen=True)
class ElasticNet(Term):
    """`l1 ||x||_1 + (l2/2) ||x||^2`."""

    kind: ClassVar[str] = "elastic_net"
    l1: Weight
    l2: Weight

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """Return both norms' sum."""
        return self.l1 * row_sums(x.abs()) + 0.5 * self.l2 * row_sums(x * x)

    def prox(self, v: torch.Tensor, step: float) -> torch.Tensor:
        """Soft threshold, then shrink by `1 / (1 + step l2)`."""
        return soft(v, step * self.l1) / (1.0 + step * self.l2)


@dataclass(frozen=True)
class GroupLasso(Term):
    """`weight sum_g sqrt(size) ||x_g||_2` over consecutive groups of `size` coordinates (the last may be smaller)."""

    kind: ClassVar[str] = "group_lasso"
    weight: Weight
    size: Annotated[int, Field(ge=1)]

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of norms."""
        return self.weight * sum((root * norm for _, root, norm in self._groups(x)), start=x.new_zeros(len(x)))

    def prox(self, v: torch.Tensor, step: float) -> torch.Tensor:
        """Shrink every group's norm by `step weight sqrt(size)`; a shorter group becomes 0."""
        import torch

        out = torch.empty_like(v)
        for columns, root, norm in self._groups(v):
            limit = step * self.weight * root
            kept = ~(norm <= limit)  # a norm that is no number is kept: it must be seen
            factor = torch.where(kept, 1.0 - limit / torch.where(kept, norm, torch.ones_like(norm)), 0.0)[:, None]
            out[:, columns] = torch.where(kept[:, None], v[:, columns] * factor.to(v.dtype), torch.zeros_like(factor))
        return out

    def _groups(self, x: torch.Tensor) -> list[tuple[slice, float, torch.Tensor]]:
        groups = []
        for first in range(0, x.shape[1], self.size):
            columns = slice(first, min(first + self.size, x.shape[1]))
            part = x[:, columns]
            groups.append((columns, part.shape[1] ** 0.5, row_sums(part * part).sqrt()))
        return groups


@dataclass(frozen=True)
class MCP(Term):
    """Minimax concave penalty: per coordinate `weight a - a^2/(2 g)` for `a = |x| <= g weight`, else `g weight^2/2`."""

    kind: ClassVar[str] = "mcp"
    weight: Positive
    g: Positive

    @property
    def weak_convexity(self) -> float:  # pyright: ignore
        """`1 / g`."""
        return 1.0 / self.g

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum over coordinates."""
        import torch

        a = x.abs()
        flat = torch.full_like(a, 0.5 * self.g * self.weight**2)
        return row_sums(torch.where(a <= self.g * self.weight, self.weight * a - a * a / (2 * self.g), flat))

    def prox(self, v: torch.Tensor, step: float) -> torch.Tensor:
        """`soft(v, step weight) / (1 - step/g)` up to `g weight`, then v; needs `step < g`."""
        import torch

        _refuse_step(step, self.g, "mcp", "g")
        inner = soft(v, step * self.weight) / (1.0 - step / self.g)
        return torch.where(v.abs() <= self.g * self.weight, inner, v)


@dataclass(frozen=True)
class SCAD(Term):
    """Smoothly clipped absolute deviation (Fan and Li 2001), `a > 2`."""

    kind: ClassVar[str] = "scad"
    weight: Positive
    a: Annotated[float, Field(gt=2, allow_inf_nan=False)] = 3.7

    @property
    def weak_convexity(self) -> float:  # pyright: ignore
        """`1 / (a - 1)`."""
        return 1.0 / (self.a - 1.0)

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum over coordinates."""
        import torch

        w, a, t = self.weight, self.a, x.abs()
        middle = (2 * a * w * t - t * t - w * w) / (2 * (a - 1))
        flat = torch.full_like(t, 0.5 * (a + 1) * w * w)
        return row_sums(torch.where(t <= w, w * t, torch.where(t <= a * w, middle, flat)))

    def prox(self, v: torch.Tensor, step: float) -> torch.Tensor:
        """Three pieces by |v|: soft threshold, linear, identity; needs `step < a - 1`."""
        import torch

        w, a = self.weight, self.a
        _refuse_step(step, a - 1.0, "scad", "a - 1")
        middle = ((a - 1) * v - torch.sign(v) * step * a * w) / (a - 1 - step)
        outer = torch.where(v.abs() <= a * w, middle, v)
        return torch.where(v.abs() <= (1.0 + step) * w, soft(v, step * w), outer)


@dataclass(frozen=True)
class Box(Term):
    """0 where `low <= x <= high` in every coordinate, else infinity."""

    kind: ClassVar[str] = "box"
    low: float
    high: float

    def __post_init__(self) -> None:
        """Refuse an empty box."""
        if not self.low < self.high:
            raise InputError(f"low = {self.low} and high = {self.high} given; low < high needed")

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """Return 0 inside (to rounding), infinity outside."""
        low, high = (bound + side * rounding(x) * abs(bound) for bound, side in ((self.low, -1), (self.high, 1)))
        return _indicator(((x >= low) & (x <= high)).all(dim=1), x)

    def prox(self, v: torch.Tensor, step: float) -> torch.Tensor:
        """Clip; the step does not matter."""
        return v.clamp(self.low, self.high) + 0.0  # zeros are +0.0


@dataclass(frozen=True)
class NonNegative(Term):
    """0 where every coordinate is at least 0, else infinity."""

    kind: ClassVar[str] = "non_negative"

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """Return 0 inside, infinity outside."""
        return _indicator((x >= 0.0).all(dim=1), x)

    def prox(self, v: torch.Tensor, step: float) -> torch.Tensor:
        """Return `max(v, 0)`."""
        return soft(v.clamp(min=0.0), 0.0)


@dataclass(frozen=True)
class Ball(Term):
    """0 where `||x||_2 <= radius`, else infinity."""

    kind: ClassVar[str] = "ball"
    radius: Positive

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """Return 0 inside (to rounding), infinity outside."""
        return _indicator(row_sums(x * x).sqrt() <= self.radius * (1.0 + rounding(x)), x)

    def prox(self, v: torch.Tensor, step: float) -> torch.Tensor:
        """Return `v min(1, radius / ||v||)`."""
        import torch

        norm = row_sums(v * v).sqrt()
        inside = norm <= self.radius
        factor = torch.where(inside, torch.ones_like(norm), self.radius / torch.where(inside, 1.0, norm))
        return v * factor[:, None].to(v.dtype) + 0.0


class OnTensors(Term):
    """A term of some of a model's tensors, the others being free: `parameters` of a scenario's `problem.composite`.

    Args:
        term: of the chosen coordinates, one after another.
        patterns: names of tensors, with `*` for anything: `("*weight",)` leaves biases out.
        names, sizes: of all tensors of a model, in order.

    Raises:
        InputError: a pattern that names no tensor.
    """

    def __init__(self, term: Term, patterns: Sequence[str], names: Sequence[str], sizes: Sequence[int]) -> None:
        import torch

        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise InputError(f"problem.composite.parameters: {pattern!r} names none of {', '.join(names)}")
        self.term, self.patterns, self.weak_convexity = term, tuple(patterns), term.weak_convexity
        taken = [any(fnmatchcase(name, pattern) for pattern in patterns) for name in names]
        self._places = torch.repeat_interleave(torch.tensor(taken), torch.tensor(list(sizes))).nonzero()[:, 0]

    def __repr__(self) -> str:
        return f"{self.term!r} on {', '.join(self.patterns)}"

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """Return the term's value at the chosen coordinates."""
        return self.term.value(x[:, self._places])

    def prox(self, v: torch.Tensor, step: float) -> torch.Tensor:
        """Return the term's prox at the chosen coordinates, v at the others."""
        out = v.clone()
        out[:, self._places] = self.term.prox(v[:, self._places], step)
        return out


def rounding(x: torch.Tensor) -> float:
    """Return what sums and means of x may be off by, relative: means of points on a constraint's edge are feasible."""
    import torch

    return 64 * torch.finfo(x.dtype).eps


def row_sums(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of each row, `[rows]`; torch is loaded by the first one."""
    from fedsim.problems import rows

    return rows.row_sums(values)


def build(section: Mapping[str, Any], base: Path) -> Term:
    """Return the term of a scenario's `problem.composite`.

    Raises:
        InputError: an unknown kind or key, or a value out of range.
    """
    from pydantic import TypeAdapter, ValidationError

    from fedsim import registry
    from fedsim.errors import did_you_mean

    values = dict(section)
    cls = registry.find("composite", str(values.pop("kind", None)), base)
    known = [f.name for f in fields(cls)]
    for name in values:
        if name not in known:
            hint = did_you_mean(name, known)
            raise InputError(f"problem.composite.{name}: unknown key{hint}; known: {', '.join(known)}")
    try:
        term = TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"problem.composite.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if not isinstance(term, Term):
        raise InputError(f"problem.composite.kind: {section['kind']}: a fedsim.problems.composite.Term is needed")
    return term


def _indicator(inside: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.where(inside, x.new_zeros(len(x)), torch.inf)


def _refuse_step(step: float, limit: float, kind: str, name: str) -> None:
    if step >= limit:
        raise InputError(f"problem.composite: the prox of {kind} needs a step below {name} = {limit:g}; {step:g} given")
