"""Every function value that a run asked for, in `queries.parquet`."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

    from fedsim.engine.layout import Layout

FILE = "queries.parquet"


def write_queries(folder: Path, columns: dict[str, NDArray], layout: Layout) -> None:
    """Write the log of all ranks, by node and number; rank 0 writes, every rank calls.

    Columns: node, number (from 0, per node), round (-1: before round 0), value, and x (a list) for short points.
    """
    parts = [columns]
    if layout.size > 1:
        parts = [_read(part) for part in layout.transport.all_gather(_packed(columns))]
    if layout.rank > 0:
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole = {name: np.concatenate([p[name] for p in parts]) for name in columns}
    order = np.lexsort((whole["number"], whole["node"]))
    table = {name: pa.array(list(a[order]) if a.ndim > 1 else a[order]) for name, a in whole.items()}
    temporary = folder / (FILE + ".tmp")
    pq.write_table(pa.table(table), temporary)
    os.replace(temporary, folder / FILE)


def read_queries(folder: Path) -> pd.DataFrame:
    """Return the log as a frame: node, number, round, value, and x where points are short.

    Raises:
        FileNotFoundError: the run asked for no function values.
    """
    import pandas as pd

    return pd.read_parquet(folder / FILE)


def _packed(columns: dict[str, NDArray]) -> NDArray[np.uint8]:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **columns)  # type: ignore[arg-type]
    return np.frombuffer(file.getvalue(), np.uint8)


def _read(part: NDArray[np.uint8]) -> dict[str, NDArray]:
    with np.load(io.BytesIO(part.tobytes()), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
