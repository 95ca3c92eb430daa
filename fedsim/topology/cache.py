"""Answers that took long to compute, kept by content: the same question is never solved twice.

Files live under `$FEDSIM_CACHE`, else `$XDG_CACHE_HOME/fedsim`, else `~/.cache/fedsim`.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

VERSION = 2  # raised whenever a solver's answers change


def folder() -> Path:
    """Return the cache folder (it may not exist)."""
    own = os.environ.get("FEDSIM_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedsim"


def load(what: str, content: tuple[Any, ...]) -> dict[str, np.ndarray] | None:
    """Return the arrays saved for this content, or None; an unreadable file counts as none."""
    try:
        with _place(what, content).open("rb") as file, np.load(file, allow_pickle=False) as saved:
            return dict(saved)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def save(what: str, content: tuple[Any, ...], arrays: dict[str, np.ndarray]) -> None:
    """Save arrays under their content; a cache that cannot be written is no error."""
    place = _place(what, content)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place.parent, suffix=".tmp", delete=False) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(file.name, place)
    except OSError:
        return


def _place(what: str, content: tuple[Any, ...]) -> Path:
    digest = hashlib.sha256(f"{what} {VERSION}".encode())
    for item in content:
        array = np.asarray(item)
        digest.update(f"{array.dtype.kind} {array.shape} ".encode())
        digest.update(str(item).encode() if array.dtype.kind in "US" else np.ascontiguousarray(array).tobytes())
    return folder() / what / f"{digest.hexdigest()[:32]}.npz"
