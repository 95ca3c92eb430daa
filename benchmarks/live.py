"""Live gossip between two ranks: `python -m benchmarks.live` prints exchanges a second, and what gradients lose.

The baseline of exchanges is a bare ping-pong of the same bytes; that of gradients the same run without gossip.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fedsim.launchers import command

GRADIENT = 1.5e-3  # seconds
QUADRATIC = {"kind": "quadratic", "shape": "diagonal"}
MPI_PING = """
import numpy as np, time
from mpi4py import MPI
c = MPI.COMM_WORLD
a = np.ones({size}, np.uint8)
def both(n):
    c.Barrier(); clock = time.perf_counter()
    for _ in range(n):
        if c.rank == 0: c.Send(a, 1); c.Recv(a, 1)
        else: c.Recv(a, 0); c.Send(a, 0)
    return (time.perf_counter() - clock) / n
both(20)
if (best := min(both({times}) for _ in range(5))) and c.rank == 0: print(best)
"""
TCP_PING = """
import os, socket, time
a, b = socket.create_server(("127.0.0.1", 0)), socket.socket()
if os.fork():
    c, _ = a.accept()
else:
    b.connect(a.getsockname()); c = b
first, out, into = c is not b, bytes({size}), memoryview(bytearray({size}))
c.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
def take():
    got = 0
    while got < {size}: got += c.recv_into(into[got:])
def both(n):
    clock = time.perf_counter()
    for _ in range(n):
        if first: c.sendall(out); take()
        else: take(); c.sendall(out)
    return (time.perf_counter() - clock) / n
both(20)
if (best := min(both({times}) for _ in range(5))) and first: print(best)
"""


def scenario(dim: int, rate: float, seconds: float) -> dict[str, Any]:
    """Return two nodes that gossip `rate` times a second; with gradients of 1.5 ms where `seconds` are those."""
    averaging = seconds == 0.0
    return {
        "name": "live",
        "topology": {"kind": "path", "n": 2},
        "problem": {"kind": "consensus", "dim": dim} if averaging else QUADRATIC | {"dim": dim},
        "start": {"kind": "normal"},
        "algorithm": {"kind": "randomised_gossip"} if averaging else {"kind": "gossip_sgd", "step": 1e-3},
        "rates": {"kind": "uniform", "caps": rate * (seconds or 1.0), "scale": "none"},
        "schedule": {"kind": "live", "unit": seconds or 1.0, "horizon": 3.0 / (seconds or 1.0)},
        "record": {"every": 3.0 / (seconds or 1.0), "metrics": ["consensus"]},
        **({} if averaging else {"engine": {"gradient_seconds": seconds}}),
    }


def played(content: dict[str, Any], root: Path) -> dict[str, Any]:
    """Play a scenario on two ranks and return its last observation."""
    file = root / "s.yaml"
    file.write_text(json.dumps(content))
    out = root / f"out{len(list(root.iterdir()))}"
    line = [*command("mpi", 2), "-m", "fedsim", "run", str(file), "--json", "--folder", str(out)]
    return json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)["last"]


def bare_rate(start: list[str], program: str, ping: dict[str, int]) -> float:
    """Return ping-pongs a second."""
    done = subprocess.run([*start, "-c", program.format(**ping)], check=True, capture_output=True, text=True)
    return 1 / float(done.stdout)


def main() -> None:
    """Print both tables."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        print(
            "| dim | exchanges a second | of bare TCP ping-pongs | of mpi4py's, in shared memory |\n|---|---|---|---|"
        )
        for dim, most in ((10, 2e4), (100_000, 1e4)):
            last = played(scenario(dim, most, 0.0), root)
            rate = last["communications"] / last["wall_seconds"]
            ping = {"size": 8 * dim, "times": 2000 if dim == 10 else 200}
            bare = [bare_rate([sys.executable], TCP_PING, ping), bare_rate(command("mpi", 2), MPI_PING, ping)]
            print(f"| {dim:,} | {rate:,.0f} | {' | '.join(f'{rate / b:.2f} ({b:,.0f})' for b in bare)} |", flush=True)
        print("\n| dim | gradients a second | without gossip | lost |\n|---|---|---|---|")
        for dim in (10, 100_000):
            free, busy = (played(scenario(dim, rate, GRADIENT), root) for rate in (1e-3, 1 / GRADIENT))
            speeds = [last["gradients"] / last["wall_seconds"] for last in (free, busy)]
            print(f"| {dim:,} | {speeds[1]:,.1f} | {speeds[0]:,.1f} | {1 - speeds[1] / speeds[0]:.1%} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
