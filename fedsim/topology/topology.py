"""A topology: undirected edges over nodes 0..n-1, and the order in which nodes are laid over processes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import InputError

if TYPE_CHECKING:
    import networkx as nx

Order = Literal["rcm", "given"]


@dataclass(frozen=True, eq=False)
class Topology:
    """An undirected simple graph, or a `server` (nodes that meet only in sums).

    Nodes carry two numbers. The *node number* (0..n-1) is the user's: data, random draws, results and
    `edges` use it. The *position* is the place in `order`, which keeps neighbours close; every process
    owns a contiguous range of positions, and sums over nodes follow positions.

    Attributes:
        name: what to call it in tables and plots.
        n: number of nodes.
        edges: int64 `[m, 2]`, node numbers, `edges[e, 0] < edges[e, 1]`, sorted by row.
        order: int64 `[n]`, the node number at each position.
        labels: the user's names of the nodes, by node number (None: the numbers themselves).
        costs: float64 `[m]`, the cost of one exchange on each edge (None: all 1).
        layout: float64 `[n, 2]`, where to draw each node (None: drawn by a spring layout).
        recipe: how it was made, e.g. `("torus", {"rows": 4, "columns": 5})`; closed forms look here.
    """

    name: str
    n: int
    edges: NDArray[np.int64]
    order: NDArray[np.int64]
    labels: tuple[Hashable, ...] | None = None
    costs: NDArray[np.float64] | None = None
    layout: NDArray[np.float64] | None = None
    recipe: tuple[str, dict[str, object]] | None = field(default=None)

    @classmethod
    def from_edges(
        cls,
        name: str,
        n: int,
        edges: NDArray[np.int64] | Sequence[tuple[int, int]],
        *,
        order: Order = "rcm",
        labels: tuple[Hashable, ...] | None = None,
        costs: NDArray[np.float64] | Sequence[float] | None = None,
        layout: NDArray[np.float64] | None = None,
        recipe: tuple[str, dict[str, object]] | None = None,
    ) -> Topology:
        """Check a list of edges (node numbers) and number the nodes along a reverse Cuthill-McKee order.

        Raises:
            InputError: fewer than 2 nodes, a self-loop, a duplicate edge, an unknown node, a disconnected graph,
                or a cost that is no positive number; the message names the culprit as the user does.
        """
        array = np.asarray(edges, dtype=np.int64).reshape(-1, 2)
        called = _Called(name, n, labels)
        _refuse_bad_edges(called, array)
        array = np.sort(array, axis=1)
        by_row = np.lexsort((array[:, 1], array[:, 0]))
        array = np.ascontiguousarray(array[by_row])
        _refuse_duplicates(called, array)
        adjacency = _adjacency(n, array)
        _refuse_disconnected(called, adjacency)
        return cls(
            name=name,
            n=n,
            edges=array,
            order=_positions(name, adjacency, order),
            labels=labels,
            costs=None if costs is None else _checked_costs(called, array, costs, by_row),
            layout=layout,
            recipe=recipe,
        )

    @classmethod
    def server(cls, n: int, name: str = "server") -> Topology:
        """Return `n` nodes without edges: they meet only in `Sum`, `Mean` and `Route`."""
        if n < 1:
            raise InputError(f"topology {name!r}: a server needs at least 1 node, got n = {n}")
        return cls(name, n, np.empty((0, 2), np.int64), np.arange(n, dtype=np.int64), recipe=("server", {}))

    @classmethod
    def from_networkx(cls, graph: nx.Graph, name: str | None = None, *, order: Order = "rcm") -> Topology:
        """Take a networkx graph; nodes are numbered in the graph's own order, edge attribute `cost` is kept."""
        title = name or graph.name or type(graph).__name__
        if graph.is_directed():
            raise InputError(f"topology {title!r}: the graph is directed; pass graph.to_undirected()")
        labels = tuple(graph.nodes)
        number = {label: i for i, label in enumerate(labels)}
        pairs = [(number[u], number[v]) for u, v in graph.edges()]
        costs: list[Any] = [data.get("cost") for _, _, data in graph.edges(data=True)]
        if any(c is None for c in costs) and any(c is not None for c in costs):
            raise InputError(f"topology {title!r}: some edges have a 'cost' and some do not; give all or none")
        has_costs = bool(costs) and costs[0] is not None
        return cls.from_edges(
            title,
            len(labels),
            np.asarray(pairs, dtype=np.int64),
            order=order,
            labels=None if labels == tuple(range(len(labels))) else labels,
            costs=costs if has_costs else None,
            layout=_positions_of_nodes(graph),
        )

    @property
    def m(self) -> int:
        """Number of undirected edges."""
        return len(self.edges)

    @property
    def is_server(self) -> bool:
        """True when there are no edges at all."""
        return self.m == 0

    @cached_property
    def position(self) -> NDArray[np.int64]:
        """int64 `[n]`: the position of each node number (inverse of `order`)."""
        inverse = np.empty(self.n, dtype=np.int64)
        inverse[self.order] = np.arange(self.n)
        return inverse

    @cached_property
    def degrees(self) -> NDArray[np.int64]:
        """int64 `[n]`: number of neighbours, by node number."""
        return np.bincount(self.edges.ravel(), minlength=self.n).astype(np.int64)

    @cached_property
    def graph(self) -> nx.Graph:
        """The networkx graph over node numbers, made on first use."""
        import networkx as nx

        graph = nx.Graph(name=self.name)
        graph.add_nodes_from(range(self.n))
        graph.add_edges_from(self.edges.tolist())
        return graph

    def label(self, node: int) -> Hashable:
        """Return the user's name of a node number."""
        return node if self.labels is None else self.labels[node]


def _positions_of_nodes(graph: nx.Graph) -> NDArray[np.float64] | None:
    placed = [data.get("pos") for _, data in graph.nodes(data=True)]
    if not placed or any(p is None or len(p) != 2 for p in placed):
        return None
    return np.asarray(placed, dtype=np.float64)


@dataclass(frozen=True)
class _Called:
    """What messages call a graph and its nodes."""

    name: str
    n: int
    labels: tuple[Hashable, ...] | None

    def node(self, number: int) -> str:
        return str(number) if self.labels is None else repr(self.labels[number])

    def edge(self, ends: NDArray[np.int64]) -> str:
        return f"edge ({self.node(int(ends[0]))}, {self.node(int(ends[1]))})"

    def refusal(self, reason: str) -> InputError:
        return InputError(f"topology {self.name!r}: {reason}")


def _refuse_bad_edges(called: _Called, edges: NDArray[np.int64]) -> None:
    n = called.n
    if n < 2:
        raise called.refusal(f"at least 2 nodes are needed, got {n}")
    if called.labels is not None and len(set(called.labels)) != n:
        raise called.refusal(f"{n} nodes need as many different names, got {len(set(called.labels))}")
    outside = edges[(edges < 0).any(axis=1) | (edges >= n).any(axis=1)]
    if len(outside):
        raise called.refusal(f"edge {tuple(outside[0].tolist())} names a node outside 0..{n - 1}")
    loops = edges[edges[:, 0] == edges[:, 1]]
    if len(loops):
        raise called.refusal(f"node {called.node(int(loops[0, 0]))} has an edge to itself (self-loop); remove it")


def _refuse_duplicates(called: _Called, edges: NDArray[np.int64]) -> None:
    same = np.flatnonzero((edges[1:] == edges[:-1]).all(axis=1))
    if len(same):
        raise called.refusal(f"{called.edge(edges[same[0]])} is given twice (duplicate edge)")


def _checked_costs(called: _Called, edges: NDArray[np.int64], given: Any, by_row: NDArray[np.int64]) -> Any:
    """The costs in the order of the sorted `edges`; `given` are in the order that `by_row` undoes."""
    if np.shape(given) != (len(edges),):
        raise called.refusal(f"{len(edges)} edges need as many costs, got shape {np.shape(given)}")
    costs = np.array([_number(given[i]) for i in by_row])
    bad = np.flatnonzero(~(np.isfinite(costs) & (costs > 0)))
    if len(bad):
        wrong = given[by_row[bad[0]]]
        raise called.refusal(f"the cost of {called.edge(edges[bad[0]])} must be a positive number, got {wrong!r}")
    return costs


def _number(given: Any) -> float:
    try:
        return float(given)
    except (TypeError, ValueError):
        return float("nan")


def _adjacency(n: int, edges: NDArray[np.int64]):
    from scipy.sparse import coo_array

    ones = np.ones(len(edges), dtype=np.int8)
    upper = coo_array((ones, (edges[:, 0], edges[:, 1])), shape=(n, n))
    return (upper + upper.T).tocsr()


def _refuse_disconnected(called: _Called, adjacency) -> None:
    from scipy.sparse.csgraph import connected_components

    parts, part = connected_components(adjacency, directed=False)
    if parts > 1:
        sizes = sorted(np.bincount(part).tolist(), reverse=True)
        lonely = int(np.flatnonzero(part == np.bincount(part).argmin())[0])
        raise called.refusal(
            f"the graph is disconnected: {parts} parts of sizes {sizes[:6]}{'...' if parts > 6 else ''}; "
            f"node {called.node(lonely)} is in the smallest. A connected graph is needed"
        )


def _positions(name: str, adjacency, order: Order) -> NDArray[np.int64]:
    if order not in get_args(Order):
        raise InputError(f"topology {name!r}: order must be 'rcm' or 'given', got {order!r}")
    if order == "given":
        return np.arange(adjacency.shape[0], dtype=np.int64)
    from scipy.sparse.csgraph import reverse_cuthill_mckee

    return reverse_cuthill_mckee(adjacency, symmetric_mode=True).astype(np.int64)
