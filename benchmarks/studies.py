"""A study of 1,000 runs, loaded and compared: `python -m benchmarks.studies`."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path

import fedsim
from benchmarks.sweeps import SCENARIO

RUNS = 1000


def main() -> None:
    """Print seconds to load all metrics and to compare, beside those of reading the same files plainly."""
    with tempfile.TemporaryDirectory() as root:
        folder = _study(Path(root))
        begun = time.perf_counter()
        for file in folder.glob("*/metrics.arrows"):
            file.read_bytes()
            (file.parent / "run.json").read_bytes()
        bare = time.perf_counter() - begun
        begun = time.perf_counter()
        study = fedsim.load(folder)
        rows = sum(len(run.metrics) for run in study.runs)
        loaded = time.perf_counter() - begun
        begun = time.perf_counter()
        study.compare(at=("round", 1000))
        compared = time.perf_counter() - begun
        print(f"{RUNS} runs, {rows} rows: bare bytes {bare:.2f} s, loaded {loaded:.2f} s, compared {compared:.2f} s")


def _study(root: Path) -> Path:
    """Play one cell and leave it a thousand times, with seeds of their own."""
    run = fedsim.run({**SCENARIO, "sweep": {"algorithm.eta": [0.1]}}, folder=root / "one").runs[0]
    names = [f"seed{k}" for k in range(RUNS)]
    for k, name in enumerate(names):
        shutil.copytree(run.folder, root / "all" / name)
        file = root / "all" / name / "run.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "seed": k}))
    (root / "all" / "study.json").write_text(json.dumps({"name": "all", "claim": "", "runs": names}))
    return root / "all"


if __name__ == "__main__":
    main()
