"""Where router scores come from: synthetic batches with named skews, and recordings."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import InputError

Workload = Literal[
    "balanced", "skew", "hot_experts", "hot_host", "spread_hot", "zero_expert_host", "rotating", "burst", "drift"
]
MOVING = ("rotating", "burst", "drift")
ScoreFunc = Literal["sigmoid", "softmax", "sqrtsoftplus"]


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
        return 1 / (1 + np.exp(-logits))
    if score_func == "softmax":
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)
    return np.sqrt(np.logaddexp(0.0, logits))


def recorded(file: Path) -> NDArray:
    """Return recorded scores as `[steps, layers, tokens, E]` from .npy, .npz (`scores`) or Parquet.

    Arrays of 2, 3 or 4 axes are tokens x experts, layers in front of them, steps in front of those. A Parquet table has
    one column per expert, and columns `step` and `layer` where there are several; rows are tokens, as many for each.

    Raises:
        InputError: no such file, another shape, or values that are not finite.
    """
    if not file.is_file():
        raise InputError(f"problem.file: {file}: no such file; .npy, .npz or .parquet of router scores is needed")
    if file.suffix == ".parquet":
        array = _from_parquet(file)
    elif file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as content:
            if "scores" not in content.files:
                raise InputError(f"problem.file: {file}: no array 'scores'; it has {', '.join(content.files)}")
            array = content["scores"]
    elif file.suffix == ".npy":
        array = np.load(file, allow_pickle=False)
    else:
        raise InputError(f"problem.file: {file.name}: .npy, .npz or .parquet is needed")
    if array.ndim not in (2, 3, 4) or 0 in array.shape:
        raise InputError(
            f"problem.file: {file}: shape {array.shape}; [tokens, experts], [layers, tokens, experts] or"
            " [steps, layers, tokens, experts] is needed"
        )
    if array.dtype not in (np.float32, np.float64) or not np.isfinite(array).all():
        raise InputError(f"problem.file: {file}: finite float32 or float64 scores are needed, {array.dtype} found")
    return np.ascontiguousarray(array.reshape((1,) * (4 - array.ndim) + array.shape))


def _from_parquet(file: Path) -> NDArray:
    import pyarrow.parquet as pq

    table = pq.read_table(file)
    experts = [name for name in table.column_names if name not in ("step", "layer", "token")]
    values = np.stack([table[name].to_numpy() for name in experts], axis=1)
    parts = {n: table[n].to_numpy() if n in table.column_names else np.zeros(len(values)) for n in ("step", "layer")}
    order = np.lexsort((parts["layer"], parts["step"]))
    pairs, counts = np.unique(np.stack([parts["step"], parts["layer"]], axis=1), axis=0, return_counts=True)
    steps = len(np.unique(pairs[:, 0]))
    if len(set(counts)) > 1 or len(pairs) % steps:
        raise InputError(f"problem.file: {file}: every (step, layer) needs as many tokens; they have {sorted(counts)}")
    return values[order].reshape(steps, len(pairs) // steps, counts[0], len(experts))
