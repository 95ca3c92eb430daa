"""Every snippet of the README and the guide runs as it is printed."""

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


def run(command, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize(
    "page", [pytest.param(p, id=p.stem, marks=() if p.stem in FIRST else pytest.mark.slow) for p in PAGES]
)
def test_snippets_run(page, tmp_path):
    """Files are written, commands exit with 0, and Python runs, in the order of the page."""
    (tmp_path / "scenarios").symlink_to(ROOT / "scenarios")
    played = 0
    for language, text in BLOCK.findall(page.read_text()):
        name = re.match(r"# file: (\S+)\n", text)
        if name:
            (tmp_path / name[1]).write_text(text)
        elif language == "python":
            run([sys.executable, "-c", text], tmp_path)
        elif language == "console":
            for line in text.splitlines():
                run([sys.executable, "-m", *shlex.split(line.removeprefix("$ "))], tmp_path)
        played += 1
    assert played


def test_every_algorithm_has_its_current_page():
    """docs/algorithms holds one page per registered algorithm, made from its docstring (`python docs/pages.py`)."""
    import importlib.util

    from fedsim import registry

    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "pages.py")
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    for kind in registry.KINDS["algorithm"]:
        assert (ROOT / "docs" / "algorithms" / f"{kind}.md").read_text() == pages.page(kind)
