"""Gossip rates: local rules, sets, files, the cache and the table of `fedsim rates`."""

from __future__ import annotations

import numpy as np
import pytest

from fedsim.errors import InputError
from fedsim.topology.build import build
from fedsim.topology.rate_files import read_rates, write_rates
from fedsim.topology.rates import build_rates, gossip_rates
from fedsim.topology.sets import rate_set
from fedsim.topology.table import rates_table
from fedsim.topology.topology import Topology


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))


LOCAL = {  # communications per unit time: uniform, metropolis, degree (specification of DADAO's rates)
    "path:4": (3.91969, 3.91969, 4.79042),
    "path:20": (121.082, 121.082, 127.352),
    "star:20": (19, 19, 19),
    "ring:20": (62.3059, 62.3059, 62.3059),
    "grid:4,4": (26.2523, 25.3234, 26.7019),
    "grid:4,5": (41.9674, 40.0255, 42.1304),
    "balanced_tree:2,3": (45.0005, 45.0005, 66.0991),
    "barbell:3": (10.5716, 11.5784, 13.0747),
    "barbell:10": (221.328, 238.84, 242.211),
}


@pytest.mark.parametrize("text", LOCAL)
def test_local_rules_need_the_known_communications(text: str):
    """Uniform, Metropolis and degree rates need the tabulated communications per unit time."""
    topology = build(text)
    found = [gossip_rates(topology, kind).communications for kind in ("uniform", "metropolis", "degree")]
    assert found == pytest.approx(LOCAL[text], rel=1e-5)


@pytest.mark.parametrize("set", ["total", "node_rate", "node_bandwidth"])
@pytest.mark.parametrize("kind", ["uniform", "metropolis", "degree"])
def test_local_rules_fill_their_set(set, kind):
    """Normalised rates lie on the boundary of their set, with costs and uneven caps."""
    base = build("random_geometric:15,0.5,1")
    costs = np.linspace(1, 3, base.m)
    topology = Topology.from_edges("costly", base.n, base.edges, costs=costs)
    caps = 2.0 if set == "total" else np.linspace(0.5, 2, base.n)
    rates = gossip_rates(topology, kind, set, caps)
    assert rate_set(topology, set, caps).gauge(rates.rates) == pytest.approx(1)
    if set == "total":
        assert costs @ rates.rates == pytest.approx(2)
    if set == "node_bandwidth":
        load = np.zeros(base.n)
        np.add.at(load, topology.edges, (costs * rates.rates)[:, None])
        assert (load / caps).max() == pytest.approx(1)


def test_degree_rates_are_one_exchange_per_node():
    """With `degree` every node can start exchanges at the same rate, so the node-rate set is filled evenly."""
    topology = build("grid:3,4")
    rates = gossip_rates(topology, "degree", "node_rate")
    assert rates.rates.sum() == pytest.approx(topology.n)


@pytest.mark.parametrize("set", ["total", "node_rate", "node_bandwidth"])
def test_support_function_is_the_maximum_over_the_set(set):
    """The support function bounds v.w over random affordable rates, and equals the linear programme's value."""
    from scipy.optimize import linprog

    topology = build("random_geometric:12,0.5,2")
    rng = np.random.default_rng(0)
    costs = rng.uniform(0.5, 2, topology.m)
    topology = Topology.from_edges("costly", topology.n, topology.edges, costs=costs)
    affordable = rate_set(topology, set, None if set == "total" else rng.uniform(0.5, 2, topology.n))
    values = rng.uniform(0, 1, topology.m)
    best = linprog(-(affordable.merge.T @ values), A_ub=affordable.cover, b_ub=affordable.caps, method="highs")
    assert affordable.support(values) == pytest.approx(-best.fun, rel=1e-9)


def test_theory_scaling_makes_the_product_one():
    """`theory` scales rates to 2 chi1 chi2 = 1, and their sum is the communications per unit time."""
    rates = gossip_rates(build("grid:4,5"), "metropolis")
    scaled = rates.theory()
    assert 2 * scaled.chi1 * scaled.chi2 == pytest.approx(1)
    assert scaled.rates.sum() == pytest.approx(rates.communications)


def test_rates_survive_their_file_bit_for_bit(tmp_path):
    """A table written by `write_rates` is read back with the same bits, node names and all."""
    topology = build("florentine-families")
    rates = gossip_rates(topology, "sdp").rates
    write_rates(tmp_path / "mine.csv", topology, rates)
    assert (read_rates("mine.csv", topology, tmp_path) == rates).all()
    assert (build_rates({"file": "mine.csv"}, topology, tmp_path).rates == rates).all()


def test_names_with_spaces_survive_the_file_of_rates(tmp_path):
    """Rates of a graph whose nodes have names of several words, or are tuples, can be used by a scenario."""
    for text in ("davis_southern_women_graph", "grid_2d_graph:3,4"):
        topology = build(text)
        rates = np.linspace(1, 2, topology.m)
        write_rates(tmp_path / "mine.csv", topology, rates)
        assert (read_rates("mine.csv", topology, tmp_path) == rates).all()


def test_rates_in_a_topology_file_follow_their_edges(tmp_path):
    """A YAML's `rates` belong to its `edges`, whatever their order."""
    (tmp_path / "line.yaml").write_text("n: 3\nedges: [[2, 1], [0, 1]]\nrates: [5, 7]\n")
    topology = build({"file": "line.yaml"}, tmp_path)
    assert read_rates("line.yaml", topology, tmp_path).tolist() == [7, 5]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0,1,1\n1,2,1\n", "rate of edge .* is missing"),
        ("0,1,1\n1,0,1\n1,2,1\n0,2,1\n", "given twice"),
        ("0,1,1\n1,2,-1\n0,2,1\n", "bad.csv:2: a rate must be"),
        ("0,1,1\n1,2,x\n0,2,1\n", "bad.csv:2: a rate must be"),
        ("0,1,1\n1,7,1\n0,2,1\n", "bad.csv:2: .* has no edge"),
        ("0,1,0\n1,2,0\n0,2,1\n", "never meet"),
    ],
)
def test_bad_rate_files_are_refused(tmp_path, text, words):
    """Missing, repeated, negative, unreadable, stray and disconnecting rates are refused by line."""
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        read_rates("bad.csv", build("complete:3"), tmp_path)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"kind": "sdpp"}, "did you mean 'sdp'"),
        ({"kind": "sdp", "set": "totall"}, "did you mean 'total'"),
        ({"kind": "sdp", "solver": "mosek"}, "unknown solver"),
        ({"kind": "sdp", "sett": "total"}, "did you mean 'set'"),
        ({"kind": "uniform", "caps": -1}, "positive"),
        ({"kind": "uniform", "set": "node_rate", "caps": [1, 2]}, "one number or 4"),
        ({"kind": "uniform", "chi1": 2}, "chi1 and chi2"),
        ({"kind": "uniform", "chi1": 2, "chi2": 0.1}, "at least .* = 1.5 on any graph"),
        ({"kind": "sdp", "caps": "one"}, "caps must be numbers"),
        ({"kind": "sdp", "file": "mine.csv"}, "kind: does not go with file"),
        ({"kind": "uniform", "solver": "cvxpy"}, "solver: is for kind: sdp"),
        ({"kind": "uniform", "prune": True}, "prune: is for kind: sdp"),
        ({"kind": "sdp", "chi1": 3, "chi2": 2}, "chi1: does not go with kind: sdp"),
        ({"file": "nowhere.csv"}, "no file"),
    ],
)
def test_refusals_name_the_key(spec, words):
    """A rates section that cannot be used is refused with the key at fault."""
    with pytest.raises(InputError, match=words):
        build_rates(spec, build("ring:4"))


def test_a_server_has_no_rates_and_large_graphs_no_sdp():
    """A server is refused by name; so is an SDP beyond what dense matrices can hold, with the alternative."""
    with pytest.raises(InputError, match="server"):
        gossip_rates(build("server:4"), "uniform")
    with pytest.raises(InputError, match="metropolis"):
        gossip_rates(build("ring:5000"), "sdp")


def test_given_constants_are_used_and_not_called_exact():
    """chi1 and chi2 of a scenario replace the computed ones."""
    rates = build_rates({"kind": "uniform", "chi1": 3.0, "chi2": 2.0}, build("ring:4"))
    assert (rates.chi1, rates.chi2, rates.chi.exact) == (3.0, 2.0, False)


def test_the_same_question_is_solved_once(monkeypatch):
    """A second call reads the cache; another set, cost or solver is another question; a broken file is solved anew."""
    from fedsim.topology import cache
    from fedsim.topology import rates as module

    topology = build("barbell:4")
    first = gossip_rates(topology)
    calls = []
    solve = module.optimise
    monkeypatch.setattr(module, "optimise", lambda *a: calls.append(a) or solve(*a))
    again = gossip_rates(topology)
    assert (again.rates == first.rates).all()
    assert (first.cached, again.cached, calls) == (False, True, [])
    gossip_rates(topology, set="node_rate")
    gossip_rates(topology, solver="interior_point")
    gossip_rates(Topology.from_edges("b", topology.n, topology.edges, costs=np.linspace(1, 2, topology.m)))
    assert len(calls) == 3
    for broken in (lambda whole: b"broken", lambda whole: whole[: len(whole) // 2], lambda whole: b""):
        for file in cache.folder().rglob("*.npz"):
            file.write_bytes(broken(file.read_bytes()))
        assert not gossip_rates(topology).cached


def test_the_table_holds_what_the_command_prints():
    """The table's object has n, edges and schemes with chi1, chi2, communications, gap; pruned only when asked."""
    found = rates_table(build("barbell:5"), prune=True)
    row = found.as_dict()
    assert (row["n"], row["edges"]) == (10, 21)
    assert list(row["schemes"]) == ["uniform", "metropolis", "degree", "sdp", "sdp_pruned"]
    assert row["schemes"]["uniform"]["gap"] is None
    assert row["schemes"]["sdp"]["communications"] == pytest.approx(18.2151, rel=1e-4)
    assert found.saved("uniform", "sdp") == pytest.approx(0.526, abs=1e-3)
    assert any("of the 21 edges" in note for note in found.notes())
    assert "sdp_pruned" not in rates_table(build("ring:5")).schemes


def test_the_table_of_a_graph_beyond_the_sdp_has_the_local_rules():
    """Beyond 2,000 nodes the table compares the local rules and says so; a forced solver is refused."""
    table = rates_table(build("torus:45,50"))
    assert list(table.schemes) == ["uniform", "metropolis", "degree"]
    assert table.schemes["uniform"].chi.exact
    assert (table.best, table.saved("uniform")) == ("uniform", 0)
    assert any("no SDP" in note and "2000" in note for note in table.notes())
    with pytest.raises(InputError, match="the limit is 2000 nodes"):
        rates_table(build("torus:45,50"), solver="surrogate")


def test_the_table_says_that_the_solver_was_switched():
    """Beyond the nodes for cvxpy the note names the solver that was taken and why; a forced one needs no reason."""
    topology = build("ring:21")
    assert any("interior_point" in n and "cvxpy is for up to 20 nodes" in n for n in rates_table(topology).notes())
    forced = rates_table(topology, solver="surrogate")
    assert any("surrogate" in n and "up to 20" not in n for n in forced.notes())


def test_the_printed_table_has_every_column(tmp_path, monkeypatch, capsys):
    """Per-node sets add the slowdown and costs the cost beside the communications; the file's name is bare YAML."""
    import yaml

    from fedsim.cli import rates

    monkeypatch.chdir(tmp_path)
    rates("grid:2,3", set_="node_rate")
    printed = capsys.readouterr().out
    for word in ("chi1", "chi2", "communications", "slowdown", "saved", "gap", "of the load sqrt(2 chi1 chi2)"):
        assert word in printed
    hint = printed.partition("(use it: ")[2].partition(")\n")[0]
    section = yaml.safe_load(hint)["rates"]
    assert build_rates(section, build("grid:2,3"), tmp_path).rates.sum() > 0
    (tmp_path / "costly.csv").write_text("a,b,1\nb,c,2\nc,a,3\n")
    rates("costly.csv")
    assert {"communications", "cost"} <= set(capsys.readouterr().out.split())


def test_per_node_sets_add_the_slowdown_and_costs_the_cost():
    """Node sets report max(1, sqrt(2 chi1 chi2)); edge costs report the cost."""
    wheel = build("wheel_graph:8")
    row = rates_table(wheel, "node_rate").as_dict()["schemes"]["sdp"]
    assert row["slowdown"] == 1.0
    assert row["communications"] == pytest.approx(0.95539 * 8, rel=1e-4)
    costly = Topology.from_edges("costly", wheel.n, wheel.edges, costs=np.linspace(1, 3, wheel.m))
    table = rates_table(costly)
    schemes = table.as_dict()["schemes"]
    assert min(schemes, key=lambda s: schemes[s]["cost"]) == "sdp"
