"""A table of records as numbers: features, labels, and the raw columns that a partition may follow."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import InputError, did_you_mean

Task = Literal["regression", "binary", "multiclass"]
Normalise = Literal["none", "columns", "rows", "both"]
Constant = Literal["refuse", "drop", "keep"]

LARGEST = 1e100
MAX_LEVELS = 1000
"""A text column with more distinct values than this is an identifier rather than a feature."""


@dataclass(frozen=True)
class Data:
    """Records with labels.

    Attributes:
        features: float64 `[N, d]`.
        labels: float64 `[N]` targets for `task="regression"`; else int64 `[N]` class numbers into `classes`.
        columns: the raw columns by name, each `[N]` (text or numbers), before encoding and normalisation;
            synthetic sets have one, `node`.
        name: of the set, for messages and plots.
        task: "regression", "binary" (two classes) or "multiclass".
        classes: names of the classes in the order of their numbers; empty for regression.
        feature_names: `d` names; a one-hot column is called `column=value`.
        held_out: records that no node owns, scaled as the others, for tests.
        vocabulary: of text, whose features are codes of characters: the characters by their codes.
    """

    features: NDArray[np.float64]
    labels: NDArray[Any]
    columns: dict[str, NDArray[Any]]
    name: str
    task: Task
    classes: tuple[str, ...] = ()
    feature_names: tuple[str, ...] = ()
    held_out: Data | None = None
    vocabulary: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def signs(self) -> NDArray[np.float64]:
        """Labels of a binary set as float64 `[N]` in {-1, +1}; +1 is `classes[1]`.

        Raises:
            InputError: the set is not binary.
        """
        if self.task != "binary":
            raise InputError(f"data {self.name!r} is a {self.task} set; labels -1/+1 need a binary one")
        return 2.0 * self.labels - 1.0


def encode(
    columns: Mapping[str, NDArray[Any]],
    label: str,
    name: str,
    *,
    drop: Collection[str] = (),
    task: Literal["auto", "regression", "classification"] = "auto",
    missing_text: Literal["refuse", "zeros"] = "refuse",
    constant: Constant = "refuse",
) -> Data:
    """Return the table as numbers: numeric columns as they are, text columns one-hot in sorted order of values.

    Every value of a text column gets a column of its own (none is left out). With `missing_text="zeros"` a
    missing text value is a row of zeros in its block.

    Args:
        columns: name -> `[N]`; numbers (NaN where missing) or objects (text, None where missing).
        label: the column to predict; `drop`: columns that are no features (they stay in `Data.columns`).
        task: "auto" takes text and two-valued labels as classes, other numbers as targets, and asks where
            whole numbers could be either.

    Raises:
        InputError: no records or features, unknown columns, missing or infinite values, constant columns, one class.
    """
    _check_names(columns, label, drop, name)
    blocks: list[NDArray[np.float64]] = []
    names: list[str] = []
    for key, values in columns.items():
        if key == label or key in drop:
            continue
        block, labels_of_block = _feature_block(key, values, name, missing_text == "zeros")
        blocks.append(block)
        names.extend(labels_of_block)
    if not blocks:
        raise InputError(f"data {name!r}: no feature columns are left beside the label {label!r}")
    labels, kind, classes = encode_labels(columns[label], name, label, task)
    data = Data(np.hstack(blocks), labels, dict(columns), name, kind, classes, tuple(names))
    return checked(data, constant)


def encode_labels(
    values: NDArray[Any], name: str, label: str, task: str = "auto"
) -> tuple[NDArray[Any], Task, tuple[str, ...]]:
    """Return (labels `[N]`, task, class names) of a label column; see `encode`."""
    if not len(values):
        raise InputError(f"data {name!r} has no records")
    text = values.dtype.kind not in "fiub"
    if text:
        _refuse_other_than_text(label, values, name, "needed are numbers or text")
    _refuse_missing(label, values, name, "fill them or remove those records")
    levels, numbers = np.unique(values, return_inverse=True)
    if task == "auto":
        task = _guess_task(text, levels, name, label)
    if task == "regression":
        if text:
            raise InputError(f"data {name!r}: label column {label!r} holds text; task 'regression' needs numbers")
        return values.astype(np.float64), "regression", ()
    classes = tuple(str(level) if text else f"{level:g}" for level in levels)
    if len(set(classes)) < len(levels):
        raise InputError(f"data {name!r}: label column {label!r} holds {len(levels)} different numbers, too close "
                         "to name as classes; say task: regression")  # fmt: skip
    kind: Task = "binary" if len(classes) == 2 else "multiclass"
    return numbers.reshape(-1).astype(np.int64), kind, classes


def _guess_task(text: bool, levels: NDArray[Any], name: str, label: str) -> str:
    if text or len(levels) <= 2:
        return "classification"
    if np.all(levels == np.round(levels)) and len(levels) <= 100:
        raise InputError(f"data {name!r}: label column {label!r} holds {len(levels)} different whole numbers, which "
                         "may be classes or amounts; say task: classification or task: regression")  # fmt: skip
    return "regression"


def _check_names(columns: Mapping[str, Any], label: str, drop: Collection[str], name: str) -> None:
    for key, what in [(label, "label"), *((key, "drop") for key in drop)]:
        if key not in columns:
            hint = did_you_mean(key, columns)
            raise InputError(f"data {name!r}: {what}: no column {key!r}{hint}; it has {_listed(columns)}")


def _feature_block(
    key: str, values: NDArray[Any], name: str, missing_as_zeros: bool
) -> tuple[NDArray[np.float64], list[str]]:
    remedy = f"fill them, remove those records, or drop the column (drop: [{key}])"
    if values.dtype.kind in "fiub":
        _refuse_missing(key, values, name, remedy)
        return values.astype(np.float64)[:, None], [key]
    _refuse_other_than_text(key, values, name, f"drop it (drop: [{key}]) or convert it")
    if not missing_as_zeros:
        _refuse_missing(key, values, name, remedy)
    levels = sorted({value for value in values if value is not None})
    if len(levels) > MAX_LEVELS:
        raise InputError(f"data {name!r}: text column {key!r} holds {len(levels)} different values, too many for one "
                         f"column each; drop it (drop: [{key}])")  # fmt: skip
    place = {level: i for i, level in enumerate(levels)}
    codes = np.array([place.get(value, -1) for value in values], dtype=np.int64)
    return (codes[:, None] == np.arange(len(levels))).astype(np.float64), [f"{key}={level}" for level in levels]


def _refuse_other_than_text(key: str, values: NDArray[Any], name: str, remedy: str) -> None:
    odd = [type(v).__name__ for v in values if v is not None and not isinstance(v, str)][:1]
    if values.dtype.kind != "O" or odd:
        held = odd[0] if odd and values.dtype.kind == "O" else values.dtype
        raise InputError(f"data {name!r}: column {key!r} holds {held}, neither numbers nor text in UTF-8; {remedy}")


def _refuse_missing(key: str, values: NDArray[Any], name: str, remedy: str) -> None:
    if values.dtype.kind == "f":
        bad = ~np.isfinite(values)
    elif values.dtype.kind == "O":
        bad = np.array([value is None for value in values], dtype=bool)
    else:
        return
    if bad.any():
        first = int(np.argmax(bad))
        what = "missing" if values.dtype.kind == "O" or np.isnan(values[first]) else "infinite"
        raise InputError(f"data {name!r}: column {key!r} has {int(bad.sum())} missing or infinite value(s), the first "
                         f"({what}) in record {first}; {remedy}")  # fmt: skip


def checked(data: Data, constant: Constant = "refuse") -> Data:
    """Return `data` if it can be learned from; constant columns are refused, dropped or kept.

    Raises:
        InputError: no records, NaN or infinity, numbers whose squares would be infinite, a whole set of one class,
            constant columns where refused.
    """
    if not len(data) or not data.features.shape[1]:
        shape = " x ".join(map(str, data.features.shape))
        raise InputError(f"data {data.name!r} is empty: {shape} (records x features)")
    bad = ~np.isfinite(data.features)
    if bad.any() or not np.isfinite(data.labels).all():
        record = int(np.argmax(bad.any(axis=1) | ~np.isfinite(data.labels)))
        raise InputError(f"data {data.name!r}: {int(bad.sum())} missing or infinite value(s), the first in record "
                         f"{record}; fill them or remove those records")  # fmt: skip
    largest = max(float(np.abs(data.features).max()), float(np.abs(data.labels).max()))
    if largest > LARGEST:
        raise InputError(
            f"data {data.name!r}: a value of {largest:.2g}, whose square is out of range; give that column in larger"
            " units"
        )
    if data.task != "regression" and len(np.unique(data.labels)) < 2:
        only = data.classes[int(data.labels[0])]
        raise InputError(f"data {data.name!r}: all {len(data)} records are of one class, {only!r}: nothing to learn")
    return data if constant == "keep" else _without_constant(data, constant)


def _without_constant(data: Data, constant: Constant) -> Data:
    varies = np.ptp(data.features, axis=0) > 0
    if varies.all():
        return data
    if not varies.any():
        raise InputError(f"data {data.name!r}: no feature varies: nothing to learn from")
    if constant == "refuse":
        names = [data.feature_names[j] for j in np.flatnonzero(~varies)]
        raise InputError(f"data {data.name!r}: the same value in every record of column(s) {_listed(names)}; say "
                         "constant: drop to leave them out (for an intercept there is bias: true), or "
                         "constant: keep")  # fmt: skip
    names = tuple(name for name, keep in zip(data.feature_names, varies, strict=True) if keep)
    return replace(data, features=data.features[:, varies], feature_names=names)


def split_off(data: Data, share: float, seed: int) -> Data:
    """Return `data` without a random share of its records, which it then has as `held_out`.

    The records are those that scikit-learn's `train_test_split(test_size=share, random_state=seed)` takes.

    Raises:
        InputError: none are left, or all of one class.
    """
    from sklearn.model_selection import train_test_split

    if math.ceil(share * len(data)) >= len(data):
        raise InputError(f"data.held_out: {share:g} of the {len(data)} records of {data.name!r} are all of them")
    kept, other = train_test_split(np.arange(len(data)), test_size=share, random_state=seed)
    rest = replace(_part(data, np.asarray(kept)), held_out=_part(data, np.asarray(other)))
    return rest if data.vocabulary else checked(rest, "keep")


def _part(data: Data, records: NDArray[np.int64]) -> Data:
    columns = {name: values[records] for name, values in data.columns.items()}
    return replace(data, features=data.features[records], labels=data.labels[records], columns=columns)


def with_target(data: Data) -> Data:
    """Return `data` with its targets divided by the largest magnitude among them.

    Raises:
        InputError: it has classes instead of targets, or targets that are all 0.
    """
    if data.task != "regression":
        raise InputError(f"data {data.name!r}: target: max divides numbers, and its labels are classes")
    largest = np.abs(data.labels).max()
    if not largest:
        raise InputError(f"data {data.name!r}: target: max divides by the largest target, and all are 0")
    other = data.held_out
    held_out = None if other is None else replace(other, labels=other.labels / largest)
    return replace(data, labels=data.labels / largest, held_out=held_out)


def normalised(data: Data, how: Normalise) -> Data:
    """Return `data` with its features scaled, held-out ones by the same numbers.

    - `columns`: every column to mean 0 and standard deviation 1 (population; a constant pixel becomes 0);
    - `rows`: every record to Euclidean norm 1 (a record of zeros stays);
    - `both`: columns first, then rows; `none`: as they are.
    """
    features, other = data.features, data.held_out
    varies = np.ptp(features, axis=0) > 0
    mean, deviation = features.mean(axis=0), np.where(varies, features.std(axis=0), 1.0)

    def scaled(features: NDArray[np.float64]) -> NDArray[np.float64]:
        if how in ("columns", "both"):
            features = np.where(varies, features - mean, 0.0) / deviation
        if how in ("rows", "both"):
            norms = np.linalg.norm(features, axis=1, keepdims=True)
            features = features / np.where(norms > 0, norms, 1.0)
        return features

    held_out = None if other is None else replace(other, features=scaled(other.features))
    return replace(data, features=scaled(features), held_out=held_out)


def with_bias(data: Data) -> Data:
    """Return `data` with a last feature `bias` that is 1 in every record (added after any scaling)."""
    features = np.hstack([data.features, np.ones((len(data), 1))])
    held_out = None if data.held_out is None else with_bias(data.held_out)
    return replace(data, features=features, feature_names=(*data.feature_names, "bias"), held_out=held_out)


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(repr(name) for name in list(names)[:10])
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"
