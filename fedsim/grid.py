"""Axes of a sweep, and the grid that they span."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fedsim.errors import InputError
from fedsim.reading import read_value

Axes = dict[str, tuple[Any, ...]]
Cell = dict[str, Any]


def axes_of(section: Mapping[str, Any]) -> Axes:
    """Return the values of every swept key, in the order of the file.

    Each is a list, or `{log: [a, b, n]}`: n values from a to b, evenly spaced in the logarithm, both ends included.

    Raises:
        InputError: neither, no value, a value twice, or a range that is none; names the key.
    """
    return {str(key): _values(str(key), given) for key, given in section.items()}


def cells_of(axes: Axes) -> list[Cell]:
    """Return every point of the grid; the last axis runs fastest. No axes: one empty cell."""
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def label(variant: str | None, cell: Cell, axes: Axes) -> str | None:
    """Return what tables and figures call a cell: the variant and each value that it does not share with all others."""
    swept = [key for key in cell if len(axes[key]) > 1]
    short = {key: key.rpartition(".")[2] for key in swept}
    names = {key: name if list(short.values()).count(name) == 1 else key for key, name in short.items()}
    values = [f"{names[key]}={_told_apart(cell[key], axes[key])}" for key in swept]
    return ", ".join([*([variant] if variant else []), *values]) or None


def _told_apart(value: Any, among: tuple[Any, ...]) -> str:
    """Return a value in as few digits as tell it from the others of its axis."""
    for digits in (4, 8, 12):
        texts = [f"{v:.{digits}g}" if isinstance(v, float) else written(v) for v in among]
        if len(set(texts)) == len(among):
            return texts[among.index(value)]
    return repr(value)


def written(value: Any) -> str:
    """Return a value as a person writes it."""
    if isinstance(value, float):
        return f"{value:.12g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def edges(cell: Cell, axes: Axes) -> list[str]:
    """Say on which axes of numbers a cell lies at an end: the true optimum may lie beyond."""
    found = []
    for key, value in cell.items():
        numbers = sorted(v for v in axes[key] if isinstance(v, int | float) and not isinstance(v, bool))
        if len(numbers) < max(2, len(axes[key])):
            continue
        if value in (numbers[0], numbers[-1]):
            found.append(f"{key} at its {'lower' if value == numbers[0] else 'upper'} end {written(value)}")
    return found


def from_command_line(texts: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Part `KEY=VALUE` overrides from axes: `KEY=a,b,c` (commas outside of brackets) or `KEY=log:a,b,n`."""
    overrides, axes = [], {}
    for text in texts:
        key, _, value = text.partition("=")
        parts = re.split(r",(?![^\[{]*[\]}])", value)
        if value.startswith("log:"):
            axes[key] = {"log": [read_value(part) for part in value[4:].split(",")]}
        elif len(parts) > 1:
            axes[key] = [read_value(part) for part in parts]
        else:
            overrides.append(text)
    return overrides, axes


def _values(key: str, given: Any) -> tuple[Any, ...]:
    if isinstance(given, Mapping):
        return _log_range(key, given)
    if not isinstance(given, list):
        raise InputError(f"{key}: {given!r} given; a list of values or log: [a, b, n] is needed")
    if not given:
        raise InputError(f"{key}: an empty list; at least one value is needed")
    if any(given.index(value) < place for place, value in enumerate(given)):
        raise InputError(f"{key}: {given} holds a value twice; its runs would be the same")
    return tuple(given)


def _log_range(key: str, given: Mapping[str, Any]) -> tuple[float, ...]:
    found = given.get("log") if set(given) == {"log"} else None
    parts: list[Any] = found if isinstance(found, list) else []
    if len(parts) != 3 or not all(isinstance(p, int | float) and not isinstance(p, bool) for p in parts):
        raise InputError(f"{key}: {dict(given)} given; log: [a, b, n] with three numbers is needed")
    first, last, count = parts
    if not (0 < first < math.inf and 0 < last < math.inf and first != last and count >= 2 and count == int(count)):
        raise InputError(f"{key}: log: {parts} given; two numbers above 0 that differ and a count of 2 or more needed")
    steps = int(count) - 1
    # Rounded to 12 digits, so that 0.1 is written 0.1; ends are kept as they are.
    inner = [float(f"{first * (last / first) ** (k / steps):.12g}") for k in range(1, steps)]
    return (float(first), *inner, float(last))
