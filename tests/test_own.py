"""Components of the user's own in a file beside the scenario: what helps, and what each mistake is told."""

import subprocess
import sys
import time
from dataclasses import dataclass

import networkx as nx
import numpy as np
import pytest
import torch
from cases import quadratic

import fedsim
import fedsim.testing
from fedsim.describe import describe
from fedsim.errors import InputError, RunError
from fedsim.problems.quadratic import Quadratic
from fedsim.scenario import load_study, override

HUBER = """
import numpy as np
import torch
import fedsim

class Base(fedsim.Problem):
    kind = "absolute"
    def gradient(self, x, nodes, batch=None):
        return torch.stack([self.A[i].T @ torch.sign(self.A[i] @ r - self.b[i]) for i, r in zip(nodes, x)])
    def loss(self, x, nodes):
        return torch.stack([(self.A[i] @ r - self.b[i]).abs().sum() for i, r in zip(nodes, x.expand(len(nodes), -1))])

class Absolute(Base):
    @classmethod
    def from_records(cls, data, parts, scale=1.0):
        made = cls()
        made.A = [scale * torch.from_numpy(data.features[p]) for p in parts]
        made.b = [scale * torch.from_numpy(data.labels[p]) for p in parts]
        made.n, made.dim = len(parts), data.features.shape[1]
        made.records = np.zeros(made.n, np.int64)
        return made

class Forgetful(Absolute):
    @classmethod
    def from_records(cls, data, parts):
        made = super().from_records(data, parts)
        del made.records
        return made

class Needy(Absolute):
    @classmethod
    def from_records(cls, data, parts, scale):
        return super().from_records(data, parts, scale)

class Lossless(fedsim.Problem):
    def gradient(self, x, nodes, batch=None):
        return x

class Unmade(Base):
    pass

class Failing(Absolute):
    def gradient(self, x, nodes, batch=None):
        raise ZeroDivisionError("of the user's own")

class Startless(fedsim.SyncAlgorithm):
    async def round(self, s, k, f, rng):
        return s
"""

BREAKS = """
from dataclasses import dataclass
import numpy as np
import torch
import fedsim

class Breaks(fedsim.Problem):
    kind = "breaks"
    n, dim, records = 6, 3, np.zeros(6, np.int64)
    def gradient(self, x, nodes, batch=None):
        return x * (1 + 1e-15 * len(nodes))
    def loss(self, x, nodes):
        return (x.expand(len(nodes), -1) ** 2).sum(1) / 2

@dataclass
class State:
    x: fedsim.Rows

@dataclass(frozen=True)
class Wrong(fedsim.SyncAlgorithm):
    bad: bool = True
    async def start(self, x0, f, rng):
        return State(x0)
    async def round(self, s, k, f, rng):
        return State(await fedsim.Mix(s.x - 0.1 * f.gradient(s.x) + (1e-9 * len(s.x) if self.bad else 0.0)))

class Event(fedsim.EventAlgorithm):
    variables = ("x",)
    def start(self, x0, gradient, mean_gradient):
        return {"x": x0}
    def gradient(self, v, g, count):
        return {"x": v["x"] - 0.1 * g - 1e-9 * len(g)}
    def message(self, v):
        return v["x"]
    def gossip(self, v, own, other):
        return {"x": v["x"] - (own - other) / 2}

class Plain(Event):
    def start(self, x0):
        return {"x": x0}
"""

SCENARIO = {
    "topology": {"kind": "ring", "n": 4},
    "problem": {"kind": "own.py:Absolute", "data": {"kind": "csv", "file": "lab.csv", "label": "y"}},
    "algorithm": {"kind": "dpsgd", "eta": 0.01, "batch": None},
    "schedule": {"horizon": 3},
}


@dataclass
class State:
    x: fedsim.Rows


class Averaging(fedsim.SyncAlgorithm):
    kind, paper, provenance = "averaging", "none", "reconstruction"

    async def start(self, x0, f, rng):
        return State(x0)


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """Return a folder with a table and classes of the user's own, as the current one."""
    rng = np.random.default_rng(0)
    lines = [",".join(f"{v:.3f}" for v in row) for row in rng.normal(size=(22, 3))]
    (tmp_path / "lab.csv").write_text("\n".join(["a,b,y", *lines]))
    (tmp_path / "own.py").write_text(HUBER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problem(**changes):
    return SCENARIO | {"problem": SCENARIO["problem"] | changes}


def test_records_are_loaded_and_split_for_ones_own_problem(beside):
    """`from_records` gets the loaded table, every node's record numbers and the section's other keys."""
    result = fedsim.run(problem(scale=2.0), folder=beside / "out")
    assert result.status == "finished"
    assert fedsim.check(problem())[0]["problem"]["dim"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scall": 2.0}, r"problem.scall: unknown key \(did you mean 'scale'\?\); own.py:Absolute knows scale"),
        ({"data": None}, "problem.data: missing; own.py:Absolute needs records"),
        ({"kind": "own.py:Needy"}, "problem.scale: this key is missing"),
        ({"kind": "own.py:Forgetful"}, "Forgetful does not set 'records'; a Problem sets n"),
        ({"kind": "own.py:Lossless"}, "own.py:Lossless does not define loss"),
        ({"kind": "own.py:Unmade"}, "needs a class method: from_records"),
    ],
)
def test_a_mistake_in_ones_own_problem_is_named(beside, changes, words):
    """What a class of one's own lacks, or a key that it does not know, ends before anything is played."""
    with pytest.raises(InputError, match=words):
        fedsim.run(problem(**changes), folder=beside / "out")


def test_constants_of_a_wrong_shape_are_refused():
    """L and mu have one number per node."""
    wrong = quadratic()
    wrong.L = np.ones(3)
    with pytest.raises(InputError, match=r"Quadratic.L has shape \[3\], \[12\] needed"):
        fedsim.testing.check(wrong)


def test_methods_that_an_algorithm_lacks_are_named(beside):
    """An algorithm of one's own without `start` is refused by that word, not by a traceback."""
    with pytest.raises(InputError, match=r"own\.py:Startless does not define start"):
        load_study(SCENARIO | {"algorithm": {"kind": "own.py:Startless"}})


def test_the_traceback_of_ones_own_mistake_begins_in_fedsim(beside):
    """An exception in the user's code leaves with its traceback, without the frames of the command line's library."""
    import yaml

    (beside / "s.yaml").write_text(yaml.safe_dump(problem(kind="own.py:Failing")))
    done = subprocess.run([sys.executable, "-m", "fedsim", "run", "s.yaml"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ZeroDivisionError: of the user's own" in done.stderr
    assert "own.py" in done.stderr
    assert "typer/" not in done.stderr


def test_a_state_without_a_row_per_node_is_refused_by_name(tmp_path):
    """A round that loses the axis of nodes is told the field, its shape and the rows; run.json says so, too."""

    class Flat(Averaging):
        async def round(self, s, k, f, rng):
            return State((await fedsim.Mix(s.x)).mean(dim=0))

    given = {"topology": {"kind": "ring", "n": 6}, "problem": {"kind": "quadratic", "dim": 3}}
    words = r"State.x has shape \(3,\) after round 1; one row per node is needed, and this block has 6"
    with pytest.raises(RunError, match=words):
        fedsim.run(**given, algorithm=Flat(), schedule={"horizon": 2}, folder=tmp_path / "run")
    assert "State.x has shape" in fedsim.load(tmp_path / "run").facts["error"]


def test_run_json_says_what_kind_of_error_ones_own_code_raised(tmp_path):
    """The message of a KeyError is a bare key; `run.json` names the exception beside it."""

    class Asks(Averaging):
        async def round(self, s, k, f, rng):
            return {}["momentum"]

    given = {"topology": {"kind": "ring", "n": 6}, "problem": {"kind": "quadratic", "dim": 3}}
    with pytest.raises(KeyError):
        fedsim.run(**given, algorithm=Asks(), schedule={"horizon": 2}, folder=tmp_path / "run")
    assert fedsim.load(tmp_path / "run").facts["error"] == "KeyError: 'momentum'"


def test_metrics_of_held_out_records_say_what_they_need():
    """A problem without held-out records that is asked for `test_accuracy` says so, not only that it is unknown."""
    data = {"kind": "breast_cancer"}
    scenario = {
        "topology": {"kind": "ring", "n": 5},
        "problem": {"kind": "logistic", "l2": 0.1, "data": data},
        "algorithm": {"kind": "dpsgd", "eta": 0.1},
        "schedule": {"horizon": 2},
        "record": {"metrics": ["test_accuracy"]},
    }
    with pytest.raises(InputError, match=r"held-out records need data\.held_out, and accuracy needs classes"):
        fedsim.check(scenario)


def test_another_file_keeps_what_reads_it():
    """`problem.data.file=...` changes the file only; `topology.file=...` stands for another topology."""
    content = {"topology": {"kind": "ring", "n": 4}, "problem": dict(SCENARIO["problem"])}
    override(content, "problem.data.file", "other.csv")
    override(content, "topology.file", "graph.txt")
    assert content["problem"]["data"] == {"kind": "csv", "file": "other.csv", "label": "y"}
    assert content["topology"] == {"file": "graph.txt"}


def test_a_name_in_place_of_a_section_is_told_the_section():
    """`mixing: metropolis` is answered by what to write instead."""
    with pytest.raises(InputError, match=r"such as mixing: \{kind: metropolis\}"):
        load_study(SCENARIO | {"mixing": "metropolis"})


def test_every_kind_describes_itself():
    """`fedsim list SECTION KIND` works for every registered kind, and names the keys of a CSV table."""
    from fedsim.registry import GRAPHS, KINDS

    for section, kinds in KINDS.items():
        for kind in kinds:
            assert describe(section, kind)
    for kind in GRAPHS.split():
        assert describe("topology", kind)
    assert "label            needed" in describe("data", "csv")
    with pytest.raises(InputError, match="did you mean 'csv'"):
        describe("data", "cvs")


def test_what_is_sent_is_not_warned_of():
    """Buffers that torch.distributed sends may be read-only; nothing warns."""
    from fedsim.transport.torchrun import _to_send

    frozen = np.zeros(3, np.uint8)
    frozen.setflags(write=False)
    assert torch.equal(_to_send(frozen), torch.zeros(3, dtype=torch.uint8))


def test_public_functions_outlive_the_import_of_their_modules():
    """`fedsim.check` and `fedsim.run` are functions, whoever imports the modules of these names."""
    import fedsim.check
    import fedsim.run

    assert callable(fedsim.check)
    assert callable(fedsim.run)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda own: {"problem": own.Breaks()}, ["own problem: gradient of node 0 is different"]),
        (lambda own: {"algorithm": own.Wrong()}, ["own algorithm: x of node"]),
        (lambda own: {"algorithm": own.Event()}, ["own algorithm: gradient: x of node 0 is different"]),
        (lambda own: {"algorithm": own.Plain()}, ["own algorithm: gradient: x of node 0 is different"]),
        (lambda own: {"algorithm": own.Wrong(bad=False)}, []),
        (lambda own: {}, []),
    ],
)
def test_a_class_that_breaks_bit_equality_runs_and_the_result_says_so(tmp_path, change, words):
    """`run.json` and `check` name what depends on the rows beside; a class that keeps the law has no such note."""
    from pathlib import Path

    from fedsim import registry

    (tmp_path / "own.py").write_text(BREAKS)
    own = sys.modules[registry.find("problem", "own.py:Breaks", Path(tmp_path)).__module__]
    given = {
        "topology": {"kind": "ring", "n": 6},
        "problem": {"kind": "quadratic", "dim": 3},
        "algorithm": {"kind": "dpsgd", "eta": 0.1, "batch": None},
        "schedule": {"horizon": 2},
    }
    result = fedsim.run(**(given | change(own)), folder=tmp_path / "run")
    assert result.status == "finished"
    notes = [note for note in result.facts["notes"] if "may depend on block and ranks" in note]
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))


def test_gradients_that_take_long_are_not_looked_at_before_the_run(tmp_path):
    """One's own problem of 0.2 s a gradient is asked for two of them, not for a hundred, before it plays."""
    asked = []

    class Dear(Quadratic):
        """Takes long, until the run begins."""

        def gradient(self, x, nodes, batch=None):
            asked.append(len(x))
            time.sleep(0.0 if len(asked) > 2 else 0.2)
            return super().gradient(x, nodes, batch)

    problem = Dear(np.tile(np.eye(3), (6, 1, 1)), np.ones((6, 3)))
    given = {"algorithm": {"kind": "dpsgd", "eta": 0.1, "batch": None}, "schedule": {"horizon": 2}}
    fedsim.run(topology=nx.cycle_graph(6), problem=problem, **given, folder=tmp_path / "run")
    assert asked[:2] == [1, 1]
    assert len(asked) == 2 + 2
