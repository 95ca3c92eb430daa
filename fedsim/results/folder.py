"""The folder that a run leaves behind. Every file is written under a temporary name and renamed."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.errors import InputError

if TYPE_CHECKING:
    import numpy as np

RUN = "run.json"
SCENARIO = "scenario.yaml"
CHECKPOINT = "checkpoint"
MANIFEST = "manifest.json"
WORDS = ("inf", "-inf", "nan")
NAMES = ("name", "variant", "folder", "claim")


class RunFolder:
    """Writes `scenario.yaml`, `run.json` and `checkpoint/` so that a killed run leaves whole files only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def write_scenario(self, text: str) -> None:
        """Write the resolved scenario."""
        write_whole(self.path / SCENARIO, text)

    def write_run(self, facts: dict[str, Any]) -> None:
        """Write `run.json`: status, versions, machine, seed, digest, constants, totals."""
        write_whole(self.path / RUN, to_json(facts) + "\n")

    def read_run(self) -> dict[str, Any]:
        """Return what `run.json` says.

        Raises:
            InputError: the folder holds no run.
        """
        file = self.path / RUN
        if not file.exists():
            raise InputError(f"{self.path}: no {RUN} here; give the folder of a run")
        return from_json(file.read_text())

    def save_checkpoint(self, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
        """Write a new checkpoint; the manifest, renamed last, is what makes it the one that counts."""
        import numpy as np

        root = self.path / CHECKPOINT
        root.mkdir(exist_ok=True)
        name = f"state-{facts['rows']:08d}.npz"
        temporary = root / (name + ".tmp")
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, root / name)
        write_whole(root / MANIFEST, json.dumps({**facts, "file": name}) + "\n")
        for old in root.glob("state-*"):
            if old.name != name:
                old.unlink()

    def load_checkpoint(self) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Return the arrays and facts of the last whole checkpoint, or None."""
        import numpy as np

        manifest = self.path / CHECKPOINT / MANIFEST
        if not manifest.exists():
            return None
        facts = json.loads(manifest.read_text())
        with np.load(self.path / CHECKPOINT / facts["file"], allow_pickle=False) as file:
            return {name: file[name] for name in file.files}, facts

    def clear(self) -> None:
        """Remove what an earlier run observed and saved here, and nothing else."""
        for name in ("metrics.arrows", "metrics.parquet", "queries.parquet", "study.json"):
            (self.path / name).unlink(missing_ok=True)
        for name in (CHECKPOINT, "plots"):
            shutil.rmtree(self.path / name, ignore_errors=True)


def to_json(facts: Any) -> str:
    """Return JSON that any program reads: infinite numbers are the words inf, -inf and nan, paths are text."""
    return json.dumps(_in_words(facts), indent=2, allow_nan=False, default=str)


def from_json(text: str) -> Any:
    """Return what `to_json` wrote; names stay words."""
    return json.loads(text, object_hook=lambda found: {k: _as_number(k, v) for k, v in found.items()})


def _in_words(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _in_words(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_in_words(inner) for inner in value]
    return str(float(value)) if isinstance(value, float) and not math.isfinite(value) else value


def _as_number(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_as_number(key, inner) for inner in value]
    return float(value) if isinstance(value, str) and value in WORDS and key not in NAMES else value


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
