"""Graph files: edge list, GraphML, GML, JSON node-link, adjacency `.npy`, and the project's own YAML."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.errors import InputError, did_you_mean
from fedsim.topology.topology import Order, Topology

YAML_KEYS = (
    "name",
    "description",
    "source",
    "kind",
    "n",
    "nodes",
    "edges",
    "positions",
    "costs",
    "rates",
    "order",
)


def read(file: str, base: Path, name: str | None = None, order: Order = "rcm") -> Topology:
    """Read a graph file; its ending says the format.

    `.txt .edges .edgelist .csv`: one edge per line, two node names and perhaps a cost, `#` starts a comment.
    `.graphml .gml .json` (node-link): as networkx writes them; an edge attribute `cost` is kept.
    `.npy`: a symmetric adjacency matrix of zeros and ones. `.yaml`: `kind` with parameters, or `nodes`/`n`,
    `edges` and perhaps `positions` and `costs`.

    Raises:
        InputError: no such file, an unknown ending, or a graph that cannot be used (says why).
    """
    place = find(file, base)
    if place is None:
        raise InputError(
            f"topology: no file {file!r} (looked in {', '.join(map(str, folders(base)))}){_near(file, base)}"
        )
    reader = READERS.get(place.suffix.lower())
    if reader is None:
        raise InputError(f"topology {place.name!r}: unknown ending; known are {', '.join(sorted(READERS))}")
    return reader(place, name or place.stem, order)


def find(file: str, base: Path) -> Path | None:
    """Return the file, or the shipped topology of that bare name, or None."""
    for folder in folders(base):
        for candidate in (folder / file, folder / f"{file}.yaml"):
            if candidate.is_file():
                return candidate
    return None


def folders(base: Path) -> list[Path]:
    """Return where a graph file is looked for, in order: `base`, then the shipped topologies."""
    package = Path(__file__).resolve().parents[1]
    shipped = [p for p in (package / "_topologies", package.parent / "topologies") if p.is_dir()]
    return [base, base / "topologies", *shipped]


def shipped() -> list[str]:
    """Return the bare names of the topologies that come with fedsim."""
    return sorted({p.stem for folder in folders(Path())[2:] for p in folder.glob("*.yaml")})


def load_yaml(place: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping."""
    import yaml

    try:
        content = yaml.safe_load(place.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"{place}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{place}: a mapping of keys is needed, got {type(content).__name__}")
    return content


def rows(place: Path, least: int, most: int) -> list[tuple[int, list[str]]]:
    """Return the (line number, fields) of a text table; fields are split at commas or white space."""
    table = []
    for number, line in enumerate(place.read_text().splitlines(), start=1):
        fields = line.split("#")[0].replace(",", " ").split()
        if not fields:
            continue
        if not least <= len(fields) <= most:
            raise InputError(f"{place.name}:{number}: {least} to {most} fields are needed, got {len(fields)}: {line!r}")
        table.append((number, fields))
    return table


def _near(file: str, base: Path) -> str:
    names = {p.name for folder in folders(base) if folder.is_dir() for p in folder.iterdir() if p.suffix in READERS}
    return did_you_mean(file, names)


def _edge_list(place: Path, name: str, order: Order) -> Topology:
    table = rows(place, 2, 3)
    if table and {len(fields) for _, fields in table} == {2, 3}:
        raise InputError(f"topology {name!r}: some lines have a cost and some do not; give all or none")
    names = sorted({f for _, fields in table for f in fields[:2]}, key=_natural)
    number = {label: i for i, label in enumerate(names)}
    pairs = [(number[fields[0]], number[fields[1]]) for _, fields in table]
    costs = [_cost(place, line, fields[2]) for line, fields in table if len(fields) == 3]
    return Topology.from_edges(
        name,
        len(names),
        np.asarray(pairs, dtype=np.int64),
        order=order,
        labels=None if names == [str(i) for i in range(len(names))] else tuple(names),
        costs=np.asarray(costs) if costs else None,
    )


def _natural(label: str) -> tuple[int, int, str]:
    return (0, int(label), "") if label.isdecimal() else (1, 0, label)


def _cost(place: Path, line: int, text: str) -> float:
    try:
        cost = float(text)
    except ValueError:
        cost = np.nan
    if not (np.isfinite(cost) and cost > 0):
        raise InputError(f"{place.name}:{line}: the cost of an edge must be a positive number, got {text!r}")
    return cost


def _networkx_file(reader: str) -> Callable[[Path, str, Order], Topology]:
    def load(place: Path, name: str, order: Order) -> Topology:
        import networkx as nx

        try:
            graph = getattr(nx, reader)(place)
        except Exception as error:  # networkx's readers raise nearly anything on a broken file
            raise InputError(f"topology {place.name!r}: networkx cannot read it: {error}") from None
        return _from_graph(graph, name, order)

    return load


def _node_link(place: Path, name: str, order: Order) -> Topology:
    import networkx as nx

    try:
        content = json.loads(place.read_text())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = nx.node_link_graph(content, edges="links" if "links" in content else "edges")
    except (ValueError, KeyError, TypeError, nx.NetworkXException) as error:
        raise InputError(f"topology {place.name!r}: not a JSON node-link graph: {error!r}") from None
    return _from_graph(graph, name, order)


def _from_graph(graph: Any, name: str, order: Order) -> Topology:
    topology = Topology.from_networkx(graph, name, order=order)
    _check_costs(name, topology)
    return topology


def _adjacency(place: Path, name: str, order: Order) -> Topology:
    try:
        matrix = np.load(place, allow_pickle=False)
    except (ValueError, OSError) as error:
        raise InputError(f"topology {place.name!r}: not a .npy array: {error}") from None
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise InputError(f"topology {place.name!r}: a square adjacency matrix is needed, got shape {matrix.shape}")
    if not np.isin(matrix, (0, 1)).all():
        raise InputError(f"topology {place.name!r}: entries must be 0 or 1; give costs or rates in their own file")
    if not np.array_equal(matrix, matrix.T):
        raise InputError(f"topology {place.name!r}: the matrix is not symmetric, so the graph is directed")
    return Topology.from_edges(name, len(matrix), np.argwhere(np.triu(matrix)), order=order)


def _yaml(place: Path, name: str, order: Order) -> Topology:
    content = load_yaml(place)
    title = str(content.get("name", name))
    if "kind" in content:
        from fedsim.topology.generators import generate

        parameters = {k: v for k, v in content.items() if k not in ("name", "description", "source", "kind", "order")}
        return generate(str(content["kind"]), parameters, name=title, order=content.get("order", order))
    for key in content:
        if key not in YAML_KEYS:
            raise InputError(f"{place}: unknown key {key!r}{did_you_mean(str(key), YAML_KEYS)}")
    return _listed(place, content, title, order)


def _listed(place: Path, content: dict[str, Any], name: str, order: Order) -> Topology:
    if "edges" not in content or not ("nodes" in content or "n" in content):
        raise InputError(f"{place}: give 'kind', or 'edges' with 'nodes' (names) or 'n' (a number)")
    labels: list[Hashable] = list(content["nodes"]) if "nodes" in content else list(range(content["n"]))
    number = {label: i for i, label in enumerate(labels)}
    pairs = []
    for edge in content["edges"]:
        if not isinstance(edge, list) or len(edge) != 2 or any(end not in number for end in edge):
            raise InputError(f"{place}: edge {edge!r} must be a pair of known nodes")
        pairs.append((number[edge[0]], number[edge[1]]))
    topology = Topology.from_edges(
        name,
        len(labels),
        np.asarray(pairs, dtype=np.int64),
        order=content.get("order", order),
        labels=tuple(labels) if "nodes" in content else None,
        costs=_column(place, content, "costs", len(pairs)),
        layout=_layout(place, content, len(labels)),
    )
    _check_costs(name, topology)
    return topology


def _column(place: Path, content: dict[str, Any], key: str, m: int) -> np.ndarray | None:
    if key not in content:
        return None
    if len(content[key]) != m:
        raise InputError(f"{place}: {key} has {len(content[key])} values for {m} edges")
    return np.asarray(content[key], dtype=float)


def _layout(place: Path, content: dict[str, Any], n: int) -> np.ndarray | None:
    if "positions" not in content:
        return None
    layout = np.asarray(content["positions"], dtype=float)
    if layout.shape != (n, 2):
        raise InputError(f"{place}: positions must be {n} pairs, got shape {layout.shape}")
    return layout


def _check_costs(name: str, topology: Topology) -> None:
    if topology.costs is None:
        return
    bad = np.flatnonzero(~(np.isfinite(topology.costs) & (topology.costs > 0)))
    if len(bad):
        u, v = topology.edges[bad[0]]
        cost = topology.costs[bad[0]]
        raise InputError(f"topology {name!r}: the cost of edge ({u}, {v}) must be positive, got {cost}")


READERS: dict[str, Callable[[Path, str, Order], Topology]] = {
    **dict.fromkeys((".txt", ".edges", ".edgelist", ".csv"), _edge_list),
    ".graphml": _networkx_file("read_graphml"),
    ".gml": _networkx_file("read_gml"),
    ".json": _node_link,
    ".npy": _adjacency,
    **dict.fromkeys((".yaml", ".yml"), _yaml),
}
