"""Where router scores come from: synthetic batches with named skews, and recordings."""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import InputError

Workload = Literal[
    "balanced", "skew", "hot_experts", "hot_host", "spread_hot", "zero_expert_host", "rotating", "burst", "drift"
]
MOVING = ("rotating", "burst", "drift")
ScoreFunc = Literal["sigmoid", "softmax", "sqrtsoftplus"]
KEYS = ("step", "layer", "token")  # columns of a Parquet table that are not experts


def offsets(workload: Workload, size: float, experts: int, hosts: int, step: int, period: int) -> NDArray[np.float64]:
    """Return what a workload adds to the experts' logits at a step, `[E]`.

    `skew`: from -size to size; `hot_experts`: the first eighth of the experts; `hot_host`: those of host 0;
    `spread_hot`: the first of each host; `zero_expert_host`: those of the last host get nothing (-20 size);
    `rotating`: the hot eighth moves on every `period` steps; `burst`: it is hot in the first quarter of each period;
    `drift`: a cosine over experts that goes around once per period.
    """
    each, host, few = np.arange(experts), np.arange(experts) * hosts // experts, max(1, experts // 8)
    if workload == "skew":
        return size * np.linspace(-1, 1, experts)
    if workload == "drift":
        return size * np.cos(2 * np.pi * (each / experts - step / period))
    if workload == "zero_expert_host":
        return np.where(host == hosts - 1, -20.0 * size, 0.0)
    hot = {
        "balanced": np.zeros(experts, bool),
        "hot_experts": each < few,
        "hot_host": host == 0,
        "spread_hot": np.concatenate([[True], np.diff(host) > 0]),
        "rotating": (each // few) == (step // period) % -(-experts // few),
        "burst": (each < few) & (step % period < max(1, period // 4)),
    }[workload]
    return size * hot


def to_scores(logits: NDArray, score_func: ScoreFunc) -> NDArray:
    """Return the affinities of logits `[..., E]`."""
    if score_func == "sigmoid":
        with np.errstate(over="ignore"):  # exp(710) is infinite, the score rightly 0
            return 1 / (1 + np.exp(-logits))
    if score_func == "softmax":
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)
    return np.sqrt(np.logaddexp(0.0, logits))


def recorded(file: Path) -> NDArray:
    """Return recorded scores as `[steps, layers, tokens, E]` from .npy, .npz (`scores`) or Parquet.

    Arrays of 2, 3 or 4 axes are tokens x experts, layers in front of them, steps in front of those. A Parquet table has
    one column per expert, in their order, and columns `step` and `layer` where there are several; rows are tokens, as
    many for each, in the order of column `token` where there is one.

    Raises:
        InputError: no such file, not readable, another shape, or values that are no finite numbers.
    """
    if not file.is_file():
        raise InputError(f"problem.file: {file}: no such file; .npy, .npz or .parquet of router scores is needed")
    if file.suffix not in (".npy", ".npz", ".parquet"):
        raise InputError(f"problem.file: {file.name}: .npy, .npz or .parquet is needed")
    array = _from_parquet(file) if file.suffix == ".parquet" else _from_numpy(file)
    if array.ndim not in (2, 3, 4) or 0 in array.shape:
        raise InputError(
            f"problem.file: {file}: shape {array.shape}; [tokens, experts], [layers, tokens, experts] or"
            " [steps, layers, tokens, experts] is needed"
        )
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise InputError(f"problem.file: {file}: float16, float32 or float64 scores are needed, {array.dtype} found")
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        place = tuple(bad[0].tolist())
        raise InputError(
            f"problem.file: {file}: scores must be finite; {len(bad)} are not, the first at {list(place)}"
            f" ({array[place]})"
        )
    return np.ascontiguousarray(
        array.reshape((1,) * (4 - array.ndim) + array.shape),
        dtype=np.float32 if array.dtype.itemsize < 8 else np.float64,
    )


def _from_numpy(file: Path) -> NDArray:
    try:
        found = np.load(file, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        with found:
            if "scores" in found.files:
                return found["scores"]
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise InputError(f"problem.file: {file}: not a readable {file.suffix} of numbers ({error})") from error
    raise InputError(f"problem.file: {file}: no array 'scores'; it has {', '.join(found.files)}")


def _from_parquet(file: Path) -> NDArray:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"problem.file: {file}: not a readable Parquet file ({error})") from error
    experts = [name for name in table.column_names if name not in KEYS]
    for name in experts:
        if not pa.types.is_floating(table.schema.field(name).type) or table[name].null_count:
            raise InputError(
                f"problem.file: {file}: column {name!r} is {table.schema.field(name).type} with"
                f" {table[name].null_count} nulls; every column but {', '.join(KEYS)} is an expert's float scores"
            )
    if not experts or not table.num_rows:
        raise InputError(
            f"problem.file: {file}: {table.num_rows} rows, {len(experts)} columns of experts; at least one is needed"
        )
    step, layer, token = (table[k].to_numpy() if k in table.column_names else np.zeros(table.num_rows) for k in KEYS)
    pairs, counts = np.unique(np.stack([step, layer], axis=1), axis=0, return_counts=True)
    steps, layers = len(np.unique(step)), len(np.unique(layer))
    if len(set(counts)) > 1 or len(pairs) != steps * layers:
        raise InputError(
            f"problem.file: {file}: every (step, layer) needs as many tokens; {len(pairs)} of {steps} x {layers} are"
            f" there, with {sorted(set(counts.tolist()))} tokens"
        )
    values = np.stack([table[name].to_numpy() for name in experts], axis=1)
    return values[np.lexsort((token, layer, step))].reshape(steps, layers, counts[0], len(experts))
