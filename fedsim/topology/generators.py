"""Graphs by name: the usual ones from NumPy arrays, every other one from networkx.

The short names build their edge arrays directly, so that a torus of a million nodes takes seconds; the
networkx graph of a topology is made only when someone asks for it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import InputError, did_you_mean
from fedsim.topology.topology import Order, Topology

Edges = NDArray[np.int64]
Layout = NDArray[np.float64] | None
DRAWN = 5000  # nodes up to which a generator also says where to draw them


def ring(n: int) -> tuple[int, Edges, Layout]:
    """`n >= 3` nodes in a circle."""
    _at_least("ring", "n", n, 3)
    nodes = np.arange(n)
    return n, np.column_stack([nodes, (nodes + 1) % n]), _circle(n)


def path(n: int) -> tuple[int, Edges, Layout]:
    """`n` nodes in a line."""
    _at_least("path", "n", n, 2)
    nodes = np.arange(n)
    layout = np.column_stack([nodes, np.zeros(n)]).astype(float)
    return n, np.column_stack([nodes[:-1], nodes[1:]]), layout


def star(n: int) -> tuple[int, Edges, Layout]:
    """Node 0 in the centre of `n - 1` others (`n` counts the centre, unlike networkx)."""
    _at_least("star", "n", n, 2)
    layout = np.vstack([np.zeros((1, 2)), _circle(n - 1)])
    return n, np.column_stack([np.zeros(n - 1, int), np.arange(1, n)]), layout


def complete(n: int) -> tuple[int, Edges, Layout]:
    """Every pair of `n` nodes."""
    _at_least("complete", "n", n, 2)
    return n, np.column_stack(np.triu_indices(n, 1)), _circle(n)


def grid(rows: int, columns: int) -> tuple[int, Edges, Layout]:
    """`rows x columns` nodes, numbered row by row, each joined to the next in its row and column."""
    _at_least("grid", "rows", rows, 1)
    _at_least("grid", "columns", columns, 1)
    return _lattice((rows, columns), periodic=False)


def torus(rows: int, columns: int) -> tuple[int, Edges, Layout]:
    """A grid whose rows and columns close into rings (each side 1, 2 or longer; a side of 2 is one edge)."""
    _at_least("torus", "rows", rows, 1)
    _at_least("torus", "columns", columns, 1)
    return _lattice((rows, columns), periodic=True)


def hypercube(dim: int) -> tuple[int, Edges, Layout]:
    """`2^dim` nodes, joined where their numbers differ in one bit."""
    _at_least("hypercube", "dim", dim, 1)
    n, edges, _ = _lattice((2,) * dim, periodic=False)
    return n, edges, None


def barbell(clique: int, bridge: int = 0) -> tuple[int, Edges, Layout]:
    """Two complete graphs of `clique` nodes, joined by a path through `bridge` more nodes."""
    _at_least("barbell", "clique", clique, 2)
    _at_least("barbell", "bridge", bridge, 0)
    inside = np.column_stack(np.triu_indices(clique, 1))
    right = clique + bridge
    line = np.arange(clique - 1, right + 1)
    edges = np.vstack([inside, np.column_stack([line[:-1], line[1:]]), inside + right])
    return right + clique, edges, None


def exponential(n: int) -> tuple[int, Edges, Layout]:
    """Node `i` is joined to `i + 1, i + 2, i + 4, ...` (mod n), `n >= 3`; made undirected."""
    _at_least("exponential", "n", n, 3)
    nodes = np.arange(n)
    hops = 2 ** np.arange(math.ceil(math.log2(n)))
    pairs = np.vstack([np.column_stack([nodes, (nodes + h) % n]) for h in hops])
    return n, np.unique(np.sort(pairs, axis=1), axis=0), _circle(n)


def random_geometric(n: int, radius: float, seed: int = 0) -> tuple[int, Edges, Layout]:
    """`n` points drawn in the unit square, joined where closer than `radius` (networkx's numbers)."""
    import networkx as nx

    _at_least("random_geometric", "n", n, 2)
    graph = nx.random_geometric_graph(n, radius, seed=seed)
    layout = np.array([graph.nodes[i]["pos"] for i in range(n)], dtype=float)
    return n, _edges_of(graph), layout


def random_regular(n: int, degree: int, seed: int = 0) -> tuple[int, Edges, Layout]:
    """A random graph in which every node has `degree` neighbours (`n * degree` even)."""
    import networkx as nx

    if not 0 < degree < n or n * degree % 2:
        raise InputError(
            f"topology random_regular: needs 0 < degree < n and n * degree even, got n = {n}, degree = {degree}"
        )
    return n, _edges_of(nx.random_regular_graph(degree, n, seed=seed)), None


SHORT: dict[str, Callable[..., tuple[int, Edges, Layout]]] = {
    f.__name__: f
    for f in (
        ring, path, star, complete, grid, torus, hypercube, barbell, exponential, random_geometric, random_regular,
    )
}  # fmt: skip


def generate(kind: str, parameters: Mapping[str, Any], name: str | None = None, order: Order = "rcm") -> Topology:
    """Build the graph `kind` (a short name, `server`, or a networkx generator with or without `_graph`).

    A random graph without a `seed` has seed 0: the global generators are never asked.

    Raises:
        InputError: unknown kind or parameter, a parameter that is missing or of the wrong type, or a graph
            that is disconnected, directed, has self-loops, duplicate edges or fewer than 2 nodes.
    """
    make = maker(kind)
    given = bind(kind, make, parameters)
    if "seed" in parameter_names(make) and given.get("seed") is None:
        given["seed"] = 0
    title = name or _title(kind, given)
    if kind == "server":
        return Topology.server(given["n"], title)
    if kind not in SHORT:
        return _from_networkx(kind, make, given, title, order)
    n, edges, layout = make(**given)
    drawn = layout if n <= DRAWN else None
    try:
        return Topology.from_edges(title, n, edges, order=order, layout=drawn, recipe=(kind, dict(given)))
    except InputError as error:
        raise _with_advice(error, given) from None


def maker(kind: str) -> Callable[..., Any]:
    """Return the function behind a kind's name, or refuse it with the closest known name."""
    if kind == "server":
        return _server
    if kind in SHORT:
        return SHORT[kind]
    import networkx as nx

    for candidate in (kind, f"{kind}_graph"):
        found = getattr(nx, candidate, None)
        if callable(found) and str(getattr(found, "__module__", "")).startswith("networkx.generators"):
            return found
    from fedsim.topology.files import shipped

    raise InputError(
        f"topology: unknown kind {kind!r}{did_you_mean(kind, [*kinds(), *shipped()])}. "
        f"Known are {', '.join(sorted(SHORT))}, server, and every generator of networkx by its name"
    )


def kinds() -> list[str]:
    """Return every kind: short names, `server`, and networkx's generators."""
    import networkx as nx

    generators = [
        name
        for name in dir(nx)
        if str(getattr(getattr(nx, name), "__module__", "")).startswith("networkx.generators")
        and callable(getattr(nx, name))
    ]
    return sorted({*SHORT, "server", *generators})


def parameter_names(make: Callable[..., Any]) -> list[str]:
    """Return the parameters of a generator that a scenario may give, in order."""
    hidden = {"create_using", "backend", "backend_kwargs", "pos", "pos_name"}
    return [p for p in inspect.signature(make).parameters if p not in hidden]


def bind(kind: str, make: Callable[..., Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Check names, presence and types of `parameters` against the generator's signature."""
    allowed = parameter_names(make)
    for name in parameters:
        if name not in allowed:
            known = ", ".join(allowed) or "no parameters"
            raise InputError(f"topology {kind}: unknown key {name!r}{did_you_mean(name, allowed)}; it takes {known}")
    for name, text in wrong_parameters(make, parameters):
        raise InputError(f"topology {kind}: {name} {text}")
    return dict(parameters)


def wrong_parameters(make: Callable[..., Any], parameters: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (name, what is wrong) for parameters that a generator lacks, or that have the wrong type."""
    allowed, signature = parameter_names(make), inspect.signature(make).parameters
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = [
        p for p in allowed if signature[p].default is inspect.Parameter.empty and signature[p].kind not in variadic
    ]
    found = [(name, f"missing; it takes {', '.join(allowed)}") for name in needed if name not in parameters]
    for name, value in parameters.items():
        wanted, number = str(signature[name].annotation), not isinstance(value, bool)
        if wanted == "int" and not (number and isinstance(value, int | np.integer)):
            found.append((name, f"must be an integer, got {value!r}"))
        if wanted == "float" and not (number and isinstance(value, int | float) and value > 0):
            found.append((name, f"must be a positive number, got {value!r}"))
    return found


def _server(n: int) -> None:
    """`n` nodes without edges, which meet only in sums."""


def _from_networkx(kind: str, make: Callable[..., Any], given: dict[str, Any], title: str, order: Order) -> Topology:
    import networkx as nx

    try:
        graph = make(**given)
    except Exception as error:  # networkx raises nearly anything on parameters that it does not expect
        raise InputError(f"topology {kind}: networkx refuses {given}: {error}") from None
    if not isinstance(graph, nx.Graph):
        raise InputError(f"topology {kind}: networkx returns a {type(graph).__name__}, not a graph")
    try:
        topology = Topology.from_networkx(graph, title, order=order)
    except InputError as error:
        raise _with_advice(error, given) from None
    return replace(topology, recipe=_lattice_recipe(kind, given))


def _lattice_recipe(kind: str, given: Mapping[str, Any]) -> tuple[str, dict[str, object]] | None:
    """networkx's lattices as the closed forms know them; rings, stars and the like show in the edges."""
    short, periodic = kind.removesuffix("_graph"), given.get("periodic", False)
    if short == "hypercube":
        return "hypercube", {"dim": given["n"]}
    sides = {"grid_2d": [given.get("m"), given.get("n")], "grid": given.get("dim")}.get(short)
    if not isinstance(sides, list) or not all(isinstance(s, int) for s in sides) or not isinstance(periodic, bool):
        return None
    if len(sides) == 1:
        return None  # a ring or a path
    return ("torus" if periodic else "grid"), {"sides": tuple(sides)}


def _with_advice(error: InputError, given: Mapping[str, Any]) -> InputError:
    if "disconnected" not in str(error) or "seed" not in given:
        return error
    tried = ", ".join(f"{name} = {value}" for name, value in given.items())
    return InputError(f"{error}. Drawn with {tried}: choose another seed, or join more nodes")


def _title(kind: str, given: Mapping[str, Any]) -> str:
    inside = ",".join(f"{name}={value}" for name, value in given.items())
    return f"{kind}({inside})" if inside else kind


def _at_least(kind: str, name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"topology {kind}: {name} must be at least {least}, got {value}")


def _edges_of(graph: Any) -> Edges:
    return np.array(graph.edges(), dtype=np.int64).reshape(-1, 2)


def _circle(n: int) -> NDArray[np.float64]:
    angle = 2 * np.pi * np.arange(n) / max(n, 1)
    return np.column_stack([np.cos(angle), np.sin(angle)])


def _lattice(dims: Sequence[int], periodic: bool) -> tuple[int, Edges, Layout]:
    n = math.prod(dims)
    number = np.arange(n).reshape(dims)
    pairs = []
    for axis, size in enumerate(dims):
        steps = np.arange(size - 1)
        pairs.append([number.take(steps, axis).ravel(), number.take(steps + 1, axis).ravel()])
        if periodic and size > 2:
            pairs.append([number.take(0, axis).ravel(), number.take(size - 1, axis).ravel()])
    edges = np.concatenate([np.column_stack(pair) for pair in pairs])
    where = np.array(np.unravel_index(np.arange(n), dims), dtype=float).T if n <= DRAWN else None
    return n, edges, where[:, ::-1] * [1, -1] if where is not None and len(dims) == 2 else None
