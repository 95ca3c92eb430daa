"""Every snippet of the README and the guide runs as it is printed."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]
FIRST = {"README"}  # the other pages play with the slow proofs
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)


PLAYER = """
import gc, json, os, sys
from fedsim.engine.machine import prepare
prepare()
import matplotlib.figure, numba, pandas, sklearn.datasets
from fedsim import cli, run

def play(kind, step):
    try:
        sys.argv = step
        exec(step, {"__name__": "__main__"}) if kind == "python" else cli.main()
        return 0
    except SystemExit as end:
        return end.code or 0

gc.freeze()  # every step is a process of its own; what all of them import is imported once, and never taken apart
for kind, step in json.load(sys.stdin):
    print(">", step, flush=True)
    child = os.fork()
    if not child:
        code = play(kind, step)
        sys.stdout.flush()
        os._exit(code)
    if os.waitpid(child, 0)[1]:
        sys.exit("ended with an error")
"""


@pytest.mark.parametrize(
    "page", [pytest.param(p, id=p.stem, marks=() if p.stem in FIRST else pytest.mark.slow) for p in PAGES]
)
def test_snippets_run(page, tmp_path):
    """Files are written, commands exit with 0, and Python runs, in the order of the page."""
    (tmp_path / "scenarios").symlink_to(ROOT / "scenarios")
    steps = []
    for language, text in BLOCK.findall(page.read_text()):
        name = re.match(r"# file: (\S+)\n", text)
        if name:
            (tmp_path / name[1]).write_text(text)
        elif language == "python":
            steps.append((language, text))
        elif language == "console":
            steps += [(language, shlex.split(line.removeprefix("$ "))) for line in text.splitlines()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    call, given = [sys.executable, "-c", PLAYER], json.dumps(steps)
    done = subprocess.run(call, cwd=tmp_path, input=given, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert steps


def quoted(text):
    """Return the commands that prose quotes, with their arguments, and those of `text` blocks."""
    inline = re.findall(r"`fedsim ([^`]+)`", " ".join(text.split()))
    blocks = "".join(body for language, body in BLOCK.findall(text) if language == "text")
    return [c for c in inline if " " in c] + re.findall(r"^fedsim (.+)", blocks, re.M)


@pytest.mark.parametrize(
    "file",
    [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "scenarios").rglob("*.yaml"))],
    ids=lambda f: f.stem,
)
def test_commands_in_prose_are_ones_that_the_command_line_takes(file):
    """Arguments and options of every quoted `fedsim COMMAND ...` parse; nothing is run."""
    from typer.main import get_command

    from fedsim.cli import app

    for line in quoted(file.read_text()):
        words = shlex.split(line, comments=True)
        command = get_command(app)
        while hasattr(command, "commands") and words:
            name, command = words[0], command.commands[words.pop(0)]
        command.make_context(name, words)


def test_every_algorithm_has_its_current_page():
    """docs/algorithms holds one page per registered algorithm, made from its docstring (`python docs/pages.py`)."""
    import importlib.util

    from fedsim import registry

    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "pages.py")
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    for kind in registry.KINDS["algorithm"]:
        assert (ROOT / "docs" / "algorithms" / f"{kind}.md").read_text() == pages.page(kind)
