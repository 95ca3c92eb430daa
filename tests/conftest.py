"""The machine is set as a run sets it, before any test computes anything."""

import gc
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")

from fedsim.engine.machine import prepare

prepare()

settings.register_profile("the same every time", derandomize=True)  # a run of the tests can be repeated, too
settings.load_profile("the same every time")


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
