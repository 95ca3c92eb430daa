"""What a number of processes would hold and send, before any is started: `fedsim check --ranks 4`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.algorithms.algorithm import SyncAlgorithm
from fedsim.engine.layout import Layout

if TYPE_CHECKING:
    from fedsim.prepare import Prepared

# What pays was measured with 2 processes on 2 cores, n = 2000, dim = 1000 (benchmarks/transport.py).
PAYS, MAY_PAY = 0.25, 1.0  # share of rows (or of events) that travels: below the first it pays, above the second not
MESSAGE = 20e-6  # seconds that one message between two processes takes at least
MOVED = 5e9  # bytes of rows that one process mixes or updates in a second


def spread(p: Prepared, ranks: int) -> dict[str, Any]:
    """Return, for so many ranks, each one's rows, neighbour ranks and messages, and whether they can pay.

    Rounds: `sent` rows leave a rank in every mixing. Events: `sent` exchanges per unit of time cross to other ranks.

    Raises:
        InputError: there are more ranks than nodes.
    """
    layout = Layout(p.topology, 0, ranks)
    ends = p.topology.position[p.topology.edges]
    owner = layout.owner(ends)
    cut = owner[:, 0] != owner[:, 1]
    crossing = np.concatenate([np.c_[ends[cut, 0], owner[cut]], np.c_[ends[cut, 1], owner[cut][:, ::-1]]])
    once = np.unique(crossing, axis=0) if len(crossing) else np.empty((0, 3), np.int64)
    pairs = np.unique(once[:, 1:], axis=0)
    rows = np.diff(layout.ranges)
    rounds = isinstance(p.algorithm, SyncAlgorithm)
    sent, own = (np.bincount(once[:, 1], minlength=ranks), rows) if rounds else _exchanges(p, owner, cut, rows)
    share = float(np.max(sent / np.maximum(own, 1e-300)))
    return {
        "ranks": ranks,
        "rows": rows.tolist(),
        "neighbours": np.bincount(pairs[:, 0], minlength=ranks).tolist(),
        "sent": sent.tolist(),
        "per": "mixing" if rounds else "unit of time",
        "share": share,
        "verdict": _verdict(share, int(rows.max()) * p.problem.dim * 8, rounds),
    }


def _exchanges(p: Prepared, owner: np.ndarray, cut: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each rank's exchanges with other ranks, and all its events, per unit of time."""
    assert p.rates is not None
    rates, ranks = p.rates.rates, len(rows)
    far = sum(np.bincount(owner[cut, side], weights=rates[cut], minlength=ranks) for side in (0, 1))
    near = np.bincount(owner[~cut, 0], weights=rates[~cut], minlength=ranks)
    return np.asarray(far), rows + near + far


def _verdict(share: float, size: int, rounds: bool) -> str:
    what = "rows" if rounds else "events"
    if rounds and size / MOVED < MESSAGE:
        return f"cannot pay: one process mixes these rows in {size / MOVED * 1e6:.2g} us, less than a message takes"
    limit = PAYS if rounds else PAYS / 2
    if share <= limit:
        return f"pays where cores are free: {100 * share:.2g} % of a rank's {what} involve another one"
    if share <= MAY_PAY and rounds:
        return f"may pay a little: {100 * share:.2g} % of a rank's rows travel; a topology with a smaller cut pays more"
    if share <= 4 * limit:
        return f"may pay for long rows or slow gradients: {100 * share:.2g} % of a rank's events involve another one"
    return f"is unlikely to pay: {100 * share:.3g} % of a rank's {what} travel"


def as_lines(facts: dict[str, Any]) -> list[str]:
    """Return the table; beyond 16 ranks the least and the most of each column."""
    columns = [facts["rows"], facts["neighbours"], facts["sent"]]
    names = [str(rank) for rank in range(facts["ranks"])]
    if facts["ranks"] > 16:
        columns, names = [[min(c), max(c)] for c in columns], ["least", "most"]
    what = "rows sent" if facts["per"] == "mixing" else "exchanges with others"
    head = f"  {'rank':<6}{'rows':>10}{'neighbours':>12}  {what} per {facts['per']}"
    table = [f"  {n:<6}{a:>10}{b:>12}  {c:>{len(what)}.6g}" for n, a, b, c in zip(names, *columns, strict=True)]
    return [head, *table, f"  {facts['ranks']} ranks: {facts['verdict']}"]
