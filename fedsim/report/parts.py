"""What a report is made of: tables, pictures, and how values are written."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

NUMBER = re.compile(r"^([-+]?(\d|∞)|–$)")


@dataclass(frozen=True)
class Table:
    """Cells are plain text; the first column heads its row.

    Attributes:
        caption: what the table shows.
        columns: headings.
        rows: one list of cells per row.
        notes: lines under the table.
        prose: whether cells hold sentences, which wrap; numbers never do.
        words: columns that hold no numbers, even where they look like some.
    """

    caption: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    prose: bool = False
    words: tuple[str, ...] = ()

    def is_number(self, column: int, cell: str) -> bool:
        """Return whether a cell is set flush right."""
        return not self.prose and self.columns[column] not in self.words and bool(NUMBER.match(cell))

    def heads_numbers(self, column: int) -> bool:
        """Return whether the heading of a column is set flush right: all its cells are."""
        return column > 0 and bool(self.rows) and all(self.is_number(column, row[column]) for row in self.rows)


@dataclass(frozen=True)
class Picture:
    """A picture inside of the page.

    Attributes:
        uri: `data:` and the picture itself.
        alt: what it shows, for those who do not see it.
        caption: the line under it.
        wide: whether it takes the whole width of the page.
    """

    uri: str
    alt: str
    caption: str
    wide: bool = False


def text_of(value: Any) -> str:
    """Return a value as a person writes it: 1,234, 1.5e-07, yes, a, b."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        return ", ".join(text_of(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{name}: {text_of(v)}" for name, v in value.items())
    return str(value)


def number(value: float) -> str:
    """Return a number with as many digits as one reads; infinity and what is no number say so."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0 or (abs(value) >= 1000 and abs(value) < 1e15) or (value.is_integer() and abs(value) < 1000):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def spread(values: list[float]) -> str:
    """Return the median, and the quartiles where values differ."""
    import numpy as np

    low, middle, high = (float(v) for v in np.quantile(values, [0.25, 0.5, 0.75]))
    return number(middle) if low == high else f"{number(middle)} [{number(low)}, {number(high)}]"
