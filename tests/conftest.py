"""The machine is set as a run sets it, before any test computes anything."""

import gc
import os
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

from fedsim.engine.machine import prepare

prepare()


def pytest_collection_finish():
    """What was imported and collected stays: the garbage collector need not look through it again and again."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache():
    """Tests keep solved rates in a folder of their own, so that none of them depends on an earlier session.

    Data sets that the user has brought are seen there.
    """
    data = Path.home() / ".cache" / "fedsim" / "data"
    with tempfile.TemporaryDirectory() as folder:
        if data.is_dir():
            (Path(folder) / "data").symlink_to(data)
        before = os.environ.get("FEDSIM_CACHE")
        os.environ["FEDSIM_CACHE"] = before or folder
        yield
        if before is None:
            del os.environ["FEDSIM_CACHE"]
