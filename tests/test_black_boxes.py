"""Black boxes: synthetic ones, attacks, metrics, users' own code; queries counted, logged, ended exactly."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import launch, needs_mpi

import fedsim
from fedsim import testing
from fedsim.engine.counts import Counts
from fedsim.engine.oracle import BlockOracle
from fedsim.engine.queries import Spent
from fedsim.engine.streams import Streams
from fedsim.errors import InputError, RunError, Unsupported
from fedsim.problems.build import build
from fedsim.problems.functions import STANDARD
from fedsim.problems.metric import score

DIGITS = {"data": {"kind": "digits"}, "partition": {"kind": "shards", "shards": 7, "seed": 0}}


def problem(n=5, base=None, **section):
    """Return a problem by its section."""
    return build(section, n, 3, base or Path())


def oracle(p, budget=None, nodes=None):
    """Return an oracle of all nodes, and what it counts."""
    counts = Counts()
    return BlockOracle(p, np.arange(p.n) if nodes is None else nodes, Streams(0), counts, budget), counts


@pytest.mark.parametrize("C", [0.5, 5.0, 50.0])
def test_the_mean_of_the_quadratics_does_not_depend_on_heterogeneity(C):
    """mean_i f_i = (1/(10 d)) [sum_j (u_j^2 + u_j) + 1]; the start is that of the authors' draws; F* at 0.475."""
    p = problem(kind="synthetic_quadratic", heterogeneity=C, seed=1234)
    x = torch.rand(4, 300, generator=torch.Generator().manual_seed(0)).double()
    mean = p.values(x.expand(5, -1, -1), np.arange(5)).mean(dim=0)
    u = 20 * x - 10
    assert torch.allclose(mean, ((u * u + u).sum(1) + 1) / 3000, rtol=1e-12, atol=1e-12)
    start = float(p.loss(p.start(np.arange(5)), np.arange(5)).mean())
    assert start == pytest.approx(3.34177, abs=5e-6)
    best = float(p.loss(p.optimum()[None], np.arange(5)).mean())
    assert best == pytest.approx(-0.025 + 0.1 / 300, abs=1e-12)


@pytest.mark.parametrize(("name", "at_two"), [("ackley", 6.593599), ("levy", 0.625), ("rastrigin", 4.0)])
def test_standard_functions_in_one_dimension(name, at_two):
    """A line is enough for all that join no coordinates: their values at 2, worked out by hand."""
    assert float(STANDARD[name].function(torch.full((1, 1), 2.0).double())) == pytest.approx(at_two, abs=1e-6)
    p = problem(kind="test_function", function=name, dim=1)
    assert (p.loss(p.start(np.arange(5)), np.arange(5)) > 0).all()


@pytest.mark.parametrize("name", STANDARD)
def test_standard_functions_are_least_where_they_say(name):
    """Each is 0 at its minimiser, shifted and rotated: f_i is 0 at its own; values have the same bits in any block."""
    function = STANDARD[name]
    assert function.function(torch.full((1, 6), function.best).double()).abs() < 1e-12
    p = problem(kind="test_function", function=name, dim=6, shift=0.1)
    low, high = function.box
    own = (function.best + p._shifts - low) / (high - low)
    assert p.loss(own, np.arange(5)).abs().max() < 1e-9
    x = torch.rand(5, 6, generator=torch.Generator().manual_seed(1)).double()
    assert (p.loss(x, np.arange(5)) > 0).all()
    whole = p.values(x[:, None], np.arange(5))
    assert torch.equal(whole[2:4], p.values(x[2:4, None], np.arange(2, 4)))


def test_any_dimension_needs_no_square_matrix():
    """A rotated function in dimension 20,000 is made and evaluated."""
    p = problem(2, kind="test_function", function="levy", dim=20_000)
    assert p.loss(p.start(np.arange(2)), np.arange(2)).isfinite().all()


@pytest.mark.parametrize("metric", ["precision", "recall", "f1", "jaccard"])
def test_metrics_are_those_of_scikit_learn(metric):
    """The macro mean over the classes that occur, 0 for 0/0."""
    import sklearn.metrics

    rng = np.random.default_rng(0)
    reference = getattr(sklearn.metrics, f"{metric}_score")
    for _ in range(20):
        labels, predicted = rng.integers(0, rng.integers(2, 6), 30), rng.integers(0, 5, 30)
        expected = reference(labels, predicted, average="macro", zero_division=0)
        assert score(metric, labels, predicted, 7) == pytest.approx(expected, abs=1e-12)


def test_metric_optimisation_starts_from_the_trained_model():
    """x = 0.5 is the model trained on the other half; clients' values are 1 - metric; a change changes them."""
    p = problem(kind="metric_optimisation", data={"kind": "wine", "normalise": "columns"}, metric="f1")
    x = torch.full((1, p.dim), 0.5).double()
    assert p.metrics()["f1"](x) > 0.9
    other = torch.rand(1, p.dim, generator=torch.Generator().manual_seed(0)).double()
    assert p.loss(other, np.arange(5)).mean() != p.loss(x, np.arange(5)).mean()
    assert sum(p.facts()["records"]) == pytest.approx(89, abs=5)


@pytest.fixture(scope="module")
def attack():
    return problem(4, kind="attack", image=2, **DIGITS)


def test_an_attack_starts_at_an_image_that_is_classified_rightly(attack):
    """The mean margin is positive at the image; clients know different classes; another image is another record."""
    x = torch.full((1, 64), 0.5).double()
    assert attack.loss(x, np.arange(4)).mean() > 0
    assert attack.metrics()["success"](x) == 0.0
    assert len({tuple(c) for c in attack.facts()["classes"]}) > 1
    with pytest.raises(InputError, match="images of classes are needed"):
        problem(kind="attack", data={"kind": "diabetes"})


def test_an_attack_succeeds_within_a_budget(attack, tmp_path):
    """FZooS misleads the mean of the classifiers; the run says at which query."""
    run = fedsim.run(
        topology={"kind": "server", "n": 4},
        problem=attack,
        start={"kind": "problem"},
        algorithm={"kind": "fzoos", "features": 500, "local_steps": 5, "server_active": 20},
        schedule={"horizon": 12},
        record={"metrics": ["loss", "success"]},
        folder=tmp_path / "a",
    )
    assert run.metrics.success.iloc[0] == 0
    assert run.metrics.success.iloc[-1] == 1


def test_black_boxes_keep_the_laws(attack, tmp_path):
    """No value depends on the block; there are no gradients."""
    (tmp_path / "mine.py").write_text("def f(x, node):\n    return float(((x - node) ** 2).sum())\n")
    boxes = [
        attack,
        problem(kind="metric_optimisation", data={"kind": "wine", "normalise": "columns"}),
        problem(kind="test_function", function="ackley", dim=5),
        problem(3, tmp_path, kind="function", function="mine.py:f", dim=2),
    ]
    for p in boxes:
        if not p.has_gradient:
            assert "loss" in str(testing.check(p))
            with pytest.raises(Unsupported, match="is a black box: it has values, no gradients"):
                p.gradient(torch.zeros(p.n, p.dim).double(), np.arange(p.n))


def test_a_users_function_is_mapped_from_its_box(tmp_path, monkeypatch):
    """The function sees its own units; worker processes give the same values; start is given in the user's units."""
    (tmp_path / "mine.py").write_text("def f(x, node):\n    return float(100 * node + x[0] + 10 * x[1])\n")
    section = {"function": "mine.py:f", "dim": 2, "lower": [-1, 0], "upper": [1, 5], "start": [0.0, 1.0]}
    p = problem(3, tmp_path, kind="function", **section)
    x = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [2.0, -3.0]]]).double()
    assert p.values(x, np.array([2])).tolist() == [[199.0, 251.0, 201.0]]
    assert p.start(np.arange(3))[1].tolist() == [0.5, 0.2]
    (tmp_path / "script.py").write_text("raise SystemExit('run once more')")  # as a script without a guard would be
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "script.py"), raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    many = problem(3, tmp_path, kind="function", workers=2, **section)
    assert torch.equal(many.values(x.expand(3, -1, -1), np.arange(3)), p.values(x.expand(3, -1, -1), np.arange(3)))


FUNCTION = {"kind": "function", "function": "mine.py:f", "dim": 2}
REFUSED = [
    ({**FUNCTION, "upper": [1.0]}, "problem.upper: 1 numbers given, dim = 2"),
    ({**FUNCTION, "upper": -1.0}, "problem.upper: -1 at coordinate 0, not above lower = 0"),
    ({**FUNCTION, "start": [0.5, 7.0]}, "problem.start: lies outside the box"),
    ({**FUNCTION, "function": "f"}, "package.module:name or file.py:name is needed"),
    ({**FUNCTION, "function": "mine.py:g"}, "problem.function: .*has no 'g'"),
    ({**FUNCTION, "function": "nowhere:f"}, "problem.function: 'nowhere:f': No module named 'nowhere'; give"),
    ({**FUNCTION, "function": "lost.py:f"}, "No module named 'nowhere_at_all'; which the code imports"),
    ({"kind": "test_function", "function": "rosenbrock", "dim": 1}, "problem.dim: 1 given; rosenbrock .* needs 2"),
    ({**FUNCTION, "function": "mine.py:one"}, "is no function"),
    ({"kind": "command", "command": " ", "dim": 2}, "problem.command: empty"),
    ({"kind": "command", "command": "'a", "dim": 2}, "No closing quotation"),
]


@pytest.mark.parametrize(("section", "words"), REFUSED, ids=lambda v: "" if isinstance(v, dict) else v)
def test_an_own_black_box_that_cannot_be_used_is_refused(tmp_path, section, words):
    """Boxes, starts and names that make no sense are refused before anything runs."""
    (tmp_path / "mine.py").write_text("one = 1\n\ndef f(x, node):\n    return 0.0\n")
    (tmp_path / "lost.py").write_text("import nowhere_at_all\n")
    with pytest.raises(InputError, match=words):
        problem(3, tmp_path, **section)


def test_a_function_that_returns_no_number_ends_the_run_by_name(tmp_path):
    """None and NaN are named, with client and point; so is what it raises, with its place."""
    for value in ("None", "float('nan')", "'a'"):
        (tmp_path / f"m{len(value)}.py").write_text(f"def f(x, node):\n    return {value}\n")
        p = problem(2, tmp_path, kind="function", function=f"m{len(value)}.py:f", dim=1)
        with pytest.raises(RunError, match=r"for client 1 at x = \[0.0\]; a finite number is needed"):
            p.values(torch.zeros(1, 1, 1).double(), np.array([1]))
    (tmp_path / "bad.py").write_text("def f(x, node):\n    return {}['boom']\n")
    with pytest.raises(RunError, match=r"bad.py:f raised KeyError: 'boom' \(.*bad.py, line 2\) for client 0 at x"):
        problem(1, tmp_path, kind="function", function="bad.py:f", dim=12).values(torch.zeros(1, 1, 12), np.array([0]))


def test_a_users_module_may_lie_beside_the_scenario_and_is_read_anew(tmp_path):
    """`module:name` and `package.module:name` are found there, and so is what a file imports; edits count."""
    (tmp_path / "i7_helper.py").write_text("def half(v):\n    return v / 2\n")
    (tmp_path / "i7_mine.py").write_text("from i7_helper import half\n\ndef f(x, node):\n    return half(x[0])\n")
    (tmp_path / "i7_pack").mkdir()
    (tmp_path / "i7_pack" / "part.py").write_text("def f(x, node):\n    return 3.0\n")
    at = torch.ones(1, 1, 1).double(), np.array([0])
    for name, value in (("i7_mine.py:f", 0.5), ("i7_mine:f", 0.5), ("i7_pack.part:f", 3.0)):
        assert problem(1, tmp_path, kind="function", function=name, dim=1).values(*at).tolist() == [[value]]
    (tmp_path / "i7_mine.py").write_text("def f(x, node):\n    return 7.0\n")
    assert problem(1, tmp_path, kind="function", function="i7_mine.py:f", dim=1).values(*at).tolist() == [[7.0]]


SIMULATOR = """
import os, subprocess, sys, pathlib
x = [float(line) for line in sys.stdin]
mode, node = sys.argv[1], int(sys.argv[2])
if mode == "slow": subprocess.run(["sleep", "30"])
if mode == "shot": os.kill(os.getpid(), 9)
if mode == "garbled": sys.stdout.buffer.write(b"\\xff\\xfe 1.5\\n"); sys.exit(0)
if mode == "fails": sys.exit("out of memory")
if mode == "silent": sys.exit(0)
if mode == "moody":
    file = pathlib.Path("tried")
    if not file.exists(): file.touch(); sys.exit(3)
print("starting"); print(sum(x) + node)
"""
SAID = {
    "slow": "gave no answer within 0.5 seconds",
    "fails": "ended with exit code 1: out of memory",
    "silent": "printed '' as its last line; a finite number is needed",
    "moody": r"ended with exit code 3: it said nothing, for client 0 at x = \[0.0, 0.0\]$",
    "shot": "was ended by signal 9",
    "garbled": "printed '\ufffd\ufffd 1.5' as its last line",
}


def _simulator(tmp_path, mode, **more):
    (tmp_path / "sim.py").write_text(SIMULATOR)
    command = f"{sys.executable} sim.py {mode} {{node}}"
    return problem(3, tmp_path, kind="command", command=command, dim=2, **more)


def test_a_command_reads_a_point_and_prints_a_value(tmp_path):
    """The last line is the value, the client's number is put in, several run side by side; a failure may be retried."""
    x = torch.tensor([[[0.25, 0.5]], [[0.5, 0.5]]]).double()
    p = _simulator(tmp_path, "good", workers=2, upper=2.0)
    assert p.values(x, np.array([0, 2])).tolist() == [[1.5], [4.0]]
    assert _simulator(tmp_path, "moody", retries=1).values(x[:1], np.array([0])).tolist() == [[0.75]]


@pytest.mark.parametrize("mode", SAID)
def test_a_command_that_fails_is_quoted(tmp_path, mode):
    """Time-outs, exit codes with what was said, and missing numbers end the run by name."""
    p = _simulator(tmp_path, mode, timeout=0.5 if mode == "slow" else 20.0)
    with pytest.raises(RunError, match=SAID[mode]):
        p.values(torch.zeros(1, 1, 2).double(), np.array([0]))
    missing = problem(3, tmp_path, kind="command", command="no-such-program", dim=2)
    with pytest.raises(RunError, match="no-such-program: cannot be started"):
        missing.values(torch.zeros(1, 1, 2).double(), np.array([0]))


def test_a_command_that_takes_too_long_ends_with_all_it_started(tmp_path):
    """What a command has started itself does not outlive the time it was given."""
    command = "sh -c 'sleep 60 & echo $! > child; wait; echo 1'"
    p = problem(1, tmp_path, kind="command", command=command, dim=1, timeout=0.5)
    with pytest.raises(RunError, match=r"no answer within 0\.5 seconds"):
        p.values(torch.zeros(1, 1, 1).double(), np.array([0]))
    child = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    deadline = time.monotonic() + 5.0
    while child.exists() and child.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_queries_are_counted_per_client_noisy_and_the_same_for_any_holder():
    """Only those in the mask are charged; noise depends on seed, client and its number of queries, on nothing else."""
    p = problem(kind="synthetic_quadratic", dim=3, noise=0.5)
    f, counts = oracle(p)
    x = torch.full((5, 2, 3), 0.3).double()
    mask = np.array([True, False, True, True, False])
    first = f.query(x, mask)
    assert counts.queries == 6
    assert f.queries.asked.tolist() == [2, 0, 2, 2, 0]
    assert (first[~mask] == 0).all()
    second = f.query(x)
    assert not torch.equal(first[0], second[0])
    alone, _ = oracle(p, nodes=np.array([2]))
    assert torch.equal(alone.query(x[2:3], mask), first[2:3])
    assert torch.equal(alone.query(x[2:3]), second[2:3])
    errors = f.query(x[:, :1].expand(-1, 4000, -1)) - p.values(x[:, :1], np.arange(5))
    assert float(errors.std()) == pytest.approx(0.5, rel=0.03)


def test_a_budget_that_ends_within_a_call_is_dealt_out_exactly():
    """7 queries left, 3 clients, 4 points each: 3, 2, 2 are asked, then the run is told."""
    p = problem(kind="synthetic_quadratic", dim=3)
    f, counts = oracle(p, budget=12)
    x, mask = torch.full((5, 4, 3), 0.3).double(), np.array([True, True, False, True, False])
    f.query(x[:, :1])
    with pytest.raises(Spent):
        f.query(x, mask)
    assert counts.queries == 12
    assert f.queries.asked.tolist() == [4, 3, 1, 3, 1]
    with pytest.raises(Spent):
        f.query(x[:, :1])
    assert counts.queries == 12


RUN = {
    "seed": 3,
    "topology": {"kind": "server", "n": 5},
    "problem": {"kind": "synthetic_quadratic", "dim": 4, "noise": 0.01},
    "start": {"kind": "problem"},
    "algorithm": {"kind": "fzoos", "features": 30, "local_steps": 3, "server_active": 5, "participants": 3},
    "schedule": {"horizon": 6},
    "checkpoint": {"every": 2},
}


def test_every_query_is_logged_and_a_budget_is_kept_to_the_query(tmp_path):
    """The log has as many rows as the counter says, with points and values; the run stops at the exact number."""
    run = fedsim.run({**RUN, "stop": {"queries": 200}}, folder=tmp_path / "b")
    assert run.metrics.queries.iloc[-1] == 200
    assert run.facts["stopped_by"] == "queries >= 200"
    log = run.queries
    assert len(log) == 200
    assert run.facts["queries_per_client"] == log.groupby("node").size().tolist()
    assert list(log.columns) == ["node", "number", "round", "value", "x"]
    assert log["round"].min() == -1
    assert all(min(x) >= 0 and max(x) <= 1 for x in log.x)
    quiet = {**RUN, "problem": {**RUN["problem"], "noise": 0.0}}
    again = fedsim.run(quiet, folder=tmp_path / "q").queries
    p = problem(kind="synthetic_quadratic", dim=4)
    one = again.iloc[57]
    assert float(p.loss(torch.tensor([list(one.x)]).double(), np.array([one.node]))[0]) == one.value
    with pytest.raises(InputError, match=r"stop.queries: 7 do not cover the start"):
        fedsim.run({**RUN, "stop": {"queries": 7}}, folder=tmp_path / "s")


def test_other_bounds_hold_where_the_queries_end_a_run(tmp_path):
    """A round that the budget of queries ends midway is not charged for messages that would pass another bound."""
    free = fedsim.run({**RUN, "stop": {"queries": 200}}, folder=tmp_path / "f").metrics
    bound = int(free.bytes.iloc[-1]) - 1
    last = fedsim.run({**RUN, "stop": {"queries": 200, "bytes": bound}}, folder=tmp_path / "b").metrics.iloc[-1]
    assert free.bytes.iloc[-2] <= last.bytes <= bound
    assert last.queries == 200


def test_a_run_that_fails_leaves_the_values_it_had(tmp_path):
    """Values may have been dear: the log of what was answered stays."""
    (tmp_path / "mine.py").write_text(
        "calls = []\n\ndef f(x, node):\n    calls.append(node)\n    return 1.0 / (100 - len(calls))\n"
    )
    own = {"kind": "function", "function": "mine.py:f", "dim": 2}
    (tmp_path / "s.yaml").write_text(json.dumps({**RUN, "problem": own, "record": {"metrics": []}}))
    with pytest.raises(RunError, match="ZeroDivisionError"):
        fedsim.run(tmp_path / "s.yaml", folder=tmp_path / "out")
    result = fedsim.load(tmp_path / "out")
    assert result.status == "failed"
    assert len(result.queries) == result.facts["totals"]["queries"] > 50
    assert (1 / result.queries.value).max() == pytest.approx(99)


def test_long_points_are_not_logged(tmp_path):
    """In more than 100 dimensions the log holds values only."""
    wide = {**RUN, "problem": {"kind": "synthetic_quadratic", "dim": 101}, "schedule": {"horizon": 1}}
    assert "x" not in fedsim.run(wide, folder=tmp_path / "w").queries


def test_a_resumed_run_has_the_log_of_an_uninterrupted_one(tmp_path):
    """Stopped after a checkpoint and resumed: the same digest, the same log."""

    def kill(name, now, horizon, row):
        if now == 5:
            raise KeyboardInterrupt

    (tmp_path / "s.yaml").write_text(json.dumps(RUN))
    whole = fedsim.run(tmp_path / "s.yaml", folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fedsim.run(tmp_path / "s.yaml", folder=tmp_path / "part", progress=kill)
    resumed = fedsim.resume(tmp_path / "part")
    assert resumed.digest == whole.digest
    assert resumed.queries.equals(whole.queries)


@needs_mpi
@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_every_number_of_processes_gives_one_digest_and_one_log(tmp_path, size):
    """Methods on values, with partial participation and a budget, in one process and under mpirun."""
    study = {
        **RUN,
        "variants": {
            "all": {"algorithm.participants": None},
            "some": {},
            "budget": {"stop": {"queries": 150}},
            "learned": {"algorithm.gamma": "learned", "algorithm.server_active": 0},
            "scaffold": {"algorithm": {"kind": "scaffold_zo", "participants": 4, "local_steps": 2}},
            "fedprox": {"algorithm": {"kind": "fedprox_zo", "safeguard": True, "local_steps": 2}},
            "blocks": {"engine.block": 2},
        },
    }
    (tmp_path / "s.yaml").write_text(json.dumps(study))
    here = fedsim.run(tmp_path / "s.yaml", folder=tmp_path / "here")
    done = launch("mpi", size, "run", tmp_path / "s.yaml", "--json", "--folder", tmp_path / "there", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    there = fedsim.load(tmp_path / "there")
    assert [r.digest for r in there.runs] == [r.digest for r in here.runs]
    assert all(a.queries.equals(b.queries) for a, b in zip(here.runs, there.runs, strict=True))
    assert here.runs[1].digest == here.runs[-1].digest


def test_data_may_be_drawn_anew_with_every_seed():
    """`data_seed: each` gives every run of a study its own; anything else but a number is refused."""
    from fedsim.scenario import load_study

    study = load_study({**RUN, "seeds": 3, "data_seed": "each"})
    assert [r.data_seed for r in study.runs] == [3, 4, 5]
    with pytest.raises(InputError, match=r"data_seed: 'all' given; a whole number .*, or each, is needed"):
        load_study({**RUN, "data_seed": "all"})
