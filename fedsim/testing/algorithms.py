"""Algorithms are held to the laws by playing them in every way that must not matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.algorithms.algorithm import Algorithm, EventAlgorithm, SyncAlgorithm
from fedsim.errors import InputError, RunError
from fedsim.testing.report import Report, generators, no_own_generators

if TYPE_CHECKING:
    from fedsim.algorithms.requests import Request
    from fedsim.engine.player import Player
    from fedsim.problems.problem import Problem
    from fedsim.topology.topology import Topology

BLOCKS = (1, 2, 3, 7)
State = dict[str, NDArray]
Argument = torch.Tensor | dict[str, torch.Tensor]
HINT = "; a row may read other rows through requests only, and its result may not depend on how many share a call"


class _Play:
    """Makes players of one algorithm on one problem, by the way that a scenario takes.

    Attributes:
        apart: whether nodes start apart, rows of very different sizes; else all start at one point, where a row that
            reads another would see itself.
    """

    def __init__(self, algorithm: Algorithm, problem: Problem, topology: Topology | None, seed: int) -> None:
        import networkx as nx

        from fedsim.prepare import Live
        from fedsim.topology.topology import Topology

        wheel = Topology.from_networkx(nx.wheel_graph(problem.n) if problem.n > 3 else nx.path_graph(problem.n))
        self.live = Live(topology or wheel, problem, algorithm)
        self.rounds = isinstance(algorithm, SyncAlgorithm)
        self._seed = seed
        self._shared: dict[str, Any] = {}
        self.apart = True

    def player(self, **engine: Any) -> Player:
        from fedsim.prepare import prepare
        from fedsim.scenario import load_study

        scenario = {
            "seed": self._seed,
            "start": {"kind": "normal" if self.apart else "common_normal"},
            "schedule": {"kind": "rounds" if self.rounds else "poisson", "horizon": 1},
            "engine": engine,
        }
        prepared = prepare(load_study(scenario, live=self.live).runs[0], self.live, self._shared)
        self.nodes = prepared.layout.nodes
        made = prepared.player()
        if self.rounds:
            network: Any = made._network  # pyright: ignore[reportAttributeAccessIssue]
            network.answer = _Watched(network.answer).answer
        x0: Any = getattr(made, "_x0")  # noqa: B009 - as private as the network
        if self.apart:
            x0.mul_(torch.from_numpy(_sizes(len(self.nodes))[self.nodes]))
        before = x0.clone()
        with no_own_generators(), _one_law():
            made.start()
        if _bits(x0) != _bits(before):
            raise AssertionError("start modified the points x0 that it was given; they are read-only")
        return made

    def states(self, length: int, **engine: Any) -> list[State]:
        """Play to `length`; return state, output and counts at the start and after every unit of it."""
        made, found = self.player(**engine), []
        for until in range(length + 1):
            with no_own_generators(), _one_law():
                made.advance(until)
            found.append(_state(made))
        return found


def _sizes(n: int) -> NDArray[np.float64]:
    """Return `[n, 1]` from 0.01 to 10, so that a condition on a block's rows comes out in more than one way."""
    return 10.0 ** np.linspace(-2.0, 1.0, n)[np.random.default_rng(0).permutation(n), None]


@contextmanager
def _one_law() -> Iterator[None]:
    """Say of blocks that ask for different things what it is: control flow that follows rows."""
    try:
        yield
    except RunError as error:
        if "blocks disagree" not in str(error):
            raise
        raise AssertionError(str(error)) from error


def check_algorithm(
    algorithm: Algorithm, problem: Problem, topology: Topology | None, length: int, seed: int
) -> Report:
    """Play an algorithm to `length` in every way that must give the same bits; see `fedsim.testing.check`."""
    play = _Play(algorithm, problem, topology, seed)
    report = Report(f"algorithm {getattr(algorithm, 'kind', type(algorithm).__name__)} on {problem.kind}")
    with generators(1):
        try:
            whole = play.states(length)
        except InputError:  # it may need a common start
            play.apart = False
            whole = play.states(length)
    if isinstance(algorithm, SyncAlgorithm):
        _check_blocks(play, whole, report, length)
        _check_states(play, report)
    elif isinstance(algorithm, EventAlgorithm):
        check_functions(algorithm, problem, seed, problem.n)
        functions = "start, flow, point, gradient, message, gossip and output"
        report.held.append(f"{functions} give the same bits in any block of rows, and leave their arguments alone")
    else:
        _check_players(play, whole, report, length)
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
    if play.apart:  # from a common start some leave out an exchange
        with _together(play):
            _same(play, play.states(length), play.states(length, block=1), f"in blocks of 1 row{HINT}")
    report.held.append(f"blocks of {', '.join(map(str, BLOCKS))} and all rows give the same bits and counts")
    report.held.append("answers to requests are left unmodified")


def _check_players(play: _Play, whole: list[State], report: Report, length: int) -> None:
    how = "by the plain loop than by the fast player"
    _same(play, whole, play.states(length, player="plain"), how)
    if play.apart:
        with _together(play):
            _same(play, play.states(length), play.states(length, player="plain"), how)
    report.held.append("the plain loop and the fast player give the same bits and counts")


@contextmanager
def _together(play: _Play) -> Iterator[None]:
    """Have all nodes start at one point."""
    play.apart = False
    try:
        yield
    finally:
        play.apart = True


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
    from fedsim.engine.events import gradients_taken
    from fedsim.engine.streams import RoundDraws, Streams

    draws = RoundDraws(Streams(seed), np.arange(rows), 0)
    sizes = torch.from_numpy(_sizes(rows))

    def drawn(name: str) -> torch.Tensor:
        return (sizes * draws.normal(name, problem.dim)).to(problem.dtype)

    v = {name: drawn(name) for name in algorithm.variables}
    x0, g, other, mean = drawn("start"), drawn("gradient"), drawn("message"), drawn("mean")[:1]
    time, count = draws.uniform("elapsed", 1), draws.integers("count", 1, 100)
    calls: dict[str, tuple[Argument, ...]] = {
        "start": (x0, *({"gradient": g, "mean_gradient": mean}[taken] for taken in gradients_taken(algorithm))),
        "flow": (v, time),
        "point": (v,),
        "gradient": (v, g, count),
        "message": (v,),
        "gossip": (v, g, other),
        "output": (v,),
    }
    for name, arguments in calls.items():
        whole = _called(algorithm, name, arguments, slice(None))
        for block in BLOCKS:
            for begin in range(0, rows, block):
                chosen = slice(begin, begin + block)
                for part, value in _called(algorithm, name, arguments, chosen).items():
                    if value.tobytes() != whole[part][chosen].tobytes():
                        raise AssertionError(f"{name}: {part} of node {begin} is different in blocks of {block}{HINT}")


def _called(
    algorithm: EventAlgorithm, name: str, arguments: tuple[Argument, ...], rows: slice
) -> dict[str, NDArray[Any]]:
    """Return what a function says of some rows; refuse that it writes to what it is given."""
    given = [_part(argument, rows) for argument in arguments]
    tensors = [tensor for part in given for tensor in (part.values() if isinstance(part, dict) else [part])]
    before = [_bits(tensor) for tensor in tensors]
    with no_own_generators():
        value = getattr(algorithm, name)(*given)
    parts = value if isinstance(value, dict) else {name: value}
    found = {part: tensor.detach().contiguous().numpy().copy() for part, tensor in parts.items()}
    if [_bits(tensor) for tensor in tensors] != before:
        raise AssertionError(
            f"{name} modified what it was given; state, sent values and answers are read-only, return new ones"
        )
    return found


def _part(argument: Argument, rows: slice) -> Argument:
    """Return copies of some rows; a single one (a mean) serves all."""
    if isinstance(argument, dict):
        return {name: value[rows].clone() for name, value in argument.items()}
    return argument[rows].clone() if len(argument) > 1 else argument.clone()


def _resumed(play: _Play, length: int) -> Player:
    first, second = play.player(), play.player()
    first.advance(length // 2)
    second.load(first.save())
    second.advance(length)
    return second


def _state(player: Player) -> State:
    state = {name: np.array(value) for name, value in player.final().items()}
    watch = getattr(getattr(getattr(player, "_network", None), "answer", None), "__self__", None)
    if isinstance(watch, _Watched):
        watch.refuse_modified()
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
    """Notices answers of a network that were written to, whether by torch or behind its back."""

    def __init__(self, answer: Callable[[list[Request]], list[Any]]) -> None:
        self._answer = answer
        self._given: list[tuple[str, torch.Tensor | NDArray[Any], int, bytes]] = []

    def answer(self, requests: list[Request]) -> list[Any]:
        self.refuse_modified()
        answers = self._answer(requests)
        what = type(requests[0]).__name__
        self._given = [(what, part, _version(part), _bits(part)) for each in answers for part in _parts(each)]
        return answers

    def refuse_modified(self) -> None:
        for what, part, version, bits in self._given:
            if (_version(part), _bits(part)) != (version, bits):
                raise AssertionError(
                    f"the answer to {what} was modified in place; answers are read-only, other rows may share them"
                )


def _parts(answer: Any) -> list[torch.Tensor | NDArray[Any]]:
    """Return the arrays of an answer."""
    if isinstance(answer, torch.Tensor):
        return [answer]
    return [value for value in getattr(answer, "__dict__", {}).values() if isinstance(value, torch.Tensor | np.ndarray)]


def _version(array: torch.Tensor | NDArray[Any]) -> int:
    """Return how often torch wrote to a tensor."""
    return array._version if isinstance(array, torch.Tensor) else 0


def _bits(array: torch.Tensor | NDArray[Any]) -> bytes:
    return (array.detach().cpu().contiguous().numpy() if isinstance(array, torch.Tensor) else array).tobytes()
