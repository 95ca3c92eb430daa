"""All processes of a job must play the same: checked once, before anything else travels between them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.errors import RunError

if TYPE_CHECKING:
    from fedsim.scenario import Study
    from fedsim.transport.transport import Transport

PACKAGES = ("fedsim", "numpy", "torch", "numba")
NOT_COMPARED = ("name", "claim")


def refuse_disagreement(study: Study, transport: Transport) -> None:
    """Compare versions and scenarios of all processes.

    Raises:
        RunError: two differ; names the first rank that differs from rank 0, what differs, and both values.
    """
    if transport.size == 1:
        return
    mine = json.dumps({"versions": {name: version(name) for name in PACKAGES}, "runs": _content(study)}, default=str)
    parts = [json.loads(p.tobytes()) for p in transport.all_gather(np.frombuffer(mine.encode(), np.uint8))]
    for rank, other in enumerate(parts):
        for where, here, there in _differences(parts[0], other):
            raise RunError(f"ranks disagree: {where} is {here!r} on rank 0 and {there!r} on rank {rank}")


def _content(study: Study) -> dict[str, Any]:
    return {run.folder: {k: v for k, v in _of(run).items() if k not in NOT_COMPARED} for run in study.runs}


def _of(run: Any) -> dict[str, Any]:
    return {**run.content(), "source of": dict(run.sources), "objects": list(run.live)}


def _differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, value in a, value in b) for all that differs."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            yield from _differences(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    elif a != b:
        yield path, a, b
