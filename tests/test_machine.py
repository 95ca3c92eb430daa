"""What is set before a run so that its bits do not depend on the machine's mood."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest

from fedsim.engine.machine import one_at_a_time

PROGRAM = """
import json, sys
from fedsim.engine.machine import prepare
try:
    found = prepare()
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
import torch
a = torch.randn(7, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
b = a[:, :, :1] + 1.0
alike = {}
for name, solve in {"solve": lambda i: torch.linalg.solve(a[i], b[i]), "inv": lambda i: torch.linalg.inv(a[i]),
                    "eigh": lambda i: torch.linalg.eigvalsh(a[i] + a[i].mT)}.items():
    whole = solve(slice(0, 7))
    alike[name] = all(torch.equal(solve(slice(i, i + w)), whole[i:i + w]) for w in (2, 3) for i in range(0, 7 - w))
import scipy.linalg
from threadpoolctl import threadpool_info
blas = {part["num_threads"] for part in threadpool_info() if part["user_api"] == "blas"}
print(json.dumps({**found, "blas threads": sorted(blas), "torch threads": torch.get_num_threads(), "alike": alike}))
"""


def _prepared(**environment: str) -> subprocess.CompletedProcess:
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("MKL_CBWR", "FEDSIM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    }
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**kept, **environment}, capture_output=True, text=True, check=False
    )


def test_a_fresh_process_runs_one_thread_and_strict_linear_algebra():
    """By default torch has one thread, MKL is strict, and batched solves have the same bits in blocks of 2, 3, 7."""
    found = json.loads(_prepared().stdout)
    assert found["threads"] == found["torch threads"] == 1
    assert found["blas threads"] == [1]  # of NumPy's library and of SciPy's, which is loaded later
    assert found["mkl_cbwr"].endswith(",STRICT")
    assert all(found["alike"].values()), found["alike"]
    assert found["memory_kept"] == sys.platform.startswith("linux")


def test_what_the_user_has_set_is_kept_and_recorded():
    """A user's own MKL_CBWR and number of threads win, and the run records them."""
    found = json.loads(_prepared(MKL_CBWR="COMPATIBLE", FEDSIM_THREADS="2").stdout)
    assert (found["mkl_cbwr"], found["threads"], found["torch threads"]) == ("COMPATIBLE", 2, 2)


@pytest.mark.parametrize("given", ["two", "0", "-1", ""])
def test_a_number_of_threads_that_is_none_is_refused(given):
    """A mistyped FEDSIM_THREADS is an input error that says what is needed."""
    assert f"InputError: FEDSIM_THREADS: {given!r} given; a whole number" in _prepared(FEDSIM_THREADS=given).stderr


def test_what_all_processes_would_compile_one_of_them_does():
    """Whoever comes second waits outside until the first has left; the lock is the file's, not the process's."""
    entered = threading.Event()

    def second():
        with one_at_a_time("test"):
            entered.set()

    thread = threading.Thread(target=second)
    with one_at_a_time("test"):
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(20)
    thread.join()
