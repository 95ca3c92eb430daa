"""The catalogue's sets as records: scikit-learn's own, tables, images."""

from __future__ import annotations

import gzip
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Gt
from numpy.typing import NDArray
from pydantic import AllowInfNan

from fedsim.problems.data import catalogue
from fedsim.problems.data.files import csv_columns
from fedsim.problems.data.source import Source, Surroundings
from fedsim.problems.data.table import Constant, Data, Task, checked, encode


@dataclass(frozen=True, kw_only=True)
class KnownSource(Source):
    """Base of the sets in the catalogue; `set_name` is its row there."""

    set_name: ClassVar[str]

    def facts(self) -> dict[str, Any]:
        """Return package, version, licence and sums of the set."""
        row = catalogue.known(self.set_name)
        return {
            "set": row.name,
            "package": f"{row.package} {row.version}".strip(),
            "licence": row.licence,
            "sha256": dict(row.files),
        }


@dataclass(frozen=True, kw_only=True)
class Bundled(KnownSource):
    """Base of the sets that scikit-learn carries."""

    task: ClassVar[Task] = "multiclass"
    constant: ClassVar[Constant] = "refuse"
    arguments: ClassVar[dict[str, Any]] = {}

    def read(self, around: Surroundings) -> Data:
        """Return the set in its original units."""
        import sklearn.datasets

        bunch = getattr(sklearn.datasets, f"load_{self.set_name}")(**self.arguments)
        features = np.ascontiguousarray(bunch.data, dtype=np.float64)
        names = tuple(map(str, bunch.feature_names))
        classes = () if self.task == "regression" else tuple(map(str, bunch.target_names))
        labels = bunch.target.astype(np.float64 if self.task == "regression" else np.int64)
        columns = {} if self.constant == "keep" else dict(zip(names, features.T, strict=True))
        return checked(Data(features, labels, columns, self.set_name, self.task, classes, names), self.constant)


@dataclass(frozen=True, kw_only=True)
class BreastCancer(Bundled):
    """Breast cancer Wisconsin: 569 tumours, 30 measurements, malignant (0) or benign (1)."""

    set_name: ClassVar[str] = "breast_cancer"
    task: ClassVar[Task] = "binary"


@dataclass(frozen=True, kw_only=True)
class Diabetes(Bundled):
    """Diabetes: 442 patients, 10 measurements in their own units, progression after a year."""

    set_name: ClassVar[str] = "diabetes"
    task: ClassVar[Task] = "regression"
    arguments: ClassVar[dict[str, Any]] = {"scaled": False}


@dataclass(frozen=True, kw_only=True)
class Digits(Bundled):
    """Handwritten digits: 1,797 images of 8 x 8 pixels with values 0 to 16; some pixels never vary."""

    set_name: ClassVar[str] = "digits"
    constant: ClassVar[Constant] = "keep"


@dataclass(frozen=True, kw_only=True)
class Iris(Bundled):
    """Iris: 150 flowers, 4 lengths in cm, three kinds."""

    set_name: ClassVar[str] = "iris"


@dataclass(frozen=True, kw_only=True)
class Wine(Bundled):
    """Wine: 178 wines, 13 measurements, three growers."""

    set_name: ClassVar[str] = "wine"


@dataclass(frozen=True, kw_only=True)
class PackagedTable(KnownSource):
    """Base of the tables in the catalogue: one CSV file each."""

    label: ClassVar[str]
    drop: ClassVar[tuple[str, ...]] = ()
    task: ClassVar[Literal["regression", "classification"]] = "regression"
    missing_text: ClassVar[Literal["refuse", "zeros"]] = "refuse"

    def read(self, around: Surroundings) -> Data:
        """Return the table's records.

        Raises:
            InputError: the set is not here; the message is the command that brings it.
        """
        (path,) = catalogue.files(self.set_name).values()
        return encode(
            csv_columns(path),
            self.label,
            self.set_name,
            drop=self.drop,
            task=self.task,
            missing_text=self.missing_text,
        )


@dataclass(frozen=True, kw_only=True)
class Adult(PackagedTable):
    """Adult census income: 48,842 people, 104 features after one-hot, `<=50K` (0) or `>50K` (1).

    The survey weight `fnlwgt` is no feature. Its 6,465 missing cells are all text: a row of zeros in their block.
    """

    set_name: ClassVar[str] = "adult"
    label: ClassVar[str] = "class"
    drop: ClassVar[tuple[str, ...]] = ("fnlwgt",)
    task: ClassVar[Literal["regression", "classification"]] = "classification"
    missing_text: ClassVar[Literal["refuse", "zeros"]] = "zeros"


@dataclass(frozen=True, kw_only=True)
class CaliforniaHousing(PackagedTable):
    """California housing: 20,640 districts, 8 features, median house value in 100,000 dollars."""

    set_name: ClassVar[str] = "california_housing"
    label: ClassVar[str] = "MedHouseVal"


@dataclass(frozen=True, kw_only=True)
class Bike(PackagedTable):
    """Bike sharing: 17,379 hours, rentals in that hour; season and weather one-hot."""

    set_name: ClassVar[str] = "bike"
    label: ClassVar[str] = "count"


@dataclass(frozen=True, kw_only=True)
class Images(KnownSource):
    """Base of the image sets in idx files: 60,000 images to train on; the 10,000 to test on are held out.

    Attributes:
        mean, deviation: pixels in [0, 1], less `mean`, over `deviation` (often 0.1307 and 0.3081, those of MNIST).
    """

    classes: ClassVar[tuple[str, ...]] = tuple("0123456789")
    mean: Annotated[float, AllowInfNan(False)] = 0.0
    deviation: Annotated[float, Gt(0)] = 1.0

    def read(self, around: Surroundings) -> Data:
        """Return the images as rows of pixels; `held_out`, where given, is split off the training images instead.

        Raises:
            InputError: the set is not here; the message is the command that brings it.
        """
        paths = {name.removesuffix(".gz"): path for name, path in catalogue.files(self.set_name).items()}
        train = checked(self._part(paths, "train"), "keep")
        return train if self.held_out else replace(train, held_out=self._part(paths, "t10k"))

    def _part(self, paths: dict[str, Path], part: str) -> Data:
        images = read_idx(paths[f"{part}-images-idx3-ubyte"])
        labels = read_idx(paths[f"{part}-labels-idx1-ubyte"]).astype(np.int64)
        features = images.reshape(len(images), -1) / 255.0
        if (self.mean, self.deviation) != (0.0, 1.0):
            features = (features - self.mean) / self.deviation
        names = tuple(f"pixel{j}" for j in range(features.shape[1]))
        return Data(features, labels, {}, self.set_name, "multiclass", self.classes, names)


@dataclass(frozen=True, kw_only=True)
class Mnist(Images):
    """MNIST: 60,000 handwritten digits, 28 x 28 pixels."""

    set_name: ClassVar[str] = "mnist"


@dataclass(frozen=True, kw_only=True)
class FashionMnist(Images):
    """Fashion-MNIST: 60,000 pictures of clothes, 28 x 28 pixels."""

    set_name: ClassVar[str] = "fashion_mnist"
    classes: ClassVar[tuple[str, ...]] = (
        "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
    )  # fmt: skip


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Return the array of an idx file of bytes (gzip or not), in its own shape."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    dims = content[3]
    shape = np.frombuffer(content, dtype=">u4", count=dims, offset=4)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dims).reshape(shape)
