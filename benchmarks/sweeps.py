"""A sweep of 200 cells beside the sum of its cells over the cores: `python -m benchmarks.sweeps`."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import fedsim
from fedsim.scenario import load_study
from fedsim.side_by_side import free_cores

SCENARIO = {
    "name": "swept",
    "topology": {"kind": "torus", "rows": 6, "columns": 8},
    "problem": {"kind": "logistic", "l2": 0.1, "data": {"kind": "breast_cancer"}},
    "algorithm": {"kind": "dpsgd"},
    "schedule": {"horizon": 1500},
    "record": {"every": 50},
    "sweep": {"algorithm.eta": {"log": [1e-3, 1, 200]}},
}


def main() -> None:
    """Print seconds of single cells, of the sweep, of a second call, and the ratio to sum over cores."""
    with tempfile.TemporaryDirectory() as root:
        cells = load_study(SCENARIO).runs
        alone = []
        for k, cell in enumerate(cells[:11]):
            lone = {**cell.content(), "name": "alone"}
            begun = time.perf_counter()
            fedsim.run(lone, folder=Path(root) / f"alone{k}")
            alone.append(time.perf_counter() - begun)
        one = statistics.median(alone[1:])
        begun = time.perf_counter()
        fedsim.sweep(SCENARIO, folder=Path(root) / "out")
        whole = time.perf_counter() - begun
        begun = time.perf_counter()
        fedsim.sweep(SCENARIO, folder=Path(root) / "out")
        again = time.perf_counter() - begun
        share = one * len(cells) / free_cores()
        print(f"one cell {one:.3f} s; {len(cells)} cells over {free_cores()} cores {share:.1f} s")
        print(f"the sweep {whole:.1f} s: {whole / share:.2f} of that; called again {again:.1f} s")


if __name__ == "__main__":
    main()
