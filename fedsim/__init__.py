"""fedsim: decentralized and federated optimization; one scenario file on every engine, with the same numbers.

result = fedsim.run("scenarios/quickstart.yaml")
result.metrics            # a pandas frame
result.plot()             # PNG and SVG
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsim.algorithms.algorithm import (
        Constant,
        DynamicsAlgorithm,
        EventAlgorithm,
        Guarantee,
        Sampling,
        SyncAlgorithm,
    )
    from fedsim.algorithms.dynamics import Dynamics
    from fedsim.algorithms.requests import Gather, Mean, Mix, Rows, Shared, Sum
    from fedsim.check import check
    from fedsim.errors import Diverged, FedsimError, InputError, RunError, Unsupported
    from fedsim.problems.problem import CompiledObjective, Minibatch, Problem
    from fedsim.results.compare import compare
    from fedsim.results.result import Result, StudyResult, load
    from fedsim.run import resume, run
    from fedsim.sweeping import sweep
    from fedsim.topology.topology import Topology

# Where each public name lives; imported on first use, since torch alone takes over a second.
_HOME = {
    "Constant": "algorithms.algorithm",
    "DynamicsAlgorithm": "algorithms.algorithm",
    "EventAlgorithm": "algorithms.algorithm",
    "Guarantee": "algorithms.algorithm",
    "Sampling": "algorithms.algorithm",
    "SyncAlgorithm": "algorithms.algorithm",
    "Dynamics": "algorithms.dynamics",
    "Gather": "algorithms.requests",
    "Mean": "algorithms.requests",
    "Mix": "algorithms.requests",
    "Rows": "algorithms.requests",
    "Shared": "algorithms.requests",
    "Sum": "algorithms.requests",
    "check": "check",
    "Diverged": "errors",
    "FedsimError": "errors",
    "InputError": "errors",
    "RunError": "errors",
    "Unsupported": "errors",
    "CompiledObjective": "problems.problem",
    "Minibatch": "problems.problem",
    "Problem": "problems.problem",
    "compare": "results.compare",
    "Result": "results.result",
    "StudyResult": "results.result",
    "load": "results.result",
    "resume": "run",
    "run": "run",
    "sweep": "sweeping",
    "Topology": "topology.topology",
}

__all__ = [
    "CompiledObjective",
    "Constant",
    "Diverged",
    "Dynamics",
    "DynamicsAlgorithm",
    "EventAlgorithm",
    "FedsimError",
    "Gather",
    "Guarantee",
    "InputError",
    "Mean",
    "Minibatch",
    "Mix",
    "Problem",
    "Result",
    "Rows",
    "RunError",
    "Sampling",
    "Shared",
    "StudyResult",
    "Sum",
    "SyncAlgorithm",
    "Topology",
    "Unsupported",
    "check",
    "compare",
    "load",
    "resume",
    "run",
    "sweep",
]


class _Package(ModuleType):
    """Keeps `fedsim.check` a function when the module of the same name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedsim' has no attribute {name!r}")
    value = getattr(import_module(f"fedsim.{_HOME[name]}"), name)
    globals()[name] = value
    return value
