"""One process against two ranks, whole runs: `python -m benchmarks.ranks` prints a table of ratios.

Each case is played in turn by one process and by `mpirun -n 2`, three times; the least wall time of each counts (that
of the run's own clock, without imports and compilation). Two free cores are needed for the ratios to mean anything.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from fedsim.launchers import command

GRAPHS = {
    "torus": {"kind": "torus", "rows": 40, "columns": 50},
    "ring": {"kind": "ring", "n": 2000},
    "random 4-regular": {"kind": "random_regular", "n": 2000, "degree": 4, "seed": 0},
    "geometric": {"kind": "random_geometric", "n": 2000, "radius": 0.05, "seed": 1},
}
TIMES = 3


def scenario(graph: str, events: bool) -> dict:
    """Return a scenario with n = 2,000 and dim = 1,000."""
    algorithm = {"kind": "gossip_sgd", "step": 1e-3} if events else {"kind": "gradient_tracking", "eta": 1e-3}
    return {
        "name": "ranks",
        "topology": GRAPHS[graph],
        "problem": {"kind": "quadratic", "dim": 1000, "shape": "diagonal"},
        "algorithm": algorithm,
        "start": {"kind": "normal"},
        "schedule": {"horizon": 40 if events else 60},
        "record": {"every": 20, "metrics": ["consensus"]},
        **({"rates": {"kind": "uniform", "scale": "none"}} if events else {}),
    }


def seconds(file: Path, kind: str, size: int, folder: Path) -> float:
    """Return the wall time that a run reports for all but its first 20 rounds or units, which warm up."""
    start = [*command(kind, size), "-m", "fedsim", "run", str(file), "--json", "--folder", str(folder)]
    subprocess.run(start, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    import fedsim

    wall = fedsim.load(folder).metrics["wall_seconds"]
    return float(wall.iloc[-1] - wall.iloc[1])


def main() -> None:
    """Print the table."""
    print("| schedule | graph | one process, s | two ranks, s | ratio |\n|---|---|---|---|---|", flush=True)
    for events, graphs in ((False, ("torus", "ring", "random 4-regular")), (True, ("ring", "geometric"))):
        for graph in graphs:
            with tempfile.TemporaryDirectory() as scratch:
                file = Path(scratch) / "s.yaml"
                file.write_text(json.dumps(scenario(graph, events)))
                turns = [
                    (
                        seconds(file, "local", 1, Path(scratch) / f"a{turn}"),
                        seconds(file, "mpi", 2, Path(scratch) / f"b{turn}"),
                    )
                    for turn in range(TIMES)
                ]
            one, two = (min(turn[k] for turn in turns) for k in (0, 1))
            name = "events" if events else "rounds"
            print(f"| {name} | {graph} | {one:.2f} | {two:.2f} | {one / two:.2f} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
