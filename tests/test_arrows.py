"""Imports point one way, and what is heavy or foreign comes in at one place."""

import ast
from pathlib import Path

import pytest

import fedsim

ROOT = Path(fedsim.__file__).parent
BELOW = (
    "fedsim.engine",
    "fedsim.transport",
    "fedsim.results",
    "fedsim.run",
    "fedsim.cli",
    "fedsim.scenario",
    "fedsim.job",
)


def imports(path):
    """Return the modules that a file imports when it runs; what only type checkers read is left out."""
    tree = ast.parse(path.read_text())
    unread = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        for node in ast.walk(statement)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in unread:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def files(package):
    """Return the modules of a package, by name."""
    return {str(path.relative_to(ROOT)): imports(path) for path in (ROOT / package).rglob("*.py")}


def reaches(modules, target):
    """Return whether one of the modules is the target or lies in it."""
    return any(module == target or module.startswith(target + ".") for module in modules)


@pytest.mark.parametrize("package", ["algorithms", "problems", "topology", "compression"])
def test_mathematics_knows_no_engine(package):
    """Algorithms, problems and topologies import no engine, transport, result file or command line."""
    wrong = {name: below for name, found in files(package).items() for below in BELOW if reaches(found, below)}
    assert not wrong


def test_transports_know_no_nodes():
    """A transport moves bytes: it imports no engine, algorithm, problem or topology."""
    upper = ("fedsim.engine", "fedsim.algorithms", "fedsim.problems", "fedsim.topology", "fedsim.results")
    wrong = {name: above for name, found in files("transport").items() for above in upper if reaches(found, above)}
    assert not wrong


def test_engines_know_no_command_line():
    """An engine reads no scenario file and writes no result."""
    above = ("fedsim.cli", "fedsim.run", "fedsim.scenario", "fedsim.results")
    wrong = {name: to for name, found in files("engine").items() for to in above if reaches(found, to)}
    assert not wrong


@pytest.mark.parametrize("module", ["mpi4py", "torch.distributed", "cvxpy", "dp_accounting"])
def test_foreign_worlds_enter_at_one_place(module):
    """mpi4py, torch.distributed, cvxpy and dp-accounting are each imported by one file at most."""
    at = [name for name, found in files(".").items() if reaches(found, module)]
    assert len(at) <= 1, at
