"""Events: the players agree, the papers' traces hold, and what is counted happened."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from event_cases import Squares, Table, events, random_squares, ring, three_variables

import fedsim.testing
from fedsim.algorithms.algorithm import EventAlgorithm, Sampling
from fedsim.algorithms.continuized import Continuized
from fedsim.algorithms.dadao import DADAO
from fedsim.engine.events import Events
from fedsim.engine.layout import Layout
from fedsim.errors import Diverged, InputError, RunError
from fedsim.setting import RunSetting
from fedsim.topology.topology import Topology

OPTIONS = {
    "plain columns": {},
    "gradient map": {"gradient_map": np.array([[0.9, 0.1, 0], [0, 1, 0], [0.2, 0, 0.8]])},
    "decay": {"decay": (3.0, 0.5)},
    "edge scale": {"edge_jump": np.array([0, -0.1, 0.05]), "edge_scale": np.linspace(0.5, 2, 7)},
    "still": {"flow": np.zeros((3, 3))},
    "edges only": {"node_clocks": False},
}


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dim", [1, 5, 131])
def test_kernel_equals_the_plain_loop_to_the_bit(option, dim):
    """The compiled kernel gives the bits of the plain loop for every column of the table, whatever the dimension."""
    problem = random_squares(7, dim)
    plain, kernel = (
        events(three_variables(**OPTIONS[option]), problem, ring(7), player=player) for player in ("plain", "kernel")
    )
    for player in (plain, kernel):
        player.advance(12.5)
    assert same_bits(plain.save(), kernel.save())
    assert plain.events > 100


@pytest.mark.parametrize("kind", ["with_replacement", "epoch", "poisson"])
def test_minibatches_are_the_same_in_both_players(kind):
    """Kernel and plain loop draw the same records, and count them."""
    problem = random_squares(7, 5)
    plain, kernel = (
        events(three_variables(), problem, ring(7), player=player, sampling=Sampling(2, kind))
        for player in ("plain", "kernel")
    )
    for player in (plain, kernel):
        player.advance(10)
    assert same_bits(plain.save(), kernel.save())
    if kind == "with_replacement":
        assert kernel.counts.samples == 2 * (kernel.counts.gradients - 7) + 7 * 4


def golden() -> tuple[Squares, Topology, np.ndarray, np.ndarray]:
    """The data, graph, rates (total sqrt(2 chi1 chi2)) and start of the published deterministic trace."""
    i, j, c = np.meshgrid(np.arange(4), np.arange(3), np.arange(2), indexing="ij")
    a = np.cos(1 + i + 2 * j + 3 * c) + (j == c)
    i, j = i[:, :, 0], j[:, :, 0]
    path = Topology.from_edges("path", 4, [(0, 1), (1, 2), (2, 3)], order="given")
    rates = np.full(3, 3.91968889462913 / 3)
    x0 = 0.1 * np.outer(np.arange(1, 5), np.arange(1, 3))
    return Squares(a, np.sin(1 + i * j) + 0.5 * i), path, rates, x0


def play_golden(algorithm, player: str, time, edge, gradient) -> Events:
    problem, path, rates, x0 = golden()
    setting = RunSetting(problem, path, rates, common_start=False)
    layout = Layout(path)
    run = Events(
        algorithm.resolve(setting), setting, problem, layout, rates, torch.from_numpy(x0), 0,
        output="lazy", player=player,
    )  # fmt: skip
    run.start()
    ends = path.edges[edge]
    run.play(np.where(gradient >= 0, 0, 1), np.where(gradient >= 0, gradient, ends[:, 0]), ends[:, 1], time)
    return run


def dadao_trace(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    k = np.arange(count)
    return 0.1 * (k + 1), (k + k // 3) % 3, np.where(k % 3 == 0, (k // 3) % 4, -1)


@pytest.mark.parametrize("player", ["plain", "kernel", "waves"])
def test_dadao_trace(player):
    """DADAO's deterministic trace of 600 events is reproduced to 1e-10, digit by digit."""
    run = play_golden(DADAO(init="authors_code"), player, *dadao_trace(1))
    assert np.allclose(run.final()["x"][0], [0.135227002674, 0.216232999813], atol=1e-12, rtol=0)
    assert np.allclose(run.final()["yt"][0], [-0.67789956307, -0.31862612714], atol=1e-10, rtol=0)
    run = play_golden(DADAO(init="authors_code"), player, *dadao_trace(3))
    z = [[0, 0], [-2.329030740583e-8, -4.658061481166e-8], [-6.529366353909e-8, -1.305873270782e-7],
         [9.151877392518e-8, 1.830375478504e-7]]  # fmt: skip
    assert np.allclose(run.final()["z"], z, atol=1e-16, rtol=1e-8)
    run = play_golden(DADAO(init="authors_code"), player, *dadao_trace(60))
    zt = [[0.093255157414, -0.457619100838], [0.146690598741, -0.027017136571], [-0.152804134193, 0.28855552683],
          [-0.087510768619, 0.19693914317]]  # fmt: skip
    assert np.allclose(run.final()["zt"], zt, atol=1e-10, rtol=0)
    run = play_golden(DADAO(init="authors_code"), player, *dadao_trace(600))
    x = [[1.295669706257, 1.217301022567], [1.339902100551, 1.268447774759], [1.361458955581, 1.326473787475],
         [1.373386058588, 1.390656970822]]  # fmt: skip
    assert np.allclose(run.outputs(), x, atol=1e-10, rtol=0)
    assert (run.counts.gradients, run.counts.communications) == (200, 400)


@pytest.mark.parametrize("player", ["plain", "waves"])
def test_continuized_trace(player):
    """The Continuized method's deterministic trace is reproduced: its errors, and y after one event."""
    problem, _, _, _ = golden()
    for count, error in {1: 2.3550210932, 2: 2.3360818487, 60: 0.0778526791, 240: 6.3779e-9}.items():
        k = np.arange(count)
        time = (0.9 * (k + 1) + 0.2 * np.sin(k)) / 3.91968889462913  # the trace is at one event per unit of time
        run = play_golden(Continuized(), player, time, (k**2 + k // 3) % 3, np.full(count, -1))
        found = float(((run.outputs() - problem.optimum()) ** 2).sum(dim=1).mean())
        assert found == pytest.approx(error, abs=3e-9 if count < 240 else 1e-12)  # printed from single precision parts
        assert run.counts.dual_gradients == 2 * count
        if count == 1:
            y = [[0.1101390783, 0.0651321207], [-0.1101390783, -0.0651321207], [0, 0], [0, 0]]
            assert np.allclose(run.final()["y"], y, atol=1e-10, rtol=0)


def test_counts_are_what_happened():
    """Gradients, samples, communications, messages, bytes and exchanges are those of the events and of the start."""
    run = events(three_variables(), random_squares(7, 5), ring(7))
    start = 7 * 2  # the start takes a mean: every node sends one row and receives one
    assert run.counts.as_dict() | {"gradients": 7, "samples": 28, "communications": start, "bytes": start * 40,
        "messages": start, "bytes_up": 280, "bytes_down": 280, "exchanges": 2} == run.counts.as_dict()  # fmt: skip
    run.advance(10)
    gradients, exchanges = run.counts.gradients - 7, run.counts.communications - start
    assert gradients + exchanges == run.events
    assert run.counts.samples == 4 * (gradients + 7)
    assert run.counts.messages == start + 2 * exchanges
    assert run.counts.bytes == start * 40 + exchanges * 80
    assert 2 < run.counts.exchanges < 2 + exchanges


def test_observing_does_not_change_the_run_and_windows_do_not_matter():
    """Bits do not depend on how often the run is observed, nor on where it was halted in between."""
    problem = random_squares(7, 5)
    once = events(three_variables(), problem, ring(7))
    once.advance(9)
    often = events(three_variables(), problem, ring(7))
    for until in np.arange(0.3, 9.3, 0.3):
        often.advance(min(until, 9))
        often.outputs()
    often.advance(9)
    assert same_bits(once.save(), often.save())


@pytest.mark.parametrize("player", ["plain", "kernel"])
def test_a_resumed_run_equals_an_uninterrupted_one(player):
    """Saving, starting afresh and loading leaves no trace in the bits."""
    problem = random_squares(7, 5)
    make = lambda: events(three_variables(), problem, ring(7), player=player, sampling=Sampling(2, "epoch"))
    whole, first, second = make(), make(), make()
    whole.advance(8)
    first.advance(3.3)
    second.load(first.save())
    second.advance(8)
    assert same_bits(whole.save(), second.save())


def test_flowed_and_lazy_outputs():
    """A flowed output is the plain flow of a node's state to `now`; a lazy one is its value at its last event."""
    from scipy.linalg import expm

    table, problem = three_variables(), random_squares(7, 5)
    flowed, lazy = (events(table, problem, ring(7), output=output) for output in ("flowed", "lazy"))
    for run in (flowed, lazy):
        run.advance(4)
    v, last = lazy.state.v, lazy.state.last
    expected = np.array([table.output @ expm(table.flow * (4 - t)) @ node for node, t in zip(v, last, strict=True)])
    assert np.array_equal(lazy.outputs().numpy(), v[:, 0])
    assert np.allclose(flowed.outputs().numpy(), expected, atol=1e-13)


def test_divergence_names_event_node_and_time():
    """A run that overflows stops at the event at which this was noticed, and says which and where."""
    table = three_variables(gradient_jump=np.array([1e200, 0, 0]))
    for player in ("plain", "kernel", "waves"):
        run = events(table, random_squares(7, 5), ring(7), player=player)
        with pytest.raises(Diverged, match=r"event \d+ at time [\d.]+, node \d+: a value is not finite"):
            run.advance(10)


def test_players_that_cannot_play_are_refused():
    """The kernel without compiled gradients, and batches larger than a node's records, are refused by name."""
    with pytest.raises(InputError, match="problem 'squares', which has no compiled gradient; use 'waves'"):
        events(three_variables(), random_squares(7, 5, compiles=False), ring(7), player="kernel")
    with pytest.raises(InputError, match="9 records asked for, node 0 has 4"):
        events(three_variables(), random_squares(7, 5), ring(7), sampling=Sampling(9, "epoch"))


class ClippedMomentum(EventAlgorithm):
    """Asynchronous gossip with momentum and clipping: not linear, so no table."""

    kind, paper, provenance = "clipped momentum", "none", "reconstruction"
    variables = ("x", "b")

    def start(self, x0):
        return {"x": x0, "b": torch.zeros_like(x0)}

    def gradient(self, v, g, count):
        b = 0.5 * v["b"] + g * torch.clamp(1.0 / g.norm(dim=1, keepdim=True), max=1.0)
        return {"x": v["x"] - 0.1 / (1 + count / 50) * b, "b": b}

    def message(self, v):
        return v["x"]

    def gossip(self, v, own, other):
        return {"x": v["x"] + (other - own) / 2, "b": v["b"]}


def test_a_nonlinear_algorithm_is_played_and_converges():
    """Gossip with momentum and clipping, which no table can state, comes closer to the optimum by the plain loop."""
    problem, topology = random_squares(7, 3, records=6), ring(7)
    rates = np.full(7, 2.0)
    setting, layout = RunSetting(problem, topology, rates), Layout(topology)
    x0 = torch.ones((7, 3), dtype=torch.float64)
    run = Events(ClippedMomentum(), setting, problem, layout, rates, x0, 3)
    run.start()
    distance = [float(((run.outputs() - problem.optimum()) ** 2).mean())]
    for until in (50, 400):
        run.advance(until)
        distance.append(float(((run.outputs() - problem.optimum()) ** 2).mean()))
    assert distance[2] < distance[1] < distance[0]
    assert distance[2] < 0.02 * distance[0]


def functions(algorithm, problem, topology, seed=1) -> Events:
    """A started player of functions of rows, from ones."""
    rates, layout = np.full(topology.m, 1.5), Layout(topology)
    x0 = torch.ones((problem.n, problem.dim), dtype=torch.float64)
    run = Events(algorithm, RunSetting(problem, topology, rates), problem, layout, rates, x0, seed)
    run.start()
    return run


def test_a_start_costs_the_gradients_that_it_takes():
    """An algorithm of functions pays for gradients, and for their mean, only where its start has such a parameter."""

    class WithGradient(ClippedMomentum):
        def start(self, x0, gradient):
            return {"x": x0 - gradient, "b": gradient}

    class WithMean(ClippedMomentum):
        def start(self, x0, mean_gradient):
            return {"x": x0 - mean_gradient, "b": x0}

    class WithWhat(ClippedMomentum):
        def start(self, x0, g):
            return {"x": x0, "b": g}

    problem, topology = random_squares(7, 5), ring(7)
    for algorithm, gradients, communications in ((ClippedMomentum, 0, 0), (WithGradient, 7, 0), (WithMean, 7, 14)):
        counts = functions(algorithm(), problem, topology).counts
        assert (counts.gradients, counts.samples, counts.communications) == (gradients, 4 * gradients, communications)
    with pytest.raises(InputError, match=r"WithWhat.start: parameter 'g' is unknown; .* gradient, mean_gradient"):
        functions(WithWhat(), problem, topology)


def test_messages_that_are_not_charged_are_refused():
    """What is charged is dim numbers: a message of more is refused."""

    class Talkative(ClippedMomentum):
        def message(self, v):
            return torch.cat([v["x"], v["b"]], dim=1)

    run = functions(Talkative(), random_squares(7, 5), ring(7))
    with pytest.raises(RunError, match=r"Talkative.message of one node: shape \(1, 10\), \(1, 5\) needed"):
        run.advance(5)


def test_tables_whose_columns_do_not_fit_are_refused():
    """A scale for other edges than the topology's would be read past its end; halves of a pair would be ignored."""
    jump, problem = np.array([0, -0.1, 0.05]), random_squares(7, 5)
    with pytest.raises(InputError, match="edge_scale: 6 given, one per edge, 7, needed"):
        events(three_variables(edge_jump=jump, edge_scale=np.ones(6)), problem, ring(7))
    with pytest.raises(InputError, match="edge_jump and edge_scale go together"):
        three_variables(edge_jump=jump)
    with pytest.raises(InputError, match="with dual the message is the dual gradient"):
        three_variables(dual=True)
    with pytest.raises(InputError, match=r"decay: \(0, 1\) given"):
        three_variables(decay=(0, 1))


def test_a_nonlinear_algorithm_that_is_linear_equals_its_table():
    """Gossip SGD written as functions of rows gives the bits of gossip SGD written as a table."""
    from fedsim.algorithms.dynamics import Dynamics

    class GossipSGD(ClippedMomentum):
        variables = ("x",)

        def start(self, x0):
            return {"x": x0}

        def gradient(self, v, g, count):
            return {"x": v["x"] + -0.1 * g}

        def gossip(self, v, own, other):
            return {"x": v["x"] + -0.5 * (own - other)}

    one = np.ones(1)
    table = Dynamics(("x",), np.zeros((1, 1)), one, 0 * one, -0.1 * one, one, -0.5 * one, np.array([[1.0, 0, 0]]), one)
    problem, topology, rates = random_squares(7, 3), ring(7), np.full(7, 1.5)
    by_table = events(table, problem, topology)
    setting, layout = RunSetting(problem, topology, rates), Layout(topology)
    by_rows = Events(GossipSGD(), setting, problem, layout, rates, by_table._x0, 1)
    by_rows.start()
    for run in (by_table, by_rows):
        run.advance(10)
    assert np.array_equal(by_table.state.v, by_rows.state.v)
    assert isinstance(by_table._algorithm, Table)


@pytest.mark.parametrize(
    ("function", "body"),
    [
        ("start", lambda self, x0: {"x": x0}),
        ("gradient", lambda self, v, g, count: {"x": v["x"] - 0.1 * g}),
        ("gossip", lambda self, v, own, other: {"x": v["x"] + (other - own) / 2}),
    ],
)
def test_a_function_of_rows_that_forgets_a_variable_is_named(function, body):
    """An own start, gradient or gossip that returns only what it changed is told which variable lacks."""
    forgetful = type("Forgetful", (ClippedMomentum,), {function: body})
    problem, topology, rates = random_squares(7, 3, records=6), ring(7), np.full(7, 2.0)
    x0 = torch.zeros(7, 3, dtype=torch.float64)
    run = Events(forgetful(), RunSetting(problem, topology, rates), problem, Layout(topology), rates, x0, 1)

    def play():
        run.start()
        run.advance(5)

    with pytest.raises(RunError, match=f"Forgetful.{function} returned x without b: every variable is needed"):
        play()


def test_the_check_of_an_own_class_calls_its_start_with_what_it_takes():
    """`fedsim.testing.check` takes an asynchronous class whose start needs no gradients, as the guide writes it."""
    assert "same bits" in str(fedsim.testing.check(ClippedMomentum()))


def test_the_clocks_go_on_after_a_trace():
    """After a trace that ends at time 5, the next events are those that the clocks have after 5."""
    run, twin = (events(three_variables(), random_squares(7, 5), ring(7)) for _ in range(2))
    run.play(np.array([0]), np.array([3]), np.array([0]), np.array([5.0]))
    twin.advance(5)
    before = twin.events
    for player in (run, twin):
        player.advance(6)
    assert run.events - 1 == twin.events - before
    assert (run.state.last[twin.state.last > 5] == twin.state.last[twin.state.last > 5]).all()


def test_unknown_edges_and_times_that_go_back_are_refused_in_traces():
    """A trace must use the topology's edges, in order of time."""
    run = events(three_variables(), random_squares(7, 5), ring(7))
    with pytest.raises(InputError, match="event 0 is an exchange between 0 and 3, not an edge"):
        run.play(np.array([1]), np.array([3]), np.array([0]), np.array([0.5]))
    with pytest.raises(InputError, match=r"event 1 at time 0\.25 is earlier"):
        run.play(np.array([0, 0]), np.array([3, 1]), np.array([0, 0]), np.array([0.5, 0.25]))
