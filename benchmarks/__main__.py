"""Run suites with one thread: `python -m benchmarks [FILES]`; further arguments go to pytest (`-k`, `-s`)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).parent
SHOWN = "--benchmark-columns=min,median,ops,rounds", "--benchmark-group-by=group", "--benchmark-warmup=on"

if __name__ == "__main__":
    options = ["-q", "-o", "python_files=bench_*.py", "-o", "python_functions=bench_*", "-W", "default", *SHOWN]
    given = sys.argv[1:]
    suites = [] if any(Path(word).exists() for word in given) else [str(HERE)]
    sys.exit(pytest.main([*suites, *options, *given]))
