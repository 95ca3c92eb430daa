"""How fast two or more processes of a job exchange bytes: a ping-pong and an all-to-all on fedsim's own transport."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np

from fedsim.transport.detect import connect
from fedsim.transport.transport import Transport

SMALL, LARGE, PART = 64, 1 << 23, 1 << 18  # bytes of the ping-pong's messages, and of each all-to-all part


def measure(transport: Transport) -> dict[str, float]:
    """Return seconds per exchange between ranks 0 and 1 (both send at once) and per all-to-all of all ranks.

    Raises:
        RuntimeError: what arrived is not what was sent.
    """
    return {
        "small": _best(lambda: _ping(transport, SMALL), 200),
        "large": _best(lambda: _ping(transport, LARGE), 5),
        "all_to_all": _best(lambda: _shuffle(transport), 20),
    }


def _best(play: Callable[[], None], times: int) -> float:
    """Return the median of several measurements, after two that warm up."""
    taken = []
    for _ in range(times + 2):
        clock = time.perf_counter()
        play()
        taken.append(time.perf_counter() - clock)
    return float(np.median(taken[2:]))


def _ping(transport: Transport, size: int) -> None:
    if transport.rank > 1:
        return
    other = 1 - transport.rank
    received = np.empty(size, np.uint8)
    transport.exchange({other: np.full(size, transport.rank, np.uint8)}, {other: received})
    if received[0] != other or received[-1] != other:
        raise RuntimeError(f"rank {transport.rank} received {received[0]} from rank {other}")


def _shuffle(transport: Transport) -> None:
    sends = np.repeat(np.arange(transport.size, dtype=np.uint8), PART)
    lengths = [PART] * transport.size
    received = transport.all_to_all(sends, lengths, lengths)
    if not (received == transport.rank).all():
        raise RuntimeError(f"rank {transport.rank} received parts that are not its own")


if __name__ == "__main__":
    job = connect()
    result = measure(job)
    if job.rank == 0:
        print(json.dumps({"processes": job.size, **result}))
    job.close()
