"""Graph files: edge list, GraphML, GML, JSON node-link, adjacency `.npy`, and the project's own YAML."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.errors import InputError, did_you_mean
from fedsim.topology.topology import Order, Topology

FIELD = re.compile(r'"((?:[^"]|"")*)"|(\{.*\})|([^\s,#"{][^\s,#]*)')  # a quoted name, networkx's attributes, a word
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

    `.txt .edges .edgelist .csv`: one edge per line, two node names and perhaps a cost or networkx's `{attributes}`;
    `#` starts a comment, a name with spaces or commas stands in double quotes.
    `.graphml .gml .json` (node-link): as networkx writes them; an edge attribute `cost` is kept.
    `.npy`: a symmetric adjacency matrix of zeros and ones. `.yaml`: `kind` with parameters (a random graph without
    `seed` has seed 0), or `nodes`/`n`, `edges` and perhaps `positions` and `costs`.

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


def text_of(place: Path) -> str:
    """Return a file's text (UTF-8)."""
    try:
        return place.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{place}: not a text file (UTF-8 is needed)") from None


def load_yaml(place: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping."""
    import yaml

    try:
        content = yaml.safe_load(text_of(place))
    except yaml.YAMLError as error:
        raise InputError(f"{place}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{place}: a mapping of keys is needed, got {type(content).__name__}")
    return content


def rows(place: Path, least: int, most: int) -> list[tuple[int, list[str]]]:
    """Return the (line number, fields) of a text table; fields are split at commas or white space, or quoted."""
    table = []
    for number, line in enumerate(text_of(place).splitlines(), start=1):
        fields = _fields(f"{place.name}:{number}", line)
        if not fields:
            continue
        if not least <= len(fields) <= most:
            wanted = str(least) if least == most else f"{least} to {most}"
            raise InputError(f"{place.name}:{number}: {wanted} fields are needed, got {len(fields)}: {line!r}")
        table.append((number, fields))
    return table


def _fields(where: str, line: str) -> list[str]:
    found, rest = [], line.lstrip(", \t")
    while rest and not rest.startswith("#"):
        field = FIELD.match(rest)
        if field is None:
            raise InputError(f"{where}: cannot be read from here: {rest!r}")
        quoted, attributes, word = field.groups()
        found.append(quoted.replace('""', '"') if quoted is not None else attributes or word)
        rest = rest[field.end() :].lstrip(", \t\r\f\v")
    return found


def quoted(name: Hashable) -> str:
    """Return a node's name as a text table holds it."""
    text = str(name)
    return text if re.fullmatch(r'[^\s,#"{][^\s,#]*', text) else '"' + text.replace('"', '""') + '"'


def _near(file: str, base: Path) -> str:
    names = {p.name for folder in folders(base) if folder.is_dir() for p in folder.iterdir() if p.suffix in READERS}
    return did_you_mean(file, names)


def _edge_list(place: Path, name: str, order: Order) -> Topology:
    table = rows(place, 2, 3)
    names = sorted({f for _, fields in table for f in fields[:2]}, key=_natural)
    number = {label: i for i, label in enumerate(names)}
    pairs = [(number[fields[0]], number[fields[1]]) for _, fields in table]
    costs = [_cost(place, line, fields[2:]) for line, fields in table]
    if None in costs and any(cost is not None for cost in costs):
        raise InputError(f"topology {name!r}: some lines have a cost and some do not; give all or none")
    return Topology.from_edges(
        name,
        len(names),
        np.asarray(pairs, dtype=np.int64),
        order=order,
        labels=None if names == [str(i) for i in range(len(names))] else tuple(names),
        costs=None if None in costs else [cost for cost in costs if cost is not None],
    )


def _natural(label: str) -> tuple[int, int, str]:
    return (0, int(label), "") if label.isdecimal() else (1, 0, label)


def _cost(place: Path, line: int, rest: list[str]) -> float | None:
    """The third field, or `cost` among the attributes that networkx writes; None where there is neither."""
    given: Any = rest[0] if rest else None
    if given is not None and given.startswith("{"):
        given = _attributes(f"{place.name}:{line}", given).get("cost")
    if given is None:
        return None
    try:
        cost = float(given)
    except (TypeError, ValueError):
        cost = np.nan
    if not (np.isfinite(cost) and cost > 0):
        raise InputError(f"{place.name}:{line}: the cost of an edge must be a positive number, got {given!r}")
    return cost


def _attributes(where: str, text: str) -> dict[str, Any]:
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{where}: cannot read the attributes {text!r}")
    return found


def _graphml(place: Path, name: str, order: Order) -> Topology:
    import networkx as nx

    return Topology.from_networkx(_by_networkx(place, nx.read_graphml), name, order=order)


def _gml(place: Path, name: str, order: Order) -> Topology:
    """Nodes are called by their `label`, or by their `id` where a file has no labels."""
    import networkx as nx

    def read_gml(place: Path) -> Any:
        try:
            return nx.read_gml(place)
        except nx.NetworkXError as error:
            if "has no 'label'" not in str(error):
                raise
            return nx.read_gml(place, label="id")

    return Topology.from_networkx(_by_networkx(place, read_gml), name, order=order)


def _by_networkx(place: Path, reader: Callable[[Path], Any]) -> Any:
    try:
        return reader(place)
    except Exception as error:  # networkx's readers raise nearly anything on a broken file
        raise InputError(f"topology {place.name!r}: networkx cannot read it: {error}") from None


def _node_link(place: Path, name: str, order: Order) -> Topology:
    """As `networkx.node_link_data` writes it; read here, as networkx joins duplicate edges without a word."""
    import networkx as nx

    try:
        content = json.loads(text_of(place))
        graph = nx.MultiDiGraph() if content.get("directed") else nx.MultiGraph()
        for node in content["nodes"]:
            graph.add_node(_hashable(node["id"]), **{k: v for k, v in node.items() if k != "id"})
        for edge in content["links" if "links" in content else "edges"]:
            ends = [_hashable(edge[end]) for end in ("source", "target")]
            strange = [end for end in ends if end not in graph]
            if strange:
                raise InputError(f"topology {place.name!r}: an edge names {strange[0]!r}, which is no node")
            graph.add_edge(*ends, **({"cost": edge["cost"]} if "cost" in edge else {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"topology {place.name!r}: not a JSON node-link graph: {error!r}") from None
    return Topology.from_networkx(graph, name, order=order)


def _hashable(name: Any) -> Hashable:
    return tuple(map(_hashable, name)) if isinstance(name, list) else name


def _adjacency(place: Path, name: str, order: Order) -> Topology:
    try:
        matrix = np.load(place, allow_pickle=False)
    except (ValueError, OSError) as error:
        raise InputError(f"topology {place.name!r}: not a .npy array: {error}") from None
    if not isinstance(matrix, np.ndarray):
        raise InputError(f"topology {place.name!r}: not a .npy array but an archive of several")
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
    labels, pairs = listed_edges(place, content)
    return Topology.from_edges(
        name,
        len(labels),
        np.asarray(pairs, dtype=np.int64),
        order=content.get("order", order),
        labels=tuple(labels) if "nodes" in content else None,
        costs=content.get("costs"),
        layout=_layout(place, content, len(labels)),
    )


def listed_edges(place: Path, content: dict[str, Any]) -> tuple[list[Hashable], list[tuple[int, int]]]:
    """Return the nodes of a YAML file and its edges as pairs of their places in that list."""
    nodes, edges = content.get("nodes"), content.get("edges")
    if nodes is None and isinstance(content.get("n"), int):
        nodes = list(range(content["n"]))
    if not isinstance(nodes, list) or not isinstance(edges, list):
        raise InputError(f"{place}: give 'kind', or a list 'edges' with 'nodes' (a list of names) or 'n' (a number)")
    labels = [_hashable(node) for node in nodes]
    number = {label: i for i, label in enumerate(labels)}
    pairs = []
    for edge in edges:
        ends = [number.get(_hashable(end)) for end in edge] if isinstance(edge, list) else []
        if len(ends) != 2 or None in ends:
            raise InputError(f"{place}: edge {edge!r} must be a pair of known nodes")
        pairs.append((ends[0], ends[1]))
    return labels, pairs


def _layout(place: Path, content: dict[str, Any], n: int) -> np.ndarray | None:
    if "positions" not in content:
        return None
    try:
        layout = np.asarray(content["positions"], dtype=float)
    except (TypeError, ValueError):
        layout = np.empty(0)
    if layout.shape != (n, 2):
        raise InputError(f"{place}: positions must be {n} pairs of numbers")
    return layout


READERS: dict[str, Callable[[Path, str, Order], Topology]] = {
    **dict.fromkeys((".txt", ".edges", ".edgelist", ".csv"), _edge_list),
    ".graphml": _graphml,
    ".gml": _gml,
    ".json": _node_link,
    ".npy": _adjacency,
    **dict.fromkeys((".yaml", ".yml"), _yaml),
}
