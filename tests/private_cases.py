"""Small private runs that several tests need."""

from pathlib import Path

import torch

from fedsim.engine.layout import Layout
from fedsim.engine.rounds import Rounds
from fedsim.prepare import Live, prepare
from fedsim.privacy.guard import Guard
from fedsim.privacy.plan import multipliers
from fedsim.problems.build import build
from fedsim.scenario import load_study

NETWORK = {
    "kind": "module", "hidden": [10], "activation": "softplus", "initial": "uniform",
    "data": {"kind": "breast_cancer", "normalise": "columns"}, "partition": {"kind": "round_robin"},
}  # fmt: skip
LOGISTIC = {"kind": "logistic", "l2": 0.01, "data": {"kind": "breast_cancer", "normalise": "both"}}


def problem(section, n=5):
    return build(section, n, 0, Path())


def scenario(algorithm, section=None, privacy=None, n=5, rounds=12, **more):
    """Return a scenario on a server."""
    content = {
        "topology": {"kind": "server", "n": n},
        "problem": section or LOGISTIC,
        "algorithm": algorithm,
        "schedule": {"horizon": rounds},
        "record": {"every": rounds},
        **({"privacy": {"delta": 1e-5, **privacy}} if privacy else {}),
        **more,
    }
    return content


def prepared(*arguments, live=None, **options):
    """Return what `scenario` describes, prepared; `live` is a problem given as an object."""
    content, objects = scenario(*arguments, **options), Live(problem=live)
    return prepare(load_study(content, live=objects).runs[0], objects)


def played(p, rounds, block="auto", seed=0, taps=(), guard=None):
    """Return a player of a prepared run after some rounds; `taps` hear every release."""
    layout = Layout(p.topology)
    privacy = p.setting.privacy
    z = {} if privacy is None else multipliers(privacy, p.algorithm.plan(p.setting))
    guard = guard or Guard(privacy, z, p.problem, layout, seed)
    guard.taps += taps
    own = p.problem.start(layout.nodes)
    x0 = torch.zeros(layout.rows, p.problem.dim, dtype=torch.float64) if own is None else own
    made = Rounds(p.algorithm, p.problem, layout, {}, x0, seed, block, guard=guard)
    made.start()
    made.advance(rounds)
    return made


def answer(player):
    """Return the server's point `[dim]`."""
    return player.outputs()[0]
