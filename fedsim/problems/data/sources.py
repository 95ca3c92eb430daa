"""`data:` of a scenario becomes records: the table of kinds, and `load`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.problems.data.choice import choose
from fedsim.problems.data.files import Csv, Libsvm, Npz, Parquet
from fedsim.problems.data.known import (
    Adult,
    Bike,
    BreastCancer,
    CaliforniaHousing,
    Diabetes,
    Digits,
    FashionMnist,
    Iris,
    Mnist,
    Wine,
)
from fedsim.problems.data.source import Source, Surroundings
from fedsim.problems.data.synthetic import (
    DadaoClassification,
    DadaoRegression,
    SyntheticClassification,
    SyntheticLasso,
    SyntheticRegression,
    TeacherNetwork,
)
from fedsim.problems.data.table import Data
from fedsim.problems.data.texts import KingJames, Presidents, PythonDocs, TextFile

KINDS: dict[str, type[Source]] = {
    "breast_cancer": BreastCancer,
    "diabetes": Diabetes,
    "digits": Digits,
    "iris": Iris,
    "wine": Wine,
    "adult": Adult,
    "bike": Bike,
    "california_housing": CaliforniaHousing,
    "fashion_mnist": FashionMnist,
    "mnist": Mnist,
    "python_docs": PythonDocs,
    "king_james": KingJames,
    "presidents": Presidents,
    "text": TextFile,
    "csv": Csv,
    "parquet": Parquet,
    "npz": Npz,
    "libsvm": Libsvm,
    "synthetic_regression": SyntheticRegression,
    "synthetic_classification": SyntheticClassification,
    "synthetic_lasso": SyntheticLasso,
    "teacher_network": TeacherNetwork,
    "dadao_regression": DadaoRegression,
    "dadao_classification": DadaoClassification,
}


def load(spec: Mapping[str, Any], base: Path, n: int | None = None, seed: int = 0) -> Data:
    """Return the records that `spec` names, scaled as it says.

    Args:
        spec: `{kind: ..., normalise: ..., bias: ..., and the kind's own keys}`.
        base: folder that relative file names start from (the scenario's).
        n: number of nodes, which synthetic kinds need. seed: the scenario's, for synthetic kinds without their own.

    Raises:
        InputError: unknown kind or key, a set that is not here, records that cannot be used.
    """
    return choose(spec, KINDS, "data").load(Surroundings(base, n, seed))
