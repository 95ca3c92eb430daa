"""A comparison as Markdown, LaTeX (booktabs) or CSV."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

Format = Literal["markdown", "csv", "latex"]
BESIDE = ("reached", "ended", "diverged", "pairs")
PART = re.compile(r".*(_q1|_q3|_vs)$")


def written(frame: pd.DataFrame, format: Format = "markdown") -> str:
    """Return a table of `compare`: medians with quartiles, pairs below, and the notes; CSV has every column."""
    if format == "csv":
        return frame.to_csv()
    return markdown(frame) if format == "markdown" else latex(frame)


def markdown(frame: pd.DataFrame) -> str:
    """Return the table as Markdown; a variant that did not reach the goal says so: `not reached (n of m)`."""
    lines = [f"**{frame.attrs['question']}**", ""]
    for title, head, rows in tables(frame):
        lines += ["", f"*{title}*", ""] if title else []
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    notes = frame.attrs.get("notes", [])
    return "\n".join([*lines, *([""] if notes else []), *(f"- {note}" for note in notes)])


def latex(frame: pd.DataFrame) -> str:
    """Return `tabular` environments with booktabs rules; text is escaped, quartiles are set small."""
    lines = [f"% {frame.attrs['question']}; needs \\usepackage{{booktabs}}"]
    for title, head, rows in tables(frame):
        lines += [f"% {title}"] if title else []
        lines += [
            rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
            r"\toprule",
            _row(map(_escaped, head)),
            r"\midrule",
        ]
        lines += [_row([_escaped(row[0]), *(_small(_escaped(cell)) for cell in row[1:])]) for row in rows]
        lines += [r"\bottomrule", r"\end{tabular}"]
    notes = frame.attrs.get("notes", [])
    return "\n".join([*lines, *(f"\\par\\footnotesize {_escaped(note)}" for note in notes)])


def tables(frame: pd.DataFrame) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return (title, head, rows of text): the values, and where there are pairs what they give."""
    columns = [str(c) for c in frame.columns if not PART.match(str(c)) and c not in BESIDE and c != "runs"]
    rows = [[name, str(row["runs"]), *(cell(row, c) for c in columns)] for name, row in _rows(frame)]
    found = [("", ["variant", "runs", *columns], rows)]
    others = [(name, row) for name, row in _rows(frame) if name != frame.attrs["reference"]]
    if any(row["pairs"] > 1 for _, row in others):
        kind = "ratio to" if frame.attrs["paired"] == "ratio" else "difference to"
        title = f"{kind} {frame.attrs['reference']} on common seeds"
        rows = [[name, str(row["pairs"]), *(_spread(row, f"{c}_vs") for c in columns)] for name, row in others]
        found.append((title, ["variant", "pairs", *columns], rows))
    return found


def _rows(frame: pd.DataFrame) -> list[tuple[str, dict[str, Any]]]:
    return [(str(name), {str(c): value for c, value in row.items()}) for name, row in frame.to_dict("index").items()]


def cell(row: Mapping[str, Any], column: str) -> str:
    """Return a median with its quartiles, or in words why there is none: n of m runs are as it says."""
    runs, failed = int(row["runs"]), int(row.get("diverged", 0))
    text = _spread(row, column)
    if text != "-":
        return text
    if "reached" in row and row["reached"] < runs:
        also = f", {failed} diverged" if failed else ""
        return f"not reached ({runs - int(row['reached'])} of {runs}{also})"
    return f"diverged ({failed} of {runs})" if failed else "-"


def _spread(row: Mapping[str, Any], column: str) -> str:
    value, low, high = (float(row.get(name, np.nan)) for name in (column, f"{column}_q1", f"{column}_q3"))
    if np.isnan(value):
        return "-"
    return short(value) + ("" if low == high or np.isnan(low) else f" [{short(low)}, {short(high)}]")


def short(value: float) -> str:
    """Return a number as a table shows it: whole where it is large or whole, else three digits."""
    if np.isinf(value):
        return "infinite"
    whole = 1000 <= abs(value) < 1e15 or float(value).is_integer()
    return f"{value:,.0f}" if whole and abs(value) < 1e15 else f"{value:.3g}"


def _row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _small(text: str) -> str:
    value, bracket, rest = text.partition(" [")
    return rf"{value} {{\scriptsize [{rest}}}" if bracket else value


SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\N{DAGGER}": r"\dag{}"}


def _escaped(text: str) -> str:
    text = re.sub(r"[\\~^\N{DAGGER}]|[&%$#_{}]", lambda m: SPECIAL.get(m.group(), "\\" + m.group()), text)
    return text.replace("<=", r"$\le$").replace(">=", r"$\ge$").replace("<", r"$<$").replace(">", r"$>$")
