"""What travels between processes may be of any size, also none, and may take its time."""

import os
import subprocess

import pytest
from launching import command, needs_mpi

PROGRAM = """
import numpy as np
from fedsim.transport import mpi
from fedsim.transport.detect import connect
mpi.PIECE = 12  # bytes: everything but the smallest goes in pieces
t = connect("KIND")
ranks, me = range(t.size), t.rank

def message(sender, receiver, most):
    return np.random.default_rng([sender, receiver]).integers(0, 255, (7 * sender + 3 * receiver) % most, np.uint8)

for most in (1, 4, 9, 40):
    whole = t.all_gather(message(me, 0, most))
    assert [part.tobytes() for part in whole] == [message(r, 0, most).tobytes() for r in ranks]
    theirs = [message(r, me, most) for r in ranks]
    before, mine = t.moved, [message(me, r, most) for r in ranks]
    got = t.all_to_all(np.concatenate(mine), [len(m) for m in mine], [len(m) for m in theirs])
    assert got.tobytes() == np.concatenate(theirs).tobytes()
    assert t.moved - before == sum(len(m) for r, m in enumerate(mine) if r != me)
    others = [r for r in ranks if r != me]
    into = {r: np.empty(len(theirs[r]), np.uint8) for r in others}
    t.exchange({r: mine[r] for r in others}, into)
    assert all(into[r].tobytes() == theirs[r].tobytes() for r in others)
    assert t.broadcast(message(1, 2, most) if me == 1 else None, root=1).tobytes() == message(1, 2, most).tobytes()
print(f"rank {me} has everything", flush=True)
t.close()
"""

LATE = """
import time
import numpy as np
from fedsim.transport.torchrun import TorchTransport
t = TorchTransport(2.0)
other, came = 1 - t.rank, np.zeros(1, np.uint8)
time.sleep(4.0 * t.rank)
t.exchange({other: came + 1}, {other: came})
time.sleep(4.0 * t.rank)
assert [int(part[0]) for part in t.all_gather(came)] == [1, 1]
print(f"rank {t.rank} has everything", flush=True)
time.sleep(4.0 * t.rank)
t.close()
"""


@pytest.mark.parametrize("kind", [pytest.param("mpi", marks=needs_mpi), pytest.param("torch", marks=pytest.mark.slow)])
def test_messages_of_any_size_arrive_whole(tmp_path, kind):
    """Gathered, broadcast, all-to-all, to each other: empty ones, and those of more bytes than one call may count."""
    play(tmp_path, PROGRAM.replace("KIND", kind), kind, 3)


@pytest.mark.slow
def test_torch_waits_for_as_long_as_the_watch_lets_it(tmp_path):
    """A peer may come later than gloo's own timeout: engine.timeout says who waits too long, and it can be raised."""
    play(tmp_path, LATE, "torch", 2)


def play(folder, program, kind, size):
    """Have so many processes play a program to its end."""
    (folder / "program.py").write_text(program)
    done = subprocess.run(
        command(kind, size, folder / "program.py"),
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"rank {r} has everything" in done.stdout for r in range(size))
