"""Files of gossip rates: a table `u,v,rate`, or the `rates` list of a topology's YAML."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import InputError
from fedsim.topology import files
from fedsim.topology.spectral import check_rates
from fedsim.topology.topology import Topology

Vector = NDArray[np.float64]


def read_rates(file: str, topology: Topology, base: Path | None = None) -> Vector:
    """Read rates `[m]` from a table `node,node,rate` (node names of the topology), or a YAML's `rates` list.

    Raises:
        InputError: a missing, repeated or unknown edge, a rate that is negative or not a number.
    """
    place = files.find(file, base or Path.cwd())
    if place is None:
        raise InputError(f"rates: no file {file!r}")
    if place.suffix in (".yaml", ".yml"):
        return _listed_rates(place, topology)
    number = {str(topology.label(i)): i for i in range(topology.n)}
    edge = {(int(u), int(v)): e for e, (u, v) in enumerate(topology.edges)}
    rates = np.full(topology.m, np.nan)
    for line, (first, second, text) in files.rows(place, 3, 3):
        if (first, second, text) == ("u", "v", "rate"):
            continue
        ends = sorted((number.get(first, -1), number.get(second, -1)))
        e = edge.get((ends[0], ends[1]))
        if e is None:
            raise InputError(f"{place.name}:{line}: {topology.name!r} has no edge ({first}, {second})")
        if not np.isnan(rates[e]):
            raise InputError(f"{place.name}:{line}: edge ({first}, {second}) is given twice")
        rates[e] = _number(place, line, text)
    missing = np.flatnonzero(np.isnan(rates))
    if len(missing):
        u, v = (topology.label(int(i)) for i in topology.edges[missing[0]])
        raise InputError(f"{place.name}: the rate of edge ({u}, {v}) is missing ({len(missing)} missing in all)")
    check_rates(topology, rates)
    return rates


def write_rates(place: Path, topology: Topology, rates: Vector) -> None:
    """Write a table `u,v,rate` that `rates: {file: ...}` reads back bit for bit.

    Raises:
        InputError: the file cannot be written.
    """
    ends = [(topology.label(int(u)), topology.label(int(v))) for u, v in topology.edges]
    lines = [f"{files.quoted(u)},{files.quoted(v)},{rate!r}" for (u, v), rate in zip(ends, rates.tolist(), strict=True)]
    try:
        place.write_text("\n".join(["u,v,rate", *lines]) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"rates: cannot write {str(place)!r}: {error.strerror}") from None


def _listed_rates(place: Path, topology: Topology) -> Vector:
    content = files.load_yaml(place)
    given = content.get("rates")
    labels, pairs = files.listed_edges(place, content) if isinstance(given, list) else ([], [])
    if not isinstance(given, list) or len(given) != len(pairs):
        raise InputError(f"{place.name}: 'rates' must list one number per entry of 'edges'")
    ends = np.sort(np.array(pairs).reshape(-1, 2), axis=1)
    by_row = np.lexsort((ends[:, 1], ends[:, 0]))
    if labels != [topology.label(i) for i in range(topology.n)] or not np.array_equal(ends[by_row], topology.edges):
        raise InputError(f"{place.name}: its edges are not those of {topology.name!r}")
    rates = np.array([_number(place, None, str(r)) for r in given])[by_row]
    check_rates(topology, rates)
    return rates


def _number(place: Path, line: int | None, text: str) -> float:
    where = place.name if line is None else f"{place.name}:{line}"
    try:
        rate = float(text)
    except ValueError:
        rate = float("nan")
    if not (np.isfinite(rate) and rate >= 0):
        raise InputError(f"{where}: a rate must be a number >= 0, got {text!r}")
    return rate
