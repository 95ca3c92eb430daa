"""Composite terms: prox against brute force, exact zeros, refusals."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedsim
from fedsim.errors import InputError
from fedsim.problems.build import build as build_problem
from fedsim.problems.composite import build

SCALAR = {
    "l1": {"weight": 0.7},
    "elastic_net": {"l1": 0.5, "l2": 2.0},
    "mcp": {"weight": 0.6, "g": 3.0},
    "scad": {"weight": 0.4, "a": 3.1},
    "box": {"low": -0.3, "high": 1.1},
    "non_negative": {},
    "none": {},
}
WHOLE = {"group_lasso": {"weight": 0.5, "size": 2}, "ball": {"radius": 0.8}}


def term(kind):
    return build({"kind": kind, **{**SCALAR, **WHOLE}[kind]}, None)


@pytest.mark.parametrize("kind", SCALAR)
@settings(max_examples=60, deadline=None)
@given(v=st.floats(-4, 4), step=st.floats(0.05, 1.8))
def test_a_coordinates_prox_is_the_minimiser(kind, v, step):
    """No point of a fine grid around and over the range is better than the closed form."""
    r = term(kind)
    found = r.prox(torch.tensor([[v]], dtype=torch.float64), step)
    grid = torch.from_numpy(np.r_[np.linspace(-5, 5, 4001), float(found) + np.linspace(-1e-3, 1e-3, 101)])[:, None]

    def cost(x):
        return r.value(x) + ((x[:, 0] - v) ** 2) / (2 * step)

    assert float(cost(found)[0]) <= float(cost(grid).min()) + 1e-12


@pytest.mark.parametrize("kind", WHOLE)
def test_a_rows_prox_is_the_minimiser(kind):
    """For terms that couple coordinates: no random point nearby or far is better."""
    r, rng = term(kind), np.random.default_rng(0)
    for _ in range(20):
        v = torch.from_numpy(rng.standard_normal((1, 5)) * rng.uniform(0.1, 2))
        found = r.prox(v, 0.7)
        others = found + torch.from_numpy(rng.standard_normal((4000, 5)) * 10.0 ** rng.uniform(-5, 0, (4000, 1)))
        inside = others if kind != "ball" else others * (0.8 / others.norm(dim=1, keepdim=True)).clamp(max=1.0)

        def cost(x, v=v):
            return r.value(x) + ((x - v) ** 2).sum(dim=1) / 1.4

        assert float(cost(found)[0]) <= float(cost(inside).min()) + 1e-9


def test_the_soft_threshold_is_exact():
    """(0.3, -0.05, 0.05, 0) at threshold 0.05 becomes (0.25, 0, 0, 0); zeros are +0.0; it scales with the step."""
    r = build({"kind": "l1", "weight": 0.5}, None)
    v = torch.tensor([[0.3, -0.05, 0.05, -0.0]], dtype=torch.float64)
    out = r.prox(v, 0.1)
    assert out.tolist() == [[0.25, 0.0, 0.0, 0.0]]
    assert not torch.signbit(out).any()
    assert (r.prox(v, 1.0) == 0).all()


def test_groups_vanish_together():
    """A group whose norm is below the threshold becomes exactly 0, the others keep their direction."""
    r = build({"kind": "group_lasso", "weight": 1.0, "size": 2}, None)
    v = torch.tensor([[0.1, -0.2, 3.0, 4.0, 2.0]], dtype=torch.float64)
    out = r.prox(v, 0.5)[0]
    shrink = 1 - 0.5 * 2**0.5 / 5
    assert out.tolist() == pytest.approx([0.0, 0.0, 3 * shrink, 4 * shrink, 1.5])
    assert (out[:2] == 0).all()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kind": "l2norm"}, "composite.kind: 'l2norm' is not known"),
        ({"kind": "l1"}, "composite.weight"),
        ({"kind": "l1", "weight": -1.0}, "composite.weight"),
        ({"kind": "l1", "wight": 1.0}, "did you mean 'weight'"),
        ({"kind": "box", "low": 1.0, "high": 0.0}, "low < high needed"),
        ({"kind": "scad", "weight": 1.0, "a": 2.0}, "composite.a"),
    ],
)
def test_wrong_terms_are_refused(section, message):
    """The key, what was given, what is needed."""
    with pytest.raises(InputError, match=message):
        build(section, None)


def test_a_step_too_long_for_a_weakly_convex_term_is_refused():
    """The prox of MCP needs step < g."""
    with pytest.raises(InputError, match="needs a step below g = 3"):
        term("mcp").prox(torch.zeros(1, 1), 3.0)


@pytest.mark.parametrize("kind", [*SCALAR, *WHOLE])
def test_what_is_no_number_is_not_made_one(kind):
    """A gradient that has overflowed stays visible through every prox: a zero in its stead would hide divergence."""
    v = torch.tensor([[np.nan, 1.0, -0.0]], dtype=torch.float64)
    out = term(kind).prox(v, 0.1)
    assert out[0, 0].isnan()
    assert kind == "none" or not torch.signbit(out[out == 0]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_means_on_the_edge_of_a_constraint_are_feasible(dtype):
    """The mean of equal points on the edge is off by a rounding, and must not have an infinite loss."""
    box = build({"kind": "box", "low": -1.0, "high": 0.1}, None)
    for n in (3, 6, 7):
        assert box.value(torch.full((n, 4), 0.1, dtype=dtype).sum(dim=0, keepdim=True) / n) == 0
    assert box.value(torch.full((1, 4), 0.1001, dtype=dtype)) == torch.inf
    v = torch.from_numpy(np.random.default_rng(0).normal(size=(500, 50))).to(dtype)
    ball = term("ball")
    assert (ball.value(ball.prox(v, 1.0)) == 0).all()
    assert ball.value(1.01 * ball.prox(v, 1.0)).isinf().all()


GIVEN = {
    "name": "l1",
    "topology": {"kind": "ring", "n": 4},
    "problem": {"kind": "quadratic", "dim": 5, "composite": {"kind": "l1", "weight": 0.4}},
    "algorithm": {"kind": "dproxsgt", "eta": 0.05},
    "schedule": {"horizon": 600},
    "record": {"every": 600},
}


def test_a_scenario_with_a_term_runs_to_its_optimum(tmp_path):
    """`problem.composite` reaches prox, loss, optimum and the columns of sparsity."""
    result = fedsim.run(GIVEN, folder=tmp_path / "out")
    last = result.metrics.iloc[-1]
    assert last["distance"] < 1e-20
    assert {"nonzeros", "nonzeros_half", "nonzeros_x"} <= set(result.metrics)
    assert result.facts["problem"]["composite"] == "L1(weight=0.4)"


MCP = {"kind": "mcp", "weight": 0.1, "g": 0.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"algorithm": {"kind": "dproxsgt", "eta": 0.5}},
            r"algorithm.eta: 0.5 given; .*\(rho = 2\).* below 1/rho = 0.5",
        ),
        ({"algorithm": {"kind": "allreduce_sgd", "eta": 2.0}}, "algorithm.eta: 2 given"),
        ({"record": {"every": 600, "step": 1.0, "metrics": ["stationarity"]}}, "record.step: 1 given; .* 1/rho = 0.5"),
    ],
)
def test_a_step_that_is_too_long_is_refused_before_anything_runs(tmp_path, changes, message):
    """The step of the method and that of the recorded mapping both must keep the prox of a weakly convex term one."""
    scenario = {**GIVEN, "problem": {**GIVEN["problem"], "composite": MCP}, **changes}
    with pytest.raises(InputError, match=message):
        fedsim.run(scenario, folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_step_of_the_recorded_mapping_is_recorded(tmp_path):
    """`stationarity` is for a step that a reader can find, also where it is the default 1/L."""
    found = {}
    for step in (None, 0.2):
        record = {"every": 600, "metrics": ["stationarity"], **({"step": step} if step else {})}
        result = fedsim.run({**GIVEN, "record": record}, folder=tmp_path / str(step))
        found[step] = result.facts["stationarity_step"]
    assert found[0.2] == 0.2
    assert 0 < found[None] < 1


def test_a_term_may_be_of_some_parameters_only(tmp_path):
    """`parameters: ['*weight']` makes weights sparse and leaves biases alone; a name that is none is refused."""
    problem = {
        "kind": "module",
        "hidden": [4],
        "data": {"kind": "iris"},
        "composite": {"kind": "l1", "weight": 10.0, "parameters": ["*weight"]},
    }
    made = build_problem(problem, 2, 0, tmp_path)
    assert made.tensor_names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    v = torch.full((1, made.dim), -0.5, dtype=torch.float64)
    kept = (made.prox(v, 1.0) != 0)[0].split(made.tensor_sizes)
    assert [bool(part.all()) for part in kept] == [False, True, False, True]
    assert float(made.composite(v)[0]) == 10 * 0.5 * (16 + 12)
    assert "'*weight'" not in made.facts()["composite"]
    with pytest.raises(InputError, match=r"parameters: 'bais' names none of 0.weight"):
        build_problem({**problem, "composite": {**problem["composite"], "parameters": ["bais"]}}, 2, 0, tmp_path)
    scenario = {**GIVEN, "problem": {**problem, "composite": {**problem["composite"], "parameters": "*"}}}
    with pytest.raises(InputError, match=r"composite.parameters: .* a list of names"):
        fedsim.run(scenario, folder=tmp_path / "out")


@pytest.mark.parametrize("algorithm", [{"kind": "dadao"}, {"kind": "gradient_tracking", "eta": 0.1}])
def test_methods_without_a_prox_refuse_a_term(tmp_path, algorithm):
    """They would minimise another objective; the message names those that can."""
    with pytest.raises(InputError, match=r"has no prox and would minimise f without r; these have: .*dproxsgt"):
        fedsim.run({**GIVEN, "algorithm": algorithm}, folder=tmp_path / "out")


def test_ones_own_constraint_may_forbid_the_start(tmp_path):
    """A term in a file beside the scenario forbids the start, where the loss is infinite, and not the end."""
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nimport torch\nfrom fedsim.problems.composite import Term\n\n\n"
        "@dataclass(frozen=True)\nclass Above(Term):\n    low: float\n\n"
        "    def value(self, x):\n        return torch.where((x >= self.low).all(dim=1), 0.0, torch.inf)\n\n"
        "    def prox(self, v, step):\n        return v.clamp(min=self.low)\n"
    )
    own = {"kind": "mine.py:Above", "low": 0.7}
    scenario = {**GIVEN, "problem": {**GIVEN["problem"], "composite": own}, "record": {"every": 300}}
    (tmp_path / "s.yaml").write_text(json.dumps(scenario))
    losses = fedsim.run(tmp_path / "s.yaml", folder=tmp_path / "out").metrics["loss"]
    assert losses.iloc[0] == np.inf
    assert np.isfinite(losses.iloc[-1])
