"""From a scenario's `problem` section to a Problem."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim import registry
from fedsim.errors import InputError, did_you_mean
from fedsim.problems.parameters import (
    ConsensusParameters,
    LogisticParameters,
    ModuleParameters,
    MultinomialParameters,
    QuadraticParameters,
    RidgeParameters,
)
from fedsim.problems.problem import Problem

if TYPE_CHECKING:
    from fedsim.problems.data.table import Data


def build(spec: Mapping[str, Any], n: int, seed: int, base: Path) -> Problem:
    """Return the problem of `{kind, data, partition, composite, ...}` for n nodes.

    A user's own class (`package.module:Class`, `file.py:Class`) is a `Problem` with one of two class methods:
    `from_records(data: Data, parts: list[NDArray], KEYS...)` gets the loaded data, each node's record numbers,
    and the section's other keys by name; `from_scenario(parameters: dict, n: int, seed: int, base: Path)` gets the
    section without `kind` and reads everything itself.

    Raises:
        InputError: a key, the data or the partition cannot be used.
    """
    section = dict(spec)
    composite = section.pop("composite", None)
    problem = _smooth(section, n, seed, base)
    if composite is None or composite.get("kind") == "none":
        return problem
    from fedsim.problems.composite import OnTensors
    from fedsim.problems.composite import build as term
    from fedsim.problems.regularised import Regularised

    values = dict(composite)
    patterns = values.pop("parameters", None)
    made = term(values, base)
    if patterns is not None:
        made = OnTensors(made, tuple(patterns), problem.tensor_names, problem.tensor_sizes)
    return Regularised(problem, made)


def _smooth(section: dict[str, Any], n: int, seed: int, base: Path) -> Problem:
    kind = str(section.pop("kind"))
    cls = registry.find("problem", kind, base)
    if ":" in kind:
        return _own(cls, kind, section, n, seed, base)
    data_spec, partition_spec = section.pop("data", None), section.pop("partition", None)
    if not cls.needs_data:
        for name, given in (("data", data_spec), ("partition", partition_spec)):
            if given is not None:
                raise InputError(f"problem.{name}: {kind} makes its own objectives; leave {name} out")
        made = _parameters(cls, section)
        return made.problem(n, seed, base) if hasattr(made, "problem") else _made(made, n, seed)
    if data_spec is None:
        raise InputError(f"problem.data: missing; {kind} needs records, such as data: {{kind: breast_cancer}}")
    data, parts = _split(data_spec, partition_spec, n, seed, base)
    return _from_records(kind, _parameters(cls, section), data, parts, seed, base)


def _parameters(cls: type, values: dict[str, Any]) -> Any:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"problem.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _split(
    data_spec: dict[str, Any], partition_spec: dict[str, Any] | None, n: int, seed: int, base: Path
) -> tuple[Data, list[np.ndarray]]:
    from fedsim.problems.data.sources import load
    from fedsim.problems.partition import partition

    data = load(data_spec, base, n=n, seed=seed)
    default = "node" if "node" in data.columns and str(data_spec["kind"]).startswith(("synthetic", "dadao")) else "iid"
    return data, partition(data, n, partition_spec or {"kind": default}, seed=seed)


def _from_records(kind: str, p: Any, data: Data, parts: list[np.ndarray], seed: int, base: Path) -> Problem:
    if isinstance(p, ModuleParameters):
        return _module(p, data, parts, seed, base)
    if data.vocabulary:
        raise InputError(f"problem.data: {kind} needs numbers, and {data.name!r} is text; kind: module reads text")
    if hasattr(p, "from_records"):
        return p.from_records(data, parts, seed)
    if isinstance(p, LogisticParameters):
        from fedsim.problems.logistic import Logistic

        return Logistic(data, parts, p.l2, p.weights)
    if isinstance(p, MultinomialParameters):
        from fedsim.problems.logistic import Multinomial

        return Multinomial(data, parts, p.l2, p.weights)
    from fedsim.problems.least_squares import LeastSquares

    return LeastSquares(data, parts, p.l2 if isinstance(p, RidgeParameters) else 0.0, p.weights, kind)


def _module(p: ModuleParameters, data: Data, parts: list[np.ndarray], seed: int, base: Path) -> Problem:
    from fedsim.problems import losses
    from fedsim.problems.module import ModuleProblem

    loss = losses.default(data) if p.loss is None else p.loss
    made = registry.find("model", loss, base) if ":" in loss else loss
    model = _model(p, data, loss, seed if p.seed is None else p.seed, base)
    return ModuleProblem(model, data, parts, made, p.l2, p.weights, p.dtype)


def _model(p: ModuleParameters, data: Data, loss: str, seed: int, base: Path) -> Any:
    """Return the model for inputs and outputs of these data."""
    import torch

    from fedsim.problems.models.mlp import mlp

    features = data.features.shape[1] - bool(data.vocabulary)
    outputs = len(data.vocabulary) or (1 if loss == "mean_square" or data.task == "regression" else len(data.classes))
    _refuse_mismatch(p, data)
    if p.model in ("mlp", "softmax"):
        hidden = list(p.hidden) if p.model == "mlp" else []
        return mlp(features, outputs, hidden, seed, p.activation, p.initial)
    cls = registry.find("model", p.model, base)
    with torch.random.fork_rng(devices=[]):  # a module draws its own first weights from torch's generator
        torch.manual_seed(seed)
        try:
            return cls(features, outputs, **p.arguments)
        except TypeError as error:
            raise InputError(
                f"problem.arguments: {p.model} called with ({features}, {outputs}, ...): {error}"
            ) from None


def _refuse_mismatch(p: ModuleParameters, data: Data) -> None:
    """Refuse a shipped model of something else than the data hold, and arguments that it has not."""
    shipped = ":" not in p.model
    if shipped and (p.model == "transformer") != bool(data.vocabulary):
        have = "text, which transformer reads" if data.vocabulary else "no text, which transformer needs"
        raise InputError(f"problem.model: {p.model} given; data {data.name!r} hold {have}")
    if p.arguments and p.model in ("mlp", "softmax"):
        raise InputError(f"problem.arguments: {p.model} has none; say hidden, activation and initial")


def _made(p: Any, n: int, seed: int) -> Problem:
    from fedsim.problems.data.draws import generator
    from fedsim.problems.quadratic import Consensus, Quadratic, random_quadratic

    rng = generator(seed if p.seed is None else p.seed, "problem")
    if isinstance(p, ConsensusParameters):
        return Consensus(rng.standard_normal((n, p.dim)) if p.values is None else _rows("values", p.values, n))
    assert isinstance(p, QuadraticParameters)
    if p.centres is None and p.curvatures is None:
        return random_quadratic(n, p.dim, p.condition, p.heterogeneity, p.shape == "diagonal", rng)
    if p.centres is None:
        raise InputError("problem.centres: missing; given curvatures need given centres ([n][dim])")
    centres = _rows("centres", p.centres, n)
    curvatures = np.ones_like(centres) if p.curvatures is None else _array("curvatures", p.curvatures)
    curvatures = np.repeat(curvatures[:, None], centres.shape[1], axis=1) if curvatures.ndim == 1 else curvatures
    return Quadratic(curvatures, centres)


def _array(name: str, values: list[Any]) -> np.ndarray:
    try:
        return np.array(values, dtype=np.float64)
    except ValueError:
        raise InputError(
            f"problem.{name}: its lists differ in length; one row per node of equal lengths needed"
        ) from None


def _rows(name: str, values: list[list[float]], n: int) -> np.ndarray:
    array = _array(name, values)
    if array.ndim != 2 or len(array) != n or not array.shape[1]:
        raise InputError(f"problem.{name}: shape {array.shape} given, [{n}][dim] needed (one row per node)")
    return array


def _own(cls: Any, kind: str, section: dict[str, Any], n: int, seed: int, base: Path) -> Problem:
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise InputError(f"problem.kind: {kind} does not define {', '.join(missing)}")
    if hasattr(cls, "from_records"):
        data_spec, partition_spec = section.pop("data", None), section.pop("partition", None)
        if data_spec is None:
            raise InputError(f"problem.data: missing; {kind} needs records, such as data: {{kind: breast_cancer}}")
        _refuse_unknown(cls.from_records, kind, section)
        method, problem = "from_records", cls.from_records(*_split(data_spec, partition_spec, n, seed, base), **section)
    elif hasattr(cls, "from_scenario"):
        method, problem = "from_scenario", cls.from_scenario(section, n, seed, base)
    else:
        raise InputError(
            f"problem.kind: {kind}: needs a class method: from_records(data, parts, ...) or"
            " from_scenario(parameters, n, seed, base)"
        )
    if not isinstance(problem, Problem):
        raise InputError(
            f"problem.kind: {kind}: {method} returned {type(problem).__name__}, a fedsim Problem is needed"
        )
    return problem


def _refuse_unknown(method: Any, kind: str, section: dict[str, Any]) -> None:
    """Refuse keys that the method has no parameter for, and parameters that the section leaves open."""
    wanted = list(inspect.signature(method).parameters.values())[2:]
    if any(p.kind is p.VAR_KEYWORD for p in wanted):
        return
    names = [p.name for p in wanted]
    for key in section:
        if key not in names:
            raise InputError(f"problem.{key}: unknown key{did_you_mean(key, names)}; {kind} knows {', '.join(names)}")
    for p in wanted:
        if p.default is p.empty and p.name not in section:
            raise InputError(f"problem.{p.name}: this key is missing; {kind} needs it")
