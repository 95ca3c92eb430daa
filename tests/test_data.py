"""Records: what is read, how it is scaled, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.errors import InputError
from fedsim.problems.data.known import read_idx
from fedsim.problems.data.sources import KINDS, load

HERE = Path(".")


def refusal(spec: dict[str, Any], base: Path = HERE, n: int | None = None) -> str:
    """Return the message with which `spec` is refused."""
    with pytest.raises(InputError) as error:
        load(spec, base, n)
    return str(error.value)


def csv(folder: Path, text: str, **keys: Any) -> dict[str, Any]:
    """Write a CSV file and return the spec that reads it."""
    (folder / "t.csv").write_text(text)
    return {"kind": "csv", "file": "t.csv", "label": "y", **keys}


# bundled sets and scaling


@pytest.mark.parametrize(
    ("kind", "shape", "task"),
    [
        ("breast_cancer", (569, 30), "binary"),
        ("diabetes", (442, 10), "regression"),
        ("digits", (1797, 64), "multiclass"),
        ("iris", (150, 4), "multiclass"),
        ("wine", (178, 13), "multiclass"),
    ],
)
def test_bundled_sets(kind: str, shape: tuple[int, int], task: str) -> None:
    """Every set that scikit-learn carries is read in its own size, with finite float64 features."""
    data = load({"kind": kind}, HERE)
    assert data.features.shape == shape
    assert data.features.dtype == np.float64
    assert len(data) == shape[0]
    assert data.task == task
    assert (data.labels.dtype == np.float64) == (task == "regression")
    assert len(data.feature_names) == shape[1]


def test_normalise_columns() -> None:
    """`columns` gives every column mean 0 and deviation 1."""
    data = load({"kind": "wine", "normalise": "columns"}, HERE)
    np.testing.assert_allclose(data.features.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(data.features.std(axis=0), 1, atol=1e-12)


@pytest.mark.parametrize("how", ["rows", "both"])
def test_normalise_rows(how: str) -> None:
    """`rows` and `both` give every record Euclidean norm 1."""
    data = load({"kind": "wine", "normalise": how}, HERE)
    np.testing.assert_allclose(np.linalg.norm(data.features, axis=1), 1, atol=1e-12)


def test_bias_is_added_after_scaling() -> None:
    """The intercept is a last column of ones, whatever the scaling."""
    data = load({"kind": "wine", "normalise": "both", "bias": True}, HERE)
    assert data.features.shape == (178, 14)
    assert np.all(data.features[:, -1] == 1.0)
    assert data.feature_names[-1] == "bias"


def test_pixels_that_never_vary_stay_zero() -> None:
    """Standardised digits have no NaN: pixels that never vary are 0."""
    raw, scaled = load({"kind": "digits"}, HERE), load({"kind": "digits", "normalise": "columns"}, HERE)
    flat = np.ptp(raw.features, axis=0) == 0
    assert flat.any()
    assert np.all(scaled.features[:, flat] == 0)
    assert np.isfinite(scaled.features).all()


def test_signs() -> None:
    """A binary set gives its labels as -1 and +1 in class order; a multiclass set refuses to."""
    data = load({"kind": "breast_cancer"}, HERE)
    assert data.classes == ("malignant", "benign")
    assert set(data.signs) == {-1.0, 1.0}
    assert np.array_equal(data.signs > 0, data.labels == 1)
    with pytest.raises(InputError, match="multiclass"):
        _ = load({"kind": "iris"}, HERE).signs


# the user's files


def test_csv_with_text(tmp_path: Path) -> None:
    """Text columns become one column per value in sorted order; text labels become classes in sorted order."""
    data = load(csv(tmp_path, "a,colour,y\n1,red,no\n2,blue,yes\n3.5,red,no\n"), tmp_path)
    assert data.feature_names == ("a", "colour=blue", "colour=red")
    assert np.array_equal(data.features, [[1, 0, 1], [2, 1, 0], [3.5, 0, 1]])
    assert (data.task, data.classes, data.labels.tolist()) == ("binary", ("no", "yes"), [0, 1, 0])
    assert list(data.columns["colour"]) == ["red", "blue", "red"]


def test_csv_drop_keeps_the_column_for_partitions(tmp_path: Path) -> None:
    """A dropped column is no feature, but is still there to split by."""
    data = load(csv(tmp_path, "a,site,y\n1,u,0.5\n2,v,0.25\n4,v,1.5\n", drop=["site"]), tmp_path)
    assert data.feature_names == ("a",)
    assert data.task == "regression"
    assert list(data.columns["site"]) == ["u", "v", "v"]


def test_parquet_equals_csv(tmp_path: Path) -> None:
    """The same table gives the same records from CSV and from Parquet."""
    import pyarrow.csv
    import pyarrow.parquet

    spec = csv(tmp_path, "a,b,c,y\n1,true,x,1\n2,false,z,0\n3,true,x,1\n")
    pyarrow.parquet.write_table(pyarrow.csv.read_csv(tmp_path / "t.csv"), tmp_path / "t.parquet")
    one = load(spec, tmp_path)
    two = load({"kind": "parquet", "file": "t.parquet", "label": "y"}, tmp_path)
    assert np.array_equal(one.features, two.features)
    assert np.array_equal(one.labels, two.labels)
    assert one.feature_names == two.feature_names == ("a", "b", "c=x", "c=z")


def test_npz(tmp_path: Path) -> None:
    """An archive gives features, labels, and every other array of the same length as a column."""
    X = np.arange(8.0).reshape(4, 2)
    np.savez(tmp_path / "t.npz", X=X, y=np.array(["b", "a", "a", "b"]), client=np.array([0, 0, 1, 1]), other=np.eye(3))
    data = load({"kind": "npz", "file": "t.npz"}, tmp_path)
    assert np.array_equal(data.features, X)
    assert (data.classes, data.labels.tolist()) == (("a", "b"), [1, 0, 0, 1])
    assert list(data.columns) == ["client"]


def test_libsvm(tmp_path: Path) -> None:
    """LIBSVM lines become dense rows; indices start at 1; labels -1 and +1 are two classes."""
    (tmp_path / "t.svm").write_text("+1 1:0.5 3:2 # a comment\n-1 2:1\n\n+1 1:1 2:4 3:1\n")
    data = load({"kind": "libsvm", "file": "t.svm"}, tmp_path)
    assert np.array_equal(data.features, [[0.5, 0, 2], [0, 1, 0], [1, 4, 1]])
    assert (data.classes, data.signs.tolist()) == (("-1", "1"), [1, -1, 1])
    wide = load({"kind": "libsvm", "file": "t.svm", "dim": 5, "constant": "keep"}, tmp_path)
    assert wide.features.shape == (3, 5)


def test_task_can_be_said(tmp_path: Path) -> None:
    """Whole-numbered labels are refused until the task is said, then taken as said."""
    spec = csv(tmp_path, "a,y\n1,1\n2,2\n3,3\n")
    assert "task: classification or task: regression" in refusal(spec, tmp_path)
    assert load({**spec, "task": "classification"}, tmp_path).task == "multiclass"
    assert load({**spec, "task": "regression"}, tmp_path).labels.tolist() == [1.0, 2.0, 3.0]


def test_constant_columns_can_be_dropped(tmp_path: Path) -> None:
    """A constant column is refused by name, and left out or kept where that is said."""
    spec = csv(tmp_path, "a,b,y\n1,7,0.5\n2,7,1.5\n")
    assert "'b'" in refusal(spec, tmp_path)
    assert "constant: drop" in refusal(spec, tmp_path)
    assert load({**spec, "constant": "drop"}, tmp_path).feature_names == ("a",)
    assert load({**spec, "constant": "keep"}, tmp_path).feature_names == ("a", "b")


@pytest.mark.parametrize(
    ("text", "keys", "words"),
    [
        ("a,b,y\n1,2,0\n,3,1\n2,4,1\n", {}, ["'a'", "1 missing", "record 1"]),
        ("a,b,y\n1,u,0\n2,,1\n", {}, ["'b'", "missing", "drop: [b]"]),
        ("a,y\n1,0\n2,\n", {}, ["'y'", "missing"]),
        ("a,y\n1,0\ninf,1\n", {}, ["'a'", "infinite"]),
        ("a,y\n1,no\n2,no\n", {}, ["one class", "'no'"]),
        ("a,y\n", {}, ["no records"]),
        ("y\n1\n0\n", {}, ["no feature columns"]),
        ("a,y\n1,0\n2,1\n", {"label": "Y"}, ["no column 'Y'", "'a', 'y'"]),
        ("age,y\n1,0\n2,1\n", {"drop": ["aje"]}, ["drop", "did you mean 'age'"]),
        ("a,a,y\n1,2,0\n2,3,1\n", {}, ["two columns", "'a'"]),
        ("a,b,y\n1,2020-01-01,0\n2,2020-01-02,1\n", {}, ["'b'", "neither numbers nor text"]),
        ("a,y\n1,no\n2,yes\n", {"task": "regression"}, ["holds text", "needs numbers"]),
        ("a,y\n1,2,3\n", {}, ["not a readable CSV"]),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, text: str, keys: dict[str, Any], words: list[str]) -> None:
    """A table that cannot be learned from is refused, naming the column and what is wrong with it."""
    message = refusal({**csv(tmp_path, text), **keys}, tmp_path)
    for word in words:
        assert word in message


def test_identifiers_are_refused(tmp_path: Path) -> None:
    """A text column with thousands of values is taken for an identifier, not blown up to thousands of features."""
    lines = "".join(f"{i},id{i},{i % 2}\n" for i in range(1500))
    assert "1500 different values" in refusal(csv(tmp_path, "a,b,y\n" + lines), tmp_path)


def test_arrays_that_are_refused(tmp_path: Path) -> None:
    """NPZ files with NaN, wrong shapes, pickles or missing arrays are refused with the reason."""
    X, y = np.arange(6.0).reshape(3, 2), np.array([0, 1, 1])
    bad = X.copy()
    bad[1, 0] = np.nan
    cases = {
        "record 1": {"X": bad, "y": y},
        "do not fit": {"X": X, "y": y[:2]},
        "no array 'X'": {"features": X, "y": y},
        "not an NPZ file": {"X": X, "y": np.array([{}, {}, {}], dtype=object)},
    }
    for words, arrays in cases.items():
        np.savez(tmp_path / "t.npz", **arrays)  # pyright: ignore[reportArgumentType]
        assert words in refusal({"kind": "npz", "file": "t.npz"}, tmp_path)
    (tmp_path / "t.npz").write_text("no archive")
    assert "not an NPZ file" in refusal({"kind": "npz", "file": "t.npz"}, tmp_path)


@pytest.mark.parametrize(("line", "word"), [("1 a:2", "line 2"), ("1 3:1 3:2", "twice"), ("1 -1:1", "negative")])
def test_libsvm_lines_that_are_refused(tmp_path: Path, line: str, word: str) -> None:
    """A broken LIBSVM line is refused with its number."""
    (tmp_path / "t.svm").write_text(f"0 1:1\n{line}\n")
    assert word in refusal({"kind": "libsvm", "file": "t.svm"}, tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    """A file that does not exist is refused with the full path that was tried."""
    message = refusal({"kind": "csv", "file": "none.csv", "label": "y"}, tmp_path)
    assert str(tmp_path / "none.csv") in message


# the spec itself


def test_unknown_kind_and_keys() -> None:
    """Wrong names and values are all reported at once, with the nearest right name."""
    assert "did you mean 'breast_cancer'" in refusal({"kind": "breast_canser"})
    message = refusal({"kind": "csv", "fil": "a.csv", "label": "y", "normalise": "cols"})
    assert "did you mean 'file'" in message
    assert "data.normalise" in message
    assert "data.file: field required" in message


# synthetic sets


SYNTHETIC = ["synthetic_regression", "synthetic_classification", "dadao_regression", "dadao_classification"]


@pytest.mark.parametrize("kind", SYNTHETIC)
def test_synthetic_depends_on_seed_and_node_only(kind: str) -> None:
    """A node's records do not depend on the number of nodes; another seed gives others; global state is not used."""
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002  # pyright: ignore
    few, many = load({"kind": kind}, HERE, n=2), load({"kind": kind}, HERE, n=5)
    assert np.array_equal(few.features, many.features[:200])
    assert np.array_equal(few.labels, many.labels[:200])
    assert np.array_equal(many.columns["node"], np.repeat(np.arange(5), 100))
    assert not np.array_equal(few.features, load({"kind": kind, "seed": 1}, HERE, n=2).features)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_synthetic_needs_nodes() -> None:
    """A synthetic set without the number of nodes is refused."""
    assert "number of nodes" in refusal({"kind": "synthetic_regression"})


def test_heterogeneity_moves_local_minimisers() -> None:
    """Without heterogeneity or noise all nodes have one least-squares solution; with it they lie about h apart."""

    def solutions(h: float) -> np.ndarray:
        data = load({"kind": "synthetic_regression", "noise": 0, "dim": 5, "heterogeneity": h}, HERE, n=40)
        pairs = zip(np.split(data.features, 40), np.split(data.labels, 40), strict=True)
        return np.stack([np.linalg.lstsq(a, c, rcond=None)[0] for a, c in pairs])

    same, apart = solutions(0.0), solutions(3.0)
    np.testing.assert_allclose(same, same[:1].repeat(40, axis=0), atol=1e-10)
    assert 2.0 < apart.std(axis=0).mean() < 4.0


def test_shift_moves_features() -> None:
    """`shift` moves the mean of a node's features by about that much per coordinate."""
    spec = {"kind": "synthetic_classification", "samples": 400, "shift": 2.0, "classes": 3}
    data = load(spec, HERE, n=50)
    means = np.stack([part.mean(axis=0) for part in np.split(data.features, 50)])
    assert 1.7 < means.std() < 2.3
    assert data.task == "multiclass"


def test_dadao_recipe() -> None:
    """The DADAO regression nodes have unrelated positive coefficients up to 100, times a factor up to 5."""
    data = load({"kind": "dadao_regression", "dim": 3, "noise": 0, "samples": 50}, HERE, n=200)
    pairs = zip(np.split(data.features, 200), np.split(data.labels, 200), strict=True)
    found = np.stack([np.linalg.lstsq(a, c, rcond=None)[0] for a, c in pairs])
    assert found.min() >= -1e-9
    assert found.max() <= 500
    assert 110 < found.mean() < 142  # 50 * 2.505 = 125, four standard errors of 200 nodes


def test_every_kind_says_what_it_is() -> None:
    """Every kind has a docstring, which is what lists and documentation print."""
    for kind, cls in KINDS.items():
        assert cls.__doc__, kind
        assert not cls.__doc__.startswith(cls.__name__ + "("), kind


def test_idx_files(tmp_path: Path) -> None:
    """An idx file of bytes is read in its own shape, gzipped or not."""
    import gzip

    images = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    content = bytes([0, 0, 8, 3]) + np.array([2, 3, 4], dtype=">u4").tobytes() + images.tobytes()
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "a.gz").write_bytes(gzip.compress(content))
    assert np.array_equal(read_idx(tmp_path / "a"), images)
    assert np.array_equal(read_idx(tmp_path / "a.gz"), images)
