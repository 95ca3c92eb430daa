"""What the processes of a job do together around a run: rank 0 writes, the others hand it what it needs."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsim.transport.local import LocalTransport
from fedsim.transport.transport import Transport, as_bytes

if TYPE_CHECKING:
    from fedsim.engine.counts import Counts, Packed
    from fedsim.engine.layout import Layout
    from fedsim.watch import Watch

LONG = 3600.0  # seconds that rank 0 may need for tables and pictures
TOGETHER = 5.0  # seconds in which all ranks find the same mistake, or one of them has found its own

_connected: Transport | None = None
_watch: Watch | None = None


def connected(wanted: str = "auto", timeout: float = 120.0) -> Transport:
    """Return this process's transport, connected once; a job keeps it to its end."""
    global _connected, _watch
    from fedsim.transport.detect import connect

    if _connected is None:
        _connected = connect(wanted, timeout)
        if _connected.size > 1:
            from fedsim.watch import Watch

            _watch = Watch(_connected, timeout)
    return LocalTransport() if wanted == "local" else _connected


@contextmanager
def watched(timeout: float, on_failure: Callable[[str], None]) -> Iterator[None]:
    """Have this job's ranks watched while they play: one that is gone, stopped or stuck ends all.

    Args:
        timeout: seconds without a sign of life or of progress.
        on_failure: what rank 0 does first, given the message.
    """
    if _watch is None:
        yield
        return
    _watch.begin(timeout, on_failure)
    try:
        yield
    finally:
        _watch.playing = False


def leads() -> bool:
    """Return whether this process prints: the only one, or rank 0 of its job."""
    return _connected is None or _connected.rank == 0


def end(error: BaseException | None) -> None:
    """Leave the job: all together after success, or at once for all after an error of one rank.

    A mistake in the input that every rank finds ends each of them in its own way.
    """
    from fedsim.errors import InputError

    if _connected is None or _connected.size == 1:
        return
    if isinstance(error, InputError) and _connected.leaves_with_all(TOGETHER):
        return
    if error is None and _connected.leaves_with_all(LONG):  # watched while it waits: who is missing is named
        if _watch is not None:
            _watch.close()
        _connected.close()
        return
    sys.stdout.flush()
    what = f"{type(error).__name__}: {error}" if error is not None else "the others have not come to the end"
    message = f"rank {_connected.rank} of {_connected.size}: {what}"
    if _watch is not None:
        _watch.fail(message)
    _connected.abort(f"fedsim: {message}")


def made_by_rank_0(make: Callable[[], dict[str, Any]], transport: Transport) -> dict[str, Any]:
    """Return on every rank what rank 0 makes: plain values and lists, floats to the bit.

    Raises:
        InputError: rank 0 cannot make it; every rank says the same.
    """
    from fedsim.errors import InputError

    if transport.size == 1:
        return make()
    text = None
    if transport.rank == 0:
        try:
            text = json.dumps({"made": make()})
        except InputError as error:
            text = json.dumps({"refused": str(error)})
    received = transport.broadcast(None if text is None else np.frombuffer(text.encode(), np.uint8))
    found = json.loads(received.tobytes())
    if "refused" in found:
        raise InputError(found["refused"])
    return found["made"]


def counts_of_all(counts: Counts | Packed, layout: Layout) -> dict[str, int]:
    """Return the counts over all ranks: sums, and for `exchanges` (steps that cannot overlap) the most."""
    mine = counts.as_dict()
    if layout.size == 1:
        return mine
    parts = [p.view(np.int64) for p in layout.transport.all_gather(as_bytes(np.array(list(mine.values()), np.int64)))]
    return {
        name: int(max(p[i] for p in parts) if name == "exchanges" else sum(p[i] for p in parts))
        for i, name in enumerate(mine)
    }


def of_rank_0(value: float, layout: Layout) -> float:
    """Return rank 0's number on every rank, so that all decide alike."""
    if layout.size == 1:
        return value
    return float(layout.transport.broadcast(as_bytes(np.array([value]))).view(np.float64)[0])


def rows_of_all(array: NDArray, layout: Layout) -> NDArray | None:
    """Return all nodes' rows `[n, ...]` in position order on rank 0, None on the others."""
    if layout.size == 1:
        return array
    array = np.ascontiguousarray(array)
    if layout.rank > 0:
        layout.transport.exchange({0: as_bytes(array)}, {})
        return None
    whole = np.empty((layout.n, *array.shape[1:]), array.dtype)
    whole[: layout.rows] = array
    flat = whole.reshape(layout.n, -1)
    places = [slice(int(a), int(b)) for a, b in zip(layout.ranges[1:-1], layout.ranges[2:], strict=True)]
    parts = {r: np.empty(flat[place].nbytes, np.uint8) for r, place in enumerate(places, start=1)}
    layout.transport.exchange({}, parts)
    for r, place in enumerate(places, start=1):
        flat[place] = parts[r].view(array.dtype).reshape(flat[place].shape)
    return whole


def gathered(arrays: Mapping[str, NDArray], rows: frozenset[str], layout: Layout) -> dict[str, NDArray] | None:
    """Return a state's arrays with all nodes' rows on rank 0, None on the others."""
    whole = {name: rows_of_all(a, layout) if name in rows else a for name, a in arrays.items()}
    return None if layout.rank > 0 else {name: a for name, a in whole.items() if a is not None}


def own_part(arrays: Mapping[str, NDArray], rows: frozenset[str], layout: Layout) -> dict[str, NDArray]:
    """Return the arrays of a whole state with this rank's rows only."""
    return {name: a[layout.lo : layout.hi] if name in rows else a for name, a in arrays.items()}


def arrays_of_rank_0(read: Callable[[], dict[str, NDArray] | None], layout: Layout) -> dict[str, NDArray] | None:
    """Return on every rank what rank 0 reads."""
    if layout.size == 1:
        return read()
    sent: Any = None
    if layout.rank == 0:
        found, file = read(), io.BytesIO()
        if found is not None:
            np.savez(file, allow_pickle=False, **found)  # type: ignore[arg-type]
        sent = np.frombuffer(file.getvalue(), np.uint8)
    received = layout.transport.broadcast(sent)
    if not len(received):
        return None
    with np.load(io.BytesIO(received.tobytes()), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
