"""What several runs on the same data spend together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fedsim.errors import InputError
from fedsim.privacy.gaussian import epsilon_of
from fedsim.privacy.ledger import FILE, Entry, Ledger, read, whole
from fedsim.privacy.sampled import epsilon_of_events

SAME = ("unit", "relation", "delta")


def refuse_mixtures(sections: Iterable[tuple[str, dict[str, Any] | None]]) -> None:
    """Refuse a study whose runs promise different things: their epsilons could not be compared, or added.

    Args:
        sections: (name of the run, its privacy section with defaults, or None).

    Raises:
        InputError: says which runs differ in what.
    """
    promised = [(name, section) for name, section in sections if section is not None]
    for name, section in promised[1:]:
        for key in SAME:
            first, there = promised[0]
            if section[key] != there[key]:
                raise InputError(
                    f"privacy.{key}: {there[key]!r} in {first}, {section[key]!r} in {name}; runs of one study must"
                    " promise the same, or their epsilons can be neither compared nor added"
                )


def composed(folders: Sequence[Path]) -> dict[str, Any] | None:
    """Return the epsilon of all private runs together, for the record (or worker) that each exposes most.

    None where no run is private. A run without a privacy section protects nothing: then all together do not either.
    """
    texts = [(folder / FILE).read_text() for folder in folders if (folder / FILE).exists()]
    found = [read(text) for text in texts if whole(text)]  # else ended before its first release
    if not found:
        return None
    head = found[0][0]
    events: dict[tuple[float, float], int] = {}
    for header, entries in found:
        for z, rate, count in _worst(header, entries):
            events[z, rate] = events.get((z, rate), 0) + count
    spent = _price(events, head)
    return {
        "unit": head["unit"],
        "relation": head["relation"],
        "delta": head["delta"],
        "runs": len(found),
        "unprotected_runs": len(folders) - len(found),
        "epsilon_of_private_runs": spent,
        "epsilon": spent if len(found) == len(folders) else math.inf,
        "note": "all runs used the same data: together they spend this, at the same delta",
    }


def _worst(header: dict[str, Any], entries: Sequence[Entry]) -> list[tuple[float, float, int]]:
    """Return the events of a unit that is in everything at its run's largest exposure (workers differ between runs)."""
    ledger = Ledger(header["delta"], header["relation"], header["exposure"])
    ledger.write(entries)
    return ledger.bound()


def _price(events: dict[tuple[float, float], int], head: dict[str, Any]) -> float:
    whole = tuple((z, rate, count) for (z, rate), count in sorted(events.items()))
    if all(rate == 1 for _, rate, _ in whole):
        return epsilon_of(math.sqrt(sum(count / z**2 for z, _, count in whole)), head["delta"])
    return epsilon_of_events(whole, head["delta"], head["relation"])
