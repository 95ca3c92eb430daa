"""Metrics of a run: appended to an Arrow stream that can be read at any moment, a Parquet file at the end."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

STREAM = "metrics.arrows"
PARQUET = "metrics.parquet"


class Recorder:
    """Appends one row per observation to `metrics.arrows`; every row is on disk when `append` returns.

    The columns are those of the first row (numbers only; int stays int64, float stays float64).
    """

    def __init__(self, folder: Path, keep: int = 0) -> None:
        """Start a stream in `folder`, with the first `keep` rows of what an earlier, interrupted run left there.

        Raises:
            RunError: fewer than `keep` rows are there.
        """
        self._folder = folder
        self._rows = _kept(folder, keep) if keep else []
        self._writer: Any = None
        self._sink: Any = None
        if self._rows:
            self._open(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def last(self) -> dict[str, Any]:
        """The newest row, or an empty dict."""
        return dict(self._rows[-1]) if self._rows else {}

    @property
    def first(self) -> dict[str, Any]:
        """The oldest row, or an empty dict."""
        return dict(self._rows[0]) if self._rows else {}

    def append(self, row: dict[str, Any]) -> None:
        """Write one row; its keys must be those of the first."""
        if self._writer is None:
            self._open([row])
        else:
            self._write(row)
        self._rows.append(row)

    def close(self) -> None:
        """Turn the stream into `metrics.parquet` (temporary name, then renamed) and remove the stream."""
        if self._writer is None:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        writer, self._writer = self._writer, None
        with contextlib.suppress(OSError):  # a full disk: all whole rows are there
            writer.close()
            self._sink.close()
        temporary = self._folder / (PARQUET + ".tmp")
        try:
            pq.write_table(pa.Table.from_pylist(self._rows, schema=self._schema), temporary)
            os.replace(temporary, self._folder / PARQUET)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        (self._folder / STREAM).unlink()

    def _open(self, rows: list[dict[str, Any]]) -> None:
        """Begin the stream with these rows; it stands under its name once it holds them all."""
        import pyarrow as pa

        self._schema = pa.schema(
            [(name, pa.int64() if isinstance(v, int) else pa.float64()) for name, v in rows[0].items()]
        )
        temporary = self._folder / (STREAM + ".tmp")
        self._sink = pa.OSFile(str(temporary), "wb")
        self._writer = pa.ipc.new_stream(self._sink, self._schema)
        for row in rows:
            self._write(row)
        os.replace(temporary, self._folder / STREAM)

    def _write(self, row: dict[str, Any]) -> None:
        import pyarrow as pa

        self._writer.write_batch(pa.RecordBatch.from_pylist([row], schema=self._schema))
        self._sink.flush()


def read_metrics(folder: Path) -> pa.Table:
    """Return the metrics of a run, finished or not; an empty table where none are written yet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if (folder / PARQUET).exists() and not (folder / STREAM).exists():
        return pq.read_table(folder / PARQUET)
    if not (folder / STREAM).exists():
        return pa.table({})
    batches: list[pa.RecordBatch] = []
    with pa.OSFile(str(folder / STREAM), "rb") as source:
        try:
            stream = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:  # not even the columns are written yet
            return pa.table({})
        with contextlib.suppress(pa.ArrowInvalid, OSError, EOFError):  # the last row: killed while writing it
            batches.extend(stream)
        return pa.Table.from_batches(batches, schema=stream.schema)


def _kept(folder: Path, keep: int) -> list[dict[str, Any]]:
    from fedsim.errors import RunError

    rows = read_metrics(folder).slice(0, keep).to_pylist()
    if len(rows) < keep:
        raise RunError(f"{folder}: the checkpoint counts {keep} rows of metrics, but only {len(rows)} are there")
    return rows
