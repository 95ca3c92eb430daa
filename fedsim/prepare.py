"""From a scenario to the objects of a run: topology, rates, problem, algorithm, player."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsim import registry
from fedsim.algorithms.algorithm import Algorithm, DynamicsAlgorithm, EventAlgorithm, SyncAlgorithm
from fedsim.engine import pace
from fedsim.engine.layout import Layout
from fedsim.engine.machine import Device, usable
from fedsim.errors import InputError
from fedsim.job import connected, made_by_rank_0
from fedsim.problems.problem import refuse_step, refuse_undeclared
from fedsim.setting import RunSetting

if TYPE_CHECKING:
    import torch

    from fedsim.engine.player import Player
    from fedsim.privacy.guard import Guard
    from fedsim.privacy.section import Privacy
    from fedsim.problems.problem import Problem
    from fedsim.scenario import Scenario
    from fedsim.topology.rates import Rates
    from fedsim.topology.topology import Topology
    from fedsim.transport.transport import Transport


@dataclass(frozen=True)
class Live:
    """Objects given from Python instead of a section of the scenario; None: built from the section."""

    topology: Topology | None = None
    problem: Problem | None = None
    algorithm: Algorithm | None = None


@dataclass(frozen=True, eq=False)
class Prepared:
    """Everything a run needs, resolved; nothing has been played yet."""

    scenario: Scenario
    topology: Topology
    problem: Problem
    algorithm: Algorithm
    setting: RunSetting
    rates: Rates | None
    layout: Layout
    device: Device
    cache: dict[str, Any] = field(default_factory=dict)

    def player(self) -> Player:
        """Return a fresh player; it starts from the scenario's start."""
        with self.scenario.origin.told("start"):
            x0 = start_rows(self.scenario, self.problem, self.layout)
        with self.scenario.origin.told("algorithm"):
            return _rounds(self, x0) if isinstance(self.algorithm, SyncAlgorithm) else _events(self, x0)


def prepare(scenario: Scenario, live: Live | None = None, shared: dict[str, Any] | None = None) -> Prepared:
    """Build and resolve everything that `scenario` names.

    Args:
        live: objects that replace sections.
        shared: a dictionary that the runs of one study pass along, so that equal sections are built once.

    Raises:
        InputError: a section cannot be built, or the algorithm's theory lacks something.
    """
    live = live or Live()
    shared = {} if shared is None else shared
    at = scenario.origin.told
    graph = (scenario.topology, scenario.data_seed)  # a random graph may take its seed from the data's
    with at("topology"):
        topology = live.topology or _once(shared, ("topology", *graph), lambda: _topology(scenario))
    with at("engine", "device"):
        device = _device(scenario, shared)
    with at("problem"):
        problem = live.problem or _once(
            shared,
            ("problem", scenario.problem, scenario.data_seed, topology.n, device.name),
            lambda: _problem(scenario, topology.n),
        )
        refuse_undeclared(problem)
        problem.use(device.name)
        if problem.n != topology.n:
            raise InputError(
                f"the problem has {problem.n} nodes, topology {topology.name!r} has {topology.n}; make them equal"
            )
    algorithm = live.algorithm or _algorithm(scenario)
    sync = isinstance(algorithm, SyncAlgorithm)
    with at("rates"):
        rates = None if sync or topology.is_server else _once(
            shared, ("rates", *graph, scenario.rates), lambda: _rates(scenario, topology)
        )  # fmt: skip
    with at("mixing"):
        mixing = None if not sync or topology.is_server else _once(
            shared, ("mixing", *graph, scenario.mixing), lambda: _mixing(scenario, topology)
        )  # fmt: skip
    with at("start"):
        common_start = _starts_together(scenario, problem)
    with at("privacy"):
        privacy = _privacy(scenario, algorithm)
    setting = RunSetting(
        problem,
        topology,
        None if rates is None else rates.rates,
        None if rates is None else rates.chi,
        mixing,
        common_start=common_start,
        rounds=int(scenario.schedule["horizon"]) if sync else 0,
        privacy=privacy,
        base=scenario.base,
    )
    with at("algorithm"):
        _refuse_no_prox(problem, algorithm, scenario.base)
        resolved = algorithm.resolve(setting)
        step = getattr(resolved, "eta", None)
        if algorithm.proximal and isinstance(step, float | int):
            refuse_step(problem, step, "algorithm.eta")
    layout = Layout(topology, transport=_transport(scenario))
    return Prepared(scenario, topology, problem, resolved, setting, rates, layout, device)


def _refuse_no_prox(problem: Problem, algorithm: Algorithm, base: Path) -> None:
    if problem.has_composite and not algorithm.proximal:
        have = [k for k in registry.KINDS["algorithm"] if registry.find("algorithm", k, base).proximal]
        name = getattr(algorithm, "kind", type(algorithm).__name__)
        raise InputError(
            f"problem.composite: {name} has no prox and would minimise f without r; these have: {', '.join(have)}"
            " (one's own says so by `proximal: ClassVar[bool] = True`)"
        )


def start_rows(scenario: Scenario, problem: Problem, layout: Layout) -> torch.Tensor:
    """Return where the rows start: `[rows, dim]`, by the scenario's `start` section.

    `zeros`; `normal` (one draw per node, times `scale`); `common_normal` (one draw for all); `given`
    (`value`: a list of `dim` numbers, or a `.npy` file of `[dim]` or `[n, dim]`).
    """
    import torch

    from fedsim.engine.streams import Streams

    kind, dtype = scenario.start.get("kind", "zeros"), problem.dtype
    shape = (layout.rows, problem.dim)
    if kind == "zeros":
        return torch.zeros(shape, dtype=dtype)
    scale = float(scenario.start.get("scale", 1.0))
    streams = Streams(scenario.seed)
    if kind == "normal":
        return torch.from_numpy(streams.normal("start", layout.nodes, 0, problem.dim) * scale).to(dtype)
    if kind == "common_normal":
        one = streams.normal("start", np.zeros(1, np.int64), 0, problem.dim) * scale
        return torch.from_numpy(np.repeat(one, layout.rows, axis=0)).to(dtype)
    if kind == "problem":
        own = problem.start(layout.nodes)
        if own is None:
            raise InputError(
                f"start.kind: 'problem' needs a problem that knows where to start; {problem.kind!r} does not"
            )
        return own.to(dtype)
    return _given_start(scenario, problem, layout).to(dtype)


def _starts_together(scenario: Scenario, problem: Problem) -> bool:
    """Return whether all nodes start from one point."""
    kind = scenario.start.get("kind", "zeros")
    if kind == "given":
        array = _given(scenario)
        return array.ndim < 2 or bool((array == array[:1]).all())
    return kind in ("zeros", "common_normal") or (kind == "problem" and problem.common_start)


def _given(scenario: Scenario) -> NDArray[np.float64]:
    value = scenario.start["value"]
    if isinstance(value, str):
        try:
            value = np.load(scenario.base / value, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"start.value: {value!r} cannot be read as .npy: {error}") from None
    array = np.asarray(value, dtype=np.float64)
    if not np.isfinite(array).all():
        raise InputError(f"start.value: {np.count_nonzero(~np.isfinite(array))} numbers are not finite")
    return array


def _given_start(scenario: Scenario, problem: Problem, layout: Layout) -> torch.Tensor:
    import torch

    array = _given(scenario)
    if array.shape == (problem.dim,):
        return torch.from_numpy(np.repeat(array[None], layout.rows, axis=0))
    if array.shape == (layout.n, problem.dim):
        return torch.from_numpy(np.ascontiguousarray(array[layout.nodes]))
    raise InputError(
        f"start.value: shape {array.shape} given, [{problem.dim}] or [{layout.n}, {problem.dim}] (one per node) needed"
    )


def _once(shared: dict[str, Any], key: tuple[Any, ...], build: Any) -> Any:
    name = repr(key)
    if name not in shared:
        shared[name] = build()
    return shared[name]


def _topology(scenario: Scenario) -> Topology:
    from fedsim.topology.build import build

    return build(scenario.topology, scenario.base, seed=scenario.data_seed)


def _problem(scenario: Scenario, n: int) -> Problem:
    from fedsim.problems.build import build

    return build(scenario.problem, n, scenario.data_seed, scenario.base)


def _algorithm(scenario: Scenario) -> Algorithm:
    return scenario.make_algorithm()


def _privacy(scenario: Scenario, algorithm: Algorithm) -> Privacy | None:
    """Return what is promised.

    Raises:
        InputError: the algorithm releases what no plan of it covers.
    """
    from fedsim.algorithms.private import PrivateAlgorithm
    from fedsim.checks import build
    from fedsim.privacy.section import Privacy

    if scenario.privacy is None:
        return None
    if not isinstance(algorithm, PrivateAlgorithm):
        have = [k for k in registry.KINDS["algorithm"] if _is_private(k, scenario.base)]
        raise InputError(
            f"privacy: {getattr(algorithm, 'kind', type(algorithm).__name__)} sends what is not protected; these keep"
            f" the promise: {', '.join(have)}"
        )
    return build(Privacy, scenario.privacy)


def _is_private(kind: str, base: Path) -> bool:
    from fedsim.algorithms.private import PrivateAlgorithm

    return issubclass(registry.find("algorithm", kind, base), PrivateAlgorithm)


def guard_of(p: Prepared) -> Guard | None:
    """Return the guard of a private algorithm's releases; without a `privacy` section it adds nothing."""
    from fedsim.algorithms.private import PrivateAlgorithm
    from fedsim.privacy.guard import Guard
    from fedsim.privacy.plan import multipliers, promised

    if not isinstance(p.algorithm, PrivateAlgorithm):
        return None
    privacy = p.setting.privacy
    z = {} if privacy is None else multipliers(privacy, p.algorithm.plan(p.setting))
    bounds = [privacy.epsilon if privacy else None, (p.scenario.stop or {}).get("epsilon")]
    budget = min((float(b) for b in bounds if b is not None), default=None)
    # a seed of its own for every scenario: noise that two releases share could be subtracted
    seed = int(hashlib.sha256(f"noise {p.scenario.digest()}".encode()).hexdigest()[:16], 16)
    guard = Guard(privacy, z, p.problem, p.layout, seed, budget)
    if guard.ledger is not None and privacy is not None and budget == privacy.epsilon:
        guard.ledger.promised = promised(z, p.algorithm.plan(p.setting))
    return guard


def _rates(scenario: Scenario, topology: Topology) -> Rates:
    """Return the rates of the section; its `scale: theory` (default) sets them to `2 chi1 chi2 = 1`."""
    from fedsim.topology.rates import Rates, build_rates

    section = dict(scenario.rates or {"kind": "uniform"})
    scale = section.pop("scale", "theory")
    if section.get("kind") == "sdp":  # solvers may differ from host to host
        rates = Rates.from_plain(
            made_by_rank_0(lambda: build_rates(section, topology, scenario.base).as_plain(), _transport(scenario))
        )
    else:
        rates = build_rates(section, topology, scenario.base)
    return rates if scale == "none" else rates.theory()


def _mixing(scenario: Scenario, topology: Topology) -> Any:
    from fedsim.topology.mixing import build_mixing

    section = scenario.mixing or {"kind": "metropolis"}
    if section.get("kind") not in ("fdla", "fastest_mixing"):
        return build_mixing(section, topology, scenario.base)
    from scipy.sparse import csr_array

    def solve() -> dict[str, Any]:
        m = csr_array(build_mixing(section, topology, scenario.base))
        return {"data": m.data.tolist(), "indices": m.indices.tolist(), "offsets": m.indptr.tolist()}

    parts = made_by_rank_0(solve, _transport(scenario))
    return csr_array((parts["data"], parts["indices"], parts["offsets"]), shape=(topology.n, topology.n))


def _device(scenario: Scenario, shared: dict[str, Any]) -> Device:
    """Return this process's device, which all processes agree on once."""
    kind = scenario.engine["device"]
    return _once(shared, ("device", kind), lambda: usable(kind, _transport(scenario)))


def _transport(scenario: Scenario) -> Transport:
    return connected(scenario.engine["transport"], scenario.engine["timeout"])


def _rounds(p: Prepared, x0: torch.Tensor) -> Player:
    from fedsim.engine.rounds import Rounds
    from fedsim.topology.spectral import laplacian

    matrices = {}
    if not p.topology.is_server:
        lap = laplacian(p.topology)
        matrices = {"W": p.setting.mixing, "laplacian": lap, "adjacency": _without_diagonal(lap)}
    block = p.scenario.engine.get("block", "auto")
    if block == "auto" and p.scenario.engine["device"] != "cpu":
        block = max(1, p.layout.rows)  # a device is busy with all rows at once, and has no cache to fit
    assert isinstance(p.algorithm, SyncAlgorithm)
    guard, links = guard_of(p), None
    if p.device.name != "cpu" and p.algorithm.on_device:
        x0, links = x0.to(p.device.name), p.layout.transport.links(*p.device)
    player = Rounds(
        p.algorithm, p.problem, p.layout, matrices, x0, p.scenario.seed, block, p.scenario.stop, guard, links
    )
    player.set_pace(pace.of(p.scenario.engine, p.layout.rank))
    return player


def _without_diagonal(matrix: Any) -> Any:
    from scipy.sparse import diags_array

    rest = (diags_array(matrix.diagonal()) - matrix).tocsr()
    rest.eliminate_zeros()
    return rest


def _events(p: Prepared, x0: torch.Tensor) -> Player:
    from fedsim.engine.events import Events

    assert isinstance(p.algorithm, DynamicsAlgorithm | EventAlgorithm)
    arguments = p.algorithm, p.setting, p.problem, p.layout, p.setting.rates, x0, p.scenario.seed
    sampling, output = getattr(p.algorithm, "batch", None), p.scenario.record.get("output", "flowed")
    if p.scenario.schedule.get("kind") == "live":
        from fedsim.live.player import LiveEvents

        speed = pace.of(p.scenario.engine, p.layout.rank) or pace.Pace()
        unit = p.scenario.schedule.get("unit")
        return LiveEvents(*arguments, unit=unit, pace=speed, sampling=sampling, output=output)
    player = p.scenario.engine.get("player", "auto")
    return Events(*arguments, sampling=sampling, output=output, player=player, stop=p.scenario.stop)


def provenance(algorithm: Algorithm) -> dict[str, str]:
    """Return what a reader must know of where the algorithm comes from."""
    kind = getattr(algorithm, "kind", type(algorithm).__name__)
    return {
        "algorithm": kind,
        "paper": getattr(algorithm, "paper", "the user's own"),
        "provenance": getattr(algorithm, "provenance", "the user's own"),
    }


def folder_for(name: str, root: Path) -> Path:
    """Make and return `root/name`, or `root/name-2`, ... : a folder that no other run has."""
    root.mkdir(parents=True, exist_ok=True)
    path, count = root / name, 1
    while True:
        try:
            path.mkdir()
            return path
        except FileExistsError:
            count += 1
            path = root / f"{name}-{count}"
