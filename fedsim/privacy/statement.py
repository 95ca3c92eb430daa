"""What a private result says of itself, in words."""

from __future__ import annotations

import math
from typing import Any

MEANING = {
    "replace_one": "is replaced by another",
    "zero_out": "contributes nothing",
    "add_remove": "is there or not",
}


def statement(facts: dict[str, Any]) -> list[str]:
    """Return lines for a terminal from the facts of a run, or of a study; none where nothing is private."""
    p = facts.get("privacy")
    if not p:
        return []
    if "runs" in p:
        lines = [
            f"privacy  {p['runs']} private runs on the same data spend {_pair(p, 'epsilon_of_private_runs')} together"
        ]
        if p["unprotected_runs"]:
            lines.append(f"         and {p['unprotected_runs']} runs protect nothing, so all together do not either")
        return lines
    server = "the server is trusted" if math.isinf(p["epsilon_server"]) else "the server included"
    return [
        f"privacy  {_pair(p, 'epsilon')}, when one {p['unit']} {MEANING[p['relation']]}, against all who see what is"
        f" broadcast, {server} ({p['trust']})",
        f"         noise {p['noise']}",
        "         not covered: metrics on the data, scaling by exact statistics, the choice of hyper-parameters",
    ]


def _pair(p: dict[str, Any], key: str) -> str:
    return f"({p[key]:.4g}, {p['delta']:g})-DP"
