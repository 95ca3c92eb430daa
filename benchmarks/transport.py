"""What the transport adds to a round: `python -m benchmarks.transport` prints a table.

Two ranks, n = 2,000, dim = 1,000. Each case is played ten rounds at a time with the real transport and with one that
moves nothing: the same computation and packing, on both cores at once, and in every exchange the same wait until the
other rank has come as far, told by a flag in shared memory. The difference is held against a bare exchange of the same
bytes by mpi4py or torch.distributed alone: in a loop, where its buffers stay in the caches, and among the same
computations, in place of what the transport moves.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsim.algorithms.dproxsgt import GradientTracking
from fedsim.engine.ghosts import HEADER
from fedsim.engine.layout import Layout
from fedsim.engine.machine import prepare
from fedsim.engine.rounds import Rounds
from fedsim.launchers import command
from fedsim.problems.quadratic import Quadratic
from fedsim.topology.build import build
from fedsim.topology.mixing import mixing_matrix
from fedsim.transport.detect import connect
from fedsim.transport.transport import Bytes

GRAPHS = {"ring": "ring:2000", "torus": "torus:40,50", "random 4-regular": "random_regular:n=2000,degree=4,seed=0"}
DIM, ROUNDS, TIMES, MIXINGS = 1000, 10, 30, 2


class _Idle:
    """A transport that moves nothing of the run's: its answers are the headers that are expected, and zeros.

    Args:
        real: whose ranks these are. flags: int64 `[ranks]` in shared memory, how many exchanges each has begun.
        bare: what is done instead in every exchange.
    """

    def __init__(self, real: Any, flags: np.ndarray, bare: Callable[[], None] | None = None) -> None:
        self._real, self._flags, self._bare = real, flags, bare
        self._known: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def start(self, sends: dict[int, Bytes], receives: dict[int, Bytes]) -> Callable[[], None]:
        for peer, buffer in receives.items():
            if buffer.ctypes.data not in self._known:  # they are kept from exchange to exchange
                self._known.add(buffer.ctypes.data)
                buffer[:] = 0
            buffer[: 8 * HEADER] = sends[peer][: 8 * HEADER]
        if self._bare is not None:
            return self._bare
        self._flags[self.rank] += 1
        begun = int(self._flags[self.rank])

        def wait() -> None:
            while min(int(self._flags[peer]) for peer in receives) < begun:
                pass

        return wait


def _shared(job: Any) -> np.ndarray:
    """Return int64 `[ranks]`, 0 at first, that all ranks see."""
    name = Path(tempfile.gettempdir()) / f"fedsim-flags-{os.getppid()}"
    if job.rank == 0:
        name.write_bytes(bytes(8 * job.size))
    job.all_gather(np.zeros(1, np.uint8))
    flags = np.memmap(name, np.int64, "r+", shape=(job.size,))
    job.all_gather(np.zeros(1, np.uint8))
    if job.rank == 0:
        name.unlink()
    return flags


def _player(graph: str, transport: Any) -> Rounds:
    topology = build(graph)
    rng = np.random.default_rng(0)
    problem = Quadratic(1 + rng.random((topology.n, DIM)), rng.normal(size=(topology.n, DIM)))
    layout = Layout(topology, transport=transport)
    x0 = torch.zeros(layout.rows, DIM, dtype=torch.float64)
    return Rounds(GradientTracking(eta=1e-3), problem, layout, {"W": mixing_matrix(topology)}, x0, 0)


def _rounds(player: Rounds) -> Callable[[], None]:
    return lambda: player.advance(player.now + ROUNDS)


def _medians(plays: list[Callable[[], None]], job: Any) -> list[float]:
    """Return how long each takes both ranks; they are played in turn, so that a machine's moods meet all of them."""
    taken = np.empty((TIMES, len(plays)))
    for row in taken:
        for place, play in enumerate(plays):
            job.all_gather(np.zeros(1, np.uint8))  # both start together
            clock = time.perf_counter()
            play()
            own = np.array([time.perf_counter() - clock])
            row[place] = max(float(part.view(np.float64)[0]) for part in job.all_gather(own.view(np.uint8)))
    return np.median(taken, axis=0).tolist()


def _often(play: Callable[[], None]) -> Callable[[], None]:
    """Return what plays as many exchanges in a row as the rounds have mixings."""

    def plays() -> None:
        for _ in range(ROUNDS * MIXINGS):
            play()

    return plays


def _bare(job: Any, size: int) -> Callable[[], None]:
    """Return an exchange of `size` bytes each way by the library alone."""
    mine, theirs, other = np.ones(size, np.uint8), np.empty(size, np.uint8), 1 - job.rank
    if job.kind == "mpi":
        from mpi4py import MPI

        return lambda: MPI.COMM_WORLD.Sendrecv(mine, other, 0, theirs, other, 0)
    import torch.distributed as dist

    def play() -> None:
        works = [dist.irecv(torch.from_numpy(theirs), src=other), dist.isend(torch.from_numpy(mine), dst=other)]
        for work in works:
            assert work is not None
            work.wait()

    return play


def measure(job: Any) -> list[dict[str, Any]]:
    """Return, per graph, milliseconds per mixing: of the transport, and of the bare exchange, looped and among work."""
    found, flags = [], _shared(job)
    for name, graph in GRAPHS.items():
        real = _player(graph, job)
        real.start()
        real.advance(2)
        before = job.moved
        real.advance(real.now + 1)
        own = np.array([(job.moved - before) // MIXINGS])
        size = max(int(part.view(np.int64)[0]) for part in job.all_gather(own.view(np.uint8)))
        bare = _bare(job, size)
        others = [_player(graph, _Idle(job, flags)), _player(graph, _Idle(job, flags, bare))]
        for player in others:
            player.start()
            player.advance(2)
        plays = [*map(_rounds, [real, *others]), _often(bare)]
        full, alone, among, looped = (seconds / ROUNDS for seconds in _medians(plays, job))
        found.append(
            {
                "graph": name,
                "bytes": size,
                "round_ms": 1e3 * full,
                "added_ms": 1e3 * (full - alone) / MIXINGS,
                "bare_ms": 1e3 * looped / MIXINGS,
                "among_ms": 1e3 * (among - alone) / MIXINGS,
            }
        )
    return found


def main() -> None:
    """Play both kinds of job and print the table."""
    print("| transport | graph | bytes each way | round, ms | added per mixing, ms |", end="")
    print(" bare exchange in a loop, ms | ratio | among the computations, ms | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for kind in ("mpi", "torch"):
        start = [*command(kind, 2), "-m", "benchmarks.transport", "job"]
        done = subprocess.run(start, check=True, capture_output=True, text=True)
        for row in json.loads(done.stdout.splitlines()[-1]):
            added, bare, among = (row[name] for name in ("added_ms", "bare_ms", "among_ms"))
            print(
                f"| {kind} | {row['graph']} | {row['bytes']:,} | {row['round_ms']:.2f} | {added:.3f} | {bare:.3f} |"
                f" {added / bare:.2f} | {among:.3f} | {added / among:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:] == ["job"]:
        prepare()
        here = connect()
        rows = measure(here)
        if here.rank == 0:
            print(json.dumps(rows))
        here.close()
    else:
        main()
