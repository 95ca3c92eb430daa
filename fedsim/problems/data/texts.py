"""Text as records: sequences of characters, each from one section (a topic, a book, a speaker)."""

from __future__ import annotations

import io
import json
import re
import tarfile
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge

from fedsim.errors import InputError
from fedsim.problems.data import catalogue
from fedsim.problems.data.known import KnownSource
from fedsim.problems.data.source import Source, Surroundings
from fedsim.problems.data.table import Data


@dataclass(frozen=True, kw_only=True)
class Text(Source):
    """Base of the text kinds: every record is `sequence` characters and the one after them.

    A record's features are codes of its `sequence + 1` characters, and its class is its section: `sorted`, `shards`,
    `dirichlet` or `column: section` give nodes different speakers. Sections are cut from their beginnings; a rest
    shorter than a sequence is left out, and so are sections without a record.

    Attributes:
        sequence: characters that a model reads at a time.
    """

    sequence: Annotated[int, Ge(1)] = 64
    name: ClassVar[str]

    @abstractmethod
    def sections(self, around: Surroundings) -> Mapping[str, str]:
        """Return the texts by the names of their sections."""

    def read(self, around: Surroundings) -> Data:
        """Return the sequences, section after section.

        Raises:
            InputError: the text is not here or too short, or is to be scaled.
        """
        for key in ("normalise", "target", "bias"):
            if getattr(self, key) not in ("none", "given", False):
                raise InputError(f"data.{key}: features of text are codes of characters, not quantities; leave it out")
        return records(self.sections(around), self.sequence, self.name)


def records(sections: Mapping[str, str], sequence: int, name: str) -> Data:
    """Return the sequences of some texts as a table.

    Raises:
        InputError: no section has as many characters as a sequence.
    """
    kept = {title: text for title, text in sections.items() if len(text) > sequence}
    if not kept:
        longest = max(map(len, sections.values()), default=0)
        raise InputError(f"data {name!r}: sequences of {sequence} characters need {sequence + 1} at least; the longest"
                         f" section has {longest}")  # fmt: skip
    vocabulary, cut = tuple(sorted(set().union(*map(set, kept.values())))), []
    code = np.zeros(max(map(ord, vocabulary)) + 1, np.int64)
    code[[ord(c) for c in vocabulary]] = np.arange(len(vocabulary))
    for text in kept.values():
        points = code[np.frombuffer(text.encode("utf-32-le"), np.uint32)]
        cut.append(np.lib.stride_tricks.sliding_window_view(points, sequence + 1)[::sequence])
    titles = np.repeat(np.array(list(kept), dtype=object), [len(part) for part in cut])
    labels = np.repeat(np.arange(len(kept)), [len(part) for part in cut])
    return Data(
        features=np.concatenate(cut).astype(np.float64),
        labels=labels,
        columns={"section": titles},
        name=name,
        task="binary" if len(kept) == 2 else "multiclass",
        classes=tuple(kept),
        feature_names=tuple(f"character{j}" for j in range(sequence + 1)),
        vocabulary=vocabulary,
    )


@dataclass(frozen=True, kw_only=True)
class PythonDocs(Text):
    """Python's own help texts: 0.46 million characters in some 80 topics, part of every Python (PSF licence).

    The text is that of the Python that runs, so it differs a little between versions.
    """

    name: ClassVar[str] = "python_docs"

    def sections(self, around: Surroundings) -> Mapping[str, str]:
        """Return the topics."""
        from pydoc_data.topics import topics

        return dict(sorted(topics.items()))


@dataclass(frozen=True, kw_only=True)
class TextFile(Text):
    """Your own text in UTF-8: one file, or a folder of `.txt` files, each a section (a speaker, say).

    Attributes:
        file: its path, from the scenario's folder where it is relative.
    """

    name: ClassVar[str] = "text"
    file: str

    def sections(self, around: Surroundings) -> Mapping[str, str]:
        """Return the files' texts by their names."""
        path = around.base / Path(self.file).expanduser()
        found = sorted(path.glob("*.txt")) if path.is_dir() else [path] if path.is_file() else []
        if not found:
            raise InputError(f"data.file: there is no text file, and no folder of .txt files, at {path}")
        try:
            return {each.stem: each.read_text(encoding="utf-8") for each in found}
        except UnicodeDecodeError as error:
            raise InputError(f"data.file: {path} is not text in UTF-8: {error}") from None


@dataclass(frozen=True, kw_only=True)
class KingJames(Text, KnownSource):
    """King James bible: 4.3 million characters in 66 books, verses numbered."""

    name: ClassVar[str] = "king_james"
    set_name: ClassVar[str] = "king_james"

    def sections(self, around: Surroundings) -> Mapping[str, str]:
        """Return the books; a module of the package is read as a file, never imported."""
        (path,) = catalogue.files(self.set_name).values()
        source = path.read_text(encoding="utf-8")
        begin = source.index('"""') + 3
        end = source.index('"""', begin)
        starts: dict[int, int] = {}
        for verse, place in re.findall(r"(\d{7,8}): (\d+),", source[end:]):  # book, chapter, verse as one number
            starts.setdefault(int(verse) // 1_000_000, int(place))
        names = re.findall(r'Book\.\w+: "([^"]+)"', source[end:])  # short ones first, then long ones
        cuts = [begin + starts[book] for book in sorted(starts)] + [end]
        return {name: source[cuts[k] : cuts[k + 1]] for k, name in enumerate(names[: len(starts)])}


@dataclass(frozen=True, kw_only=True)
class Presidents(Text, KnownSource):
    """State of the Union addresses, 1790 to 2021: 10.8 million characters by 43 presidents."""

    name: ClassVar[str] = "presidents"
    set_name: ClassVar[str] = "presidents"

    def sections(self, around: Surroundings) -> Mapping[str, str]:
        """Return each president's speeches, one after the other."""
        (path,) = catalogue.files(self.set_name).values()
        speeches: dict[str, str] = {}
        with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as tar:
            for member in sorted(
                m.name for m in tar if m.name.startswith("package/data/") and m.name.endswith(".json")
            ):
                stream = tar.extractfile(member)
                speech = json.loads(stream.read()) if stream else {}
                speeches[speech["name"]] = speeches.get(speech["name"], "") + speech["text"] + "\n"
        return speeches
