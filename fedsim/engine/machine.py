"""What is set before the first operation, so that results do not depend on the machine's mood."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedsim.errors import InputError
from fedsim.locks import locked

if TYPE_CHECKING:
    from fedsim.transport.transport import Transport

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


@cache
def prepare() -> dict[str, Any]:
    """Fix what changes bits or speed: one torch thread, strict MKL, memory kept by the process.

    Returns:
        What was set and found, for `run.json`. `MKL_CBWR` must precede MKL's first call: where torch was used
        before, it is only recorded. `FEDSIM_THREADS` gives torch more threads (and may change bits).

    Raises:
        InputError: `FEDSIM_THREADS` is not a number of threads.
    """
    mkl = os.environ.setdefault("MKL_CBWR", f"{_instruction_set()},STRICT")
    import torch

    threads = _threads()
    torch.set_num_threads(threads)
    _limit_blas(threads)
    return {
        "threads": threads,
        "mkl_cbwr": mkl,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "memory_kept": _keep_memory(),
    }


class Device(NamedTuple):
    """Where a process computes: `cpu`, or `cuda:i`; `alone`: every process of the job has a device of its own."""

    name: str
    alone: bool = True


def usable(device: str, transport: Transport) -> Device:
    """Return the device of this process for `engine.device`, if it can compute here; all processes ask together.

    On cuda, float32 means float32 (no shorter products) and cuDNN takes no faster sums in changing order. Processes of
    a host take its devices in turn; where they are more than devices, several share one.

    Raises:
        InputError: cuda without a device.
    """
    if device == "cpu":
        return Device(device)
    import torch

    if not torch.cuda.is_available():
        built = "built for the CPU" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        raise InputError(
            f"engine.device: cuda asked for, but torch {torch.__version__} ({built}) finds no CUDA device here; say"
            " device: cpu, or install a torch with CUDA on a machine that has one"
        )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    from fedsim.transport.links import own_device

    of = torch.cuda.get_device_properties
    number, alone = own_device(torch.cuda.device_count(), transport, lambda i: str(getattr(of(i), "uuid", i)))
    torch.cuda.set_device(number)
    return Device(f"cuda:{number}", alone)


@contextmanager
def one_at_a_time(what: str) -> Iterator[None]:
    """Let one process of this user and host at a time through; where files cannot be locked, all of them."""
    with ExitStack() as stack:
        with suppress(AttributeError, OSError):  # a system without users, a folder that is not writable
            file = stack.enter_context(open(Path(tempfile.gettempdir()) / f"fedsim-{os.getuid()}-{what}.lock", "w"))
            locked(file.fileno(), wait=True)  # until the file is closed
        yield


def _threads() -> int:
    given = os.environ.get("FEDSIM_THREADS", "1")
    if not given.isdigit() or int(given) < 1:
        raise InputError(f"FEDSIM_THREADS: {given!r} given; a whole number of at least 1 is needed (leave it out: 1)")
    return int(given)


def _limit_blas(threads: int) -> None:
    """Keep NumPy's and SciPy's linear algebra to the same number of threads: its last bits may depend on them."""
    import numpy as np
    from threadpoolctl import threadpool_limits

    os.environ["OPENBLAS_NUM_THREADS"] = str(threads)  # SciPy brings a library of its own, loaded when it is needed
    np.linalg.norm(np.eye(2) @ np.eye(2))  # loads the library that is to be limited
    threadpool_limits(threads, user_api="blas")


def _instruction_set() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return "AVX512" if "avx512f" in file.read() else "AVX2"
    except OSError:
        return "AVX2"


def _keep_memory() -> bool:
    """Let freed memory stay with the process: fresh pages cost more than the arithmetic on them (glibc only)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(libc.mallopt(M_MMAP_MAX, 0)) and bool(libc.mallopt(M_TRIM_THRESHOLD, 2**30))
    except (OSError, AttributeError):
        return False
