"""Topologies: what can be built, what is refused, and that numbers are those of networkx."""

from __future__ import annotations

import json

import networkx as nx
import numpy as np
import pytest

from fedsim.errors import InputError
from fedsim.topology.build import build, parse
from fedsim.topology.files import shipped
from fedsim.topology.topology import Topology

SAME = {
    "ring:7": nx.cycle_graph(7),
    "path:5": nx.path_graph(5),
    "star:6": nx.star_graph(5),
    "complete:5": nx.complete_graph(5),
    "barbell:4,2": nx.barbell_graph(4, 2),
    "hypercube:4": nx.convert_node_labels_to_integers(nx.hypercube_graph(4)),
    "grid:3,4": nx.convert_node_labels_to_integers(nx.grid_2d_graph(3, 4)),
    "torus:3,4": nx.convert_node_labels_to_integers(nx.grid_2d_graph(3, 4, periodic=True)),
    "torus:2,5": nx.convert_node_labels_to_integers(nx.grid_2d_graph(2, 5, periodic=True)),
    "random_geometric:20,0.4,0": nx.random_geometric_graph(20, 0.4, seed=0),
    "random_regular:10,3,4": nx.random_regular_graph(3, 10, seed=4),
    "watts_strogatz:12,4,0.3,5": nx.watts_strogatz_graph(12, 4, 0.3, seed=5),
    "karate_club": nx.karate_club_graph(),
}


def edge_set(topology: Topology) -> set[tuple[int, int]]:
    return {(int(u), int(v)) for u, v in topology.edges}


@pytest.mark.parametrize("text", SAME)
def test_short_names_are_the_graphs_of_networkx(text: str):
    """A short name, or any networkx generator, gives exactly the graph that networkx gives."""
    topology, graph = build(text), SAME[text]
    assert topology.n == graph.number_of_nodes()
    assert edge_set(topology) == {(min(e), max(e)) for e in graph.edges()}


def test_exponential_graph_has_logarithmic_degree():
    """In the exponential graph of 16 nodes each has neighbours at distance 1, 2, 4 and 8: degree 7."""
    assert set(build("exponential:16").degrees) == {7}


def test_edges_are_sorted_and_order_is_a_permutation():
    """Edges are sorted pairs u < v in row order, and positions and node numbers are inverse permutations."""
    topology = build("random_geometric:30,0.4,1")
    edges = topology.edges
    assert (edges[:, 0] < edges[:, 1]).all()
    assert (np.lexsort((edges[:, 1], edges[:, 0])) == np.arange(len(edges))).all()
    assert (topology.position[topology.order] == np.arange(30)).all()


def test_order_keeps_neighbours_close():
    """Reverse Cuthill-McKee lays a shuffled path out as a path again; `order: given` keeps the user's."""
    shuffled = np.random.default_rng(0).permutation(30)
    pairs = np.column_stack([shuffled[:-1], shuffled[1:]])
    near = Topology.from_edges("path", 30, pairs)
    ends = near.position[near.edges]
    assert (np.abs(ends[:, 0] - ends[:, 1]) == 1).all()
    assert (Topology.from_edges("path", 30, pairs, order="given").order == np.arange(30)).all()


def test_a_server_has_no_edges():
    """`server` is n nodes that meet only in sums."""
    server = build({"kind": "server", "n": 5})
    assert (server.n, server.m, server.is_server) == (5, 0, True)


def test_seed_of_the_caller_is_used_only_where_the_scenario_gives_none():
    """A random graph takes the caller's seed unless it has its own."""
    spec = {"kind": "random_geometric", "n": 20, "radius": 0.5}
    assert edge_set(build(spec, seed=3)) == edge_set(build({**spec, "seed": 3}, seed=9))
    assert edge_set(build(spec, seed=3)) != edge_set(build(spec, seed=4))


def test_building_leaves_global_random_state_alone():
    """A random graph neither uses nor disturbs the global generators."""
    import random

    before, legacy = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    build("random_regular:20,4,1")
    assert random.getstate() == before
    assert (np.random.get_state()[1] == legacy).all()  # noqa: NPY002


def test_command_line_form_reads_names_places_and_lists():
    """`kind:key=value` and values by place mean the same; numbers like 1e-1 are numbers."""
    assert parse("torus:4,columns=5") == {"kind": "torus", "rows": 4, "columns": 5}
    assert parse("random_geometric:n=9,radius=5e-1") == {"kind": "random_geometric", "n": 9, "radius": 0.5}
    assert parse("LCF_graph:14,[5,-5],7") == {"kind": "LCF_graph", "n": 14, "shift_list": [5, -5], "repeats": 7}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"kind": "rinng", "n": 5}, ("unknown kind", "did you mean 'ring'")),
        ({"kind": "ring"}, ("n missing",)),
        ({"kind": "ring", "n": 5, "radius": 1}, ("unknown key 'radius'",)),
        ({"kind": "ring", "n": 2.5}, ("must be an integer", "2.5")),
        ({"kind": "ring", "n": 2}, ("at least 3",)),
        ({"kind": "path", "n": 1}, ("at least 2",)),
        ({"kind": "random_geometric", "n": 30, "radius": 0.05, "seed": 7}, ("disconnected", "seed = 7", "radius")),
        ({"kind": "random_regular", "n": 5, "degree": 3}, ("even",)),
        ({"kind": "gnp_random_graph", "n": 5, "p": 0.9, "directed": True}, ("directed",)),
        ({"kind": "trivial_graph"}, ("2 nodes",)),
        ({"kind": "shortest_path"}, ("unknown kind",)),
        ({"kind": "line_graph", "G": 3}, ("networkx refuses",)),
        ({"kind": "geometric50"}, ("did you mean 'geometric-50'",)),
        ({"file": "nowhere.gml"}, ("no file", "nowhere.gml")),
        ({"file": "geometric-5O.yaml"}, ("did you mean 'geometric-50.yaml'",)),
        ({"file": "geometric-50.yaml", "n": 3}, ("do not go with 'file'",)),
        ({"n": 3}, ("'kind'", "'file'")),
        ({"kind": "ring", "n": 5, "order": "best"}, ("'rcm' or 'given'",)),
    ],
)
def test_refusals_say_which_and_why(spec: dict, words: tuple[str, ...]):
    """Every scenario that means no graph is refused with the key or property at fault."""
    with pytest.raises(InputError) as refusal:
        build(spec)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize(
    ("edges", "words"),
    [
        ([(0, 1), (1, 1), (1, 2)], ("node 1", "self-loop")),
        ([(0, 1), (1, 2), (1, 0)], ("(0, 1)", "duplicate")),
        ([(0, 1), (2, 3)], ("disconnected", "2 parts")),
        ([(0, 1), (1, 7)], ("outside 0..3",)),
    ],
)
def test_bad_edges_are_refused_by_name(edges: list, words: tuple[str, ...]):
    """Self-loops, duplicates, unknown nodes and disconnected graphs name the culprit."""
    with pytest.raises(InputError) as refusal:
        Topology.from_edges("mine", 4, edges)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_topology_builds_by_its_bare_name(name: str):
    """Each file of `topologies/` builds, from its bare name, and carries that name."""
    topology = build(name)
    assert topology.name == name
    assert topology.n >= 2


def test_at_least_ten_topologies_ship_and_some_are_real():
    """There are ten named topologies at least, real networks among them."""
    assert len(shipped()) >= 10
    assert {"karate-club", "les-miserables", "florentine-families"} <= set(shipped())


WHEEL = nx.wheel_graph(6)


def write_gml(place):
    nx.write_gml(WHEEL, place)


def write_graphml(place):
    nx.write_graphml(WHEEL, place)


def write_json(place):
    place.write_text(json.dumps(nx.node_link_data(WHEEL, edges="edges")))


def write_npy(place):
    np.save(place, nx.to_numpy_array(WHEEL))


def write_edges(place):
    place.write_text("# a wheel\n" + "\n".join(f"{u} {v}" for u, v in WHEEL.edges()))


def write_networkx_edges(place):
    nx.write_edgelist(nx.Graph(((u, v, {"weight": 2}) for u, v in WHEEL.edges())), place)


def write_csv(place):
    place.write_text("\n".join(f"{u},{v},{1 + u}" for u, v in WHEEL.edges()))


def write_yaml(place):
    place.write_text(f"n: 6\nedges: {[list(e) for e in WHEEL.edges()]}\n")


@pytest.mark.parametrize(
    ("ending", "write"),
    [
        (".gml", write_gml),
        (".graphml", write_graphml),
        (".json", write_json),
        (".npy", write_npy),
        (".edges", write_edges),
        (".edgelist", write_networkx_edges),
        (".csv", write_csv),
        (".yaml", write_yaml),
    ],
)
def test_every_file_format_gives_the_same_graph(tmp_path, ending: str, write):
    """A wheel written in any format is read back as the same wheel."""
    write(tmp_path / f"wheel{ending}")
    topology = build({"file": f"wheel{ending}"}, tmp_path)
    assert edge_set(topology) == {(min(e), max(e)) for e in WHEEL.edges()}


def test_costs_follow_their_edges(tmp_path):
    """Costs of an edge list stay with their edges when the edges are sorted."""
    (tmp_path / "line.csv").write_text("c,b,3\nb,a,2\n")
    topology = build({"file": "line.csv"}, tmp_path)
    assert topology.labels == ("a", "b", "c")
    assert topology.costs is not None
    assert dict(zip(map(tuple, topology.edges.tolist()), topology.costs, strict=True)) == {(0, 1): 2.0, (1, 2): 3.0}


def test_costs_among_the_attributes_of_networkx_are_kept(tmp_path):
    """`networkx.write_edgelist` writes attributes as a dictionary: `cost` counts, other attributes do not."""
    graph = nx.Graph()
    graph.add_edge("b", "c", cost=3, weight=7)
    graph.add_edge("a", "b", cost=2.5)
    nx.write_edgelist(graph, tmp_path / "line.edgelist")
    topology = build({"file": "line.edgelist"}, tmp_path)
    assert topology.labels == ("a", "b", "c")
    assert topology.costs.tolist() == [2.5, 3]


def test_names_with_spaces_stand_in_quotes(tmp_path):
    """A quoted name may hold spaces, commas, quotes and `#`; a byte-order mark is no part of a name."""
    (tmp_path / "towns.csv").write_bytes(b'\xef\xbb\xbf"New York","Los Angeles, CA" # far\n"New York","the ""#1"""\n')
    assert build({"file": "towns.csv"}, tmp_path).labels == ("Los Angeles, CA", "New York", 'the "#1"')


def test_gml_without_labels_calls_nodes_by_their_id(tmp_path):
    """GML needs no labels; nodes then are their ids."""
    (tmp_path / "pair.gml").write_text("graph [ node [ id 7 ] node [ id 9 ] edge [ source 7 target 9 ] ]")
    assert build({"file": "pair.gml"}, tmp_path).labels == (7, 9)


def test_duplicate_edges_of_node_link_files_are_refused(tmp_path):
    """networkx joins the two edges of a JSON file without a word; fedsim refuses them."""
    content = nx.node_link_data(nx.path_graph(3), edges="edges")
    content["edges"].append({"source": 2, "target": 1})
    (tmp_path / "twice.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"edge \(1, 2\) is given twice"):
        build({"file": "twice.json"}, tmp_path)


def test_messages_call_nodes_by_their_names(tmp_path):
    """Culprits are named as the user names them, not by the numbers that fedsim gives."""
    for text, words in [
        ("ann bob\nbob bob\n", "node 'bob'"),
        ("ann bob\nbob ann\n", "edge ('ann', 'bob') is given twice"),
        ("ann bob\nann cat\ndan eve\n", "node 'dan' is in the smallest"),
    ]:
        (tmp_path / "names.txt").write_text(text)
        with pytest.raises(InputError) as refusal:
            build({"file": "names.txt"}, tmp_path)
        assert words in str(refusal.value)


@pytest.mark.parametrize("cost", [0, -1, float("nan"), "cheap"])
def test_costs_of_a_live_graph_are_checked(cost):
    """A graph from Python is held to the same costs as a file."""
    with pytest.raises(InputError, match=r"cost of edge \('a', 'b'\) must be a positive number"):
        Topology.from_networkx(nx.Graph([("a", "b", {"cost": cost})]))


def test_a_random_graph_of_a_file_without_seed_is_one_graph(tmp_path):
    """A file that names a random generator and no seed means seed 0, never the global generators."""
    (tmp_path / "any.yaml").write_text("kind: gnp_random_graph\nn: 20\np: 0.5\n")
    first, again = (build({"file": "any.yaml"}, tmp_path) for _ in range(2))
    assert (
        edge_set(first) == edge_set(again) == {tuple(sorted(e)) for e in nx.gnp_random_graph(20, 0.5, seed=0).edges()}
    )


BROKEN = {
    "directed.npy": (np.array([[0, 1], [0, 0]]), "directed"),
    "weights.npy": (np.array([[0, 2.5], [2.5, 0]]), "0 or 1"),
    "loop.npy": (np.array([[1, 1], [1, 0]]), "self-loop"),
    "flat.npy": (np.zeros(3), "square"),
    "twice.csv": ("0,1\n1,0\n1,2\n", "duplicate"),
    "loop.csv": ("0,1\n1,1\n", "self-loop"),
    "parts.csv": ("0,1\n2,3\n", "disconnected"),
    "fields.csv": ("0,1\n2\n", "fields.csv:2"),
    "cost.csv": ("0,1,-4\n", "cost.csv:1"),
    "some.csv": ("0,1,1\n1,2\n", "all or none"),
    "empty.csv": ("# nothing\n", "at least 2 nodes"),
    "bad.json": ("{", "node-link"),
    "bad.gml": ("graph [", "networkx"),
    "key.yaml": ("n: 2\nedges: [[0, 1]]\nratess: [1]\n", "did you mean 'rates'"),
    "edge.yaml": ("n: 2\nedges: [[0, 5]]\n", "known nodes"),
    "list.yaml": ("- 1\n", "mapping"),
    "cost.yaml": ("n: 2\nedges: [[0, 1]]\ncosts: [0]\n", "positive"),
    "graph.xyz": ("", "unknown ending"),
    "bytes.txt": (b"\xff\xfe\x00", "UTF-8"),
    "attributes.edgelist": ("0 1 {cost: 2}\n", "attributes.edgelist:1: cannot read the attributes"),
    "stray.json": ('{"nodes": [{"id": 0}, {"id": 1}], "edges": [{"source": 0, "target": 7}]}', "7, which is no node"),
    "list.json": ("[1]", "node-link"),
    "number.yaml": ("n: x\nedges: [[0, 1]]\n", "'n'"),
    "nodes.yaml": ("nodes: 5\nedges: [[0, 1]]\n", "'nodes'"),
    "names.yaml": ("nodes: [a, b, a]\nedges: [[a, b]]\n", "different names"),
    "none.yaml": ("n: 2\nedges:\n", "'edges'"),
    "costs.yaml": ("n: 2\nedges: [[0, 1]]\ncosts: 3\n", "as many costs"),
    "words.yaml": ("n: 2\nedges: [[0, 1]]\ncosts: [x]\n", "positive number"),
    "places.yaml": ("n: 2\nedges: [[0, 1]]\npositions: [[0, 1], [1]]\n", "pairs of numbers"),
    "nested.yaml": ("n: 2\nedges: [[0, [1]]]\n", "known nodes"),
    "order.yaml": ("kind: ring\nn: 5\norder: best\n", "'rcm' or 'given'"),
}


@pytest.mark.parametrize("file", BROKEN)
def test_broken_files_are_refused_with_their_reason(tmp_path, file: str):
    """A file that holds no usable graph is refused, naming file (and line) and the reason."""
    content, word = BROKEN[file]
    if isinstance(content, str | bytes):
        (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    else:
        np.save(tmp_path / file, content)
    with pytest.raises(InputError, match=word):
        build({"file": file}, tmp_path)


def test_directed_graph_files_are_refused(tmp_path):
    """A directed GraphML file is refused rather than silently symmetrised."""
    nx.write_graphml(nx.DiGraph([(0, 1), (1, 2)]), tmp_path / "arrows.graphml")
    with pytest.raises(InputError, match="directed"):
        build({"file": "arrows.graphml"}, tmp_path)


def test_a_torus_of_a_quarter_million_nodes_needs_no_networkx_graph():
    """A large torus is edge arrays only, with a closed form for its constants."""
    from fedsim.topology.spectral import chi

    torus = build("torus:500,500")
    assert (torus.n, torus.m) == (250_000, 500_000)
    assert "graph" not in torus.__dict__
    assert chi(torus, np.ones(torus.m)).exact


def test_an_archive_is_no_adjacency_matrix(tmp_path):
    """An .npz that calls itself .npy is refused by name."""
    with (tmp_path / "many.npy").open("wb") as file:
        np.savez(file, a=np.eye(2))
    with pytest.raises(InputError, match="archive"):
        build({"file": "many.npy"}, tmp_path)
