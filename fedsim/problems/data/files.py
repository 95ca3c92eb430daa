"""The user's own files: CSV, Parquet, NPZ and LIBSVM."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import InputError, did_you_mean
from fedsim.problems.data.source import Source, Surroundings
from fedsim.problems.data.table import Constant, Data, checked, encode, encode_labels

if TYPE_CHECKING:
    import pyarrow

TaskKey = Literal["auto", "regression", "classification"]

MISSING = ["", "NaN", "nan", "NA", "N/A", "null", "?"]
"""Texts of a CSV cell that count as missing."""


@dataclass(frozen=True, kw_only=True)
class FileSource(Source):
    """Base of the file kinds.

    Attributes:
        file: its path, from the scenario's folder where it is relative.
        task: classification, regression, or auto: text and two-valued labels are classes, other numbers targets.
        constant: what to do with columns of one value: refuse, drop or keep.
    """

    file: str
    task: TaskKey = "auto"
    constant: Constant = "refuse"

    def path(self, around: Surroundings) -> Path:
        """Return the file's full path.

        Raises:
            InputError: there is no such file.
        """
        path = around.base / Path(self.file).expanduser()
        if not path.is_file():
            raise InputError(f"data.file: there is no file {path}")
        return path


@dataclass(frozen=True, kw_only=True)
class Csv(FileSource):
    """A CSV file with a line of column names; text columns become one-hot.

    Attributes:
        label: name of the column to predict.
        drop: columns that are no features; a partition may still follow them.
    """

    label: str
    drop: tuple[str, ...] = ()

    def read(self, around: Surroundings) -> Data:
        """Return the file's records."""
        path = self.path(around)
        columns = csv_columns(path)
        return encode(columns, self.label, path.name, drop=self.drop, task=self.task, constant=self.constant)


@dataclass(frozen=True, kw_only=True)
class Parquet(FileSource):
    """A Parquet file; keys as for CSV."""

    label: str
    drop: tuple[str, ...] = ()

    def read(self, around: Surroundings) -> Data:
        """Return the file's records."""
        import pyarrow
        import pyarrow.parquet

        path = self.path(around)
        try:
            table = pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"data.file: {path} is not a readable Parquet file: {error}") from None
        columns = arrow_columns(table)
        return encode(columns, self.label, path.name, drop=self.drop, task=self.task, constant=self.constant)


def csv_columns(path: Path) -> dict[str, NDArray[Any]]:
    """Return the columns of a CSV file as `encode` takes them.

    Raises:
        InputError: the file is not CSV, or has two columns of one name.
    """
    import pyarrow
    import pyarrow.csv

    convert = pyarrow.csv.ConvertOptions(null_values=MISSING, strings_can_be_null=True)
    try:
        table = pyarrow.csv.read_csv(path, convert_options=convert)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"data.file: {path} is not a readable CSV file: {error}") from None
    return arrow_columns(table)


def arrow_columns(table: pyarrow.Table) -> dict[str, NDArray[Any]]:
    """Return an Arrow table's columns: whole numbers, float64 (NaN where missing), or objects (None where missing)."""
    names = table.column_names
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"data: two columns have one name: {', '.join(map(repr, twice))}")
    return {name: _array(column) for name, column in zip(names, table.columns, strict=True)}


def _array(column: pyarrow.ChunkedArray) -> NDArray[Any]:
    import pyarrow
    from pyarrow import types

    kind = column.type
    if types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    if types.is_null(kind):
        return np.full(len(column), np.nan)
    if types.is_boolean(kind):
        column, kind = column.cast(pyarrow.int8()), pyarrow.int8()
    if types.is_integer(kind) and not column.null_count:
        return column.to_numpy().astype(np.uint64 if types.is_uint64(kind) else np.int64)
    if types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
        return column.cast(pyarrow.float64(), safe=False).to_numpy()
    if types.is_string(kind) or types.is_large_string(kind):
        return np.array(column.to_pylist(), dtype=object)
    return column.to_numpy()


@dataclass(frozen=True, kw_only=True)
class Npz(FileSource):
    """A NumPy archive with a matrix of features `[N, d]` and labels `[N]`; no pickles are read.

    Attributes:
        features, label: names of the two arrays. Other arrays of length N can be followed by a partition.
    """

    features: str = "X"
    label: str = "y"

    def read(self, around: Surroundings) -> Data:
        """Return the file's records."""
        path = self.path(around)
        arrays = _npz_arrays(path)
        for name in (self.features, self.label):
            if name not in arrays:
                raise InputError(f"data.file: {path} has no array {name!r}{did_you_mean(name, arrays)}; it has "
                                 f"{', '.join(map(repr, arrays))}")  # fmt: skip
        X, y = arrays.pop(self.features), arrays.pop(self.label)
        _check_shapes(X, y, path)
        if y.dtype.kind in "US":
            y = y.astype(str).astype(object)
        labels, task, classes = encode_labels(y, path.name, self.label, self.task)
        columns = {name: a for name, a in arrays.items() if a.shape == (len(y),)}
        names = tuple(f"{self.features}[{j}]" for j in range(X.shape[1]))
        return checked(Data(X.astype(np.float64), labels, columns, path.name, task, classes, names), self.constant)


def _npz_arrays(path: Path) -> dict[str, NDArray[Any]]:
    import zipfile

    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(f"data.file: {path} is not an NPZ file of plain arrays: {error}") from None


def _check_shapes(X: NDArray[Any], y: NDArray[Any], path: Path) -> None:
    if X.ndim != 2 or y.shape != X.shape[:1]:
        raise InputError(f"data.file: {path}: features {list(X.shape)} and labels {list(y.shape)} do not fit; "
                         "needed are [N, d] and [N]")  # fmt: skip
    if X.dtype.kind not in "fiub":
        raise InputError(f"data.file: {path}: features hold {X.dtype}; needed are numbers")


@dataclass(frozen=True, kw_only=True)
class Libsvm(FileSource):
    """A LIBSVM (svmlight) text file, `label index:value ...`; features left out of a line are 0.

    Indices start at 1, or at 0 where index 0 occurs. The matrix is held dense.

    Attributes:
        dim: number of features; by default the largest index that occurs.
    """

    dim: int | None = None

    def read(self, around: Surroundings) -> Data:
        """Return the file's records."""
        path = self.path(around)
        labels, rows, indices, values = _libsvm_entries(path)
        if not labels:
            raise InputError(f"data.file: {path} has no records")
        first = 0 if 0 in indices else 1
        width = max(indices, default=0) + 1 - first
        if self.dim is not None and self.dim < width:
            raise InputError(f"data.dim: {self.dim} is given, but {path} has index {max(indices)}")
        dim = self.dim or width
        _refuse_larger_than_memory(len(labels), dim, path)
        X = np.zeros((len(labels), dim))
        X[rows, np.array(indices, dtype=np.int64) - first] = values
        y, task, classes = encode_labels(np.array(labels), path.name, "label", self.task)
        names = tuple(f"{j + first}" for j in range(dim))
        return checked(Data(X, y, {}, path.name, task, classes, names), self.constant)


def _refuse_larger_than_memory(records: int, dim: int, path: Path) -> None:
    """Refuse a dense matrix that the machine could not hold together with what is made of it."""
    if not {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
        return
    needed, there = 8 * records * dim, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there / 3:
        raise InputError(
            f"data.file: {path} has {records} records of {dim} features, {needed / 2**30:.3g} GiB as a dense matrix;"
            f" this machine has {there / 2**30:.3g}; keep fewer features"
        )


def _libsvm_entries(path: Path) -> tuple[list[float], list[int], list[int], list[float]]:
    labels, rows, indices, values = [], [], [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        try:
            label = float(words[0])
            pairs = [(int(index), float(value)) for index, value in (word.split(":") for word in words[1:])]
        except ValueError:
            raise InputError(f"data.file: {path}, line {number}: needed is 'label index:value ...', "
                             f"given {line[:60]!r}") from None  # fmt: skip
        if any(index < 0 for index, _ in pairs) or len({index for index, _ in pairs}) < len(pairs):
            raise InputError(f"data.file: {path}, line {number}: an index is negative or occurs twice")
        rows.extend([len(labels)] * len(pairs))
        labels.append(label)
        indices.extend(index for index, _ in pairs)
        values.extend(value for _, value in pairs)
    return labels, rows, indices, values
