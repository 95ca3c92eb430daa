"""Text for small language models, as bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import InputError


def load(name: str, base: Path) -> NDArray[np.uint8]:
    """Return a corpus: `python_docs` (with every Python), a known one that was fetched, or any text file.

    Raises:
        InputError: no such file.
    """
    if name == "python_docs":
        from pydoc_data.topics import topics

        return np.frombuffer("\n\n".join(topics[key] for key in sorted(topics)).encode(), np.uint8)
    file = base / name
    if not file.is_file():
        raise InputError(
            f"problem.corpus: {name!r}: no such file; give python_docs (part of every Python), or a text file"
            " beside the scenario"
        )
    return np.frombuffer(file.read_bytes(), np.uint8)
