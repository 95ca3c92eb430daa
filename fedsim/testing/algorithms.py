"""Algorithms are held to the laws by playing them in every way that must not matter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.algorithms.algorithm import Algorithm, EventAlgorithm, SyncAlgorithm
from fedsim.testing.report import Report, generators

if TYPE_CHECKING:
    from fedsim.algorithms.requests import Request
    from fedsim.engine.player import Player
    from fedsim.problems.problem import Problem
    from fedsim.topology.topology import Topology

BLOCKS = (1, 2, 3, 7)
State = dict[str, NDArray]
HINT = "; a row may read other rows through requests only, and its result may not depend on how many share a call"


class _Play:
    """Makes players of one algorithm on one problem, by the way that a scenario takes."""

    def __init__(self, algorithm: Algorithm, problem: Problem, topology: Topology | None, seed: int) -> None:
        import networkx as nx

        from fedsim.prepare import Live
        from fedsim.topology.topology import Topology

        wheel = Topology.from_networkx(nx.wheel_graph(problem.n) if problem.n > 3 else nx.path_graph(problem.n))
        self.live = Live(topology or wheel, problem, algorithm)
        self.rounds = isinstance(algorithm, SyncAlgorithm)
        self._seed = seed
        self._shared: dict[str, Any] = {}

    def player(self, **engine: Any) -> Player:
        from fedsim.prepare import prepare
        from fedsim.scenario import load_study

        scenario = {
            "seed": self._seed,
            "start": {"kind": "common_normal"},
            "schedule": {"kind": "rounds" if self.rounds else "poisson", "horizon": 1},
            "engine": engine,
        }
        prepared = prepare(load_study(scenario, live=self.live).runs[0], self.live, self._shared)
        self.nodes = prepared.layout.nodes
        made = prepared.player()
        if self.rounds:
            made._network = _Watched(made._network)  # pyright: ignore[reportAttributeAccessIssue]
        made.start()
        return made

    def states(self, length: int, **engine: Any) -> list[State]:
        """Play to `length`; return state, output and counts at the start and after every unit of it."""
        made, found = self.player(**engine), []
        for until in range(length + 1):
            made.advance(until)
            found.append(_state(made))
        return found


def check_algorithm(
    algorithm: Algorithm, problem: Problem, topology: Topology | None, length: int, seed: int
) -> Report:
    """Play an algorithm to `length` in every way that must give the same bits; see `fedsim.testing.check`."""
    play = _Play(algorithm, problem, topology, seed)
    report = Report(f"algorithm {getattr(algorithm, 'kind', type(algorithm).__name__)} on {problem.kind}")
    with generators(1):
        whole = play.states(length)
    if isinstance(algorithm, SyncAlgorithm):
        _check_blocks(play, whole, report, length)
        _check_states(play, report)
    elif isinstance(algorithm, EventAlgorithm):
        check_functions(algorithm, problem, seed, problem.n)
        report.held.append("flow, point, gradient, message, gossip and output give the same bits in any block of rows")
    else:
        _same(play, whole, play.states(length, player="plain"), "by the plain loop than by the fast player")
        report.held.append("the plain loop and the fast player give the same bits and counts")
    with generators(2):
        _same(play, whole, play.states(length), "when the global random generators are in another state")
    report.held.append("the global random generators are neither used nor moved")
    straight = play.player()
    straight.advance(length)
    _same(play, whole[-1:], [_state(straight)], "when it is played without observing it")
    _same(play, whole[-1:], [_state(_resumed(play, length))], "when it is saved half way and resumed")
    report.held.append("observing, saving and resuming leave the run unchanged")
    return report


def _check_blocks(play: _Play, whole: list[State], report: Report, length: int) -> None:
    for block in BLOCKS:
        how = f"in blocks of {block} rows than in one of all rows{HINT}"
        _same(play, whole, play.states(length, block=block), how)
    report.held.append(f"blocks of {', '.join(map(str, BLOCKS))} and all rows give the same bits and counts")
    report.held.append("answers to requests are left unmodified")


def _check_states(play: _Play, report: Report) -> None:
    """A round that passes a budget is taken back, so the state before it must still be there."""
    player: Any = play.player()
    for until in (1, 2):
        before, bits = player._states, player.save()
        player.advance(until)
        player._states, after = before, player._states
        for name, value in player.save().items():
            if name.startswith("state.") and value.tobytes() != bits[name].tobytes():
                raise AssertionError(f"{name[6:]} of the state that round {until - 1} was given was modified in place")
        player._states = after
    report.held.append("rounds leave the state that they are given unmodified")


def check_rounds(algorithm: SyncAlgorithm, problem: Problem, rounds: int) -> None:
    """Hold some rounds to their rows: any block gives the bits that all rows give together."""
    play = _Play(algorithm, problem, None, 0)
    whole = play.states(rounds, transport="local")
    for block in BLOCKS[:3]:
        how = f"in blocks of {block} rows than in one of all rows"
        _same(play, whole, play.states(rounds, transport="local", block=block), how)


def check_functions(algorithm: EventAlgorithm, problem: Problem, seed: int, rows: int) -> None:
    """Hold each function of so many rows to its rows: any block gives the bits that all rows give together."""
    from fedsim.engine.streams import RoundDraws, Streams

    nodes = np.arange(rows)
    draws = RoundDraws(Streams(seed), nodes, 0)
    v = {name: draws.normal(name, problem.dim).to(problem.dtype) for name in algorithm.variables}
    g, other = (draws.normal(name, problem.dim).to(problem.dtype) for name in ("gradient", "message"))
    time, count = draws.uniform("elapsed", 1), draws.integers("count", 1, 100)
    calls = {
        "flow": lambda r: algorithm.flow(_rows(v, r), time[r]),
        "point": lambda r: algorithm.point(_rows(v, r)),
        "gradient": lambda r: algorithm.gradient(_rows(v, r), g[r], count[r]),
        "message": lambda r: algorithm.message(_rows(v, r)),
        "gossip": lambda r: algorithm.gossip(_rows(v, r), g[r], other[r]),
        "output": lambda r: algorithm.output(_rows(v, r)),
    }
    for name, call in calls.items():
        whole = _named(call(slice(None)), name)
        for block in BLOCKS:
            for begin in range(0, rows, block):
                part = slice(begin, begin + block)
                for variable, value in _named(call(part), name).items():
                    if value.tobytes() != whole[variable][part].tobytes():
                        raise AssertionError(
                            f"{name}: {variable} of node {begin} is different in blocks of {block}{HINT}"
                        )


def _rows(v: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    return {name: value[rows].clone() for name, value in v.items()}


def _named(value: torch.Tensor | dict[str, torch.Tensor], name: str) -> dict[str, NDArray]:
    parts = value if isinstance(value, dict) else {name: value}
    return {part: tensor.detach().contiguous().numpy() for part, tensor in parts.items()}


def _resumed(play: _Play, length: int) -> Player:
    first, second = play.player(), play.player()
    first.advance(length // 2)
    second.load(first.save())
    second.advance(length)
    return second


def _state(player: Player) -> State:
    state = {name: np.array(value) for name, value in player.final().items()}
    network = getattr(player, "_network", None)
    if isinstance(network, _Watched):
        network.refuse_modified()
    counts = {f"count of {name}": np.array([value]) for name, value in player.counts.as_dict().items()}
    return {**state, "output": player.outputs().numpy().copy(), **counts}


def _same(play: _Play, expected: list[State], got: list[State], how: str) -> None:
    unit = "round" if play.rounds else "time"
    for now, (one, other) in enumerate(zip(expected, got, strict=True)):
        for name, value in one.items():
            if value.tobytes() != other[name].tobytes():
                when = f"after {unit} {now}" if len(expected) > 1 else "at the end"
                raise AssertionError(f"{_difference(name, value, other[name], play.nodes)} {when} {how}")


def _difference(name: str, one: NDArray, other: NDArray, nodes: NDArray[np.int64]) -> str:
    if one.shape != other.shape:
        return f"{name} has shape {other.shape} instead of {one.shape}"
    if name.startswith("count of "):
        return f"the {name} is {other[0]} instead of {one[0]}"
    rows = [row for row in range(len(one)) if one[row].tobytes() != other[row].tobytes()]
    where = f" of node {nodes[rows[0]]}" if len(one) == len(nodes) else ""
    size = float(np.abs(one[rows[0]].astype(float) - other[rows[0]].astype(float)).max())
    return f"{name}{where} is different (by {size:.2g}, {len(rows)} of {len(one)} rows)"


class _Watched:
    """A network that notices answers that were written to: torch numbers the versions of every tensor."""

    def __init__(self, network: Any) -> None:
        self._network = network
        self._given: list[tuple[str, torch.Tensor, int]] = []

    def answer(self, requests: list[Request]) -> list[Any]:
        self.refuse_modified()
        answers = self._network.answer(requests)
        tensors = [a if isinstance(a, torch.Tensor) else getattr(a, "values", None) for a in answers]
        self._given = [(type(requests[0]).__name__, t, t._version) for t in tensors if torch.is_tensor(t)]
        return answers

    def refuse_modified(self) -> None:
        for what, tensor, version in self._given:
            if tensor._version != version:
                raise AssertionError(
                    f"the answer to {what} was modified in place; answers are read-only, other rows may share them"
                )
